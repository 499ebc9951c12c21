"""Stage 2: fine-tune a pre-trained E2E-VLP on a task of section 5 (tasks.py has them).

    python finetune.py --task vqa --mini --init runs/mini/last.pt                # a laptop: minutes
    python finetune.py --task flickr30k --init runs/pretrain/last.pt --data DIR  # one GPU
    torchrun --nproc_per_node=8 finetune.py --task vqa --init FILE --data DIR    # the paper's run

`--output` gets log.jsonl, last.pt (with the optimizer: `--resume` continues from it), best.pt (the
best on validation) and curves.png. `--init none` starts from scratch, so that what pre-training is
worth can be seen. The loop is pretrain.train; this file has the flags, the model and the
validation.

Settings are section 5.1's where it gives them. Ours are clip, the ResNet's rate and weight decay,
captioning's batch and epochs, and all of detection's, which are VQA's.
"""

import functools
import math
import os
import random
import sys
from dataclasses import fields, replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from data import (InputError, Tokenizer, add_box_flags, command, describe, load_images, number,
                  other_sentence, pad_images, pad_tokens, print0, to_pixels)
from evaluate import check_classes, draw_curves, predict
from matcher import LOSS_WEIGHTS
from model import E2EVLP, build_model, load_checkpoint, load_pretrained
from pretrain import (FILE_FLAGS, MINI_LOADING, MINI_MODEL, MODEL_FLAGS, Run, check_file_flags,
                      new_model, parse_resumed, shared_flags, train)
from tasks import TASKS, make_task


class TaskSet(Dataset):
    """Examples of a task. Items are asked for as (epoch, index, draw), see pretrain.Batches.

    An item is an image (NLVR2: two) with up to K questions about it, or with up to K of its own
    sentences (`by_sentence`), which share one pass of the backbone. All items together have each
    question, or each pair of an image and a sentence, once; which of an image's sentences go
    together is drawn anew in each epoch.
    """

    def __init__(self, task, examples, tokenizer, args):
        """examples: MmapList; args: the flags."""
        self.task, self.examples, self.tokenizer, self.seed = task, examples, tokenizer, args.seed
        self.short_sides, self.long_side = args.short_sides, args.long_side
        self.K = args.sentences_per_picture
        # Item n has the examples order[starts[n]:starts[n + 1]], all about one image; by sentence
        # they are one example so often
        self.count = min(len(examples), args.train_examples or len(examples))
        if task.by_sentence:
            sentences = [len(examples[i].sentences) for i in range(self.count)]
            self.order = ordered = np.repeat(np.arange(self.count), sentences)
        else:
            numbers = examples.image_numbers[:self.count]
            self.order = np.argsort(numbers, kind="stable")
            ordered = numbers[self.order]
        place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # among its image's
        self.starts = np.append(np.flatnonzero(place % self.K == 0), len(ordered))
        self.first_places = place[self.starts[:-1]]
        self.sizes = examples.sizes[self.order[self.starts[:-1]]]

    def __len__(self):
        return len(self.starts) - 1

    def of_item(self, index):
        numbers = self.order[self.starts[index]:self.starts[index + 1]]
        return [self.examples[i] for i in dict.fromkeys(numbers)]

    def sentences(self, epoch, index, examples, rng):
        """(what is read with the item's image; by sentence: so many wrong sentences for each)."""
        if not self.task.by_sentence:
            return self.task.sentences(examples, rng), []
        # All items of an image shuffle its sentences alike, then each takes its part
        number = self.order[self.starts[index]]
        shuffled = list(examples[0].sentences)
        random.Random(f"{self.seed} {epoch} sentences {number}").shuffle(shuffled)
        first = self.first_places[index]
        sentences = shuffled[first:first + self.K]
        wrong = [other_sentence(self.examples, number, examples[0].captions > 0, rng, self.count)
                 for _ in range(len(sentences) * self.task.negatives)]
        if None in wrong:
            raise InputError(f"--task {self.task.name}: no sentence was found that is not one of "
                             f"image {examples[0].id}; it needs images with different ones")
        return sentences, wrong

    def __getitem__(self, key):
        epoch, index, draw = key
        rng = random.Random(f"{self.seed} {self.task.name} {epoch} {index}")
        short = self.short_sides[draw % len(self.short_sides)]
        images, index, broken = load_images(lambda i: self.of_item(i)[0], index, len(self),
                                            short, self.long_side)
        examples = self.of_item(index)
        sentences, wrong = self.sentences(epoch, index, examples, rng)
        images, examples = self.task.augment_images(images, examples, rng)
        return {"images": [to_pixels(image, short, self.long_side) for image in images],
                "tokens": [self.tokenizer.encode(sentence) for sentence in sentences],
                "wrong": [self.tokenizer.encode(sentence) for sentence in wrong],
                "targets": [self.task.target(example) for example in examples],
                "ids": [example.id for example in examples], "broken": broken}


def collate_task(items, pad):
    """Items of TaskSet -> a batch of B images with N sentences: images, sizes, padded (see
    pad_images; for NLVR2 2 B, first all left ones, then all right ones); tokens (N, T); image (N,):
    which of the B each is about; wrong (N n, T): n wrong sentences for each (retrieval); targets:
    what task.target made, a tensor or, of dicts and None, a list; ids; broken.
    """
    sides = zip(*(item["images"] for item in items))
    images, sizes, padded = pad_images([image for side in sides for image in side])
    targets = [target for item in items for target in item["targets"]]
    if isinstance(targets[0], (np.ndarray, np.integer)):
        targets = torch.from_numpy(np.stack(targets))
    right = [tokens for item in items for tokens in item["tokens"]]
    wrong = [tokens for item in items for tokens in item["wrong"]]
    tokens = pad_tokens(right + wrong, pad)
    image = [n for n, item in enumerate(items) for _ in item["tokens"]]
    return {"images": images, "sizes": sizes, "padded": padded, "targets": targets,
            "tokens": tokens[:len(right)], "wrong": tokens[len(right):],
            "image": torch.tensor(image),
            "ids": [i for item in items for i in item["ids"]],
            "broken": [message for item in items for message in item["broken"]]}


class FineTuning(nn.Module):
    """The model with the loss of its task: what DistributedDataParallel wraps."""

    def __init__(self, model, task, freeze_backbone):
        super().__init__()
        self.model, self.task, self.freeze_backbone = model, task, freeze_backbone

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_backbone:  # a frozen ResNet keeps the statistics of its batch norm too
            self.model.backbone.resnet.eval()
        return self

    def normalizers(self, batch):
        return self.task.normalizers(batch, self.model.config)

    def forward(self, batch, normalizers):
        return self.task.losses(self.model, batch, normalizers)


def parse(argv):
    """(flags, the checkpoint to resume or None). Layers of defaults: the task's, then --mini's
    or the resumed run's, then what is given.
    """
    parser = shared_flags(
        usage="finetune.py --task TASK --init FILE [--mini] ... (--help: all flags)",
        description="Fine-tune E2E-VLP (Xu et al., ACL 2021, section 5).")
    g = parser.add_argument_group("fine-tuning")
    g.add_argument("--task", choices=tuple(TASKS), help="what to learn")
    g.add_argument("--init", metavar="FILE",
                   help="checkpoint to start from, DETR's weights (detection without a sentence), "
                   "or none: then the model's flags count")
    g.add_argument("--train-examples", type=number(int, 0), default=0, metavar="N",
                   help="train on the first ones (captions: images) only; 0: all")
    g.add_argument("--val-every", type=number(float, 0.001), default=1.0, metavar="EPOCHS",
                   help="epochs between two validations")
    g.add_argument("--val-examples", type=number(int, 0), default=0, metavar="N",
                   help="validate on the first ones only; 0: all")
    g.add_argument("--train-splits", nargs="+", choices=("train", "val"), default=["train"],
                   help="train val for VQA's test-dev: nothing is validated then, best.pt is the "
                   "last checkpoint")
    add_box_flags(parser.add_argument_group("detection on boxes of your own"))
    g = parser.add_argument_group("flags of one task")
    for task in TASKS.values():
        for field in fields(task):
            if field.metadata:  # made by tasks.flag
                name = "--" + field.name.replace("_", "-")
                g.add_argument(name, default=field.default, **field.metadata)
    # lr_head, a setting without a flag: a new classifier's rate, as a multiple of --lr
    parser.set_defaults(epochs=12, output="runs/TASK", lr_head=1.0)
    args = parser.parse_args(argv)
    if args.train_annotations or args.val_annotations:
        parser.set_defaults(text="none")  # boxes of one's own have no captions
    if args.task:
        task = TASKS[args.task]
        parser.set_defaults(output=f"runs/{args.task}", **task.settings)
        if args.mini:
            mini = dict(epochs=100, lr=5e-4, lr_backbone=5e-4, schedule="cosine", warmup=50,
                        clip=1.0, val_every=1e6, output=f"runs/mini-{args.task}")
            # From scratch pre-training's rates are better
            rates = {"lr": 1e-3, "lr_backbone": 1e-3} if args.init == "none" else {}
            parser.set_defaults(**{**MINI_MODEL, **MINI_LOADING, **mini, **task.mini, **rates})
        if args.init not in (None, "none"):
            parser.set_defaults(**dict.fromkeys(FILE_FLAGS), vocab=None)
    args, state = parse_resumed(parser, argv, fixed=(
        *MODEL_FLAGS, "task", "init", "sentences_per_picture", "text", "augment",
        "train_splits"))
    if state is None and not (args.task and args.init):
        raise InputError("give --task and --init, a checkpoint's file or none; or --resume FILE")
    return args, state


def initial_model(args, task, names):
    """(model, tokenizer, names) from --init: its configuration and vocabulary are kept, the task's
    new head and classes are re-initialised; or from scratch.
    """
    more = dict(task=task.name, classifier_images=task.images,
                classifier_outputs=len(names["answers"]) if task.new_head else 0)
    if args.init == "none":
        names = {"coco": [], "vg": [], "attributes": [], **names}
        tokenizer = Tokenizer(args.vocab or f"{args.data}/vocab.txt")
        return new_model(args, tokenizer, names, **more), tokenizer, names
    state = load_checkpoint(args.init, "--init")
    config = state["config"]
    check_file_flags(args, config, (*FILE_FLAGS, "vocab"))
    if config.task not in ("", task.name):
        raise InputError(f"--init {args.init}: is fine-tuned for {config.task}; give a pre-trained "
                         "one")
    if "coco" in names and names["coco"] != state["names"]["coco"]:
        print0(f"{len(names['coco'])} classes in place of the {len(state['names']['coco'])} of "
               f"{args.init}: the class head is re-initialised, the rest is kept")
        config = replace(config, classes={**config.classes, "coco": len(names["coco"])})
        for part in ("weight", "bias"):
            state["model"].pop(f"classes.coco.{part}", None)
    if names.get("answers") != state["names"].get("answers"):  # outputs of another meaning
        state["model"] = {name: tensor for name, tensor in state["model"].items()
                          if not name.startswith("classifier.")}
    tokenizer = Tokenizer(state["vocabulary"], config.max_tokens)
    if "sentence" in task.modules and not tokenizer.ordinary:
        raise InputError(f"--init {args.init}: has DETR's weights, and knows no words; give --text "
                         "none, or pre-train from it first (pretrain.py --init)")
    torch.manual_seed(args.seed)  # the same new weights in each process
    model = E2EVLP(replace(config, dropout=args.dropout, train_stem=args.train_stem, **more))
    load_pretrained(model, state["model"], print0)
    return model, tokenizer, {**state["names"], **names}


def check_task_flags(args, task):
    """InputError for a flag that would do nothing, since the task does not have it."""
    for flag in ("pairs", "train_annotations", "val_annotations", "augment"):
        if getattr(args, flag) not in (None, "none") and not hasattr(task, flag):
            raise InputError(f"--{flag.replace('_', '-')}: --task {task.name} does not have it")


def first_or_resumed_model(args, state, task, index):
    """(model, tokenizer, names): of the resumed run, or `initial_model`'s with the answers of the
    training set.
    """
    names = dict(index["train"]["names"])
    if state is not None:
        check_classes(names, state["names"], args.resume)
        model = build_model(state, args.resume)
        return model, Tokenizer(state["vocabulary"], model.config.max_tokens), state["names"]
    names["answers"] = []
    if task.new_head:
        # What is trained on is counted already
        val_targets = {} if "val" in args.train_splits else index["val"]["targets"]
        names["answers"] = task.choose_labels(index["train"]["targets"], val_targets, print0)
    return initial_model(args, task, names)


def parameter_groups(args, model, task):
    """[(parameters, learning rate)] of the parts that the task trains; the others are frozen."""
    groups = {"rest": [], "head": [], "backbone": []}
    for name, parameter in model.named_parameters():
        is_backbone = name.startswith("backbone.resnet")
        if not name.startswith(tuple(task.modules)) or is_backbone and not args.lr_backbone:
            parameter.requires_grad_(False)
        elif not parameter.requires_grad:
            continue  # the ResNet's stem
        elif is_backbone:
            groups["backbone"].append(parameter)
        elif name.startswith("classifier."):
            groups["head"].append(parameter)
        else:
            groups["rest"].append(parameter)
    rates = {"rest": args.lr, "head": args.lr * args.lr_head, "backbone": args.lr_backbone}
    return [(groups[key], rates[key]) for key in groups]


def validate(run, task, val):
    """Score the validation examples, and the first ones blind; log, draw, keep the best."""
    if "val" in run.args.train_splits:
        run.save("best.pt", scores={}, optimizer=None)
        return
    scores = {}
    for kind, examples in (("val", val), ("blind", val[:task.blind_examples])):
        answers = predict(task, run.model, run.tokenizer, examples, blind=kind == "blind",
                          **run.evaluation)
        if run.rank == 0:
            scores[kind] = task.score(answers, examples, run.args.data, "val")
    if run.rank > 0:
        return
    run.log({"step": run.step, "epoch": run.step / run.per_epoch,
             **{f"{kind}_{k}": v for kind in scores for k, v in scores[kind].items()},
             "blind_examples": min(len(val), task.blind_examples)})
    draw_curves([run.args.output], os.path.join(run.args.output, "curves.png"))
    print0(f"step {run.step}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores["val"].items()))
    metric = sum(scores["val"][key] for key in task.selection_metric)
    if metric > run.kept["best"]:
        run.kept["best"] = metric
        run.save("best.pt", scores=scores["val"], optimizer=None)


def log_majority(run, task, targets, val):
    """What needs no model at all, to compare with: always the most frequent answer."""
    majority = max(targets.items(), key=lambda pair: pair[1])[0]
    scores = task.score([majority] * len(val), val, run.args.data, "val")
    print0(f"always {majority!r}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    run.log({"step": 0, "epoch": 0, **{f"majority_{k}": v for k, v in scores.items()}})


def finetune(args, state):
    run = Run(args, state)
    task = make_task(args.task, vars(args))
    check_task_flags(args, task)
    index = {"train": task.index(args.data, "+".join(args.train_splits), args.index, print0),
             "val": task.index(args.data, "val", args.index, print0)}
    check_classes(index["val"]["names"], index["train"]["names"], "the training file")
    train_examples, val = index["train"]["examples"], index["val"]["examples"]
    val = val[:args.val_examples] if args.val_examples else val

    model, tokenizer, names = first_or_resumed_model(args, state, task, index)
    task.labels, task.names = names["answers"], names
    model.to(run.device)
    queries = model.config.queries
    mean_objects = describe("train", train_examples, names, queries, tokenizer, print0)
    describe("val", val, {**names, **index["val"]["names"]}, queries, tokenizer, print0)
    task.set_balance(mean_objects, queries)

    dataset = TaskSet(task, train_examples, tokenizer, args)
    print0(f"{task.name}: an epoch is {len(dataset.order)} "
           f"{'pairs' if task.by_sentence else 'examples'} in {len(dataset)} items, "
           f"{len(dataset) / args.batch_size:.1f} steps; {len(val)} examples to validate"
           + (f", {len(task.labels)} answers" if task.labels else ""))
    optimizer = run.set_up(model, tokenizer, names, parameter_groups(args, model, task),
                           len(dataset))
    run.kept["best"] = state["best"] if state is not None else -math.inf
    loader = run.loader(dataset, dataset.sizes, functools.partial(collate_task, pad=tokenizer.pad))

    if "val" in args.train_splits:
        print0("val is trained on, so nothing is validated: best.pt is the last checkpoint")
    elif task.labels and state is None:
        log_majority(run, task, index["train"]["targets"], val)
    # What validation and scores need is tried on two examples now, not after hours
    answers = predict(task, model, tokenizer, val[:2], **run.evaluation)
    if run.rank == 0:
        task.score(answers, val[:2], args.data, "val")

    objective = FineTuning(model, task, freeze_backbone=not args.lr_backbone)
    weights = {**LOSS_WEIGHTS, **dict.fromkeys(task.logged, 0.0)}
    code = train(run, objective, loader, optimizer, weights,
                 functools.partial(validate, run, task, val),
                 max(1, math.ceil(args.val_every * run.per_epoch - 1e-9)))
    if run.rank == 0 and code == 0:
        best = load_checkpoint(os.path.join(args.output, "best.pt"))["scores"]
        print0(f"{args.output}/best.pt: "
               + (", ".join(f"{k} {v:.3f}" for k, v in best.items()) or "the last checkpoint"))
    return code


def main(argv=None):
    return command("finetune.py", lambda: finetune(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
