"""Stage 3: measures, one's own pictures, reports.

    python evaluate.py --checkpoint runs/pretrain/last.pt --data DIR --json FILE --sheet FILE.png   # held-out pictures
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --split val              # official measures
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --split test --submit FILE    # a server's
    python evaluate.py --task caption --score RESULTS --against ANNOTATIONS --json FILE             # anybody's results
    python evaluate.py --checkpoint runs/pretrain/last.pt --image PICTURE... --output OUT           # one's own pictures
    python evaluate.py --report RUN [RUN ...] --output OUT                                          # runs on one page

This file, in order: words and what they say of a picture; the measures of pre-training; the official scores of the five
tasks of section 5.1 and the files that they are computed from; what a model answers to the tasks; one picture (the
class Viewer), drawing, one's own pictures; the report of a run; the command.

Pre-trained models: beside each measure stands `blind_...`: the same model and the same inputs with every picture
replaced by the mean picture. What is left then is what the words alone, or habit alone, give away.

The words of a sentence are checked against the annotation: an object phrase is a name of the label sets with the
attribute words right before it ("small red circle"). It is true of a picture if one annotated object has that name and
all of these attributes. Nothing else is parsed, so a sentence may have other faults that these measures do not see.
"""

import argparse
import base64
import contextlib
import glob
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from html import escape

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # macOS: what MPS lacks runs on the CPU; torch reads it once

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import map_coordinates
from torchvision.ops import box_iou
from tqdm import tqdm

from data import (
    FORMATS,
    LARGEST,
    HelpFormatter,
    InputError,
    Tokenizer,
    attempt,
    check_names,
    command,
    decodable,
    gathered,
    index_pretraining,
    index_task,
    is_usable,
    launch,
    load_picture,
    mask_words,
    normalise_answer,
    other_sentence,
    pad_pictures,
    pad_tokens,
    progressed,
    read_json,
    read_vg,
    resized,
    say_first,
    start_processes,
    stop_processes,
    to_pixels,
    write_safely,
)
from matcher import hungarian_match
from model import E2EVLP, TASKS, load_checkpoint

# ----------------------------------------------------------------------------------------------------------------
# Words and what they say of a picture


class Phrases:
    """Finds object phrases in sentences and tells whether they are true of a picture."""

    def __init__(self, names):
        """names: {"coco": [...], "vg": [...], "attributes": [...]}, each a name with its synonyms after commas."""
        self.objects = {}  # each name and synonym -> (label, which of the synonyms it is, so that plurals meet plurals)
        self.source = "vg" if names["vg"] else "coco"
        self.labels = [line.split(",") for line in names[self.source]]
        self.attribute_names = [line.split(",") for line in names["attributes"]] if self.source == "vg" else []
        for label, synonyms in enumerate(self.labels):
            for form, name in enumerate(synonyms):
                self.objects.setdefault(name, (label, form))
        self.attributes = {}
        for label, synonyms in enumerate(self.attribute_names):
            for name in synonyms:
                self.attributes.setdefault(name, label)
        self.seen, self.together = set(), set()  # attributes met, and pairs met on one object

    def learn(self, pictures):
        """Note which attributes occur on one object: those that never do (red, blue) can replace one another."""
        for picture in pictures:
            for _, attributes in self.facts(picture) or ():
                self.seen |= attributes
                self.together |= {(a, b) for a in attributes for b in attributes}
        return self

    def facts(self, picture):
        """[(label, {attributes})] of a picture's objects, or None if it is not annotated."""
        annotation = getattr(picture, self.source)
        if annotation is None:
            return None
        attributes = annotation[2] if self.source == "vg" else [()] * len(annotation[1])
        return [(int(label), set(a)) for label, a in zip(annotation[1], attributes)]

    def find(self, sentence):
        """[(words before it: [(start, end, attribute)], (start, end, label, form))] with places in characters."""
        words = [(m.group(), *m.span()) for m in re.finditer(r"[a-z0-9'-]+", sentence.lower())]
        found, before, i = [], [], 0
        while i < len(words):
            for n in (3, 2, 1):  # "stop sign" is one name, not a "stop" and a "sign"
                name = " ".join(w for w, _, _ in words[i:i + n])
                if i + n > len(words) or (name not in self.objects and name not in self.attributes):
                    continue
                place = (words[i][1], words[i + n - 1][2])
                if name in self.objects:
                    found.append((before, (*place, *self.objects[name])))
                    before = []
                else:
                    before = [*before, (*place, self.attributes[name])]
                break
            else:
                n, before = 1, []
            i += n
        return found

    @staticmethod
    def true(facts, label, attributes):
        return any(label == has and set(attributes) <= its for has, its in facts)

    def changes(self, facts, phrase):
        """For each word of a true phrase: (start, end, [words that make it true as well], [words that make it false]).

        The picture decides a word if no other makes the phrase true. A false word is drawn from its likes: another
        name in the same form, or an attribute never met on one object with this one.
        """
        before, (start, end, label, form) = phrase
        attributes = [a for _, _, a in before]
        for at, (s, e, attribute) in enumerate(before):
            rest = attributes[:at] + attributes[at + 1:]
            others = [a for a in self.seen if a != attribute]
            true = [a for a in others if a not in rest and self.true(facts, label, [*rest, a])]
            false = [a for a in sorted(others) if a not in true and (a, attribute) not in self.together
                     and a not in rest]
            yield s, e, true, [self.attribute_names[a][0] for a in false]
        others = [other for other in range(len(self.labels)) if other != label]
        true = [other for other in others if self.true(facts, other, attributes)]
        false = [self.labels[other] for other in others if other not in true]
        yield start, end, true, [names[form] if form < len(names) else names[0] for names in false]

    def decided(self, facts, sentence):
        """Places (start, end) of the sentence's single words that the picture decides, with false words for each."""
        places = []
        for phrase in self.find(sentence):
            if self.true(facts, phrase[1][2], [a for _, _, a in phrase[0]]):
                places += [(s, e, false) for s, e, true, false in self.changes(facts, phrase)
                           if not true and " " not in sentence[s:e]]
        return places

    def all_true(self, facts, sentence):
        """A caption counts if it names at least one object and every object phrase in it is true of the picture."""
        found = self.find(sentence)
        return bool(found) and all(self.true(facts, p[1][2], [a for _, _, a in p[0]]) for p in found)


def questions(pictures, phrases, tokenizer, seed=0, per_picture=4):
    """The sentences each picture is asked about, the same for each model and run: a list with a dict a picture.

    mlm: [(input, labels)], 15 % of the words hidden; visual: the same with one word that the picture decides hidden;
    itm: [(tokens, 1 or 0)], half of them from another picture; foil: the same, half with one decided word made false.
    In validation a hidden word is always [MASK]: a word left in place would flatter a blind model.
    """
    asked = []
    for number, picture in enumerate(pictures):
        rng = random.Random(f"validation {seed} {picture.name}")
        sentences = rng.sample(range(len(picture.sentences)), min(per_picture, len(picture.sentences)))
        facts = phrases.facts(picture)
        q = {"mlm": [], "visual": [], "itm": [], "foil": [], "first": tokenizer.encode(picture.sentences[0])}
        for i, place in enumerate(sentences):
            sentence = picture.sentences[place]
            tokens = tokenizer.encode(sentence)
            labels = mask_words(tokens, tokenizer, rng)[1]
            q["mlm"].append(([tokenizer.mask if label >= 0 else t for t, label in zip(tokens, labels)], labels))
            false = (number + i) % 2
            if false and len(pictures) > 1:
                other = other_sentence(pictures, number, place < picture.captions, rng)
                if other is not None:
                    q["itm"].append((tokenizer.encode(other), 0))
            else:
                q["itm"].append((tokens, 1))
            places = phrases.decided(facts, sentence) if facts is not None else []
            if not places:
                continue
            tokens, spans = tokenizer.encode_with_places(sentence)
            start, end, _ = rng.choice(places)
            hidden = [s < e and s >= start and e <= end for s, e in spans]
            if any(hidden):
                q["visual"].append(([tokenizer.mask if h else t for h, t in zip(hidden, tokens)],
                                    [t if h else -1 for h, t in zip(hidden, tokens)]))
            places = [p for p in places if p[2]]
            if places:
                start, end, words = rng.choice(places)
                foil = sentence[:start] + rng.choice(words) + sentence[end:]
                q["foil"].append((tokenizer.encode(foil), 0) if false else (tokens, 1))
        asked.append(q)
    return asked


# ----------------------------------------------------------------------------------------------------------------
# Measuring


def mean_picture(files, side=64):
    """What a blind model sees: the mean of the pictures, each squeezed to side x side, as a PIL image."""
    total = sum(torch.from_numpy(np.array(picture_of(file).resize((side, side)))).double() for file in files)
    return Image.fromarray((total / len(files)).round().byte().numpy())


def boxes_in_pixels(boxes, size):
    """(n, 4) cxcywh fractions, (height, width) -> x, y, w, h in pixels as COCO's files have them."""
    height, width = size
    cx, cy, w, h = boxes.unbind(-1)
    scale = boxes.new_tensor([width, height, width, height])
    return torch.stack([cx - w / 2, cy - h / 2, w, h], dim=-1) * scale


def prepare(tokenizer, names, pictures):
    """What `measure` asks of `pictures`, which is the same at each validation: at full size it takes half a minute."""
    phrases = Phrases(names).learn(pictures)
    return phrases, questions(pictures, phrases, tokenizer), mean_picture([p.file for p in pictures[:500]])


def average_precision(pictures, results, source):
    """(AP, AP50) by pycocotools. results: dicts of image_id (a number in `pictures`), category_id, bbox, score.

    Truth is what the reader kept, so crowd regions are not ignored as in the official measure but absent.
    """
    truth = {"info": {}, "images": [], "annotations": [], "categories": {}}
    for number, picture in enumerate(pictures):
        if getattr(picture, source) is None:
            continue
        truth["images"].append({"id": number, "height": picture.size[0], "width": picture.size[1]})
        boxes, labels = getattr(picture, source)[:2]
        for box, label in zip(boxes_in_pixels(torch.from_numpy(boxes), picture.size).tolist(), labels.tolist()):
            truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": number, "bbox": box,
                                         "category_id": label, "area": box[2] * box[3], "iscrowd": 0})
            truth["categories"][label] = {"id": label, "name": str(label)}
    truth["categories"] = list(truth["categories"].values())
    used = {image["id"] for image in truth["images"]}
    results = [r for r in results if r["image_id"] in used]
    if not results or not truth["annotations"]:
        return 0.0, 0.0
    scores = detection_scores(results, truth, areas=("all",))
    return scores["AP"], scores["AP50"]


def found_objects(objects, source):
    """The last layer's answer: scores (B, Q), labels (B, Q) (no-object aside), boxes (B, Q, 4) cxcywh."""
    scores, labels = objects["logits"][source][-1].float().softmax(-1)[..., :-1].max(-1)
    return scores, labels, objects["boxes"][-1]


@torch.no_grad()
def measure(model, tokenizer, names, pictures, *, short, long, device="cpu", batch_size=32, amp=False, blind=False,
            rank=0, world=1, prepared=None):
    """All measures on `pictures`: {"mlm_accuracy": ..., ...} as fractions. Collective: each process does its share.

    prepared: what `prepare` returned. A measure that has nothing to count (no Visual Genome annotation, say) is left
    out.
    """
    model.eval()
    phrases, asked, mean = prepared or prepare(tokenizer, names, pictures)
    source = "coco" if names["coco"] else "vg"
    tally = defaultdict(list)  # measure -> 1 or 0 for each thing asked; for AP the boxes found

    # Pictures of like shape together; which picture is in which batch changes nothing but the padding.
    mine = sorted(range(rank, len(pictures), world), key=lambda i: pictures[i].size[1] / pictures[i].size[0])
    for at in range(0, len(mine), batch_size):
        progressed()
        numbers = mine[at:at + batch_size]
        batch = [pictures[i] for i in numbers]
        images, sizes = pad_pictures([
            to_pixels(mean.resize(p.size[::-1]) if blind else load_picture(p.file, short, long), short, long)
            for p in batch])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            grid = model.encode_picture(images.to(device), sizes)
            # Words and pairs: every sentence of one kind, each with its picture
            for name, kind in (("mlm_accuracy", "mlm"), ("mlm_accuracy_visual", "visual"), ("itm_accuracy", "itm"),
                               ("itm_accuracy_foil", "foil")):
                rows = [(j, *pair) for j, i in enumerate(numbers) for pair in asked[i][kind]]
                if not rows:
                    continue
                which, sentences, answers = zip(*rows)
                tokens = pad_tokens([[s] for s in sentences], tokenizer.pad)[:, 0].to(device)
                states = model.encode(grid.rows(torch.tensor(which, device=device)), tokens).states
                if kind in ("itm", "foil"):
                    tally[name] += (model.itm(states[:, 0]).argmax(-1).cpu() == torch.tensor(answers)).tolist()
                    continue
                labels = pad_tokens([[a] for a in answers], -1)[:, 0].to(device)
                hidden = labels >= 0
                right = torch.ones_like(hidden)
                right[hidden] = model.guess_words(states[:, :tokens.shape[1]][hidden]).argmax(-1) == labels[hidden]
                # Each hidden piece counts, but a visual word of several pieces is right if all of them are.
                tally[name] += (right[hidden] if kind == "mlm" else right.all(1)).tolist()
            # Objects, with a sentence and without
            first = pad_tokens([[asked[i]["first"]] for i in numbers], tokenizer.pad)[:, 0].to(device)
            alone = model.encode(grid)
            for name, memory in (("AP", model.encode(grid, first)), ("AP_no_sentence", alone)):
                objects = model.detect(memory)
                for i, scores, labels, boxes in zip(numbers, *(x.cpu() for x in found_objects(objects, source))):
                    found = boxes_in_pixels(boxes, pictures[i].size).tolist()
                    tally[name] += [{"image_id": i, "category_id": label, "bbox": box, "score": score}
                                    for score, label, box in zip(scores.tolist(), labels.tolist(), found)]
            # Attributes of the query that matches an annotated box, without a sentence
            annotated = [j for j, p in enumerate(batch) if p.vg is not None] if names["vg"] else []
            if annotated:
                targets = [{"labels": torch.from_numpy(batch[j].vg[1]).to(device),
                            "boxes": torch.from_numpy(batch[j].vg[0]).to(device)} for j in annotated]
                _, row, query, box = hungarian_match(
                    objects["logits"]["vg"][-1:, annotated], objects["boxes"][-1:, annotated], targets)
                true = [set(a) for j in annotated for a in batch[j].vg[2]]
                for logits, b in zip(objects["attributes"][-1, annotated][row, query].float(), box.tolist()):
                    if true[b]:  # of its k true attributes, how many are among the k most likely
                        best = logits.topk(len(true[b])).indices.tolist()
                        tally["attribute_accuracy"].append(len(true[b].intersection(best)) / len(true[b]))
            # Captions, greedy
            for (pieces, _), facts in zip(model.generate(alone), map(phrases.facts, batch)):
                if facts is not None:
                    tally["caption_objects"].append(phrases.all_true(facts, tokenizer.decode(pieces)))
    shares = gathered(dict(tally), world)
    tally = {name: [x for part in shares for x in part.get(name, ())] for name in set().union(*shares)}
    measures = {}
    for name in ("mlm_accuracy", "mlm_accuracy_visual", "itm_accuracy", "itm_accuracy_foil", "AP", "AP_no_sentence",
                 "attribute_accuracy", "caption_objects"):
        if name.startswith("AP"):
            measures[name], measures[name.replace("AP", "AP50")] = average_precision(pictures, tally[name], source)
        elif tally.get(name):
            measures[name] = sum(tally[name]) / len(tally[name])
    return measures


def measure_with_blind(model, tokenizer, names, pictures, **settings):
    """{"val_...": the measures, "blind_...": the same with every picture replaced by the mean picture}."""
    settings["prepared"] = settings.get("prepared") or prepare(tokenizer, names, pictures)
    seen = measure(model, tokenizer, names, pictures, **settings)
    blind = measure(model, tokenizer, names, pictures, blind=True, **settings)
    return {**{f"val_{k}": v for k, v in seen.items()}, **{f"blind_{k}": v for k, v in blind.items()}}


# ----------------------------------------------------------------------------------------------------------------
# Official scores
#
# What each measure follows, and where this file knowingly differs:
#
# - VQA v2: GT-Vision-Lab/VQA, vqaEval.py as of a013f00 (earlier ones normalised the model's answer always and the
#   annotators' not quite; that only changes a few answers). Not rounded.
# - NLVR2: lil-lab/nlvr, nlvr2/eval/metrics.py. The official program lets the last of two rows for a pair win; here
#   that is an error.
# - Captions: salaniz/pycocoevalcap, equal to it on equal words. Its words come from a Java program; see `ptb_words`.
# - Detection: pycocotools itself.
# - Retrieval has no official program; ties count against the model (see `retrieval_scores`).
#
# All of them ask for a result for every record that is scored. One that is missing, double or unknown is an error:
# pycocotools and pycocoevalcap would score whatever part is there, and a number on a part looks like one on the whole.

ANSWER_TYPES = ("yes/no", "number", "other")


def answer_type(record):
    """An annotation's "answer_type"; some copies of the files leave it out, then it goes by what most people said."""
    if "answer_type" in record:
        return record["answer_type"]
    most = Counter(normalise_answer(a["answer"]) for a in record["answers"]).most_common(1)[0][0]
    return "yes/no" if most in ("yes", "no") else "number" if most.isdigit() else "other"


def vqa_scores(answers, annotations):
    """{"overall", "yes/no", "number", "other"}: accuracy in percent; a kind without a question is left out.

    answers: {question_id: str}; annotations: the official records (question_id, answer_type, answers: ten dicts with
    "answer"). An answer is compared with each nine of the ten annotators: three of them agreeing make it right.
    """
    accuracy = defaultdict(list)
    for record in annotations:
        truth = [a["answer"].replace("\n", " ").replace("\t", " ").strip() for a in record["answers"]]
        answer = answers[record["question_id"]].replace("\n", " ").replace("\t", " ").strip()
        if len(set(truth)) > 1:  # if all agree nothing is normalised: "Yes." is then wrong where all said "yes"
            answer, *truth = map(normalise_answer, [answer, *truth])
        agree = sum(t == answer for t in truth)
        value = sum(min(1, (agree - (t == answer)) / 3) for t in truth) / len(truth)
        accuracy["overall"].append(value)
        accuracy[answer_type(record)].append(value)
    return {kind: 100 * sum(accuracy[kind]) / len(accuracy[kind]) for kind in ("overall", *ANSWER_TYPES)
            if accuracy[kind]}


# ----------------------------------------------------------------------------------------------------------------
# NLVR2


def nlvr2_scores(predictions, records):
    """{"accuracy", "consistency"} as fractions. predictions: {identifier: "True" or "False"}; records: the official.

    A sentence (split-set-pair-sentence without the pair) is consistent if it is right for all pairs it is asked of.
    """
    right = {r["identifier"]: predictions[r["identifier"]].lower() == r["label"].lower() for r in records}
    sentences = defaultdict(list)
    for identifier, value in right.items():
        split, pictures, _, sentence = identifier.split("-")
        sentences[split, pictures, sentence].append(value)
    return {"accuracy": sum(right.values()) / len(right),
            "consistency": sum(map(all, sentences.values())) / len(sentences)}


# ----------------------------------------------------------------------------------------------------------------
# Captions: words


# Words that keep the point after them wherever they stand ("etc." is a word, "dog." two), and those that do so only
# with a capital ("Miss." but not "miss.") or only before a number ("no. 5"). So are single letters, U.S and a.m.
PTB_POINT = set("""
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bldg blvd brig bros calif capt cf cmdr co col colo
comdr conn corp cos cpl ct dec dept det dr drs ed.d elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc
ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms
msgr mt natl neb nev nov oct okla penn pfc ph ph.d plc pres prof profs pvt rd rep reps rev rt sen sens sep sept seq
sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo""".split())
PTB_POINT_CAPITAL = set("ark az del ill la mass miss ore pa tex wash".split())
PTB_POINT_NUMBER = set("art bldg ca fig figs no nos op pp prop".split())


def _ptb_rules():
    """[(kind, pattern)], for `ptb_words`. A group is the token; what the pattern has after it must follow."""
    apos, quote = "(?:['\u2019]|&apos;)", "(?:['`\u2018\u2019\u201b]|&apos;)"
    # Python's \w has digits and fractions of all kinds; Stanford's letters have some accents that stand alone.
    letter = r"[^\W\d_²³¹¼-¾\u2070-\u209c\u2150-\u2189\u2460-\u249b]"
    first = rf"(?:{letter}|[\u02d2-\u02df])"
    word = rf"{first}(?:{first}|[\d\u00ad\u0300-\u036f])*"
    word = rf"{word}(?:[.!?]{word})*"  # "street.A" is one
    part = rf"(?:[dol]{quote})?(?:{letter}|\d)+"
    ending, hyphen = "(?:[msd]|re|ve|ll)", r"[-_\u2010\u2011]"
    return [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in (
        ("", r"(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na"), ("", rf"({apos}t)(?:is|was)"),
        ("", rf"({word}){apos}{ending}"), ("", rf"([a-z]*[a-mo-z])n{quote}t"), ("", word),  # it|'s, do|n't
        ("", rf"{part}(?:{hyphen}{part})*"),  # t-shirt, 1950s, d'art
        ("", r"[a-z0-9][a-z0-9.,]*(?:-(?:[a-z](?:\.[a-z])+\.|[a-z0-9]+))+"),  # 1,000-year
        ("", r"[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"),  # black/white, w/o, but not a/b/c/d
        ("", rf"(y{apos}){letter}|({apos}\d\d)\s"),  # y'|all, '09
        ("", rf"{apos}(?:n{apos}?|em|till?|cause|[2-9]0s)|(?:ol|dunkin|somethin|[ldj]){apos}|c(?:ap)?'(?:mon|n|est)|"
             rf"cont'd|s'mores|li'l|nor'easter|(?-i:[A-HJ-XZn]){quote}{letter}{{2,}}|"  # R'Us; next ma'am, not dog's
             rf"{letter}+[aeiouy]{quote}(?-i:[aeiouA-Z]){letter}*"),
        ("quote", rf"({apos}{ending})[^a-z]"), ("quote", rf"n{quote}t"),
        ("", r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"), ("", r"(?:\d{1,4}[- \u00a0])?\d{1,4}/\d{1,4}"),  # 5:30, 2 1/2
        ("", r"[¼-¾\u2153-\u215e]|[¹²³\u2070\u2074-\u2079]+|[\u2080-\u2089]+|c\+\+|[cf]\#|(?:pro|anti)-"),
        ("", r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)|(?-i:[A-Z]*)\$"),  # AT&T, US$
        ("", rf"\#{letter}+|@[a-z_]\w*|</?[a-z][\w.-]*/?>|&(?:amp|lt|gt|\#\d+);"),
        ("", r"[a-z0-9][^\s\"<>|(){}]*@[^\s\"<>|(){}.]+(?:\.[^\s\"<>|(){}.]+)*"),
        ("", r"(?:https?://[^\s\"<>()|]+|[a-z][a-z.]*\.(?:com|net|org|edu)/[^\s\"<>()|]+)[^\s\"<>()|.!?,{}-]"),
        ("quote", r"\"|&quot;|''"), ("quote", r"(')[a-z]\S"), ("quote", rf"{apos}{ending}"),
        ("quote", rf"[`\u2018-\u201f\u2039\u203a«»]{{1,2}}|{apos}"),
        ("bracket", r"([<>]?[:;=][-o*']?[()DP|\[\]])[^a-z0-9]"), ("bracket", r"[\[\](){}]"),
        ("dots", r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|\u2026"), ("", r"-+|[?!]+|\*+|\#+|@+|_+|<<|>>"),
        ("", r"[!-~¡-¿×÷\u2013-\u2017\u2020-\u2023\u2030-\u2042\u20ac\u2100-\u2bff]"))]


PTB_RULES = _ptb_rules()
PTB_PLAIN = re.compile("(?i:(?!(?:cannot|gonna|gotta|lemme|gimme|wanna) )[a-z]+(?= ))", re.ASCII)  # most words, fast
PTB_QUOTES = str.maketrans({'"': "''", "\u2018": "`", "\u201b": "`", "\u2039": "`", "\u2019": "'", "\u203a": "'",
                            "\u201c": "``", "«": "``", "\u201d": "''", "»": "''"})
PTB_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PTB_SYMBOLS = {"¢": "cents", "£": "#", "¤": "$", "\u20ac": "$", "¼": "1/4", "½": "1/2", "¾": "3/4", "\u2153": "1/3",
               "\u2154": "2/3", "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# What the COCO evaluation drops. Its list has the brackets in upper case, yet the words are in lower case: they stay.
PTB_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "---", "----", "\u2013", "\u2014",
               "\u2015"}


def _keeps_point(token, after):
    """Whether a token takes the point that `after` begins with."""
    lower = token.lower()
    return (lower in PTB_POINT or (lower in PTB_POINT_CAPITAL and token[0].isupper())
            or re.fullmatch(r"[A-Za-z](\.[A-Za-z])*", token)  # U.S., a.m., plan B.
            or (lower in PTB_POINT_NUMBER and re.match(r"\.\s?\d", after))
            or (after[1] in ",;:" and token[-1].isalnum() and not re.search(r"\d[.,:]\d", token)))  # "dog., "


def ptb_words(sentence):
    """A caption -> its words as the COCO caption evaluation has them: lower case, without most punctuation.

    Does what Stanford's PTBTokenizer 3.4.1 (-preserveLines -lowerCase) does, without Java: of all rules the one that
    sees furthest wins, and of equals the first. Compared with that program on some thousand sentences, of which
    test_scores.py has some hundred. Known to differ: the program reads all captions as one text, so that a single
    letter and a point at the end of one ("plan B.") lose the point if the next begins with "A " or "The "; here each
    stands alone. Line breaks other than \\n put its captions out of step; here they are spaces. Telephone numbers with
    spaces, file names (5a.jpg), HTML with attributes, "Jan.-May" and letters and symbols outside Latin may split
    otherwise, as may a web address right after a mark.
    """
    text, words, at = sentence.replace("\n", " ") + "\n\n", [], 0
    while at < len(text):
        plain = PTB_PLAIN.match(text, at)
        if plain:
            words.append(plain.group())
            at = plain.end()
            continue
        kind, best = None, None
        for this, rule in PTB_RULES:
            found = rule.match(text, at)
            if found and found.end() > (best.end() if best else at):
                kind, best = this, found
        if best is None:  # white space, or a character the program does not know and drops
            at += 1
            continue
        token = best.group(best.lastindex or 0)
        at += len(token)
        if text[at] == "." and token[0].isalnum() and _keeps_point(token, text[at:at + 3]):
            token, at = token + ".", at + 1
        if kind == "quote":
            token = token.replace("&quot;", '"').replace("&apos;", "'").translate(PTB_QUOTES)
        elif kind == "bracket":  # in smileys only the round ones are rewritten
            token = PTB_BRACKETS.get(token) or token.replace("(", "-lrb-").replace(")", "-rrb-")
        elif kind == "dots":
            token = "..."
        token = PTB_SYMBOLS.get(token, token).replace("\u00ad", "") or "-"
        words.append(token.replace(" ", "\u00a0"))  # the space in "2 1/2"
    return [word for word in map(str.lower, words) if word not in PTB_DROPPED]


# ----------------------------------------------------------------------------------------------------------------
# Captions: measures


def _ngrams(words):
    """(number of words, {(w1, .., wn): count} for n = 1 .. 4)."""
    return len(words), Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def _bleu(results, references):
    """[BLEU-1, .., BLEU-4] of the corpus against the reference of the closest length, of two the shorter."""
    guessed, correct, length, wanted = [0] * 4, [0] * 4, 0, 0
    for (size, grams), truth in zip(results, references):
        length += size
        wanted += min((abs(s - size), s) for s, _ in truth)[1]
        for n in range(4):
            guessed[n] += max(0, size - n)
        for gram, count in grams.items():
            correct[len(gram) - 1] += min(count, max(true[gram] for _, true in truth))
    product, scores = 1.0, []
    ratio = (length + 1e-15) / (wanted + 1e-9)  # the official constants against division by zero
    for n in range(4):
        product *= (correct[n] + 1e-15) / (guessed[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return scores


def _cider(results, references):
    """CIDEr-D of each picture: tf-idf cosine of n-grams with clipped counts and a penalty for another length (sigma 6),
    times 10.

    A document is a picture's references together. The length is counted in pairs of words, as officially.
    """
    pictures = math.log(len(references))
    documents = Counter(gram for truth in references for gram in set().union(*(grams for _, grams in truth)))

    def weigh(grams):
        vector = {gram: count * (pictures - math.log(max(1, documents[gram]))) for gram, count in grams.items()}
        norms = [0.0] * 4
        for gram, weight in vector.items():
            norms[len(gram) - 1] += weight ** 2
        return vector, [math.sqrt(norm) for norm in norms]

    values = []
    for (size, grams), truth in zip(results, references):
        vector, norms = weigh(grams)
        value = 0.0
        for true_size, true_grams in truth:
            true, true_norms = weigh(true_grams)
            products = [0.0] * 4
            for gram, weight in vector.items():
                if gram in true:
                    products[len(gram) - 1] += min(weight, true[gram]) * true[gram]
            cosine = sum(p / (a * b) for p, a, b in zip(products, norms, true_norms) if a and b) / 4
            apart = max(0, size - 1) - max(0, true_size - 1)
            value += 10 * cosine * math.exp(-apart ** 2 / 72) / len(truth)
        values.append(value)
    return values


def _common(a, b):
    """Length of the longest common subsequence of two lists, a bit of an integer for each word of b (Hyyro 2004)."""
    places = defaultdict(int)
    for i, word in enumerate(b):
        places[word] |= 1 << i
    full = row = (1 << len(b)) - 1
    for word in a:
        met = row & places[word]
        row = ((row + met) | (row - met)) & full
    return (row ^ full).bit_count()


def _rouge(results, references):
    """ROUGE-L, beta 1.2: the best precision and the best recall of a picture's references, mean over pictures."""
    total = 0.0
    for result, truth in zip(results, references):
        common = [_common(result, true) for true in truth]
        precision = max(common) / len(result)
        recall = max(c / len(true) for c, true in zip(common, truth))
        if precision:
            total += 2.44 * precision * recall / (recall + 1.44 * precision)
    return total / len(references)


def caption_scores(results, references):
    """{"Bleu_1" .. "Bleu_4", "ROUGE_L", "CIDEr"} as fractions (CIDEr up to 10), as pycocoevalcap has them.

    results: {image_id: caption}; references: {image_id: [caption, ..]} with the same ids. CIDEr weighs words by the
    pictures whose references have them, so a part of the pictures has other scores than the whole.
    """
    lines = [" ".join(ptb_words(results[i])) for i in references]
    truths = [[" ".join(ptb_words(caption)) for caption in captions] for captions in references.values()]
    # ROUGE splits at spaces alone, so that a caption without words is one empty word and "2\u00a01/2" is one word; the
    # others split at any white space.
    rouge = _rouge([line.split(" ") for line in lines], [[true.split(" ") for true in truth] for truth in truths])
    grams = [_ngrams(line.split()) for line in lines]
    true_grams = [[_ngrams(true.split()) for true in truth] for truth in truths]
    return {**{f"Bleu_{n}": value for n, value in enumerate(_bleu(grams, true_grams), 1)},
            "ROUGE_L": rouge, "CIDEr": sum(_cider(grams, true_grams)) / len(grams)}


# ----------------------------------------------------------------------------------------------------------------
# Retrieval and detection


def retrieval_scores(scores, owner):
    """{"IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10"} as fractions.

    scores: (P, S), higher is better, of P pictures and S sentences; owner: (S,), the row of each sentence's picture.
    IR: a sentence looks for its picture. TR: a picture looks for any of its sentences. A rank is 1 + the number of
    wrong candidates that score as high or higher, so that a model without an opinion finds nothing.
    """
    scores, owner = np.asarray(scores), np.asarray(owner)
    P, S = scores.shape
    if owner.shape != (S,) or set(owner.tolist()) != set(range(P)):
        raise InputError(f"retrieval scores of {P} pictures and {S} sentences: each picture needs a sentence of its "
                         "own and each sentence its picture; give the matrix of the whole split")
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        raise InputError(f"retrieval scores: picture {row}, sentence {column} is NaN; mend the model or its numbers")
    picture_rank = (scores >= scores[owner, np.arange(S)]).sum(0)  # (S,); the right one counts itself: the "1 +"
    sentence_rank = np.empty(P, int)
    for p in range(P):
        own = owner == p
        sentence_rank[p] = 1 + (scores[p, ~own] >= scores[p, own].max()).sum()
    return {f"{name}@{k}": float((rank <= k).mean()) for name, rank in (("IR", picture_rank), ("TR", sentence_rank))
            for k in (1, 5, 10)}


def detection_scores(results, annotation_file, image_ids=None, areas=("all", "small", "medium", "large")):
    """{"AP", "AP50", "AP75", "APs", "APm", "APl"} of boxes as fractions; -1 where there is nothing to measure.

    results: dicts of image_id, category_id, bbox (x, y, w, h in pixels), score; annotation_file: COCO's instances
    JSON, a path or what it holds; image_ids: the pictures to look at, all by default; areas: the sizes of boxes that
    are scored apart, with fewer it takes less time.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, found = COCO(), COCO()
        truth.dataset = annotation_file if isinstance(annotation_file, dict) else _read_json(annotation_file)
        truth.createIndex()
        if results:
            found = truth.loadRes([dict(r) for r in results])  # it writes into the records
        else:  # nothing found is a score of 0, but loadRes fails on it
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scored = COCOeval(truth, found, "bbox")
        if image_ids is not None:
            scored.params.imgIds = sorted(image_ids)
        kept = [label in areas for label in scored.params.areaRngLbl]
        scored.params.areaRng = list(itertools.compress(scored.params.areaRng, kept))
        scored.params.areaRngLbl = list(itertools.compress(scored.params.areaRngLbl, kept))
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return {name: float(value) for name, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), scored.stats)}


# ----------------------------------------------------------------------------------------------------------------
# Files

NUMBER = "a finite number"
BOX = "four finite numbers x, y, w, h with w, h >= 0"
RECORDS = "a list of records"


def _is(x, kind):
    """Whether a value of a JSON file is of a kind; True is no integer, NaN no number."""
    if kind == RECORDS:
        return isinstance(x, list) and all(isinstance(r, dict) for r in x)
    if kind == BOX:
        return isinstance(x, list) and len(x) == 4 and all(_is(v, NUMBER) for v in x) and min(x[2:]) >= 0
    if kind == NUMBER:
        return type(x) in (int, float) and abs(x) < 1e100
    return type(x) is kind and (kind is not int or abs(x) <= LARGEST)


def _read_text(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give an existing text file") from None


def _read_json(path, text=None):
    text = _read_text(path) if text is None else text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); it may be cut off, write it again") from None


def _records(path, found, fields, empty=False):
    """`found` if it is a list of records with these fields: {name: kind as in `_is`}. Else InputError."""
    if not _is(found, RECORDS) or not (found or empty):
        raise InputError(f"{path}: expected a list of records with {', '.join(fields)}; is it another file?")
    for n, record in enumerate(found):
        for field, kind in fields.items():
            if not _is(record.get(field), kind):
                kind = {int: "an integer", str: "a string"}.get(kind, kind)
                raise InputError(f"{path}: record {n}, {str(record)[:80]!r}: {field!r} is not there or is not {kind}; "
                                 "mend the record")
    return found


def _listed(path, found, key, fields, empty=False):
    """The records under a key of an annotation file."""
    return _records(f"{path}, {key!r}", found.get(key) if isinstance(found, dict) else None, fields, empty)


def _match(path, rows, wanted, allowed=None):
    """[(id, value)] -> {id: value}, or InputError that names the first id that is double, unknown or missing.

    wanted: the ids that need a result, in file order; allowed: all that may have one, by default the same.
    """
    found, known = dict(rows), set(wanted if allowed is None else allowed)
    double = [i for i, count in Counter(i for i, _ in rows).items() if count > 1]
    unknown, missing = [i for i in found if i not in known], [i for i in wanted if i not in found]
    for bad, says in ((double, "stands there more than once ({}); keep one of each"),
                      (unknown, "is not known ({}); is it another split's file?"),
                      (missing, "is missing ({}); each needs a result, run the model on all")):
        if bad:
            raise InputError(f"{path}: id {bad[0]} {says.format(f'{len(bad)} such ids of {len(known)}')}")
    return found


def read_texts(path, key, value, wanted, allowed=None):
    """A result file like VQA's, a list of {"question_id", "answer"}, or COCO's of {"image_id", "caption"} -> a dict."""
    rows = _records(path, _read_json(path), {key: int, value: str}, empty=True)
    return _match(path, [(r[key], r[value]) for r in rows], wanted, allowed)


def read_detections(path, images, categories):
    """COCO's detection results -> the records. A picture may have none, but ids not in these sets are an InputError."""
    rows = _records(path, _read_json(path), {"image_id": int, "category_id": int, "bbox": BOX, "score": NUMBER}, True)
    for key, known in (("image_id", images), ("category_id", categories)):
        _match(f"{path}, {key}", [(i, None) for i in dict.fromkeys(r[key] for r in rows)], [], known)
    return rows


def read_predictions(path, wanted):
    """NLVR2's CSV without a header, rows like dev-850-0-0,True -> {identifier: "True" or "False"}."""
    rows = []
    for n, line in enumerate(_read_text(path).split("\n"), 1):
        identifier, _, value = map(str.strip, line.partition(","))
        if value.lower() in ("true", "false"):
            rows.append((identifier, value.capitalize()))
        elif line.strip():
            raise InputError(f"{path}: line {n}, {line[:60]!r}, is not an identifier, a comma and True or False; "
                             "write each row like dev-850-0-0,True, without a header")
    return _match(path, rows, wanted)


def read_matrix(path, shape):
    """A matrix of finite numbers of this shape, (pictures, sentences), from a .npy file."""
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a head may promise any size
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); write it with numpy.save") from None
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu" or matrix.shape != shape:
        is_it = f"{matrix.dtype} {matrix.shape}" if isinstance(matrix, np.ndarray) else "an archive"
        raise InputError(f"{path}: is {is_it}, but must be numbers {shape}: a row for each picture of the split, a "
                         "column for each of its sentences, picture after picture; write it anew, or give its --split")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(f"{path}: row {row}, column {column} is {matrix[row, column]}; mend the model or its numbers")
    return matrix


def _karpathy(path, found, split, fields):
    """The pictures of a split of Karpathy's dataset_coco.json or dataset_flickr30k.json."""
    images = [image for image in _listed(path, found, "images", {"split": str, "sentences": RECORDS, **fields})
              if image["split"] == split]
    for image in _records(f"{path}, split {split!r}", images, {"sentences": RECORDS}):
        _listed(path, image, "sentences", {"raw": str})
    return images


def vqa_records(path, found):
    """The records of VQA's annotation file, as `vqa_scores` needs them."""
    records = _listed(path, found, "annotations", {"question_id": int, "answers": RECORDS})
    for r in records:
        _listed(f"{path}, question_id {r['question_id']}", r, "answers", {"answer": str})
        if answer_type(r) not in ANSWER_TYPES:
            raise InputError(f"{path}: question_id {r['question_id']}: answer_type {str(answer_type(r))[:40]!r} "
                             f"is not one of {', '.join(ANSWER_TYPES)}; give VQA v2's annotations")
    return records


def coco_ids(path, found):
    """The sets of pictures' and of categories' ids of COCO's instances file, once it has all that pycocotools reads."""
    ids = ({r["id"] for r in _listed(path, found, key, {"id": int})} for key in ("images", "categories"))
    for r in _listed(path, found, "annotations", {"id": int, "image_id": int, "category_id": int, "bbox": BOX,
                                                  "area": NUMBER, "iscrowd": int}, empty=True):
        if r["iscrowd"] not in (0, 1):
            raise InputError(f"{path}: annotation {r['id']}: iscrowd is {r['iscrowd']}, not 0 or 1; mend the record")
    return tuple(ids)


def score_files(task, results, against, questions=None, split="test"):
    """The scores of a result file, {measure: value} as the task's function above gives them.

    | task      | results                             | against                                          |
    | vqa       | list of {"question_id", "answer"}   | v2_mscoco_*_annotations.json (and its questions) |
    | nlvr2     | CSV, rows like dev-850-0-0,True     | dev.json, test1.json                             |
    | caption   | list of {"image_id", "caption"}     | captions_*.json, or Karpathy's dataset_coco.json |
    | flickr30k | .npy, (pictures, sentences)         | Karpathy's dataset_flickr30k.json                |
    | detection | list of {"image_id", "category_id", | instances_*.json                                 |
    |           | "bbox", "score"}                    |                                                  |

    Of Karpathy's files, which have all splits in one, the pictures of `split` count: test or val.

    With a questions file each annotation must be of one of its questions, and results may answer those that have no
    annotation too. InputError, a line with the file and the first record at fault, if anything is not as it should be.
    """
    if task == "nlvr2":
        lines = enumerate(_read_text(against).split("\n"), 1)
        records = _records(against, [_read_json(f"{against}, line {n}", line) for n, line in lines if line.strip()],
                           {"identifier": str, "label": str})
        for r in records:
            if r["identifier"].count("-") != 3 or r["label"].lower() not in ("true", "false"):
                raise InputError(f"{against}: record {r['identifier']!r}, {r['label'][:40]!r}: must be dev-850-0-0 "
                                 "or the like and True or False; give NLVR2's file")
        wanted = [r["identifier"] for r in records]
        _match(against, [(i, None) for i in wanted], [], wanted)
        return nlvr2_scores(read_predictions(results, wanted), records)
    if task not in ("vqa", "caption", "flickr30k", "detection"):
        raise InputError(f"task {task!r} is not known; give vqa, nlvr2, caption, flickr30k or detection")
    truth = _read_json(against)
    if task == "vqa":
        records = vqa_records(against, truth)
        wanted, asked = [r["question_id"] for r in records], None
        if questions is not None:
            asked = _listed(questions, _read_json(questions), "questions", {"question_id": int})
            asked = {r["question_id"] for r in asked}
        _match(against, [(i, None) for i in wanted], [], wanted if asked is None else asked)
        return vqa_scores(read_texts(results, "question_id", "answer", wanted, asked), records)
    if task == "caption":
        references = defaultdict(list)
        if isinstance(truth, dict) and "annotations" in truth:
            for r in _listed(against, truth, "annotations", {"image_id": int, "caption": str}):
                references[r["image_id"]].append(r["caption"])
        else:
            for image in _karpathy(against, truth, split, {"cocoid": int}):
                references[image["cocoid"]] += [s["raw"] for s in image["sentences"]]
        return caption_scores(read_texts(results, "image_id", "caption", list(references)), references)
    if task == "flickr30k":
        counts = [len(image["sentences"]) for image in _karpathy(against, truth, split, {})]
        owner = np.repeat(np.arange(len(counts)), counts)
        return retrieval_scores(read_matrix(results, (len(counts), len(owner))), owner)
    images, categories = coco_ids(against, truth)
    return detection_scores(read_detections(results, images, categories), truth)


# ----------------------------------------------------------------------------------------------------------------
# The tasks of section 5.1: what a fine-tuned model answers, in the official result files' form

# The official scores that decide which checkpoint of a fine-tuning is the best
BEST_BY = {"vqa": ("overall",), "nlvr2": ("accuracy",), "caption": ("CIDEr",), "flickr30k": ("IR@1", "TR@1"),
           "detection": ("AP",)}
ZERO_SHOT = ("caption", "flickr30k", "detection")  # pre-training has trained all that these need


def answer_task(task, model, tokenizer, names, examples, *, rank=0, world=1, rows=None, **settings):
    """What the model says of each example, in their order; collective: each process does its share, all get all.

    An answer goes by its example's number, so nothing is counted twice however the examples divide among the processes.
    rows: retrieval's `Rows`, so that an evaluation that was cut short goes on where it stopped.
    """
    before = rows.read() if rows else {}
    for part in gathered(before, world):
        before.update(part)
    groups = {}  # questions about the same picture together, so that its backbone runs once
    for number, e in enumerate(examples):
        if number not in before:
            groups.setdefault(e.files, []).append(number)
    # Pictures of like shape together, so that little is padded
    groups = sorted(groups.values(), key=lambda group: examples[group[0]].size[1] / examples[group[0]].size[0])
    share = groups[rank::world]
    found = attempt(lambda: answer_share(task, model, tokenizer, names, examples, share, show=rank == 0,
                                         keep=rows.write if rows else None, **settings), world)
    for part in gathered(found, world):
        before.update(part)
    return [before[number] for number in range(len(examples))]


class Rows:
    """Finished rows of retrieval's matrix on disk: one file a process, PATH.rows-RANK, to which rows are appended.

    A file's first line says what the rows are of; then come records of a row's number and its scores. A record that
    was cut off is dropped. Any number of processes may go on with what any number of processes left.
    """

    def __init__(self, path, rank, key, columns):
        """key: a dictionary that two evaluations share only if their rows are the same."""
        self.path, self.rank, self.head = path, rank, json.dumps(key).encode() + b"\n"
        self.record = np.dtype([("number", "<i8"), ("scores", "<f4", (columns,))])

    def files(self):
        return sorted(glob.glob(glob.escape(f"{self.path}.rows-") + "*"))

    def read(self):
        """{number: scores} of all files; InputError if one is of something else."""
        found = {}
        for name in self.files():
            with open(name, "rb") as file:
                if file.readline() != self.head:
                    raise InputError(f"{name}: has rows of another checkpoint, split or data; remove it, or give "
                                     "another --submit")
                content = file.read()
            records = np.frombuffer(content[:len(content) // self.record.itemsize * self.record.itemsize], self.record)
            found.update((int(r["number"]), r["scores"].copy()) for r in records)
        return found

    def write(self, number, scores):
        name = f"{self.path}.rows-{self.rank}"
        with open(name, "ab") as file:
            if file.tell() == 0:
                file.write(self.head)
            cut_off = (file.tell() - len(self.head)) % self.record.itemsize
            file.truncate(file.tell() - cut_off)
            file.write(np.array((number, scores), self.record).tobytes())

    def remove(self):
        for name in self.files():
            os.remove(name)


@torch.no_grad()
def answer_share(task, model, tokenizer, names, examples, groups, *, short, long, device="cpu", text="caption",
                 batch_size=32, amp=False, blind=False, beam=4, alpha=0.9, show=True, keep=None):
    """What the model says of examples, {number: answer}; groups: lists of numbers, those of a group on one picture:

    vqa: the answer; nlvr2: "True" or "False"; caption: the caption; detection: [(label, (x, y, w, h) in pixels,
    score)]; flickr30k: (S,) float32, the picture's similarity to all sentences of all examples, in their order; `keep`
    is called with the number and the scores of each picture when it is done.
    """
    model.eval()
    mean = mean_picture([e.files[0] for e in examples[:500]]) if blind else None
    found = {}
    if task == "flickr30k":
        every = [tokenizer.encode(sentence) for e in examples for sentence in e.sentences]
        order = sorted(range(len(every)), key=lambda i: len(every[i]))  # like lengths together, so little is padded
    for at in tqdm(range(0, len(groups), batch_size), task, disable=None if show else True, leave=False):
        progressed()
        part = groups[at:at + batch_size]
        numbers = [i for group in part for i in group]
        sides = range(len(examples[numbers[0]].files))
        images = [picture_of(examples[group[0]].files[side], mean, short, long) for side in sides for group in part]
        pixels, sizes = pad_pictures([to_pixels(image, short, long) for image in images])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            grid = model.encode_picture(pixels.to(device), sizes)
            if task == "flickr30k":
                for j, i in enumerate(numbers):
                    row = torch.empty(len(every))
                    for start in range(0, len(every), 256):  # the backbone ran once; each pair goes through the encoder
                        progressed()
                        chosen = order[start:start + 256]
                        tokens = pad_tokens([[every[c]] for c in chosen], tokenizer.pad)[:, 0].to(device)
                        one = grid.rows(torch.full((len(chosen),), j, device=device))
                        row[chosen] = model.similarity(one, tokens).cpu()
                    found[i] = row.numpy()
                    if keep:
                        keep(i, found[i])
                continue
            if task == "caption":
                said = model.generate(model.encode(grid), beam=beam, alpha=alpha)
                found.update((i, tokenizer.decode(pieces)) for i, (pieces, _) in zip(numbers, said))
                continue
            asked = [examples[i] for i in numbers]
            sentences = [e.text or (e.sentences[0] if e.sentences and text == "caption" else "") for e in asked]
            tokens = pad_tokens([[tokenizer.encode(s)] for s in sentences], tokenizer.pad)[:, 0].to(device)
            picture = torch.tensor([j for j, group in enumerate(part) for _ in group], device=device)
            if task == "vqa":
                best = model.answer_questions(grid.rows(picture), tokens).argmax(-1).tolist()
                found.update((i, names["answers"][a]) for i, a in zip(numbers, best))
            elif task == "nlvr2":
                both = grid.rows(torch.cat([picture, picture + len(part)]))
                best = model.judge_statements(both, tokens).argmax(-1).tolist()
                found.update((i, str(bool(b))) for i, b in zip(numbers, best))
            else:
                objects = model.detect(model.encode(grid, tokens if text == "caption" else None))
                for i, e, scores, labels, boxes in zip(
                        numbers, asked, *(x.cpu() for x in found_objects(objects, "coco"))):
                    found[i] = list(zip(labels.tolist(), boxes_in_pixels(boxes, e.size).tolist(), scores.tolist()))
    return found


def picture_of(file, mean=None, short=None, long=None):
    """The picture of a file, or the mean picture at its size; InputError if it does not decode. See `load_picture`."""
    try:
        image = load_picture(file, short, long)
    except Exception as error:
        raise InputError(f"{file}: cannot be decoded ({error}); mend it, a score needs every picture") from None
    return image if mean is None else mean.resize(image.size)


def caption_objects(captions, data):
    """Share of captions that name at least one object and only what Visual Genome's boxes confirm, see `Phrases`.

    captions: {COCO's number of a picture: caption}; those that Visual Genome has not annotated do not count.
    """
    pictures, same, objects, attributes = read_vg(data, lambda text: None)
    phrases = Phrases({"coco": [], "vg": list(map(",".join, objects)), "attributes": list(map(",".join, attributes))})
    true = [phrases.all_true(phrases.facts(picture), captions[same[number][0]])
            for number, picture in pictures.items() if same[number][0] in captions]
    return sum(true) / len(true) if true else 0.0


def results_of(task, said, examples, categories=()):
    """What `answer_task` gave, as the official result files hold it. categories: COCO's ids of the classes."""
    if task == "vqa":
        return [{"question_id": e.id, "answer": answer} for e, answer in zip(examples, said)]
    if task == "nlvr2":
        return {e.id: answer for e, answer in zip(examples, said)}
    if task == "caption":
        return [{"image_id": e.id, "caption": caption} for e, caption in zip(examples, said)]
    if task == "flickr30k":
        return np.stack(said)
    return [{"image_id": e.id, "category_id": categories[label], "bbox": [round(v, 2) for v in box],
             "score": round(score, 5)} for e, boxes in zip(examples, said) for label, box, score in boxes]


def coco_boxes(data, split):
    """COCO's instances file and its categories' ids, in the order of the model's classes."""
    path = f"{data}/coco/annotations/instances_{split}2017.json"
    truth = read_json(path, "COCO's boxes")
    return truth, sorted(coco_ids(path, truth)[1])


def score_answers(task, said, examples, data, split, objects=False):
    """The official scores of what `answer_task` gave, or {} where the truth is not known.

    objects: captions are also checked against Visual Genome's boxes, which takes minutes to read at full size.
    """
    if task == "vqa":
        if not examples[0].answers:
            return {}
        path = f"{data}/vqa/v2_mscoco_{split}2014_annotations.json"
        answers = {e.id: answer for e, answer in zip(examples, said)}
        return vqa_scores(answers, [r for r in vqa_records(path, read_json(path, "scores"))
                                    if r["question_id"] in answers])
    if task == "nlvr2":
        if examples[0].target is None:
            return {}
        truth = [{"identifier": e.id, "label": str(bool(e.target))} for e in examples]
        return nlvr2_scores(results_of(task, said, examples), truth)
    if task == "caption":
        captions = {e.id: caption for e, caption in zip(examples, said)}
        scores = caption_scores(captions, {e.id: e.sentences for e in examples})
        return {**scores, "caption_objects": caption_objects(captions, data)} if objects else scores
    if task == "flickr30k":
        owner = np.repeat(np.arange(len(examples)), [len(e.sentences) for e in examples])
        return retrieval_scores(np.stack(said), owner)
    truth, ids = coco_boxes(data, split)
    return detection_scores(results_of(task, said, examples, ids), truth, [e.id for e in examples])


# ----------------------------------------------------------------------------------------------------------------
# Looking: what the model says of one picture


def label_of(thing):
    return " ".join([*thing["attributes"], thing["name"]])


def colour_of(thing):
    return f"hsl({thing['query'] * 47 % 360}, 90%, 35%)"


class Viewer:
    """A checkpoint's model with what is needed to show it pictures that are in no data set."""

    def __init__(self, model, tokenizer, names, *, short, long, device="cpu", amp=False, beam=4, alpha=0.9,
                 without=(), text="caption"):
        """without, text: the flags of its training, which say what it never learnt."""
        self.model, self.tokenizer, self.names = model.eval(), tokenizer, names
        self.short, self.long, self.device, self.amp = short, long, device, amp
        self.beam, self.alpha, self.task, self.text = beam, alpha, model.config.task, text
        self.source = "vg" if names["vg"] and not self.task else "coco"
        self.captions = self.task in ("", "caption") and "caption" not in without
        self.objects = self.task in ("", "detection") and "detection" not in without
        self.attributes = self.source == "vg" and "attributes" not in without
        self.matches = self.task in ("", "flickr30k") and "itm" not in without  # sentences and pictures

    def can(self):
        """{what it can be asked: how that is said}"""
        alone = ["caption"] * self.captions + [f"objects{' with attributes' * self.attributes}"] * self.objects
        return {key: says for key, says, able in (
            ("image alone", f"--image alone ({', '.join(alone)})", alone),
            ("question", "--question", self.task == "vqa"), ("statement", "--statement", self.task == "nlvr2"),
            ("sentence", "--sentence", self.matches or self.objects and self.text != "none"),
            ("find", "--find", self.matches),
            ("attention", "--attention", self.task == "vqa" or self.matches or self.objects)) if able}

    def encode(self, *images, sentence=None):
        """PIL images -> (their grid, the sentence's tokens for each of them or None)."""
        pixels, sizes = pad_pictures([to_pixels(image, self.short, self.long) for image in images])
        grid = self.model.encode_picture(pixels.to(self.device), sizes)
        if sentence is None:
            return grid, None
        tokens = torch.tensor([self.tokenizer.encode(sentence)], device=self.device)
        return grid, tokens.repeat(len(images), 1)

    def autocast(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.amp)

    def named(self, objects, image, threshold):
        """The objects in what `detect` gave for one picture, the surest first, those above the threshold:
        [{"name", "attributes": [...], "score", "box": [x, y, w, h] in pixels of the image, "query"}].
        """
        scores, labels, boxes = (x[0].cpu() for x in found_objects(objects, self.source))
        boxes, found = boxes_in_pixels(boxes, image.size[::-1]), []
        attributes = objects["attributes"][-1, 0].float().softmax(-1).cpu()
        for q in scores.argsort(descending=True).tolist():
            if scores[q] <= threshold:
                break
            # A box's attributes share one softmax, so k of them come to about 1 / k each.
            likely = sorted(attributes[q].argsort(descending=True)[:3].tolist()) if self.attributes else []
            found.append({
                "name": self.names[self.source][labels[q]].split(",")[0], "score": round(scores[q].item(), 4),
                "attributes": [self.names["attributes"][a].split(",")[0] for a in likely if attributes[q, a] > 0.15],
                "box": [round(v, 1) for v in boxes[q].tolist()], "query": q})
        return found

    @torch.no_grad()
    def describe(self, image, sentence=None, threshold=0.5):
        """{"caption", "objects", "match"}, those of them that the model was trained for; match: the probability that
        the sentence belongs to the picture. The objects are looked for with the sentence, if there is one.
        """
        with self.autocast():
            return self.say(image, *self.encode(image, sentence=sentence), threshold)

    def say(self, image, grid, tokens=None, threshold=0.5):
        """What `describe` gives, of a picture that went through the backbone already."""
        said = {}
        with self.autocast():
            if self.captions:
                said["caption"] = self.tokenizer.decode(
                    self.model.generate(self.model.encode(grid), beam=self.beam, alpha=self.alpha)[0][0])
            if self.objects:
                said["objects"] = self.named(self.model.detect(self.model.encode(grid, tokens)), image, threshold)
            if tokens is not None and self.matches:
                said["match"] = round(self.model.similarity(grid, tokens).sigmoid().item(), 4)
        return said

    @torch.no_grad()
    def answer(self, image, question):
        """The five likeliest answers: [{"answer", "probability"}]; they need not sum to 1, each has its own sigmoid."""
        with self.autocast():
            chances = self.model.answer_questions(*self.encode(image, sentence=question))[0].float().sigmoid()
        best = chances.topk(min(5, len(chances)))
        return [{"answer": self.names["answers"][a], "probability": round(p, 4)}
                for p, a in zip(best.values.tolist(), best.indices.tolist())]

    @torch.no_grad()
    def judge(self, left, right, statement):
        """The probability that a statement about two pictures is true."""
        with self.autocast():
            grid, tokens = self.encode(left, right, sentence=statement)
            return self.model.judge_statements(grid, tokens[:1])[0].float().softmax(-1)[1].item()

    @torch.no_grad()
    def similarity(self, image, sentence):
        """Log-odds that the sentence belongs to the picture."""
        with self.autocast():
            return self.model.similarity(*self.encode(image, sentence=sentence)).item()

    @torch.no_grad()
    def attention(self, image, sentence=None, threshold=0.5):
        """Where each word and each object query looks. A dict:

        words: the T pieces of the sentence; encoder (L, T, T + S): how each word's attention is shared out among words
        and cells in each encoder layer, mean over heads, rows sum to 1; objects: as `describe` has them; decoder
        (L', n, T + S): the cross-attention of these objects' queries; grid: (H, W), with H * W = S; centres: of the
        rows and of the columns of cells, as fractions of the picture.
        """
        stride = self.model.config.stride
        height, width = resized(image.height, image.width, self.short, self.long)
        words = [] if sentence is None else [self.tokenizer.vocabulary[t] for t in self.tokenizer.encode(sentence)]
        H, W = -(-height // stride), -(-width // stride)
        # Each stride-2 layer of the ResNet looks around every second place, beginning with the first: cell i is about
        # pixel i * stride, not about the middle of a square that begins there.
        found = {"words": words, "objects": [], "grid": (H, W), "centres": (
            (np.arange(H) * stride + 0.5) / height, (np.arange(W) * stride + 0.5) / width)}
        encoder = [layer.attention for layer in self.model.encoder]
        decoder = [layer.cross_attention for layer in self.model.decoder]
        with self.autocast(), watched(encoder, len(words)) as by_word, watched(decoder) as by_query:
            grid, tokens = self.encode(image, sentence=sentence)
            memory = self.model.encode(grid, tokens)
            if self.objects:
                found["objects"] = self.named(self.model.detect(memory), image, threshold)
        found["encoder"] = torch.stack([layer[0][0].mean(0) for layer in by_word])
        queries = [thing["query"] for thing in found["objects"]]
        found["decoder"] = torch.stack([layer[0][0, :, queries].mean(0) for layer in by_query]) if queries else None
        return found


@contextlib.contextmanager
def watched(modules, first=None):
    """The weights of these Attention modules while the block runs: for each a list of (B, heads, T, S), one a call;
    of the first queries only, if a number is given: those of all cells would be the square of the grid.

    F.scaled_dot_product_attention never gives its weights away (the quick ways of computing it do not even have them in
    one place), so they are computed again from what it was given: softmax(q k^T / sqrt(width of a head)).
    """
    seen = [[] for _ in modules]

    def keep(into):
        def hook(module, args, kwargs, output):
            query, (k, _), *rest = args
            assert not kwargs.get("causal"), "captions' words are not watched"
            with torch.autocast(k.device.type, enabled=False):
                q = F.linear(query[:, :first].float(), module.q.weight, module.q.bias)
                scores = module.split(q) @ k.float().transpose(-1, -2) / math.sqrt(k.shape[-1])
            mask = rest[0] if rest else kwargs.get("mask")  # True = may be attended to
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None], -math.inf)
            into.append(scores.softmax(-1).cpu())
        return hook

    hooks = [module.register_forward_hook(keep(into), with_kwargs=True) for module, into in zip(modules, seen)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------------------------------
# Drawing


def as_png(image, **options):
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def draw_answer(image, objects=(), lines=(), side=None):
    """A picture with the boxes of `Viewer.named` and lines of text below it. side: its longer side in pixels, by
    default its own, but 600 at least, so that the labels can be read, and 1600 at most.
    """
    side = side or min(max(*image.size, 600), 1600)
    font = ImageFont.load_default(size=max(13, side // 50))
    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    width = max(image.width, min(side, 300))
    pen, wrapped = ImageDraw.Draw(image), []
    for line in lines:
        *full, last = [""]
        for word in line.split():
            if last and pen.textlength(f"{last} {word}", font=font) > width - 6:
                full, last = [*full, last], word
            else:
                last = f"{last} {word}".strip()
        wrapped += [*full, last]
    height = font.size + 4
    tile = Image.new("RGB", (width, image.height + height * len(wrapped) + (4 if wrapped else 0)), "white")
    tile.paste(image)
    pen, labels = ImageDraw.Draw(tile), []
    for thing in reversed(list(objects)):  # the surest last, so that its outline is on top
        x, y, w, h = (v * scale for v in thing["box"])
        pen.rectangle((x, y, x + w, y + h), outline=colour_of(thing), width=max(2, side // 300))
    for thing in objects:  # its label above it, or where it covers no other
        x, y, w, h = (v * scale for v in thing["box"])
        *_, right, bottom = pen.textbbox((0, 0), label_of(thing), font=font)
        x, step = max(0, min(x, tile.width - right - 2)), bottom + 3
        free = [at for at in (y - step, y + h + 2, *(y - n * step for n in (2, 3)), *(y + h + n * step for n in (1, 2)))
                if 0 <= at <= image.height - step and all(
                    x > b + 2 or x + right + 2 < a or at > d or at + step < c for a, c, b, d in labels)]
        y = free[0] if free else max(0, min(y - step, image.height - step))
        labels.append((x, y, x + right + 2, y + bottom + 2))
        pen.rectangle(labels[-1], fill="white")
        pen.text((x + 1, y), label_of(thing), fill=colour_of(thing), font=font)
    for i, text in enumerate(wrapped):
        pen.text((3, image.height + 2 + height * i), text, fill="black", font=font)
    return tile


def contact_sheet(tiles):
    """One picture of many, four in a row."""
    columns = min(4, len(tiles))
    width, height = (max(tile.size[i] for tile in tiles) + 8 for i in (0, 1))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), (200, 200, 200))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width + 4, i // columns * height + 4))
    return sheet


def draw_sheet(path, model, tokenizer, names, pictures, **settings):
    """A PNG with each picture, the objects found in it (no sentence given), and its generated caption."""
    viewer = Viewer(model, tokenizer, names, beam=1, **settings)
    tiles = []
    for picture in pictures:
        image = load_picture(picture.file)
        said = viewer.describe(image)
        below = [f"says: {said['caption']}"] if "caption" in said else []
        tiles.append(draw_answer(image, said.get("objects", ()), below, side=300))
    write_safely(path, as_png(contact_sheet(tiles).quantize(128), optimize=True))


def draw_attention(image, title, rows, centres, side=150):
    """A table of pictures: a row for each word or object, a column for each layer; bright is where it looks.

    rows: [(name, weights (L, S), share (L,) of the attention that falls on the picture at all, object or None)]. Each
    small picture is scaled to its own largest weight. centres: see `Viewer.attention`.
    """
    font = ImageFont.load_default(size=13)
    scale = side / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    dark = Image.blend(small.convert("L").convert("RGB"), Image.new("RGB", small.size), 0.75)
    # Where the small picture's pixels lie between the centres of cells
    places = np.meshgrid(*(np.interp((np.arange(n) + 0.5) / n, at, np.arange(len(at)))
                           for n, at in zip(small.size[::-1], centres)), indexing="ij")
    left = 16 + round(max(font.getlength(name) for name, *_ in rows))
    top, step = 44, small.height + 22
    layers = len(rows[0][1])
    sheet = Image.new("RGB", (left + layers * (small.width + 6), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 4), title, fill="black", font=font)
    for layer in range(layers):
        pen.text((left + layer * (small.width + 6), 24), f"layer {layer + 1}", fill="black", font=font)
    for number, (name, weights, share, thing) in enumerate(rows):
        y = top + number * step
        pen.text((4, y + 4), name, fill="black", font=font)
        for layer in range(layers):
            x = left + layer * (small.width + 6)
            bright = weights[layer].view(len(centres[0]), -1) / weights[layer].max().clamp(min=1e-12)
            mask = map_coordinates(bright.numpy(), places, order=1)
            tile = Image.composite(small, dark, Image.fromarray((mask * 255).astype(np.uint8)))
            if thing is not None:
                bx, by, bw, bh = (v * scale for v in thing["box"])
                ImageDraw.Draw(tile).rectangle((bx, by, bx + bw, by + bh), outline="red")
            sheet.paste(tile, (x, y))
            pen.text((x, y + small.height + 1), f"{share[layer]:.0%} on the picture", fill=(90, 90, 90), font=font)
    return sheet


# ----------------------------------------------------------------------------------------------------------------
# One's own pictures


def own_pictures(paths):
    """(name, file name or bytes) of each picture of --image: files, folders, "-" (standard input).

    Of a folder those whose ending is a picture's, not its hidden files and not its folders. A path with no picture to
    try comes as (name, what is wrong with it).
    """
    no_pictures = ("BUFR", "GRIB", "HDF5", "MPEG", "PDF", "WMF")  # the endings of the others are read, or named
    kinds = {ending for ending, kind in Image.registered_extensions().items()
             if kind in Image.OPEN and kind not in no_pictures} | {".heic", ".heif"}  # telephones', to be named
    for path in paths:
        if path == "-":
            yield "stdin", io.BytesIO(sys.stdin.buffer.read())
        elif os.path.isdir(path):
            try:
                inside = sorted(name for name in os.listdir(path)
                                if os.path.splitext(name)[1].lower() in kinds and not name.startswith("."))
            except OSError as error:
                yield path, InputError(f"{path}: cannot be read ({error.strerror})")
                continue
            yield from ((os.path.join(path, name), os.path.join(path, name)) for name in inside)
            if not inside:
                yield path, InputError(f"{path}: no picture in this folder")
        else:
            yield path, path


def open_own(name, file):
    """The picture as a person sees it: a camera's rotation is applied. InputError if there is none."""
    if isinstance(file, InputError):
        raise file
    try:
        return load_picture(file, upright=True)
    except FileNotFoundError:
        problem = "no such file"
    except UnidentifiedImageError:
        problem = f"not a picture of a kind that is read, {', '.join(FORMATS)}"
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
        problem = f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})"
    raise InputError(f"{name}: {problem}")


class Folder:
    """--output of one's own pictures: names each drawn picture so that none overwrites another, or an input."""

    def __init__(self, path, inputs):
        self.path, self.used = path, set()
        self.inputs = {os.path.realpath(file) for file in inputs if isinstance(file, str)}
        check_output(path)

    def file(self, name):
        stem, number = os.path.splitext(os.path.basename(name))[0], 1
        while True:
            path = os.path.join(self.path, f"{stem}{f'-{number}' if number > 1 else ''}.png")
            if path not in self.used and os.path.realpath(path) not in self.inputs:
                self.used.add(path)
                return path
            number += 1


def check_output(folder, flag="--output"):
    """Make the folder and see that it can be written: better now than after hours."""
    try:
        os.makedirs(folder, exist_ok=True)
        probe = os.path.join(folder, f".probe-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except (OSError, RecursionError) as error:  # RecursionError: makedirs, of a thousand folders in one another
        reason = getattr(error, "strerror", None) or error
        reason = "is a file; give a folder" if os.path.isfile(folder) else f"cannot be written ({reason})"
        raise InputError(f"{flag} {folder[:200]}: {reason}") from None


def check_asked(args, viewer):
    """InputError if this checkpoint cannot do what is asked, with what it can."""
    asked = [flag for flag in ("question", "statement", "find", "sentence") if getattr(args, flag) is not None]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]}, --{asked[1]}: give one of them")
    for flag in asked:
        if not is_usable(getattr(args, flag), str):  # bytes that are no UTF-8
            raise InputError(f"--{flag} {getattr(args, flag)!r:.40}: is no text")
        if not getattr(args, flag).strip():
            raise InputError(f"--{flag}: is empty")
    can, asked = viewer.can(), asked or ["image alone"]
    for what in [*asked, "attention"] if args.attention else asked:
        if what not in can and not (args.attention and what == "image alone"):
            is_it = f"fine-tuned for {viewer.task}" if viewer.task else "pre-trained, and fine-tuned for no task"
            needs = {"question": "fine-tuned for vqa", "statement": "fine-tuned for nlvr2",
                     "find": "pre-trained or fine-tuned for flickr30k"}
            needs = f"; --{what} needs one {needs[what]}" if what in needs else ""
            raise InputError(f"--{what}: {args.checkpoint} is {is_it}; it can be asked {', '.join(can.values())}"
                             + needs)
    if args.attention and (asked[0] == "find" or asked[0] == "image alone" and not viewer.objects):
        raise InputError("--attention: goes with --sentence or --question, whose words are watched")
    if viewer.task == "detection" and viewer.text == "caption" and args.sentence is None:
        print(f"evaluate.py: {args.checkpoint} has learnt to find objects with a sentence; give --sentence for better "
              "boxes", file=sys.stderr)


def show_own(args, viewer):
    """Answers --image and the flags beside it, on the console, in --output and --json; returns the exit code.

    A picture that cannot be read is named on stderr and left out; the exit code is then 2. Ctrl-C keeps what is done.
    """
    check_asked(args, viewer)
    if args.image.count("-") > 1:
        raise InputError("--image -: standard input can be read once")
    if "" in args.image:
        raise InputError("--image: one of its names is empty; give a file or a folder")
    longest = viewer.tokenizer.max_tokens - 2
    for text in filter(None, (args.question, args.statement, args.find, args.sentence)):
        pieces = len(viewer.tokenizer.wordpiece.encode(text, add_special_tokens=False).ids)
        if pieces > longest:
            print(f"evaluate.py: {text[:40]!r}: has {pieces} word pieces; the model reads the first {longest}",
                  file=sys.stderr)
    paths, bad = list(own_pictures(args.image)), []
    folder = Folder(args.output, [file for _, file in paths]) if args.output else None

    def readable():
        for name, file in paths:
            try:
                yield name, file, open_own(name, file)
            except InputError as error:
                tqdm.write(f"evaluate.py: {error}", file=sys.stderr)
                bad.append(name)

    results = []

    def save():
        if folder:
            write_safely(os.path.join(args.output, "results.json"), json.dumps(results, indent=1))
        if args.json:
            write_safely(args.json, json.dumps(results, indent=1))

    try:
        if args.statement is not None:
            results.append(show_statement(args, viewer, list(itertools.islice(readable(), 3))))
        elif args.attention:
            results.append(show_attention(args, viewer, list(itertools.islice(readable(), 2))))
        elif args.find is not None:
            show_found(args, viewer, readable(), len(paths), folder, results)
        else:
            for name, _, image in readable():
                results.append(show_one(args, viewer, name, image, folder))
    except BaseException:  # Ctrl-C: what was answered before is kept
        if results:
            save()
        raise
    save()
    return 2 if bad else 0


def show_one(args, viewer, name, image, folder):
    """Caption and objects of a picture, or the answers to --question; the result as results.json has it."""
    result, objects = {"image": name, "width": image.width, "height": image.height}, []
    if args.question is not None:
        result |= {"question": args.question, "answers": viewer.answer(image, args.question)}
        lines = [f"{a['probability']:.2f}  {a['answer']}" for a in result["answers"]]
        below = [args.question, *lines]
    else:
        result |= viewer.describe(image, args.sentence, args.threshold)
        lines, objects = [result["caption"]] if "caption" in result else [], result.get("objects", [])
        if args.sentence is not None:
            result["sentence"] = args.sentence
            if "match" in result:
                lines.append(f"{result['match']:.2f}  belongs to it: {args.sentence}")
        below = list(lines)
        lines += [f"{o['score']:.2f}  {label_of(o):32} x {o['box'][0]:.0f}  y {o['box'][1]:.0f}  "
                  f"w {o['box'][2]:.0f}  h {o['box'][3]:.0f}" for o in objects]
        if "objects" in result and not objects:
            lines.append(f"no object above {args.threshold:g} (--threshold)")
    print("\n".join([f"{name} ({image.width} x {image.height})", *(f"   {line}" for line in lines)]), flush=True)
    if folder:
        result["drawn"] = folder.file(name)
        write_safely(result["drawn"], as_png(draw_answer(image, objects, below)))
    return result


def show_found(args, viewer, pictures, total, folder, results):
    """--find: fills `results` with the pictures, the likeliest first."""
    found = []
    try:
        for name, file, image in tqdm(pictures, "pictures", total=total, disable=None, leave=False):
            odds = viewer.similarity(image, args.find)
            found.append((odds, file, {"image": name, "width": image.width, "height": image.height, "log_odds": odds,
                                       "probability": round(torch.tensor(odds).sigmoid().item(), 4)}))
    finally:
        found.sort(key=lambda one: -one[0])
        results += [result for _, _, result in found]
    print(f"{args.find}: {len(results)} pictures")
    for rank, r in enumerate(results[:20], 1):
        print(f"{rank:4}  {r['probability']:.2f}  {r['image']}")
    if len(results) > 20:
        print(f"      and {len(results) - 20} more")
    if folder and results:
        tiles = []
        for _, file, r in found[:12]:
            if isinstance(file, io.BytesIO):
                file.seek(0)
            below = f"{r['probability']:.2f}  {r['image']}"
            tiles.append(draw_answer(open_own(r["image"], file), [], [below], side=300))
        write_safely(folder.file("found"), as_png(contact_sheet(tiles)))


def show_statement(args, viewer, pictures):
    """--statement about two pictures."""
    if len(pictures) != 2:
        raise InputError("--statement: needs two pictures that can be read: --image LEFT RIGHT")
    (left, _, a), (right, _, b) = pictures
    chance = viewer.judge(a, b, args.statement)
    print(f"{left}, {right}\n   {str(chance > 0.5).lower()} ({max(chance, 1 - chance):.2f}): {args.statement}")
    return {"images": [left, right], "statement": args.statement, "answer": chance > 0.5,
            "probability": round(chance, 4)}


def show_attention(args, viewer, pictures):
    """Draws where each word and each object looks to --attention: words.png, objects.png, attention.npz."""
    if len(pictures) != 1:
        raise InputError("--attention: takes one picture that can be read")
    (name, _, image), = pictures
    check_output(args.attention, "--attention")
    result = show_one(args, viewer, name, image, None)
    sentence = args.sentence if args.question is None else args.question
    found = viewer.attention(image, sentence, args.threshold)
    T, files = len(found["words"]), {}
    for kind, weights, titles, things in (
            ("words", found["encoder"], found["words"], [None] * T),
            ("objects", found["decoder"], list(map(label_of, found["objects"])), found["objects"])):
        if not titles:
            continue
        cells = weights[:, :, T:]  # (L, n, S)
        rows = [(title, cells[:, i], cells[:, i].sum(-1), thing)
                for i, (title, thing) in enumerate(zip(titles, things))]
        title = {"words": "Where each word looks, by encoder layer (mean over heads)",
                 "objects": "Where each object's query looks, by decoder layer (mean over heads)"}[kind]
        files[kind] = os.path.join(args.attention, f"{kind}.png")
        write_safely(files[kind], as_png(draw_attention(image, title, rows, found["centres"])))
    numbers = io.BytesIO()
    np.savez_compressed(numbers, encoder=found["encoder"].numpy(), grid=found["grid"], words=np.array(found["words"]),
                        **{} if found["decoder"] is None else {"decoder": found["decoder"].numpy()})
    files["weights"] = os.path.join(args.attention, "attention.npz")
    write_safely(files["weights"], numbers.getvalue())
    for kind, path in files.items():
        print(f"   {kind:8} {path}")
    return {**result, "words": found["words"], "objects": found["objects"], "grid": found["grid"], "files": files}


# ----------------------------------------------------------------------------------------------------------------
# The report of a run: report.html has curves, measures and held-out pictures, and needs nothing from the network


class Gallery:
    """Held-out examples as the report shows them: what is true beside what the model says.

    An item: "kinds" to filter by; "score" 0 .. 1 to order by and "says", the same in words; "asks", what was asked;
    "pictures" shown once, or in each of "truth" and "answer", which are {"lines": [...], "boxes": [[x, y, w, h as
    fractions, label]], "pictures": [...]}. Everything is kept as JSON beside the page, so that runs can be compared.
    """

    def __init__(self):
        self.pictures, self.items = {}, []

    def picture(self, file):
        """Keep a small copy of a picture's file; returns the key that items name it by, the same in each run."""
        image, small = load_picture(file, 320, 320), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(small, format="JPEG", quality=85)
        key = hashlib.sha1(small.getvalue()).hexdigest()[:12]
        self.pictures[key] = {"size": image.size, "jpeg": base64.b64encode(small.getvalue()).decode()}
        return key

    def add(self, kinds, score, says, asks, truth, answer, pictures=()):
        self.items.append({"kinds": list(kinds), "score": round(float(score), 4), "says": says, "asks": asks,
                           "pictures": list(pictures), "truth": truth, "answer": answer})


def found_rightly(truth, found):
    """F1 of boxes [x, y, w, h, label]: a found one is right if a true one of its label, not yet taken, overlaps it by
    half. Both lists empty is right too.
    """
    left, right = list(truth), 0
    for *box, label in found:
        x, y, w, h = box
        corners = torch.tensor([[x, y, x + w, y + h]])
        like = [t for t in left if t[4] == label]
        if like:
            others = torch.tensor([[t[0], t[1], t[0] + t[2], t[1] + t[3]] for t in like])
            overlap = box_iou(corners, others)[0]
            if overlap.max() >= 0.5:
                left.remove(like[int(overlap.argmax())])
                right += 1
    return 2 * right / (len(truth) + len(found)) if truth or found else 1.0


def some(things, most):
    """At most so many of them, evenly spaced."""
    return [things[i * len(things) // most] for i in range(most)] if len(things) > most else list(things)


@torch.no_grad()
def pretrained_gallery(model, tokenizer, names, pictures, most=20, without=(), **settings):
    """Objects, captions, hidden words, pairs of some held-out pictures; without: the losses it was trained without."""
    viewer = Viewer(model, tokenizer, names, beam=1, without=without, **settings)
    gallery, chosen = Gallery(), some(pictures, most)
    phrases = Phrases(names).learn(pictures)
    for picture, asked in zip(chosen, questions(chosen, phrases, tokenizer)):
        image, key = load_picture(picture.file), gallery.picture(picture.file)
        with viewer.autocast():
            grid, _ = viewer.encode(image)
        said, annotation, facts = viewer.say(image, grid), getattr(picture, viewer.source), phrases.facts(picture)
        if annotation is not None and viewer.objects:
            true = boxes_in_pixels(torch.from_numpy(annotation[0]), (1, 1)).tolist()  # fractions
            attributes = annotation[2] if viewer.source == "vg" else [()] * len(true)
            true = [[*box, names[viewer.source][label].split(",")[0]] for box, label in zip(true, annotation[1])]
            its = [[names["attributes"][a].split(",")[0] for a in has] for has in attributes]
            scale = [1 / image.width, 1 / image.height] * 2
            found = [[*(v * s for v, s in zip(thing["box"], scale)), thing["name"]] for thing in said["objects"]]
            score = found_rightly(true, found)
            gallery.add(["objects"], score, f"F1 {score:.2f} at half overlap, by name", "",
                        {"boxes": [[*box[:4], " ".join([*a, box[4]])] for box, a in zip(true, its)],
                         "pictures": [key]},
                        {"boxes": [[*box[:4], label_of(o)] for box, o in zip(found, said["objects"])],
                         "pictures": [key]})
        if facts is not None and viewer.captions:
            said_of = phrases.find(said["caption"])
            true = [phrases.true(facts, thing[2], [a for _, _, a in before]) for before, thing in said_of]
            score = sum(true) / len(true) if true else 0.0
            says = f"{sum(true)} of {len(true)} object phrases are true" if true else "it names no object"
            gallery.add(["caption"], score, says, "",
                        {"lines": list(picture.sentences[:3])}, {"lines": [said["caption"]]}, [key])
        for tokens, labels in asked["visual"][:2] * ("mlm" not in without):
            with viewer.autocast():
                sentence = torch.tensor([tokens], device=viewer.device)
                hidden = [i for i, label in enumerate(labels) if label >= 0]
                logits = model.guess_words(model.encode(grid, sentence).states[0, hidden]).float()
            words = tokenizer.decode([labels[i] for i in hidden])
            chances, best = logits[0].softmax(-1).topk(3)
            guess = tokenizer.decode(logits.argmax(-1).tolist())
            gallery.add(["hidden word"], guess == words, "right" if guess == words else "wrong",
                        " ".join("___" if i in hidden else tokenizer.vocabulary[t] for i, t in enumerate(tokens)
                                 if t not in (tokenizer.cls, tokenizer.sep)),
                        {"lines": [words]}, {"lines": [guess] if len(hidden) > 1 else [
                            f"{tokenizer.vocabulary[w]} ({p:.2f})" for p, w in zip(chances.tolist(), best.tolist())]},
                        [key])
        for kind, false in (("itm", "another picture's"), ("foil", "one word is wrong")):
            for tokens, belongs in asked[kind][:1] * viewer.matches:
                with viewer.autocast():
                    odds = model.similarity(grid, torch.tensor([tokens], device=viewer.device))
                chance = odds.sigmoid().item()
                gallery.add(["sentence and picture"], chance if belongs else 1 - chance,
                            "right" if (chance > 0.5) == belongs else "wrong", tokenizer.decode(tokens[1:-1]),
                            {"lines": ["belongs to it" if belongs else f"does not: {false}"]},
                            {"lines": [f"{'belongs' if chance > 0.5 else 'does not'} ({chance:.2f})"]}, [key])
    return gallery


def task_gallery(task, said, examples, names, most=48):
    """Some of what `answer_task` gave for these examples."""
    gallery, chosen = Gallery(), some(range(len(examples)), most)
    if task == "caption":
        every = _cider([_ngrams(ptb_words(s)) for s in said], [[_ngrams(ptb_words(t)) for t in e.sentences]
                                                               for e in examples])
        thirds = np.quantile(every, [1 / 3, 2 / 3])
    if task == "flickr30k":
        matrix = np.stack(said)
        owner = np.repeat(np.arange(len(examples)), [len(e.sentences) for e in examples])
        sentences = [s for e in examples for s in e.sentences]
    for i in chosen:
        e, answer, keys = examples[i], said[i], [gallery.picture(file) for file in examples[i].files]
        if task == "vqa":
            record = {"question_id": 0, "answers": [{"answer": a} for a in e.answers]}
            score = vqa_scores({0: answer}, [record])["overall"] / 100
            people = Counter(e.answers).most_common(4)
            gallery.add([answer_type(record)], score, f"accuracy {score:.2f}", e.text,
                        {"lines": [f"{n} of {len(e.answers)}: {a}" for a, n in people]}, {"lines": [answer]}, keys)
        elif task == "nlvr2":
            truth = str(bool(e.target))
            gallery.add([f"{truth.lower()} statements"], answer == truth, "right" if answer == truth else "wrong",
                        e.text, {"lines": [truth.lower()]}, {"lines": [answer.lower()]}, keys)
        elif task == "caption":
            third = ("lowest", "middle", "highest")[int(np.searchsorted(thirds, every[i]))]
            gallery.add([f"{third} third"], min(1, every[i] / 2), f"CIDEr {every[i]:.2f}", "",
                        {"lines": list(e.sentences[:5])}, {"lines": [answer]}, keys)
        elif task == "detection":
            height, width = e.size
            boxes, labels = e.target
            true = [[*box, names["coco"][label]] for box, label in zip(
                boxes_in_pixels(torch.from_numpy(boxes), (1, 1)).tolist(), labels.tolist())]  # fractions
            found = [[x / width, y / height, w / width, h / height, names["coco"][label]]
                     for label, (x, y, w, h), score in sorted(answer, key=lambda one: -one[2]) if score > 0.5]
            score = found_rightly(true, found)
            gallery.add(sorted({t[4] for t in true}) or ["nothing"], score, f"F1 {score:.2f} at half overlap", "",
                        {"boxes": true, "pictures": keys}, {"boxes": found, "pictures": keys})
        elif task == "flickr30k":
            column = int(np.flatnonzero(owner == i)[0])
            order = np.argsort(-matrix[:, column], kind="stable")
            rank = int((matrix[:, column] >= matrix[i, column]).sum())
            gallery.add(["a sentence's picture"], 1 / rank, f"rank {rank} of {len(examples)}", sentences[column],
                        {"pictures": keys}, {"pictures": [gallery.picture(examples[p].files[0]) for p in order[:3]]})
            own = matrix[i, owner == i].max()
            rank = 1 + int((matrix[i, owner != i] >= own).sum())
            best = np.argsort(-matrix[i], kind="stable")[:3]
            gallery.add(["a picture's sentences"], 1 / rank, f"rank {rank} of {len(sentences)}", "",
                        {"lines": list(e.sentences[:5])}, {"lines": [sentences[s] for s in best]}, keys)
    return gallery


def run_facts(script, kind, args, config, world, resumed):
    """What the report says of a run besides its log: kind, commands (of args.words), settings, versions."""
    former = read_report(args.output).get("commands", []) if resumed else []
    cuda = str(args.device).startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__,
                "torchvision": torchvision.__version__, "NumPy": np.__version__,
                "machine": f"{platform.system()} {platform.machine()}, {device}, {world} process(es)"}
    with contextlib.suppress(OSError):  # there need be no git, nor a clone
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                               cwd=os.path.dirname(os.path.abspath(__file__)))
        if found.returncode == 0:
            versions["commit"] = found.stdout.strip()
    return {"kind": kind, "commands": [*former, launch(script, args.words)], "versions": versions,
            "settings": {k: getattr(config, k, None) if v is None else v for k, v in sorted(vars(args).items())
                         if k not in ("resume", "pad", "words")}}


def read_report(folder):
    """What `write_report` kept of a run, or {} where that is not there or damaged."""
    try:
        found = _read_json(os.path.join(folder, "report.json"))
    except InputError:
        return {}

    def texts(value):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    def side(part):  # of an item of the gallery
        return (isinstance(part, dict) and texts(part.get("lines", [])) and texts(part.get("pictures", [])) and all(
            isinstance(box, list) and len(box) == 5 and isinstance(box[4], str) and all(_is(v, NUMBER) for v in box[:4])
            for box in part.get("boxes", ()) if isinstance(part.get("boxes", []), list)))

    def item(one):
        return (isinstance(one, dict) and _is(one.get("score"), NUMBER) and texts(one.get("kinds"))
                and all(isinstance(one.get(key), str) for key in ("asks", "says"))
                and all(side(part) for part in (one, one.get("truth"), one.get("answer"))))

    def small(picture):  # becomes part of the page as it is, and the run may be another's
        size, jpeg = (picture.get(key) for key in ("size", "jpeg")) if isinstance(picture, dict) else (None, None)
        return (isinstance(size, list) and len(size) == 2 and all(_is(v, int) and 0 < v < 10_000 for v in size)
                and isinstance(jpeg, str) and re.fullmatch("[A-Za-z0-9+/=]*", jpeg) is not None)

    known = {"kind": lambda value: isinstance(value, str), "commands": texts, "settings": lambda _: True,
             "versions": lambda value: texts(list(value.values())), "gallery": lambda value: all(map(item, value)),
             "pictures": lambda value: all(map(small, value.values()))}
    empty = {"kind": "", "commands": [], "settings": {}, "versions": {}, "gallery": [], "pictures": {}}
    for key, fits in known.items():
        value = found.get(key, empty[key]) if isinstance(found, dict) else None
        if type(value) is not type(empty[key]) or not fits(value):
            return {}
    return found


def write_report(folder, facts, gallery=None):
    """FOLDER/report.html and what it is made of, report.json, from FOLDER/log.jsonl, `run_facts` and a Gallery.

    One that cannot be written is said and no more: a training should not end for the want of its report.
    """
    kept = {**read_report(folder), **facts}
    if gallery:
        kept |= {"pictures": gallery.pictures, "gallery": gallery.items}
    try:
        write_safely(os.path.join(folder, "report.json"), json.dumps(kept))
        if os.path.exists(os.path.join(folder, "log.jsonl")):
            write_safely(os.path.join(folder, "report.html"), report_page([read_run(folder)]))
    except InputError as error:
        tqdm.write(f"no report: {error}", file=sys.stderr)


def read_run(folder):
    """A run's folder -> {"name", "lines": its log, and what `write_report` kept}."""
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--report {folder}: no log.jsonl in it that can be read; give a run's --output") from None
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # the last line may be half there
            found = json.loads(line)
            if isinstance(found, dict) and _is(found.get("step"), int) and 0 <= found["step"] < 1e15:
                lines.append(found)
    if not lines:
        raise InputError(f"--report {folder}: log.jsonl has no line of a run yet")
    return {"name": os.path.normpath(folder), "lines": lines, "kind": "", "commands": [], "settings": {},
            "versions": {}, "pictures": {}, "gallery": [], **read_report(folder)}


def points_of(run, key, most=300):
    """[(step, value)] of a log key, where it is a finite number; more than `most` are drawn together by their mean.

    pycocotools says -1 where there is nothing to measure (no object of that size): that is no point.
    """
    points = [(line["step"], line[key]) for line in run["lines"] if _is(line.get(key), NUMBER) and line[key] != -1]
    size = -(-len(points) // most)
    return [tuple(sum(column) / len(part) for column in zip(*part))
            for part in (points[at:at + size] for at in range(0, len(points), size or 1))]


def short_number(value):
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def tick_values(low, high, log=False):
    """A few round numbers from low to high."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [v for p in powers for v in ((10 ** p,) if len(powers) > 3 else (10 ** p, 2 * 10 ** p, 5 * 10 ** p))
                if low * 0.999 <= v <= high * 1.001]
    rough = (high - low) / 4 or 1
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, curves, log=False, top=None, unit="step"):
    """A figure with an inline SVG. curves: [(label, CSS classes, [(step, value)])]; unit: what is counted below. The
    page's script reads the scales from data-..., so that a pointer or the arrow keys tell the values.
    """
    curves = [(label, kind, points) for label, kind, points in curves if points]
    values = [y for _, _, points in curves for _, y in points]
    steps = [x for _, _, points in curves for x, _ in points]
    log = log and min(values) > 0 and max(values) > 10 * min(values)
    low, high = (min(values), max(values)) if log else (min(0, *values), max(top or 0, *values))
    high, last = high if high > low else low + 1, max(*steps, 1)
    W, H, left, bottom = 420, 220, 46, 24

    def x_of(step):
        return left + step / last * (W - left - 10)

    def y_of(value):
        share = (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)
        return 10 + (1 - share) * (H - bottom - 10)

    drawn = []
    for v in tick_values(low, high, log):
        drawn.append(f'<line class="grid" x1="{left}" x2="{W - 10}" y1="{y_of(v):.1f}" y2="{y_of(v):.1f}"/>'
                     f'<text x="{left - 6}" y="{y_of(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    for v in tick_values(0, last):
        says = f"{v / 1000:g}k" if v >= 10000 else f"{v:g}"
        drawn.append(f'<text x="{x_of(v):.1f}" y="{H - 6}" text-anchor="middle">{says}</text>')
    for label, kind, points in curves:
        places = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        drawn.append(f'<polyline class="{kind}" data-label="{escape(label)}" points="{places}"/>')
        if len(points) < 30:
            drawn += [f'<circle class="{kind}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>' for x, y in points]
    says = "; ".join(f"{label}: {short_number(points[0][1])} at {unit} {points[0][0]:.0f}, "
                     f"{short_number(points[-1][1])} at {unit} {points[-1][0]:.0f}" for label, _, points in curves)
    keys = "".join(f'<span class="key {kind}">{escape(label)} <b>{short_number(points[-1][1])}</b></span>'
                   for label, kind, points in curves)
    return (f'<figure class="chart"><figcaption><b>{escape(title)}</b> {keys}</figcaption>'
            f'<svg viewBox="0 0 {W} {H}" role="img" tabindex="0" aria-label="{escape(f"{title}. {says}")}" '
            f'data-left="{left}" data-right="{W - 10}" data-top="10" data-bottom="{H - bottom}" data-last="{last}" '
            f'data-low="{low}" data-high="{high}" data-log="{int(log)}" data-unit="{unit}">{"".join(drawn)}</svg>'
            f'<p class="reading" aria-live="polite"></p></figure>')


def report_curves(runs):
    """The losses, in their order in the log, then the measures with what a blind model and a constant answer score."""
    keys = list(dict.fromkeys(k for run in runs for line in run["lines"] for k in line))
    losses = [k for k in keys if k == "loss" or k.startswith("loss_")]
    measures = [k[4:] for k in keys if k.startswith("val_")]

    def curves(*kinds, one="model"):
        return [(f"{run['name']}{says}" if len(runs) > 1 else says.strip(" ,") or one, f"run{n % 8} {kind}", points)
                for n, run in enumerate(runs) for says, kind, key in kinds if (points := points_of(run, key))]

    first = second = ""
    for key in losses if len(losses) > 2 else losses[:1]:  # a sum of one loss is that loss
        found = curves(("", "", key), one="training")
        if any(y for _, _, points in found for _, y in points):  # a loss that is off is 0 all the time
            first += chart("loss: the weighted sum" if key == "loss" else key.removeprefix("loss_"), found, log=True)
    for name in measures:
        found = curves(("", "", f"val_{name}"), (", blind", "blind", f"blind_{name}"),
                       (", constant answer", "habit", f"habit_{name}"))
        if any(len(points) > 1 for _, _, points in found):  # a single validation is in the table
            # What a constant answer scores is known once: drawn as a line through the whole run
            last = max(x for _, _, points in found for x, _ in points)
            found = [(label, kind, [*points, (last, points[0][1])] if "habit" in kind else points)
                     for label, kind, points in found]
            second += chart(name, found, top=100 if all(run["kind"] == "vqa" for run in runs) else 1)
    return (f'<section><h2 id="measures">Measures on held-out pictures</h2>{report_table(runs, measures)}'
            f'<div class="charts">{second}</div></section>'
            f'<section><h2 id="losses">Losses</h2><div class="charts">{first}</div></section>')


def report_table(runs, measures):
    """The last validation of each run, with a bar, and a mark on it where a blind model stands."""
    rows, scale = "", 100 if all(run["kind"] == "vqa" for run in runs) else 1
    for name in measures:
        cells, each = "", [{key: points[-1][1] for key in (f"val_{name}", f"blind_{name}", f"habit_{name}")
                            if (points := points_of(run, key, most=10 ** 9))} for run in runs]
        highest = max([scale, *(v for e in each for v in e.values())])
        for n, (run, last) in enumerate(zip(runs, each)):
            if f"val_{name}" not in last:
                cells += "<td>-</td>"
                continue
            value = last.pop(f"val_{name}")
            marks = "".join(f'<i style="left:{max(0, 100 * v / highest):.1f}%"></i>' for v in last.values())
            others = "".join(f" <small>{'blind' if key.startswith('blind') else 'constant'} {short_number(v)}</small>"
                             for key, v in last.items())
            name_of = escape(run["name"]) if len(runs) > 1 else ""  # for telephones, where the table has no head
            cells += (f'<td class="run{n % 8}" data-run="{name_of}"><b>{short_number(value)}</b>{others}'
                      '<div class="bar">'
                      f'<span style="width:{max(0, 100 * value / highest):.1f}%"></span>{marks}</div></td>')
        rows += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    if not rows:
        return "<p>No validation yet.</p>"
    heads = "".join(f"<th scope=col>{escape(run['name'])}</th>" for run in runs)
    few = {f"{line['blind_examples']:,}" for run in runs for line in run["lines"]
           if _is(line.get("blind_examples"), NUMBER)}
    few = f", on the first {' or '.join(sorted(few))} examples" if few else ""
    return (f'<div class="wide measures" tabindex="0" role="region" aria-label="measures"><table><thead><tr><td></td>'
            f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
            f"<p>Blind: the same model, with every picture replaced by the mean picture{few}; constant: the commonest "
            f"answer to everything. They are the marks on the bars; a full bar is {short_number(scale)} or the row's "
            "largest.</p>")


def report_gallery(runs, most):
    """The held-out examples with each run's answer, and the symbols of their pictures: (HTML, SVG)."""
    items, pictures = {}, {}  # the same example of several runs stands once
    for run in runs:
        for item in some(run["gallery"], most):
            key = json.dumps([item["kinds"], item["asks"], item["pictures"], item["truth"]])
            given = items.setdefault(key, (item, []))[1]
            if not any(other is run for other, _ in given):  # nor does one that a run was asked twice
                given.append((run, item))
        pictures |= run["pictures"]
    used = {p for item, given in items.values() for side in (item, item["truth"], *(i["answer"] for _, i in given))
            for p in side.get("pictures", ())}
    numbers = {name: n for n, name in enumerate(p for p in pictures if p in used)}
    symbols = "".join(
        f'<symbol id="p{n}" viewBox="0 0 {w} {h}"><image width="{w}" height="{h}" '
        f'href="data:image/jpeg;base64,{pictures[name]["jpeg"]}"/></symbol>'
        for name, n in numbers.items() for w, h in [pictures[name]["size"]])

    def drawn(name, boxes=(), says="the picture"):
        w, h = pictures[name]["size"]
        over = "".join(
            f'<g class="box{sum(map(ord, label)) % 6}">'
            f'<rect x="{x * w:.1f}" y="{y * h:.1f}" width="{bw * w:.1f}" height="{bh * h:.1f}"/>'
            # Letters are about half as wide as high: a label that would end outside begins further left
            f'<text x="{max(0, min(x, 1 - 0.037 * len(label))) * w:.1f}" '
            f'y="{max(y * h - w * 0.01, w * 0.06):.1f}" font-size="{w * 0.06:.1f}">{escape(label)}</text></g>'
            for x, y, bw, bh, label in boxes)  # a kind of thing has the same colour in truth and answer
        return (f'<svg class="picture" viewBox="0 0 {w} {h}" role="img" aria-label="{escape(says)}">'
                f'<use href="#p{numbers[name]}" width="{w}" height="{h}"/>{over}</svg>')

    def side(title, part, kind=""):
        shown = [p for p in part.get("pictures", ()) if p in numbers]
        boxes = part.get("boxes", ())
        objects = f": {', '.join(box[4] for box in boxes) or 'no object'}" if "boxes" in part else ""
        images = "".join(drawn(p, boxes if n == 1 else (), f"{title}, picture {n} of {len(shown)}{objects}")
                         for n, p in enumerate(shown, 1))
        lines = "".join(f"<p>{escape(line)}</p>" for line in part.get("lines", ()))
        return f'<div class="side {kind}"><h4>{escape(title)}</h4>{images}{lines}</div>'

    cards, kinds = "", {}
    for item, given in sorted(items.values(), key=lambda one: one[0]["score"]):
        for kind in item["kinds"]:
            kinds[kind] = kinds.get(kind, 0) + 1
        common = "".join(drawn(p, says=f"picture {n} of {len(item['pictures'])}")
                         for n, p in enumerate(item["pictures"], 1) if p in numbers)
        answers = "".join(side(f"{run['name'] if len(runs) > 1 else 'model'} ({i['says']})", i["answer"], "answer")
                          for run, i in given)
        score = sum(i["score"] for _, i in given) / len(given)
        asks = f"<h3>{escape(item['asks'])}</h3>" if item["asks"] else ""
        cards += (f'<article class="card" data-kinds="{escape("|".join(item["kinds"]))}" data-score="{score:.4f}">'
                  f'<p class="kind">{escape(", ".join(item["kinds"]))}</p>{asks}'
                  + (f'<div class="common">{common}</div>' if common else "")
                  + f'<div class="sides">{side("truth", item["truth"])}{answers}</div></article>')
    if not cards:
        return "", ""
    options = "".join(f'<option value="{escape(kind)}">{escape(kind)} ({n})</option>'
                      for kind, n in sorted(kinds.items()))
    return (f'<section><h2 id="gallery">Held-out pictures</h2><form class="controls"><label>Kind <select id="kind">'
            f'<option value="">all ({len(items)})</option>{options}</select></label> <label>Order <select id="order">'
            '<option value="1">worst first</option><option value="-1">best first</option></select></label> '
            f'<output id="shown" aria-live="polite">{len(items)} shown</output></form>'
            f'<div class="cards" style="--least: {200 * (len(runs) + 1) + 60}px">{cards}</div>'
            '<p><button id="more" hidden>Show more</button></p></section>'), symbols


def report_settings(runs):
    """Commands, versions and settings; of several runs those settings first in which they differ."""
    body = ""
    for run in runs:
        commands = "".join(f"<pre tabindex=0>{escape(command)}</pre>" for command in run["commands"])
        versions = escape(", ".join(f"{name} {version}" for name, version in run["versions"].items()))
        body += f"<h3>{escape(run['name'])}</h3>{commands}<p>{versions}</p>"
    keys = sorted({k for run in runs for k in run["settings"]})

    def table(keys):
        heads = "".join(f"<th scope=col>{escape(run['name'])}</th>" for run in runs)
        rows = "".join(f"<tr><th scope=row>--{escape(k.replace('_', '-'))}</th>" + "".join(
            f"<td>{escape(says(run['settings'].get(k)))}</td>" for run in runs) + "</tr>" for k in keys)
        return (f'<div class="wide" tabindex="0" role="region" aria-label="settings"><table><thead><tr><td></td>{heads}'
                f"</tr></thead><tbody>{rows}</tbody></table></div>")

    def says(value):
        return " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)

    differ = [k for k in keys if len({says(run["settings"].get(k)) for run in runs}) > 1]
    if differ:
        body += f"<h3>Settings that differ</h3>{table(differ)}"
    return (f'<section><h2 id="settings">Settings</h2>{body}<details><summary>All settings</summary>{table(keys)}'
            "</details></section>")


def fill_page(title, lead, body, sections, symbols=""):
    """assets/report.html with a page's parts; sections: {id: name} of those in body, which is HTML."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "assets", "report.html"), encoding="utf-8") as file:
        template = file.read()
    parts = {"title": escape(title), "lead": escape(lead), "body": body, "symbols": symbols,
             "sections": "".join(f'<a href="#{name}">{says}</a>' for name, says in sections.items())}
    # All at once: a sentence may have braces of its own
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


def report_page(runs, limit=5_000_000):
    """One HTML page of one run or several (each as `read_run` gives it), no longer than `limit` bytes."""
    names = ", ".join(run["name"] for run in runs)
    last = [run["lines"][-1]["step"] for run in runs]
    spent = [line["seconds"] for run in runs for line in run["lines"][-3:] if _is(line.get("seconds"), NUMBER)]
    lead = (f"{runs[0]['kind'] or 'a run'}, step {last[0]}" + (f", {spent[-1] / 60:.1f} minutes of training" if spent
            else "") if len(runs) == 1 else f"{len(runs)} runs, to step {', '.join(map(str, last))}")
    curves, settings, most = report_curves(runs), report_settings(runs), max(len(run["gallery"]) for run in runs)
    while True:
        gallery, symbols = report_gallery(runs, most)
        sections = {"measures": "Measures", "losses": "Losses", **({"gallery": "Pictures"} if gallery else {}),
                    "settings": "Settings"}
        page = fill_page(f"E2E-VLP: {names}", lead, curves + gallery + settings, sections, symbols)
        if len(page.encode(errors="backslashreplace")) <= limit or not most:
            return page
        most //= 2


# ----------------------------------------------------------------------------------------------------------------
# The command


# The ways to call, and the flags that go with each: another would be ignored without a word
WITH_MODEL = ("checkpoint", "json", "beam", "alpha", "device", "amp")
WAYS = {"data": (*WITH_MODEL, "task", "index", "split", "submit", "sheet", "examples", "blind", "text", "objects",
                 "batch_size"),
        "image": (*WITH_MODEL, "question", "statement", "find", "sentence", "attention", "threshold", "output"),
        "score": ("task", "against", "questions", "split", "json", "device"), "report": ("output", "device")}


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Measure a checkpoint, score a result file, ask about pictures of one's own, or compare runs.",
        usage="evaluate.py --checkpoint FILE (--data DIR | --image PICTURE ...)\n"
              "       evaluate.py --task TASK --score FILE --against FILE\n"
              "       evaluate.py --report RUN [RUN ...]",
        formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", metavar="FILE", help="what pretrain.py or finetune.py wrote")
    g = parser.add_argument_group("measures on a data set")
    g.add_argument("--task", choices=TASKS, help="score a fine-tuned checkpoint, or with --score a result file")
    g.add_argument("--data", metavar="DIR", help="the data folder (README: the data tree)")
    g.add_argument("--index", metavar="DIR", help="where the index of the data lies (default: DATA/.index)")
    g.add_argument("--split", help="val (default) or test; vqa also test-dev; detection has no test. With --score: "
                                   "that of Karpathy's files which counts (default: test)")
    g.add_argument("--submit", metavar="FILE", help="write the results in the official server's format to this file")
    g.add_argument("--sheet", metavar="FILE",
                   help="pre-trained: draw a dozen pictures with what was found to this PNG file")
    g.add_argument("--examples", type=int, default=0, metavar="N",
                   help="the first N only; default: all, pre-trained 1000")
    g.add_argument("--blind", action="store_true", help="show the mean picture in place of each")
    g.add_argument("--text", choices=("caption", "none"), help="sentence for detection (default: as trained)")
    g.add_argument("--objects", action="store_true", help="caption: caption_objects too, by Visual Genome's boxes")
    g.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time")
    g = parser.add_argument_group("anybody's results, no model involved")
    g.add_argument("--score", metavar="FILE", help="a result file")
    g.add_argument("--against", metavar="FILE", help="the official annotation file that it is compared with")
    g.add_argument("--questions", metavar="FILE", help="VQA: the questions that may be answered")
    g = parser.add_argument_group("pictures of one's own")
    g.add_argument("--image", nargs="+", metavar="PICTURE", help="files, folders, or - for standard input")
    g.add_argument("--question", metavar="SENTENCE", help="a VQA checkpoint: the five likeliest answers")
    g.add_argument("--statement", metavar="SENTENCE",
                   help="an NLVR2 checkpoint: is it true of two pictures, left and right?")
    g.add_argument("--find", metavar="SENTENCE", help="pre-trained or for retrieval: the pictures by how well it fits")
    g.add_argument("--sentence", help="pre-trained or for retrieval: does it belong to the picture? Pre-trained or for "
                                      "detection: objects are looked for with it")
    g.add_argument("--attention", metavar="DIR", help="draw where each word and each object looks, by layer")
    g.add_argument("--threshold", type=float, default=0.5, metavar="P", help="objects: least probability, 0 to 1")
    g = parser.add_argument_group("reports")
    g.add_argument("--report", nargs="+", metavar="RUN", help="folders of runs (their --output): write report.html of "
                                                              "one anew, or compare several on one page")
    g = parser.add_argument_group("output")
    g.add_argument("--json", metavar="FILE",
                   help="write the measures, or what was answered of one's own pictures, to this file")
    g.add_argument("--output", metavar="DIR",
                   help="folder: drawn pictures and results.json of --image; report.html of --report (default: the "
                        "run's own folder; the folder that several lie in)")
    g = parser.add_argument_group("model")
    g.add_argument("--beam", type=int, default=4, metavar="N", help="captions: beams of the search")
    g.add_argument("--alpha", type=float, default=0.9, metavar="A", help="captions: length penalty")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps")
    g.add_argument("--amp", choices=("none", "bf16"), default="none", help="mixed precision")
    args = parser.parse_args(argv)
    for flag, least, most in (("batch_size", 1, 10 ** 6), ("beam", 1, 1000), ("examples", 0, 10 ** 9),
                              ("threshold", 0, 1), ("alpha", -10, 10)):
        if not least <= getattr(args, flag) <= most:  # NaN is not either
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)!s:.40}: must be from {least} to {most}")
    way = next((way for way in ("score", "report", "image") if getattr(args, way)), "data")
    given = [flag for flag, value in vars(args).items() if value != parser.get_default(flag)]
    for flag in given:
        if getattr(args, flag) == "":  # which would be taken for none given
            raise InputError(f"--{flag.replace('_', '-')}: is empty")
    for flag in given:
        if flag in WAYS and flag != way:
            raise InputError(f"--{way}, --{flag}: give one of them")
    for flag in given:
        if flag != way and flag not in WAYS[way]:
            fits = " or ".join(f"--{other}" for other, flags in WAYS.items() if flag in flags)
            raise InputError(f"--{flag.replace('_', '-')}: goes with {fits}, not with --{way}")
    if args.score and not (args.task and args.against):
        raise InputError("--score: needs --task and --against, the official annotation file")
    if args.score and args.split and (args.task not in ("caption", "flickr30k") or args.split not in ("val", "test")):
        raise InputError(f"--split {args.split}: with --score val or test of Karpathy's files (caption, flickr30k); "
                         "what else counts, --against decides")
    args.split = args.split or ("test" if args.score else "val")
    if not args.score and not args.report and not (args.checkpoint and (args.image or args.data)):
        if args.checkpoint:
            raise InputError("--checkpoint: give --data DIR too (measures), or --image PICTURE (pictures of your own)")
        raise InputError("give --checkpoint and --data (measures) or --image (pictures of your own); or --task, "
                         "--score and --against; or --report")
    for flag in ("json", "sheet", "submit"):
        path = getattr(args, flag)
        if path and (os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK)):
            raise InputError(f"--{flag} {path}: cannot be written; make its folder first, or give another")
    return args


def write_results(path, task, results):
    """A result file as the task's server takes it."""
    if task == "flickr30k":
        matrix = io.BytesIO()
        np.save(matrix, results)
        write_safely(path, matrix.getvalue())
    elif task == "nlvr2":
        write_safely(path, "".join(f"{identifier},{value}\n" for identifier, value in results.items()))
    else:
        write_safely(path, json.dumps(results))


def load(args, world=1):
    """(state, tokenizer, model) of --checkpoint, if it can do what the flags ask for; collective."""
    def build():
        state = load_checkpoint(args.checkpoint)
        if "args" not in state:
            raise InputError(f"--checkpoint {args.checkpoint}: not of a training run; give a run's last.pt or best.pt")
        task = state["config"].task
        if args.task and task != args.task and (task or args.task not in ZERO_SHOT):
            is_it = f"fine-tuned for {task}" if task else "pre-trained, and fine-tuned for no task"
            raise InputError(f"--task {args.task}: {args.checkpoint} is {is_it}; give "
                             + (f"--task {task}" if task else f"one of {', '.join(ZERO_SHOT)}, or no --task to measure "
                                "what it has learnt"))
        if task and not args.task and not args.image:
            raise InputError(f"--checkpoint {args.checkpoint}: is fine-tuned for {task}; give --task {task}")
        if not args.task and not args.image and (args.submit or args.blind or args.split != "val"):
            raise InputError("--submit, --blind, --split: need a --task")
        tokenizer = Tokenizer(state["vocabulary"], state["config"].max_tokens)
        model = E2EVLP(state["config"]).to(args.device)
        model.load_state_dict(state["model"])
        return state, tokenizer, model

    return attempt(build, world)


def run(args, rank=0, world=1):
    """{measure: value} of what the flags ask for, and the files they name; collective."""
    if args.score:
        return score_files(args.task, args.score, args.against, args.questions, args.split)
    state, tokenizer, model = load(args, world)
    names = state["names"]
    settings = {"short": max(state["args"]["short_sides"]), "long": state["args"]["long_side"], "device": args.device,
                "amp": args.amp == "bf16", "batch_size": args.batch_size, "rank": rank, "world": world}
    if args.task:
        return run_task(args, model, tokenizer, names, {**settings, "beam": args.beam, "alpha": args.alpha, "blind":
                        args.blind, "text": args.text or state["args"].get("text", "caption")})

    def read():
        data = index_pretraining(args.data, state["args"]["sets"], args.index, say_first(rank))
        check_names(args.data, data["names"], names, args.checkpoint)
        if not data["val"]:
            raise InputError(f"--data {args.data}: no held-out picture with a sentence")
        return decodable(data["val"][:args.examples or 1000], say_first(rank))

    pictures = attempt(read, world)
    if args.sheet and rank == 0:
        draw_sheet(args.sheet, model, tokenizer, names, pictures[:12], short=settings["short"], long=settings["long"],
                   device=args.device, without=state["args"].get("without", ()))
    return measure_with_blind(model, tokenizer, names, pictures, **settings)


def run_task(args, model, tokenizer, names, settings):
    """The official scores of a task's split; writes --submit. Collective."""
    rank, world = settings["rank"], settings["world"]

    def read():
        found = index_task(args.task, args.data, args.split, args.index, say_first(rank))
        if args.task == "detection" and found["categories"] != names["coco"]:
            raise InputError(f"--data {args.data}: COCO's categories are not those of {args.checkpoint} "
                             f"(instances_{args.split}2017.json has others)")
        rows, examples = None, found["examples"][:args.examples] if args.examples else found["examples"]
        if args.task == "flickr30k" and args.submit:
            with open(args.checkpoint, "rb") as file:
                key = {"checkpoint": hashlib.sha256(file.read()).hexdigest(), "blind": args.blind, "amp": args.amp,
                       "scores": "log-odds",
                       "pictures": hashlib.sha256(repr([(e.id, e.sentences) for e in examples]).encode()).hexdigest()}
            rows = Rows(args.submit, rank, key, sum(len(e.sentences) for e in examples))
            rows.read()
        return examples, rows

    examples, rows = attempt(read, world)
    said = answer_task(args.task, model, tokenizer, names, examples, rows=rows, **settings)

    def finish():
        if rank:
            return {}
        if args.submit:
            ids = coco_boxes(args.data, args.split)[1] if args.task == "detection" else ()
            write_results(args.submit, args.task, results_of(args.task, said, examples, ids))
            print(f"{args.submit}: {len(examples)} {'pictures' if examples[0].sentences else 'answers'}")
            if rows:
                rows.remove()
        return score_answers(args.task, said, examples, args.data, args.split, args.objects)

    return attempt(finish, world)


def run_own(args):
    """--image: the exit code."""
    state, tokenizer, model = load(args)
    config, names = state["config"], state["names"]
    print(f"{args.checkpoint}: {f'fine-tuned for {config.task}' if config.task else 'pre-trained'}, {config.backbone}, "
          f"{config.encoder_layers} + {config.decoder_layers} layers")
    return show_own(args, Viewer(model, tokenizer, names, short=max(state["args"]["short_sides"]),
                                 long=state["args"]["long_side"], device=args.device, amp=args.amp == "bf16",
                                 beam=args.beam, alpha=args.alpha, without=state["args"].get("without", ()),
                                 text=state["args"].get("text", "caption")))


def run_report(args):
    """--report: writes the page."""
    page = report_page([read_run(folder) for folder in args.report])
    folder = args.output or args.report[0]
    if len(args.report) > 1 and not args.output:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in args.report])
        if folder == os.path.dirname(folder) or os.path.exists(os.path.join(folder, "log.jsonl")):
            raise InputError("--report: give --output, a folder for the page that compares the runs")
    check_output(folder)
    path = os.path.join(folder, "report.html")
    write_safely(path, page)
    print(os.path.relpath(path))


def main(argv=None):
    def work(stop):
        for stream in (sys.stdout, sys.stderr):  # names of files need not be text
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        args = parse(argv)
        rank, world = 0, 1
        if args.report:
            return run_report(args)
        if not args.score:
            rank, world, args.device = start_processes(args.device)
        if args.image:
            if world > 1:
                raise InputError("--image: runs on one process; start it without torchrun")
            return run_own(args)
        scores = run(args, rank, world)
        if rank == 0:
            for name, value in scores.items():
                if name.startswith("val_"):
                    print(f"{name[4:]:24} {value:.3f}   blind {scores['blind_' + name[4:]]:.3f}")
                elif not name.startswith("blind_"):
                    print(f"{name:24} {value:.3f}")
            if args.json:
                write_safely(args.json, json.dumps(scores, indent=1))
        stop_processes(world)

    return command("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
