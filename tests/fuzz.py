"""Hostile inputs to every command: broken files of each kind that it reads, odd values of each flag that it has.

    python tests/fuzz.py --cases 2000 --seed 1                 # about 20 minutes on one core
    python tests/fuzz.py --seed 1 --only 17 --keep kept        # one case again, with all that it prints

A case is a command line, and mostly a file of its inputs or a flag that is made wrong. It is a pure function of the
seed and the case's number. It must end in success, or with exit code 2 and a message of three lines at most that names
the file or the flag; within a minute and 2 GB; and nothing may be written but what the command was told to write.
Anything else is a fault: it is printed with its number, command line and output, and the exit code is 1.

Importing torch takes seconds, so nearly all cases run in a fork of this process, which has imported it and never
computes with more than one thread (a fork has none of its parent's threads). One in twenty is a real command line.
"""

import argparse
import contextlib
import glob
import io
import json
import os
import random
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: E402
import evaluate  # noqa: E402
import finetune  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import shapes  # noqa: E402

SCRIPTS = {"data": data, "evaluate": evaluate, "finetune": finetune, "model": model, "pretrain": pretrain,
           "shapes": shapes}
SECONDS, MEMORY = 60, 2e9  # what a case may take
# The preset made as small as it gets; a step and a validation on few pictures. --epochs: for a case of --steps 0
TINY = ("--mini --workers 0 --minutes 0 --batch-size 4 --sentences-per-picture 1 --warmup 0 --log-every 1 --steps 1 "
        "--epochs 0.01 --device cpu").split()
TINY_MODEL = "--width 32 --heads 2 --feed-forward 64 --encoder-layers 1 --decoder-layers 1 --queries 8".split()

COCO = [f"data/coco/annotations/{what}_{split}2017.json" for what in ("instances", "captions")
        for split in ("train", "val")]
SPLITS = ["data/coco/dataset_coco.json", "data/flickr30k/dataset_flickr30k.json"]
PRETRAINING = [*COCO, *SPLITS, "data/vocab.txt", "data/coco/*2017/*.jpg", "data/vg/VG_100K*/*.jpg",
               *(f"data/vg/{name}" for name in ("image_data.json", "objects.json", "attributes.json",
                                                "region_descriptions.json", "objects_vocab.txt",
                                                "attributes_vocab.txt"))]
VQA = "data/vqa/v2_{}mscoco_{}2014_{}.json"
TASK_FILES = {
    "vqa": [VQA.format(*part) for split in ("train", "val") for part in (
        ("OpenEnded_", split, "questions"), ("", split, "annotations"))] + ["data/coco/*2017/*.jpg"],
    "nlvr2": ["data/nlvr2/train.json", "data/nlvr2/dev.json", "data/nlvr2/images/dev/*", "data/nlvr2/images/train/*/*"],
    "caption": [SPLITS[0], "data/coco/*2017/*.jpg"],
    "flickr30k": [SPLITS[1], "data/flickr30k/flickr30k-images/*.jpg"],
    "detection": [*COCO, "data/coco/*2017/*.jpg"]}
AGAINST = {"vqa": VQA.format("", "val", "annotations"), "nlvr2": "data/nlvr2/dev.json", "caption": COCO[3],
           "flickr30k": SPLITS[1], "detection": COCO[1]}
RESULTS = {"vqa": "in/vqa.json", "nlvr2": "in/nlvr2.csv", "caption": "in/caption.json", "flickr30k": "in/flickr30k.npy",
           "detection": "in/detection.json"}
OWN = {"pretrain": ["", "--sentence 'a red circle'", "--find 'a red circle'", "--attention out/looks",
                    "--sentence 'a star' --attention out/looks"],
       "vqa": ["--question 'what colour is the star?'", "--question 'why?' --attention out/looks"],
       "nlvr2": ["--statement 'both have a circle'"], "caption": [""], "detection": ["", "--sentence 'a star'"],
       "flickr30k": ["--find 'a circle'", "--sentence 'a circle'"]}


@dataclass
class Case:
    number: int
    name: str            # of the command and its way
    script: str
    words: list          # its command line
    files: list          # what it reads, as patterns of paths
    may: list            # the paths below which it may write
    kind: str = "as it is"
    culprits: tuple = ()  # a refusal must name one of them
    changed: tuple = ()  # the files that were changed
    real: bool = False   # a command line of its own, not a fork


# ----------------------------------------------------------------------------------------------------------------
# The kit: a world, a checkpoint of each kind and result files, made once; each case has a copy of it


def make_kit(folder):
    """FOLDER/data, FOLDER/runs/pretrain and one of each task, FOLDER/in: pictures and result files."""
    os.makedirs(f"{folder}/in")
    os.chdir(folder)
    shapes.write_world("data", seed=3, train=32, val=6, test=6)
    common = [*TINY, "--steps", "2", "--data", "data", "--index", "index"]
    for script, run, words in [("pretrain", "pretrain", TINY_MODEL)] + [
            ("finetune", task, ["--task", task, "--init", "runs/pretrain/last.pt", "--negatives", "2"])
            for task in model.TASKS]:
        if SCRIPTS[script].main([*common, *words, "--output", f"runs/{run}"]):
            raise SystemExit(f"no {run}")
    shutil.rmtree("index")
    pictures = sorted(glob.glob("data/coco/val2017/*.jpg"))
    shutil.copy(pictures[0], "in/a.jpg")
    Image.open(pictures[1]).save("in/b.png")
    load = {task: json.load(open(path)) for task, path in AGAINST.items() if task != "nlvr2"}
    lines = [json.loads(line)["identifier"] for line in open(AGAINST["nlvr2"])]
    images = [image["id"] for image in load["detection"]["images"]]
    for name, value in (
            ("vqa", [{"question_id": r["question_id"], "answer": "yes"} for r in load["vqa"]["annotations"]]),
            ("caption", [{"image_id": i, "caption": "a red circle"} for i in images]),
            ("detection", [{"image_id": i, "category_id": 1, "bbox": [1, 2, 30, 20.5], "score": 0.5} for i in images]),
            ("answers", ["yes", "no", "2", "red"])):
        with open(f"in/{name}.json", "w") as file:
            json.dump(value, file)
    with open(RESULTS["nlvr2"], "w") as file:
        file.writelines(f"{line},True\n" for line in lines)
    np.save(RESULTS["flickr30k"], np.random.default_rng(0).random((6, 30), np.float32))
    resnet = torch.load("runs/pretrain/last.pt", weights_only=True)["model"]
    torch.save({key.removeprefix("backbone.resnet."): value for key, value in resnet.items() if "resnet" in key},
               "in/resnet.pth")


def copy_kit(kit, folder):
    """A case's own copy. Large files are linked: whoever writes them writes another file and renames it."""
    for place, _, names in os.walk(kit):
        there = os.path.join(folder, os.path.relpath(place, kit))
        os.makedirs(there, exist_ok=True)
        for name in names:
            path = os.path.join(place, name)
            (shutil.copy if os.path.getsize(path) < 200_000 else os.link)(path, os.path.join(there, name))
    os.mkdir(os.path.join(folder, "tmp"))


def snapshot(folder):
    """{path below the folder: (size, time)} of all files, and (0, 0) of folders."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            status = os.lstat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), folder)] = (
                (0, 0) if name in folders else (status.st_size, status.st_mtime_ns))
    return found


# ----------------------------------------------------------------------------------------------------------------
# What is wrong with a file

ODD = [None, True, False, 0, -1, 1, 1.5, 1e308, -1e308, 10 ** 18, 10 ** 30, -10 ** 30, 10 ** 400, float("nan"),
       float("inf"), -float("inf"), "", "x", " ", "yes", "1", "-1", "a\nb", "\0", "\ud800", "é" * 300, "0" * 5000,
       [], {}, [[]], [None], [1, 2, 3, 4], [{}], {"a": 1}, [float("nan")] * 4, "DEEP", "LONG"]


def dumped(value):
    """JSON text; of the odd values two have no place in a Python object: too deep, and too many digits."""
    text = json.dumps(value)
    return text.replace('"DEEP"', "[" * 100_000 + "]" * 100_000).replace('"LONG"', "9" * 5000).encode()


def damaged(rng, content):
    """(what is wrong, bytes): what can happen to any file."""
    kind = rng.choice(("cut", "flipped", "empty", "zeros", "noise", "text", "utf-16", "latin-1"))
    place = rng.randrange(max(1, len(content)))
    if kind == "cut":
        return kind, content[:place]
    if kind == "flipped":
        content = bytearray(content)
        for _ in range(rng.choice((1, 1, 10, 100)) if content else 0):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return kind, bytes(content)
    if kind == "utf-16":
        return kind, content[:100_000].decode("latin-1").encode("utf-16")
    if kind == "latin-1":
        return kind, content[:place] + b"\xe9\xff" + content[place:]
    return kind, {"empty": b"", "zeros": bytes(100), "noise": rng.randbytes(500), "text": b"no such thing\n"}[kind]


def odd_tree(rng, value):
    """(what is wrong, value): a JSON value or a state with one place of it changed."""
    parent, key, node = None, None, value
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.85):
        parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    kind = rng.choice(("odd value", "odd value", "odd value", "missing", "doubled", "another kind"))
    if parent is None:
        return "odd value", rng.choice(ODD)
    if kind == "missing":
        del parent[key]
    elif kind == "doubled" and isinstance(parent, list):
        parent.append(node)
    elif kind == "another kind" and not torch.is_tensor(node):
        parent[key] = float(node) if isinstance(node, int) else [node] if isinstance(node, str) else str(node)
    else:
        kind, parent[key] = "odd value", rng.choice(ODD)
    return kind, value


def odd_lines(rng, content, records):
    """(what is wrong, bytes) of a text file of lines; records: each is JSON."""
    lines = content.decode().split("\n")
    n = rng.randrange(max(1, len(lines) - 1))
    kind = rng.choice(("missing", "doubled", "blank", "long", "CRLF", "odd value", "odd value"))
    if kind == "odd value" and records:
        kind, value = odd_tree(rng, json.loads(lines[n]))
        lines[n] = dumped(value).decode()
    elif kind == "missing":
        del lines[n]
    elif kind == "doubled":
        lines.insert(n, lines[n])
    elif kind == "CRLF":
        lines = [f"{line}\r" for line in lines]
    else:
        lines[n] = {"blank": "", "long": "x" * 100_000}.get(kind) or rng.choice(("\0", ",,,", "é", " ", "-1", "[UNK]"))
    return kind, "\n".join(lines).encode()


def odd_picture(rng, content):
    """(what is wrong, bytes): a picture that Pillow may read, of a kind that few have thought of."""
    kind = rng.choice(("CMYK", "16 bits", "palette", "transparent", "1 bit", "float", "YCbCr", "moving", "1 x N",
                       "N x 1", "1 x 1", "huge head", "odd EXIF", "bitmap"))
    image, file = Image.open(io.BytesIO(content)).convert("RGB"), io.BytesIO()
    if kind == "huge head":
        image.save(file, "PNG")
        head = bytearray(file.getvalue())
        head[16:24] = struct.pack(">II", *rng.choice(((60_000, 60_000), (2 ** 31 - 1, 1), (0, 5), (1, 2 ** 32 - 1))))
        return kind, bytes(head)
    if kind in ("1 x N", "N x 1", "1 x 1"):
        image = image.resize({"1 x N": (1, 3000), "N x 1": (3000, 1), "1 x 1": (1, 1)}[kind])
    mode = {"CMYK": "CMYK", "16 bits": "L", "palette": "P", "transparent": rng.choice(("RGBA", "LA")), "1 bit": "1",
            "float": "F", "YCbCr": "YCbCr"}.get(kind, "RGB")
    image, more = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode), {}
    if kind == "16 bits":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    if kind == "moving":
        more = {"save_all": True, "append_images": [image.rotate(90)]}
    if kind == "odd EXIF":
        rotation = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"  # 99: there is none such
        more = {"exif": b"Exif\0\0" + rng.choice((rng.randbytes(40), rotation))}
    image.save(file, {"CMYK": "JPEG", "YCbCr": "JPEG", "float": "TIFF", "moving": "GIF", "bitmap": "BMP",
                      "odd EXIF": "JPEG"}.get(kind, "PNG"), **more)
    return kind, file.getvalue()


class Code:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def odd_state(rng, path):
    """(what is wrong, bytes) of a checkpoint."""
    state, file = torch.load(path, weights_only=True), io.BytesIO()
    weights = state["model"] if "model" in state else state
    kind = rng.choice(("config", "config", "config", "vocabulary", "names", "args", "args", "weights", "weights", "NaN",
                       "a key", "missing", "code", "no dictionary", "optimizer"))
    if kind == "code":
        if rng.random() < 0.5:
            torch.save({"format": Code()}, file, _use_new_zipfile_serialization=False)  # as before torch 1.6
            return kind, file.getvalue()
        state["format"] = Code()
    elif kind == "no dictionary":
        state = rng.choice(([1], "x", torch.zeros(3), None))
    elif kind == "missing":
        del state[rng.choice(list(state))]
    elif kind == "NaN":
        tensor = weights[rng.choice([k for k, v in weights.items() if v.is_floating_point() and v.numel()])]
        tensor[tuple(map(rng.randrange, tensor.shape))] = rng.choice((float("nan"), float("inf")))
    elif kind == "weights":
        key = rng.choice(list(weights))
        change = rng.choice(("missing", "more", "shape", "type", "odd"))
        if change == "missing":
            del weights[key]
        elif change == "more":
            weights["another"] = torch.zeros(2)
        else:
            weights[key] = {"shape": weights[key][None], "type": weights[key].to(torch.complex64),
                            "odd": rng.choice(ODD)}[change]
    elif kind in state and rng.random() < 0.9:
        state[kind] = odd_tree(rng, state[kind])[1]
    else:
        state[rng.choice(list(state))] = rng.choice(ODD)
    torch.save(state, file)
    return kind, file.getvalue()


def odd_matrix(rng, content):
    """(what is wrong, bytes) of an .npy file."""
    kind = rng.choice(("NaN", "shape", "huge head", "objects", "words", "archive", "complex", "no rows"))
    file, matrix = io.BytesIO(), np.load(io.BytesIO(content))
    if kind == "huge head":
        return kind, content.replace(b"(6, 30)", b"(6" + b"0" * rng.choice((8, 20)) + b", 30)", 1).replace(
            b"                            \n", b"\n", 1)
    if kind == "archive":
        np.savez(file, matrix)
        return kind, file.getvalue()
    if kind == "NaN":
        matrix[rng.randrange(6), rng.randrange(30)] = rng.choice((float("nan"), float("inf")))
    np.save(file, {"shape": matrix[:, 1:], "objects": np.array([[{}] * 30] * 6), "words": matrix.astype(str),
                   "complex": matrix.astype(complex), "no rows": matrix[:0]}.get(kind, matrix), allow_pickle=True)
    return kind, file.getvalue()


def change(rng, path):
    """Make a file wrong; returns what is wrong with it. Its name is kept, its inode is not: others are linked to it."""
    with open(path, "rb") as file:
        content = file.read()
    ending = os.path.splitext(path)[1]
    lines = ending in (".txt", ".csv", ".jsonl") or "data/nlvr2" in path
    what = {".json": "JSON", ".jpg": "picture", ".png": "picture", ".pt": "checkpoint", ".pth": "checkpoint",
            ".npy": "matrix"}.get(ending, "lines")
    draw = rng.random()
    if draw < 0.1:
        os.remove(path)
        if draw < 0.05:
            os.mkdir(path)
        return f"{what}: {'a folder' if draw < 0.05 else 'not there'}"
    if draw < 0.35:
        kind, content = damaged(rng, content)
    elif what == "picture":
        kind, content = odd_picture(rng, content)
    elif what == "checkpoint":
        kind, content = odd_state(rng, path)
    elif what == "matrix":
        kind, content = odd_matrix(rng, content)
    elif lines:
        kind, content = odd_lines(rng, content, ending not in (".txt", ".csv"))
    else:
        kind, value = odd_tree(rng, json.loads(content))
        content = dumped(value)
    os.remove(path)
    with open(path, "wb") as file:
        file.write(content)
    return f"{what}: {kind}"


# ----------------------------------------------------------------------------------------------------------------
# What is wrong with a flag


class Caught(BaseException):
    """Brings a parser's flags out of a command, past what it catches."""


def flags_of(script):
    """The flags of a command, from its own parser, so that a new flag is tried too."""
    def catch(parser, *_):
        raise Caught(parser._actions)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            SCRIPTS[script].main([])
        except Caught as caught:
            # Compiling takes minutes, whatever the input
            return [a for a in caught.args[0] if a.option_strings and a.option_strings[0] not in ("-h", "--compile")]


NUMBERS = ("-1", "0", "1", "3", "2.5", "nan", "inf", "-inf", "1e308", "1e-308", "x", "", "0x10", "99999999999999999999",
           "-99999999999999999999", "1" + "0" * 400)
TEXTS = ("", " ", "x", "missing/x", "in", "data", "in/a.jpg", "in/vqa.json", "runs/vqa/best.pt", "data/vocab.txt", "-",
         "a" * 300, "a/" * 3000, "\udcff", "\x1b[2J", "out/new", "é\nb")


WRITES = ("--json", "--submit", "--sheet", "--index", "--output", "--attention", "--report", "--data")


def odd_flag(rng, action):
    """[the flag, its values]."""
    if action.nargs == 0:
        return [action.option_strings[0]]
    one = (rng.choice([*map(str, action.choices), "x", ""]) if action.choices else
           rng.choice(NUMBERS if action.type in (int, float) or rng.random() < 0.1 else TEXTS))
    few = rng.choice((0, 1, 1, 2)) if action.nargs == "+" else 1
    return [action.option_strings[0], *[one] * few]


# ----------------------------------------------------------------------------------------------------------------
# The cases


def own_case(rng):
    """A question about pictures of one's own."""
    run = rng.choice(list(OWN))
    asked = shlex.split(rng.choice(OWN[run]))
    file = rng.choice([f"runs/{run}/last.pt"] + [f"runs/{run}/best.pt"] * (run != "pretrain"))
    images = ["in/a.jpg", "in/b.png"][:1 if "--attention" in asked else 2]
    if run != "nlvr2" and "--attention" not in asked:  # they take two pictures, and one
        images = rng.choice((images, images, ["in/a.jpg"], ["-"], ["in"]))
    words = ["--checkpoint", file, "--image", *images, *asked, "--beam", "2", "--device", "cpu"]
    return f"evaluate --image, {run}", "evaluate", words + ["--output", "out"] * ("--attention" not in asked), [
        file, *({"-": [], "in": ["in/a.jpg", "in/b.png"] * 2}.get(images[0], images * 2))], ["out"]


def data_case(rng):
    words = ["--data", "data", *rng.choice(([], ["--index", "index"])), *rng.choice(([], ["--json", "out/data.json"]))]
    return "data", "data", words, sorted({*PRETRAINING, *sum(TASK_FILES.values(), [])}), ["index", "data/.index", "out"]


def pretrain_case(rng):
    if rng.random() < 0.25:
        file = "runs/pretrain/last.pt"
        return "pretrain --resume", "pretrain", ["--resume", file, "--steps", "3", "--epochs", "1"], [
            *[file] * 8, "runs/pretrain/log.jsonl", "runs/pretrain/report.json", *PRETRAINING], [
            "index", "data/.index", "runs/pretrain"]
    plan, weights = rng.random() < 0.2, rng.random() < 0.2
    words = [*TINY, *TINY_MODEL, "--data", "data", "--index", "index", "--val-pictures", "4", "--output", "out",
             *["--plan"] * plan, *["--backbone-weights", "in/resnet.pth"] * weights]
    return f"pretrain{' --plan' * plan}", "pretrain", words, [*PRETRAINING, *["in/resnet.pth"] * 8 * weights], [
        "index", "out"]


def finetune_case(rng):
    task = rng.choice(model.TASKS)
    if rng.random() < 0.25:
        run = f"runs/{task}"
        return f"finetune --resume, {task}", "finetune", ["--resume", f"{run}/last.pt", "--steps", "3"], [
            *[f"{run}/last.pt"] * 6, f"{run}/best.pt", f"{run}/log.jsonl", f"{run}/report.json", *TASK_FILES[task]], [
            "index", "data/.index", run]
    fresh = rng.random() < 0.2
    words = ["--task", task, *TINY, "--data", "data", "--index", "index", "--output", "out", "--negatives", "2",
             "--init", *(["none", *TINY_MODEL] if fresh else ["runs/pretrain/last.pt"]),
             *["--answers", "in/answers.json"] * (task == "vqa")]
    return f"finetune{' --init none' * fresh}, {task}", "finetune", words, [
        *TASK_FILES[task], *(["data/vocab.txt"] * 2 if fresh else ["runs/pretrain/last.pt"] * 3),
        *["in/answers.json"] * 2 * (task == "vqa")], ["index", "out"]


def measure_case(rng):
    run = rng.choice(list(OWN))
    file = f"runs/{run}/last.pt"
    words = ["--checkpoint", file, "--data", "data", "--index", "index", "--examples", "4", "--json", "out/scores.json",
             "--device", "cpu"]
    if run == "pretrain":
        words += ["--sheet", "out/sheet.png"]
    else:
        words += ["--task", run, "--beam", "1", *rng.choice(([], ["--submit", "out/results"], ["--blind"]))]
    return f"evaluate --data, {run}", "evaluate", words, [
        *[file] * 5, *(PRETRAINING if run == "pretrain" else TASK_FILES[run])], ["index", "out"]


def score_case(rng):
    task = rng.choice(model.TASKS)
    words = ["--task", task, "--score", RESULTS[task], "--against", AGAINST[task], "--json", "out/scores.json"]
    files = [RESULTS[task]] * 2 + [AGAINST[task]]
    if task == "vqa" and rng.random() < 0.5:
        files.append(VQA.format("OpenEnded_", "val", "questions"))
        words += ["--questions", files[-1]]
    return f"evaluate --score, {task}", "evaluate", words, files, ["out"]


def report_case(rng):
    runs = rng.sample([f"runs/{run}" for run in OWN], rng.choice((1, 2)))
    return "evaluate --report", "evaluate", ["--report", *runs, *["--output", "out"] * (len(runs) > 1)], [
        f"{runs[0]}/log.jsonl", f"{runs[0]}/report.json"], ["out", *runs]


def shapes_case(rng):
    return "shapes", "shapes", ["--output", "out/world", "--train", "16", "--val", "1", "--test", "2"], [], ["out"]


def model_case(rng):
    return "model", "model", ("--backbone r18 --stride 16 --height 64 --width 96 --words 9 --encoder-layers 1 "
                              "--decoder-layers 1").split(), [], []


CASES = {data_case: 20, own_case: 20, score_case: 20, report_case: 8, measure_case: 10, pretrain_case: 10,
         finetune_case: 12, shapes_case: 3, model_case: 3}


def make_case(seed, number, kit, folder, flags):
    """A case in its folder, ready to run."""
    rng = random.Random(f"{seed} {number}")
    case = Case(number, *rng.choices(list(CASES), CASES.values())[0](rng), real=rng.random() < 0.05)
    copy_kit(kit, folder)
    os.makedirs(os.path.join(folder, "out"), exist_ok=True)
    draw = rng.random()
    if draw < 0.03:
        return case
    if draw < 0.3 or not case.files:
        actions = [rng.choice(flags[case.script]) for _ in range(rng.choice((1, 1, 1, 2)))]
        case.kind, case.culprits = "a flag", tuple(a.option_strings[0] for a in actions)
        for action in actions:
            flag, *values = odd_flag(rng, action)
            case.words += [flag, *values]
            # or the file that it names, which is printed without control characters and may be cut
            case.culprits += tuple(f"{value!r:.100}"[1:].rstrip("'") for value in values if value)
            if action.choices:  # another task, say, which then does not go with one of the files
                case.culprits += tuple(word for word in case.words if "." in word and "/" in word)
            if flag in WRITES:  # then it is told to write there, and may make the folders above
                case.may += [os.path.normpath(value) for value in values] + [f"{value}/.index" for value in values] + [
                    value.split("/")[0] for value in values if value.startswith("missing/")]
            elif flag == "--resume":
                case.may += [os.path.dirname(value) for value in values]
        return case
    patterns = [os.path.join(folder, pattern) for pattern in case.files]
    path = rng.choice(sorted(glob.glob(rng.choice(patterns))))
    case.changed = (path,)
    case.kind, case.culprits = change(rng, path), (os.path.basename(path),)
    if "--score" in case.words:  # what one of the two files lacks, the other one has too much
        case.culprits += tuple(map(os.path.basename, case.files))
    return case


def child(case, folder):
    """What the fork does: runs the command in the case's folder, and never returns."""
    os.setsid()
    os.chdir(folder)
    torch.set_num_threads(1)  # here: the thread pool that this makes does not live through a fork
    os.environ.update(TMPDIR=os.path.join(folder, "tmp"), HOME=os.path.join(folder, "tmp"), OMP_NUM_THREADS="1")
    given = "in/a.jpg" if os.path.isfile("in/a.jpg") else os.devnull
    for number, path, how in ((0, given, os.O_RDONLY), (1, "../stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                              (2, "../stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, how), number)
    if case.real:
        os.execv(sys.executable, [sys.executable, "-B", f"{ROOT}/{case.script}.py", *case.words])
    tempfile.tempdir, sys.argv = None, [f"{case.script}.py", *case.words]
    code = 1
    try:
        code = SCRIPTS[case.script].main(case.words)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def run_case(case, folder):
    """(exit code, stdout, stderr, [what was wrong with the run])."""
    before, started, wrong = snapshot(folder), time.time(), []
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(case, folder)
    page, killed = os.sysconf("SC_PAGESIZE"), False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
            if not killed and int(file.read().split()[1]) * page > MEMORY:
                killed = os.kill(pid, signal.SIGKILL) is None
        if not killed and time.time() - started > SECONDS:
            wrong.append(f"took more than {SECONDS} s")
            killed = os.kill(pid, signal.SIGKILL) is None
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # loaders that are still there
        os.killpg(pid, signal.SIGKILL)
    if usage.ru_maxrss * 1024 > MEMORY:
        wrong.append(f"took {usage.ru_maxrss / 1e6:.1f} GB")
    after = snapshot(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path) and not any(
        path == may or path.startswith(f"{may}/") for may in case.may))
    if changed:
        wrong.append(f"changed {', '.join(changed[:5])}")
    said = []
    for name in ("stdout", "stderr"):
        with open(os.path.join(os.path.dirname(folder), name), errors="surrogateescape") as file:
            said.append(file.read())
    return os.waitstatus_to_exitcode(status), *said, wrong


def judge(case, code, out, err):
    """[what is wrong with how it ended]."""
    if code == 0:
        return ["a traceback"] if "Traceback (most" in out + err else []
    if code != 2:
        return [f"exit code {code}"]
    message = err[err.rindex(f"{case.script}.py: error:"):] if err.startswith("usage:") and ": error:" in err else err
    return [says for says, wrong in (
        ("a traceback", "Traceback (most" in out + err), ("no message", not message.strip()),
        (f"{len(message.splitlines())} lines of message", len(message.splitlines()) > 3),
        (f"{len(message)} characters of message", len(message) > 8000),
        ("a message that names none of " + ", ".join(case.culprits),
         not any(culprit in message for culprit in case.culprits))) if wrong]


def main():
    parser = argparse.ArgumentParser(description="Hostile inputs to every command.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="this case alone, with all that it prints")
    parser.add_argument("--keep", metavar="DIR", help="folder for the changed files of the cases with faults")
    parser.add_argument("--kit", metavar="DIR", help="where the kit is, or is to be kept")
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.cases) if args.only is None else [args.only]
    faults, ends, names, kinds = 0, Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as place:
        kit, keep = os.path.abspath(args.kit or f"{place}/kit"), args.keep and os.path.abspath(args.keep)
        if not os.path.isdir(f"{kit}/in"):
            # In a fork too, since training computes; what it writes is not below its folder
            os.makedirs(f"{place}/first/tmp")
            SCRIPTS["kit"] = argparse.Namespace(main=lambda _: make_kit(kit) or 0)
            code, out, err, _ = run_case(Case(0, "kit", "kit", [], [], []), f"{place}/first")
            if code:
                sys.exit(f"the kit cannot be made\n{out}\n{err}")
        flags = {script: flags_of(script) for script in SCRIPTS if script != "kit"}
        for number in numbers:
            folder = os.path.join(place, "case")
            case = make_case(args.seed, number, kit, folder, flags)
            code, out, err, wrong = run_case(case, folder)
            wrong += judge(case, code, out, err)
            ends[code] += 1
            names[case.name] += 1
            kinds[case.kind] += 1
            if wrong or args.only is not None:
                faults += bool(wrong)
                line = shlex.join(["python", f"{case.script}.py", *case.words])
                tail = (lambda text: text) if args.only is not None else (lambda text: text[-1500:])
                report = (f"case {number}: {'; '.join(wrong) or 'as it should be'}\n  {line[:1000]}\n  {case.kind}: "
                          f"{' '.join(os.path.relpath(path, folder) for path in case.changed) or case.culprits}\n"
                          f"  exit code {code}\n{tail(out)}\n{tail(err)}\n")
                print(report.encode("utf-8", "backslashreplace").decode(), flush=True)
                if keep:
                    os.makedirs(f"{keep}/{number}", exist_ok=True)
                    with open(f"{keep}/{number}/case.txt", "w", errors="backslashreplace") as file:
                        file.write(report)
                    for path in filter(os.path.isfile, case.changed):
                        shutil.copy(path, f"{keep}/{number}")
            shutil.rmtree(folder)
    for title, counts in (("commands", names), ("changes", kinds)):
        print(f"{title}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print(f"{len(numbers)} cases: {ends[0]} succeeded, {ends[2]} refused with a message, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
