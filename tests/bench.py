"""Speed and memory against what people would use instead; each row is a ratio, from one run.

    python tests/bench.py                                        # all but the GPU's: half an hour
    python tests/bench.py --only detr,loader --json rows.json    # rows whose names begin so
    python tests/bench.py --only loader --full                   # the index at its full size
    python tests/bench.py --only gpu --device cuda               # a training step on a GPU

Ours and the peer's take turns in one process, with the same inputs and threads, and medians of
several rounds are compared. A ratio above 1 means that ours is better; a row holds if its ratio
reaches the target. Where a bound is promised, the peer's column has the bound. The peers are the
real code (transformers, torchvision, pycocotools) at its true size. Weights are random on both
sides, which changes nothing in the time. No test asserts a ratio: it depends on the machine.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the peers' weights are random: nothing to fetch

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import RandomShortestSize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pretrain  # noqa: E402
from data import (IMAGE_MEAN, IMAGE_STD, LONG_SIDE, SHORT_SIDES, SPECIAL, Example,  # noqa: E402
                  Objects, Tokenizer, load_or_build_index, resized)
from matcher import set_loss  # noqa: E402
from model import E2EVLP, Config  # noqa: E402
from pretrain import Batches, Pretraining, collate, loss_weights  # noqa: E402


def row(name, ours, peer, unit, target, note="", more_is_better=False):
    """A row of the table, a dict. note: what its function's docstring does not say."""
    better, worse = (ours, peer) if more_is_better else (peer, ours)
    ratio = round(better / max(worse, 1e-9), 2)
    return {"name": name, "ours": float(f"{ours:.4g}"), "peer": float(f"{peer:.4g}"), "unit": unit,
            "ratio": ratio, "target": target, "holds": ratio >= target, "note": note}


def medians_of(args, *functions, rounds=3):
    """The median of what each function returns; they take turns."""
    values = [[] for _ in functions]
    for _ in range(1 if args.quick else rounds):
        for function, measured in zip(functions, values):
            measured.append(function())
    return list(map(statistics.median, values))


def medians(args, *functions, rounds=3):
    """The median seconds of each, after a first call; a tensor that it returns must be finite."""
    for function in functions:
        result = function()
        assert not torch.is_tensor(result) or result.isfinite().all()

    def seconds(function):
        synchronize(args.device)
        started = time.perf_counter()
        function()
        synchronize(args.device)
        return time.perf_counter() - started

    timed = [functools.partial(seconds, function) for function in functions]
    return medians_of(args, *timed, rounds=rounds)


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def fresh_process(function, *inputs):
    """function(*inputs) in a new process: a used allocator changes both memory and time."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *inputs).result()


# --------------------------------------------------------------------------------------------------
# The loader

# Sizes (height, width) of COCO's train2017 in percent; a third has anything for its shorter side
SIZES = {(480, 640): 22, (427, 640): 17, (640, 480): 8, (426, 640): 8, (640, 427): 5,
         (375, 500): 4, (640, 640): 2, None: 34}


def coco_size(rng):
    (size,) = rng.choices(list(SIZES), SIZES.values())
    if size is not None:
        return size
    size = rng.randrange(240, 630), 640
    return size if rng.random() < 0.7 else size[::-1]


def write_jpegs(folder, count):
    """JPEGs of COCO's sizes, of noise that is smooth over 4 pixels: {file: size}."""
    rng = np.random.default_rng(0)
    sizes = random.Random(0)
    files = {}
    for i in range(count):
        height, width = coco_size(sizes)
        noise = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image.save(f"{folder}/{i:06d}.jpg", quality=90)
        files[f"{folder}/{i:06d}.jpg"] = height, width
    return files


def random_crop(image):
    height, width = (random.randint(min(side, 384), min(side, 600)) for side in image.size[::-1])
    return transforms.RandomCrop((height, width))(image)


# DETR's published transforms of training
SCALE = RandomShortestSize(list(SHORT_SIDES), LONG_SIDE)
CROP = transforms.Compose([RandomShortestSize([400, 500, 600]), random_crop, SCALE])
TRANSFORM = transforms.Compose([
    transforms.RandomHorizontalFlip(), transforms.RandomChoice([SCALE, CROP]),
    transforms.ToTensor(), transforms.Normalize(IMAGE_MEAN, IMAGE_STD)])


def detr_batch(files):
    """The peer: DETR's reading of images, its transforms and its collation."""
    images = [TRANSFORM(Image.open(file).convert("RGB")) for file in files]
    H, W = (max(image.shape[side] for image in images) for side in (1, 2))
    padded = torch.zeros(len(images), 3, H, W)
    mask = torch.ones(len(images), H, W, dtype=torch.bool)
    for b, image in enumerate(images):
        _, h, w = image.shape
        padded[b, :, :h, :w].copy_(image)
        mask[b, :h, :w] = False
    return padded, mask


def loader_speed(args):
    """Images a second through the whole loader, with words and boxes, against DETR's transforms and
    collation: 160 JPEGs of COCO's sizes, batch 4, 480 .. 800 pixels.
    """
    workers = min(2, os.cpu_count() or 1)

    def rate(dataset, collate_fn, **sampling):
        loader = iter(DataLoader(dataset, num_workers=workers, multiprocessing_context="fork",
                                 collate_fn=collate_fn, **sampling))
        next(loader)  # starting the workers is not what is measured
        started = time.perf_counter()
        batches = sum(1 for _ in loader)
        return 4 * batches / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        files = write_jpegs(folder, 16 if args.quick else 160)
        seven = Objects([(0.5, 0.5, 0.5, 0.5)] * 7, [0] * 7)
        examples = [Example(file, [file], size, sentences=["a picture"], captions=1, coco=seven)
                    for file, size in files.items()]
        names = {"coco": ["picture"], "vg": [], "attributes": []}
        flags, _ = pretrain.parse([])  # the paper's settings
        dataset = pretrain.PretrainingSet(examples, Tokenizer([*SPECIAL, "a", "picture"]), names,
                                          flags)
        batches = iter(Batches(list(files.values()), 4))

        def mine():
            one_pass = list(itertools.islice(batches, len(files) // 4))
            return rate(dataset, functools.partial(collate, pad=0, stride=32),
                        batch_sampler=one_pass)

        def peer():
            return rate(list(files), detr_batch, batch_size=4, shuffle=True)

        rates = medians_of(args, mine, peer)
    yield row("loader/pictures-per-second", *rates, "pictures/s", 1.5, f"{workers} workers",
              more_is_better=True)


def loader_padding(args):
    """Share of grid cells that are padding, with 8 processes of 4 images each, of COCO's usual
    sizes, against random batches with a size for each image (DETR). At most 0.12 is promised.
    """
    rng = random.Random(0)
    sizes = [coco_size(rng) for _ in range(20_000)]
    count = 100 if args.quick else 5000

    def padding(batches):
        cells = used = 0
        for batch in batches:
            pixels = np.array([resized(*sizes[i], SHORT_SIDES[draw % len(SHORT_SIDES)])
                               for i, draw in batch])
            grids = np.ceil(pixels / 32)  # rows and columns
            cells += len(batch) * grids.max(0).prod()
            used += grids.prod(1).sum()
        return float(1 - used / cells)

    batches = itertools.islice(Batches(sizes, 32, world=8), count)
    mine = padding([(i, draw) for _, i, draw in batch] for batch in batches)
    peer = padding([(rng.randrange(len(sizes)), rng.randrange(11)) for _ in range(4)]
                   for _ in range(count))
    yield row("loader/padding", mine, peer, "share of cells", round(peer / 0.12, 2))


def open_index(folder, read=None):
    return load_or_build_index(folder, None, "synthetic", read)["train"]


def build_index(folder, images, sentences):
    """An index of so many images with so many sentences, as if read from the official files."""
    things = Objects(np.random.default_rng(0).random((20, 4)).tolist(), [0] * 20, [[1, 2]] * 20)

    def example(n):
        texts = [f"the {n * 37 % 1009} thing left of {i}" for i in range(sentences // images)]
        return Example(f"vg {n}", [f"{folder}/{n}.jpg"], (480, 640), sentences=texts, vg=things)

    open_index(folder, lambda say: {"train": [example(n) for n in range(images)]})


def anonymous_megabytes():
    """This process's memory without mapped files."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous")) / 1024


def growth_of_reads(folder, reads):
    """Megabytes by which a loader worker's memory grows in so many random reads."""
    examples = open_index(folder)
    rng = random.Random(0)
    before = anonymous_megabytes()
    for _ in range(reads):
        examples[rng.randrange(len(examples))]
    return anonymous_megabytes() - before


def loader_index(args):
    """The index. start: opening it and reading the first batch's records, against reading the
    captions' JSON alone; open: opening it, 10 ms are promised; memory: growth of a worker's own in
    64,000 random reads, 10 MB are promised.
    """
    images, count = (1800, 60_000) if args.quick else (18_000, 600_000)
    if args.full:
        images, count = 180_000, 6_000_000
    reads = 1000 if args.quick else 64_000
    with tempfile.TemporaryDirectory() as folder:
        fresh_process(build_index, folder, images, count)  # its memory must not be shared
        captions = Path(folder, "captions.json")
        captions.write_text(json.dumps([
            {"id": i, "image_id": i % images, "caption": f"the {i * 37 % 1009} thing"}
            for i in range(count)]))

        def first_batch():
            examples = open_index(folder)
            batch = next(iter(Batches(examples.sizes, 32)))
            return [examples[i] for _, i, _ in batch]

        opened, mine, peer = medians(
            args, lambda: open_index(folder), first_batch,
            lambda: json.loads(captions.read_text()))  # what pycocotools.COCO begins with
        megabytes = fresh_process(growth_of_reads, folder, reads)
    size = f"{images:,} images with {count:,} sentences"
    yield row("loader/start", mine, peer, "s", 3, size)
    yield row("loader/open", opened, 0.01, "s", 1, size)
    yield row("loader/memory", megabytes, 10, "MB", 1, size)


def write_coco(folder, counts):
    """COCO 2017's annotations at their size, polygons of 25 corners, and links to one JPEG."""
    Image.new("RGB", (640, 427)).save(f"{folder}/image.jpg")
    Path(folder, "vocab.txt").write_text("\n".join([*SPECIAL, "a", "the", "thing"]))
    os.makedirs(f"{folder}/coco/annotations")
    for split, (images, boxes, captions) in (("train", counts), ("val", (9, 9, 9))):
        os.mkdir(f"{folder}/coco/{split}2017")
        for i in range(images):
            os.symlink(f"{folder}/image.jpg", f"{folder}/coco/{split}2017/{i:012d}.jpg")
        records = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 427, "width": 640}
                   for i in range(images)]
        instances = {
            "images": records,
            "categories": [{"id": i, "name": f"thing {i}"} for i in range(1, 81)],
            "annotations": [{"id": i, "image_id": i % images, "category_id": 1 + i % 80,
                             "segmentation": [[418.75] * 50], "iscrowd": 0, "area": 702.1057,
                             "bbox": [i % 400 + 0.02, i % 300 + 0.97, 18.7, 52.3]}
                            for i in range(boxes)]}
        sentences = {"images": records, "annotations": [
            {"id": i, "image_id": i % images, "caption": f"the {i % 1009} thing with number {i}"}
            for i in range(captions)]}
        for name, content in (("instances", instances), ("captions", sentences)):
            path = Path(folder, f"coco/annotations/{name}_{split}2017.json")
            path.write_text(json.dumps(content))


def seconds_of_pycocotools(folder):
    from pycocotools.coco import COCO
    started = time.perf_counter()
    with contextlib.redirect_stdout(None):  # it prints its progress
        for name in ("instances_train", "captions_train", "instances_val", "captions_val"):
            COCO(f"{folder}/coco/annotations/{name}2017.json")
    return time.perf_counter() - started


def seconds_to_first_step(folder):
    flags = ("--task detection --init none --backbone r18 --backbone-weights none --stride 16 "
             "--width 64 --heads 2 --encoder-layers 1 --decoder-layers 1 --short-sides 64 "
             "--long-side 96 --batch-size 2 --workers 0 --device cpu").split()
    started = time.perf_counter()
    # Beside the data, not in it: what changes in the data's folders rebuilds the index
    with tempfile.TemporaryDirectory() as output, subprocess.Popen(
            [sys.executable, f"{ROOT}/finetune.py", *flags, "--data", folder, "--output", output],
            stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - started
                process.kill()
    return seconds


def start(args):
    """Seconds from the command of a training on COCO's detection, of its full size, to the first
    finished step, by the index that an earlier run has built; against reading the annotations alone
    with pycocotools, as each process of DETR does each time. Neither waits for a disk.
    """
    share = 0.01 if args.quick else 1
    counts = [int(share * n) for n in (118_287, 860_001, 591_753)]
    with tempfile.TemporaryDirectory() as folder:
        fresh_process(write_coco, folder, counts)
        built = seconds_to_first_step(folder)
        mine, peer = medians_of(args, lambda: seconds_to_first_step(folder),
                                lambda: fresh_process(seconds_of_pycocotools, folder))
    yield row("start", mine, peer, "s", 3, f"building the index, once, took {built:.0f} s")


# --------------------------------------------------------------------------------------------------
# Models, images and sentences

SMALL_BERT = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4)  # with --quick


def ours(args, **changes):
    """Our model for inference; with --quick a very small one."""
    if args.quick:
        changes.update(backbone="r18", encoder_layers=2, decoder_layers=2, vocabulary=500,
                       classes={"coco": 80, "vg": 20})
    torch.manual_seed(0)
    model = scaled(E2EVLP(Config(**{"dropout": 0.0, **changes})))
    model.load_state_dict(model.state_dict())  # frozen norms are folded again
    return model.to(args.device).eval()


def scaled(model):
    """Batch norms scaled to 0.7, on both sides: else the variance of a ResNet of random weights
    doubles in each block, and what follows has denormal numbers, which are slow on a CPU.
    """
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.weight.data.mul_(0.7)
    return model


def resnet_layers(args, name, norm, leave_out):
    """(torchvision's ResNet without its last layers, those layers); with --quick the smallest."""
    build = getattr(torchvision.models, "resnet18" if args.quick else name)
    layers = list(scaled(build(norm_layer=norm)).children())
    return nn.Sequential(*layers[:-leave_out]), layers[-leave_out:]


def pixels(args, height, width, batch=1):
    """(B, 3, H, W) uint8 and sizes (B, 2); with --quick a twelfth of each side."""
    if args.quick:
        height, width = max(64, height // 12), max(64, width // 12)
    images = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([[height, width]] * batch)
    return images.to(args.device), sizes.to(args.device)


def normalised(images):
    """What the peers are given, inside of what is measured: ours takes uint8 pixels too."""
    return transforms.functional.normalize(images / 255, IMAGE_MEAN, IMAGE_STD)


def sentences(args, batch, words=14):
    """(B, T) random word pieces between [CLS] and [SEP]."""
    tokens = torch.randint(200, 500, (batch, words))
    tokens[:, 0] = Config.cls
    tokens[:, -1] = Config.sep
    return tokens.to(args.device)


def objects(args, counts, classes, of_vg=()):
    """A target for each number of boxes; of_vg: images with Visual Genome's 400 attributes."""
    targets = []
    for b, n in enumerate(counts):
        boxes = torch.cat([torch.rand(n, 2) * 0.6 + 0.2, torch.rand(n, 2) * 0.35 + 0.02], 1)
        target = {"source": "vg" if b in of_vg else "coco", "boxes": boxes.to(args.device),
                  "labels": torch.randint(classes, (n,)).to(args.device)}
        if b in of_vg:
            target["attributes"] = (torch.rand(n, 400) < 0.01).float().to(args.device)
        targets.append(target)
    return targets


def as_labels(targets):
    """The same for transformers' DETR."""
    return [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]


def flops_of(function):
    """FLOPs of a function; attention by its formula, since fast kernels are not always counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# Training steps, their time and memory


def weighted_sum(losses):
    weights = loss_weights()
    return sum(weights[name] * loss for name, loss in losses.items())


def all_losses(model, batch, normalizers=None):
    """The weighted sum of pre-training's losses; normalizers: by default the batch's."""
    objective = Pretraining(model)
    return weighted_sum(objective(batch, normalizers or objective.normalizers(batch)))


def training_step(args, model, loss, precision="fp32", clip=0.0, update=True):
    """A function that does a step and returns its loss. loss(): of the model; update: by AdamW."""
    device = torch.device(args.device).type
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4, fused=True)

    def step():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = \
            precision == "tf32"
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def peak(device):
    """Megabytes that this process has had in memory at most."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def warmed_up(args, make_step, steps):
    """(a step that has run so often, megabytes that model, optimizer and steps take at most)."""
    before = peak(args.device)
    step = make_step()
    for _ in range(steps):  # AdamW's state comes into being in the first
        assert torch.isfinite(step())
    return step, max(1.0, peak(args.device) - before)


# --------------------------------------------------------------------------------------------------
# A question about an image: against two-step pipelines, Pixel-BERT, and ourselves at other sizes


def bottom_up_attention(args):
    """The peer of two-step: (images uint8 -> boxes with features, these and tokens -> logits).

    Faster R-CNN as Anderson et al. (2018) trained it on Visual Genome: ResNet-101 up to C4, 12
    anchors a cell, 300 proposals, RoIAlign 14 x 14, the fifth stage as box head, 1,601 classes; the
    features of 36 boxes go to LXMERT. Generous to it: RoIAlign at stride 2 in the fifth stage
    (theirs is dilated), one non-maximum suppression over the boxes' best classes (theirs runs for
    each of 1,600), and no image is read or feature written in between.
    """
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
    from torchvision.ops import batched_nms, roi_align
    from transformers import LxmertConfig, LxmertForQuestionAnswering
    torch.manual_seed(0)
    stages, (stage5, _, fc) = resnet_layers(args, "resnet101", FrozenBatchNorm2d, leave_out=3)
    c5 = fc.in_features
    c4 = c5 // 2
    hidden = min(512, c4)  # torchvision's head keeps all channels; the original has 512
    head = RPNHead(c4, 12)
    head.conv = nn.Sequential(nn.Conv2d(c4, hidden, 3, padding=1), nn.ReLU())
    head.cls_logits = nn.Conv2d(hidden, 12, 1)
    head.bbox_pred = nn.Conv2d(hidden, 48, 1)
    anchors = AnchorGenerator(((64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
    before, after = dict(training=6000, testing=6000), dict(training=300, testing=300)
    rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, before, after, 0.7)
    classifier = nn.Linear(c5, 1601)
    small = dict(SMALL_BERT, l_layers=1, x_layers=1, r_layers=1) if args.quick else {}
    lxmert = LxmertForQuestionAnswering(
        LxmertConfig(num_qa_labels=3129, visual_feat_dim=c5, **small))
    nn.ModuleList([stages, stage5, rpn, classifier, lxmert]).to(args.device).eval()

    def look(images):
        height, width = images.shape[-2:]
        x = stages(normalised(images))
        boxes = rpn(ImageList(images, [(height, width)]), {"0": x})[0][0]
        assert args.quick or len(boxes) == 300
        regions = roi_align(x, [boxes], 14, x.shape[-1] / width, 2)
        features = stage5(regions).mean((2, 3))                                  # (300, 2048)
        score, label = classifier(features).softmax(-1)[:, 1:].max(-1)
        kept = batched_nms(boxes, score, label, 0.3)
        preferred = score.index_fill(0, kept, 2.0) + score  # the others only if there are too few
        best = preferred.topk(min(36, len(boxes))).indices
        scale = boxes.new_tensor([width, height, width, height])
        return features[best][None], (boxes[best] / scale)[None]

    def read(seen, tokens):
        features, boxes = seen
        answer = lxmert(input_ids=tokens, visual_feats=features, visual_pos=boxes)
        return answer.question_answering_score

    return look, read


def pixel_bert_model(args):
    """The peer of pixel-bert (Huang et al. 2020): (images -> cells, these and tokens -> logits)."""
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    stages, (_, fc) = resnet_layers(args, "resnet152", nn.BatchNorm2d, leave_out=2)
    small = dict(SMALL_BERT, num_hidden_layers=1) if args.quick else {}
    bert = BertModel(BertConfig(**small))
    project = nn.Linear(fc.in_features, bert.config.hidden_size)
    classify = nn.Linear(bert.config.hidden_size, 3129)
    nn.ModuleList([stages, bert, project, classify]).to(args.device).eval()

    def look(images):
        x = stages(normalised(images))
        return project(nn.functional.max_pool2d(x, 2).flatten(2).transpose(1, 2))

    def read(seen, tokens):
        words = bert.embeddings.word_embeddings(tokens)
        return classify(bert(inputs_embeds=torch.cat([words, seen], 1)).pooler_output)

    return look, read


def our_vqa(args):
    """Ours in the same two steps, with ResNet-152 and 12 layers."""
    model = ours(args, backbone="r152", task="vqa", classifier_outputs=3129)

    def look(images):
        sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        return model.encode_image(images, sizes, padded=False)

    return look, model.classify


def answering(steps, images, tokens):
    """A function that answers a question, from pixels and word pieces to 3,129 logits. steps:
    (look, read), as the functions above return.
    """
    look, read = steps
    return lambda: read(look(images), tokens).float()


@torch.inference_mode()
def question(args, name, peer, height, width, target):
    """A row: one question about one image."""
    images, _ = pixels(args, height, width)
    tokens = sentences(args, 1)
    answers = [answering(build(args), images, tokens) for build in (our_vqa, peer)]
    return row(name, *medians(args, *answers), "s", target)


def two_step(args):
    """A question about an image of 600 x 1000, r152 + 12 layers, against Faster R-CNN (ResNet-101
    C4, 300 proposals) whose 36 boxes go to LXMERT (9/5/5 layers).
    """
    yield question(args, "two-step", bottom_up_attention, 600, 1000, 2.0)


def pixel_bert(args):
    """The same at 800 x 1333 against ResNet-152, its grid max-pooled 2 x 2, and BERT-base over
    words and cells: the same ResNet, a quarter of our cells, nine times our transformer's
    parameters.
    """
    yield question(args, "pixel-bert", pixel_bert_model, 800, 1333, 1.6)


@torch.inference_mode()
def question_bf16(args):
    """A question at 800 x 1333 with `--amp bf16`, against float32; where the CPU computes in bf16
    (AMX or AVX512-BF16).
    """
    capabilities = torch.cpu.get_capabilities()
    if not (args.quick or capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")):
        print("question-bf16: left out, this CPU does not compute in bf16", flush=True)
        return
    float32 = answering(our_vqa(args), pixels(args, 800, 1333)[0], sentences(args, 1))
    bf16 = torch.autocast(torch.device(args.device).type, torch.bfloat16)(float32)
    torch.testing.assert_close(bf16().sigmoid(), float32().sigmoid(), rtol=0, atol=0.05)
    yield row("question-bf16", *medians(args, bf16, float32), "s", 2)


@torch.inference_mode()
def table_6(args):
    """Table 6 of the paper: a question at smaller images, against the same at 800 x 1333."""
    model, tokens = our_vqa(args), sentences(args, 1)
    sides = [(448, 448), (448, 746), (600, 1000), (800, 1333)]
    answers = [answering(model, pixels(args, *size)[0], tokens) for size in sides]
    flops = [flops_of(answer) for answer in answers]
    *times, largest = medians(args, *answers)
    for (height, width), seconds, target, own in zip(sides, times, (5, 3, 1.5), flops):
        yield row(f"table-6/{height}x{width}", seconds, largest, "s", target,
                  f"the larger has {flops[-1] / own:.2f} times the FLOPs")


# --------------------------------------------------------------------------------------------------
# Detection: against transformers' DETR

DROPOUTS = {"": 0.0, "/dropout": 0.1}


def detr(args, dropout=0.0):
    """transformers' DETR r50. Stem and first stage are frozen, as the published one's and ours."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    torch.manual_seed(0)
    small = dict(layer_type="basic", depths=[2, 2, 2, 2],
                 hidden_sizes=[64, 128, 256, 512]) if args.quick else {}
    layers = 2 if args.quick else 6
    model = DetrForObjectDetection(DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=80,
        backbone_config=ResNetConfig(out_features=["stage4"], **small), auxiliary_loss=True,
        encoder_layers=layers, decoder_layers=layers, dropout=dropout, attention_dropout=dropout,
        activation_dropout=dropout))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embedder" not in name and "stages.0." not in name)
    return scaled(model).to(args.device).eval()


def detr_outputs(model, images, **more):
    mask = torch.ones_like(images[:, 0], dtype=torch.long)
    return model(normalised(images), mask, **more)


def detect(model, images, sizes, tokens=None):
    """Our detection, from pixels, with a sentence or without."""
    grid = model.encode_image(images, sizes, padded=False)
    return model.detect(model.encode(grid, tokens))


@torch.inference_mode()
def detr_forward(args):
    """Detection on one image of 800 x 1333, r50, 6 + 6 layers, against transformers' DETR. Each
    transformer is its own paper's: 12 heads of 32 units and 1,024 units between; 8 heads and 2,048.
    """
    model, theirs = ours(args, encoder_layers=6), detr(args)
    images, sizes = pixels(args, 800, 1333)

    def mine():
        return detect(model, images, sizes)["logits"]["coco"][-1]

    def peer():
        return detr_outputs(theirs, images).logits

    assert mine().shape == peer().shape
    yield row("detr-forward", *medians(args, mine, peer), "s", 1.5)


def detection_step(args, side, dropout=0.0, precision="fp32", compiled=False, recompute=False):
    """A step of detection, r50, batch 2. side: ours or peer; recompute: checkpointing."""
    torch.manual_seed(0)
    images, sizes = pixels(args, 800, 1333, batch=2)
    targets = objects(args, [7, 12], 80)
    if side == "ours":
        model = ours(args, encoder_layers=6, dropout=dropout)
        model.recompute = recompute
        backend = "inductor" if args.device.startswith("cuda") else "eager"
        run = torch.compile(detect, backend=backend) if compiled else detect

        def loss():
            found = run(model, images, sizes)
            coco = {**found, "logits": {"coco": found["logits"]["coco"]}}
            return weighted_sum(set_loss(coco, targets))
    else:
        model = detr(args, dropout)
        set_loss_of_detr = model.loss_function

        def in_float32(logits, labels, device, boxes, config, *layers):
            return set_loss_of_detr(logits.float(), labels, device, boxes.float(), config,
                                    *(tensor.float() for tensor in layers))

        model.loss_function = in_float32  # its matching does not work in bf16

        def loss():
            return detr_outputs(model, images, labels=as_labels(targets)).loss

    return training_step(args, model, loss, precision)


def detr_step(args):
    """A training step of detection: forward, set loss, backward, AdamW; r50, 6 + 6 layers, batch 2
    at 800 x 1333; against transformers' DETR. checkpointing: with --activation-checkpointing
    against without; a third more time is expected.
    """
    steps = [detection_step(args, side, dropout)
             for dropout in DROPOUTS.values() for side in ("ours", "peer")]
    steps.append(detection_step(args, "ours", recompute=True))
    *times, again = medians(args, *steps)
    for i, (name, dropout) in enumerate(DROPOUTS.items()):
        yield row(f"detr-step{name}", *times[2 * i:2 * i + 2], "s", 1.4, f"dropout {dropout}")
    yield row("detr-step/checkpointing", again, times[0], "s", 0.74, "dropout 0")


def step_memory(args, settings):
    """Megabytes of two steps, in a process of its own."""
    import transformers.models.detr.modeling_detr  # noqa: F401  the code is not what is measured
    return warmed_up(args, lambda: detection_step(args, **settings), 2)[1]


def detr_memory(args):
    """The peak of the step of detr-step; checkpointing: against transformers' DETR too."""
    def measure(**settings):
        if args.quick:
            return step_memory(args, settings)
        return fresh_process(step_memory, args, settings)

    peers = {name: measure(side="peer", dropout=dropout) for name, dropout in DROPOUTS.items()}
    for name, dropout in DROPOUTS.items():
        yield row(f"detr-memory{name}", measure(side="ours", dropout=dropout), peers[name], "MB",
                  1.25, f"dropout {dropout}")
    yield row("detr-memory/checkpointing", measure(side="ours", recompute=True), peers[""], "MB",
              1.25, "dropout 0")


# --------------------------------------------------------------------------------------------------
# Pre-training, its set loss, and generation


def pretraining_batch(args, batch=2, height=800, width=1333, words=14):
    """As of pretrain.collate: a sentence an image; every other image is Visual Genome's."""
    images, sizes = pixels(args, height, width, batch)
    captions = sentences(args, batch, words)[:, None]
    tokens = captions.clone()
    tokens[..., 1:1 + max(1, round(0.15 * (words - 2)))] = Config.mask
    positions = (tokens.flatten() == Config.mask).nonzero()[:, 0]
    counts = ([7, 12] * batch)[:batch]
    return {"images": images, "sizes": sizes, "padded": False, "tokens": tokens,
            "captions": captions, "mlm_positions": positions,
            "mlm_labels": captions.flatten()[positions],
            "itm_labels": torch.ones(batch, 1, dtype=torch.long, device=args.device),
            "no_sentence": torch.zeros(batch, dtype=torch.bool, device=args.device),
            "targets": objects(args, counts, 20, of_vg=range(1, batch, 2))}


def four_losses(args):
    """Forward and backward with all losses, r50, 12 + 6 layers, batch 2 at 800 x 1333, against
    detection alone (which reads the sentence too). At most 1.35 times its time is promised.
    """
    model = ours(args)
    batch = pretraining_batch(args)

    def detection_loss():
        found = detect(model, batch["images"], batch["sizes"], batch["tokens"][:, 0])
        return weighted_sum(set_loss(found, batch["targets"]))

    steps = [training_step(args, model, loss, update=False)
             for loss in (lambda: all_losses(model, batch), detection_loss)]
    yield row("four-losses", *medians(args, *steps), "s", 0.74)


class Operators(TorchDispatchMode):
    """Counts the calls of operators that are not views: on a GPU each is work of its own."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or "detach" in str(function)
                           or "_unsafe_view" in str(function))
        return function(*args, **(kwargs or {}))


def operators(args):
    """Operator calls that are not views in a training step of pre-training, r152, 12 + 6 layers,
    batch 4, bf16, against a bound. Dropout is 0: on a CPU attention with dropout is ten calls.
    """
    model = ours(args, backbone="r152")
    batch = pretraining_batch(args, 4, 96, 160)  # the number is the same at any size
    step = training_step(args, model, lambda: all_losses(model, batch), "bf16", clip=0.1)
    step()  # AdamW's state comes into being
    with Operators() as calls:
        step()
    yield row("operators", calls.count, 3500, "calls", 1)


def matcher(args):
    """Matching and set loss, forward and backward, batch 16, 6 layers, 20 to 60 boxes an image,
    against transformers' DETR loss; equal to 1e-4.
    """
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
    torch.manual_seed(0)
    L, B, Q, C = (2, 2, 30, 91) if args.quick else (6, 16, 100, 91)
    targets = objects(args, torch.randint(20, 25 if args.quick else 61, (B,)).tolist(), C)
    labels = as_labels(targets)
    config = DetrConfig(num_labels=C, auxiliary_loss=True, decoder_layers=L)
    logits = torch.randn(L, B, Q, C + 1, device=args.device, requires_grad=True)
    raw = torch.randn(L, B, Q, 4, device=args.device, requires_grad=True)
    attributes = torch.zeros(L, B, Q, 1, device=args.device, requires_grad=True)

    def mine():
        outputs = {"logits": {"coco": logits}, "boxes": raw.sigmoid(), "attributes": attributes}
        value = weighted_sum(set_loss(outputs, targets))
        return value, torch.autograd.grad(value, (logits, raw))

    def peer():
        boxes = raw.sigmoid()
        value = ForObjectDetectionLoss(logits[-1], labels, args.device, boxes[-1], config,
                                       outputs_class=logits, outputs_coord=boxes)[0]
        return value, torch.autograd.grad(value, (logits, raw))

    torch.testing.assert_close(mine(), peer(), rtol=1e-4, atol=1e-4)
    yield row("matcher", *medians(args, mine, peer), "s", 3)


@torch.inference_mode()
def caption(args):
    """A caption of 20 words by beam search of 4 over 1,050 cells, r50, 12 + 6 layers, against the
    same without keeping the keys and values of earlier words.
    """
    model, length = ours(args), 4 if args.quick else 20
    # That no beam ends early: the outputs get a mean of 1, and [SEP] a logit of minus the width
    model.decoder[-1].norm3.bias += 1
    model.caption.weight[model.config.sep] = -1
    memory = model.encode(model.encode_image(*pixels(args, 800, 1333), padded=False))

    def words(cache):
        return model.generate(memory, beam=4, max_tokens=length + 1, cache=cache)[0]

    assert words(True) == words(False) and len(words(True)) == length
    yield row("caption", *medians(args, lambda: words(True), lambda: words(False)), "s", 4)


@torch.inference_mode()
def retrieval_row(args, name, backbone, n=8):
    model = ours(args, backbone=backbone)
    images, sizes = pixels(args, 800, 1333)
    tokens = sentences(args, n)

    def grids(count):
        return model.encode_image(images.repeat(count, 1, 1, 1), sizes.repeat(count, 1),
                                  padded=False)

    grid = grids(1)
    once, pairs, whole = medians(
        args, lambda: grids(1), lambda: model.similarity(grid.select([0] * n), tokens),
        lambda: model.similarity(grids(n), tokens))
    return row(f"{name}/{backbone}", once / 5000 + pairs / n, whole / n, "s a pair", 8,
               f"the backbone alone takes {once:.2f} s")


def retrieval(args):
    """A pair of 1,000 images x 5,000 sentences at 800 x 1333, the backbone run once an image,
    against each pair from its pixels. Measured on eight sentences about one image; the backbone
    counts with one 5,000th. The ratio is at most (backbone + encoder) / encoder.
    """
    for backbone in ("r152", "r50"):
        yield retrieval_row(args, "retrieval", backbone)


def growth_step(args, cells, words, batch, layers, queries):
    """A pre-training step of a moderate model, without AdamW."""
    model = ours(args, backbone="r18", encoder_layers=layers, decoder_layers=2, queries=queries,
                 vocabulary=3000, max_tokens=max(40, words))
    rows = 2 ** (int(math.log2(cells)) // 2)  # a square, or two squares side by side
    inputs = pretraining_batch(args, batch, 32 * rows, 32 * cells // rows, words)
    return training_step(args, model, lambda: all_losses(model, inputs), update=False)


def growth(args):
    """The exponent with which the time of a pre-training step grows with one quantity; against
    attention's square, with 0.1 of tolerance. Dropout is 0.
    """
    base = dict(cells=64, words=16, batch=1, layers=3, queries=50)
    for axis, first in base.items():
        sizes = [first * 2**i for i in range(2 if args.quick else 4)]
        steps = [growth_step(args, **{**base, axis: size}) for size in sizes]
        slope, _ = np.polyfit(np.log(sizes), np.log(medians(args, *steps)), 1).tolist()
        yield row(f"growth/{axis}", slope, 2, "exponent", 0.95, f"{first} to {sizes[-1]}")


# --------------------------------------------------------------------------------------------------
# On a GPU

# Dense bf16 FLOP/s of the card, from its data sheet
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def gpu_measure(args, make_step, rounds=9):
    """(seconds of a step, megabytes of its peak), after three steps."""
    torch.compiler.reset()
    gc.collect()  # of the step before
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, megabytes = warmed_up(args, make_step, 1 if args.quick else 3)
    (seconds,) = medians(args, step, rounds=rounds)
    return seconds, megabytes


def pretraining_step(args, backbone, batch, precision, compiled=False):
    """A step of pre-training at 800 x 1333."""
    model = ours(args, backbone=backbone, dropout=0.1)
    inputs = pretraining_batch(args, batch)
    normalizers = Pretraining(model).normalizers(inputs)  # once: training has them on the host
    if compiled:
        model.compile(fullgraph=True)
    return training_step(args, model, lambda: all_losses(model, inputs, normalizers), precision)


def gpu(args):
    """A training step of detection, r50 and dropout 0.1, against transformers' DETR at the same
    precision, not compiled; then a step of pre-training, 12 + 6 layers at 800 x 1333 (the peer is
    the card's bf16 peak), questions, retrieval.
    """
    cuda = args.device.startswith("cuda")
    card = torch.cuda.get_device_name() if cuda else "a CPU in the place of a GPU"
    card_peak = next((value for name, value in PEAKS.items() if name in card), 1e12)
    bf16 = "bf16" if cuda else "fp32"  # bf16 is slow on a CPU

    def detection(side, compiled=False):
        return gpu_measure(
            args, lambda: detection_step(args, side, 0.1, precision=bf16, compiled=compiled))

    peer = detection("peer")
    for compiled in (False, True):
        seconds, megabytes = detection("ours", compiled)
        name = f"r50-{bf16}{'-compile' if compiled else ''}"
        yield row(f"gpu/detection-time/{name}", seconds, peer[0], "s", 1.5, card)
        yield row(f"gpu/detection-memory/{name}", megabytes, peer[1], "MB", 1.25, card)

    flops = {backbone: flops_of(pretraining_step(args, backbone, 1, "fp32"))  # of one image
             for backbone in ("r50", "r152")}

    def pretraining(backbone, batch, precision, compiled=False):
        seconds, megabytes = gpu_measure(
            args, lambda: pretraining_step(args, backbone, batch, precision, compiled), rounds=5)
        rate = batch * flops[backbone] / seconds
        name = f"{backbone}-{precision}{'-compile' if compiled else ''}/batch-{batch}"
        return row(f"gpu/pretraining/{name}", rate / 1e12, card_peak / 1e12, "TFLOP/s", 0.35,
                   f"{batch / seconds:.1f} images/s, {megabytes:.0f} MB, {card}",
                   more_is_better=True)

    settings = [("r152", batch, bf16) for batch in (4, 8, 16, 32, 64)]
    settings += [(backbone, 4, precision) for backbone in ("r152", "r50")
                 for precision in ("fp32", "tf32")]
    settings.append(("r50", 4, "bf16"))
    for setting in settings[:1] if args.quick else settings:
        with contextlib.suppress(torch.OutOfMemoryError):  # a large batch on a small card
            yield pretraining(*setting)
    yield question(args, "gpu/two-step", bottom_up_attention, 600, 1000, 2.0)
    yield question(args, "gpu/pixel-bert", pixel_bert_model, 800, 1333, 1.6)
    yield retrieval_row(args, "gpu/retrieval", "r152")
    if cuda:
        for backbone, batch in (("r50", 4), ("r152", 4), ("r152", 16)):
            yield pretraining(backbone, batch, bf16, compiled=True)


# --------------------------------------------------------------------------------------------------
# The command

ROWS = {
    "loader/pictures-per-second": loader_speed, "loader/padding": loader_padding,
    "loader/index": loader_index, "start": start, "two-step": two_step, "pixel-bert": pixel_bert,
    "question-bf16": question_bf16, "table-6": table_6, "detr-forward": detr_forward,
    "detr-step": detr_step, "detr-memory": detr_memory, "four-losses": four_losses,
    "operators": operators, "matcher": matcher, "caption": caption, "retrieval": retrieval,
    "growth": growth, "gpu": gpu}


def rows_of(name, args):
    """Its rows as a list, for a process of its own."""
    return list(ROWS[name](args))


def processor():
    with open("/proc/cpuinfo") as file:
        name = re.search(r"model name\s*:\s*(.*)", file.read())
    return name[1] if name else "unknown processor"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="beginnings of rows' names, separated by commas")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the rows gpu/... need cuda")
    parser.add_argument("--full", action="store_true",
                        help="loader: an index of 180,000 images with 6 M sentences")
    parser.add_argument("--quick", action="store_true",
                        help="very small models, one round: does each row work?")
    args = parser.parse_args(argv)
    chosen = [name for name in ROWS if name.startswith(tuple(args.only.split(",")))]
    if not chosen:
        parser.error(f"--only {args.only}: no such row; there are {', '.join(ROWS)}")
    if "gpu" in chosen and not args.device.startswith("cuda") and not args.quick:
        chosen.remove("gpu")
        print("gpu: left out; python tests/bench.py --only gpu --device cuda")
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{args.device}", flush=True)

    rows = []
    for name in chosen:
        alone = not args.quick and name != "gpu"  # the GPU's rows are written one by one
        for found in fresh_process(rows_of, name, args) if alone else ROWS[name](args):
            rows.append({**found, "what": " ".join(ROWS[name].__doc__.split())})
            print(f"{found['name']:28} ours {found['ours']!s:<10} peer {found['peer']!s:<10} "
                  f"{found['unit']:16} ratio {found['ratio']!s:<8} target {found['target']!s:<6} "
                  f"{'holds' if found['holds'] else 'DOES NOT HOLD'}", flush=True)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
