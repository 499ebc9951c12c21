"""Stage 2: fine-tune a pre-trained E2E-VLP on one of five tasks (section 5.1; detection: section 5.8).

    python finetune.py --task vqa --mini --init runs/mini/last.pt                       # a laptop, minutes
    python finetune.py --task flickr30k --init runs/pretrain/last.pt --data DIR         # one GPU
    torchrun --nproc_per_node=8 finetune.py --task vqa --init FILE --data DIR           # defaults: the paper's settings

    task        reads                               learns with                           chosen by
    vqa         [CLS] question [SEP] picture        sigmoid cross-entropy over answers    overall accuracy
    nlvr2       two such sequences, one a picture   cross-entropy, true or false          accuracy
    caption     the picture alone                   label-smoothed cross-entropy          CIDEr
    flickr30k   [CLS] sentence [SEP] picture        circle loss over sampled pairs        mean of IR@1 and TR@1
    detection   [CLS] sentence [SEP] picture        DETR's set loss, COCO's head          AP

What it writes to --output: log.jsonl, last.pt (with the optimiser: `--resume` goes on from it), best.pt (the best on
validation), report.html and what it is made of, report.json.
`--init none` starts from nothing, so that what pre-training is worth can be seen. Ctrl-C (or SIGTERM, or SIGUSR1)
finishes the step, writes last.pt and says how to go on.
"""

import argparse
import functools
import math
import os
import sys
import time
from collections import Counter
from dataclasses import replace

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # macOS: what MPS lacks runs on the CPU; torch reads it once

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    Batches,
    HelpFormatter,
    InputError,
    TaskSet,
    Tokenizer,
    attempt,
    collate_task,
    command,
    common_answers,
    gathered,
    ignore_signals,
    index_task,
    progressed,
    read_json,
    say_first,
    share_statistics,
    start_processes,
    stop_processes,
    summed,
)
from evaluate import BEST_BY, answer_task, check_output, run_facts, score_answers, task_gallery, write_report
from matcher import LOSS_WEIGHTS as SET_WEIGHTS
from matcher import count, set_loss
from model import E2EVLP, TASKS, load_checkpoint, load_weights, save_checkpoint
from pretrain import (
    MINI_MODEL,
    MODEL_FLAGS,
    Output,
    Statistics,
    add_keeping_flags,
    add_loading_flags,
    add_loop_flags,
    add_model_flags,
    check_bad_steps,
    check_flags,
    check_kept,
    check_resumed,
    config_of,
    divide_batch,
    load_optimizer,
    report_bad_step,
    resumable,
    set_up,
    share_done,
    time_left,
    to_device,
)

# What a checkpoint's weights fix; dropout has none, so a fine-tuning may choose its own
FIXED = [flag for flag in MODEL_FLAGS if flag != "dropout"]
# Section 5.1 where it gives them: no epochs for captioning, nothing for detection; decay: the epochs after which the
# rates are multiplied by 0.1
DEFAULTS = {"vqa": dict(batch_size=32, epochs=12, lr=1e-4, decay=[6, 9]),
            "nlvr2": dict(batch_size=32, epochs=12, lr=1e-4, decay=[6, 9]),
            "caption": dict(batch_size=32, epochs=12, lr=1e-4, decay=[6, 9]),
            # All pairs of 1,014 pictures and 5,070 sentences are five times what an epoch trains on
            "flickr30k": dict(batch_size=64, epochs=4, lr=5e-5, decay=[], val_examples=200),
            "detection": dict(batch_size=32, epochs=12, lr=1e-4, decay=[6, 9])}
# What the model scores blind, when it sees the mean picture only, is measured on the first ones: retrieval's pairs grow
# with the square, and for the others a thousand tell enough
BLIND_EXAMPLES = {"vqa": 1000, "nlvr2": 1000, "caption": 1000, "flickr30k": 50, "detection": 1000}
# The parts of the model that a task uses. The others are not trained: they get no gradient, and DDP must know.
PARTS = {"vqa": ("backbone", "sentence", "encoder", "answer"), "nlvr2": ("backbone", "sentence", "encoder", "pair"),
         "caption": ("backbone", "sentence", "encoder", "decoder", "caption"),
         "flickr30k": ("backbone", "sentence", "encoder", "itm"),
         "detection": ("backbone", "sentence", "encoder", "decoder", "query_positions", "classes.coco", "box")}


def parse(argv):
    """Flags. Three layers of defaults: the task's, then --mini's, then what is given."""
    parser = argparse.ArgumentParser(usage="finetune.py --task TASK --init FILE [--mini] ... (--help: all flags)",
                                     description="Fine-tune E2E-VLP (Xu et al., ACL 2021, section 5.1).",
                                     epilog="The task's defaults: --batch-size 32 --epochs 12 --lr 1e-4, retrieval's "
                                     "64, 4 and 5e-5. --mini's: mostly 16, 100 and 5e-4, --minutes 4 to 8; see MINI.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="what to learn")
    parser.add_argument("--mini", action="store_true", help="other defaults: the miniature world on a laptop")
    parser.add_argument("--init", metavar="FILE",
                        help="checkpoint to start from, or none: then the model's flags count")
    g = parser.add_argument_group("data")
    add_loading_flags(g)
    g.add_argument("--vocab", metavar="FILE", help="with --init none: WordPiece vocabulary (default: DATA/vocab.txt)")
    g.add_argument("--answers", metavar="FILE",
                   help="VQA: JSON list of answers (default: those given at least 9 times in train + val)")
    g.add_argument("--text", choices=("caption", "none"), default="caption", help="the sentence detection is given")
    g.add_argument("--sentences-per-picture", type=int, default=1, metavar="N",
                   help="VQA, captioning, retrieval: questions or sentences that share one backbone pass")
    g.add_argument("--train-examples", type=int, default=0, metavar="N",
                   help="train on the first ones only; 0: all")
    add_model_flags(parser)
    g = parser.add_argument_group("training")
    g.add_argument("--batch-size", type=int, metavar="N",
                   help="pictures a step, over all processes (default: the task's)")
    g.add_argument("--epochs", type=float, metavar="N",
                   help="passes over the training examples (default: the task's)")
    g.add_argument("--lr", type=float, metavar="RATE", help="learning rate of the transformer (default: the task's)")
    g.add_argument("--lr-backbone", type=float, default=1e-5, metavar="RATE",
                   help="learning rate of the ResNet; 0 freezes it")
    g.add_argument("--lr-head", type=float, default=1.0, metavar="FACTOR",
                   help="VQA, NLVR2: the new classifier's rate, as a multiple of --lr")
    g.add_argument("--schedule", choices=("step", "cosine"), default="step", help="step: x 0.1 after the task's epochs")
    g.add_argument("--label-smoothing", type=float, default=0.1, metavar="SHARE",
                   help="captioning: share of the target that all words have together, 0 to 1")
    g.add_argument("--negatives", type=int, default=4, metavar="N",
                   help="retrieval: wrong sentences, and pictures, a pair")
    g.add_argument("--gamma", type=float, default=32.0, metavar="SCALE", help="retrieval: scale of the circle loss")
    g.add_argument("--margin", type=float, default=0.25, metavar="MARGIN", help="retrieval: margin of the circle loss")
    add_loop_flags(g)
    g = parser.add_argument_group("output")
    g.add_argument("--output", metavar="DIR",
                   help="folder for log.jsonl, last.pt, best.pt and report.html (default: runs/TASK)")
    add_keeping_flags(g)
    g.add_argument("--val-every", type=float, default=1.0, metavar="EPOCHS", help="epochs between two validations")
    g.add_argument("--objects", action="store_true", help="captioning: caption_objects too, by Visual Genome's boxes")
    g.add_argument("--val-examples", type=int, default=0, metavar="N",
                   help="validate on the first ones only; 0: all (default: 0, retrieval's 200)")
    args = parser.parse_args(argv)
    if args.task:
        parser.set_defaults(output=f"runs/{args.task}", **DEFAULTS[args.task])
        if args.mini:
            mini_preset(parser, args.task, args.init)
    if args.resume == "auto" and not args.task:
        raise InputError("--resume auto: give --task and --init too, as for a new run")
    path, state = resumable(args.resume, parser.parse_args(argv).output, fine_tuning=True)
    if path:
        check_kept(parser, state["args"], f"--resume {path}")
        parser.set_defaults(**{**state["args"], "output": os.path.dirname(path) or "."})
        args = parser.parse_args(argv)
        for flag in (*FIXED, "task", "init", "batch_size", "sentences_per_picture", "weight_decay", "dropout", "seed",
                     "answers", "text"):
            if getattr(args, flag) != state["args"].get(flag):
                raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: the resumed run has "
                                 f"{state['args'].get(flag)}; leave the flag away")
        if bool(args.lr_backbone) != bool(state["args"].get("lr_backbone")):
            raise InputError(f"--lr-backbone {args.lr_backbone}: a resumed run cannot freeze or unfreeze the ResNet; "
                             f"it has {state['args'].get('lr_backbone')}")
    elif not args.task or not args.init:
        raise InputError("give --task and --init, a checkpoint's file or none; or --resume")
    else:
        init = args.init
        if init != "none":  # the model is the file's: a flag that is given can only agree with it, see `build`
            parser.set_defaults(**dict.fromkeys((*FIXED, "backbone_weights", "vocab")))
        args = parser.parse_args(argv)
        state = None if init == "none" else load_checkpoint(init, "--init")
    args.resume = path
    check_flags(args)
    if args.val_every <= 0:
        raise InputError(f"--val-every {args.val_every}: must be more than 0")
    args.words = sys.argv[1:] if argv is None else list(argv)  # for the report
    return args, state


# The miniature world: what differs from task to task. NLVR2's 1,500 statements are soon known by heart: its pictures
# keep the features that pre-training gave them, and the new classifier learns faster than what is below it.
MINI = {"vqa": dict(batch_size=16, sentences_per_picture=4, minutes=7.0, val_every=3),
        "nlvr2": dict(minutes=8.0, val_every=3, lr=3e-4, lr_backbone=0.0, lr_head=3.0, dropout=0.1, weight_decay=0.05),
        "caption": dict(batch_size=16, sentences_per_picture=4, minutes=4.0, objects=True),
        "flickr30k": dict(batch_size=16, sentences_per_picture=2, minutes=6.5, val_examples=0),
        "detection": dict(batch_size=16, minutes=4.0)}


def mini_preset(parser, task, init):
    """The miniature world on two cores in less than 12 minutes, start and validation included."""
    parser.set_defaults(**{**MINI_MODEL, **dict(
        data="data/mini", short_sides=[64], long_side=96, workers=1, epochs=100, lr=5e-4, lr_backbone=5e-4,
        schedule="cosine", warmup=50, clip=1.0, val_every=1e6, output=f"runs/mini-{task}"), **MINI[task]})
    if init == "none":  # from nothing the rates of pre-training are the better ones
        parser.set_defaults(lr=1e-3, lr_backbone=1e-3)


# ----------------------------------------------------------------------------------------------------------------
# What each task learns with


def circle_loss(right, wrong, margin=0.25, gamma=32.0):
    """Circle loss of one right and several wrong similarities (Sun et al. 2020, Eq. 6), for each of N anchors.

    right (N,), wrong (N, M), both in 0..1. With O_p = 1 + m, O_n = -m, D_p = 1 - m, D_n = m:
        L = log(1 + sum_j exp(g a_n (s_n - D_n)) * exp(-g a_p (s_p - D_p))),  a_p = [O_p - s_p]+, a_n = [s_n - O_n]+
    The weights a grow with how far a similarity is from its optimum, and are not differentiated: a pair that is nearly
    right is left alone, the hardest of the wrong ones outweighs the rest in the sum. Returns (N,).
    """
    weight_right = (1 + margin - right).clamp(min=0).detach()
    weight_wrong = (wrong + margin).clamp(min=0).detach()
    pull = -gamma * weight_right * (right - (1 - margin))
    push = torch.logsumexp(gamma * weight_wrong * (wrong - margin), dim=1)
    return F.softplus(push + pull)


def draw_others(own, candidates, n, generator):
    """(N, n) int64: for each of `own` (N,) n different places in `candidates` (M,) that do not hold the same number,
    as long as there are so many.
    """
    chance = torch.rand(len(own), len(candidates), generator=generator)
    return chance.masked_fill(own[:, None] == candidates, -1).topk(n).indices


class Objective(nn.Module):
    """The model with the loss of its task: what DistributedDataParallel wraps."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, batch, counts):
        """batch of data.collate_task, on the device; counts: of `counts_of`, summed over all processes.

        Returns the named losses, each divided by its count; their weighted sum over all processes is the loss.
        """
        model, args, tokens, targets = self.model, self.args, batch["tokens"], batch["targets"]
        grid, picture = model.encode_picture(batch["images"], batch["sizes"]), batch["picture"]
        if args.task == "vqa":
            logits = model.answer_questions(grid.rows(picture), tokens).float()
            return {"loss_vqa": F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / counts[0]}
        if args.task == "nlvr2":
            logits = model.judge_statements(grid, tokens).float()
            return {"loss_nlvr2": F.cross_entropy(logits, targets, reduction="sum") / counts[0]}
        if args.task == "caption":
            logits = model.decode_caption(model.encode(grid).rows(picture), tokens[:, :-1]).float()
            return {"loss_caption": F.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=model.config.pad, reduction="sum",
                label_smoothing=args.label_smoothing) / counts[0]}
        if args.task == "flickr30k":
            # Each sentence with its own picture, with n other pictures, and its picture with n other sentences
            N, n = len(tokens), args.negatives
            repeated = torch.arange(N, device=tokens.device).repeat_interleave(n)
            pictures = torch.cat([picture, batch["other_pictures"].flatten(), picture[repeated]])
            sentences = torch.cat([repeated[::n], repeated, batch["other_sentences"].flatten()])
            scores = model.similarity(grid.rows(pictures), tokens[sentences]).sigmoid()
            right, *wrong = scores.split([N, N * n, N * n])
            both = sum(circle_loss(right, w.view(N, n), args.margin, args.gamma).sum() for w in wrong)
            return {"loss_flickr30k": both / (2 * counts[0])}
        objects = model.detect(model.encode(grid, tokens if args.text == "caption" else None))
        objects["logits"] = {"coco": objects["logits"]["coco"]}
        return set_loss(objects, targets, counts=torch.tensor(counts))


def counts_of(batch, args, config):
    """What the task's loss is divided by, for this process's part of the batch."""
    if args.task == "detection":
        return count(batch["targets"], config.queries).tolist()
    return [float((batch["tokens"][:, 1:] != config.pad).sum()) if args.task == "caption" else len(batch["tokens"])]


def rate_scale(step, epoch, progress, args):
    """What both rates are multiplied by, from the step, the epochs done and the share of the training (0 .. 1)."""
    warm = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    if args.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return warm * 0.1 ** sum(epoch >= e for e in args.decay)


# ----------------------------------------------------------------------------------------------------------------


def build(args, state, answers, categories, say):
    """(model, tokenizer, names): from --init, whose configuration and vocabulary are kept, or from nothing."""
    torch.manual_seed(args.seed)  # the same weights in each process
    if args.resume:
        model = E2EVLP(state["config"])
        model.load_state_dict(state["model"])
        return model, Tokenizer(state["vocabulary"], state["config"].max_tokens), state["names"]
    if state is None:
        names = {"coco": categories, "vg": [], "attributes": [], "answers": answers}
        tokenizer = Tokenizer(args.vocab or f"{args.data}/vocab.txt")
        model = E2EVLP(config_of(args, tokenizer, names, task=args.task, answers=len(answers)))
        if args.backbone_weights != "none":
            model.backbone.load_weights(args.backbone_weights)
        return model, tokenizer, names
    config = state["config"]
    for flag in (*FIXED, "backbone_weights", "vocab"):
        value, name = getattr(args, flag), f"--{flag.replace('_', '-')}"
        if value is not None and (flag not in FIXED or value != getattr(config, flag)):
            has = f" has {getattr(config, flag)}" if flag in FIXED else " has its own"
            raise InputError(f"{name} {value}: {args.init}{has}; leave the flag away, or give --init none")
    if config.task not in ("", args.task):
        raise InputError(f"--init {args.init}: fine-tuned for {config.task}; give a pre-trained checkpoint")
    if config.task == "vqa" and state["names"]["answers"] != answers:
        source = f"--answers {args.answers}" if args.answers else f"--data {args.data}"
        raise InputError(f"{source}: {len(answers)} answers, but not the {config.answers} of {args.init}; give its "
                         "list, or a pre-trained --init")
    if args.task == "detection" and state["names"]["coco"] != categories:
        raise InputError(f"--data {args.data}: COCO's categories are not those of {args.init} "
                         "(instances_train2017.json has others)")
    tokenizer = Tokenizer(state["vocabulary"], config.max_tokens)
    model = E2EVLP(replace(config, task=args.task, answers=len(answers), dropout=args.dropout))
    load_weights(model, state["model"], say)
    return model, tokenizer, {**state["names"], "answers": answers}


def read_answers(path):
    """A JSON list of answers, as bottom-up-attention's trainval_label2ans; InputError if it is none."""
    answers = read_json(path, "VQA's answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise InputError(f"--answers {path}: must be a JSON list of answers")
    if len(set(answers)) < len(answers):
        raise InputError(f"--answers {path}: {len(answers) - len(set(answers))} answers stand in it twice")
    return answers


def train(args, state, stop):
    """stop: data.Stopping, for Ctrl-C."""
    rank, world, device = start_processes(args.device, args.timeout)
    say = say_first(rank)
    share, parts = divide_batch(args, world)
    check_resumed(args, state if args.resume else None, world)
    if args.task == "flickr30k" and share // parts <= args.negatives:
        raise InputError(f"--negatives {args.negatives}: are drawn from what a process holds at once, {share // parts} "
                         "pictures; choose fewer, or a larger --batch-size or --micro-batch")

    def prepare():
        if rank == 0:
            check_output(args.output)
        found, held = (index_task(args.task, args.data, split, args.index, say) for split in ("train", "val"))
        targets = Counter(found["targets"])
        answers = state["names"]["answers"] if args.resume and args.task == "vqa" else []
        if args.task == "vqa" and not args.resume:
            counts = targets + Counter(held["targets"])
            answers = read_answers(args.answers) if args.answers else common_answers(counts)
            if not answers:
                raise InputError(f"{args.data}/vqa: no answer was given to 9 questions; give --answers FILE")
        if args.task == "nlvr2" and targets.total() < len(found["examples"]):
            raise InputError(f"{args.data}/nlvr2/train.json: has records without a label, which training needs")
        val = held["examples"][:args.val_examples] if args.val_examples else held["examples"]
        return (found["examples"], val, targets, answers,
                *build(args, state, answers, found["categories"], say))

    examples, val, targets, answers, model, tokenizer, names = attempt(prepare, world)
    config = model.config
    for name, parameter in model.named_parameters():
        if (not name.startswith(PARTS[args.task]) or name.startswith("backbone.resnet") and not args.lr_backbone
                or name.startswith("sentence") and args.text == "none" and args.task == "detection"):
            parameter.requires_grad_(False)
    model.to(device)
    set_up(model, args)
    groups = {"rest": [], "head": [], "backbone": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone" if name.startswith("backbone.resnet") else
                   "head" if name.startswith(("answer.", "pair.")) else "rest"].append(parameter)
    base_rates = [args.lr, args.lr * args.lr_head, args.lr_backbone]
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in groups.values()], lr=args.lr,
                                  weight_decay=args.weight_decay, fused=True)

    def to_training():
        model.train()
        if not args.lr_backbone:  # a frozen ResNet keeps the statistics of its batch norm too
            model.backbone.resnet.eval()

    step, before, best = 0, 0.0, -math.inf
    if args.resume:
        load_optimizer(optimizer, state["optimizer"], f"--resume {args.resume}")
        step, before = state["step"], state["seconds"]
        if os.path.exists(f"{args.output}/best.pt"):
            try:
                best = load_checkpoint(f"{args.output}/best.pt")["best"]
            except InputError as error:
                say(f"{error}; it will be written anew")
    if state is not None:
        for key in ("model", "optimizer"):  # of the largest model a gigabyte a process
            state.pop(key, None)
    objective = Objective(model, args)
    if world > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True,
                                            broadcast_buffers=not config.frozen_batch_norm)

    trainset = TaskSet(args.task, examples, tokenizer, answers, short_sides=args.short_sides, long_side=args.long_side,
                       text=args.text, sentences_per_picture=args.sentences_per_picture, most=args.train_examples,
                       seed=args.seed)
    batches = Batches(trainset.sizes, args.batch_size, parts=parts, rank=rank, world=world,
                      seed=args.seed, start=step)
    loader = torch.utils.data.DataLoader(
        trainset, batch_sampler=batches, num_workers=args.workers, pin_memory=device.startswith("cuda"),
        collate_fn=functools.partial(collate_task, pad=tokenizer.pad), prefetch_factor=4 if args.workers else None,
        worker_init_fn=ignore_signals)
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch)
    number = min(len(examples), args.train_examples or len(examples))
    say(f"{args.task}: {number} examples to train on, {len(val)} to validate"
        + (f", {len(answers)} answers" if answers else ""))
    say(f"{config.backbone}, {config.encoder_layers} + {config.decoder_layers} layers, "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M parameters in training, "
        f"on {device}")
    say(f"batch {args.batch_size} = {world} process(es) x {parts} part(s) x {share // parts} pictures; {steps} steps"
        + (f" or {args.minutes:g} minutes" if args.minutes else ""))
    if args.resume:
        over = share_done(step, steps, before, args.minutes) >= 1
        say(f"{args.resume}: " + (f"has ended, at step {step}; more --steps, --epochs or --minutes would go on" if over
                                  else f"going on at step {step}"))
        if over and state.get("ended"):  # else it was stopped in its last validation, which is made up for
            return stop_processes(world)

    output = Output(args, state if args.resume else None, rank, world, stop, say)
    kept = {k: v for k, v in vars(args).items() if k not in ("resume", "words")}
    facts = run_facts("finetune.py", args.task, args, config, world, bool(args.resume))
    if rank == 0:
        write_report(args.output, facts)  # a run that is stopped before its first validation has one too
    broken, bad_steps = (set(state.get("broken", ())), state.get("bad_steps", 0)) if args.resume else (set(), 0)
    seen, spent = 0, before
    started = logged = saved = time.time()
    next_val = state["next_val"] if args.resume else args.val_every

    def save(ended=False):
        output.save(model, tokenizer, names, step, args=kept, optimizer=optimizer.state_dict(), seconds=spent,
                    best=best, next_val=next_val, broken=sorted(broken), bad_steps=bad_steps, ended=ended)

    def show_progress(total):
        return tqdm(total=total, initial=step, disable=None if rank == 0 else True, unit="step")

    def score(said, examples=val):
        return score_answers(args.task, said, examples, args.data, "val", args.objects)

    def keep(scores, blind):
        nonlocal best
        output.log({"step": step, "epoch": step / batches.per_epoch, **{f"val_{k}": v for k, v in scores.items()},
                   **{f"blind_{k}": v for k, v in blind.items()},
                   "blind_examples": min(len(val), BLIND_EXAMPLES[args.task])})
        say(f"step {step}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        mark = sum(scores[k] for k in BEST_BY[args.task])
        if mark > best:
            best = mark
            save_checkpoint(os.path.join(args.output, "best.pt"), model, tokenizer.vocabulary, names, args=kept,
                            step=step, seconds=spent, best=best, next_val=next_val, scores=scores)

    def validate():
        nonlocal next_val
        if stop.saved != (step, output.last):
            save()  # first of all: what goes wrong below loses no training, and Ctrl-C need not wait for the end
        stop.release()
        share_statistics(model, world)
        if bar.disable:
            say(f"step {step}/{bar.total}  validating on {len(val)} examples")
        bar.leave = done
        bar.close()  # answer_task shows one of its own in its place
        few = val[:BLIND_EXAMPLES[args.task]]
        said, blindly = (answer_task(
            args.task, model, tokenizer, names, examples, short=max(args.short_sides), long=args.long_side,
            device=device, text=args.text, batch_size=share // parts, amp=args.amp == "bf16", rank=rank, world=world,
            blind=blind) for examples, blind in ((val, False), (few, True)))

        def write():
            if rank == 0:
                keep(score(said), score(blindly, few))
                write_report(args.output, facts, task_gallery(args.task, said, val, names))

        attempt(write, world)
        stop.hold()
        while next_val <= step / batches.per_epoch:
            next_val += args.val_every
        save(ended=done)  # now with this validation done
        to_training()

    if args.task in ("vqa", "nlvr2") and rank == 0 and not args.resume:  # what needs no model at all, to compare with
        answer = targets.most_common(1)[0][0]
        scores = score([answer] * len(val))
        say(f"always {answer!r}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        output.log({"step": 0, "epoch": 0, **{f"habit_{k}": v for k, v in scores.items()}})

    generator = torch.Generator()
    statistics = Statistics(model)
    to_training()
    iterator = iter(loader)
    bar, stopping = show_progress(steps), 0
    done = share_done(step, steps, spent, args.minutes) >= 1
    stop.hold()
    while not done:
        if step / batches.per_epoch >= next_val:  # here, so that a run that was stopped in it begins with it
            validate()
            bar = show_progress(bar.total)
            logged, seen = time.time(), 0
        micro = attempt(lambda: [next(iterator) for _ in range(parts)], world)
        unknown = {name for batch in micro for name in batch["broken"]} - broken
        local = [sum(column) for column in zip(*(counts_of(batch, args, config) for batch in micro))]
        *counts, examples_here, spent, keeping, new, stopping = summed(
            [*local, sum(len(batch["tokens"]) for batch in micro), *(
                (before + time.time() - started, time.time() - saved > args.checkpoint_minutes * 60) if rank == 0 else
                (0.0, 0.0)), len(unknown), stop.number], world, device)
        if stopping:  # before this step has changed anything: it is the first one of the run that goes on
            break
        if new:
            broken.update(*gathered(unknown, world))
        if len(broken) > args.max_broken:
            raise InputError(f"{sorted(broken)[0]}: cannot be decoded, nor can {len(broken) - 1} more "
                             f"(--max-broken {args.max_broken}); mend or remove them")
        epoch = step / batches.per_epoch
        progress = share_done(step, steps, spent, args.minutes)
        for group, rate in zip(optimizer.param_groups, base_rates):
            group["lr"] = rate * rate_scale(step, epoch, progress, args)

        torch.manual_seed(hash((args.seed, step, rank)) % 2 ** 31)  # what is drawn depends on the step alone: --resume
        generator.manual_seed(hash((args.seed, step, rank)) % 2 ** 31)
        sums = {}
        statistics.keep()
        for number, batch in enumerate(micro):
            if args.task == "flickr30k":  # never one's own, also where a picture stands in the batch twice
                pictures = torch.tensor([batch["ids"].index(i) for i in batch["ids"]])
                own = pictures[batch["picture"]]
                batch["other_pictures"] = draw_others(own, pictures, args.negatives, generator)
                batch["other_sentences"] = draw_others(own, own, args.negatives, generator)
            with objective.no_sync() if world > 1 and number < parts - 1 else torch.enable_grad():
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.amp == "bf16"):
                    named = objective(to_device(batch, device), counts)
                progressed()  # what can wait for another process is the backward pass
                total = sum(SET_WEIGHTS.get(name, 1.0) * value for name, value in named.items())
                (total * world).backward()  # DDP takes the mean over processes; the counts are sums over them already
            for name, value in named.items():
                sums[name] = sums.get(name, 0) + value.detach()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], args.clip)
        finite = bool(torch.isfinite(norm))  # the same in each process: it is the norm of the sum over all
        if finite:
            optimizer.step()
        else:
            statistics.restore()
            bad_steps += 1
            report_bad_step(output, step, batches.per_epoch, sums, bad_steps, say, sum(gathered(
                [i for batch in micro for i in batch["ids"]], world), []))
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + examples_here
        progress = share_done(step, steps, spent, args.minutes)
        bar.total = max(step, round(step / progress))  # with --minutes the time decides how many steps there will be
        bar.update()
        done = progress >= 1

        check_bad_steps(bad_steps, args, output, save)
        if finite and (step % args.log_every == 0 or step == 1 or done):  # the first: is it alive, how fast?
            values = dict(zip(sums, summed([float(v) for v in sums.values()], world, device)))
            line = {"step": step, "epoch": round(step / batches.per_epoch, 4),
                    "loss": sum(SET_WEIGHTS.get(k, 1.0) * v for k, v in values.items()), **values,
                    "lr": optimizer.param_groups[0]["lr"], "lr_backbone": optimizer.param_groups[2]["lr"],
                    "grad_norm": float(norm), "examples_per_second": seen / (time.time() - logged), "seconds": spent,
                    "broken": len(broken)}
            output.log(line)
            bar.set_postfix(loss=f"{line['loss']:.3f}")
            if rank == 0 and bar.disable:
                say(f"step {step}/{bar.total}  loss {line['loss']:.4f}  {line['examples_per_second']:.0f} examples/s  "
                    f"{time_left(before + time.time() - started, progress, args.minutes)}")
            logged, seen = time.time(), 0
        if keeping:
            save()
            saved = time.time()
    if stopping:
        save()
        stop.together(world)
    if broken:
        say(f"{len(broken)} pictures could not be decoded and were replaced: {sorted(broken)[:3]}")
    validate()
    stop.release()
    say(f"{args.output}/best.pt: " + ", ".join(
        f"{k} {v:.3f}" for k, v in load_checkpoint(f"{args.output}/best.pt")["scores"].items())) if rank == 0 else None
    stop_processes(world)


def main(argv=None):
    return command("finetune.py", lambda stop: train(*parse(argv), stop))


if __name__ == "__main__":
    sys.exit(main())
