"""Boxes, bipartite matching and the set loss (section 3.1.3, "Enhanced by Object Detection"; after DETR).

A detector that answers with a set has a problem that a classifier has not: which answer should be compared with which
object? The 100 answers have no order. DETR's solution is to find the one-to-one assignment that costs least (Eq. 1,
"bipartite matching", solved exactly by the Hungarian algorithm) and then to compare each answer with its partner. The
answers without a partner are to say "no object". Because the matching is one to one, two answers for the same object
cannot both be right, so duplicates are unlearnt (the decoder's queries see each other) and no non-maximum suppression
is needed. At inference nothing is matched: each query gives its box and its most probable class other than "no
object", with that probability as score.

Boxes are cxcywh as fractions of the unpadded picture (0 .. 1) unless a name says xyxy. Of the padded one they would
depend on the other pictures of the batch, and the model could not know them: it sees nothing of the padding.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

NO_OBJECT_WEIGHT = 0.1
# How the named losses are summed (DETR's weights; the attributes' is ours); `hungarian_match` weighs its costs by the
# same numbers, whatever --loss-weights says.
LOSS_WEIGHTS = {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_attribute": 1.0}


def full_precision(x):
    """bf16 and fp16 have too few digits for differences of areas; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def moved(x, device):
    """A small tensor of the host on the device, without waiting for what the device still has to do (CUDA only)."""
    return x.to(device, non_blocking=device.type == "cuda")


def box_cxcywh_to_xyxy(boxes):
    """(..., 4) centre and size -> corners."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def generalized_box_iou(a, b, check=True):
    """GIoU of boxes xyxy, elementwise with broadcasting: a[:, None], b[None] gives all pairs. Range -1 .. 1.

    IoU alone is 0 for all boxes that do not touch, however far apart, and gives no gradient there. GIoU subtracts the
    empty part of the smallest box around both, so it still says in which direction to move (Rezatofighi et al. 2019).
    Raises ValueError if a box has x1 < x0 or y1 < y0: its "area" would be meaningless. check=False skips this test, for
    which the host would wait for the device: boxes made of centre and size have corners in order.
    """
    a, b = full_precision(a), full_precision(b)
    for name, boxes in (("first", a), ("second", b)) if check else ():
        if (boxes[..., 2:] < boxes[..., :2]).any():
            raise ValueError(f"generalized_box_iou: the {name} boxes have x1 < x0 or y1 < y0; give corners (xyxy)")
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = inner[..., 0] * inner[..., 1]
    union = area_a + area_b - overlap
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    around = outer[..., 0] * outer[..., 1]
    tiny = torch.finfo(a.dtype).tiny  # two boxes without area have union 0; 0 / tiny is 0, 0 / 0 would be NaN
    return overlap / union.clamp(min=tiny) - (around - union) / around.clamp(min=tiny)


@torch.no_grad()
def hungarian_match(logits, boxes, targets):
    """Eq. 1: the assignment of objects to queries that costs least, for each layer and picture on its own.

    logits (L, B, Q, C + 1), the last class is "no object"; boxes (L, B, Q, 4); targets: B dicts with labels (n,) int64
    and boxes (n, 4). Returns four index tensors (M,): layer, picture, query, and row in the targets of all pictures
    one after another. With more objects than queries the dearest objects stay without a partner.
    A prediction that is not finite costs more than any other; its loss is not finite either, and the training loop
    then says for which pictures.

    No gradient goes through the matching: an assignment is a choice, it has no derivative. What is differentiated is
    the loss of the pairs that were chosen (in `set_loss`), exactly as in max-pooling.
    """
    L, B, Q, _ = logits.shape
    device = logits.device
    counts = [len(t["labels"]) for t in targets]
    most = max(counts, default=0)
    if most == 0:
        return tuple(torch.zeros(0, dtype=torch.long, device=device) for _ in range(4))
    # Objects padded to the same number for each picture, so that the costs of all layers are one tensor.
    labels = torch.zeros(B, most, dtype=torch.long, device=device)
    wanted = torch.full((B, most, 4), 0.5, device=device, dtype=full_precision(boxes).dtype)
    for b, t in enumerate(targets):
        labels[b, :counts[b]], wanted[b, :counts[b]] = t["labels"], t["boxes"].to(wanted.dtype)
    # The class cost is minus the probability, not minus its logarithm: bounded, so it cannot outweigh the boxes.
    probability = full_precision(logits).softmax(-1)
    weights, found = LOSS_WEIGHTS, full_precision(boxes)
    cost = -weights["loss_class"] * probability.gather(3, labels[None, :, None].expand(L, B, Q, most))  # (L, B, Q, n)
    cost += weights["loss_bbox"] * torch.cdist(found.flatten(0, 1), wanted.repeat(L, 1, 1), p=1).view(L, B, Q, most)
    cost -= weights["loss_giou"] * generalized_box_iou(box_cxcywh_to_xyxy(found)[..., None, :],
                                                       box_cxcywh_to_xyxy(wanted)[None, :, None], check=False)
    cost = cost.cpu()  # the one transfer: scipy works on the host, and each transfer would wait for the device
    cost = cost.nan_to_num(nan=1e9, posinf=1e9, neginf=1e9).numpy()
    rows = []
    for layer in range(L):
        before = 0
        for b, n in enumerate(counts):
            queries, objects = linear_sum_assignment(cost[layer, b, :, :n])
            rows += [(layer, b, q, before + o) for q, o in zip(queries.tolist(), objects.tolist())]
            before += n
    return tuple(moved(torch.tensor(rows, dtype=torch.long).view(-1, 4), device).unbind(1))


def count(targets, queries):
    """What the losses are divided by, (3,) float32: boxes; the sum of class weights in one layer; boxes that have
    attributes. They are sums, so those of several batches or processes may simply be added. And they should be: were
    each process's losses divided by its own count, an object would weigh more where there are few beside it.
    """
    boxes = weight = described = 0.0
    for t in targets:
        n = len(t["labels"])
        matched = min(n, queries)
        boxes += n
        weight += matched + NO_OBJECT_WEIGHT * (queries - matched)
        if "attributes" in t:
            described += float((t["attributes"].sum(-1) > 0).sum())
    return torch.tensor([boxes, weight, described])


def set_loss(outputs, targets, counts=None):
    """L_v: the losses of matched pairs, and of "no object" for the rest, summed over the decoder's layers.

    outputs: logits {source: (L, B, Q, C + 1)}, boxes (L, B, Q, 4), attributes (L, B, Q, A) logits.
    targets: B dicts: source "coco" or "vg" (which head this picture trains), labels (n,), boxes (n, 4), and for Visual
    Genome attributes (n, A), ones and zeros. counts: of `count`, summed over all processes and parts of the batch.

    Returns {"loss_class", "loss_bbox", "loss_giou", "loss_attribute"}: scalars, normalised, not yet weighted by
    LOSS_WEIGHTS. The earlier layers' losses ("auxiliary") count like the last one's: each layer has its own matching
    and learns to give a whole answer, which the next refines; without them the gradient reaches early layers late.
    Its own, because an early layer may have an object at another query than the last layer has it in the end.
    """
    boxes = full_precision(outputs["boxes"])
    L, B, Q, _ = boxes.shape
    device = boxes.device
    if len(targets) != B:
        raise ValueError(f"set_loss: outputs of {B} pictures, targets of {len(targets)}")
    if counts is None:
        counts = count(targets, Q)
    num_boxes, class_weight, described = (max(float(c), floor) for c, floor in zip(counts, (1.0, 1e-6, 1.0)))
    # A head that no picture of this batch trains still takes part, with gradient zero: DistributedDataParallel waits
    # for the gradient of each parameter.
    nothing = sum(full_precision(x).sum() * 0.0 for x in (outputs["attributes"], *outputs["logits"].values()))
    loss_class = nothing
    found, wanted, attribute_logits, attributes = [], [], [], []
    for source, all_logits in outputs["logits"].items():
        pictures = [b for b, t in enumerate(targets) if t["source"] == source]
        if not pictures:
            continue
        own = [targets[b] for b in pictures]
        of = moved(torch.tensor(pictures), device)
        logits = full_precision(all_logits[:, of])  # (L, b, Q, C + 1)
        layer, picture, query, row = hungarian_match(logits, boxes[:, of], own)
        labels = torch.cat([t["labels"] for t in own])
        none = logits.shape[-1] - 1
        classes = torch.full(logits.shape[:3], none, device=device)
        classes[layer, picture, query] = labels[row]
        # About 95 of 100 queries have no partner. Unweighted, "no object" would be the answer to everything.
        weight = torch.ones(none + 1, device=device, dtype=logits.dtype)
        weight[none] = NO_OBJECT_WEIGHT
        loss_class = loss_class + F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight=weight,
                                                  reduction="sum") / class_weight
        # Here the boxes' gradient begins: the matching only says which boxes to pick, and a picked box is compared with
        # its object below. A box without a partner gets no gradient; its query learns "no object" by its class alone.
        at = of[picture]
        found.append(boxes[layer, at, query])
        wanted.append(torch.cat([t["boxes"] for t in own])[row].to(boxes.dtype))
        if source == "vg":
            attribute_logits.append(full_precision(outputs["attributes"][layer, at, query]))
            attributes.append(torch.cat([t["attributes"] for t in own])[row])
    # The matched pairs of all layers at once. L1 alone would weigh a large box's error more than a small one's of the
    # same proportion; GIoU does not depend on scale; together they do well (DETR, section 3.1).
    zero = boxes.sum() * 0.0
    found, wanted = torch.cat(found or [boxes[0, 0, :0]]), torch.cat(wanted or [boxes[0, 0, :0]])
    loss_bbox = zero + F.l1_loss(found, wanted, reduction="sum") / num_boxes
    giou = generalized_box_iou(box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(wanted), check=False)
    loss_giou = zero + (1 - giou).sum() / num_boxes
    loss_attribute = nothing
    if attributes:
        # -log p(a): a box with k attributes wants each with probability 1 / k; one without any is not asked.
        wanted = torch.cat(attributes)
        log_p = torch.cat(attribute_logits).log_softmax(-1)
        each = -(wanted * log_p).sum(-1) / wanted.sum(-1).clamp(min=1)
        loss_attribute = loss_attribute + each.sum() / described
    return {"loss_class": loss_class, "loss_bbox": loss_bbox, "loss_giou": loss_giou, "loss_attribute": loss_attribute}
