"""Inputs that are wrong, to every command: official files, result files, checkpoints, flags.

    python tests/fuzz.py --cases 300 --seed 1              # two minutes on two cores
    python tests/fuzz.py --seed 1 --only 17                # one case again, with all that it prints

A case is a command line about a tiny world, of which one file or flag is changed. It must end in
success, or with exit code 2 and one line that says what is wrong. Anything else is a fault: it is
printed, and the exit code is 1. A case is a function of the seed and its number.
"""

import argparse
import contextlib
import glob
import io
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from unittest import mock

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
import tasks  # noqa: E402

SCRIPTS = {"data": data, "evaluate": evaluate, "finetune": finetune, "pretrain": pretrain}
SECONDS = 60  # for a case; more is a hanging command
TINY = """--mini --workers 0 --minutes 0 --batch-size 4 --sentences-per-picture 1 --steps 1
    --index index --data data --device cpu --output out""".split()
TINY_MODEL = """--width 16 --heads 1 --feed-forward 16 --encoder-layers 1 --decoder-layers 1
    --queries 4""".split()
MEASURE = "--data data --index index --workers 0 --device cpu".split()
# What each command reads, what a result file is scored against, what a checkpoint is asked
COCO = "data/coco/annotations/*.json"
FILES = {"pretrain": [COCO, "data/*/dataset_*.json", "data/vocab.txt", "data/vg/*.json",
                      "data/vg/*.txt", "data/coco/*2017/*.jpg", "data/vg/VG_100K/*.jpg"],
         "vqa": ["data/vqa/*val2014*.json", "data/coco/val2017/*.jpg"],
         "nlvr2": ["data/nlvr2/dev.json", "data/nlvr2/images/dev/*.png"],
         "flickr30k": ["data/flickr30k/dataset_flickr30k.json", "data/flickr30k/*/*.jpg"],
         "detection": [COCO, "data/coco/val2017/*.jpg"]}
AGAINST = {"vqa": "data/vqa/v2_mscoco_val2014_annotations.json", "nlvr2": "data/nlvr2/dev.json",
           "flickr30k": "data/flickr30k/dataset_flickr30k.json",
           "detection": "data/coco/annotations/instances_val2017.json"}
ASKED = {"pretrain": ["", "--sentence star", "--find star"], "vqa": ["--question why?"],
         "nlvr2": ["--statement star"], "caption": [""], "detection": [""],
         "flickr30k": ["--find star", "--sentence star"]}


def make_kit(folder):
    """A world, a checkpoint of each kind and a result file of each task."""
    os.makedirs(f"{folder}/in")
    os.chdir(folder)
    torch.set_num_threads(1)
    shapes.write_world("data", seed=3, train=16, val=4, test=4)
    code, _, error = call("pretrain", [*TINY, *TINY_MODEL, "--steps", "2", "--val-pictures", "2"])
    assert not code, error
    os.rename("out", "runs")
    state = model.load_checkpoint("runs/last.pt")
    for name, task in tasks.TASKS.items():
        answers = ["False", "True"] if task.new_head else []
        config = {**vars(state["config"]), "task": name, "classifier_images": task.images,
                  "classifier_outputs": len(answers)}
        model.save_checkpoint(f"runs/{name}.pt", model.E2EVLP(model.Config(**config)),
                              state["vocabulary"], {**state["names"], "answers": answers},
                              args=state["args"], step=1)
    os.rename("runs/last.pt", "runs/pretrain.pt")
    images = sorted(glob.glob("data/coco/val2017/*.jpg"))
    shutil.copy(images[0], "in/a.jpg")
    Image.open(images[1]).save("in/b.png")
    for task in AGAINST:
        words = [*MEASURE, "--checkpoint", f"runs/{task}.pt", "--submit", f"in/{task}"]
        code, _, error = call("evaluate", words)
        assert not code, error


# --------------------------------------------------------------------------------------------------
# What is wrong with a file or a flag

ODD = [None, True, 0, -1, 1.5, 1e308, 10 ** 30, float("nan"), -float("inf"), "", "x", "a\nb",
       "\0", "../../a", "\ud800", "é" * 300, [], {}, [[]], [None], [1, 2, 3, 4], {"a": 1}]
NUMBERS = ("-1", "0", "1", "2.5", "nan", "inf", "1e308", "x", "", "1" + "0" * 400)
TEXTS = ("", "x", "missing/x", "data", "in/a.jpg", "in/vqa", "runs/vqa.pt", "a" * 300,
         "data/vocab.txt", "\udcff", "\x1b[2J", "é\nb")


def odd_bytes(rng, content):
    """What can happen to any file: cut, a bit flipped, bytes that are no UTF-8, empty, noise."""
    place = rng.randrange(max(1, len(content)))
    before, after = content[:place], content[place:]
    flipped = bytes([content[place] ^ 1 << rng.randrange(8)]) + after[1:] if content else b""
    return rng.choice([before, before + flipped, before + b"\xe9\xff" + after, b"",
                       rng.randbytes(500)])


def odd_record(rng, text):
    """A JSON text with one place of it changed."""
    tree = [json.loads(text)]
    parent, key = tree, 0
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.9:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    if parent is not tree and rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return json.dumps(tree[0]).encode()


def change_file(rng, path):
    """Make a file wrong, or remove it. The kit's own is only linked here."""
    with open(path, "rb") as file:
        content = file.read()
    os.remove(path)
    draw = rng.random()
    if draw < 0.05:
        return
    if draw < 0.3 or path.endswith((".pt", ".jpg", ".png", ".txt")) or path == "in/flickr30k":
        content = odd_bytes(rng, content)
    elif "nlvr2" in path:
        lines = content.splitlines()
        n = rng.randrange(len(lines))
        lines[n] = b"x,True" if path == "in/nlvr2" else odd_record(rng, lines[n])
        content = b"\n".join(lines)
    else:
        content = odd_record(rng, content)
    with open(path, "wb") as file:
        file.write(content)


def flags_of(script):
    """The flags of a command's own parser, as argparse's actions."""
    actions = []

    def catch(parser, *_):
        actions.extend(parser._actions)
        raise SystemExit

    with (mock.patch.object(argparse.ArgumentParser, "parse_args", catch),
          contextlib.suppress(SystemExit)):
        SCRIPTS[script].main([])
    return [action for action in actions
            if action.option_strings[:1] not in ([], ["-h"], ["--compile"], ["--workers"])]


def odd_flag(rng, script):
    """[a flag, its value]"""
    action = rng.choice(flags_of(script))
    values = [*action.choices, "x"] if action.choices else TEXTS if action.type is None else NUMBERS
    return [action.option_strings[0], *[str(rng.choice(values))] * (action.nargs != 0)]


# --------------------------------------------------------------------------------------------------
# The cases


def make_case(rng):
    """(script, its words, patterns of the files that it reads)."""
    way = rng.choice("data data score score score ask ask measure pretrain finetune".split())
    task = rng.choice(list(AGAINST))
    run = rng.choice(list(ASKED))
    if way == "data":
        return "data", ["--data", "data", "--index", "index"], FILES["pretrain"]
    if way == "score":
        words = ["--task", task, "--score", f"in/{task}", "--against", AGAINST[task]]
        return "evaluate", [*words, "--split", "val"], [f"in/{task}", AGAINST[task]]
    if way == "ask":
        words = ["--checkpoint", f"runs/{run}.pt", "--image", "in/a.jpg", "in/b.png", "--beam", "1",
                 "--device", "cpu", *rng.choice(ASKED[run]).split()]
        return "evaluate", words, [f"runs/{run}.pt", "in/?.*"]
    if way == "measure":
        words = [*MEASURE, "--checkpoint", f"runs/{task}.pt", "--submit", "results"]
        return "evaluate", words, [f"runs/{task}.pt", *FILES[task]]
    if way == "pretrain":
        words = rng.choice(([*TINY, *TINY_MODEL, "--val-pictures", "2"],
                            ["--resume", "runs/pretrain.pt", "--steps", "3", "--index", "index"]))
        return "pretrain", words, [*FILES["pretrain"], "runs/pretrain.pt"]
    words = ["--task", task, *TINY, "--init", "runs/pretrain.pt", "--negatives", "2",
             "--val-examples", "2"]
    return "finetune", words, [*FILES[task], "runs/pretrain.pt"]


def too_long(number, frame):
    raise TimeoutError(f"more than {SECONDS} s")


def call(script, words):
    """(exit code, what is printed, errors) of a command in this process."""
    sys.argv = [f"{script}.py"]  # argparse's name for the command
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = SCRIPTS[script].main(words)
        except SystemExit as ended:  # argparse's
            code = ended.code
        except BaseException:
            code = 1
            traceback.print_exc()
    signal.alarm(0)
    for number in data.SIGNALS:  # a training notes SIGTERM, with which the pool ends its processes
        signal.signal(number, signal.SIG_DFL)
    return code, out.getvalue(), err.getvalue()


def run_case(seed, number, kit):
    """("succeeded", "refused" or "fault", a report)."""
    rng = random.Random(f"{seed} {number}")
    script, words, files = make_case(rng)
    folder = tempfile.mkdtemp(dir=os.path.dirname(kit))
    # Files are linked: whoever writes one writes another file and renames it
    shutil.copytree(kit, folder, copy_function=os.link, dirs_exist_ok=True)
    os.chdir(folder)
    changed = ""
    if rng.random() < 0.75:
        changed = rng.choice(sorted(glob.glob(rng.choice(files))))
        change_file(rng, changed)
    else:
        words += odd_flag(rng, script)
    code, out, err = call(script, words)
    os.chdir(kit)
    shutil.rmtree(folder)

    end = "fault"
    if code == 0:
        end = "succeeded"
    elif code == 2 and err.strip().split("\n")[-1].startswith(f"{script}.py: "):
        end = "refused"  # and the last line says why
    report = (f"case {number}: {end}, exit code {code}\n  python {script}.py {shlex.join(words)}\n"
              f"  {changed}\n{out[-500:]}\n{err[-3000:]}")
    return end, report.encode("utf-8", "backslashreplace").decode()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Wrong inputs to every command.")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone, with all that it prints")
    args = parser.parse_args(argv)
    numbers = range(args.cases) if args.only is None else [args.only]
    ends = {"succeeded": 0, "refused": 0, "fault": 0}
    # Forks made before anything is computed: torch's gradients do not work in a fork of a process
    # that has computed some
    with (tempfile.TemporaryDirectory() as place,
          multiprocessing.get_context("fork").Pool(2) as pool):
        kit = os.path.join(place, "kit")
        pool.apply(make_kit, [kit])
        jobs = [pool.apply_async(run_case, (args.seed, number, kit)) for number in numbers]
        for job in jobs:
            end, report = job.get()
            ends[end] += 1
            if end == "fault" or args.only is not None:
                print(report, flush=True)
    print(f"{len(numbers)} cases: {ends['succeeded']} succeeded, {ends['refused']} refused, "
          f"{ends['fault']} faults")
    return int(ends["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
