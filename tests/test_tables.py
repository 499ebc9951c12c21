"""The command that makes the paper's tables: what it runs, what it keeps, what it writes."""

import glob
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

import conftest
import pytest
import tables
from conftest import ROOT

import finetune
import pretrain

SMALL = """-- --width 32 --heads 2 --feed-forward 64 --encoder-layers 2 --decoder-layers 2
    --batch-size 8 --val-every 1000""".split()


def commands(capsys, *words):
    assert tables.main([*words, "--mini", "--seeds", "2", "--work", "WORK", "--dry-run"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_the_commands_of_all_tables(capsys, monkeypatch):
    """They parse, what is tuned comes after what it starts from, and a run has one name."""
    monkeypatch.setattr(finetune, "load_checkpoint", lambda *_: None)
    scripts = {"pretrain.py": pretrain, "finetune.py": finetune}
    runs = {}
    for number in "123567":
        folders = []
        for words in commands(capsys, "--table", number):
            args, _ = scripts[words[1]].parse(words[2:])
            assert args.output not in folders
            folders.append(args.output)
            assert runs.setdefault(args.output, words) == words
            init = getattr(args, "init", "none")
            assert init == "none" or os.path.dirname(init) in folders
    assert len(set(map(str, runs.values()))) == len(runs)
    pretrainings = {re.sub("-seed.", "", name) for name in runs if "pretrain" in name}
    assert len(pretrainings) == 6 + 3  # of Table 3, and of Table 5, which shares one of them
    with_objects, _ = pretrain.parse(runs["WORK/pretrain-all-seed1"][2:])
    without, _ = pretrain.parse(runs["WORK/pretrain-no-detection-seed1"][2:])
    assert (with_objects.without, without.without) == ([], ["detection"])
    assert with_objects.steps * with_objects.batch_size == 25_600 and with_objects.seed == 1


def test_some_of_the_rows(capsys):
    found = commands(capsys, "--table", "3", "--rows", "all", "no detection")
    assert len(found) == 2 * 2 * 3
    assert tables.main(["--table", "3", "--mini", "--rows", "nothing", "--dry-run"]) == 2
    assert "table 3 has none of that name; there are: 'all', 'no cap" in capsys.readouterr().err


class Fork:
    """A command in a fork of conftest's warm process, with what the runner asks of a Popen."""

    def __init__(self, words, log):
        self.process = conftest.FORKS.Process(target=conftest._work, args=(
            words[1], words[2:], ROOT, {"OMP_NUM_THREADS": "1"}, [os.devnull, log, log]))
        self.process.start()
        self.terminate, self.wait = self.process.terminate, self.process.join

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)


@pytest.fixture
def started(monkeypatch):
    """The names of the runs that were started."""
    names = []

    def popen(words, env, stdin, stdout, stderr):
        words = ["python", os.path.basename(words[1]), *words[2:]]
        folder = words[words.index("--output") + 1]
        names.append(os.path.basename(folder))
        return Fork(words, os.path.join(folder, "output.txt"))

    monkeypatch.setattr(tables.subprocess, "Popen", popen)
    monkeypatch.setattr(tables, "commit", lambda: "abc")
    return names


def words_for(world, folder, *more):
    return ["--mini", "--data", world, "--output", f"{folder}/out", "--work", f"{folder}/work",
            *more, *SMALL]


def test_a_table_is_made_and_its_runs_kept(world, tmp_path, started, capsys):
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out/README.md"
    readme.write_text("before\n<!-- table 7 -->\nold\n<!-- end -->\nafter\n")
    words = words_for(world, tmp_path, "--seeds", "2", "--budget", "64", "--rows",
                      "pre-trained, sentence", "from scratch, sentence")
    assert tables.main(["--table", "7", *words]) == 0
    assert len(set(started)) == len(started) == 2 * 3
    result = json.loads((tmp_path / "out/table7.json").read_text())
    logs = []
    for seed in (0, 1):  # a value is the last validation's in the run's own log
        lines = (tmp_path / f"work/detection-all-seed{seed}/log.jsonl").read_text().splitlines()
        logs.append(json.loads(lines[-1])["val_AP50"])
    row = result["rows"][0]
    measure = row["measures"]["detection.AP50"]
    assert row["name"] == "pre-trained, sentence" and len(result["rows"]) == 2
    assert measure["values"] == pytest.approx(logs, rel=1e-4)
    assert measure["mean"] == pytest.approx(statistics.fmean(logs), rel=1e-4)
    assert measure["std"] == pytest.approx(statistics.stdev(logs), rel=1e-4)
    assert (tmp_path / "out/table7.png").read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("before\n<!-- table 7 -->\n|  | AP | AP50 | paper: AP | paper: AP50 |\n")
    assert text.endswith("\n<!-- end -->\nafter\n") and "commit abc" in text and "old" not in text
    assert not list((tmp_path / "work").glob("detection*/*.pt"))  # nothing starts from them

    # Again: nothing is run. With another budget they are other runs, here and in --work.
    started.clear()
    assert tables.main(["--table", "7", *words]) == 0 and not started
    assert json.loads((tmp_path / "out/table7.json").read_text())["rows"] == result["rows"]
    words[words.index("64")] = "128"
    assert tables.main(["--table", "7", *words]) == 2
    assert "pretrain-all-seed0.json: is of a run with other flags" in capsys.readouterr().err
    words[words.index(f"{tmp_path}/out")] = f"{tmp_path}/out2"
    assert tables.main(["--table", "7", *words]) == 2 and not started
    assert "run.json: is of a run with other flags" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_last_words(world, tmp_path, started, capsys):
    words = words_for(world, tmp_path, "--seeds", "1", "--budget", "64", "--jobs", "1")
    assert tables.main(["--table", "7", *words, "--lr", "nan"]) == 2
    error = capsys.readouterr().err
    assert "pretrain-all, seed 0: exit code 2" in error
    assert "--lr" in error and "output.txt" in error
    assert not os.path.exists(tmp_path / "out/runs")


def test_a_signal_stops_what_it_runs(world, tmp_path):
    """A real command line: SIGTERM ends it and what it runs, which keep a checkpoint."""
    words = ["--seeds", "1", "--budget", "10000000", "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "tests/tables.py"), "--table", "7",
         *words_for(world, tmp_path, *words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "work/pretrain-all-seed0/log.jsonl"
    until = time.time() + 200
    while not (log.exists() and log.read_text()) and time.time() < until:
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGINT, out
    assert "stopped at step" in (log.parent / "output.txt").read_text()
    assert (log.parent / "last.pt").exists()


def test_what_is_better_and_what_is_within_the_spread():
    def of(*values):
        return tables.spread(list(values))

    assert tables.compared(of(3, 4, 5), of(0, 1, 2.9)) == "+"
    assert tables.compared(of(0, 1), of(2, 3)) == "-"
    assert tables.compared(of(0, 1, 3), of(2, 3, 4)) == tables.compared(of(9), of(1, 2)) == ""
    assert tables.compared(of(3, 4, 5), of(0, 1, 2.9), smaller=True) == "-"
    assert of(1, 2, 3, 6) == {"mean": 3, "std": pytest.approx((14 / 3) ** 0.5),
                              "values": [1, 2, 3, 6]}


def test_a_table_as_markdown():
    result = {"heads": {"vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}, "reference": "all"}
    result["rows"] = [
        {"name": "all", "paper": {"vqa.overall": 70.76}, "measures": {
            "vqa.overall": tables.spread([80.0, 82.0]),
            "nlvr2.accuracy": tables.spread([0.7, 0.74])}},
        {"name": "none", "paper": {}, "measures": {
            "vqa.overall": tables.spread([40.0, 41.0]),
            "nlvr2.accuracy": tables.spread([0.72, 0.5])}}]
    assert tables.markdown(result) == (
        "|  | VQA | NLVR2 | paper: VQA |\n| --- | --- | --- | --- |\n"
        "| all | 81.0 ± 1.4 | 72.0 ± 2.8 | 70.76 |\n| none | 40.5 ± 0.7 (-) | 61.0 ± 15.6 |  |")


def test_the_page_of_results_has_the_tables_that_were_made():
    folder = os.path.join(ROOT, "results")
    with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
        shown = dict(re.findall(r"<!-- table (\S+) -->\n(.*?)\n\n", file.read(), flags=re.S))
    made = {}
    for path in glob.glob(os.path.join(folder, "**/table*.json"), recursive=True):
        with open(path) as file:
            name = os.path.relpath(path, folder).replace("table", "").removesuffix(".json")
            made[name] = tables.markdown(json.load(file))
    assert shown == made


def test_the_stages_of_a_question_are_timed():
    """Table 4 at a tiny size: a row a model, each stage takes time."""
    found = tables.stage_times(2, quick=True)
    assert len(found) == len(tables.Plan.table_4(None).rows) == 3
    for row in found:
        assert list(row) == ["picture", "reading", "together"]
        assert all(len(times["values"]) == 2 and times["mean"] > 0 for times in row.values())
