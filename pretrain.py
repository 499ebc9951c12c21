"""Stage 1: pre-train E2E-VLP end to end, from pixels and words, with four losses at once (section
3.2).

    python pretrain.py --mini                                          # a laptop: 19 minutes
    python pretrain.py --backbone r50 --data DIR                       # one GPU
    torchrun --nproc_per_node=8 pretrain.py --backbone r152 --data DIR # the paper's run

In this file: an image as a training item and as a batch; the four losses; **the** training loop,
which fine-tuning uses too; what the loop calls by name (class Run: output folder, resume, clock,
log); flags; the run.

`--output` gets log.jsonl, last.pt (all that is needed to use the model or to resume), and at each
validation curves.png and sheet.png (held-out images: truth beside answer). `--mini` is only a set
of other defaults, see `MINI`; a flag that is given wins over it. Ctrl-C, SIGTERM and SIGUSR1 finish
the step and write last.pt; `--resume` ends with the weights of a run that never stopped (on a CPU;
with --minutes the clock decides).
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

import shapes
from data import (LONG_SIDE, SHORT_SIDES, SIGNALS, HelpFormatter, InputError, Objects,
                  Tokenizer, add_source_flags, command, decodable, describe, gather,
                  ignore_signals, init_processes, load_images, mask_tokens, number,
                  on_first_process, other_sentence, pad_images, pad_tokens, pretraining_index,
                  print0, to_pixels)
from evaluate import Predictor, draw_curves, draw_sheet, measure_with_blind, prepare_probes
from matcher import (LOSS_WEIGHTS, NO_OBJECT_WEIGHT, detection_target, loss_normalizers,
                     no_object_weight, set_loss, to_device)
from model import (BACKBONES, E2EVLP, Config, build_model, load_checkpoint,
                   load_pretrained, save_checkpoint)

# --------------------------------------------------------------------------------------------------
# An image as a training item, and a batch of them


class PretrainingSet(Dataset):
    """Images with all that the four losses need. Items are asked for as (epoch, index, draw), see
    Batches. An image that does not decode is replaced by the next one, and named under "broken".
    """

    def __init__(self, examples, tokenizer, names, args):
        """names: of the label sets, {"coco", "vg", "attributes": [...]}; args: the flags."""
        self.examples, self.tokenizer, self.args = examples, tokenizer, args
        self.num_attributes = len(names["attributes"])
        # The word pieces of each name, for --mask-named and the grid-word loss
        self.words = {kind: [tokenizer.encode(name)[1:-1] for name in names[kind]]
                      for kind in ("coco", "vg", "attributes")}
        self.named = set(itertools.chain(*self.words["coco"], *self.words["vg"],
                                         *self.words["attributes"]))
        if "attributes" in args.without:
            self.words["attributes"] = [[] for _ in names["attributes"]]

    def __getitem__(self, key):
        args = self.args
        epoch, index, draw = key
        rng = random.Random(f"{args.seed} {epoch} {index}")
        short = args.short_sides[draw % len(args.short_sides)]
        (image,), index, broken = load_images(self.examples.__getitem__, index,
                                              len(self.examples), short, args.long_side)
        example = self.examples[index]
        item = {"image": to_pixels(image, short, args.long_side), "tokens": [], "mlm_labels": [],
                "itm_labels": [], "captions": [], "id": example.id, "broken": broken}
        every, K = range(len(example.sentences)), args.sentences_per_picture
        chosen = rng.sample(every, K) if len(every) >= K else rng.choices(every, k=K)
        for place in chosen:
            caption = self.tokenizer.encode(example.sentences[place])
            matched = rng.random() < 0.5 or "itm" in args.without
            other = None if matched else other_sentence(self.examples, index,
                                                        place < example.captions, rng)
            # Both kinds of pairs have masked tokens, or ITM would only learn to look for [MASK].
            # But they are only asked for where the sentence is true of the image: a mismatched pair
            # would teach MLM to ignore it. The captioning target is always the image's own.
            sentence = caption if other is None else self.tokenizer.encode(other)
            tokens, labels = mask_tokens(sentence, self.tokenizer, rng, self.named,
                                         args.mask_named)
            item["tokens"].append(tokens)
            item["mlm_labels"].append(labels if other is None else [-1] * len(labels))
            item["itm_labels"].append(int(other is None))
            item["captions"].append(caption)
        item["no_sentence"] = rng.random() < args.without_sentence

        # An image in both sets draws anew whose annotation it trains; one in none has no objects
        annotated = [name for name in ("coco", "vg") if getattr(example, name) is not None]
        source = rng.choice(annotated or ["coco"])
        objects = getattr(example, source) or Objects([], [])
        item["target"] = detection_target(source, objects, self.num_attributes)
        if args.grid_word_loss:
            item["words"] = [list(self.words[source][label]) for label in objects.labels]
            for pieces, numbers in zip(item["words"], objects.attributes):
                for attribute in numbers:
                    pieces += self.words["attributes"][attribute]
        return item


def collate(items, pad, stride):
    """Items of PretrainingSet -> a batch: images, sizes, padded (see pad_images), tokens (B, K, T),
    mlm_positions (M,): the masked tokens' places in tokens.flatten(), mlm_labels (M,): what they
    were, captions (B, K, Tc), itm_labels (B, K) (1 = the sentence belongs to the image),
    no_sentence (B,) (True = detection without a sentence: for some images, and where the first
    sentence is another image's, or the detector would learn not to read), targets: B dicts, see
    matcher.set_loss; ids, broken: names and messages. For the grid-word loss also what `grid_words`
    gives.
    """
    images, sizes, padded = pad_images([item["image"] for item in items])
    B, K = len(items), len(items[0]["tokens"])

    def stack(key, fill):
        flat = [tokens for item in items for tokens in item[key]]
        return pad_tokens(flat, fill).unflatten(0, (B, K))

    labels = stack("mlm_labels", -1).flatten()
    positions = (labels >= 0).nonzero()[:, 0]  # found here: a device would make the host wait
    batch = {"images": images, "sizes": sizes, "padded": padded, "tokens": stack("tokens", pad),
             "mlm_positions": positions, "mlm_labels": labels[positions],
             "captions": stack("captions", pad),
             "itm_labels": torch.tensor([item["itm_labels"] for item in items]),
             "no_sentence": torch.tensor([item["no_sentence"] or not item["itm_labels"][0]
                                          for item in items]),
             "targets": [item["target"] for item in items],
             "ids": [item["id"] for item in items],
             "broken": [message for item in items for message in item["broken"]]}
    if "words" in items[0]:
        batch.update(grid_words(items, images, stride))
    return batch


def grid_words(items, images, stride):
    """For the grid-word loss: object_cells (N,): the cell of the grid that each object's centre
    lies in, counted over the batch; word_pieces (k,), word_objects (k,): the words of each object,
    word_weights (k,): those of an object sum to 1.
    """
    H, W = (math.ceil(side / stride) for side in images.shape[-2:])
    cells, pieces, numbers, weights = [], [], [], []
    for b, item in enumerate(items):
        height, width = item["image"].shape[1:]
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        for (cx, cy, _, _), words in zip(item["target"]["boxes"], item["words"]):
            row = min(int(cy * height / stride), rows - 1)
            column = min(int(cx * width / stride), columns - 1)
            numbers += [len(cells)] * len(words)
            cells.append((b * H + row) * W + column)
            pieces += words
            weights += [1 / len(words) for _ in words]
    return {"object_cells": torch.tensor(cells, dtype=torch.long),
            "word_objects": torch.tensor(numbers, dtype=torch.long),
            "word_pieces": torch.tensor(pieces, dtype=torch.long),
            "word_weights": torch.tensor(weights)}


class Batches(Sampler):
    """Batches of (epoch, index, draw) for one process, a pure function of seed and rank: endless,
    from batch `start` on, pass after pass over all items.

    Every batch is full, and an item comes once in a pass, whatever the number of processes. Images
    of similar shape go together, so that little is padded: chunks of 16 batches (fewer where a pass
    has few) are sorted by shape, cut, and their batches shuffled. `draw` picks the size of the
    scale augmentation, one for a batch in all processes: 480 and 800 pixels in one batch would pad
    most of it, and of two processes one would wait for the other.
    """

    def __init__(self, sizes, batch, *, accumulation_steps=1, rank=0, world=1, seed=0, start=0):
        """sizes (N, 2): height and width of each item's image; batch: the total, over all processes
        and micro-batches; start: the number of batches already done.
        """
        sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
        self.ratios = sizes[:, 1] / sizes[:, 0]
        self.batch, self.accumulation_steps = batch, accumulation_steps
        self.rank, self.world, self.seed, self.start = rank, world, seed, start
        self.chunk = max(1, min(16, len(sizes) // batch // 4))

    def __iter__(self):
        N, length = len(self.ratios), self.chunk * self.batch
        micro_batch = self.batch // self.world // self.accumulation_steps
        for chunk in itertools.count(self.start // self.chunk):
            places = np.arange(chunk * length, (chunk + 1) * length)
            epochs = places // N
            orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(N)
                      for epoch in np.unique(epochs)}
            items = np.array([orders[e][place] for e, place in zip(epochs, places % N)])
            # By epoch first: so an item meets itself at most in the one batch that spans two epochs
            chosen = np.lexsort((self.ratios[items], epochs)).reshape(self.chunk, self.batch)
            rng = np.random.default_rng((self.seed, chunk, 1))
            draws = rng.integers(2**31, size=self.chunk)
            for n in rng.permutation(self.chunk)[max(0, self.start - chunk * self.chunk):]:
                for step in range(self.accumulation_steps):
                    at = (step * self.world + self.rank) * micro_batch
                    yield [(int(epochs[i]), int(items[i]), int(draws[n]))
                           for i in chosen[n, at:at + micro_batch]]


# --------------------------------------------------------------------------------------------------
# The losses


class Pretraining(nn.Module):
    """The model with its four losses: what DistributedDataParallel wraps."""

    def __init__(self, model, no_object=NO_OBJECT_WEIGHT):
        """no_object: of matcher.set_loss."""
        super().__init__()
        self.model, self.no_object = model, no_object

    def normalizers(self, batch):
        """What each loss is divided by: counts that are summed over all processes and
        micro-batches, for the reason in matcher.loss_normalizers.
        """
        config = self.model.config
        words = (batch["captions"][..., 1:] != config.pad).sum()
        return [len(batch["mlm_positions"]), batch["itm_labels"].numel(), float(words),
                *loss_normalizers(batch["targets"], config.queries, self.no_object)]

    def forward(self, batch, normalizers):
        """The named losses of section 3.2, each divided by its normalizer. batch: of `collate`."""
        outputs = self.model(batch)
        mlm, itm, words, boxes = (max(n, 1) for n in normalizers[:4])
        next_words = batch["captions"][..., 1:].flatten()
        losses = {
            "loss_mlm": F.cross_entropy(outputs["mlm"].float(), batch["mlm_labels"],
                                        reduction="sum") / mlm,
            "loss_itm": F.cross_entropy(outputs["itm"].float(), batch["itm_labels"].flatten(),
                                        reduction="sum") / itm,
            "loss_caption": F.cross_entropy(outputs["caption"].float().flatten(0, 1), next_words,
                                            ignore_index=self.model.config.pad,
                                            reduction="sum") / words,
            **set_loss(outputs["objects"], batch["targets"], normalizers[3:], self.no_object),
        }
        if "grid_words" in outputs:
            losses["loss_grid_word"] = grid_word_loss(outputs["grid_words"], batch) / boxes
        return losses


def grid_word_loss(logits, batch):
    """Beyond the paper (--grid-word-loss): each object's words, asked of the cell of the grid that
    its centre lies in; a sum over objects, of which each object's words share the weight equally.

    In the set loss the ResNet learns what a thing is only through queries that have found it, which
    they can only by what the ResNet tells. Here the MLM head, which knows words by their
    embeddings, reads the cell itself: so it must say in the language of the words what is there.
    (Zong et al. 2023 ask a detector's encoder directly; words of detected objects as anchors
    between image and sentence are Oscar's idea, Li et al. 2020.)

    logits (N, V) of E2EVLP.forward for the N objects; batch: see `collate`.
    """
    log_p = logits.float().log_softmax(-1)
    chosen = log_p[batch["word_objects"], batch["word_pieces"]]
    return -(chosen * batch["word_weights"]).sum()


def loss_weights(changed=(), without=(), grid_word=0.0):
    """How much each named loss counts in the sum (Eq. 3; DETR's weights inside L_v).

    changed: [(name of a loss, another weight)]; without: the tasks that are left out; grid_word:
    --grid-word-loss.
    """
    weights = {"loss_mlm": 1.0, "loss_itm": 1.0, "loss_caption": 1.0, **LOSS_WEIGHTS}
    weights.update(changed)
    weights["loss_grid_word"] = grid_word
    off = {"mlm": ["loss_mlm"], "itm": ["loss_itm"], "caption": ["loss_caption"],
           "attributes": ["loss_attribute"], "detection": [*LOSS_WEIGHTS, "loss_grid_word"]}
    for task in without:
        weights.update(dict.fromkeys(off[task], 0.0))
    return weights


# --------------------------------------------------------------------------------------------------
# The training loop


def rate_factor(args, step, progress):
    """What the learning rates are multiplied by: warm-up times cosine, or a tenth after each of
    args.decay. Those and progress are shares of the training, 0 .. 1.
    """
    warm = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    if args.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return warm * 0.1 ** sum(progress >= share for share in args.decay)


def train(run, objective, loader, optimizer, weights, validate, val_steps):
    """The training loop of both stages. Returns the exit code.

    objective: a module with `normalizers(batch)`, whose forward(batch, normalizers) gives named
    losses; loader: endless micro-batches; weights: {name of a loss: its weight}; validate():
    measures and logs; val_steps: between two validations, 0: only one, at the end.
    """
    args = run.args
    parallel = run.parallel(objective)
    parallel.train()
    batches = iter(loader)
    signal_number = 0
    if run.ended and run.progress >= 1:
        print0(f"{args.resume}: has ended; more --steps, --epochs or --minutes would continue it")
        return 0
    run.start_clock()
    while run.progress < 1:
        # The batch, and what its losses are divided by, summed over micro-batches and processes.
        # The first process's clock and a noted signal travel along: all processes must agree.
        micro_batches, normalizers, signal_number = run.next_step(objective, batches)
        if signal_number:
            break

        # The learning rate: a function of the step and of how much of the training is done
        for group, base_rate in zip(optimizer.param_groups, run.base_rates):
            group["lr"] = base_rate * rate_factor(args, run.step, run.progress)

        # Forward and backward. Dropout is seeded by the step, so that a resumed run draws the same.
        torch.manual_seed(hash((args.seed, run.step, run.rank)) % 2**31)
        sums = defaultdict(float)
        for i, batch in enumerate(micro_batches):
            batch = to_device(batch, run.device)
            # Gradients are added up over the processes once, with the last micro-batch
            parallel.require_backward_grad_sync = i == run.accumulation_steps - 1
            with torch.autocast(torch.device(run.device).type, torch.bfloat16,
                                enabled=args.amp == "bf16"):
                losses = parallel(batch, normalizers)
            # Eq. 3: L = L_mlm + L_itm + L_v + L_dec; L_v = class + 5 L1 + 2 GIoU + attribute
            total = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())
            # DDP takes the mean over processes; the normalizers are sums over them already.
            (total * run.world).backward()
            for name, loss in losses.items():
                sums[name] += loss.detach()

        # Clip, step
        grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
        if not torch.isfinite(grad_norm):  # in each process: it is the norm of the sum over all
            run.stop_not_finite(sums, micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1

        # Log, validate, save
        run.log_step(sums, weights, grad_norm)
        if val_steps and run.step % val_steps == 0 and run.progress < 1:
            run.validate(validate)
            parallel.train()
        if time.time() - run.saved > 60 * args.checkpoint_minutes:
            run.save()

    if signal_number:
        run.save()
        print0(f"stopped at step {run.step} by a signal; continue with --resume {run.last}")
        return 128 + signal_number
    run.validate(validate)
    run.save(ended=True)
    return 0


# --------------------------------------------------------------------------------------------------
# What the loop calls by name


class Run:
    """One training run: its processes, output folder, clock, log and checkpoints."""

    def __init__(self, args, state):
        """state: the checkpoint that the run resumes, or None for a new run."""
        self.rank, self.world, self.device = init_processes(args.device, args.timeout)
        self.args, self.state = args, state
        if args.batch_size % self.world:
            raise InputError(f"--batch-size {args.batch_size}: does not divide among {self.world} "
                             f"processes; choose a multiple of {self.world}")
        share = args.batch_size // self.world
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        self.micro_batch = max(n for n in divisors if n <= (args.micro_batch or share))
        self.accumulation_steps = share // self.micro_batch
        # How evaluate's functions are to load images and run the model
        self.evaluation = {
            "short": max(args.short_sides), "long": args.long_side, "workers": args.workers,
            "batch_size": self.micro_batch, "device": self.device, "amp": args.amp == "bf16",
            "rank": self.rank, "world": self.world}
        self.log_file = os.path.join(args.output, "log.jsonl")
        self.last = os.path.join(args.output, "last.pt")
        start = state or {}
        self.step = start.get("step", 0)
        self.seconds = start.get("seconds", 0.0)
        self.broken = start.get("broken", 0)
        self.ended = start.get("ended", False)
        self.kept = {}  # what a stage adds to its checkpoints
        if len(set(gather(self.step))) > 1:
            raise InputError(f"--resume {args.resume}: the processes find different checkpoints; "
                             "--output must be a folder that all hosts share")
        on_first_process(self.prepare_folder)

    def prepare_folder(self):
        """A new run overwrites no other; a resumed one drops the log after its checkpoint."""
        folder = self.args.output
        if self.state is None and os.path.exists(self.last):
            raise InputError(f"--output {folder}: holds a run; continue with --resume {self.last}, "
                             "or give another folder")
        size = 0 if self.state is None else self.state["log_size"]
        try:
            os.makedirs(folder, exist_ok=True)
            with open(self.log_file, "ab") as file:  # if it cannot be written: now, not after hours
                file.truncate(min(file.tell(), size))
        except OSError as error:
            raise InputError(f"--output {folder}: cannot be written ({error.strerror})") from None

    def set_up(self, model, tokenizer, names, groups, num_items):
        """The length of the training, and its optimizer. groups: [(parameters, base rate)];
        num_items: of an epoch.
        """
        args = self.args
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.per_epoch = num_items / args.batch_size  # steps
        self.steps = args.steps or math.ceil(args.epochs * self.per_epoch)
        model.recompute = args.activation_checkpointing
        self.base_rates = [base_rate for _, base_rate in groups]
        self.optimizer = torch.optim.AdamW([{"params": parameters} for parameters, _ in groups],
                                           weight_decay=args.weight_decay, fused=True)
        training = sum(p.numel() for parameters, _ in groups for p in parameters)
        every = sum(p.numel() for p in model.parameters())
        print0(f"{model.config.backbone}: {every / 1e6:.1f} M parameters, "
               f"{training / 1e6:.1f} M in training, on {self.device}")
        limit = f" or {args.minutes:g} minutes" if args.minutes else ""
        print0(f"batch {args.batch_size} = {self.world} process(es) x {self.accumulation_steps} "
               f"accumulation step(s) x {self.micro_batch} images; {self.steps} steps{limit}")
        if self.steps < 1000 and not (args.steps or args.minutes):
            print0(f"warning: so few steps learn little; for {num_items} items give more --epochs "
                   f"({math.ceil(3000 / self.per_epoch)} are 3,000 steps) and a larger --val-every")
        if self.state is not None:
            self.optimizer.load_state_dict(self.state.pop("optimizer"))
            self.state.pop("model")  # of the largest model a gigabyte a process
            print0(f"{args.resume}: resuming at step {self.step}")
        return self.optimizer

    def loader(self, dataset, sizes, collate_fn):
        """Endless micro-batches for this process, from the current step on."""
        args = self.args
        batches = Batches(sizes, args.batch_size, accumulation_steps=self.accumulation_steps,
                          rank=self.rank, world=self.world, seed=args.seed, start=self.step)
        return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers,
                          collate_fn=collate_fn, pin_memory=self.device.startswith("cuda"),
                          prefetch_factor=4 if args.workers else None,
                          worker_init_fn=ignore_signals)

    def parallel(self, objective):
        """The objective, wrapped if there are several processes. Gradients are added up in buckets
        while the backward pass still runs; batch norm's statistics are not sent at each step, see
        `validate`.
        """
        if self.world == 1:
            return objective
        # 1 x 1 kernels have gradients of other strides that mean the same order in memory
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        parallel = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        parallel.broadcast_buffers = False
        return parallel

    def note_signal(self, number, frame):
        """The loop looks once a step. A second Ctrl-C ends at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def start_clock(self):
        self.signal = 0
        for noted in SIGNALS:
            signal.signal(noted, self.note_signal)
        self.started = time.time() - self.seconds
        self.saved = self.logged = time.time()
        self.logged_step = self.step

    @property
    def progress(self):
        """The share that is done: of the steps or of the time, whichever is more."""
        minutes = self.args.minutes
        return max(self.step / self.steps, self.seconds / (minutes * 60) if minutes else 0)

    def next_step(self, objective, batches):
        """(the step's micro-batches, the normalizers, the number of a signal that any process has
        noted).
        """
        micro_batches, problem = [], ""
        try:
            micro_batches = [next(batches) for _ in range(self.accumulation_steps)]
        except InputError as error:
            problem = str(error)
        broken = [message for batch in micro_batches for message in batch["broken"]]
        for message in broken:
            print(f"{message}; replaced by the next image", file=sys.stderr, flush=True)
        counts = zip(*(objective.normalizers(batch) for batch in micro_batches))
        counts = [float(sum(column)) for column in counts]

        clock = time.time() - self.started
        told = gather((clock, len(broken), problem, self.signal, counts))
        clocks, broken, problems, numbers, counts = zip(*told)
        if any(problems):
            raise InputError(max(problems))
        self.seconds = clocks[0]  # the first process's counts
        self.broken += sum(broken)
        return micro_batches, [sum(column) for column in zip(*counts)], max(numbers)

    def log(self, line):
        """Add a dict to log.jsonl."""
        if self.rank == 0:
            with open(self.log_file, "a") as file:
                file.write(json.dumps(line) + "\n")

    def log_step(self, sums, weights, grad_norm):
        """A line of losses every --log-every steps, and after the first: is it alive, how fast?"""
        args, step = self.args, self.step
        if step % args.log_every and step != 1 and self.progress < 1:
            return
        losses = self.total(sums)
        total = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        speed = (step - self.logged_step) * args.batch_size / (time.time() - self.logged)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.log({"step": step, "epoch": round(step / self.per_epoch, 4), "loss": total, **losses,
                  "lr": rates[0], "lr_backbone": rates[-1], "grad_norm": float(grad_norm),
                  "pictures_per_second": speed, "seconds": self.seconds, "broken": self.broken})

        steps = max(step, round(step / self.progress))  # with --minutes, the time decides
        left = self.seconds * (1 / min(1, self.progress) - 1) / 60
        named = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}"
                          for name, value in losses.items())
        print0(f"step {step}/{steps}  loss {total:.3f}  {named}  {speed:.0f} images/s  "
               f"{left:.1f} minutes left")
        self.logged, self.logged_step = time.time(), step

    def validate(self, function):
        """Call a stage's validation. Batch norm that trains has different statistics in each
        process: all measure with the first one's, which the checkpoint holds.
        """
        if self.world > 1 and not self.model.config.frozen_batch_norm:
            for tensor in self.model.buffers():
                dist.broadcast(tensor, 0)
        print0(f"step {self.step}: validating")
        function()
        self.logged, self.logged_step = time.time(), self.step

    def save(self, name="last.pt", **more):
        """Write a checkpoint; the log of before it is on the disk first."""
        if self.rank == 0:
            with open(self.log_file, "a") as file:
                os.fsync(file.fileno())
            flags = {k: v for k, v in vars(self.args).items() if k != "resume"}
            more = {"optimizer": self.optimizer.state_dict(), **self.kept, **more}
            save_checkpoint(os.path.join(self.args.output, name), self.model,
                            self.tokenizer.vocabulary, self.names, args=flags, step=self.step,
                            seconds=self.seconds, broken=self.broken,
                            log_size=os.path.getsize(self.log_file), **more)
        if name == "last.pt":  # the only one that a run resumes
            self.saved = time.time()

    def total(self, sums):
        """{name of a loss: its sum over the processes}."""
        shares = gather([float(value) for value in sums.values()])
        return dict(zip(sums, map(sum, zip(*shares))))

    def stop_not_finite(self, sums, micro_batches):
        """End the run at the first loss that is not finite, with a checkpoint of before."""
        ids = sum(gather([i for batch in micro_batches for i in batch["ids"]]), [])
        values = ", ".join(f"{name} {value:.3g}" for name, value in self.total(sums).items())
        if all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            self.save()  # else batch norm's statistics are spoilt, and the former one stays
        raise InputError(f"step {self.step}: the loss or its gradient is not finite ({values}); "
                         f"images: {', '.join(map(str, ids))}; {self.last}, if it is there, is of "
                         "before: try a lower --lr")


# --------------------------------------------------------------------------------------------------
# Flags


# The flags that say what the model is; a resumed run, and a fine-tuning, has its checkpoint's.
# With --init FILE the sizes are the file's; FILE_FLAGS can only agree with it.
SIZE_FLAGS = ("backbone", "stride", "width", "heads", "feed_forward", "encoder_layers",
              "decoder_layers", "queries", "temperature")
MODEL_FLAGS = (*SIZE_FLAGS, "dropout", "train_stem")
FILE_FLAGS = (*SIZE_FLAGS, "backbone_weights")
# The miniature world on two cores in 19 minutes: smaller, with a recipe that is faster at first
MINI_MODEL = dict(backbone="r18", backbone_weights="none", stride=16, width=128, heads=4,
                  feed_forward=256, encoder_layers=3, decoder_layers=5, queries=9,
                  temperature=20.0, dropout=0.0)
MINI_LOADING = dict(data="data/mini", short_sides=[64], long_side=96, workers=1)
MINI = dict(**MINI_MODEL, **MINI_LOADING, batch_size=24, sentences_per_picture=4, minutes=18.5,
            epochs=40, lr=1e-3, lr_backbone=1e-3, schedule="cosine", warmup=100, clip=5.0,
            mask_named=0.5,
            loss_weights=[("loss_mlm", 16.0), ("loss_itm", 16.0), ("loss_caption", 8.0),
                          ("loss_class", 2.0), ("loss_attribute", 2.0)],
            grid_word_loss=8.0, val_pictures=200, val_every=500, output="runs/mini",
            checkpoint_minutes=5.0)

COUNT = number(int, 1, 10**6)
COUNT_OR_0 = number(int, 0, 10**9)
SHARE = number(float, 0, 1)
AMOUNT = number(float, 0, 1e9)
MORE_THAN_0 = number(float, 1e-9, 1e9)


def named_weight(text):
    """An argparse type: "mlm=3" -> ("loss_mlm", 3.0)."""
    name, _, value = text.partition("=")
    name = f"loss_{name}"
    if name not in loss_weights():
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=WEIGHT")
    return name, AMOUNT(value)


def multiple_of_4(text):
    if COUNT(text) % 4:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 4 (rows and columns, "
                                         "sines and cosines)")
    return int(text)


def shared_flags(usage, description):
    """A parser with the flags of both stages; the defaults are those of pre-training."""
    parser = argparse.ArgumentParser(usage=usage, description=description,
                                     formatter_class=HelpFormatter)
    parser.add_argument("--mini", action="store_true",
                        help="other defaults: those of the miniature world")

    g = parser.add_argument_group("data")
    add_source_flags(g)
    g.add_argument("--vocab", metavar="FILE", help="word pieces (default: DATA/vocab.txt)")
    g.add_argument("--short-sides", nargs="+", type=number(int, 32, 10000), metavar="PIXELS",
                   default=list(SHORT_SIDES), help="scale augmentation: each batch draws one")
    g.add_argument("--long-side", type=number(int, 32, 10000), default=LONG_SIDE, metavar="PIXELS",
                   help="no side gets longer than this")
    g.add_argument("--sentences-per-picture", type=COUNT, default=1, metavar="N",
                   help="sentences or questions that share one pass of the backbone")
    g.add_argument("--workers", type=number(int, 0, 1000), default=min(4, os.cpu_count() or 1),
                   help="loader processes of each training process; 0: it loads itself")

    g = parser.add_argument_group("model")
    g.add_argument("--backbone", choices=BACKBONES, default="r50", help="ResNet-18 .. 152")
    g.add_argument("--backbone-weights", default="imagenet", metavar="WEIGHTS",
                   help="imagenet, none, or the file of a torchvision state dict")
    g.add_argument("--stride", type=int, choices=(16, 32), default=32, help="pixels a grid cell")
    g.add_argument("--width", type=multiple_of_4, default=256, help="hidden units")
    g.add_argument("--heads", type=COUNT, default=12, help="attention heads of 32 units")
    g.add_argument("--feed-forward", type=COUNT, default=1024, help="units of the inner layer")
    g.add_argument("--encoder-layers", type=COUNT, default=12, help="6 or 12 in the paper")
    g.add_argument("--decoder-layers", type=COUNT, default=6, help="for objects and for captions")
    g.add_argument("--queries", type=COUNT, default=100, help="the most objects in an image")
    g.add_argument("--dropout", type=SHARE, default=0.1, help="share of units, 0 to 1")
    g.add_argument("--train-stem", action="store_true",
                   help="train the ResNet's conv1 and layer1 too, which ImageNet weights freeze")

    g = parser.add_argument_group("training")
    g.add_argument("--batch-size", type=COUNT, default=32, help="items a step, in all processes")
    g.add_argument("--micro-batch", type=COUNT_OR_0, default=0,
                   help="images a process holds at once, the rest is accumulated; 0: its "
                   "share (flickr30k: 8)")
    g.add_argument("--epochs", type=MORE_THAN_0, default=200, help="passes over the training items")
    g.add_argument("--steps", type=COUNT_OR_0, default=0, help="end here; 0: --epochs decides")
    g.add_argument("--minutes", type=AMOUNT, default=0,
                   help="time limit of training, for the schedule too; 0: none")
    g.add_argument("--lr", type=AMOUNT, default=1e-4, help="the transformer's learning rate")
    g.add_argument("--lr-backbone", type=AMOUNT, default=1e-5, help="the ResNet's learning rate")
    g.add_argument("--schedule", choices=("step", "cosine"), default="step",
                   help="step: x 0.1 for the last third (fine-tuning: after 1/2 and 3/4; "
                   "flickr30k: constant)")
    g.add_argument("--warmup", type=COUNT_OR_0, default=0, help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=AMOUNT, default=1e-4, help="AdamW's")
    g.add_argument("--clip", type=MORE_THAN_0, default=0.1, help="largest norm of the gradient")
    g.add_argument("--seed", type=number(int, 0, 2**62), default=0, help="of all that is drawn")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:N or mps")
    g.add_argument("--amp", choices=("none", "bf16"), default="none", help="mixed precision")
    g.add_argument("--activation-checkpointing", action="store_true",
                   help="compute activations again in the backward pass: less memory, more time")

    g = parser.add_argument_group("output")
    g.add_argument("--output", default="runs/pretrain", metavar="DIR", help="the run's folder")
    g.add_argument("--resume", metavar="FILE",
                   help="resume this last.pt, with its settings, in its folder; auto: from "
                   "that of --output, or from the start if there is none")
    g.add_argument("--checkpoint-minutes", type=AMOUNT, default=30, metavar="MINUTES",
                   help="time between two checkpoints")
    g.add_argument("--log-every", type=COUNT, default=50, metavar="STEPS", help="between two lines")
    g.add_argument("--timeout", type=number(float, 0.01, 1e6), default=60, metavar="MINUTES",
                   help="a process may keep the others waiting so long, first reading included")

    # Without a flag: the longest wavelength of positions, and DETR's decay, for the last third
    parser.set_defaults(temperature=10000.0, decay=[2 / 3])
    return parser


def parse(argv):
    """(flags, the checkpoint to resume or None). Three layers of defaults: the paper's, then
    --mini's or the resumed run's, then what is given.
    """
    parser = shared_flags(
        usage="pretrain.py [--mini] [--data DIR] [--output DIR] ... (--help: all flags)",
        description="Pre-train E2E-VLP (Xu et al., ACL 2021). The defaults are the paper's.")
    g = parser.add_argument_group("pre-training")
    g.add_argument("--sets", nargs="+", choices=("coco", "vg"), default=["coco", "vg"],
                   help="what to train on")
    g.add_argument("--without-sentence", type=SHARE, default=0.25, metavar="SHARE",
                   help="of images whose objects are detected without a sentence")
    g.add_argument("--without", nargs="+", default=[], metavar="LOSS",
                   choices=("mlm", "itm", "detection", "attributes", "caption"),
                   help="leave out: detection attributes caption (Table 3), mlm itm")
    g.add_argument("--no-object-weight", type=AMOUNT, metavar="WEIGHT",
                   help="of \"no object\" among the classes; default: what balances the objects of "
                   "the training set and the queries (DETR: 0.1)")
    g.add_argument("--loss-weights", nargs="+", type=named_weight, default=[],
                   metavar="NAME=WEIGHT",
                   help="instead of 1 and DETR's: mlm itm caption class bbox giou attribute")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--val-every", type=COUNT_OR_0, default=5000, metavar="STEPS",
                   help="between two validations; 0: only one, at the end")
    g.add_argument("--val-pictures", type=COUNT, default=1000, metavar="N",
                   help="held-out images to measure on, at most")
    g = parser.add_argument_group("beyond the paper")
    g.add_argument("--init", metavar="FILE", help="start from DETR's weights, and in its sizes")
    g.add_argument("--mask-named", type=SHARE, default=0.15, metavar="SHARE",
                   help="of masked words, among those that name an object or attribute")
    g.add_argument("--grid-word-loss", type=AMOUNT, default=0, metavar="WEIGHT",
                   help="ask the cell at an object's centre for the object's words; 0: off")
    args = parser.parse_args(argv)
    if args.mini:
        parser.set_defaults(**MINI)
    if args.init:
        parser.set_defaults(**dict.fromkeys(FILE_FLAGS))
    return parse_resumed(parser, argv, fixed=(*MODEL_FLAGS, "backbone_weights", "vocab", "sets",
                                              "init"))


def parse_resumed(parser, argv, fixed):
    """The last layer of defaults: those of the run that --resume names. fixed: flags that it keeps,
    beside seed, batch and weight decay.
    """
    args = parser.parse_args(argv)
    last = os.path.join(args.output, "last.pt")
    if args.resume == "auto":
        args.resume = last if os.path.exists(last) else None
    if args.resume is None:
        return args, None
    path, folder = args.resume, os.path.dirname(args.resume) or "."
    state = load_checkpoint(path, "--resume")
    is_finetuning = hasattr(args, "task")
    if state.get("optimizer") is None or bool(state["config"].task) != is_finetuning:
        raise InputError(f"--resume {path}: is not a last.pt of this stage")
    parser.set_defaults(**{**state["args"], "output": folder})
    args = parser.parse_args(argv)
    args.resume = path
    if os.path.realpath(args.output) != os.path.realpath(folder):
        raise InputError(f"--output {args.output}: a resumed run stays in its folder, {folder}")
    for flag in (*fixed, "seed", "batch_size", "weight_decay"):
        if getattr(args, flag) != state["args"].get(flag):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: the resumed run "
                             f"has {state['args'].get(flag)}; leave the flag out")
    return args, state


# --------------------------------------------------------------------------------------------------
# The run


def check_file_flags(args, config, flags):
    """InputError for a flag that disagrees with the file of --init."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and value != getattr(config, flag, None):
            raise InputError(f"--{flag.replace('_', '-')} {value}: {args.init} has its own; leave "
                             "out this flag or --init")


def new_model(args, tokenizer, names, **more):
    """A model from the flags, the vocabulary and the label sets, its ResNet with
    --backbone-weights; the same in each process. more: of Config.
    """
    torch.manual_seed(args.seed)
    model = E2EVLP(Config(
        **{flag: getattr(args, flag) for flag in MODEL_FLAGS},
        frozen_batch_norm=args.backbone_weights != "none", vocabulary=len(tokenizer.vocabulary),
        max_tokens=tokenizer.max_tokens, attributes=max(1, len(names["attributes"])),
        classes={source: len(names[source]) for source in ("coco", "vg") if names[source]},
        pad=tokenizer.pad, cls=tokenizer.cls, sep=tokenizer.sep, mask=tokenizer.mask, **more))
    if args.backbone_weights not in ("none", None):
        model.backbone.load_weights(args.backbone_weights)
    return model


def detr_model(args, tokenizer, names):
    """A model in the sizes of DETR's weights and with them. Words, and the heads that DETR has not
    or has in another size, are re-initialised. The sizes become the run's flags.
    """
    state = load_checkpoint(args.init, "--init")
    config = state["config"]
    if "lacks" not in state:
        raise InputError(f"--init {args.init}: not DETR's weights; a checkpoint of "
                         "pre-training is continued by --resume")
    check_file_flags(args, config, FILE_FLAGS)
    for flag in SIZE_FLAGS:
        setattr(args, flag, getattr(config, flag))
    model = new_model(args, tokenizer, names, activation=config.activation,
                      decoder_norm=config.decoder_norm)
    load_pretrained(model, state["model"], print0)
    return model


def pretrain(args, state):
    run = Run(args, state)
    if args.mini and not args.pairs and not os.path.exists(args.data):
        print0(f"writing the miniature world to {args.data}")
        on_first_process(lambda: shapes.write_world(args.data))
    if args.pairs:  # they have no boxes
        args.without = sorted({*args.without, "detection", "attributes"})
    data = pretraining_index(args.data, args.sets, args.index, print0, args.pairs,
                             args.pairs_images)
    names = data["names"]
    val = decodable(data["val"][:args.val_pictures], print0)
    if state is None:
        tokenizer = Tokenizer(args.vocab or f"{args.data}/vocab.txt")
        model = (detr_model if args.init else new_model)(args, tokenizer, names)
    else:
        if names != {key: state["names"][key] for key in names}:
            raise InputError(f"--data {args.data}: its classes or attributes are not those of "
                             f"{args.resume}")
        tokenizer = Tokenizer(state["vocabulary"], state["config"].max_tokens)
        model = build_model(state, args.resume)
    model.to(run.device)
    mean_objects = describe("train", data["train"], names, args.queries, tokenizer, print0)
    describe("val", val, names, args.queries, tokenizer, print0)
    if args.no_object_weight is None:  # kept with the flags, so that a resumed run has it too
        args.no_object_weight = no_object_weight(mean_objects, args.queries)
        print0(f"no-object weight: {args.no_object_weight:.2f}")

    backbone = [p for p in model.backbone.resnet.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.resnet")]
    optimizer = run.set_up(model, tokenizer, names, [(rest, args.lr), (backbone, args.lr_backbone)],
                           len(data["train"]))
    if args.compile:
        # DDP's optimizer cuts graphs where buckets end, and fails once shapes are dynamic
        torch._dynamo.config.optimize_ddp = False
        torch._dynamo.config.recompile_limit = 64  # torch 2.11: even and odd sides apart
        # One graph, with sizes that may vary; recomputing parts it
        model.compile(fullgraph=not args.activation_checkpointing)
    loader = run.loader(PretrainingSet(data["train"], tokenizer, names, args),
                        data["train"].sizes,
                        functools.partial(collate, pad=tokenizer.pad, stride=args.stride))
    weights = loss_weights(args.loss_weights, args.without, args.grid_word_loss)
    probes = prepare_probes(tokenizer, names, val) if val else None

    def validate():
        if not val:
            return
        measures = measure_with_blind(model, tokenizer, names, val, probes, without=args.without,
                                      **run.evaluation)
        run.log({"step": run.step, "epoch": run.step / run.per_epoch, **measures})
        if run.rank > 0:
            return
        draw_curves([args.output], os.path.join(args.output, "curves.png"))
        state = {"vocabulary": tokenizer.vocabulary, "names": names, "args": vars(args)}
        predictor = Predictor(state, run.device, model)
        draw_sheet(os.path.join(args.output, "sheet.png"), predictor, val[:12])
        for key, value in measures.items():
            if key.startswith("val_"):
                blind = measures.get(key.replace("val_", "blind_"), math.nan)
                print0(f"  {key} {value:.3f} (blind {blind:.3f})")
        print0(f"see {args.output}/curves.png and sheet.png")

    objective = Pretraining(model, args.no_object_weight)
    return train(run, objective, loader, optimizer, weights, validate, args.val_every)


def main(argv=None):
    return command("pretrain.py", lambda: pretrain(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
