"""What a run survives: damaged and missing checkpoints, a full disk, losses that are not finite, processes that die."""

import contextlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import drill
import pytest
import soak
import torch
from conftest import ROOT, TINY, small_model

import data
import finetune
import pretrain
from data import InputError
from model import check_sums, load_checkpoint, save_checkpoint

# What is drawn, is drawn again; and what is kept beside the model is kept
SCHEDULE = ["--schedule", "step", "--dropout", "0.1", "--short-sides", "48", "64", "--cells", "2", "--mask-share",
            "0.3", "--mask-named", "0.5"]


def log(folder):
    with open(os.path.join(folder, "log.jsonl")) as file:
        return [{k: v for k, v in json.loads(line).items() if k not in drill.TIMES} for line in file]


def names_of(folder):
    return sorted(name for name in os.listdir(folder) if "checkpoint" in name or name.endswith((".pt", ".tmp")))


@pytest.fixture(scope="module")
def one_thread():
    """Other numbers of threads sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(one_thread, world, tmp_path_factory):
    """An undisturbed run of six steps with a validation in the middle, in two parts a step: its folder."""
    folder = str(tmp_path_factory.mktemp("trust") / "whole")
    assert pretrain.main([*flags_of(world, folder), "--steps", "6"]) == 0
    return folder


def flags_of(world, folder):
    return [*TINY, *SCHEDULE, "--data", world, "--output", str(folder), "--micro-batch", "2", "--val-every", "4",
            "--checkpoint-minutes", "0"]


def cut(original, at):
    """A function that is interrupted when it is called for the so-manieth time: its process has no time to do anything.
    """
    calls = itertools.count(1)

    def function(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)
    return function


@pytest.fixture(scope="module")
def unfinished(one_thread, world, tmp_path_factory):
    """The same, cut off in the last validation: last.pt of step 6, previous.pt of step 5."""
    folder = str(tmp_path_factory.mktemp("trust") / "unfinished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "measure_with_blind", cut(pretrain.measure_with_blind, 2))
        pretrain.main([*flags_of(world, folder), "--steps", "6"])
    return folder


@pytest.fixture
def copy(unfinished, tmp_path):
    """That run, to break."""
    shutil.copytree(unfinished, tmp_path / "run")
    return tmp_path / "run"


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_the_last_two_checkpoints_are_kept(unfinished):
    assert names_of(unfinished) == ["last.pt", "previous.pt"]
    assert [load_checkpoint(os.path.join(unfinished, name))["step"] for name in ("last.pt", "previous.pt")] == [6, 5]


def test_a_save_that_was_cut_between_two_names_leaves_none_too_many(tmp_path):
    """Killed when previous.pt was last.pt's file already: renaming one name of a file to its other does nothing."""
    last, previous = (str(tmp_path / name) for name in ("last.pt", "previous.pt"))
    save_checkpoint(last, small_model(), [], {}, step=1)
    os.link(last, previous)
    save_checkpoint(last, small_model(), [], {}, previous=previous, step=2)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


def test_a_run_that_has_ended_stays_as_it_is(whole, world, tmp_path, capsys):
    """With more --steps it goes on, and the log keeps what was measured at its end."""
    shutil.copytree(whole, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(whole)}
    assert pretrain.main([*flags_of(world, tmp_path / "run"), "--steps", "6", "--resume", "auto"]) == 0
    assert "has ended, at step 6" in capsys.readouterr().out
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}
    assert pretrain.main(["--resume", str(tmp_path / "run" / "last.pt"), "--steps", "7"]) == 0
    assert [(line["step"], "loss" in line) for line in log(tmp_path / "run")][-4:] == [
        (6, True), (6, False), (7, True), (7, False)]


def damaged(content, how, rng):
    if how == "cut off":
        return content[:rng.randrange(len(content))]
    where = rng.randrange(1000, len(content) - 5000)  # weights, not the zip file's list of parts at its end
    if how == "a flipped bit":
        return content[:where] + bytes([content[where] ^ 1 << rng.randrange(8)]) + content[where + 1:]
    return content[:where] + bytes(512) + content[where + 512:] if how == "a lost block" else b""


@pytest.mark.parametrize("how", ["cut off", "a flipped bit", "a lost block", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(copy, whole, world, how, capsys):
    rng = random.Random(how)
    path = copy / "last.pt"
    content = path.read_bytes()
    path.write_bytes(damaged(content, how, rng))
    assert pretrain.main(["--resume", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"--resume {path}: not a PyTorch file, or damaged" in said and f"--resume {copy}/previous.pt" in said
    assert pretrain.main([*flags_of(world, copy), "--steps", "6", "--resume", "auto"]) == 0
    said = capsys.readouterr()
    assert f"{path}: not a PyTorch file, or damaged" in said.err and "previous.pt, of step 5" in said.err
    assert "going on at step 5" in said.out
    assert (copy / "earlier-1" / "last.pt").exists()  # nothing is thrown away
    assert drill.differences(drill.result("pretrain", whole), drill.result("pretrain", copy)) == []


def test_flipped_bits_are_found_wherever_they_matter(tmp_path):
    """Anywhere in the file: either it is said to be damaged, or what is read is what was written."""
    path = str(tmp_path / "c.pt")
    model = small_model()
    save_checkpoint(path, model, ["a"], {"coco": ["x"]}, step=3)
    with open(path, "rb") as file:
        content = file.read()
    rng, found = random.Random(0), 0
    places = [rng.randrange(len(content)) for _ in range(20)]
    places += [len(content) - rng.randrange(1, 2000) for _ in range(20)]  # the zip file's list of parts
    for place in places:
        with open(path, "wb") as file:
            file.write(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:])
        try:
            state = load_checkpoint(path)
        except InputError as error:
            found += 1
            assert path in str(error) and "damaged" in str(error)
        else:  # in the padding between two parts, or a date
            assert all(torch.equal(state["model"][k], v) for k, v in model.state_dict().items()) and state["step"] == 3
    assert found >= 20


def test_torch_alone_would_not_notice(tmp_path):
    path = str(tmp_path / "c.pt")
    torch.save({"weights": torch.zeros(100_000)}, path)
    with open(path, "r+b") as file:
        file.seek(200_000)
        file.write(b"\x40")
    assert torch.load(path, weights_only=True)["weights"].sum() != 0
    with pytest.raises(ValueError, match="checksum"):
        check_sums(path)


def test_both_checkpoints_damaged(copy, world, capsys):
    for name in ("last.pt", "previous.pt"):
        (copy / name).write_bytes(b"")
    assert pretrain.main([*flags_of(world, copy), "--steps", "6", "--resume", "auto"]) == 2
    said = capsys.readouterr().err
    assert f"{copy}/previous.pt" in said and "to start anew" in said and len(said.splitlines()) == 1


def test_auto_starts_where_nothing_is(world, tmp_path, capsys):
    flags = [*flags_of(world, tmp_path / "run"), "--resume", "auto"]
    assert pretrain.main([*flags, "--steps", "1"]) == 0 and pretrain.main([*flags, "--steps", "2"]) == 0
    assert "going on at step 1" in capsys.readouterr().out
    assert [line["step"] for line in log(tmp_path / "run") if "loss" in line] == [1, 2]
    assert finetune.main(["--resume", str(tmp_path / "run" / "last.pt")]) == 2
    assert "not a fine-tuning's last.pt" in capsys.readouterr().err


def test_going_back_to_the_one_before(copy, world):
    """--resume previous.pt by hand: what came after it is moved away, not mixed in."""
    assert pretrain.main(["--resume", str(copy / "previous.pt"), "--steps", "5"]) == 0
    assert load_checkpoint(str(copy / "last.pt"))["step"] == 5 and (copy / "earlier-1" / "last.pt").exists()
    assert [line["step"] for line in log(copy) if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stop", [1, 5, "measure_with_blind", "pretrained_gallery"])
def test_a_run_that_is_cut_off_ends_as_the_undisturbed_one(whole, world, stop, tmp_path, monkeypatch):
    """Cut off without a chance to write anything: in a step's second part, or in the validation after step 4, before or
    after its line is in the log."""
    with monkeypatch.context() as patch:
        if isinstance(stop, str):
            patch.setattr(pretrain, stop, cut(getattr(pretrain, stop), 1))
        else:
            patch.setattr(pretrain, "losses", cut(pretrain.losses, 2 * stop + 2))
        with pytest.raises(KeyboardInterrupt):
            pretrain.main([*flags_of(world, tmp_path / "run"), "--steps", "6"])
    assert pretrain.main([*flags_of(world, tmp_path / "run"), "--steps", "6", "--resume", "auto"]) == 0
    assert drill.differences(drill.result("pretrain", whole), drill.result("pretrain", tmp_path / "run")) == []


@pytest.mark.parametrize("rounds,processes", [(2, 1), (1, 2)])
def test_killed_runs_go_on(rounds, processes, capsys):
    assert drill.main(["--rounds", str(rounds), "--processes", str(processes), "--kills", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"{rounds} rounds, {rounds} survived, parameters equal: yes\n")


# ----------------------------------------------------------------------------------------------------------------
# A full disk; losses that are not finite


@contextlib.contextmanager
def no_file_grows_beyond(size):
    """What a full disk does, for this process alone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_former_checkpoint(copy, capsys):
    before = (copy / "last.pt").read_bytes()
    with no_file_grows_beyond(1_000_000):
        code = pretrain.main(["--resume", str(copy / "last.pt"), "--steps", "8"])
    first, second = capsys.readouterr().err.splitlines()
    assert code == 2 and first == f"pretrain.py: {copy}/last.pt: cannot be written (File too large); what is there " \
                                  "is whole; make room"
    assert "is of step 6; go on with: python pretrain.py --resume" in second
    assert (copy / "last.pt").read_bytes() == before and names_of(copy) == ["last.pt", "previous.pt"]


def test_a_log_that_cannot_be_written(copy, monkeypatch, capsys):
    """Half of the line may be there; the run that goes on cuts it off."""
    monkeypatch.setattr(pretrain, "write_report", lambda *_: None)
    with no_file_grows_beyond(load_checkpoint(str(copy / "last.pt"))["log_size"] + 100):
        assert pretrain.main(["--resume", str(copy / "last.pt"), "--steps", "8"]) == 2
    assert "log.jsonl: cannot be written (File too large)" in capsys.readouterr().err
    assert pretrain.main(["--resume", str(copy / "last.pt"), "--steps", "7"]) == 0
    assert [line["step"] for line in log(copy) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux has a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, capsys):
    assert pretrain.main([*flags_of(str(tmp_path / "none"), "/proc/self/run"), "--steps", "1"]) == 2
    assert "--output /proc/self/run: cannot be written (" in capsys.readouterr().err


def test_deterministic(world, tmp_path):
    """--deterministic holds for its run and not for the next one in the same process."""
    for flags, on in (["--deterministic"], True), ([], False):
        assert pretrain.main([*flags_of(world, tmp_path / "run"), "--steps", "1", *flags]) == 0
        assert torch.are_deterministic_algorithms_enabled() == on


def test_a_step_that_is_not_finite_is_skipped(whole, world, tmp_path, monkeypatch, capsys):
    """The weights, the statistics of batch norm and the optimiser stay as they were; the run ends as one that had
    those pictures nowhere."""
    losses, calls = pretrain.losses, 0

    def spoil(outputs, batch, counts, args):
        nonlocal calls
        calls += 1
        named = losses(outputs, batch, counts, args)
        return {k: v * (math.nan if calls == 4 else 1) for k, v in named.items()}  # the second part of step 1

    monkeypatch.setattr(pretrain, "losses", spoil)
    flags = [*flags_of(world, tmp_path / "run"), "--val-every", "0"]
    monkeypatch.setattr(pretrain, "measure_with_blind", cut(None, 1))  # else a third checkpoint would come after it
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*flags, "--steps", "2"])
    said = capsys.readouterr().out
    assert "step 1: not finite (loss_mlm nan" in said and "skipped; pictures coco" in said.replace("vg", "coco")
    one, two = (load_checkpoint(str(tmp_path / "run" / name)) for name in ("previous.pt", "last.pt"))
    assert (one["step"], one["bad_steps"], two["step"], two["bad_steps"]) == (1, 0, 2, 1)
    assert drill.differences(one["model"], two["model"]) == []
    assert drill.differences(one["optimizer"]["state"], two["optimizer"]["state"]) == []
    (line,) = (line for line in log(tmp_path / "run") if "bad_steps" in line)
    assert line["step"] == 2 and line["bad_steps"] == 1 and len(line["pictures"]) == 4


@pytest.mark.parametrize("script", [pretrain, finetune], ids=lambda script: script.__name__)
def test_too_many_steps_that_are_not_finite(script, world, tmp_path, monkeypatch, capsys):
    """Two are skipped, at the third the run stops, with a checkpoint."""
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *words: clip(*words) * math.nan)
    flags = [*TINY[:TINY.index("--val-pictures")], "--log-every", "1", "--data", world, "--output",
             str(tmp_path / "run"), "--steps", "9", "--max-bad-steps", "2"]
    assert script.main(flags + ["--task", "nlvr2", "--init", "none"] * (script is finetune)) == 2
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert "3 steps with a loss that is not finite (--max-bad-steps 2)" in first and "lower --lr" in first
    assert "the last checkpoint is of step 3; go on with" in second and said.out.count("skipped; pictures ") == 3
    state = load_checkpoint(str(tmp_path / "run" / "last.pt"))
    assert state["step"] == state["bad_steps"] == 3 and state["optimizer"]["state"] == {}


def test_weights_that_are_not_finite_are_not_kept(copy, monkeypatch, capsys):
    """No later step could mend them, and the two checkpoints would soon be gone."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf))
    assert pretrain.main(["--resume", str(copy / "last.pt"), "--steps", "9"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "step 7: the weights are not finite, and not kept; try a lower --lr" in first
    assert "the last checkpoint is of step 6" in second
    assert [load_checkpoint(str(copy / name))["step"] for name in names_of(copy)] == [6, 5]


# ----------------------------------------------------------------------------------------------------------------
# Processes that die or hang


WAIT = """
import sys, time
sys.path.insert(0, {root!r})
import data, torch
def work(stop):
    rank, world, device = data.start_processes("cpu", {limit} / 60)
    for step in range({steps}):
        print(step, flush=True)
        {body}
        data.summed([1.0], world, device)
        time.sleep(0.05)
sys.exit(data.command("loop.py", work))
"""


def processes(limit, body="pass", world=2, steps=1000):
    """Some processes that sum a number again and again, started without torchrun, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [subprocess.Popen(
        [sys.executable, "-c", WAIT.format(root=ROOT, limit=limit, body=body, steps=steps)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        for rank in range(world)]
    for process in found:
        process.stdout.readline()  # it has met the others
    return found


def ends(process, within):
    began = time.time()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and time.time() - began < within, said
    return [line for line in said.splitlines() if line.startswith("rank")]


def test_a_process_that_dies_is_named():
    first, second = processes(60)
    time.sleep(0.5)
    second.kill()
    assert ends(first, 20) == ["rank 0: rank 1 has ended; this process ends"]


def test_a_process_that_ends_while_it_asks_the_others_is_not_aborted():
    """Without the wait for its thread this ends with SIGABRT, in two of three cases."""
    for _ in range(2):
        for process in processes(0.2, "data.watch.limit = 60", steps=12):  # asks again after 0.01 s
            process.communicate(timeout=60)
            assert process.returncode == 0


def test_a_process_that_is_frozen_is_named():
    first, second = processes(3)
    second.send_signal(signal.SIGSTOP)
    said = ends(first, 20)
    second.kill()
    assert said == ["rank 0: rank 1 has not answered for 3 s (--timeout); this process ends"]


def test_a_process_that_comes_no_further_is_named_by_all():
    """Rank 1 alone does not come to the sum; rank 2, which takes long but goes on for a while, is not at fault."""
    body = "rank == 1 and step == 2 and time.sleep(100); [(time.sleep(0.5), data.progressed()) for _ in range(4) " \
           "if rank == 2 and step == 1]"
    three = processes(3, body, world=3)
    for rank, process in enumerate(three):
        assert ends(process, 30) == [f"rank {rank}: rank 1 has come no further for 3 s (--timeout); this process ends"]


def test_all_processes_measure_the_model_that_is_kept():
    """Batch norm's statistics are each process's own until the next step; the checkpoint has the first one's."""
    body = "norm = torch.nn.BatchNorm1d(2); norm.running_mean.fill_(rank + 5); data.share_statistics(norm, world); " \
           "print(norm.running_mean.tolist(), flush=True)"
    for process in processes(60, body, steps=1):
        assert process.communicate(timeout=60)[0] == "[5.0, 5.0]\n"


def test_a_training_whose_second_process_is_killed(world, tmp_path):
    """Under torchrun: none is left behind, and the last checkpoint is whole."""
    run = drill.Run.__new__(drill.Run)
    run.folder, run.marker = str(tmp_path / "run"), f"trust-{os.getpid()}"
    run.process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py",
         *flags_of(world, run.folder), "--steps", "1000", "--timeout", "0.2", "--workers", "1"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "DRILL": run.marker, "OMP_NUM_THREADS": "1"})
    run.began = time.time()
    run.wait(lambda: run.steps() > 2)
    mine = [one for one in soak.tree(run.process.pid) if rank_of(one) == "1"]
    os.kill(min(mine), signal.SIGKILL)
    said = run.process.communicate(timeout=60)[1]
    assert run.process.returncode != 0 and "rank 0: rank 1 has ended" in said, said
    time.sleep(0.5)
    assert not [pid for pid in filter(str.isdigit, os.listdir("/proc")) if run.marker in environment_of(pid)]
    assert load_checkpoint(os.path.join(run.folder, "last.pt"))["step"] >= 2 and names_of(run.folder) == [
        "last.pt", "previous.pt"]


def environment_of(pid):
    try:
        with open(f"/proc/{pid}/environ") as file:
            return file.read()
    except OSError:
        return ""


def rank_of(pid):
    return dict(part.partition("=")[::2] for part in environment_of(pid).split("\0")).get("RANK")


def test_a_loader_process_that_is_killed():
    def fetch():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(InputError, match="a loader process was killed.*--workers"):
        data.attempt(fetch, 1)
    with pytest.raises(RuntimeError, match="shape"):
        data.attempt(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), 1)


# ----------------------------------------------------------------------------------------------------------------
# The soak's judgement


def looks(**slopes):
    """What a soak of two hours would see: constants with some noise, and so much more an hour."""
    rng = random.Random(0)
    return [{"hours": h / 100, "step": h * 50, "cpu_seconds": h * 5 * (1 + slopes.get("cpu", 0) * h / 200),
             **{key: start + rng.choice([0, 0, 0, 3]) * (key == "megabytes") + slopes.get(key, 0) * h / 100
                for key, start in (("megabytes", 900), ("files", 40), ("threads", 9), ("processes", 2))}}
            for h in range(200)]


@pytest.mark.parametrize("key,slope", [("megabytes", 2.0), ("files", 1.0), ("threads", 1.0), ("cpu", 0.2)])
def test_a_soak_sees_what_grows(key, slope):
    assert all(row[-1] for row in soak.judge(looks()))
    assert [row[0].split()[0].lower() for row in soak.judge(looks(**{key: slope})) if not row[-1]] == [key]


def test_other_work_beside_a_soak_is_no_slowness():
    """In the last third it makes every second step 20 % dearer; the cheapest quarter tells that steps are as before."""
    seen, more = looks(), 0.0
    for n, one in enumerate(seen):
        more += n > 130 and n % 2
        one["cpu_seconds"] += more
    assert all(row[-1] for row in soak.judge(seen))
