"""Boxes, bipartite matching and the set loss (section 3.1.3, "Enhanced by Object Detection"; DETR).

A detector that answers with a set has a problem that a classifier has not: which answer should be
compared with which object? The 100 answers have no order. DETR finds the one-to-one assignment of
least cost (Eq. 1, "bipartite matching", solved exactly by the Hungarian algorithm) and compares
each answer with its partner. The answers without a partner are to say "no object". The matching is
one to one, so two answers for the same object cannot both be right: duplicates are unlearnt (the
decoder's queries see each other), and no non-maximum suppression is needed. At inference nothing is
matched: each query gives its box and its most probable class, with that probability as the score.

Boxes are cxcywh as fractions (0 .. 1) of the unpadded image, unless a name says xyxy. As fractions
of the padded image they would depend on the other images of the batch, which the model cannot see.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou

NO_OBJECT_WEIGHT = 0.1  # DETR's, see `no_object_weight`
# The weights of the named losses in L_v (DETR's; the attributes' is ours). `hungarian_match` weighs
# its costs by the same numbers, whatever --loss-weights says.
LOSS_WEIGHTS = {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_attribute": 1.0}


def to_device(value, device):
    """A tensor or array, or a batch with such in it, however deep, on the device; without waiting
    for the device's pending work (CUDA only).
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if torch.is_tensor(value):
        return value.to(device, non_blocking=torch.device(device).type == "cuda")
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, list) else value


def box_in_fractions(box, width, height):
    """x, y, w, h in pixels -> cx, cy, w, h as fractions, clipped; None if nothing is inside."""
    x0, y0, w, h = box
    x1, y1 = min(x0 + w, width), min(y0 + h, height)
    x0, y0 = max(x0, 0), max(y0, 0)
    if not (x1 > x0 and y1 > y0):
        return None
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height


def boxes_in_pixels(boxes, size):
    """(n, 4) cxcywh fractions, (height, width) -> x, y, w, h in pixels, as COCO's files have."""
    height, width = size
    return box_convert(boxes, "cxcywh", "xywh") * boxes.new_tensor([width, height, width, height])


@torch.no_grad()
def hungarian_match(logits, boxes, targets):
    """Eq. 1: the assignment of objects to queries of least cost, for each layer and each image.

    logits (L, B, Q, C + 1), the last class is "no object"; boxes (L, B, Q, 4); targets: B dicts
    with labels (n,) int64 and boxes (n, 4). Returns four index tensors (M,): layer, image, query,
    and row in the targets of all images one after another. With more objects than queries the
    costliest objects stay unmatched. A prediction that is not finite costs more than any other; its
    loss is not finite either, and the training loop stops there.

    No gradient goes through the matching: an assignment is a choice, it has no derivative. What is
    differentiated is the loss of the chosen pairs (in `set_loss`), exactly as in max-pooling.
    """
    L, B, Q, _ = logits.shape
    counts = [len(t["labels"]) for t in targets]
    # Objects padded to the same number for each image, so that all costs are one tensor
    boxes = boxes.float()
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)              # (B, n)
    target_boxes = pad_sequence([t["boxes"].float() for t in targets], batch_first=True)

    # The class cost is minus the probability, not minus its logarithm: bounded, so that it cannot
    # outweigh the boxes. Attributes take no part in the matching (Eq. 1).
    probability = logits.float().softmax(-1)
    index = labels[None, :, None].expand(L, B, Q, -1)
    cost_class = -probability.gather(3, index)                                # (L, B, Q, n)
    cost_bbox = torch.cdist(boxes, target_boxes.expand(L, -1, -1, -1), p=1)
    cost_giou = -generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"),
                                     box_convert(target_boxes, "cxcywh", "xyxy"))
    cost = (LOSS_WEIGHTS["loss_class"] * cost_class
            + LOSS_WEIGHTS["loss_bbox"] * cost_bbox
            + LOSS_WEIGHTS["loss_giou"] * cost_giou)
    # One transfer for all: scipy works on the host, and each transfer waits for the device.
    cost = cost.cpu().nan_to_num(nan=1e9, posinf=1e9, neginf=1e9).numpy()

    matches = []
    for layer in range(L):
        first_row = 0
        for b, n in enumerate(counts):
            queries, objects = linear_sum_assignment(cost[layer, b, :, :n])
            matches += [(layer, b, q, first_row + o)
                        for q, o in zip(queries.tolist(), objects.tolist())]
            first_row += n
    matches = torch.tensor(matches, dtype=torch.long).view(-1, 4)
    return to_device(matches, logits.device).unbind(1)


def detection_target(source, objects, attributes=0):
    """What `set_loss` compares with, of an image's data.Objects; attributes: how many kinds there
    are. NumPy arrays until they reach the device: each tensor that a loader worker hands over takes
    an open file, and there would be thousands.
    """
    target = {"source": source, "boxes": np.array(objects.boxes, np.float32).reshape(-1, 4),
              "labels": np.array(objects.labels, np.int64)}
    if source == "vg":
        target["attributes"] = np.zeros((len(objects.boxes), attributes), np.float32)
        for row, numbers in zip(target["attributes"], objects.attributes):
            row[numbers] = 1
    return target


def no_object_weight(mean_objects, queries):
    """The weight of "no object" in the class loss with which objects and no-objects count alike.

    Of Q queries n have a partner and Q - n have none, so n / (Q - n); DETR's 0.1, which is about
    that for COCO (7.3 objects and 100 queries, 0.08), is the least. Where it is too small, two
    queries that see the same object both say so: they cannot be told apart, half of the time each
    is the matched one, and probability 1 / (1 + weight) is then the best answer for both.
    """
    return max(NO_OBJECT_WEIGHT, mean_objects / max(1.0, queries - mean_objects))


def loss_normalizers(targets, queries, no_object=NO_OBJECT_WEIGHT):
    """What the set loss is divided by, three numbers: boxes; the sum of the class weights in one
    layer; boxes that have attributes.

    They are sums, so those of several micro-batches or processes may simply be added. And they
    should be: were each process's losses divided by its own count, an object would weigh more where
    there are few beside it.
    """
    boxes = class_weight = with_attributes = 0.0
    for target in targets:
        n = len(target["labels"])
        matched = min(n, queries)
        boxes += n
        class_weight += matched + no_object * (queries - matched)
        if "attributes" in target:
            with_attributes += float((target["attributes"].sum(-1) > 0).sum())
    return [boxes, class_weight, with_attributes]


def set_loss(outputs, targets, normalizers=None, no_object=NO_OBJECT_WEIGHT):
    """L_v: the losses of matched pairs, and of "no object" for the rest, summed over the layers.

    outputs: logits {source: (L, B, Q, C + 1)}, boxes (L, B, Q, 4), attributes (L, B, Q, A) logits.
    targets: B dicts: source "coco" or "vg" (which class head this image trains), labels (n,), boxes
    (n, 4), and for Visual Genome attributes (n, A), ones and zeros. normalizers: those of
    `loss_normalizers`, summed over all processes and micro-batches. no_object: the weight of "no
    object" among the classes.

    Returns {"loss_class", "loss_bbox", "loss_giou", "loss_attribute"}: scalars, normalised, not yet
    weighted by LOSS_WEIGHTS. The earlier layers' losses ("auxiliary") count like the last one's:
    each layer learns to give a whole answer, which the next refines; without them the gradient
    reaches early layers late. Each has its own matching, because an early layer may have an object
    at another query than the last layer has it in the end.
    """
    boxes = outputs["boxes"].float()
    attribute_logits = outputs["attributes"]
    Q, device = boxes.shape[2], boxes.device
    if normalizers is None:
        normalizers = loss_normalizers(targets, Q, no_object)
    num_boxes, class_weight, num_with_attributes = (
        max(float(n), least) for n, least in zip(normalizers, (1.0, 1e-6, 1.0)))

    # A head that no image of this batch trains still takes part, with gradient zero:
    # DistributedDataParallel waits for the gradient of each parameter.
    zero_loss = sum(x.float().sum() * 0.0
                    for x in (attribute_logits, *outputs["logits"].values()))
    loss_class = loss_attribute = zero_loss
    loss_bbox = loss_giou = boxes.sum() * 0.0

    for source, all_logits in outputs["logits"].items():
        images = [b for b, target in enumerate(targets) if target["source"] == source]
        if not images:
            continue
        of_source = [targets[b] for b in images]
        images = to_device(torch.tensor(images), device)
        logits = all_logits[:, images].float()  # (L, b, Q, C + 1)
        layer, image, query, row = hungarian_match(logits, boxes[:, images], of_source)

        # About 95 of 100 queries have no partner. Unweighted, "no object" would be the answer to
        # everything.
        last = logits.shape[-1] - 1  # "no object"
        labels = torch.cat([target["labels"] for target in of_source])
        classes = torch.full(logits.shape[:3], last, device=device)
        classes[layer, image, query] = labels[row]
        weight = torch.ones(last + 1, device=device)
        weight[last:].fill_(no_object)  # an assignment would make the host wait
        loss_class = loss_class + F.cross_entropy(
            logits.flatten(0, 2), classes.flatten(), weight=weight, reduction="sum") / class_weight

        # Here the boxes' gradient begins: the matching only says which boxes to pick, and a picked
        # box is compared with its object. An unmatched box gets no gradient; its query learns "no
        # object" by its class alone. L1 alone would weigh a large box's error more than a small
        # one's of the same proportion; GIoU does not depend on scale (DETR, section 3.1). IoU would
        # not either, but is 0 for all boxes that do not touch, without a gradient; GIoU subtracts
        # the empty share of the smallest box around both, and so still says in which direction to
        # move (Rezatofighi et al. 2019).
        matched = boxes[layer, images[image], query]
        target_boxes = torch.cat([target["boxes"] for target in of_source])[row].float()
        # Each box with its own object alone, as one pair of a matrix of 1 x 1
        giou = generalized_box_iou(box_convert(matched, "cxcywh", "xyxy")[:, None],
                                   box_convert(target_boxes, "cxcywh", "xyxy")[:, None])
        loss_bbox = loss_bbox + F.l1_loss(matched, target_boxes, reduction="sum") / num_boxes
        loss_giou = loss_giou + (1 - giou).sum() / num_boxes

        if source == "vg":
            # -log p(a): a box with k attributes wants each with probability 1 / k; a box without
            # any is not asked.
            log_p = attribute_logits[layer, images[image], query].float().log_softmax(-1)
            attributes = torch.cat([target["attributes"] for target in of_source])[row]
            per_box = -(attributes * log_p).sum(-1) / attributes.sum(-1).clamp(min=1)
            loss_attribute = loss_attribute + per_box.sum() / num_with_attributes

    return {"loss_class": loss_class, "loss_bbox": loss_bbox, "loss_giou": loss_giou,
            "loss_attribute": loss_attribute}
