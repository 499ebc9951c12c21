"""Stage 1 as a user runs it: the command lines at a tiny size, resume, several processes, full size, bad input."""

import functools
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_command, small_batch, small_model
from PIL import Image

import pretrain
from data import InputError, Tokenizer
from model import E2EVLP, Config, count_parameters, load_checkpoint, walk

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def log(folder):
    """(lines of training, lines of validation)"""
    with open(os.path.join(folder, "log.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def ok(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run of four steps: (its folder, what it printed)."""
    folder = str(tmp_path_factory.mktemp("run") / "out")
    done = run_command("pretrain.py", *TINY, "--data", world, "--output", folder, "--steps", "4", "--schedule", "step",
                       "--dropout", "0.1")
    return folder, ok(done)


# ----------------------------------------------------------------------------------------------------------------
# One run


def test_a_run_writes_its_log_checkpoint_and_sheet(run):
    folder, said = run
    assert sorted(os.listdir(folder)) == ["last.pt", "log.jsonl", "previous.pt", "report.html", "report.json",
                                          "sheet.png"]
    steps, validations = log(folder)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    parts = ("loss_mlm", "loss_itm", "loss_caption", "loss_class", "loss_bbox", "loss_giou", "loss_attribute",
             "loss_cell")
    for line in steps:
        assert {"epoch", "loss", *parts, "lr", "lr_backbone", "grad_norm", "pictures_per_second"} <= set(line)
        mini = args_of("--mini")
        named = pretrain.weights_of([], mini.loss_weights, mini.cells)
        assert line["loss"] == pytest.approx(sum(named[name] * line[name] for name in parts), rel=1e-5)
    (values,) = validations
    for name in ("mlm_accuracy", "mlm_accuracy_visual", "itm_accuracy", "itm_accuracy_foil", "AP", "AP50",
                 "AP_no_sentence", "AP50_no_sentence", "attribute_accuracy", "caption_objects"):
        assert 0 <= values[f"val_{name}"] <= 1 and 0 <= values[f"blind_{name}"] <= 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("On 4 held-out pictures it guesses") and last.endswith(f"{folder}/report.html and sheet.png")
    assert f"{values['val_caption_objects']:.2f} (blind {values['blind_caption_objects']:.2f})" in last
    with Image.open(f"{folder}/sheet.png") as image:
        assert image.size[0] > 1000 and len(image.convert("RGB").getcolors(10 ** 6)) > 10


def test_the_checkpoint_says_how_it_was_made(run, world):
    state = load_checkpoint(f"{run[0]}/last.pt")
    assert state["step"] == 4 and state["args"]["data"] == world and state["args"]["mini"]
    assert state["names"]["coco"][0] == "circle" and state["config"].classes == {"coco": 6, "vg": 6}
    assert len(state["vocabulary"]) == state["config"].vocabulary == state["model"]["caption.weight"].shape[0]


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(run, world, command, tmp_path):
    options = [*TINY, "--data", world, "--output", tmp_path / "out", "--schedule", "step", "--dropout", "0.1"]
    ok(command("pretrain.py", *options, "--steps", 2))
    with open(tmp_path / "out" / "log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 99}\n{"step": 4, "lo')  # what a killed run may leave after its checkpoint
    ok(command("pretrain.py", "--resume", tmp_path / "out" / "last.pt", "--steps", 4, "--val-every", 3))
    whole, parted = load_checkpoint(f"{run[0]}/last.pt"), load_checkpoint(str(tmp_path / "out" / "last.pt"))
    for name, value in whole["model"].items():
        assert torch.equal(value, parted["model"][name]), name
    steps, _ = log(tmp_path / "out")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for a, b in zip(log(run[0])[0], steps):
        assert a["loss"] == b["loss"] and a["lr"] == b["lr"] and a["grad_norm"] == b["grad_norm"]


def test_a_second_run_moves_the_first_one_out_of_the_way(run, world, command, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(run[0], folder)
    said = ok(command("pretrain.py", *TINY, "--data", world, "--output", folder, "--steps", 1))
    assert f"holds an earlier run; moved to {folder}/earlier-1" in said
    assert sorted(os.listdir(folder / "earlier-1")) == sorted(os.listdir(run[0]))
    assert len(log(folder)[0]) == 1


# ----------------------------------------------------------------------------------------------------------------
# The same on several processes


@pytest.fixture(scope="module")
def one_step(world, weights, tmp_path_factory):
    """The checkpoint and log after one step of total batch 4, run in some way."""
    @functools.cache
    def step(*launch, **flags):
        folder = str(tmp_path_factory.mktemp("step") / "out")
        words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        ok(run_command("pretrain.py", *TINY, "--data", world, "--output", folder, "--steps", "1", "--backbone-weights",
                       weights, "--lr", "1e-4", "--lr-backbone", "1e-5", *words, launch=launch))
        return load_checkpoint(f"{folder}/last.pt"), log(folder)[0][0]
    return step


@pytest.mark.parametrize("launch,flags", [(TORCHRUN, {}), ((), {"micro_batch": 1}), (TORCHRUN, {"micro_batch": 1})],
                         ids=["two processes", "four parts", "two processes of two parts"])
def test_processes_and_parts_change_nothing(one_step, weights, launch, flags):
    (one, one_log), (many, many_log) = one_step(), one_step(*launch, **flags)
    for name, value in one["model"].items():
        torch.testing.assert_close(many["model"][name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: name + m)
    # AdamW's first step is lr * sign(gradient), nearly; its first moments tell more: they are a tenth of the gradient.
    for a, b in zip(one["optimizer"]["state"].values(), many["optimizer"]["state"].values()):
        torch.testing.assert_close(b["exp_avg"], a["exp_avg"], rtol=1e-3, atol=1e-6)
    # Nor do they change the rates: the ResNet learns at its own
    before = torch.load(weights, weights_only=True)
    moved = [float((many["model"][f"backbone.resnet.{name}"] - value).abs().max()) for name, value in before.items()
             if name.endswith("weight") and f"backbone.resnet.{name}" in one["model"]]
    assert 0.9e-5 < max(moved) < 1.2e-5
    for name in one_log:
        if name.startswith("loss") or name == "grad_norm":
            assert many_log[name] == pytest.approx(one_log[name], rel=1e-5), name


@pytest.fixture
def two_hosts(tmp_path):
    """Run a script as on two hosts: two launchers that know of each other only where to meet."""
    def run(*words):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            meet = f"localhost:{s.getsockname()[1]}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                  "--rdzv_backend=c10d", f"--rdzv_endpoint={meet}"]
        hosts = [subprocess.Popen([*launch, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
        said = [host.communicate(timeout=300) for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], said
        return "".join(out for out, _ in said)
    return run


def test_two_hosts_train_and_measure_as_one_process(one_step, two_hosts, world, weights, tmp_path):
    flags = [*TINY, "--data", world, "--steps", "1", "--backbone-weights", weights, "--lr", "1e-4", "--lr-backbone",
             "1e-5"]
    said = two_hosts("pretrain.py", *flags, "--output", f"{tmp_path}/out", "--activation-checkpointing",
                     "--micro-batch", "1")
    assert said.count("batch 4 = 2 process(es) x 2 part(s) x 1 pictures") == 1  # only the first process speaks
    one, one_log = one_step()
    for name, value in load_checkpoint(f"{tmp_path}/out/last.pt")["model"].items():
        torch.testing.assert_close(value, one["model"][name], rtol=0, atol=1e-5, msg=lambda m, name=name: name + m)
    assert log(f"{tmp_path}/out")[0][0]["grad_norm"] == pytest.approx(one_log["grad_norm"], rel=1e-5)
    evaluate = ["evaluate.py", "--checkpoint", f"{tmp_path}/out/last.pt", "--data", world, "--json"]
    two_hosts(*evaluate, f"{tmp_path}/two.json")
    ok(run_command(*evaluate, f"{tmp_path}/one.json"))
    with open(tmp_path / "one.json") as a, open(tmp_path / "two.json") as b:
        measured, expected = json.load(b), json.load(a)
    assert measured.keys() == expected.keys()
    assert all(measured[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6) for name in expected)


def test_two_processes_measure_what_one_does(run, command, tmp_path):
    shutil.copytree(run[0], tmp_path / "out")  # previous.pt is of before its last validation, which is then taken again
    ok(command("pretrain.py", "--resume", tmp_path / "out" / "previous.pt", launch=TORCHRUN))
    (one,), (two,) = log(run[0])[1], log(tmp_path / "out")[1]
    assert one == pytest.approx(two, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------
# Losses and the schedule


def args_of(*words):
    return pretrain.parse([*words])[0]


def test_cell_loss_equals_a_loop_over_objects():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64)
    objects = [[(1, 2), (3,)], [], [(4, 4, 5), ()]]  # the words of each picture's objects; one may have none
    targets = [{"labels": torch.zeros(len(of), dtype=torch.long),
                "words": torch.tensor([w for words in of for w in words], dtype=torch.long),
                "word_rows": torch.tensor([n for n, words in enumerate(of) for _ in words], dtype=torch.long)}
               for of in objects]
    expected = 0.0
    for row, words in zip(logits, [words for of in objects for words in of]):
        each = [-math.log(math.exp(row[w]) / sum(math.exp(v) for v in row)) for w in words]
        expected += sum(each) / max(1, len(each)) / 4
    assert float(pretrain.cell_loss(logits, targets, 4.0)) == pytest.approx(expected, rel=1e-6)
    nothing = pretrain.cell_loss(logits[:0].requires_grad_(), targets[1:2], 0.0)
    nothing.backward()
    assert nothing == 0


def test_words_of_names():
    tokenizer = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tennis", "court", "red"])
    names = {"coco": ["tennis court"], "vg": ["court"], "attributes": ["red"]}
    assert pretrain.words_of(names, tokenizer) == {"coco": [[5, 6]], "vg": [[6]], "attributes": [[7]]}
    assert pretrain.words_of(names, tokenizer, ["attributes"]) == {"coco": [[5, 6]], "vg": [[6]], "attributes": [[]]}


def test_losses_can_be_left_out(world, command, tmp_path):
    everything = pretrain.weights_of([])
    assert everything == {"loss_mlm": 1, "loss_itm": 1, "loss_caption": 1, "loss_class": 1, "loss_bbox": 5,
                          "loss_giou": 2, "loss_attribute": 1}
    assert pretrain.weights_of(["attributes"]) == {**everything, "loss_attribute": 0}
    assert sum(pretrain.weights_of(["mlm", "itm", "detection", "caption"], cells=4).values()) == 0
    assert pretrain.weights_of(["attributes"], cells=4) == {**everything, "loss_attribute": 0, "loss_cell": 4}
    assert pretrain.weights_of([], ["mlm=3", "giou=0.5"]) == {**everything, "loss_mlm": 3, "loss_giou": 0.5}
    for wrong in ("mlm", "poetry=3", "mlm=much", "mlm=-1", "mlm=nan"):
        with pytest.raises(InputError, match=f"--loss-weights {wrong}: must be NAME=NUMBER"):
            pretrain.weights_of([], [wrong])
    ok(command("pretrain.py", *TINY, "--data", world, "--output", tmp_path / "out", "--steps", 1,
               "--without", "detection", "caption", "--loss-weights", "itm=2"))
    (line,), _ = log(tmp_path / "out")
    assert line["loss"] == pytest.approx(line["loss_mlm"] + 2 * line["loss_itm"], rel=1e-6)
    state = load_checkpoint(f"{tmp_path}/out/last.pt")  # the heads of what was left out have learnt nothing
    names = [n for n in state["model"] if "backbone.resnet" not in n]
    moments = {n: v["exp_avg"].abs().sum() for n, v in zip(names, state["optimizer"]["state"].values())}
    assert moments["caption.weight"] == moments["box.0.weight"] == 0 < moments["itm.0.weight"]


def test_each_loss_is_normalised_by_its_own_count():
    model, batch = small_model().train(), small_batch()
    args = args_of("--queries", "5")
    args.pad = 0
    counts = pretrain.counts_of(batch, args)
    assert counts[0] == len(batch["mlm_words"]) and counts[1] == 6
    assert counts[2] == int((batch["captions"][..., 1:] != 0).sum()) and counts[3] == 5  # boxes: 2 + 3 + 0
    out = model(batch)
    named = pretrain.losses(out, batch, counts, args)
    words = torch.nn.functional.cross_entropy(out["caption"].transpose(1, 2), batch["captions"].flatten(0, 1)[:, 1:],
                                              ignore_index=0)
    torch.testing.assert_close(named["loss_caption"], words)
    torch.testing.assert_close(named["loss_itm"], torch.nn.functional.cross_entropy(
        out["itm"], batch["itm_labels"].flatten()))


@pytest.mark.parametrize("progress,scale", [(0.0, 1.0), (0.66, 1.0), (0.67, 0.1), (1.0, 0.1)])
def test_step_schedule(progress, scale):
    assert pretrain.learning_rate_scale(10 ** 6, progress, args_of()) == scale


def test_cosine_schedule_and_warm_up():
    args = args_of("--schedule", "cosine", "--warmup", "10")
    assert pretrain.learning_rate_scale(0, 0.0, args) == pytest.approx(0.1)
    assert pretrain.learning_rate_scale(100, 0.5, args) == pytest.approx(0.5)
    assert pretrain.learning_rate_scale(100, 1.2, args) == pytest.approx(0.0)


def test_the_papers_settings_are_the_defaults():
    args = args_of("--backbone", "r152", "--data", "DIR")
    assert (args.batch_size, args.epochs, args.lr, args.lr_backbone, args.weight_decay, args.sentences_per_picture,
            args.encoder_layers, args.decoder_layers, args.width, args.heads, args.feed_forward, args.queries) == (
        32, 200, 1e-4, 1e-5, 1e-4, 1, 12, 6, 256, 12, 1024, 100)
    assert args.short_sides == list(range(480, 801, 32)) and args.long_side == 1333
    assert args.backbone_weights == "imagenet" and not args.minutes


def test_given_flags_win_over_the_preset():
    args = args_of("--mini", "--backbone", "r34", "--minutes", "3")
    assert args.backbone == "r34" and args.minutes == 3 and args.width == 128 and args.stride == 16


def test_the_model_can_be_traced_for_compilation():
    """What --compile asks of the model; generating code for it takes a minute and a half on a CPU and is not tested."""
    model, batch = small_model(), small_batch()
    traced = torch.compile(model, backend="eager")(batch)
    for name, value in model(batch).items():
        if name != "objects":
            torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-5)


def test_compilation_does_not_begin_again_with_each_shape():
    """Of a long training's pictures hardly two batches have the same size."""
    graphs = []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    traced, numbers = torch.compile(small_model(frozen_batch_norm=True).train(), backend=count), []
    for n in range(6):
        traced(small_batch(sizes=[(40 + 13 * n, 90 - 7 * n), (50 + 9 * n, 41 + 5 * n)], T=6 + n))
        numbers.append(len(graphs))
    # Of the six parts into which the model falls, torch 2.11 compiles one again where sides are even instead of odd
    more = 3 if torch.__version__.startswith("2.11") else 0
    assert 0 < numbers[-1] <= numbers[2] + more, numbers


# ----------------------------------------------------------------------------------------------------------------
# Full size


FULL_STEP = """
import sys, torch
sys.path.insert(0, "tests")
from conftest import small_batch
from model import E2EVLP, Config
import pretrain
torch.manual_seed(0)
model = E2EVLP(Config(backbone="r50", vocabulary=1000, classes={"coco": 80, "vg": 1600}, attributes=6)).train()
batch = small_batch(((800, 1333),), K=1, T=40, vocabulary=1000)
for old, new in ((2, 101), (3, 102)):
    for key in ("tokens", "captions"):
        batch[key][batch[key] == old] = new
args = pretrain.parse([])[0]
args.pad = 0
named = pretrain.losses(model(batch), batch, pretrain.counts_of(batch, args), args)
sum(named.values()).backward()
assert all(torch.isfinite(p.grad).all() for p in model.parameters())
"""


def test_a_full_size_step_fits_into_12_gb():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run([sys.executable, "-c", FULL_STEP], cwd=ROOT, text=True, capture_output=True, timeout=300)
    ok(done)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20  # of the largest child so far, GB
    assert max(before / 2 ** 20, peak) < 12


# ----------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("flags", [[], ["--amp", "bf16"], ["--activation-checkpointing"]], ids=lambda f: f[-1:])
def test_the_plans_step_is_the_real_one(flags):
    """Counted without memory or computation, and for tensors that are there: the same FLOPs and bytes."""
    args = args_of("--queries", "20", "--sentences-per-picture", "2", *flags)
    config = Config(backbone="r18", encoder_layers=2, decoder_layers=2, queries=20)
    (flops, held), (real_flops, real_held) = (
        pretrain.step_cost(config, args, 2, 160, 224, fake=fake) for fake in (True, False))
    assert flops == real_flops and held == pytest.approx(real_held, rel=0.02)


def test_the_plans_flops_are_three_times_the_walks():
    """A backward pass has twice the products of the forward pass: for a layer's input and for its weights. Less: the
    first convolution's input; more: quick attention computes its weights a second time."""
    config = Config(backbone="r18", encoder_layers=2, decoder_layers=2)
    forward = sum(row[3] for row in walk(config, 256, 320, 20))
    flops, _ = pretrain.step_cost(config, args_of(), 1, 256, 320)
    assert flops == pytest.approx(3 * forward, rel=0.03)


def test_the_plan_is_printed_and_nothing_is_written(command, tmp_path):
    said = ok(command("pretrain.py", "--plan", "--backbone", "r18", "--gpus", "8", "--micro-batch", "2",
                      "--short-sides", "64", "96", "--long-side", "160", "--encoder-layers", "2",
                      "--data", f"{tmp_path}/none", "--output", f"{tmp_path}/out"))
    with torch.device("meta"):
        parameters = count_parameters(E2EVLP(Config(backbone="r18", encoder_layers=2)))
    assert f"{parameters / 1e6:.1f} M parameters" in said and "8 GPU(s) x 2 part(s) x 2" in said
    assert "5,625 steps" in said and "1,125,000 steps, 200 epochs" in said and max(map(len, said.splitlines())) < 200
    weights, gradients, optimiser, activations, whole = map(float, re.search(
        r"weights ([\d.]+) \+ gradients ([\d.]+) \+ optimiser ([\d.]+) \+ activations ([\d.]+) = ([\d.]+) of 80 GB",
        said).groups())
    assert weights == gradients == pytest.approx(parameters * 4e-9, abs=0.01)
    assert optimiser == pytest.approx(2 * weights, abs=0.01)
    assert weights + gradients + optimiser + activations == pytest.approx(whole, abs=0.03)
    assert not os.path.exists(tmp_path / "out") and not os.path.exists(tmp_path / "none")


def test_the_plan_knows_the_data(command, world, tmp_path):
    said = ok(command("pretrain.py", *TINY, "--plan", "--data", world, "--gpu-memory", "0.01"))
    assert f"64 pictures of {world}" in said and "at most 0 pictures at once, not 4" in said


# ----------------------------------------------------------------------------------------------------------------
# Bad input: exit code 2, one or two lines that name the culprit, no traceback, nothing written


@pytest.fixture
def copy(world, tmp_path):
    """A world of one's own, to break."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def fails(done, *says):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line]
    assert 1 <= len(lines) <= 2 and lines[-1].startswith("pretrain.py: ")
    for text in says:
        assert text in lines[-1], lines


@pytest.mark.parametrize("flags,says", [
    (["--data", "nowhere", "--steps", "1"], ["--data nowhere: no such folder"]),
    (["--backbone", "r99"], ["--backbone", "r99"]),
    (["--resume", "nowhere.pt"], ["--resume nowhere.pt: no such file"]),
    (["--resume", "README.md"], ["--resume README.md: not a PyTorch file"]),
    (["--mini", "--batch-size", "0"], ["--batch-size 0: must be more than 0"]),
    (["--mini", "--width", "30"], ["--width 30: must be a multiple of 4"]),
    (["--mini", "--resume", "nowhere/last.pt"], ["--resume nowhere/last.pt: no such file"]),
    (["--mini", "--short-sides", "8"], ["--short-sides 8"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
], ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "")
def test_bad_flags(command, flags, says):
    fails(command("pretrain.py", *flags), *says)


def test_a_folder_that_cannot_be_written(command, world, tmp_path):
    (tmp_path / "file").write_text("")
    fails(command("pretrain.py", *TINY, "--data", world, "--output", tmp_path / "file"), f"--output {tmp_path}/file")


def test_missing_and_broken_files(command, copy):
    flags = [*TINY, "--data", copy, "--output", copy / "out", "--steps", "1"]
    path = copy / "vg" / "objects.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    fails(command("pretrain.py", *flags), "vg/objects.json: not valid JSON", "cut off")
    path.unlink()
    fails(command("pretrain.py", *flags), "vg/objects.json: not found")
    path.write_bytes(whole)
    (copy / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    fails(command("pretrain.py", *flags), "vocab.txt", "[MASK]")
    assert os.listdir(copy / "out") == []


def test_a_batch_that_does_not_divide(command, world, tmp_path):
    done = command("pretrain.py", *TINY, "--data", world, "--output", tmp_path, "--batch-size", 3, launch=TORCHRUN)
    said = [line for line in done.stderr.splitlines() if line.startswith("pretrain.py: ")]
    assert done.returncode != 0 and said == [
        "pretrain.py: --batch-size 3: does not divide among 2 processes; choose a multiple of 2"]


def break_pictures(copy, n):
    folder = copy / "coco" / "train2017"
    for name in sorted(os.listdir(folder))[:n]:
        (folder / name).write_bytes(b"\xff\xd8\xff half a picture")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_named_counted_and_replaced(command, copy, workers):
    break_pictures(copy, 3)
    flags = [*TINY, "--data", copy, "--output", copy / "out", "--epochs", "1", "--workers", workers]
    said = ok(command("pretrain.py", *flags))
    assert "3 pictures could not be decoded and were replaced" in said and "coco/train2017/0000" in said
    assert log(copy / "out")[0][-1]["broken"] == 3
    fails(command("pretrain.py", *flags, "--max-broken", 2), "coco/train2017/0000", "--max-broken 2")


@pytest.mark.parametrize("launch", [(), TORCHRUN], ids=["one process", "two processes"])
def test_a_folder_full_of_broken_pictures(command, copy, launch):
    break_pictures(copy, 100)
    done = command("pretrain.py", *TINY, "--data", copy, "--output", copy / "out", "--sets", "coco", "--workers", 1,
                   launch=launch)
    said = [line for line in done.stderr.splitlines() if "cannot be decoded" in line]
    assert done.returncode != 0 and len(said) == 1 and said[0].startswith("pretrain.py: ") and "0000" in said[0]


def test_a_broken_validation_picture_is_said_and_left_out(command, copy):
    name = sorted(os.listdir(copy / "coco" / "val2017"))[0]
    (copy / "coco" / "val2017" / name).write_bytes(b"\xff\xd8\xff half a picture")
    said = ok(command("pretrain.py", *TINY, "--data", copy, "--output", copy / "out", "--steps", "1"))
    assert f"{name}: cannot be decoded" in said and "On 3 held-out pictures" in said


@pytest.mark.parametrize("flag,value", [("--width", "64"), ("--queries", "7"), ("--seed", "5")])
def test_resuming_with_other_settings(command, run, flag, value):
    fails(command("pretrain.py", "--resume", f"{run[0]}/last.pt", flag, value), f"{flag} {value}: the resumed run has")


@pytest.mark.parametrize("flag,value", [
    *((f"--{flag}", "1" + "0" * 20) for flag in ("seed", "workers", "steps", "width", "encoder-layers", "long-side",
                                                "short-sides", "sentences-per-picture")),
    ("--batch-size", "1" + "0" * 400), ("--lr", "1e+300")])
def test_numbers_beyond_all_sense_are_refused_by_name(flag, value, capsys):
    assert pretrain.main(["--mini", flag, value]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pretrain.py: {flag} {value[:40]}: must be") and said.count("\n") == 1 and len(said) < 200


@pytest.mark.parametrize("change,says", [
    (lambda s: s["args"].update(width="128"), "its run's --width is '128'"),
    (lambda s: s["args"].update(short_sides=[]), "sizes of pictures"),
    (lambda s: s["args"].pop("seed"), "run's --seed"), (lambda s: s.pop("seconds"), "its seconds is"),
    (lambda s: s["args"].update(schedule="never"), "its run's --schedule is 'never'"),
    (lambda s: s["args"].update(epochs=None), "its run's --epochs is 'None'"),
    (lambda s: s["optimizer"]["param_groups"].pop(), "its optimiser's state"),
    (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "its optimiser's state"),
    (lambda s: s["optimizer"]["state"][0].pop("step"), "its optimiser's state"),
    (lambda s: s["optimizer"].update(state=[]), "its optimiser's state")])
def test_resuming_a_checkpoint_that_somebody_has_edited(run, tmp_path, capsys, change, says):
    shutil.copytree(run[0], tmp_path / "out")
    path = str(tmp_path / "out" / "last.pt")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    assert pretrain.main(["--resume", path, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert says in said and path in said and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output", "--data"])
def test_a_folder_that_is_too_deep_to_make(flag, tmp_path, capsys):
    assert pretrain.main(["--mini", "--device", "cpu", "--output", str(tmp_path), flag, "a/" * 3000]) == 2
    assert f"{flag} a/a/" in capsys.readouterr().err


def test_resuming_on_other_data(command, run, copy):
    (copy / "vg" / "attributes_vocab.txt").write_text("red\nblue\n")
    fails(command("pretrain.py", "--resume", f"{run[0]}/last.pt", "--data", copy),
          "its classes or attributes are not those of", "attributes_vocab.txt")


def test_weights_that_cannot_be_had(command, world, tmp_path):
    fails(command("pretrain.py", *TINY, "--data", world, "--output", tmp_path, "--backbone-weights", "nowhere.pth"),
          "--backbone-weights nowhere.pth: no such file")
