"""Each command of the README runs as it stands there, with small data and a small model."""

import json
import os
import re
import shlex
import shutil

from conftest import ROOT, TINY, run_command, write_detr
from PIL import Image
from test_finetune import write_pairs, write_rectangles

MODEL = ["--backbone", "r18", "--backbone-weights", "none", "--stride", "16", "--queries", "8"]
RUN = [*TINY[11:], "--short-sides", "64", "--long-side", "96", "--steps", "1", "--device", "cpu"]
SMALL = [*TINY[1:11], *MODEL, *RUN]
TUNE = ["--batch-size", "8", "--steps", "1", "--workers", "0", "--minutes", "0", "--short-sides",
        "64", "--long-side", "96", "--device", "cpu"]
FILES = ["matcher.py", "data.py", "model.py", "tasks.py", "evaluate.py", "pretrain.py",
         "finetune.py", "shapes.py"]


def readme():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return file.read()


def commands():
    """The README's command lines, in their order, without what is installed before them."""
    text = readme().replace(" \\\n", " ")  # a command may go on in the next line
    lines = [line.strip().split("&& ")[-1] for line in text.splitlines()
             if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines
            if line.startswith(("python ", "torchrun "))]


def prepare(words, folder):
    """(words for run_command, how to launch them) of a README command, made small."""
    launch = []
    if words[0] == "torchrun":
        assert words[1] == "--nproc_per_node=8"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        words = words[1:]
    script, flags = words[1], words[2:]
    if script == "pretrain.py" and "--resume" not in flags:
        flags += RUN if "--init" in flags else SMALL  # DETR's weights have their sizes
        flags += [] if "--data" in flags else ["--data", "DIR"]
    elif script == "finetune.py":
        flags += TUNE
        if flags[flags.index("--init") + 1] == "none":
            flags += [*MODEL, *TINY[1:11]]
        if "--mini" in flags:
            flags += ["--data", "DIR"]
        if "--output" not in flags and os.path.exists(folder / f"runs/{flags[1]}"):
            flags += ["--output", f"runs/{len(os.listdir(folder / 'runs'))}"]
    elif script == "shapes.py":
        flags += ["--train", "16", "--val", "2", "--test", "2"]
    elif script == "evaluate.py":
        if "--data" in flags:
            flags[flags.index("--data") + 1] = "DIR"
        flags = [flag.replace("data/mini", "DIR") for flag in flags]
    if "detr-r50.pth" in flags:
        flags = [flag.replace("DIR", "COCO") for flag in flags]
    return [script, *flags], launch


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
    shutil.copytree(world, tmp_path / "DIR")
    image = sorted((tmp_path / "DIR/coco/val2017").iterdir())[0]
    shutil.copy(image, tmp_path / "a.jpg")
    Image.open(image).save(tmp_path / "b.png")
    shutil.copy(image, tmp_path / "photo.jpg")
    shutil.copy(tmp_path / "DIR/vocab.txt", tmp_path)
    for split in ("train", "val"):
        write_rectangles(tmp_path / "mine", split, 8)
    write_pairs(tmp_path / "mine")
    write_coco(world, tmp_path / "COCO")
    write_detr(tmp_path / "detr-r50.pth")
    os.rename(tmp_path / "mine/images", tmp_path / "mine/pictures")
    for words in found:
        if "pytest" in words:
            continue
        if "runs/mini-nlvr2/best.pt" in words:  # vqa stands for the miniature's five fine-tunings
            made = run_command("finetune.py", "--task", "nlvr2", "--mini", "--init",
                               "runs/mini/last.pt", "--data", "DIR", *TUNE, cwd=tmp_path)
            assert made.returncode == 0, made.stderr[-2000:]
        if "--task" in words and "count" in words:  # test_tasks runs the README's class
            continue
        command, launch = prepare(words, tmp_path)
        done = run_command(*command, launch=launch, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr[-2000:])


def test_the_counting_task_is_the_one_that_is_tested():
    from test_tasks import COUNTING

    text = readme().split("<!-- counting -->\n")[1].split("\n\nAdd it to")[0]
    shown = "\n".join(line[4:] for line in text.splitlines())
    assert shown.strip() == COUNTING.strip()


def test_files_and_their_lines():
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", readme(), re.MULTILINE)
    assert [name for name, _ in rows] == FILES
    for name, lines in rows:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            assert abs(int(lines.replace(",", "")) - len(file.readlines())) <= 25, name


def test_what_the_readmes_link_to_is_there():
    for name in ("README.md", "results/README.md", "results/speed.md", "tests/README.md"):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            links = re.findall(r"\]\((?!http)([^)#]+)\)", file.read())
        for link in links:
            assert os.path.isfile(os.path.join(ROOT, os.path.dirname(name), link)), (name, link)


def test_the_layout_is_flat_and_each_file_imports_from_those_above_it():
    top = {name for name in os.listdir(ROOT) if name.endswith(".py")}
    assert top == set(FILES)
    for name in FILES:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            imported = re.findall(r"^\s*(?:from|import) (\w+)", file.read(), re.MULTILINE)
        ours = {f"{module}.py" for module in imported} & set(FILES)
        above = FILES if name == "pretrain.py" else FILES[:FILES.index(name)]
        assert ours <= set(above), (name, ours)
