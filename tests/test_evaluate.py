"""Measures on held-out pictures: phrases by hand, AP against pycocotools on the official file, oracles, the command."""

import contextlib
import io
import json
import os
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, small_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from data import Example, Tokenizer, index_task, read_pretraining
from evaluate import Phrases, average_precision, boxes_in_pixels, measure, questions
from model import Memory, load_checkpoint, save_checkpoint

NAMES = {"coco": ["circle", "square", "stop sign"], "vg": ["circle,circles,disc", "square,squares", "stop sign"],
         "attributes": ["red", "blue,azure", "small", "large"]}
CIRCLE, SQUARE, SIGN = range(3)
RED, BLUE, SMALL, LARGE = range(4)
FACTS = [(CIRCLE, {RED, SMALL}), (CIRCLE, {BLUE, LARGE}), (SQUARE, {RED, LARGE})]


@pytest.fixture(scope="module")
def data(world):
    return read_pretraining(world, say=lambda text: None)


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer(f"{world}/vocab.txt")


@pytest.fixture
def phrases():
    p = Phrases(NAMES)
    p.seen = {RED, BLUE, SMALL, LARGE}
    p.together = {(a, b) for _, its in FACTS for a in its for b in its}
    return p


def found(phrases, sentence):
    return [([a for _, _, a in before], thing[2]) for before, thing in phrases.find(sentence)]


# ----------------------------------------------------------------------------------------------------------------
# Words and what they say


@pytest.mark.parametrize("sentence,expected", [
    ("A small red circle is left of a SQUARE.", [([SMALL, RED], CIRCLE), ([], SQUARE)]),
    ("two azure discs and a disc", [([], CIRCLE)]),                         # "discs" is in no list
    ("red and a circle", [([], CIRCLE)]),                                   # the attribute is not right before it
    ("a stop sign", [([], SIGN)]), ("nothing here", []), ("", [])])
def test_phrases_are_found(phrases, sentence, expected):
    assert found(phrases, sentence) == expected


def test_a_caption_counts_if_all_its_phrases_are_true_and_it_has_one(phrases):
    for sentence, truth in (("a small red circle", True), ("a large red circle", False), ("red square.", True),
                            ("a circle and a square", True), ("a circle and a stop sign", False), ("a day", False)):
        assert phrases.all_true(FACTS, sentence) == truth, sentence


def test_which_words_the_picture_decides(phrases):
    def decided(sentence):
        return {sentence[s:e]: sorted(false) for s, e, false in phrases.decided(FACTS, sentence)}

    # Only one thing is small and red, and no other circle is small or red. False words are drawn from those that never
    # occur together with the true one on one object: a thing can be red and large, so "large" does not replace "red".
    assert decided("a small red circle") == {"small": ["blue", "large"], "red": ["blue"],
                                             "circle": ["square", "stop sign"]}
    assert decided("a red circle") == {}            # there is a blue circle too, and a red square
    assert decided("a large blue square") == {}     # false of the picture


def test_foils_are_false_and_true_ones_true(data, tokenizer):
    phrases = Phrases(data["names"]).learn(data["val"])
    kinds = {0: 0, 1: 0}
    for picture, q in zip(data["val"], questions(data["val"], phrases, tokenizer)):
        for tokens, label in q["foil"]:
            assert phrases.all_true(phrases.facts(picture), tokenizer.decode(tokens)) == bool(label)
            kinds[label] += 1
        for tokens, labels in q["visual"]:
            assert sum(label >= 0 for label in labels) == 1  # whole words in this vocabulary
            assert [t for t, label in zip(tokens, labels) if label >= 0] == [tokenizer.mask]
        own = {s.lower() for s in picture.sentences}
        for tokens, label in q["itm"]:
            text = tokenizer.decode(tokens).replace(" .", ".").replace(" ,", ",")
            assert (text in own) == bool(label)
    assert min(kinds.values()) > 5


def test_questions_are_the_same_each_time(data, tokenizer):
    phrases = Phrases(data["names"]).learn(data["val"])
    assert questions(data["val"], phrases, tokenizer) == questions(data["val"], phrases, tokenizer)


# ----------------------------------------------------------------------------------------------------------------
# Average precision


def official(path, results):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        scored = COCOeval(truth, truth.loadRes(results), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored.stats[0], scored.stats[1]


def test_ap_equals_pycocotools_on_the_official_file(world):
    path = f"{world}/coco/annotations/instances_train2017.json"
    data = read_pretraining(world, ["coco"], say=lambda text: None)
    rng = random.Random(0)
    with open(path) as file:
        annotations = json.load(file)["annotations"]
    place = {int(p.name.split()[1]): i for i, p in enumerate(data["train"])}
    label_of = {c: i for i, c in enumerate(sorted({a["category_id"] for a in annotations}))}
    theirs, ours = [], []
    for a in annotations:
        for _ in range(2):  # boxes off by some pixels, some of a wrong class
            x, y, w, h = (v + rng.randint(-4, 4) for v in a["bbox"])
            box = [x, y, max(1, w), max(1, h)]
            category, score = rng.choice([a["category_id"]] * 3 + list(label_of)), rng.random()
            theirs.append({"image_id": a["image_id"], "category_id": category, "bbox": box, "score": score})
            ours.append({**theirs[-1], "image_id": place[a["image_id"]], "category_id": label_of[category]})
    expected = official(path, theirs)
    assert 0.05 < expected[0] < 0.9
    assert average_precision(data["train"], ours, "coco") == pytest.approx(expected, abs=1e-6)
    assert average_precision(data["train"], [], "coco") == (0.0, 0.0)


def test_true_boxes_score_one(data):
    results = [{"image_id": i, "category_id": label, "bbox": box, "score": 0.9}
               for i, p in enumerate(data["val"])
               for label, box in zip(p.coco[1].tolist(), boxes_in_pixels(torch.from_numpy(p.coco[0]), p.size).tolist())]
    assert average_precision(data["val"], results, "coco") == (1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------
# The whole measure


def small_trained(world, tokenizer, data):
    names = data["names"]
    return small_model(vocabulary=len(tokenizer), max_tokens=40, queries=8, classes={"coco": 6, "vg": 6},
                       attributes=len(names["attributes"]), pad=tokenizer.pad, cls=tokenizer.cls, sep=tokenizer.sep,
                       mask=tokenizer.mask)


def test_measures_do_not_depend_on_the_batch_and_blind_sees_no_picture(world, data, tokenizer):
    model = small_trained(world, tokenizer, data)
    size = {"short": 64, "long": 96}
    one = measure(model, tokenizer, data["names"], data["val"], batch_size=1, **size)
    all_at_once = measure(model, tokenizer, data["names"], data["val"], batch_size=8, **size)
    assert one == pytest.approx(all_at_once, abs=1e-6) and all(0 <= v <= 1 for v in one.values())
    blind = measure(model, tokenizer, data["names"], data["val"], blind=True, **size)
    assert set(blind) == set(one)


def test_blind_pictures_are_all_alike(world, data, tokenizer, monkeypatch):
    seen = []
    model = small_trained(world, tokenizer, data).train()
    inner = model.encode_picture
    monkeypatch.setattr(model, "encode_picture", lambda images, sizes: seen.append(images) or inner(images, sizes))
    size = Counter(p.size for p in data["val"]).most_common(1)[0][0]
    pictures = [p for p in data["val"] if p.size == size]
    measure(model, tokenizer, data["names"], pictures, blind=True, short=64, long=96)
    for images in seen:
        assert len(images) > 1 and all(torch.equal(image, images[0]) for image in images)
    assert seen and not model.training


class Oracle:
    """Stands where the model stands and answers with the truth; pictures are told apart by their pixels."""

    def __init__(self, data, tokenizer):
        self.data, self.tokenizer, self.pictures = data, tokenizer, data["val"]
        pixels = [evaluate.to_pixels(evaluate.load_picture(p.file), 64, 96) for p in self.pictures]
        self.known = {p.numpy().tobytes(): i for i, p in enumerate(pixels)}
        asked = questions(self.pictures, Phrases(data["names"]).learn(self.pictures), tokenizer)
        self.labels = {(i, tuple(t)): a for i, q in enumerate(asked) for t, a in q["mlm"] + q["visual"]}
        self.pairs = {(i, tuple(t)): a for i, q in enumerate(asked) for t, a in q["itm"] + q["foil"]}

    def eval(self):
        pass

    def encode_picture(self, images, sizes):  # the only state of a picture is its number
        numbers = [self.known[image[:, :h, :w].numpy().tobytes()] for image, (h, w) in zip(images, sizes.tolist())]
        return Memory(torch.tensor(numbers).view(-1, 1, 1), torch.zeros(len(numbers), 1, 1), None)

    def encode(self, grid, tokens=None):  # a word's state: the picture's number, the word's place, the whole sentence
        if tokens is None:
            return grid
        n, T = tokens.shape
        places = torch.arange(T).view(1, T, 1).expand(n, T, 1)
        states = torch.cat([grid.states.view(n, 1, 1).expand(n, T, 1), places, tokens[:, None].expand(n, T, T)], 2)
        return Memory(states, None, None)

    def key(self, state):
        return int(state[0]), tuple(t for t in state[2:].tolist() if t != self.tokenizer.pad)

    def itm(self, states):
        return F.one_hot(torch.tensor([self.pairs[self.key(s)] for s in states]), 2)

    def guess_words(self, states):
        return F.one_hot(torch.tensor([self.labels[self.key(s)][int(s[1])] for s in states]), len(self.tokenizer))

    def detect(self, memory):
        B, Q = len(memory.states), 8
        out = {"logits": {name: torch.zeros(1, B, Q, 7) for name in ("coco", "vg")},
               "boxes": torch.full((1, B, Q, 4), 0.01),
               "attributes": torch.zeros(1, B, Q, len(self.data["names"]["attributes"]))}
        for row, i in enumerate(memory.states[:, 0, 0].tolist()):
            boxes, labels, attributes = self.pictures[i].vg  # the miniature world lists objects in COCO's order
            for name, logits in out["logits"].items():
                logits[0, row, :, -1] = 50
                logits[0, row, range(len(labels)), -1] = 0
                logits[0, row, range(len(labels)), getattr(self.pictures[i], name)[1]] = 50
            out["boxes"][0, row, :len(labels)] = torch.from_numpy(boxes)
            for q, its in enumerate(attributes):
                out["attributes"][0, row, q, list(its)] = 9
        return out

    def generate(self, memory):
        return [(self.tokenizer.encode(self.pictures[i].sentences[0]), 0.0) for i in memory.states[:, 0, 0].tolist()]


def test_a_model_that_knows_scores_one(data, tokenizer):
    """Truth put in at the model's outputs must come out as 1 for each measure: nothing is lost on the way."""
    measures = measure(Oracle(data, tokenizer), tokenizer, data["names"], data["val"], short=64, long=96, batch_size=3)
    assert len(measures) == 10 and measures == pytest.approx(dict.fromkeys(measures, 1.0))


# ----------------------------------------------------------------------------------------------------------------
# What a model answers to the tasks


def few(task, world, n=4):
    return index_task(task, world, "val", say=lambda text: None)["examples"][:n]


def test_a_row_of_retrieval_has_the_sentences_in_their_order(world, data, tokenizer):
    """One pair at a time, in place of batches of sentences of like length."""
    model, examples = small_trained(world, tokenizer, data), few("flickr30k", world, 2)
    rows = evaluate.answer_task("flickr30k", model, tokenizer, data["names"], examples, short=64, long=96)
    with torch.no_grad():
        for e, row in zip(examples, rows):
            pixels = evaluate.to_pixels(evaluate.load_picture(e.files[0]), 64, 96)
            grid = model.encode_picture(pixels[None], torch.tensor([pixels.shape[1:]]))
            expected = [model.similarity(grid, torch.tensor([tokenizer.encode(s)])).item()
                        for other in examples for s in other.sentences]
            assert row.tolist() == pytest.approx(expected, abs=1e-4) and len(set(row.tolist())) == len(row) == 10


class Brightest:
    """Knows of a picture how bright it is: a statement is true if its left picture is the brighter one."""

    def __init__(self):
        self.training, self.seen = True, []

    def eval(self):
        self.training = False

    def encode_picture(self, images, sizes):
        assert not self.training
        self.seen += [image[:, :h, :w] for image, (h, w) in zip(images, sizes.tolist())]
        return Memory(torch.stack([x.float().mean() for x in self.seen[-len(images):]]).view(-1, 1, 1),
                      torch.zeros(len(images), 1, 1), None)

    def judge_statements(self, grid, tokens):
        left, right = grid.states.flatten().chunk(2)
        return F.one_hot((left > right).long(), 2)


def test_each_statement_is_about_its_two_pictures_and_blind_about_none(world, data, tokenizer):
    examples, settings = few("nlvr2", world, 8), {"short": 64, "long": 96, "batch_size": 3}
    said = evaluate.answer_task("nlvr2", Brightest(), tokenizer, data["names"], examples, **settings)
    bright = [[evaluate.to_pixels(Image.open(f).convert("RGB"), 64, 96).float().mean() for f in e.files]
              for e in examples]
    assert said == [str(bool(left > right)) for left, right in bright] and set(said) == {"True", "False"}
    blind = Brightest()
    evaluate.answer_task("nlvr2", blind, tokenizer, data["names"], examples, blind=True, **settings)
    alike = {}
    for image in blind.seen:
        assert torch.equal(image, alike.setdefault(image.shape, image))
    assert len(blind.seen) == 16 > len(alike)


def test_results_have_cocos_own_numbers():
    """Its 80 classes have ids up to 90."""
    boxes = [[(2, (1.0, 2.0, 3.0, 4.0), 0.5)], []]
    found = evaluate.results_of("detection", boxes, [Example(7, ()), Example(8, ())], [1, 2, 4])
    assert found == [{"image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4], "score": 0.5}]


# ----------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def checkpoint(world, data, tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("checkpoint") / "last.pt")
    save_checkpoint(path, small_trained(world, tokenizer, data), tokenizer.vocabulary, data["names"],
                    args={"sets": ["coco", "vg"], "short_sides": [64], "long_side": 96})
    return path


def test_the_command(command, checkpoint, world, tmp_path):
    done = command("evaluate.py", "--checkpoint", checkpoint, "--data", world, "--examples", 4, "--json",
                   tmp_path / "measures.json", "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert {"val_AP50", "blind_AP50", "val_caption_objects"} <= set(measures)
    assert f"AP50                     {measures['val_AP50']:.3f}" in done.stdout
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("break_it,says", [
    (lambda world: ["--checkpoint", f"{world}/vocab.txt"], "vocab.txt: not a PyTorch file"),
    (lambda world: ["--data", "nowhere"], "--data nowhere: no such folder"),
    (lambda world: ["--json", "nowhere/x.json"], "--json nowhere/x.json: cannot be written"),
    (lambda world: ["--sheet", "nowhere/x.png"], "--sheet nowhere/x.png: cannot be written")])
def test_bad_input(command, checkpoint, world, break_it, says):
    done = command("evaluate.py", "--checkpoint", checkpoint, "--data", world, *break_it(world))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("evaluate.py: ") and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag,value", [("--beam", "1" + "0" * 20), ("--examples", "-5"), ("--alpha", "1e308"),
                                        ("--alpha", "nan"), ("--batch-size", "1" + "0" * 400), ("--threshold", "nan")])
def test_numbers_beyond_all_sense_are_refused_by_name(flag, value, capsys):
    assert evaluate.main(["--checkpoint", "nowhere.pt", "--data", "nowhere", flag, value]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"evaluate.py: {flag} ") and ": must be from" in said and said.count("\n") == 1


def test_a_run_checkpoint_is_read(command, world, tmp_path):
    done = command("pretrain.py", *TINY, "--data", world, "--output", tmp_path, "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(os.path.join(tmp_path, "last.pt"))["args"]["sets"] == ["coco", "vg"]
    done = command("evaluate.py", "--checkpoint", tmp_path / "last.pt", "--data", world, "--examples", 2)
    assert done.returncode == 0 and "caption_objects" in done.stdout, done.stderr
