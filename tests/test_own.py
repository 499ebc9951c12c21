"""One's own pictures: each way of asking, what is drawn, pictures that cannot be read, where the model looks."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, small_model
from PIL import Image

import evaluate
from data import SPECIAL, Tokenizer, read_pretraining, to_pixels
from evaluate import Viewer, draw_answer, draw_attention, watched
from model import TASKS, load_checkpoint, save_checkpoint

ANSWERS = ["yes", "no", "red", "blue", "two", "a circle"]


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """{task or "": the file of a random model for it}."""
    folder, names = tmp_path_factory.mktemp("checkpoints"), read_pretraining(world, say=lambda text: None)["names"]
    tokenizer = Tokenizer(f"{world}/vocab.txt")
    for task in ("", *TASKS):
        model = small_model(
            vocabulary=len(tokenizer), max_tokens=tokenizer.max_tokens, attributes=len(names["attributes"]),
            classes={name: len(names[name]) for name in ("coco", "vg")}, pad=tokenizer.pad, cls=tokenizer.cls,
            sep=tokenizer.sep, mask=tokenizer.mask, task=task, answers=len(ANSWERS) if task == "vqa" else 0)
        save_checkpoint(str(folder / f"{task}.pt"), model, tokenizer.vocabulary, {**names, "answers": ANSWERS},
                        args={"sets": ["coco", "vg"], "short_sides": [64], "long_side": 96})
    return lambda task: str(folder / f"{task}.pt")


@pytest.fixture(scope="module")
def pictures(world):
    folder = f"{world}/coco/val2017"
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


@pytest.fixture
def ask(capsys, checkpoints):
    """ask(task, flags...) -> (exit code, what stood on stdout, on stderr)."""
    def run(task, *flags):
        code = evaluate.main(["--checkpoint", checkpoints(task), "--device", "cpu", *map(str, flags)])
        return code, *capsys.readouterr()
    return run


def viewer_of(model):
    tokenizer = Tokenizer([f"w{n}" if n > 4 else piece for n, piece in enumerate([*SPECIAL, *range(45)])])
    return Viewer(model, tokenizer, {"coco": ["a", "b", "c"], "vg": [], "attributes": []}, short=64, long=96)


def viewer(path):
    state = load_checkpoint(path)
    tokenizer = Tokenizer(state["vocabulary"], state["config"].max_tokens)
    model = small_model(**vars(state["config"]))
    model.load_state_dict(state["model"])
    return Viewer(model, tokenizer, state["names"], short=64, long=96)


def test_good_pictures_are_answered_among_bad_ones(ask, pictures, tmp_path):
    bad, cut = tmp_path / "bad.png", tmp_path / "cut.jpg"
    bad.write_text("no picture")
    with open(pictures[0], "rb") as file:
        cut.write_bytes(file.read()[:300])
    (tmp_path / "empty").mkdir()
    code, said, wrong = ask("", "--image", pictures[0], bad, "nowhere.jpg", cut, tmp_path / "empty", pictures[1],
                            "--output", tmp_path / "out", "--json", tmp_path / "all.json", "--threshold", 0)
    assert code == 2
    lines = wrong.splitlines()
    assert len(lines) == 4 and all(line.startswith("evaluate.py: ") for line in lines), wrong
    for line, name, says in zip(lines, (bad, "nowhere.jpg", cut, tmp_path / "empty"),
                                ("not a picture", "no such file", "cannot be decoded", "no picture in this folder")):
        assert f"{name}: {says}" in line
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results == json.loads((tmp_path / "all.json").read_text())
    assert [r["image"] for r in results] == pictures[:2] and "{" not in said
    for r in results:
        assert f"{r['image']} ({r['width']} x {r['height']})\n   {r['caption']}\n" in said
        assert len(r["objects"]) == 5 and r["objects"] == sorted(r["objects"], key=lambda o: -o["score"])
        assert os.path.basename(r["drawn"]) == os.path.basename(r["image"]).replace(".jpg", ".png")


def test_results_are_what_the_model_says(checkpoints, pictures):
    """The reference goes from the pixels through the model's parts by itself."""
    state, image = load_checkpoint(checkpoints("")), Image.open(pictures[0]).convert("RGB")
    said = viewer(checkpoints("")).describe(image, threshold=0)
    model = small_model(**vars(state["config"]))
    model.load_state_dict(state["model"])
    pixels = to_pixels(image, 64, 96)
    with torch.no_grad():
        objects = model.detect(model.encode(model.encode_picture(pixels[None], torch.tensor([pixels.shape[1:]]))))
    for thing in said["objects"]:
        cx, cy, w, h = (objects["boxes"][-1, 0, thing["query"]] * torch.tensor([*image.size, *image.size])).tolist()
        assert thing["box"] == pytest.approx([cx - w / 2, cy - h / 2, w, h], abs=0.051)
        chances = objects["logits"]["vg"][-1, 0, thing["query"]].softmax(-1)[:-1]
        assert thing["name"] == state["names"]["vg"][int(chances.argmax())].split(",")[0]
        assert thing["score"] == pytest.approx(chances.max().item(), abs=1e-4)


@pytest.mark.parametrize("size", [(90, 60), (1000, 700), (2400, 1200), (50, 200)])
def test_boxes_are_drawn_where_the_results_say(size):
    image = Image.new("RGB", size, (250, 250, 250))
    w, h = size
    thing = {"name": "dog", "attributes": [], "score": 0.9, "query": 2, "box": [w * 0.3, h * 0.4, w * 0.5, h * 0.5]}
    plain, drawn = np.asarray(draw_answer(image)), np.asarray(draw_answer(image, [thing]))
    assert plain.shape == drawn.shape and max(drawn.shape[:2]) == min(max(*size, 600), 1600)
    scale = max(drawn.shape[:2]) / max(size)
    changed = np.abs(plain.astype(int) - drawn).sum(-1) > 60
    rows = np.flatnonzero(changed[:, round(w * 0.75 * scale)])    # a column through the box, beside its label
    columns = np.flatnonzero(changed[round(h * 0.8 * scale)])     # a row through it
    for found, expected in ((rows[[0, -1]], (h * 0.4, h * 0.9)), (columns[[0, -1]], (w * 0.3, w * 0.8))):
        assert found / scale == pytest.approx(expected, abs=2 / scale + 1)


def test_the_drawn_file_has_the_boxes_of_results_json(ask, pictures, tmp_path):
    code, *_ = ask("", "--image", pictures[2], "--output", tmp_path, "--threshold", 0)
    assert code == 0
    result, = json.loads((tmp_path / "results.json").read_text())
    with Image.open(result["drawn"]) as file, Image.open(pictures[2]) as image:
        drawn = np.asarray(file.convert("RGB")).astype(int)
        expected = np.asarray(draw_answer(image.convert("RGB"), result["objects"], [result["caption"]])).astype(int)
        plain = np.asarray(draw_answer(image.convert("RGB"), [], [result["caption"]])).astype(int)
    assert (drawn == expected).all()
    x, y, w, h = np.array(result["objects"][0]["box"]) * 600 / max(result["width"], result["height"])
    inside = [(round(x), round(y + h * 0.7)), (round(x + w), round(y + h * 0.7)), (round(x + w * 0.9), round(y + h))]
    checked = [(a, b) for a, b in inside if 2 < a < plain.shape[1] - 3 and 2 < b < plain.shape[0] - 30]
    assert checked
    for a, b in checked:  # the surest one's outline is on top
        assert (np.abs(drawn - plain)[b - 2:b + 3, a - 2:a + 3].sum(-1) > 60).any(), (a, b)


def test_standard_input(checkpoints, pictures):
    with open(pictures[0], "rb") as file:
        done = subprocess.run([sys.executable, "evaluate.py", "--checkpoint", checkpoints(""), "--image", "-"],
                              stdin=file, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "stdin (" in done.stdout and done.stderr == ""


def test_a_reader_who_has_seen_enough(checkpoints, pictures):
    words = [sys.executable, "evaluate.py", "--checkpoint", checkpoints("caption"), "--image",
             os.path.dirname(pictures[0])]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == ""


def test_a_question(ask, checkpoints, pictures, tmp_path):
    code, said, _ = ask("vqa", "--image", pictures[0], "--question", "What colour is it?", "--json",
                        tmp_path / "r.json", "--output", tmp_path)
    result, = json.loads((tmp_path / "r.json").read_text())
    v = viewer(checkpoints("vqa"))
    pixels = to_pixels(Image.open(pictures[0]), 64, 96)
    with torch.no_grad():
        grid = v.model.encode_picture(pixels[None], torch.tensor([pixels.shape[1:]]))
        chances = v.model.answer_questions(grid, torch.tensor([v.tokenizer.encode("What colour is it?")]))[0].sigmoid()
    best = sorted(zip(chances.tolist(), ANSWERS), reverse=True)[:5]
    assert code == 0 and [a["answer"] for a in result["answers"]] == [a for _, a in best]
    assert [a["probability"] for a in result["answers"]] == pytest.approx([p for p, _ in best], abs=1e-4)
    assert f"   {best[0][0]:.2f}  {best[0][1]}\n" in said and os.path.exists(result["drawn"])


def test_a_statement_about_two_pictures(ask, checkpoints, pictures, tmp_path):
    chances = []
    for two in (pictures[:2], pictures[1::-1]):
        code, said, _ = ask("nlvr2", "--image", *two, "--statement", "both have circles", "--json", tmp_path / "r.json")
        result, = json.loads((tmp_path / "r.json").read_text())
        assert code == 0 and result["images"] == two and result["answer"] == (result["probability"] > 0.5)
        assert str(result["answer"]).lower() in said
        chances.append(result["probability"])
    assert chances[0] != chances[1]  # left and right are not the same
    judge = viewer(checkpoints("nlvr2"))
    pixels, sizes = evaluate.pad_pictures([to_pixels(Image.open(file).convert("RGB"), 64, 96) for file in pictures[:2]])
    with torch.no_grad():
        logits = judge.model.judge_statements(judge.model.encode_picture(pixels, sizes), torch.tensor(
            [judge.tokenizer.encode("both have circles")]))[0]
    assert chances[0] == pytest.approx(1 / (1 + np.exp(float(logits[0] - logits[1]))), abs=1e-4)
    code, _, wrong = ask("nlvr2", "--image", pictures[0], "--statement", "both have a circle")
    assert code == 2 and "needs two pictures" in wrong


@pytest.mark.parametrize("task", ["", "flickr30k"])
def test_pictures_are_found_in_order_of_their_score(ask, checkpoints, pictures, tmp_path, task):
    shutil.copytree(os.path.dirname(pictures[0]), tmp_path / "DIR")
    (tmp_path / "DIR/notes.txt").write_text("not a picture, and not tried")
    code, said, wrong = ask(task, "--image", tmp_path / "DIR", "--find", "a red circle", "--output", tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    v = viewer(checkpoints(task))
    odds = {os.path.basename(p): v.similarity(Image.open(p).convert("RGB"), "a red circle") for p in pictures}
    assert code == 0 and wrong == ""
    assert [os.path.basename(r["image"]) for r in results] == sorted(odds, key=lambda name: -odds[name])
    assert results[0]["probability"] == pytest.approx(1 / (1 + np.exp(-results[0]["log_odds"])), abs=1e-4)
    assert f"   1  {results[0]['probability']:.2f}  {results[0]['image']}" in said
    assert os.path.exists(tmp_path / "out/found.png")


def test_sentence_and_attention(ask, checkpoints, pictures, tmp_path):
    code, said, _ = ask("", "--image", pictures[0], "--sentence", "a red circle", "--attention", tmp_path / "a",
                        "--threshold", 0, "--json", tmp_path / "r.json")
    assert code == 0
    result, = json.loads((tmp_path / "r.json").read_text())
    assert result["words"][0] == "[CLS]" and result["words"][-1] == "[SEP]" and "circle" in result["words"]
    kept = np.load(tmp_path / "a/attention.npz")
    T, (H, W) = len(result["words"]), result["grid"]
    assert kept["encoder"].shape == (2, T, T + H * W) and kept["decoder"].shape == (2, 5, T + H * W)
    for weights in (kept["encoder"], kept["decoder"]):
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert weights.min() >= 0
    for name, rows in (("words", T), ("objects", 5)):
        assert result["files"][name] in said
        with Image.open(tmp_path / f"a/{name}.png") as image:
            assert image.height > 100 * rows


def test_attention_is_drawn_where_the_cells_look():
    """A ResNet whose input is one bright pixel answers most at the cell whose centre is nearest to it."""
    v = viewer_of(small_model(backbone="r18"))
    image = Image.new("RGB", (96, 64))
    image.putpixel((49, 33), (255, 255, 255))  # nearest to column 3, row 2, which are about pixels 48 and 32
    with torch.no_grad():
        grid, dark = (v.encode(i)[0].states[0] for i in (image, Image.new("RGB", (96, 64))))
    row, column = divmod(int((grid - dark).norm(dim=-1).argmax()), 6)
    rows, columns = v.attention(image)["centres"]
    assert (rows[row] * 64, columns[column] * 96) == pytest.approx((33, 49), abs=1)
    weights = torch.zeros(1, 24)
    weights[0, row * 6 + column] = 1
    white = Image.new("RGB", (96, 64), "white")
    drawn = np.asarray(draw_attention(white, "", [("", weights, [1.0], None)], (rows, columns), side=960).convert("L"))
    y, x = np.unravel_index(np.argmax(drawn[44:44 + 640, 16:16 + 960]), (640, 960))
    assert (y / 10, x / 10) == pytest.approx((33, 49), abs=1.5)


def test_labels_do_not_cover_one_another():
    things = [{"name": f"thing {n}", "attributes": ["small"], "score": 0.9, "query": n, "box": [30 + n, 40, 20, 20]}
              for n in range(3)]
    image = Image.new("RGB", (100, 100), (250, 250, 250))

    def white(*some):  # the labels' ground
        return (np.asarray(draw_answer(image, some)) == 255).all(-1).sum()

    assert white(*things) == pytest.approx(sum(map(white, things)), rel=0.02)


def test_watched_weights_are_those_the_model_uses():
    """Recomputed weights, applied to the values, give the module's own output, with padding too."""
    torch.manual_seed(0)
    attention, inputs = small_model().encoder[0].attention, torch.randn(3, 6, 32)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    with watched([attention]) as (seen,), torch.no_grad():
        kv = attention.keys_values(inputs, inputs)
        expected = attention(inputs, kv, mask)
        attention(inputs, kv)
        found = attention.out((seen[0] @ kv[1]).transpose(1, 2).flatten(2))
    assert len(seen) == 2 and torch.allclose(found, expected, atol=1e-6)
    assert (seen[0][1, :, :, 4:] == 0).all() and torch.allclose(seen[1].sum(-1), torch.ones(()))
    attention(inputs, kv)
    assert len(seen) == 2  # the hook is gone


@pytest.mark.parametrize("task,flags,says", [
    ("vqa", [], "--image alone: {} is fine-tuned for vqa; it can be asked --question, --attention"),
    ("", ["--question", "why?"], "--question: {} is pre-trained, and fine-tuned for no task; it can be asked --image "
     "alone (caption, objects with attributes), --sentence, --find, --attention"),
    ("caption", ["--find", "a dog"], "fine-tuned for caption; it can be asked --image alone (caption)"),
    ("nlvr2", ["--statement", "a", "--attention", "x"], "--attention: {} is fine-tuned for nlvr2"),
    ("flickr30k", ["--attention", "x"], "--attention: goes with --sentence or --question"),
    ("flickr30k", [], "it can be asked --sentence, --find, --attention"),
    ("", ["--find", "a", "--attention", "x"], "--attention: goes with --sentence or --question"),
    ("detection", ["--statement", "a"], "fine-tuned for detection"),
    ("", ["--find", "a", "--sentence", "b"], "--find, --sentence: give one of them"),
    ("", ["--find", " "], "--find: is empty"), ("", ["--find", "\udcff"], "--find '\\udcff': is no text"),
    ("", ["--image", ""], "--image: one of its names is empty"),
    ("", ["--data", "x"], "--image, --data: give one of them"),
    ("", ["--blind"], "--blind: goes with --data, not with --image"),
    ("", ["--threshold", "2"], "--threshold 2.0: must be from 0 to 1"),
    ("", ["--report", "x"], "--report, --image: give one of them"),
    ("", ["--statement", "x", "--score", "y"], "--score, --image: give one of them")])
def test_what_cannot_be_asked(ask, checkpoints, pictures, task, flags, says):
    code, said, wrong = ask(task, "--image", pictures[0], *flags)
    assert code == 2 and says.format(checkpoints(task)) in wrong and wrong.count("\n") == 1


@pytest.fixture
def partly(checkpoints, tmp_path):
    """A checkpoint as a run with other flags leaves it: partly(task, flag=value, ...)."""
    def make(task, **flags):
        state = torch.load(checkpoints(task), weights_only=True)
        state["args"].update(flags)
        torch.save(state, tmp_path / "partly.pt")
        return ["--checkpoint", tmp_path / "partly.pt"]
    return make


def test_what_was_never_trained_is_not_said(ask, partly, pictures, tmp_path):
    code, said, _ = ask("", *partly("", without=["caption", "attributes"]), "--image", pictures[0], "--threshold", 0,
                        "--json", tmp_path / "r.json")
    result, = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and "caption" not in result and all(o["attributes"] == [] for o in result["objects"])
    code, _, wrong = ask("", *partly("", without=["itm"]), "--image", pictures[0], "--find", "a dog")
    assert code == 2 and "it can be asked --image alone (caption, objects with attributes), --sentence" in wrong
    code, _, wrong = ask("", *partly("detection", text="none"), "--image", pictures[0], "--sentence", "a dog")
    assert code == 2 and "it can be asked --image alone (objects), --attention" in wrong
    code, _, wrong = ask("", *partly("detection", text="caption"), "--image", pictures[0])
    assert code == 0 and "give --sentence for better boxes" in wrong


def test_folders_and_names_of_all_kinds(ask, pictures, tmp_path):
    folder = tmp_path / "DIR"
    folder.mkdir()
    for name in ("a.jpg", ".hidden.jpg", "notes.h5", "b.PNG", "\udce4.jpg", "phone.heic"):
        shutil.copy(pictures[0], folder / name)
    (folder / "phone.heic").write_bytes(b"no")
    code, said, wrong = ask("caption", "--image", folder, "--json", tmp_path / "r.json")
    assert code == 2 and wrong.count("\n") == 1 and "phone.heic: not a picture" in wrong
    names = [os.path.basename(r["image"]) for r in json.loads((tmp_path / "r.json").read_text())]
    assert names == ["a.jpg", "b.PNG", "\udce4.jpg"]


def test_a_folder_that_cannot_be_read(ask, pictures, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(evaluate.os, "listdir", refuse)
    code, said, wrong = ask("caption", "--image", os.path.dirname(pictures[0]), pictures[0])
    assert code == 2 and "cannot be read (Permission denied)" in wrong and pictures[0] in said


def test_written_through_links_and_to_devices(ask, pictures, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert ask("caption", "--image", pictures[0], "--json", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text())
    assert ask("caption", "--image", pictures[0], "--json", "/dev/null")[0] == 0
    assert not os.path.isfile("/dev/null")


def test_flags_that_need_a_picture(ask):
    code, _, wrong = ask("", "--find", "a dog", "--data", "x")
    assert code == 2 and wrong == "evaluate.py: --find: goes with --image, not with --data\n"


def test_no_drawing_overwrites_another_or_an_input(ask, pictures, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(pictures[0]).save(tmp_path / folder / "same.png")
    before = (tmp_path / "a/same.png").read_bytes()
    code, *_ = ask("caption", "--image", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "a")
    assert code == 0 and (tmp_path / "a/same.png").read_bytes() == before
    drawn = [r["drawn"] for r in json.loads((tmp_path / "a/results.json").read_text())]
    assert [os.path.basename(d) for d in drawn] == ["same-2.png", "same-3.png"]


def test_a_rotated_photograph_stands_upright(ask, tmp_path):
    image = Image.new("RGB", (80, 40), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    code, said, _ = ask("caption", "--image", tmp_path / "turned.jpg")
    assert code == 0 and "turned.jpg (40 x 80)" in said


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (700, 2)])
def test_pictures_of_strange_shapes(ask, tmp_path, size):
    Image.new("L", size).save(tmp_path / "odd.png")
    code, said, wrong = ask("", "--image", tmp_path / "odd.png", "--output", tmp_path, "--threshold", 0)
    assert code == 0 and f"({size[0]} x {size[1]})" in said, wrong
