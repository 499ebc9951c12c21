"""The paper's tables, one command each: train and fine-tune what a table needs, measure it, write it down.

    python tests/tables.py --table 3 --mini --seeds 3 --output results     # on the miniature world, from nothing
    python tests/tables.py --table 3 --mini --rows all "no detection" --output two         # some of a table's rows
    python tests/tables.py --table few --mini --output results             # the same with few examples to fine-tune on
    python tests/tables.py --table recipe --mini --output results          # what helps beyond the paper's recipe
    python tests/tables.py --table parts --mini --output results           # what the miniature's owes to each part
    python tests/tables.py --table 3 --data DIR --gpus 8 --output tables   # real data, the paper's sizes, by torchrun
    python tests/tables.py --table 3 --data DIR --gpus 8 --dry-run         # its commands, and nothing else
    python tests/tables.py --write README.md --output results              # a file's tables renewed, nothing run

Each run is one command line of pretrain.py or finetune.py. One that has ended is kept in OUTPUT/runs/NAME.json with all
of its validations, and serves every table that needs it; one that was stopped goes on where it was. Checkpoints are
in --work; they are needed only as long as something is to be fine-tuned from them.

Runs are compared by the pictures that they have seen, not by the clock: a slower machine needs longer and finds the
same. OUTPUT/tableN.json has means, standard deviations and all values over the seeds, OUTPUT/tableN.md the same beside
the paper's figures, OUTPUT/tableN.html the curves too.
"""

import argparse
import fcntl
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from html import escape

import torch
from bench import (  # which puts the root on the path
    ROOT,
    Canvas,
    bottom_up_attention,
    checked,
    medians,
    ours,
    pixel_bert_model,
    pixels,
    processor,
    sentences,
)

import shapes
from data import HelpFormatter, InputError, command, parse_json, read_text, write_safely
from evaluate import chart, check_output, fill_page
from finetune import DEFAULTS, MINI
from model import E2EVLP, load_checkpoint


@dataclass(frozen=True)
class Run:
    """One training, without its seed: a pre-training, or a fine-tuning that starts from one (or from nothing)."""
    name: str
    script: str
    words: tuple
    start: "Run | None" = None
    gone: bool = False  # its flags are no more; what was measured stays


@dataclass
class Table:
    """What a table compares: rows of measures, each the key of a run's last validation."""
    title: str
    heads: dict                                 # measure -> its heading
    rows: list = field(default_factory=list)    # (name, {measure: (Run, key)}, {measure: the paper's figure})
    reference: str = ""                         # the row that the others are compared with
    sizes: dict = field(default_factory=dict)   # row -> (height, width) of which a question's time is measured
    note: str = ""                              # what a reader of its figures has to know

    def runs(self):
        """All that is to be trained, each once, after what it starts from."""
        own = [run for _, cells, _ in self.rows for run, _ in cells.values()]
        return list(dict.fromkeys(r for run in own for r in (run.start, run) if r is not None))


# ----------------------------------------------------------------------------------------------------------------
# What the tables need

# Passes over its examples that a fine-tuning takes in the miniature, for each 25,600 pictures of --budget
PASSES = {"vqa": 4, "nlvr2": 8, "caption": 2, "flickr30k": 6, "detection": 4}
# Of VQA's and NLVR2's official training sets, and the miniature's
EXAMPLES = {"vqa": (443_757, 12_000), "nlvr2": (86_373, 1_500)}
# Table 3: the losses that a pre-training leaves out. Without objects there is nothing to have attributes.
WITHOUT = {"all": (), "no captioning": ("caption",), "no attributes": ("attributes",), "no detection": ("detection",),
           "words alone": ("detection", "caption")}
PAPER_3 = {"all": (70.76, 72.12), "no captioning": (70.20, 71.59), "no attributes": (69.92, 70.92),
           "no detection": (68.85, 70.38)}
# The recipe: the paper's has one sentence a picture, 15 % of the words hidden, losses weighed alike, rates that drop
# once and no warm-up; the miniature's sizes and learning rates are common to all. An idea differs from it in one thing.
PAPER_RECIPE = ("--sentences-per-picture", "1", "--schedule", "step", "--warmup", "0", "--cells", "0", "--mask-share",
                "0.15", "--mask-named", "0.15", "--loss-weights", "mlm=1", "itm=1", "caption=1", "attribute=1")
IDEAS = {
    "cosine schedule, warm-up": ("--schedule", "cosine", "--warmup", "WARM"),
    "2 sentences a picture": ("--sentences-per-picture", "2"),
    "4 sentences a picture": ("--sentences-per-picture", "4"),
    "8 sentences a picture": ("--sentences-per-picture", "8"),
    "40 % of the words hidden": ("--mask-share", "0.4", "--mask-named", "0.4"),
    "half of the names hidden": ("--mask-named", "0.5"),
    "words weigh 8 times": ("--loss-weights", "mlm=8", "itm=8", "caption=2", "attribute=2"),
    "cells are asked": ("--cells", "8"),
    "half without a sentence": ("--without-sentence", "0.5"),
    "16 pictures a step": ("--batch-size", "16"),
}
# Ideas that did not help, and whose code is gone: they were run at commit 82020d7, and their rows are those of the runs
# that were kept in results/. In turn: three sets of queries, each of which is matched with all objects; a loss between
# the encodings of picture alone and sentence alone, and ITM's wrong sentences drawn by it; an average of the weights.
TRIED = {"3 groups of queries": ("--query-groups", "3"),
         "contrastive, hard negatives": ("--contrastive", "1", "--hard-negatives"),
         "moving average of the weights": ("--ema", "0.99")}
TOGETHER = ("cosine schedule, warm-up", "4 sentences a picture", "words weigh 8 times", "cells are asked",
            "half of the names hidden")
# What --mini has beyond the paper's recipe, and how each part is undone
PARTS = {"step schedule, no warm-up": ("--schedule", "step", "--warmup", "0"),
         "1 sentence a picture": ("--sentences-per-picture", "1"),
         "words weigh as the rest": ("--loss-weights", "mlm=1", "itm=1", "caption=1", "attribute=1"),
         "cells not asked": ("--cells", "0"), "names hidden like other words": ("--mask-named", "0.15")}
TIMED = ("recipe", "parts")  # tables whose runs take the same time, not the same pictures
# What changes a step's time; the other ideas only change numbers
COSTLY = {"--sentences-per-picture", "--cells", "--batch-size"}
PRETRAINED = {"val_mlm_accuracy_visual": "words the picture decides", "blind_mlm_accuracy_visual": "the same, blind",
              "val_itm_accuracy": "ITM", "val_itm_accuracy_foil": "foils", "val_AP50": "AP50",
              "val_AP50_no_sentence": "AP50, no sentence", "val_attribute_accuracy": "attributes",
              "val_caption_objects": "captions true"}
# Not in the picture for a README
LEFT_OUT = {PRETRAINED[key] for key in ("blind_mlm_accuracy_visual", "val_itm_accuracy_foil", "val_AP50_no_sentence",
                                        "val_attribute_accuracy")}
# Whose smaller values are the better ones
TIMES = ("milliseconds", "picture", "reading", "together")
# What of a table's figures on real data is not the paper's
SPLITS = ("Ours are of val, and of VQA's pictures there pre-training has seen three quarters; the paper's are of VQA's "
          "test-dev and of Karpathy's test.")


def batch_of(words):
    """The pictures of a step, from the flags of a command line."""
    if "--batch-size" in words:
        return int(words[len(words) - words[::-1].index("--batch-size")])
    task = words[words.index("--task") + 1] if "--task" in words else None
    return (DEFAULTS[task] | (MINI[task] if "--mini" in words else {}))["batch_size"] if task else 32


class Plan:
    """The runs, at the size that --mini or its absence asks for, and the tables made of them."""

    def __init__(self, args):
        self.args, self.mini, self.budget = args, args.mini, args.budget

    def pretrain(self, name, *words, cost=1.0, gone=False):
        """cost: the time a picture takes, as a multiple; so many fewer are seen."""
        if self.mini:
            steps = max(1, round(self.budget / batch_of([*words, *self.args.words]) / cost))
            words = [str(steps // 10) if word == "WARM" else word for word in words]
            words = ("--mini", "--minutes", "0", "--steps", str(steps), "--val-every", str(-(-steps // 4)),
                     *(() if "--warmup" in words else ("--warmup", str(steps // 10))), "--workers", "0", *words)
        return Run(f"pretrain-{name}".replace(" ", "-"), "pretrain.py", tuple(words), gone=gone)

    def finetune(self, task, start, name, *words, often=1.0):
        """start: the pre-training to begin with; None: from nothing; often: more passes than usual."""
        if self.mini:
            passes = PASSES[task] * often * self.budget / 25_600
            # All pairs of retrieval's pictures and sentences take as long as a good part of its training
            every = passes / (2 if task == "flickr30k" else 4)
            examples = "0" if task in ("vqa", "nlvr2") else "400"  # 0: all that there are
            words = ("--mini", "--minutes", "0", "--epochs", f"{passes:g}", "--val-every", f"{every:g}",
                     "--val-examples", examples, "--workers", "0", "--checkpoint-minutes", "5", *words)
        elif often != 1:
            words = ("--epochs", f"{DEFAULTS[task]['epochs'] * often:g}", "--schedule", "cosine", *words)
        elif task == "flickr30k":  # the paper ranks all pictures; that takes as long as an epoch, so only at the end
            words = ("--val-examples", "0", "--val-every", str(DEFAULTS[task]["epochs"]), *words)
        return Run(f"{task}-{name}".replace(" ", "-"), "finetune.py", ("--task", task, *words), start)

    # -- the five tasks --------------------------------------------------------------------------------------------

    def full(self):
        """The pre-training of Tables 1, 2 and 6: everything, the largest model."""
        return self.pretrain("all") if self.mini else self.pretrain("r152", "--backbone", "r152")

    def scratch(self):
        return () if self.mini else ("--backbone", "r152")

    def compare(self, title, heads, paper):
        """A table of pre-trained, from nothing, and blind. heads: {"task.key": heading}."""
        table = Table(title, heads, reference="pre-trained", note="" if self.mini else SPLITS)
        start = self.full()
        tasks = {name.split(".")[0] for name in heads}
        tuned = {task: self.finetune(task, start, start.name.removeprefix("pretrain-")) for task in tasks}
        nothing = {task: self.finetune(task, None, "scratch", *self.scratch()) for task in tasks}

        def row(name, runs, kind, paper):
            cells = {m: (runs[m.split(".")[0]], f"{kind}_{m.split('.')[1]}") for m in heads}
            table.rows.append((name, cells, paper))

        row("pre-trained", tuned, "val", paper)
        row("from scratch" if self.mini else "from ImageNet's ResNet", nothing, "val", {})
        row("pre-trained, blind" + ", of 50 pictures" * ("flickr30k" in tasks), tuned, "blind", {})
        return table

    def table_1(self):
        return self.compare("Table 1: VQA, NLVR2 and captions", {
            "vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2", "caption.Bleu_4": "BLEU4", "caption.CIDEr": "CIDEr"},
            {"vqa.overall": 73.25, "nlvr2.accuracy": 77.25, "caption.Bleu_4": 36.2, "caption.CIDEr": 117.3})

    def table_2(self):
        keys = [f"{kind}@{n}" for kind in ("IR", "TR") for n in (1, 5, 10)]
        table = self.compare("Table 2: retrieval, Flickr30k", {f"flickr30k.{key}": key for key in keys}, dict(
            zip((f"flickr30k.{key}" for key in keys), (73.58, 92.42, 96.03, 86.24, 97.5, 98.92))))
        table.note = ("All rank 200 pictures and their 1,000 sentences, blind ranks 50 and 250." if self.mini else
                      "Ours rank the 1,014 pictures of val, the paper's the 1,000 of test; blind ranks 50.")
        return table

    def vqa_and_nlvr2(self, table, name, start, paper=(), *words, suffix=""):
        """A row: one pre-training, fine-tuned on the two tasks that Tables 3, 5 and 6 ask for."""
        cells = {}
        for task, key in (("vqa", "overall"), ("nlvr2", "accuracy")):
            run = self.finetune(task, start, start.name.removeprefix("pretrain-") + suffix, *words)
            cells[f"{task}.{key}"] = (run, f"val_{key}")
        table.rows.append((name, cells, dict(zip(cells, paper))))

    def ablations(self):
        """{row of Table 3: its pre-training}. The miniature's recipe also asks the grid's cells for objects' words
        (--cells), which goes where detection or attributes go; the last row is without that, all as the paper has it.
        """
        size = () if self.mini else ("--backbone", "r50", "--encoder-layers", "6")
        starts = {name: self.pretrain(name if tasks or self.mini else "r50-6", *size,
                                      *(("--without", *tasks) if tasks else ())) for name, tasks in WITHOUT.items()}
        return {**starts, "all, cells not asked": self.pretrain("no cells", "--cells", "0")} if self.mini else starts

    def table_3(self):
        table = Table("Table 3: pre-training without each of the visual tasks", {
            "vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}, reference="all", note=(
            "Pre-trained by the miniature's recipe, whose `--cells` goes with detection and attributes; NLVR2 keeps "
            "the pre-trained ResNet as it is." if self.mini else SPLITS))
        for name, start in self.ablations().items():
            self.vqa_and_nlvr2(table, name, start, PAPER_3.get(name, ()))
        return table

    def table_few(self):
        """Table 3 with 1, 10 and 100 % of the examples to fine-tune on: many may hide what was learnt before."""
        measures = {"vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}
        table = Table("Table 3 with fewer examples to fine-tune on", {
            f"{measure}@{share}": f"{head}, {share} %" for measure, head in measures.items() for share in (1, 10, 100)},
            reference="all", note="The few examples are the first ones, the same for every seed.")
        for name, start in self.ablations().items():
            cells = {}
            for measure, share in ((m, s) for m in measures for s in (1, 10, 100)):
                task, key = measure.split(".")
                often = (100 / share) ** 0.75  # a tenth of the examples has 56 % of the steps, a hundredth 32 %
                few = ()
                if share < 100:  # whole pictures, of NLVR2 whole statements: four examples each
                    few = ("--train-examples", str(-(-EXAMPLES[task][self.mini] * share // 400) * 4))
                    few += ("--warmup", str(round(50 * often * share / 100))) if self.mini else ()
                stem = start.name.removeprefix("pretrain-") + ("" if share == 100 else f"-{share}-percent")
                run = self.finetune(task, start, stem, *few, often=often)
                cells[f"{measure}@{share}"] = run, f"val_{key}"
            table.rows.append((name, cells, {}))
        return table

    def table_4(self):
        """Nothing to train; `stage_times` measures it."""
        return Table("Table 4: time of a question about a picture of 600 x 1000 pixels, by stages", {
            "picture": "picture, ms", "reading": "reading, ms", "together": "together, ms"}, [
            ("E2E-VLP, r152", {}, {"together": 192}), ("Pixel-BERT, r152", {}, {"together": 201}),
            ("two steps: Faster R-CNN, LXMERT", {}, {"together": 496})], reference="E2E-VLP, r152")

    def table_5(self):
        table = Table("Table 5: layers of the encoder and the ResNet", {
            "vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}, note="" if self.mini else SPLITS)
        paper = iter(((70.56, 72.12), (71.42, 74.34), (72.23, 76.21), (71.34, 73.04), (72.43, 75.23), (73.25, 77.25)))
        for layers in ((3, 6) if self.mini else (6, 12)):
            for backbone in (("r18", "r34") if self.mini else ("r50", "r101", "r152")):
                words = ("--backbone", backbone, "--encoder-layers", str(layers))
                name = {"r18-3": "all", "r152-12": "r152"}.get(f"{backbone}-{layers}", f"{backbone}-{layers}")
                start = self.pretrain(name, *(() if name == "all" else words[:2] if name == "r152" else words))
                self.vqa_and_nlvr2(table, f"{layers} layers, {backbone}", start, () if self.mini else next(paper))
        table.reference = table.rows[0][0]
        return table

    def table_6(self):
        table = Table("Table 6: size of the pictures in fine-tuning", {
            "vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}, note="Times are three repeats in one process. " + (
            "NLVR2 keeps the ResNet as it was pre-trained, on pictures of 64 x 96." if self.mini else SPLITS))
        sizes = {(448, 448): (71.14, 75.43), (448, 746): (72.04, 75.79), (600, 1000): (73.08, 76.87),
                 (800, 1333): (73.25, 77.25)}
        start = self.full()
        for (short, long), paper in ({(32, 48): (), (48, 72): (), (64, 96): ()} if self.mini else sizes).items():
            own = (short, long) in ((64, 96), (800, 1333))  # at which it is fine-tuned for the other tables too
            self.vqa_and_nlvr2(table, f"{short} x {long}", start, paper, *(() if own else (
                "--short-sides", str(short), "--long-side", str(long))), suffix="" if own else f"-{short}x{long}")
            table.sizes[f"{short} x {long}"] = short, long
        table.reference = f"{short} x {long}"
        return table

    def table_7(self):
        table = Table("Table 7: detection, with the sentence and without", {
            f"detection.{key}": key for key in ("AP", "AP50", *(() if self.mini else ("APs", "APm", "APl")))},
            reference="pre-trained, sentence")  # the miniature's objects are all small
        start = self.full()
        own = start.name.removeprefix("pretrain-")
        alone = self.finetune("detection", start, f"{own}-no-sentence", "--text", "none")
        nothing = self.finetune("detection", None, "scratch", *self.scratch())
        plain = self.finetune("detection", None, "scratch-no-sentence", "--text", "none", *self.scratch())
        scratch, of_detr = "from scratch" if self.mini else "from ImageNet's ResNet", (40.6, 61.6, 19.9, 44.3, 60.2)
        rows = [("pre-trained, sentence", self.finetune("detection", start, own), (41.9, 62.6, 20.3, 45.6, 61.1)),
                ("pre-trained, no sentence", alone, ()), (f"{scratch}, sentence", nothing, ()),
                (f"{scratch}, no sentence", plain, of_detr if self.mini else ())]
        if not self.mini:
            rows.append(("DETR's size: r50, 6 layers, 300 epochs, no sentence", self.finetune(
                "detection", None, "detr", "--text", "none", "--backbone", "r50", "--encoder-layers", "6", "--epochs",
                "300", "--schedule", "cosine"), of_detr))
        for name, run, paper in rows:
            cells = {m: (run, f"val_{m.split('.')[1]}") for m in table.heads}
            table.rows.append((name, cells, dict(zip(cells, paper))))
        return table

    def recipe(self, costs):
        """Each idea alone, and those that help together, against the paper's recipe in the same time."""
        table = Table("Recipe: what helps beyond the paper's, in the same time", PRETRAINED, reference="the paper's",
                      note="The same time as measured side by side over 20 steps of each, to a tenth.")
        for name, words in {**self.ideas(), **TRIED}.items():
            gone = name in TRIED
            run = self.pretrain(f"recipe-{re.sub('[^a-z0-9 ]', '', name)}", *(PAPER_RECIPE if gone else ()), *words,
                                cost=costs.get(name, 1.0), gone=gone)
            table.rows.append((name, {key: (run, key) for key in PRETRAINED}, {}))
        return table

    def parts(self, costs):
        """The other way round, and long enough for words to be learnt: the miniature's recipe without each part."""
        table = Table("Recipe: the miniature's without each of its parts, and the paper's, in the same time",
                      PRETRAINED, reference="the miniature's", note="As for the ideas one at a time, but longer.")
        one = costs.get("4 sentences a picture", 1.0)
        runs = {"the miniature's": self.full(), **{name: self.pretrain(
            "no cells" if name == "cells not asked" else f"parts-{name.replace(',', '')}", *words,
            cost=1 / one if name == "1 sentence a picture" else 1.0) for name, words in PARTS.items()}}
        runs["the paper's"] = self.pretrain("parts-the-papers", *PAPER_RECIPE, cost=1 / costs.get("together", 1.0))
        table.rows = [(name, {key: (run, key) for key in PRETRAINED}, {}) for name, run in runs.items()]
        return table

    def table(self, number, costs=None):
        """The table that --table names, with the rows that --rows does; costs: Runner.costs, for those that compare in
        the same time.
        """
        table = getattr(self, number)(costs or {}) if number in TIMED else getattr(self, f"table_{number}")()
        names, wanted = [name for name, *_ in table.rows], self.args.rows or ()
        for name in wanted:
            if name not in names:
                raise InputError(f"--rows {name!r}: table {number} has none of that name; there are: "
                                 f"{', '.join(map(repr, names))}")
        table.rows = [row for row in table.rows if not wanted or row[0] in wanted]
        return table

    def ideas(self):
        """{name: flags}; a flag that stands there twice counts as it stands last."""
        return {"the paper's": PAPER_RECIPE, **{name: (*PAPER_RECIPE, *words) for name, words in IDEAS.items()},
                "together": (*PAPER_RECIPE, *(word for name in TOGETHER for word in IDEAS[name]))}


# ----------------------------------------------------------------------------------------------------------------
# Running


class Runner:
    """Runs command lines, --jobs at once, and keeps what they measured in OUTPUT/runs."""

    def __init__(self, args):
        self.args = args
        self.kept = os.path.join(args.output, "runs")
        if not args.dry_run:
            check_output(self.kept, "--output")

    def folder(self, run, seed):
        return os.path.join(self.args.work, f"{run.name}-seed{seed}")

    def words(self, run, seed):
        """The command line that trains a run."""
        args = self.args
        words = [run.script, *run.words, "--data", args.data, "--seed", str(seed), *args.words]
        if run.script == "finetune.py":
            words += ["--init", os.path.join(self.folder(run.start, seed), "last.pt") if run.start else "none"]
        words += ["--output", self.folder(run, seed), "--resume", "auto"]
        return ["torchrun", f"--nproc_per_node={args.gpus}", *words] if args.gpus > 1 else ["python", *words]

    def read(self, run, seed):
        """What was kept of a run, or None. InputError if it was another run of this name."""
        path = os.path.join(self.kept, f"{run.name}-seed{seed}.json")
        if not os.path.exists(path):
            return None
        found = parse_json(read_text(path, "a run's measures"), path)
        self.check(run, found, path, "--output")
        return found

    def flags(self, run):
        return [*run.words, *self.args.words]

    def check(self, run, found, path, flag):
        """InputError unless what was written down of a run is of these flags, and of these that it starts from."""
        if (found["flags"], found.get("start")) != (self.flags(run), self.flags(run.start) if run.start else None):
            raise InputError(f"{path}: is of a run with other flags ({shlex.join(found['flags'])}); give another "
                             f"{flag}, or remove it")

    def claim(self, run, seed):
        """Take a run's folder: a descriptor whose lock holds as long as the run lives, even if this process does not.

        InputError if another run is in the folder, or left something there: --resume auto would go on with that.
        """
        folder = self.folder(run, seed)
        os.makedirs(folder, exist_ok=True)
        lock = os.open(os.path.join(folder, "lock"), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = os.path.join(folder, "run.json")
            if os.path.exists(path):
                self.check(run, parse_json(read_text(path, "a run's flags"), path), folder, "--work")
            elif os.path.exists(os.path.join(folder, "log.jsonl")):
                raise InputError(f"{folder}: holds a run of unknown flags; give another --work, or remove it")
            else:
                write_safely(path, in_lines({"flags": self.flags(run), "commit": commit(),
                                             "start": self.flags(run.start) if run.start else None}))
        except BlockingIOError:
            os.close(lock)
            raise InputError(f"{folder}: another run is in it; wait for its end, or stop it") from None
        except InputError:
            os.close(lock)
            raise
        return lock

    def keep(self, run, seed):
        """Write down what a run that has ended measured: all of its validations."""
        folder = self.folder(run, seed)
        with open(os.path.join(folder, "log.jsonl")) as file:
            lines = [json.loads(line) for line in file]
        with open(os.path.join(folder, "run.json")) as file:
            began = json.load(file)
        batch = batch_of(self.flags(run))
        curve = [{"pictures": line["step"] * batch, **{k: v if isinstance(v, int) else float(f"{v:.5g}")
                                                       for k, v in line.items() if k.startswith(("val_", "blind_"))}}
                 for line in lines if any(k.startswith("val_") for k in line)]
        found = {"name": run.name, "seed": seed, **began, "machine": machine(),
                 "hours": round(max(line.get("seconds", 0) for line in lines) / 3600, 4), "curve": curve}
        write_safely(os.path.join(self.kept, f"{run.name}-seed{seed}.json"), in_lines(found))
        if run.script == "finetune.py":  # nothing starts from it
            for name in ("last.pt", "previous.pt", "best.pt"):
                if os.path.exists(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))

    def missing(self, runs):
        """(run, seed) of what is still to be run, a seed after the other, so that all rows have one early."""
        missing = [(run, seed) for seed in range(self.args.seeds) for run in runs
                   if not run.gone and self.read(run, seed) is None]
        # What it starts from is needed again if its checkpoint is gone
        for run, seed in list(missing):
            start = (run.start, seed)
            if run.start and start not in missing and not os.path.exists(
                    os.path.join(self.folder(*start), "last.pt")):
                missing.insert(missing.index((run, seed)), start)
        return missing

    def all(self, keys, ended):
        """Train (run, seed), each after what it starts from; ended(run, seed) after each. InputError if one fails, with
        its last words; then, and when this process is stopped, the others are stopped too.
        """
        waiting, going, total = list(keys), {}, len(keys)
        try:
            while waiting or going:
                for key in [k for k in waiting if (k[0].start, k[1]) not in (*waiting, *going)]:
                    if len(going) < self.args.jobs:
                        waiting.remove(key)
                        lock = self.claim(*key)
                        try:
                            going[key] = self.start(*key, lock), time.time()
                        finally:
                            os.close(lock)
                time.sleep(0.2)
                for key in [k for k, (process, _) in going.items() if process.poll() is not None]:
                    process, began = going.pop(key)
                    run, seed = key
                    if process.returncode:
                        raise InputError(f"{run.name}, seed {seed}: ended with {process.returncode}: "
                                         f"{self.last_words(run, seed)}")
                    print(f"{total - len(waiting) - len(going)}/{total}  {run.name}, seed {seed}: "
                          f"{(time.time() - began) / 60:.1f} minutes", flush=True)
                    ended(run, seed)
        finally:
            for process, _ in going.values():
                if process.poll() is None:
                    process.terminate()  # it finishes its step and keeps a checkpoint
            for process, _ in going.values():
                process.wait()

    def start(self, run, seed, lock):
        folder, words = self.folder(run, seed), self.words(run, seed)
        words = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else []), *(
            os.path.join(ROOT, word) if word == run.script else word for word in words[1:])]
        # Side by side: a thread each, so that two of them do not take turns with four
        threads = str(max(1, (os.cpu_count() or 1) // self.args.jobs)) if self.args.mini else None
        environment = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})}
        with open(os.path.join(folder, "output.txt"), "a") as log:
            return subprocess.Popen(words, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                    pass_fds=(lock,))

    def last_words(self, run, seed):
        path = os.path.join(self.folder(run, seed), "output.txt")
        lines = [line.strip() for line in read_text(path, "what a run said").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'it said nothing'} ({path})"

    def costs(self, ideas):
        """{idea: what a picture takes, as a multiple of the paper's recipe}: 20 steps of each, taking turns.

        Kept in OUTPUT/costs.json, for it must stay as it was when the runs were made whose lengths it decides.
        """
        path = os.path.join(self.args.output, "costs.json")
        costs = parse_json(read_text(path, "costs of ideas"), path) if os.path.exists(path) else {}
        names = [name for name in ideas if name not in costs and (
            name not in IDEAS or COSTLY.intersection(IDEAS[name]))]
        if not names:
            return costs
        plain, speeds = next(iter(ideas)), {}
        runs = {Run(f"cost-{list(ideas).index(name)}", "pretrain.py", (
            "--mini", "--minutes", "0", "--steps", "21", "--log-every", "20", "--val-pictures", "1", "--workers", "0",
            *("2" if word == "WARM" else word for word in ideas[name]))): name
            for name in dict.fromkeys([plain, *names])}

        def ended(run, turn):
            with open(os.path.join(self.folder(run, turn), "log.jsonl")) as file:
                speeds.setdefault(runs[run], []).extend(
                    line["pictures_per_second"] for line in map(json.loads, file)
                    if line["step"] == 20 and "loss" in line)

        self.all([(run, turn) for turn in range(3) for run in runs], ended)
        speeds = {name: statistics.median(found) for name, found in speeds.items()}
        costs.update({name: round(speeds[plain] / speeds[name], 3) for name in names})
        write_safely(path, json.dumps(costs, indent=1) + "\n")
        return costs


def in_lines(found):
    """A dict as JSON with a line for each value, and for each member of a list of dicts."""
    def text(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "]"
        return json.dumps(value)

    return "{" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in found.items())[1:] + "}\n"


def commit():
    """The source that is run, for the results; with a + if it has changes of its own."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine():
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {processor()}"
    return f"{where}, torch {torch.__version__.split('+')[0]}"


# ----------------------------------------------------------------------------------------------------------------
# Results


def gather(table, runner):
    """The rows of a table's JSON from the runs that have ended: {"name", "measures": {...}, "paper": {...}}."""
    rows = []
    for name, cells, paper in table.rows:
        measures = {}
        for measure, (run, key) in cells.items():
            kept = [found for seed in range(runner.args.seeds) if (found := runner.read(run, seed))]
            values = [found["curve"][-1][key] for found in kept if key in found["curve"][-1]]
            if values:
                measures[measure] = spread(values)
        if measures or not any(run.gone for run, _ in cells.values()):
            rows.append({"name": name, "measures": measures, "paper": paper})
    return rows


def spread(values):
    """{"mean", "std" (of a sample; 0 for a single value), "values"}."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "values": values}


def compared(measure, reference, smaller=False):
    """"+", "-" if every value is better, or worse, than every value of the reference; else "", within the spread.

    smaller: a smaller one is better. Of two kinds of three runs each that do not differ, one in ten is so by chance.
    """
    if len(measure["values"]) < 2 or len(reference["values"]) < 2:
        return ""
    signs = "-+" if smaller else "+-"
    if min(measure["values"]) > max(reference["values"]):
        return signs[0]
    return signs[1] if max(measure["values"]) < min(reference["values"]) else ""


def in_percent(measure, value):
    """As it is printed: VQA's accuracy and times are as they are, the rest is 100 times a fraction."""
    as_they_are = ("vqa.overall", "speed-up", *TIMES)
    return value if measure.startswith(as_they_are) else 100 * value


def markdown(result):
    """A table of OUTPUT/tableN.json as Markdown: mean ± deviation over the seeds, and the paper's figures."""
    heads, rows = result["heads"], result["rows"]
    reference = next((row["measures"] for row in rows if row["name"] == result["reference"]), {})
    paper = any(row["paper"] for row in rows)
    first = [""] + [head for head in heads.values()] + [f"paper: {head}" for measure, head in heads.items() if paper and
                                                        any(measure in row["paper"] for row in rows)]
    lines = [first, ["---"] * len(first)]
    for row in rows:
        cells = [row["name"]]
        for measure in heads:
            found = row["measures"].get(measure)
            if found is None:
                cells.append("")
                continue
            text = f"{in_percent(measure, found['mean']):.1f}"
            if len(found["values"]) > 1:
                text += f" ± {in_percent(measure, found['std']):.1f}"
            if row["name"] != result["reference"] and measure in reference and not measure.startswith("blind_"):
                mark = compared(found, reference[measure], measure in TIMES)
                text += f" ({mark})" if mark else ""
            cells.append(text)
        for measure in heads:
            if any(measure in other["paper"] for other in rows) and paper:
                cells.append(f"{row['paper'][measure]:g}" if measure in row["paper"] else "")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line).strip() + " |" for line in lines)


def curves(table, runner):
    """[(heading, top, [(row, [(pictures, mean over the seeds)])])]: each measure over what was seen until then.

    First those of the fine-tunings, or of the pre-trainings if that is what the table is about, then those of the
    pre-trainings that fine-tunings start from.
    """
    def line(run, key):
        kept = [found["curve"] for seed in range(runner.args.seeds) if (found := runner.read(run, seed))]
        return [(points[0]["pictures"], statistics.fmean(p[key] for p in points))
                for points in zip(*kept) if all(key in p for p in points)]

    found = [(head, [(name, line(*cells[measure])) for name, cells, _ in table.rows if measure in cells])
             for measure, head in table.heads.items()]
    starts = {name: run.start for name, cells, _ in table.rows for run, _ in cells.values() if run.start}
    if len(set(starts.values())) > 1:
        found += [(f"in pre-training: {head}", [(name, line(run, key)) for name, run in starts.items()])
                  for key, head in PRETRAINED.items()]
    largest = [max((y for _, points in lines for _, y in points), default=None) for _, lines in found]
    return [(head, 1 if most <= 1 else 2 if most <= 2 else 100, lines)  # shares, CIDEr, and VQA's percent
            for (head, lines), most in zip(found, largest) if most is not None]


def page(result, drawn):
    """OUTPUT/tableN.html: the table, and the curves as inline SVG."""
    head, _, *rows = [[escape(cell.strip()) for cell in line.strip("|").split("|")]
                      for line in markdown(result).splitlines()]
    body = "".join(f"<tr><th scope=row>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
                   for row in rows)
    charts = "".join(chart(head, [(name, f"run{n % 8}" + " second" * (n // 8), points) for n, (name, points) in
                                  enumerate(lines)], top=top, unit="pictures seen") for head, top, lines in drawn)
    return fill_page(result["title"], summary(result), (
        '<section><h2 id="table">Table</h2><div class="wide" tabindex="0" role="region" aria-label="table"><table>'
        "<thead><tr>" + "".join(f"<th scope=col>{cell}</th>" for cell in head) + f"</tr></thead><tbody>{body}</tbody>"
        f'</table></div></section><section><h2 id="curves">Curves, over what was seen</h2><div class="charts">{charts}'
        "</div></section>"), {"table": "Table", "curves": "Curves"})


def summary(result):
    """What a table's figures are, in a sentence or two."""
    number = len(result["seeds"])
    kind, hours = (("seed", f"{result['hours']:.1f} hours of training, ") if result["hours"] else ("repeat", ""))
    text = f"{number} {kind}; {hours}{result['machine']}."
    if number > 1:
        text = f"{number} {kind}s, mean and standard deviation; {hours}{result['machine']}."
        chance = 2 / math.comb(2 * number, number)
        text += (f" (+), (-): all {number} are better, or worse, than all {number} of \"{result['reference']}\", else "
                 "within the spread" + (f"; by chance alone {chance:.0%} of comparisons have a sign." if result["hours"]
                                        else "."))
    return f"{text} {result.get('note', '')}".strip()


def draw_curves(path, drawn, title):
    """Small panels side by side, one a measure, as a PNG for the README."""
    drawn = [panel for panel in drawn if panel[0].split(": ")[-1] not in LEFT_OUT][:6]
    across = 2 if len(drawn) == 4 else min(3, len(drawn))
    down = -(-len(drawn) // across)
    names = [name for name, _ in drawn[0][2]]
    wide, high, legend = 400, 280, 50 + 26 * -(-len(names) // across)
    canvas = Canvas(wide * across + 20, high * down + legend + 40)
    canvas.text(20, 24, title, 20)

    def pen(number):  # the first row is what the others are compared with
        return canvas.COLOURS[number % len(canvas.COLOURS)], 3 if number else 5

    def stroke(number, points):  # the colours once over in dashes
        (canvas.line if number < len(canvas.COLOURS) else canvas.dashes)(points, *pen(number))

    for n, (head, top, lines) in enumerate(drawn):
        x0, y1 = 60 + n % across * wide, 70 + n // across * high + high - 80
        last = max(x for _, points in lines for x, _ in points)

        def place(x, y, x0=x0, y1=y1, last=last, top=top):
            return x0 + x / last * (wide - 80), y1 - y / top * (high - 90)

        canvas.text(x0, y1 - high + 74, head, 17)
        for share in (0, 0.25, 0.5, 0.75, 1):
            canvas.line([place(0, share * top), place(last, share * top)], "#e4e4e4", 1)
            canvas.text(x0 - 6, place(0, share * top)[1], f"{share * top:g}", 13, "rm")
            canvas.text(place(share * last, 0)[0], y1 + 16, f"{share * last / 1000:.0f}k", 13, "mm")
        for number, (_, points) in enumerate(lines):
            if points:  # a row that has not ended yet has none
                stroke(number, [place(*point) for point in points])
                canvas.dot(*place(*points[-1]), pen(number)[0])
    for number, name in enumerate(names):
        x, y = 60 + number % across * wide, high * down + 80 + 26 * (number // across)
        stroke(number, [(x, y), (x + 26, y)])
        canvas.text(x + 36, y, name, 15)
    canvas.save(path)


def write_tables(path, output):
    """Renew what stands in a Markdown file between <!-- table N --> and <!-- end --> from OUTPUT/tableN.json, and
    between <!-- table DIR/N --> and <!-- end --> from OUTPUT/DIR/tableN.json.
    """
    text = read_text(path, "a Markdown file")

    def renewed(found):
        source = os.path.join(output, found[1] or "", f"table{found[2]}.json")
        result = parse_json(read_text(source, "a table's results"), source)
        return (f"<!-- table {found[1] or ''}{found[2]} -->\n{markdown(result)}\n\n{summary(result)} Made by "
                f"`{result['command']}`.\n<!-- end -->")

    write_safely(path, re.sub(r"<!-- table (\w+/)?(\w+) -->\n.*?<!-- end -->", renewed, text, flags=re.S))


@torch.inference_mode()
def stage_times(table, repeats, quick=False):
    """Table 4: {row: {"picture", "reading", "together"}}, milliseconds; each value is the median of rounds in turns."""
    args = argparse.Namespace(rounds=3, quick=quick, device="cuda" if torch.cuda.is_available() else "cpu")
    (images, sizes), tokens = pixels(args, 600, 1000), sentences(args, 1)
    model = ours(args, backbone="r152", task="vqa", answers=3129)
    functions = []
    for look, read in ((lambda images: model.encode_picture(images, sizes), model.answer_questions),
                       pixel_bert_model(args), bottom_up_attention(args)):
        seen = look(images)
        checked(read(seen, tokens), 1, 3129)
        functions += [lambda look=look: look(images), lambda seen=seen, read=read: read(seen, tokens),
                      lambda look=look, read=read: read(look(images), tokens)]
    times = iter(zip(*(medians(args, *functions) for _ in range(repeats))))
    return {name: {key: spread([1000 * t for t in next(times)]) for key in ("picture", "reading", "together")}
            for name, *_ in table.rows}


def question_times(table, path):
    """Table 6's speed: {row: {"milliseconds", "speed-up"}} of one question about a picture, the sizes in turns.

    path: a checkpoint of the model.
    """
    config = load_checkpoint(path)["config"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = E2EVLP(config).to(device).eval()
    tokens = torch.randint(config.vocabulary, (1, 14), device=device)
    functions = []
    for height, width in table.sizes.values():
        images = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device)
        sizes = torch.tensor([[height, width]])
        functions.append(lambda images=images, sizes=sizes: model.read(model.encode_picture(images, sizes), tokens))
    with torch.inference_mode():
        for function in functions:
            function()
        rounds = [medians(argparse.Namespace(rounds=20, quick=False, device=device), *functions) for _ in range(3)]
    times = [[1000 * t for t in each] for each in zip(*rounds)]
    largest = statistics.median(times[-1])
    return {name: {"milliseconds": spread(own), "speed-up": spread([largest / statistics.median(own)])}
            for name, own in zip(table.sizes, times)}


def make(number, args):
    """Train what a table needs, and write its JSON, Markdown and page, anew whenever a run has ended."""
    plan, runner = Plan(args), Runner(args)
    table = plan.table(number, runner.costs(plan.ideas()) if number in TIMED else None)
    stem = os.path.join(args.output, f"table{number}")

    def times():
        """What was timed, or None: nothing is, or not yet. Kept, for the machine may be busy when it is asked again."""
        path = os.path.join(args.output, f"times{number}.json")
        model = os.path.join(runner.folder(plan.full(), 0), "last.pt")
        if os.path.exists(path):
            return parse_json(read_text(path, "a table's times"), path)
        if number != "4" and not (number == "6" and os.path.exists(model)):
            return None
        rows = stage_times(plan.table_4(), args.seeds) if number == "4" else question_times(table, model)
        found = {"commit": commit(), "machine": machine(), "rows": rows}
        write_safely(path, json.dumps(found, indent=1) + "\n")
        return found

    def write(timed=None):
        result = {"table": int(number) if number.isdigit() else number, "title": table.title, "heads": table.heads,
                  "note": table.note, "reference": table.reference, "rows": gather(table, runner),
                  "seeds": list(range(args.seeds))}
        kept = [found for run in table.runs() for seed in range(args.seeds) if (found := runner.read(run, seed))]
        if number == "6" and timed:
            result["heads"] = {**table.heads, "milliseconds": "ms a question", "speed-up": "speed-up"}
        for row in result["rows"]:
            row["measures"].update(timed["rows"][row["name"]] if timed else {})
        whole = [*kept, timed] if timed else kept
        result.update({"command": shlex.join(["python", "tests/tables.py", *args.asked]),
                       "commit": ", ".join(dict.fromkeys(found["commit"] for found in whole)),
                       "machine": "; ".join(dict.fromkeys(found["machine"] for found in whole)),
                       "hours": round(sum(found["hours"] for found in kept), 2)})
        drawn = curves(table, runner)
        write_safely(f"{stem}.json", in_lines(result))
        write_safely(f"{stem}.md", markdown(result) + "\n")
        write_safely(f"{stem}.html", page(result, drawn))
        if args.picture and drawn:
            draw_curves(args.picture, drawn, table.title)

    def ended(run, seed):
        runner.keep(run, seed)
        write()

    runner.all(runner.missing(table.runs()), ended)
    write(times())
    print(read_text(f"{stem}.md", "a table"))


def show(number, args):
    """--dry-run: the commands in an order in which they can run."""
    plan, runner = Plan(args), Runner(args)
    table = plan.table(number)
    for seed in range(args.seeds):
        for run in table.runs():
            if not run.gone:
                print(shlex.join(runner.words(run, seed)))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--table", nargs="+", choices=("1", "2", "3", "few", "4", "5", "6", "7", *TIMED), default=[],
                        help="which; what they share is trained once")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these of its rows (default: all)")
    parser.add_argument("--mini", action="store_true", help="on the miniature world, which is written to --data")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--budget", type=int, default=25_600, metavar="PICTURES",
                        help="--mini: pictures that a pre-training sees; a fine-tuning's passes grow with it")
    parser.add_argument("--jobs", type=int, default=2, metavar="N",
                        help="--mini: runs at a time, on equal shares of the cores")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of a run, by torchrun")
    parser.add_argument("--data", metavar="DIR", help="the data sets (default: data/mini with --mini, else data)")
    parser.add_argument("--output", default="results", metavar="DIR", help="tables, and what was measured in each run")
    parser.add_argument("--work", metavar="DIR", help="the runs' folders (default: runs/tables)")
    parser.add_argument("--picture", metavar="FILE", help="draw the table's curves into this PNG")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--write", metavar="FILE", help="renew the tables in this Markdown file from --output's")
    parser.add_argument("words", nargs="*", metavar="FLAG", help="after --: more flags for each run")
    args = parser.parse_args(argv)
    args.asked = sys.argv[1:] if argv is None else list(argv)
    if not args.table and not args.write:
        raise InputError("give --table, or --write FILE")
    for flag in ("seeds", "budget", "jobs", "gpus"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    for name in set(TIMED).intersection(args.table) if not args.mini else ():
        raise InputError(f"--table {name}: is the miniature's; give --mini")
    args.data = args.data or ("data/mini" if args.mini else "data")
    args.work = args.work or os.path.join("runs", "tables")
    args.jobs = args.jobs if args.mini else 1
    return args


def main(argv=None):
    def work(stop):
        args = parse(argv)
        if args.mini and args.table and not args.dry_run and not os.path.exists(args.data):
            print(f"writing the miniature world to {args.data}", flush=True)
            shapes.write_world(args.data, flag="--data")
        for number in args.table:
            (show if args.dry_run else make)(number, args)
        if args.write and not args.dry_run:
            write_tables(args.write, args.output)

    return command("tables.py", work)


if __name__ == "__main__":
    sys.exit(main())
