"""Speed and memory against what people would use instead: each row is a ratio, measured in one run with its peer.

    python tests/bench.py                                    # all rows
    python tests/bench.py --only loader --json rows.json     # those whose name begins so
    python tests/bench.py --only loader/pictures --pictures DIR --workers 4

Ours and the peer's alternate, the medians of several rounds are compared; a ratio above 1 means that ours is better.
Nothing here is asserted by a test: a ratio depends on the machine.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import (  # noqa: E402
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


# ----------------------------------------------------------------------------------------------------------------
# The peer: DETR's published transforms of training, and its collation, written with torchvision


class DetrPictures(torch.utils.data.Dataset):
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


def row(name, ours, peer, unit, target, how, more_is_better=True, limit=None):
    """A row of the table; limit: `ours` must also be below it."""
    ratio = (ours if more_is_better else peer) / max(peer if more_is_better else ours, 1e-3)  # it can be nothing at all
    holds = ratio >= target if limit is None else ours <= limit
    return {"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "unit": unit, "ratio": round(ratio, 2),
            "target": target if limit is None else limit, "holds": bool(holds), "how": how}


def tokenizer():
    return Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "something", "##s"])


def loader_pictures(args):
    """Pictures a second through the whole loader, words and boxes included for ours; the same files and workers."""
    with tempfile.TemporaryDirectory() as made:
        folder = args.pictures or made
        if not args.pictures:
            make_pictures(made)
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
               "batch 4, 480 .. 800 pixels, against DETR's transforms and collation; ours with words and boxes")


def loader_padding(args):
    """Share of grid cells that are padding, 8 processes with 4 pictures each, sizes drawn as COCO's are."""
    rng = random.Random(0)
    shapes = [coco_size(rng) for _ in range(20000)]

    def wasted(batches):
        cells = used = 0
        for batch in batches:
            sizes = [resized(*shapes[i], SHORT_SIDES[draw % len(SHORT_SIDES)]) for i, draw in batch]
            cells += len(batch) * max(-(-h // 32) for h, _ in sizes) * max(-(-w // 32) for _, w in sizes)
            used += sum(-(-h // 32) * -(-w // 32) for h, w in sizes)
        return 1 - used / cells

    ours = wasted([(i, draw) for _, i, draw in batch]
                  for batch, _ in zip(Batches(shapes, 32, parts=8), range(5000)))
    peer = wasted([(rng.randrange(len(shapes)), rng.randrange(11)) for _ in range(4)] for _ in range(5000))
    return row("loader/padding", ours, peer, "share of cells", None, "20,000 pictures of COCO's usual sizes, batch 4 a "
               "process, against random batches with a size a picture (DETR)", more_is_better=False, limit=0.12)


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
    n, m = (180_000, 6_000_000) if args.full else (18_000, 600_000)
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
            if number == 2000:
                break
            for _, i, _ in batch:
                found[i]
        growth = private_memory() - before
    ours, peer = (statistics.median(times[name]) for name in times)
    return [row("loader/start", ours, peer, "s", 3, f"{n:,} pictures with {m:,} sentences: mapping the index and "
                "drawing the first batch, against reading the captions' JSON alone", more_is_better=False),
            row("loader/memory", growth, 50, "MB", None, "growth of a process's own memory over 2,000 batches of 32 "
                "records; the peer column is the limit", more_is_better=False, limit=50)]


def private_memory():
    """Megabytes that this process shares with no file and no other process."""
    try:
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


ROWS = {"loader/pictures-per-second": loader_pictures, "loader/padding": loader_padding, "loader/start": loader_start}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", help="names of rows, or what they begin with, separated by commas")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--pictures", help="loader: a folder of JPEGs (default: made for it)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="loader: processes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; medians are compared")
    parser.add_argument("--full", action="store_true", help="loader/start: 180,000 pictures and 6 M sentences")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else [""]
    unknown = [w for w in wanted if not any(name.startswith(w) for name in ROWS)]
    if unknown:
        print(f"bench.py: --only {unknown[0]}: no such row; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    rows = []
    for name, function in ROWS.items():
        if any(name.startswith(w) for w in wanted):
            found = function(args)
            for r in found if isinstance(found, list) else [found]:
                rows.append(r)
                print(f"{r['name']:28} ours {r['ours']:<10g} peer {r['peer']:<10g} {r['unit']:16} "
                      f"ratio {r['ratio']:<8g} target {r['target']}  {'holds' if r['holds'] else 'DOES NOT HOLD'}",
                      flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
