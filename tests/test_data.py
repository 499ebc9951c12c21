"""Readers on records with the real sets' flaws, word pieces, transforms, the four tasks' inputs, batches."""

import json
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer

from data import (
    Batches,
    InputError,
    Picture,
    PretrainingSet,
    Tokenizer,
    collate,
    load_picture,
    mask_words,
    pad_pictures,
    read_coco,
    read_pretraining,
    read_vg,
    resized,
    to_pixels,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(value if isinstance(value, str) else json.dumps(value))


def picture(path, size=(40, 30), mode="RGB"):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new(mode, size, 128 if mode == "L" else None).save(path, "JPEG")


class Silent(list):
    """What a reader said."""

    def __call__(self, text):
        self.append(text)

    def __str__(self):
        return "\n".join(self)


# ----------------------------------------------------------------------------------------------------------------
# COCO and Visual Genome


def annotation(number, image, box, category=3, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **more}


@pytest.fixture
def files(tmp_path):
    """Both sets with a few pictures; a test changes a record and writes the file again."""
    d = str(tmp_path / "data")
    content = {}
    for split, ids in (("train", (9, 25, 30)), ("val", (139, 285))):
        for number in ids:
            picture(f"{d}/coco/{split}2017/{number:012d}.jpg")
        content[f"coco/annotations/instances_{split}2017.json"] = {
            "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 30, "width": 40} for n in ids],
            "annotations": [annotation(10 * n, n, [4, 3, 8, 6]) for n in ids],
            "categories": [{"id": 7, "name": "train"}, {"id": 3, "name": "car"}]}
        content[f"coco/annotations/captions_{split}2017.json"] = {"annotations": [
            {"id": 5 * n + i, "image_id": n, "caption": f" Caption {i} of {n}.\n"} for n in ids for i in range(2)]}
    for number in (1, 2, 3, 4, 5, 6):
        picture(f"{d}/vg/{'VG_100K' if number % 2 else 'VG_100K_2'}/{number}.jpg")
    links = {1: {}, 2: {"coco_id": 25}, 3: {"coco_id": 139}, 4: {"flickr_id": 77}, 5: {"coco_id": 600}, 6: {}}
    content["vg/image_data.json"] = [
        {"image_id": n, "width": 40, "height": 30, "coco_id": None, "flickr_id": None, **link}
        for n, link in links.items()]
    content["vg/objects.json"] = [{"image_id": n, "objects": [
        {"object_id": 100 * n, "names": ["Car "], "x": 4, "y": 3, "w": 8, "h": 6}]} for n in links]
    content["vg/attributes.json"] = [{"image_id": n, "attributes": [
        {"object_id": 100 * n, "names": ["car"], "attributes": ["Red", "unheard of", " big"]}]} for n in links]
    content["vg/region_descriptions.json"] = [{"id": n, "regions": [
        {"region_id": n, "image_id": n, "phrase": f"region of {n}"}]} for n in links]
    content["vg/objects_vocab.txt"] = "person,man\nautomobile,car,cars\n"
    content["vg/attributes_vocab.txt"] = "red\nlarge,big\n"
    content["coco/dataset_coco.json"] = {"images": [
        {"cocoid": 9, "split": "train"}, {"cocoid": 30, "split": "val"}, {"cocoid": 285, "split": "test"},
        {"cocoid": 600, "split": "test"}, {"cocoid": 139, "split": "restval"}]}
    content["flickr30k/dataset_flickr30k.json"] = {"images": [
        {"filename": "77.jpg", "split": "test"}, {"filename": "78.jpg", "split": "train"}]}

    class Files(dict):
        folder = d

        def write(self, *names):
            for name in names or self:
                write(f"{d}/{name}", self[name])

    files = Files(content)
    files.write()
    return files


def test_coco_is_read_as_it_is(files):
    say = Silent()
    pictures, names = read_coco(files.folder, "train", say)
    assert names == ["car", "train"] and list(pictures) == [9, 25, 30]  # classes in the order of their ids
    p = pictures[9]
    assert p.name == "coco 9" and p.size == (30, 40) and p.sentences == ["Caption 0 of 9.", "Caption 1 of 9."]
    np.testing.assert_allclose(p.coco[0], [[8 / 40, 6 / 30, 8 / 40, 6 / 30]])
    assert p.coco[1].tolist() == [0] and say == []


def test_coco_crowds_are_left_out_and_boxes_are_clipped(files):
    name = "coco/annotations/instances_train2017.json"
    files[name]["annotations"] += [annotation(1, 9, [0, 0, 40, 30], iscrowd=1), annotation(2, 9, [30, 20, 100, 100])]
    files.write(name)
    boxes, labels = read_coco(files.folder, "train")[0][9].coco
    np.testing.assert_allclose(boxes[1], [35 / 40, 25 / 30, 10 / 40, 10 / 30], rtol=1e-6)
    assert len(labels) == 2


@pytest.mark.parametrize("box", [[4, 3, 0, 6], [50, 3, 8, 6], [4, 3, float("nan"), 6], [4, 3, 8], None, "box"], ids=str)
def test_coco_box_that_is_empty_or_outside(files, box):
    name = "coco/annotations/instances_train2017.json"
    files[name]["annotations"].append(annotation(77, 9, box))
    files.write(name)
    with pytest.raises(InputError, match="instances_train2017.json: annotation 77: bbox .* is empty or outside"):
        read_coco(files.folder, "train")


def test_coco_one_bad_box_among_ten_thousand_is_left_out_and_said(files):
    name = "coco/annotations/instances_train2017.json"
    files[name]["annotations"] += [annotation(100 + i, 25, [1, 2, 3, 4]) for i in range(10000)]
    files[name]["annotations"].append(annotation(77, 9, [23, 3, 0, 0]))
    files.write(name)
    say = Silent()
    pictures, _ = read_coco(files.folder, "train", say)
    assert len(pictures[9].coco[1]) == 1 and "left out 1 of 10004 boxes" in str(say) and "annotation 77" in str(say)


@pytest.mark.parametrize("name,change,says", [
    ("coco/annotations/instances_train2017.json", lambda f: f["annotations"][0].update(image_id=5),
     "annotation 90: unknown image_id 5"),
    ("coco/annotations/instances_train2017.json", lambda f: f["annotations"][0].update(category_id=5),
     "annotation 90: unknown category_id 5"),
    ("coco/annotations/instances_train2017.json", lambda f: f["images"][0].update(height=0), "image 9: height"),
    ("coco/annotations/instances_train2017.json", lambda f: f["images"][0].pop("width"), "record id 9: 'width' is"),
    ("coco/annotations/instances_train2017.json", lambda f: f.pop("images"),
     "expected a list of records under 'images'"),
    ("coco/annotations/captions_train2017.json", lambda f: f["annotations"][0].update(caption=None),
     "record id 45: 'caption' is 'None'"),
    ("vg/objects.json", lambda f: f[0]["objects"][0].update(w="wide"), "record object_id 100: 'w' is 'wide'"),
    ("vg/image_data.json", lambda f: f[0].pop("width"), "record image_id 1: 'width'"),
    ("coco/dataset_coco.json", lambda f: f.pop("images"), "expected a list of records under 'images'"),
    ("flickr30k/dataset_flickr30k.json", lambda f: f["images"][0].update(filename="cat.jpg"),
     "has no usable picture number")])
def test_a_record_that_cannot_be_used(files, name, change, says):
    change(files[name])
    files.write(name)
    with pytest.raises(InputError) as error:
        read_pretraining(files.folder, say=Silent())
    assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [
    "coco/annotations/instances_train2017.json", "coco/annotations/captions_val2017.json", "vg/image_data.json",
    "vg/objects.json", "vg/attributes.json", "vg/region_descriptions.json", "coco/dataset_coco.json"])
def test_a_file_that_is_missing_cut_off_or_another(files, name):
    path = f"{files.folder}/{name}"
    for content, says in (('{"images": [{"id": 1', "not valid JSON"), ("3", "expected a list of records")):
        write(path, content)
        with pytest.raises(InputError, match=f"{name}: {says}"):
            read_pretraining(files.folder, say=Silent())
    os.remove(path)
    if name != "coco/dataset_coco.json":
        with pytest.raises(InputError, match=f"{name}: not found, needed for"):
            read_pretraining(files.folder, say=Silent())
    else:
        say = Silent()
        read_pretraining(files.folder, say=say)
        assert "dataset_coco.json: not there, so its val and test pictures cannot be kept out" in str(say)


def test_pictures_that_are_not_there_are_said_and_left_out(files):
    os.remove(f"{files.folder}/coco/train2017/000000000009.jpg")
    os.remove(f"{files.folder}/vg/VG_100K/1.jpg")
    say = Silent()
    found = read_pretraining(files.folder, say=say)
    assert {p.name for p in found["train"]} == {"coco 25", "vg 6"}
    assert "1 pictures of" in str(say) and "000000000009.jpg" in str(say) and "1.jpg" in str(say)


def test_missing_folders(files):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_pretraining("nowhere")
    os.rename(f"{files.folder}/coco/val2017", f"{files.folder}/coco/elsewhere")
    with pytest.raises(InputError, match="coco/val2017: no such folder; unpack"):
        read_pretraining(files.folder, say=Silent())


def test_visual_genome_with_its_flaws(files):
    files["vg/objects.json"][0]["objects"] += [
        {"object_id": 7, "names": ["unheard of", "MAN"], "x": -5, "y": -5, "w": 10, "h": 10},  # second name, clipped
        {"object_id": 8, "names": ["car"], "x": 45, "y": 3, "w": 8, "h": 6},                   # outside
        {"object_id": 9, "names": ["unicorn"], "x": 4, "y": 3, "w": 8, "h": 6},                # not in the vocabulary
        {"object_id": 10, "names": [], "x": 4, "y": 3, "w": 8, "h": 6}]                        # no name
    files["vg/attributes.json"][0]["attributes"] += [{"object_id": 7, "attributes": None}, {"object_id": 11}]
    files["vg/region_descriptions.json"][0]["regions"] += [{"phrase": " "}, {"phrase": None}, {"phrase": "a\u00e9 \n"}]
    files.write()
    say = Silent()
    pictures, same, objects, attributes = read_vg(files.folder, say)
    boxes, labels, of_boxes = pictures[1].vg
    assert labels.tolist() == [1, 0] and of_boxes == [(0, 1), ()]
    np.testing.assert_allclose(boxes, [[8 / 40, 6 / 30, 8 / 40, 6 / 30], [2.5 / 40, 2.5 / 30, 5 / 40, 5 / 30]],
                               rtol=1e-6)
    assert pictures[1].sentences == ["region of 1", "a\u00e9"]
    assert "of 10 boxes left out 1 empty or outside, 2 whose name is not in" in str(say)
    assert objects[1] == ["automobile", "car", "cars"] and attributes[1] == ["large", "big"] and same[2][0] == 25


def test_one_picture_of_both_sets_and_no_test_picture(files):
    say = Silent()
    found = read_pretraining(files.folder, say=say)
    by_name = {p.name: p for p in found["train"]}
    # coco 30 is Karpathy's val; vg 3 and 4 are COCO's val and Flickr30k's test; vg 5 is Karpathy's test.
    assert set(by_name) == {"coco 9", "coco 25", "vg 1", "vg 6"}
    assert by_name["coco 25"].vg is not None
    assert by_name["coco 25"].sentences == ["Caption 0 of 25.", "Caption 1 of 25.", "region of 2"]
    assert by_name["coco 9"].vg is None and by_name["vg 1"].coco is None
    # val2017 without Karpathy's test, with Visual Genome's annotation where it has one
    assert [p.name for p in found["val"]] == ["coco 139"] and found["val"][0].vg is not None
    assert "coco: 1 pictures of train2017 are in a val or test split" in str(say)
    assert "vg: 2 pictures are in a val or test split" in str(say)
    assert found["names"] == {"coco": ["car", "train"], "vg": ["person,man", "automobile,car,cars"],
                              "attributes": ["red", "large,big"]}


def test_photographs_of_flickr30ks_test_split_are_known_by_their_address_too(files):
    name = "coco/annotations/instances_train2017.json"
    address = "http://farm9.staticflickr.com/8186/{}_4e622c8349_z.jpg"
    files[name]["images"][0]["flickr_url"] = address.format(77)  # Flickr30k's test; 78 is its train
    files[name]["images"][1]["flickr_url"] = address.format(78)
    files["vg/image_data.json"][1]["flickr_id"] = 77             # vg 2 is coco 25
    files.write()
    say = Silent()
    assert {p.name for p in read_pretraining(files.folder, say=say)["train"]} == {"vg 1", "vg 6"}
    assert "1 pictures of train2017 are in Flickr30k's val or test split" in str(say)


@pytest.mark.parametrize("sets,names", [(["coco"], {"coco 9", "coco 25"}), (["vg"], {"vg 1", "vg 2", "vg 6"})])
def test_one_set_alone(files, sets, names):
    found = read_pretraining(files.folder, sets, Silent())
    assert {p.name for p in found["train"]} == names


# ----------------------------------------------------------------------------------------------------------------
# Word pieces


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-")  # one piece each
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *letters, *(f"##{c}" for c in letters), "the", "cat", "un", "##able"]))
    return str(path)


def test_pieces_equal_transformers_bert_tokenizer(vocabulary):
    ours, theirs = Tokenizer(vocabulary), BertTokenizer(vocabulary)
    for text in ("The cats' hat.", "Unable, CAFÉ 12-3!", "", "naïve 中 ok", "don't  stop\tthe cat"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.decode(ours.encode("The cats.")) == theirs.decode(theirs("The cats.")["input_ids"],
                                                                  skip_special_tokens=True)


def test_a_long_sentence_is_cut_and_keeps_its_end(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    tokens = tokenizer.encode("cat " * 100)
    assert len(tokens) == 40 and tokens[0] == tokenizer.cls and tokens[-1] == tokenizer.sep


@pytest.mark.parametrize("lines,says", [
    (SPECIAL[:-1] + ["a"], r"has no \[MASK\]"), (SPECIAL + ["a", "a"], "1 pieces stand in it twice")])
def test_a_vocabulary_that_is_none(tmp_path, lines, says):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"--vocab {path}: {says}"):
        Tokenizer(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(str(tmp_path / "none.txt"))


# ----------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (333, 2000), (500, 500), (1200, 50)])
@pytest.mark.parametrize("short", [480, 800])
def test_sizes_follow_detrs_rule(size, short):
    height, width = resized(*size, short, 1333)
    scale = min(short / min(size), 1333 / max(size))
    assert abs(height - size[0] * scale) <= 0.5 and abs(width - size[1] * scale) <= 0.5
    assert min(height, width) <= short and max(height, width) <= 1333
    assert min(height, width) == short or max(height, width) == 1333


def test_boxes_follow_the_picture():
    image = np.zeros((60, 100, 3), np.uint8)
    image[12:48, 30:80] = 255  # cx .55, cy .5, w .5, h .6
    pixels = to_pixels(Image.fromarray(image), 96)
    assert pixels.shape == (3, 96, 160) and pixels.dtype == torch.uint8
    rows, columns = (pixels[0] > 127).nonzero().unbind(1)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    expected = torch.tensor([0.3 * 160, 0.2 * 96, 0.8 * 160, 0.8 * 96])
    assert (found - expected).abs().max() <= 1


def test_pictures_of_any_mode_become_rgb(tmp_path):
    for mode in ("L", "CMYK", "RGB"):
        path = str(tmp_path / f"{mode}.jpg")
        picture(path, mode=mode)
        assert to_pixels(load_picture(path), 32).shape[0] == 3


def test_padding_is_right_and_below():
    images, sizes = pad_pictures([torch.ones(3, 4, 6, dtype=torch.uint8), torch.ones(3, 5, 2, dtype=torch.uint8)])
    assert images.shape == (2, 3, 5, 6) and sizes.tolist() == [[4, 6], [5, 2]]
    assert images[0, :, :4, :6].all() and images[0, :, 4:].sum() == 0 and images[1, :, :, 2:].sum() == 0


# ----------------------------------------------------------------------------------------------------------------
# The four tasks' inputs


def test_masking_has_berts_proportions(vocabulary):
    tokenizer, rng = Tokenizer(vocabulary), random.Random(0)
    sentence = [tokenizer.cls, *range(5, 25), tokenizer.sep]
    chosen = masked = kept = places = none = 0
    repeats = 20000
    for _ in range(repeats):
        tokens, labels = mask_words(sentence, tokenizer, rng)
        assert labels[0] == labels[-1] == -1 and tokens[0] == tokenizer.cls and tokens[-1] == tokenizer.sep
        asked = [i for i, label in enumerate(labels) if label >= 0]
        assert all(labels[i] == sentence[i] for i in asked)
        assert all(tokens[i] == sentence[i] for i in range(len(sentence)) if i not in asked)
        places, chosen, none = places + 20, chosen + len(asked), none + (not asked)
        masked += sum(tokens[i] == tokenizer.mask for i in asked)
        kept += sum(tokens[i] == sentence[i] for i in asked)
    assert chosen / places == pytest.approx(0.15, abs=0.003)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / (len(tokenizer) - 5), abs=0.01)
    assert none / repeats == pytest.approx(0.85 ** 20, abs=0.01)  # each word on its own, so some sentences have none


@pytest.fixture
def pictures(tmp_path):
    """Sixteen pictures; some sentences belong to several, in other letters."""
    made = []
    for i in range(16):
        path = str(tmp_path / f"{i}.jpg")
        picture(path, size=(40 + 4 * (i % 3), 32))
        boxes = np.array([[0.5, 0.5, 0.2, 0.2]], np.float32)
        coco = (boxes, np.array([i % 3])) if i % 2 == 0 else None
        vg = (boxes, np.array([i % 3]), ((0, 2),)) if i % 2 or i == 0 else None
        sentences = [f"cat {i}", "The cat" if i % 2 else "the CAT", f"un {i} able"]
        made.append(Picture(f"coco {i}", path, (32, 40), sentences, coco, vg))
    return made


def training_set(pictures, vocabulary, **settings):
    settings = {"short_sides": (32, 48), "long_side": 64, **settings}
    return PretrainingSet(pictures, Tokenizer(vocabulary), 4, **settings)


def test_negatives_are_of_other_pictures_and_never_true_of_this_one(pictures, vocabulary):
    data = training_set(pictures, vocabulary, sentences_per_picture=2)
    tokenizer = data.tokenizer
    asked, hidden, words, accidents = Counter(), Counter(), Counter(), 0
    for index in range(16):
        known = {s.lower() for s in pictures[index].sentences}
        drawn = {data.other_sentence(index, random.Random(seed)) for seed in range(200)}
        assert len(drawn) > 5 and not {s.lower() for s in drawn} & known
    for epoch in range(150):
        for index in range(16):
            item = data[epoch, index]
            own = [tokenizer.encode(s) for s in pictures[index].sentences]
            assert all(c in own for c in item["captions"]) and item["captions"][0] != item["captions"][1]
            for tokens, labels, match in zip(item["tokens"], item["mlm_labels"], item["itm_labels"]):
                asked[match] += 1
                words[match] += len(tokens) - 2
                hidden[match] += tokens.count(tokenizer.mask)
                fits = [all(t == o or label == o for t, label, o in zip(tokens, labels, s)) for s in own
                        if len(s) == len(tokens)]
                if match:
                    assert any(fits)
                else:
                    assert set(labels) == {-1}
                    accidents += any(fits)  # a random piece in another's sentence may make it one of this picture's
    assert asked[1] / sum(asked.values()) == pytest.approx(0.5, abs=0.02) and accidents / asked[0] < 0.005
    # Were words hidden in matching sentences alone, ITM could be solved by looking for [MASK].
    assert hidden[0] / words[0] == pytest.approx(hidden[1] / words[1], abs=0.01) and hidden[0] > 0


def test_two_pictures_with_the_same_sentences_have_no_negative(pictures, vocabulary):
    for p in pictures:
        p.sentences = ["the cat"]
    data = training_set(pictures, vocabulary)
    assert all(data[0, i]["itm_labels"] == [1] for i in range(16))


def test_items_depend_on_seed_epoch_and_picture_alone(pictures, vocabulary):
    a, b = training_set(pictures, vocabulary), training_set(pictures, vocabulary)
    for key in ((0, 3), (4, 3), (0, 3)):
        x, y = a[key], b[key]
        assert torch.equal(x["image"], y["image"]) and x["tokens"] == y["tokens"]
    items = [a[epoch, 3] for epoch in range(30)]
    assert len({tuple(i["tokens"][0]) for i in items}) > 5 and {i["image"].shape[1] for i in items} == {32, 48}
    other = training_set(pictures, vocabulary, seed=1)
    assert any(other[epoch, 3]["tokens"] != item["tokens"] for epoch, item in enumerate(items))
    share = sum(a[e, i]["no_sentence"] for e in range(60) for i in range(16)) / 960
    assert share == pytest.approx(0.25, abs=0.05)


def test_a_picture_of_both_sets_trains_one_of_them_each_visit(pictures, vocabulary):
    data = training_set(pictures, vocabulary)
    targets = [data[epoch, 0]["target"] for epoch in range(60)]
    assert 15 < sum(t["source"] == "vg" for t in targets) < 45
    for t in targets:
        assert ("attributes" in t) == (t["source"] == "vg")
        assert t["source"] == "coco" or t["attributes"].tolist() == [[1, 0, 1, 0]]


def test_a_broken_picture_is_named_and_replaced(pictures, vocabulary):
    with open(pictures[4].file, "wb") as file:
        file.write(b"\xff\xd8\xff half a picture")
    data = training_set(pictures, vocabulary)
    item = data[0, 4]
    assert item["index"] == 5 and len(item["broken"]) == 1 and pictures[4].file in item["broken"][0]
    assert data[0, 5]["broken"] == []
    for p in pictures:
        os.remove(p.file)
    with pytest.raises(InputError, match="0.jpg: .*cannot be decoded"):
        data[0, 0]


def test_collation(pictures, vocabulary):
    data = training_set(pictures, vocabulary, sentences_per_picture=3)
    items = [data[0, i] for i in range(4)]
    batch = collate(items, data.tokenizer.pad)
    B, K, T = batch["tokens"].shape
    assert (B, K) == (4, 3) and batch["mlm_labels"].shape == (B, K, T) and batch["itm_labels"].shape == (B, K)
    assert batch["captions"].shape[:2] == (B, K) and batch["no_sentence"].dtype == torch.bool
    for b, item in enumerate(items):
        assert batch["sizes"][b].tolist() == list(item["image"].shape[1:])
        for k, tokens in enumerate(item["tokens"]):
            assert batch["tokens"][b, k].tolist() == tokens + [data.tokenizer.pad] * (T - len(tokens))
            assert batch["mlm_labels"][b, k, len(tokens):].eq(-1).all()


# ----------------------------------------------------------------------------------------------------------------
# Batches


def take(batches, n):
    return [batch for batch, _ in zip(batches, range(n))]


SHAPES = [(60 + i % 7, 90 - i % 11) for i in range(50)]


def test_an_epoch_is_each_picture_once_and_the_last_batch_is_filled_up():
    batches = take(Batches(SHAPES, 8), 14)
    for epoch in (0, 1):
        seen = Counter(i for batch in batches[7 * epoch:7 * epoch + 7] for e, i in batch)
        assert set(seen) == set(range(50)) and sum(seen.values()) == 56 and max(seen.values()) == 2
        assert {e for batch in batches[7 * epoch:7 * epoch + 7] for e, _ in batch} == {epoch}
    assert sorted(batches[:7]) != sorted([[(0, i) for _, i in b] for b in batches[7:]])


def test_processes_and_parts_share_the_same_batches():
    whole = take(Batches(SHAPES, 8, seed=5), 10)
    for world, parts in ((2, 1), (2, 2), (4, 2), (1, 4)):
        shared = [take(Batches(SHAPES, 8, seed=5, rank=rank, world=world, parts=parts), 10 * parts)
                  for rank in range(world)]
        for number, batch in enumerate(whole):
            pieces = [i for mine in shared for part in mine[number * parts:(number + 1) * parts] for i in part]
            assert sorted(pieces) == sorted(batch)
            assert all(len(part) == 8 // world // parts for mine in shared for part in mine)


@pytest.mark.parametrize("start", [0, 3, 7, 12])
def test_batches_go_on_where_a_run_stopped(start):
    assert take(Batches(SHAPES, 8, start=start), 9) == take(Batches(SHAPES, 8), start + 9)[start:]


def test_pictures_of_like_shape_go_together():
    shapes = [(64, random.Random(i).randrange(40, 160)) for i in range(640)]
    spread = [max(w) - min(w) for w in ([shapes[i][1] for _, i in batch] for batch in take(Batches(shapes, 8), 80))]
    assert sum(spread) / len(spread) < 12
