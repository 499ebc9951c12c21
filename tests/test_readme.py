"""Each command of the README runs as it stands there, with small data and a small model."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

from conftest import ROOT, TINY, run_command, write_detr
from PIL import Image
from test_finetune import write_boxes, write_pairs

README = Path(ROOT, "README.md").read_text(encoding="utf-8")
MODEL = ["--backbone", "r18", "--backbone-weights", "none", "--stride", "16", "--queries", "8",
         *TINY[1:11]]
TUNE = ["--batch-size", "8", "--steps", "1", "--workers", "0", "--minutes", "0", "--short-sides",
        "64", "--long-side", "96", "--device", "cpu"]
PRETRAIN = [*TUNE, *TINY[15:]]


def commands():
    """The README's command lines, in their order, without what is installed before them."""
    text = README.replace(" \\\n", " ")  # a command may go on in the next line
    lines = [line.strip().split("&& ")[-1] for line in text.splitlines()
             if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines
            if line.startswith(("python ", "torchrun "))]


def run(words, folder):
    """Run a README command, made small."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if words[0] == "python":
        launch = []
    script, *flags = words[1 if words[0] == "python" else 2:]
    if script == "pretrain.py" and "--resume" not in flags:
        flags += PRETRAIN
        flags += [] if "--init" in flags else MODEL  # DETR's weights have their sizes
    elif script == "finetune.py":
        flags += TUNE
        if flags[flags.index("--init") + 1] == "none":
            flags += MODEL
    elif script == "shapes.py":
        flags += ["--train", "16", "--val", "2", "--test", "2"]
    done = run_command(script, *flags, launch=launch, cwd=folder)
    assert done.returncode == 0, (words, done.stderr[-2000:])


def write_coco(world, folder):
    """The miniature world with the names of COCO's classes, which DETR's weights know."""
    shutil.copytree(world, folder)
    names = ["person", "bicycle", "car", "stop sign", "dog", "toothbrush"]
    for split in ("train", "val"):
        path = folder / f"coco/annotations/instances_{split}2017.json"
        file = json.loads(path.read_text())
        for category, name in zip(file["categories"], names, strict=True):
            category["name"] = name
        path.write_text(json.dumps(file))


def test_every_command_runs(world, tmp_path):
    found = commands()
    assert len(found) >= 20 and sum(words[0] == "torchrun" for words in found) >= 2
    shutil.copytree(world, tmp_path / "data/mini")
    write_coco(world, tmp_path / "DIR")
    image = sorted((tmp_path / "DIR/coco/val2017").iterdir())[0]
    shutil.copy(image, tmp_path / "a.jpg")
    Image.open(image).save(tmp_path / "b.png")
    shutil.copy(image, tmp_path / "photo.jpg")
    shutil.copy(tmp_path / "DIR/vocab.txt", tmp_path)
    for split in ("train", "val"):
        write_boxes(world, tmp_path / "mine", split)
    write_pairs(tmp_path / "mine")
    os.rename(tmp_path / "mine/images", tmp_path / "mine/pictures")
    write_detr(tmp_path / "detr-r50.pth")
    for words in found:
        if "runs/mini-nlvr2/best.pt" in words:  # vqa stands for the miniature's five fine-tunings
            tune = "python finetune.py --task nlvr2 --mini --init runs/mini/last.pt"
            run(tune.split(), tmp_path)
        if "pytest" not in words and "count" not in words:  # test_tasks runs the README's class
            run(words, tmp_path)


def test_the_files_are_those_of_the_reading_tour_in_its_order():
    """Each imports only from those above it, but for the miniature world."""
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.MULTILINE)
    names = [name for name, _ in rows]
    assert set(names) == {name for name in os.listdir(ROOT) if name.endswith(".py")}
    for place, (name, lines) in enumerate(rows):
        text = Path(ROOT, name).read_text(encoding="utf-8")
        assert abs(int(lines.replace(",", "")) - text.count("\n")) <= 25, name
        imported = re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE)
        ours = {f"{module}.py" for module in imported} & set(names)
        assert ours <= {*names[:place], "shapes.py"}, name


def test_what_the_readmes_link_to_is_there():
    for name in ("README.md", "results/README.md", "results/speed.md", "tests/README.md"):
        path = Path(ROOT, name)
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).is_file(), (name, link)
