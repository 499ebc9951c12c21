"""Matching and the set loss: against transformers' DETR loss, and against a slow float64 loop over all assignments."""

import itertools
import math

import pytest
import torch
import torchvision
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from matcher import (
    LOSS_WEIGHTS,
    box_cxcywh_to_xyxy,
    count,
    generalized_box_iou,
    hungarian_match,
    set_loss,
)


def random_boxes(*shape, dtype=torch.float32):
    return torch.cat([torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.35 + 0.02], -1).to(dtype)


def random_case(numbers, L=3, Q=8, classes=None, A=5, dtype=torch.float32, seed=0):
    """Outputs that require gradients, and targets of numbers[b] boxes; sources alternate where there are two."""
    torch.manual_seed(seed)
    classes = classes or {"coco": 7}
    B = len(numbers)
    outputs = {"logits": {name: torch.randn(L, B, Q, n + 1, dtype=dtype, requires_grad=True)
                          for name, n in classes.items()},
               "boxes": random_boxes(L, B, Q, dtype=dtype).requires_grad_(),
               "attributes": torch.randn(L, B, Q, A, dtype=dtype, requires_grad=True)}
    targets = []
    for b, n in enumerate(numbers):
        source = list(classes)[b % len(classes)]
        target = {"source": source, "labels": torch.randint(0, classes[source], (n,)),
                  "boxes": random_boxes(n, dtype=dtype)}
        if source == "vg":
            target["attributes"] = (torch.rand(n, A) < 0.4).to(dtype)
        targets.append(target)
    return outputs, targets


def weighted(losses):
    return sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())


def gradients(total, outputs):
    tensors = [*outputs["logits"].values(), outputs["boxes"], outputs["attributes"]]
    return torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("numbers", [(3, 1, 5), (0, 4, 2), (0, 0), (11, 8, 1)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_transformers_detr_loss(numbers, seed):
    outputs, targets = random_case(numbers, seed=seed)
    logits, boxes = outputs["logits"]["coco"], outputs["boxes"]
    config = DetrConfig(num_labels=7, auxiliary_loss=True, decoder_layers=3)
    theirs, named, _ = ForObjectDetectionLoss(
        logits[-1], [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets], "cpu", boxes[-1], config,
        outputs_class=logits, outputs_coord=boxes)
    ours = set_loss(outputs, targets)
    for mine, name in (("loss_class", "loss_ce"), ("loss_bbox", "loss_bbox"), ("loss_giou", "loss_giou")):
        expected = named[name] + sum(named[f"{name}_{layer}"] for layer in range(2))
        torch.testing.assert_close(ours[mine], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted(ours), theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(weighted(ours), (logits, boxes), retain_graph=True),
                    torch.autograd.grad(theirs, (logits, boxes), allow_unused=True)):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


def slow_giou(a, b):
    """Of two boxes cxcywh, from the definition."""
    (ax0, ay0), (ax1, ay1) = (a[0] - a[2] / 2, a[1] - a[3] / 2), (a[0] + a[2] / 2, a[1] + a[3] / 2)
    (bx0, by0), (bx1, by1) = (b[0] - b[2] / 2, b[1] - b[3] / 2), (b[0] + b[2] / 2, b[1] + b[3] / 2)
    zero = torch.zeros((), dtype=torch.float64)
    overlap = (torch.maximum(torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0), zero)
               * torch.maximum(torch.minimum(ay1, by1) - torch.maximum(ay0, by0), zero))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = ((torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0)))
    return overlap / union - (hull - union) / hull


def slow_set_loss(outputs, targets):
    """One picture, layer, query and box at a time; the best assignment by trying all of them."""
    L, B, Q, _ = outputs["boxes"].shape
    total = {name: torch.zeros((), dtype=torch.float64) for name in LOSS_WEIGHTS}
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    class_weight = sum(len(t["labels"]) + 0.1 * (Q - len(t["labels"])) for t in targets)
    described = max(1, sum(int(a.any()) for t in targets if "attributes" in t for a in t["attributes"]))
    for layer, b in itertools.product(range(L), range(B)):
        t = targets[b]
        logits, boxes = outputs["logits"][t["source"]][layer, b], outputs["boxes"][layer, b]
        n, none = len(t["labels"]), logits.shape[-1] - 1
        best, partners = math.inf, ()
        for queries in itertools.permutations(range(Q), n):
            cost = 0.0
            for q, label, box in zip(queries, t["labels"].tolist(), t["boxes"]):
                cost -= float(logits[q].detach().softmax(-1)[label])
                cost += 5 * float((boxes[q] - box).abs().sum().detach()) - 2 * float(slow_giou(boxes[q], box).detach())
            if cost < best:
                best, partners = cost, queries
        for q in range(Q):
            label = int(t["labels"][partners.index(q)]) if q in partners else none
            total["loss_class"] = total["loss_class"] + (0.1 if label == none else 1.0) * (
                logits[q].exp().sum().log() - logits[q][label]) / class_weight
        for number, q in enumerate(partners):
            total["loss_bbox"] = total["loss_bbox"] + (boxes[q] - t["boxes"][number]).abs().sum() / num_boxes
            total["loss_giou"] = total["loss_giou"] + (1 - slow_giou(boxes[q], t["boxes"][number])) / num_boxes
            true = t["attributes"][number].nonzero()[:, 0].tolist() if "attributes" in t else []
            for a in true:
                of = outputs["attributes"][layer, b, q]
                total["loss_attribute"] = total["loss_attribute"] + (
                    of.exp().sum().log() - of[a]) / len(true) / described
    return total


def test_equals_a_slow_loop_in_float64_with_two_label_sets_and_attributes():
    outputs, targets = random_case((2, 3, 0, 1), L=2, Q=4, classes={"coco": 3, "vg": 6}, dtype=torch.float64)
    targets[1]["attributes"][0] = 0  # not described: not asked, and not counted
    ours, slow = set_loss(outputs, targets), slow_set_loss(outputs, targets)
    assert slow["loss_attribute"] > 0
    for name in slow:
        torch.testing.assert_close(ours[name], slow[name], rtol=1e-6, atol=1e-8)  # the counts are float32
    for a, b in zip(gradients(weighted(ours), outputs), gradients(weighted(slow), outputs)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_pictures_without_objects_learn_no_object_and_nothing_else():
    outputs, targets = random_case((0, 0), classes={"coco": 3, "vg": 6})
    losses = set_loss(outputs, targets)
    assert losses["loss_bbox"] == losses["loss_giou"] == losses["loss_attribute"] == 0
    to_logits, other_logits, to_boxes, to_attributes = gradients(weighted(losses), outputs)
    assert (to_logits[:, 0, :, -1] < 0).all() and (to_logits[:, 0, :, :-1] > 0).all()
    assert to_boxes.abs().sum() == 0 and to_attributes.abs().sum() == 0
    assert (to_logits[:, 1] == 0).all() and (other_logits[:, 0] == 0).all()  # each trains the head of its own source


def test_every_output_takes_part_even_if_no_picture_is_of_its_source():
    outputs, targets = random_case((2, 1), classes={"coco": 3, "vg": 6})
    targets = [t for t in targets if t["source"] == "coco"]
    outputs = {"logits": {k: v[:, :1] for k, v in outputs["logits"].items()}, "boxes": outputs["boxes"][:, :1],
               "attributes": outputs["attributes"][:, :1]}
    assert all(g is not None for g in gradients(weighted(set_loss(outputs, targets)), outputs))


def test_parts_of_a_batch_add_up_to_the_whole():
    outputs, targets = random_case((2, 3, 0, 1, 4), classes={"coco": 3, "vg": 6})
    whole, counts = set_loss(outputs, targets), count(targets, 8)
    summed = dict.fromkeys(whole, 0.0)
    for part in (slice(0, 2), slice(2, 5)):
        mine = {"logits": {k: v[:, part] for k, v in outputs["logits"].items()}, "boxes": outputs["boxes"][:, part],
                "attributes": outputs["attributes"][:, part]}
        for name, value in set_loss(mine, targets[part], counts=counts).items():
            summed[name] = summed[name] + value
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name])


def test_matching_is_one_to_one_and_names_rows_across_pictures():
    outputs, targets = random_case((3, 0, 11))
    layer, picture, query, row = hungarian_match(outputs["logits"]["coco"], outputs["boxes"], targets)
    assert len(layer) == 3 * (3 + 8)  # eleven objects, eight queries
    for at in range(3):
        assert sorted(row[(layer == at) & (picture == 0)].tolist()) == [0, 1, 2]
        assert len(set(query[(layer == at) & (picture == 2)].tolist())) == 8
        assert set(row[(layer == at) & (picture == 2)].tolist()) <= set(range(3, 14))


def test_a_perfect_answer_is_found():
    outputs, targets = random_case((4,), L=1)
    order = torch.randperm(8)[:4]
    with torch.no_grad():
        outputs["boxes"][0, 0, order] = targets[0]["boxes"]
        outputs["logits"]["coco"][0, 0, order, targets[0]["labels"]] = 20
    losses = set_loss(outputs, targets)
    assert losses["loss_bbox"] < 1e-6 and losses["loss_giou"] < 1e-5
    _, _, query, row = hungarian_match(outputs["logits"]["coco"], outputs["boxes"], targets)
    assert order[row].tolist() == query.tolist()


def test_box_arithmetic_equals_torchvision():
    boxes = random_boxes(50)
    corners = torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")
    torch.testing.assert_close(box_cxcywh_to_xyxy(boxes), corners)
    torch.testing.assert_close(generalized_box_iou(corners[:20, None], corners[None, 20:]),
                               torchvision.ops.generalized_box_iou(corners[:20], corners[20:]))


def test_boxes_without_area_give_no_nan():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert torch.isfinite(generalized_box_iou(point, point)).all()


def test_corners_in_the_wrong_order_are_an_error():
    with pytest.raises(ValueError, match="x1 < x0"):
        generalized_box_iou(torch.tensor([[0.5, 0.5, 0.2, 0.6]]), torch.tensor([[0.1, 0.1, 0.2, 0.2]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_matched_last_and_make_the_loss_not_finite(bad):
    outputs, targets = random_case((2, 8))
    with torch.no_grad():
        outputs["boxes"][1, 0, 3] = bad
        outputs["logits"]["coco"][1, 0, 3] = bad
    layer, picture, query, _ = hungarian_match(outputs["logits"]["coco"], outputs["boxes"], targets)
    assert len(layer) == 3 * (2 + 8) and not ((layer == 1) & (picture == 0) & (query == 3)).any()
    assert not torch.isfinite(weighted(set_loss(outputs, targets)))


def test_half_precision_is_computed_in_float32():
    outputs, targets = random_case((2, 1))
    exact = set_loss(outputs, targets)
    half = {"logits": {k: v.bfloat16() for k, v in outputs["logits"].items()}, "boxes": outputs["boxes"],
            "attributes": outputs["attributes"].bfloat16()}
    losses = set_loss(half, targets)
    assert all(value.dtype == torch.float32 for value in losses.values())
    torch.testing.assert_close(losses["loss_class"], exact["loss_class"], rtol=0.02, atol=0.02)
