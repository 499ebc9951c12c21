"""Stage 3: measures. What a pre-trained model has learnt, and the official scores of the five tasks of section 5.1.

    python evaluate.py --checkpoint runs/pretrain/last.pt --data DIR --json FILE --sheet FILE.png   # held-out pictures
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --split val              # official measures
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --split test --submit FILE    # a server's
    python evaluate.py --task caption --score RESULTS --against ANNOTATIONS --json FILE             # anybody's results

Pre-trained models: beside each measure stands `blind_...`: the same model and the same inputs with every picture
replaced by the mean picture. What is left then is what the words alone, or habit alone, give away.

The words of a sentence are checked against the annotation: an object phrase is a name of the label sets with the
attribute words right before it ("small red circle"). It is true of a picture if one annotated object has that name and
all of these attributes. Nothing else is parsed, so a sentence may have other faults that these measures do not see.
"""

import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from data import (
    InputError,
    Tokenizer,
    attempt,
    decodable,
    gathered,
    index_pretraining,
    index_task,
    load_picture,
    mask_words,
    normalise_answer,
    pad_pictures,
    pad_tokens,
    read_json,
    read_vg,
    start_processes,
    stop_processes,
    to_pixels,
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
        sentences = rng.sample(picture.sentences, min(per_picture, len(picture.sentences)))
        facts = phrases.facts(picture)
        q = {"mlm": [], "visual": [], "itm": [], "foil": [], "first": tokenizer.encode(picture.sentences[0])}
        known = {s.lower() for s in picture.sentences}
        for i, sentence in enumerate(sentences):
            tokens = tokenizer.encode(sentence)
            labels = mask_words(tokens, tokenizer, rng)[1]
            q["mlm"].append(([tokenizer.mask if label >= 0 else t for t, label in zip(tokens, labels)], labels))
            false = (number + i) % 2
            if false and len(pictures) > 1:
                drawn = (rng.choice(pictures[rng.randrange(len(pictures))].sentences) for _ in range(100))
                other = next((s for s in drawn if s.lower() not in known), None)
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
    scores = detection_scores(results, truth)
    return scores["AP"], scores["AP50"]


def found_objects(objects, source):
    """The last layer's answer: scores (B, Q), labels (B, Q) (no-object aside), boxes (B, Q, 4) cxcywh."""
    scores, labels = objects["logits"][source][-1].float().softmax(-1)[..., :-1].max(-1)
    return scores, labels, objects["boxes"][-1]


@torch.no_grad()
def measure(model, tokenizer, names, pictures, *, short, long, device="cpu", batch_size=32, amp=False, blind=False,
            rank=0, world=1):
    """All measures on `pictures`: {"mlm_accuracy": ..., ...} as fractions. Collective: each process does its share.

    A measure that has nothing to count (no Visual Genome annotation, say) is left out.
    """
    model.eval()
    phrases = Phrases(names).learn(pictures)
    asked = questions(pictures, phrases, tokenizer)
    source = "coco" if names["coco"] else "vg"
    mean = mean_picture([p.file for p in pictures[:500]]) if blind else None
    tally = defaultdict(list)  # measure -> 1 or 0 for each thing asked; for AP the boxes found

    # Pictures of like shape together; which picture is in which batch changes nothing but the padding.
    mine = sorted(range(rank, len(pictures), world), key=lambda i: pictures[i].size[1] / pictures[i].size[0])
    for at in range(0, len(mine), batch_size):
        numbers = mine[at:at + batch_size]
        batch = [pictures[i] for i in numbers]
        images, sizes = pad_pictures([
            to_pixels(mean.resize(p.size[::-1]) if blind else load_picture(p.file, short, long), short, long)
            for p in batch])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            grid = model.encode_picture(images.to(device), sizes.to(device))
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
    """CIDEr-D: tf-idf cosine of n-grams with clipped counts and a penalty for another length (sigma 6), times 10.

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

    total = 0.0
    for (size, grams), truth in zip(results, references):
        vector, norms = weigh(grams)
        for true_size, true_grams in truth:
            true, true_norms = weigh(true_grams)
            products = [0.0] * 4
            for gram, weight in vector.items():
                if gram in true:
                    products[len(gram) - 1] += min(weight, true[gram]) * true[gram]
            cosine = sum(p / (a * b) for p, a, b in zip(products, norms, true_norms) if a and b) / 4
            apart = max(0, size - 1) - max(0, true_size - 1)
            total += 10 * cosine * math.exp(-apart ** 2 / 72) / len(truth)
    return total / len(references)


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
            "ROUGE_L": rouge, "CIDEr": _cider(grams, true_grams)}


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
                         "own and each sentence its picture; give the matrix of the whole test split")
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


def detection_scores(results, annotation_file, image_ids=None):
    """{"AP", "AP50", "AP75", "APs", "APm", "APl"} of boxes as fractions; -1 where there is nothing to measure.

    results: dicts of image_id, category_id, bbox (x, y, w, h in pixels), score; annotation_file: COCO's instances
    JSON, a path or what it holds; image_ids: the pictures to look at, all by default.
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
    return type(x) in (int, float) and abs(x) < 1e100 if kind == NUMBER else type(x) is kind


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
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); write it with numpy.save") from None
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu" or matrix.shape != shape:
        is_it = f"{matrix.dtype} {matrix.shape}" if isinstance(matrix, np.ndarray) else "an archive"
        raise InputError(f"{path}: is {is_it}, but must be numbers {shape}: a row for each picture of the test split, "
                         "a column for each of its sentences, picture after picture; write it anew")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(f"{path}: row {row}, column {column} is {matrix[row, column]}; mend the model or its numbers")
    return matrix


def _karpathy(path, found, fields):
    """The test pictures of Karpathy's dataset_coco.json or dataset_flickr30k.json."""
    images = [image for image in _listed(path, found, "images", {"split": str, "sentences": RECORDS, **fields})
              if image["split"] == "test"]
    for image in _records(f"{path}, split 'test'", images, {"sentences": RECORDS}):
        _listed(path, image, "sentences", {"raw": str})
    return images


def score_files(task, results, against, questions=None):
    """The scores of a result file, {measure: value} as the task's function above gives them.

    | task      | results                             | against                                                |
    | vqa       | list of {"question_id", "answer"}   | v2_mscoco_*_annotations.json (and its questions)       |
    | nlvr2     | CSV, rows like dev-850-0-0,True     | dev.json, test1.json                                   |
    | caption   | list of {"image_id", "caption"}     | captions_*.json, or Karpathy's dataset_coco.json: test |
    | flickr30k | .npy, (pictures, sentences)         | Karpathy's dataset_flickr30k.json: test                |
    | detection | list of {"image_id", "category_id", | instances_*.json                                       |
    |           | "bbox", "score"}                    |                                                        |

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
        records = _listed(against, truth, "annotations", {"question_id": int, "answers": RECORDS})
        for r in records:
            _listed(f"{against}, question_id {r['question_id']}", r, "answers", {"answer": str})
            if answer_type(r) not in ANSWER_TYPES:
                raise InputError(f"{against}: question_id {r['question_id']}: answer_type {str(answer_type(r))[:40]!r} "
                                 f"is not one of {', '.join(ANSWER_TYPES)}; give VQA v2's annotations")
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
            for image in _karpathy(against, truth, {"cocoid": int}):
                references[image["cocoid"]] += [s["raw"] for s in image["sentences"]]
        return caption_scores(read_texts(results, "image_id", "caption", list(references)), references)
    if task == "flickr30k":
        counts = [min(5, len(image["sentences"])) for image in _karpathy(against, truth, {})]
        owner = np.repeat(np.arange(len(counts)), counts)
        return retrieval_scores(read_matrix(results, (len(counts), len(owner))), owner)
    images, categories = ({r["id"] for r in _listed(against, truth, key, {"id": int})}
                          for key in ("images", "categories"))
    _listed(against, truth, "annotations", {"id": int, "image_id": int, "category_id": int, "bbox": BOX, "area": NUMBER,
                                            "iscrowd": int}, empty=True)
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
        part = groups[at:at + batch_size]
        numbers = [i for group in part for i in group]
        sides = range(len(examples[numbers[0]].files))
        images = [picture_of(examples[group[0]].files[side], mean, short, long) for side in sides for group in part]
        pixels, sizes = pad_pictures([to_pixels(image, short, long) for image in images])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            grid = model.encode_picture(pixels.to(device), sizes.to(device))
            if task == "flickr30k":
                for j, i in enumerate(numbers):
                    row = torch.empty(len(every))
                    for start in range(0, len(every), 256):  # the backbone ran once; each pair goes through the encoder
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
    truth = read_json(f"{data}/coco/annotations/instances_{split}2017.json", "COCO's boxes")
    return truth, sorted(c["id"] for c in truth["categories"])


def score_answers(task, said, examples, data, split, objects=False):
    """The official scores of what `answer_task` gave, or {} where the truth is not known.

    objects: captions are also checked against Visual Genome's boxes, which takes minutes to read at full size.
    """
    if task == "vqa":
        if not examples[0].answers:
            return {}
        path = f"{data}/vqa/v2_mscoco_{split}2014_annotations.json"
        answers = {e.id: answer for e, answer in zip(examples, said)}
        return vqa_scores(answers, [r for r in read_json(path, "scores")["annotations"] if r["question_id"] in answers])
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
# Looking


@torch.no_grad()
def draw_sheet(path, model, tokenizer, names, pictures, *, short, long, device="cpu", columns=4, threshold=0.5):
    """A PNG with each picture, the objects found in it (no sentence given), and its generated caption."""
    model.eval()
    source = "vg" if names["vg"] else "coco"
    font, side = ImageFont.load_default(size=13), 300
    tiles = []
    for picture in pictures:
        image = load_picture(picture.file)
        pixels, sizes = pad_pictures([to_pixels(image, short, long)])
        alone = model.encode(model.encode_picture(pixels.to(device), sizes.to(device)))
        objects = model.detect(alone)
        scores, labels, boxes = (x[0].cpu() for x in found_objects(objects, source))
        attributes = objects["attributes"][-1, 0].float().softmax(-1).cpu()
        caption = tokenizer.decode(model.generate(alone)[0][0])
        scale = side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        tile = Image.new("RGB", (side, side + 64), "white")
        tile.paste(image)
        pen = ImageDraw.Draw(tile)
        for q in torch.nonzero(scores > threshold)[:, 0].tolist():
            x, y, w, h = boxes_in_pixels(boxes[q], image.size[::-1]).tolist()
            colour = f"hsl({q * 47 % 360}, 90%, 35%)"
            pen.rectangle((x, y, x + w, y + h), outline=colour, width=2)
            # A box's attributes share one softmax, so k of them come to about 1 / k each.
            likely = sorted(attributes[q].argsort(descending=True)[:3].tolist()) if source == "vg" else []
            says = [names["attributes"][a].split(",")[0] for a in likely if attributes[q, a] > 0.15]
            text = " ".join([*says, names[source][labels[q]].split(",")[0]])
            left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
            x, y = max(0, min(x, side - right - 2)), max(0, y - bottom - 2)
            pen.rectangle((x, y, x + right + 2, y + bottom + 2), fill="white")
            pen.text((x + 1, y), text, fill=colour, font=font)
        lines, line = [], "says:"
        for word in caption.split():
            if pen.textlength(f"{line} {word}", font=font) > side - 6:
                lines, line = [*lines, line], word
            else:
                line = f"{line} {word}"
        for i, text in enumerate([*lines, line][:4]):
            pen.text((3, side + 2 + 15 * i), text, fill="black", font=font)
        tiles.append(tile)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 72)), (200, 200, 200))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (side + 8) + 4, i // columns * (side + 72) + 4))
    sheet.quantize(128).save(path, format="PNG", optimize=True)


# ----------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="score a fine-tuned checkpoint, or with --score a result file")
    parser.add_argument("--checkpoint", help="what pretrain.py or finetune.py wrote")
    parser.add_argument("--data", help="the data folder (README: the data tree)")
    parser.add_argument("--index", help="where the index of the data lies (default: DATA/.index)")
    parser.add_argument("--split", default="val", help="val or test; vqa also test-dev; detection has no test")
    parser.add_argument("--submit", help="write the results in the official server's format to this file")
    parser.add_argument("--score", help="a result file of anybody's, no model involved")
    parser.add_argument("--against", help="the annotation file that --score is compared with")
    parser.add_argument("--questions", help="VQA with --score: the questions that may be answered")
    parser.add_argument("--json", help="write the measures to this file")
    parser.add_argument("--sheet", help="pre-trained: draw a dozen pictures with what was found to this PNG file")
    parser.add_argument("--examples", type=int, default=0, help="use the first ones only (0: all; pre-trained: 1000)")
    parser.add_argument("--blind", action="store_true", help="show the mean picture in place of each")
    parser.add_argument("--text", choices=("caption", "none"), help="sentence for detection (default: as trained)")
    parser.add_argument("--objects", action="store_true", help="caption: caption_objects too, by Visual Genome's boxes")
    parser.add_argument("--beam", type=int, default=4, help="captioning")
    parser.add_argument("--alpha", type=float, default=0.9, help="captioning: length penalty")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="mixed precision")
    args = parser.parse_args(argv)
    for flag in ("batch_size", "beam"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 1 or more")
    if args.score:
        if not args.task or not args.against:
            raise InputError("--score: needs --task and --against, the official annotation file")
    elif not args.checkpoint or not args.data:
        raise InputError("give --checkpoint and --data, or --task, --score and --against")
    for flag in ("json", "sheet", "submit"):
        path = getattr(args, flag)
        if path and (os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK)):
            raise InputError(f"--{flag} {path}: cannot be written; make its folder first, or give another")
    return args


def write_results(path, task, results):
    """A result file as the task's server takes it: to a temporary name, then renamed."""
    with open(f"{path}.tmp", "wb") as file:
        if task == "flickr30k":
            np.save(file, results)
        elif task == "nlvr2":
            file.write("".join(f"{identifier},{value}\n" for identifier, value in results.items()).encode())
        else:
            file.write(json.dumps(results).encode())
    os.replace(f"{path}.tmp", path)


def say_first(rank):
    """print for the first process, silence for the others."""
    return print if rank == 0 else lambda *words: None


def run(args, rank=0, world=1):
    """{measure: value} of what the flags ask for, and the files they name; collective."""
    if args.score:
        return score_files(args.task, args.score, args.against, args.questions)

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
        if task and not args.task:
            raise InputError(f"--checkpoint {args.checkpoint}: is fine-tuned for {task}; give --task {task}")
        if not args.task and (args.submit or args.blind or args.split != "val"):
            raise InputError("--submit, --blind, --split: need a --task")
        tokenizer = Tokenizer(state["vocabulary"], state["config"].max_tokens)
        model = E2EVLP(state["config"]).to(args.device)
        model.load_state_dict(state["model"])
        return state, tokenizer, model

    state, tokenizer, model = attempt(build, world)
    names = state["names"]
    settings = {"short": max(state["args"]["short_sides"]), "long": state["args"]["long_side"], "device": args.device,
                "amp": args.amp == "bf16", "batch_size": args.batch_size, "rank": rank, "world": world}
    if args.task:
        return run_task(args, model, tokenizer, names, {**settings, "beam": args.beam, "alpha": args.alpha, "blind":
                        args.blind, "text": args.text or state["args"].get("text", "caption")})

    def read():
        data = index_pretraining(args.data, state["args"]["sets"], args.index, say_first(rank))
        if data["names"] != names:
            raise InputError(f"--data {args.data}: its classes or attributes are not those of {args.checkpoint}")
        if not data["val"]:
            raise InputError(f"--data {args.data}: no held-out picture with a sentence")
        return decodable(data["val"][:args.examples or 1000], say_first(rank))

    pictures = attempt(read, world)
    if args.sheet and rank == 0:
        draw_sheet(args.sheet, model, tokenizer, names, pictures[:12], short=settings["short"], long=settings["long"],
                   device=args.device)
    return measure_with_blind(model, tokenizer, names, pictures, **settings)


def run_task(args, model, tokenizer, names, settings):
    """The official scores of a task's split; writes --submit. Collective."""
    rank, world = settings["rank"], settings["world"]

    def read():
        found = index_task(args.task, args.data, args.split, args.index, say_first(rank))
        if args.task == "detection" and found["categories"] != names["coco"]:
            raise InputError(f"--data {args.data}: COCO's categories are not those of {args.checkpoint}")
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


def main(argv=None):
    try:
        args = parse(argv)
        rank, world = 0, 1
        if not args.score:
            rank, world, args.device = start_processes(args.device)
        scores = run(args, rank, world)
        if rank == 0:
            for name, value in scores.items():
                if name.startswith("val_"):
                    print(f"{name[4:]:24} {value:.3f}   blind {scores['blind_' + name[4:]]:.3f}")
                elif not name.startswith("blind_"):
                    print(f"{name:24} {value:.3f}")
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(scores, file, indent=1)
        stop_processes(world)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
