"""Records with the real sets' flaws, word pieces, images, batches, the index, data of one's own."""

import copy
import itertools
import json
import math
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data as data_module
from data import (SPECIAL, Example, InputError, Objects, Tokenizer, decodable, describe,
                  load_image, load_images, load_or_build_index, mask_tokens, other_sentence,
                  pretraining_index, read_boxes, read_coco, read_pairs, read_pretraining, read_vg,
                  safe_name, size_of, to_pixels)
from evaluate import evaluation_batches
from pretrain import Batches, PretrainingSet, collate, parse

try:  # BERT's own algorithm in Python; since version 5 BertTokenizer is the library that we use too
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
except ImportError:
    from transformers import BertTokenizer as BertTokenizerLegacy


def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(value if isinstance(value, str) else json.dumps(value))


def write_image(path, size=(40, 30), color=None):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", size, color).save(path, "JPEG")


# --------------------------------------------------------------------------------------------------
# The official files

INSTANCES = "coco/annotations/instances_train2017.json"
CAPTIONS = "coco/annotations/captions_train2017.json"
BOX = {"x": 4, "y": 3, "w": 8, "h": 6}
REGION = {"x": 1, "y": 1, "width": 2, "height": 3}


def coco_object(number, image, box, **more):
    return {"id": number, "image_id": image, "category_id": 3, "bbox": box, "iscrowd": 0, **more}


class Files(dict):
    """{name below the folder: content}; a test changes a record and writes the file again."""

    def __init__(self, folder):
        self.folder = folder
        for split, ids in (("train", (9, 25, 30)), ("val", (139, 285))):
            for n in ids:
                write_image(f"{folder}/coco/{split}2017/{n:012d}.jpg")
            self[f"coco/annotations/instances_{split}2017.json"] = {
                "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 30, "width": 40}
                           for n in ids],
                "annotations": [coco_object(10 * n, n, [4, 3, 8, 6]) for n in ids],
                "categories": [{"id": 7, "name": "train"}, {"id": 3, "name": "car"}]}
            self[f"coco/annotations/captions_{split}2017.json"] = {"annotations": [
                {"image_id": n, "caption": f" Caption {i} of {n}.\n"} for n in ids for i in (0, 1)]}
        for n in range(1, 7):
            write_image(f"{folder}/vg/{'VG_100K' if n % 2 else 'VG_100K_2'}/{n}.jpg")
        # They are COCO's 25 (train), 139 (val), 600 (Karpathy's test), and Flickr30k's 77 (test)
        links = {2: {"coco_id": 25}, 3: {"coco_id": 139}, 4: {"flickr_id": 77}, 5: {"coco_id": 600}}
        self["vg/image_data.json"] = [
            {"image_id": n, "width": 40, "height": 30, "coco_id": None, "flickr_id": None,
             **links.get(n, {})} for n in range(1, 7)]
        self["vg/objects.json"] = [{"image_id": n, "objects": [
            {"object_id": 100 * n, "names": ["Car "], **BOX}]} for n in range(1, 7)]
        self["vg/attributes.json"] = [{"image_id": n, "attributes": [
            {"object_id": 100 * n, **BOX, "attributes": ["Red", "unheard of", " big"]}]}
            for n in range(1, 7)]
        self["vg/region_descriptions.json"] = [
            {"id": n, "regions": [{"phrase": f"region of {n}", **REGION}]} for n in range(1, 7)]
        self["vg/objects_vocab.txt"] = "person,man\nautomobile,car,cars\nvehicle,car\n"
        self["vg/attributes_vocab.txt"] = "red\nlarge,big\n"
        self["coco/dataset_coco.json"] = {"images": [
            {"cocoid": n, "split": split, "filename": "a.jpg", "sentences": [{"raw": "a"}]}
            for n, split in ((9, "train"), (30, "val"), (285, "test"), (600, "test"))]}
        self["flickr30k/dataset_flickr30k.json"] = {"images": [
            {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": "a"}]}
            for n, split in ((77, "test"), (78, "train"))]}
        self.write()

    def write(self):
        for name, content in self.items():
            write(f"{self.folder}/{name}", content)

    def read(self, **settings):
        """(what pre-training reads, the notes as one text)"""
        self.write()
        notes = []
        return read_pretraining(self.folder, say=notes.append, **settings), "\n".join(notes)


@pytest.fixture
def files(tmp_path):
    return Files(str(tmp_path / "data"))


def ids_of(examples):
    return {example.id for example in examples}


def test_coco_without_crowds_and_with_clipped_boxes(files):
    files[INSTANCES]["annotations"] += [
        coco_object(1, 9, [0, 0, 40, 30], iscrowd=1),
        coco_object(2, 9, [30, 20, 100, 100]),
        coco_object(3, 9, [23, 3, 0, 6]),       # COCO has a box without area
        coco_object(4, 9, [50, 3, 8, 6])]
    os.remove(f"{files.folder}/coco/train2017/{25:012d}.jpg")
    files.write()
    notes = []
    examples, names, _ = read_coco(files.folder, "train", notes.append)
    assert names == ["car", "train"] and list(examples) == [9, 30]  # in the order of ids
    example = examples[9]
    assert example.size == (30, 40) and example.coco.labels == [0, 0]
    expected = [[8 / 40, 6 / 30, 8 / 40, 6 / 30], [35 / 40, 25 / 30, 10 / 40, 10 / 30]]
    np.testing.assert_allclose(example.coco.boxes, expected)
    assert example.sentences == ["Caption 0 of 9.", "Caption 1 of 9."] and example.captions == 2
    notes = "\n".join(notes)
    assert "1 images are not in" in notes and "the first is 000000000025.jpg; left out" in notes
    assert "1 crowd regions (iscrowd is 1) are left out" in notes
    assert "2 boxes without area or outside of their image are left out" in notes
    assert "1 boxes that reach beyond their image are clipped; a bbox is x, y, width" in notes


def test_visual_genome_with_its_flaws(files):
    files["vg/objects.json"][0]["objects"] += [
        {"object_id": 7, "names": ["unheard of", "MAN"], "x": -5, "y": -5, "w": 10, "h": 10},
        {"object_id": 8, "names": ["car"], **BOX, "x": 45},   # outside
        {"object_id": 9, "names": ["unicorn"], **BOX},        # not in the list of names
        {"object_id": 10, "names": [], **BOX}]
    files["vg/attributes.json"][0]["attributes"] += [
        {"object_id": 7, **BOX, "attributes": None}]
    files["vg/region_descriptions.json"][0]["regions"] += [
        {"phrase": phrase, **REGION} for phrase in (" ", "红色 12", "aé \n", "a", "A ")]
    files["vg/region_descriptions.json"][0]["regions"].append({"phrase": "a", **REGION, "x": 2})
    del files["vg/attributes.json"][1]
    os.remove(f"{files.folder}/vg/VG_100K/5.jpg")
    files.write()
    notes = []
    examples, links, objects, attributes = read_vg(files.folder, notes.append)
    found = examples[1].vg
    # A name of two classes means the first, which is the more frequent one
    assert found.labels == [1, 0] and found.attributes == [[0, 1], []]
    expected = [[8 / 40, 6 / 30, 8 / 40, 6 / 30], [2.5 / 40, 2.5 / 30, 5 / 40, 5 / 30]]
    np.testing.assert_allclose(found.boxes, expected)
    assert examples[1].sentences == ["region of 1", "aé", "a", "a"] and examples[1].captions == 0
    assert objects[1] == "automobile,car,cars" and attributes[1] == "large,big"
    assert links[2] == (25, None) and links[4] == (None, 77)
    notes = "\n".join(notes)
    assert "1 boxes without area or outside of their image are left out" in notes
    assert "2 boxes whose name is not in objects_vocab.txt are left out" in notes
    assert "3 sentences" in notes  # two without a Latin letter, one there twice
    assert "1 images of image_data.json are not there" in notes
    assert "1 objects without a record in attributes.json have no attribute" in notes


def test_an_image_of_both_sets_is_one_and_held_out_images_are_not_trained_on(files):
    """coco 30 is of Karpathy's val split; vg 3, 4, 5 of COCO's val, Flickr30k's and his test."""
    found, notes = files.read()
    train = {example.id: example for example in found["train"]}
    assert set(train) == {"coco 9", "coco 25", "vg 1", "vg 6"}
    assert train["coco 25"].sentences == ["Caption 0 of 25.", "Caption 1 of 25.", "region of 2"]
    assert train["coco 25"].captions == 2 and train["coco 25"].vg.labels == [1]
    assert train["coco 9"].vg is None and train["vg 1"].coco is None
    # val2017 less Karpathy's test image, with Visual Genome's annotation where it has one
    assert ids_of(found["val"]) == {"coco 139"} and found["val"][0].vg is not None
    assert "3 images are in a val or test split" in notes
    assert found["names"]["coco"] == ["car", "train"]
    # One set alone
    assert ids_of(files.read(sets=["coco"])[0]["train"]) == {"coco 9", "coco 25"}
    assert ids_of(files.read(sets=["vg"])[0]["train"]) == {"vg 1", "vg 2", "vg 6"}


def test_flickr30ks_test_images_are_known_by_their_address_and_by_visual_genomes_number(files):
    address = "http://farm9.staticflickr.com/8186/{}_4e622c8349_z.jpg"
    first, second = files[INSTANCES]["images"][:2]
    first["flickr_url"], second["flickr_url"] = address.format(77), address.format(78)
    files["vg/image_data.json"][1]["flickr_id"] = 77  # it is coco 25 too
    assert ids_of(files.read()[0]["train"]) == {"vg 1", "vg 6"}
    # COCO's record alone tells where coco 25, and so vg 2, is from
    first["flickr_url"], second["flickr_url"] = address.format(78), address.format(77)
    files["vg/image_data.json"][1]["flickr_id"] = None
    assert ids_of(files.read()[0]["train"]) == {"coco 9", "vg 1", "vg 6"}


@pytest.mark.parametrize("name", [
    "", "../../../a.jpg", "/a.jpg", "a/../../../b-0", "..\\a.jpg", "a\0/../../b.jpg"])
def test_a_name_in_an_annotation_cannot_lead_out_of_its_folder(name):
    """Else whoever writes annotations could have any file read that the user may read."""
    with pytest.raises(InputError, match="^a.json: the name .* leads out of its folder"):
        safe_name(name, "a.json")


# --------------------------------------------------------------------------------------------------
# Word pieces


@pytest.fixture(scope="module")
def vocabulary():
    """BERT's kind of list: unused places, signs, letters, words, endings."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = "the cat man dog play unable red shirt do they don re black white boys year old".split()
    ends = "##ing ##able ##ed ##er ##shirt".split()
    return [SPECIAL[0], "[unused0]", *SPECIAL[1:], *"!\"#&'(),-./:;?", *letters,
            *(f"##{c}" for c in letters), "中", *words, *ends]


SENTENCES = ["The cats' hat.", "Unable, CAFÉ 12-3!", "", "naïve 中国 ok", "don't  play\tthe\nc",
             "Players (in red) & white; 100% 😀 shirts", "x" * 150, "the\u00a0cat\u200b s\u0301"]


def test_pieces_equal_berts(vocabulary, tmp_path):
    path = str(tmp_path / "vocab.txt")
    write(path, "\n".join(vocabulary))
    ours, theirs = Tokenizer(path), BertTokenizerLegacy(path)
    for text in SENTENCES:
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text), text
        assert ours.decode(tokens[1:-1] + [ours.pad]) == ours.decode(tokens)
    tokens = Tokenizer(path, max_tokens=12).encode("cat " * 100)
    assert len(tokens) == 12 and (tokens[0], tokens[-1]) == (ours.cls, ours.sep)


def test_decoding_gives_the_words_back(vocabulary):
    """Up to spaces before signs: CIDEr's tokenizer parts those, but "man's" stays as it was."""
    text = ("they don't know; she'll say it's a man's red t-shirt, the boys' dog's black-and-white "
            "5-year-old cat, we've a close-up, i'm sure they're here, i'd say.")
    tokenizer = Tokenizer(vocabulary, max_tokens=200)
    decoded = tokenizer.decode(tokenizer.encode(text))
    for sign in ".,;'":
        decoded = decoded.replace(f" {sign}", sign)
    assert decoded == text


def test_a_list_without_the_special_pieces_is_no_vocabulary():
    with pytest.raises(InputError, match="MASK"):
        Tokenizer([*SPECIAL[:-1], "a"])


# --------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("size", [(48, 64), (33, 200), (120, 5), (300, 230)])
def test_images_are_resized_by_detrs_rule_as_pillow_does(size):
    """The short side becomes 80, or less if the long one would pass 133."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    scale = min(80 / min(size), 133 / max(size))
    height, width = (round(side * scale) for side in size)
    pillow = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    found = to_pixels(image, 80, 133)
    assert found.dtype == torch.uint8 and found.shape == (3, height, width)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1


def test_16_bits_and_transparency_look_as_a_viewer_shows_them(tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(np.full((4, 6), 257 * 100, np.uint16)).save(path)
    assert load_image(path).getpixel((0, 0)) == (100, 100, 100)
    Image.new("RGBA", (6, 4), (10, 20, 30, 0)).save(path)  # not the colour beneath
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(path, transparency=1)
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    path, x = str(tmp_path / "a.jpg"), np.linspace(0, 255, 2000)
    smooth = np.stack(np.broadcast_arrays(x, x[:1500, None], x[::-1]), -1).astype(np.uint8)
    Image.fromarray(smooth).save(path, quality=95)
    small = load_image(path, 300, 500)
    assert small.size == (500, 375)  # a quarter, no smaller than the 400 x 300 that it is to become
    whole, quick = (to_pixels(image, 300, 500).float() for image in (load_image(path), small))
    assert whole.shape == quick.shape and (whole - quick).abs().max() < 6
    assert load_image(path, 800, 1333).size == (2000, 1500)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """{name: file}: a good image, half of it, one that would be huge, a program (EPS)."""
    folder = tmp_path_factory.mktemp("bombs")
    Image.new("RGB", (40, 30), "red").save(folder / "good", "JPEG")
    jpeg = (folder / "good").read_bytes()
    place = jpeg.index(b"\xff\xc0") + 5  # the frame's height and width
    huge = (60000).to_bytes(2, "big")
    (folder / "huge").write_bytes(jpeg[:place] + huge + huge + jpeg[place + 4:])
    (folder / "cut").write_bytes(jpeg[:-20])
    (folder / "program").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name,problem", [
    ("huge", "decompression bomb"), ("program", "images are of kind JPEG"), ("cut", "truncated")])
def test_broken_images_and_bombs_are_named_and_left_out(bombs, name, problem):
    files = [bombs[name], bombs["good"]]
    examples = [Example(n, [file]) for n, file in enumerate(files)]
    (image,), index, broken = load_images(examples.__getitem__, 0, 2, 32, 64)
    assert index == 1 and image.size == (40, 30)
    assert len(broken) == 1 and broken[0].startswith(f"{files[0]}: ") and problem in broken[0]
    notes = []
    assert decodable(examples, notes.append) == examples[1:]
    assert len(notes) == 1 and files[0] in notes[0] and "left out of validation" in notes[0]


def test_twenty_broken_images_in_a_row_are_an_error(bombs):
    with pytest.raises(InputError, match="^none 7: cannot be read.*nor can the 19 images"):
        load_images(lambda i: Example(i, [f"none {i}"]), 7, 50, 32, 64)
    # Many questions about one broken image count once
    _, index, messages = load_images(
        lambda i: Example(i, [bombs["cut" if i < 40 else "good"]]), 3, 41, 32, 64)
    assert index == 40 and len(messages) == 1


# --------------------------------------------------------------------------------------------------
# Masking, sentences of other images, items


def test_masking_has_berts_proportions_and_chooses_named_words_more_often(vocabulary):
    tokenizer, rng, count, replaced = Tokenizer(vocabulary), random.Random(0), Counter(), set()
    words = tokenizer.ordinary[10:30]
    named = frozenset(words[2:4])
    sentence = [tokenizer.cls, *words, tokenizer.sep]
    for _ in range(20000):
        tokens, labels = mask_tokens(sentence, tokenizer, rng, named, named_share=0.6)
        chosen = [i for i, label in enumerate(labels) if label >= 0]
        assert chosen and not {0, 21} & set(chosen)
        assert all(labels[i] == sentence[i] for i in chosen)
        assert all(tokens[i] == sentence[i] for i in range(22) if i not in chosen)
        count.update(labels[i] for i in chosen)
        count["masked"] += sum(tokens[i] == tokenizer.mask for i in chosen)
        count["same"] += sum(tokens[i] == sentence[i] for i in chosen)
        replaced |= {tokens[i] for i in chosen}
    for word in words:
        assert count[word] / 20000 == pytest.approx(0.6 if word in named else 0.15, abs=0.01)
    total = sum(count[word] for word in words)
    assert count["masked"] / total == pytest.approx(0.8, abs=0.01)
    same = 0.1 + 0.1 / len(tokenizer.ordinary)
    assert count["same"] / total == pytest.approx(same, abs=0.01)
    # A random [PAD] would be padding, a random [SEP] end the sentence
    assert replaced == {tokenizer.mask, *tokenizer.ordinary}
    empty = [tokenizer.cls, tokenizer.sep]
    assert mask_tokens(empty, tokenizer, rng) == (empty, [-1, -1])


NAMES = {"coco": ["cat", "red shirt", "man"], "vg": ["dog", "boys", "old man"],
         "attributes": ["red", "black", "white and old", "year"]}


@pytest.fixture
def examples(tmp_path):
    """Sixteen images of COCO, Visual Genome and both; some sentences belong to several."""
    made = []
    for i in range(16):
        path = str(tmp_path / f"{i}.jpg")
        write_image(path, (40 + 4 * (i % 3), 32))
        box = (0.5 + 0.1 * (i % 5), 0.5, 0.2, 0.2)
        coco = Objects([box, (0.99, 1.0, 0.01, 0.1)], [i % 3, 0]) if i % 2 == 0 else None
        vg = Objects([box], [i % 3], [[0, 2]]) if i % 2 or i == 0 else None
        captions = [f"cat {i}", "the cat" if i % 2 else "The CAT", f"un {i} able"] if coco else []
        regions = [f"dog {i}", f"red {i}", "old man"] if vg else []
        made.append(Example(f"coco {i}", [path], (32, 40), sentences=captions + regions, coco=coco,
                            vg=vg, captions=len(captions)))
    return made


def training_set(examples, vocabulary, *flags):
    args, _ = parse(["--short-sides", "32", "48", "--long-side", "64", *flags])
    return PretrainingSet(examples, Tokenizer(vocabulary), NAMES, args)


def test_half_of_the_sentences_are_anothers_and_have_masked_words_too(examples, vocabulary):
    """Were words masked in matching sentences alone, ITM would learn to look for [MASK]."""
    data = training_set(examples, vocabulary, "--sentences-per-picture", "2")
    tokenizer, count = data.tokenizer, Counter()
    for epoch, index in itertools.product(range(60), range(16)):
        item = data[epoch, index, 0]
        own = [tokenizer.encode(sentence) for sentence in examples[index].sentences]
        assert all(caption in own for caption in item["captions"])
        for tokens, labels, match in zip(item["tokens"], item["mlm_labels"], item["itm_labels"]):
            count[match] += 1
            count["masked", match] += tokenizer.mask in tokens
            original = [label if label >= 0 else token for token, label in zip(tokens, labels)]
            # What another's sentence hides is not asked: MLM would learn to ignore the image
            assert original in own if match else set(labels) == {-1}
        count["none"] += item["no_sentence"]
    assert count[1] / (count[0] + count[1]) == pytest.approx(0.5, abs=0.03)
    assert count["none"] / 960 == pytest.approx(0.25, abs=0.05)
    for match in (0, 1):
        assert count["masked", match] / count[match] == pytest.approx(0.85, abs=0.07)
    # Without ITM no sentence is wrong
    data = training_set(examples, vocabulary, "--without", "itm")
    assert all(data[0, index, 0]["itm_labels"] == [1] for index in range(16))


def test_items_depend_on_seed_epoch_and_image_alone(examples, vocabulary):
    first, again = training_set(examples, vocabulary), training_set(examples, vocabulary)
    for key in ((0, 3, 7), (4, 3, 0), (0, 3, 1)):
        assert torch.equal(first[key]["image"], again[key]["image"])
        assert first[key]["tokens"] == again[key]["tokens"]
    items = [first[epoch, 0, epoch] for epoch in range(60)]
    assert len({tuple(item["tokens"][0]) for item in items}) > 5
    assert {item["image"].shape[1] for item in items} == {32, 48}  # by the draw
    other = training_set(examples, vocabulary, "--seed", "1")
    assert any(other[e, 0, e]["tokens"] != item["tokens"] for e, item in enumerate(items))
    # An image of both sets trains one of them at each visit
    targets = [item["target"] for item in items]
    assert 15 < sum(target["source"] == "vg" for target in targets) < 45
    for target in targets:
        of_vg = target["source"] == "vg"
        assert target["labels"].tolist() == ([0] if of_vg else [0, 0])
        assert ("attributes" in target) == of_vg
        assert not of_vg or target["attributes"].tolist() == [[1, 0, 1, 0]]


def test_another_sentence_is_of_the_same_kind_and_never_ones_own(examples):
    rng = random.Random(0)
    kinds = {True: {"cat", "the", "The", "un"}, False: {"dog", "red", "old"}}
    for index, is_caption in itertools.product(range(16), (True, False)):
        drawn = {other_sentence(examples, index, is_caption, rng) for _ in range(200)}
        own = {sentence.lower() for sentence in examples[index].sentences}
        assert len(drawn) > 10 and not {sentence.lower() for sentence in drawn} & own
        assert {sentence.split()[0] for sentence in drawn} <= kinds[is_caption]
    same = [Example(n, [], sentences=["The cat", "the CAT"][n:], captions=1) for n in range(2)]
    assert other_sentence(same, 0, True, rng) is None


@pytest.mark.parametrize("stride", [16, 32])
def test_a_batch_holds_its_items_and_where_their_objects_lie(examples, vocabulary, stride):
    data = training_set(examples, vocabulary, "--sentences-per-picture", "3",
                        "--grid-word-loss", "1")
    tokenizer, pad = data.tokenizer, data.tokenizer.pad
    items = [data[0, index, 0] for index in range(6)]
    batch = collate(items, pad, stride)
    B, K, T = batch["tokens"].shape
    assert (B, K) == batch["itm_labels"].shape == batch["captions"].shape[:2] == (6, 3)
    assert batch["padded"] and batch["ids"] == [f"coco {i}" for i in range(6)]
    # Where the first sentence is another image's, detection has none
    alone = [item["no_sentence"] or item["itm_labels"][0] == 0 for item in items]
    assert batch["no_sentence"].tolist() == alone
    assert alone != [item["no_sentence"] for item in items] and not all(alone)
    masked = []
    for b, item in enumerate(items):
        height, width = item["image"].shape[1:]
        assert batch["sizes"][b].tolist() == [height, width]
        assert torch.equal(batch["images"][b, :, :height, :width], item["image"])
        for k, (tokens, labels) in enumerate(zip(item["tokens"], item["mlm_labels"])):
            assert batch["tokens"][b, k].tolist() == tokens + [pad] * (T - len(tokens))
            masked += [((b * K + k) * T + t, n) for t, n in enumerate(labels) if n >= 0]
    assert masked == list(zip(batch["mlm_positions"].tolist(), batch["mlm_labels"].tolist()))

    # The cell that each object's centre lies in; one at the border is of the last cell
    cells, pieces = [], []
    H, W = (math.ceil(side / stride) for side in batch["images"].shape[2:])
    for b, (item, example) in enumerate(zip(items, examples)):
        height, width = item["image"].shape[1:]
        source = item["target"]["source"]
        objects = getattr(example, source)
        for n, (cx, cy, _, _) in enumerate(objects.boxes):
            x, y = min(cx * width, width - 0.5), min(cy * height, height - 0.5)
            cells.append((b, int(y // stride), int(x // stride)))
            names = [NAMES[source][objects.labels[n]]]
            if source == "vg":
                names += [NAMES["attributes"][attribute] for attribute in objects.attributes[n]]
            pieces.append([p for name in names for p in tokenizer.encode(name)[1:-1]])
    found = [divmod(cell, H * W) for cell in batch["object_cells"].tolist()]
    assert [(b, *divmod(cell, W)) for b, cell in found] == cells
    expected = [(n, p, 1 / len(its)) for n, its in enumerate(pieces) for p in its]
    assert batch["word_objects"].tolist() == [n for n, _, _ in expected]
    assert batch["word_pieces"].tolist() == [piece for _, piece, _ in expected]
    torch.testing.assert_close(batch["word_weights"], torch.tensor([w for _, _, w in expected]))
    assert "object_cells" not in collate([training_set(examples, vocabulary)[0, 0, 0]], pad, stride)


# --------------------------------------------------------------------------------------------------
# Batches

SHAPES = [(60 + i % 7, 90 - i % 11) for i in range(50)]


def take(n, *words, **settings):
    return list(itertools.islice(Batches(*words, **settings), n))


@pytest.mark.parametrize("n", [61, 997])
def test_each_epoch_has_each_item_once(n):
    batches = take(math.ceil(4 * n / 6), SHAPES[:1] * n, 6)
    assert {len(batch) for batch in batches} == {6}
    epochs = [[i for batch in batches for e, i, _ in batch if e == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world,accumulation_steps", [(2, 1), (2, 2), (1, 4)])
def test_processes_and_micro_batches_share_the_batches_and_their_draw(world, accumulation_steps):
    whole = take(10, SHAPES, 8, seed=5)
    shares = [take(10 * accumulation_steps, SHAPES, 8, seed=5, rank=rank, world=world,
                   accumulation_steps=accumulation_steps) for rank in range(world)]
    for number, batch in enumerate(whole):
        micro = slice(number * accumulation_steps, (number + 1) * accumulation_steps)
        together = [item for share in shares for part in share[micro] for item in part]
        assert sorted(together) == sorted(batch)
        assert len({draw for _, _, draw in batch}) == 1
    assert len({batch[0][2] for batch in whole}) == 10


@pytest.mark.parametrize("start", [3, 12, 29])
@pytest.mark.parametrize("times,chunk", [(1, 1), (8, 12)])
def test_batches_go_on_where_a_run_stopped(start, times, chunk):
    assert Batches(SHAPES * times, 8).chunk == chunk
    assert take(20, SHAPES * times, 8, start=start) == take(start + 20, SHAPES * times, 8)[start:]


# --------------------------------------------------------------------------------------------------
# The index


def test_the_index_equals_a_direct_read(world, tmp_path):
    read = read_pretraining(world, say=[].append)
    found = pretraining_index(world, folder=str(tmp_path), say=[].append)
    for split in ("train", "val"):
        for example in read[split]:
            example.files = [os.path.abspath(file) for file in example.files]
        assert list(found[split]) == read[split]
        assert found[split].sizes.tolist() == [list(e.size) for e in read[split]]
    assert found["names"] == read["names"]
    train = found["train"]
    assert train[2:40:7] == read["train"][2:40:7] and train[-1] == read["train"][-1]
    assert copy.copy(train)[5] == train[5]  # as a worker that is not forked gets it, by __reduce__


def test_the_index_is_built_again_only_when_a_source_changes(files, monkeypatch):
    reads = []
    monkeypatch.setattr(data_module, "read_pretraining",
                        lambda *words: reads.append(1) or read_pretraining(*words))
    folder = f"{files.folder}/co"  # in the data folder: it is not its own source, but coco is

    def index():
        notes = []
        return pretraining_index(files.folder, folder=folder, say=notes.append)["train"], notes

    first, notes = index()
    again, notes_again = index()
    assert len(reads) == 1 and list(first) == list(again) and notes == notes_again != []
    for run in ("run", "runs/vqa"):  # a training's --output in the data folder is no source either
        os.makedirs(f"{files.folder}/{run}")
        write(f"{files.folder}/{run}/log.jsonl", "{}")
    assert list(index()[0]) == list(first) and len(reads) == 1
    files[CAPTIONS]["annotations"][0]["caption"] = "another"
    files.write()
    assert any("another" in example.sentences for example in index()[0]) and len(reads) == 2
    assert len(os.listdir(folder)) == 1  # the stale one is gone
    os.remove(f"{files.folder}/coco/train2017/{25:012d}.jpg")
    assert "coco 25" in ids_of(first) and "coco 25" not in ids_of(index()[0])


def test_pairs_of_ones_own_are_read_again_only_when_something_changes(own, monkeypatch):
    """Their file and the index lie in the images' folder."""
    reads = []
    monkeypatch.setattr(data_module, "read_pairs",
                        lambda *words: reads.append(1) or read_pairs(*words))
    path, rows = f"{own.images}/pairs.csv", "image,caption,split\nc.jpg,a hat,val\n"

    def train():
        return pretraining_index("", say=[].append, pairs=path, pairs_images=own.images)["train"]

    write(path, f"{rows}c.jpg,a hat,train\n")
    assert train()[0].sentences == train()[0].sentences == ["a hat"]
    assert len(reads) == 2  # of train and of val
    write(path, f"{rows}c.jpg,a coat,train\nday1/new.jpg,a shoe,train\n")
    assert [example.sentences for example in train()] == [["a coat"]]
    write_image(f"{own.images}/day1/new.jpg")  # into a folder of the folder
    assert len(train()) == 2


def test_an_index_that_another_run_has_built_meanwhile_stays(files, tmp_path, monkeypatch):
    """Two runs on one host, without torchrun: whoever is second leaves the first one's in place."""
    def build(read):
        return load_or_build_index(files.folder, str(tmp_path), "word", read, [].append)["train"]

    def read_slowly(say):
        build(lambda say: {"train": [Example(1, [], (3, 4))]})  # the other run begins and ends
        return {"train": [Example(1, [], (3, 4))]}

    def remove(path, **settings):
        assert path.endswith(".tmp"), "the other run's index is taken away while it opens it"

    monkeypatch.setattr(data_module.shutil, "rmtree", remove)
    assert build(read_slowly)[0].id == 1


# --------------------------------------------------------------------------------------------------
# What the commands share


def test_an_image_that_evaluation_cannot_decode_is_an_error(examples):
    write(examples[3].files[0], "no image")
    with pytest.raises(InputError, match=f"^{examples[3].files[0]}: cannot be read"):
        list(evaluation_batches(examples, range(5), short=32, long=64, batch_size=1, workers=1))


def test_a_command_turns_errors_of_input_into_one_line(capsys):
    def bad():
        raise InputError("a\nb\x1b[2J\ud800: " + "x" * 9999)

    def stopped():
        raise KeyboardInterrupt

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    assert data_module.command("data.py", bad) == 2
    assert data_module.command("data.py", stopped) == 130
    assert data_module.command("pretrain.py", too_large) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("data.py: a\\nb\\x1b[2J\\ud800: xxx") and len(first) < 2100
    assert second == "data.py: stopped"
    assert third.startswith("pretrain.py: CUDA out of memory. Hold fewer images at once (--micro-b")
    with pytest.raises(ZeroDivisionError):  # a bug must not look like an error of input
        data_module.command("data.py", lambda: 1 / 0)


def test_the_command_says_what_is_there_and_what_was_left_out(files, tmp_path, capsys):
    for _ in range(2):  # the second time by the index
        assert data_module.main(["--data", files.folder]) == 0
        out = capsys.readouterr().out
        # coco 9 and 25 with 2 captions each, vg 1, 2 (which is coco 25) and 6 with a region each
        # and 2 boxes of coco, 3 of vg
        assert "train: 4 images, 7 sentences, 5 boxes" in out and "val: 1 images" in out
        assert f"{files.folder}: 3 images are in a val or test split; left out" in out
    assert data_module.main(["--data", f"{tmp_path}/none"]) == 2
    assert capsys.readouterr().err.startswith(f"data.py: --data {tmp_path}/none: no such folder")
    assert data_module.main(["--data", files.folder, "--index", "a" * 300]) == 2
    message = capsys.readouterr().err
    assert message.startswith("data.py: --index aaa") and "cannot be written" in message


# --------------------------------------------------------------------------------------------------
# Boxes and captions of one's own


class OwnBoxes:
    """Three images of 40 x 30 pixels with a box each, in COCO's format; a test changes a record."""

    def __init__(self, folder):
        self.path, self.images = f"{folder}/boxes.json", f"{folder}/images"
        names = ("day1/img 1.jpg", "day2/img 1.jpg", "c.jpg")
        for name in names:
            write_image(f"{self.images}/{name}")
        self.file = {
            "images": [{"id": n, "file_name": name, "height": 30, "width": 40}
                       for n, name in enumerate(names)],
            "annotations": [{"image_id": n, "category_id": 7, "bbox": [4, 3, 8, 6]}
                            for n in range(3)],
            "categories": [{"id": 7, "name": "Screw, M1"}, {"id": 9, "name": "nut"}]}

    def read(self, **settings):
        write(self.path, self.file)
        notes = []
        examples, names, _ = read_boxes(self.path, self.images, say=notes.append, **settings)
        return list(examples.values()), names, "\n".join(notes)


@pytest.fixture
def own(tmp_path):
    return OwnBoxes(str(tmp_path))


def test_boxes_of_ones_own_are_of_the_files_that_the_records_name(own):
    """Two files have the same last part of their names. No area, no iscrowd, no caption."""
    examples, names, notes = own.read()
    assert names == ["Screw, M1", "nut"] and notes == ""
    assert [os.path.relpath(e.files[0], own.images) for e in examples] == [
        "day1/img 1.jpg", "day2/img 1.jpg", "c.jpg"]
    assert all(e.coco.labels == [0] and e.coco.boxes == [(0.2, 0.2, 0.2, 0.2)] for e in examples)

    # A last part alone is enough, if it is unique and no other record's
    own.file["images"][0]["file_name"] = "elsewhere/img 1.jpg"
    own.file["images"][2]["file_name"] = "elsewhere/c.jpg"
    examples, _, notes = own.read()
    assert [e.id for e in examples] == [1, 2]
    assert f"1 images are not in {own.images}, the first is elsewhere/img 1.jpg; left out" in notes
    with pytest.raises(InputError, match="elsewhere/img 1.jpg; a score needs all"):
        own.read(complete=True)  # a score needs all
    own.file["images"].append({"id": 3, "file_name": "c.jpg", "height": 30, "width": 40})
    assert [e.id for e in own.read()[0]] == [1, 3]


def test_what_other_tools_write_beside_the_boxes_is_no_hindrance(own):
    """A category of the project's name above all; iscrowd as true, false, null or a fraction."""
    own.file["categories"].insert(0, {"id": 0, "name": "nut", "supercategory": "none"})
    for annotation, iscrowd in zip(own.file["annotations"], (False, None, 0.0)):
        annotation.update(iscrowd=iscrowd, category_id=9, segmentation=[], attributes={})
    examples, names, notes = own.read()
    assert names == ["Screw, M1", "nut"] and notes == ""
    assert all(example.coco.labels == [1] for example in examples)


@pytest.mark.parametrize("height,width,upright", [(100, 40, True), (40, 100, False)])
def test_the_records_size_tells_whether_a_cameras_rotation_is_applied(own, height, width, upright):
    """A bitmap of 100 x 40 with EXIF's orientation 6: upright it is 40 wide and 100 high."""
    image = Image.new("RGB", (100, 40), "blue")
    image.paste("red", (0, 0, 50, 40))  # the left half, which is above when the image is upright
    image.getexif()[0x0112] = 6
    image.save(f"{own.images}/c.jpg", exif=image.getexif())
    own.file["images"][2].update(height=height, width=width)
    example = own.read()[0][2]
    assert example.size == (height, width) and example.upright == upright
    (image,), _, _ = load_images(lambda _: example, 0, 1, 1000, 1000)
    assert image.size == (width, height)
    assert image.getpixel((width // 4, height // 4))[0] > 200
    assert image.getpixel((width // 4, height - 2))[0] > 200 or upright
    assert not image.getexif()  # or Predictor would turn it once more


def test_a_pngs_size_is_read_without_decoding_it(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 7)).save(tmp_path / "a.png", exif=exif)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert size_of(tmp_path / "a.png") == ((7, 5), (5, 7))


@pytest.mark.parametrize("change,words", [
    (lambda file: file["images"][1].update(height=60, width=80),
     ["img 1.jpg has 40 x 30 pixels, its record 80 x 60: boxes would be wrong"]),
    (lambda file: file["images"][1].pop("width"), ["field `width` - at `$.images[1]`"]),
    (lambda file: file["images"][1].update(id=0), ["image id 0 stands for", "day2/img 1.jpg"]),
    (lambda file: [a.update(iscrowd=1) for a in file["annotations"]],
     ["no box is left of 3 annotations"]),
    (lambda file: file.update(categories=[]), ["unknown image_id 0 or category_id 7"]),
    (lambda file: file["categories"].append({"id": 1, "name": "nut"}), ["'nut' is there twice"]),
    (lambda file: file["images"][0].update(file_name="../boxes.json"), ["leads out of"])])
def test_boxes_that_cannot_be_used_are_one_line(own, change, words):
    change(own.file)
    with pytest.raises(InputError) as error:
        own.read()
    assert all(word in str(error.value) for word in [own.path, *words])
    assert "\n" not in str(error.value)


PAIRS = 'image,caption,split\r\nc.jpg,"a ""red"" nut,\nround",train\r\nc.jpg, two ,\r\n'


def test_pairs_in_csv_and_json_lines(own, tmp_path):
    write(str(tmp_path / "pairs.csv"), "\ufeff" + PAIRS + "gone.jpg,x,train\r\nc.jpg,  ,train\r\n")
    notes = []
    example, = read_pairs(str(tmp_path / "pairs.csv"), own.images, "train", notes.append)
    assert example.id == "c.jpg" and example.captions == 2
    assert example.sentences == ['a "red" nut,\nround', "two"]
    assert "1 pairs whose image is not in" in notes[0] + notes[1]
    assert "1 pairs with an empty caption are left out" in notes[0] + notes[1]
    write(str(tmp_path / "pairs.jsonl"), '{"image": "c.jpg", "caption": "b", "split": "val"}\n\n')
    example, = read_pairs(str(tmp_path / "pairs.jsonl"), own.images, "val")
    assert example.sentences == ["b"]
    with pytest.raises(InputError, match="nowhere: no such folder, or nothing in it"):
        read_pairs(str(tmp_path / "pairs.jsonl"), "nowhere", "val")


def test_without_a_split_a_tenth_of_the_images_is_validated_on(tmp_path):
    path = str(tmp_path / "pairs.csv")
    rows = "".join(f"{n}.jpg,caption {k}\n" for n in range(100) for k in (1, 2))
    write(path, f"image,caption\n{rows}")
    train, val = (read_pairs(path, "", split) for split in ("train", "val"))
    assert 5 <= len(val) <= 15 and len(train) + len(val) == 100
    assert all(len(example.sentences) == 2 for example in train + val)


@pytest.mark.parametrize("text,words", [
    ("image,text\nc.jpg,b\n", "line 2: Object missing required field `caption`; the first line"),
    ("image,caption\nc.jpg,a red, round nut\n", "line 2: Expected `str`"),
    ("image,caption,split\nc.jpg,b,dev\n", "Invalid enum value 'dev'"),
    ('image,caption\n"c.jpg,a\n', "unexpected end of data"),
    ("image,caption\n../c.jpg,b\n", "leads out of its folder"),
    ("image,caption,split\nc.jpg,b,val\n", "no pair of 'train' is left of 1 rows; a column split")])
def test_pairs_that_cannot_be_used_are_one_line(own, tmp_path, text, words):
    path = str(tmp_path / "pairs.csv")
    write(path, text)
    with pytest.raises(InputError) as error:
        read_pairs(path, own.images, "train")
    assert path in str(error.value) and words in str(error.value)


def test_what_there_is_to_train_on_is_said(own, tmp_path, monkeypatch):
    own.file["annotations"] += [{"image_id": 0, "category_id": 9, "bbox": [4, 3, 8, 6]}] * 4
    own.file["annotations"] = [a for a in own.file["annotations"] if a["image_id"] != 2]
    examples, names, _ = own.read()
    examples[0].sentences = ["short", "long " * 8]
    write(str(tmp_path / "vocab.txt"), "\n".join([*SPECIAL, "long", "short"]))
    notes = []
    mean = describe("train", examples, {"coco": names}, queries=3, say=notes.append,
                    tokenizer=Tokenizer(str(tmp_path / "vocab.txt"), max_tokens=8))
    assert mean == 2 and notes == [
        "train: 3 images, 2 sentences, 6 boxes",
        "  1 sentences have more than 6 word pieces; what comes after those is cut off",
        "  2 classes; boxes a class: from 2 (Screw, M1) to 4 (nut)",
        "  boxes an image: 2.0 in the mean, 5 at most; 1 images have none",
        "  1 images have more objects than there are queries (3): 2 objects can never be found"]
    monkeypatch.setattr(data_module, "MOST_DESCRIBED", 2)
    assert describe("train", examples, {"coco": names}, say=notes.append) == 5 / 2
    assert "train: 3 examples; what follows is of one in 2" in notes


def test_the_command_says_what_is_in_boxes_of_ones_own(own, capsys):
    own.read()
    assert data_module.main(["--train-annotations", own.path, "--train-images", own.images,
                             "--val-annotations", own.path, "--val-images", own.images]) == 0
    out = capsys.readouterr().out
    assert "train: 3 images, 0 sentences, 3 boxes" in out and "val: 3 images" in out
    assert "boxes a class: from 0 (nut) to 3 (Screw, M1)" in out
    assert data_module.main(["--train-annotations", own.path]) == 2
    assert "give the images' folder too" in capsys.readouterr().err
