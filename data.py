"""The data: readers of the official files, word pieces, transforms, the four tasks' inputs, collation and sampling.

Nothing is converted beforehand: `--data DIR` is laid out as the official downloads unpack (the README has the tree).
A picture is known by its file; its boxes are kept as fractions of its own width and height, so that they need no care
when the picture is resized.

Everything random about a visit to a picture (its sentences, which words are masked) is drawn from a generator seeded
with (seed, epoch, picture), its size from one seeded with the batch. A run can therefore be stopped and resumed
anywhere, on any number of loader workers or processes, and each picture is still seen exactly as it would have been.
"""

import argparse
import atexit
import contextlib
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHORT_SIDES = tuple(range(480, 801, 32))  # scale augmentation (section 4.2): 480, 512 ... 800
LONG_SIDE = 1333


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names it and says what to do."""

    def __str__(self):
        """A name or a record can hold anything: the message stays one line, of a length that can be read."""
        says = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
        return says if len(says) <= 2000 else f"{says[:1000]} ... {says[-900:]}"


# ----------------------------------------------------------------------------------------------------------------
# Word pieces


class Tokenizer:
    """BERT's WordPiece (lower case) from a vocabulary: a vocab.txt, one piece a line, or a list of pieces."""

    def __init__(self, vocabulary, max_tokens=40):
        name = vocabulary if isinstance(vocabulary, (str, os.PathLike)) else "vocabulary"
        if name != "vocabulary":
            try:
                with open(name, encoding="utf-8") as file:
                    vocabulary = file.read().rstrip("\n").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--vocab {name}: cannot be read ({error}); "
                                 "give the vocab.txt of bert-base-uncased") from None
        for piece in SPECIAL:
            if piece not in vocabulary:
                raise InputError(f"--vocab {name}: has no {piece}; give a WordPiece vocabulary like BERT's vocab.txt")
        self.vocabulary = list(vocabulary)
        numbers = {piece: i for i, piece in enumerate(self.vocabulary)}
        if len(numbers) < len(self.vocabulary):
            raise InputError(f"--vocab {name}: {len(self.vocabulary) - len(numbers)} pieces stand in it twice")
        self.max_tokens = max_tokens
        self.pad, self.unk, self.cls, self.sep, self.mask = (numbers[piece] for piece in SPECIAL)
        self.ordinary = [i for i, piece in enumerate(self.vocabulary) if piece not in SPECIAL]
        self.wordpiece = BertWordPieceTokenizer(numbers, lowercase=True)

    def __len__(self):
        return len(self.vocabulary)

    def encode(self, sentence):
        """A sentence -> [CLS] w1 .. wm [SEP] as a list of numbers, at most max_tokens of them."""
        return self.encode_with_places(sentence)[0]

    def encode_with_places(self, sentence):
        """(tokens, [(start, end) of each in the sentence, in characters; (0, 0) for [CLS] and [SEP]])."""
        pieces = self.wordpiece.encode(sentence, add_special_tokens=False)
        fit = self.max_tokens - 2
        return [self.cls, *pieces.ids[:fit], self.sep], [(0, 0), *pieces.offsets[:fit], (0, 0)]

    def decode(self, tokens):
        """Numbers -> text, without the special pieces. WordPiece parts "man's" and "t-shirt" at each sign; they are put
        together again, or the words of a caption would be other ones than those of its references. A dash between two
        words looks the same as a hyphen, and becomes one.
        """
        text = self.wordpiece.decode([int(t) for t in tokens], skip_special_tokens=True)
        return re.sub(r"(?<=\w) (?:(-) (?=\w)|(') (?=(?:s|t|m|d|re|ve|ll)\b))", r"\1\2", text)


# ----------------------------------------------------------------------------------------------------------------
# Readers of the official files


@dataclass(slots=True)
class Picture:
    """One distinct picture with all that is known about it. Boxes are (n, 4) float32 cxcywh as fractions of it."""

    name: str                 # what messages call it: "coco 139", "vg 2"
    file: str
    size: tuple               # (height, width) as its record says
    sentences: list = field(default_factory=list)
    coco: tuple = None        # (boxes, labels (n,) int64), or None where COCO has not annotated it
    vg: tuple = None          # (boxes, labels, attributes: a tuple of numbers for each box), or None
    captions: int = 0         # so many of the sentences, the first, are COCO's captions; the others describe regions


@contextlib.contextmanager
def writing(path):
    """Around what writes a file: a full disk and the like become an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, or give another place") from None


def read_text(path, purpose):
    """A text file in UTF-8. Raises InputError that names the file and what it is needed for."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: not found, needed for {purpose}; the README's data tree says where it comes "
                         "from") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8 ({error}); it may be damaged, download it again") from None


def read_json(path, purpose):
    """A JSON file. Raises InputError that names the file, what it is needed for, and the place of an error in it."""
    return parse_json(read_text(path, purpose), path)


def parse_json(text, path):
    """What JSON says, or InputError that names the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); it may be cut off, download it again") from None


def stream(path, purpose):
    """The records of a file that holds one long list, one at a time: Visual Genome's have a gigabyte each.

    Errors as read_json's and records'; a bar shows how far it is.
    """
    decoder, part, at, ended = json.JSONDecoder(), "", 0, False
    try:
        with open(path, encoding="utf-8") as file, tqdm(
                desc=os.path.basename(path), total=os.path.getsize(path), unit="B", unit_scale=True, disable=None,
                leave=False) as bar:
            if file.read(1024).lstrip()[:1] != "[":
                yield from records(path, read_json(path, purpose))  # says what is wrong with it
                return
            file.seek(0)
            separator = "["  # what must stand before the next record
            while True:
                try:
                    at = WHITE.match(part, at).end()
                    if part[at:at + 1] == "]" and separator != "[":
                        ended = not (part[at + 1:] + file.read()).strip()
                        break
                    if part[at:at + 1] != separator:
                        raise ValueError("no comma between two records" if part[at:] else "the end is missing")
                    start = WHITE.match(part, at + 1).end()
                    if separator == "[" and part[start:start + 1] == "]":
                        ended = not (part[start + 1:] + file.read()).strip()
                        break
                    record, at = decoder.raw_decode(part, start)
                    separator = ","
                except ValueError as error:  # perhaps only because the part ends here
                    more = file.read(1 << 20)
                    if not more:
                        raise InputError(f"{path}: not valid JSON ({error}); it may be cut off, download it "
                                         "again") from None
                    progressed()
                    bar.update(len(more))
                    part, at = part[at:] + more, 0
                    continue
                if not isinstance(record, dict):
                    raise InputError(f"{path}: expected a list of records; is it another file?")
                yield record
    except FileNotFoundError:
        raise InputError(f"{path}: not found, needed for {purpose}; the README's data tree says where it comes "
                         "from") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not ended:
        raise InputError(f"{path}: not valid JSON (there is more after the list); download it again")


WHITE = re.compile(r"\s*")


def records(path, thing, key=None):
    """The list of records under `key` of a file's JSON (or the JSON itself), each a dictionary, or InputError."""
    found = thing.get(key) if key is not None and isinstance(thing, dict) else thing if key is None else None
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise InputError(f"{path}: expected a list of records{f' under {key!r}' if key else ''}; is it another file?")
    return found


SURROGATE = re.compile("[\ud800-\udfff]")  # halves of a character, which JSON can hold and UTF-8 cannot
LARGEST = 10 ** 15  # of numbers in records: no id or place in a picture is larger, and it fits an int64 and a float


def is_usable(value, kind):
    """Whether a value of a JSON file is of a kind, and one that can be computed with; True is no integer."""
    return isinstance(value, kind) and not isinstance(value, bool) and (
        abs(value) <= LARGEST if isinstance(value, (int, float)) else  # NaN is not
        not SURROGATE.search(value) if isinstance(value, str) and not value.isascii() else True)


def take(record, key, kind, path, optional=False):
    """record[key], checked to be of a kind; InputError names the file and record. optional: it may be None or missing.
    """
    value = record.get(key)
    if not is_usable(value, kind) and not (optional and value is None):
        name = next((f"{k} {record[k]!r:.40}" for k in ("id", "image_id", "object_id") if k in record),
                    str(record)[:60])
        raise InputError(f"{path}: record {name}: {key!r} is {str(value)[:40]!r}, which is not usable; "
                         "mend or remove the record")
    return value


def take_size(record, path):
    """(height, width) of a picture's record in pixels."""
    size = take(record, "height", int, path), take(record, "width", int, path)
    if min(size) < 1 or max(size) > 1_000_000:
        raise InputError(f"{path}: image {record.get('id', record.get('image_id'))}: height and width are {size}; "
                         "mend or remove the record")
    return size


def as_fractions(box, width, height):
    """x, y, w, h in pixels -> cx, cy, w, h in fractions, clipped to the picture, or None if nothing of it is inside."""
    x0, y0, w, h = box
    x1, y1 = min(x0 + w, width), min(y0 + h, height)
    x0, y0 = max(x0, 0), max(y0, 0)
    if not (x1 > x0 and y1 > y0):
        return None
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height


def plain_name(name, record):
    """`name`, a file's or folder's out of an annotation, if it cannot lead out of the folder that it is below.

    Who writes annotations could otherwise have any file read that the user may read. InputError names the record.
    """
    if not name or name[0] == "/" or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise InputError(f"{record}: the name {name[:80]!r} is empty or leads out of its folder; mend or remove "
                         "the record")
    return name


def on_disk(folder, data, root=None):
    """The names of the files in a folder; one listing is quicker than asking for 100,000 files one at a time.

    Links. A folder of the README's data tree, or one above it, may be a link to anywhere: the user has made it. What is
    in it comes out of an archive, which can bring links too: a picture that is one may lead to other places in its
    folder or in the data folder, and is an InputError if it leads out of both. So is a `folder` that an annotation
    names below `root`, the one of the data tree. The listing tells what is a link, so only links cost a look. Pipes
    and devices, which could be waited for in vain, are no files.
    """
    root = root or folder
    try:
        with os.scandir(folder) as found:
            entries = [(e.name, e.is_symlink()) for e in found if e.is_symlink() or e.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise InputError(f"{folder}: no such folder; unpack the pictures there (see the README's data tree)") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    links = [f"{folder}/{name}" for name, link in entries if link and name.lower().endswith((".jpg", ".jpeg", ".png"))]
    inside = tuple(os.path.join(os.path.realpath(place), "") for place in (root, data))
    for path in ([folder] if folder != root else []) + links:
        if os.path.exists(path) and not f"{os.path.realpath(path)}/".startswith(inside):
            raise InputError(f"{path}: is a link out of {root} and out of the data folder; put the files there, or let "
                             f"{root} itself be the link")
    return {name for name, link in entries if not link or os.path.isfile(f"{folder}/{name}")}


def read_coco(data, split, say=print, flickr_out=(), coco_out=None):
    """COCO 2017 instances and captions of "train" or "val": ({picture id: Picture}, [category names]).

    flickr_out: numbers of Flickr photographs to leave out; a COCO record tells its own in "flickr_url". The ids of the
    pictures that are left out for it are added to the set coco_out.
    Crowd boxes are left out. A few boxes of the real files have no area: they are left out and counted, but more than
    one in ten thousand is an error, because then the file itself is wrong.
    """
    path = f"{data}/coco/annotations/instances_{split}2017.json"
    instances = read_json(path, "detection on COCO")
    folder = f"{data}/coco/{split}2017"
    names = on_disk(folder, data)
    pictures, missing, leaking = {}, [], 0
    for r in records(path, instances, "images"):
        photo = re.search(r"/(\d{1,18})_[^/]*$", str(r.get("flickr_url")))
        number = take(r, "id", int, path)
        if photo and int(photo[1]) in flickr_out:
            leaking += 1
            coco_out.add(number)  # Visual Genome may know it by this number alone
            continue
        name = os.path.basename(plain_name(take(r, "file_name", str, path), f"{path}: image {number}"))
        size = take_size(r, path)
        if name in names:
            pictures[number] = Picture(f"coco {number}", f"{folder}/{name}", size, coco=([], []))
        else:
            missing.append(name)
    if missing:
        say(f"{folder}: {len(missing)} pictures of {path} are not there, the first is {missing[0]}; left out")
    if not pictures:
        raise InputError(f"{folder}: holds none of the pictures of {path}; unpack them there")
    if leaking:
        say(f"coco: {leaking} pictures of {split}2017 are in Flickr30k's val or test split; left out")
    categories = sorted(records(path, instances, "categories"), key=lambda r: take(r, "id", int, path))
    label_of, classes = {r["id"]: i for i, r in enumerate(categories)}, [take(r, "name", str, path) for r in categories]
    bad, count, left_out = [], 0, {r["id"] for r in instances["images"]} - set(pictures)
    for r in records(path, instances, "annotations"):
        number = take(r, "image_id", int, path)
        if r.get("iscrowd") or number in left_out:
            continue
        if number not in pictures:
            raise InputError(f"{path}: annotation {r.get('id')}: unknown image_id {number}")
        if take(r, "category_id", int, path) not in label_of:
            raise InputError(f"{path}: annotation {r.get('id')}: unknown category_id {r['category_id']}")
        box = r.get("bbox")
        numeric = isinstance(box, list) and len(box) == 4 and all(is_usable(v, (int, float)) for v in box)
        h, w = pictures[number].size
        box = as_fractions(box, w, h) if numeric else None
        count += 1
        if box is None:
            bad.append(f"annotation {r.get('id')}: bbox {str(r.get('bbox'))[:80]} in a picture of {w} x {h}")
        else:
            pictures[number].coco[0].append(box)
            pictures[number].coco[1].append(label_of[r["category_id"]])
    if len(bad) > count / 10000:
        raise InputError(f"{path}: {bad[0]} is empty or outside (so are {len(bad) - 1} more of {count}); "
                         "mend or remove the record")
    if bad:
        say(f"{path}: left out {len(bad)} of {count} boxes, the first is {bad[0]}")
    path = f"{data}/coco/annotations/captions_{split}2017.json"
    for r in records(path, read_json(path, "COCO captions"), "annotations"):
        if take(r, "image_id", int, path) in pictures and take(r, "caption", str, path).strip():
            pictures[r["image_id"]].sentences.append(r["caption"].strip())
    for p in pictures.values():
        p.captions = len(p.sentences)
        p.coco = (np.array(p.coco[0], np.float32).reshape(-1, 4), np.array(p.coco[1], np.int64))
    return pictures, classes


def read_names(path):
    """A word list of bottom-up-attention: [[name, synonym ...] for each line]."""
    lines = [line.strip() for line in read_text(path, "Visual Genome's names, a part of bottom-up-attention's "
                                                "data/genome/1600-400-20").splitlines()]
    return [[name.strip().lower() for name in line.split(",")] for line in lines if line]


def read_vg(data, say=print):
    """Visual Genome: ({picture id: Picture}, {picture id: (coco_id, flickr_id)}, object names, attribute names).

    Its flaws are many and known: boxes outside the picture, names outside the 1,600, pictures that are not there. They
    are left out and counted. A name's synonyms count as the name; an object with several names has the first known.
    """
    folder = f"{data}/vg"
    objects, attributes = read_names(f"{folder}/objects_vocab.txt"), read_names(f"{folder}/attributes_vocab.txt")
    label_of = {name: i for i, line in reversed(list(enumerate(objects))) for name in line}
    attribute_of = {name: i for i, line in reversed(list(enumerate(attributes))) for name in line}
    names = {part: on_disk(f"{folder}/{part}", data) for part in ("VG_100K", "VG_100K_2")
             if os.path.isdir(f"{folder}/{part}")}
    pictures, same, missing = {}, {}, []
    path = f"{folder}/image_data.json"
    for r in records(path, read_json(path, "Visual Genome")):
        number = take(r, "image_id", int, path)
        size = take_size(r, path)
        file = next((f"{folder}/{part}/{number}.jpg" for part in names if f"{number}.jpg" in names[part]), None)
        if file is None:
            missing.append(number)
        else:
            pictures[number] = Picture(f"vg {number}", file, size, vg=([], [], []))
            same[number] = tuple(take(r, key, int, path, optional=True) for key in ("coco_id", "flickr_id"))
    if missing:
        say(f"{folder}: {len(missing)} pictures of image_data.json are not there, the first is {missing[0]}.jpg; "
            "left out")
    if not pictures:
        raise InputError(f"{folder}: neither VG_100K nor VG_100K_2 holds a picture of image_data.json; unpack them")
    path = f"{folder}/attributes.json"
    has = {}
    for r in stream(path, "attributes"):
        for o in records(path, r, "attributes"):
            said = take(o, "attributes", list, path, optional=True)
            if said:
                has[take(o, "object_id", int, path)] = tuple(sorted({
                    attribute_of[a] for a in (str(a).strip().lower() for a in said) if a in attribute_of}))
    path = f"{folder}/objects.json"
    outside = unknown = count = 0
    for r in stream(path, "detection on Visual Genome"):
        picture = pictures.get(take(r, "image_id", int, path))
        for o in records(path, r, "objects") if picture else ():
            count += 1
            said = take(o, "names", list, path, optional=True) or ()
            known = (n for n in (str(n).strip().lower() for n in said) if n in label_of)
            label = label_of.get(next(known, None))
            box = [take(o, key, (int, float), path) for key in "xywh"]
            box = as_fractions(box, picture.size[1], picture.size[0])
            if box is None:
                outside += 1
            elif label is None:
                unknown += 1
            else:
                for values, value in zip(picture.vg, (box, label, has.get(take(o, "object_id", int, path), ()))):
                    values.append(value)
    if outside or unknown:
        say(f"{path}: of {count} boxes left out {outside} empty or outside, {unknown} whose name is not in "
            "objects_vocab.txt")
    path = f"{folder}/region_descriptions.json"
    flaws = Counter()
    for r in stream(path, "Visual Genome's sentences"):
        regions = records(path, r, "regions")
        number = take(r if "id" in r or not regions else regions[0], "id" if "id" in r else "image_id", int, path,
                      optional=True)
        picture, known = pictures.get(number), set()
        for region in regions if picture else ():
            phrase = region.get("phrase")
            phrase = phrase.strip() if is_usable(phrase, str) else ""
            key = (phrase.lower(), *(str(region.get(k)) for k in ("x", "y", "width", "height")))
            flaw = ("empty" if not phrase else "without a Latin letter" if not re.search("[a-z]", phrase.lower()) else
                    "there twice with the same box" if key in known and "x" in region else None)
            flaws[flaw] += 1
            if flaw is None:
                picture.sentences.append(phrase)
            known.add(key)
    total, _ = flaws.total(), flaws.pop(None, None)
    if flaws:
        say(f"{path}: of {total} sentences left out " + ", ".join(f"{n} {flaw}" for flaw, n in flaws.items()))
    for p in pictures.values():
        boxes, labels, attributes_of_boxes = p.vg
        p.vg = (np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), attributes_of_boxes)
    return pictures, same, objects, attributes


def held_out(data, say=print):
    """(COCO ids, Flickr ids) of pictures that no training may see: val2017, and Karpathy's val and test splits."""
    coco, flickr = set(), set()
    path = f"{data}/coco/annotations/instances_val2017.json"
    if os.path.exists(path):
        coco |= {take(r, "id", int, path) for r in records(path, read_json(path, "the held-out pictures"), "images")}
    for name, ids, number in (
            ("coco/dataset_coco.json", coco, lambda r: int(r["cocoid"])),
            ("flickr30k/dataset_flickr30k.json", flickr, lambda r: int(os.path.splitext(r["filename"])[0]))):
        path = f"{data}/{name}"
        if not os.path.exists(path):
            say(f"{path}: not there, so its val and test pictures cannot be kept out of pre-training")
            continue
        for r in records(path, read_json(path, "Karpathy's splits"), "images"):
            if r.get("split") in ("val", "test"):
                try:
                    ids.add(number(r))
                except (KeyError, ValueError, TypeError, OverflowError):
                    raise InputError(f"{path}: record {str(r)[:60]}: has no usable picture number") from None
    return coco, flickr


def check_names(data, names, own, source):
    """InputError, with the file that has them, unless the data's label sets are a checkpoint's."""
    for key, file in (("coco", "coco/annotations/instances_train2017.json"), ("vg", "vg/objects_vocab.txt"),
                      ("attributes", "vg/attributes_vocab.txt")):
        if names[key] != own[key]:
            raise InputError(f"--data {data}: its classes or attributes are not those of {source} ({file} has others)")


def read_pretraining(data, sets=("coco", "vg"), say=print):
    """All that pre-training needs (section 4.1): a dict of
    train: [Picture]; val: [Picture], COCO val2017 less Karpathy's test pictures, with their Visual Genome annotation;
    names: {"coco": [...], "vg": [...], "attributes": [...]}, a name with its synonyms separated by commas.

    A picture that is in both sets is one picture with the sentences of both. Pictures of any test set are left out.
    """
    if not os.path.isdir(data):
        raise InputError(f"--data {data}: no such folder; the README's data tree says what belongs in it")
    known = ("coco", "vg")
    coco_out, flickr_out = held_out(data, say)
    train, val, names = {}, {}, {"coco": [], "vg": [], "attributes": []}
    if "coco" in sets:
        train, names["coco"] = read_coco(data, "train", say, flickr_out, coco_out)
        val, val_names = read_coco(data, "val", say)
        if val_names != names["coco"]:
            raise InputError(f"{data}/coco/annotations/instances_train2017.json: has different categories than "
                             "instances_val2017.json; are both of one release?")
        leaking = [i for i in train if i in coco_out]
        for i in leaking:
            del train[i]
        if leaking:
            say(f"coco: {len(leaking)} pictures of train2017 are in a val or test split; left out")
    vg_only = []
    if "vg" in sets:
        vg, same, objects, attributes = read_vg(data, say)
        names["vg"], names["attributes"] = [",".join(n) for n in objects], [",".join(n) for n in attributes]
        leaking = 0
        for number, picture in vg.items():
            coco_id, flickr_id = same[number]
            partner = train.get(coco_id) or val.get(coco_id) if coco_id is not None else None
            if flickr_id in flickr_out:
                leaking += 1
                train.pop(coco_id, None)  # the same picture in COCO
            elif partner is not None:
                partner.vg = picture.vg
                partner.sentences += picture.sentences
            elif coco_id in coco_out:
                leaking += 1
            else:
                vg_only.append(picture)
        if leaking:
            say(f"vg: {leaking} pictures are in a val or test split; left out")
    path = f"{data}/coco/dataset_coco.json"
    if os.path.exists(path):
        test = {r["cocoid"] for r in read_json(path, "Karpathy's splits")["images"] if r.get("split") == "test"}
        val = {i: p for i, p in val.items() if i not in test}
    assert set(sets) <= set(known)
    train = list(train.values()) + vg_only
    silent = [p for p in train if not p.sentences]
    train = [p for p in train if p.sentences]
    if silent:
        say(f"{len(silent)} pictures have no sentence, the first is {silent[0].name}; left out")
    if not train:
        raise InputError(f"--data {data}: no picture to train on is left")
    return {"train": train, "val": [p for p in val.values() if p.sentences], "names": names}


# ----------------------------------------------------------------------------------------------------------------
# Readers for the tasks of section 5.1


@dataclass(slots=True)
class Example:
    """One thing to learn from or to answer: a question, a statement about two pictures, a picture to describe."""

    id: object              # what the official result files call it
    files: tuple            # one picture, or two (NLVR2)
    text: str = ""          # the question or statement
    target: object = None   # VQA what most people said, NLVR2 1 or 0, detection (boxes, labels); None where unknown
    sentences: tuple = ()   # the picture's own sentences
    answers: tuple = ()     # VQA: what ten people said
    size: tuple = None      # (height, width) of its picture, where known; of two, see `frame`


def coco_finder(data):
    """A function from a COCO picture's number and 2014 split to its file, in the folder of 2014 or of 2017."""
    folders = {name: on_disk(f"{data}/coco/{name}", data) for name in
               ("train2014", "val2014", "test2015", "train2017", "val2017") if os.path.isdir(f"{data}/coco/{name}")}

    def find(number, split, record):
        places = [(split, f"COCO_{split}_{number:012d}.jpg")] + [
            (name, f"{number:012d}.jpg") for name in ("train2017", "val2017") if "test" not in split]
        for folder, name in places:
            if name in folders.get(folder, ()):
                return f"{data}/coco/{folder}/{name}"
        raise InputError(f"{record}: its picture {places[0][1]} is not below {data}/coco; put it into "
                         f"{' or '.join(folder for folder, _ in places)}")

    return find


def read_vqa(data, split):
    """VQA v2 questions of "train", "val", "test-dev" or "test": [Example], id = question_id, ten answers if known.

    Train and val are those of COCO 2014; the pictures may lie in the folders of 2014 or of 2017.
    """
    year = "2015" if "test" in split else "2014"
    path = f"{data}/vqa/v2_OpenEnded_mscoco_{split}{year}_questions.json"
    questions = records(path, read_json(path, f"VQA's {split} split"), "questions")
    said = {}
    if "test" not in split:
        answers = f"{data}/vqa/v2_mscoco_{split}{year}_annotations.json"
        for r in records(answers, read_json(answers, f"VQA's {split} split"), "annotations"):
            number = take(r, "question_id", int, answers)
            ten = tuple(take(a, "answer", str, answers) for a in records(f"{answers}: question {number}", r, "answers"))
            if not ten:
                raise InputError(f"{answers}: question {number}: has no answers; download it again")
            # Some copies of the files leave out which of the ten most people gave.
            most = (take(r, "multiple_choice_answer", str, answers) if "multiple_choice_answer" in r else
                    Counter(ten).most_common(1)[0][0])
            said[number] = ten, most
    if not questions:
        raise InputError(f"{path}: holds no question; download it again")
    find, examples = coco_finder(data), []
    for r in questions:
        number = take(r, "question_id", int, path)
        if "test" not in split and number not in said:
            raise InputError(f"{answers}: no annotation of question {number} of {path}; are both of one release?")
        file = find(take(r, "image_id", int, path), "test2015" if "test" in split else f"{split}2014",
                    f"{path}: question {number}")
        ten, most = said.get(number, ((), None))
        examples.append(Example(number, (file,), take(r, "question", str, path), most, answers=ten))
    return examples


def common_answers(targets, least=9):
    """VQA's answer list, sorted: what most people said ("multiple_choice_answer") to `least` questions or more.

    targets: {normalised answer: number of questions}. Over train and val this is bottom-up-attention's list of 3,129.
    """
    return sorted(answer for answer, n in targets.items() if n >= least)


def read_nlvr2(data, split):
    """NLVR2's "train", "dev" or "test1": [Example] of two pictures, target 1 = the statement is true. One JSON a line.
    """
    path, root, examples = f"{data}/nlvr2/{split}.json", f"{data}/nlvr2/images/{split}", []
    for at, line in enumerate(read_text(path, f"NLVR2's {split} split").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}: line {at}"
        r, = records(place, [parse_json(line, place)])
        name, text = take(r, "identifier", str, place), take(r, "sentence", str, place)
        directory, label = take(r, "directory", (int, str), place, optional=True), str(r.get("label")).lower()
        plain_name(name, place)
        if name.count("-") != 3 or label not in ("true", "false", "none"):
            raise InputError(f"{place}: identifier {name[:40]!r}, label {label[:40]!r}: not a record of NLVR2; mend or "
                             "remove the record")
        folder = root if directory is None else f"{root}/{plain_name(str(directory), place)}"
        target = {"true": 1, "false": 0}.get(label)
        files = tuple(f"{folder}/{name.rsplit('-', 1)[0]}-img{side}.png" for side in (0, 1))
        examples.append(Example(name, files, text, target))
    if not examples:
        raise InputError(f"{path}: holds no record; download it again")
    there = {folder: on_disk(folder, data, root) if os.path.isdir(folder) else () for folder in {
        os.path.dirname(f) for e in examples for f in e.files}}
    for e in examples:
        for f in e.files:
            if os.path.basename(f) not in there[os.path.dirname(f)]:
                raise InputError(f"{f}: not there, a picture of {e.id} in {path}; unpack the pictures there")
    return examples


def read_karpathy(data, name, split):
    """Karpathy's "train", "val" or "test" of name "coco" or "flickr30k": [Example] with sentences.

    id = COCO's number of the picture or Flickr30k's file name. COCO's "restval" belongs to train, as everywhere.
    """
    path = f"{data}/{name}/dataset_{name}.json"
    find = coco_finder(data) if name == "coco" else None
    there = on_disk(f"{data}/flickr30k/flickr30k-images", data) if name == "flickr30k" else ()
    examples = []
    for r in records(path, read_json(path, "Karpathy's splits"), "images"):
        if take(r, "split", str, path).replace("restval", "train") != split:
            continue
        sentences = tuple(take(s, "raw", str, path).strip() for s in records(path, r, "sentences"))
        if name == "coco":
            number = take(r, "cocoid", int, path)
            record = f"{path}: picture {number}"
            file = find(number, plain_name(take(r, "filepath", str, path), record), record)
        else:
            number = plain_name(take(r, "filename", str, path), path)
            file = f"{data}/flickr30k/flickr30k-images/{number}"
            if number not in there:
                raise InputError(f"{file}: not there, a picture of {path}")
        if not sentences:
            raise InputError(f"{path}: picture {number}: has no sentence")
        examples.append(Example(number, (file,), sentences=sentences))
    if not examples:
        raise InputError(f"{path}: has no picture in split {split!r}")
    return examples


def read_detection(data, split, say=print):
    """COCO 2017 boxes of "train" or "val" with the captions: ([Example], category names in the order of their ids).

    id = COCO's number of the picture, target = (boxes cxcywh fractions, labels).
    """
    pictures, names = read_coco(data, split, say)
    return [Example(number, (p.file,), target=p.coco, sentences=tuple(p.sentences), size=p.size)
            for number, p in pictures.items()], names


def read_task(task, data, split, say=print):
    """The examples of a split ("train", "val", "test", for VQA "test-dev" too): ([Example], COCO's category names)."""
    if task == "vqa":
        return read_vqa(data, split), []
    if task == "nlvr2":
        return read_nlvr2(data, {"val": "dev", "test": "test1"}.get(split, split)), []
    if task == "detection":
        return read_detection(data, split, say)
    return read_karpathy(data, {"caption": "coco"}.get(task, task), split), []


# ----------------------------------------------------------------------------------------------------------------
# The index: what the readers found, in files that all processes map


INDEX_VERSION = 4  # another number, and each index is built anew: raise it with any change of the readers or of Packed


class Packed(Sequence):
    """A list of Pictures or Examples in memory-mapped files; an item is made when it is asked for.

    As a Python list, 180,000 pictures with 6 M sentences take gigabytes, and in each loader worker again: counting
    references writes into the pages that the processes share, and each ends with its own copy (PyTorch issue 13246).
    Here all processes share the file's pages, and none has more of them than it looks at.

    PATH.records: for each item its fields as JSON, a line end, then the bytes of its arrays; Beside it, as
    PATH.NAME.npy: ends (N,) int64, where each record ends; sizes (N, 2), height and width; groups (N,), the same
    number for the same pictures.
    """

    def __init__(self, path, data):
        self.path, self.data = path, data
        self.bytes = np.memmap(f"{path}.records", np.uint8, "r") if os.path.getsize(f"{path}.records") else b""
        self.ends, self.sizes, self.groups = (np.load(f"{path}.{name}.npy", mmap_mode="r", allow_pickle=False)
                                              for name in ("ends", "sizes", "groups"))
        if (self.ends.shape != self.groups.shape or self.sizes.shape != (*self.ends.shape, 2)
                or len(self.bytes) != (self.ends[-1] if len(self.ends) else 0)):
            raise ValueError("its files do not belong together")

    def __reduce__(self):  # a worker that is not forked maps the files again
        return Packed, (self.path, self.data)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        try:
            return self.item(bytes(self.bytes[int(self.ends[index - 1]) if index else 0:int(self.ends[index])]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.path}.records: record {index} is damaged ({str(error)[:80]}); remove the folder "
                             f"{os.path.dirname(self.path)}, and it is written anew") from None

    def item(self, record):
        line = record.index(b"\n")
        at = line + 1

        def array(found):  # the places of arrays, in the order in which they follow
            nonlocal at
            if "dtype" not in found:  # the record itself
                return found
            dtype, count = np.dtype(found["dtype"]), math.prod(found["shape"])
            values = np.frombuffer(record, dtype, count, at).reshape(found["shape"]).copy()
            at += values.nbytes
            return values

        fields = {k: tuple(v) if isinstance(v, list) else v
                  for k, v in json.loads(record[:line], object_hook=array).items()}
        # A data folder can come with an index that somebody else has written, so its names are looked at like others
        for name in [fields["file"]] if "file" in fields else fields["files"]:
            plain_name(name, "a file")
        if "file" in fields:
            return Picture(**{**fields, "file": f"{self.data}/{fields['file']}"})
        return Example(**{**fields, "files": tuple(f"{self.data}/{file}" for file in fields["files"])})

    @staticmethod
    def write(path, items, data):
        """Write items, all Pictures or all Examples, to PATH.*, their files' names as they are below `data`."""
        ends, sizes, groups, arrays = [], [], {}, []

        def place(value):
            value = np.ascontiguousarray(value)
            arrays.append(value.tobytes())
            return {"dtype": value.dtype.str, "shape": value.shape}

        with open(f"{path}.records", "wb") as file:
            for item in items:
                fields = {name: getattr(item, name) for name in item.__slots__}
                if "file" in fields:
                    fields["file"] = fields["file"].removeprefix(f"{data}/")
                else:
                    fields["files"] = [file.removeprefix(f"{data}/") for file in fields["files"]]
                file.write(json.dumps(fields, default=place).encode() + b"\n" + b"".join(arrays))
                arrays.clear()
                ends.append(file.tell())
                sizes.append(item.size)
        for number, item in enumerate(items):
            groups.setdefault(getattr(item, "files", number), len(groups))
        np.save(f"{path}.ends.npy", np.array(ends, np.int64))
        np.save(f"{path}.sizes.npy", np.array(sizes, np.int32).reshape(-1, 2))
        np.save(f"{path}.groups.npy", np.array([groups[getattr(item, "files", number)]
                                                for number, item in enumerate(items)], np.int64))


def indexed(data, folder, kind, sources, read, say=print):
    """What `read(say)` returns, with its lists as Packed: from the index, which is built if it is not there.

    folder: where indexes lie, DATA/.index by default; kind: a word for it; sources: names below data of the files and
    the picture folders that are read (of NLVR2 the files alone). An index goes by their sizes and times: if one
    changes, it is built anew. Processes of one machine build it once, the others wait; it appears whole or not at all.
    read: returns a dict of lists of Pictures or Examples, and of plain values; what it says is said again each time.
    Raises InputError.
    """
    if folder:  # one folder may serve several data folders
        kind = f"{kind}-{hashlib.sha256(os.path.abspath(data).encode()).hexdigest()[:8]}"
    folder = folder or f"{data}/.index"
    found = [(name, status(f"{data}/{name}")) for name in sorted(sources)]
    state = [(name, s.st_size, s.st_mtime_ns) for name, s in found if s]
    key = hashlib.sha256(repr((INDEX_VERSION, state)).encode()).hexdigest()[:16]
    path = f"{folder}/{kind}-{key}"
    if not os.path.isdir(path):
        if not os.path.isdir(data):
            raise InputError(f"--data {data}: no such folder; the README's data tree says what belongs in it")
        with index_file(f"{folder}/{kind}.lock") as lock:
            waited = not locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if waited:
                say(f"{folder}: another process is reading the data; waiting for it")
                locked(lock, fcntl.LOCK_EX)
            if not os.path.isdir(path):
                lock.seek(0)
                former = lock.read().decode().partition("\n")
                if waited and former[0] == key:  # the one that was waited for failed: to read again would fail again
                    raise InputError(former[2])
                try:
                    build_index(path, f"{folder}/{kind}", data, read)
                except InputError as error:
                    lock.truncate(0)
                    lock.write(f"{key}\n{error}".encode())
                    raise
    try:
        with open(f"{path}/about.json", encoding="utf-8") as file:
            about = json.load(file)
        found = {**about["plain"], **{name: Packed(f"{path}/{plain_name(name, 'a list')}", data)
                                      for name in about["lists"]}}
        said = list(about["said"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged ({str(error)[:80]}); remove this folder, and it is written "
                         "anew") from None
    for text in said:
        say(text)
    return found


def locked(file, how):
    """Lock a file of the index: True, or False if another process has it and we are not to wait."""
    try:
        fcntl.flock(file, how)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(f"--index {os.path.dirname(file.name)}: cannot be locked ({error.strerror}); give a folder of "
                         "a local disk with --index DIR") from None


def index_file(path):
    """A file of the index, opened to read and to add to."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "ab+")
    except (OSError, RecursionError) as error:  # RecursionError: makedirs, of a thousand folders in one another
        raise InputError(f"--index {os.path.dirname(path)[:200]}: cannot be written ({error}); give another folder "
                         "with --index DIR") from None


def build_index(path, stem, data, read):
    """Read, and write the index to `path`. What is left of former ones, `stem`-*, goes; the lock is the caller's."""
    said, lists, unfinished = [], {}, f"{path}.unfinished"
    found = read(said.append)
    for old in glob.glob(f"{glob.escape(stem)}-" + "[0-9a-f]" * 16 + "*"):
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.mkdir(unfinished)
        for name, items in list(found.items()):
            if isinstance(items, list) and items and isinstance(items[0], (Picture, Example)):
                size = functools.cache(size_of)  # VQA asks several questions about a picture
                for item in tqdm(items, "sizes of pictures", disable=None, leave=False):
                    progressed()
                    if item.size is None:
                        item.size = frame([size(file) for file in item.files])
                lists[name] = Packed.write(f"{unfinished}/{name}", found.pop(name), data)
        with open(f"{unfinished}/about.json", "w", encoding="utf-8") as file:
            json.dump({"said": said, "plain": found, "lists": list(lists)}, file)
        os.rename(unfinished, path)
    except OSError as error:
        raise InputError(f"--index {os.path.dirname(path)}: cannot be written ({error.strerror}); give another folder, "
                         "with space in it") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def status(path):
    """os.stat of a file or folder, or None if it is not there."""
    try:
        return os.stat(path)
    except OSError:
        return None


def frame(sizes):
    """(height, width) of one picture as it is; of two what holds both, each scaled to a short side of 1,000.

    Batches have pictures of similar shape, and two of NLVR2 are padded together with those of the other pairs.
    """
    if len(sizes) == 1:
        return sizes[0]
    return tuple(max(round(1000 * size[side] / min(size)) for size in sizes) for side in (0, 1))


def size_of(file):
    """(height, width) of a picture by its head alone; (1, 1) if it cannot be read, which its use will find out."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.height, image.width
    except Exception:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
        return 1, 1


COCO_FOLDERS = ("train2014", "val2014", "test2015", "train2017", "val2017")
SOURCES = {
    "coco": [f"coco/annotations/{what}_{split}2017.json" for what in ("instances", "captions")
             for split in ("train", "val")] + ["coco/train2017", "coco/val2017"],
    "vg": [f"vg/{name}" for name in ("image_data.json", "objects.json", "attributes.json", "region_descriptions.json",
                                     "objects_vocab.txt", "attributes_vocab.txt", "VG_100K", "VG_100K_2")],
    "splits": ["coco/dataset_coco.json", "flickr30k/dataset_flickr30k.json"],
}


def index_pretraining(data, sets=("coco", "vg"), folder=None, say=print):
    """`read_pretraining` by the index. "sentences": how many the training pictures have; lists are Packed."""
    def read(say):
        found = read_pretraining(data, sets, say)
        return {**found, "sentences": sum(len(p.sentences) for p in found["train"])}

    sources = [name for part in (*sets, "splits") for name in SOURCES[part]]
    if "coco" not in sets:
        sources.append("coco/annotations/instances_val2017.json")
    return indexed(data, folder, "-".join(["pretraining", *sorted(sets)]), sources, read, say)


def index_task(task, data, split, folder=None, say=print):
    """`read_task` by the index: a dict of "examples", Packed; "categories"; "targets": how often each target that can
    be the answer (VQA's normalised, NLVR2's "True" and "False") is that of an example.
    """
    sources = {
        "vqa": [*(f"vqa/{name}_{split}{year}_{what}.json" for name, what in (
            ("v2_OpenEnded_mscoco", "questions"), ("v2_mscoco", "annotations")) for year in (2014, 2015)),
            *(f"coco/{name}" for name in COCO_FOLDERS)],
        "nlvr2": [f"nlvr2/{split}.json" for split in ("train", "dev", "test1")],
        "caption": ["coco/dataset_coco.json", *(f"coco/{name}" for name in COCO_FOLDERS)],
        "flickr30k": ["flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"],
        "detection": SOURCES["coco"]}[task]

    def read(say):
        examples, categories = read_task(task, data, split, say)
        targets = Counter()
        if task == "vqa":
            targets.update(normalise_answer(e.target) for e in examples if e.target is not None)
        elif task == "nlvr2":
            targets.update(str(bool(e.target)) for e in examples if e.target is not None)
        return {"examples": examples, "categories": categories, "targets": targets}

    return indexed(data, folder, f"{task}-{split}", sources, read, say)


# ----------------------------------------------------------------------------------------------------------------
# VQA's answers

# The official table, word by word: what is written without its apostrophe, and with it. It has oddities (somebody'd
# loses its apostrophe; Id've, Im, Ive and the like never match, since words are in lower case by then) and they stay.
CONTRACTIONS = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't
hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm
Ive I've isnt isn't itd it'd itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't
mightnt've mightn't've mightn'tve mightn't've mightve might've mustnt mustn't mustve must've neednt needn't
notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't
shed've she'd've she'dve she'd've she's she's shouldve should've shouldnt shouldn't shouldnt've shouldn't've
shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've somebody'dve somebody'd've
somebodyll somebody'll somebodys somebody's someoned someone'd someoned've someone'd've someone'dve someone'd've
someonell someone'll someones someone's somethingd something'd somethingd've something'd've
something'dve something'd've somethingll something'll thats that's thered there'd thered've there'd've
there'dve there'd've therere there're theres there's theyd they'd theyd've they'd've they'dve they'd've
theyll they'll theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've
werent weren't whatll what'll whatre what're whats what's whatve what've whens when's whered where'd wheres where's
whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove who've whyll why'll
whyre why're whys why's wont won't wouldve would've wouldnt wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've
yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've
youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve you've
""".split()
CONTRACTIONS = dict(zip(CONTRACTIONS[::2], CONTRACTIONS[1::2]))
NUMBER_WORDS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBER_WORDS["none"] = "0"


def normalise_answer(text):
    """An answer as the official evaluation compares it: "The two dogs." -> "2 dogs".

    A mark with a space before or after it disappears, any other becomes a space ("yes/no" -> "yes no"), unless there
    is a comma between digits ("1,000"), then all disappear. ' and : stay. Then number words, articles, contractions.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    comma, out = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        out = out.replace(mark, "" if comma or mark + " " in text or " " + mark in text else " ")
    # Points go unless a digit follows; 32 at most, as the official call gives a flag where the count belongs.
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


# ----------------------------------------------------------------------------------------------------------------
# Pictures


# Pillow knows dozens of formats, and for some of them starts programs (EPS: Ghostscript) or reads many files. These are
# the ones that pictures of data sets, telephones and the web have.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pillow refuses to decode twice its MAX_IMAGE_PIXELS, 178 M pixels ("decompression bomb"); large photographs lie below
# that and need no warning.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_picture(path, short=None, long=None, upright=False):
    """An RGB picture, pixels as stored: COCO's boxes are for those, so an EXIF rotation is only applied if `upright`.

    short, long: what `to_pixels` will make of it. A JPEG much larger than that is decoded at 1/2, 1/4 or 1/8 of its
    size, which leaves out most of the work. 16 bits become 8, what is transparent becomes white, of a moving picture
    the first frame counts. Raises whatever Pillow does, for more than 178 M pixels too, whatever its file's size: a few
    hundred kilobytes can hold as many. So the most memory that a picture takes is 8 bytes a pixel, 1.4 GB (12 if
    `upright`).
    """
    with Image.open(path, formats=FORMATS) as image:
        if short is not None and image.format == "JPEG":
            height, width = resized(image.height, image.width, short, long)
            image.draft(None, (width, height))
        if upright:
            image = ImageOps.exif_transpose(image)
        deep = image.mode.startswith("I")  # 16 bits, which Pillow would cut off at 255
        if not deep and image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
            return image.convert("RGB")
        found = Image.new("RGB", image.size)
        for top in range(0, image.height, 256):  # in strips: what they need on the way is several times the picture
            part = image.crop((0, top, image.width, min(top + 256, image.height)))
            if deep:
                part = Image.fromarray((np.asarray(part).clip(0, 65535) / 257 + 0.5).astype(np.uint8)).convert("RGB")
            else:
                part = part.convert("RGBA")
                part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")
            found.paste(part, (0, top))
        return found


def decodable(pictures, say=print):
    """Those of the pictures that can be decoded; the others are said and left out (for validation, which is small)."""
    good = []
    for picture in pictures:
        try:
            load_picture(picture.file)
            good.append(picture)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
            say(f"{picture.file}: cannot be decoded ({error}); left out of validation")
    if pictures and not good:
        raise InputError(f"{pictures[0].file}: cannot be decoded, nor can any other validation picture; mend them")
    return good


def first_decodable(files_of, index, total, short=None, long=None):
    """The pictures of item `index`, or of the next item whose pictures decode: (images, its index, what was broken).

    One broken picture among 180,000 is not the end; 20 in a row are: then InputError names the first.
    """
    broken, bad = [], set()
    for _ in range(total):
        files = files_of(index)
        if bad.isdisjoint(files):  # the next questions are often about the same picture
            try:
                images = []
                for file in files:
                    images.append(load_picture(file, short, long))
                return images, index, broken
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
                broken.append(f"{file}: {error}")
                bad.add(file)
        if len(broken) > 20:
            break
        index = (index + 1) % total
    raise InputError(f"{broken[0]}: cannot be decoded, nor can the {len(broken) - 1} pictures after it; mend or remove "
                     "them")


def resized(height, width, short, long=LONG_SIDE):
    """(height, width) after scaling the shorter side to `short`, or less if the longer would pass `long` (DETR)."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_pixels(image, short, long=LONG_SIDE):
    """PIL image -> (3, H, W) uint8. The model normalises on the device: uint8 is a quarter of the way to carry.

    torch resizes uint8 exactly as Pillow does, antialiased, in a third of the time.
    """
    pixels, size = torch.from_numpy(np.array(image)).permute(2, 0, 1), resized(image.height, image.width, short, long)
    if pixels.shape[1:] == size:
        return pixels.contiguous()
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


# ----------------------------------------------------------------------------------------------------------------
# The inputs of the four tasks


def mask_words(tokens, tokenizer, rng, share=0.15, named=frozenset(), named_share=0.15):
    """Masked language modelling as in BERT: (input, labels); labels are -1 where nothing is to be guessed.

    Each word is chosen on its own with probability `share`, those in `named` with `named_share`, and if none was, any
    one of them; of the chosen, 80 % become [MASK], 10 % a random piece and 10 % stay, so that the model can never trust
    the word it sees. [CLS] and [SEP] are never chosen.
    """
    tokens, labels = list(tokens), [-1] * len(tokens)
    words = [i for i, token in enumerate(tokens) if token not in (tokenizer.cls, tokenizer.sep)]
    chosen = [i for i in words if rng.random() < (named_share if tokens[i] in named else share)]
    for i in chosen or ([rng.choice(words)] if words else []):
        labels[i] = tokens[i]
        chance = rng.random()
        if chance < 0.8:
            tokens[i] = tokenizer.mask
        elif chance < 0.9:
            tokens[i] = rng.choice(tokenizer.ordinary)
    return tokens, labels


def other_sentence(pictures, index, caption, rng):
    """A sentence of another picture that is none of this one's; None if a hundred draws find none.

    caption: whether it is to be one of COCO's captions, or else a region's description; it is of the kind that it
    stands for. If any kind would do, a description beside a picture that only COCO has would always be a wrong one.
    """
    own = {s.lower() for s in pictures[index].sentences}
    for _ in range(100):
        number = rng.randrange(len(pictures))
        other = pictures[number]
        kind = other.sentences[:other.captions] if caption else other.sentences[other.captions:]
        sentence = rng.choice(kind) if kind and number != index else None
        if sentence is not None and sentence.lower() not in own:
            return sentence
    return None


class PretrainingSet(torch.utils.data.Dataset):
    """Pictures with all that the four losses need. Items are asked for as (epoch, index, draw), see Batches.

    A picture that does not decode is replaced by the next one, and named under "broken" for the training loop, which
    counts: one among 180,000 is not the end, a folder full of them is.
    """

    def __init__(self, pictures, tokenizer, attributes, *, short_sides=SHORT_SIDES, long_side=LONG_SIDE,
                 sentences_per_picture=1, without_sentence=0.25, seed=0, masks=None, words=None):
        """masks: keywords of mask_words; words: {"coco", "vg", "attributes": the word pieces of each name}, with which
        targets tell the words of each object too, see `target`.
        """
        self.pictures, self.tokenizer, self.attributes, self.seed = pictures, tokenizer, attributes, seed
        self.masks, self.words = masks or {}, words
        self.short_sides, self.long_side = tuple(short_sides), long_side
        self.K, self.without_sentence = sentences_per_picture, without_sentence

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        epoch, index, draw = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        size = self.short_sides[draw % len(self.short_sides)], self.long_side
        (image,), index, broken = first_decodable(lambda i: [self.pictures[i].file], index, len(self.pictures), *size)
        picture, image = self.pictures[index], to_pixels(image, *size)
        every = range(len(picture.sentences))
        own = rng.sample(every, self.K) if len(every) >= self.K else rng.choices(every, k=self.K)
        tokens, mlm_labels, itm_labels, captions = [], [], [], []
        for number in own:
            # The captioning target is always the picture's own
            captions.append(self.tokenizer.encode(picture.sentences[number]))
            matched = rng.random() < 0.5
            other = None if matched else other_sentence(self.pictures, index, number < picture.captions, rng)
            # Both kinds of sentence have words hidden, or ITM would only learn to look for [MASK]. But they are only
            # asked for where the sentence is true of the picture: a mismatched pair would teach MLM to ignore it.
            pieces, labels = mask_words(captions[-1] if other is None else self.tokenizer.encode(other),
                                        self.tokenizer, rng, **self.masks)
            if other is not None:
                labels = [-1] * len(pieces)
            tokens.append(pieces)
            mlm_labels.append(labels)
            itm_labels.append(int(other is None))
        return {"image": image, "tokens": tokens, "mlm_labels": mlm_labels, "itm_labels": itm_labels,
                "captions": captions, "no_sentence": rng.random() < self.without_sentence,
                "target": self.target(picture, rng), "index": index, "broken": broken}

    def target(self, picture, rng):
        """What the set loss compares with. A picture in both sets draws anew whose annotation it trains."""
        source = rng.choice([name for name in ("coco", "vg") if getattr(picture, name) is not None])
        boxes, labels, *attributes = getattr(picture, source)
        target = {"source": source, "boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        if source == "vg":
            target["attributes"] = torch.zeros(len(boxes), self.attributes)
            for row, numbers in enumerate(attributes[0]):
                target["attributes"][row, list(numbers)] = 1
        if self.words is not None:  # those of its name and attributes, flat, and beside each the row of its object
            of_each = [[*self.words[source][label], *(piece for a in (attributes[0][row] if attributes else ())
                                                      for piece in self.words["attributes"][a])]
                       for row, label in enumerate(labels.tolist())]
            target["words"] = torch.tensor([piece for pieces in of_each for piece in pieces], dtype=torch.long)
            target["word_rows"] = torch.tensor([row for row, pieces in enumerate(of_each) for _ in pieces],
                                               dtype=torch.long)
        return target


def pad_pictures(images):
    """[(3, h, w) uint8] -> (B, 3, H, W) padded right and below with zeros, sizes (B, 2) int64 (height, width)."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    padded = torch.zeros(len(images), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    for row, image in zip(padded, images):
        row[:, :image.shape[1], :image.shape[2]] = image
    return padded, sizes


def pad_tokens(lists, pad):
    """B lists of K lists of numbers -> (B, K, T) int64, filled up with `pad`."""
    longest = max(len(tokens) for row in lists for tokens in row)
    return torch.tensor([[tokens + [pad] * (longest - len(tokens)) for tokens in row] for row in lists])


class Targets(list):
    """A list of dicts, as matcher.set_loss takes it, whose tensors travel from a loader process joined together.

    Each tensor that one process hands to another takes an open file in both until it is freed. One by one, boxes and
    labels of some batches in advance, from several loader processes, are soon more than the usual limit of 1,024.
    """

    def __reduce__(self):
        keys = {key for target in self for key in target} - {"source"}
        joined = {key: torch.cat([t[key] for t in self if key in t]) for key in keys}
        lengths = {key: [len(t[key]) if key in t else None for t in self] for key in joined}
        return parted, ([t["source"] for t in self], joined, lengths)


def parted(sources, joined, lengths):
    """Undo Targets.__reduce__."""
    parts = {key: iter(tensor.split([n for n in lengths[key] if n is not None])) for key, tensor in joined.items()}
    return Targets({"source": source, **{key: next(parts[key]) for key in parts if lengths[key][b] is not None}}
                   for b, source in enumerate(sources))


def collate(items, pad):
    """Items of PretrainingSet -> a batch: images (B, 3, H, W) uint8, sizes (B, 2), tokens (B, K, T), mlm_places (M,):
    the hidden words' places in tokens.flatten(), mlm_words (M,): what they were, captions (B, K, Tc), itm_labels (B, K)
    (1 = the sentence belongs to the picture), no_sentence (B,) (True = detection without a sentence), targets: a list
    of B dicts, see matcher.set_loss.
    """
    images, sizes = pad_pictures([item["image"] for item in items])
    labels = pad_tokens([item["mlm_labels"] for item in items], -1).flatten()  # -1: nothing to guess
    places = (labels >= 0).nonzero()[:, 0]  # found here, because a device would have to tell how many there are
    return {"images": images, "sizes": sizes, "tokens": pad_tokens([item["tokens"] for item in items], pad),
            "mlm_places": places, "mlm_words": labels[places],
            "captions": pad_tokens([item["captions"] for item in items], pad),
            "itm_labels": torch.tensor([item["itm_labels"] for item in items]),
            "no_sentence": torch.tensor([item["no_sentence"] for item in items]),
            "targets": Targets(item["target"] for item in items), "index": [item["index"] for item in items],
            "broken": [name for item in items for name in item["broken"]]}


class TaskSet(torch.utils.data.Dataset):
    """Examples of a task of section 5.1 with pixels and word pieces. Items are asked for as (epoch, index, draw), see
    Batches.

    An item is a picture (NLVR2: two) with up to K questions about it, or K of its sentences drawn anew at each visit,
    which share one pass of the backbone. With K = 1 an item is an example.
    """

    def __init__(self, task, examples, tokenizer, answers=(), *, short_sides=SHORT_SIDES, long_side=LONG_SIDE,
                 text="caption", sentences_per_picture=1, most=0, seed=0):
        """examples: Packed; answers: VQA's list; text: "caption" or "none", which sentence detection is given; most:
        how many of the examples, the first ones, are used (0: all).
        """
        self.task, self.tokenizer, self.seed, self.text, self.K = task, tokenizer, seed, text, sentences_per_picture
        self.short_sides, self.long_side = tuple(short_sides), long_side
        self.number_of = {answer: i for i, answer in enumerate(answers)}
        # Item n is of the examples order[starts[n]:starts[n + 1]]; arrays, for lists grow in each worker, see Packed
        number = min(len(examples), most or len(examples))
        self.examples, self.order, self.starts = examples, np.arange(number), np.arange(number + 1)
        if task == "vqa":
            groups = examples.groups[:number]
            self.order = np.argsort(groups, kind="stable")
            place = np.arange(len(groups)) - np.searchsorted(groups[self.order], groups[self.order])  # within its group
            self.starts = np.append(np.flatnonzero(place % self.K == 0), len(groups))
        self.sizes = examples.sizes[self.order[self.starts[:-1]]]  # (height, width) of each item's picture

    def __len__(self):
        return len(self.starts) - 1

    def item(self, index):
        return [self.examples[i] for i in self.order[self.starts[index]:self.starts[index + 1]]]

    def __getitem__(self, key):
        epoch, index, draw = key
        rng = random.Random(f"{self.seed} {self.task} {epoch} {index}")
        size = self.short_sides[draw % len(self.short_sides)], self.long_side
        images, index, broken = first_decodable(lambda i: self.item(i)[0].files, index, len(self), *size)
        item, images = self.item(index), [to_pixels(image, *size) for image in images]
        texts = [e.text for e in item]
        if item[0].sentences and self.text == "caption":
            n = 1 if self.task == "detection" else min(self.K, len(item[0].sentences))
            texts = rng.sample(item[0].sentences, n)
        return {"images": images, "tokens": [self.tokenizer.encode(text) for text in texts],
                "targets": [self.target(e) for e in item], "ids": [e.id for e in item], "broken": broken}

    def target(self, e):
        if self.task == "vqa":
            target = torch.zeros(len(self.number_of))
            for answer, n in Counter(map(normalise_answer, e.answers)).items():
                if answer in self.number_of:
                    target[self.number_of[answer]] = min(1.0, 0.3 * n)
            return target
        if self.task == "detection":
            boxes, labels = e.target
            return {"source": "coco", "boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        return e.target


def collate_task(items, pad):
    """Items of TaskSet -> a batch of B pictures with N questions or sentences: images (B, 3, H, W), sizes (B, 2), for
    NLVR2 (2 B, ...), first all left ones, then all right ones; tokens (N, T); picture (N,): which of the B each is
    about; targets: (N, answers) for VQA, (N,) for NLVR2, a list of B dicts for detection.
    """
    images, sizes = pad_pictures([image for side in zip(*(item["images"] for item in items)) for image in side])
    targets = [target for item in items for target in item["targets"]]
    if torch.is_tensor(targets[0]):
        targets = torch.stack(targets)
    elif isinstance(targets[0], int):
        targets = torch.tensor(targets)
    elif isinstance(targets[0], dict):
        targets = Targets(targets)
    tokens = [tokens for item in items for tokens in item["tokens"]]
    return {"images": images, "sizes": sizes, "tokens": pad_tokens([[t] for t in tokens], pad)[:, 0],
            "picture": torch.tensor([n for n, item in enumerate(items) for _ in item["tokens"]]), "targets": targets,
            "ids": [i for item in items for i in item["ids"]],
            "broken": [name for item in items for name in item["broken"]]}


class Batches(torch.utils.data.Sampler):
    """Batches of (epoch, index, draw) for one process: a pure function of seed and rank, endless from batch `start`.

    Pass follows pass over all pictures, each in an order of its own, and the batches are cut from that stream: in each
    pass a picture comes once, whatever the batch and the number of processes, and every batch is full (one can hold the
    last pictures of a pass and the first of the next).

    Pictures of similar shape go together, so that little is padded: within pieces of 16 batches (less where a pass has
    few, or each pass would have the same batches) they are sorted by shape before the batches are cut, and the batches
    shuffled. `draw` is the same for all of a batch, over all processes too: they take its size of the scale
    augmentation from it, since pictures of 480 and 800 pixels in one batch would pad most of it, and of two processes
    one would wait for the other.
    A batch is the total one; the `parts` that each process has of it follow one another.
    """

    def __init__(self, shapes, batch, *, parts=1, rank=0, world=1, seed=0, start=0):
        """shapes: (height, width) of each picture; batch: the total; start: the number of batches already done."""
        shapes = np.asarray(shapes, np.float64).reshape(-1, 2)
        self.ratios = shapes[:, 1] / shapes[:, 0]
        self.batch, self.parts, self.rank, self.world = batch, parts, rank, world
        self.seed, self.start = seed, start
        self.per_epoch = len(shapes) / batch
        self.piece = max(1, min(16, len(shapes) // batch // 4))

    def order(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.ratios))

    def __iter__(self):
        N, length = len(self.ratios), self.piece * self.batch
        orders = {}
        size = self.batch // self.world // self.parts
        for number in itertools.count(self.start // self.piece):
            places = np.arange(number * length, (number + 1) * length)
            epochs = places // N
            orders = {epoch: orders.get(epoch) if epoch in orders else self.order(epoch) for epoch in np.unique(epochs)}
            pictures = np.array([orders[epoch][place] for epoch, place in zip(epochs, places % N)])
            # By pass first: so a picture meets itself at most in the one batch that spans two passes
            chosen = np.lexsort((self.ratios[pictures], epochs)).reshape(self.piece, self.batch)
            rng = np.random.default_rng((self.seed, number, 1))
            draws = rng.integers(2 ** 31, size=self.piece)
            for n in rng.permutation(self.piece)[max(0, self.start - number * self.piece):]:
                for part in range(self.parts):
                    at = (part * self.world + self.rank) * size
                    yield [(int(epochs[i]), int(pictures[i]), int(draws[n])) for i in chosen[n, at:at + size]]


# ----------------------------------------------------------------------------------------------------------------
# Processes: everything works with plain `python` too, where the rank is 0 of 1 and no collective is called


class Watch(threading.Thread):
    """Sees to it that no process waits for ever for another one that has died or hangs.

    By itself a collective waits half an hour or more, and does not say for whom. So each process tells the others once
    a second, through the store that they met at, how often it has told it (a process that is gone or frozen does not
    go on), how many `marks` its main thread has made, and whether that waits in a collective. When one has been silent,
    or all have been without a new mark, for `limit` seconds, each process says which ones they are, and ends.
    """

    def __init__(self, store, rank, world, limit):
        super().__init__(daemon=True)
        self.store, self.rank, self.limit, self.tick = store, rank, limit, min(1.0, limit / 20)
        self.beats = self.marks = 0
        self.waiting, self.over, self.says = False, threading.Event(), ""
        self.news = {other: (None, None, time.monotonic()) for other in range(world) if other != rank}
        self.tell()

    def tell(self):
        self.beats += 1
        self.store.set(str(self.rank), f"{self.beats} {self.marks} {int(self.waiting)}")

    def listen(self):
        """What is new of the others: self.news[rank] = (beats, (marks, waiting), when the beats last changed)."""
        for other, (beats, _, since) in self.news.items():
            if self.store.check([str(other)]):
                told, *rest = map(int, self.store.get(str(other)).split())
                self.news[other] = told, rest, since if told == beats else time.monotonic()

    def silent(self, seconds):
        return [other for other, (*_, since) in self.news.items() if time.monotonic() - since > seconds]

    def run(self):
        before, heard, awake = None, 0.0, time.monotonic()
        changed = awake
        while not self.over.wait(self.tick):
            if time.monotonic() - awake > self.limit / 4:  # this process was frozen (Ctrl-Z): its news are old
                changed = time.monotonic()
                self.news = {other: (beats, rest, changed) for other, (beats, rest, _) in self.news.items()}
            awake = time.monotonic()
            try:
                self.tell()
                if self.store.check(["end"]):
                    self.leave(self.store.get("end").decode())
                if time.monotonic() - heard < self.limit / 20:  # many processes need not ask each other every second
                    continue
                self.listen()
            except (RuntimeError, ValueError):  # the store has gone with the process that held it
                pass
            heard = time.monotonic()
            now = [self.marks, *(rest and rest[0] for _, rest, _ in self.news.values())]
            if now != before:
                before, changed = now, heard
            silent = self.silent(self.limit)
            if self.over.is_set():
                return
            if silent:
                self.end(silent, f"has not answered for {self.limit:.0f} s (--timeout)")
            if heard - changed > self.limit:  # who is not waiting for the others is whom they wait for
                told = {self.rank: (self.marks, self.waiting)}
                told.update((other, rest) for other, (_, rest, _) in self.news.items() if rest)
                busy = {other: marks for other, (marks, waiting) in told.items() if not waiting} or {
                    other: marks for other, (marks, _) in told.items()}
                self.end([other for other, marks in busy.items() if marks == min(busy.values())],
                         f"has come no further for {self.limit:.0f} s (--timeout)")

    def close(self):
        """End the thread: where Python ends while it asks the store, deep in C++, the process is aborted."""
        self.over.set()
        self.join(10)  # longer than the store takes, here or gone

    def end(self, ranks, what):
        """Say which processes keep the others waiting, and end this one.

        The first one leaves a note and lets the others read it, or they would say that they lost one that has ended so.
        """
        if not self.says:  # else the other thread of this process is at it
            self.says = f"rank {', '.join(map(str, sorted(ranks)))} {what}"
            with contextlib.suppress(RuntimeError):  # the store can be gone
                if self.store.check(["end"]):
                    self.says = self.store.get("end").decode()
                else:
                    self.store.set("end", self.says)
                    time.sleep(max(1.0, 2 * self.tick))
        self.leave(self.says)

    def leave(self, says):
        """End this process, whose main thread may be deep in a wait."""
        print(f"rank {self.rank}: {says}; this process ends", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():  # loader workers, which would only notice after a while
            child.kill()
        os._exit(1)

    def lost(self):
        """After a collective has failed: the ranks that are gone. Takes three seconds, in which the others may tell."""
        try:
            self.listen()
            time.sleep(3)
            self.listen()
        except (RuntimeError, ValueError):
            return [0]  # which held the store, unless torchrun did
        return self.silent(2.9)


watch = None  # this process's Watch, if it is one of several


@contextlib.contextmanager
def waiting():
    """Around a collective, for the Watch."""
    if watch is not None:
        watch.waiting = True
    yield
    if watch is not None:
        watch.waiting = False
        watch.marks += 1


def progressed():
    """Tell the Watch that this process is not stuck: called between two steps of what takes long."""
    if watch is not None:
        watch.marks += 1


def start_processes(device, minutes=30.0):
    """Join torchrun's processes, if there are any: (rank, number of processes, this process's device).

    device: cpu, cuda, cuda:N or mps. One that is not there is an InputError, before anything is read. minutes: how long
    one process may keep the others waiting (see Watch).
    """
    global watch
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    gpus = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    try:
        torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: no name of a device; give {' or '.join(there)}") from None
    if world > 1 and not device.startswith(("cpu", "cuda")):
        raise InputError(f"--device {device}: works with one process; start it without torchrun, or give "
                         f"{' or '.join(there[:2] if gpus else there[:1])}")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        advice = f"give {' or '.join(there)}"
        if world > 1 and gpus:
            advice = "start no more processes than there are GPUs"
        reason = re.split(r"\.\s|\n", str(error))[0]  # torch's first sentence; pages can follow
        problem = f"--device {device}: cannot be used ({reason}); {advice}"
        if int(os.environ.get("RANK", 0)) and gpus:  # the first process has a GPU: it says nothing
            print(problem, file=sys.stderr)
        raise InputError(problem) from None
    if world == 1:
        return 0, 1, device
    rank = int(os.environ["RANK"])
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store, *_ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=minutes))))
    # The Watch has a connection of its own: the other one is busy while a collective waits. It decides who waited too
    # long; torch's own limit, which counts what takes long but does go on as well, is out of its way.
    # After a restart (torchrun's --max-restarts) the notes of before are still in the store.
    turn = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(dist.PrefixStore(f"watch {turn}", store.clone()), rank, world, 60 * minutes)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", rank=rank, world_size=world,
                            store=dist.PrefixStore(f"group {turn}", store), timeout=timedelta(days=1))
    watch.start()
    atexit.register(watch.close)  # also where an error is the end
    return rank, world, device


def stop_processes(world):
    """Wait for all, so that none is still writing when torchrun returns, and leave."""
    global watch
    if world > 1:
        with waiting():
            dist.barrier()
        watch.close()
        watch = None
        dist.destroy_process_group()


def summed(values, world, device):
    """A list of numbers, summed over all processes."""
    if world == 1:
        return [float(value) for value in values]
    values = torch.tensor(values, dtype=torch.float64, device=device)
    with waiting():
        dist.all_reduce(values)
        return values.tolist()


def gathered(value, world):
    """The values of all processes, a list in the order of their ranks; collective."""
    values = [value]
    if world > 1:
        values = [None] * world
        with waiting():
            dist.all_gather_object(values, value)
    return values


def share_statistics(model, world):
    """Give all processes the first one's statistics of batch norm that trains; collective.

    Each has added its own pictures of the last step to what they had in common. A checkpoint holds the first one's, and
    what is measured should be the model that is kept.
    """
    if world > 1:
        with waiting():
            for tensor in model.buffers():
                dist.broadcast(tensor, 0)


def attempt(function, world):
    """Call a function in each process; if it raises InputError in any of them, raise that in all; collective.

    A process that stopped alone would leave the others waiting for it until their time is over.
    """
    result = problem = None
    try:
        result = function()
    except InputError as error:
        # From a loader's worker comes a whole traceback as text; our own line stands at its end.
        problem = error.args[0].rsplit("InputError: ", 1)[-1].strip()
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        problem = "a loader process was killed, most often for want of memory; give fewer --workers"
        if "shared memory" in str(error):
            problem = "/dev/shm is full, where loader processes leave batches; give fewer --workers, or to docker " \
                      "--shm-size=16g"
    # Mostly there is none, which costs one number; texts take several transfers
    device = "cuda" if world > 1 and dist.get_backend() == "nccl" else "cpu"
    if summed([problem is not None], world, device)[0]:
        raise InputError(next(filter(None, gathered(problem, world))))
    return result


# ----------------------------------------------------------------------------------------------------------------
# What the scripts' commands share: how they end early, what they print, their --help


class Stopped(BaseException):
    """A signal ends the command. Not an Exception: `except Exception` is for pictures that do not decode."""


class Stopping:
    """Ctrl-C, SIGTERM and SIGUSR1 (a cluster's warning) within `with Stopping() as stop:`, as a wish to stop.

    The first signal raises Stopped where the program stands. Where that would lose work, between `hold` and `release`,
    it only sets `number`; a training loop looks at it after each step. A second Ctrl-C ends the process at once. A
    second SIGTERM does not: torchrun passes on what the cluster has sent to its processes already.
    """

    NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}

    def __init__(self):
        self.number, self.held, self.saved, self.former = 0, False, None, {}  # saved: (step, path) of a checkpoint

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self.former = {number: signal.signal(number, self.handle) for number in self.NAMES}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python that had set it

    def handle(self, number, frame):
        if not self.number:
            self.number = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if not self.held:
                raise Stopped

    def hold(self):
        self.held = True

    def release(self):
        self.held = False
        if self.number:
            raise Stopped

    def together(self, world):
        """End all processes, once `summed` has told them that a signal came to one of them."""
        self.number = max(gathered(self.number, world))
        stop_processes(world)
        raise Stopped


def ignore_signals(worker):
    """For the processes of a DataLoader, which the terminal and torchrun signal as well: the training still needs them
    to finish its step. Only the training process itself ends them, by SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS; there is no other way to know who sends a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

        def wait():
            while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
                pass
            os._exit(0)

        threading.Thread(target=wait, daemon=True).start()


def launch(script, words):
    """The command line that starts a script as this process was started."""
    start = ["python"]
    if "RANK" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # on each host; where they meet, torchrun does not tell
            start[1:1] = [f"--nnodes={os.environ['GROUP_WORLD_SIZE']}", "--rdzv_backend=c10d",
                          "--rdzv_endpoint=HOST:PORT"]
    return shlex.join([*start, script, *words])


def command(script, work):
    """What a script's main does: work(stop), where stop is a Stopping. What ends it early is said in one line.

    Returns the exit code: what work returns, or 0; 2 after an InputError; 128 + the signal's number.
    """
    with Stopping() as stop:
        try:
            return work(stop) or 0
        except BrokenPipeError:  # `... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except InputError as error:
            code, says = 2, f"{script}: {error}"
            if stop.saved:
                says += (f"\n{script}: the last checkpoint is of step {stop.saved[0]}; go on with: "
                         f"{launch(script, ['--resume', stop.saved[1]])}")
        except RuntimeError:  # of a collective, where another process is gone; else it is our own fault
            ranks = watch.lost() if watch is not None else []
            if not ranks:
                raise
            watch.end(ranks, "has ended")
        except Stopped:
            code, says = 128 + stop.number, f"{script}: stopped by {stop.NAMES[stop.number]}"
            if stop.saved:
                says = (f"stopped at step {stop.saved[0]} by {stop.NAMES[stop.number]}; go on with: "
                        f"{launch(script, ['--resume', stop.saved[1]])}")
        for bar in list(getattr(tqdm, "_instances", ())):  # else the line would stand behind a bar
            bar.close()
        if int(os.environ.get("RANK", 0)) == 0:
            print(says, file=sys.stderr, flush=True)
        return code


def write_safely(path, content):
    """bytes or text to a temporary name, then renamed, so that `path` is always whole. InputError if that fails."""
    name, path = path, os.path.realpath(path)  # a link stays a link
    plain = not os.path.exists(path) or os.path.isfile(path)  # /dev/stdout is none, and is not to be replaced
    temporary = f"{path}.{os.getpid()}.tmp" if plain else path
    try:
        with writing(name):
            with open(temporary, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
            if plain:
                os.replace(temporary, path)
    finally:
        if plain and os.path.exists(temporary):
            os.remove(temporary)


def say_first(rank):
    """print for the first process, above its progress bar if it shows one; silence for the others."""
    def say(*words):
        if rank == 0:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()
    return say


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help, unless there is none to speak of (None, a switch) or the help has it already.
    """

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        if default is None or default is False or default == [] or "default" in text:
            return text
        if isinstance(default, (list, tuple)):
            return f"{text} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action)


# ----------------------------------------------------------------------------------------------------------------
# The command: what is there


def describe(data, folder=None):
    """({part: {"pictures": ..., ...} or {"missing": what and where}}, [what was left out and why]) of a data folder.

    folder: as for `indexed`. Any part of the tree may be missing.
    """
    parts, said = {}, []

    def part(name, function):
        try:
            parts[name] = function()
        except InputError as error:
            parts[name] = {"missing": str(error)}

    def pretraining():
        sets = [name for name in ("coco", "vg") if os.path.isdir(f"{data}/{name}")]
        if not sets:
            raise InputError(f"{data}: has neither coco nor vg, which pre-training needs")
        found = index_pretraining(data, sets, folder, said.append)
        counts = Counter(pictures=len(found["train"]), sentences=found["sentences"], validation=len(found["val"]))
        for picture in found["train"]:
            counts["in both sets"] += picture.coco is not None and picture.vg is not None
            for name in ("coco", "vg"):
                if getattr(picture, name) is not None:
                    counts[f"{name} boxes"] += len(getattr(picture, name)[0])
            counts["attributes"] += sum(map(len, picture.vg[2])) if picture.vg is not None else 0
        # Every training picture against those that something is tested on, by the numbers that its own set gives it
        coco, flickr = held_out(data, lambda text: None)
        links = read_json(f"{data}/vg/image_data.json", "Visual Genome") if "vg" in sets else []
        other = {r["image_id"]: (r.get("coco_id"), r.get("flickr_id")) for r in links}
        numbers = [(p.name.startswith("coco"), int(p.name.split()[1])) for p in found["train"]]
        counts["in a val or test split"] = sum(
            n in coco if is_coco else other[n][0] in coco or other[n][1] in flickr for is_coco, n in numbers)
        return dict(counts)

    def task(name, split):
        found = index_task(name, data, split, folder, said.append)["examples"]
        counts = {"pictures": len({file for e in found for file in e.files}), "examples": len(found)}
        if name in ("caption", "flickr30k"):
            counts["sentences"] = sum(len(e.sentences) for e in found)
        if name == "detection":
            counts["boxes"] = sum(len(e.target[1]) for e in found)
        return counts

    if not os.path.isdir(data):
        raise InputError(f"--data {data}: no such folder; the README's data tree says what belongs in it")
    part("pre-training", pretraining)
    for name in ("vqa", "nlvr2", "caption", "flickr30k", "detection"):
        for split in ("train", "val", "test-dev", "test"):
            if split in ("train", "val") or name == "vqa" or split == "test" and name != "detection":
                part(f"{name} {split}", functools.partial(task, name, split))
    return parts, list(dict.fromkeys(said))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Say what is in a data folder, and what is missing for which task.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with the official files (README: the data "
                        "tree)")
    parser.add_argument("--index", metavar="DIR", help="where the index of the data lies (default: DATA/.index)")
    parser.add_argument("--json", metavar="FILE", help="write the counts to this file")

    def work(stop):
        args = parser.parse_args(argv)
        parts, said = describe(args.data, args.index)
        for name, counts in parts.items():
            print(f"{name:20}" + (f"missing: {counts['missing']}" if "missing" in counts else
                                  "  ".join(f"{n:,} {what}" for what, n in counts.items())))
        for text in said:
            print(f"note: {text}")
        if args.json:
            write_safely(args.json, json.dumps({"parts": parts, "notes": said}, indent=1))

    return command("data.py", work)


if __name__ == "__main__":
    sys.exit(main())
