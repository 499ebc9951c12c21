"""Each command of the README runs: as it stands there, with small data and a small model appended."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import tables
from conftest import ROOT, TINY, run_command
from PIL import Image

MODEL = ["--backbone", "r18", "--backbone-weights", "none", "--stride", "16", "--queries", "8"]
SMALL = [*TINY[1:], *MODEL, "--short-sides", "64", "--long-side", "96", "--steps", "1", "--device", "cpu"]
TUNE = ["--data", "DIR", "--batch-size", "8", "--negatives", "2", "--steps", "1", "--workers", "0", "--minutes", "0",
        "--short-sides", "64", "--long-side", "96", "--device", "cpu"]


def commands():
    """The README's command lines without what is installed before and what is said after, in their order."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        lines = [line.strip().split("&& ")[-1] for line in file if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "torchrun ", "cat "))]


def a_task_of_your_own():
    """The program in the README's section of that name."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        section = file.read().split("## Add a task of your own\n")[1].split("\n## ")[0]
    return [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]


def test_every_command_runs(world, tmp_path):
    found = commands()
    assert len(found) >= 10 and sum(words[0] == "torchrun" for words in found) >= 2
    shutil.copytree(world, tmp_path / "DIR")
    picture = sorted((tmp_path / "DIR/coco/val2017").iterdir())[0]
    shutil.copy(picture, tmp_path / "a.jpg")
    Image.open(picture).save(tmp_path / "b.png")
    for words in found:
        given = os.devnull
        if "runs/mini-nlvr2/best.pt" in words:  # vqa stands for the miniature's five fine-tunings
            shutil.copytree(tmp_path / "runs/nlvr2", tmp_path / "runs/mini-nlvr2")
        if words[0] == "cat":
            assert words[2] == "|"
            given, words = tmp_path / words[1], words[3:]
        if "pytest" in words:
            continue
        launch = []
        if words[0] == "torchrun":
            launch += ["-m", "torch.distributed.run"]
            if words[1].startswith("--nnodes"):
                assert words[1:5] == ["--nnodes=2", "--nproc_per_node=8", "--rdzv_backend=c10d",
                                      "--rdzv_endpoint=HOST:29500"]
                launch += ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:29512"]
                words = words[4:]
            else:
                assert words[1] == "--nproc_per_node=8"
                launch += ["--standalone", "--nproc_per_node=2"]
                words = words[1:]
        script, flags = words[1], words[2:]
        if script == "tests/tables.py":  # what it prints is tested beside it
            assert flags[-1] == "--dry-run" and tables.main(flags) == 0
            continue
        if script == "pretrain.py":
            flags += SMALL + (["--data", "DIR"] if "--resume" not in flags else [])
            flags += ["--batch-size", "16"] if "--plan" in flags else []  # more GPUs than the pictures of a small step
        elif "--resume" in flags:
            flags += ["--steps", "2"]
        elif script == "finetune.py":
            flags += TUNE + (MODEL + TINY[1:11] if "none" in flags[flags.index("--init") + 1] else [])
        elif script == "shapes.py":
            flags += ["--train", "16", "--val", "2", "--test", "2"]
        run = functools.partial(run_command, script, *flags, launch=launch, cwd=tmp_path, stdin=given)
        with ThreadPoolExecutor() as pool:  # a command for two hosts is given on both
            for done in pool.map(lambda _, run=run: run(), range(2 if "--nnodes=2" in launch else 1)):
                assert done.returncode == 0, (words, done.stderr[-2000:])


def test_a_task_of_your_own_runs(world, tmp_path):
    """The README's example, as it stands there; that it learns takes longer than a test may."""
    program = a_task_of_your_own()
    while not program[0]:
        program = program[1:]
    while not program[-1]:
        program = program[:-1]
    assert program[0].startswith('"""How many objects') and len(program) <= 40
    (tmp_path / "count.py").write_text("\n".join(program))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    made = run_command("pretrain.py", *TINY, "--data", world, "--steps", "1", "--output", tmp_path / "run")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([sys.executable, tmp_path / "count.py", tmp_path / "run/last.pt", world, "2"], text=True,
                          capture_output=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"right [01]\.\d\d, always the commonest [01]\.\d\d\n", done.stdout)


def test_what_the_readme_shows_is_there():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        shown = re.findall(r"\]\((?!http)([^)]+)\)", file.read())
    assert len(shown) == 4 and all(os.path.isfile(os.path.join(ROOT, path)) for path in shown)
