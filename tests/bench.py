"""Speed and memory against what people would use instead: each row is a ratio, measured in one run with its peer.

    python tests/bench.py                                    # all rows that need no GPU: half an hour on two cores
    python tests/bench.py --only detr,loader --json rows.json    # those whose name begins so
    python tests/bench.py --only gpu --device cuda           # training on a GPU
    python tests/bench.py --only growth --picture growth.png # how time and memory grow, as a picture too

Ours and the peer's take turns in one process (a fresh one for each function), with the same inputs and threads, and
the medians of several rounds are compared; a ratio above 1 means that ours is better, and a row holds if its ratio
reaches the target. Peers are the real code (transformers, torchvision, pycocotools) at its true size; weights are
random on both sides, which changes nothing in the time. Nothing here is asserted by a test: a ratio depends on the
machine.
"""

import argparse
import gc
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the peers' weights are random: nothing is to be fetched

import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import (  # noqa: E402
    IMAGE_MEAN,
    IMAGE_STD,
    LONG_SIDE,
    SHORT_SIDES,
    Batches,
    Picture,
    PretrainingSet,
    Tokenizer,
    collate,
    indexed,
    resized,
)
from finetune import PARTS  # noqa: E402
from matcher import LOSS_WEIGHTS, set_loss  # noqa: E402
from model import E2EVLP, Config  # noqa: E402
from pretrain import counts_of, losses, step_cost, weights_of  # noqa: E402


def row(name, ours, peer, unit, target, how, more_is_better=False):
    """A row of the table. The target is a ratio; where a bound is promised instead, it is the ratio at that bound."""
    ratio = round((ours if more_is_better else peer) / max(peer if more_is_better else ours, 1e-3 * (unit == "MB")), 2)
    return {"name": name, "ours": float(f"{ours:.4g}"), "peer": float(f"{peer:.4g}"), "unit": unit, "ratio": ratio,
            "target": target, "holds": ratio >= target, "how": how}


def medians(args, *functions):
    """The median seconds of each, which take turns: --rounds of them, five of what takes less than a second.

    Each function has run before, when its output was checked; so no first call with its set-up is measured.
    """
    times = [[] for _ in functions]
    rounds = args.rounds
    while len(times[0]) < rounds:
        for function, found in zip(functions, times):
            synchronize(args.device)
            started = time.perf_counter()
            function()
            synchronize(args.device)
            found.append(time.perf_counter() - started)
        if not args.quick and max(found[0] for found in times) < 1:
            rounds = max(rounds, 5)
    return [statistics.median(found) for found in times]


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------------
# The loader


# Sizes of COCO's train2017 by how common they are: 640 x 480 and 640 x 427 and these upright come to two thirds, the
# rest has a long side of 640 or 500 and anything for the other. The shares are rounded, not counted.
COMMON = [((480, 640), 22), ((427, 640), 17), ((640, 480), 8), ((426, 640), 8), ((640, 427), 5), ((375, 500), 4),
          ((640, 640), 2)]


def coco_size(rng):
    draw = rng.randrange(100)
    for size, share in COMMON:
        if draw < share:
            return size
        draw -= share
    short, long = rng.randrange(240, 630), rng.choice((640, 640, 640, 500))
    return (min(short, long), long) if rng.random() < 0.7 else (long, min(short, long))


def make_pictures(folder, n=160):
    """JPEGs of COCO's sizes with detail on all scales, at COCO's quality; about 150 KB each."""
    rng = np.random.default_rng(0)
    sizes = random.Random(0)
    for i in range(n):
        height, width = coco_size(sizes)
        image = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (height // s + 2, width // s + 2, 3), np.uint8))
                               .resize((width, height), Image.Resampling.BICUBIC), np.float32) * share
                    for s, share in ((64, 0.5), (16, 0.3), (4, 0.2)))
        Image.fromarray(image.astype(np.uint8)).save(f"{folder}/{i:06d}.jpg", quality=95)


class DetrPictures(torch.utils.data.Dataset):
    """The peer: DETR's published transforms of training, and its collation, written with torchvision."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = Image.open(self.files[index]).convert("RGB")
        if random.random() < 0.5:
            image = TF.hflip(image)
        if random.random() < 0.5:
            image = self.resize(image, SHORT_SIDES)
        else:
            image = self.resize(image, (400, 500, 600), None)
            height, width = (random.randint(min(side, 384), min(side, 600)) for side in (image.height, image.width))
            top, left = random.randint(0, image.height - height), random.randint(0, image.width - width)
            image = self.resize(TF.crop(image, top, left, height, width), SHORT_SIDES)
        return TF.normalize(TF.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    @staticmethod
    def resize(image, sides, long=LONG_SIDE):
        return TF.resize(image, resized(image.height, image.width, random.choice(sides), long or 10 ** 6))

    @staticmethod
    def collate(images):  # nested_tensor_from_tensor_list
        shape = [len(images), *(max(side) for side in zip(*(image.shape for image in images)))]
        padded, mask = torch.zeros(shape), torch.ones(shape[0], *shape[2:], dtype=torch.bool)
        for row, hidden, image in zip(padded, mask, images):
            row[:, :image.shape[1], :image.shape[2]].copy_(image)
            hidden[:image.shape[1], :image.shape[2]] = False
        return padded, mask


def tokenizer():
    return Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "something", "##s"])


def loader_pictures(args):
    """Pictures a second through the whole loader, words and boxes included for ours; the same files and workers."""
    with tempfile.TemporaryDirectory() as made:
        folder = args.pictures or made
        if not args.pictures:
            make_pictures(made, 16 if args.quick else 160)
        files = sorted(os.path.join(folder, name) for name in os.listdir(folder)
                       if name.lower().endswith((".jpg", ".jpeg")))[:160]
        if not files:
            raise SystemExit(f"bench.py: --pictures {folder}: holds no JPEG")
        pictures = []
        for file in files:
            with Image.open(file) as image:
                pictures.append(Picture(file, file, (image.height, image.width), ["a picture of something"],
                                        coco=(np.full((7, 4), 0.5, np.float32), np.zeros(7, np.int64))))
        ours = PretrainingSet(pictures, tokenizer(), 1)
        words = dict(num_workers=args.workers)
        rounds = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for name in rounds:
                if name == "ours":
                    batches = Batches([p.size for p in pictures], 4)
                    loader = torch.utils.data.DataLoader(
                        ours, batch_sampler=[b for b, _ in zip(batches, range(len(files) // 4))],
                        collate_fn=lambda items: collate(items, 0), **words)
                else:
                    loader = torch.utils.data.DataLoader(DetrPictures(files), batch_size=4, shuffle=True,
                                                         collate_fn=DetrPictures.collate, **words)
                iterator = iter(loader)
                next(iterator)  # starting the workers is not what is measured
                started, n = time.time(), 0
                for batch in iterator:
                    n += len(batch["images"] if name == "ours" else batch[0])
                rounds[name].append(n / (time.time() - started))
    ours, peer = (statistics.median(rounds[name]) for name in rounds)
    return row("loader/pictures-per-second", ours, peer, "pictures/s", 1.5,
               f"{len(files)} JPEGs {'of ' + folder if args.pictures else 'of COCO sizes'}, {args.workers} workers, "
               "batch 4, 480 .. 800 pixels, against DETR's transforms and collation; ours with words and boxes", True)


def loader_padding(args):
    """Share of grid cells that are padding, 8 processes with 4 pictures each, sizes drawn as COCO's are."""
    rng = random.Random(0)
    shapes = [coco_size(rng) for _ in range(20000)]
    n = 100 if args.quick else 5000

    def wasted(batches):
        cells = used = 0
        for batch in batches:
            sizes = [resized(*shapes[i], SHORT_SIDES[draw % len(SHORT_SIDES)]) for i, draw in batch]
            cells += len(batch) * max(-(-h // 32) for h, _ in sizes) * max(-(-w // 32) for _, w in sizes)
            used += sum(-(-h // 32) * -(-w // 32) for h, w in sizes)
        return 1 - used / cells

    ours = wasted([(i, draw) for _, i, draw in batch]
                  for batch, _ in zip(Batches(shapes, 32, parts=8), range(n)))
    peer = wasted([(rng.randrange(len(shapes)), rng.randrange(11)) for _ in range(4)] for _ in range(n))
    return row("loader/padding", ours, peer, "share of cells", round(peer / 0.12, 2), "20,000 pictures of COCO's usual "
               "sizes, batch 4 a process, against random batches with a size a picture (DETR); 0.12 is promised")


def synthetic(folder, pictures, sentences):
    """An index of so many pictures with so many sentences, as if read from files: COCO and Visual Genome's sizes."""
    os.makedirs(f"{folder}/data", exist_ok=True)
    rng = np.random.default_rng(0)

    def read(say):
        found = []
        for n in range(pictures):
            texts = [f"the {n * 37 % 1009} thing left of number {i}" for i in range(sentences // pictures)]
            boxes = rng.random((20, 4), np.float32)
            found.append(Picture(f"vg {n}", f"{folder}/data/{n}.jpg", (480, 640), texts,
                                 vg=(boxes, np.zeros(20, np.int64), [(1, 2)] * 20)))
        return {"train": found, "sentences": sentences}

    return indexed(f"{folder}/data", None, "synthetic", [], read)


def loader_start(args):
    """Seconds from nothing to the first item at full size, and a worker's own memory over 2,000 batches."""
    n, m = (180_000, 6_000_000) if args.full else (1_800, 60_000) if args.quick else (18_000, 600_000)
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what building takes in memory must not be counted, nor be shared
        script = "import sys; sys.path.insert(0, sys.argv[1]); import bench; bench.synthetic(sys.argv[2], " f"{n}, {m})"
        subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__), folder], check=True)
        with open(f"{folder}/captions.json", "w") as file:
            json.dump({"images": [{"id": i} for i in range(n)], "annotations": [
                {"id": i, "image_id": i % n, "caption": f"the {i * 37 % 1009} thing left of number {i}"}
                for i in range(m)]}, file)
        times = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            started = time.time()
            found = indexed(f"{folder}/data", None, "synthetic", [], None)["train"]
            first = next(iter(Batches(found.sizes, 32)))
            assert len(found) == n and found[first[0][1]].sentences
            times["ours"].append(time.time() - started)
            started = time.time()
            with open(f"{folder}/captions.json") as file:  # what pycocotools.COCO does, its index left out
                json.load(file)
            times["peer"].append(time.time() - started)
        before = private_memory()
        for number, batch in enumerate(Batches(found.sizes, 32)):
            if number == (50 if args.quick else 2000):
                break
            for _, i, _ in batch:
                found[i]
        growth = private_memory() - before
    ours, peer = (statistics.median(times[name]) for name in times)
    return [row("loader/start", ours, peer, "s", 3, f"{n:,} pictures with {m:,} sentences: mapping the index and "
                "drawing the first batch, against reading the captions' JSON alone"),
            row("loader/memory", growth, 50, "MB", 1, "growth of a process's own memory over 2,000 batches of 32 "
                "records; the peer column is the most that is promised")]


def private_memory():
    """Megabytes that this process shares with no file and no other process."""
    try:
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ----------------------------------------------------------------------------------------------------------------
# Start of a training at COCO's full size


def write_coco(folder, pictures, boxes, sentences):
    """COCO 2017 in its own format and size, drawn: the annotations' JSON, and hard links to a few small JPEGs.

    Polygons have 25 corners in the mean, which makes the file as large as the true one. Returns its megabytes.
    """
    rng = random.Random(0)
    os.makedirs(f"{folder}/coco/annotations")
    for i in range(8):  # a file system allows some 65,000 links to a file
        Image.new("RGB", (96, 72), (30 * i, 99, 99)).save(f"{folder}/{i}.jpg")
    with open(f"{folder}/vocab.txt", "w") as file:
        file.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "thing", "left", "of"]))
    polygons = [json.dumps([[round(rng.uniform(0, 427), 2) for _ in range(2 * n)]]) for n in range(10, 41)]
    for split, share in (("train", 1), ("val", 1 / 100)):
        n, m, k = (max(2, round(share * count)) for count in (pictures, boxes, sentences))
        n = min(n, 50) if split == "val" else n
        os.mkdir(f"{folder}/coco/{split}2017")
        for i in range(n):
            os.link(f"{folder}/{i % 8}.jpg", f"{folder}/coco/{split}2017/{i:012d}.jpg")
        images = json.dumps([{
            "license": 4, "file_name": f"{i:012d}.jpg", "coco_url": f"http://images.cocodataset.org/x2017/{i:012d}.jpg",
            "height": 427, "width": 640, "date_captured": "2013-11-14 17:02:52", "id": i,
            "flickr_url": f"http://farm7.staticflickr.com/6116/{10 ** 10 + i}_02470f44b2_z.jpg"} for i in range(n)])
        categories = json.dumps([{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, 81)])
        with open(f"{folder}/coco/annotations/instances_{split}2017.json", "w") as file:
            file.write(f'{{"images": {images}, "categories": {categories}, "annotations": [')
            for i in range(m):
                file.write(f'{", " if i else ""}{{"segmentation": {rng.choice(polygons)}, "area": 702.1057, '
                           f'"iscrowd": 0, "image_id": {i * 37 % n}, "bbox": [{i % 400}.02, {i % 300}.97, 18.7, 52.3], '
                           f'"category_id": {1 + i % 80}, "id": {i}}}')
            file.write("]}")
        with open(f"{folder}/coco/annotations/captions_{split}2017.json", "w") as file:
            json.dump({"images": json.loads(images), "annotations": [
                {"image_id": i % n, "id": i, "caption": f"the {i * 37 % 1009} thing left of the thing with number {i}"}
                for i in range(k)]}, file)
    return os.path.getsize(f"{folder}/coco/annotations/instances_train2017.json") / 1e6


# finetune.py as it is, but that its data are what pycocotools reads, as DETR's data set does it
WITH_PYCOCOTOOLS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import finetune
import numpy as np
from pycocotools.coco import COCO
from data import Example, as_fractions

class Examples:
    def __init__(self, data, split):
        self.folder = f"{data}/coco/{split}2017"
        self.boxes, self.captions = (COCO(f"{data}/coco/annotations/{what}_{split}2017.json")
                                     for what in ("instances", "captions"))
        self.numbers = sorted(self.boxes.imgs)
        self.labels = {c: i for i, c in enumerate(sorted(self.boxes.cats))}
        self.sizes = np.array([(self.boxes.imgs[i]["height"], self.boxes.imgs[i]["width"]) for i in self.numbers])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        i = self.numbers[at]
        image, found = self.boxes.imgs[i], self.boxes.loadAnns(self.boxes.getAnnIds(i, iscrowd=False))
        boxes = [as_fractions(a["bbox"], image["width"], image["height"]) for a in found]
        return Example(i, (f"{self.folder}/{image['file_name']}",), size=(image["height"], image["width"]), target=(
            np.array(boxes, np.float32).reshape(-1, 4), np.array([self.labels[a["category_id"]] for a in found])),
            sentences=tuple(a["caption"] for a in self.captions.imgToAnns[i]))

def index_task(task, data, split, folder=None, say=print):
    examples = Examples(data, split)
    return {"examples": examples, "targets": {}, "categories": [c["name"] for c in examples.boxes.cats.values()]}

finetune.index_task = index_task
sys.exit(finetune.main(sys.argv[1:]))
"""


def start(args):
    """Seconds from the command line of a training on COCO's detection to its first finished step.

    Both are finetune.py with a small model, as a process of their own; they differ only in where the records come from:
    ours maps the index that an earlier run has built, the peer's reads the same JSON with pycocotools, as each process
    of DETR does each time. The files were just written, so neither waits for a disk.
    """
    share = 0.01 if args.quick else 1
    pictures, boxes, sentences = (int(share * n) for n in (118_287, 860_001, 591_753))
    with tempfile.TemporaryDirectory() as folder:
        size = write_coco(folder, pictures, boxes, sentences)

        def first_step(*command):
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command, "--data", folder, "--output", f"{folder}/run", *(
                    "--task detection --init none --backbone r18 --backbone-weights none --stride 16 --width 64 "
                    "--heads 2 --encoder-layers 1 --decoder-layers 1 --short-sides 64 --long-side 96 --batch-size 2 "
                    "--workers 0 --device cpu").split()],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("step 1/"):
                    taken = time.perf_counter() - started
                    process.kill()
                    process.communicate()
                    return taken
            raise RuntimeError(f"no first step:\n{said}")

        built = first_step(f"{ROOT}/finetune.py")  # builds the index
        times = [], []
        for _ in range(args.rounds):
            times[0].append(first_step(f"{ROOT}/finetune.py"))
            times[1].append(first_step("-c", WITH_PYCOCOTOOLS, ROOT))
    ours, peer = map(statistics.median, times)
    return row("start", ours, peer, "s", 3, f"{pictures:,} pictures, {boxes:,} boxes with polygons (JSON of "
               f"{size:.0f} MB), {sentences:,} sentences: from the command to the first step of finetune.py --task "
               "detection, r18, against the same with pycocotools in place of the index (which took "
               f"{built:.0f} s with its building, once)")


# ----------------------------------------------------------------------------------------------------------------
# Models, pictures and sentences


def ours(args, **changes):
    """Our model, ready to be used; with --quick a very small one."""
    if args.quick:
        small = dict(backbone="r18", encoder_layers=2, decoder_layers=2, vocabulary=500, classes={"coco": 80, "vg": 20})
        changes = {**changes, **small, **({"classes": changes["classes"]} if "classes" in changes else {})}
    torch.manual_seed(0)
    return sane(E2EVLP(Config(**{"dropout": 0.0, **changes}))).to(args.device).eval()


def sane(model):
    """The last norm of each residual block scaled to 0.2, on both sides.

    A ResNet of random weights whose norms change nothing doubles its variance in each block; after fifty of them
    numbers are so large that what follows is made of zeros and ones, and a CPU computes with denormal numbers slowly.
    """
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.bn3.weight.data.mul_(0.2)
        elif isinstance(module, BasicBlock):
            module.bn2.weight.data.mul_(0.2)
        elif type(module).__name__ in ("ResNetBottleNeckLayer", "ResNetBasicLayer"):  # transformers' own ResNet
            module.layer[-1].normalization.weight.data.mul_(0.2)
    return model


def resnet(args, name, norm):
    """torchvision's ResNet, the one people take; with --quick the smallest."""
    return sane(getattr(torchvision.models, "resnet18" if args.quick else name)(weights=None, norm_layer=norm))


def pixels(args, height, width, batch=1):
    """(B, 3, H, W) uint8 and sizes (B, 2), the same for both sides; with --quick a twelfth of each side."""
    height, width = (max(64, side // 12) if args.quick else side for side in (height, width))
    images = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
    return images.to(args.device), torch.tensor([[height, width]] * batch)


def normalised(images):
    """What the peers are given: uint8 pixels as ours, so that each side does this inside of what is measured."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std


def sentences(args, batch, words=14):
    """(B, T) random word pieces between [CLS] and [SEP]."""
    tokens = torch.randint(200, 500, (batch, words))
    tokens[:, 0], tokens[:, -1] = Config.cls, Config.sep
    return tokens.to(args.device)


def objects(args, numbers, classes, attributes=()):
    """A target for each number of boxes; attributes: the pictures that are Visual Genome's, with 400 attributes."""
    targets = []
    for b, n in enumerate(numbers):
        boxes = torch.cat([torch.rand(n, 2) * 0.6 + 0.2, torch.rand(n, 2) * 0.35 + 0.02], 1)
        targets.append({"source": "vg" if b in attributes else "coco", "boxes": boxes.to(args.device),
                        "labels": torch.randint(classes, (n,)).to(args.device)})
        if b in attributes:
            targets[b]["attributes"] = (torch.rand(n, 400) < 0.01).float().to(args.device)
    return targets


def checked(tensor, *shape):
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
    assert torch.isfinite(tensor).all()
    return tensor


def flops_of(function):
    """FLOPs of what a function computes; attention by its formula, since its quick kernels are not always counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------------
# A question about a picture: against the two-step pipelines, and against ourselves at other sizes


def bottom_up_attention(args):
    """The peer of two-step, and of all models before Pixel-BERT: its two steps, images uint8 -> boxes with features,
    and these with tokens -> logits of the answers.

    Faster R-CNN as Anderson et al. (2018) trained it on Visual Genome: ResNet-101 up to C4, 12 anchors a cell, 300
    proposals, RoIAlign 14 x 14, the fifth stage as box head, 1,601 classes; 36 boxes' pooled features go to LXMERT.
    Generous to it: RoIAlign at stride 2 in the fifth stage (theirs is dilated), one non-maximum suppression over the
    boxes' best classes (theirs runs for each of 1,600 classes), and no picture is read or feature written in between.
    """
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
    from torchvision.ops import batched_nms, roi_align
    from transformers import LxmertConfig, LxmertForQuestionAnswering
    torch.manual_seed(0)
    net = resnet(args, "resnet101", FrozenBatchNorm2d)
    c5 = net.fc.in_features
    c4 = c5 // 2
    head = RPNHead(c4, 12)
    hidden = min(512, c4)  # torchvision's head keeps all channels; the original has 512
    head.conv = nn.Sequential(nn.Conv2d(c4, hidden, 3, padding=1), nn.ReLU())
    head.cls_logits, head.bbox_pred = nn.Conv2d(hidden, 12, 1), nn.Conv2d(hidden, 48, 1)
    rpn = RegionProposalNetwork(AnchorGenerator(((64, 128, 256, 512),), ((0.5, 1.0, 2.0),)), head, 0.7, 0.3, 256, 0.5,
                                dict(training=6000, testing=6000), dict(training=300, testing=300), 0.7)
    classifier = nn.Linear(c5, 1601)
    small = dict(l_layers=1, x_layers=1, r_layers=1, hidden_size=48, intermediate_size=96, num_attention_heads=4)
    lxmert = LxmertForQuestionAnswering(LxmertConfig(num_qa_labels=3129, visual_feat_dim=c5,
                                                     **small if args.quick else {}))
    for module in (net, rpn, classifier, lxmert):
        module.to(args.device).eval()

    def look(images):
        height, width = images.shape[-2:]
        x = net.maxpool(net.relu(net.bn1(net.conv1(normalised(images)))))
        x = net.layer3(net.layer2(net.layer1(x)))
        boxes = rpn(ImageList(images, [(height, width)]), {"0": x})[0][0]
        assert args.quick or len(boxes) == 300
        features = net.layer4(roi_align(x, [boxes], 14, x.shape[-1] / width, 2)).mean((2, 3))   # (300, 2048)
        score, label = classifier(features).softmax(-1)[:, 1:].max(-1)
        kept = batched_nms(boxes, score, label, 0.3)
        preferred = score.index_fill(0, kept, 2.0) + score  # those kept first; others only if there are too few
        best = preferred.topk(min(36, len(boxes))).indices
        return features[best][None], (boxes[best] / boxes.new_tensor([width, height, width, height]))[None]

    def read(seen, tokens):
        return lxmert(input_ids=tokens, visual_feats=seen[0], visual_pos=seen[1]).question_answering_score
    return look, read


def pixel_bert_model(args):
    """The peer of pixel-bert (Huang et al. 2020): images uint8 -> cells, these with tokens -> logits of the answers.

    ResNet-152, its last grid max-pooled 2 x 2, each cell projected to 768 units, BERT-base over words and cells.
    """
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    net = resnet(args, "resnet152", nn.BatchNorm2d)
    small = dict(num_hidden_layers=1, hidden_size=48, intermediate_size=96, num_attention_heads=4)
    bert = BertModel(BertConfig(**small if args.quick else {}))
    width = bert.config.hidden_size
    project, classify = nn.Linear(net.fc.in_features, width), nn.Linear(width, 3129)
    for module in (net, bert, project, classify):
        module.to(args.device).eval()

    def look(images):
        x = net.maxpool(net.relu(net.bn1(net.conv1(normalised(images)))))
        x = nn.functional.max_pool2d(net.layer4(net.layer3(net.layer2(net.layer1(x)))), 2)
        return project(x.flatten(2).transpose(1, 2))

    def read(seen, tokens):
        words = bert.embeddings.word_embeddings(tokens)
        return classify(bert(inputs_embeds=torch.cat([words, seen], 1)).pooler_output)
    return look, read


@torch.inference_mode()
def question(args, name, peer, height, width, target, how):
    """A row: one question, batch 1, from the picture's pixels and the question's word pieces to 3,129 logits."""
    model, (look, read) = ours(args, backbone="r152", task="vqa", answers=3129), peer(args)
    (images, sizes), tokens = pixels(args, height, width), sentences(args, 1)

    def mine():
        return model.answer_questions(model.encode_picture(images, sizes), tokens)

    def theirs():
        return read(look(images), tokens)

    checked(mine(), 1, 3129)
    checked(theirs(), 1, 3129)
    return row(name, *medians(args, mine, theirs), "s", target,
               f"one question, {height} x {width}, r152 + 12 layers, against {how}")


def two_step(args):
    """A question about a picture: one model from pixels to answer, against a detector and then a model over its boxes.

    Both begin with the same pixels at the size that bottom-up-attention uses, and end with 3,129 answers' logits.
    """
    return question(args, "two-step", bottom_up_attention, 600, 1000, 2.0,
                    "Faster R-CNN (ResNet-101 C4, 300 proposals) whose 36 boxes go to LXMERT (9/5/5 layers)")


def pixel_bert(args):
    """The same question at 800 x 1333, against the other model that learns from pixels: it has the same ResNet, and a
    quarter of our cells in a transformer nine times as wide in parameters.
    """
    return question(args, "pixel-bert", pixel_bert_model, 800, 1333, 1.6,
                    "ResNet-152, its grid max-pooled 2 x 2, and BERT-base over words and cells")


@torch.inference_mode()
def table_6(args):
    """Table 6 of the paper: the same model at smaller pictures, against itself at 800 x 1333.

    What a smaller picture could save at most is the ratio of FLOPs, which stands beside it.
    """
    model, tokens = ours(args, backbone="r152", task="vqa", answers=3129), sentences(args, 1)
    sides = [(448, 448), (448, 746), (600, 1000), (800, 1333)]
    pictures = [pixels(args, *size) for size in sides]
    functions = [lambda p=p: model.answer_questions(model.encode_picture(*p), tokens) for p in pictures]
    for function in functions:
        checked(function(), 1, 3129)
    flops = [flops_of(function) for function in functions]
    *times, largest = medians(args, *functions)
    return [row(f"table-6/{h}x{w}", seconds, largest, "s", target,
                f"one question, r152 + 12 layers, against 800 x 1333, which has {flops[-1] / own:.2f} times the FLOPs")
            for (h, w), seconds, target, own in zip(sides, times, (5, 3, 1.5), flops)]


# ----------------------------------------------------------------------------------------------------------------
# Detection: against transformers' DETR


def detr(args, dropout=0.0):
    """transformers' DETR with a ResNet-50, whose batch norm it freezes itself.

    All of its ResNet learns, as ours does: with transformers' ResNet its rule for what to freeze fits no name, so that
    nothing would learn, and the step would be another.
    """
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    torch.manual_seed(0)
    small = dict(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]) if args.quick else {}
    layers = 2 if args.quick else 6
    model = DetrForObjectDetection(DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=80, auxiliary_loss=True,
        backbone_config=ResNetConfig(out_features=["stage4"], **small), encoder_layers=layers, decoder_layers=layers,
        dropout=dropout, attention_dropout=dropout, activation_dropout=dropout))
    return sane(model.requires_grad_(True)).to(args.device).eval()


@torch.inference_mode()
def detr_forward(args):
    """Detection on one picture, from its uint8 pixels to classes and boxes; six layers on both sides, r50, 800 x 1333.

    Each transformer is its own paper's: ours has 12 heads of 32 units and 1,024 between, DETR 8 and 2,048.
    """
    model, theirs = ours(args, encoder_layers=6), detr(args)
    images, sizes = pixels(args, 800, 1333)

    def mine():
        return model.detect(model.encode(model.encode_picture(images, sizes)))

    def peer():
        return theirs(pixel_values=normalised(images), pixel_mask=torch.ones_like(images[:, 0], dtype=torch.long))

    checked(mine()["logits"]["coco"][-1], 1, 100, 81)
    checked(peer().logits, 1, 100, 81)
    return row("detr-forward", *medians(args, mine, peer), "s", 1.5,
               "one picture, r50, 6 + 6 layers, 800 x 1333, against transformers' DETR; from uint8 pixels")


def detection_step(args, side, dropout=0.0, backbone="r50", batch=2, precision="fp32", compiled=False,
                   recompute=False):
    """A function that does one training step of detection (forward, set loss, backward, AdamW) and gives the loss."""
    torch.manual_seed(0)
    images, sizes = pixels(args, 800, 1333, batch)
    targets = objects(args, [7, 12] * (batch // 2) + [7] * (batch % 2), 80)
    if side == "ours":
        model = ours(args, backbone=backbone, encoder_layers=6, dropout=dropout)
        model.recompute = recompute
        parts = tuple(part for part in PARTS["detection"] if part != "sentence")  # the picture alone
        parameters = [p for name, p in model.named_parameters() if name.startswith(parts)]

        def outputs(images, sizes):
            return model.detect(model.encode(model.encode_picture(images, sizes)))

        if compiled:
            outputs = torch.compile(outputs, backend="inductor" if args.device.startswith("cuda") else "eager")

        def loss():
            found = outputs(images, sizes)
            named = set_loss({**found, "logits": {"coco": found["logits"]["coco"]}}, targets)
            return sum(LOSS_WEIGHTS[name] * value for name, value in named.items())
    else:
        model = detr(args, dropout)
        parameters = list(model.parameters())
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        in_float32 = model.loss_function

        def loss_function(logits, labels, device, boxes, config, classes, coordinates):
            return in_float32(logits.float(), labels, device, boxes.float(), config, classes.float(),
                              coordinates.float())

        model.loss_function = loss_function  # its matching does not work in bf16

        def loss():
            return model(pixel_values=normalised(images), pixel_mask=torch.ones_like(images[:, 0], dtype=torch.long),
                         labels=labels).loss
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-4, fused=True)

    def step():
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()
    return step


STEP = ("forward, set loss, backward and AdamW, r50, 6 + 6 layers, batch 2 at 800 x 1333 with 7 and 12 objects, the "
        "whole ResNet learns")
# Both papers train with dropout 0.1 inside of attention too. A GPU has a quick kernel for that; a CPU has none, and
# both sides keep whole matrices of attention, of 12 heads here and of 8 there. Without dropout it does as a GPU would.
DROPOUTS = {"": (0.0, "dropout 0"), "/dropout": (0.1, "dropout 0.1, inside of attention too, for which a CPU has no "
                                                "quick kernel")}


def detr_step(args):
    """A training step of detection. The same data, optimiser, dropout and learning parts on both sides; then what the
    step costs if our activations are computed again instead of kept.
    """
    steps = [detection_step(args, side, dropout) for dropout, _ in DROPOUTS.values() for side in ("ours", "peer")]
    steps.append(detection_step(args, "ours", recompute=True))
    for step in steps:
        assert torch.isfinite(step())
    *times, again = medians(args, *steps)
    return [*(row(f"detr-step{name}", *times[2 * i:2 * i + 2], "s", 1.4, f"{STEP}, {says}; against transformers' DETR")
              for i, (name, (_, says)) in enumerate(DROPOUTS.items())),
            row("detr-step/checkpointing", again, times[0], "s", 0.74, f"{STEP}, dropout 0, with "
                "--activation-checkpointing against without; a third more time is expected, a ratio of 0.75")]


def reset_peak(device):
    """Let the peak of memory be counted from now on; returns the megabytes that are in use."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2 ** 20
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # not Linux: the peak since the process began
        pass
    return resident("VmRSS")


def peak(device):
    return torch.cuda.max_memory_allocated() / 2 ** 20 if device.startswith("cuda") else resident("VmHWM")


def resident(key):
    """Megabytes of this process in main memory: VmRSS now, VmHWM at most since the last reset."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024)


def step_memory(step, device, quick):
    """Megabytes that model, optimiser and two steps take at most. To be run in a process of its own.

    step: further arguments of `detection_step`, or "pretraining".
    """
    import transformers.models.detr.modeling_detr  # noqa: F401  the code itself is not what is measured
    args = SimpleNamespace(device=device, quick=quick)
    torch.zeros(1, device=device)
    before = reset_peak(device)
    step = pretraining_step(args) if step == "pretraining" else detection_step(args, **step)
    for _ in range(2):  # AdamW's state comes into being in the first
        assert torch.isfinite(step())
    return peak(device) - before


def megabytes(args, step):
    """`step_memory` in a fresh process: what an allocator keeps of an earlier step would count for the next."""
    if args.quick and step != "pretraining":  # one process is enough to see that this works
        return max(1.0, step_memory(step, args.device, True))
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import bench; "
              f"print(bench.step_memory({step!r}, {args.device!r}, {args.quick}))")
    found = subprocess.run([sys.executable, "-c", script, os.path.dirname(os.path.abspath(__file__))],
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return float(found.stdout.split()[-1])


def detr_memory(args):
    """The memory of that training step: model, gradients, AdamW's state, activations and what kernels need meanwhile;
    and with our activations computed again instead of kept.
    """
    how, rows = f"peak of {STEP}, above what the process had before the model was built", []
    for name, (dropout, says) in DROPOUTS.items():
        peer = megabytes(args, dict(side="peer", dropout=dropout))
        rows.append(row(f"detr-memory{name}", megabytes(args, dict(side="ours", dropout=dropout)), peer, "MB", 1.25,
                        f"{how}; {says}; against transformers' DETR"))
        if not dropout:
            again = megabytes(args, dict(side="ours", recompute=True))
            rows.append(row("detr-memory/checkpointing", again, peer, "MB", 1.25,
                            f"{how}; {says}, with --activation-checkpointing; against transformers' DETR"))
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Pre-training, its set loss, and generation


def pretraining_batch(args, config, batch=2, height=800, width=1333, words=14):
    """What data.collate gives: a sentence a picture, 15 % of its words hidden; every other picture Visual Genome's."""
    images, sizes = pixels(args, height, width, batch)
    captions = sentences(args, batch, words)[:, None]
    tokens = captions.clone()
    tokens[..., 1:1 + max(1, round(0.15 * (words - 2)))] = config.mask
    places = (tokens.flatten() == config.mask).nonzero()[:, 0]
    targets = objects(args, [7, 12] * (batch // 2) + [7] * (batch % 2), 20, range(1, batch, 2))
    return {"images": images, "sizes": sizes, "tokens": tokens,
            "mlm_places": places, "mlm_words": captions.flatten()[places], "captions": captions,
            "itm_labels": torch.ones(batch, 1, dtype=torch.long, device=args.device), "targets": targets,
            "no_sentence": torch.zeros(batch, dtype=torch.bool, device=args.device)}


def all_losses(model, batch):
    """The weighted sum of pre-training's losses, as pretrain.py has it."""
    flags = SimpleNamespace(pad=model.config.pad, queries=model.config.queries)
    named, weights = losses(model(batch), batch, counts_of(batch, flags), flags), weights_of([])
    return sum(weights[name] * value for name, value in named.items())


def pretraining_step(args):
    """A function that does a whole pre-training step, as `plan` predicts it."""
    model = ours(args).train()
    batch = pretraining_batch(args, model.config, height=600, width=1000, words=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        value = all_losses(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as with several parts of a batch: the gradients stay
        return value.detach()
    return step


def plan(args):
    """What pretrain.py --plan says of the memory of a step, against the peak of a process that does the step.

    It is to be right to a tenth, so the ratio is that of the smaller to the larger. What it cannot know is what the
    convolutions' kernels take in passing.
    """
    model = ours(args)
    flags = SimpleNamespace(activation_checkpointing=False, sentences_per_picture=1, amp="none")
    size = pixels(args, 600, 1000)[0].shape[-2:]
    predicted = (16 * sum(p.numel() for p in model.parameters())
                 + step_cost(model.config, flags, 2, *size)[1]) / 2 ** 20
    measured = megabytes(args, "pretraining")
    return {**row("plan", predicted, measured, "MB", 0.9, "pretrain.py --plan's weights, gradients, optimiser and "
                  "activations, r50, 12 + 6 layers, batch 2 at 600 x 1000, against the peak of a process that does the "
                  "step; the ratio is the smaller to the larger"),
            "ratio": (near := round(min(predicted / measured, measured / predicted), 2)), "holds": near >= 0.9}


def four_losses(args):
    """A pre-training step with all its losses, against one with detection alone: what the other three cost.

    Both read the picture with its sentence. All losses need a second pass of the encoder over the picture alone, the
    decoder over the caption, and two layers as wide as the vocabulary; they share the backbone and the decoding of
    objects. The same dropout of 0 for both, so that attention has its quick kernel on a CPU as it has on a GPU.
    """
    model = ours(args).train()
    batch = pretraining_batch(args, model.config)

    def joint():
        value = all_losses(model, batch)
        value.backward()
        model.zero_grad(set_to_none=True)
        return value

    def detection():
        grid = model.encode_picture(batch["images"], batch["sizes"])
        named = set_loss(model.detect(model.encode(grid, batch["tokens"][:, 0])), batch["targets"])
        value = sum(LOSS_WEIGHTS[name] * value for name, value in named.items())
        value.backward()
        model.zero_grad(set_to_none=True)
        return value

    assert torch.isfinite(joint()) and torch.isfinite(detection())
    return row("four-losses", *medians(args, joint, detection), "s", round(1 / 1.35, 2), "forward and backward with "
               "all losses, r50, 12 + 6 layers, batch 2 at 800 x 1333, dropout 0, against detection alone; at most "
               "1.35 times its time is promised, a ratio of 0.74")


def matcher(args):
    """Matching and set loss, forward and backward, on the same outputs and targets, against transformers' DETR loss.

    Both give the losses of all six layers, each with its own matching, and they agree to 1e-4.
    """
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
    torch.manual_seed(0)
    L, B, Q, C = (2, 2, 30, 91) if args.quick else (6, 16, 100, 91)
    targets = objects(args, torch.randint(20, 61 if not args.quick else 25, (B,)).tolist(), C)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    config = DetrConfig(num_labels=C, auxiliary_loss=True, decoder_layers=L)
    logits = torch.randn(L, B, Q, C + 1, device=args.device, requires_grad=True)
    raw = torch.randn(L, B, Q, 4, device=args.device, requires_grad=True)
    attributes = torch.zeros(L, B, Q, 1, device=args.device, requires_grad=True)

    def mine():
        named = set_loss({"logits": {"coco": logits}, "boxes": raw.sigmoid(), "attributes": attributes}, targets)
        value = sum(LOSS_WEIGHTS[name] * value for name, value in named.items())
        return value, torch.autograd.grad(value, (logits, raw))

    def peer():
        boxes = raw.sigmoid()
        value = ForObjectDetectionLoss(logits[-1], labels, args.device, boxes[-1], config, outputs_class=logits,
                                       outputs_coord=boxes)[0]
        return value, torch.autograd.grad(value, (logits, raw))

    torch.testing.assert_close(mine(), peer(), rtol=1e-4, atol=1e-4)
    return row("matcher", *medians(args, mine, peer), "s", 3, f"set loss forward and backward, batch {B}, {L} layers, "
               f"{Q} queries, {C} classes, 20 to 60 boxes a picture, against transformers' DETR loss; equal to 1e-4")


@torch.inference_mode()
def caption(args):
    """A caption of exactly 20 words by beam search of 4, with the keys and values of earlier words kept, and without.

    Both give the same words. [SEP] is made unlikely, so that neither ends early.
    """
    model, length = ours(args), 4 if args.quick else 20
    model.decoder[-1].norm3.bias += 1         # the decoder's outputs have a mean of 1 now, instead of 0
    model.caption.weight[model.config.sep] = -1  # so [SEP] has a logit of minus the width
    memory = model.encode(model.encode_picture(*pixels(args, 800, 1333)))

    def words(cache):
        return model.generate(memory, beam=4, max_tokens=length + 1, cache=cache)[0][0]

    assert words(True) == words(False) and len(words(True)) == length
    return row("caption", *medians(args, lambda: words(True), lambda: words(False)), "s", 4,
               f"beam 4, {length} words over {memory.states.shape[1]:,} cells, r50, 12 + 6 layers, against no cache")


@torch.inference_mode()
def similarities(args, backbone):
    """A pair of 1,000 pictures x 5,000 sentences, the picture's backbone run once, against each pair from its pixels.

    Measured on a part, two pictures with eight sentences each; the backbone counts with one 5,000th, for it runs once
    for all of a picture's sentences. The similarities are equal. The encoder's share, which each pair needs, bounds the
    ratio: at (backbone + encoder) / encoder.
    """
    model, n = ours(args, backbone=backbone), 8
    pictures, tokens = [pixels(args, 800, 1333) for _ in range(2)], sentences(args, n)

    def grids_alone():
        return [model.encode_picture(*picture) for picture in pictures]

    def encoder():
        return [model.similarity(grid.rows(torch.zeros(n, dtype=torch.long, device=args.device)), tokens)
                for grid in grids]

    def from_pixels():
        return [model.similarity(model.encode_picture(images.repeat(n, 1, 1, 1), sizes.repeat(n, 1)), tokens)
                for images, sizes in pictures]

    grids = grids_alone()
    for found, expected in zip(encoder(), from_pixels()):
        torch.testing.assert_close(checked(found, n), expected, rtol=1e-3, atol=1e-4)
    once, pair, whole = medians(args, grids_alone, encoder, from_pixels)
    pairs = n * len(pictures)
    return row(f"retrieval/{backbone}", once / len(pictures) / 5000 + pair / pairs, whole / pairs, "s a pair", 8,
               f"{backbone} + 12 layers, 800 x 1333; a 5,000th of the backbone ({once / len(pictures):.2f} s) and the "
               f"encoder on {n} sentences at once, against all from pixels; measured on {len(pictures)} x {n} pairs")


def retrieval(args):
    """The paper's best model, and the one with the smallest ResNet, whose backbone is less of the whole."""
    return [similarities(args, backbone) for backbone in ("r152", "r50")]


# ----------------------------------------------------------------------------------------------------------------
# Growth


def exponent(sizes, values):
    """The slope of the straight line through the points in log-log, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def saved_megabytes(model, function):
    """Megabytes that the forward pass keeps for the backward pass: distinct storages, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):  # the graph holds the tensor, so no storage's address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function()
    del value
    return sum(kept.values()) / 2 ** 20


def growth(args):
    """How time and memory of a pre-training step grow with one quantity, the others staying as they are.

    Nothing may grow faster than attention's square. The base is moderate (r18), each quantity is doubled several times;
    the exponent is that of a power law through all points, and through the last two alone, where what does not grow
    matters least. Dropout is 0, so attention has its quick kernel, which keeps no matrix of attention.
    """
    doublings = 2 if args.quick else 4
    base = dict(cells=4 if args.quick else 64, words=16, batch=2, layers=1 if args.quick else 3, queries=50)
    table = {}
    for axis in base:
        sizes = [(1 if axis == "batch" else base[axis]) * 2 ** i for i in range(doublings + 1)]
        steps, megabytes = [], []
        for size in sizes:
            at = {**base, axis: size}
            torch.manual_seed(0)
            model = E2EVLP(Config(backbone="r18", encoder_layers=at["layers"], decoder_layers=2, queries=at["queries"],
                                  max_tokens=max(40, at["words"]), dropout=0.0, vocabulary=3000))
            model = sane(model).to(args.device).train()
            rows = 2 ** (int(math.log2(at["cells"])) // 2)  # a square of cells, or two beside one another
            side = 32 * 12 if args.quick else 32  # of a cell; `pixels` divides it
            height, width = side * rows, side * at["cells"] // rows
            batch = pretraining_batch(args, model.config, at["batch"], height, width, at["words"])

            def step(model=model, batch=batch):
                all_losses(model, batch).backward()
                model.zero_grad(set_to_none=True)

            megabytes.append(saved_megabytes(model, lambda model=model, batch=batch: all_losses(model, batch)))
            step()
            steps.append(step)
        seconds = medians(args, *steps)
        table[axis] = sizes, seconds, megabytes, [exponent(sizes[-n:], values[-n:])
                                                  for values in (seconds, megabytes) for n in (len(sizes), 2)]
    for axis, (sizes, seconds, megabytes, exponents) in table.items():
        print(f"  {axis:8} " + "  ".join(f"{n}: {s:.3f} s {m:.0f} MB" for n, s, m in zip(sizes, seconds, megabytes))
              + "  exponents: time {:.2f} (last {:.2f}), memory {:.2f} (last {:.2f})".format(*exponents), flush=True)
    if args.picture:
        draw_growth(args.picture, table)
    return [row(f"growth/{axis}", max(exponents), 2, "exponent", 0.95,
                "{} {} to {}; time {:.2f} (last doubling {:.2f}), memory kept for backward {:.2f} ({:.2f})".format(
                    axis, sizes[0], sizes[-1], *exponents) + f"; from r18, {base['cells']} cells, 16 words, batch 2, "
                f"{base['layers']} layers, 50 queries, dropout 0; at most 2, with 0.1 of tolerance")
            for axis, (sizes, _, _, exponents) in table.items()]


class Canvas:
    """A white picture to draw lines and words on, for the README."""

    SCALE = 2  # drawn twice as large, so that lines are smooth
    COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222",  # also told apart by the
               "#8C6D31", "#7F7F7F"]                                                         # colour-blind

    def __init__(self, width, height):
        self.size = width, height
        self.image = Image.new("RGB", (width * self.SCALE, height * self.SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, colour, thick=3):
        self.draw.line([(x * self.SCALE, y * self.SCALE) for x, y in points], fill=colour, width=thick * self.SCALE,
                       joint="curve")

    def dashes(self, points, colour, thick=3, on=9, off=6):
        start = 0.0  # of a stretch, along the whole line
        for (x, y), (x1, y1) in zip(points, points[1:]):
            length = math.dist((x, y), (x1, y1))
            for k in range(int(start // (on + off)), math.ceil((start + length) / (on + off))):
                a, b = (min(max(k * (on + off) + end - start, 0), length) for end in (0, on))
                if a < b:
                    self.line([(x + (x1 - x) * t / length, y + (y1 - y) * t / length) for t in (a, b)], colour, thick)
            start += length

    def text(self, x, y, words, size=17, anchor="lm", colour="#222222"):
        self.draw.text((x * self.SCALE, y * self.SCALE), words, colour, ImageFont.load_default(size * self.SCALE),
                       anchor)

    def dot(self, x, y, colour):
        self.draw.ellipse([v * self.SCALE for v in (x - 5, y - 5, x + 5, y + 5)], colour)

    def save(self, path):
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(path)


def draw_growth(path, table):
    """The table as a picture: time and memory as multiples of their first value, on logarithmic axes."""
    width, height, top, left, side, gap = 1280, 640, 70, 80, 490, 140
    canvas = Canvas(width, height)
    line, text, colours = canvas.line, canvas.text, canvas.COLOURS
    doublings = max(len(sizes) for sizes, *_ in table.values()) - 1
    highest = 2 * doublings  # a square's doublings

    for panel, what in enumerate(("time", "memory kept for the backward pass")):
        x0, y1 = left + panel * (side + gap), top + side

        def place(size, value, x0=x0, y1=y1):
            return x0 + math.log2(size) / doublings * side, y1 - math.log2(max(value, 0.8)) / highest * side

        text(x0, top - 36, f"{what[0].upper()}{what[1:]} of a pre-training step", 20)
        for power in range(highest + 1):
            line([place(1, 2 ** power), place(2 ** doublings, 2 ** power)], "#e4e4e4", 1)
            text(x0 - 8, place(1, 2 ** power)[1], f"{2 ** power}x", 15, "rm")
        for power in range(doublings + 1):
            line([place(2 ** power, 1), place(2 ** power, 2 ** highest)], "#e4e4e4", 1)
            text(place(2 ** power, 1)[0], y1 + 18, f"{2 ** power}x", 15, "mm")
        text(x0 + side / 2, y1 + 46, "size, as a multiple of the smallest", 16, "mm")
        canvas.dashes([place(1, 1), place(2 ** doublings, 4 ** doublings)], "#777777", 2)
        canvas.draw.rectangle([v * canvas.SCALE for v in (x0 + 8, top + 8, x0 + 248, top + 204)], "white")
        text(x0 + 20, top + 26, "exponent through all points", 16)
        text(x0 + 20, top + 52, "dashed: 2, attention's square", 16, colour="#777777")
        for number, (axis, (sizes, seconds, megabytes, exponents)) in enumerate(table.items()):
            values = (seconds, megabytes)[panel]
            points = [place(n / sizes[0], v / values[0]) for n, v in zip(sizes, values)]
            line(points, colours[number])
            for x, y in points:
                canvas.dot(x, y, colours[number])
            y = top + 80 + 26 * number
            line([(x0 + 20, y), (x0 + 46, y)], colours[number])
            text(x0 + 56, y, f"{axis} {sizes[0]} to {sizes[-1]}: {exponents[2 * panel]:.2f}", 16)
    canvas.save(path)


# ----------------------------------------------------------------------------------------------------------------
# On a GPU

# Matrix peaks without sparsity, TFLOP/s, by what the card's name contains
PEAKS = {"H100": {"bf16": 989, "tf32": 494, "fp32": 67}, "H200": {"bf16": 989, "tf32": 494, "fp32": 67},
         "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5}}


def gpu(args):
    """The training step of detr-step on a GPU: precisions, torch.compile, memory, share of the peak, largest batch.

    The peer is transformers' DETR r50, not compiled, at the same precision; for r152 it is our own r152 in float32,
    as DETR has none. A CPU, where this runs only with --quick, shows that it works.
    """
    cuda = args.device.startswith("cuda")
    card = torch.cuda.get_device_name() if cuda else "a CPU in the place of a GPU"
    where = f"{card}, torch {torch.__version__}, batch 2 at 800 x 1333, dropout 0.1"
    peaks = next((peaks for name, peaks in PEAKS.items() if name in card), {})
    measured, flops = {}, {}
    for backbone, side in (("r50", "peer"), ("r50", "ours"), ("r152", "ours")):
        for precision in ("fp32", "tf32", "bf16"):
            for compiled in (False, True)[:1 + (side == "ours" and (cuda or (backbone, precision) == ("r50", "bf16")))]:
                measured[side, backbone, precision, compiled] = step_on_gpu(args, side, backbone, precision, compiled)
        flops[side, backbone] = flops_of(detection_step(args, side, 0.1, backbone))
    rows = []
    for key, (seconds, megabytes) in measured.items():
        side, backbone, precision, compiled = key
        if side == "peer":
            continue
        other = ("peer", "r50", precision, False) if backbone == "r50" else ("ours", "r152", "fp32", False)
        name = f"{backbone}-{precision}{'-compile' if compiled else ''}"
        how = f"{where}; against " + ("DETR r50 at the same precision" if backbone == "r50" else "ours in float32")
        targets = (1.5, 1.25) if backbone == "r50" else (1, 1)
        rates = [flops[k[:2]] / measured[k][0] / 1e12 for k in (key, other)]
        shares = [f"{rate / peaks[p]:.1%}" for rate, p in zip(rates, (precision, other[2]))] if peaks else ["unknown"]
        rows += [row(f"gpu/time/{name}", seconds, measured[other][0], "s", targets[0], f"training step, {how}"),
                 row(f"gpu/memory/{name}", megabytes, measured[other][1], "MB", targets[1], f"peak of a step, {how}"),
                 row(f"gpu/rate/{name}", *rates, "TFLOP/s", 1, f"FLOPs of a step over its time, {how}; share of the "
                     f"card's matrix peak: {' and '.join(shares)}", True)]
    seconds, key = min((value[0], key) for key, value in measured.items() if key[:2] == ("ours", "r50"))
    rows.append(row("gpu/best", seconds, measured["peer", "r50", "fp32", False][0], "s", 3, f"our quickest r50 ("
                    f"{key[2]}{', compiled' if key[3] else ''}) against DETR r50 in float32, {where}"))
    rows.append(row("gpu/largest-batch", largest_batch(args, "ours"), largest_batch(args, "peer"), "pictures", 1.25,
                    f"r50 in bf16, without running out of memory, {where}; against DETR r50", True))
    return rows


def step_on_gpu(args, side, backbone, precision, compiled):
    """(median seconds of a step, peak megabytes), after three steps that are not measured."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        torch.compiler.reset()
        in_use = reset_peak(args.device)
        step = detection_step(args, side, 0.1, backbone, 2, precision, compiled)
        for _ in range(1 if args.quick else 3):
            assert torch.isfinite(step())
        seconds = medians(args, *[step] * (1 if args.quick else 3))  # three steps a round
        return statistics.median(seconds), peak(args.device) - in_use
    finally:
        torch.backends.cudnn.allow_tf32, precision = before
        torch.set_float32_matmul_precision(precision)


def largest_batch(args, side):
    """The largest batch whose training step in bf16 fits: doubled until it does not, then halved in between."""
    def fits(batch):
        reset_peak(args.device)
        try:
            if not args.device.startswith("cuda") and batch > 2:  # a CPU's memory is not to be filled
                raise torch.OutOfMemoryError
            detection_step(args, side, 0.1, "r50", batch, "bf16")()
            return True
        except torch.OutOfMemoryError:
            return False

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


ROWS = {"loader/pictures-per-second": loader_pictures, "loader/padding": loader_padding, "loader/start": loader_start,
        "start": start, "two-step": two_step, "pixel-bert": pixel_bert, "table-6": table_6,
        "detr-forward": detr_forward, "detr-step": detr_step, "detr-memory": detr_memory, "plan": plan,
        "four-losses": four_losses, "matcher": matcher, "caption": caption, "retrieval": retrieval, "growth": growth,
        "gpu": gpu}


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"model name\s*:\s*(.*)", file.read())[1]
    except (OSError, TypeError):
        import platform
        return platform.processor() or platform.machine()


def in_a_fresh_process(name, argv):
    """The rows of one function: what rows before have left in the allocator changes how long large tensors take."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, os.path.abspath(__file__), *argv, "--only", name, "--json",
                               f"{folder}/rows.json"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"bench.py: {name} failed, see above")
        print("".join(f"{line}\n" for line in done.stdout.splitlines() if line.startswith("  ")), end="", flush=True)
        with open(f"{folder}/rows.json") as file:
            return json.load(file)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", help="names of rows, or what they begin with, separated by commas")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--picture", help="growth: draw it into this PNG")
    parser.add_argument("--pictures", help="loader: a folder of JPEGs (default: made for it)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="loader: processes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; medians are compared")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the rows gpu/... need cuda")
    parser.add_argument("--full", action="store_true", help="loader/start: 180,000 pictures and 6 M sentences")
    parser.add_argument("--quick", action="store_true", help="very small models, one round: do all rows work?")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds = 1
    wanted = args.only.split(",") if args.only else [""]

    def chosen(name):
        return any(name.startswith(w) or w.startswith(f"{name}/") for w in wanted)

    unknown = [w for w in wanted if not any(n.startswith(w) or w.startswith(f"{n}/") for n in ROWS)]
    if unknown:
        print(f"bench.py: --only {unknown[0]}: no such row; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.device}", flush=True)
    rows, began = [], time.time()
    for name, function in ROWS.items():
        if not chosen(name) or name == "gpu" and not (args.device.startswith("cuda") or args.quick):
            continue
        found = function(args) if args.quick or args.only == name else in_a_fresh_process(name, argv)
        for r in found if isinstance(found, list) else [found]:
            rows.append(r)
            print(f"{r['name']:28} ours {r['ours']:<10g} peer {r['peer']:<10g} {r['unit']:16} ratio {r['ratio']:<8g} "
                  f"target {r['target']:<6g} {'holds' if r['holds'] else 'DOES NOT HOLD'}", flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=1)
    print(f"{len(rows)} rows in {(time.time() - began) / 60:.1f} minutes")
    if chosen("gpu") and not any(r["name"].startswith("gpu") for r in rows):
        print("gpu rows: not run (python tests/bench.py --only gpu --device cuda)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
