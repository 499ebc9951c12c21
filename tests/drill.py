"""Kill pre-trainings at random moments, resume them, and compare with one that was never killed.

    python tests/drill.py --rounds 6 --processes 1 --seed 0
    python tests/drill.py --rounds 6 --processes 2 --seed 0      # under torchrun

A round is a run of a few seconds, with loader workers, micro-batches, scale augmentation, dropout,
validations and a checkpoint after each step. It gets SIGKILL, all of its processes at once, one to
three times: at any time, or while the index or a checkpoint is being written. Each time the same
command line, which ends in `--resume auto`, is started again. At the end the log and the checkpoint
must equal those of the run that was never killed, bit for bit. The last line: `6 rounds, 6
survived, parameters equal: yes`, or `no` and exit code 1. Needs Linux's /proc.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import shapes  # noqa: E402, it lies in the folder above
from model import load_checkpoint  # noqa: E402

COMMAND = """pretrain.py --mini --width 32 --heads 2 --feed-forward 64 --encoder-layers 2
--decoder-layers 2 --dropout 0.1 --workers 1 --minutes 0 --batch-size 4 --micro-batch 1
--sentences-per-picture 2 --warmup 0 --short-sides 48 64 --steps 12 --log-every 1 --val-pictures 4
--val-every 5 --checkpoint-minutes 0 --resume auto""".split()
TIMES = ("seconds", "pictures_per_second")  # of the log and the checkpoint: never the same twice


class Run:
    """A training in the background."""

    def __init__(self, folder, world, processes):
        self.folder, self.marker = Path(folder), f"DRILL={uuid.uuid4().hex}"
        launch = []
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone",
                      f"--nproc_per_node={processes}"]
        self.folder.mkdir(exist_ok=True)
        self.printed = self.folder / "printed.txt"
        with open(self.printed, "ab") as file:
            self.process = subprocess.Popen(
                ["env", self.marker, "OMP_NUM_THREADS=1", sys.executable, *launch, *COMMAND,
                 "--data", world, "--output", folder, "--index", f"{folder}/index"],
                cwd=ROOT, stdout=file, stderr=file)

    def steps(self):
        """The lines of losses in the log so far."""
        log = self.folder / "log.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def kill(self):
        """SIGKILL for all processes of the run, wherever torchrun and the loaders have put them."""
        found = True
        while found:
            found = False
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if self.marker.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                        os.kill(int(pid), signal.SIGKILL)
                        found = True
                except OSError:  # it has ended, or is another user's
                    pass
        self.process.wait()

    def wait(self, condition=lambda: False):
        """Until the run has ended or the condition holds."""
        while self.process.poll() is None and not condition():
            time.sleep(0.0005)

    def finish(self):
        self.wait()
        if self.process.returncode:
            raise SystemExit(f"a run ended with {self.process.returncode}:\n"
                             f"{self.printed.read_text()[-2000:]}")


def disturb(run, rng, seconds):
    """Kill a run at a random moment; returns a word about it. seconds: of a whole run."""
    before = run.steps()
    is_new = not (run.folder / "index").exists()
    moment = rng.choice(["any time", "checkpoint", *["index"] * is_new])
    delay = rng.uniform(0, 0.02)
    if moment == "any time":
        delay = rng.uniform(0, seconds)
    elif moment == "index":
        run.wait((run.folder / "index").exists)
    else:
        least = before + rng.randint(0, 3)
        run.wait(lambda: run.steps() >= least and (run.folder / "last.pt.tmp").exists())
    end = time.time() + delay
    run.wait(lambda: time.time() >= end)
    half = "half a" if (run.folder / "last.pt.tmp").exists() else "no half"
    run.kill()
    return f"{moment}, {run.steps()} steps, {half} checkpoint"


def result(folder):
    """What must be equal in the end: the log and the checkpoint, less times and paths."""
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    log = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    state = load_checkpoint(os.path.join(folder, "last.pt"))
    for name in ("output", "index", "workers"):
        del state["args"][name]
    return {"log": log, **{k: v for k, v in state.items() if k not in (*TIMES, "log_size")}}


def differences(a, b, path=""):
    """The places where two nested values are not equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [place for n in range(len(a)) for place in differences(a[n], b[n], f"{path}/{n}")]
    same = type(a) is type(b) and (torch.equal(a, b) if torch.is_tensor(a) else a == b)
    return [] if same else [path]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # for torchrun's files, which it cannot remove once killed
        world, whole = f"{folder}/world", f"{folder}/whole"
        shapes.write_world(world, seed=3, train=64, val=8, test=8)
        started = time.time()
        Run(whole, world, args.processes).finish()
        seconds = time.time() - started
        expected = result(whole)
        print(f"never killed: {seconds:.0f} s", flush=True)
        for number in range(args.rounds):
            place = f"{folder}/round-{number}"
            killed = [disturb(Run(place, world, args.processes), rng, seconds)
                      for _ in range(rng.randint(1, 3))]
            Run(place, world, args.processes).finish()
            different = differences(expected, result(place))
            survived += not different
            print(f"round {number}: killed at: {'; '.join(killed)}: "
                  + (f"DIFFERENT: {different[:5]}" if different else "equal"), flush=True)
    equal = survived == args.rounds
    print(f"{args.rounds} rounds, {survived} survived, parameters equal: "
          f"{'yes' if equal else 'no'}")
    return not equal


if __name__ == "__main__":
    sys.exit(main())
