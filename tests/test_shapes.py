"""The miniature world: reproducible, true, balanced, in official formats, with held-out pairs."""

import hashlib
import json
import os
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import shapes


def load(world, name):
    return json.loads(Path(world, name).read_text())


def files_of(folder, seed, **more):
    """{path: content} of a small world."""
    shapes.write_world(folder, seed=seed, train=32, val=4, test=4, **more)
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*.*")) if path.name != "world.json"}


def test_the_same_seed_gives_the_same_files(tmp_path):
    world = files_of(tmp_path / "a", 5)
    assert world == files_of(tmp_path / "b", 5) != files_of(tmp_path / "c", 6)
    # The same on other machines. JPEG files are left out: they depend on the version of libjpeg.
    texts = [content for name, content in world.items() if name.endswith((".json", ".txt"))]
    assert hashlib.sha256(b"".join(texts)).hexdigest()[:16] == "d075c2f01d414114"


def test_a_hard_world_differs_in_the_pixels_of_coco_alone(tmp_path):
    plain, hard = files_of(tmp_path / "plain", 5), files_of(tmp_path / "hard", 5, hard=True)
    different = {name for name in plain if plain[name] != hard[name]}
    assert {name for name in plain if re.match("coco/(train|val)2017/", name)} <= different
    assert all(re.match(r"(coco|vg)/.*\.jpg", name) for name in different)  # VG has some of COCO's


# An independent reader checks sentences against traits and boxes.

NUMBER = {word: i for i, word in enumerate(("no", "one", "two", "three", "four", "five", "six"))}
SINGULAR = {f"{kind}s": kind for kind in (*shapes.KINDS, "shape")} | {"crosses": "cross"}


def select(things, phrase):
    """Return the things that a phrase such as "small red circles" describes."""
    traits = {SINGULAR.get(word, word) for word in phrase.split()} - {"shape"}
    return [thing for thing in things if traits <= set(thing[:4])]


def is_at(thing, position, width, height):
    x, y = (thing.x1 + thing.x2) / 2 / width, (thing.y1 + thing.y2) / 2 / height
    return {"on the left": x < 1 / 3, "on the right": x > 2 / 3,
            "at the top": y < 1 / 3, "at the bottom": y > 2 / 3}[position]


def is_related(a, relation, b):
    return {"left of": a.x2 <= b.x1, "right of": b.x2 <= a.x1,
            "above": a.y2 <= b.y1, "below": b.y2 <= a.y1}[relation]


def is_true(sentence, things, width, height):
    text = sentence.lower().rstrip(".")
    text = re.sub(r"^(there (is|are) |a picture (of|with) |you can see )", "", text)
    if counted := re.fullmatch(r"(two|three|four|five|six) (.*)", text):
        return len(select(things, counted[2])) == NUMBER[counted[1]]
    if placed := re.fullmatch(r"a (.*?) (on the left|on the right|at the top|at the bottom)", text):
        return any(is_at(a, placed[2], width, height) for a in select(things, placed[1]))
    if related := re.fullmatch(
            r"a (.*?)(?: is)?(?: to the)? (left of|right of|above|below) a (.*)", text):
        firsts, seconds = select(things, related[1]), select(things, related[3])
        return any(is_related(a, related[2], b) for a in firsts for b in seconds)
    phrases = re.split(r", | and ", text)
    choices = [select(things, phrase.removeprefix("a ")) for phrase in phrases]
    return any(all(thing in choice for thing, choice in zip(chosen, choices))
               for chosen in permutations(things, len(choices)))


@pytest.fixture(scope="module")
def scenes(world):
    """{COCO id, or ("vg", id) where COCO has not the image: (things, width, height)}."""
    result = {}
    images = load(world, "vg/image_data.json")
    for image, record in zip(images, load(world, "vg/attributes.json")):
        things = []
        for box in record["attributes"]:
            kind = box["names"][0].strip().lower()
            x, y, w, h = box["x"], box["y"], box["w"], box["h"]
            things.append(shapes.Shape(*box["attributes"], kind, x, y, x + w, y + h))
        name = image["coco_id"] or ("vg", image["image_id"])
        result[name] = things, image["width"], image["height"]
    return result


def test_every_sentence_is_true_and_its_words_are_in_the_vocabulary(world, scenes):
    tokens = Path(world, "vocab.txt").read_text().splitlines()
    assert len(set(tokens)) == len(tokens)
    checked = {"regions": 0, "train": 0, "val": 0}
    for scene, record in zip(scenes.values(), load(world, "vg/region_descriptions.json")):
        for region in record["regions"]:
            assert is_true(region["phrase"], *scene), region
            checked["regions"] += 1
    for split in ("train", "val"):
        for record in load(world, f"coco/annotations/captions_{split}2017.json")["annotations"]:
            assert set(re.findall(r"\w+|\.", record["caption"].lower())) <= set(tokens)
            if record["image_id"] in scenes:
                assert is_true(record["caption"], *scenes[record["image_id"]]), record
                checked[split] += 1
    assert min(checked.values()) > 50


def test_pycocotools_reads_boxes_that_agree_with_the_pixels(world):
    coco = COCO(f"{world}/coco/annotations/instances_train2017.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.KINDS)
    for image in coco.loadImgs(coco.getImgIds())[:20]:
        pixels = np.asarray(Image.open(f"{world}/coco/train2017/{image['file_name']}")).astype(int)
        assert pixels.shape == (image["height"], image["width"], 3)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        painted = abs(pixels - background).max(-1) > 25
        outside = painted.copy()
        for record in coco.loadAnns(coco.getAnnIds(image["id"])):
            x, y, w, h = record["bbox"]
            assert record["area"] == w * h == coco.annToMask(record).sum()
            rows, columns = painted[y:y + h, x:x + w].nonzero()
            assert rows.min() <= 1 and rows.max() >= h - 2  # paint reaches each side of the box
            assert columns.min() <= 1 and columns.max() >= w - 2
            outside[max(0, y - 1):y + h + 1, max(0, x - 1):x + w + 1] = False
        assert not outside.any()


def test_only_test_images_have_held_out_pairs(world, scenes):
    held_out = {tuple(text.split()) for text in load(world, "world.json")["held_out"]}
    karpathy = load(world, "coco/dataset_coco.json")["images"]
    tests = [image["cocoid"] for image in karpathy if image["split"] == "test"]
    flickr = {("vg", i["image_id"]) for i in load(world, "vg/image_data.json") if i["flickr_id"]}
    assert len(held_out) == 6 and len(tests) == len(flickr) == 8
    for name, (things, _, _) in scenes.items():
        has_pair = any((thing.colour, thing.kind) in held_out for thing in things)
        if name not in flickr:
            assert has_pair == (name in tests[::2]), name


def test_answers_are_right_and_not_given_by_the_words(world, scenes):
    questions = load(world, "vqa/v2_OpenEnded_mscoco_train2014_questions.json")["questions"]
    records = load(world, "vqa/v2_mscoco_train2014_annotations.json")["annotations"]
    answers, starts = defaultdict(list), set()
    for question, record in zip(questions, records):
        text, answer = question["question"], record["multiple_choice_answer"]
        given = [person["answer"] for person in record["answers"]]
        assert len(given) == 10 and given.count(answer) >= 8
        answers[text].append(answer)
        if record["image_id"] in scenes:
            things, width, height = scenes[record["image_id"]]
            start, body = re.fullmatch(
                r"(Is there|How many|W\w+(?: color)? is the) (.*?)(?: are there)?\?", text).groups()
            starts.add(start)
            if start == "Is there":
                right = "yes" if is_true(body, things, width, height) else "no"
            elif start == "How many":
                right = str(len(select(things, body)))
            else:
                (thing,) = select(things, body)
                where = "top " if thing.y1 + thing.y2 < height else "bottom "
                where += "left" if thing.x1 + thing.x2 < width else "right"
                right = {"What color is the": thing.colour, "What is the": thing.kind,
                         "Where is the": where}[start]
            assert answer == right, text

    assert len(starts) == 5
    for text, given in answers.items():  # whether and how many: two images, different answers
        if text.startswith("How many"):
            assert len(given) % 2 == 0 and len(set(given)) > 1, text
        if text.startswith("Is there") and text.count(" a ") == 1:
            assert given.count("yes") == given.count("no"), text


def test_statements_are_true_and_neither_the_words_nor_one_image_decides(monkeypatch):
    drawn, files, forms, counts = [], {}, set(), defaultdict(list)
    monkeypatch.setattr(shapes, "render", lambda rng, canvas, things: drawn.append(things))
    shapes.add_nlvr2(files, [], seed=1, train=0, val=400, test=0)
    for i, record in enumerate(map(json.loads, files["nlvr2/dev.json"].splitlines())):
        text = record["sentence"].lower().rstrip(".")
        form, phrase = re.fullmatch(
            r".*(contains a|same number of|different numbers of|there (?:is|are) \w+) (.*?)"
            r"(?: in total)?", text).groups()
        a, b = len(select(drawn[2 * i], phrase)), len(select(drawn[2 * i + 1], phrase))
        truth = {"contains a": (a > 0) != (b > 0), "same number of": a == b,
                 "different numbers of": a != b}.get(form, a + b == NUMBER.get(form.split()[-1]))
        assert record["label"] == str(truth), record
        forms.add(form.split()[0])
        counts[i // 4, truth].append((a, b))
    assert len(forms) == 4
    for i in range(100):  # a statement's counts on either side are those of true and of false pairs
        for true, false in zip(zip(*counts[i, True]), zip(*counts[i, False])):
            assert sorted(true) == sorted(false)


def test_flickr_sentences_are_true_of_one_image_only():
    files = {}
    images = shapes.add_flickr(files, [], seed=1, train=0, val=0, test=40)
    for number, record in enumerate(files["flickr30k/dataset_flickr30k.json"]["images"]):
        for sentence in record["sentences"]:
            true = [i for i, (_, (height, width), things, _) in enumerate(images)
                    if is_true(sentence["raw"], things, width, height)]
            assert true == [number], sentence


def test_the_folder_must_be_free_and_appears_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    flags = ["--seed", "5", "--train", "16", "--val", "1", "--test", "2", "--output"]
    world = str(tmp_path / "world")
    assert shapes.main([*flags, world]) == 0 and load(world, "world.json")["seed"] == 5
    assert shapes.main([*flags, world]) == 2
    assert "world: is not empty; give another folder" in capsys.readouterr().err

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert shapes.main([*flags, str(tmp_path / "new")]) == 2
    assert "new: cannot be written (No space left on device)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["world"]
