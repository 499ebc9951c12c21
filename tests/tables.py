"""The paper's Tables 1 to 7 on the miniature world: train what a table needs, measure, write.

    python tests/tables.py --table 3 --mini --seeds 3 --output results   # hours; may be stopped
    python tests/tables.py --table 3 --mini --rows all "no detection" --seeds 1 --output two
    python tests/tables.py --table 1 2 --mini --dry-run                  # its commands alone

Each run is a command line of pretrain.py or finetune.py. One that has ended is kept in OUTPUT/runs
with all of its validations and serves every table that needs it; one that was stopped goes on where
it was. Checkpoints are in --work, as long as something is to be fine-tuned from them. Table 4, of
times, is measured at once.

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
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
from bench import (ROOT, bottom_up_attention, checked, medians, our_vqa,  # it finds the root
                   pixel_bert_model, pixels, processor, sentences)
from matplotlib.figure import Figure

import shapes
from data import HelpFormatter, InputError, command, number
from tasks import TASKS


@dataclass(frozen=True)
class Run:
    """One training, without its seed; start: the pre-training that a fine-tuning begins with."""

    name: str
    script: str
    flags: tuple
    start: "Run | None" = None


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
        every = [*(run.start for run in tuned if run.start), *tuned]
        return sorted(dict.fromkeys(every), key=lambda run: run.start is not None)


# --------------------------------------------------------------------------------------------------
# What the tables need

# Passes over its examples that a fine-tuning takes for each 25,600 images of --budget
PASSES = {"vqa": 4, "nlvr2": 8, "caption": 2, "flickr30k": 6, "detection": 4}
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

    def __init__(self, args):
        self.budget, self.more = args.budget, tuple(args.flags)

    def pretrain(self, name, *flags):
        steps = max(1, round(self.budget / batch_size([*flags, *self.more])))
        return Run(f"pretrain-{name}".replace(" ", "-").replace(",", ""), "pretrain.py", (
            "--mini", "--minutes", "0", "--steps", str(steps), "--val-every", str(-(-steps // 4)),
            "--warmup", str(steps // 10), "--workers", "0", *flags))

    def finetune(self, task, start, name="", *flags):
        """start: the pre-training to begin with; None: from nothing; name: of what flags change."""
        passes = PASSES[task] * self.budget / 25_600
        # All pairs of retrieval's images and sentences take as long as a good part of its training
        every = passes / (2 if task == "flickr30k" else 4)
        origin = start.name.removeprefix("pretrain-") if start else "scratch"
        return Run(f"{task}-{origin}{name}", "finetune.py", (
            "--task", task, "--mini", "--minutes", "0", "--epochs", f"{passes:g}", "--val-every",
            f"{every:g}", "--val-examples", "0" if task in ("vqa", "nlvr2") else "400", "--workers",
            "0", "--checkpoint-minutes", "5", *flags), start)

    def understanding(self, start, name="", *flags):
        """The cells of a row of Tables 3, 5 and 6: one pre-training, fine-tuned on two tasks."""
        return {"vqa.overall": (self.finetune("vqa", start, name, *flags), "val_overall"),
                "nlvr2.accuracy": (self.finetune("nlvr2", start, name, *flags), "val_accuracy")}

    def compare(self, title, heads, paper, note=""):
        """Pre-trained, from nothing, and blind. heads: {"task.key": heading}."""
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
        table = Table("layers of the encoder and the ResNet", UNDERSTANDING,
                      reference="3 layers, r18")
        for layers in ("3", "6"):
            for backbone in ("r18", "r34"):
                flags = ("--backbone", backbone, "--encoder-layers", layers)
                start = self.pretrain(f"{backbone}-{layers}", *flags)
                if (backbone, layers) == ("r18", "3"):  # the preset
                    start = self.pretrain("all")
                table.add(f"{layers} layers, {backbone}", self.understanding(start))
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
        table = Table("detection, with the sentence and without",
                      {"detection.AP": "AP", "detection.AP50": "AP50"},
                      reference="pre-trained, sentence", note="The paper's last row is DETR's.")
        papers = {"pre-trained, sentence": (41.9, 62.6), "from scratch, no sentence": (40.6, 61.6)}
        texts = {"sentence": (), "no sentence": ("-no-sentence", "--text", "none")}
        for origin, start in (("pre-trained", self.pretrain("all")), ("from scratch", None)):
            for text, flags in texts.items():
                run = self.finetune("detection", start, *flags)
                cells = {measure: (run, measure.replace("detection.", "val_"))
                         for measure in table.heads}
                name = f"{origin}, {text}"
                table.add(name, cells, papers.get(name, ()))
        return table


def batch_size(flags):
    """The images of a step, from the flags of a command line."""
    if "--batch-size" in flags:
        return int(flags[len(flags) - flags[::-1].index("--batch-size")])
    if "--task" not in flags:
        return 32
    task = TASKS[flags[flags.index("--task") + 1]]
    return {**task.settings, **task.mini}["batch_size"]


def make_table(args, table_number):
    """The table, with the rows that --rows names."""
    table = getattr(Plan(args), f"table_{table_number}")()
    names = [name for name, *_ in table.rows]
    for name in args.rows or ():
        if name not in names:
            raise InputError(f"--rows {name!r}: table {table_number} has none of that name; there "
                             f"are: {', '.join(map(repr, names))}")
    table.rows = [row for row in table.rows if not args.rows or row[0] in args.rows]
    return table


# --------------------------------------------------------------------------------------------------
# Running


class Runner:
    """Runs command lines, --jobs at once, and keeps what they measured in OUTPUT/runs."""

    def __init__(self, args):
        self.args = args

    def folder(self, run, seed):
        return os.path.join(self.args.work, f"{run.name}-seed{seed}")

    def kept(self, run, seed):
        return os.path.join(self.args.output, "runs", f"{run.name}-seed{seed}.json")

    def command(self, run, seed):
        """The command line that trains a run."""
        words = ["python", run.script, *run.flags, "--data", self.args.data, "--seed", str(seed)]
        words += self.args.flags
        if run.script == "finetune.py":
            init = os.path.join(self.folder(run.start, seed), "last.pt") if run.start else "none"
            words += ["--init", init]
        return [*words, "--output", self.folder(run, seed), "--resume", "auto"]

    def identity(self, run):
        """What makes a run of this name another one."""
        start = [*run.start.flags, *self.args.flags] if run.start else None
        return {"flags": [*run.flags, *self.args.flags], "start": start}

    def load(self, path, run):
        """What was written down of a run, or None. InputError if it was another of this name."""
        if not os.path.exists(path):
            return None
        with open(path) as file:
            found = json.load(file)
        if {key: found[key] for key in ("flags", "start")} != self.identity(run):
            raise InputError(f"{path}: is of a run with other flags ({shlex.join(found['flags'])});"
                             " give another --output and --work, or remove it")
        return found

    def missing(self, runs):
        """(run, seed) of what is still to be run, a seed after the other."""
        missing = []
        for seed in range(self.args.seeds):
            wanted = [run for run in runs if self.load(self.kept(run, seed), run) is None]
            for run in list(wanted):  # what it starts from is run again if its checkpoint is gone
                if run.start and run.start not in wanted and not os.path.exists(
                        os.path.join(self.folder(run.start, seed), "last.pt")):
                    wanted.insert(0, run.start)
            missing += [(run, seed) for run in wanted]
        return missing

    def train(self, keys, ended):
        """Train (run, seed), each after what it starts from; ended(run, seed) after each. If one
        fails, or this process is stopped, the others are stopped too: they keep a checkpoint.
        """
        waiting, running = list(keys), {}
        try:
            while waiting or running:
                unfinished = [*waiting, *running]
                ready = [key for key in waiting if (key[0].start, key[1]) not in unfinished]
                for key in ready[:self.args.jobs - len(running)]:
                    running[key] = self.start(*key)
                    waiting.remove(key)
                time.sleep(0.2)
                for (run, seed), process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run, seed]
                    if process.returncode:
                        path = os.path.join(self.folder(run, seed), "output.txt")
                        with open(path) as file:
                            lines = [line.strip() for line in file if line.strip()]
                        raise InputError(f"{run.name}, seed {seed}: exit code {process.returncode}:"
                                         f" {lines[-1] if lines else ''} ({path})")
                    self.keep(run, seed)
                    print(f"{run.name}, seed {seed}: done", flush=True)
                    ended(run, seed)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()

    def start(self, run, seed):
        folder = self.folder(run, seed)
        os.makedirs(folder, exist_ok=True)
        if self.load(f"{folder}/run.json", run) is None:
            with open(f"{folder}/run.json", "w") as file:
                json.dump({**self.identity(run), "commit": commit()}, file)
        if not os.path.exists(f"{folder}/last.pt") and os.path.exists(f"{folder}/log.jsonl"):
            os.remove(f"{folder}/log.jsonl")  # it was stopped before its first checkpoint
        # Side by side: a thread each, so that two of them do not take turns with four
        threads = str(max(1, (os.cpu_count() or 1) // self.args.jobs))
        with open(f"{folder}/output.txt", "a") as log:
            return subprocess.Popen(
                [sys.executable, os.path.join(ROOT, run.script), *self.command(run, seed)[2:]],
                env={**os.environ, "OMP_NUM_THREADS": threads}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log)

    def keep(self, run, seed):
        """Write down what a run that has ended measured: all of its validations."""
        folder = self.folder(run, seed)
        with open(f"{folder}/run.json") as file:
            began = json.load(file)
        with open(f"{folder}/log.jsonl") as file:
            lines = [json.loads(line) for line in file]
        curve = []
        for line in lines:
            measures = {key: value if isinstance(value, int) else float(f"{value:.5g}")
                        for key, value in line.items() if key.startswith(("val_", "blind_"))}
            if measures:
                curve.append({"pictures": line["step"] * batch_size(began["flags"]), **measures})
        seconds = max(line.get("seconds", 0) for line in lines)
        write(self.kept(run, seed), {"name": run.name, "seed": seed, **began, "machine": machine(),
                                     "hours": round(seconds / 3600, 4), "curve": curve})
        if run.script == "finetune.py":  # nothing starts from it
            for path in glob.glob(f"{glob.escape(folder)}/*.pt"):
                os.remove(path)


def write(path, found):
    """A dict as JSON with a line for each value, and for each member of a list of dicts."""
    def text(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "]"
        return json.dumps(value)

    lines = [f" {json.dumps(key)}: {text(value)}" for key, value in found.items()]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        file.write("{" + ",\n".join(lines)[1:] + "}\n")
    os.replace(f"{path}.tmp", path)


def commit():
    """The source that is run; with a + if it has changes of its own."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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


def gather(table, runner):
    """(rows of a table's JSON from the runs that have ended, all that was kept of them)."""
    kept = {}
    for run in table.runs():
        found = [runner.load(runner.kept(run, seed), run) for seed in range(runner.args.seeds)]
        kept[run] = [one for one in found if one]
    rows = []
    for name, cells, paper in table.rows:
        measures = {}
        for measure, (run, key) in cells.items():
            values = [one["curve"][-1][key] for one in kept[run]]
            if values:
                measures[measure] = spread(values)
        rows.append({"name": name, "measures": measures, "paper": paper})
    return rows, kept


@torch.inference_mode()
def stage_times(repeats, quick=False):
    """Table 4: milliseconds by stage, {stage: spread} for each of its rows; each value is the
    median of rounds in which all take turns.
    """
    args = argparse.Namespace(quick=quick, device="cuda" if torch.cuda.is_available() else "cpu")
    images, _ = pixels(args, 600, 1000)
    tokens = sentences(args, 1)
    functions = []
    for model in (our_vqa, pixel_bert_model, bottom_up_attention):
        look, read = model(args)
        seen = look(images)
        checked(read(seen, tokens), 1, 3129)
        functions += [lambda look=look: look(images),
                      lambda read=read, seen=seen: read(seen, tokens),
                      lambda look=look, read=read: read(look(images), tokens)]
    rounds = [medians(args, *functions) for _ in range(repeats)]
    times = [spread([1000 * seconds for seconds in each]) for each in zip(*rounds)]
    return [dict(zip(STAGES, times[i:i + 3])) for i in (0, 3, 6)]


def compared(measure, reference, smaller=False):
    """"+", "-" if every value is better, or worse, than every value of the reference; else "".

    smaller: a smaller one is better. Of two kinds of three runs each that do not differ, one in ten
    is so by chance.
    """
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
    """The curves of a table as a PNG: each measure over the images seen, a colour a row, the mean
    over the seeds. After those of the fine-tunings the pre-trainings', where there are several.
    """
    panels = {head: {name: cells[measure] for name, cells, _ in table.rows}
              for measure, head in table.heads.items()}
    starts = {name: run.start for name, cells, _ in table.rows for run, _ in cells.values()}
    if None not in starts.values() and len(set(starts.values())) > 1:
        for key, head in PRETRAINED.items():
            panels[f"pre-training: {head}"] = {name: (run, key) for name, run in starts.items()}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    for ax, (head, lines) in zip(axes, panels.items()):
        ax.set_title(head, fontsize=9)
        ax.tick_params(labelsize=7)
        for n, (name, (run, key)) in enumerate(lines.items()):
            points = [(same[0]["pictures"], statistics.fmean(point[key] for point in same))
                      for same in zip(*(one["curve"] for one in kept[run]))]
            ax.plot(*zip(*points), color=f"C{n % 10}", marker=".", label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8,
                  ncols=3)
    figure.savefig(path, dpi=100)


def renew(folder):
    """Write the tables of FOLDER/README.md anew: what stands between <!-- table N --> and <!-- end
    --> from FOLDER/tableN.json, what stands between <!-- table DIR/N --> from
    FOLDER/DIR/tableN.json.
    """
    path = os.path.join(folder, "README.md")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        text = file.read()

    def renewed(found):
        directory, name = os.path.split(found[1])
        with open(os.path.join(folder, directory, f"table{name}.json")) as file:
            result = json.load(file)
        return f"<!-- table {found[1]} -->\n{markdown(result)}\n\n{summary(result)}\n<!-- end -->"

    text = re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", renewed, text, flags=re.S)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def make(table_number, args):
    """Train what a table needs; its JSON and picture are written anew whenever a run has ended."""
    runner, table = Runner(args), make_table(args, table_number)
    stem = os.path.join(args.output, f"table{table_number}")

    def write_table(times=None):
        rows, kept = gather(table, runner)
        for row, measures in zip(rows, times or ()):
            row["measures"] = measures
        every = [one for found in kept.values() for one in found]
        result = {
            "table": int(table_number), "title": table.title, "heads": table.heads,
            "note": table.note, "reference": table.reference, "rows": rows,
            "seeds": list(range(args.seeds)),
            "command": shlex.join(["python", "tests/tables.py", *args.asked]),
            "commit": ", ".join(dict.fromkeys(one["commit"] for one in every)) or commit(),
            "machine": "; ".join(dict.fromkeys(one["machine"] for one in every)) or machine(),
            "hours": round(sum(one["hours"] for one in every), 4)}
        write(f"{stem}.json", result)
        if every and all(kept.values()):
            draw(f"{stem}.png", table, kept)
        return result

    runner.train(runner.missing(table.runs()), lambda run, seed: write_table())
    result = write_table(stage_times(args.seeds) if table_number == "4" else None)
    renew(args.output)
    print(markdown(result))


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    parser.add_argument("--table", nargs="+", choices=tuple("1234567"), required=True,
                        help="which; what they share is trained once")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these of its rows")
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
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="after --: flags for each run")
    args = parser.parse_args(argv)
    args.asked = sys.argv[1:] if argv is None else list(argv)
    return args


def main(argv=None):
    def work():
        args = parse(argv)
        if args.dry_run:
            for table_number in args.table:
                runs = make_table(args, table_number).runs()
                for seed in range(args.seeds):
                    for run in runs:
                        print(shlex.join(Runner(args).command(run, seed)))
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        if not os.path.exists(args.data):
            print(f"writing the miniature world to {args.data}", flush=True)
            shapes.write_world(args.data, flag="--data")
        for table_number in args.table:
            make(table_number, args)

    return command("tables.py", work)


if __name__ == "__main__":
    sys.exit(main())
