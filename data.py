"""The data: word pieces; the official files as typed records, and their readers; the index; images;
masking. At the end, what the commands share.

Nothing is converted beforehand: `--data DIR` is laid out as the official downloads unpack (the
README has the tree). Boxes are kept as fractions of their image, so that they need no care when it
is resized.
"""

import argparse
import csv
import functools
import glob
import hashlib
import io
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from msgspec import Meta, Struct
from PIL import ExifTags, Image, ImageOps
from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm

from matcher import box_in_fractions, boxes_in_pixels

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as torchvision's weights expect
IMAGE_STD = (0.229, 0.224, 0.225)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHORT_SIDES = tuple(range(480, 801, 32))  # scale augmentation (section 4.2): 480, 512 ... 800
LONG_SIDE = 1333


class InputError(ValueError):
    """Something the user gave cannot be used. One line that names it and says what to do."""

    def __init__(self, message):
        # One that a loader's worker raised arrives as its traceback; its own line ends it.
        message = str(message).rsplit("InputError: ", 1)[-1].strip()
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:2000]))


# --------------------------------------------------------------------------------------------------
# Word pieces


class Tokenizer:
    """BERT's WordPiece (lower case) from a vocab.txt, or from a list of pieces."""

    def __init__(self, vocabulary, max_tokens=40):
        source = vocabulary if isinstance(vocabulary, str) else "the checkpoint's vocabulary"
        if isinstance(vocabulary, str):
            vocabulary = read_text(vocabulary).rstrip("\n").split("\n")
        self.vocabulary = list(map(str, vocabulary))
        ids = {piece: i for i, piece in enumerate(self.vocabulary)}
        missing = [piece for piece in SPECIAL if piece not in ids]
        double = len(self.vocabulary) - len(ids)
        if missing or double:
            raise InputError(f"{source}: not a WordPiece vocabulary like BERT's vocab.txt: "
                             f"{missing} are missing, {double} pieces are there twice")
        self.max_tokens = max_tokens
        self.pad, _, self.cls, self.sep, self.mask = (ids[piece] for piece in SPECIAL)
        self.ordinary = [i for piece, i in ids.items() if piece not in SPECIAL]
        self.wordpiece = BertWordPieceTokenizer(ids, lowercase=True)
        self.wordpiece.enable_truncation(max_tokens)

    def encode(self, sentence):
        """A sentence -> [CLS] w1 .. wm [SEP] as a list of ids, at most max_tokens of them."""
        if sentence and not self.ordinary:
            raise InputError("DETR's weights know no words: give no sentence")
        return self.wordpiece.encode(sentence).ids

    def is_too_long(self, sentence):
        """Whether `encode` cuts its end off."""
        could_be = len(sentence) > self.max_tokens - 2  # a piece has a character at least
        return could_be and bool(self.wordpiece.encode(sentence).overflowing)

    def decode(self, tokens):
        """Ids -> text, without special pieces. WordPiece parts "man's" and "t-shirt" at each sign;
        they are joined again, or a caption's words would differ from its references'.
        """
        text = self.wordpiece.decode([int(t) for t in tokens], skip_special_tokens=True)
        return re.sub(r"(?<=\w) (?:(-) (?=\w)|(') (?=(?:s|t|m|d|re|ve|ll)\b))", r"\1\2", text)


# --------------------------------------------------------------------------------------------------
# The official files. A class is a record of a file, its fields are what is read of it; msgspec
# skips all others, and its message names the record and field that is missing or of another type.

Id = Annotated[int, Meta(ge=0, le=10**15)]
Pixels = Annotated[int, Meta(ge=1, le=10**6)]
Box = tuple[float, float, float, float]


class CocoImage(Struct):
    id: Id
    file_name: str
    height: Pixels
    width: Pixels
    flickr_url: str = ""  # tells the photograph's number on Flickr

class CocoObject(Struct):
    image_id: Id
    category_id: Id
    bbox: Box             # x, y, width, height in pixels
    id: int = 0
    iscrowd: bool | float | None = 0
    area: float | None = None  # in pixels, for AP of small, medium, large objects

class Category(Struct):
    id: Id                # with gaps
    name: str

class CocoInstances(Struct):
    """coco/annotations/instances_*.json, or boxes of one's own in this format"""
    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[Category]

class CocoCaption(Struct):
    image_id: Id
    caption: str

class CocoCaptions(Struct):
    """coco/annotations/captions_*.json"""
    annotations: list[CocoCaption]

class VGImage(Struct):
    """vg/image_data.json, a list of these: the image may be COCO's or Flickr30k's too."""
    image_id: Id
    height: Pixels
    width: Pixels
    coco_id: Id | None = None
    flickr_id: Id | None = None

class VGObject(Struct):
    object_id: Id
    x: float
    y: float
    w: float
    h: float
    names: list[str | None] | None = None
    attributes: list[str | None] | None = None

class VGObjects(Struct):
    """vg/objects.json and vg/attributes.json, each a list of these."""
    image_id: Id
    objects: list[VGObject] = []
    attributes: list[VGObject] = []

class VGRegion(Struct):
    phrase: str
    x: float
    y: float
    width: float
    height: float

class VGRegions(Struct):
    """vg/region_descriptions.json, a list of these; id is the image's."""
    id: Id
    regions: list[VGRegion]

class KarpathySentence(Struct):
    raw: str

class KarpathyImage(Struct):
    split: str
    filename: str
    sentences: Annotated[list[KarpathySentence], Meta(min_length=1)]
    cocoid: Id | None = None

class Karpathy(Struct):
    """coco/dataset_coco.json, flickr30k/dataset_flickr30k.json: Karpathy's splits."""
    images: list[KarpathyImage]


class Pair(Struct):
    """A row of a file of images with captions of one's own; image: its path below their folder."""
    image: str
    caption: str
    split: Literal["train", "val", "test", ""] = ""


class Objects(Struct):
    """An image's objects: boxes cxcywh as fractions, labels, attributes of Visual Genome."""
    boxes: list[Box]
    labels: list[int]
    attributes: list[list[int]] = []


class Example(Struct):
    """One image (NLVR2: two) with what is known about it: what the readers make of the files."""
    id: int | str                        # what the official result files, or messages, call it
    files: list[str] = []
    size: tuple[int, int] | None = None  # (height, width) of its image; of two, see `frame`
    upright: bool = True                 # whether a camera's rotation (EXIF) is applied
    text: str = ""                       # the question or statement about it
    target: int | str | None = None      # the right answer; VQA: most people's; None: unknown
    answers: list[str] = []              # VQA: what ten people said
    answer_type: str = ""                # VQA: yes/no, number, other
    sentences: list[str] = []            # COCO's captions first, then region descriptions
    captions: int = 0                    # so many of them are captions
    coco: Objects | None = None          # None where COCO has not annotated it
    vg: Objects | None = None


def read_text(path):
    """A text file. InputError names it."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin with a byte order mark
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path}: cannot be read ({reason}); the README's data tree says where "
                         "it comes from") from None


def read_json(path, kind, lines=False):
    """A JSON file as a record type; lines: a record a line, a list of them. InputError names the
    file and the field.
    """
    text = read_text(path)
    decoder = msgspec.json.Decoder(kind)
    try:
        return decoder.decode_lines(text) if lines else decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"{path}: {error}; mend the record, or download the file again") from None


def safe_name(name, path):
    """A name out of an annotation, if it cannot lead out of its folder: else whoever writes
    annotations could have any file read that the user may read.
    """
    if not name or name[0] == "/" or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise InputError(f"{path}: the name {name[:80]!r} is empty or leads out of its folder")
    return name


def say_counts(path, counts, say):
    """counts: {what was met, and what is done about it: how many}."""
    for what, number in counts.items():
        if number:
            say(f"{path}: {number} {what}")


def find_files(folder, names):
    """{name in a record: the image's path in a folder, or None}. It is the path as the record has
    it; if that is not there its last part, if only one file, and no other record's, is called so.
    """
    if folder is None:
        raise InputError("give the images' folder too: --images, --train-images or --val-images")
    paths = {}
    alike = defaultdict(list)
    for parent, _, files in os.walk(folder, followlinks=True):
        for file in files:
            path = os.path.join(parent, file)
            paths[os.path.relpath(path, folder)] = path
            alike[file].append(path)
    if not paths:
        raise InputError(f"{folder}: no such folder, or nothing in it; unpack the images there")

    found = {name: paths.get(os.path.normpath(name)) for name in names}
    taken = set(found.values())
    for name, path in found.items():
        others = alike[os.path.basename(name)]
        if path is None and len(others) == 1 and others[0] not in taken:
            found[name] = others[0]
            taken.add(others[0])
    return found


def read_boxes(path, folder, complete=False, say=print):
    """A file of boxes in COCO's format, without crowd regions: ({image id: Example}, the
    categories' names, by id, of which labels are the numbers, {image id: Flickr's number}).

    folder: of the images; complete: an image that is not there is an error (a score needs all),
    else left out.
    """
    instances = read_json(path, CocoInstances)
    examples = images_with_records(path, folder, instances.images, complete, say)
    categories = sorted(instances.categories, key=lambda category: category.id)
    # Some tools write a category of the project's name above all, which no box has
    used = {annotation.category_id for annotation in instances.annotations}
    used_names = [category.name for category in categories if category.id in used]
    categories = [category for category in categories
                  if category.id in used or category.name not in used_names]
    names = [category.name for category in categories]
    label_of = {category.id: label for label, category in enumerate(categories)}
    if len(set(names)) < len(names):
        double = Counter(names).most_common(1)[0][0]
        raise InputError(f"{path}: the category {double!r} is there twice")
    photographs = {}
    for image in instances.images:
        photograph = re.search(r"/(\d{1,18})_[^/]*$", image.flickr_url)
        if photograph:
            photographs[image.id] = int(photograph[1])

    known = {image.id for image in instances.images}
    counts = Counter()
    for annotation in instances.annotations:
        if annotation.image_id not in known or annotation.category_id not in label_of:
            raise InputError(f"{path}: annotation {annotation.id}: unknown image_id "
                             f"{annotation.image_id} or category_id {annotation.category_id}")
        example = examples.get(annotation.image_id)
        if example is None:
            continue
        height, width = example.size
        x, y, w, h = annotation.bbox
        box = box_in_fractions(annotation.bbox, width, height)
        if annotation.iscrowd:
            counts["crowd regions (iscrowd is 1) are left out"] += 1
        elif box is None:
            counts["boxes without area or outside of their image are left out"] += 1
        else:
            example.coco.boxes.append(box)
            example.coco.labels.append(label_of[annotation.category_id])
            beyond = min(x, y) < -1 or x + w > width + 1 or y + h > height + 1
            counts["boxes that reach beyond their image are clipped; a bbox is x, y, width, height "
                   "in pixels"] += beyond
    say_counts(path, counts, say)
    if not any(example.coco.boxes for example in examples.values()):
        raise InputError(f"{path}: no box is left of {len(instances.annotations)} annotations and "
                         f"{len(instances.categories)} categories; detection needs some")
    return examples, names, photographs


def images_with_records(path, folder, images, complete, say):
    """{image id: Example} of the CocoImages whose files are in the folder. Boxes are for the pixels
    as stored, or for the image as a camera's rotation (EXIF) turns it: the record's size tells.
    """
    files = find_files(folder, [safe_name(image.file_name, path) for image in images])
    examples, file_names = {}, {}
    missing = []
    for image in tqdm(images, "image sizes", disable=None, leave=False):
        if file_names.setdefault(image.id, image.file_name) != image.file_name:
            raise InputError(f"{path}: image id {image.id} stands for {file_names[image.id]} and "
                             f"for {image.file_name}; give each image a number of its own")
        file = files[image.file_name]
        if file is None:
            missing.append(image.file_name)
            continue
        size = image.height, image.width
        stored, turned = size_of(file)
        if stored is not None and size not in (stored, turned):
            raise InputError(f"{path}: {file} has {stored[1]} x {stored[0]} pixels, its record "
                             f"{image.width} x {image.height}: boxes would be wrong")
        examples[image.id] = Example(image.id, [file], size, upright=size != stored,
                                     coco=Objects([], []))
    if missing:
        problem = f"{path}: {len(missing)} images are not in {folder}, the first is {missing[0]}"
        if complete or not examples:
            raise InputError(f"{problem}; a score needs all, a training some")
        say(f"{problem}; left out")
    return examples


def add_captions(examples, path):
    """COCO's captions of these images, {image id: Example}."""
    for caption in read_json(path, CocoCaptions).annotations:
        if caption.image_id in examples and caption.caption.strip():
            examples[caption.image_id].sentences.append(caption.caption.strip())
            examples[caption.image_id].captions += 1


def read_coco(data, split, say=print):
    """`read_boxes` of COCO 2017's "train" or "val", with captions."""
    folder = f"{data}/coco/annotations"
    found = read_boxes(f"{folder}/instances_{split}2017.json", f"{data}/coco/{split}2017", say=say)
    add_captions(found[0], f"{folder}/captions_{split}2017.json")
    return found


def read_pairs(path, folder, split, say=print):
    """Images with captions of one's own, those of "train", "val" or "test": [Example]; an image's
    name is its id. A CSV file with the header image,caption[,split], or JSON lines of the same
    words. Without a split one in ten images is of val, chosen by a hash of its name. folder: of the
    images; "": they are not needed.
    """
    if path.endswith(".jsonl"):
        pairs = read_json(path, Pair, lines=True)
    else:
        rows = csv.DictReader(io.StringIO(read_text(path)), strict=True, restval="")
        try:
            pairs = [msgspec.convert(row, Pair) for row in rows]
        except (csv.Error, msgspec.MsgspecError) as error:
            raise InputError(f"{path}, line {rows.line_num}: {error}; the first line must be image,"
                             "caption or image,caption,split; split is train, val, test or empty; "
                             "a caption with commas needs double quotes") from None
    names = [os.path.normpath(safe_name(pair.image, path)) for pair in pairs]
    files = dict(zip(names, names)) if folder == "" else find_files(folder, names)
    counts = Counter()
    examples = {}
    for pair, name in zip(pairs, names):
        by_hash = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
        if split != (pair.split or ("val" if by_hash else "train")):
            continue
        file = files[name]
        if file is None and split != "train":
            raise InputError(f"{folder}/{name}: is not there, but in {path}; a score needs all")
        if file is None:
            counts[f"pairs whose image is not in {folder} are left out"] += 1
        elif not pair.caption.strip():
            counts["pairs with an empty caption are left out"] += 1
        else:
            example = examples.setdefault(name, Example(name, [file]))
            example.sentences.append(pair.caption.strip())
            example.captions += 1
    say_counts(path, counts, say)
    if not examples:
        raise InputError(f"{path}: no pair of {split!r} is left of {len(pairs)} rows; a column "
                         "split says which are of train, val and test")
    return list(examples.values())


def read_names(path):
    """bottom-up-attention's word list: (lines "name,synonym ...", {name or synonym: its line})."""
    lines = [line.strip().lower() for line in read_text(path).splitlines() if line.strip()]
    number_of = {}
    for number, line in enumerate(lines):
        for name in line.split(","):
            number_of.setdefault(name.strip(), number)
    return lines, number_of


def name_of(names, source, number):
    """The name of a class or attribute; only Visual Genome's have synonyms, after a comma."""
    name = names[source][number]
    return name if source == "coco" else name.split(",")[0]


def known_names(names, number_of):
    """The numbers of those of the names that a word list has, in their order."""
    cleaned = [str(name).strip().lower() for name in names or ()]
    return [number_of[name] for name in cleaned if name in number_of]


def read_vg(data, say=print):
    """Visual Genome: ({image id: Example}, {image id: (coco_id, flickr_id)}, object names,
    attribute names). Its known flaws are left out and counted. The first known name counts.
    """
    folder = f"{data}/vg"
    objects, label_of = read_names(f"{folder}/objects_vocab.txt")
    attributes, attribute_of = read_names(f"{folder}/attributes_vocab.txt")
    files = glob.glob(f"{glob.escape(folder)}/VG_100K*/*.jpg")
    on_disk = {os.path.basename(file): file for file in files}

    examples, links = {}, {}
    counts = Counter()
    for image in read_json(f"{folder}/image_data.json", list[VGImage]):
        file = on_disk.get(f"{image.image_id}.jpg")
        if file is None:
            counts["images of image_data.json are not there and left out"] += 1
            continue
        examples[image.image_id] = Example(
            f"vg {image.image_id}", [file], (image.height, image.width), upright=False,
            vg=Objects([], []))
        links[image.image_id] = image.coco_id, image.flickr_id
    if not examples:
        raise InputError(f"{folder}: VG_100K and VG_100K_2 hold no image of image_data.json")

    attributes_of = {}
    for record in read_json(f"{folder}/attributes.json", list[VGObjects]):
        for thing in record.attributes:
            numbers = known_names(thing.attributes, attribute_of)
            attributes_of[thing.object_id] = sorted(set(numbers))

    for record in read_json(f"{folder}/objects.json", list[VGObjects]):
        example = examples.get(record.image_id)
        for thing in record.objects if example else ():
            labels = known_names(thing.names, label_of)
            height, width = example.size
            box = box_in_fractions((thing.x, thing.y, thing.w, thing.h), width, height)
            if box is None:
                counts["boxes without area or outside of their image are left out"] += 1
            elif not labels:
                counts["boxes whose name is not in objects_vocab.txt are left out"] += 1
            else:
                example.vg.boxes.append(box)
                example.vg.labels.append(labels[0])
                example.vg.attributes.append(attributes_of.get(thing.object_id, []))
                if thing.object_id not in attributes_of:
                    counts["objects without a record in attributes.json have no attribute"] += 1

    for record in read_json(f"{folder}/region_descriptions.json", list[VGRegions]):
        example = examples.get(record.id)
        known = set()
        for region in record.regions if example else ():
            phrase = region.phrase.strip()
            key = phrase.lower(), region.x, region.y, region.width, region.height
            if key in known or not re.search("[a-z]", phrase.lower()):
                counts["sentences without a Latin letter, or twice with the same box, are left "
                       "out"] += 1
            else:
                example.sentences.append(phrase)
            known.add(key)
    say_counts(folder, counts, say)
    return examples, links, objects, attributes


def held_out(data, say=print):
    """(COCO ids, Flickr numbers) of the images that no training may see, those of val2017 and of
    Karpathy's val and test splits; and COCO's ids of his test split.
    """
    coco, flickr, test = set(), set(), set()
    path = f"{data}/coco/annotations/instances_val2017.json"
    if os.path.exists(path):
        coco |= {image.id for image in read_json(path, CocoInstances).images}
    for name in ("coco", "flickr30k"):
        path = f"{data}/{name}/dataset_{name}.json"
        if not os.path.exists(path):
            say(f"{path}: not there, so its val and test images cannot be kept out of pre-training")
            continue
        for image in read_json(path, Karpathy).images:
            stem = os.path.splitext(image.filename)[0]
            if image.split not in ("val", "test"):
                continue
            if name == "flickr30k" and stem.isdigit():
                flickr.add(int(stem))
            elif image.cocoid is not None:
                coco.add(image.cocoid)
                if image.split == "test":
                    test.add(image.cocoid)
    return coco, flickr, test


def read_pretraining(data, sets=("coco", "vg"), say=print):
    """All that pre-training needs (section 4.1), a dict: train: [Example], none of a val or test
    split; val: [Example], COCO val2017 less Karpathy's test images; names: {"coco", "vg",
    "attributes": [...]}. An image in both sets is one Example.
    """
    coco_out, flickr_out, coco_test = held_out(data, say)
    names = {"coco": [], "vg": [], "attributes": []}
    train, val, vg_only = {}, {}, []
    leaking = 0
    if "coco" in sets:
        train, names["coco"], photographs = read_coco(data, "train", say)
        val, val_names, _ = read_coco(data, "val", say)
        if val_names != names["coco"]:
            raise InputError(f"{data}/coco: train2017 and val2017 have different categories")
        for number in list(train):
            if number in coco_out or photographs.get(number) in flickr_out:
                coco_out.add(number)  # Visual Genome may know it by this number alone
                leaking += train.pop(number) is not None
    if "vg" in sets:
        examples, links, names["vg"], names["attributes"] = read_vg(data, say)
        for number, example in examples.items():
            coco_id, flickr_id = links[number]
            twin = train.get(coco_id) or val.get(coco_id)
            if flickr_id in flickr_out:
                leaking += 1
                train.pop(coco_id, None)  # the same image in COCO
            elif twin is not None:
                twin.vg = example.vg
                twin.sentences += example.sentences
            elif coco_id in coco_out:
                leaking += 1
            else:
                vg_only.append(example)

    val = {number: example for number, example in val.items() if number not in coco_test}
    for number, example in [*train.items(), *val.items()]:
        example.id = f"coco {number}"
    found = [*train.values(), *vg_only]
    train = [example for example in found if example.sentences]
    say_counts(data, {"images are in a val or test split; left out of pre-training": leaking,
                      "images have no sentence; left out": len(found) - len(train)}, say)
    if not train:
        raise InputError(f"--data {data}: no image to pre-train on is left")
    return {"train": train, "val": [example for example in val.values() if example.sentences],
            "names": names}


# --------------------------------------------------------------------------------------------------
# The index: what the readers made, in files that all processes map

INDEX_VERSION = 10  # raise it with any change of the readers or of Example


class MmapList(Sequence):
    """A list of Examples in memory-mapped files; an item is decoded when it is asked for. As a
    Python list, 180,000 images with 6 M sentences take gigabytes, and in each loader worker again:
    counting references copies the pages that processes share (PyTorch issue 13246).

    PATH.msgpack has the records, PATH.npy (N, 5) of each where it starts and ends, the height and
    width of its image, and a number that is the same for the same image.
    """

    def __init__(self, path):
        self.path = path
        self.bytes = np.memmap(f"{path}.msgpack", np.uint8, "r")
        self.table = np.load(f"{path}.npy", mmap_mode="r")
        self.sizes = self.table[:, 2:4]
        self.image_numbers = self.table[:, 4]
        self.decoder = msgspec.msgpack.Decoder(Example)

    def __reduce__(self):  # a worker that is not forked maps the files again
        return MmapList, (self.path,)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self.table[index, :2]
        return self.decoder.decode(self.bytes[start:end].tobytes())

    @staticmethod
    def write(path, examples):
        known = {}  # files -> (number, size)
        rows = []
        with open(f"{path}.msgpack", "wb") as file:
            file.write(b"\0")  # an empty file could not be mapped
            for example in tqdm(examples, "index", disable=None, leave=False):
                example.files = [os.path.abspath(name) for name in example.files]
                key = tuple(example.files)
                if key not in known:
                    size = example.size or frame([size_of(name)[1] or (1, 1) for name in key])
                    known[key] = len(known), size
                number_, example.size = known[key]
                start = file.tell()
                file.write(msgspec.msgpack.encode(example))
                rows.append((start, file.tell(), *example.size, number_))
        np.save(f"{path}.npy", np.array(rows, np.int64).reshape(-1, 5))


def load_or_build_index(data, folder, kind, read, say=print, sources=()):
    """The dict that read(say) returns, its lists of Examples as MmapLists, from an index.

    folder: where indexes lie, DATA/.index by default; kind: a word for it; sources: the files and
    folders that `read` reads, by default the official ones. If the size or time of one changes, the
    index is rebuilt, by each host's first process, while the others wait. What `read` says is
    kept and said again each time.
    """
    if not os.path.isdir(data or ""):
        raise InputError(f"--data {data}: no such folder; see the README's data tree")
    folder = folder or f"{data}/.index"

    def cannot_write(error):
        return InputError(f"--index {folder}: cannot be written ({error.strerror}); give another "
                          "folder, with space in it")

    try:  # in each process, before it looks at times: it changes that of the folder above
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise cannot_write(error) from None
    root = glob.escape(data)
    official = sorted(glob.glob(f"{root}/*/*") + glob.glob(f"{root}/coco/annotations/*"))
    # What trainings write, if their --output is in the data folder, is no source
    logs = glob.glob(f"{root}/*/log.jsonl") + glob.glob(f"{root}/*/*/log.jsonl")
    runs = {os.path.dirname(log) for log in logs}
    official = [path for path in official if not runs & {path, os.path.dirname(path)}]
    state = [INDEX_VERSION, os.path.abspath(data)]
    # Of one's own folders also those in them: os.walk gives nothing for a file
    own = [parent for path in sources for parent, _, files in os.walk(path, followlinks=True)
           if "log.jsonl" not in files]
    for path in [*sources, *own] or official:
        if os.path.exists(path) and not f"{path}/".startswith(f"{folder.rstrip('/')}/"):
            status = os.stat(path)
            state.append((path, status.st_size, status.st_mtime_ns))
    path = f"{folder}/{kind}-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}"

    def build():
        if os.path.isdir(path):
            return
        notes = []
        found = read(notes.append)
        unfinished = f"{path}.{os.getpid()}.tmp"
        try:
            os.makedirs(unfinished, exist_ok=True)
            lists = [name for name, value in found.items() if isinstance(value, list)]
            for name in lists:
                MmapList.write(f"{unfinished}/{name}", found.pop(name))
            with open(f"{unfinished}/about.json", "wb") as file:
                file.write(msgspec.json.encode({"plain": found, "lists": lists, "notes": notes}))
            for old in glob.glob(f"{glob.escape(folder)}/{kind}-" + "[0-9a-f]" * 16):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)
            os.rename(unfinished, path)
        except OSError as error:
            if not os.path.isdir(path):  # else another run was faster
                raise cannot_write(error) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    on_first_process(build)
    about = read_json(f"{path}/about.json", dict)
    for note in about["notes"]:
        say(note)
    return {**about["plain"], **{name: MmapList(f"{path}/{name}") for name in about["lists"]}}


def pretraining_index(data, sets=("coco", "vg"), folder=None, say=print, pairs=None,
                      pairs_images=None):
    """`read_pretraining` by the index; or, with pairs and pairs_images, `read_pairs`."""
    if pairs is None:
        kind = "-".join(["pretraining", *sorted(sets)])
        return load_or_build_index(data, folder, kind,
                                   lambda say: read_pretraining(data, sets, say), say)

    def read(say):
        train, val = (read_pairs(pairs, pairs_images, split, say) for split in ("train", "val"))
        return {"train": train, "val": val, "names": {"coco": [], "vg": [], "attributes": []}}

    return load_or_build_index(os.path.dirname(pairs) or ".", folder, "pretraining-pairs", read,
                               say, sources=(pairs, pairs_images or ""))


MOST_DESCRIBED = 10_000  # all of 180,000 with 6 M sentences would take minutes at each start


def describe(kind, examples, names, queries=0, tokenizer=None, say=print):
    """Say what there is to train on or to measure on; of a large list every so many examples count.
    kind: what to call it; names: of the classes, {"coco", "vg": [...]}; queries: of the detector.
    Returns the mean number of objects in an image.
    """
    every = math.ceil(len(examples) / MOST_DESCRIBED) or 1
    if every > 1:
        say(f"{kind}: {len(examples):,} examples; what follows is of one in {every}")
    files = set()
    boxes = {"coco": Counter(), "vg": Counter()}  # label -> how many
    in_image = []
    sentences = cut_off = 0
    for example in examples[::every]:
        files.update(example.files)
        for source, counts in boxes.items():
            objects = getattr(example, source)
            if objects is not None:
                counts.update(objects.labels)
                in_image.append(len(objects.labels))
        for sentence in filter(None, [example.text, *example.sentences]):
            sentences += 1
            cut_off += tokenizer is not None and tokenizer.is_too_long(sentence)

    say(f"{kind}: {len(files):,} images, {sentences:,} sentences, {sum(in_image):,} boxes")
    if cut_off:
        say(f"  {cut_off:,} sentences have more than {tokenizer.max_tokens - 2} word pieces; what "
            "comes after those is cut off")
    for source, counts in boxes.items():
        if counts:
            labels = sorted(range(len(names[source])), key=counts.__getitem__)
            fewest, most = (f"{counts[label]:,} ({name_of(names, source, label)})"
                            for label in (labels[0], labels[-1]))
            say(f"  {len(labels):,} classes; boxes a class: from {fewest} to {most}")
    if in_image:
        say(f"  boxes an image: {np.mean(in_image):.1f} in the mean, {max(in_image)} at most; "
            f"{in_image.count(0):,} images have none")
    lost = [n - queries for n in in_image if queries and n > queries]
    if lost:
        say(f"  {len(lost):,} images have more objects than there are queries ({queries}): "
            f"{sum(lost):,} objects can never be found")
    return float(np.mean(in_image)) if in_image else 0.0


# --------------------------------------------------------------------------------------------------
# Images

# Pillow knows dozens of formats, and starts programs for some of them (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pillow refuses to decode more than twice its MAX_IMAGE_PIXELS, 178 M pixels ("decompression
# bomb"); large photographs lie below that and need no warning.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image(file, short=None, long=None, upright=True):
    """An RGB image; upright: a camera's rotation (EXIF) is applied, else pixels are as stored (COCO
    counts its boxes so). 16 bits become 8, transparent areas white; of a moving image the first
    frame counts. InputError names a file that does not decode.

    short, long: what `to_pixels` will make of it. A JPEG much larger than that is decoded at 1/2,
    1/4 or 1/8 of its size, which leaves out most of the work.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if short is not None and image.format == "JPEG":
                height, width = resized(image.height, image.width, short, long)
                image.draft(None, (width, height))
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            image.info.pop("exif", None)  # so that no caller applies it again
            return to_rgb(image)
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"{file}: cannot be read ({error}); images are of kind "
                         f"{', '.join(FORMATS)}") from None


def to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        pixels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_images(example_of, index, total, short, long):
    """The images of item `index`, or of the next item whose images decode: (images, its index,
    messages about those that do not). example_of(index): an item's Example.

    One broken image among 180,000 is not the end; 20 in a row are: then InputError names the first.
    """
    broken = {}  # files -> message
    for at in range(index, index + total):
        example = example_of(at % total)
        files = tuple(example.files)
        if files in broken:  # the next questions are often about the same image
            continue
        try:
            images = [load_image(file, short, long, example.upright) for file in files]
            return images, at % total, list(broken.values())
        except InputError as error:
            broken[files] = str(error)
        if len(broken) == 20:
            break
    first = next(iter(broken.values()))
    raise InputError(f"{first}; nor can the {len(broken) - 1} images after it")


def size_of(file):
    """((height, width) as stored, the same as a camera's rotation (EXIF) turns it) of an image, by
    its header alone; (None, None) if it has none: its use will find out, and name it.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            stored = image.height, image.width
            # PNG's own getexif would decode the whole image
            rotation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            quarter_turn = rotation in (5, 6, 7, 8)
            return stored, stored[::-1] if quarter_turn else stored
    except FileNotFoundError:
        raise InputError(f"{file}: not there; unpack the images there") from None
    except Exception:  # Pillow raises many kinds
        return None, None


def frame(sizes):
    """(height, width) of one image; of NLVR2's two what holds both, short sides scaled to 1,000."""
    if len(sizes) == 1:
        return sizes[0]
    return tuple(max(round(1000 * size[side] / min(size)) for size in sizes) for side in (0, 1))


def resized(height, width, short, long=LONG_SIDE):
    """(height, width) with the shorter side `short`, or less if the longer would pass `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_pixels(image, short, long=LONG_SIDE):
    """PIL image -> (3, H, W) uint8. The model normalises on the device: uint8 is a quarter of the
    way to carry. torch resizes uint8 as Pillow does, antialiased, in a third of the time.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    size = resized(image.height, image.width, short, long)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def flip_and_crop(image, objects, rng):
    """DETR's augmentation beside the scale's: (PIL image, Objects), mirrored in half of the cases,
    in another half cut to a random rectangle. What a box has inside of it stays; boxes without area
    there are left out.

    DETR makes the short side 400, 500 or 600, cuts out 384 to 600 pixels each way, and resizes the
    rectangle like a whole image. Here it is cut from the pixels as they are, so none are resized
    twice, and shares of the short side are the same in an image of any size.
    """
    boxes = torch.tensor(objects.boxes, dtype=torch.float64).view(-1, 4)
    boxes = boxes_in_pixels(boxes, (image.height, image.width)).tolist()      # x, y, w, h
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
        boxes = [(image.width - x - w, y, w, h) for x, y, w, h in boxes]

    if rng.random() < 0.5:
        short = rng.choice((400, 500, 600))
        scale = min(image.size) / short
        width, height = (max(1, round(scale * rng.uniform(384, min(side / scale, 600))))
                         for side in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        boxes = [(x - left, y - top, w, h) for x, y, w, h in boxes]

    boxes = [box_in_fractions(box, image.width, image.height) for box in boxes]
    # 1e-4: a box that ends where the rectangle begins has a rest of rounding
    kept = [i for i, box in enumerate(boxes) if box is not None and min(box[2:]) > 1e-4]
    return image, Objects([boxes[i] for i in kept], [objects.labels[i] for i in kept])


def decodable(examples, say=print):
    """Those whose images decode; the others are named and left out."""
    good = []
    for example in examples:
        try:
            load_image(example.files[0])
            good.append(example)
        except InputError as error:
            say(f"{error}; left out of validation")
    return good


@functools.lru_cache
def mean_image(files):
    """What a blind model sees: a PIL image, the mean of these, each squeezed to 64 x 64. files: a
    tuple, so that not each validation reads them anew.
    """
    total = sum(np.array(load_image(file).resize((64, 64)), np.float64) for file in files)
    return Image.fromarray((total / len(files)).round().astype(np.uint8))


def pad_images(images):
    """[(3, h, w) uint8] -> (B, 3, H, W) padded right and below with zeros, sizes (B, 2) int64
    (height, width), padded: whether any image is smaller than the tensor.
    """
    sizes = torch.tensor([image.shape[1:] for image in images])
    H, W = sizes.amax(0).tolist()
    padded = torch.zeros(len(images), 3, H, W, dtype=torch.uint8)
    for row, image in zip(padded, images):
        row[:, :image.shape[1], :image.shape[2]] = image
    return padded, sizes, bool((sizes != torch.tensor([H, W])).any())


def pad_tokens(lists, pad):
    """N lists of ids -> (N, T) int64, filled up with `pad`."""
    longest = max(map(len, lists))
    return torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in lists])


def mask_tokens(tokens, tokenizer, rng, named=frozenset(), named_share=0.15):
    """Masked language modelling as in BERT: (input, labels); labels are -1 where nothing is asked.

    Each word is chosen with probability 15 %, those in `named` with `named_share`, at least one; of
    the chosen, 80 % become [MASK], 10 % a random piece, 10 % stay, so that the model can never
    trust the word it sees.
    """
    tokens = list(tokens)
    labels = [-1] * len(tokens)
    words = [i for i, token in enumerate(tokens) if token not in (tokenizer.cls, tokenizer.sep)]
    chosen = [i for i in words if rng.random() < (named_share if tokens[i] in named else 0.15)]
    for i in chosen or ([rng.choice(words)] if words else []):
        labels[i] = tokens[i]
        chance = rng.random()
        if chance < 0.8:
            tokens[i] = tokenizer.mask
        elif chance < 0.9:
            tokens[i] = rng.choice(tokenizer.ordinary)
    return tokens, labels


def other_sentence(examples, index, is_caption, rng, count=0):
    """A sentence of another image that is none of this one's; None if a hundred draws find none. A
    COCO caption stands for a caption, a region's description for a description: else an image that
    only COCO has would tell a description as wrong by its kind. count: of the first so many images.
    """
    own = {sentence.lower() for sentence in examples[index].sentences}
    for _ in range(100):
        number = rng.randrange(count or len(examples))
        other = examples[number]
        first, last = (0, other.captions) if is_caption else (other.captions, None)
        choices = other.sentences[first:last]
        sentence = rng.choice(choices) if choices and number != index else None
        if sentence is not None and sentence.lower() not in own:
            return sentence
    return None


# --------------------------------------------------------------------------------------------------
# What the commands share: flags, processes, signals, errors as one line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, the end, a cluster's warning


def number(kind, least, most=math.inf):
    """An argparse type: an int or float within bounds."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:  # NaN is not either
            raise argparse.ArgumentTypeError(f"{text}: must be from {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # argparse's message for what is no number
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help, unless there is none to speak of."""

    def _get_help_string(self, action):
        if action.default in (None, False, []) or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def init_processes(device, timeout=30.0):
    """Join torchrun's processes, if there are any: (rank, number of processes, this one's device).
    timeout: minutes that one process may keep the others waiting, the first reading of the data
    included; then torch ends them. Without torchrun the rank is 0 of 1, no collective is called.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        if here > gpus:
            raise InputError(f"--device cuda: {here} processes for {gpus} GPUs; start no more "
                             "processes than there are GPUs, or give --device cpu")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise InputError(f"--device {device}: cannot be used ({reason}); give another one, or "
                         "--device cpu") from None
    if world == 1:
        return 0, 1, device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(minutes=timeout))
    gather(None)  # all are connected before one may end with an error, which then all of them see
    return dist.get_rank(), world, device


def gather(value):
    """The values of all processes, a list in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_in_all(problem):
    """InputError in all processes, if one has a problem: a message, "" is none."""
    problem = max(gather(problem))
    if problem:
        raise InputError(problem)


def on_first_process(function):
    """Call a function in each host's first process; its InputError is raised in all."""
    problem = ""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            function()
        except InputError as error:
            problem = str(error)
    raise_in_all(problem)


def print0(*words):
    """print in the first process alone, above its progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def ignore_signals(worker):
    """For loader workers, which are signalled too: the training needs them to finish a step."""
    for noted in SIGNALS:
        signal.signal(noted, signal.SIG_IGN)


def command(script, work):
    """What a script's main does: work(), an InputError as one line. Returns the exit code: what
    work returns, or 0; 2 after an InputError; 130 after Ctrl-C.
    """
    try:
        code = work() or 0
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except InputError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, "stopped"
    except torch.OutOfMemoryError as error:
        code, message = 2, (f"{str(error).splitlines()[0]} Hold fewer images at once "
                            "(--micro-batch; evaluate.py: --batch-size), or give --amp bf16 or "
                            "--activation-checkpointing")
        print(f"{script}: {message}", file=sys.stderr, flush=True)  # whichever process it is
        return code
    finally:  # after an error loader workers are still there: Python would wait for them for ever
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # on each host: the problem may be its own
        print(f"{script}: {message}", file=sys.stderr, flush=True)
    return code


# --------------------------------------------------------------------------------------------------
# The command: what is there for pre-training


def add_source_flags(group):
    """What all commands that train have: where their data lies."""
    group.add_argument("--data", default="data", metavar="DIR", help="folder of official files")
    group.add_argument("--index", metavar="DIR",
                       help="folder of the data's index (default: .index in the data's folder)")
    group.add_argument("--pairs", metavar="FILE", help="images with captions of your own, .csv or "
                       ".jsonl: image, caption and perhaps split")
    group.add_argument("--images", metavar="DIR", dest="pairs_images", help="those of --pairs")


def add_box_flags(group):
    for split in ("train", "val"):
        group.add_argument(f"--{split}-annotations", metavar="FILE",
                           help="boxes of your own in COCO's format")
        group.add_argument(f"--{split}-images", metavar="DIR", help="their images")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Say what there is to train on, and what was left out and why.",
        formatter_class=HelpFormatter)
    add_source_flags(parser)
    add_box_flags(parser)

    def work():
        args = parser.parse_args(argv)
        own = [split for split in ("train", "val") if getattr(args, f"{split}_annotations")]
        for split in own:
            examples, names, _ = read_boxes(getattr(args, f"{split}_annotations"),
                                            getattr(args, f"{split}_images"),
                                            complete=split == "val")
            describe(split, list(examples.values()), {"coco": names})
        if own:
            return
        sets = [name for name in ("coco", "vg") if os.path.isdir(f"{args.data}/{name}")]
        data = pretraining_index(args.data, sets, args.index, pairs=args.pairs,
                                 pairs_images=args.pairs_images)
        for split in ("train", "val"):
            describe(split, data[split], data["names"])

    return command("data.py", work)


if __name__ == "__main__":
    sys.exit(main())
