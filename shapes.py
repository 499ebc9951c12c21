"""The miniature world: pictures of coloured shapes, and true sentences about them, in the official files' formats.

    python shapes.py --output data/mini --seed 1          # about 10,000 pictures, less than a minute

A picture has 1 to 6 shapes on a light ground, its sides are 64, 80 or 96 pixels. A shape has a kind, a colour, a size
and a fill; a phrase names them in one order, "[size] [colour] [fill] kind", and may leave some out. Everything is
written as the real data sets are (the README has the tree), so that the readers need no special case:

    coco       boxes, five captions a picture, Karpathy's splits     train 3/4 of --train, val2017 = --val + --test
    vg         boxes with attributes, regions                        a third of coco's train, all of its val2017, and
                                                                     1/4 of --train that are in no other set
    vqa        four questions or less, each answered by ten people   on coco's pictures; test2015 has its own
    nlvr2      statements about two pictures                         3/8 of --train, twice --val, twice --test
    flickr30k  five sentences that are true of one picture only      1/4 of --train, --val, --test

Test pictures combine what training never combines: HELD_OUT pairs of kind and colour are in no train or val picture and
in every second test picture of each set (the even ones, counted from 0), so a model that memorises pairs is found out.

The same seed gives the same files, byte for byte: each picture has a generator of its own, seeded by a string; shapes
are computed with + - * / alone, which IEEE 754 fixes; JPEG is written with libjpeg's integer transform.
"""

import argparse
import io
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import SPECIAL, HelpFormatter, InputError, command

KINDS = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {"red": (214, 36, 36), "green": (36, 160, 60), "blue": (40, 80, 220), "yellow": (240, 205, 20),
           "purple": (140, 50, 185), "pink": (250, 130, 190), "brown": (135, 82, 42), "black": (25, 25, 25)}
SIZES = {"small": (12, 15), "large": (22, 28)}  # side of the box in pixels, from .. to
FILLS = ("solid", "striped", "dotted", "hollow")
HELD_OUT = {("circle", "purple"), ("square", "pink"), ("triangle", "brown"), ("star", "red"), ("cross", "blue"),
            ("heart", "green")}
PAIRS = [(kind, colour) for kind in KINDS for colour in COLOURS]
CANVASES = ((64, 64), (64, 80), (80, 64), (64, 96), (96, 64))  # height, width
CATEGORY_IDS = dict(zip(KINDS, (1, 2, 4, 7, 8, 11)))           # with gaps, as COCO's
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One shape. x, y: its box's left and upper side, side: the box's width and height, in pixels."""

    size: str
    colour: str
    fill: str
    kind: str
    x: int = 0
    y: int = 0
    side: int = 0

    def traits(self):
        return {"size": self.size, "colour": self.colour, "fill": self.fill, "kind": self.kind}


# ----------------------------------------------------------------------------------------------------------------
# Pictures


def inside(kind, x, y):
    """Is the point in the shape? x (right) and y (down) run from -1 to 1 over the shape's box."""
    if kind == "circle":
        return x * x + y * y <= 1
    if kind == "square":
        return np.ones(np.broadcast(x, y).shape, bool)
    if kind == "triangle":
        return abs(x) <= (y + 1) / 2
    if kind == "cross":
        return (abs(x) <= 0.34) | (abs(y) <= 0.34)
    if kind == "heart":
        u, v = x * 1.139, 0.118 - y * 1.118
        w = u * u + v * v - 1
        return w * w * w <= u * u * v * v * v
    # A five-pointed star is where at least four of a pentagon's five sides have the point on their inner side.
    corners = ((0, -1), (0.9511, -0.3090), (0.5878, 0.8090), (-0.5878, 0.8090), (-0.9511, -0.3090))
    u, v = x * 0.9511, y * 0.9045 - 0.0955
    votes = 0
    for i in range(5):
        (ax, ay), (bx, by) = corners[i], corners[(i + 2) % 5]
        votes = votes + ((bx - ax) * (v - ay) - (by - ay) * (u - ax) >= 0)
    return votes >= 4


def coverage(kind, fill, side, cache={}):  # noqa: B006, the cache is meant to be shared
    """How much of each pixel is painted, (side, side) float64 in 0 .. 1, from 4 x 4 points in a pixel."""
    if (kind, fill, side) not in cache:
        place = (np.arange(side * 4) + 0.5) / 4  # in pixels from the box's corner
        x, y = (place / side * 2 - 1)[None, :], (place / side * 2 - 1)[:, None]
        painted = inside(kind, x, y)
        if fill != "solid":  # a rim, so that the outline stays, and a pattern within it
            rim = 2.0 if fill == "hollow" else 1.25
            shrink = side / (side - 2 * rim)
            core = inside(kind, x * shrink, y * shrink) & (abs(x) * shrink <= 1) & (abs(y) * shrink <= 1)
            if kind == "triangle":  # its centre is below the middle of its box: an even rim needs a shift
                core = inside(kind, x * (shrink + 2 / side * 2), (y - rim / side) * (shrink + 2 / side * 2))
                core = core & (y <= 1 - 2 * rim / side)
            pattern = {"hollow": False, "striped": (place % 4 < 2)[:, None] | (x > 2),
                       "dotted": (place % 4 < 2)[:, None] & (place % 4 < 2)[None, :]}[fill]
            painted = painted & (~core | pattern)
        cache[kind, fill, side] = painted.reshape(side, 4, side, 4).mean((1, 3))
    return cache[kind, fill, side]


def draw(rng, canvas, things):
    """The picture as JPEG bytes: shapes on a light ground, each colour a little different each time."""
    ground = rng.randrange(222, 246)
    image = np.full((*canvas, 3), ground, np.float64)
    for t in things:
        ink = np.array([min(255, max(0, c + rng.randrange(-10, 11))) for c in COLOURS[t.colour]], np.float64)
        part = image[t.y:t.y + t.side, t.x:t.x + t.side]
        part += coverage(t.kind, t.fill, t.side)[..., None] * (ink - part)
    file = io.BytesIO()
    Image.fromarray((image + 0.5).astype(np.uint8)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def is_(thing, traits):
    return all(getattr(thing, k) == v for k, v in traits.items())


def count_of(things, traits):
    return sum(is_(t, traits) for t in things)


def draw_scene(rng, held=False, least=1, wanted=None, count=0):
    """A canvas (height, width) and its things, apart from each other. held: has a HELD_OUT pair, otherwise it has none.

    wanted, count: exactly `count` things have the traits `wanted`, and one or two more have not.
    """
    pairs = PAIRS if held else [p for p in PAIRS if p not in HELD_OUT]
    while True:
        n = rng.randint(least, 6) if wanted is None else count + (rng.randint(1, 2) if wanted else 0)
        things = []
        while len(things) < n:
            kind, colour = rng.choice(pairs)
            size = "large" if rng.random() < (0.45 if n <= 3 else 0.25) else "small"
            thing = Thing(size, colour, rng.choice(("solid", "solid", "solid", *FILLS[1:])), kind)
            if wanted is None or is_(thing, wanted) == (len(things) < count):
                things.append(thing)
        if any((t.kind, t.colour) in HELD_OUT for t in things) != held:
            continue
        canvas = rng.choice(CANVASES)
        placed = []
        for t in sorted(things, key=lambda t: t.size):  # the large ones first
            side = rng.randint(*SIZES[t.size])
            for _ in range(100):
                x, y = rng.randrange(canvas[1] - side + 1), rng.randrange(canvas[0] - side + 1)
                if all(x >= o.x + o.side + 2 or o.x >= x + side + 2 or y >= o.y + o.side + 2 or o.y >= y + side + 2
                       for o in placed):
                    placed.append(Thing(t.size, t.colour, t.fill, t.kind, x, y, side))
                    break
        if len(placed) == n:
            rng.shuffle(placed)
            return canvas, placed


# ----------------------------------------------------------------------------------------------------------------
# Sentences


def some_traits(rng, thing):
    """The traits that a phrase about this thing names; solid is what one expects, so it is seldom said."""
    said = {"size": 0.65, "colour": 0.65, "fill": 0.15 if thing.fill == "solid" else 0.65, "kind": 1}
    return {k: v for k, v in thing.traits().items() if rng.random() < said[k]}


def phrase(traits, plural=False):
    kind = traits.get("kind", "shape")
    words = [traits[k] for k in ("size", "colour", "fill") if k in traits]
    return " ".join([*words, kind + ("es" if kind == "cross" else "s") if plural else kind])


def relations(a, b):
    """What holds between two things, clearly: there is a straight line between their boxes."""
    return [name for name, holds in (("left of", a.x + a.side <= b.x), ("right of", b.x + b.side <= a.x),
                                     ("above", a.y + a.side <= b.y), ("below", b.y + b.side <= a.y)) if holds]


def related(things, first, relation, second):
    return any(relation in relations(a, b) for a in things for b in things
               if a is not b and is_(a, first) and is_(b, second))


def places(canvas, t):
    """Where the thing is: in the outer third, measured at its centre."""
    x, y = (t.x + t.side / 2) / canvas[1], (t.y + t.side / 2) / canvas[0]
    return [name for name, holds in (("on the left", 3 * x < 1), ("on the right", 3 * x > 2),
                                     ("at the top", 3 * y < 1), ("at the bottom", 3 * y > 2)) if holds]


def sentence(rng, canvas, things):
    """(a true sentence, the things it is about). It claims that something is there, never that there is no more."""
    while True:
        a, b = rng.sample(things, 2) if len(things) > 1 else (things[0], None)
        first = phrase(some_traits(rng, a))
        draw = rng.random()
        if draw < 0.2:
            return rng.choice(("a {}", "there is a {}", "a picture of a {}", "you can see a {}")).format(first), [a]
        if draw < 0.3 and places(canvas, a):
            where = rng.choice(places(canvas, a))
            return rng.choice(("a {} {}", "there is a {} {}")).format(first, where), [a]
        if draw < 0.65 and b and relations(a, b):
            form = rng.choice(("a {} {} a {}", "there is a {} {} a {}", "a {} is {} a {}"))
            relation = rng.choice(relations(a, b))
            if "of" in relation and rng.random() < 0.3:
                relation = "to the " + relation
            return form.format(first, relation, phrase(some_traits(rng, b))), [a, b]
        if 0.65 <= draw < 0.85 and b:
            form = rng.choice(("a {} and a {}", "there is a {} and a {}", "a picture of a {} and a {}"))
            return form.format(first, phrase(some_traits(rng, b))), [a, b]
        if draw >= 0.85:
            if len(things) > 1 and rng.random() < 0.35:
                return rng.choice(("there are {} shapes", "a picture with {} shapes", "{} shapes")).format(
                    NUMBERS[len(things)]), things
            # Counts of at least two; where a thing has no like, it is named with one trait less until it has.
            traits = some_traits(rng, a)
            for k in ("size", "fill", "colour"):
                if count_of(things, traits) < 2:
                    traits.pop(k, None)
            number = count_of(things, traits)
            if number > 1:
                return rng.choice(("{} {}", "there are {} {}", "a picture with {} {}")).format(
                    NUMBERS[number], phrase(traits, plural=True)), [t for t in things if is_(t, traits)]


def distinct_sentences(rng, canvas, things, n):
    found = {}
    while len(found) < n:
        text, about = sentence(rng, canvas, things)
        found.setdefault(text, about)
    return list(found)


def telling_sentences(rng, things, n=5):
    """Sentences that name two or three things with all their traits: draw_telling_scenes makes each true only here."""
    found = []
    while len(found) < n:
        chosen = rng.sample(things, min(len(things), rng.choice((2, 2, 3))))
        a, b, *more = (phrase(t.traits()) for t in chosen)
        how = relations(*chosen[:2])
        if more:
            text = f"a {a}, a {b} and a {more[0]}"
        elif how and rng.random() < 0.6:
            text = rng.choice(("a {} {} a {}", "a {} is {} a {}")).format(a, rng.choice(how), b)
        else:
            text = rng.choice(("a {} and a {}", "there is a {} and a {}", "a picture of a {} and a {}")).format(a, b)
        if text not in found:
            found.append(text)
    return found


def draw_telling_scenes(rng, n, test):
    """Scenes of which no two share two things alike, so that naming two things tells the picture."""
    scenes, taken = [], set()
    while len(scenes) < n:
        canvas, things = draw_scene(rng, held=test and len(scenes) % 2 == 0, least=2)
        looks = sorted(phrase(t.traits()) for t in things)
        pairs = {(a, b) for i, a in enumerate(looks) for b in looks[i + 1:]}
        if not pairs & taken:
            taken |= pairs
            scenes.append((canvas, things))
    return scenes


# ----------------------------------------------------------------------------------------------------------------
# Questions and statements


def question(rng, canvas, things, kind):
    """(question, its type as VQA names it, a function from a picture's things to the answer, all answers there are), or
    None if what was drawn cannot be asked about this picture.
    """
    t = rng.choice(things)
    traits = some_traits(rng, t)
    if kind == "is there":
        return (f"Is there a {phrase(traits)}?", "is there a",
                lambda others: "yes" if count_of(others, traits) else "no", ("yes", "no"))
    if kind == "relation":
        b = rng.choice(things)
        if b is t or not relations(t, b):
            return None
        other, relation = some_traits(rng, b), rng.choice(relations(t, b))
        if related(things, traits, OPPOSITE[relation], other):
            return None
        # The true relation or its opposite: both phrases are as likely to stand in a question
        relation = rng.choice((relation, OPPOSITE[relation]))
        return (f"Is there a {phrase(traits)} {relation} a {phrase(other)}?", "is there a",
                lambda others: "yes" if related(others, traits, relation, other) else "no", ("yes", "no"))
    if kind == "count":
        for k in ("size", "fill", "kind"):  # few words, so that there can be many of them
            if len(traits) > 1 and rng.random() < 0.6:
                traits.pop(k, None)
        return (f"How many {phrase(traits, plural=True)} are there?", "how many",
                lambda others: str(count_of(others, traits)), tuple("0123456"))
    traits.pop({"color": "colour", "shape": "kind"}.get(kind), None)
    if count_of(things, traits) != 1:  # "the" needs exactly one
        return None
    if kind == "color":
        return f"What color is the {phrase(traits)}?", "what color is the", lambda _: t.colour, tuple(COLOURS)
    if kind == "shape":
        return f"What is the {phrase(traits)}?", "what is the", lambda _: t.kind, KINDS
    x, y = 2 * t.x + t.side - canvas[1], 2 * t.y + t.side - canvas[0]
    if min(abs(x), abs(y)) < 8:  # too near to the middle to say
        return None
    answer = f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
    return (f"Where is the {phrase(traits)}?", "where is the", lambda _: answer,
            ("top left", "top right", "bottom left", "bottom right"))


def ask(rng, pictures):
    """Four questions about each picture and, in VQA's format, what ten people answered: (questions, annotations).

    As in VQA v2, a question whether or how many there are is asked about two pictures that answer it differently, so
    that its words do not give the answer away; a relation and its opposite are asked equally often. Where no second
    picture is found, a picture may have fewer than four.
    """
    asked = [{} for _ in pictures]  # of each picture: question -> (type, answer, all answers there are)
    free = list(range(len(pictures)))  # the pictures that can have more questions
    for i, (_, canvas, things, _) in enumerate(pictures):
        for _ in range(200):
            if len(asked[i]) == 4:
                break
            kind = rng.choice(("is there", "relation", "count", "color", "color", "shape", "shape", "where"))
            found = question(rng, canvas, things, kind)
            if found is None or found[0] in asked[i]:
                continue
            text, prefix, answer, possible = found
            here = [(i, answer(things))]
            if kind in ("is there", "count"):
                other = rng.choice([p for p in possible[:4] if p != here[0][1]])
                drawn = (rng.choice(free) for _ in range(60))
                here += [(j, other) for j in drawn if len(asked[j]) < 4 and text not in asked[j] and j != i
                         and answer(pictures[j][2]) == other][:1]
                if len(here) < 2:
                    continue
            for j, said in here:
                asked[j][text] = (prefix, said, possible)
        free = [j for j in free if len(asked[j]) < 4] if i % 50 == 0 else free
    questions, annotations = [], []
    for (image_id, *_), about in zip(pictures, asked):
        for n, (text, (prefix, answer, possible)) in enumerate(sorted(about.items(), key=lambda _: rng.random())):
            answers = [answer] * 10
            for i in range(rng.choice((0, 0, 0, 0, 1, 2))):  # few people are wrong, and not by much
                wrong = [p for p in possible if p != answer and (prefix != "how many" or abs(int(p) - int(answer)) < 2)]
                answers[i] = rng.choice(wrong)
            rng.shuffle(answers)
            key = {"image_id": image_id, "question_id": image_id * 1000 + n}
            questions.append({**key, "question": text})
            annotations.append({**key, "question_type": prefix, "multiple_choice_answer": answer,
                                "answer_type": {"is there a": "yes/no", "how many": "number"}.get(prefix, "other"),
                                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1}
                                            for i, a in enumerate(answers)]})
    return questions, annotations


def statement(rng):
    """(sentence, traits, [(how many such things left, how many right, is it true)] four times).

    Each number stands left twice and right twice, once in a true pair and once in a false one: the sentence alone says
    nothing about the answer (two are true), nor does it with one picture alone.
    """
    kind, colour = rng.choice([p for p in PAIRS if p not in HELD_OUT])  # for not all test pictures can have those
    thing = Thing(rng.choice(tuple(SIZES)), colour, rng.choice(FILLS), kind)
    traits = {k: v for k, v in thing.traits().items() if k == "kind" or rng.random() < 0.3}
    one, many = phrase(traits), phrase(traits, plural=True)
    a, b = rng.sample(range(4), 2)
    form = rng.randrange(4)
    if form == 0:
        a, b = rng.sample((0, rng.randint(1, 2)), 2)
        return f"Exactly one of the two pictures contains a {one}.", traits, [
            (a, b, True), (b, a, True), (a, a, False), (b, b, False)]
    if form == 1:
        total = rng.randint(max(a, b), 3)
        return (f"There are {NUMBERS[total]} {many} in total." if total > 1 else f"There is one {one} in total."
                if total else f"There are no {many} at all."), traits, [
            (a, total - a, True), (b, total - b, True), (a, total - b, False), (b, total - a, False)]
    if form == 2 and rng.random() < 0.3:
        many, traits, a, b = "shapes", {}, a + 1, b + 1
    if form == 2:
        return f"Both pictures contain the same number of {many}.", traits, [
            (a, a, True), (b, b, True), (a, b, False), (b, a, False)]
    return f"The pictures contain different numbers of {many}.", traits, [
        (a, b, True), (b, a, True), (a, a, False), (b, b, False)]


# ----------------------------------------------------------------------------------------------------------------
# Files


class Writer:
    """Writes files below a folder and collects the words of all sentences for the vocabulary."""

    def __init__(self, folder):
        self.folder, self.words = folder, Counter()
        self.bar = tqdm(desc="pictures", unit="", disable=None, leave=False)

    def file(self, name, content):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        self.bar.update(name.endswith((".jpg", ".png")))

    def json(self, name, value):
        self.file(name, json.dumps(value).encode())

    def heard(self, texts):
        for text in texts:
            self.words.update(re.findall(r"\w+|[^\w\s]", text.lower()))
        return texts

    def vocabulary(self):
        """WordPiece: special pieces, all characters at a word's start and within it, then whole words."""
        characters = sorted({c for word in self.words for c in word} | set("abcdefghijklmnopqrstuvwxyz0123456789"))
        words = sorted((w for w in self.words if len(w) > 1), key=lambda w: (-self.words[w], w))
        pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters), *words]
        self.file("vocab.txt", "".join(f"{piece}\n" for piece in pieces).encode())


def write_coco(w, seed, train, val, test):
    """COCO and Karpathy's splits of it. Returns {split: [(id, canvas, things, JPEG)]} of train, val, test."""
    pictures = {}
    karpathy = {"dataset": "coco", "images": []}
    for split, n, first in (("train", train, 139), ("val", val, 400009), ("test", test, 600007)):
        pictures[split] = []
        for i in range(n):
            rng = random.Random(f"{seed} coco {split} {i}")
            canvas, things = draw_scene(rng, held=split == "test" and i % 2 == 0)
            pictures[split].append((first + 7 * i, canvas, things, draw(rng, canvas, things)))
    for year_split, splits in (("train", ("train",)), ("val", ("val", "test"))):
        head = {"info": {"description": "miniature world", "version": "1.0"}, "licenses": []}
        instances = {**head, "images": [], "annotations": [], "categories": [
            {"supercategory": "shape", "id": CATEGORY_IDS[kind], "name": kind} for kind in KINDS]}
        captions = {**head, "images": instances["images"], "annotations": []}
        for split, (number, canvas, things, jpeg) in ((s, p) for s in splits for p in pictures[s]):
            name = f"{number:012d}.jpg"
            w.file(f"coco/{year_split}2017/{name}", jpeg)
            instances["images"].append({"id": number, "file_name": name, "height": canvas[0], "width": canvas[1]})
            for t in things:
                x1, y1 = t.x + t.side, t.y + t.side
                instances["annotations"].append({
                    "id": len(instances["annotations"]) + 1, "image_id": number, "category_id": CATEGORY_IDS[t.kind],
                    "bbox": [t.x, t.y, t.side, t.side], "area": t.side * t.side, "iscrowd": 0,
                    "segmentation": [[t.x, t.y, x1, t.y, x1, y1, t.x, y1]]})
            texts = w.heard(distinct_sentences(random.Random(f"{seed} captions {number}"), canvas, things, 5))
            ids = [len(captions["annotations"]) + 1 + i for i in range(5)]
            captions["annotations"] += [{"image_id": number, "id": i, "caption": f"{text[0].upper()}{text[1:]}."}
                                        for i, text in zip(ids, texts)]
            karpathy["images"].append(karpathy_record(len(karpathy["images"]), texts, split, {
                "filepath": f"{year_split}2014", "filename": f"COCO_{year_split}2014_{name}", "cocoid": number}))
        w.json(f"coco/annotations/instances_{year_split}2017.json", instances)
        w.json(f"coco/annotations/captions_{year_split}2017.json", captions)
    w.json("coco/dataset_coco.json", karpathy)
    return pictures


def karpathy_record(number, texts, split, more):
    ids = [number * len(texts) + i for i in range(len(texts))]
    return {**more, "imgid": number, "split": split, "sentids": ids, "sentences": [
        {"tokens": re.findall(r"\w+", text), "raw": f"{text[0].upper()}{text[1:]}.", "imgid": number, "sentid": i}
        for i, text in zip(ids, texts)]}


def write_flickr(w, seed, train, val, test):
    """Flickr30k with Karpathy's splits. Returns the test pictures as write_coco does."""
    images, tests = [], []
    for split, n, first in (("train", train, 1000092795), ("val", val, 3000092795), ("test", test, 4000092795)):
        rng = random.Random(f"{seed} flickr {split}")
        for i, (canvas, things) in enumerate(draw_telling_scenes(rng, n, split == "test")):
            number, jpeg = first + 11 * i, draw(rng, canvas, things)
            w.file(f"flickr30k/flickr30k-images/{number}.jpg", jpeg)
            texts = w.heard(telling_sentences(rng, things))
            images.append(karpathy_record(len(images), texts, split, {"filename": f"{number}.jpg"}))
            if split == "test":
                tests.append((number, canvas, things, jpeg))
    w.json("flickr30k/dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    return tests


def write_vg(w, seed, coco, flickr_test, own):
    """Visual Genome: pictures that are COCO's or Flickr30k's too, as a part of the real ones are, and `own` others."""
    shared = [(p, "coco_id") for p in coco["train"][::3] + coco["val"] + coco["test"]]
    shared += [(p, "flickr_id") for p in flickr_test[:20]]
    for i in range(own):
        rng = random.Random(f"{seed} vg {i}")
        canvas, things = draw_scene(rng)
        shared.append(((None, canvas, things, draw(rng, canvas, things)), None))
    random.Random(f"{seed} vg order").shuffle(shared)
    data, objects, attributes, regions = [], [], [], []
    number = region = 0
    for image, ((other, canvas, things, jpeg), key) in enumerate(shared, 1):
        rng = random.Random(f"{seed} vg words {image}")
        part = "VG_100K" if image % 2 else "VG_100K_2"
        w.file(f"vg/{part}/{image}.jpg", jpeg)
        data.append({"image_id": image, "width": canvas[1], "height": canvas[0], "url": f"{part}/{image}.jpg",
                     "coco_id": None, "flickr_id": None, **({key: other} if key else {})})
        records = []
        for t in things:
            number += 1
            name = rng.choice((t.kind, t.kind, t.kind, t.kind.upper(), f"{t.kind} "))  # people type as they like
            records.append({"object_id": number, "names": [name], "synsets": [f"{t.kind}.n.01"], "x": t.x, "y": t.y,
                            "w": t.side, "h": t.side})
        objects.append({"image_id": image, "objects": records})
        attributes.append({"image_id": image, "attributes": [
            {**r, "attributes": [t.size, t.colour, t.fill]} for r, t in zip(records, things)]})
        described = []
        for _ in range(rng.randint(6, 10)):
            text, about = sentence(rng, canvas, things)
            x, y = min(t.x for t in about), min(t.y for t in about)
            region += 1
            described.append({"region_id": region, "image_id": image, "phrase": w.heard([text])[0], "x": x, "y": y,
                              "width": max(t.x + t.side for t in about) - x,
                              "height": max(t.y + t.side for t in about) - y})
        regions.append({"id": image, "regions": described})
    w.json("vg/image_data.json", data)
    w.json("vg/objects.json", objects)
    w.json("vg/attributes.json", attributes)
    w.json("vg/region_descriptions.json", regions)
    w.file("vg/objects_vocab.txt", "\n".join(f"{k},{phrase({'kind': k}, plural=True)}" for k in KINDS).encode())
    w.file("vg/attributes_vocab.txt", "\n".join((*SIZES, *COLOURS, *FILLS)).encode())


def write_vqa(w, seed, coco, test):
    """VQA v2: questions on COCO's train and val pictures, and on pictures of its own for which no answer is given."""
    tests = []
    for i in range(test):
        rng = random.Random(f"{seed} test2015 {i}")
        canvas, things = draw_scene(rng, held=i % 2 == 0)
        tests.append((800011 + 7 * i, canvas, things, None))
        w.file(f"coco/test2015/COCO_test2015_{800011 + 7 * i:012d}.jpg", draw(rng, canvas, things))
    asked = {split: ask(random.Random(f"{seed} vqa {split}"), pictures) for split, pictures in (
        ("train2014", coco["train"]), ("val2014", coco["val"]), ("test2015", tests))}
    first = {number for number, *_ in tests[:test // 2]}
    asked["test-dev2015"] = [q for q in asked["test2015"][0] if q["image_id"] in first], []
    for split, (questions, annotations) in asked.items():
        w.heard([q["question"] for q in questions] + [a["multiple_choice_answer"] for a in annotations])
        head = {"info": {"description": "miniature world", "version": "2.0"}, "data_type": "mscoco",
                "license": {}, "data_subtype": split}
        w.json(f"vqa/v2_OpenEnded_mscoco_{split}_questions.json",
               {**head, "task_type": "Open-Ended", "questions": questions})
        if "test" not in split:
            w.json(f"vqa/v2_mscoco_{split}_annotations.json", {**head, "annotations": annotations})


def write_nlvr2(w, seed, train, val, test):
    """NLVR2: one record a line. Pictures are JPEGs under the name .png, as a part of the real ones are."""
    for split, n in (("train", train), ("dev", val), ("test1", test)):
        lines = []
        for i in range(-(-n // 4)):
            rng = random.Random(f"{seed} nlvr2 {split} {i}")
            text, traits, pairs = statement(rng)
            w.heard([text])
            rng.shuffle(pairs)
            for j, (left, right, true) in enumerate(pairs):
                where = {"directory": i % 100} if split == "train" else {}
                folder = f"nlvr2/images/{split}/{i % 100}" if where else f"nlvr2/images/{split}"
                for side, number in enumerate((left, right)):
                    held = split == "test1" and (4 * i + j) % 2 == 0
                    canvas, things = draw_scene(rng, held=held, wanted=traits, count=number)
                    w.file(f"{folder}/{split}-{i}-{j}-img{side}.png", draw(rng, canvas, things))
                lines.append({"identifier": f"{split}-{i}-{j}-0", "sentence": text, "label": str(true), **where})
        w.file(f"nlvr2/{split}.json", "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def write_world(folder, seed=1, train=4000, val=200, test=200, flag="--output"):
    """Write the whole world to `folder`, which must not exist or be empty; it appears whole or not at all.
    flag: what a message calls the folder.

    Raises InputError if the folder is in use, cannot be written, or a number is too small.
    """
    # With more, the numbers of COCO's splits would overlap; and Flickr30k's sentences do not tell more pictures apart
    for name, value, least, most in (("--train", train, 16, 76_000), ("--val", val, 1, 10_000),
                                     ("--test", test, 2, 10_000)):
        if not least <= value <= most:
            raise InputError(f"{name} {value}: must be from {least} to {most}")
    try:
        if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise InputError(f"{flag} {folder}: is there already; give another folder, or move it away")
        parent = os.path.dirname(os.path.abspath(folder))
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{os.path.basename(folder)}-", dir=parent) as unfinished:
            w = Writer(os.path.join(unfinished, "world"))
            coco = write_coco(w, seed, train * 3 // 4, val, test)
            flickr_test = write_flickr(w, seed, train // 4, val, test)
            write_vg(w, seed, coco, flickr_test, train - train * 3 // 4)
            write_vqa(w, seed, coco, test)
            write_nlvr2(w, seed, train * 3 // 8, val * 2, test * 2)
            w.vocabulary()
            w.json("world.json", {"seed": seed, "train": train, "val": val, "test": test,
                                  "held_out": sorted(f"{colour} {kind}" for kind, colour in HELD_OUT)})
            w.bar.close()
            os.rename(w.folder, folder)
    except (OSError, RecursionError) as error:  # RecursionError: makedirs, of a thousand folders in one another
        raise InputError(f"{flag} {folder[:200]}: cannot be written "
                         f"({getattr(error, 'strerror', None) or error})") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the miniature world of coloured shapes.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="another seed, another world")
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="pictures to pre-train on")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="validation pictures of each set")
    parser.add_argument("--test", type=int, default=200, metavar="N", help="test pictures of each set")

    def work(stop):
        args = parser.parse_args(argv)
        write_world(args.output, args.seed, args.train, args.val, args.test)
        print(f"{args.output}: written; python pretrain.py --mini --data {args.output} trains on it")

    return command("shapes.py", work)


if __name__ == "__main__":
    sys.exit(main())
