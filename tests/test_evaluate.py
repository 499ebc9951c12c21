"""What a pre-trained model has learnt, and images of one's own, against models called by hand."""

import json
import os
import random
import re
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_model
from matplotlib.figure import Figure
from PIL import Image
from test_tasks import QUIET, SIZE, model_for, official_ap

import evaluate
from data import Example, InputError, Objects, Tokenizer, load_image, read_pretraining, to_pixels
from evaluate import (Grounding, Predictor, average_precision, draw_attention, draw_curves,
                      duplicates_and_missed, measure, measure_with_blind, prepare_probes,
                      record_attention)
from model import Memory, build_model, load_checkpoint, save_checkpoint
from tasks import TASKS, make_task

NAMES = {"coco": [], "vg": ["circle,circles,disc", "square,squares", "stop sign"],
         "attributes": ["red", "blue,azure", "small", "large"]}
CIRCLE, SQUARE, SIGN = range(3)
RED, BLUE, SMALL, LARGE = range(4)
# A small red circle, a large blue circle, a large red square
IMAGE = Example("an image", vg=Objects([(0.5, 0.5, 0.1, 0.1)] * 3, [CIRCLE, CIRCLE, SQUARE],
                                       [[RED, SMALL], [BLUE, LARGE], [RED, LARGE]]))
GROUNDING = Grounding(NAMES, [IMAGE])
ANSWERS = ["yes", "no", "red", "blue", "two", "a circle"]


@pytest.fixture(scope="module")
def val(world):
    return read_pretraining(world, **QUIET)["val"]


@pytest.fixture(scope="module")
def checkpoints(words, tmp_path_factory):
    """{a task's name, or "" for pre-training: the file of a random model}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer, names = words
    files = {}
    for name in ("", *TASKS):
        task = make_task(name, {}) if name else None
        if name:
            task.labels = ANSWERS if name == "vqa" else ["False", "True"]
        files[name] = str(folder / f"{name or 'pretrained'}.pt")
        save_checkpoint(files[name], model_for(task, tokenizer, names), tokenizer.vocabulary,
                        {**names, "answers": task.labels if task else []},
                        args={"sets": ["coco", "vg"], "short_sides": [64], "long_side": 96,
                              "without": []})
    return files


@pytest.fixture(scope="module")
def images(world):
    folder = f"{world}/coco/val2017"
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))[:3]]


@pytest.fixture
def run(capsys, checkpoints):
    """run(task, flags ...) -> (exit code, stdout, the lines of stderr)."""
    def run(task, *flags):
        checkpoint = [] if task is None else ["--checkpoint", checkpoints[task]]
        flags = [*checkpoint, "--device", "cpu", "--workers", "0", *map(str, flags)]
        code = evaluate.main(flags)
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()
    return run


# --------------------------------------------------------------------------------------------------
# Words and what they say of an image


@pytest.mark.parametrize("sentence, expected", [
    ("A small red circle is left of a SQUARE.", [([SMALL, RED], CIRCLE), ([], SQUARE)]),
    ("two azure discs and a disc", [([], CIRCLE)]),  # "discs" is in no list
    ("red and a circle", [([], CIRCLE)]),            # the attribute is not right before it
    ("an azure stop sign", [([BLUE], SIGN)]), ("nothing here", []), ("", [])])
def test_object_phrases_are_found(sentence, expected):
    found = [(phrase.attributes, phrase.label) for phrase in GROUNDING.find(sentence)]
    assert found == expected


@pytest.mark.parametrize("sentence, truth", [
    ("a small red circle", True), ("a large red circle", False), ("a circle and a square", True),
    ("a circle and a stop sign", False), ("a day", False)])
def test_a_caption_is_true_if_it_names_something_and_all_that_it_names_is_there(sentence, truth):
    assert GROUNDING.all_true(GROUNDING.facts(IMAGE), sentence) == truth


@pytest.mark.parametrize("sentence, expected", [
    # False words never occur with the true one on one object: a red thing can be large
    ("a small red circle", {"small": ["blue", "large"], "red": ["blue"],
                            "circle": ["square", "stop sign"]}),
    ("blue circles", {"circles": ["squares", "stop sign"]}),  # a plural; red ones are there too
    ("a red circle", {}),            # there is a blue circle too, and a red square
    ("a large blue square", {})])    # not true of the image
def test_which_words_the_image_decides(sentence, expected):
    found = GROUNDING.grounded_words(GROUNDING.facts(IMAGE), sentence)
    assert {sentence[start:end]: sorted(false) for start, end, false in found} == expected


def test_probes_are_the_same_each_time_and_foils_are_never_true(val, words):
    tokenizer, names = words
    grounding, probes, _ = prepare_probes(tokenizer, names, val)
    assert probes == prepare_probes(tokenizer, names, val)[1]
    labels = []
    for example, probe in zip(val, probes):
        own = {tuple(tokenizer.encode(sentence)) for sentence in example.sentences}
        for tokens, label in probe["itm_accuracy_foil"]:
            truth = grounding.all_true(grounding.facts(example), tokenizer.decode(tokens))
            assert truth == bool(label)
            labels.append(label)
        for tokens, label in probe["itm_accuracy"]:
            assert (tuple(tokens) in own) == bool(label)
        for tokens, answers in probe["mlm_accuracy"] + probe["mlm_accuracy_visual"]:
            masked = [token == tokenizer.mask for token in tokens]
            assert any(masked) and masked == [answer >= 0 for answer in answers]
    assert min(labels.count(0), labels.count(1)) > 5


# --------------------------------------------------------------------------------------------------
# The measures of pre-training


def test_average_precision_is_pycocotools_on_the_official_file(world):
    path = f"{world}/coco/annotations/instances_train2017.json"
    examples = read_pretraining(world, ["coco"], **QUIET)["train"]
    with open(path) as file:
        annotations = json.load(file)["annotations"]
    number = {int(example.id.split()[1]): i for i, example in enumerate(examples)}
    categories = sorted({a["category_id"] for a in annotations})
    rng = random.Random(0)
    theirs, ours = [], defaultdict(list)
    for a in annotations * 2:  # boxes off by some pixels, some of a wrong class
        x, y, w, h = (v + rng.uniform(-4, 4) for v in a["bbox"])
        category = rng.choice([a["category_id"]] * 3 + categories)
        box, score = [x, y, max(1, w), max(1, h)], rng.random()
        theirs.append({"image_id": a["image_id"], "bbox": box, "category_id": category,
                       "score": score})
        ours[number[a["image_id"]]].append((categories.index(category), box, score))
    expected = official_ap(path, theirs)
    assert 0.05 < expected["AP"] < 0.9
    found = average_precision(examples, ours, len(categories))
    assert found == pytest.approx({name: expected[name] for name in ("AP", "AP50")}, abs=1e-6)
    assert average_precision(examples, {}, len(categories)) == {"AP": 0.0, "AP50": 0.0}


class Oracle:
    """Stands where the model stands, knows images by their pixels, and answers with the truth; of
    the images in `wrong` with something else."""

    def __init__(self, examples, words, probes, wrong=()):
        self.examples, self.wrong = examples, wrong
        self.tokenizer, self.names = words
        pixels = [to_pixels(load_image(e.files[0]), **SIZE) for e in examples]
        self.known = {image.numpy().tobytes(): i for i, image in enumerate(pixels)}
        self.labels = {(i, tuple(tokens)): answer for i, probe in enumerate(probes)
                       for kind in probe for tokens, answer in probe[kind]}

    def eval(self):
        pass

    def encode_image(self, images, sizes, padded):  # the state of an image is its number
        numbers = [self.known[image[:, :h, :w].numpy().tobytes()]
                   for image, (h, w) in zip(images, sizes.tolist())]
        return Memory(torch.tensor(numbers).view(-1, 1, 1), torch.zeros(len(numbers), 1, 1), None)

    def encode(self, grid, tokens=None):  # of a word: the image's number, its place, the sentence
        if tokens is None:
            return grid
        N, T = tokens.shape
        places = torch.arange(T).view(1, T, 1).expand(N, T, 1)
        numbers = grid.states.expand(N, T, 1)
        return Memory(torch.cat([numbers, places, tokens[:, None].expand(N, T, T)], 2), None, None)

    def answer(self, state, choices):
        number, place, *tokens = state.tolist()
        answer = self.labels[number, tuple(t for t in tokens if t != self.tokenizer.pad)]
        answer = answer[place] if isinstance(answer, list) else answer
        return F.one_hot(torch.tensor((answer + (number in self.wrong)) % choices), choices)

    def itm(self, states):
        return torch.stack([self.answer(state, 2) for state in states])

    def mlm_logits(self, states):
        return torch.stack([self.answer(state, len(self.tokenizer.vocabulary)) for state in states])

    def detect(self, memory):
        B, Q = len(memory.states), 8
        logits = {source: torch.zeros(1, B, Q, 7) for source in ("coco", "vg")}
        boxes = torch.full((1, B, Q, 4), 0.01)
        attributes = torch.zeros(1, B, Q, len(self.names["attributes"]))
        for row, number in enumerate(memory.states[:, 0, 0].tolist()):
            example = self.examples[number]  # the miniature world has its objects in one order
            for source in logits:
                labels = getattr(example, source).labels
                logits[source][0, row, len(labels):, -1] = 50
                logits[source][0, row, range(len(labels)), labels] = 50
            boxes[0, row, :len(labels)] = torch.tensor(example.vg.boxes).view(-1, 4)
            for query, its in enumerate(example.vg.attributes):
                attributes[0, row, query, its] = -9 if number in self.wrong else 9
        return {"logits": logits, "boxes": boxes, "attributes": attributes}

    def generate(self, memory):
        numbers = memory.states[:, 0, 0].tolist()
        sentences = ["" if i in self.wrong else self.examples[i].sentences[0] for i in numbers]
        return [self.tokenizer.encode(sentence) for sentence in sentences]


def test_measures_count_the_right_answers(val, words):
    """A model that knows all has 1 everywhere; what it does not know of three images is missing."""
    asked = prepare_probes(*words, val)
    _, probes, _ = asked
    everything = measure(Oracle(val, words, probes), *words, val, asked, batch_size=3, **SIZE)
    assert len(everything) == 18
    for name, value in everything.items():
        assert value == pytest.approx(0 if "duplicates" in name or "missed" in name else 1), name

    wrong = {0, 3, 5}
    found = measure(Oracle(val, words, probes, wrong), *words, val, asked, batch_size=3, **SIZE)
    counts = {name: [len(probe[name]) for probe in probes] for name in probes[0]}
    counts["mlm_accuracy"] = [sum(label >= 0 for _, labels in probe["mlm_accuracy"]
                                  for label in labels) for probe in probes]
    counts["attribute_accuracy"] = [sum(map(bool, e.vg.attributes)) for e in val]
    counts["caption_objects"] = [1] * len(val)
    for name, per_image in counts.items():
        right = sum(n for i, n in enumerate(per_image) if i not in wrong)
        assert found[name] == pytest.approx(right / sum(per_image)), name


def test_duplicates_and_missed_objects_by_hand():
    """Two circles and a star; found: a circle three times, once weakly; the star as a circle."""
    boxes = [(0.2, 0.2, 0.2, 0.2), (0.8, 0.8, 0.2, 0.2), (0.5, 0.5, 0.2, 0.2)]
    example = Example(0, [], (100, 100), coco=Objects(boxes, [0, 0, 1]))
    found = [(0, [10, 10, 20, 20], 0.9), (0, [11, 10, 20, 20], 0.6), (0, [10, 10, 20, 20], 0.4),
             (1, [10, 10, 20, 20], 0.8), (0, [40, 40, 20, 20], 0.7)]
    empty = Example(1, [], (100, 100), coco=Objects([], []))
    assert duplicates_and_missed([empty, example], {1: found}) == pytest.approx(
        {"duplicates": 1 / 3, "missed": 2 / 3})
    assert duplicates_and_missed([example], {}) == {"duplicates": 0, "missed": 1}


@pytest.mark.parametrize("without,gone", [
    (["mlm"], "mlm"), (["itm"], "itm"), (["caption"], "caption"), (["attributes"], "attribute"),
    (["detection", "attributes"], "AP")])
def test_what_training_left_out_is_not_measured(val, words, without, gone):
    probes = prepare_probes(*words, val)
    model = model_for(None, *words)
    every, some = (measure(model, *words, val[:2], probes, without=left_out, **SIZE)
                   for left_out in ((), without))
    assert any(gone in name for name in every) and not any(gone in name for name in some)
    assert some == {name: every[name] for name in some}


def test_a_blind_model_sees_the_mean_image(val, words, monkeypatch):
    model = model_for(None, *words)
    encode_image = model.encode_image
    shown = []

    def note_image(images, sizes, padded):
        assert not any(module.training for module in model.modules())
        shown.append([image[:, :h, :w] for image, (h, w) in zip(images, sizes.tolist())])
        return encode_image(images, sizes, padded)

    monkeypatch.setattr(model, "encode_image", note_image)
    probes = prepare_probes(*words, val)
    model.train()  # as training leaves it: measures are without dropout
    measure_with_blind(model, *words, val, probes, **SIZE)
    seen, blind = shown
    expected = [to_pixels(probes[2].resize(example.size[::-1]), **SIZE) for example in val]
    for image, mean in zip(seen, blind):
        assert image.shape == mean.shape and not torch.equal(image, mean)
        assert any(torch.equal(mean, other) for other in expected)


# --------------------------------------------------------------------------------------------------
# Predictor


def by_hand(checkpoint, *files):
    """(the checkpoint's model, its tokenizer, its names, the grid of the images)."""
    state = load_checkpoint(checkpoint)
    model = build_model(state, checkpoint).eval()
    pixels = [to_pixels(Image.open(file).convert("RGB"), **SIZE) for file in files]
    with torch.no_grad():
        grids = [model.encode_image(p[None], torch.tensor([p.shape[1:]])) for p in pixels]
    return model, Tokenizer(state["vocabulary"], 40), state["names"], grids


@torch.no_grad()
def test_a_predictor_says_what_the_model_says(checkpoints, images):
    model, tokenizer, names, (grid,) = by_hand(checkpoints[""], images[0])
    predictor = Predictor(checkpoints[""], "cpu")
    (pieces,) = model.generate(model.encode(grid), beam=4, alpha=0.9)
    assert predictor.caption(images[0]) == tokenizer.decode(pieces)
    tokens = torch.tensor([tokenizer.encode("a red circle")])
    chance = model.itm(model.encode(grid, tokens).states[:, 0]).softmax(-1)[0, 1].item()
    assert predictor.match(images[0], "a red circle") == pytest.approx(chance, abs=1e-4)

    width, height = Image.open(images[0]).size
    for sentence in (None, "a red circle"):
        found = predictor.detect(images[0], 0, sentence)
        objects = model.detect(model.encode(grid, None if sentence is None else tokens))
        chances = objects["logits"]["vg"][-1, 0].softmax(-1)[:, :-1]
        order = chances.amax(-1).argsort(descending=True).tolist()
        assert len(found) == len(order) == 5
        for thing, query in zip(found, order):
            assert thing["score"] == pytest.approx(chances[query].max().item(), abs=1e-4)
            assert thing["label"] == names["vg"][int(chances[query].argmax())].split(",")[0]
            cx, cy, w, h = objects["boxes"][-1, 0, query].tolist()
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            assert thing["box"] == pytest.approx(box, abs=0.06)


@torch.no_grad()
def test_a_predictor_answers_and_judges_as_the_model_does(checkpoints, images):
    model, tokenizer, _, (grid,) = by_hand(checkpoints["vqa"], images[0])
    p = model.classify(grid, torch.tensor([tokenizer.encode("what?")]))[0].sigmoid().tolist()
    expected = sorted(zip(ANSWERS, p), key=lambda pair: -pair[1])[:5]
    for found, (answer, chance) in zip(Predictor(checkpoints["vqa"], "cpu").answer(
            images[0], "what?"), expected):
        assert found == (answer, pytest.approx(chance, abs=1e-4))

    model, tokenizer, _, grids = by_hand(checkpoints["nlvr2"], *images[:2])
    tokens = torch.tensor([tokenizer.encode("both are red")])
    for left, right in ((0, 1), (1, 0)):
        cls = torch.cat([model.encode_cls(grids[side], tokens) for side in (left, right)], 1)
        chance = model.classifier(cls).softmax(-1)[0, 1].item()
        found = Predictor(checkpoints["nlvr2"], "cpu").judge(
            images[left], images[right], "both are red")
        assert found == pytest.approx(chance, abs=1e-4)


def test_a_path_a_pil_image_and_an_array_are_the_same_image(checkpoints, tmp_path):
    """Of any mode; a camera's rotation is applied."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # show it turned by 90 degrees
    path = str(tmp_path / "image.png")
    image.save(path, exif=exif)
    predictor = Predictor(checkpoints["caption"], "cpu")
    expected = np.asarray(predictor.open(path))
    assert expected.shape == (30, 20, 3) and expected.std() > 5
    np.testing.assert_array_equal(np.asarray(predictor.open(Image.open(path))), expected)
    np.testing.assert_array_equal(np.asarray(predictor.open(expected)), expected)


def test_what_was_left_out_of_training_is_not_said(checkpoints, images, tmp_path):
    state = load_checkpoint(checkpoints[""])
    path = str(tmp_path / "partly.pt")
    save_checkpoint(path, build_model(state, ""), state["vocabulary"], state["names"],
                    args={**state["args"], "without": ["caption", "attributes"]})
    predictor = Predictor(path, "cpu")
    with pytest.raises(InputError, match=f"{path}: is pre-trained, and cannot caption; it can "
                       "detect, match"):
        predictor.caption(images[0])
    assert all(thing["attributes"] == [] for thing in predictor.detect(images[0], 0))


# --------------------------------------------------------------------------------------------------
# Attention


def test_recorded_weights_are_those_that_the_model_uses():
    """The mean over heads of the softmax by hand, in float64."""
    torch.manual_seed(0)
    attention, x = small_model().encoder[0].self_attention, torch.randn(3, 6, 32)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    recorded = record_attention([attention])
    with torch.no_grad():
        keys_values = attention.keys_values(x, x)
        attention(x, keys_values, mask)
        attention(x, keys_values, mask)  # no longer recorded
        q, k = attention.split(attention.q(x)).double(), keys_values[0].double()
    found, = recorded
    for b, length in enumerate((6, 4, 1)):
        scores = q[b] @ k[b, :, :length].transpose(1, 2) / q.shape[-1] ** 0.5
        expected = scores.softmax(-1).mean(0)
        torch.testing.assert_close(found[b, :, :length].double(), expected, atol=1e-5, rtol=0)
        assert (found[b, :, length:] == 0).all()


# --------------------------------------------------------------------------------------------------
# Drawings


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be written."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    return drawn


def test_curves_of_several_runs_have_a_colour_each_and_blind_ones_are_dashed(figures, tmp_path):
    for run in "ab":
        line = {"step": 1, "loss": 0.5, "val_AP": 0.2, "blind_AP": 0.1}
        (tmp_path / run).mkdir()
        # A run that is writing, or was cut short
        (tmp_path / run / "log.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "lo')
    draw_curves([tmp_path / "a", tmp_path / "b"], "")
    _, precision = figures[0].axes
    curves = [(line.get_label(), line.get_color(), line.get_linestyle(), *line.get_ydata())
              for line in precision.lines]
    assert curves == [("a", "C0", "-", 0.2), ("a", "C0", "--", 0.1),
                      ("b", "C1", "-", 0.2), ("b", "C1", "--", 0.1)]


def test_attention_is_drawn_where_it_looks(figures):
    """Cell (row, column) of the ResNet's grid has its centre at pixel (16 row, 16 column)."""
    found = {"words": ["[CLS]", "a", "[SEP]"], "objects": [], "grid": (4, 6),
             "encoder": torch.rand(2, 3, 3 + 24)}
    draw_attention("", Image.new("RGB", (96, 64)), found, "words")
    axes = figures[0].axes
    assert len(axes) == 6
    for n, ax in enumerate(axes):
        word, layer = divmod(n, 2)
        cells = found["encoder"][layer, word, 3:].view(4, 6)
        np.testing.assert_array_equal(ax.images[-1].get_array(), cells)
        assert ax.images[-1].get_extent() == [-8, 88, 56, -8]


# --------------------------------------------------------------------------------------------------
# The command


def test_files_and_folders_are_answered_and_a_broken_image_is_named(run, images, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images[0], folder / "b.PNG")
    (folder / "a.jpg").write_text("no image")
    code, said, wrong = run("", "--image", folder, images[1], "nowhere.jpg", "--threshold", 0,
                            "--json", tmp_path / "out.json", "--output", tmp_path / "out")
    assert code == 2 and len(wrong) == 2
    assert wrong[0].startswith(f"evaluate.py: {folder}/a.jpg: cannot be read")
    assert wrong[1].startswith("evaluate.py: nowhere.jpg: cannot be read")
    answers = json.loads((tmp_path / "out.json").read_text())
    assert [answer["image"] for answer in answers] == [str(folder / "b.PNG"), images[1]]
    for answer in answers:
        assert answer["image"] in said and len(answer["objects"]) == 5
    assert len(os.listdir(tmp_path / "out")) == 2


def test_images_are_found_in_the_order_of_how_well_the_sentence_fits(run, checkpoints, images):
    predictor = Predictor(checkpoints["flickr30k"], "cpu")
    fit = {image: predictor.match(image, "a red circle") for image in images}
    code, said, _ = run("flickr30k", "--image", *images, "--find", "a red circle")
    found = [line.split()[1] for line in said.splitlines()]
    assert code == 0 and found == sorted(images, key=lambda image: -fit[image])


def test_questions_statements_and_attention(run, images, tmp_path):
    code, said, _ = run("vqa", "--image", images[0], "--question", "what is it?", "--attention",
                        "--output", tmp_path, "--amp", "bf16")
    assert code == 0 and "answers" in said
    assert sorted(name.split("-")[-1] for name in os.listdir(tmp_path))[-1] == "words.png"
    code, said, _ = run("nlvr2", "--image", *images[:2], "--statement", "both are red")
    assert code == 0 and "both are red" in said
    code, said, _ = run("", "--image", images[0], "--sentence", "a circle", "--threshold", 0,
                        "--attention", "--output", tmp_path / "more")
    assert code == 0 and "match" in said
    assert len(os.listdir(tmp_path / "more")) == 3
    code, _, wrong = run("detection", "--image", images[0], "--threshold", 1, "--attention",
                         "--output", tmp_path)  # nothing is found
    assert (code, wrong) == (0, [])


def test_the_measures_of_a_pretrained_checkpoint(run, world, tmp_path):
    code, said, _ = run("", "--data", world, "--examples", 4, "--json", tmp_path / "measures.json",
                        "--output", tmp_path, "--amp", "bf16")
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert code == 0 and (tmp_path / "sheet.png").exists()
    for name in ("AP50", "mlm_accuracy", "caption_objects"):
        for prefix in ("val", "blind"):
            value = measures[f"{prefix}_{name}"]
            assert re.search(rf"^{prefix}_{name} +{value:.3f}$", said, re.MULTILINE)


@pytest.mark.parametrize("task, flags, says", [
    (None, ["--image", "a.jpg"], "--image: needs --checkpoint"),
    (None, ["--score", "a", "--task", "vqa"], "--score: needs --against"),
    (None, ["--curves", "a"], "--curves: needs --output"),
    (None, ["--curves", "a", "--output", "{image}"], "{image}: cannot be written"),
    (None, ["--curves", "nowhere", "--output", "{out}"], "nowhere/log.jsonl: cannot be read"),
    ("", ["--image", "{image}", "--attention"], "--attention: needs --output"),
    ("", ["--image", "{image}", "--question", "why?"], "is pre-trained, and cannot answer"),
    ("vqa", ["--image", "{image}"], "is fine-tuned for vqa, and cannot caption; it can answer"),
    ("nlvr2", ["--image", "{image}", "--statement", "a"], "--statement: needs two images"),
    ("", ["--data", "{world}", "--split", "val"], "need a --task"),
    ("vqa", ["--data", "{world}", "--task", "nlvr2"], "is fine-tuned for vqa"),
    ("", ["--data", "{world}", "--task", "vqa"], "is pre-trained"),
    ("", ["--data", "nowhere"], "--data nowhere: no such folder")])
def test_what_cannot_be_done_is_one_line(run, world, images, tmp_path, task, flags, says):
    places = {"out": tmp_path, "image": images[0], "world": world}
    code, _, wrong = run(task, *(flag.format(**places) for flag in flags))
    assert code == 2 and len(wrong) == 1
    assert wrong[0].startswith("evaluate.py: ") and says.format(**places) in wrong[0]
