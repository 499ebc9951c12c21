"""Stage 3: what a model has learnt, its official scores, and images of one's own.

    python evaluate.py --checkpoint runs/pretrain/last.pt --data DIR --json FILE     # pre-trained
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --submit FILE
    python evaluate.py --task caption --score RESULTS --against ANNOTATIONS
    python evaluate.py --checkpoint runs/pretrain/last.pt --image photo.jpg --output OUT

In this file: asking a model about many examples; what the words of a sentence say of an image; the
measures of pre-training; `Predictor`, the Python interface; drawings; the command.

Beside each measure of pre-training stands `blind_...`: the same model and inputs, with every image
replaced by the mean image. What is left then is what words alone, or habit, give away.
"""

import argparse
import glob
import json
import math
import os
import pprint
import random
import re
import sys
import textwrap
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert, box_iou
from tqdm import tqdm

from data import (HelpFormatter, InputError, Tokenizer, command,
                  decodable, gather, ignore_signals, init_processes, load_image, mask_tokens,
                  mean_image, name_of, number, other_sentence, pad_images, pad_tokens,
                  pretraining_index, print0, raise_in_all, read_text, resized, to_pixels,
                  to_rgb)
from matcher import boxes_in_pixels, detection_target, hungarian_match, to_device
from model import build_model, load_checkpoint
from tasks import TASKS, best_boxes, detection_scores, make_task

# --------------------------------------------------------------------------------------------------
# Asking a model about many examples


class EvaluationSet(Dataset):
    """Batches of images, asked for by lists of their numbers: (numbers, images, sizes, padded)."""

    def __init__(self, examples, short, long, mean=None):
        """mean: a PIL image shown in place of each (a blind model sees that)."""
        self.examples, self.short, self.long, self.mean = examples, short, long, mean

    def pixels(self, file, upright):
        image = load_image(file, self.short, self.long, upright)
        if self.mean is not None:
            image = self.mean.resize(image.size)
        return to_pixels(image, self.short, self.long)

    def __getitem__(self, numbers):
        asked = [self.examples[i] for i in numbers]
        images = [[self.pixels(file, example.upright) for file in example.files]
                  for example in asked]
        return numbers, *pad_images([image for side in zip(*images) for image in side])


def evaluation_batches(examples, numbers, *, short, long, batch_size=32, workers=0, rank=0, world=1,
                       mean=None):
    """EvaluationSet's batches of this process's share of `numbers`, similar shapes together.
    Collective: InputError in all processes, once each has done its share, if any met one.
    """
    numbers = sorted(numbers, key=lambda i: examples[i].size[1] / examples[i].size[0])[rank::world]
    batches = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    loader = DataLoader(EvaluationSet(examples, short, long, mean), batch_size=None,
                        sampler=batches, num_workers=workers, worker_init_fn=ignore_signals)
    problem = ""
    try:
        yield from tqdm(loader, "evaluating", disable=None if rank == 0 else True, leave=False)
    except InputError as error:  # an image that one process cannot read ends them all
        problem = str(error)
    raise_in_all(problem)


@torch.no_grad()
def predict(task, model, tokenizer, examples, *, device="cpu", amp=False, blind=False, rank=0,
            world=1, **loading):
    """What the model says of each example, in their order. Collective: each process does a share,
    all get all. blind: it sees the mean image. loading: of `evaluation_batches`.
    """
    model.eval()
    task.start(examples, tokenizer)
    mean = mean_image(tuple(example.files[0] for example in examples[:500])) if blind else None
    about = defaultdict(list)  # the examples about one image: its backbone runs once
    for i, example in enumerate(examples):
        about[tuple(example.files)].append(i)
    about = {numbers[0]: numbers for numbers in about.values()}
    answers = {}
    for firsts, images, sizes, padded in evaluation_batches(examples, about, rank=rank,
                                                            world=world, mean=mean, **loading):
        numbers = [i for first in firsts for i in about[first]]
        asked = [examples[i] for i in numbers]
        tokens = [tokenizer.encode(task.sentences([example])[0]) for example in asked]
        image = [row for row, first in enumerate(firsts) for _ in about[first]]
        batch = {"images": images, "sizes": sizes, "padded": padded,
                 "image": torch.tensor(image), "tokens": pad_tokens(tokens, tokenizer.pad)}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            found = task.answer(model, to_device(batch, device), asked, tokenizer)
        answers.update(zip(numbers, found))
    for share in gather(answers):
        answers.update(share)
    return [answers[i] for i in range(len(examples))]


# --------------------------------------------------------------------------------------------------
# Words and what they say of an image


class Phrase(NamedTuple):
    """A name of the label sets with the attribute words right before it ("small red circle")."""

    span: tuple[int, int]  # of the name: its first character and the one after its last
    label: int
    form: int              # which of the label's synonyms: a plural is replaced by plurals
    attributes: list[int]
    attribute_spans: list[tuple[int, int]]


class Grounding:
    """Finds object phrases in sentences and tells whether they are true of an image: whether one
    annotated object has that name and all of these attributes.
    """

    def __init__(self, names, examples):
        """names: a name's synonyms after commas; examples show which attributes go together."""
        self.source = "vg" if names["vg"] else "coco"
        # Only Visual Genome's word lists have synonyms
        self.labels = [line.split(",") if self.source == "vg" else [line]
                       for line in names[self.source]]
        self.attributes = [line.split(",") for line in names["attributes"]]
        self.object_of = self.by_name(self.labels)
        self.attribute_of = self.by_name(self.attributes)
        self.together = defaultdict(set)  # attribute -> those met on one object with it, and itself
        for example in examples:
            for _, its in self.facts(example) or ():
                for attribute in its:
                    self.together[attribute] |= its

    @staticmethod
    def by_name(lines):
        """Lists of synonyms -> {name: (its list's number, its place in the list)}."""
        places = {}
        for i, synonyms in enumerate(lines):
            for form, name in enumerate(synonyms):
                places.setdefault(name, (i, form))
        return places

    def facts(self, example):
        """[(label, {attributes})] of an image's objects, or None if it is not annotated."""
        objects = getattr(example, self.source)
        if objects is None:
            return None
        attributes = objects.attributes or [[]] * len(objects.labels)
        return [(label, set(its)) for label, its in zip(objects.labels, attributes)]

    def find(self, sentence):
        """The object phrases of a sentence: [Phrase]."""
        words = [(m.group(), *m.span()) for m in re.finditer(r"[a-z0-9'-]+", sentence.lower())]
        phrases, attributes, spans = [], [], []
        i = 0
        while i < len(words):
            for n in (3, 2, 1):  # "stop sign" is one name, not a "stop" and a "sign"
                name = " ".join(word for word, _, _ in words[i:i + n])
                if name in self.object_of or name in self.attribute_of:
                    break
            span = words[i][1], words[i:i + n][-1][2]
            if name in self.object_of:
                phrases.append(Phrase(span, *self.object_of[name], attributes, spans))
                attributes, spans = [], []
            elif name in self.attribute_of:
                attributes.append(self.attribute_of[name][0])
                spans.append(span)
            else:
                attributes, spans = [], []
            i += n
        return phrases

    @staticmethod
    def is_true(facts, label, attributes):
        return any(label == has and set(attributes) <= its for has, its in facts)

    def grounded_words(self, facts, sentence):
        """[(start, end, false words)] of the single words that the image decides: no other word in
        their place would be true. False words are other names, or attributes never met on one
        object with this one.
        """
        words = []
        for phrase in self.find(sentence):
            label, attributes = phrase.label, phrase.attributes
            if not self.is_true(facts, label, attributes):
                continue
            for at, (attribute, span) in enumerate(zip(attributes, phrase.attribute_spans)):
                rest = attributes[:at] + attributes[at + 1:]
                others = sorted(self.together.keys() - {attribute, *rest})
                if not any(self.is_true(facts, label, [*rest, other]) for other in others):
                    false = [self.attributes[other][0] for other in others
                             if other not in self.together[attribute]]
                    words.append((*span, false))
            others = [other for other in range(len(self.labels)) if other != label]
            if not any(self.is_true(facts, other, attributes) for other in others):
                false = []
                for other in others:
                    forms = self.labels[other]
                    false.append(forms[phrase.form] if phrase.form < len(forms) else forms[0])
                words.append((*phrase.span, false))
        return [word for word in words if " " not in sentence[word[0]:word[1]]]

    def all_true(self, facts, sentence):
        """Whether it names an object, and every object phrase in it is true of the image."""
        phrases = self.find(sentence)
        return bool(phrases) and all(
            self.is_true(facts, phrase.label, phrase.attributes) for phrase in phrases)


# --------------------------------------------------------------------------------------------------
# The measures of pre-training


def hide(tokens, hidden, mask):
    """(input, labels) that ask for the hidden tokens. Each becomes [MASK], not 80 % of them as in
    training: one left in place would flatter a blind model.
    """
    masked = [mask if is_hidden else token for token, is_hidden in zip(tokens, hidden)]
    labels = [token if is_hidden else -1 for token, is_hidden in zip(tokens, hidden)]
    return masked, labels


def make_probe(examples, index, grounding, tokenizer):
    """What is asked about an image with up to four of its sentences, the same for each model and
    run: {measure: questions}. mlm_accuracy: [(input, labels)], 15 % of the words masked; .._visual:
    the same with one word that the image decides; itm_accuracy: [(tokens, 1 or 0)], half of them
    another image's; .._foil: the same, half with one grounded word made false.
    """
    example = examples[index]
    facts = grounding.facts(example) or ()
    probe = {"mlm_accuracy": [], "mlm_accuracy_visual": [], "itm_accuracy": [],
             "itm_accuracy_foil": []}
    rng = random.Random(f"validation 0 {example.id}")
    count = min(4, len(example.sentences))
    for i, place in enumerate(rng.sample(range(len(example.sentences)), count)):
        sentence = example.sentences[place]
        encoding = tokenizer.wordpiece.encode(sentence)
        tokens, spans = encoding.ids, encoding.offsets  # in characters; of [CLS] and [SEP] (0, 0)
        make_false = (index + i) % 2 == 1

        labels = mask_tokens(tokens, tokenizer, rng)[1]
        hidden = [label >= 0 for label in labels]
        probe["mlm_accuracy"].append(hide(tokens, hidden, tokenizer.mask))

        if make_false:
            other = other_sentence(examples, index, place < example.captions, rng)
            if other is not None:
                probe["itm_accuracy"].append((tokenizer.encode(other), 0))
        else:
            probe["itm_accuracy"].append((tokens, 1))

        words = grounding.grounded_words(facts, sentence)
        if not words:
            continue
        start, end, _ = rng.choice(words)
        hidden = [s < e and s >= start and e <= end for s, e in spans]
        if any(hidden):  # a long sentence is cut
            probe["mlm_accuracy_visual"].append(hide(tokens, hidden, tokenizer.mask))

        words = [word for word in words if word[2]]
        if words and make_false:
            start, end, false = rng.choice(words)
            foil = sentence[:start] + rng.choice(false) + sentence[end:]
            probe["itm_accuracy_foil"].append((tokenizer.encode(foil), 0))
        elif words:
            probe["itm_accuracy_foil"].append((tokens, 1))
    return probe


def prepare_probes(tokenizer, names, examples):
    """What `measure` asks at each validation: (Grounding, each image's probe, the mean image)."""
    grounding = Grounding(names, examples)
    probes = [make_probe(examples, i, grounding, tokenizer) for i in range(len(examples))]
    return grounding, probes, mean_image(tuple(example.files[0] for example in examples[:500]))


def probes_right(model, tokenizer, grid, probes, kind):
    """[is it right?] of the answers to the probes of one kind; grid: of the images asked about."""
    rows = [(row, *pair) for row, probe in enumerate(probes) for pair in probe[kind]]
    if not rows:
        return []
    images, sentences, answers = zip(*rows)
    device = grid.states.device
    tokens = pad_tokens(sentences, tokenizer.pad).to(device)
    states = model.encode(grid.select(torch.tensor(images, device=device)), tokens).states

    if kind.startswith("itm"):
        guesses = model.itm(states[:, 0]).argmax(-1).tolist()
        return [guess == answer for guess, answer in zip(guesses, answers)]

    labels = pad_tokens(answers, -1).to(device)
    hidden = labels >= 0
    right = torch.ones_like(hidden)
    logits = model.mlm_logits(states[:, :tokens.shape[1]][hidden])
    right[hidden] = logits.argmax(-1) == labels[hidden]
    # Each masked token counts, but a visual word of several is right if all of them are
    return (right[hidden] if kind == "mlm_accuracy" else right.all(1)).tolist()


def average_precision(examples, found, classes):
    """{"AP", "AP50"} of COCO's boxes by pycocotools. found: {number of an example: what
    tasks.best_boxes says of it}. Crowd regions are absent, not ignored as officially.
    """
    results = [{"image_id": i, "category_id": label, "bbox": box, "score": score}
               for i, boxes in found.items() for label, box, score in boxes]
    annotations = []
    for image_id, example in enumerate(examples):
        boxes = torch.tensor(example.coco.boxes).view(-1, 4)
        boxes = boxes_in_pixels(boxes, example.size).tolist()
        for box, label in zip(boxes, example.coco.labels):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "bbox": box,
                                "category_id": label, "area": box[2] * box[3], "iscrowd": 0})
    truth = {"info": {}, "images": [{"id": i} for i in range(len(examples))],
             "annotations": annotations, "categories": [{"id": i} for i in range(classes)]}
    scores = detection_scores(results, truth)
    return {"AP": scores["AP"], "AP50": scores["AP50"]}


def duplicates_and_missed(examples, found):
    """Counts for each annotated object, of predictions with a score over 0.5. duplicates: those
    that find again what a surer one has found (same class, IoU over 0.5); missed: objects that none
    finds. A detector that learns from a set finds each object once; AP hardly tells, since it asks
    for the surest predictions first. found: as for `average_precision`.
    """
    objects = duplicates = missed = 0
    for i, example in enumerate(examples):
        sure = [answer for answer in found.get(i, ()) if answer[2] > 0.5]
        sure.sort(key=lambda answer: -answer[2])
        boxes = torch.tensor([box for _, box, _ in sure]).view(-1, 4)
        labels = torch.tensor([label for label, _, _ in sure])
        true_boxes = boxes_in_pixels(torch.tensor(example.coco.boxes).view(-1, 4), example.size)
        true_labels = torch.tensor(example.coco.labels)
        corners, true_corners = (box_convert(b, "xywh", "xyxy") for b in (boxes, true_boxes))

        again = (box_iou(corners, corners) > 0.5) & (labels[:, None] == labels)
        duplicates += again.tril(-1).any(1).sum().item()
        hits = (box_iou(true_corners, corners) > 0.5) & (true_labels[:, None] == labels)
        missed += (~hits.any(1)).sum().item()
        objects += len(true_boxes)
    return {"duplicates": duplicates / max(1, objects), "missed": missed / max(1, objects)}


def attributes_right(objects, batch):
    """Of each annotated object of Visual Genome with k attributes, how many are among the k most
    likely of the query that matches its box, divided by k.
    """
    rows = [row for row, example in enumerate(batch) if example.vg is not None]
    if not rows:
        return []
    device = objects["boxes"].device
    annotated = [batch[row].vg for row in rows]
    targets = [to_device(detection_target("coco", its), device) for its in annotated]
    _, row, query, box = hungarian_match(
        objects["logits"]["vg"][-1:, rows], objects["boxes"][-1:, rows], targets)

    truth = [set(attributes) for its in annotated for attributes in its.attributes]
    logits = objects["attributes"][-1, rows][row, query].float()
    right = []
    for scores, b in zip(logits, box.tolist()):
        k = len(truth[b])
        if k:
            likely = scores.topk(k).indices.tolist()
            right.append(len(truth[b].intersection(likely)) / k)
    return right


@torch.no_grad()
def measure(model, tokenizer, names, examples, probes, *, without=(), device="cpu", amp=False,
            blind=False, rank=0, world=1, **loading):
    """All measures on held-out examples: {"mlm_accuracy": ..., ...} as fractions. Collective: each
    process does its share. probes: of `prepare_probes`; without: the losses that training left out,
    whose measures are left out too; loading: of `evaluation_batches`.
    """
    model.eval()
    grounding, asked, mean = probes
    kinds = [kind for kind in asked[0] if kind.split("_")[0] not in without]  # mlm.., itm..
    detects = names["coco"] and "detection" not in without
    tally = defaultdict(list)  # measure -> how right (0 .. 1) each answer is; for AP the boxes
    batches = evaluation_batches(examples, range(len(examples)), rank=rank, world=world,
                                 mean=mean if blind else None, **loading)
    for numbers, images, sizes, padded in batches:
        batch = [examples[i] for i in numbers]
        image_sizes = [example.size for example in batch]  # sizes: of what the model sees
        batch_probes = [asked[i] for i in numbers]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            grid = model.encode_image(images.to(device), sizes.to(device), padded)
            for kind in kinds:
                tally[kind] += probes_right(model, tokenizer, grid, batch_probes, kind)

            # Objects, with the image's own sentence, with the next image's, and without
            alone = model.encode(grid)
            if detects:
                for name, further in (("AP", 0), ("AP_wrong_sentence", 1)):
                    read = [examples[(i + further) % len(examples)].sentences[0] for i in numbers]
                    tokens = pad_tokens([tokenizer.encode(text) for text in read], tokenizer.pad)
                    objects = model.detect(model.encode(grid, tokens.to(device)))
                    tally[name] += zip(numbers, best_boxes(objects, "coco", image_sizes))
                objects = model.detect(alone)
                tally["AP_no_sentence"] += zip(numbers, best_boxes(objects, "coco", image_sizes))
                if "attributes" not in without:
                    tally["attribute_accuracy"] += attributes_right(objects, batch)

            # Captions, by greedy search
            captions = [] if "caption" in without else model.generate(alone)
            for pieces, example in zip(captions, batch):
                facts = grounding.facts(example)
                if facts is not None:
                    caption = tokenizer.decode(pieces)
                    tally["caption_objects"].append(grounding.all_true(facts, caption))

    shares = gather(tally)
    measures = {}
    for name in shares[0]:
        values = [value for share in shares for value in share[name]]
        if name.startswith("AP"):
            found = {**average_precision(examples, dict(values), len(names["coco"])),
                     **duplicates_and_missed(examples, dict(values))}
            measures.update({name.replace("AP", kind): value for kind, value in found.items()})
        elif values:
            measures[name] = sum(values) / len(values)
    return measures


def measure_with_blind(*inputs, **settings):
    """{"val_...": the measures, "blind_...": the same with each image replaced by the mean image}.
    """
    return {f"{kind}_{name}": value for kind in ("val", "blind")
            for name, value in measure(*inputs, blind=kind == "blind", **settings).items()}


# --------------------------------------------------------------------------------------------------
# One image: the Python interface


class Predictor:
    """A checkpoint that answers about images: Predictor("last.pt").caption("photo.jpg").

    An image is a path, a PIL image of any mode, or an array (H, W, 3) uint8; a camera's rotation
    (EXIF) is applied. What a checkpoint cannot do is an InputError that says what it can.
    """

    def __init__(self, checkpoint, device=None, model=None):
        """device: by default a GPU if there is one; model: of a checkpoint that is in memory
        already, a dict with vocabulary, names and args.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.source = checkpoint
        state = load_checkpoint(checkpoint) if model is None else checkpoint
        model = model or build_model(state, checkpoint).requires_grad_(False)
        self.model = model.to(self.device).eval()
        self.names, self.flags = state["names"], state["args"]
        self.tokenizer = Tokenizer(state["vocabulary"], self.model.config.max_tokens)
        self.short, self.long = max(self.flags["short_sides"]), self.flags["long_side"]
        without = self.flags.get("without", ())
        self.task = self.model.config.task
        self.kind = f"fine-tuned for {self.task}" if self.task else "pre-trained"
        if self.task:
            self.can = TASKS[self.task].can
        else:
            learnt = {"caption": "caption", "detect": "detection", "match": "itm"}
            self.can = [ability for ability, loss in learnt.items() if loss not in without]
        self.labels = "vg" if self.names["vg"] and not self.task else "coco"
        self.attributes = self.labels == "vg" and "attributes" not in without

    def require(self, ability):
        if ability not in self.can:
            raise InputError(f"{self.source}: is {self.kind}, and cannot {ability}; it can "
                             f"{', '.join(self.can) or 'be scored (--task)'}")

    def open(self, image):
        """An RGB PIL image of what a caller gave."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return to_rgb(ImageOps.exif_transpose(image))
        return load_image(image)

    def encode(self, *images, sentence=None):
        """(the grid of the images, the sentence's tokens (1, T) or None)."""
        pixels, sizes, padded = pad_images(
            [to_pixels(self.open(image), self.short, self.long) for image in images])
        grid = self.model.encode_image(pixels.to(self.device), sizes.to(self.device), padded)
        if sentence is None:
            return grid, None
        return grid, torch.tensor([self.tokenizer.encode(sentence)], device=self.device)

    def caption(self, image, beam=4):
        """A sentence, by beam search."""
        self.require("caption")
        memory = self.model.encode(*self.encode(image))
        (pieces,) = self.model.generate(memory, beam=beam)
        return self.tokenizer.decode(pieces)

    def detect(self, image, threshold=0.5, sentence=None):
        """[{"label", "attributes": [...], "score", "box": [x, y, w, h] in pixels}], the surest
        first. sentence: one that the encoder reads beside the image.
        """
        self.require("detect")
        image = self.open(image)
        objects = self.model.detect(self.model.encode(*self.encode(image, sentence=sentence)))
        return self.read_objects(objects, image, threshold)[1]

    def read_objects(self, objects, image, threshold):
        """(the queries that find something, what `detect` returns) of model.detect's output."""
        (boxes,) = best_boxes(objects, self.labels, [image.size[::-1]])
        attributes = objects["attributes"][-1, 0].softmax(-1).cpu()
        queries = [q for q, (_, _, score) in enumerate(boxes) if score > threshold]
        queries.sort(key=lambda q: -boxes[q][2])
        found = []
        for q in queries:
            label, box, score = boxes[q]
            # A box's attributes share one softmax, so k of them come to about 1 / k each
            likely = (attributes[q] > 0.15).nonzero().flatten().tolist()
            names = [name_of(self.names, "attributes", a) for a in likely if self.attributes]
            found.append({"label": name_of(self.names, self.labels, label), "attributes": names,
                          "score": round(score, 4), "box": [round(v, 1) for v in box]})
        return queries, found

    def match(self, image, sentence):
        """The probability that the sentence belongs to the image."""
        self.require("match")
        return self.model.similarity(*self.encode(image, sentence=sentence)).sigmoid().item()

    def answer(self, image, question):
        """[(answer, probability)], the five likeliest; each has its own sigmoid."""
        self.require("answer")
        logits = self.model.classify(*self.encode(image, sentence=question))
        best = logits[0].float().sigmoid().topk(min(5, logits.shape[1]))
        return [(self.names["answers"][a], round(p, 4))
                for p, a in zip(best.values.tolist(), best.indices.tolist())]

    def judge(self, left, right, statement):
        """The probability that a statement about two images is true."""
        self.require("judge")
        logits = self.model.classify(*self.encode(left, right, sentence=statement))
        return logits[0].softmax(-1)[1].item()

    def attention(self, image, sentence=None, threshold=0.5):
        """Where each word and each object looks, a dict: words: the T pieces of the sentence;
        encoder (L, T, T + S): each word's attention by layer, mean over heads; objects: as `detect`
        has them; decoder (L', n, T + S): their queries' cross-attention; grid: (H, W), H * W = S.
        """
        image = self.open(image)
        height, width = resized(image.height, image.width, self.short, self.long)
        stride = self.model.config.stride
        grid, tokens = self.encode(image, sentence=sentence)
        by_word = record_attention(layer.self_attention for layer in self.model.encoder)
        memory = self.model.encode(grid, tokens)
        words = [] if tokens is None else tokens[0].tolist()
        found = {"words": [self.tokenizer.vocabulary[token] for token in words],
                 "encoder": torch.stack([weights[0, :len(words)] for weights in by_word]),
                 "objects": [], "decoder": torch.zeros(0),
                 "grid": (math.ceil(height / stride), math.ceil(width / stride))}
        if "detect" in self.can:
            by_query = record_attention(layer.cross_attention for layer in self.model.decoder)
            objects = self.model.detect(memory)
            queries, found["objects"] = self.read_objects(objects, image, threshold)
            found["decoder"] = torch.stack([weights[0, queries] for weights in by_query])
        return found


def record_attention(modules):
    """A list that gets the weights (B, T, S), mean over heads, of each module's next call: computed
    again, because F.scaled_dot_product_attention keeps them to itself.
    """
    weights = []

    def hook(module, args, output):
        query, (k, _), mask = args  # mask: True = may be attended to
        scores = module.split(module.q(query)) @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        weights.append(scores.float().softmax(-1).mean(1).cpu())
        handles[module].remove()

    handles = {module: module.register_forward_hook(hook) for module in modules}
    return weights


# --------------------------------------------------------------------------------------------------
# Drawings


def show_objects(axes, image, objects, title):
    """An image with labelled boxes, as `Predictor.detect` has them, and a title."""
    axes.imshow(image, aspect="equal", extent=(0, image.width, image.height, 0))
    axes.set_axis_off()
    axes.set_title("\n".join(textwrap.wrap(title, 32)), fontsize=7)
    for i, thing in enumerate(objects):
        x, y, w, h = thing["box"]
        axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=f"C{i}", linewidth=1))
        axes.text(x, y - 1, " ".join([*thing["attributes"], thing["label"]]), fontsize=5,
                  color=f"C{i}", bbox=dict(facecolor="white", edgecolor="none", pad=0.5))


def true_objects(example, names, source):
    """An image's annotated objects as `Predictor.detect` has those that it finds."""
    objects = getattr(example, source)
    if objects is None:
        return []
    boxes = boxes_in_pixels(torch.tensor(objects.boxes).view(-1, 4), example.size).tolist()
    attributes = objects.attributes or [[]] * len(boxes)
    return [{"label": name_of(names, source, label), "box": box,
             "attributes": [name_of(names, "attributes", a) for a in its]}
            for label, box, its in zip(objects.labels, boxes, attributes)]


@torch.no_grad()
def draw_sheet(path, predictor, examples):
    """A PNG of held-out images: truth on the left, on the right what the model says."""
    rows = math.ceil(len(examples) / 2)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    for n, example in enumerate(examples):
        left, right = (figure.add_subplot(rows, 4, 2 * n + side) for side in (1, 2))
        image = load_image(example.files[0], upright=example.upright)
        truth = true_objects(example, predictor.names, predictor.labels)
        show_objects(left, image, truth, f"true: {example.sentences[0]}")
        caption = predictor.caption(image, beam=1) if "caption" in predictor.can else ""
        found = predictor.detect(image) if "detect" in predictor.can else []
        show_objects(right, image, found, f"says: {caption}")
    figure.savefig(path)


def draw_curves(folders, path):
    """A PNG of runs' losses and measures, a colour a run; blind ones dashed, majority's dotted."""
    runs = []
    for folder in folders:
        text = read_text(os.path.join(folder, "log.jsonl"))
        lines = [json.loads(line) for line in text.split("\n")[:-1]]  # the last may be cut off
        runs.append((os.path.basename(os.path.normpath(folder)), lines))
    keys = dict.fromkeys(key for _, lines in runs for line in lines for key in line)
    keys = [key for key in keys if key.startswith(("loss", "val_"))]
    rows = math.ceil(len(keys) / 4)
    figure = Figure(figsize=(13, 2.2 * rows + 0.1), layout="constrained")
    for place, key in enumerate(keys, 1):
        ax = figure.add_subplot(rows, 4, place)
        ax.set_title(key.removeprefix("val_"), fontsize=8)
        ax.tick_params(labelsize=6)
        styles = {key: "-"}
        if key.startswith("val_"):
            styles[key.replace("val_", "blind_")] = "--"
            styles[key.replace("val_", "majority_")] = ":"
        for n, (name, lines) in enumerate(runs):
            for curve, style in styles.items():
                points = [(line["step"], line[curve]) for line in lines if curve in line]
                if points:
                    ax.plot(*zip(*points), style, color=f"C{n}", linewidth=1, marker=".",
                            markersize=3, label=name)
        if place == 1:
            ax.legend(fontsize=6)
    figure.savefig(path)


def draw_attention(path, image, found, kind):
    """A PNG of `Predictor.attention`: a row for each word or object, a column for each layer."""
    weights = found["encoder" if kind == "words" else "decoder"]   # (L, n, T + S)
    names = found["words"] if kind == "words" else [thing["label"] for thing in found["objects"]]
    T = len(found["words"])
    H, W = found["grid"]
    layers, rows = weights.shape[:2]
    figure = Figure(figsize=(1.5 * layers + 1, 1.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, layers, squeeze=False)
    # Cell i is about pixel i * stride, the centre of its square: squares begin half a cell before
    x, y = image.width / W, image.height / H
    extent = (-x / 2, image.width - x / 2, image.height - y / 2, -y / 2)
    for (row, layer), ax in np.ndenumerate(axes):
        cells = weights[layer, row, T:]
        ax.imshow(image.convert("L"), cmap="gray")
        ax.imshow(cells.view(H, W).numpy(), cmap="hot", alpha=0.6, extent=extent,
                  interpolation="bilinear")
        ax.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
        ax.set_title(f"layer {layer + 1}: {cells.sum():.0%} on the image", fontsize=5)
        if layer == 0:
            ax.set_ylabel(names[row], fontsize=7)
        if kind == "objects":
            bx, by, bw, bh = found["objects"][row]["box"]
            ax.add_patch(Rectangle((bx, by), bw, bh, fill=False, edgecolor="cyan"))
    figure.savefig(path)


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Measure a checkpoint, score a result file, or ask about images of your own.",
        formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint",
                        help="what pretrain.py or finetune.py wrote, or DETR's weights")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--data", metavar="DIR", help="measure on a data folder (README: its tree)")
    mode.add_argument("--pairs", metavar="FILE", help="measure on images with captions of your own")
    mode.add_argument("--val-annotations", metavar="FILE", help="measure on boxes of your own")
    mode.add_argument("--image", nargs="+", help="files or folders: caption and objects of each")
    mode.add_argument("--score", metavar="FILE", help="score anybody's result file; no model")
    mode.add_argument("--curves", nargs="+", metavar="RUN", help="draw the curves of runs' folders")
    parser.add_argument("--output", metavar="DIR", help="folder for drawings")
    parser.add_argument("--json", metavar="FILE", help="write the measures, or answers, to it")
    parser.add_argument("--beam", type=number(int, 1, 20), default=4, help="captions: beams")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="mixed precision")
    g = parser.add_argument_group("measures on a data set")
    g.add_argument("--task", choices=tuple(TASKS), help="the official scores of a task (default: "
                   "the one that the checkpoint is fine-tuned for)")
    g.add_argument("--images", metavar="DIR", dest="pairs_images", help="those of --pairs")
    g.add_argument("--val-images", metavar="DIR", help="those of --val-annotations")
    g.add_argument("--index", metavar="DIR",
                   help="folder of the data's index (default: .index in the data's folder)")
    g.add_argument("--split", help="train, val (default), test; vqa also test-dev. With --score: "
                   "that of Karpathy's files which counts (default: test)")
    g.add_argument("--submit", metavar="FILE", help="write the results in the official format")
    g.add_argument("--against", metavar="FILE", help="with --score: the official annotation file")
    g.add_argument("--questions", metavar="FILE", help="--score, VQA: all that may be answered")
    g.add_argument("--examples", type=number(int, 1), metavar="N",
                   help="the first N only; default: all, pre-trained 1000")
    g.add_argument("--batch-size", type=number(int, 1), default=32, help="images at a time")
    g.add_argument("--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1),
                   help="loader processes")
    g = parser.add_argument_group("images of your own")
    g.add_argument("--question", help="a VQA checkpoint: the five likeliest answers")
    g.add_argument("--statement", help="an NLVR2 checkpoint: is it true of two images?")
    g.add_argument("--find", metavar="SENTENCE", help="the images by how well it fits")
    g.add_argument("--sentence", help="does it belong to the image? Objects are detected with it")
    g.add_argument("--attention", action="store_true",
                   help="draw to --output where each word of the sentence and each object looks")
    g.add_argument("--threshold", type=number(float, 0, 1), default=0.5, metavar="P",
                   help="objects: least probability")
    args = parser.parse_args(argv)
    for flag, needed in (("data", "checkpoint"), ("pairs", "checkpoint"), ("image", "checkpoint"),
                         ("val_annotations", "checkpoint"), ("score", "task"), ("score", "against"),
                         ("curves", "output"), ("attention", "output")):
        if getattr(args, flag) and not getattr(args, needed):
            raise InputError(f"--{flag}: needs --{needed}".replace("_", "-"))
    try:  # now, not after hours
        if args.output:
            os.makedirs(args.output, exist_ok=True)
        for path in filter(None, [args.json, args.submit]):
            open(path, "ab").close()
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return args


def run_model(args):
    """What the flags ask of a checkpoint: ({measure: value} on a data set, collective, or a list of
    answers about images, the exit code).
    """
    rank, world, device = init_processes(args.device)
    predictor = Predictor(args.checkpoint, device)
    amp = args.amp == "bf16"
    if args.image:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            return run_images(args, predictor)
    settings = {"short": predictor.short, "long": predictor.long, "device": device, "amp": amp,
                "batch_size": args.batch_size, "workers": args.workers, "rank": rank,
                "world": world}
    score = score_task if args.task or predictor.task else measure_pretrained
    return score(args, predictor, settings), 0


def check_classes(found, known, source):
    """Classes go by their names: InputError for one that the model does not know."""
    unknown = [name for key in found for name in found[key] if name not in known[key]]
    if unknown:
        raise InputError(f"the class {unknown[0]!r} of the data is not one of {source}, which has "
                         f"{', '.join(known['coco'])[:300]}")


def score_task(args, predictor, settings):
    """The official scores of a task; with --submit also its result file."""
    name, names = args.task or predictor.task, predictor.names
    if name != predictor.task and (predictor.task or TASKS[name].new_head):
        raise InputError(f"--task {name}: {args.checkpoint} is {predictor.kind}")
    task = make_task(name, {**predictor.flags, **vars(args), "train_annotations": None,
                            "meteor": True, **({"text": "none"} if args.val_annotations else {})})
    task.labels, task.names = names.get("answers", ()), names
    split = args.split or "val"
    index = task.index(args.data, split, args.index, print0)
    check_classes(index["names"], names, args.checkpoint)

    examples = index["examples"][:args.examples]
    answers = predict(task, predictor.model, predictor.tokenizer, examples, **settings)
    if settings["rank"] > 0:
        return {}
    if args.submit:
        with open(args.submit, "wb") as file:
            file.write(task.results(answers, examples, args.data, split))
        print0(f"{args.submit}: {len(examples)} results")
    return task.score(answers, examples, args.data, split)


def measure_pretrained(args, predictor, settings):
    """The measures of pre-training, blind ones beside them; with --output also the sheet."""
    if args.submit or args.split or args.val_annotations:
        raise InputError("--submit, --split and --val-annotations: need a --task")
    tokenizer, names = predictor.tokenizer, predictor.names
    data = pretraining_index(args.data, predictor.flags["sets"], args.index, print0, args.pairs,
                             args.pairs_images)
    if not args.pairs and data["names"] != {key: names[key] for key in data["names"]}:
        raise InputError(f"--data {args.data}: has other classes or attributes than "
                         f"{args.checkpoint}")
    if not data["val"]:
        raise InputError(f"--data {args.data}: has no held-out images")
    examples = decodable(data["val"][:args.examples or 1000], print0)
    if args.output and settings["rank"] == 0:
        draw_sheet(f"{args.output}/sheet.png", predictor, examples[:12])
    probes = prepare_probes(tokenizer, names, examples)
    return measure_with_blind(predictor.model, tokenizer, data["names"], examples, probes,
                              without=predictor.flags["without"], **settings)


def ask(predictor, image, args):
    """What the flags ask about one image, a dict."""
    if args.question:
        return {"answers": predictor.answer(image, args.question)}
    if args.find:
        return {"match": predictor.match(image, args.find)}
    answer = {}
    if args.sentence and "match" in predictor.can:
        answer["match"] = predictor.match(image, args.sentence)
    if "caption" in predictor.can:
        answer["caption"] = predictor.caption(image, args.beam)
    if "detect" in predictor.can:
        answer["objects"] = predictor.detect(image, args.threshold, args.sentence)
    if not answer:  # it can do nothing of this
        predictor.require("caption")
    return answer


def draw_answer(stem, predictor, image, answer, args):
    """STEM.png, the image with its objects; with --attention also where words and objects look."""
    figure = Figure(figsize=(8, 8))
    title = answer.get("caption") or str(answer.get("answers", ""))
    show_objects(figure.subplots(), image, answer.get("objects", []), title)
    figure.savefig(f"{stem}.png", bbox_inches="tight")
    if args.attention:
        found = predictor.attention(image, args.sentence or args.question, args.threshold)
        for kind in ("words", "objects"):
            if found[kind]:
                draw_attention(f"{stem}-{kind}.png", image, found, kind)


def run_images(args, predictor):
    """(answers, exit code). An image that cannot be read is named and left out: code 2."""
    files = []
    for path in args.image:
        inside = sorted(glob.glob(f"{glob.escape(path)}/*"))  # if it is a folder
        files += inside or [path]
    if args.statement:
        if len(files) != 2:
            raise InputError("--statement: needs two images, left and right")
        answer = {"images": files, "statement": args.statement,
                  "probability": predictor.judge(*files, args.statement)}
        pprint.pprint(answer, sort_dicts=False, width=140)
        return [answer], 0

    answers = []
    for n, file in enumerate(files, 1):
        try:
            image = predictor.open(file)
        except InputError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            continue
        answer = ask(predictor, image, args)
        answers.append({"image": file, "width": image.width, "height": image.height, **answer})
        if not args.find:
            pprint.pprint(answers[-1], sort_dicts=False, width=140)
        if args.output:
            name = os.path.splitext(os.path.basename(file))[0]
            draw_answer(f"{args.output}/{n:03}-{name}", predictor, image, answer, args)
    if args.find:
        answers.sort(key=lambda answer: -answer["match"])
        for answer in answers[:20]:
            print(f"{answer['match']:.2f}  {answer['image']}")
    return answers, 2 if len(answers) < len(files) else 0


def main(argv=None):
    def work():
        args = parse(argv)
        code = 0
        if args.curves:
            return draw_curves(args.curves, os.path.join(args.output, "curves.png"))
        if args.score:
            task = make_task(args.task, {"meteor": True})
            found = task.score_file(args.score, args.against, args.split or "test", args.questions)
        else:
            found, code = run_model(args)
        if isinstance(found, dict):
            print0("\n".join(f"{name:28} {value:.3f}" for name, value in found.items()))
        if args.json and int(os.environ.get("RANK", 0)) == 0:
            with open(args.json, "w") as file:
                json.dump(found, file, indent=1)
        return code

    return command("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
