"""The paper's Tables 1 to 7 on the miniature world: train what a table needs, measure, write.

    python tests/tables.py --table 3 --mini --seeds 3 --output results   # hours; may be stopped

Each run is a command line of pretrain.py or finetune.py. What one that has ended measured is kept
in OUTPUT/runs and serves every table that needs it; one that was stopped is resumed.
Checkpoints are in --work, as long as something is to be fine-tuned from them. Table 4, of times, is
measured at once.

Runs are compared by the images that they have seen, not by the clock: a slower machine needs longer
and finds the same. OUTPUT/tableN.json has means, deviations and all values over the seeds, with the
paper's figures, OUTPUT/tableN.png the curves. In OUTPUT/README.md what stands between
`<!-- table N -->` and `<!-- end -->` is renewed.
"""

import argparse
import glob
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from bench import (ROOT, bottom_up_attention, medians, our_vqa,  # puts the root on the path
                   pixel_bert_model, pixels, processor, sentences)
from matplotlib.figure import Figure

import shapes
from data import HelpFormatter, InputError, command, number
from pretrain import MINI
from tasks import TASKS


@dataclass(frozen=True)
class Run:
    """One training, without its seed."""

    name: str
    script: str
    flags: tuple
    start: "Run | None" = None  # the pre-training that a fine-tuning begins with
    hard: bool = False  # on the world of `shapes.py --hard`


@dataclass
class Table:
    """What a table compares."""

    title: str
    heads: dict                               # measure -> its heading
    rows: list = field(default_factory=list)  # (name, {measure: (Run, key of its log)}, paper's)
    reference: str = ""                       # the row that the others are compared with
    note: str = ""                            # what a reader of its figures has to know

    def add(self, name, cells, paper=()):
        """A row; paper: the paper's figures in the order of the heads."""
        self.rows.append((name, cells, dict(zip(self.heads, paper))))

    def runs(self):
        """All that is to be trained, each once; what needs no other first."""
        tuned = [run for _, cells, _ in self.rows for run, _ in cells.values()]
        starts = [run.start for run in tuned if run.start]
        return list(dict.fromkeys([*starts, *tuned]))


# --------------------------------------------------------------------------------------------------
# What the tables need

BATCH_SIZE = MINI["batch_size"]  # of a pre-training
# Passes over its examples that a fine-tuning takes for each 25,600 images of --budget
PASSES = {"vqa": 4, "nlvr2": 3, "caption": 2, "flickr30k": 6, "detection": 4}
# Table 3: the losses that a pre-training leaves out, and the paper's VQA and NLVR2. Without objects
# there is nothing to have attributes. The last row is without the loss that the paper has not.
ABLATIONS = {
    "all": ((), (70.76, 72.12)),
    "no captioning": (("--without", "caption"), (70.20, 71.59)),
    "no attributes": (("--without", "attributes"), (69.92, 70.92)),
    "no detection": (("--without", "detection"), (68.85, 70.38)),
    "words alone": (("--without", "detection", "caption"), ()),
    "all, no grid-word loss": (("--grid-word-loss", "0"), ())}
PRETRAINED = {"val_mlm_accuracy_visual": "words the image decides", "val_itm_accuracy": "ITM",
              "val_AP50": "AP50", "val_caption_objects": "captions true"}
UNDERSTANDING = {"vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}
STAGES = {"picture": "picture, ms", "reading": "reading, ms", "together": "together, ms"}


class Plan:
    """The runs at --budget, and the tables made of them."""

    def __init__(self, budget):
        self.budget = budget

    def pretrain(self, name, *flags):
        steps = max(1, self.budget // BATCH_SIZE)
        return Run(f"pretrain-{name}".replace(" ", "-").replace(",", ""), "pretrain.py", (
            "--mini", "--minutes", "0", "--steps", str(steps), "--val-every", str(-(-steps // 4)),
            "--warmup", str(steps // 10), "--workers", "0", *flags))

    def finetune(self, task, start, name="", *flags, hard=False):
        """start: the pre-training to begin with; None: from scratch; name: of what flags change."""
        passes = PASSES[task] * self.budget / 25_600
        # All pairs of retrieval's images and sentences take as long as a good part of its training
        every = passes / (2 if task == "flickr30k" else 4)
        origin = start.name.removeprefix("pretrain-") if start else "scratch"
        return Run(f"{task}-{origin}{name}", "finetune.py", (
            "--task", task, "--mini", "--minutes", "0", "--epochs", f"{passes:g}", "--val-every",
            f"{every:g}", "--val-examples", "0" if task in ("vqa", "nlvr2") else "400", "--workers",
            "0", "--checkpoint-minutes", "5", *flags), start, hard)

    def understanding(self, start, name="", *flags):
        """The cells of a row of Tables 3 and 6: one pre-training, fine-tuned on two tasks."""
        return {"vqa.overall": (self.finetune("vqa", start, name, *flags), "val_overall"),
                "nlvr2.accuracy": (self.finetune("nlvr2", start, name, *flags), "val_accuracy")}

    def compare(self, title, heads, paper, note=""):
        """Pre-trained, from scratch, and blind. heads: {"task.key": heading}."""
        table = Table(title, heads, reference="pre-trained", note=note)
        every = self.pretrain("all")
        for name, start, kind in (("pre-trained", every, "val"), ("from scratch", None, "val"),
                                  ("pre-trained, blind", every, "blind")):
            cells = {}
            for measure in heads:
                task, key = measure.split(".")
                cells[measure] = self.finetune(task, start), f"{kind}_{key}"
            table.add(name, cells, paper if name == "pre-trained" else ())
        return table

    def table_1(self):
        return self.compare("VQA, NLVR2 and captions", {
            **UNDERSTANDING, "caption.Bleu_4": "BLEU4", "caption.CIDEr": "CIDEr"},
            (73.25, 77.25, 36.2, 117.3))

    def table_2(self):
        keys = [f"{kind}@{n}" for kind in ("IR", "TR") for n in (1, 5, 10)]
        return self.compare(
            "retrieval, Flickr30k", {f"flickr30k.{key}": key for key in keys},
            (73.58, 92.42, 96.03, 86.24, 97.5, 98.92),
            "All rank 200 images and their 1,000 sentences, blind ranks 50 and 250.")

    def table_3(self):
        table = Table("pre-training without each of the visual tasks", UNDERSTANDING,
                      reference="all", note="The grid-word loss goes with detection and "
                      "attributes; NLVR2 keeps the pre-trained ResNet as it is.")
        for name, (flags, paper) in ABLATIONS.items():
            table.add(name, self.understanding(self.pretrain(name, *flags)), paper)
        return table

    def table_4(self):
        table = Table("time of a question about an image of 600 x 1000, by stages", STAGES,
                      reference="E2E-VLP, r152")
        for name, paper in (("E2E-VLP, r152", 192), ("Pixel-BERT, r152", 201),
                            ("two steps: Faster R-CNN, LXMERT", 496)):
            table.rows.append((name, {}, {"together": paper}))
        return table

    def table_5(self):
        table = Table("depth of the encoder and size of the ResNet", UNDERSTANDING,
                      reference="3 layers, r18", note="The paper's: 6 and 12 layers, r50 and r152.")
        for layers, backbone, paper in ((3, "r18", (70.56, 72.12)), (6, "r18", (71.34, 73.04)),
                                        (3, "r34", (72.23, 76.21)), (6, "r34", (73.25, 77.25))):
            name, flags = f"{layers} layers, {backbone}", ()
            if name != table.reference:  # the preset's sizes
                flags = "--encoder-layers", str(layers), "--backbone", backbone
            start = self.pretrain(name if flags else "all", *flags)
            table.add(name, self.understanding(start), paper)
        return table

    def table_6(self):
        table = Table("size of the images in fine-tuning", UNDERSTANDING, reference="64 x 96",
                      note="NLVR2 keeps the ResNet as it was pre-trained, on images of 64 x 96.")
        for short, long in ((32, 48), (48, 72), (64, 96)):
            flags = (f"-{short}x{long}", "--short-sides", str(short), "--long-side", str(long))
            if short == 64:  # the preset
                flags = ()
            table.add(f"{short} x {long}", self.understanding(self.pretrain("all"), *flags))
        return table

    def table_7(self):
        heads = {"AP": "AP", "AP50": "AP50", "hard_AP": "AP, hard to see",
                 "hard_AP50": "AP50, hard to see"}
        table = Table("detection, with the sentence and without", heads,
                      reference="fine-tuned, sentence", note="Hard to see: COCO's images of "
                      "`shapes.py --hard`, in fine-tuning and validation. The paper's last row is "
                      "DETR's.")
        every = self.pretrain("all")
        for name, kind in (("sentence", ""), ("another image's sentence", "_wrong_sentence"),
                           ("no sentence", "_no_sentence")):
            cells = {key: (every, f"val_{key}{kind}") for key in ("AP", "AP50")}
            table.add(f"pre-trained only, {name}", cells)
        alone = "-no-sentence", "--text", "none"
        for name, start, flags, paper in (
                ("fine-tuned, sentence", every, (), (41.9, 62.6)),
                ("fine-tuned, no sentence", every, alone, ()),
                ("from scratch, sentence", None, (), ()),
                ("from scratch, no sentence", None, alone, (40.6, 61.6))):
            run = self.finetune("detection", start, *flags)
            cells = {key: (run, f"val_{key}") for key in ("AP", "AP50")}
            if start:
                name_, *more = flags or ("",)
                run = self.finetune("detection", start, f"{name_}-hard", *more, hard=True)
                cells |= {f"hard_{key}": (run, f"val_{key}") for key in ("AP", "AP50")}
            table.add(name, cells, paper)
        return table


# --------------------------------------------------------------------------------------------------
# Running


class Runner:
    """Runs command lines, --jobs at once, and keeps what they measured in OUTPUT/runs."""

    def __init__(self, args):
        self.args = args

    def name(self, run, seed):
        return f"{run.name}-{self.args.budget}-seed{seed}"

    def folder(self, run, seed):
        return os.path.join(self.args.work, self.name(run, seed))

    def kept(self, run, seed):
        return os.path.join(self.args.output, "runs", f"{self.name(run, seed)}.json")

    def command(self, run, seed):
        """The command line that trains a run."""
        data = f"{self.args.data}-hard" if run.hard else self.args.data
        words = ["python", run.script, *run.flags, "--data", data, "--seed", str(seed)]
        if run.script == "finetune.py":
            init = os.path.join(self.folder(run.start, seed), "last.pt") if run.start else "none"
            words += ["--init", init]
        return [*words, "--output", self.folder(run, seed), "--resume", "auto"]

    def train(self, tables):
        """Train what has not ended yet, table by table, first the pre-trainings; a fine-tuning
        waits for its own. After Ctrl-C what runs writes its checkpoint.
        """
        keys = [(run, seed) for table in tables for script in ("pretrain.py", "finetune.py")
                for seed in range(self.args.seeds) for run in table.runs() if run.script == script]
        ends = {}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for run, seed in dict.fromkeys(keys):
                if not os.path.exists(self.kept(run, seed)):
                    start = ends.get((run.start, seed))
                    ends[run, seed] = pool.submit(self.train_one, run, seed, start)
        for end in ends.values():
            end.result()  # raises what the run raised

    def train_one(self, run, seed, start):
        """start: the end of the pre-training that it needs, or None."""
        if start is not None:
            start.result()
        folder = self.folder(run, seed)
        os.makedirs(folder, exist_ok=True)
        # Side by side: a thread each, so that two of them do not take turns with four
        threads = str(max(1, (os.cpu_count() or 1) // self.args.jobs))
        script, *words = self.command(run, seed)[1:]
        with open(f"{folder}/output.txt", "a") as log:
            code = subprocess.call([sys.executable, os.path.join(ROOT, script), *words],
                                   env={**os.environ, "OMP_NUM_THREADS": threads},
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if code:
            raise InputError(f"{self.name(run, seed)}: exit code {code}, see {folder}/output.txt")
        self.keep(run, seed)
        print(f"{self.name(run, seed)}: done", flush=True)

    def keep(self, run, seed):
        """Write down what a run that has ended measured: all of its validations."""
        folder = self.folder(run, seed)
        with open(f"{folder}/log.jsonl") as file:
            lines = [json.loads(line) for line in file]
        task = TASKS.get(run.name.split("-")[0])
        batch = {**task.settings, **task.mini}["batch_size"] if task else BATCH_SIZE
        curve = []
        for line in lines:
            measures = {key: value for key, value in line.items()
                        if key.startswith(("val_", "blind_"))}
            if measures:
                curve.append({"pictures": line["step"] * batch, **measures})
        seconds = max(line.get("seconds", 0) for line in lines)
        write(self.kept(run, seed), {
            "command": shlex.join(self.command(run, seed)), "commit": commit(),
            "machine": machine(), "hours": round(seconds / 3600, 4), "curve": curve})
        if run.script == "finetune.py":  # nothing starts from it
            for path in glob.glob(f"{glob.escape(folder)}/*.pt"):
                os.remove(path)


def read(path):
    with open(path) as file:
        return json.load(file)


def write(path, found):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(found, file, indent=1)


def commit():
    """The source that is run; what the tables write beside it makes it no other."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "*.py")
    return git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")


def machine():
    where = f"{os.cpu_count()} cores of {processor()}"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__.split('+')[0]}"


# --------------------------------------------------------------------------------------------------
# Results


def spread(values):
    """{"mean", "std" (of a sample; 0 for a single value), "values"}."""
    return {"mean": statistics.fmean(values), "values": values,
            "std": statistics.stdev(values) if len(values) > 1 else 0.0}


@torch.inference_mode()
def stage_times(repeats, quick=False):
    """Table 4: milliseconds by stage, {stage: spread} for each of its rows; all take turns."""
    args = argparse.Namespace(quick=quick, device="cuda" if torch.cuda.is_available() else "cpu")
    images, _ = pixels(args, 600, 1000)
    tokens = sentences(args, 1)
    functions = []
    for model in (our_vqa, pixel_bert_model, bottom_up_attention):
        look, read = model(args)
        seen = look(images)
        functions += [lambda look=look: look(images),
                      lambda read=read, seen=seen: read(seen, tokens),
                      lambda look=look, read=read: read(look(images), tokens)]
    rounds = [medians(args, *functions) for _ in range(repeats)]
    times = [spread([1000 * seconds for seconds in each]) for each in zip(*rounds)]
    return [dict(zip(STAGES, times[i:i + 3])) for i in (0, 3, 6)]


def compared(measure, reference, smaller=False):
    """"+" or "-" if every value is better, or worse, than every one of the reference; else ""."""
    if min(len(measure["values"]), len(reference["values"])) < 2:
        return ""
    above, below = ("-", "+") if smaller else ("+", "-")
    if min(measure["values"]) > max(reference["values"]):
        return above
    return below if max(measure["values"]) < min(reference["values"]) else ""


def markdown(result):
    """A table's JSON as Markdown: mean ± deviation over the seeds, and the paper's figures."""
    heads, rows = result["heads"], result["rows"]
    reference = next((row["measures"] for row in rows if row["name"] == result["reference"]), {})
    papers = [measure for measure in heads if any(measure in row["paper"] for row in rows)]
    lines = [["", *heads.values(), *(f"paper: {heads[measure]}" for measure in papers)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [row["name"]]
        for measure in heads:
            found = row["measures"].get(measure)
            scale = 1 if measure in ("vqa.overall", *STAGES) else 100  # percent, ms; else fractions
            text = ""
            if found:
                text = f"{scale * found['mean']:.1f}"
                if len(found["values"]) > 1:
                    text += f" ± {scale * found['std']:.1f}"
                if measure in reference and row["name"] != result["reference"]:
                    mark = compared(found, reference[measure], measure in STAGES)
                    text += f" ({mark})" if mark else ""
            cells.append(text)
        cells += [f"{row['paper'][m]:g}" if m in row["paper"] else "" for m in papers]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(result):
    """What a table's figures are, in a few sentences."""
    n = len(result["seeds"])
    kind = "seed" if result["hours"] else "repeat"
    text = f"{n} {kind}{'s, mean and standard deviation' if n > 1 else ''}; "
    if result["hours"]:
        text += f"{result['hours']:.1f} hours of training, "
    text += f"{result['machine']}, commit {result['commit']}."
    if n > 1:
        text += (f" (+), (-): all {n} are better, or worse, than all {n} of "
                 f"\"{result['reference']}\", else within the spread; by chance "
                 f"{2 / math.comb(2 * n, n):.0%} have a sign.")
    return f"{text} {result['note']}".strip() + f" Made by `{result['command']}`."


def draw(path, table, kept):
    """A PNG of each measure over the images seen, a colour a row, means over the seeds; then of the
    pre-trainings, where the rows differ in them.
    """
    panels = {head: {name: cells[measure] for name, cells, _ in table.rows if measure in cells}
              for measure, head in table.heads.items()}
    starts = {name: run.start for name, cells, _ in table.rows for run, _ in cells.values()}
    if None not in starts.values() and len(set(starts.values())) > 1:
        for key, head in PRETRAINED.items():
            panels[f"pre-training: {head}"] = {name: (run, key) for name, run in starts.items()}
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(11, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    colours = {name: f"C{i}" for i, (name, *_) in enumerate(table.rows)}
    for ax, (head, lines) in zip(axes, panels.items()):
        ax.set_title(head, fontsize=9)
        for name, (run, key) in lines.items():
            if key not in kept[run][0]["curve"][0]:
                continue  # without detection there is no AP
            curves = [[point[key] for point in one["curve"]] for one in kept[run]]
            seen = [point["pictures"] for point in kept[run][0]["curve"]]
            ax.plot(seen, [statistics.fmean(values) for values in zip(*curves)], marker=".",
                    color=colours[name], label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)


def renew(folder):
    """Write the tables of FOLDER/README.md anew: what stands between <!-- table N --> and <!-- end
    --> from FOLDER/tableN.json.
    """
    path = os.path.join(folder, "README.md")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        text = file.read()

    def renewed(found):
        result = read(os.path.join(folder, f"table{found[1]}.json"))
        return f"<!-- table {found[1]} -->\n{markdown(result)}\n\n{summary(result)}\n<!-- end -->"

    text = re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", renewed, text, flags=re.S)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_worlds(args, tables):
    """The miniature worlds that the tables' runs need, if they are not there."""
    worlds = {False: args.data, True: f"{args.data}-hard"}
    for hard in {run.hard for table in tables for run in table.runs()}:
        if not os.path.exists(worlds[hard]):
            print(f"writing the miniature world to {worlds[hard]}", flush=True)
            shapes.write_world(worlds[hard], hard=hard)


def make(number_, table, runner):
    """Write a table's JSON and picture, of what its runs have measured."""
    args = runner.args
    seeds = range(args.seeds)
    kept, rows = {}, []
    for run in table.runs():
        kept[run] = [read(runner.kept(run, seed)) for seed in seeds]
    for name, cells, paper in table.rows:
        measures = {measure: spread([one["curve"][-1][key] for one in kept[run]])
                    for measure, (run, key) in cells.items()}
        rows.append({"name": name, "measures": measures, "paper": paper})
    if number_ == "4":
        for row, times in zip(rows, stage_times(args.seeds)):
            row["measures"] = times

    every = [one for found in kept.values() for one in found]
    stem = os.path.join(args.output, f"table{number_}")
    result = {
        "table": int(number_), "title": table.title, "heads": table.heads, "note": table.note,
        "reference": table.reference, "rows": rows, "seeds": list(seeds),
        "command": shlex.join(["python", "tests/tables.py", *args.asked]),
        "commit": ", ".join(dict.fromkeys(one["commit"] for one in every)) or commit(),
        "machine": "; ".join(dict.fromkeys(one["machine"] for one in every)) or machine(),
        "hours": round(sum(one["hours"] for one in every), 4)}
    write(f"{stem}.json", result)
    if kept:
        draw(f"{stem}.png", table, kept)
    renew(args.output)
    print(markdown(result))


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    parser.add_argument("--table", nargs="+", choices=tuple("1234567"), required=True,
                        help="which; what they share is trained once")
    parser.add_argument("--mini", action="store_true", required=True,
                        help="on the miniature world, written to --data if it is not there")
    parser.add_argument("--seeds", type=number(int, 1), default=3, metavar="N", help="0 to N - 1")
    parser.add_argument("--budget", type=number(int, 1), default=25_600, metavar="N",
                        help="images that a pre-training sees; a fine-tuning's passes grow with it")
    parser.add_argument("--jobs", type=number(int, 1), default=2, metavar="N",
                        help="runs at a time, on equal shares of the cores")
    parser.add_argument("--data", default="data/mini", metavar="DIR", help="the miniature world")
    parser.add_argument("--output", default="results", metavar="DIR",
                        help="tables, and what was measured in each run")
    parser.add_argument("--work", default="runs/tables", metavar="DIR", help="the runs' folders")

    def work():
        args = parser.parse_args(argv)
        args.asked = sys.argv[1:] if argv is None else argv
        plan = Plan(args.budget)
        tables = {number_: getattr(plan, f"table_{number_}")() for number_ in args.table}
        write_worlds(args, tables.values())
        runner = Runner(args)
        runner.train(tables.values())
        for number_, table in tables.items():
            make(number_, table, runner)

    return command("tables.py", work)


if __name__ == "__main__":
    sys.exit(main())
