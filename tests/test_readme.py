"""Each command of the README runs: as it stands there, with small data and a small model appended."""

import os
import shlex
import shutil
import subprocess
import sys

from conftest import ROOT, TINY

MODEL = ["--backbone", "r18", "--backbone-weights", "none", "--stride", "16", "--queries", "8"]
SMALL = [*TINY[1:], *MODEL, "--short-sides", "64", "--long-side", "96", "--steps", "1", "--device", "cpu"]
TUNE = ["--data", "DIR", "--batch-size", "8", "--negatives", "2", "--steps", "1", "--workers", "0", "--minutes", "0",
        "--short-sides", "64", "--long-side", "96", "--device", "cpu"]


def commands():
    """The README's command lines without what is installed before and what is said after, in their order."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        lines = [line.strip().split("&& ")[-1] for line in file if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "torchrun "))]


def test_every_command_runs(world, tmp_path):
    found = commands()
    assert len(found) >= 10 and sum(words[0] == "torchrun" for words in found) >= 2
    shutil.copytree(world, tmp_path / "DIR")
    for words in found:
        if "pytest" in words:
            continue
        launch = [sys.executable]
        if words[0] == "torchrun":
            assert words[1] == "--nproc_per_node=8"
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            words = words[1:]
        script, flags = words[1], words[2:]
        if script == "pretrain.py":
            flags += SMALL + (["--data", "DIR"] if "--resume" not in flags else [])
        elif "--resume" in flags:
            flags += ["--steps", "2"]
        elif script == "finetune.py":
            flags += TUNE + (MODEL + TINY[1:11] if "none" in flags[flags.index("--init") + 1] else [])
        elif script == "shapes.py":
            flags += ["--train", "16", "--val", "2", "--test", "2"]
        done = subprocess.run([*launch, os.path.join(ROOT, script), *flags], cwd=tmp_path, text=True,
                              capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, (words, done.stderr[-2000:])
