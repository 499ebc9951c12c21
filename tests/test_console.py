"""What a user sees and presses: Ctrl-C and other signals, the progress bar and the plain lines, --help, --device."""

import fcntl
import importlib
import json
import math
import os
import pty
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, TINY

import data
import pretrain
from data import InputError, start_processes
from model import load_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # other numbers of threads sum in another order
STEPS = 30  # enough that a signal after a few of them comes before the end


def log(folder):
    """The lines of a run's log, as far as it is written."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as file:
            return [json.loads(line) for line in file if line.endswith("\n")]
    except FileNotFoundError:
        return []


def python(*words):
    """Run a command line in the repository: (exit code, stdout, the lines of stderr)."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env=ENVIRONMENT)
    return done.returncode, done.stdout, done.stderr.splitlines()


def interrupt(folder, number, words, steps=3, group=True):
    """Start a command and send it a signal after some steps: (exit code, stdout, the lines of stderr).

    group: to its children too, as a terminal does.
    """
    run = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True, env=ENVIRONMENT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while run.poll() is None and sum("loss" in line for line in log(folder)) < steps:
        time.sleep(0.01)
    (os.killpg if group else os.kill)(run.pid, number)
    out, err = run.communicate(timeout=120)
    return run.returncode, out, err.splitlines()


def on_terminal(*words):
    """Run a command line with a terminal for its output: (exit code, what the terminal got)."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # lines, columns
    run = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdin=its, stdout=its,
                           stderr=its)
    os.close(its)
    got = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            part = b""
        if not part:
            break
        got += part
    os.close(ours)
    return run.wait(), got.decode().replace("\r\n", "\n")


def left_over(folder):
    """Processes whose command line names the folder, after those that are ending have had time to."""
    for _ in range(100):
        listed = subprocess.run(["ps", "-axo", "pid,command"], text=True, capture_output=True, check=True).stdout
        found = [line for line in listed.splitlines() if str(folder) in line]
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def options(world):
    return [*TINY, "--data", world, "--dropout", "0.1", "--steps", STEPS]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run that nothing disturbed: (its folder, its stdout)."""
    folder = str(tmp_path_factory.mktemp("whole") / "out")
    code, out, err = python("pretrain.py", *options, "--output", folder)
    assert code == 0 and not err, err  # no bar where there is no terminal
    return folder, out


# ----------------------------------------------------------------------------------------------------------------
# Signals


def test_a_run_stopped_by_ctrl_c_ends_as_one_that_never_stopped(whole, options, tmp_path):
    """The line that is printed is the command that is run; it runs on a terminal, whose bar is looked at too."""
    folder, steps = str(tmp_path / "out"), random.randint(1, 10)
    words = ["pretrain.py", *options, "--output", folder, "--workers", 1]
    code, _, err = interrupt(folder, signal.SIGINT, words, steps)
    assert code == 130 and len(err) == 1, err
    step = load_checkpoint(f"{folder}/last.pt")["step"]
    assert steps <= step == max(line["step"] for line in log(folder)) < STEPS
    said, advice = err[0].split("; go on with: ")
    assert said == f"stopped at step {step} by Ctrl-C"
    first, *words = shlex.split(advice)
    code, screen = on_terminal(*words)
    assert (first, code) == ("python", 0)
    undisturbed, parted = (load_checkpoint(f"{where}/last.pt") for where in (whole[0], folder))
    for name, value in undisturbed["model"].items():
        assert torch.equal(value, parted["model"][name]), name
    ours, its = (log(where)[:STEPS] for where in (whole[0], folder))
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [line[key] for line in ours] == [line[key] for line in its]
    assert f"{STEPS}/{STEPS} [" in screen and "\rvalidating: 100%" in screen
    assert screen.splitlines()[-1].startswith("On 4 held-out pictures it guesses")


@pytest.mark.parametrize("script,number", [("pretrain.py", signal.SIGTERM), ("finetune.py", signal.SIGINT)])
def test_torchrun_passes_a_signal_on(script, number, whole, options, world, tmp_path):
    """It goes to the loaders' processes as well."""
    folder, words = str(tmp_path / "out"), [*options, "--workers", 1]
    if script == "finetune.py":
        words = ["--task", "nlvr2", "--init", f"{whole[0]}/last.pt", "--data", world, "--mini", "--minutes", 0,
                 "--batch-size", 4, "--workers", 1, "--steps", 1000, "--log-every", 1]
    code, _, err = interrupt(folder, number, [*TORCHRUN, script, *words, "--output", folder], group=False)
    state = load_checkpoint(f"{folder}/last.pt")
    said = [line for line in err if line.startswith("stopped at ")]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert code != 0 and said == [f"stopped at step {state['step']} by {name}; go on with: torchrun "
                                  f"--nproc_per_node=2 {script} --resume {folder}/last.pt"], err
    assert not left_over(folder)
    if script == "finetune.py":  # pre-training goes on in the test above
        code, _, err = python(script, "--resume", f"{folder}/last.pt", "--steps", state["step"] + 1)
        assert code == 0 and load_checkpoint(f"{folder}/last.pt")["step"] == state["step"] + 1, err


OTHER_MOMENTS = """
import os, signal, sys, threading
import pretrain
options, folder = sys.argv[2:], sys.argv[1]
before = signal.getsignal(signal.SIGINT)  # a shell lets what it starts in the background ignore it

def press(*words, **settings):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("went on")

def patched(name):
    real = getattr(pretrain, name)
    setattr(pretrain, name, press)
    codes.append(pretrain.main([*options, "--output", folder]))
    setattr(pretrain, name, real)
    handlers.append(signal.getsignal(signal.SIGINT))

codes, handlers = [], []
patched("index_pretraining")                                # 1. before the first step
patched("measure_with_blind")                               # 2. while it validates
codes.append(pretrain.main(["--resume", f"{folder}/last.pt"]))
thread = threading.Thread(target=lambda: codes.append(pretrain.main(["--resume", "nowhere.pt"])))
thread.start()
thread.join()
assert handlers == [before] * 2
print(codes)
"""


def test_ctrl_c_before_the_first_step_and_in_a_validation(options, tmp_path):
    folder = str(tmp_path / "out")
    code, out, err = python("-c", OTHER_MOMENTS, folder, *options, "--steps", 4, "--val-every", 2)
    assert code == 0 and out.splitlines()[-1] == "[130, 130, 0, 2]", err
    assert err == ["pretrain.py: stopped by Ctrl-C", "stopped at step 2 by Ctrl-C; go on with: python pretrain.py "
                   f"--resume {folder}/last.pt", "pretrain.py: --resume nowhere.pt: no such file"]
    # The validation that was cut short comes first
    assert [(line["step"], "loss" in line) for line in log(folder)] == [
        (1, True), (2, True), (2, False), (3, True), (4, True), (4, False)]


SECOND = """
import os, signal
import data
with data.Stopping() as stop:
    stop.hold()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.number == signal.SIGINT
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("and still", flush=True)
"""


def test_a_second_ctrl_c_ends_at_once():
    assert python("-c", SECOND) == (-signal.SIGINT, "still here\n", [])


# ----------------------------------------------------------------------------------------------------------------
# What is printed


def test_plain_lines_tell_the_time_left(whole):
    lines = [line for line in whole[1].splitlines() if re.match(rf"step \d+/{STEPS}  loss ", line)]
    assert len(lines) == STEPS and all(re.search(r" pictures/s  \d+:\d\d left$", line) for line in lines)
    assert lines[-1].endswith("  0:00 left") and f"\nstep {STEPS}/{STEPS}  validating on 4 pictures\n" in whole[1]
    assert pretrain.time_left(100, 0.25) == "5:00 left" and pretrain.time_left(3723, 0.5) == "1:02:03 left"
    assert pretrain.time_left(61, 1.01) == "0:00 left"
    assert pretrain.time_left(1, 0.0002, 18.5) == "18:29 left"  # the first step is slow
    assert pretrain.share_done(10, 100, 30, 1) == 0.5 and pretrain.share_done(10, 100, 30, 0) == 0.1


def test_one_bar_at_a_time_whose_end_is_where_the_minutes_end(whole, world, tmp_path):
    """Two bars would make the terminal go up a line."""
    code, screen = on_terminal("finetune.py", "--task", "nlvr2", "--init", f"{whole[0]}/last.pt", "--data", world,
                               "--mini", "--workers", 0, "--batch-size", 4, "--val-every", 4, "--val-examples", 4,
                               "--log-every", 3, "--minutes", 0.05, "--output", tmp_path / "out")
    assert code == 0 and "\x1b[A" not in screen, screen
    totals = [tuple(map(int, found)) for found in re.findall(r"(\d+)/(\d+) \[", screen)]
    steps = log(tmp_path / "out")[-1]["step"]
    assert (steps, steps) in totals and (0, 600) in totals  # 100 epochs of 24 examples
    for line in log(tmp_path / "out"):
        if "lr" in line:  # the schedule goes by the minutes too: 3e-4, 50 steps of warm-up, a cosine over the 3 seconds
            done = max((line["step"] - 1) / 600, line["seconds"] / 3)
            expected = 3e-4 * min(1, line["step"] / 50) * (1 + math.cos(math.pi * min(done, 1))) / 2
            assert line["lr"] == pytest.approx(expected, rel=1e-6)
    # What is said stands on a line of its own: behind nothing, or behind a bar that was wiped out
    for said in re.findall(r"^.*step \d+  accuracy", screen, re.MULTILINE):
        assert not said.rsplit("\r", 1)[0].rsplit("\r", 1)[-1].strip() and said.rsplit("\r", 1)[-1].startswith("step ")


# ----------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("script", ["pretrain", "finetune", "evaluate", "model", "data", "shapes"])
def test_help_says_each_default_once(script, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= columns
    flags = re.split(r"^  (?=-)", text.split("\n\n", 2)[2], flags=re.MULTILINE)[1:]
    for flag in flags:
        assert not re.search(r"default:\s+(None|False|\[)", flag) and flag.count("default:") <= 1, flag
        assert len(flag.split()) > 2, flag  # no flag without a word about it
    if script in ("pretrain", "finetune"):
        assert all(f"\n{group}:\n" in text for group in ("data", "model", "training", "output")) and len(flags) > 35


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", ""] + ["mps"] * (not torch.backends.mps.is_available()))
def test_a_device_that_is_not_there(device):
    with pytest.raises(InputError) as problem:
        start_processes(device)
    assert re.fullmatch(rf"--device {device}: .{{,200}}; give cpu.*", str(problem.value))


def test_mps_has_one_process_and_no_float64(monkeypatch):
    assert data.summed([1, 2.5, True], 1, "mps") == [1.0, 2.5, 1.0]  # not sent there
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device mps: works with one process"):
        start_processes("mps")
