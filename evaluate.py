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
import contextlib
import json
import math
import os
import random
import re
import sys
import textwrap
from collections import defaultdict

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (FORMATS, HelpFormatter, InputError, Tokenizer, command,
                  decodable, gather, ignore_signals, init_processes, load_image, mask_tokens,
                  mean_image, number, other_sentence, pad_images, pad_tokens, pretraining_index,
                  print0, read_text, to_pixels, to_rgb)
from matcher import boxes_in_pixels, detection_target, hungarian_match, to_device
from model import build_model, load_checkpoint
from tasks import TASKS, best_classes, detection_scores, make_task

# --------------------------------------------------------------------------------------------------
# Asking a model about many examples


class EvaluationSet(Dataset):
    """Batches of images, asked for by lists of their numbers: (numbers, images, sizes, padded)."""

    def __init__(self, examples, short, long, mean=None):
        """mean: a PIL image shown in place of each (a blind model sees that)."""
        self.examples, self.short, self.long, self.mean = examples, short, long, mean

    def pixels(self, file):
        try:
            image = load_image(file, self.short, self.long)
        except Exception as error:
            raise InputError(f"{file}: cannot be decoded ({error}); a score needs every image, "
                             "mend it") from None
        if self.mean is not None:
            image = self.mean.resize(image.size)
        return to_pixels(image, self.short, self.long)

    def __getitem__(self, numbers):
        images = [[self.pixels(file) for file in self.examples[i].files] for i in numbers]
        return numbers, *pad_images([image for side in zip(*images) for image in side])


def evaluation_batches(examples, numbers, *, short, long, batch_size=32, workers=0, rank=0, world=1,
                       mean=None):
    """EvaluationSet's batches of this process's share of `numbers`, similar shapes together."""
    numbers = sorted(numbers, key=lambda i: examples[i].size[1] / examples[i].size[0])[rank::world]
    batches = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    loader = DataLoader(EvaluationSet(examples, short, long, mean), batch_size=None,
                        sampler=batches, num_workers=workers, worker_init_fn=ignore_signals)
    yield from tqdm(loader, "evaluating", disable=None if rank == 0 else True, leave=False)


@torch.no_grad()
def predict(task, model, tokenizer, examples, *, device="cpu", amp=False, blind=False, rank=0,
            world=1, **loading):
    """What the model says of each example, in their order. Collective: each process does a share,
    all get all. blind: it sees the mean image. loading: of `evaluation_batches`.
    """
    model.eval()
    task.start(examples, tokenizer)
    mean = mean_image([example.files[0] for example in examples[:500]]) if blind else None
    about = defaultdict(list)  # the examples about one image: its backbone runs once
    for i, example in enumerate(examples):
        about[tuple(example.files)].append(i)
    about = {numbers[0]: numbers for numbers in about.values()}
    answers = {}
    for firsts, images, sizes, padded in evaluation_batches(examples, about, rank=rank, world=world,
                                                            mean=mean, **loading):
        numbers = [i for first in firsts for i in about[first]]
        asked = [examples[i] for i in numbers]
        tokens = [tokenizer.encode(task.sentences([example])[0]) for example in asked]
        image = [row for row, first in enumerate(firsts) for _ in about[first]]
        batch = {"images": images, "sizes": sizes, "padded": padded, "image": torch.tensor(image),
                 "tokens": pad_tokens(tokens, tokenizer.pad)}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            found = task.answer(model, to_device(batch, device), asked, tokenizer)
        answers.update(zip(numbers, found))
    for share in gather(answers):
        answers.update(share)
    return [answers[i] for i in range(len(examples))]


# --------------------------------------------------------------------------------------------------
# Words and what they say of an image


class Grounding:
    """Finds object phrases in sentences and tells whether they are true of an image.

    An object phrase is a name of the label sets with the attribute words right before it ("small
    red circle"). It is true if one annotated object has that name and all of these attributes.
    """

    def __init__(self, names, examples=()):
        """names: a name's synonyms after commas; examples show which attributes go together."""
        self.source = "vg" if names["vg"] else "coco"
        self.labels = [line.split(",") for line in names[self.source]]
        self.attributes = [line.split(",") for line in names["attributes"]] if names["vg"] else []
        self.object_of = {}  # name -> (label, which of its synonyms: plurals meet plurals)
        for label, synonyms in enumerate(self.labels):
            for form, name in enumerate(synonyms):
                self.object_of.setdefault(name, (label, form))
        self.attribute_of = {}
        for attribute, synonyms in enumerate(self.attributes):
            for name in synonyms:
                self.attribute_of.setdefault(name, attribute)
        self.seen, self.together = set(), set()  # attributes met, and pairs met on one object
        for example in examples:
            for _, its in self.facts(example) or ():
                self.seen |= its
                self.together |= {(a, b) for a in its for b in its}

    def facts(self, example):
        """[(label, {attributes})] of an image's objects, or None if it is not annotated."""
        objects = getattr(example, self.source)
        if objects is None:
            return None
        attributes = objects.attributes or [[]] * len(objects.labels)
        return [(label, set(its)) for label, its in zip(objects.labels, attributes)]

    def find(self, sentence):
        """[(attributes: [(start, end, attribute)], (start, end, label, form))], in characters."""
        words = [(m.group(), *m.span()) for m in re.finditer(r"[a-z0-9'-]+", sentence.lower())]
        phrases, before = [], []
        i = 0
        while i < len(words):
            for n in (3, 2, 1):  # "stop sign" is one name, not a "stop" and a "sign"
                name = " ".join(word for word, _, _ in words[i:i + n])
                if i + n > len(words):
                    continue
                span = words[i][1], words[i + n - 1][2]
                if name in self.object_of:
                    phrases.append((before, (*span, *self.object_of[name])))
                    before = []
                    break
                if name in self.attribute_of:
                    before = [*before, (*span, self.attribute_of[name])]
                    break
            else:
                n, before = 1, []
            i += n
        return phrases

    @staticmethod
    def is_true(facts, label, attributes):
        return any(label == has and set(attributes) <= its for has, its in facts)

    def counterfactuals(self, facts, phrase):
        """For each word of a true phrase: (start, end, [others that keep it true], [words that make
        it false]: names, or attributes never met on one object with this one).
        """
        before, (start, end, label, form) = phrase
        attributes = [attribute for _, _, attribute in before]
        for at, (a_start, a_end, attribute) in enumerate(before):
            rest = attributes[:at] + attributes[at + 1:]
            others = [a for a in sorted(self.seen) if a != attribute and a not in rest]
            true = [a for a in others if self.is_true(facts, label, [*rest, a])]
            false = [self.attributes[a][0] for a in others
                     if a not in true and (a, attribute) not in self.together]
            yield a_start, a_end, true, false
        others = [other for other in range(len(self.labels)) if other != label]
        true = [other for other in others if self.is_true(facts, other, attributes)]
        false = [self.labels[other] for other in others if other not in true]
        yield start, end, true, [names[form] if form < len(names) else names[0] for names in false]

    def grounded_words(self, facts, sentence):
        """(start, end, false words) of the single words that the image decides: no other word would
        make their phrase true.
        """
        words = []
        for phrase in self.find(sentence):
            if self.is_true(facts, phrase[1][2], [attribute for _, _, attribute in phrase[0]]):
                words += [(start, end, false)
                          for start, end, true, false in self.counterfactuals(facts, phrase)
                          if not true and " " not in sentence[start:end]]
        return words

    def all_true(self, facts, sentence):
        """Whether it names an object, and every object phrase in it is true of the image."""
        phrases = self.find(sentence)
        return bool(phrases) and all(
            self.is_true(facts, object_[2], [attribute for _, _, attribute in before])
            for before, object_ in phrases)


# --------------------------------------------------------------------------------------------------
# The measures of pre-training


def make_probes(examples, grounding, tokenizer, seed=0, per_image=4):
    """What each image is asked, the same for each model and run, a list of dicts: mlm: [(input,
    labels)], 15 % of the words masked; visual: the same with one word that the image decides; itm:
    [(tokens, 1 or 0)], half of them another image's; foil: the same, half with one grounded word
    made false. A masked word is always [MASK]: one left in place would flatter a blind model.
    """
    probes = []
    for index, example in enumerate(examples):
        rng = random.Random(f"validation {seed} {example.id}")
        count = min(per_image, len(example.sentences))
        facts = grounding.facts(example)
        probe = {"mlm": [], "visual": [], "itm": [], "foil": [],
                 "first": tokenizer.encode(example.sentences[0])}
        for i, place in enumerate(rng.sample(range(len(example.sentences)), count)):
            sentence = example.sentences[place]
            tokens, spans = tokenizer.encode_with_offsets(sentence)
            labels = mask_tokens(tokens, tokenizer, rng)[1]
            masked = [tokenizer.mask if label >= 0 else t for t, label in zip(tokens, labels)]
            probe["mlm"].append((masked, labels))

            make_false = (index + i) % 2 == 1 and len(examples) > 1
            if not make_false:
                probe["itm"].append((tokens, 1))
            else:
                other = other_sentence(examples, index, place < example.captions, rng)
                if other is not None:
                    probe["itm"].append((tokenizer.encode(other), 0))

            words = grounding.grounded_words(facts, sentence) if facts is not None else []
            if not words:
                continue
            start, end, _ = rng.choice(words)
            hidden = [s < e and s >= start and e <= end for s, e in spans]
            if any(hidden):
                masked = [tokenizer.mask if h else t for h, t in zip(hidden, tokens)]
                labels = [t if h else -1 for h, t in zip(hidden, tokens)]
                probe["visual"].append((masked, labels))
            words = [word for word in words if word[2]]
            if words and make_false:
                start, end, false = rng.choice(words)
                foil = sentence[:start] + rng.choice(false) + sentence[end:]
                probe["foil"].append((tokenizer.encode(foil), 0))
            elif words:
                probe["foil"].append((tokens, 1))
        probes.append(probe)
    return probes


def prepare_probes(tokenizer, names, examples):
    """What `measure` needs at each validation: (Grounding, probes, the mean image)."""
    grounding = Grounding(names, examples)
    mean = mean_image([example.files[0] for example in examples[:500]])
    return grounding, make_probes(examples, grounding, tokenizer), mean


def average_precision(examples, results, source):
    """(AP, AP50) by pycocotools. results: dicts of image_id (a number in `examples`), category_id,
    bbox, score. Crowd regions are absent from the truth, not ignored as officially.
    """
    truth = {"info": {}, "images": [], "annotations": []}
    for image_id, example in enumerate(examples):
        objects = getattr(example, source)
        if objects is None:
            continue
        truth["images"].append({"id": image_id})
        boxes = boxes_in_pixels(torch.tensor(objects.boxes).view(-1, 4), example.size).tolist()
        for box, label in zip(boxes, objects.labels):
            truth["annotations"].append({
                "id": len(truth["annotations"]) + 1, "image_id": image_id, "bbox": box,
                "category_id": label, "area": box[2] * box[3], "iscrowd": 0})
    labels = {annotation["category_id"] for annotation in truth["annotations"]}
    truth["categories"] = [{"id": label} for label in labels]
    annotated = {image["id"] for image in truth["images"]}
    results = [result for result in results if result["image_id"] in annotated]
    if not labels:
        return 0.0, 0.0
    scores = detection_scores(results, truth)
    return scores["AP"], scores["AP50"]


@torch.no_grad()
def measure(model, tokenizer, names, examples, probes, *, device="cpu", amp=False, blind=False,
            rank=0, world=1, **loading):
    """All measures on held-out examples: {"mlm_accuracy": ..., ...} as fractions. Collective: each
    process does its share. probes: of `prepare_probes`; loading: of `evaluation_batches`.
    """
    model.eval()
    grounding, asked, mean = probes
    source = "coco" if names["coco"] else "vg"
    tally = defaultdict(list)  # measure -> 1 or 0 for each thing asked; for AP the boxes
    batches = evaluation_batches(examples, range(len(examples)), rank=rank, world=world,
                                 mean=mean if blind else None, **loading)
    for numbers, images, sizes, padded in batches:
        batch = [examples[i] for i in numbers]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            grid = model.encode_image(images.to(device), sizes.to(device), padded)

            # Words and pairs: every sentence of one kind, each with its image
            for kind, name in (("mlm", "mlm_accuracy"), ("visual", "mlm_accuracy_visual"),
                               ("itm", "itm_accuracy"), ("foil", "itm_accuracy_foil")):
                rows = [(j, *pair) for j, i in enumerate(numbers) for pair in asked[i][kind]]
                if not rows:
                    continue
                which, sentences, answers = zip(*rows)
                tokens = pad_tokens(sentences, tokenizer.pad).to(device)
                images_of = torch.tensor(which, device=device)
                states = model.encode(grid.select(images_of), tokens).states
                if kind in ("itm", "foil"):
                    guesses = model.itm(states[:, 0]).argmax(-1).tolist()
                    tally[name] += [guess == answer for guess, answer in zip(guesses, answers)]
                    continue
                labels = pad_tokens(answers, -1).to(device)
                hidden = labels >= 0
                right = torch.ones_like(hidden)
                logits = model.mlm_logits(states[:, :tokens.shape[1]][hidden])
                right[hidden] = logits.argmax(-1) == labels[hidden]
                # Each masked token counts, but a visual word of several is right if all of them
                # are.
                tally[name] += (right[hidden] if kind == "mlm" else right.all(1)).tolist()

            # Objects, with a sentence and without
            first = pad_tokens([asked[i]["first"] for i in numbers], tokenizer.pad).to(device)
            alone = model.encode(grid)
            for name, memory in (("AP", model.encode(grid, first)), ("AP_no_sentence", alone)):
                objects = model.detect(memory)
                answers = (x.cpu() for x in best_classes(objects, source))
                for i, scores, labels, boxes in zip(numbers, *answers):
                    pixels = boxes_in_pixels(boxes, examples[i].size).tolist()
                    tally[name] += [
                        {"image_id": i, "category_id": label, "bbox": box, "score": score}
                        for score, label, box in zip(scores.tolist(), labels.tolist(), pixels)]

            # Attributes of the query that matches an annotated box, without a sentence: of its k
            # true attributes, how many are among the k most likely
            rows = [j for j, example in enumerate(batch) if example.vg is not None and names["vg"]]
            if rows:
                annotated = [batch[j].vg for j in rows]
                targets = [to_device(detection_target("coco", its), device) for its in annotated]
                _, row, query, box = hungarian_match(
                    objects["logits"]["vg"][-1:, rows], objects["boxes"][-1:, rows], targets)
                truth = [set(attributes) for its in annotated for attributes in its.attributes]
                logits = objects["attributes"][-1, rows][row, query].float()
                for scores, b in zip(logits, box.tolist()):
                    if truth[b]:
                        best = scores.topk(len(truth[b])).indices.tolist()
                        right = len(truth[b].intersection(best))
                        tally["attribute_accuracy"].append(right / len(truth[b]))

            # Captions, greedy
            for (pieces, _), example in zip(model.generate(alone), batch):
                facts = grounding.facts(example)
                if facts is not None:
                    caption = tokenizer.decode(pieces)
                    tally["caption_objects"].append(grounding.all_true(facts, caption))

    shares = gather(dict(tally))
    kinds = dict.fromkeys(kind for share in shares for kind in share)
    tally = {kind: [x for share in shares for x in share.get(kind, ())] for kind in kinds}
    measures = {}
    for name, values in tally.items():
        if name.startswith("AP"):
            precision = average_precision(examples, values, source)
            measures[name], measures[name.replace("AP", "AP50")] = precision
        else:
            measures[name] = sum(values) / len(values)
    return measures


def measure_with_blind(*inputs, **settings):
    """{"val_...": the measures, "blind_...": the same with every image replaced by the mean
    image}."""
    seen = measure(*inputs, **settings)
    blind = measure(*inputs, blind=True, **settings)
    return {**{f"val_{name}": value for name, value in seen.items()},
            **{f"blind_{name}": value for name, value in blind.items()}}


# --------------------------------------------------------------------------------------------------
# One image: the Python interface


class Predictor:
    """A checkpoint that answers about images: Predictor("last.pt").caption("photo.jpg").

    An image is a path, a PIL image of any mode, or an array (H, W, 3) uint8; a camera's rotation
    (EXIF) is applied. What a checkpoint cannot do is an InputError that says what it can.
    """

    def __init__(self, checkpoint, device=None, amp=False, beam=4, alpha=0.9, model=None):
        """device: by default a GPU if there is one; amp: in bf16; beam, alpha: of captions; model:
        of a checkpoint that is in memory already, a dict with vocabulary, names and args.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.amp, self.beam, self.alpha, self.source = amp, beam, alpha, checkpoint
        state = load_checkpoint(checkpoint) if model is None else checkpoint
        self.model = (model or build_model(state, checkpoint)).to(self.device).eval()
        self.names, flags = state["names"], state["args"]
        self.tokenizer = Tokenizer(state["vocabulary"], self.model.config.max_tokens)
        self.short, self.long = max(flags["short_sides"]), flags["long_side"]
        without = flags.get("without", ())
        learnt = (("caption", "caption"), ("detect", "detection"), ("match", "itm"))
        self.can = [can for can, loss in learnt if loss not in without]
        self.task = self.model.config.task
        if self.task:
            self.can = TASKS[self.task].can
        self.labels = "vg" if self.names["vg"] and not self.task else "coco"
        self.attributes = self.labels == "vg" and "attributes" not in without

    def require(self, ability):
        if ability not in self.can:
            kind = f"fine-tuned for {self.task}" if self.task else "pre-trained"
            raise InputError(f"{self.source}: is {kind}, and cannot {ability}; it can "
                             f"{', '.join(self.can) or 'be scored (--task)'}")

    def open(self, image):
        """An RGB PIL image of what a caller gave."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return to_rgb(ImageOps.exif_transpose(image))
        try:
            return load_image(image, upright=True)
        except FileNotFoundError:
            raise InputError(f"{image}: no such file") from None
        except Exception as error:  # Pillow raises many kinds
            raise InputError(f"{image}: cannot be decoded ({error}); images are of kind "
                             f"{', '.join(FORMATS)}") from None

    @contextlib.contextmanager
    def inference(self):
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, torch.bfloat16,
                                             enabled=self.amp):
            yield

    def encode(self, *images, sentence=None):
        """PIL images -> (their grid, the sentence's tokens (1, T) or None)."""
        pixels, sizes, padded = pad_images(
            [to_pixels(image, self.short, self.long) for image in images])
        grid = self.model.encode_image(pixels.to(self.device), sizes.to(self.device), padded)
        if sentence is None:
            return grid, None
        return grid, torch.tensor([self.tokenizer.encode(sentence)], device=self.device)

    def caption(self, image):
        """A sentence, by beam search."""
        self.require("caption")
        with self.inference():
            grid, _ = self.encode(self.open(image))
            memory = self.model.encode(grid)
            (pieces, _), = self.model.generate(memory, beam=self.beam, alpha=self.alpha)
        return self.tokenizer.decode(pieces)

    def detect(self, image, threshold=0.5, sentence=None):
        """[{"label", "attributes": [...], "score", "box": [x, y, w, h] in pixels}], the surest
        first. sentence: one that the encoder reads beside the image.
        """
        self.require("detect")
        image = self.open(image)
        with self.inference():
            objects = self.model.detect(self.model.encode(*self.encode(image, sentence=sentence)))
        return [found for _, found in self.read_objects(objects, image, threshold)]

    def read_objects(self, objects, image, threshold):
        """[(query, what `detect` returns of it)] of what model.detect gave for one image."""
        scores, labels, boxes = (x[0].cpu() for x in best_classes(objects, self.labels))
        boxes = boxes_in_pixels(boxes, image.size[::-1])
        attributes = objects["attributes"][-1, 0].float().softmax(-1).cpu()
        found = []
        for q in scores.argsort(descending=True).tolist():
            if scores[q] <= threshold:
                break
            # A box's attributes share one softmax, so k of them come to about 1 / k each.
            likely = [a for a in attributes[q].topk(min(3, attributes.shape[1])).indices.tolist()
                      if attributes[q, a] > 0.15]
            names = [self.names["attributes"][a].split(",")[0] for a in sorted(likely)]
            found.append((q, {"label": self.names[self.labels][labels[q]].split(",")[0],
                              "attributes": names if self.attributes else [],
                              "score": round(scores[q].item(), 4),
                              "box": [round(v, 1) for v in boxes[q].tolist()]}))
        return found

    def match(self, image, sentence):
        """The probability that the sentence belongs to the image."""
        self.require("match")
        with self.inference():
            return self.model.similarity(*self.encode(self.open(image), sentence=sentence)) \
                .sigmoid().item()

    def answer(self, image, question):
        """[(answer, probability)], the five likeliest; each has its own sigmoid."""
        self.require("answer")
        with self.inference():
            logits = self.model.classify(*self.encode(self.open(image), sentence=question))
        best = logits[0].float().sigmoid().topk(min(5, logits.shape[1]))
        return [(self.names["answers"][a], round(p, 4))
                for p, a in zip(best.values.tolist(), best.indices.tolist())]

    def judge(self, left, right, statement):
        """The probability that a statement about two images is true."""
        self.require("judge")
        with self.inference():
            images = self.open(left), self.open(right)
            logits = self.model.classify(*self.encode(*images, sentence=statement))
        return logits[0].float().softmax(-1)[1].item()

    def attention(self, image, sentence=None, threshold=0.5):
        """Where each word and each object looks, a dict: words: the T pieces of the sentence;
        encoder (L, T, T + S): each word's attention by layer, mean over heads; objects: as `detect`
        has them; decoder (L', n, T + S): their queries' cross-attention; grid: (H, W), H * W = S.
        """
        image = self.open(image)
        stride = self.model.config.stride
        pixels = to_pixels(image, self.short, self.long)
        tokens = [] if sentence is None else self.tokenizer.encode(sentence)
        found = {"words": [self.tokenizer.vocabulary[t] for t in tokens], "objects": [],
                 "grid": tuple(math.ceil(side / stride) for side in pixels.shape[1:])}
        encoder = [layer.attention for layer in self.model.encoder]
        decoder = [layer.cross_attention for layer in self.model.decoder]
        queries = []
        with self.inference(), record_attention(encoder, len(tokens)) as by_word, \
                record_attention(decoder) as by_query:
            memory = self.model.encode(*self.encode(image, sentence=sentence))
            if "detect" in self.can:
                read = self.read_objects(self.model.detect(memory), image, threshold)
                queries = [query for query, _ in read]
                found["objects"] = [thing for _, thing in read]
        found["encoder"] = torch.stack([weights[0].mean(0) for weights in by_word])
        found["decoder"] = torch.stack([weights[0, :, queries].mean(0) for weights in by_query]) \
            if queries else torch.zeros(0)
        return found


@contextlib.contextmanager
def record_attention(modules, first=None):
    """The weights (B, heads, T, S) of these modules, of the first so many queries, one a call:
    computed again, because F.scaled_dot_product_attention keeps them to itself.
    """
    weights = []

    def hook(module, args, kwargs, output):
        query, (k, _), *rest = args
        with torch.autocast(k.device.type, enabled=False):
            q = module.split(F.linear(query[:, :first].float(), module.q.weight, module.q.bias))
            scores = q @ k.float().transpose(-1, -2) / math.sqrt(k.shape[-1])
        mask = rest[0] if rest else kwargs.get("mask")  # True = may be attended to
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        weights.append(scores.softmax(-1).cpu())

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield weights
    finally:
        for handle in hooks:
            handle.remove()


# --------------------------------------------------------------------------------------------------
# Drawings


def show_objects(axes, image, objects, title=""):
    """An image with labelled boxes, as `Predictor.detect` has them, and a title."""
    axes.imshow(image, aspect="equal")
    axes.set_axis_off()
    axes.set_title("\n".join(textwrap.wrap(title, 32)), fontsize=7)
    for i, thing in enumerate(objects):
        x, y, w, h = thing["box"]
        axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=f"C{i % 10}", linewidth=1))
        axes.text(x, y - 1, " ".join([*thing["attributes"], thing["label"]]), fontsize=5,
                  color=f"C{i % 10}", bbox=dict(facecolor="white", edgecolor="none", pad=0.5))


def draw_sheet(path, model, tokenizer, names, examples, without=(), *, short, long, device="cpu"):
    """A PNG of held-out images: truth on the left, on the right what the model says."""
    flags = {"short_sides": [short], "long_side": long, "without": without}
    state = {"vocabulary": tokenizer.vocabulary, "names": names, "args": flags}
    predictor = Predictor(state, device, beam=1, model=model)
    rows = math.ceil(len(examples) / 2)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for n, example in enumerate(examples):
        image = load_image(example.files[0])
        objects = getattr(example, predictor.labels)
        truth = []
        if objects is not None:
            boxes = boxes_in_pixels(torch.tensor(objects.boxes).view(-1, 4), example.size).tolist()
            attributes = objects.attributes or [[]] * len(boxes)
            truth = [{"label": names[predictor.labels][label].split(",")[0], "box": box,
                      "attributes": [names["attributes"][a].split(",")[0] for a in its]}
                     for label, box, its in zip(objects.labels, boxes, attributes)]
        show_objects(axes[2 * n], image, truth, f"true: {example.sentences[0]}")
        caption = predictor.caption(image) if "caption" in predictor.can else ""
        found = predictor.detect(image) if "detect" in predictor.can else []
        show_objects(axes[2 * n + 1], image, found, f"says: {caption}")
    figure.savefig(path)


def draw_curves(folders, path):
    """A PNG of runs' losses and measures, a colour a run; blind ones dashed, majority's dotted."""
    runs = []
    for folder in folders:
        text = read_text(os.path.join(folder, "log.jsonl"), "the curves of a run")
        lines = [json.loads(line) for line in text.split("\n")[:-1]]  # the last may be cut off
        runs.append((os.path.basename(os.path.normpath(folder)), lines))
    keys = dict.fromkeys(key for _, lines in runs for line in lines for key in line)
    keys = [key for key in keys if key.startswith(("loss", "val_"))]
    rows = max(1, math.ceil(len(keys) / 4))
    figure = Figure(figsize=(13, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flatten()
    for ax in axes[len(keys):]:
        ax.set_axis_off()
    for ax, key in zip(axes, keys):
        ax.set_title(key.removeprefix("val_"), fontsize=8)
        ax.tick_params(labelsize=6)
        ax.xaxis.get_major_locator().set_params(integer=True)
        for n, (name, lines) in enumerate(runs):
            for prefix, style in (("val_", "-"), ("blind_", "--"), ("majority_", ":")):
                curve = key.replace("val_", prefix)
                points = [(line["step"], line[curve]) for line in lines if curve in line]
                if points and (curve != key or prefix == "val_"):
                    ax.plot(*zip(*points), style, color=f"C{n % 10}", linewidth=1, label=name,
                            marker="." if len(points) < 3 else None)
    if len(runs) > 1 and keys:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=4)
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
    # Cell i of the ResNet's grid is about pixel i * stride: the cells' squares begin half a cell
    # before
    x, y = image.width / W, image.height / H
    extent = (-x / 2, image.width - x / 2, image.height - y / 2, -y / 2)
    for row in range(rows):
        for layer in range(layers):
            ax = axes[row][layer]
            cells = weights[layer, row, T:]
            ax.imshow(image.convert("L"), cmap="gray")
            ax.imshow(cells.view(H, W).numpy(), cmap="hot", alpha=0.6, extent=extent,
                      interpolation="bilinear")
            ax.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
            ax.set_title(f"layer {layer + 1}: {cells.sum():.0%} on the image", fontsize=5)
            if kind == "objects":
                bx, by, bw, bh = found["objects"][row]["box"]
                ax.add_patch(Rectangle((bx, by), bw, bh, fill=False, edgecolor="cyan"))
        axes[row][0].set_ylabel(names[row], fontsize=7)
    figure.savefig(path)


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Measure a checkpoint, score a result file, or ask about images of your own.",
        usage="evaluate.py --checkpoint FILE ([--task TASK] --data DIR | --image IMAGE ...)\n"
              "       evaluate.py --task TASK --score FILE --against FILE\n"
              "       evaluate.py --curves RUN [RUN ...] --output DIR",
        formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", help="what pretrain.py or finetune.py wrote")
    g = parser.add_argument_group("measures on a data set")
    g.add_argument("--task", choices=tuple(TASKS), help="the official scores of a task")
    g.add_argument("--data", metavar="DIR", help="the data folder (README: the data tree)")
    g.add_argument("--index", metavar="DIR", help="the data's index (default: DATA/.index)")
    g.add_argument("--split", help="train, val (default), test; vqa also test-dev. With --score: "
                   "that of Karpathy's files which counts (default: test)")
    g.add_argument("--submit", metavar="FILE", help="write the results in the official format")
    g.add_argument("--examples", type=number(int, 1), metavar="N",
                   help="the first N only; default: all, pre-trained 1000")
    g.add_argument("--blind", action="store_true", help="show the mean image in place of each")
    g.add_argument("--text", choices=("caption", "none"), help="detection: default as trained")
    g.add_argument("--batch-size", type=number(int, 1), default=32, help="images at a time")
    g.add_argument("--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1),
                   help="loader processes")
    g = parser.add_argument_group("anybody's results, no model involved")
    g.add_argument("--score", metavar="FILE", help="a result file")
    g.add_argument("--against", metavar="FILE", help="the official annotation file")
    g.add_argument("--questions", metavar="FILE", help="VQA: the questions that may be answered")
    g = parser.add_argument_group("images of your own")
    g.add_argument("--image", nargs="+", help="files or folders: caption and objects of each")
    g.add_argument("--question", help="a VQA checkpoint: the five likeliest answers")
    g.add_argument("--statement", help="an NLVR2 checkpoint: is it true of two images?")
    g.add_argument("--find", metavar="SENTENCE", help="the images by how well it fits")
    g.add_argument("--sentence", help="does it belong to the image? Objects are detected with it")
    g.add_argument("--attention", action="store_true",
                   help="draw to --output where each word of the sentence and each object looks")
    g.add_argument("--threshold", type=number(float, 0, 1), default=0.5, metavar="P",
                   help="objects: least probability")
    g = parser.add_argument_group("output and model")
    g.add_argument("--curves", nargs="+", metavar="RUN", help="draw the curves of runs' folders")
    g.add_argument("--output", metavar="DIR", help="folder for drawings")
    g.add_argument("--json", metavar="FILE", help="write the measures, or answers, to this file")
    g.add_argument("--beam", type=number(int, 1, 1000), default=4, help="captions: beams")
    g.add_argument("--alpha", type=number(float, -10, 10), default=0.9, help="length penalty")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:N or mps")
    g.add_argument("--amp", choices=("none", "bf16"), default="none", help="mixed precision")
    args = parser.parse_args(argv)
    ways = [way for way in ("score", "curves", "image", "data") if getattr(args, way)]
    if len(ways) != 1 or args.score and not (args.task and args.against) or \
            ways[0] in ("image", "data") and not args.checkpoint:
        raise InputError("give --checkpoint and --data (measures) or --image (your own); or "
                         "--task, --score and --against; or --curves")
    asked = [flag for flag in ("question", "statement", "find", "sentence") if getattr(args, flag)]
    if len(asked) > bool(args.image):
        raise InputError(f"--{asked[0]}: goes with --image, and alone")
    if (args.curves or args.attention) and not args.output:
        raise InputError("give --output, a folder for the drawings")
    folders = [os.path.dirname(path) for path in (args.json, args.submit) if path]
    try:
        for folder in filter(None, [*folders, args.output]):
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: is no folder that can be made ({error.strerror})") from None
    return args


def run_data(args):
    """{measure: value} of a checkpoint on a data set. Collective."""
    rank, world, device = init_processes(args.device)
    state = load_checkpoint(args.checkpoint)
    model = build_model(state, args.checkpoint).to(device)
    flags, names, trained = state["args"], state["names"], state["config"].task
    tokenizer = Tokenizer(state["vocabulary"], state["config"].max_tokens)
    size = {"short": max(flags["short_sides"]), "long": flags["long_side"]}
    loading = {**size, "workers": args.workers, "batch_size": args.batch_size, "device": device,
               "amp": args.amp == "bf16", "rank": rank, "world": world}
    if args.task:
        if args.task != trained and (trained or TASKS[args.task].new_head):
            raise InputError(f"--task {args.task}: {args.checkpoint} is "
                             f"{f'fine-tuned for {trained}' if trained else 'pre-trained only'}")
        given = {"beam": args.beam, "alpha": args.alpha, "meteor": True}
        if args.text:
            given["text"] = args.text
        task = make_task(args.task, {**flags, **given})
        task.labels = names.get("answers", ())
        split = args.split or "val"
        index = task.index(args.data, split, args.index, print0)
        if any(index["names"][key] != names[key] for key in index["names"]):
            raise InputError(f"--data {args.data}: has other classes than {args.checkpoint}")
        examples = index["examples"][:args.examples or None]
        answers = predict(task, model, tokenizer, examples, blind=args.blind, **loading)
        if rank > 0:
            return {}
        if args.submit:
            with open(args.submit, "wb") as file:
                file.write(task.results(answers, examples, args.data, split))
            print0(f"{args.submit}: {len(examples)} results")
        return task.score(answers, examples, args.data, split)

    if trained or args.submit or args.split or args.blind:
        raise InputError(f"give --task: {args.checkpoint} is fine-tuned for {trained}" if trained
                         else "--submit, --split and --blind need a --task")
    data = pretraining_index(args.data, flags["sets"], args.index, print0)
    if data["names"] != {key: names[key] for key in data["names"]} or not data["val"]:
        raise InputError(f"--data {args.data}: has no held-out images, or other classes or "
                         f"attributes than {args.checkpoint}")
    examples = decodable(data["val"][:args.examples or 1000], print0)
    if args.output and rank == 0:
        draw_sheet(os.path.join(args.output, "sheet.png"), model, tokenizer, names, examples[:12],
                   flags["without"], device=device, **size)
    probes = prepare_probes(tokenizer, names, examples)
    return measure_with_blind(model, tokenizer, names, examples, probes, **loading)


def image_files(paths):
    """The files of --image; of a folder those whose ending is an image's."""
    files, endings = [], (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
    for path in paths:
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else None
        files += [path] if inside is None else [os.path.join(path, name) for name in inside
                                                if name.lower().endswith(endings)]
    if not files:
        raise InputError(f"--image {paths[0]}: no image in this folder")
    return files


def ask(args, predictor, file):
    """What the flags ask about one image: a dict, and lines for the console."""
    image = predictor.open(file)
    answer = {"image": file, "width": image.width, "height": image.height}
    lines = []
    if args.question:
        answer["answers"] = predictor.answer(image, args.question)
        return answer, [f"{p:.2f}  {text}" for text, p in answer["answers"]]
    if args.sentence and "match" in predictor.can or args.find:
        answer["match"] = predictor.match(image, args.find or args.sentence)
        lines.append(f"{answer['match']:.2f}  belongs to it: {args.find or args.sentence}")
        if args.find:
            return answer, lines
    if "caption" in predictor.can:
        answer["caption"] = predictor.caption(image)
        lines.append(answer["caption"])
    if "detect" in predictor.can:
        answer["objects"] = predictor.detect(image, args.threshold, args.sentence)
        lines += [f"{o['score']:.2f}  {' '.join([*o['attributes'], o['label']]):32} box {o['box']}"
                  for o in answer["objects"]]
    if len(answer) == 3:  # it can do nothing of this
        predictor.require("caption")
    return answer, lines


def run_images(args):
    """(answers, exit code). An image that cannot be read is named and left out: code 2."""
    predictor = Predictor(args.checkpoint, args.device, args.amp == "bf16", args.beam, args.alpha)
    files = image_files(args.image)
    if args.statement:
        if len(files) != 2:
            raise InputError("--statement: needs two images, left and right")
        chance = predictor.judge(*files, args.statement)
        print(f"{files[0]}, {files[1]}\n   {chance:.2f}  true: {args.statement}")
        return [{"images": files, "statement": args.statement, "probability": chance}], 0
    answers, code = [], 0
    for n, file in enumerate(files, 1):
        try:
            answer, lines = ask(args, predictor, file)
        except InputError as error:
            if file not in str(error):
                raise
            print(f"evaluate.py: {error}", file=sys.stderr)
            code = 2
            continue
        head = f"{file} ({answer['width']} x {answer['height']})"
        print("\n   ".join([head, *lines]), flush=True)
        answers.append(answer)
        if not args.output:
            continue
        image = predictor.open(file)
        stem = os.path.join(args.output, f"{n:03}-{os.path.splitext(os.path.basename(file))[0]}")
        height = 8 * min(3, image.height / image.width) + 0.5
        figure = Figure(figsize=(8, height), layout="constrained")
        title = " | ".join(lines[:5] if args.question else lines[:1])
        show_objects(figure.subplots(), image, answer.get("objects", ()), title)
        figure.savefig(f"{stem}.png")
        if args.attention:
            found = predictor.attention(image, args.sentence or args.question, args.threshold)
            for kind in ("words", "objects"):
                if found[kind]:
                    draw_attention(f"{stem}-{kind}.png", image, found, kind)
    if args.find:
        answers.sort(key=lambda answer: -answer["match"])
        print("\n".join(f"{n:4}  {answer['match']:.2f}  {answer['image']}"
                        for n, answer in enumerate(answers[:20], 1)))
    return answers, code


def main(argv=None):
    def work():
        args = parse(argv)
        code = 0
        if args.curves:
            return draw_curves(args.curves, os.path.join(args.output, "curves.png"))
        if args.image:
            init_processes(args.device)  # for its check of the device
            found, code = run_images(args)
        elif args.score:
            found = make_task(args.task, {}).score_file(args.score, args.against, args.questions,
                                                        args.split or "test")
        else:
            found = run_data(args)
        if isinstance(found, dict):
            print0("\n".join(f"{name:28} {value:.3f}" for name, value in found.items()))
        if args.json and int(os.environ.get("RANK", 0)) == 0:
            with open(args.json, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(found), indent=1))
        return code

    return command("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
