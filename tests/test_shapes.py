"""The miniature world: the same for the same seed, true, in the official formats, balanced, with pairs held out."""

import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import shapes
from data import InputError, Tokenizer, read_pretraining

SMALL = dict(train=32, val=4, test=4)


def load(world, name):
    with open(f"{world}/{name}", encoding="utf-8") as file:
        return json.load(file)


def digest(folder, only=""):
    found = hashlib.sha256()
    for at, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            if name.endswith(only):
                path = os.path.join(at, name)
                found.update(os.path.relpath(path, folder).encode())
                with open(path, "rb") as file:
                    found.update(file.read())
    return found.hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "a"
    shapes.write_world(str(folder), seed=5, **SMALL)
    return str(folder)


def test_the_same_seed_gives_the_same_files(small, tmp_path):
    shapes.write_world(str(tmp_path / "b"), seed=5, **SMALL)
    shapes.write_world(str(tmp_path / "c"), seed=6, **SMALL)
    assert digest(small) == digest(tmp_path / "b") != digest(tmp_path / "c")
    # The same on every machine: this is what one machine wrote (annotations; JPEG's bytes depend on libjpeg's version).
    assert digest(small, ".json")[:16] == "0a1a6070671e748b"


# ----------------------------------------------------------------------------------------------------------------
# Truth: sentences checked against boxes and attributes by a reader of their own


WORDS = {**{k: "kind" for k in shapes.KINDS}, **{c: "colour" for c in shapes.COLOURS},
         **{s: "size" for s in shapes.SIZES}, **{f: "fill" for f in shapes.FILLS}}
NUMBER = {word: i for i, word in enumerate(("no", "one", "two", "three", "four", "five", "six"))}


def said(phrase):
    """'small red circles' -> {'size': 'small', 'colour': 'red', 'kind': 'circle'}"""
    traits = {}
    for word in phrase.split():
        word = {"crosses": "cross"}.get(word, word[:-1] if word.endswith("s") and word != "cross" else word)
        if word != "shape":
            traits[WORDS[word]] = word
    return traits


def matching(things, phrase):
    return [t for t in things if all(t[k] == v for k, v in said(phrase).items())]


def is_true(sentence, things, width, height):
    """Of things: dicts of size, colour, fill, kind and box (x, y, w, h)."""
    text = re.sub(r"^(there (is|are) |a picture (of|with) |you can see )", "", sentence.lower().rstrip("."))
    number = re.fullmatch(r"(\w+) (.*(?:s|es))", text)
    if number and number[1] in NUMBER and number[1] != "no":
        return len(matching(things, number[2])) == NUMBER[number[1]]
    place = re.fullmatch(r"an? ([\w ]+?) (on the left|on the right|at the top|at the bottom)", text)
    if place:
        def there(box):
            x, y = (box[0] + box[2] / 2) / width, (box[1] + box[3] / 2) / height
            return {"on the left": x < 1 / 3, "on the right": x > 2 / 3, "at the top": y < 1 / 3,
                    "at the bottom": y > 2 / 3}[place[2]]
        return any(there(t["box"]) for t in matching(things, place[1]))
    relation = re.fullmatch(r"a ([\w ]+?)(?: is)?(?: to the)? (left of|right of|above|below) a ([\w ]+)", text)
    if relation:
        def holds(a, b):
            return {"left of": a[0] + a[2] <= b[0], "right of": b[0] + b[2] <= a[0], "above": a[1] + a[3] <= b[1],
                    "below": b[1] + b[3] <= a[1]}[relation[2]]
        return any(holds(a["box"], b["box"]) for a in matching(things, relation[1])
                   for b in matching(things, relation[3]) if a is not b)
    if " and " in text or ", " in text:
        wanted = [p.removeprefix("a ") for p in re.split(r", | and ", text)]
        return assign([matching(things, p) for p in wanted])
    return bool(matching(things, text.removeprefix("a ")))


def assign(choices, used=()):
    """Can each phrase have a thing of its own?"""
    return not choices or any(assign(choices[1:], (*used, id(t))) for t in choices[0] if id(t) not in used)


def test_the_checker_tells_true_from_false():
    things = [dict(size="small", colour="red", fill="solid", kind="circle", box=(0, 0, 10, 10)),
              dict(size="large", colour="blue", fill="striped", kind="cross", box=(40, 40, 20, 20))]
    for text, truth in (("A small circle.", True), ("a large circle", False),
                        ("a red circle left of a blue cross", True),
                        ("there is a circle to the right of a cross", False), ("two shapes", True),
                        ("there are two circles", False), ("a cross at the bottom", True),
                        ("a circle on the right", False), ("a circle and a circle", False),
                        ("a picture of a circle and a striped cross", True)):
        assert is_true(text, things, 64, 64) == truth, text


@pytest.fixture(scope="module")
def annotated(world):
    """{vg picture: (things, width, height)}, {coco id: vg picture}, from the files alone."""
    found, link = {}, {}
    attributes = {r["image_id"]: r for r in load(world, "vg/attributes.json")}
    for r in load(world, "vg/image_data.json"):
        things = []
        for o in attributes[r["image_id"]]["attributes"]:
            size, colour, fill = o["attributes"]
            things.append(dict(size=size, colour=colour, fill=fill, kind=o["names"][0].strip().lower(),
                               box=(o["x"], o["y"], o["w"], o["h"])))
        found[r["image_id"]] = things, r["width"], r["height"]
        if r["coco_id"]:
            link[r["coco_id"]] = r["image_id"]
    return found, link


def test_every_sentence_is_true(world, annotated):
    found, link = annotated
    checked = Counter()
    for r in load(world, "vg/region_descriptions.json"):
        for region in r["regions"]:
            assert is_true(region["phrase"], *found[r["id"]]), (r["id"], region["phrase"])
            checked["regions"] += 1
    for split in ("train", "val"):
        for r in load(world, f"coco/annotations/captions_{split}2017.json")["annotations"]:
            if r["image_id"] in link:
                assert is_true(r["caption"], *found[link[r["image_id"]]]), r
                checked[split] += 1
    assert min(checked.values()) > 50 and len(checked) == 3


def test_sentences_are_varied(world):
    texts = [r["caption"] for r in load(world, "coco/annotations/captions_train2017.json")["annotations"]]
    for form in ("left of", "above", "on the right", " and ", "There are", "shapes", "You can see", "striped"):
        assert any(form in text for text in texts), form
    assert len(set(texts)) > 0.8 * len(texts)


def test_pixels_show_what_the_boxes_say(world):
    annotated = load(world, "coco/annotations/instances_train2017.json")
    sizes = {i["id"]: i for i in annotated["images"]}
    boxes = defaultdict(list)
    for a in annotated["annotations"]:
        boxes[a["image_id"]].append(a["bbox"])
    for number, image in list(sizes.items())[:20]:
        pixels = np.asarray(Image.open(f"{world}/coco/train2017/{image['file_name']}").convert("RGB")).astype(int)
        assert pixels.shape == (image["height"], image["width"], 3)
        # painted = unlike the ground
        painted = abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).max(-1) > 25
        outside = painted.copy()
        for x, y, w, h in boxes[number]:
            rows, columns = painted[y:y + h, x:x + w].nonzero()  # the shape reaches each side of its box
            assert rows.min() <= 1 and rows.max() >= h - 2 and columns.min() <= 1 and columns.max() >= w - 2
            outside[max(0, y - 1):y + h + 1, max(0, x - 1):x + w + 1] = False
        assert not outside.any()
        assert 1 <= len(boxes[number]) <= 6


# ----------------------------------------------------------------------------------------------------------------
# Formats and splits


def test_pycocotools_reads_the_instances(world):
    for split in ("train", "val"):
        coco = COCO(f"{world}/coco/annotations/instances_{split}2017.json")
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.KINDS)
        assert all(coco.annToMask(a).sum() > 0 for a in coco.dataset["annotations"][:5])
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in coco.dataset["annotations"])
        captions = load(world, f"coco/annotations/captions_{split}2017.json")
        assert set(Counter(a["image_id"] for a in captions["annotations"]).values()) == {5}


def test_every_picture_named_anywhere_is_there(world):
    for split in ("train", "val"):
        for i in load(world, f"coco/annotations/instances_{split}2017.json")["images"]:
            assert os.path.getsize(f"{world}/coco/{split}2017/{i['file_name']}")
    for r in load(world, "vg/image_data.json"):
        part = r["url"].split("/")[0]
        assert Image.open(f"{world}/vg/{part}/{r['image_id']}.jpg").size == (r["width"], r["height"])
    for i in load(world, "flickr30k/dataset_flickr30k.json")["images"]:
        assert os.path.getsize(f"{world}/flickr30k/flickr30k-images/{i['filename']}") and len(i["sentences"]) == 5
    for split in ("train", "dev", "test1"):
        with open(f"{world}/nlvr2/{split}.json", encoding="utf-8") as file:
            for r in map(json.loads, file):
                name = r["identifier"].rsplit("-", 1)[0]
                folder = f"{world}/nlvr2/images/{split}/" + (f"{r['directory']}/" if split == "train" else "")
                assert all(os.path.getsize(f"{folder}{name}-img{side}.png") for side in (0, 1))
                assert r["label"] in ("True", "False")
    for i in load(world, "vqa/v2_OpenEnded_mscoco_test2015_questions.json")["questions"]:
        assert os.path.getsize(f"{world}/coco/test2015/COCO_test2015_{i['image_id']:012d}.jpg")


def test_splits(world):
    splits = Counter(i["split"] for i in load(world, "coco/dataset_coco.json")["images"])
    assert splits == {"train": 48, "val": 8, "test": 8}
    flickr = Counter(i["split"] for i in load(world, "flickr30k/dataset_flickr30k.json")["images"])
    assert flickr == {"train": 16, "val": 8, "test": 8}
    data = read_pretraining(world, say=lambda text: None)
    assert len(data["train"]) == 64 and len(data["val"]) == 8
    assert any(p.coco and p.vg for p in data["train"]) and any(p.vg and not p.coco for p in data["train"])


def test_the_vocabulary_knows_all_words(world):
    tokenizer = Tokenizer(f"{world}/vocab.txt")
    for r in load(world, "coco/annotations/captions_train2017.json")["annotations"]:
        tokens = tokenizer.encode(r["caption"])
        assert tokenizer.unk not in tokens and len(tokens) == len(re.findall(r"\w+|\.", r["caption"])) + 2


def test_held_out_pairs_are_in_test_pictures_alone(world, annotated):
    found, link = annotated
    held = {tuple(reversed(text.split())) for text in load(world, "world.json")["held_out"]}
    assert held == shapes.HELD_OUT and len(held) == 6
    tests = [i["cocoid"] for i in load(world, "coco/dataset_coco.json")["images"] if i["split"] == "test"]
    flickr = {r["image_id"] for r in load(world, "vg/image_data.json") if r["flickr_id"]}
    for number, (things, _, _) in found.items():
        has = any((t["kind"], t["colour"]) in held for t in things)
        other = next((c for c, v in link.items() if v == number), None)
        if other in tests:
            assert has == (tests.index(other) % 2 == 0)
        elif number not in flickr:
            assert not has


# ----------------------------------------------------------------------------------------------------------------
# VQA, NLVR2, Flickr30k


def test_answers_are_right(world, annotated):
    found, link = annotated
    kinds, said_yes = Counter(), Counter()
    questions = {q["question_id"]: q["question"]
                 for q in load(world, "vqa/v2_OpenEnded_mscoco_train2014_questions.json")["questions"]}
    for a in load(world, "vqa/v2_mscoco_train2014_annotations.json")["annotations"]:
        text, answer = questions[a["question_id"]], a["multiple_choice_answer"]
        given = Counter(x["answer"] for x in a["answers"])
        assert sum(given.values()) == 10 and given[answer] >= 8
        assert [x["answer_id"] for x in a["answers"]] == list(range(1, 11))
        kinds[a["question_type"]] += 1
        if a["answer_type"] == "yes/no":
            said_yes[answer] += 1
        if a["image_id"] not in link:
            continue
        things, width, height = found[link[a["image_id"]]]
        asks = "Is there|How many|What color is the|What is the|Where is the"
        body = re.fullmatch(rf"({asks}) (.*?)( are there)?\?", text)
        if body[1] == "Is there":
            assert is_true(body[2], things, width, height) == (answer == "yes"), text
        elif body[1] == "How many":
            assert str(len(matching(things, body[2]))) == answer, text
        else:
            (thing,) = matching(things, body[2])
            x, y, w, h = thing["box"]
            where = f"{'top' if y + h / 2 < height / 2 else 'bottom'} {'left' if x + w / 2 < width / 2 else 'right'}"
            assert answer == {"What color is the": thing["colour"], "What is the": thing["kind"],
                              "Where is the": where}[body[1]], text
    assert len(kinds) == 5
    assert said_yes["yes"] / sum(said_yes.values()) == pytest.approx(0.5, abs=0.2)


def test_the_words_of_a_question_do_not_give_its_answer_away(world):
    """Whether and how many there are is asked about two pictures at a time, which answer it differently."""
    annotations = {a["question_id"]: a for a in load(world, "vqa/v2_mscoco_train2014_annotations.json")["annotations"]}
    answers, asked = defaultdict(list), Counter()
    for q in load(world, "vqa/v2_OpenEnded_mscoco_train2014_questions.json")["questions"]:
        asked[q["image_id"]] += 1
        answers[q["question"]].append(annotations[q["question_id"]]["multiple_choice_answer"])
    assert set(asked.values()) <= {3, 4} and Counter(asked.values())[4] > 40
    for text, given in answers.items():
        if text.startswith("How many") or text.startswith("Is there") and text.count(" a ") == 1:
            assert len(given) % 2 == 0 and len(set(given)) > 1, text
        if text.startswith("Is there") and text.count(" a ") == 1:
            assert given.count("yes") == given.count("no"), text


def test_nlvr2_is_decided_by_neither_the_words_nor_one_picture():
    forms = set()
    for seed in range(400):
        text, _, pairs = shapes.statement(random.Random(seed))
        forms.add(text.split()[0])
        assert [true for _, _, true in pairs].count(True) == 2
        for side in (0, 1):
            assert sorted(p[side] for p in pairs if p[2]) == sorted(p[side] for p in pairs if not p[2]), text
        for left, right, true in pairs:
            words = text.lower().rstrip(".").split()
            if "exactly" in words:
                assert ((left > 0) + (right > 0) == 1) == true
            elif "total" in words or "all" in words:
                assert (left + right == NUMBER[words[2]]) == true
            else:
                assert ((left == right) == true) if "same" in words else ((left != right) == true)
    assert len(forms) >= 4


def test_statements_are_true_of_the_pictures_that_are_drawn(tmp_path, monkeypatch):
    drawn, scene = [], shapes.draw_scene
    monkeypatch.setattr(shapes, "draw_scene", lambda *words, **more: drawn.append(scene(*words, **more)) or drawn[-1])
    shapes.write_nlvr2(shapes.Writer(str(tmp_path)), 1, 0, 60, 0)
    with open(tmp_path / "nlvr2/dev.json", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(drawn) == 2 * len(records) == 120
    for r, (_, left), (_, right) in zip(records, drawn[::2], drawn[1::2]):
        text, sides = r["sentence"].lower().rstrip("."), ([t.traits() for t in left], [t.traits() for t in right])
        what = re.search(r"(?:contains a|numbers? of|there (?:is|are) \w+) (.*?)(?: in total| at all)?$", text)[1]
        a, b = (len(matching(things, what)) for things in sides)
        number = re.match(r"there (?:is|are) (\w+)", text)
        truth = (a + b == NUMBER[number[1]] if number else a != b if "different" in text else
                 (a > 0) != (b > 0) if "exactly one" in text else a == b)
        assert str(truth) == r["label"], r


def test_flickr_sentences_are_true_of_one_picture_only():
    rng = random.Random(1)
    scenes = [[dict(t.traits(), box=(t.x, t.y, t.side, t.side)) for t in things]
              for _, things in shapes.draw_telling_scenes(rng, 40, test=True)]
    rng = random.Random(1)
    for number, (canvas, things) in enumerate(shapes.draw_telling_scenes(rng, 40, test=True)):
        for text in shapes.telling_sentences(random.Random(number), things):
            true = [i for i, scene in enumerate(scenes) if is_true(text, scene, canvas[1], canvas[0])]
            assert true == [number], text


# ----------------------------------------------------------------------------------------------------------------
# Writing


def test_the_folder_must_be_free_and_appears_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    assert shapes.main(["--output", str(tmp_path / "used")]) == 2
    assert "used: is there already; give another folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "used") == ["file"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "write_nlvr2", full)
    assert shapes.main(["--output", str(tmp_path / "new"), "--train", "16", "--val", "1", "--test", "2"]) == 2
    assert capsys.readouterr().err == (
        f"shapes.py: --output {tmp_path / 'new'}: cannot be written (No space left on device)\n")
    assert os.listdir(tmp_path) == ["used"]


@pytest.mark.parametrize("flag,value,says", [
    ("train", 3, "16 to 76000"), ("val", 10 ** 20, "1 to 10000"), ("test", 1, "2 to 10000")])
def test_numbers_that_no_world_can_have(flag, value, says):
    with pytest.raises(InputError, match=f"--{flag} {value}: must be from {says}"):
        shapes.write_world("nowhere", **{flag: value})


def test_a_folder_that_is_too_deep_to_make():
    with pytest.raises(InputError, match="--output .*: cannot be written"):
        shapes.write_world("a/" * 3000, train=16, val=1, test=2)


def test_the_command(command, tmp_path):
    done = command("shapes.py", "--output", tmp_path / "w", "--seed", 5, "--train", 32, "--val", 4, "--test", 4)
    assert done.returncode == 0 and "written" in done.stdout, done.stderr
    assert load(tmp_path / "w", "world.json")["seed"] == 5
