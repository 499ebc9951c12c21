"""Readers on records with the real sets' flaws, word pieces, transforms, the four tasks' inputs, batches."""

import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter

import bench
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from transformers import BertTokenizer

import data as data_module
from data import (
    IMAGE_MEAN,
    IMAGE_STD,
    SHORT_SIDES,
    Batches,
    Example,
    InputError,
    Picture,
    PretrainingSet,
    TaskSet,
    Tokenizer,
    collate,
    collate_task,
    common_answers,
    first_decodable,
    index_pretraining,
    index_task,
    load_picture,
    mask_words,
    other_sentence,
    pad_pictures,
    read_coco,
    read_karpathy,
    read_nlvr2,
    read_pretraining,
    read_task,
    read_vg,
    resized,
    stream,
    to_pixels,
)
from evaluate import Phrases, ptb_words, questions

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


INSTANCES, CAPTIONS = (f"coco/annotations/{what}_train2017.json" for what in ("instances", "captions"))


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
     "has no usable picture number"),
    # Kinds of values that have no place in a set or a dictionary, in an array or in UTF-8
    (INSTANCES, lambda f: f["images"][0].update(width=10 ** 400), "'width' is '1000"),
    (INSTANCES, lambda f: f["images"][0].update(width=10 ** 9), "image 9: height and"),
    (INSTANCES, lambda f: f["annotations"][0].update(bbox=[1, 1, 10 ** 400, 1]),
     "annotation 90: bbox"),
    (INSTANCES, lambda f: f["annotations"][0].update(category_id=[]), "'category_id'"),
    (INSTANCES, lambda f: f["categories"][0].update(name=None), "'name' is 'None'"),
    (INSTANCES, lambda f: f["categories"][0].update(name="bus"), "has different categories"),
    ("coco/annotations/instances_val2017.json", lambda f: f["images"][0].update(id={}), "'id' is '{}'"),
    (CAPTIONS, lambda f: f["annotations"][0].update(image_id=[]), "'image_id'"),
    (CAPTIONS, lambda f: f["annotations"][0].update(caption="\ud800"), "'caption' is"),
    ("vg/image_data.json", lambda f: f[0].update(height=0), "image 1: height and width are (0, 40)"),
    ("vg/image_data.json", lambda f: f[0].update(coco_id=[]), "'coco_id' is '[]'"),
    ("vg/objects.json", lambda f: f[0].update(image_id=[]), "'image_id' is '[]'"),
    ("vg/objects.json", lambda f: f[0]["objects"][0].update(names=3), "'names' is '3'"),
    ("vg/objects.json", lambda f: f[0]["objects"][0].update(object_id={}), "'object_id' is '{}'"),
    ("vg/attributes.json", lambda f: f[0]["attributes"][0].update(attributes=3), "'attributes' is '3'"),
    ("vg/attributes.json", lambda f: f[0]["attributes"][0].update(object_id=[]), "'object_id' is '[]'"),
    ("vg/region_descriptions.json", lambda f: f[0].update(id=[]), "'id' is '[]'"),
    ("coco/dataset_coco.json", lambda f: f["images"][1].update(cocoid=[]), "has no usable picture number")])
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


@pytest.mark.parametrize("name", ["vg/objects_vocab.txt", "coco/annotations/captions_train2017.json"])
def test_a_file_that_is_not_utf_8(files, name):
    with open(f"{files.folder}/{name}", "wb") as file:
        file.write("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match=f"{name}: is not text in UTF-8"):
        read_pretraining(files.folder, say=Silent())


@pytest.mark.parametrize("line,says", [
    ("[1]", "expected a list of records"), ("\xe9", "not text in UTF-8"), ("[" * 99999, "not valid JSON"),
    ({"identifier": 7, "sentence": "a"}, "'identifier' is '7'"), ({"identifier": "a-b", "sentence": "a"}, "a-b"),
    ({"identifier": "a-0-0-0", "sentence": "\ud800"}, "'sentence' is"),
    ({"identifier": "a-0-0-0", "sentence": "a", "label": 3}, "label '3'"),
    ({"identifier": "a-0-0-0", "sentence": "a", "directory": "\0"}, "leads out of its folder")])
def test_a_line_of_nlvr2_that_cannot_be_used(tmp_path, line, says):
    os.mkdir(tmp_path / "nlvr2")
    path = tmp_path / "nlvr2" / "train.json"
    path.write_bytes((line if isinstance(line, str) else json.dumps(line)).encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_task("nlvr2", str(tmp_path), "train")
    assert says in str(error.value) and str(path) in str(error.value)


def test_a_question_that_nobody_has_answered(tmp_path):
    path = str(tmp_path / "vqa" / "v2_mscoco_train2014_annotations.json")
    write(path.replace("mscoco_", "OpenEnded_mscoco_").replace("annotations", "questions"), {"questions": [
        {"question_id": 5, "image_id": 1, "question": "why?"}]})
    write(path, {"annotations": [{"question_id": 5, "answers": []}]})
    with pytest.raises(InputError, match=f"{path}: question 5: has no answers"):
        read_task("vqa", str(tmp_path), "train")


def test_a_message_is_one_line_whatever_a_name_holds(capsys):
    def work(stop):
        raise InputError("a\nb\x1b[2J\ud800: " + "x" * 9999)

    assert data_module.command("data.py", work) == 2
    said = capsys.readouterr().err
    assert said.startswith("data.py: a\\nb\\x1b[2J\\ud800: xxx") and said.count("\n") == 1 and len(said) < 2000


@pytest.mark.parametrize("flag", ["--index", "--json"])
def test_a_path_that_is_too_deep_to_make(files, flag, capsys):
    code = data_module.main(["--data", files.folder, flag, "a/" * 3000])
    said = capsys.readouterr()
    assert code == (2 if flag == "--json" else 0) and "cannot be written" in said.out + said.err


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
    files["vg/region_descriptions.json"][0]["regions"] += [
        {"phrase": " "}, {"phrase": None}, {"phrase": "a\u00e9 \n"}, {"phrase": "\u7ea2\u8272 12"},
        *({"phrase": text, "x": x, "y": 1, "width": 2, "height": 3} for text, x in (("a", 1), ("A ", 1), ("a", 2)))]
    files.write()
    say = Silent()
    pictures, same, objects, attributes = read_vg(files.folder, say)
    boxes, labels, of_boxes = pictures[1].vg
    assert labels.tolist() == [1, 0] and of_boxes == [(0, 1), ()]
    np.testing.assert_allclose(boxes, [[8 / 40, 6 / 30, 8 / 40, 6 / 30], [2.5 / 40, 2.5 / 30, 5 / 40, 5 / 30]],
                               rtol=1e-6)
    assert pictures[1].sentences == ["region of 1", "a\u00e9", "a", "a"]
    assert "of 13 sentences left out 2 empty, 1 without a Latin letter, 1 there twice with the same box" in str(say)
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
    assert [by_name[name].captions for name in ("coco 9", "coco 25", "vg 1")] == [2, 2, 0]
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
    files["vg/image_data.json"][1]["flickr_id"] = None           # COCO's record alone tells where it is from
    files[name]["images"][0]["flickr_url"] = address.format(78)
    files[name]["images"][1]["flickr_url"] = address.format(77)
    files.write()
    assert {p.name for p in read_pretraining(files.folder, say=say)["train"]} == {"coco 9", "vg 1", "vg 6"}


def test_a_name_of_two_classes_means_the_first(files):
    """The vocabularies of bottom-up-attention have such names; the first line is the class that is more frequent."""
    files["vg/objects_vocab.txt"] = "person,man\nautomobile,car,cars\nvehicle,car,man\n"
    files["vg/attributes_vocab.txt"] = "red\nlarge,big\nhuge,big,red\n"
    files.write()
    boxes, labels, attributes = read_vg(files.folder, Silent())[0][1].vg
    assert labels.tolist() == [1] and attributes == [(0, 1)]


@pytest.mark.parametrize("sets,names", [(["coco"], {"coco 9", "coco 25"}), (["vg"], {"vg 1", "vg 2", "vg 6"})])
def test_one_set_alone(files, sets, names):
    found = read_pretraining(files.folder, sets, Silent())
    assert {p.name for p in found["train"]} == names


# ----------------------------------------------------------------------------------------------------------------
# The tasks' records


def test_karpathys_restval_is_trained_on(files):
    """113,287 pictures of train and restval together, as everybody trains captioning."""
    files["coco/dataset_coco.json"]["images"] = [
        {"cocoid": number, "split": split, "filepath": "train2014", "sentences": [{"raw": f" {split} "}]}
        for number, split in ((9, "train"), (25, "val"), (30, "restval"))]
    files.write()
    assert [(e.id, e.sentences) for e in read_karpathy(files.folder, "coco", "train")] == [
        (9, ("train",)), (30, ("restval",))]
    assert [e.id for e in read_karpathy(files.folder, "coco", "val")] == [25]


def test_nlvr2_is_read_as_it_is(world):
    with open(f"{world}/nlvr2/dev.json", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    examples = read_nlvr2(world, "dev")
    assert [(e.id, e.text, e.target) for e in examples] == [
        (r["identifier"], r["sentence"], int(r["label"] == "True")) for r in lines]
    name = f"{world}/nlvr2/images/dev/{lines[0]['identifier'][:-2]}"
    assert examples[0].files == (f"{name}-img0.png", f"{name}-img1.png")


def test_answers_in_the_list_are_those_given_nine_times():
    assert common_answers({"red": 9, "blue": 8, "a": 10}) == ["a", "red"]


def test_the_target_of_an_answer_is_its_score(world, vocabulary):
    """Bottom-up-attention's: of n people, 0.3, 0.6, 0.9, 1. It is the official score but for the last of ten sets."""
    said = ["red"] + ["two"] * 2 + ["Blue"] * 3 + ["no"] * 4
    data = TaskSet("vqa", index_task("vqa", world, "val")["examples"], Tokenizer(vocabulary),
                   ["2", "blue", "green", "no", "red"])
    target = data.target(Example(1, (), answers=tuple(said)))
    torch.testing.assert_close(target, torch.tensor([0.6, 0.9, 0.0, 1.0, 0.3]))


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_the_first_examples_alone(world, vocabulary, task):
    examples = index_task(task, world, "val")["examples"]
    first = TaskSet(task, examples, Tokenizer(vocabulary), sentences_per_picture=2, most=5)
    assert sorted(e.id for n in range(len(first)) for e in first.item(n)) == sorted(examples[n].id for n in range(5))
    assert len(first.sizes) == len(first) <= 5
    everything = TaskSet(task, examples, Tokenizer(vocabulary), most=10 ** 6)
    assert sum(len(everything.item(n)) for n in range(len(everything))) == len(examples)


def test_a_pictures_sentences_are_drawn_anew_at_each_visit(world, vocabulary):
    data = TaskSet("flickr30k", index_task("flickr30k", world, "val")["examples"], Tokenizer(vocabulary),
                   short_sides=[32], long_side=48)
    drawn = [data[epoch, 0, 0]["tokens"] for epoch in range(40)]
    assert len({str(tokens) for tokens in drawn}) == 5 and data[7, 0, 0]["tokens"] == drawn[7]


def test_left_pictures_come_first_in_a_batch():
    items = [{"images": [torch.full((3, 2, 2), 10 * n + side, dtype=torch.uint8) for side in (0, 1)],
              "tokens": [[2, 3]], "targets": [1], "ids": [n], "broken": []} for n in range(3)]
    batch = collate_task(items, 0)
    assert batch["images"][:, 0, 0, 0].tolist() == [0, 10, 20, 1, 11, 21] and batch["picture"].tolist() == [0, 1, 2]


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


def test_pixels_are_normalised_as_imagenets_weights_expect():
    theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    assert list(IMAGE_MEAN) == theirs.mean and list(IMAGE_STD) == theirs.std


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


def test_odd_pictures(tmp_path):
    """What Pillow alone would get wrong, each against what a viewer shows."""
    path = str(tmp_path / "a.png")
    Image.fromarray(np.full((4, 6), 257 * 100, np.uint16)).save(path)  # 16 bits
    assert np.asarray(load_picture(path)).tolist() == [[[100] * 3] * 6] * 4
    Image.new("RGBA", (6, 4), (10, 20, 30, 0)).save(path)  # wholly transparent: white, not the colour beneath
    assert load_picture(path).getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (6, 4), (0, 255)).save(path)
    assert load_picture(path).getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(path)
    assert load_picture(path).getpixel((0, 0)) == (200, 0, 0)
    palette.save(path, transparency=1)
    assert load_picture(path).getpixel((0, 0)) == (255, 255, 255)
    palette.save(str(tmp_path / "a.gif"), save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
    assert load_picture(str(tmp_path / "a.gif")).getpixel((0, 0)) == (200, 0, 0)
    cmyk = str(tmp_path / "a.jpg")
    Image.new("CMYK", (6, 4), (0, 0, 0, 0)).save(cmyk, quality=95)
    assert min(load_picture(cmyk).getpixel((0, 0))) > 250


def test_rotations_that_only_a_tag_asks_for_are_not_made(tmp_path):
    """COCO's boxes are for the pixels as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert load_picture(str(tmp_path / "a.jpg")).size == (40, 30)


def test_pictures_cut_off_or_too_large_are_errors(tmp_path, monkeypatch):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)).save(path)
    with open(path, "rb") as file:
        half = file.read()[:5000]
    with open(path, "wb") as file:
        file.write(half)
    with pytest.raises(InputError, match="a.jpg: image file is truncated.* cannot be decoded"):
        first_decodable(lambda i: [path], 0, 1)
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(InputError, match="a.jpg: .*decompression bomb.* cannot be decoded"):
        first_decodable(lambda i: [path], 0, 1)


@pytest.mark.parametrize("size,short", [((480, 640), 800), ((640, 427), 480), ((333, 500), 608), ((900, 701), 64)])
def test_pictures_are_resized_as_pillow_does(size, short):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    height, width = resized(*size, short)
    pillow = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    found = to_pixels(image, short)
    assert found.dtype == torch.uint8 and found.shape == (3, height, width)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    path, x = str(tmp_path / "a.jpg"), np.linspace(0, 255, 2000)
    smooth = np.stack(np.broadcast_arrays(x, x[:1500, None], x[::-1]), -1).astype(np.uint8)
    Image.fromarray(smooth).save(path, quality=95)
    small = load_picture(path, 300, 500)
    assert small.size == (500, 375)  # a quarter, no smaller than the 300 x 400 that it is to become
    whole, quick = (to_pixels(image, 300, 500).float() for image in (load_picture(path), small))
    assert whole.shape == quick.shape == (3, 300, 400) and (whole - quick).abs().max() < 6
    assert load_picture(path, 800, 1333).size == (2000, 1500)


def test_padding_is_right_and_below():
    images, sizes = pad_pictures([torch.ones(3, 4, 6, dtype=torch.uint8), torch.ones(3, 5, 2, dtype=torch.uint8)])
    assert images.shape == (2, 3, 5, 6) and sizes.tolist() == [[4, 6], [5, 2]]
    assert images[0, :, :4, :6].all() and images[0, :, 4:].sum() == 0 and images[1, :, :, 2:].sum() == 0


# ----------------------------------------------------------------------------------------------------------------
# The four tasks' inputs


@pytest.mark.parametrize("caption", [
    "a man's red t-shirt.", "they don't know, and she'll say it's a close-up", "two dogs' tails, and a cat's",
    "a black-and-white cat; the boys' dog's 5-year-old t-shirt"])
def test_words_survive_word_pieces(caption):
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,;'-"]
    tokenizer = Tokenizer([*SPECIAL, *letters, *(f"##{letter}" for letter in letters)], max_tokens=80)
    assert ptb_words(tokenizer.decode(tokenizer.encode(caption))) == ptb_words(caption)


def test_masking_has_berts_proportions(vocabulary):
    tokenizer, rng = Tokenizer(vocabulary), random.Random(0)
    sentence = [tokenizer.cls, *range(5, 25), tokenizer.sep]
    chosen = masked = kept = places = single = 0
    shown = set()
    repeats = 20000
    for _ in range(repeats):
        tokens, labels = mask_words(sentence, tokenizer, rng)
        assert labels[0] == labels[-1] == -1 and tokens[0] == tokenizer.cls and tokens[-1] == tokenizer.sep
        asked = [i for i, label in enumerate(labels) if label >= 0]
        assert all(labels[i] == sentence[i] for i in asked)
        assert all(tokens[i] == sentence[i] for i in range(len(sentence)) if i not in asked)
        shown |= {tokens[i] for i in asked}
        assert asked
        places, chosen, single = places + 20, chosen + len(asked), single + (len(asked) == 1)
        masked += sum(tokens[i] == tokenizer.mask for i in asked)
        kept += sum(tokens[i] == sentence[i] for i in asked)
    none = 0.85 ** 20  # each word on its own, and one where that would be none
    assert chosen / places == pytest.approx(0.15 + none / 20, abs=0.002)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / (len(tokenizer) - 5), abs=0.01)
    # A random [PAD] would be masked, a random [SEP] end the sentence
    assert shown == {tokenizer.mask, *range(len(SPECIAL), len(tokenizer))}
    assert single / repeats == pytest.approx(20 * 0.15 * 0.85 ** 19 + none, abs=0.01)
    assert mask_words([tokenizer.cls, tokenizer.sep], tokenizer, rng) == ([tokenizer.cls, tokenizer.sep], [-1, -1])


def test_words_that_name_something_have_a_share_of_their_own(vocabulary):
    tokenizer, rng, hidden = Tokenizer(vocabulary), random.Random(0), Counter()
    sentence = [tokenizer.cls, *range(5, 25), tokenizer.sep]
    for _ in range(5000):
        labels = mask_words(sentence, tokenizer, rng, share=0.1, named=frozenset({7, 9}), named_share=0.6)[1]
        hidden.update(label for label in labels if label >= 0)
    for word in range(5, 25):
        assert hidden[word] / 5000 == pytest.approx(0.6 if word in (7, 9) else 0.1, abs=0.03)


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


def test_a_wrong_sentence_is_of_the_kind_that_it_stands_for(pictures):
    captions, descriptions = ("a", "b", "c"), ("x", "y", "z")
    for i, p in enumerate(pictures):  # in turns of COCO alone, of both, of Visual Genome alone
        p.sentences = [f"{word} {i}" for word in (captions, captions + descriptions, descriptions)[i % 3]]
        p.captions = (3, 3, 0)[i % 3]
    rng = random.Random(0)
    for index, caption in itertools.product(range(16), (True, False)):
        drawn = {other_sentence(pictures, index, caption, rng) for _ in range(200)}
        assert {s.split()[0] for s in drawn} == set(captions if caption else descriptions)
        assert len(drawn) > 20 and str(index) not in {s.split()[1] for s in drawn}
    for p in pictures[1:]:
        p.sentences, p.captions = p.sentences[:p.captions] or ["a"], p.captions or 1
    assert other_sentence(pictures, 0, False, rng) is None


def test_training_and_validation_draw_wrong_sentences_of_the_same_kind(pictures, vocabulary):
    for i, p in enumerate(pictures):
        p.sentences, p.captions = (["cat"] * 4, 4) if i % 2 else ([f"un {'able ' * (i + 2)}"] * 4, 0)
    trained = training_set(pictures, vocabulary, sentences_per_picture=4, masks={"share": 0, "named_share": 0})
    lengths = {True: set(), False: set()}
    for index in range(16):
        for tokens, match in zip(trained[0, index, 0]["tokens"], trained[0, index, 0]["itm_labels"]):
            if not match:
                lengths[index % 2 == 1].add(len(tokens))
    tokenizer = trained.tokenizer
    names = {"coco": ["cat", "dog", "cow"], "vg": [], "attributes": []}
    for index, q in enumerate(questions(pictures, Phrases(names), tokenizer)):
        lengths[index % 2 == 1].update(len(tokens) for tokens, match in q["itm"] if not match)
    assert not lengths[True] and min(lengths[False]) > 4  # each caption is "cat", so none can be a wrong one


def test_negatives_are_of_other_pictures_and_never_true_of_this_one(pictures, vocabulary):
    data = training_set(pictures, vocabulary, sentences_per_picture=2)
    tokenizer = data.tokenizer
    asked, hidden, words, accidents = Counter(), Counter(), Counter(), 0
    for index in range(16):
        known = {s.lower() for s in pictures[index].sentences}
        drawn = {other_sentence(pictures, index, False, random.Random(seed)) for seed in range(200)}
        assert len(drawn) > 5 and not {s.lower() for s in drawn} & known
    for epoch in range(150):
        for index in range(16):
            item = data[epoch, index, 0]
            own = [tokenizer.encode(s) for s in pictures[index].sentences]
            assert all(c in own for c in item["captions"]) and item["captions"][0] != item["captions"][1]
            for tokens, labels, match in zip(item["tokens"], item["mlm_labels"], item["itm_labels"]):
                asked[match] += 1
                words[match, len(tokens)] += len(tokens) - 2
                hidden[match, len(tokens)] += tokens.count(tokenizer.mask)
                fits = [all(t == o or label == o for t, label, o in zip(tokens, labels, s)) for s in own
                        if len(s) == len(tokens)]
                if match:
                    assert any(fits)
                else:
                    assert set(labels) == {-1}
                    accidents += any(fits)  # a random piece in another's sentence may make it one of this picture's
    assert asked[1] / sum(asked.values()) == pytest.approx(0.5, abs=0.02) and accidents / asked[0] < 0.005
    # Were words hidden in matching sentences alone, ITM could be solved by looking for [MASK].
    often = {length for _, length in words if min(words[0, length], words[1, length]) > 1000}
    assert len(often) > 1
    for n in often:
        assert hidden[0, n] / words[0, n] == pytest.approx(hidden[1, n] / words[1, n], abs=0.05) and hidden[0, n] > 0


def test_targets_tell_the_words_of_each_object(pictures, vocabulary):
    words = {"coco": [[5], [6, 7], [8]], "vg": [[9], [10], [11]], "attributes": [[12], [13], [14, 15], [16]]}
    data = training_set(pictures, vocabulary, words=words)
    of_coco, of_vg = data[0, 4, 0]["target"], data[0, 5, 0]["target"]  # kind 1; kind 2 with attributes 0 and 2
    assert of_coco["words"].tolist() == [6, 7] and of_coco["word_rows"].tolist() == [0, 0]
    assert of_vg["words"].tolist() == [11, 12, 14, 15] and of_vg["word_rows"].tolist() == [0, 0, 0, 0]
    assert "words" not in training_set(pictures, vocabulary)[0, 4, 0]["target"]


def test_two_pictures_with_the_same_sentences_have_no_negative(pictures, vocabulary):
    for p in pictures:
        p.sentences = ["the cat"]
    data = training_set(pictures, vocabulary)
    assert all(data[0, i, 0]["itm_labels"] == [1] for i in range(16))


def test_items_depend_on_seed_epoch_and_picture_alone(pictures, vocabulary):
    a, b = training_set(pictures, vocabulary), training_set(pictures, vocabulary)
    for key in ((0, 3, 7), (4, 3, 0), (0, 3, 1)):
        x, y = a[key], b[key]
        assert torch.equal(x["image"], y["image"]) and x["tokens"] == y["tokens"]
    items = [a[epoch, 3, epoch] for epoch in range(30)]
    assert len({tuple(i["tokens"][0]) for i in items}) > 5 and {i["image"].shape[1] for i in items} == {32, 48}
    other = training_set(pictures, vocabulary, seed=1)
    assert any(other[epoch, 3, epoch]["tokens"] != item["tokens"] for epoch, item in enumerate(items))
    share = sum(a[e, i, 0]["no_sentence"] for e in range(60) for i in range(16)) / 960
    assert share == pytest.approx(0.25, abs=0.05)


def test_a_picture_of_both_sets_trains_one_of_them_each_visit(pictures, vocabulary):
    data = training_set(pictures, vocabulary)
    targets = [data[epoch, 0, 0]["target"] for epoch in range(60)]
    assert 15 < sum(t["source"] == "vg" for t in targets) < 45
    for t in targets:
        assert ("attributes" in t) == (t["source"] == "vg")
        assert t["source"] == "coco" or t["attributes"].tolist() == [[1, 0, 1, 0]]


def test_a_broken_picture_is_named_and_replaced(pictures, vocabulary):
    with open(pictures[4].file, "wb") as file:
        file.write(b"\xff\xd8\xff half a picture")
    data = training_set(pictures, vocabulary)
    item = data[0, 4, 0]
    assert item["index"] == 5 and len(item["broken"]) == 1 and pictures[4].file in item["broken"][0]
    assert data[0, 5, 0]["broken"] == []
    for p in pictures:
        os.remove(p.file)
    with pytest.raises(InputError, match="0.jpg: .*cannot be decoded"):
        data[0, 0, 0]


def test_collation(pictures, vocabulary):
    data = training_set(pictures, vocabulary, sentences_per_picture=3)
    items = [data[0, i, 0] for i in range(4)]
    batch = collate(items, data.tokenizer.pad)
    B, K, T = batch["tokens"].shape
    assert (B, K) == (4, 3) and batch["itm_labels"].shape == (B, K)
    assert batch["captions"].shape[:2] == (B, K) and batch["no_sentence"].dtype == torch.bool
    for b, item in enumerate(items):
        assert batch["sizes"][b].tolist() == list(item["image"].shape[1:])
        for k, tokens in enumerate(item["tokens"]):
            assert batch["tokens"][b, k].tolist() == tokens + [data.tokenizer.pad] * (T - len(tokens))
    hidden = {((b * K + k) * T + t, word) for b, item in enumerate(items)
              for k, labels in enumerate(item["mlm_labels"]) for t, word in enumerate(labels) if word >= 0}
    assert hidden == set(zip(batch["mlm_places"].tolist(), batch["mlm_words"].tolist()))
    assert len(hidden) == len(batch["mlm_places"]) > 0


# ----------------------------------------------------------------------------------------------------------------
# Batches


def take(batches, n):
    return [batch for batch, _ in zip(batches, range(n))]


SHAPES = [(60 + i % 7, 90 - i % 11) for i in range(50)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("n", [61, 120, 997])
def test_each_pass_has_each_picture_once(world, n):
    """Whatever divides into what: from five passes' batches on all processes, each picture of the first four once."""
    batch = 2 * world
    each = [take(Batches(SHAPES[:1] * n, batch, rank=rank, world=world), math.ceil(5 * n / batch))
            for rank in range(world)]
    assert {len(share) for batches in each for share in batches} == {2}
    seen = Counter((epoch, i) for batches in each for share in batches for epoch, i, _ in share)
    for epoch in range(4):
        assert [seen[epoch, i] for i in range(n)] == [1] * n


def test_passes_have_orders_of_their_own_and_a_batch_one_draw():
    batches = take(Batches(SHAPES, 10), 10)
    assert {frozenset(i for _, i, _ in b) for b in batches[:5]} != {frozenset(i for _, i, _ in b) for b in batches[5:]}
    assert all(len({draw for _, _, draw in b}) == 1 for b in batches) and len({b[0][2] for b in batches}) == 10


def test_processes_and_parts_share_the_same_batches():
    whole = take(Batches(SHAPES, 8, seed=5), 10)
    for world, parts in ((2, 1), (2, 2), (4, 2), (1, 4)):
        shared = [take(Batches(SHAPES, 8, seed=5, rank=rank, world=world, parts=parts), 10 * parts)
                  for rank in range(world)]
        for number, batch in enumerate(whole):
            pieces = [i for mine in shared for part in mine[number * parts:(number + 1) * parts] for i in part]
            assert sorted(pieces) == sorted(batch)
            assert all(len(part) == 8 // world // parts for mine in shared for part in mine)


@pytest.mark.parametrize("start", [0, 3, 7, 12, 29])
@pytest.mark.parametrize("times,piece", [(1, 1), (8, 12)])
def test_batches_go_on_where_a_run_stopped(start, times, piece):
    batches = Batches(SHAPES * times, 8, start=start)
    assert batches.piece == piece
    assert take(batches, 20) == take(Batches(SHAPES * times, 8), start + 20)[start:]


def test_pictures_of_like_shape_go_together():
    shapes = [(64, random.Random(i).randrange(40, 160)) for i in range(640)]
    spread = [max(w) - min(w) for w in ([shapes[i][1] for _, i, _ in batch] for batch in take(Batches(shapes, 8), 80))]
    assert sum(spread) / len(spread) < 12


def test_little_is_padded():
    """Sizes as photographs have them: most 4:3 or 3:2, a fifth upright; against batches drawn at random."""
    rng = random.Random(0)
    common = [(480, 640)] * 8 + [(427, 640)] * 7 + [(640, 480)] * 3 + [(640, 427)] * 2 + [(640, 640)]
    shapes = [rng.choice(common) if rng.random() < 0.7 else (rng.randrange(300, 640), 640) for _ in range(3000)]

    def wasted(batches):
        cells = used = 0
        for batch in batches:
            sizes = [resized(*shapes[i], SHORT_SIDES[draw % len(SHORT_SIDES)]) for _, i, draw in batch]
            cells += len(batch) * max(-(-h // 32) for h, _ in sizes) * max(-(-w // 32) for _, w in sizes)
            used += sum(-(-h // 32) * -(-w // 32) for h, w in sizes)
        return 1 - used / cells

    ours = wasted(take(Batches(shapes, 32, parts=8), 8 * 90))
    random_ones = [[(0, rng.randrange(3000), rng.randrange(1000)) for _ in range(4)] for _ in range(720)]
    assert ours < 0.06 and wasted(random_ones) > 0.3


# ----------------------------------------------------------------------------------------------------------------
# The index


def same(a, b):
    """Are two Pictures or Examples the same, arrays and all?"""
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def same_items(packed, items):
    return len(packed) == len(items) and all(
        same([getattr(a, k) for k in a.__slots__ if k != "size"], [getattr(b, k) for k in b.__slots__ if k != "size"])
        for a, b in zip(packed, items))


def test_the_index_equals_a_direct_read(world, tmp_path):
    found, read = index_pretraining(world, folder=str(tmp_path), say=Silent()), read_pretraining(world, say=Silent())
    assert same_items(found["train"], read["train"]) and same_items(found["val"], read["val"])
    assert found["names"] == read["names"] and found["sentences"] == sum(len(p.sentences) for p in read["train"])
    assert found["train"].sizes.tolist() == [list(p.size) for p in read["train"]]
    for task, split in itertools.product(("vqa", "nlvr2", "caption", "flickr30k", "detection"), ("train", "val")):
        found = index_task(task, world, split, str(tmp_path), Silent())
        examples, categories = read_task(task, world, split, Silent())
        assert same_items(found["examples"], examples) and found["categories"] == categories
        for n, e in enumerate(examples):
            sizes = []
            for file in e.files:
                with Image.open(file) as image:
                    sizes.append([image.height, image.width])
            if task == "nlvr2":  # a frame that has room for both, once their short sides are alike
                sizes = [[max(round(1000 * size[side] / min(size)) for size in sizes) for side in (0, 1)]]
            assert [found["examples"].sizes[n].tolist()] == sizes
            assert (found["examples"].groups[n] == found["examples"].groups[0]) == (e.files == examples[0].files)
    again = copy.copy(found["examples"])  # as a worker that is not forked gets it, by __reduce__
    assert again[-1].id == examples[-1].id and [e.id for e in again[1:3]] == [e.id for e in examples[1:3]]


def test_the_index_is_read_again_only_when_a_source_changes(files, tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(data_module, "read_pretraining", lambda *words: times.append(1) or read_pretraining(*words))
    folder, said = str(tmp_path / "index"), [Silent(), Silent()]
    first, again = (index_pretraining(files.folder, folder=folder, say=say) for say in said)
    assert len(times) == 1 and same_items(first["train"], again["train"]) and said[0] == said[1] != []
    files["coco/annotations/captions_train2017.json"]["annotations"][0]["caption"] = "another"
    files.write("coco/annotations/captions_train2017.json")
    changed = index_pretraining(files.folder, folder=folder, say=Silent())
    assert len(times) == 2 and any("another" in p.sentences for p in changed["train"])
    assert len([name for name in os.listdir(folder) if "." not in name]) == 1  # the stale one is gone
    os.remove(f"{files.folder}/coco/train2017/{25:012d}.jpg")
    assert "coco 25" in {p.name for p in changed["train"]}
    assert "coco 25" not in {p.name for p in index_pretraining(files.folder, folder=folder, say=Silent())["train"]}


def test_an_index_cut_short_leaves_nothing_that_is_read(world, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module.os, "rename", killed)
        patch.setattr(data_module.shutil, "rmtree", lambda *_, **__: None)  # as if no handler had run: kill -9
        with pytest.raises(KeyboardInterrupt):
            index_pretraining(world, folder=str(tmp_path), say=Silent())
    assert any(name.endswith(".unfinished") for name in os.listdir(tmp_path))
    assert len(index_pretraining(world, folder=str(tmp_path), say=Silent())["train"]) == 64
    assert not any(name.endswith(".unfinished") for name in os.listdir(tmp_path))


def test_two_processes_at_once_read_once(world, tmp_path):
    script = """
import sys, time, data
read = data.read_pretraining
data.read_pretraining = lambda *words: (time.sleep(2), print("reads"), read(*words))[2]
print(len(data.index_pretraining(sys.argv[1], folder=sys.argv[2])["train"]))
"""
    running = [subprocess.Popen([sys.executable, "-c", script, world, str(tmp_path)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0].splitlines() for process in running]
    assert sorted(line for lines in said for line in lines if line in ("reads", "64")) == ["64", "64", "reads"]
    assert sum("another process is reading" in line for lines in said for line in lines) == 1


def test_who_waited_for_a_reader_that_failed_does_not_read_again(world, tmp_path):
    script = """
import sys, time, data
def read(*words):
    print("reads", flush=True)
    time.sleep(2)
    raise data.InputError("this file: is broken")
data.read_pretraining = read
try:
    data.index_pretraining(sys.argv[1], folder=sys.argv[2])
except data.InputError as error:
    print(error)
"""
    running = [subprocess.Popen([sys.executable, "-c", script, world, str(tmp_path)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE) for _ in range(3)]
    said = [line for process in running for line in process.communicate()[0].splitlines()]
    assert said.count("reads") == 1 and said.count("this file: is broken") == 3
    assert len(index_pretraining(world, folder=str(tmp_path), say=Silent())["train"]) == 64


def test_two_data_folders_can_share_an_index_folder(files, world, tmp_path):
    for _ in range(2):
        for data in (files.folder, world):
            index_pretraining(data, folder=str(tmp_path / "index"), say=Silent())
    assert len([name for name in os.listdir(tmp_path / "index") if "." not in name]) == 2


def test_a_broken_picture_with_many_questions_is_tried_once(tmp_path):
    path, good = str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    picture(good)
    images, index, broken = first_decodable(lambda i: [path] if i < 40 else [good], 3, 41)
    assert len(images) == 1 and index == 40 and len(broken) == 1


def test_an_index_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--index .*file: cannot be written .* another folder with --index DIR"):
        index_pretraining(world, folder=str(tmp_path / "file"), say=Silent())
    with pytest.raises(InputError, match="--data nowhere: no such folder"):
        index_pretraining("nowhere", say=Silent())


def test_lists_are_streamed_as_json_reads_them(tmp_path, monkeypatch):
    path = str(tmp_path / "list.json")
    rng = random.Random(0)
    for n in (0, 1, 3, 400):
        found = [{"number": i, "text": "}],[ \u00e9\"" * rng.randrange(400), "deep": [{"a": [1.5, None]}]}
                 for i in range(n)]
        for indent in (None, 1):
            with open(path, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=indent, ensure_ascii=n == 3)
                file.write("\n")
            assert list(stream(path, "a test")) == found
    for text, says in (("[{}", "cut off"), ("[{} {}]", "no comma"), ("[{}] x", "more after"), ("3", "list of records"),
                       ("[1, 2]", "list of records"), ('[{"a": 1},]', "cut off"), ("", "not valid JSON"),
                       ('[{"a": tru', "cut off")):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(InputError, match=says):
            list(stream(path, "a test"))
    with pytest.raises(InputError, match="not found, needed for a test"):
        list(stream(str(tmp_path / "none.json"), "a test"))


class Reads(torch.utils.data.Dataset):
    """Reads the record it is asked for; gives its process's own memory in MB."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __getitem__(self, key):
        assert len(self.pictures[key[1]].sentences) > 30
        return bench.private_memory() if key[1] % 100 == 0 else -1.0


def test_a_workers_memory_stays_flat(tmp_path):
    """A tenth of full size: 18,000 pictures with 600,000 sentences, 2,000 batches of a loader worker."""
    script = "import sys; sys.path.insert(0, 'tests'); import bench; bench.synthetic(sys.argv[1], 18_000, 600_000)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)
    pictures = data_module.indexed(f"{tmp_path}/data", None, "synthetic", [], None)["train"]
    batches = take(Batches(pictures.sizes, 32), 2000)
    loader = torch.utils.data.DataLoader(Reads(pictures), batch_sampler=batches, num_workers=1)
    used = [float(value) for batch in loader for value in batch if value >= 0]
    assert len(used) > 100 and max(used) - used[0] < 50
