"""Fine-tuning at a tiny size, on a CPU. The tasks' losses and scores: test_tasks.py; the training
loop: test_pretrain.py.
"""

import json
import math
import os
import shutil
import signal
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, run_command
from drill import differences, result
from PIL import Image
from test_pretrain import (log, ok, restored_signals, run_ranks,  # noqa: F401
                           signal_after)

import finetune
import tasks
from data import InputError
from evaluate import Predictor
from model import load_checkpoint

SMALL = ["--mini", "--workers", "0", "--minutes", "0", "--batch-size", "4", "--warmup", "0",
         "--log-every", "1", "--negatives", "2", "--val-examples", "4"]
# Beside the sentence's embedding and the encoder, which all of them train
LEARNT = {"vqa": {"backbone"}, "nlvr2": {"backbone"}, "caption": {"backbone", "decoder", "caption"},
          "flickr30k": {"backbone", "itm"},
          "detection": {"backbone", "decoder", "query_positions", "classes", "box"}}


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory):
    """A checkpoint of one step, its batch norm in training."""
    folder = tmp_path_factory.mktemp("pretrained")
    ok(run_command("pretrain.py", *TINY, "--data", world, "--output", folder, "--steps", "1",
                   "--val-pictures", "1"))
    return str(folder / "last.pt")


def one_line(capsys, *flags):
    """What a command line prints that ends with exit code 2 and one line."""
    assert finetune.main([str(flag) for flag in flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finetune.py: ")
    return line


# --------------------------------------------------------------------------------------------------
# Each task


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_trains_its_modules_alone_and_keeps_its_best(name, pretrained, world, tmp_path):
    ok(run_command("finetune.py", "--task", name, "--init", pretrained, "--data", world,
                   "--output", tmp_path, *SMALL, "--steps", "2"))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "curves.png", "last.pt", "log.jsonl"]
    steps, (*majority, validation) = log(tmp_path)
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in steps)
    scores = {k[4:]: v for k, v in validation.items() if k.startswith("val_")}
    blind = {k[6:] for k in validation if k.startswith("blind_")} - {"examples"}
    assert set(scores) == blind
    best = load_checkpoint(f"{tmp_path}/best.pt")
    assert best["scores"] == scores and best["step"] == 2 and best["optimizer"] is None
    assert best["best"] == sum(scores[key] for key in tasks.TASKS[name].selection_metric)
    if name == "flickr30k":  # what is logged beside it is no part of the loss
        assert steps[0]["loss"] == steps[0]["loss_flickr30k"]
        assert steps[0]["wrong_log_odds_50"] < steps[0]["wrong_log_odds_99"]
    if name in ("vqa", "nlvr2"):  # the most frequent answer, for comparison
        (line,) = majority
        assert line["step"] == 0 and set(scores) == {k[9:] for k in line if "majority_" in k}

    before, after = load_checkpoint(pretrained)["model"], load_checkpoint(f"{tmp_path}/last.pt")
    changed = {key for key, value in before.items() if not torch.equal(after["model"][key], value)}
    modules = {key.split(".")[0] for key in changed}
    assert modules == {"sentence", "encoder"} | LEARNT[name]
    rates = [group["lr"] for group in after["optimizer"]["param_groups"]]
    resnet = {key for key in changed if key.startswith("backbone.resnet")}
    if name == "nlvr2":  # --mini: a quick classifier, and a ResNet that keeps its statistics too
        assert rates[1] == pytest.approx(3 * rates[0]) and rates[2] == 0 and not resnet
    else:
        assert rates[0] == rates[2] > 0 and resnet


# --------------------------------------------------------------------------------------------------
# The course of a training


def test_rate_falls_and_validations_come_by_epochs(pretrained, world, tmp_path):
    """An epoch of one step: a tenth from half of the training on, then a hundredth."""
    assert finetune.main([
        "--task", "nlvr2", "--init", pretrained, "--data", world, "--output", str(tmp_path), *SMALL,
        "--train-examples", "4", "--steps", "10", "--schedule", "step", "--lr", "0.002",
        "--warmup", "2", "--val-every", "4"]) == 0
    steps, (_, *validations) = log(tmp_path)
    assert [line["epoch"] for line in steps] == list(range(1, 11))
    expected = [0.001] + [0.002] * 4 + [0.0002] * 3 + [0.00002] * 2
    assert [line["lr"] for line in steps] == pytest.approx(expected)
    assert [line["step"] for line in validations] == [4, 8, 10]


def test_a_test_dev_run_of_vqa_keeps_the_last_checkpoint(pretrained, world, tmp_path, capsys):
    flags = ["--task", "vqa", "--init", pretrained, "--data", world, "--output", str(tmp_path)]
    assert finetune.main([*flags, *SMALL, "--train-splits", "train", "val", "--steps", "2",
                          "--val-every", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "an epoch is 224 examples in 56 items" in printed  # of 48 images and 8 of val
    assert "val is trained on, so nothing is validated: best.pt is the last checkpoint" in printed
    assert log(tmp_path)[1] == []
    assert finetune.main(["--resume", f"{tmp_path}/last.pt", "--steps", "3"]) == 0
    best, last = (load_checkpoint(f"{tmp_path}/{name}.pt") for name in ("best", "last"))
    assert best["step"] == 3 and best["scores"] == {}
    vqa = tasks.VQA()
    targets = [vqa.index(world, split)["targets"] for split in ("train", "val")]
    assert best["names"]["answers"] == vqa.choose_labels(*targets)  # val's are counted once
    assert all(torch.equal(best["model"][key], value) for key, value in last["model"].items())
    line = one_line(capsys, "--resume", tmp_path / "last.pt", "--train-splits", "train")
    assert "--train-splits" in line and "the resumed run has ['train', 'val']" in line

    best["names"]["answers"][0] = "another"  # as many answers, but not the same ones
    torch.save({**best, "config": asdict(best["config"])}, tmp_path / "other.pt")
    capsys.readouterr()
    assert finetune.main(["--task", "vqa", "--init", f"{tmp_path}/other.pt", "--data", world,
                          "--output", f"{tmp_path}/again", *SMALL, "--train-splits", "train", "val",
                          "--steps", "1"]) == 0
    assert "or of another shape; re-initialised: classifier.3.weight" in capsys.readouterr().out


def test_the_best_is_chosen_by_the_tasks_measure(pretrained, world, tmp_path, monkeypatch):
    """Also by a resumed run, which knows what the best one was."""
    # Of the most frequent answer, the trial, then of each validation, seen and blind; trial, ...
    values = iter([1.0, 1.0, 0.2, 1.0, 0.9, 1.0, 0.5, 1.0, 1.0, 0.8, 1.0])
    monkeypatch.setattr(tasks.NLVR2, "score", lambda *inputs: {"accuracy": next(values)})
    save = finetune.Run.save

    def save_and_look(run, name="last.pt", **more):
        before = run.saved
        save(run, name, **more)
        assert (run.saved == before) == (name == "best.pt")  # when last.pt is due

    monkeypatch.setattr(finetune.Run, "save", save_and_look)
    flags = ["--task", "nlvr2", "--init", pretrained, "--data", world, "--output", str(tmp_path)]
    # 96 examples: 24 steps an epoch, so a validation after each step
    assert finetune.main([*flags, *SMALL, "--steps", "3", "--val-every", "0.04"]) == 0
    assert finetune.main(["--resume", f"{tmp_path}/last.pt", "--steps", "4"]) == 0
    assert [line["val_accuracy"] for line in log(tmp_path)[1][1:]] == [0.2, 0.9, 0.5, 0.8]
    best = load_checkpoint(f"{tmp_path}/best.pt")
    assert best["step"] == 2 and best["scores"] == {"accuracy": 0.9}


def test_a_run_stopped_by_a_signal_ends_as_one_that_never_stopped(pretrained, world, tmp_path):
    """Retrieval draws wrong pairs in each step, beside the images' sizes, sentences and dropout."""
    flags = ["finetune.py", "--task", "flickr30k", "--init", pretrained, "--data", world, *SMALL,
             "--dropout", "0.1", "--short-sides", "48", "64", "--steps", "3", "--val-every", "0.25",
             "--schedule", "step"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ok(run_command(*flags, "--output", whole))
    (done,) = run_ranks(*flags, "--output", parts, ranks=1,
                        last=(signal_after, 1, signal.SIGTERM))
    assert done.returncode == 128 + signal.SIGTERM
    ok(run_command("finetune.py", "--resume", parts / "last.pt", "--workers", "1"))
    assert differences(result(whole), result(parts)) == []
    best = [load_checkpoint(f"{folder}/best.pt") for folder in (whole, parts)]
    assert best[0]["step"] == best[1]["step"] and best[0]["scores"] == best[1]["scores"]


def test_two_processes_train_and_score_as_one_also_from_scratch(world, weights, tmp_path):
    flags = [*TINY[:TINY.index("--val-pictures")], "--task", "vqa", "--init", "none", "--data",
             world, "--backbone-weights", weights, "--lr", "1e-4", "--steps", "1", "--log-every",
             "1", "--val-examples", "5"]
    ok(run_command("finetune.py", *flags, "--output", tmp_path / "one"))
    for done in run_ranks("finetune.py", *flags, "--output", tmp_path / "two"):
        ok(done)
    one, two = (load_checkpoint(f"{tmp_path}/{name}/last.pt") for name in ("one", "two"))
    states = [state["optimizer"]["state"] for state in (one, two)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():  # a tenth of the gradient
        torch.testing.assert_close(states[1][key]["exp_avg"], state["exp_avg"], rtol=1e-3,
                                   atol=1e-6)
    logs = [log(tmp_path / name) for name in ("one", "two")]
    assert logs[0][0][0]["loss"] == pytest.approx(logs[1][0][0]["loss"], rel=1e-5)
    assert logs[0][1] == logs[1][1]  # majority, validation


# --------------------------------------------------------------------------------------------------
# What cannot be


BOXES = ["--task", "detection", "--init", "FILE", "--text", "none", "--train-annotations", "a.json",
         "--train-images", "a", "--val-annotations", "b.json", "--val-images", "b"]


@pytest.mark.parametrize("flags, says", [
    (["--task", "vqa"], "give --task and --init"), (["--init", "none"], "give --task and --init"),
    (["--task", "vqa", "--resume", "auto"], "give --task and --init"),
    (["--task", "vqa", "--init", "nowhere.pt"], "--init nowhere.pt: no such file"),
    (["--resume", "FILE"], "is not a last.pt of this stage"),
    (["--task", "vqa", "--init", "FILE", "--width", "64"], "--width 64: "),
    (["--task", "flickr30k", "--init", "FILE", "--micro-batch", "1"],
     "--task flickr30k: wrong images are the others that a process holds at once, and it holds"),
    (["--task", "detection", "--init", "FILE", "--augment", "detr"],
     "--augment detr: a sentence may say left and right, or what is cut off; give --text none"),
    (["--task", "vqa", "--init", "FILE", "--augment", "detr"],
     "--augment: --task vqa does not have it"),
    ([*BOXES, "--text", "caption"], "--text caption: boxes of one's own have no captions"),
    ([*BOXES, "--train-images", ""], "--train-annotations and --train-images: both are needed"),
    ([*BOXES, "--task", "vqa"], "--train-annotations: --task vqa does not have it"),
    ([*BOXES, "--pairs", "x.csv"], "--pairs: --task detection does not have it"),
    (["--task", "detection", "--init", "DETR"], "knows no words; give --text none"),
    (["--task", "vqa", "--init", "DETR"], "is fine-tuned for detection"),
    (["--task", "detection", "--init", "DETR", "--text", "none", "--width", "32"], "--width 32: ")])
def test_flags_that_do_not_fit_are_one_line(flags, says, pretrained, detr, world, tmp_path, capsys):
    files = {"FILE": pretrained, "DETR": detr}
    flags = [files.get(flag, flag) for flag in flags]
    rest = [*SMALL, "--steps", "1", "--data", world, "--output", tmp_path / "out"]
    assert says in one_line(capsys, *rest, *flags)


# --------------------------------------------------------------------------------------------------
# Data of one's own

CLASSES = ("red, M1", "green", "blue")
COLORS = ((230, 30, 30), (30, 230, 30), (30, 30, 230))


def write_boxes(world, folder, split, ids=(5, 9, 2), classes=CLASSES):
    """Boxes of one's own: the world's, of which the classes become three; ids: of these."""
    shutil.copytree(f"{world}/coco/{split}2017", folder / split, dirs_exist_ok=True)
    with open(f"{world}/coco/annotations/instances_{split}2017.json") as source:
        file = json.load(source)
    for annotation in file["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"] % 3]
    file["categories"] = [{"id": number, "name": name} for number, name in zip(ids, classes)]
    (folder / f"{split}.json").write_text(json.dumps(file))
    return file


def own_flags(folder):
    return ["--task", "detection", "--train-annotations", folder / "train.json",
            "--train-images", folder / "train", "--val-annotations", folder / "val.json",
            "--val-images", folder / "val"]


def test_boxes_of_ones_own_with_other_classes(pretrained, world, tmp_path, capsys):
    """Training and validation file number the classes differently."""
    write_boxes(world, tmp_path, "train")
    write_boxes(world, tmp_path, "val", ids=(1, 2, 3))
    printed = ok(run_command("finetune.py", *own_flags(tmp_path), "--augment", "detr", "--init",
                             pretrained, *SMALL, "--output", tmp_path / "run", "--steps", "2"))
    assert f"3 classes in place of the 6 of {pretrained}: the class head is re-i" in printed
    state = load_checkpoint(f"{tmp_path}/run/best.pt")
    assert state["names"]["coco"] == ["blue", "red, M1", "green"]  # by their numbers in training

    predictor = Predictor(f"{tmp_path}/run/best.pt")
    image = next((tmp_path / "val").iterdir())
    labels = {found["label"] for found in predictor.detect(image, 0.0)}
    assert labels <= set(CLASSES)
    scores, submitted = tmp_path / "scores.json", tmp_path / "results.json"
    ok(run_command("evaluate.py", "--checkpoint", tmp_path / "run/best.pt", "--val-annotations",
                   tmp_path / "val.json", "--val-images", tmp_path / "val", "--json", scores,
                   "--submit", submitted, "--examples", "4"))
    assert json.loads(scores.read_text()) == pytest.approx(state["scores"], abs=1e-6)
    assert {result["category_id"] for result in json.loads(submitted.read_text())} <= {1, 2, 3}
    ok(run_command("finetune.py", "--resume", tmp_path / "run/last.pt", "--steps", "3"))
    # A pre-trained checkpoint finds none of these classes, and says so
    done = run_command("evaluate.py", "--task", "detection", "--checkpoint", pretrained,
                       "--val-annotations", tmp_path / "val.json", "--val-images", tmp_path / "val")
    assert done.returncode == 2 and "the class 'red, M1' of the data is not" in done.stderr
    # Nor can a class be validated that is not trained
    write_boxes(world, tmp_path, "val", classes=("red, M1", "green", "violet"))
    flags = [*own_flags(tmp_path), "--init", pretrained, "--output", tmp_path / "new"]
    assert "class 'violet' of the data is not one of the training" in one_line(capsys, *flags)


def write_pairs(folder, n=8):
    """Images with two captions each, every fourth is of val."""
    os.makedirs(folder / "images", exist_ok=True)
    rows = ["image,caption,split"]
    for number in range(n):
        image = Image.new("RGB", (96, 64), COLORS[number % 3])
        image.save(folder / "images" / f"{number}.jpg")
        split = "val" if number % 4 == 3 else "train"
        rows += [f"{number}.jpg,a red thing {number},{split}",
                 f"{number}.jpg,something green {number},{split}"]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return ["--pairs", folder / "pairs.csv", "--images", folder / "images"]


def test_pairs_of_ones_own_pretrain_and_fine_tune(world, tmp_path):
    flags = write_pairs(tmp_path)
    vocabulary = ["--vocab", f"{world}/vocab.txt"]
    printed = ok(run_command("pretrain.py", *TINY, *flags, *vocabulary, "--steps", "2", "--output",
                             tmp_path / "pretrained"))
    assert "train: 6 images, 12 sentences, 0 boxes" in printed
    (measures,) = log(tmp_path / "pretrained")[1]
    assert "val_mlm_accuracy" in measures and not any("AP" in key for key in measures)

    for task in ("caption", "flickr30k"):
        run = tmp_path / task
        ok(run_command("finetune.py", "--task", task, *flags, "--init",
                       tmp_path / "pretrained/last.pt", *SMALL, "--steps", "2", "--negatives", "1",
                       "--output", run))
        results = tmp_path / f"{task}.results"
        ok(run_command("evaluate.py", "--checkpoint", run / "best.pt", *flags, "--submit", results,
                       "--json", tmp_path / "a.json"))
        ok(run_command("evaluate.py", "--task", task, "--score", results, "--against",
                       tmp_path / "pairs.csv", "--split", "val", "--json", tmp_path / "b.json"))
        a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
        assert a == pytest.approx(b)
    image, = json.loads((tmp_path / "caption.results").read_text())[:1]
    assert image["image_id"] == "3.jpg"


# --------------------------------------------------------------------------------------------------
# From DETR's weights


def test_detection_trains_from_detrs_weights(detr, world, tmp_path):
    """All of them, but for the stem and the statistics of batch norm."""
    printed = ok(run_command("finetune.py", "--task", "detection", "--text", "none", "--init", detr,
                             "--data", world, "--output", tmp_path, *SMALL, "--steps", "2"))
    assert f"6 classes in place of the 80 of {detr}: the class head is re-initialised" in printed

    state = load_checkpoint(f"{tmp_path}/last.pt")
    assert state["config"].decoder_norm and state["config"].activation == "relu"
    for name, tensor in load_checkpoint(detr)["model"].items():
        stem = name.startswith(("backbone.resnet.conv1.", "backbone.resnet.layer1."))
        norm = name.startswith("backbone.") and (".bn" in name or "downsample.1." in name)
        if not name.startswith("classes."):
            assert torch.equal(tensor, state["model"][name]) == (stem or norm), name
    ok(run_command("finetune.py", "--resume", tmp_path / "last.pt", "--steps", "3"))

    predictor, image = Predictor(detr), Image.new("RGB", (96, 72))
    found = predictor.detect(image, 0.0)
    assert len(found) == 8 and not any(thing["attributes"] for thing in found)
    with pytest.raises(InputError, match="cannot caption; it can detect"):
        predictor.caption(image)
    with pytest.raises(InputError, match="know no words: give no sentence"):
        predictor.detect(image, sentence="a red circle")


def test_detrs_class_head_is_kept_where_the_data_has_cocos_classes(detr, world, tmp_path):
    """As COCO's own files have: 80 names in the order of their ids."""
    start = load_checkpoint(detr)
    for split in ("train", "val"):
        file = write_boxes(world, tmp_path, split)
        file["categories"] = [{"id": number, "name": name}
                              for number, name in enumerate(start["names"]["coco"], 1)]
        (tmp_path / f"{split}.json").write_text(json.dumps(file))
    printed = ok(run_command("finetune.py", *own_flags(tmp_path), "--init", detr, *SMALL,
                             "--output", tmp_path / "run", "--steps", "1", "--lr", "1e-6"))
    assert "classes 5,265" in printed and "the class head is re-initialised" not in printed
    trained = load_checkpoint(f"{tmp_path}/run/best.pt")["model"]["classes.coco.weight"]
    torch.testing.assert_close(trained, start["model"]["classes.coco.weight"], rtol=0, atol=1e-5)
