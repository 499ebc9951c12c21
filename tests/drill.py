"""Kill trainings at random moments, go on with them, and compare with those that nobody disturbed, bit for bit.

    python tests/drill.py --rounds 30 --processes 1 --seed 0
    python tests/drill.py --rounds 30 --processes 2 --seed 0      # under torchrun

A round is a run of seconds, of pretrain.py and finetune.py in turn, with loader workers, accumulated parts, scale
augmentation, masking, validations and a checkpoint after every step. It gets SIGKILL, all of its processes at once, one
to three times: anywhere, or just when a checkpoint is being written; each time the same command line, which ends in
`--resume auto`, is started again. At its end the weights, the optimiser's state, the log with its validations, and all
else that a checkpoint holds must be those of the undisturbed run. The last line: `30 rounds, 30 survived, parameters
equal: yes`, or `no` and exit code 1. Needs Linux's /proc.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import shapes  # noqa: E402, it lies in the folder above
from model import load_checkpoint  # noqa: E402

TINY = ["--mini", "--width", "32", "--heads", "2", "--feed-forward", "64", "--encoder-layers", "2", "--decoder-layers",
        "2", "--dropout", "0.1", "--workers", "1", "--minutes", "0", "--batch-size", "4", "--micro-batch", "1",
        "--sentences-per-picture", "2", "--warmup", "0", "--short-sides", "48", "64", "--steps", "12", "--log-every",
        "1", "--checkpoint-minutes", "0", "--resume", "auto"]
RUNS = {"pretrain": ["pretrain.py", *TINY, "--val-pictures", "4", "--val-every", "5"],
        "finetune": ["finetune.py", "--task", "vqa", "--init", "none", *TINY, "--val-examples", "8",
                     "--val-every", "0.12"]}
TIMES = ("seconds", "pictures_per_second", "examples_per_second")  # what a clock gives is never the same
LIMIT = 180  # seconds for one start, with all that it does


class Run:
    """A training in the background."""

    def __init__(self, kind, folder, world, processes):
        self.folder, self.marker = folder, uuid.uuid4().hex
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        os.makedirs(folder, exist_ok=True)
        self.said = os.path.join(folder, "said.txt")
        with open(self.said, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launch, *RUNS[kind], "--data", world, "--output", folder], cwd=ROOT, stdout=file,
                stderr=file, env={**os.environ, "DRILL": self.marker, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        self.began = time.time()

    def steps(self):
        try:
            with open(os.path.join(self.folder, "log.jsonl")) as file:
                return sum('"loss"' in line for line in file)
        except FileNotFoundError:
            return 0

    def kill(self):
        """SIGKILL for all processes of the run, wherever torchrun and the loaders have put them."""
        found = True
        while found:
            found = []
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open(f"/proc/{pid}/environ", "rb") as file:
                        if f"DRILL={self.marker}".encode() in file.read():
                            os.kill(int(pid), signal.SIGKILL)
                            found.append(pid)
                except OSError:  # it has ended, or is another user's
                    pass
        self.process.wait()

    def wait(self, condition=lambda: False):
        """Until it has ended, its time is over, or the condition holds. Returns whether it still runs."""
        while self.process.poll() is None and not condition():
            if time.time() - self.began > LIMIT:
                self.kill()
                raise SystemExit(f"a run took more than {LIMIT} s; see {self.said}")
            time.sleep(0.0005)
        return self.process.poll() is None


def finished(kind, folder, world, processes):
    """Start a run and let it come to its end: (seconds to its first step, seconds in all)."""
    run = Run(kind, folder, world, processes)
    there = run.steps()
    run.wait(lambda: run.steps() > there)
    first = time.time() - run.began
    run.wait()
    if run.process.returncode:
        with open(run.said, errors="replace") as file:
            raise SystemExit(f"a run ended with {run.process.returncode}:\n{file.read()[-2000:]}")
    return first, time.time() - run.began


def disturb(kind, folder, world, processes, rng, first, whole):
    """Start a run and kill it at a random moment; says where that was."""
    run = Run(kind, folder, world, processes)
    moment = rng.choice(["start", "training", "training", "writing", "writing"])
    there, temporary = run.steps(), os.path.join(folder, "last.pt.tmp")
    if moment == "start":  # imports, reading the checkpoint, the first pictures
        delay = rng.uniform(0.5, 1.0) * first
    elif moment == "training":
        delay = rng.uniform(0, whole - first)
        run.wait(lambda: run.steps() > there)
    else:
        saves, seen = rng.randint(1, 4), [False, 0]

        def writing():
            now = os.path.exists(temporary)
            seen[1] += now and not seen[0]
            seen[0] = now
            return seen[1] >= saves

        run.wait(writing)
        delay = rng.uniform(0, 0.05)
    end = time.time() + delay
    run.wait(lambda: time.time() >= end)
    half = os.path.exists(temporary)
    run.kill()
    return f"{moment} at step {run.steps()}" + " with half a checkpoint" * half


def result(kind, folder):
    """What must be equal in the end."""
    with open(os.path.join(folder, "log.jsonl")) as file:
        log = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in file]
    found = {"log": log}
    for name in ("last.pt", "best.pt")[:1 + (kind == "finetune")]:
        state = load_checkpoint(os.path.join(folder, name))
        state["args"] = {k: v for k, v in state["args"].items() if k != "output"}
        found[name] = {k: v for k, v in state.items() if k not in (*TIMES, "log_size")}
    return found


def differences(a, b, path=""):
    """The places where two nested values are not equal bit for bit."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        return [place for key in {**a, **b} for place in (
            differences(a[key], b[key], f"{path}/{key}") if key in a and key in b else [f"{path}/{key}"])]
    if isinstance(a, (list, tuple)):
        return [path] * (len(a) != len(b)) or [
            place for number, pair in enumerate(zip(a, b)) for place in differences(*pair, f"{path}/{number}")]
    return [] if (torch.equal(a, b) if torch.is_tensor(a) else a == b) else [path]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=3, help="in a round, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # torchrun's own files, which it cannot remove when it is killed
        world = os.path.join(folder, "world")
        shapes.write_world(world, seed=3, train=64, val=8, test=8)
        expected, times = {}, {}
        for kind in list(RUNS)[:args.rounds]:
            times[kind] = finished(kind, os.path.join(folder, kind), world, args.processes)
            expected[kind] = result(kind, os.path.join(folder, kind))
            print(f"{kind}, undisturbed: {times[kind][1]:.0f} s, {times[kind][0]:.0f} to the first step", flush=True)
        for number in range(args.rounds):
            kind, began = list(RUNS)[number % len(RUNS)], time.time()
            place = os.path.join(folder, f"round-{number}")
            killed = [disturb(kind, place, world, args.processes, rng, *times[kind])
                      for _ in range(rng.randint(1, args.kills))]
            finished(kind, place, world, args.processes)
            different = differences(expected[kind], result(kind, place))
            left = [name for name in os.listdir(place) if name.endswith(".tmp")]
            survived += not different and not left
            print(f"round {number}: {kind}, killed at: {', '.join(killed)}; "
                  + (f"DIFFERENT: {different[:5]}" if different else f"LEFT: {left}" if left else "equal")
                  + f"; {time.time() - began:.0f} s", flush=True)
            shutil.rmtree(place)
    equal = survived == args.rounds
    print(f"{args.rounds} rounds, {survived} survived, parameters equal: {'yes' if equal else 'no'}")
    return not equal


if __name__ == "__main__":
    sys.exit(main())
