"""Pre-training at a tiny size, on a CPU: what a run writes, losses, resume, errors, flags."""

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_command, run_ranks, small_batch, small_model
from drill import differences, result
from PIL import Image
from torch import nn

import evaluate
import finetune
import pretrain
import shapes
from data import InputError, MmapList, pretraining_index
from model import load_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# Of all that a resumed run has to draw again, something in each step
DRAWS = ["--schedule", "step", "--dropout", "0.1", "--short-sides", "48", "64", "--batch-size", "8",
         "--micro-batch", "2", "--val-pictures", "2", "--val-every", "3", "--steps", "5",
         "--checkpoint-minutes", "0"]
LOSSES = ("mlm", "itm", "caption", "class", "bbox", "giou", "attribute", "grid_word")


def log(folder):
    """(lines of training, lines of validation)"""
    lines = ([], [])
    for line in map(json.loads, Path(folder, "log.jsonl").read_text().splitlines()):
        lines["loss" not in line].append(line)
    return lines


def ok(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def one_line(done, *texts):
    """It ended with exit code 2 and one line that holds the texts."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    for text in texts:
        assert text in line, line


def after_step(step, function, *inputs):
    """In this process a function is called when the step is logged."""
    log_step = pretrain.Run.log_step

    def log_and_call(run, *values):
        log_step(run, *values)
        if run.step == step:
            function(*inputs)

    pretrain.Run.log_step = log_and_call


def signal_after(step, number):
    """A process sends the signal to itself and its loader workers."""
    after_step(step, os.killpg, 0, number)


def no_image_decodes():
    """In this process alone."""
    def fail(dataset, key):
        raise InputError("a.jpg: cannot be read")

    pretrain.PretrainingSet.__getitem__ = fail


@pytest.fixture(autouse=True)
def restored_signals():
    """A run in this process leaves its handlers of signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """(the folder, what it printed) of a run of five steps that nothing disturbed."""
    folder = str(tmp_path_factory.mktemp("whole") / "out")
    done = run_command("pretrain.py", *TINY, *DRAWS, "--data", world, "--output", folder)
    return folder, ok(done)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that run's folder, to resume in."""
    return Path(shutil.copytree(whole[0], tmp_path / "finished"))


@pytest.fixture
def copy(world, tmp_path):
    """The world, to break."""
    return Path(shutil.copytree(world, tmp_path / "world"))


def break_images(copy, which=slice(None)):
    """Some of COCO's images, or all: their paths."""
    paths = sorted((copy / "coco/train2017").iterdir())[which]
    for path in paths:
        path.write_bytes(b"\xff\xd8\xff half an image")
    return paths


# --------------------------------------------------------------------------------------------------
# One run


def test_a_run_writes_its_log_checkpoint_curves_and_sheet(whole):
    folder, printed = whole
    assert sorted(os.listdir(folder)) == ["curves.png", "last.pt", "log.jsonl", "sheet.png"]
    steps, validations = log(folder)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    weights = pretrain.loss_weights(pretrain.MINI["loss_weights"], grid_word=8.0)
    for line in steps:
        total = sum(weights[f"loss_{name}"] * line[f"loss_{name}"] for name in LOSSES)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["epoch"] == line["step"] / 8  # 64 images in batches of 8
        assert {"lr", "lr_backbone", "grad_norm", "pictures_per_second", "seconds"} <= set(line)

    assert [line["step"] for line in validations] == [3, 5]
    for name in ("mlm_accuracy_visual", "itm_accuracy_foil", "AP50", "AP50_no_sentence",
                 "attribute_accuracy", "caption_objects"):
        for line in validations:
            assert 0 <= line[f"val_{name}"] <= 1 and 0 <= line[f"blind_{name}"] <= 1
    seen, blind = (validations[-1][f"{kind}_itm_accuracy"] for kind in ("val", "blind"))
    assert f"val_itm_accuracy {seen:.3f} (blind {blind:.3f})" in printed
    for name in ("curves.png", "sheet.png"):
        with Image.open(f"{folder}/{name}") as image:
            assert len(image.convert("RGB").getcolors(10**6)) > 10  # not an empty page
    state = load_checkpoint(f"{folder}/last.pt")
    assert state["step"] == 5 and state["args"]["mini"] and state["names"]["coco"][0] == "circle"
    assert len(state["vocabulary"]) == state["config"].vocabulary


def test_mini_writes_the_world_if_it_is_not_there(tmp_path, monkeypatch, capsys):
    write = shapes.write_world
    monkeypatch.setattr(shapes, "write_world", lambda folder, **more: write(
        folder, train=16, val=4, test=4, **more))
    assert pretrain.main([*TINY, "--data", str(tmp_path / "world"), "--steps", "1",
                          "--val-pictures", "1", "--output", str(tmp_path / "out")]) == 0
    assert f"writing the miniature world to {tmp_path}/world" in capsys.readouterr().out
    assert len(log(tmp_path / "out")[0]) == 1


# --------------------------------------------------------------------------------------------------
# Losses


def minus_log_p(logits, answer):
    """-log softmax(logits)[answer] in float64."""
    values = [float(value) for value in logits]
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values)) - values[answer]


def test_losses_equal_slow_loops_in_float64():
    model, batch = small_model(), small_batch()
    batch["object_cells"] = torch.tensor([0, 7, 3])  # of three objects
    batch["word_objects"] = torch.tensor([0, 1, 1])  # the second has two words, the last none
    batch["word_pieces"] = torch.tensor([9, 20, 21])
    batch["word_weights"] = torch.tensor([1.0, 0.5, 0.5])
    objective = pretrain.Pretraining(model)
    counts = objective.normalizers(batch)
    words = sum(int(token) != 0 for token in batch["captions"][..., 1:].flatten())
    assert counts[:3] == [len(batch["mlm_labels"]), 6, words]
    assert counts[3] == 5  # boxes: 2 + 3 + 0

    with torch.no_grad():
        outputs = model(batch)
        # The counts of two such micro-batches: the sum over both is the mean over all
        losses = objective(batch, [2 * count for count in counts])
    mlm = sum(map(minus_log_p, outputs["mlm"], batch["mlm_labels"].tolist()))
    itm = sum(map(minus_log_p, outputs["itm"], batch["itm_labels"].flatten().tolist()))
    caption = 0.0
    for row, tokens in zip(outputs["caption"], batch["captions"].flatten(0, 1).tolist()):
        for logits, token in zip(row, tokens[1:]):
            caption += minus_log_p(logits, token) if token != 0 else 0.0
    first, second, _ = outputs["grid_words"]
    grid = minus_log_p(first, 9) + (minus_log_p(second, 20) + minus_log_p(second, 21)) / 2
    expected = {"mlm": mlm / counts[0], "itm": itm / 6, "caption": caption / words,
                "grid_word": grid / 5}
    for name, value in expected.items():
        assert float(losses[f"loss_{name}"]) == pytest.approx(value / 2, rel=1e-5), name


def test_a_batch_with_nothing_to_ask_has_losses_of_zero():
    """No masked token of a true sentence, no box: a mean over nothing would be NaN."""
    model, batch = small_model(), small_batch()
    batch["mlm_positions"] = batch["mlm_positions"][:0]
    batch["mlm_labels"] = batch["mlm_labels"][:0]
    batch["targets"] = [batch["targets"][2]] * 3
    batch["object_cells"] = batch["word_objects"] = batch["word_pieces"] = torch.tensor([]).long()
    batch["word_weights"] = torch.tensor([])
    objective = pretrain.Pretraining(model)
    losses = objective(batch, objective.normalizers(batch))
    assert losses["loss_mlm"] == losses["loss_grid_word"] == losses["loss_bbox"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_weights_of_the_losses():
    papers = {"loss_mlm": 1, "loss_itm": 1, "loss_caption": 1, "loss_class": 1, "loss_bbox": 5,
              "loss_giou": 2, "loss_attribute": 1, "loss_grid_word": 0}
    assert pretrain.loss_weights() == papers
    without = pretrain.loss_weights([("loss_mlm", 3)], without=["attributes"], grid_word=4)
    assert without == {**papers, "loss_mlm": 3, "loss_attribute": 0, "loss_grid_word": 4}
    nothing = pretrain.loss_weights(without=["mlm", "itm", "detection", "caption"], grid_word=4)
    assert set(nothing.values()) == {0}


def test_what_is_left_out_learns_nothing(world, tmp_path):
    flags = ["--without", "detection", "caption", "--steps", "1"]
    assert pretrain.main([*TINY, *flags, "--data", world, "--output", str(tmp_path)]) == 0
    state = load_checkpoint(f"{tmp_path}/last.pt")
    names = [name for name in state["model"] if "backbone.resnet" not in name]
    moments = {name: float(value["exp_avg"].abs().sum())
               for name, value in zip(names, state["optimizer"]["state"].values())}
    assert moments["caption.weight"] == moments["box.0.weight"] == 0 < moments["itm.0.weight"]


# --------------------------------------------------------------------------------------------------
# The same step in other ways


@pytest.fixture(scope="module")
def step_flags(world, weights):
    """One step of batch 4, without dropout and with frozen batch norm."""
    return ["pretrain.py", *TINY, "--data", world, "--steps", "1", "--backbone-weights", weights,
            "--lr", "1e-4", "--lr-backbone", "1e-5", "--val-pictures", "2"]


@pytest.fixture(scope="module")
def one_step(step_flags, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("one") / "out")
    ok(run_command(*step_flags, "--output", folder))
    return load_checkpoint(f"{folder}/last.pt"), log(folder)


def same_step(folder, one_step):
    (state, lines), (one, one_lines) = (load_checkpoint(f"{folder}/last.pt"), log(folder)), one_step
    for name, value in one["model"].items():
        torch.testing.assert_close(state["model"][name], value, rtol=0, atol=1e-5, msg=name)
    # AdamW's first step is nearly lr * sign(gradient). Its first moments, a tenth of the gradient,
    # tell more.
    for a, b in zip(one["optimizer"]["state"].values(), state["optimizer"]["state"].values()):
        torch.testing.assert_close(b["exp_avg"], a["exp_avg"], rtol=1e-3, atol=1e-6)
    (line,), (one_line,) = lines[0], one_lines[0]
    for name in ("loss", "grad_norm", *(f"loss_{name}" for name in LOSSES)):
        assert line[name] == pytest.approx(one_line[name], rel=1e-5), name


@pytest.mark.parametrize("launch,flags,says", [
    ((), [], "batch 4 = 1 process(es) x 4 accumulation step(s) x 1 images"),
    (TORCHRUN, ["--activation-checkpointing"],
     "batch 4 = 2 process(es) x 2 accumulation step(s) x 1 images")])
def test_micro_batches_take_the_same_step(launch, flags, says, step_flags, one_step, tmp_path):
    """On one process, and on two, of which only the first prints."""
    printed = ok(run_command(*step_flags, "--output", tmp_path, "--micro-batch", "1", *flags,
                             launch=launch))
    assert printed.count(says) == 1
    same_step(tmp_path, one_step)


def test_two_processes_take_the_same_step_and_measure_the_same(step_flags, one_step, tmp_path):
    for done in run_ranks(*step_flags, "--output", tmp_path):
        ok(done)
        assert done.stderr == ""
    same_step(tmp_path, one_step)
    (measured,), (expected,) = log(tmp_path)[1], one_step[1][1]
    assert measured == pytest.approx(expected, abs=1e-6)


def test_bf16_takes_nearly_the_same_step(step_flags, one_step, tmp_path):
    assert pretrain.main([*step_flags[1:], "--output", str(tmp_path), "--amp", "bf16"]) == 0
    assert log(tmp_path)[0][0]["loss"] == pytest.approx(one_step[1][0][0]["loss"], rel=0.02)


def test_a_compiled_model_takes_the_same_step(step_flags, one_step, tmp_path, monkeypatch):
    """Traced, but run as it is: generating code takes minutes on a CPU."""
    real = nn.Module.compile
    traced = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, fullgraph: traced.append(
        real(module, backend="eager", fullgraph=fullgraph)))
    with torch._dynamo.config.patch(optimize_ddp=True, recompile_limit=8):  # --compile sets both
        assert pretrain.main([*step_flags[1:], "--output", str(tmp_path), "--compile"]) == 0
    torch.compiler.reset()
    assert len(traced) == 1
    same_step(tmp_path, one_step)


def test_the_resnet_learns_at_its_own_rate(one_step, weights):
    """AdamW's first step is at most the learning rate, and hardly less for some weight."""
    state = one_step[0]
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [1e-4, 1e-5]
    before = torch.load(weights, weights_only=True)
    names = {f"backbone.resnet.{name}": value for name, value in before.items()}
    moved = max(float((state["model"][name] - value).abs().max()) for name, value in names.items()
                if name in state["model"])
    assert 0.9e-5 < moved < 1.2e-5


# --------------------------------------------------------------------------------------------------
# Schedules and defaults


def args_of(*words):
    return pretrain.parse([*words])[0]


def test_schedules_are_functions_of_step_and_progress():
    def rates(args, *moments):
        return [pretrain.rate_factor(args, step, progress) for step, progress in moments]

    moments = [(10**6, progress) for progress in (0, 0.66, 2 / 3, 1)]
    assert rates(args_of(), *moments) == pytest.approx([1, 1, 0.1, 0.1])
    moments = [(0, 0.0), (9, 0.0), (100, 1 / 3), (100, 1.2)]  # --minutes may be passed
    args = args_of("--schedule", "cosine", "--warmup", "10")
    assert rates(args, *moments) == pytest.approx([0.1, 1, 0.75, 0])


def test_the_papers_settings_are_the_defaults_and_mini_is_others():
    args = args_of("--backbone", "r152", "--data", "DIR")
    expected = dict(
        batch_size=32, epochs=200, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4,
        encoder_layers=12, decoder_layers=6, width=256, heads=12, feed_forward=1024, queries=100,
        sentences_per_picture=1, short_sides=list(range(480, 801, 32)), long_side=1333, stride=32,
        backbone_weights="imagenet", minutes=0, grid_word_loss=0, mask_named=0.15, clip=0.1,
        loss_weights=[], no_object_weight=None, train_stem=False)
    assert {key: getattr(args, key) for key in expected} == expected

    args = args_of("--mini", "--backbone", "r34", "--minutes", "3")  # a given flag wins
    expected = {**pretrain.MINI, "backbone": "r34", "minutes": 3}
    assert {key: getattr(args, key) for key in expected} == expected


# --------------------------------------------------------------------------------------------------
# Resume


def as_whole(folder, whole):
    """The log and everything in the checkpoint is as if the run had not been stopped."""
    assert differences(result(whole), result(folder)) == []


@pytest.mark.parametrize("number,step,workers", [
    (signal.SIGTERM, 1, (1, 0)), (signal.SIGINT, 2, (0, 2)), (signal.SIGUSR1, 4, (2, 1))])
def test_a_run_stopped_by_a_signal_ends_as_one_that_never_stopped(
        whole, world, number, step, workers, tmp_path):
    flags = ["pretrain.py", *TINY, *DRAWS, "--data", world, "--output", tmp_path]
    (done,) = run_ranks(*flags, "--workers", workers[0], ranks=1,
                        last=(signal_after, step, number))
    assert done.returncode == 128 + number and done.stderr == ""
    assert done.stdout.splitlines()[-1] == (
        f"stopped at step {step} by a signal; continue with --resume {tmp_path}/last.pt")
    assert load_checkpoint(f"{tmp_path}/last.pt")["step"] == step
    ok(run_command("pretrain.py", "--resume", f"{tmp_path}/last.pt", "--workers", workers[1]))
    as_whole(tmp_path, whole[0])


def test_a_killed_run_ends_as_one_that_never_stopped(whole, world, tmp_path):
    """Killed before the first checkpoint; then when step 4 is in the log and not yet in the
    checkpoint, with a half-written line. Once it has ended, the same command changes nothing.
    """
    flags = ["pretrain.py", *TINY, *DRAWS, "--data", world, "--output", tmp_path, "--resume",
             "auto"]
    (done,) = run_ranks(*flags, ranks=1, last=(signal_after, 1, signal.SIGKILL))
    assert done.returncode == -signal.SIGKILL and os.listdir(tmp_path) == ["log.jsonl"]
    run_ranks(*flags, ranks=1, last=(signal_after, 4, signal.SIGKILL))
    assert load_checkpoint(f"{tmp_path}/last.pt")["step"] == 3
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert f"{tmp_path}/last.pt: resuming at step 3" in ok(run_command(*flags))
    as_whole(tmp_path, whole[0])
    ok(run_command(*flags))
    as_whole(tmp_path, whole[0])


def test_a_run_killed_while_it_writes_the_index_starts_again(copy, monkeypatch):
    """Also if it has the same process number again, as in a container."""
    def be_killed(*inputs, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MmapList, "write", be_killed)
        patch.setattr(shutil, "rmtree", lambda *inputs, **more: None)  # it has no time to tidy up
        with pytest.raises(KeyboardInterrupt):
            pretraining_index(str(copy), say=print)
    assert len(pretraining_index(str(copy), say=print)["train"]) == 64


def test_two_processes_stop_together_and_resume_exactly(world, tmp_path):
    """The signal reaches only the second one and its loader workers."""
    flags = ["pretrain.py", *TINY, *DRAWS, "--data", world, "--steps", "3", "--val-every", "0"]
    for done in run_ranks(*flags, "--output", tmp_path / "whole"):
        ok(done)
    parts = tmp_path / "parts"
    first, second = run_ranks(*flags, "--output", parts, "--workers", "1",
                              last=(signal_after, 1, signal.SIGUSR1))
    assert first.returncode > 128 and second.returncode == first.returncode, first.stderr
    assert "stopped at step 1 by a signal" in first.stdout and second.stdout == ""
    for done in run_ranks("pretrain.py", "--resume", parts / "last.pt"):
        ok(done)
    as_whole(parts, tmp_path / "whole")


def test_a_folder_that_holds_a_run_is_refused(whole, finished, world, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    flags = [*TINY, "--data", world, "--output", str(finished), "--steps", "1"]
    assert pretrain.main(flags) == 2
    assert f"--output {finished}: holds a run; continue with --resume" in capsys.readouterr().err
    assert pretrain.main([*flags, "--resume", f"{whole[0]}/last.pt"]) == 2  # of another folder
    assert f"--output {finished}: " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


@pytest.mark.parametrize("flag,value,was", [
    ("--width", "64", 32), ("--seed", "5", 0), ("--sets", "vg", "['coco', 'vg']")])
def test_flags_that_a_resumed_run_may_not_change(whole, flag, value, was, capsys):
    assert pretrain.main(["--resume", f"{whole[0]}/last.pt", flag, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line and f"the resumed run has {was}; leave the flag out" in line


# --------------------------------------------------------------------------------------------------
# What stops a run


def test_the_first_loss_that_is_not_finite_stops_the_run(whole, finished, monkeypatch, capsys):
    """In a later micro-batch of step 6: the checkpoint is of step 5, and the images are named."""
    forward, batches = pretrain.Pretraining.forward, []

    def spoil(objective, batch, normalizers):
        batches.append(batch["ids"])
        losses = forward(objective, batch, normalizers)
        factor = math.nan if len(batches) == 3 else 1
        return {name: factor * loss for name, loss in losses.items()}

    monkeypatch.setattr(pretrain.Pretraining, "forward", spoil)
    # Batch norm that trains has seen the images: those statistics are of no step, but finite
    assert pretrain.main(["--resume", f"{finished}/last.pt", "--steps", "8"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pretrain.py: step 5: the loss or its gradient is not finite (loss_mlm ")
    assert ", ".join(name for ids in batches for name in ids) in line and len(batches) == 4
    state, before = (load_checkpoint(f"{place}/last.pt") for place in (finished, whole[0]))
    assert state["step"] == 5
    assert differences(before["optimizer"]["state"], state["optimizer"]["state"]) == []
    for name, value in before["model"].items():
        trained = "running_" in name or "num_batches" in name
        assert trained or torch.equal(state["model"][name], value), name


def test_weights_that_are_not_finite_are_not_saved(finished, monkeypatch, capsys):
    step = torch.optim.AdamW.step

    def spoil(optimizer):
        step(optimizer)
        optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    flags = ["--resume", f"{finished}/last.pt", "--steps", "8", "--checkpoint-minutes", "9"]
    assert pretrain.main(flags) == 2
    assert "step 6: the loss or its gradient is not finite" in capsys.readouterr().err
    assert load_checkpoint(f"{finished}/last.pt")["step"] == 5


def test_a_broken_image_is_named_counted_and_replaced(copy, tmp_path):
    broken = break_images(copy, slice(0, 6, 2))  # the next image is there
    done = run_command("pretrain.py", *TINY, "--data", copy, "--output", tmp_path / "out",
                       "--epochs", "1", "--workers", "2", "--val-pictures", "1")
    ok(done)
    lines = sorted(done.stderr.splitlines())
    for path, line in zip(broken, lines, strict=True):
        assert line.startswith(f"{path}: ") and "replaced by the next image" in line
    steps, _ = log(tmp_path / "out")
    assert len(steps) == 16 and steps[-1]["broken"] == 3


def test_a_folder_of_broken_images_is_one_line(copy, tmp_path):
    """It is a loader worker that finds out."""
    break_images(copy)
    done = run_command("pretrain.py", *TINY, "--data", copy, "--output", tmp_path / "out",
                       "--sets", "coco", "--workers", "1")
    one_line(done, "coco/train2017/0000", "cannot be read", "nor can the 19 images after it")


def test_an_error_of_the_second_processs_data_is_one_line(world, tmp_path):
    """It is printed by one of the two, and both end with it."""
    done = run_ranks("pretrain.py", *TINY, "--data", world, "--output", tmp_path,
                     last=(no_image_decodes,))
    assert [one.returncode for one in done] == [2, 2], done[0].stderr
    printed = "".join(one.stderr for one in done)
    assert printed.count("pretrain.py: a.jpg: cannot be read\n") == 1
    assert printed.count("pretrain.py: ") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("flags,texts", [
    ([], ["pretrain.py: ", "vg/objects.json"]),
    (["--batch-size", "3"],
     ["--batch-size 3: does not divide among 2 processes; choose a multiple of 2"])])
def test_an_error_of_both_processes_is_printed_by_the_first(copy, flags, texts, tmp_path):
    path = copy / "vg/objects.json"
    path.write_bytes(path.read_bytes()[:1000])
    first, second = run_ranks("pretrain.py", *TINY, "--data", copy, "--output", tmp_path / "out",
                              *flags)
    one_line(first, *texts)
    assert second.returncode == 2 and second.stderr == ""


def test_a_process_that_hangs_ends_the_run(world, tmp_path):
    """The first process waits --timeout minutes for the second one, then both end."""
    done = run_ranks("pretrain.py", *TINY, "--data", world, "--output", tmp_path, "--steps", "9",
                     "--timeout", "0.1", last=(after_step, 1, time.sleep, 20))
    assert all(one.returncode == 1 for one in done)


# --------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("flag,value", [
    ("--backbone", "r99"), ("--batch-size", "0"), ("--lr", "nan"), ("--width", "30"),
    ("--epochs", "0"), ("--clip", "0"), ("--workers", "many"), ("--device", "cuda:99"),
    ("--resume", "nowhere.pt"), ("--resume", "README.md"), ("--data", "nowhere"),
    ("--backbone-weights", "nowhere.pth"), ("--output", "README.md")])
def test_a_flag_that_cannot_be_is_named_in_one_line(flag, value, world, tmp_path, capsys):
    flags = ["--backbone", "r18", "--data", world, "--output", str(tmp_path), flag, value]
    try:
        code = pretrain.main(flags)
    except SystemExit as end:  # argparse's way
        code = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
    assert code == 2 and len(lines) == 1, lines
    assert flag in lines[0] and value in lines[0]


@pytest.mark.parametrize("script", [pretrain, finetune, evaluate])
def test_help_says_each_default_once_and_none_where_there_is_none(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    for flag in re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]:
        assert flag.count("default:") <= 1, flag
        assert not re.search(r"default:\s+(None|False|\[\])", flag), flag


def test_pretraining_starts_from_detrs_weights(detr, world, tmp_path):
    """Its sizes are the file's; words and the heads that DETR has not are re-initialised."""
    flags = ["--mini", "--init", detr, "--data", world, "--workers", "0", "--minutes", "0",
             "--batch-size", "4", "--val-pictures", "4", "--steps", "1"]
    printed = ok(run_command("pretrain.py", *flags, "--output", tmp_path / "a"))
    anew = printed.split("parameters re-initialised: ")[1].split("\n")[0]
    assert [part.split()[0] for part in anew.split(", ")] == [
        "mlm_bias", "sentence", "mlm_transform", "itm", "classes", "attribute", "caption"]
    state = load_checkpoint(f"{tmp_path}/a/last.pt")
    config, args = state["config"], state["args"]
    assert (config.width, config.heads, config.queries, config.stride) == (64, 2, 8, 32)
    assert config.decoder_norm and config.frozen_batch_norm
    assert config.task == "" and args["width"] == 64 and args["backbone"] == "r18"
    stem = "backbone.resnet.layer1.0.conv1.weight"
    assert torch.equal(state["model"][stem], load_checkpoint(detr)["model"][stem])
    ok(run_command("pretrain.py", "--resume", tmp_path / "a/last.pt", "--steps", "2"))

    for change, words in ((["--queries", "9"], "--queries 9: "),
                          (["--init", tmp_path / "a/last.pt"], "not DETR's weights")):
        one_line(run_command("pretrain.py", *flags, "--output", tmp_path / "b", *change), words)
