"""Measures on held-out pictures: what a pre-trained model has learnt, and what a blind one would score.

    python evaluate.py --checkpoint runs/pretrain/last.pt --data DIR [--json FILE] [--sheet FILE.png]

Beside each measure stands `blind_...`: the same model and the same inputs with every picture replaced by the mean
picture. What is left then is what the words alone, or habit alone, give away.

The words of a sentence are checked against the annotation: an object phrase is a name of the label sets with the
attribute words right before it ("small red circle"). It is true of a picture if one annotated object has that name and
all of these attributes. Nothing else is parsed, so a sentence may have other faults that these measures do not see.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import sys
from collections import defaultdict

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import (
    InputError,
    Tokenizer,
    decodable,
    load_picture,
    mask_words,
    pad_pictures,
    pad_tokens,
    read_pretraining,
    to_pixels,
)
from matcher import hungarian_match
from model import E2EVLP, load_checkpoint

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


def mean_picture(pictures, side=64):
    """What a blind model sees: the mean of the pictures, each squeezed to side x side, as a PIL image."""
    total = sum(torch.from_numpy(np.array(load_picture(p.file).resize((side, side)))).double()
                for p in pictures)
    return Image.fromarray((total / len(pictures)).round().byte().numpy())


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
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        scored = COCOeval(coco, coco.loadRes(results), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return float(scored.stats[0]), float(scored.stats[1])


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
    mean = mean_picture(pictures[:500]) if blind else None
    tally = defaultdict(list)  # measure -> 1 or 0 for each thing asked; for AP the boxes found

    # Pictures of like shape together; which picture is in which batch changes nothing but the padding.
    mine = sorted(range(rank, len(pictures), world), key=lambda i: pictures[i].size[1] / pictures[i].size[0])
    for at in range(0, len(mine), batch_size):
        numbers = mine[at:at + batch_size]
        batch = [pictures[i] for i in numbers]
        images, sizes = pad_pictures([
            to_pixels(mean.resize(p.size[::-1]) if blind else load_picture(p.file), short, long) for p in batch])
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
    if world > 1:
        gathered = [None] * world
        torch.distributed.all_gather_object(gathered, dict(tally))
        tally = {name: [x for part in gathered for x in part.get(name, ())] for name in set().union(*gathered)}
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="what pretrain.py wrote: last.pt")
    parser.add_argument("--data", required=True, help="the data folder (README: the data tree)")
    parser.add_argument("--pictures", type=int, default=1000, help="held-out pictures to use, at most (default 1000)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time (default 32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the measures to this file")
    parser.add_argument("--sheet", help="draw a dozen pictures with what was found to this PNG file")
    args = parser.parse_args(argv)
    try:
        for flag, path in (("--json", args.json), ("--sheet", args.sheet)):
            if path and not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise InputError(f"{flag} {path}: cannot be written; make its folder first, or give another")
        state = load_checkpoint(args.checkpoint)
        if "args" not in state:
            raise InputError(f"--checkpoint {args.checkpoint}: not of a training run; give a run's last.pt")
        data = read_pretraining(args.data, state["args"]["sets"])
        if data["names"] != state["names"]:
            raise InputError(f"--data {args.data}: its classes or attributes are not those of {args.checkpoint}")
        if not data["val"]:
            raise InputError(f"--data {args.data}: no held-out picture with a sentence")
        tokenizer = Tokenizer(state["vocabulary"], state["config"].max_tokens)
        model = E2EVLP(state["config"]).to(args.device)
        model.load_state_dict(state["model"])
        size = {"short": max(state["args"]["short_sides"]), "long": state["args"]["long_side"], "device": args.device}
        pictures = decodable(data["val"][:args.pictures])
        measures = measure_with_blind(model, tokenizer, data["names"], pictures, batch_size=args.batch_size, **size)
        for name, value in measures.items():
            if name.startswith("val_"):
                print(f"{name[4:]:24} {value:.3f}   blind {measures['blind_' + name[4:]]:.3f}")
        if args.json:
            with open(args.json, "w") as file:
                json.dump(measures, file, indent=1)
        if args.sheet:
            draw_sheet(args.sheet, model, tokenizer, data["names"], pictures[:12], **size)
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
