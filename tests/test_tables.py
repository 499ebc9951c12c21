"""The command that makes the paper's tables: what it would run, what it writes, and that the README says the same."""

import fcntl
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
from PIL import Image

import finetune
import pretrain

SMALL = ["--", "--width", "32", "--heads", "2", "--feed-forward", "64", "--encoder-layers", "2", "--decoder-layers",
         "2", "--batch-size", "8"]


def commands(capsys, *words):
    assert tables.main([*words, "--dry-run"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def flags(words, script, monkeypatch):
    """The flags of a printed command, by the script's own parser; its --init is not there yet."""
    monkeypatch.setattr(finetune, "load_checkpoint", lambda *_: None)
    return {"pretrain.py": pretrain, "finetune.py": finetune}[script].parse(words)[0]


def test_some_of_the_rows(capsys, tmp_path):
    found = commands(capsys, "--table", "3", "--rows", "all", "no detection", "--seeds", "1", "--work", str(tmp_path))
    assert {words[words.index("--output") + 1].removeprefix(f"{tmp_path}/") for words in found} == {
        f"{run}-seed0" for row in ("r50-6", "no-detection")
        for run in (f"pretrain-{row}", f"vqa-{row}", f"nlvr2-{row}")}
    assert tables.main(["--table", "3", "--rows", "nothing", "--dry-run"]) == 2
    assert "--rows 'nothing': table 3 has none of that name; there are: 'all', 'no cap" in capsys.readouterr().err


def test_what_table_3_would_run_on_real_data(capsys, monkeypatch, tmp_path):
    found = commands(capsys, "--table", "3", "--data", "DIR", "--gpus", "8", "--seeds", "1", "--work",
                     str(tmp_path))
    assert all(words[:2] == ["torchrun", "--nproc_per_node=8"] for words in found)
    runs = {(words[2], args.output): args for words in found
            for args in [flags(words[3:], words[2], monkeypatch)]}
    stems = {"r50-6": [], "no-captioning": ["caption"], "no-attributes": ["attributes"], "no-detection": ["detection"],
             "words-alone": ["detection", "caption"]}
    assert len(found) == len(runs) == 3 * len(stems)
    for name, without in stems.items():
        args = runs["pretrain.py", f"{tmp_path}/pretrain-{name}-seed0"]
        # The paper's: 6 layers of encoder, ResNet-50, 32 pictures, 200 passes
        assert (args.without, args.backbone, args.encoder_layers, args.batch_size, args.epochs, args.data) == (
            without, "r50", 6, 32, 200, "DIR")
        for task in ("vqa", "nlvr2"):
            tuned = runs["finetune.py", f"{tmp_path}/{task}-{name}-seed0"]
            assert (tuned.task, tuned.init, tuned.batch_size, tuned.epochs, tuned.decay) == (
                task, f"{args.output}/last.pt", 32, 12, [6, 9])
    folders = [words[words.index("--output") + 1] for words in found]
    for place, words in enumerate(found):  # what a fine-tuning starts from comes before it
        if words[2] == "finetune.py":
            assert os.path.dirname(words[words.index("--init") + 1]) in folders[:place]


@pytest.mark.parametrize("number", ["1", "2", "3", "few", "5", "6", "7", "recipe", "parts"])
def test_each_table_has_commands_that_parse(number, capsys, monkeypatch, tmp_path):
    for size in (["--mini"], ["--data", "DIR"]):
        if number in tables.TIMED and size[0] == "--data":
            continue
        found = commands(capsys, "--table", number, *size, "--seeds", "2", "--work", str(tmp_path))
        folders = [flags(words[2:], words[1], monkeypatch).output for words in found]
        assert len(set(folders)) == len(folders) > 4
        seeds = {flags(words[2:], words[1], monkeypatch).seed for words in found}
        assert seeds == {0, 1}


def test_tables_share_their_runs(capsys, tmp_path):
    """One name is one command, in all tables."""
    seen = {}
    for number in ("1", "2", "3", "few", "5", "6", "7", "recipe", "parts"):
        for words in commands(capsys, "--table", number, "--mini", "--seeds", "1", "--work", str(tmp_path)):
            folder = words[words.index("--output") + 1]
            assert seen.setdefault(folder, words) == words
    own = [folder for folder in seen if "pretrain" in folder and "recipe" not in folder]
    assert len(own) == 6 + 3 + 5  # 6 of Table 3, 3 more of Table 5, 5 more of what the recipe owes to its parts
    real = {}
    for number in ("1", "2", "3", "few", "5", "6", "7"):
        for words in commands(capsys, "--table", number, "--data", "DIR", "--seeds", "1"):
            assert real.setdefault(words[words.index("--output") + 1], words) == words
    assert len(set(map(str, seen.values()))) == len(seen)  # and no run is trained twice under two names
    without_folder = [[word for word in words if "runs/tables" not in word or word.endswith(".pt")]
                      for words in real.values()]
    assert len(set(map(str, without_folder))) == len(real)


class Fork:
    """A command in a fork of the process that has imported torch, with what the runner asks of a Popen."""

    def __init__(self, words, log):
        self.process = conftest.FORKS.Process(target=conftest._work, args=(
            words[1], words[2:], ROOT, {"OMP_NUM_THREADS": "1"}, [os.devnull, log, log]))
        self.process.start()
        self.terminate, self.wait = self.process.terminate, self.process.join

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)


@pytest.fixture
def forks(monkeypatch):
    """The list of the runs that were started."""
    started = []

    def start(runner, run, seed, lock):
        started.append((run.name, seed))
        return Fork(runner.words(run, seed), os.path.join(runner.folder(run, seed), "output.txt"))

    monkeypatch.setattr(tables.Runner, "start", start)
    return started


def words_for(world, folder, *more):
    return ["--mini", "--data", world, "--output", f"{folder}/out", "--work", f"{folder}/work", *more, *SMALL]


def test_a_table_is_made_and_its_runs_kept(world, tmp_path, forks, capsys):
    words = words_for(world, tmp_path, "--seeds", "2", "--budget", "16", "--picture", f"{tmp_path}/curves.png")
    assert tables.main(["--table", "7", *words]) == 0
    assert len(set(forks)) == len(forks) == 2 * 5
    with open(tmp_path / "out/table7.json") as file:
        result = json.load(file)
    assert result["table"] == 7 and result["seeds"] == [0, 1] and result["hours"] >= 0 and len(result["rows"]) == 4
    assert result["command"].startswith("python tests/tables.py --table 7 --mini") and result["commit"]
    logs = []
    for seed in (0, 1):  # each value is the last validation's in the run's own log
        with open(tmp_path / f"work/detection-all-seed{seed}/log.jsonl") as file:
            logs.append([json.loads(line) for line in file][-1]["val_AP50"])
    row = result["rows"][0]
    assert row["name"] == "pre-trained, sentence" and row["measures"]["detection.AP50"]["values"] == pytest.approx(
        logs, rel=1e-4)
    assert row["measures"]["detection.AP50"]["mean"] == pytest.approx(statistics.fmean(logs), rel=1e-4)
    assert row["measures"]["detection.AP50"]["std"] == pytest.approx(statistics.stdev(logs), rel=1e-4)
    assert Image.open(tmp_path / "curves.png").size[0] > 400
    page = (tmp_path / "out/table7.html").read_text()
    assert page.count("<svg viewBox") == 2 and 'data-unit="pictures seen"' in page
    assert (tmp_path / "out/table7.md").read_text() == tables.markdown(result) + "\n"
    assert not glob.glob(f"{tmp_path}/work/detection*/*.pt")  # nothing starts from them

    # Again: nothing is run. Another table trains only what it does not share. Another budget is another run.
    forks.clear()
    assert tables.main(["--table", "7", *words]) == 0 and not forks
    with open(tmp_path / "out/table7.json") as file:
        assert json.load(file)["rows"] == result["rows"]
    assert tables.main(["--table", "2", *words]) == 0
    assert sorted(set(name for name, _ in forks)) == ["flickr30k-all", "flickr30k-scratch"] and len(forks) == 4
    capsys.readouterr()
    words[words.index("16")] = "32"
    assert tables.main(["--table", "7", *words]) == 2
    assert "pretrain-all-seed0.json: is of a run with other flags" in capsys.readouterr().err
    # Nor is its checkpoint gone on with, or what is tuned from another pre-training believed
    (tmp_path / "out/runs/pretrain-all-seed0.json").unlink()
    assert tables.main(["--table", "7", *words]) == 2
    assert "give another --output" in capsys.readouterr().err
    words[words.index(f"{tmp_path}/out")] = f"{tmp_path}/out2"
    forks.clear()
    assert tables.main(["--table", "7", *words]) == 2 and not forks
    assert "work/pretrain-all-seed0: is of a run with other flags" in capsys.readouterr().err


def test_one_run_at_a_time_in_a_folder(world, tmp_path, forks, capsys):
    words = words_for(world, tmp_path, "--seeds", "1", "--budget", "16", "--jobs", "1")
    folder = tmp_path / "work/pretrain-all-seed0"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert tables.main(["--table", "7", *words]) == 2 and not forks
        assert "another run is in it" in capsys.readouterr().err
    (folder / "log.jsonl").write_text("")
    assert tables.main(["--table", "7", *words]) == 2 and "unknown flags" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_last_words(world, tmp_path, forks, capsys):
    words = words_for(world, tmp_path, "--seeds", "1", "--budget", "16")
    assert tables.main(["--table", "7", *words, "--lr", "nan"]) == 2
    error = capsys.readouterr().err
    assert "pretrain-all, seed 0: ended with 2" in error and "--lr nan" in error and "output.txt" in error
    assert not os.listdir(tmp_path / "out/runs")


def test_stopped_and_gone_on(world, tmp_path):
    """A real command line: SIGTERM ends it and what it runs; the same command goes on where that was."""
    words = [sys.executable, os.path.join(ROOT, "tests/tables.py"), "--table", "7", *words_for(
        world, tmp_path, "--seeds", "1", "--budget", "100000", "--jobs", "1")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "work/pretrain-all-seed0/log.jsonl"
    until = time.time() + 100
    while not (log.exists() and log.read_text()) and time.time() < until:
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    said = (tmp_path / "work/pretrain-all-seed0/output.txt").read_text()
    assert "stopped at step" in said and (log.parent / "last.pt").exists()


def test_what_was_tried_is_not_run_again_but_keeps_its_row(tmp_path):
    args = tables.parse(["--table", "recipe", "--mini", "--seeds", "1", "--output", str(tmp_path)])
    runner, table = tables.Runner(args), tables.Plan(args).table("recipe")
    assert not any(run.gone for run, _ in runner.missing(table.runs()))
    assert not set(tables.TRIED) & {row["name"] for row in tables.gather(table, runner)}
    run, = [run for run in table.runs() if run.name == "pretrain-recipe-3-groups-of-queries"]
    (tmp_path / "runs" / f"{run.name}-seed0.json").write_text(json.dumps(
        {"flags": list(run.words), "curve": [dict.fromkeys(tables.PRETRAINED, 0.5)]}))
    rows = {row["name"]: row["measures"] for row in tables.gather(table, runner)}
    assert rows["3 groups of queries"]["val_AP50"]["values"] == [0.5] and "moving average of the weights" not in rows


def test_what_is_better_and_what_is_within_the_spread():
    def of(*values):
        return tables.spread(list(values))

    assert tables.compared(of(3, 4, 5), of(0, 1, 2.9)) == "+" and tables.compared(of(0, 1), of(2, 3)) == "-"
    assert tables.compared(of(0, 1, 3), of(2, 3, 4)) == "" and tables.compared(of(9), of(1, 2)) == ""
    assert tables.compared(of(3, 4, 5), of(0, 1, 2.9), smaller=True) == "-"
    assert of(1, 2, 3, 6) == {"mean": 3, "std": pytest.approx((14 / 3) ** 0.5), "values": [1, 2, 3, 6]}


def test_a_table_as_markdown():
    result = {"heads": {"vqa.overall": "VQA", "nlvr2.accuracy": "NLVR2"}, "reference": "all", "rows": [
        {"name": "all", "measures": {"vqa.overall": tables.spread([80.0, 82.0]),
                                     "nlvr2.accuracy": tables.spread([0.7, 0.74])}, "paper": {"vqa.overall": 70.76}},
        {"name": "none", "measures": {"vqa.overall": tables.spread([40.0, 41.0]),
                                      "nlvr2.accuracy": tables.spread([0.72, 0.5])}, "paper": {}}]}
    assert tables.markdown(result) == (
        "| | VQA | NLVR2 | paper: VQA |\n| --- | --- | --- | --- |\n"
        "| all | 81.0 ± 1.4 | 72.0 ± 2.8 | 70.76 |\n| none | 40.5 ± 0.7 (-) | 61.0 ± 15.6 | |")


def test_the_readme_has_the_tables_that_were_made():
    """Each table in results stands in the README as tests/tables.py writes it, and no other does."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        readme = file.read()
    shown = dict(re.findall(r"<!-- table ([\w/]+) -->\n(.*?)\n\n", readme, flags=re.S))
    made, results = {}, os.path.join(ROOT, "results")
    for path in glob.glob(os.path.join(results, "**", "table*.json"), recursive=True):
        with open(path) as file:
            name = os.path.relpath(path, results).removesuffix(".json")
            made["".join(name.rsplit("table", 1))] = tables.markdown(json.load(file))
    assert shown == made


def test_a_file_is_renewed(tmp_path):
    result = {"heads": {"a": "A"}, "reference": "x", "rows": [
        {"name": "x", "measures": {"a": tables.spread([0.5])}, "paper": {}}], "seeds": [0], "hours": 1.0,
        "machine": "this one", "command": "python tests/tables.py --table 9"}
    text = tmp_path / "text.md"
    for name, path in (("9", tmp_path / "table9.json"), ("long/9", tmp_path / "long" / "table9.json")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(tables.in_lines(result))
        text.write_text(f"before\n<!-- table {name} -->\nold\n<!-- end -->\nafter\n")
        assert tables.main(["--write", str(text), "--output", str(tmp_path)]) == 0
        assert text.read_text() == (
            f"before\n<!-- table {name} -->\n| | A |\n| --- | --- |\n| x | 50.0 |\n\n1 seed; 1.0 hours of training, "
            "this one. Made by `python tests/tables.py --table 9`.\n<!-- end -->\nafter\n")
    text.write_text("<!-- table 8 -->\n<!-- end -->")
    assert tables.main(["--write", str(text), "--output", str(tmp_path)]) == 2


def test_the_stages_of_a_question_are_timed(monkeypatch, tmp_path):
    """Table 4 at a tiny size: both stages take time, and together at least as long as the longer one."""
    quick = tables.stage_times
    monkeypatch.setattr(tables, "stage_times", lambda table, repeats: quick(table, repeats, quick=True))
    assert tables.main(["--table", "4", "--seeds", "2", "--output", str(tmp_path)]) == 0
    with open(tmp_path / "table4.json") as file:
        rows = json.load(file)["rows"]
    assert len(rows) == 3 and [row["paper"]["together"] for row in rows] == [192, 201, 496]
    for row in rows:
        assert all(len(found["values"]) == 2 and found["mean"] > 0 for found in row["measures"].values())
    said = (tmp_path / "table4.md").read_text()
    monkeypatch.setattr(tables, "stage_times", None)  # they are kept
    assert tables.main(["--table", "4", "--seeds", "2", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "table4.md").read_text() == said


@pytest.mark.parametrize("words, says", [
    ([], "give --table"), (["--table", "3", "--seeds", "0"], "--seeds 0"), (["--table", "recipe"], "give --mini")])
def test_flags_that_cannot_be(words, says, capsys):
    assert tables.main(words) == 2 and says in capsys.readouterr().err
