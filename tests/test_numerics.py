"""Numbers: float32 and bf16 against float64, gradients against finite differences, extreme values, bit-equal steps.

Bounds are in units of rounding: u = 2^-24 for float32 and 2^-8 for bf16, the most by which one rounding changes a
number relative to it. From pixels to an output there are about 50 roundings one after another (14 convolutions, 2
encoder layers with 6 products each, 2 decoder layers with 10, heads). Their errors have no common direction, so they
add up like a random walk: sqrt(50) u, 7 u. A loss is a mean over many numbers and less wrong than each. A gradient
comes back the same way through activations that are wrong themselves: sqrt(3 * 50) u, 12 u. OUTPUT, LOSS and GRADIENT
are those, rounded up; PART, of one part of the model such as the ResNet alone, at the far end of the way, twice that.

Two things can do more for single seeds, so these bound the median. A gradient that is a difference of nearly equal
numbers (p - y, summed over a batch that is nearly right) keeps its absolute precision and loses its relative one. And a
ReLU whose input is within rounding of zero opens or closes, in float32 too: one unit's gradient comes or goes.
"""

import contextlib
import copy
import math
import types

import pytest
import torch
from conftest import small_batch, small_model

import finetune
import matcher
import pretrain
from matcher import box_cxcywh_to_xyxy, generalized_box_iou, set_loss
from model import TASKS

UNIT = {"float32": 2.0 ** -24, "bf16": 2.0 ** -8}
SIZES = ((33, 48), (48, 40), (32, 32))  # padded pictures


def task_batch(task, seed=0):
    """A batch as data.collate_task makes it, of random pixels and words: two sentences a picture; "": small_batch."""
    batch, g = small_batch(SIZES, seed=seed), torch.Generator().manual_seed(seed)
    if not task:
        return batch
    picture, B = torch.arange(3).repeat_interleave(2), 3
    found = {"targets": [None] * 2 * B, "images": batch["images"], "sizes": batch["sizes"], "picture": picture,
             "tokens": batch["tokens"].flatten(0, 1)}
    if task == "vqa":
        found["targets"] = torch.randint(0, 4, (2 * B, 7), generator=g).clamp(max=3) * 0.3
    elif task == "nlvr2":
        found |= {name: batch[name].repeat(2, *[1] * (batch[name].dim() - 1)) for name in ("images", "sizes")}
        found["images"][B:] = found["images"][B:].flip(1)  # other pictures: their colours change places
        found |= {"tokens": batch["tokens"][:, 0], "picture": torch.arange(B), "targets": torch.tensor([0, 1, 1])}
    elif task == "flickr30k":
        found["other_pictures"] = finetune.draw_others(picture, torch.arange(B), 2, g)
        found["other_sentences"] = finetune.draw_others(picture, picture, 2, g)
    elif task == "detection":
        found["tokens"] = batch["tokens"][:, 0]
        found["targets"] = [{"source": "coco", "labels": t["labels"], "boxes": t["boxes"]} for t in batch["targets"]]
    return found


def seeded_model(task="", seed=0, **changes):
    model = small_model(task=task, answers=7, **changes)
    torch.manual_seed(seed)
    model.initialise()
    return model


def step(model, batch, task="", amp=False):
    """(outputs, losses, gradients) of one step as the training scripts take it."""
    args = types.SimpleNamespace(task=task, text="caption", negatives=2, margin=0.25, gamma=32.0, label_smoothing=0.1,
                                 pad=0, queries=model.config.queries)
    outputs = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        if task:
            losses = finetune.Objective(model, args)(batch, finetune.counts_of(batch, args, model.config))
        else:
            found = model(batch)
            outputs = {name: found[name] for name in ("mlm", "itm", "caption")} | {
                "boxes": found["objects"]["boxes"], "attributes": found["objects"]["attributes"],
                **found["objects"]["logits"]}
    if not task:
        losses = pretrain.losses(found, batch, pretrain.counts_of(batch, args), args)
    sum(matcher.LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs, {name: loss.detach() for name, loss in losses.items()}, gradients


def to_double(value):
    if isinstance(value, list):
        return [to_double(v) for v in value]
    if isinstance(value, dict):
        return {k: to_double(v) for k, v in value.items()}
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


@contextlib.contextmanager
def all_in_float64():
    """What the code computes in float32 whatever its input's type (pixels, boxes, losses) is in float64 as well."""
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def error(a, b):
    """The distance of two vectors, relative to the second."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float((a - b).norm() / b.norm()) if b.any() else float(a.norm())


def errors(task, seeds, monkeypatch):
    """{"float32" or "bf16": [for each seed {output, loss, "gradient" or part of the model: relative error / u}]}."""
    match, found = matcher.hungarian_match, {"float32": [], "bf16": []}
    for seed in range(seeds):
        model, batch, assigned = seeded_model(task, seed), task_batch(task, seed), []

        def remember(*inputs, assigned=assigned, **more):
            assigned.append(match(*inputs, **more))
            return assigned[-1]

        monkeypatch.setattr(matcher, "hungarian_match", remember)
        with all_in_float64():
            exact = step(copy.deepcopy(model).double(), to_double(batch), task)
        for kind in found:
            # The untrained model's boxes are nearly alike: rounding can change which query has which object, and the
            # loss then has another branch. What is compared here is the arithmetic within one branch.
            again = iter(assigned)
            monkeypatch.setattr(matcher, "hungarian_match", lambda *_, again=again, **__: next(again))
            ours = step(copy.deepcopy(model), batch, task, kind == "bf16")
            assert ours[2].keys() == exact[2].keys()
            each = {name: error(ours[n][name], value) for n in (0, 1) for name, value in exact[n].items()}
            parts = {"gradient": list(exact[2])}
            for name in exact[2]:
                parts.setdefault(f"gradient of {name.split('.')[0]}", []).append(name)
            for part, names in parts.items():
                each[part] = error(*(torch.cat([g[n].flatten() for n in names]) for g in (ours[2], exact[2])))
            found[kind].append({name: value / UNIT[kind] for name, value in each.items()})
        monkeypatch.setattr(matcher, "hungarian_match", match)
    return found


# Of the median seed, in u. Any seed may have six times that, a gradient 2^-8 too, for the ReLU that closes.
OUTPUT, LOSS, GRADIENT, PART = 8, 4, 12, 24


@pytest.mark.parametrize("task", ["", *TASKS])
def test_float32_and_bf16_stay_within_their_rounding_of_float64(task, monkeypatch):
    """Measured over 20 seeds of pre-training and each task: the largest median and the largest of all, in u.

                  float32                    bf16
        output    6.4    19 (ITM)            2.2    6.6 (ITM)
        loss      1.5   6.3 (NLVR2)          0.6    4.0 (NLVR2)
        gradient  8.3    60 (NLVR2)          9.0     42 (NLVR2)
        part       18  1230 (NLVR2, ResNet)   15     72 (ITM head)

    The 1230 is one ReLU with an input of 1e-8; without that seed it is 54, of the ITM head.
    """
    for kind, seeds in errors(task, 3, monkeypatch).items():
        for name in seeds[0]:
            bound = (LOSS if name.startswith("loss") else GRADIENT if name == "gradient" else
                     PART if name.startswith("gradient") else OUTPUT)
            found = sorted(seed[name] for seed in seeds)
            most = max(6 * bound * UNIT[kind], 2.0 ** -8 if name.startswith("gradient") else 0)
            assert found[len(found) // 2] < bound and found[-1] * UNIT[kind] < most, (kind, name, found)


# ----------------------------------------------------------------------------------------------------------------
# Gradients against finite differences, in float64


def boxes_of(n, g, size=(0.1, 0.3)):
    """(n, 4) cxcywh within the picture, in general position: no two edges at the same place."""
    wh = torch.rand(n, 2, generator=g, dtype=torch.float64) * (size[1] - size[0]) + size[0]
    return torch.cat([torch.rand(n, 2, generator=g, dtype=torch.float64) * 0.6 + 0.2, wh], -1)


def test_the_set_losses_gradient(monkeypatch):
    """All four losses by all outputs: two layers, two label sets, pictures with 2, 3, 0 and 1 objects.

    The assignment has no derivative: each object has a prediction near it, so that none of the shifts changes it.
    """
    g = torch.Generator().manual_seed(0)
    L, Q, targets = 2, 3, []
    for b, n in enumerate((2, 3, 0, 1)):
        target = {"source": ("coco", "vg")[b % 2], "boxes": boxes_of(n, g),
                  "labels": torch.randint(0, 2, (n,), generator=g)}
        if b % 2:
            target["attributes"] = (torch.rand(n, 4, generator=g, dtype=torch.float64) < 0.5).double()
            target["attributes"][1:2] = 0  # not asked
        targets.append(target)
    boxes = boxes_of(L * len(targets) * Q, g).view(L, len(targets), Q, 4)
    for b, t in enumerate(targets):
        beside = 0.01 * (1 + torch.rand(L, *t["boxes"].shape, generator=g, dtype=torch.float64))
        boxes[:, b, :len(t["boxes"])] = t["boxes"] + beside
    inputs = [boxes, *(torch.randn(L, len(targets), Q, n, generator=g, dtype=torch.float64) for n in (3, 4, 4))]
    match, seen = matcher.hungarian_match, {}

    def record(logits, *more):
        found = match(logits, *more)
        seen.setdefault(logits.shape[-1], []).append(torch.stack(found))  # COCO has 3 classes here, Visual Genome 4
        return found

    monkeypatch.setattr(matcher, "hungarian_match", record)

    def losses(boxes, coco, vg, attributes):
        return tuple(set_loss({"logits": {"coco": coco, "vg": vg}, "boxes": boxes, "attributes": attributes},
                              targets).values())

    assert all(float(loss) > 0 for loss in losses(*inputs))
    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in inputs], atol=1e-7, rtol=1e-5)
    assert len(seen) == 2 and all(torch.equal(found, each[0]) for each in seen.values() for found in each)


def test_the_gradient_of_giou():
    """Pairs that overlap, that lie apart, and of which one holds the other."""
    g = torch.Generator().manual_seed(0)
    a, b = (box_cxcywh_to_xyxy(boxes_of(n, g)) for n in (6, 5))
    b = torch.cat([b, a[:1] + torch.tensor([[-0.05, -0.04, 0.06, 0.07]], dtype=torch.float64)])
    value = generalized_box_iou(a[:, None], b[None])
    assert (value < 0).any() and (value > 0).any()
    assert torch.autograd.gradcheck(lambda a, b: generalized_box_iou(a[:, None], b[None]),
                                    [a.requires_grad_(), b.requires_grad_()], atol=1e-8, rtol=1e-6)


def test_the_circle_losses_gradient_is_that_of_fixed_weights():
    """Its weights are not differentiated, so the loss's own finite differences are another function's gradient; those
    of the formula with the weights held at the point are the gradient that is meant.
    """
    g, margin, gamma, h = torch.Generator().manual_seed(0), 0.25, 32.0, 1e-6
    right, wrong = (torch.rand(*shape, generator=g, dtype=torch.float64) for shape in ((5,), (5, 3)))

    def loss(values, weights):  # Eq. 6 of one anchor: the right similarity, then the wrong ones
        push = sum(math.exp(gamma * a * (s - margin)) for s, a in zip(values[1:], weights[1:]))
        return math.log(1 + push * math.exp(-gamma * weights[0] * (values[0] - (1 - margin))))

    finetune.circle_loss(right.requires_grad_(), wrong.requires_grad_(), margin, gamma).sum().backward()
    free = 0
    for n in range(5):
        point = [float(right[n].detach()), *wrong[n].tolist()]

        def weights(values):
            return [1 + margin - values[0], *(s + margin for s in values[1:])]

        for k, gradient in enumerate([float(right.grad[n]), *wrong.grad[n].tolist()]):
            above, below = ([s + sign * h * (i == k) for i, s in enumerate(point)] for sign in (1, -1))
            held = weights(point)
            assert gradient == pytest.approx((loss(above, held) - loss(below, held)) / (2 * h), rel=1e-6, abs=1e-7)
            free += abs(gradient - (loss(above, weights(above)) - loss(below, weights(below))) / (2 * h)) > 1e-2
    assert free  # and it is another one


# ----------------------------------------------------------------------------------------------------------------
# Extreme values


def finite(losses, gradients):
    assert all(torch.isfinite(loss).all() for loss in losses.values()), losses
    assert gradients and all(torch.isfinite(g).all() for g in gradients.values())


@torch.no_grad()
def test_boxes_are_computed_in_float32_with_amp_too():
    model, batch = small_model(), small_batch()
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.encode(model.encode_picture(batch["images"], batch["sizes"]))
        states, boxes = model.decode_objects(memory), model.detect(memory)["boxes"]
    torch.testing.assert_close(boxes, model.box(states.float()).sigmoid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bf16"])
@pytest.mark.parametrize("task", ["", *TASKS])
def test_logits_of_ten_thousand(task, kind):
    """As of a model that is sure of everything, also of what is wrong: losses are large and not infinite."""
    model, largest = seeded_model(task), {}
    heads = {"itm": model.itm, "caption": model.caption, "attribute": model.attribute, "box": model.box,
             "mlm": model.mlm_transform, **model.classes, **{name: getattr(model, name) for name in ("answer", "pair")
                                                             if hasattr(model, name)}}
    for name, head in heads.items():
        last = head[-1] if isinstance(head, torch.nn.Sequential) else head
        with torch.no_grad():
            last.weight.mul_(1e6)

        def keep(module, inputs, output, name=name):
            largest[name] = float(output.detach().abs().max())

        last.register_forward_hook(keep)
    _, losses, gradients = step(model, task_batch(task), task, kind == "bf16")
    finite(losses, gradients)
    assert largest and all(value > 1e4 for value in largest.values()), largest


def test_boxes_without_area_and_on_the_border():
    """As truth and as prediction, each with each: corners and edges of the picture, points and lines."""
    strange = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0],
                            [0.5, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 1.0], [1.0, 0.5, 0.2, 0.2], [0.5, 0.5, 1e-20, 1e-20],
                            [0.25, 0.25, 0.5, 0.5]])
    n = len(strange)
    for shift in range(n):
        boxes = strange.roll(shift, 0)[None, None].clone().requires_grad_()
        logits, attributes = (torch.full((1, 1, n, k), 1e4).requires_grad_() for k in (4, 2))
        outputs = {"logits": {"vg": logits}, "boxes": boxes, "attributes": attributes}
        targets = [{"source": "vg", "labels": torch.zeros(n, dtype=torch.long), "boxes": strange,
                    "attributes": torch.ones(n, 2)}]
        losses = set_loss(outputs, targets)
        sum(losses.values()).backward()
        finite(losses, {"boxes": boxes.grad, "logits": logits.grad, "attributes": attributes.grad})
        pairs = strange[:, None].expand(n, n, 4).clone().requires_grad_()
        value = generalized_box_iou(box_cxcywh_to_xyxy(pairs), box_cxcywh_to_xyxy(strange)[None])
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(pairs.grad).all()
        assert (value.detach().abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("gamma", [32.0, 256.0])
def test_circle_loss_at_its_ends(gamma):
    for value in (0.0, 1.0):
        for others in (0.0, 1.0):
            right, wrong = torch.tensor([value], requires_grad=True), torch.full((1, 8), others, requires_grad=True)
            loss = finetune.circle_loss(right, wrong, gamma=gamma)
            loss.sum().backward()
            finite({"loss": loss}, {"right": right.grad, "wrong": wrong.grad})


def test_a_batch_with_nothing_in_it():
    """All sentences are padding, nothing is hidden, no picture has an object, and one has a single pixel."""
    model, batch = seeded_model(), small_batch(((48, 33), (1, 1), (32, 48)))
    batch |= {name: torch.zeros_like(batch[name]) for name in ("tokens", "captions")}
    batch |= {"mlm_places": batch["mlm_places"][:0], "mlm_words": batch["mlm_words"][:0]}
    for t in batch["targets"]:
        t.update({name: t[name][:0] for name in ("labels", "boxes", "attributes") if name in t})
    outputs, losses, gradients = step(model, batch)
    finite({**losses, **outputs}, gradients)
    assert all(float(losses[name]) == 0 for name in ("loss_mlm", "loss_caption", "loss_bbox", "loss_giou",
                                                     "loss_attribute"))
    assert float(losses["loss_itm"]) > 0 and float(losses["loss_class"]) > 0
    for task in TASKS:
        batch = task_batch(task)
        batch["tokens"] = torch.zeros_like(batch["tokens"])
        if task == "detection":
            for t in batch["targets"]:
                t.update(labels=t["labels"][:0], boxes=t["boxes"][:0])
        if task == "caption":  # a batch whose every caption is empty is divided by no word: the reader leaves none
            batch["tokens"][0, :2] = torch.tensor([2, 3])
        finite(*step(seeded_model(task), batch, task)[1:])


# ----------------------------------------------------------------------------------------------------------------
# Deterministic algorithms


@pytest.mark.parametrize("task", ["", *TASKS])
def test_steps_with_deterministic_algorithms_are_equal_bit_for_bit(task):
    """None of what a step needs lacks a deterministic form (PyTorch would raise), dropout and recomputing included."""
    steps = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = seeded_model(task, dropout=0.1).train()
            model.recompute = True
            torch.manual_seed(1)
            steps.append(step(model, task_batch(task), task))
    finally:
        torch.use_deterministic_algorithms(before)
    for first, second in zip(*steps):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(g.any() for g in steps[0][2].values())
