"""The miniature world: images of coloured shapes and true sentences, in the official formats.

    python shapes.py --output data/mini --seed 1     # about 23,000 images, less than a minute

An image has 1 to 6 shapes on a light background. A phrase names a shape's traits in one order and
may omit some: "small red striped circle", "large star". Every second test image has a HELD_OUT
pair of kind and colour, which no train or val image has: a model that memorises pairs fails there.

The same seed gives the same files, byte for byte: an image has its own generator, seeded with a
string, and its shapes are computed with + - * / alone, which IEEE 754 defines exactly.
"""

import argparse
import io
import json
import re
import sys
from collections import Counter, namedtuple
from functools import cache
from itertools import combinations, count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageFilter

from data import SPECIAL, HelpFormatter, InputError, command, number

SIZES = {"small": (12, 15), "large": (22, 28)}  # least and largest side, in pixels
COLOURS = {"red": (214, 36, 36), "green": (36, 160, 60), "blue": (40, 80, 220),
           "yellow": (240, 205, 20), "purple": (140, 50, 185), "pink": (250, 130, 190),
           "brown": (135, 82, 42), "black": (25, 25, 25)}
FILLS = ("solid", "striped", "dotted", "hollow")
KINDS = ("circle", "square", "triangle", "star", "cross", "heart")
PAIRS = [(kind, colour) for kind in KINDS for colour in COLOURS]
HELD_OUT = {("circle", "purple"), ("square", "pink"), ("triangle", "brown"),
            ("star", "red"), ("cross", "blue"), ("heart", "green")}
TRAINING_PAIRS = [pair for pair in PAIRS if pair not in HELD_OUT]
CANVASES = ((64, 64), (64, 80), (80, 64), (64, 96), (96, 64))  # height, width

# Four traits and a box in pixels. A list of traits, such as ["red", "circle"], describes shapes.
Shape = namedtuple("Shape", "size colour fill kind x1 y1 x2 y2")

# --------------------------------------------------------------------------------------------------
# Images


def inside(kind, x, y):
    """Tell which points are in the shape. x (right) and y (down) run from -1 to 1 over its box."""
    if kind == "circle":
        return x * x + y * y <= 1
    if kind == "square":
        return (abs(x) <= 1) & (abs(y) <= 1)
    if kind == "triangle":
        return abs(x) <= (y + 1) / 2
    if kind == "cross":
        return (abs(x) <= 0.34) & (abs(y) <= 1) | (abs(y) <= 0.34) & (abs(x) <= 1)
    if kind == "heart":
        u, v = x * 1.139, 0.118 - y * 1.118
        w = u * u + v * v - 1
        return w * w * w <= u * u * v * v * v

    # A star: five lines join the corners of a pentagon, at least four have the point inside.
    corners = [(0, -1), (0.9511, -0.3090), (0.5878, 0.8090), (-0.5878, 0.8090), (-0.9511, -0.3090)]
    u, v = x * 0.9511, y * 0.9045 - 0.0955
    votes = 0
    for (ax, ay), (bx, by) in zip(corners, corners[2:] + corners[:2]):
        votes = votes + ((bx - ax) * (v - ay) - (by - ay) * (u - ax) >= 0)
    return votes >= 4


@cache
def coverage(kind, fill, side):
    """Return the painted fraction of each pixel, (side, side), from 4 x 4 points a pixel."""
    pixels = (np.arange(side * 4) + 0.5) / 4
    x = pixels / side * 2 - 1
    y = x[:, None]
    painted = inside(kind, x, y)

    if fill != "solid":  # a rim keeps the outline visible, the core inside it has a pattern
        rim = 2.0 if fill == "hollow" else 1.25
        shrink = side / (side - 2 * rim)
        core = inside(kind, x * shrink, y * shrink)
        if kind == "triangle":  # its centre is below the centre of its box
            shrink = shrink + 2 / side * 2
            core = inside(kind, x * shrink, (y - rim / side) * shrink) & (y <= 1 - 2 * rim / side)
        rows = (pixels % 4 < 2)[:, None]
        pattern = {"hollow": False, "striped": rows, "dotted": rows & rows.T}[fill]
        painted = painted & (~core | pattern)
    return painted.reshape(side, 4, side, 4).mean((1, 3))


def render(rng, canvas, shapes, hard=False):
    """Return the image as JPEG bytes. Colours vary a little. hard: blurred and noisy, so that a
    small shape's place and colour can be seen but hardly its kind, which a sentence may tell.
    """
    image = np.full((*canvas, 3), rng.randrange(222, 246), np.float64)
    for shape in shapes:
        colour = [channel + rng.randrange(-10, 11) for channel in COLOURS[shape.colour]]
        alpha = coverage(shape.kind, shape.fill, shape.x2 - shape.x1)[..., None]
        region = image[shape.y1:shape.y2, shape.x1:shape.x2]
        region += alpha * (np.clip(colour, 0, 255) - region)

    image = Image.fromarray((image + 0.5).astype(np.uint8))
    if hard:
        noise = np.random.default_rng(rng.randrange(2 ** 32)).integers(-43, 44, (*canvas, 1))
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(4))) + noise
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def relations(a, b, gap=0):
    """Return what holds between two shapes. A straight line, `gap` pixels wide, separates them."""
    holds = {"left of": a.x2 + gap <= b.x1, "right of": b.x2 + gap <= a.x1,
             "above": a.y2 + gap <= b.y1, "below": b.y2 + gap <= a.y1}
    return [name for name in holds if holds[name]]


def draw_scene(rng, held_out=False, traits=None, matching=0, least=1):
    """Return (canvas, shapes), with or without HELD_OUT pairs; `matching` ones have the traits."""
    while True:
        n = rng.randint(least, 6) if traits is None else matching
        if traits:
            n += rng.randint(1, 2)  # shapes without the traits

        looks = []  # size, colour, fill, kind
        while len(looks) < n:
            kind, colour = rng.choice(PAIRS if held_out else TRAINING_PAIRS)
            size = "large" if rng.random() < (0.45 if n <= 3 else 0.25) else "small"
            look = size, colour, rng.choice(("solid", "solid", *FILLS)), kind
            if traits is None or set(look).issuperset(traits) == (len(looks) < matching):
                looks.append(look)
        if held_out and HELD_OUT.isdisjoint((kind, colour) for _, colour, _, kind in looks):
            continue

        canvas = rng.choice(CANVASES)
        shapes = []
        for look in sorted(looks, key=lambda look: look[0]):  # large ones first
            side = rng.randint(*SIZES[look[0]])
            for _ in range(100):
                x, y = rng.randrange(canvas[1] - side + 1), rng.randrange(canvas[0] - side + 1)
                shape = Shape(*look, x, y, x + side, y + side)
                if all(relations(shape, other, gap=2) for other in shapes):
                    shapes.append(shape)
                    break
        if len(shapes) == n:
            rng.shuffle(shapes)
            return canvas, shapes


def draw_images(seed, n, first, test=False, hard=False):
    """Return a list of (id, canvas, shapes, JPEG bytes). The ids are first, first + 7 and so on."""
    images = []
    for i in range(n):
        rng = Random(f"{seed} {i}")
        canvas, shapes = draw_scene(rng, held_out=test and i % 2 == 0)
        images.append((first + 7 * i, canvas, shapes, render(rng, canvas, shapes, hard)))
    return images


# --------------------------------------------------------------------------------------------------
# Sentences

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ONE = ("a {}", "there is a {}", "a picture of a {}", "you can see a {}")
TWO = ("a {} and a {}", "there is a {} and a {}", "a picture of a {} and a {}")
ALL = ("there are {} shapes", "a picture with {} shapes", "{} shapes")


def select(shapes, traits):
    return [shape for shape in shapes if set(shape).issuperset(traits)]


def sample_traits(rng, shape):
    """Draw the traits that a phrase names. Solid is usual, so it is seldom named."""
    chances = (0.65, 0.65, 0.15 if shape.fill == "solid" else 0.65, 1)
    return [trait for trait, chance in zip(shape, chances) if rng.random() < chance]


def phrase(traits, plural=False):
    words = " ".join(traits if set(traits) & set(KINDS) else [*traits, "shape"])
    if plural:
        words += "es" if words.endswith("cross") else "s"
    return words


def positions(canvas, shape):
    """Return the outer thirds of the canvas that contain the centre of the shape."""
    x, y = (shape.x1 + shape.x2) / 2 / canvas[1], (shape.y1 + shape.y2) / 2 / canvas[0]
    holds = {"on the left": 3 * x < 1, "on the right": 3 * x > 2,
             "at the top": 3 * y < 1, "at the bottom": 3 * y > 2}
    return [name for name in holds if holds[name]]


def draw_sentence(rng, canvas, shapes):
    """Return (a true sentence, the shapes it is about). It never claims that there are no more."""
    while True:
        a, b = rng.sample(shapes, 2) if len(shapes) > 1 else (shapes[0], None)
        first = phrase(sample_traits(rng, a))
        draw = rng.random()
        if draw < 0.2:
            return rng.choice(ONE).format(first), [a]
        if draw < 0.3 and positions(canvas, a):
            position = rng.choice(positions(canvas, a))
            return rng.choice(("a {} {}", "there is a {} {}")).format(first, position), [a]

        if draw < 0.65 and b and relations(a, b):
            form = rng.choice(("a {} {} a {}", "there is a {} {} a {}", "a {} is {} a {}"))
            relation = rng.choice(relations(a, b))
            if "of" in relation and rng.random() < 0.3:
                relation = "to the " + relation
            return form.format(first, relation, phrase(sample_traits(rng, b))), [a, b]

        if 0.65 <= draw < 0.85 and b:
            return rng.choice(TWO).format(first, phrase(sample_traits(rng, b))), [a, b]
        if draw >= 0.85 and b and rng.random() < 0.35:
            return rng.choice(ALL).format(NUMBERS[len(shapes)]), shapes

        if draw >= 0.85:
            traits = sample_traits(rng, a)
            for names in (SIZES, FILLS, COLOURS):  # omit traits until a second shape has the rest
                if len(select(shapes, traits)) < 2:
                    traits = [trait for trait in traits if trait not in names]
            counted = select(shapes, traits)
            if len(counted) > 1:
                form = rng.choice(("{} {}", "there are {} {}", "a picture with {} {}"))
                return form.format(NUMBERS[len(counted)], phrase(traits, plural=True)), counted


def draw_unique_sentence(rng, canvas, shapes):
    """Do as draw_sentence, with all traits of two or three shapes."""
    about = rng.sample(shapes, min(len(shapes), rng.choice((2, 2, 3))))
    names = [phrase(shape[:4]) for shape in about]
    if len(names) == 3:
        return "a {}, a {} and a {}".format(*names), about
    between = relations(*about)
    if between and rng.random() < 0.6:
        form = rng.choice(("a {} {} a {}", "a {} is {} a {}"))
        return form.format(names[0], rng.choice(between), names[1]), about
    return rng.choice(TWO).format(*names), about


# --------------------------------------------------------------------------------------------------
# Questions and statements

CORNERS = ("top left", "top right", "bottom left", "bottom right")
QUESTIONS = {  # VQA's question type and answer type, all answers
    "is there": ("is there a", "yes/no", ("yes", "no")),
    "relation": ("is there a", "yes/no", ("yes", "no")),
    "count": ("how many", "number", tuple("0123456")),
    "color": ("what color is the", "other", tuple(COLOURS)),
    "shape": ("what is the", "other", KINDS),
    "where": ("where is the", "other", CORNERS)}
DRAWN = ("is there", "relation", "count", "color", "color", "shape", "shape", "where")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def draw_question(rng, canvas, shapes, kind):
    """Return (rest of the question, function from shapes to the answer), or (None, None)."""
    shape = rng.choice(shapes)
    traits = sample_traits(rng, shape)
    if kind == "is there":
        return phrase(traits), lambda others: "yes" if select(others, traits) else "no"

    if kind == "count":
        for names in (SIZES, FILLS, KINDS):  # fewer traits, larger counts
            if len(traits) > 1 and rng.random() < 0.6:
                traits = [trait for trait in traits if trait not in names]
        return phrase(traits, True) + " are there", lambda others: str(len(select(others, traits)))

    if kind == "relation":
        other = rng.choice(shapes)
        if not relations(shape, other):
            return None, None
        others = sample_traits(rng, other)
        true = rng.choice(relations(shape, other))
        false = OPPOSITE[true]
        if any(false in relations(a, b)
               for a in select(shapes, traits) for b in select(shapes, others)):
            return None, None
        asked, answer = rng.choice(((true, "yes"), (false, "no")))
        return f"{phrase(traits)} {asked} a {phrase(others)}", lambda _: answer

    # The other questions say "the", which needs exactly one shape, and must not name the answer.
    traits = [trait for trait in traits if trait not in QUESTIONS[kind][2]]
    x, y = shape.x1 + shape.x2 - canvas[1], shape.y1 + shape.y2 - canvas[0]
    if len(select(shapes, traits)) != 1 or kind == "where" and min(abs(x), abs(y)) < 8:
        return None, None
    corner = CORNERS[2 * (y >= 0) + (x >= 0)]
    answer = {"color": shape.colour, "shape": shape.kind, "where": corner}[kind]
    return phrase(traits), lambda _: answer


def draw_questions(rng, images):
    """Return, per image, at most four questions {text: (kind, answer)}."""
    questions = [{} for _ in images]
    unfinished = list(range(len(images)))  # indices of images with fewer than four questions
    for i, (_, canvas, shapes, _) in enumerate(images):
        for _ in range(200):
            if len(questions[i]) == 4:
                break
            kind = rng.choice(DRAWN)
            question_type, _, answers = QUESTIONS[kind]
            words, answer_for = draw_question(rng, canvas, shapes, kind)
            text = f"{question_type.capitalize()} {words}?"
            if words is None or text in questions[i]:
                continue

            answer = answer_for(shapes)
            if kind in ("is there", "count"):
                # As in VQA v2, a second image has another answer, so the words do not give it.
                different = rng.choice([other for other in answers[:4] if other != answer])
                candidates = [rng.choice(unfinished) for _ in range(60)]
                partners = [j for j in candidates if j != i and len(questions[j]) < 4
                            and text not in questions[j] and answer_for(images[j][2]) == different]
                if not partners:
                    continue
                questions[partners[0]][text] = kind, different
            questions[i][text] = kind, answer

        if i % 50 == 0:
            unfinished = [j for j in unfinished if len(questions[j]) < 4]
    return questions


def vqa_records(rng, images):
    """Return (questions, annotations) about the images, in VQA's format."""
    questions, annotations = [], []
    for (image_id, *_), asked in zip(images, draw_questions(rng, images)):
        for i, text in enumerate(sorted(asked, key=lambda _: rng.random())):
            kind, answer = asked[text]
            question_type, answer_type, answers = QUESTIONS[kind]
            wrong = [other for other in answers if other != answer]
            if kind == "count":
                wrong = [other for other in wrong if abs(int(other) - int(answer)) == 1]
            mistakes = rng.choice((0, 0, 0, 0, 1, 2))
            given = [rng.choice(wrong) for _ in range(mistakes)] + [answer] * (10 - mistakes)
            rng.shuffle(given)

            ids = dict(image_id=image_id, question_id=image_id * 1000 + i)
            questions.append(dict(ids, question=text))
            answers = [dict(answer=reply, answer_confidence="yes", answer_id=person)
                       for person, reply in enumerate(given, 1)]
            annotations.append(dict(ids, question_type=question_type, multiple_choice_answer=answer,
                                    answer_type=answer_type, answers=answers))
    return questions, annotations


def draw_statement(rng):
    """Return (sentence, traits, four pairs (count left, count right), first the two true ones)."""
    kind, colour = rng.choice(TRAINING_PAIRS)
    traits = [rng.choice(tuple(SIZES)), colour, rng.choice(FILLS)]
    traits = [trait for trait in traits if rng.random() < 0.3] + [kind]
    plural = phrase(traits, plural=True)
    # Each side has each count in one true and one false pair: one image does not give the answer.
    a, b = rng.sample(range(4), 2)
    form = rng.randrange(4)
    if form == 1:
        total = rng.randint(max(a, b), 3)
        text = f"There are {NUMBERS[total]} {plural} in total."
        if total == 1:
            text = f"There is one {phrase(traits)} in total."
        return text, traits, [(a, total - a), (b, total - b), (a, total - b), (b, total - a)]
    if form == 2:
        if rng.random() < 0.3:
            plural, traits, a, b = "shapes", [], a + 1, b + 1
        text = f"Both pictures contain the same number of {plural}."
        return text, traits, [(a, a), (b, b), (a, b), (b, a)]

    text = f"The pictures contain different numbers of {plural}."
    if form == 0:
        a, b = rng.sample((0, rng.randint(1, 2)), 2)
        text = f"Exactly one of the two pictures contains a {phrase(traits)}."
    return text, traits, [(a, b), (b, a), (a, a), (b, b)]


# --------------------------------------------------------------------------------------------------
# Files. Each function adds a data set to `files`, {name: content}, and its sentences to `texts`.


def karpathy_record(texts, draw, rng, canvas, shapes, number, split, **names):
    """Draw five sentences about an image. Return its record in Karpathy's splits."""
    drawn = []
    while len(drawn) < 5:
        text, _ = draw(rng, canvas, shapes)
        if text not in drawn:
            drawn.append(text)
    texts += drawn
    ids = [number * 5 + i for i in range(5)]
    sentences = [dict(tokens=re.findall(r"\w+", text), raw=f"{text.capitalize()}.", imgid=number,
                      sentid=sentence_id) for sentence_id, text in zip(ids, drawn)]
    return dict(names, imgid=number, split=split, sentids=ids, sentences=sentences)


def add_coco(files, texts, seed, train, val, test, hard):
    """Add COCO and Karpathy's splits of it. Return the images of each split."""
    images = {"train": draw_images(f"{seed} coco train", train, 139, hard=hard),
              "val": draw_images(f"{seed} coco val", val, 400009, hard=hard),
              "test": draw_images(f"{seed} coco test", test, 600007, test=True, hard=hard)}
    category_ids = dict(zip(KINDS, (1, 2, 4, 7, 8, 11)))  # with gaps, as in COCO
    categories = [dict(supercategory="shape", id=category_ids[kind], name=kind) for kind in KINDS]
    karpathy = []
    for half, members in ("train", images["train"]), ("val", images["val"] + images["test"]):
        records, boxes, captions = [], [], []
        for image_id, canvas, shapes, jpeg in members:
            split = half if image_id < 600007 else "test"
            name = f"{image_id:012d}.jpg"
            files[f"coco/{half}2017/{name}"] = jpeg
            records.append(dict(id=image_id, file_name=name, height=canvas[0], width=canvas[1]))
            for _, _, _, kind, x1, y1, x2, y2 in shapes:
                width, height = x2 - x1, y2 - y1
                boxes.append(dict(
                    id=len(boxes) + 1, image_id=image_id, category_id=category_ids[kind],
                    bbox=[x1, y1, width, height], area=width * height, iscrowd=0,
                    segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]]))

            rng = Random(f"{seed} captions {image_id}")
            karpathy.append(karpathy_record(
                texts, draw_sentence, rng, canvas, shapes, len(karpathy), split,
                filepath=f"{half}2014", filename=f"COCO_{half}2014_{name}", cocoid=image_id))
            for text in [sentence["raw"] for sentence in karpathy[-1]["sentences"]]:
                captions.append(dict(image_id=image_id, id=len(captions) + 1, caption=text))

        info = dict(description="miniature world", version="1.0")
        head = dict(info=info, licenses=[], images=records)
        files[f"coco/annotations/instances_{half}2017.json"] = dict(
            head, annotations=boxes, categories=categories)
        files[f"coco/annotations/captions_{half}2017.json"] = dict(head, annotations=captions)
    files["coco/dataset_coco.json"] = dict(dataset="coco", images=karpathy)
    return images


def add_flickr(files, texts, seed, train, val, test):
    """Add Flickr30k with Karpathy's splits. Return the test images, as draw_images does."""
    records = []
    for split, n, first in (("train", train, 1), ("val", val, 3), ("test", test, 4)):
        rng = Random(f"{seed} flickr {split}")
        scenes, taken = [], set()
        while len(scenes) < n:
            canvas, shapes = draw_scene(rng, split == "test" and len(scenes) % 2 == 0, least=2)
            pairs = set(combinations(sorted(shape[:4] for shape in shapes), 2))
            if not pairs & taken:  # two shapes with all their traits identify the image
                taken |= pairs
                scenes.append((canvas, shapes))

        images = []
        for i, (canvas, shapes) in enumerate(scenes):
            image_id = first * 10 ** 9 + 92795 + 11 * i
            jpeg = render(rng, canvas, shapes)
            images.append((image_id, canvas, shapes, jpeg))
            files[f"flickr30k/flickr30k-images/{image_id}.jpg"] = jpeg
            records.append(karpathy_record(texts, draw_unique_sentence, rng, canvas, shapes,
                                           len(records), split, filename=f"{image_id}.jpg"))
    files["flickr30k/dataset_flickr30k.json"] = dict(dataset="flickr30k", images=records)
    return images


def add_vg(files, texts, seed, coco, flickr, n):
    """Add Visual Genome: images of COCO and Flickr30k, as in the real one, and n new images."""
    coco = coco["train"][::3] + coco["val"] + coco["test"]
    images = [(coco_id, None, *image) for coco_id, *image in coco]
    images += [(None, flickr_id, *image) for flickr_id, *image in flickr]
    images += [(None, None, *image) for _, *image in draw_images(f"{seed} vg", n, 0)]
    Random(f"{seed} vg order").shuffle(images)

    data = files["vg/image_data.json"] = []
    objects = files["vg/objects.json"] = []
    attributes = files["vg/attributes.json"] = []
    regions = files["vg/region_descriptions.json"] = []
    object_ids, region_ids = count(1), count(1)
    for image_id, (coco_id, flickr_id, canvas, shapes, jpeg) in enumerate(images, 1):
        rng = Random(f"{seed} vg words {image_id}")
        name = f"{'VG_100K' if image_id % 2 else 'VG_100K_2'}/{image_id}.jpg"
        files[f"vg/{name}"] = jpeg
        data.append(dict(image_id=image_id, width=canvas[1], height=canvas[0], url=name,
                         coco_id=coco_id, flickr_id=flickr_id))

        boxes, described = [], []
        for size, colour, fill, kind, x1, y1, x2, y2 in shapes:
            typed = rng.choice((kind, kind, kind, kind.upper(), f"{kind} "))  # people's spelling
            boxes.append(dict(object_id=next(object_ids), names=[typed], synsets=[f"{kind}.n.01"],
                              x=x1, y=y1, w=x2 - x1, h=y2 - y1))
            described.append(dict(boxes[-1], attributes=[size, colour, fill]))
        objects.append(dict(image_id=image_id, objects=boxes))
        attributes.append(dict(image_id=image_id, attributes=described))

        phrases = []
        for _ in range(rng.randint(6, 10)):
            text, about = draw_sentence(rng, canvas, shapes)
            texts.append(text)
            x1, y1 = min(shape.x1 for shape in about), min(shape.y1 for shape in about)
            x2, y2 = max(shape.x2 for shape in about), max(shape.y2 for shape in about)
            phrases.append(dict(region_id=next(region_ids), image_id=image_id, phrase=text,
                                x=x1, y=y1, width=x2 - x1, height=y2 - y1))
        regions.append(dict(id=image_id, regions=phrases))

    classes = [f"{kind},{phrase([kind], plural=True)}" for kind in KINDS]
    files["vg/objects_vocab.txt"] = "\n".join(classes).encode()
    files["vg/attributes_vocab.txt"] = "\n".join((*SIZES, *COLOURS, *FILLS)).encode()


def add_vqa(files, texts, seed, coco, test):
    """Add VQA v2 about COCO's train and val images, and about new test images without answers."""
    images = {"train2014": coco["train"], "val2014": coco["val"],
              "test2015": draw_images(f"{seed} test2015", test, 800011, test=True)}
    for image_id, _, _, jpeg in images["test2015"]:
        files[f"coco/test2015/COCO_test2015_{image_id:012d}.jpg"] = jpeg
    asked = {split: vqa_records(Random(f"{seed} vqa {split}"), images[split]) for split in images}
    middle = 800011 + 7 * (test // 2)  # test-dev has the questions of the first half
    asked["test-dev2015"] = [q for q in asked["test2015"][0] if q["image_id"] < middle], []

    for split, (questions, annotations) in asked.items():
        texts += [record["question"] for record in questions]
        texts += [record["multiple_choice_answer"] for record in annotations]
        info = dict(description="miniature world", version="2.0")
        head = dict(info=info, data_type="mscoco", license={}, data_subtype=split)
        files[f"vqa/v2_OpenEnded_mscoco_{split}_questions.json"] = dict(
            head, task_type="Open-Ended", questions=questions)
        if split in ("train2014", "val2014"):
            files[f"vqa/v2_mscoco_{split}_annotations.json"] = dict(head, annotations=annotations)


def add_nlvr2(files, texts, seed, train, val, test):
    """Add NLVR2, one record a line. As in part of the real one, .png files hold JPEG data."""
    for split, n in (("train", train), ("dev", val), ("test1", test)):
        lines = []
        for i in range(-(-n // 4)):
            rng = Random(f"{seed} nlvr2 {split} {i}")
            text, traits, pairs = draw_statement(rng)
            texts.append(text)
            labelled = list(zip(pairs, (True, True, False, False)))
            rng.shuffle(labelled)
            directory = {"directory": i % 100} if split == "train" else {}
            folder = f"nlvr2/images/{split}/{i % 100}" if directory else f"nlvr2/images/{split}"
            for j, (counts, label) in enumerate(labelled):
                for side, matching in enumerate(counts):
                    scene = draw_scene(rng, split == "test1" and j % 2 == 0, traits, matching)
                    files[f"{folder}/{split}-{i}-{j}-img{side}.png"] = render(rng, *scene)
                record = dict(identifier=f"{split}-{i}-{j}-0", sentence=text, label=str(label))
                lines.append(json.dumps({**record, **directory}) + "\n")
        files[f"nlvr2/{split}.json"] = "".join(lines).encode()


def vocabulary(texts):
    """Return WordPiece's vocabulary: special tokens, characters, then words by frequency."""
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789").union(*counts))
    words = [word for word in sorted(counts) if len(word) > 1]
    words.sort(key=counts.get, reverse=True)  # words of one count stay in alphabetical order
    return [*SPECIAL, *characters, *[f"##{character}" for character in characters], *words]


def write_world(folder, seed=1, train=4000, val=200, test=200, hard=False):
    """Write the world to `folder`, whole or not at all. hard: of `render`, for COCO's images."""
    folder = Path(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty; give another folder, or move it away")

        files, texts = {}, []
        coco = add_coco(files, texts, seed, train * 3 // 4, val, test, hard)
        flickr = add_flickr(files, texts, seed, train // 4, val, test)
        add_vg(files, texts, seed, coco, flickr[:20], train - train * 3 // 4)
        add_vqa(files, texts, seed, coco, test)
        add_nlvr2(files, texts, seed, train * 3 // 2, val * 5, test * 5)
        files["vocab.txt"] = "".join(f"{token}\n" for token in vocabulary(texts)).encode()
        held_out = sorted(f"{colour} {kind}" for kind, colour in HELD_OUT)
        files["world.json"] = dict(seed=seed, train=train, val=val, test=test, hard=hard,
                                   held_out=held_out)

        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            for name, content in files.items():
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                path = Path(temporary, "world", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            Path(temporary, "world").rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the miniature world of coloured shapes.",
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    add("--seed", type=int, default=1, help="another seed, another world")
    # Larger numbers would make the image ids of COCO's splits overlap.
    add("--train", type=number(int, 16, 76_000), default=4000, help="pictures to pre-train on")
    add("--val", type=number(int, 1, 10_000), default=200, help="validation pictures of each set")
    add("--test", type=number(int, 2, 10_000), default=200, help="test pictures of each set")
    add("--hard", action="store_true", help="blur COCO's pictures: kinds can hardly be seen there")

    def work():
        args = parser.parse_args(argv)
        write_world(args.output, args.seed, args.train, args.val, args.test, args.hard)
        print(f"{args.output}: written; python pretrain.py --mini --data {args.output} uses it")

    return command("shapes.py", work)


if __name__ == "__main__":
    sys.exit(main())
