"""A GPU computes what the CPU computes. Skipped where there is none, but for one test: it looks for
tensors on a wrong device with fake tensors, which have a device and no numbers.
"""

import json
import math
import warnings
from argparse import Namespace

import pytest
import torch
from conftest import TINY, run_command, small_batch, small_model
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

import matcher
import pretrain
from data import Tokenizer
from evaluate import predict
from finetune import FineTuning, TaskSet, collate_task
from matcher import LOSS_WEIGHTS, to_device
from pretrain import Pretraining
from tasks import TASKS, make_task

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"
# Of pre-training's images
SIZES = {"padded": ((64, 80), (50, 96), (64, 64)), "equal": ((64, 80),) * 3}


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Convolutions without TF32, which has the digits of float16."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def close(found, expected, rtol=1e-3, atol=1e-4):
    assert found.keys() == expected.keys()
    for name in expected:
        a, b = found[name].detach().cpu().float(), expected[name].detach().cpu().float()
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, float(b.abs().max())),
                                   msg=lambda text, name=name: f"{name}: {text}")


def step(objective, batch, device, amp=False):
    """(losses, gradients) of a training step of a model that lies on the CPU."""
    normalizers = objective.normalizers(batch)
    objective.to(device).zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        losses = objective(to_device(batch, device), normalizers)
    sum(LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()).backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return losses, gradients


@pytest.fixture(scope="module", params=[*SIZES, *TASKS])
def case(request, world, tmp_path_factory):
    """(objective, batch, examples, tokenizer) of pre-training on random images, or of a task's
    first three items in the world.
    """
    if request.param in SIZES:
        return Pretraining(small_model()), small_batch(SIZES[request.param]), None, None
    tokenizer = Tokenizer(f"{world}/vocab.txt")
    # Of three images all others are wrong ones: none is drawn
    task = make_task(request.param, {"negatives": 2, "no_object_weight": 0.1})
    folder = str(tmp_path_factory.mktemp("index"))
    index = task.index(world, "train", folder, say=lambda *_: None)
    if task.new_head:
        task.labels = task.choose_labels(index["targets"], index["targets"])
    model = small_model(
        vocabulary=len(tokenizer.vocabulary), max_tokens=40, pad=tokenizer.pad, cls=tokenizer.cls,
        sep=tokenizer.sep, mask=tokenizer.mask, classifier_images=task.images,
        classifier_outputs=len(task.labels), classes={"coco": 80, "vg": 4})
    args = Namespace(seed=0, short_sides=[64], long_side=96, train_examples=0,
                     sentences_per_picture=5)  # an image is one item
    items = TaskSet(task, index["examples"], tokenizer, args)
    batch = collate_task([items[0, i, 0] for i in range(3)], tokenizer.pad)
    return FineTuning(model, task, False), batch, index["examples"][:3], tokenizer


@gpu
def test_a_step_is_the_cpus_and_a_task_answers(case):
    objective, batch, examples, tokenizer = case
    expected, expected_gradients = step(objective, batch, "cpu")
    expected_gradients = {name: g.clone() for name, g in expected_gradients.items()}
    losses, gradients = step(objective, batch, DEVICE)
    close(losses, expected)
    close(gradients, expected_gradients, rtol=1e-2, atol=1e-3)
    if examples is None:
        losses, gradients = step(objective, batch, DEVICE, amp=True)
        close(losses, expected, rtol=0.05, atol=0.02)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    else:
        answers = predict(objective.task, objective.model, tokenizer, examples, device=DEVICE,
                          short=64, long=96)
        assert len(answers) == 3
    objective.to("cpu")


@gpu
@pytest.mark.parametrize("beam", [1, 4])
@torch.no_grad()
def test_captions_are_the_cpus(beam):
    captions = []
    for device in (DEVICE, "cpu"):
        model = small_model(vocabulary=9)
        model.caption.weight.mul_(3)  # its choices are not all nearly alike
        batch = to_device(small_batch(), device)
        grid = model.to(device).encode_image(batch["images"], batch["sizes"])
        captions.append(model.generate(model.encode(grid), beam=beam))
    assert captions[0] == captions[1]


def read_log(folder):
    with open(folder / "log.jsonl") as file:
        return [json.loads(line) for line in file]


@gpu
def test_a_whole_training_with_validation_begins_as_the_cpus(world, tmp_path):
    logs = {}
    for name, device, amp in (("cpu", "cpu", "none"), ("cuda", DEVICE, "none"),
                              ("bf16", DEVICE, "bf16")):
        done = run_command("pretrain.py", *TINY, "--data", world, "--steps", "4", "--val-every",
                           "2", "--output", tmp_path / name, "--device", device, "--amp", amp)
        assert done.returncode == 0, done.stderr[-3000:]
        logs[name] = read_log(tmp_path / name)
    first = {name: {k: v for k, v in log[0].items() if k.startswith("loss")}
             for name, log in logs.items()}
    assert first["cuda"] == pytest.approx(first["cpu"], rel=0.01, abs=1e-3)  # with TF32
    assert first["bf16"] == pytest.approx(first["cpu"], rel=0.05, abs=0.02)
    for log in logs.values():
        assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4]
        assert log[-1].keys() == logs["cpu"][-1].keys() and "val_AP50" in log[-1]
        assert all(math.isfinite(value) for line in log for value in line.values())


def training(world, folder, *words):
    words = [*TINY, "--data", world, "--val-pictures", "1", "--schedule", "step",
             "--output", str(folder), "--device", DEVICE, *words]
    assert pretrain.main(words) == 0


@gpu
def test_a_resumed_training_ends_with_the_weights_of_one_that_never_stopped(world, tmp_path):
    """Bit for bit, if two equal runs are; else their logs are close."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name in ("whole", "again"):
            training(world, tmp_path / name, "--steps", "4")
        training(world, tmp_path / "half", "--steps", "2")
        resumed = ["--resume", str(tmp_path / "half" / "last.pt"), "--steps", "4"]
        training(world, tmp_path / "half", *resumed)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, again, half = (torch.load(tmp_path / name / "last.pt", map_location="cpu")["model"]
                          for name in ("whole", "again", "half"))
    if all(torch.equal(whole[name], again[name]) for name in whole):
        assert [name for name in whole if not torch.equal(whole[name], half[name])] == []
    expected = [line["loss"] for line in read_log(tmp_path / "whole") if "loss" in line]
    found = [line["loss"] for line in read_log(tmp_path / "half") if "loss" in line]
    assert found == pytest.approx(expected, rel=0.02)


@gpu
def test_a_step_makes_the_host_wait_three_times_at_most(world, tmp_path):
    """For the costs of the matching of each of the two label sets, and: is the gradient finite?"""
    after_step = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hook = register_optimizer_step_post_hook(lambda *_: after_step.append(len(caught)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training(world, tmp_path / "out", "--steps", "5", "--log-every", "9")
        finally:
            torch.cuda.set_sync_debug_mode("default")
            hook.remove()
    waits = []
    for first, last in zip(after_step[1:], after_step[2:]):  # the first step is logged, which waits
        waits.append([f"{w.filename}:{w.lineno}" for w in caught[first:last]
                      if "synchroniz" in str(w.message)])
    assert waits and all(1 <= len(of_step) <= 3 for of_step in waits), waits


def test_no_tensor_is_on_a_wrong_device(case, monkeypatch):
    """All tensors are fake, and those of different devices do not mix."""
    def match(logits, boxes, targets):  # the true one needs numbers
        n = sum(len(target["labels"]) for target in targets)
        return tuple(torch.zeros(n, dtype=torch.long, device=logits.device) for _ in range(4))

    monkeypatch.setattr(matcher, "hungarian_match", match)
    objective, batch, _, _ = case
    normalizers = objective.normalizers(batch)
    weights = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    mode = FakeTensorMode()
    batch, weights = tree_map_only(torch.Tensor, mode.from_tensor,
                                   (to_device(batch, "cpu"), weights))
    with mode, torch.no_grad():
        weights = to_device(weights, "cuda:0")
        inputs = (to_device(batch, "cuda:0"), normalizers)
        losses = torch.func.functional_call(objective, weights, inputs)
    assert {loss.device for loss in losses.values()} == {torch.device("cuda", 0)}
