"""Stage 1: pre-train E2E-VLP end to end, from pixels and words, with four losses at once (section 3.2).

    python pretrain.py --mini                                                # a laptop: the miniature world, 20 minutes
    python pretrain.py --backbone r50 --data DIR                             # one GPU
    torchrun --nproc_per_node=8 pretrain.py --backbone r152 --data DIR       # the paper's run; its settings are default
    python pretrain.py --plan --backbone r152 --gpus 8                       # what that takes; trains nothing

What it writes to --output: log.jsonl (a line every few steps and at each validation), last.pt (weights, configuration,
vocabulary, optimiser: all that is needed to use it or go on), report.html (curves, measures, held-out pictures, for a
browser; report.json keeps its gallery and settings), sheet.png (held-out pictures with what was found).

`--mini` is only a set of other defaults, see `mini_preset`; any flag given explicitly wins over it.

Ctrl-C (or SIGTERM, or SIGUSR1) finishes the step, writes last.pt and says how to go on; the run that goes on ends with
the weights of one that never stopped.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
import weakref

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # macOS: what MPS lacks runs on the CPU; torch reads it once

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import shapes
from data import (
    LONG_SIDE,
    SHORT_SIDES,
    Batches,
    HelpFormatter,
    InputError,
    PretrainingSet,
    Tokenizer,
    attempt,
    check_names,
    collate,
    command,
    decodable,
    gathered,
    ignore_signals,
    index_pretraining,
    progressed,
    resized,
    say_first,
    share_statistics,
    start_processes,
    stop_processes,
    summed,
    writing,
)
from evaluate import (
    check_output,
    draw_sheet,
    measure_with_blind,
    prepare,
    pretrained_gallery,
    run_facts,
    write_report,
)
from matcher import LOSS_WEIGHTS, count, set_loss
from model import BACKBONES, E2EVLP, Attention, Config, count_parameters, load_checkpoint, save_checkpoint

TASKS = ("mlm", "itm", "detection", "attributes", "caption")


# The flags that describe the model, and their values for the miniature world
MODEL_FLAGS = ("backbone", "stride", "width", "heads", "feed_forward", "encoder_layers", "decoder_layers", "queries",
               "temperature", "dropout")
MINI_MODEL = dict(backbone="r18", backbone_weights="none", stride=16, width=128, heads=4, feed_forward=256,
                  encoder_layers=3, decoder_layers=3, queries=16, temperature=20.0, dropout=0.0)


def add_model_flags(parser):
    g = parser.add_argument_group("model")
    g.add_argument("--backbone", choices=tuple(BACKBONES), default="r50", help="ResNet-18 .. ResNet-152")
    g.add_argument("--backbone-weights", default="imagenet", metavar="WEIGHTS",
                   help="imagenet, none, or a torchvision state dict's file")
    g.add_argument("--stride", type=int, choices=(16, 32), default=32, help="pixels per grid cell")
    g.add_argument("--width", type=int, default=256, metavar="UNITS", help="hidden units")
    g.add_argument("--heads", type=int, default=12, metavar="N", help="attention heads, 32 units each")
    g.add_argument("--feed-forward", type=int, default=1024, metavar="UNITS",
                   help="units between the feed-forward layers")
    g.add_argument("--encoder-layers", type=int, default=12, metavar="N", help="6 or 12 in the paper")
    g.add_argument("--decoder-layers", type=int, default=6, metavar="N", help="for objects and for captions")
    g.add_argument("--queries", type=int, default=100, metavar="N",
                   help="objects that can be found in a picture, at most")
    g.add_argument("--temperature", type=float, default=10000.0, metavar="WIDTHS",
                   help="longest wavelength of the sine positions, in widths of the picture")
    g.add_argument("--dropout", type=float, default=0.1, metavar="SHARE", help="share of units, 0 to 1")


def add_loading_flags(g):
    g.add_argument("--data", default="data", metavar="DIR",
                   help="folder with the official files (README: the data tree)")
    g.add_argument("--index", metavar="DIR", help="where the index of the data lies (default: DATA/.index)")
    g.add_argument("--short-sides", nargs="+", type=int, default=list(SHORT_SIDES), metavar="PIXELS",
                   help="scale augmentation: one is drawn for each batch, pixels")
    g.add_argument("--long-side", type=int, default=LONG_SIDE, metavar="PIXELS",
                   help="no side gets longer than this, pixels")
    g.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
                   help="loader processes for each training process; 0: it loads itself")
    g.add_argument("--max-broken", type=int, default=100, metavar="N",
                   help="pictures that do not decode before training stops")


def add_loop_flags(g):
    g.add_argument("--micro-batch", type=int, default=0, metavar="N",
                   help="pictures a process holds at once; a larger share is accumulated; 0: the whole share")
    g.add_argument("--steps", type=int, default=0, metavar="N",
                   help="stop after this many steps; 0: --epochs decides")
    g.add_argument("--minutes", type=float, default=0, metavar="MINUTES",
                   help="time limit of training, for the schedule too; 0: none")
    g.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=float, default=1e-4, metavar="RATE", help="AdamW's")
    g.add_argument("--clip", type=float, default=0.1, metavar="NORM", help="largest norm of the gradient")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="of the first weights and all that is drawn")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:N, or mps on a Mac; default: cuda if there is one, else cpu")
    g.add_argument("--amp", choices=("none", "tf32", "bf16"), default="none",
                   help="mixed precision; tf32: of a GPU's matrix products alone (none leaves it to the convolutions)")
    g.add_argument("--deterministic", action="store_true",
                   help="only operations that give the same bits each time (a CPU's do; some of a GPU's get slower)")
    g.add_argument("--activation-checkpointing", action="store_true",
                   help="compute again in the backward pass instead of keeping: a fraction of the memory, a third more "
                   "time (without --backbone-weights the transformer alone)")


def add_keeping_flags(g):
    g.add_argument("--resume", metavar="FILE",
                   help="go on from this last.pt, with its settings, in its folder; auto: from the newest sound "
                   "checkpoint in --output, or from the start if there is none")
    g.add_argument("--checkpoint-minutes", type=float, default=30, metavar="MINUTES",
                   help="time between two checkpoints; the last two are kept, last.pt and previous.pt")
    g.add_argument("--max-bad-steps", type=int, default=10, metavar="N",
                   help="steps with a loss that is not finite, which are skipped, before training stops")
    g.add_argument("--timeout", type=float, default=30, metavar="MINUTES",
                   help="how long one of several processes may keep the others waiting before they end")
    g.add_argument("--log-every", type=int, default=50, metavar="STEPS", help="steps from line to line")


def resumable(resume, output, fine_tuning=False):
    """(path, state) of the checkpoint that --resume names; (None, None) if there is none to go on from.

    auto: the newest sound one of --output, so that one and the same command starts a run and goes on with it. A damaged
    one is named and passed over. InputError if all are damaged (to start anew is the user's choice), or a stranger.
    """
    if resume is None:
        return None, None
    both = [os.path.join(output if resume == "auto" else os.path.dirname(resume), name)
            for name in ("last.pt", "previous.pt")]
    damaged = []
    for path in [path for path in both if os.path.lexists(path)] if resume == "auto" else [resume]:
        try:
            state = load_checkpoint(path, "--resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        own = all(key in state for key in ("optimizer", "args", "step", "seconds"))
        if not own or bool(state["config"].task) != fine_tuning:
            raise InputError(f"--resume {path}: not a {'fine-tuning' if fine_tuning else 'pre-training'}'s last.pt, "
                             "with its optimiser; only that can be resumed")
        if damaged and int(os.environ.get("RANK", 0)) == 0:
            print(f"{damaged[0]}; passed over for {path}, of step {state['step']}", file=sys.stderr)
        return path, state
    if resume != "auto" and resume != both[1] and os.path.exists(both[1]):
        damaged[-1] += f"; or give --resume {both[1]}, the one before it"
    elif damaged and resume == "auto":
        damaged[-1] += "; remove it, and what else is damaged, to start anew"
    for problem in damaged[-1:]:
        raise InputError(problem)
    return None, None


def parse(argv):
    """Flags. Three layers of defaults: the paper's, then --mini's or the resumed run's, then what is given."""
    parser = argparse.ArgumentParser(usage="pretrain.py [--mini] [--data DIR] [--output DIR] ... (--help: all flags)",
                                     description="Pre-train E2E-VLP (Xu et al., ACL 2021).",
                                     epilog="The defaults are the paper's; --mini has others, see mini_preset.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--mini", action="store_true", help="other defaults: the miniature world on a laptop")
    g = parser.add_argument_group("data")
    add_loading_flags(g)
    g.add_argument("--shapes", action="store_true", help="write the miniature world to --data if nothing is there")
    g.add_argument("--sets", nargs="+", choices=("coco", "vg"), default=["coco", "vg"], help="what to train on")
    g.add_argument("--vocab", metavar="FILE", help="WordPiece vocabulary (default: DATA/vocab.txt)")
    g.add_argument("--sentences-per-picture", type=int, default=1, metavar="N",
                   help="sentences that share one backbone pass")
    g.add_argument("--without-sentence", type=float, default=0.25, metavar="SHARE",
                   help="share of pictures detected without a sentence, 0 to 1")
    add_model_flags(parser)
    g = parser.add_argument_group("ideas beyond the paper")
    g.add_argument("--mask-share", type=float, default=0.15, metavar="SHARE", help="share of the words hidden for MLM")
    g.add_argument("--mask-named", type=float, metavar="SHARE",
                   help="the same of words that name an object or attribute of the label sets (default: --mask-share)")
    g.add_argument("--cells", type=float, default=0, metavar="WEIGHT",
                   help="loss that asks the grid's cell at an object's centre for the object's words; 0: none")
    g = parser.add_argument_group("training")
    g.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures a step, over all processes")
    g.add_argument("--epochs", type=float, default=200, metavar="N", help="passes over the distinct pictures")
    g.add_argument("--lr", type=float, default=1e-4, metavar="RATE", help="learning rate of the transformer")
    g.add_argument("--lr-backbone", type=float, default=1e-5, metavar="RATE", help="learning rate of the ResNet")
    g.add_argument("--schedule", choices=("step", "cosine"), default="step", help="step: x 0.1 for the last third")
    g.add_argument("--loss-weights", nargs="+", default=[], metavar="NAME=WEIGHT",
                   help="other weights in the sum than 1 and DETR's: mlm itm caption class bbox giou attribute")
    g.add_argument("--without", nargs="+", choices=TASKS, default=[], metavar="LOSS",
                   help=f"losses to leave out (Table 3): {' '.join(TASKS)}")
    add_loop_flags(g)
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g = parser.add_argument_group("output")
    g.add_argument("--output", default="runs/pretrain", metavar="DIR",
                   help="folder for log.jsonl, last.pt, report.html and sheet.png")
    add_keeping_flags(g)
    g.add_argument("--val-every", type=int, default=5000, metavar="STEPS",
                   help="steps between two validations; 0: only one, at the end")
    g.add_argument("--val-pictures", type=int, default=1000, metavar="N",
                   help="held-out pictures to measure on, at most")
    g = parser.add_argument_group("plan")
    g.add_argument("--plan", action="store_true", help="train nothing; print what this run would take")
    g.add_argument("--gpus", type=int, default=1, metavar="N", help="in all, over all hosts")
    g.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="of one")
    g.add_argument("--gpu-tflops", type=float, default=100, metavar="TFLOPS",
                   help="what one sustains in training, not its peak (a log's pictures_per_second tells)")
    args = parser.parse_args(argv)
    if args.mini:
        mini_preset(parser)
        args = parser.parse_args(argv)
    path, state = resumable(args.resume, args.output)
    if state is not None:
        check_kept(parser, state["args"], f"--resume {path}")
        parser.set_defaults(**{**state["args"], "output": os.path.dirname(path) or "."})
        args = parser.parse_args(argv)
    args.resume = path
    args.words = sys.argv[1:] if argv is None else list(argv)  # for the report
    if state is not None:
        for flag in (*MODEL_FLAGS, "backbone_weights", "vocab", "sets", "seed", "batch_size", "weight_decay"):
            if getattr(args, flag) != state["args"].get(flag, parser.get_default(flag)):
                raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: the resumed run has "
                                 f"{state['args'].get(flag)}; leave the flag away")
    check_flags(args)
    weights_of(args.without, args.loss_weights)
    return args, state


# Bounds of flags, for fine-tuning too: more than 0, 0 or more, from 0 to 1
POSITIVE = ("batch_size", "sentences_per_picture", "queries", "epochs", "width", "heads", "feed_forward", "temperature",
            "encoder_layers", "decoder_layers", "log_every", "val_pictures", "long_side", "negatives", "gamma", "clip",
            "gpus", "gpu_memory", "gpu_tflops", "timeout")
NOT_NEGATIVE = ("micro_batch", "workers", "steps", "minutes", "lr", "lr_backbone", "lr_head", "warmup", "weight_decay",
                "max_broken", "max_bad_steps", "checkpoint_minutes", "val_every", "val_examples", "train_examples",
                "margin", "seed", "cells")
SHARES = ("dropout", "label_smoothing", "without_sentence", "mask_share", "mask_named")


# The most that makes any sense; beyond it memory is full or numbers overflow, far from the flag that was mistyped
MOST = {"batch_size": 10 ** 6, "sentences_per_picture": 1000, "workers": 1000, "long_side": 10_000, "seed": 2 ** 62,
        "negatives": 10 ** 6, "val_pictures": 10 ** 9, "encoder_layers": 1000, "decoder_layers": 1000, "steps": 10 ** 9,
        **dict.fromkeys(("width", "heads", "feed_forward", "queries"), 2 ** 16),
        **dict.fromkeys(("lr", "lr_backbone", "lr_head", "weight_decay", "gamma", "margin"), 1e38)}


def check_flags(args):
    """Raise InputError for the first flag that is out of its bounds."""
    for flag, value in vars(args).items():
        name = f"--{flag.replace('_', '-')} {value!s:.40}"
        if value is None:
            continue
        if flag in POSITIVE and not 0 < value < math.inf:
            raise InputError(f"{name}: must be more than 0")
        if flag in NOT_NEGATIVE and not 0 <= value < math.inf:
            raise InputError(f"{name}: must be 0 or more")
        if flag in (*POSITIVE, *NOT_NEGATIVE) and value > MOST.get(flag, 10 ** 12):
            raise InputError(f"{name}: must be at most {MOST.get(flag, 10 ** 12):g}")
        if flag in SHARES and not 0 <= value <= 1:
            raise InputError(f"{name}: must be from 0 to 1")
        if flag == "width" and value % 4:
            raise InputError(f"{name}: must be a multiple of 4 (sine positions take a quarter each)")
        if flag == "short_sides" and not 32 <= min(value) <= max(value) <= MOST["long_side"]:
            wrong = next(v for v in value if not 32 <= v <= MOST["long_side"])
            raise InputError(f"--short-sides {wrong!s:.40}: must be from 32 to {MOST['long_side']:,}")


def config_of(args, tokenizer, names, **more):
    """The model's configuration from the flags, the vocabulary and the label sets."""
    return Config(
        **{flag: getattr(args, flag) for flag in MODEL_FLAGS}, frozen_batch_norm=args.backbone_weights != "none",
        vocabulary=len(tokenizer), max_tokens=tokenizer.max_tokens,
        classes={name: len(names[name]) for name in ("coco", "vg") if names[name]},
        attributes=max(1, len(names["attributes"])), pad=tokenizer.pad, cls=tokenizer.cls, sep=tokenizer.sep,
        mask=tokenizer.mask, **more)


def mini_preset(parser):
    """The miniature world on two cores in 20 minutes: everything smaller, nothing different. shapes.py writes it."""
    parser.set_defaults(
        **MINI_MODEL, data="data/mini", shapes=True, short_sides=[64], long_side=96, sentences_per_picture=4, workers=1,
        batch_size=32, minutes=18.5, epochs=40, lr=1e-3, lr_backbone=1e-3, schedule="cosine", warmup=100, clip=1.0,
        loss_weights=["mlm=8", "itm=8", "caption=2", "attribute=2"], cells=8.0, mask_named=0.5, val_pictures=200,
        val_every=500, output="runs/mini", checkpoint_minutes=5.0)


def check_kept(parser, kept, source):
    """InputError unless what a checkpoint keeps of its run's flags are values that the parser could have given."""
    def require(fine, flag):
        if not fine:
            raise InputError(f"{source}: its run's --{flag.replace('_', '-')} is {str(kept.get(flag))[:40]!r}; the "
                             "file is damaged, or of another version: give another one")

    for flag in (*MODEL_FLAGS, "backbone_weights", "vocab"):
        require(flag in kept, flag)
    for flag in ("seed", "batch_size", "weight_decay", "lr", "lr_backbone", "epochs"):
        require(kept.get(flag) is not None, flag)
    decay = kept.get("decay", [])  # of fine-tuning, not a flag
    require(isinstance(decay, list) and all(type(epoch) in (int, float) for epoch in decay), "decay")
    for action in parser._actions:
        flag, default = action.dest, parser.get_default(action.dest)
        value = kept.get(flag, default)
        free = value is None and flag in (*MODEL_FLAGS, "backbone_weights")  # fine-tuning leaves them to --init's file
        if flag in ("help", "resume") or value is default or free:
            continue
        values = value if action.nargs == "+" and isinstance(value, list) else [value]
        kinds = (bool,) if action.nargs == 0 else (int, float) if action.type is float else (action.type or str,)
        require((values or default == []) and all(
            type(v) in kinds and (not action.choices or v in action.choices) for v in values), flag)


def words_of(names, tokenizer, without=()):
    """{"coco", "vg", "attributes": [the word pieces of each name]}; attributes have none if they are left out."""
    words = {kind: [tokenizer.encode(name)[1:-1] for name in names[kind]] for kind in ("coco", "vg", "attributes")}
    return {**words, "attributes": [[] for _ in names["attributes"]]} if "attributes" in without else words


def load_optimizer(optimizer, kept, source):
    """Give an optimiser its state back; its settings stay those of the flags. InputError if it is not of this model."""
    own, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    state, groups = (kept.get(key) if isinstance(kept, dict) else None for key in ("state", "param_groups"))
    fits = (isinstance(state, dict) and isinstance(groups, list) and all(isinstance(g, dict) for g in groups)
            and [g.get("params") for g in groups] == [g["params"] for g in own["param_groups"]]
            and all(isinstance(g.get("lr", 0.0), (int, float)) for g in groups)
            and all(at in range(len(parameters)) and isinstance(values, dict) and values.keys() == {
                "step", "exp_avg", "exp_avg_sq"} and all(
                torch.is_tensor(value) and value.shape == (() if name == "step" else parameters[at].shape)
                and value.dtype == torch.float32 and value.isfinite().all() for name, value in values.items())
                for at, values in state.items()))
    if not fits:
        raise InputError(f"{source}: its optimiser's state is not of this model; the file is damaged, give another one")
    for group, before in zip(own["param_groups"], groups):
        group["lr"] = before.get("lr", group["lr"])  # each step sets it anew; a run that has ended keeps its last
    optimizer.load_state_dict({**own, "state": state})


# ----------------------------------------------------------------------------------------------------------------
# The batch and the output folder


def divide_batch(args, world):
    """--batch-size is the total: (a process's share of it, in how many parts the process takes it)."""
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size}: does not divide among {world} processes; "
                         f"choose a multiple of {world}")
    share = args.batch_size // world
    return share, next(n for n in range(1, share + 1) if share % n == 0 and (not args.micro_batch or
                                                                             share // n <= args.micro_batch))


class Output:
    """The folder of a run, which only its first process writes: log.jsonl, last.pt and the one before it, previous.pt.

    What an earlier run left there is moved out of the way, nothing is overwritten.
    """

    def __init__(self, args, state, rank, world, stop, say):
        """state: the checkpoint that the run goes on from, args.resume its path; or both None."""
        self.folder, self.rank, self.world, self.stop = args.output, rank, world, stop
        self.file = os.path.join(args.output, "log.jsonl")
        self.last, self.previous = (os.path.join(args.output, name) for name in ("last.pt", "previous.pt"))
        left = [self.file, self.last, self.previous,
                *(os.path.join(args.output, name) for name in ("best.pt", "sheet.png", "report.html", "report.json"))]
        if state is not None:
            stop.saved = state["step"], args.resume
            if os.path.realpath(os.path.dirname(args.resume)) == os.path.realpath(args.output):
                # The checkpoints that came after it, or from elsewhere; what came before it stays
                left = {self.last: [], self.previous: [self.last]}.get(
                    os.path.join(args.output, os.path.basename(args.resume)), [self.last, self.previous])
        if rank == 0:
            with writing(self.folder):
                self.clear(left, state, say)

    def clear(self, left, state, say):
        left = [path for path in left if os.path.lexists(path)]
        number = 1
        while os.path.lexists(os.path.join(self.folder, f"earlier-{number}")):
            number += 1
        if left:
            os.mkdir(os.path.join(self.folder, f"earlier-{number}"))
        for path in left:
            os.rename(path, os.path.join(self.folder, f"earlier-{number}", os.path.basename(path)))
        if left:
            what = "an earlier run" if state is None else ", ".join(map(os.path.basename, left))
            say(f"{self.folder}: holds {what}; moved to {self.folder}/earlier-{number}")
        if state is not None and os.path.exists(self.file):
            size = state.get("log_size", math.inf)
            if os.path.getsize(self.file) > size:  # lines about what was lost, which will be written anew
                os.truncate(self.file, size)

    def log(self, line):
        """Add a dictionary to log.jsonl."""
        if self.rank == 0:
            with writing(self.file), open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, model, tokenizer, names, step, **more):
        """Write last.pt; collective."""
        def write():
            if self.rank == 0:
                if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
                    raise InputError(f"step {step}: the weights are not finite, and not kept; try a lower --lr")
                with writing(self.file), open(self.file, "a") as file:  # what belongs to it is on the disk before it is
                    os.fsync(file.fileno())
                save_checkpoint(self.last, model, tokenizer.vocabulary, names, previous=self.previous, step=step,
                                log_size=os.path.getsize(self.file), **more)

        attempt(write, self.world)
        self.stop.saved = step, self.last


# ----------------------------------------------------------------------------------------------------------------
# The losses and the schedule


def counts_of(batch, args):
    """What each loss is divided by: sums over this part of the batch, to be added over all parts and processes.

    A mean of means would weigh a word more that stands in a part with few words. Dividing by the count over everything
    gives the same gradient on 1 and on N processes.
    """
    mlm, itm = len(batch["mlm_places"]), batch["itm_labels"].numel()
    words = (batch["captions"][..., 1:] != args.pad).sum()
    return [float(mlm), float(itm), float(words), *count(batch["targets"], args.queries).tolist()]


def losses(outputs, batch, counts, args):
    """The named losses of section 3.2, each normalised by its count; outputs as E2EVLP.forward gives them."""
    words = batch["captions"][..., 1:].flatten()
    mlm, itm, caption = (max(c, 1) for c in counts[:3])
    return {
        "loss_mlm": F.cross_entropy(outputs["mlm"].float(), batch["mlm_words"], reduction="sum") / mlm,
        "loss_itm": F.cross_entropy(outputs["itm"].float(), batch["itm_labels"].flatten(), reduction="sum") / itm,
        "loss_caption": F.cross_entropy(outputs["caption"].float().flatten(0, 1), words, ignore_index=args.pad,
                                        reduction="sum") / caption,
        **set_loss(outputs["objects"], batch["targets"], counts=torch.tensor(counts[3:])),
        **({"loss_cell": cell_loss(outputs["cells"], batch["targets"], counts[3])} if "cells" in outputs else {}),
    }


def cell_loss(logits, targets, boxes):
    """Beyond the paper (--cells): each object's words, asked of the grid's cell that its centre lies in.

    In the set loss the ResNet learns what a thing is only through queries that have found it, which they can only by
    what the ResNet tells; and that a cell and a word mean the same, only from sentences. Here the MLM head, which knows
    words by their embeddings, reads the cell itself: so it must say in the language of the words what is there, and
    words find it by what they are. (A detector with queries gains from asking its encoder directly, as Zong et al. 2023
    found; and words of detected objects as anchors between picture and sentence are Oscar's idea, Li et al. 2020.)

    logits (N, V) of E2EVLP.forward; targets: B dicts with words (k,) and word_rows (k,), see PretrainingSet.target;
    boxes: the number of objects, over all processes. A scalar; an object's words share its weight equally.
    """
    log_p = logits.float().log_softmax(-1)
    before, total = 0, log_p.sum() * 0.0  # so that a batch without objects has a loss too
    for t in targets:
        rows = t["word_rows"]
        # As bincount, for which a device would have to tell how long its result is
        share = 1 / rows.new_zeros(len(t["labels"])).index_add(0, rows, torch.ones_like(rows))[rows]
        total = total - (log_p[before + rows, t["words"]] * share).sum()
        before += len(t["labels"])
    return total / max(boxes, 1)


def weights_of(without, changed=(), cells=0.0):
    """How much each named loss counts in the sum (Eq. 3; DETR's weights inside L_v); changed: ["mlm=3", ...]."""
    weights = {"loss_mlm": 1.0, "loss_itm": 1.0, "loss_caption": 1.0, **LOSS_WEIGHTS}
    known = [name[5:] for name in weights]
    for text in changed:
        name, _, value = text.partition("=")
        try:
            value = float(value)
        except ValueError:
            value = -1.0
        if name not in known or not 0 <= value < math.inf:
            raise InputError(f"--loss-weights {text}: must be NAME=NUMBER with a name of {', '.join(known)}")
        weights[f"loss_{name}"] = value
    if cells:
        weights.update(loss_cell=cells)
    off = {"mlm": ["loss_mlm"], "itm": ["loss_itm"], "caption": ["loss_caption"], "attributes": ["loss_attribute"],
           "detection": [*LOSS_WEIGHTS, "loss_cell"]}  # without objects there is nothing to have attributes
    for task in without:
        weights.update({name: 0.0 for name in off[task] if name in weights})
    return weights


def learning_rate_scale(step, progress, args):
    """What both rates are multiplied by, from the step and the share of the training that is done (0 .. 1)."""
    warm = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    if args.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return warm * (0.1 if progress >= 2 / 3 else 1.0)


def share_done(step, steps, seconds, minutes):
    """The share of a training that is done, 1 at its end: of its steps or of its time, whichever is further on."""
    return max(step / steps, seconds / (minutes * 60) if minutes else 0.0)


def time_left(seconds, share, limit=0.0):
    """"3:20 left": what is still to come of a training of which this share took so many seconds; limit: --minutes."""
    left = seconds * max(0.0, 1 - share) / share
    seconds = round(min(left, max(0.0, limit * 60 - seconds)) if limit else left)
    hours, minutes = divmod(seconds // 60, 60)
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{seconds % 60:02} left"


def set_up(model, args):
    """What --amp, --activation-checkpointing and --deterministic need beside autocast."""
    model.recompute = args.activation_checkpointing
    torch.set_float32_matmul_precision("high" if args.amp == "tf32" else "highest")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first matrix product
    torch.use_deterministic_algorithms(args.deterministic)


class Statistics:
    """Keeps a copy of the means and variances of batch norm that trains: a forward pass that ends in a loss that is not
    finite has changed them already, for good.
    """

    def __init__(self, model):
        self.live = [] if model.config.frozen_batch_norm else list(model.buffers())
        self.kept = [tensor.clone() for tensor in self.live]

    def keep(self):
        for kept, live in zip(self.kept, self.live):
            kept.copy_(live)

    def restore(self):
        for kept, live in zip(self.kept, self.live):
            live.copy_(kept)


def report_bad_step(output, step, per_epoch, sums, number, say, pictures):
    """Say and log a step that is skipped since its loss, or its gradient, is not finite; pictures: their names."""
    losses = ", ".join(f"{name} {float(value):.3g}" for name, value in sums.items())
    say(f"step {step}: not finite ({losses}), skipped; pictures {', '.join(map(str, pictures))}")
    output.log({"step": step + 1, "epoch": round((step + 1) / per_epoch, 4), "bad_steps": number, "pictures": pictures})


def check_bad_steps(number, args, output, save):
    """Stop, with a checkpoint, once more than --max-bad-steps had to be skipped."""
    if number > args.max_bad_steps:
        save()
        raise InputError(f"{number} steps with a loss that is not finite (--max-bad-steps {args.max_bad_steps}); "
                         f"{output.file} names their pictures; try a lower --lr")


def check_resumed(args, state, world):
    """All processes must go on from the same step: a folder that the hosts do not share, or not yet, would mix two."""
    steps = gathered(None if state is None else state["step"], world)
    if len(set(steps)) > 1:
        raise InputError(f"--resume {args.resume}: the processes find different checkpoints (steps "
                         f"{', '.join(map(str, steps))}); --output must be a folder that all hosts share")


def to_device(value, device):
    """A batch with all tensors in it, however deep, on the device."""
    if torch.is_tensor(value):  # MPS would still be copying when the batch is gone
        return value.to(device, non_blocking=device.startswith("cuda"))
    if isinstance(value, dict):
        # The pictures' sizes stay on the host, which asks them whether anything is padded
        return {k: v if k == "sizes" else to_device(v, device) for k, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------------


def train(args, state, stop):
    """stop: data.Stopping, for Ctrl-C."""
    rank, world, device = start_processes(args.device, args.timeout)
    say = say_first(rank)
    share, parts = divide_batch(args, world)
    check_resumed(args, state, world)

    def first_process_prepares():
        if rank == 0:
            check_output(args.output)
            if args.shapes and not os.path.exists(args.data):
                say(f"writing the miniature world to {args.data}")
                shapes.write_world(args.data, flag="--data")

    attempt(first_process_prepares, world)

    def build():
        data = index_pretraining(args.data, args.sets, args.index, say)
        names = data["names"]
        if state is not None:
            check_names(args.data, names, state["names"], args.resume)
        tokenizer = Tokenizer(state["vocabulary"] if state else args.vocab or f"{args.data}/vocab.txt")
        torch.manual_seed(args.seed)  # the same weights in each process
        model = E2EVLP(state["config"] if state else config_of(args, tokenizer, names))
        if state is not None:
            model.load_state_dict(state["model"])
        elif args.backbone_weights != "none":
            model.backbone.load_weights(args.backbone_weights)
        return data, decodable(data["val"][:args.val_pictures], say), tokenizer, model

    data, val, tokenizer, model = attempt(build, world)
    names, config = data["names"], model.config
    args.pad = tokenizer.pad
    model.to(device)
    set_up(model, args)
    backbone = list(model.backbone.resnet.parameters())
    ours = {id(p) for p in backbone}
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if id(p) not in ours], "lr": args.lr},
        {"params": backbone, "lr": args.lr_backbone}], weight_decay=args.weight_decay, fused=True)
    base_rates = [args.lr, args.lr_backbone]
    step = spent = 0
    if state is not None:
        load_optimizer(optimizer, state["optimizer"], f"--resume {args.resume}")
        step, spent = state["step"], state["seconds"]
    # DDP adds up the gradients in buckets while the backward pass still runs; views: they lie there and nowhere else
    wrapped = model if world == 1 else DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=not config.frozen_batch_norm)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it cuts graphs where buckets end, and fails once shapes are dynamic
        torch._dynamo.config.recompile_limit = 64  # torch 2.11 compiles for even and odd sides apart; 8 are too few
        wrapped = torch.compile(wrapped)

    if state is not None:
        for key in ("model", "optimizer"):  # of the largest model more than a gigabyte a process
            state.pop(key, None)

    # Batches
    trainset = PretrainingSet(data["train"], tokenizer, len(names["attributes"]), short_sides=args.short_sides,
                              long_side=args.long_side, sentences_per_picture=args.sentences_per_picture,
                              without_sentence=args.without_sentence, seed=args.seed,
                              words=words_of(names, tokenizer, args.without) if args.cells else None,
                              masks={"share": args.mask_share, "named_share": args.mask_share if args.mask_named is None
                                     else args.mask_named, "named": frozenset(
                                         piece for kind in words_of(names, tokenizer).values() for name in kind
                                         for piece in name)})
    batches = Batches(data["train"].sizes, args.batch_size, parts=parts, rank=rank, world=world,
                      seed=args.seed, start=step)
    loader = torch.utils.data.DataLoader(
        trainset, batch_sampler=batches, num_workers=args.workers, pin_memory=device.startswith("cuda"),
        collate_fn=functools.partial(collate, pad=tokenizer.pad), prefetch_factor=4 if args.workers else None,
        worker_init_fn=ignore_signals)
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch)
    say(f"{len(data['train'])} pictures with {data['sentences']} sentences to train on, "
        f"{len(val)} held out")
    say(f"{config.backbone}, {config.encoder_layers} + {config.decoder_layers} layers: "
        f"{count_parameters(model) / 1e6:.1f} M parameters on {device}")
    say(f"batch {args.batch_size} = {world} process(es) x {parts} part(s) x {share // parts} pictures, "
        f"{args.sentences_per_picture} sentence(s) each; {steps} steps"
        + (f" or {args.minutes:g} minutes" if args.minutes else ""))
    if state is not None:
        over = share_done(step, steps, spent, args.minutes) >= 1
        say(f"{args.resume}: " + (f"has ended, at step {step}; more --steps, --epochs or --minutes would go on" if over
                                  else f"going on at step {step}"))
        if over and state.get("ended"):  # else it was stopped in its last validation, which is made up for
            return stop_processes(world)

    # The run
    output = Output(args, state, rank, world, stop, say)
    weights = weights_of(args.without, args.loss_weights, args.cells)
    broken, bad_steps = (set(state.get("broken", ())), state.get("bad_steps", 0)) if state else (set(), 0)
    kept = {k: v for k, v in vars(args).items() if k not in ("resume", "pad", "words")}
    facts = run_facts("pretrain.py", "pre-training", args, config, world, state is not None)
    if rank == 0:
        write_report(args.output, facts)  # a run that is stopped before its first validation has one too

    def save(ended=False):
        output.save(model, tokenizer, names, step, args=kept, optimizer=optimizer.state_dict(), seconds=spent,
                    validation_due=due, broken=sorted(broken), bad_steps=bad_steps, ended=ended)

    size = {"short": max(args.short_sides), "long": args.long_side, "device": device}
    prepared = functools.cache(lambda: prepare(tokenizer, names, val))

    def validate():
        nonlocal due
        if stop.saved != (step, output.last):
            save()  # first of all: what goes wrong below loses no training, and Ctrl-C need not wait for the end
        stop.release()
        share_statistics(model, world)
        measures = {}
        if val:
            bar.set_description("validating")
            if bar.disable:
                say(f"step {step}/{bar.total}  validating on {len(val)} pictures")
            measures = measure_with_blind(model, tokenizer, names, val, batch_size=share // parts,
                                          amp=args.amp == "bf16", rank=rank, world=world, prepared=prepared(), **size)
            output.log({"step": step, "epoch": step / batches.per_epoch, **measures})
            bar.set_description()
        if rank == 0:
            write_report(args.output, facts, pretrained_gallery(
                model, tokenizer, names, val, amp=args.amp == "bf16", without=args.without, **size) if val else None)
        due = False
        model.train()
        stop.hold()
        return measures

    statistics = Statistics(model)
    model.cells = args.cells > 0
    model.train()
    iterator = iter(loader)
    bar = tqdm(total=steps, initial=step, disable=None if rank == 0 else True, unit="step")
    started, before, logged, saved = time.time(), spent, time.time(), time.time()
    seen = stopping = 0
    due = state is not None and state.get("validation_due", False)  # when the run was stopped
    done = share_done(step, steps, spent, args.minutes) >= 1
    stop.hold()
    while not done:
        if due:  # here, so that a run that was stopped in it begins with it
            validate()
            logged, seen = time.time(), 0

        # 1. The step's parts, and what their losses are divided by, summed over parts and processes. The first
        #    process's clock travels with the sums, so that all agree on when the time is over; and so does Ctrl-C.
        micro = attempt(lambda: [next(iterator) for _ in range(parts)], world)
        unknown = {name for batch in micro for name in batch["broken"]} - broken
        local = [sum(column) for column in zip(*(counts_of(batch, args) for batch in micro))]
        *counts, spent, keep, new, stopping = summed(
            [*local, *((before + time.time() - started, time.time() - saved > args.checkpoint_minutes * 60)
                       if rank == 0 else (0.0, 0.0)), len(unknown), stop.number], world, device)
        if stopping:  # before this step has changed anything: it is the first one of the run that goes on
            break
        if new:  # by name, so that a picture that several processes met counts once
            broken.update(*gathered(unknown, world))
        if len(broken) > args.max_broken:
            raise InputError(f"{sorted(broken)[0]}: cannot be decoded, nor can {len(broken) - 1} more "
                             f"(--max-broken {args.max_broken}); mend or remove them")

        # 2. The learning rate: a function of the step and of how much of the training is done.
        scale = learning_rate_scale(step, share_done(step, steps, spent, args.minutes), args)
        for group, rate in zip(optimizer.param_groups, base_rates):
            group["lr"] = rate * scale

        # 3. Forward and backward. Dropout is seeded by the step, so that a resumed run draws what it would have drawn.
        torch.manual_seed(hash((args.seed, step, rank)) % 2 ** 31)
        sums = {}
        statistics.keep()
        for number, batch in enumerate(micro):
            batch = to_device(batch, device)
            # Only the last part's backward needs to add up the gradients over the processes.
            wait = wrapped.no_sync() if world > 1 and number < parts - 1 else torch.enable_grad()
            with wait:
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.amp == "bf16"):
                    outputs = wrapped(batch)
                named = losses(outputs, batch, counts, args)
                # Eq. 3: L = L_mlm + L_itm + L_v + L_dec, where L_v = class + 5 L1 + 2 GIoU + attribute
                total = sum(weights[name] * value for name, value in named.items())
                progressed()  # what can wait for another process is the backward pass
                # DDP takes the mean over processes; the counts are sums over them already.
                (total * world).backward()
            for name, value in named.items():
                sums[name] = sums.get(name, 0) + value.detach()

        # 4. Clip, look, step.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        finite = bool(torch.isfinite(norm))  # the same in each process: it is the norm of the sum over all
        if finite:
            optimizer.step()
        else:
            statistics.restore()
            bad_steps += 1
            report_bad_step(output, step, batches.per_epoch, sums, bad_steps, say, sum(gathered(
                [data["train"][i].name for batch in micro for i in batch["index"]], world), []))
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + args.batch_size
        progress = share_done(step, steps, spent, args.minutes)
        bar.total = max(step, round(step / progress))  # with --minutes the time decides how many steps there will be
        bar.update()
        done = progress >= 1

        # 5. Log, validate, keep.
        check_bad_steps(bad_steps, args, output, save)
        if finite and (step % args.log_every == 0 or step == 1 or done):  # the first: is it alive, how fast?
            keys = list(sums)
            values = dict(zip(keys, summed([float(sums[k]) for k in keys], world, device)))
            line = {"step": step, "epoch": round(step / batches.per_epoch, 4),
                    "loss": sum(weights[k] * v for k, v in values.items()), **values,
                    "lr": optimizer.param_groups[0]["lr"], "lr_backbone": optimizer.param_groups[1]["lr"],
                    "grad_norm": float(norm), "pictures_per_second": seen / (time.time() - logged),
                    "seconds": spent, "broken": len(broken)}
            output.log(line)
            bar.set_postfix(loss=f"{line['loss']:.2f}")
            if rank == 0 and bar.disable:
                say(f"step {step}/{bar.total}  loss {line['loss']:.3f}  " + "  ".join(
                    f"{k[5:]} {v:.3f}" for k, v in values.items()) + f"  {line['pictures_per_second']:.0f} pictures/s"
                    f"  {time_left(before + time.time() - started, progress, args.minutes)}")
            logged, seen = time.time(), 0
        due = not done and args.val_every > 0 and step % args.val_every == 0
        if keep:
            save()
            saved = time.time()
    spent = before + time.time() - started
    if stopping:
        save()
        stop.together(world)
    if broken:
        say(f"{len(broken)} pictures could not be decoded and were replaced: {sorted(broken)[:3]}")
    measures = validate()
    if rank == 0 and val:
        sheet = os.path.join(args.output, "sheet.png")
        draw_sheet(sheet, model, tokenizer, names, val[:12], without=args.without, **size)
    save(ended=True)
    stop.release()
    bar.close()
    if val:
        say(summary(measures, len(val), args.output))
    stop_processes(world)


def summary(measures, pictures, folder):
    """One sentence: what the model learnt, with a blind model's figures beside it, and where to look."""
    says = (("mlm_accuracy_visual", "it guesses {} of the hidden words that the picture decides"),
            ("itm_accuracy", "tells its own sentences from others at {}"),
            ("itm_accuracy_foil", "and from those with one wrong word at {}"),
            ("AP50", "finds objects with an AP50 of {}"), ("AP50_no_sentence", "without a sentence {}"),
            ("attribute_accuracy", "names {} of their attributes"),
            ("caption_objects", "and {} of its captions name only what is there"))
    parts = [text.format(f"{measures[f'val_{name}']:.2f} (blind {measures[f'blind_{name}']:.2f})")
             for name, text in says if f"val_{name}" in measures]
    return f"On {pictures} held-out pictures {', '.join(parts)}; see {folder}/report.html and sheet.png"


# ----------------------------------------------------------------------------------------------------------------
# The plan


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being: held `now`, and at the `peak`."""

    def __init__(self, known):
        super().__init__()
        self.known = weakref.WeakSet(t.untyped_storage() for t in known)  # not counted: they were there before
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def free(self, size):
        self.now -= size


def step_cost(config, args, pictures, height, width, words=20, fake=True):
    """(FLOPs, bytes) of forward and backward: so many pictures of one size, --sentences-per-picture of 20 word pieces.

    bytes: the peak beyond weights and gradients, so activations and what is needed in passing. fake: with tensors that
    have a shape and no memory, in seconds on any machine. Attention is taken as the quick kernels do it, which do not
    keep its weights.
    """
    model = E2EVLP(config).train()
    model.recompute = args.activation_checkpointing
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    for module in model.modules():
        if isinstance(module, Attention):
            module.dropout = 0.0  # CPUs, which stand for GPUs here, have no quick kernel with dropout
        for kept in (module._parameters, module._buffers) if fake else ():
            kept.update({name: torch.nn.Parameter(mode.from_tensor(t)) if kept is module._parameters else
                         mode.from_tensor(t) for name, t in kept.items() if t is not None})
    K, hidden = args.sentences_per_picture, max(1, round(0.15 * (words - 2)))
    sizes = torch.tensor([[height, width]] * pictures)  # a real tensor: the host reads it
    # Some releases of torch do not count the CPU's quick attention
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                    lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
                    lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}
    with mode:
        for parameter in model.parameters():  # as with several parts, or with DDP's buckets: they are always there
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.full((pictures, K, words), config.mask)
        batch = {"images": torch.zeros(pictures, 3, height, width, dtype=torch.uint8), "sizes": sizes, "tokens": tokens,
                 "captions": tokens, "mlm_places": torch.arange(pictures * K * hidden),
                 "no_sentence": torch.zeros(pictures, dtype=torch.bool)}
        held = Held([*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()])
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter, held:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp == "bf16"):
                out = model(batch)
            objects = out["objects"]
            # In place of the losses, which keep log_softmax's result too; the matching needs numbers, and is small
            scores = [out["mlm"], out["itm"], out["caption"], *objects["logits"].values(), objects["attributes"]]
            (sum(x.float().log_softmax(-1).sum() for x in scores) + objects["boxes"].sum()).backward()
    return counter.get_total_flops(), held.peak


def plan(args):
    """Print what a run with these flags takes: parameters, FLOPs, memory, steps, time. Trains nothing.

    The pictures' number and sizes are --data's, or if nothing is there 180,000 of 480 x 640 pixels.
    """
    vocabulary = args.vocab or f"{args.data}/vocab.txt"
    there = os.path.exists(vocabulary)
    data = index_pretraining(args.data, args.sets, args.index) if there else None
    if there:
        config = config_of(args, Tokenizer(vocabulary), data["names"])
        shapes_of, number = np.asarray(data["train"].sizes), len(data["train"])
    else:
        config = Config(**{flag: getattr(args, flag) for flag in MODEL_FLAGS},
                        frozen_batch_norm=args.backbone_weights != "none")
        shapes_of, number = np.array([[480, 640]]), 180_000
    share, parts = divide_batch(args, args.gpus)
    at_once = share // parts
    with torch.device("meta"):
        parameters = count_parameters(E2EVLP(config))
    short, long = max(args.short_sides), max(args.long_side, max(args.short_sides))

    # FLOPs grow with the area, attention's with its square: three sizes give the curve, the pictures' sizes the mean.
    points = [(int(short * scale), int(long * scale)) for scale in (1, 0.75, 0.5)]
    costs = [step_cost(config, args, 1, *size) for size in points]
    curve = np.polyfit([h * w for h, w in points], [flops for flops, _ in costs], 2)
    some = shapes_of[np.linspace(0, len(shapes_of) - 1, min(len(shapes_of), 1000)).astype(int)]
    areas = [math.prod(resized(*shape, side, args.long_side)) for shape in some.tolist() for side in args.short_sides]
    flops = float(np.polyval(curve, areas).mean())
    one = costs[0][1]
    each = step_cost(config, args, 2, *points[0])[1] - one  # what one more picture takes
    fixed = [("weights", 4 * parameters), ("gradients", 4 * parameters), ("optimiser", 8 * parameters)]
    whole = sum(size for _, size in fixed) + one + (at_once - 1) * each
    fitting = max(0, int(1 + (args.gpu_memory * 1e9 - whole + (at_once - 1) * each) // each))
    per_epoch = number / args.batch_size
    steps = args.steps or math.ceil(args.epochs * per_epoch)
    seconds = args.batch_size * flops / (args.gpus * args.gpu_tflops * 1e12)
    size = f"{short} x {long}"
    lines = [
        ("model", f"{config.backbone}, {config.encoder_layers} + {config.decoder_layers} layers, "
         f"{parameters / 1e6:.1f} M parameters"),
        ("a step", f"{args.batch_size} pictures = {args.gpus} GPU(s) x {parts} part(s) x {at_once}, each with "
         f"{args.sentences_per_picture} sentence(s) of 20 word pieces"),
        ("FLOPs", f"{flops / 1e12:.3g} T a picture on average, {costs[0][0] / 1e12:.3g} T at {size} pixels; "
         f"{args.batch_size * flops / 1e12:.3g} T a step, forward and backward"),
        ("memory, one GPU", " + ".join(f"{name} {size / 1e9:.2f}" for name, size in (
            *fixed, ("activations", one + (at_once - 1) * each))) + f" = {whole / 1e9:.2f} of {args.gpu_memory:g} GB, "
         f"at {size} pixels; CUDA itself and its workspaces take 1 to 2 more"),
        ("fits", f"at most {fitting} pictures at once" + ("" if at_once <= fitting else
         f", not {at_once}: " + (f"give --micro-batch {fitting}" if fitting else "a smaller picture or model") +
         ("" if args.activation_checkpointing else " or --activation-checkpointing"))),
        ("an epoch", f"{per_epoch:,.0f} steps, {number:,} pictures " + (f"of {args.data}" if there else
         f"(the paper's; nothing lies in {args.data})")),
        ("the whole run", f"{steps:,} steps, {steps / per_epoch:,.4g} epochs: {seconds * steps / 3600:,.3g} hours "
         f"if each GPU sustains {args.gpu_tflops:g} TFLOP/s, {seconds:.3g} s a step; the loader must bring each "
         f"{args.batch_size / args.gpus / seconds:,.3g} pictures a second")]
    print("\n".join(f"{name:16} {text}" for name, text in lines))


def main(argv=None):
    def work(stop):
        args, state = parse(argv)
        return plan(args) if args.plan else train(args, state, stop)

    return command("pretrain.py", work)


if __name__ == "__main__":
    sys.exit(main())
