"""The set loss equals transformers' of DETR, and a float64 loop that tries all assignments."""

import itertools
import math

import pytest
import torch
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from matcher import LOSS_WEIGHTS, hungarian_match, loss_normalizers, no_object_weight, set_loss

TWO_SETS = {"coco": 3, "vg": 6}


def random_boxes(*shape, dtype=torch.float32):
    centre = torch.rand(*shape, 2) * 0.6 + 0.2
    size = torch.rand(*shape, 2) * 0.35 + 0.02
    return torch.cat([centre, size], -1).to(dtype)


def random_case(numbers, L=3, Q=8, classes=None, dtype=torch.float32, seed=0):
    """Outputs that require gradients, and targets of numbers[b] boxes; label sets alternate."""
    torch.manual_seed(seed)
    classes = classes or {"coco": 7}
    B = len(numbers)
    logits = {name: torch.randn(L, B, Q, n + 1, dtype=dtype, requires_grad=True)
              for name, n in classes.items()}
    outputs = {"logits": logits, "boxes": random_boxes(L, B, Q, dtype=dtype).requires_grad_(),
               "attributes": torch.randn(L, B, Q, 5, dtype=dtype, requires_grad=True)}
    targets = []
    for b, n in enumerate(numbers):
        source = list(classes)[b % len(classes)]
        target = {"source": source, "labels": torch.randint(0, classes[source], (n,)),
                  "boxes": random_boxes(n, dtype=dtype)}
        if source == "vg":
            target["attributes"] = (torch.rand(n, 5) < 0.4).to(dtype)
        targets.append(target)
    return outputs, targets


def weighted(losses):
    return sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())


def gradients(total, outputs):
    tensors = [*outputs["logits"].values(), outputs["boxes"], outputs["attributes"]]
    return torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("numbers", [(3, 1, 5), (0, 4, 2), (0, 0), (11, 8, 1)], ids=str)
def test_equals_transformers_detr_loss(numbers):
    outputs, targets = random_case(numbers)
    logits, boxes = outputs["logits"]["coco"], outputs["boxes"]
    config = DetrConfig(num_labels=7, auxiliary_loss=True, decoder_layers=3)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    theirs, named, _ = ForObjectDetectionLoss(logits[-1], labels, "cpu", boxes[-1], config,
                                              outputs_class=logits, outputs_coord=boxes)
    ours = set_loss(outputs, targets)
    for name, theirs_name in (("loss_class", "loss_ce"), ("loss_bbox", "loss_bbox"),
                              ("loss_giou", "loss_giou")):
        expected = named[theirs_name] + named[f"{theirs_name}_0"] + named[f"{theirs_name}_1"]
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted(ours), theirs, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(theirs, (logits, boxes), allow_unused=True)
    for a, b in zip(torch.autograd.grad(weighted(ours), (logits, boxes)), expected):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def slow_giou(a, b):
    """Of two boxes cxcywh, from the definition."""
    a0, a1 = a[:2] - a[2:] / 2, a[:2] + a[2:] / 2
    b0, b1 = b[:2] - b[2:] / 2, b[:2] + b[2:] / 2
    overlap = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod()
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod()
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return overlap / union - (hull - union) / hull


def best_assignment(logits, boxes, target):
    """The queries of the objects, by trying all assignments (Eq. 1)."""
    def cost(queries):
        total = 0.0
        for q, label, box in zip(queries, target["labels"].tolist(), target["boxes"]):
            total -= float(logits[q].softmax(-1)[label])
            total += 5 * float((boxes[q] - box).abs().sum()) - 2 * float(slow_giou(boxes[q], box))
        return total

    return min(itertools.permutations(range(len(boxes)), len(target["labels"])), key=cost)


def slow_set_loss(outputs, targets):
    """One image, layer, query and box at a time."""
    L, B, Q, _ = outputs["boxes"].shape
    total = {name: torch.zeros((), dtype=torch.float64) for name in LOSS_WEIGHTS}
    counts = [len(t["labels"]) for t in targets]
    class_weight = sum(n + 0.1 * (Q - n) for n in counts)
    described = sum(int(row.any()) for t in targets for row in t.get("attributes", ()))
    for layer, b in itertools.product(range(L), range(B)):
        target = targets[b]
        logits = outputs["logits"][target["source"]][layer, b]
        boxes = outputs["boxes"][layer, b]
        partners = best_assignment(logits.detach(), boxes.detach(), target)
        for q in range(Q):
            is_object = q in partners
            label = int(target["labels"][partners.index(q)]) if is_object else -1
            loss = logits[q].logsumexp(0) - logits[q][label]
            total["loss_class"] = total["loss_class"] + (1.0 if is_object else 0.1) * loss
        for number, q in enumerate(partners):
            box = target["boxes"][number]
            total["loss_bbox"] = total["loss_bbox"] + (boxes[q] - box).abs().sum()
            total["loss_giou"] = total["loss_giou"] + 1 - slow_giou(boxes[q], box)
            if target["source"] == "vg":
                true = target["attributes"][number].nonzero()[:, 0].tolist()
                of = outputs["attributes"][layer, b, q]
                for a in true:
                    loss = (of.logsumexp(0) - of[a]) / len(true)
                    total["loss_attribute"] = total["loss_attribute"] + loss
    return {"loss_class": total["loss_class"] / class_weight,
            "loss_bbox": total["loss_bbox"] / sum(counts),
            "loss_giou": total["loss_giou"] / sum(counts),
            "loss_attribute": total["loss_attribute"] / described}


def test_equals_a_slow_loop_with_two_label_sets_and_attributes():
    outputs, targets = random_case((2, 3, 0, 1), L=2, Q=4, classes=TWO_SETS, dtype=torch.float64)
    targets[1]["attributes"][0] = 0  # a box without attributes: not asked, and not counted
    ours, slow = set_loss(outputs, targets), slow_set_loss(outputs, targets)
    assert slow["loss_attribute"] > 0
    for name in slow:  # ours is computed in float32
        torch.testing.assert_close(ours[name].double(), slow[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(weighted(ours), outputs), gradients(weighted(slow), outputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_output_gets_a_gradient_even_if_no_image_is_of_its_source():
    outputs, targets = random_case((2,), classes=TWO_SETS)
    assert targets[0]["source"] == "coco"
    total = weighted(set_loss(outputs, targets))
    assert all(gradient is not None for gradient in gradients(total, outputs))


def test_predictions_that_are_not_finite_are_matched_last_and_the_loss_is_not_finite():
    outputs, targets = random_case((2, 8))
    with torch.no_grad():
        outputs["boxes"][1, 0, 3] = math.nan
        outputs["logits"]["coco"][1, 0, 3] = math.nan
    layer, image, query, _ = hungarian_match(outputs["logits"]["coco"], outputs["boxes"], targets)
    assert len(layer) == 3 * (2 + 8)
    assert not ((layer == 1) & (image == 0) & (query == 3)).any()
    assert not torch.isfinite(weighted(set_loss(outputs, targets)))


def test_no_object_weighs_what_balances_objects_and_queries():
    """DETR's 0.1 for COCO's 7.3 objects; and in the loss both sides then weigh the same."""
    assert no_object_weight(7.3, 100) == no_object_weight(1, 100) == 0.1
    assert no_object_weight(20, 100) == pytest.approx(20 / 80)
    weight = no_object_weight(3.0, 8)
    outputs, targets = random_case((2, 4))
    _, class_weight, _ = loss_normalizers(targets, 8, weight)
    assert class_weight == pytest.approx(2 * 6)  # six objects, and ten queries that weigh as much
    logits = outputs["logits"]["coco"]
    logits.data.zero_()
    assert set_loss(outputs, targets, no_object=weight)["loss_class"].item() == pytest.approx(
        3 * math.log(logits.shape[-1]), rel=1e-5)
