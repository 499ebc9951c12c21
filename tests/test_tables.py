"""The command that makes the paper's tables: what it runs, what it keeps, what it writes."""

import argparse
import glob
import json
import os
import re
import statistics

import pytest
import tables
from conftest import ROOT, run_command

import finetune
import pretrain
import shapes

SMALL = """--width 32 --heads 2 --feed-forward 64 --encoder-layers 2 --decoder-layers 2
    --batch-size 8 --val-every 1000""".split()


def test_the_commands_of_all_tables(monkeypatch):
    """They parse, what is tuned comes after what it starts from, and a run has one name."""
    monkeypatch.setattr(finetune, "load_checkpoint", lambda *_: None)
    scripts = {"pretrain.py": pretrain, "finetune.py": finetune}
    runner = tables.Runner(argparse.Namespace(budget=25_600, work="WORK", data="DATA"))
    runs = {}
    for number in "123567":
        folders = []
        for run in getattr(tables.Plan(25_600), f"table_{number}")().runs():
            words = runner.command(run, 1)
            args, _ = scripts[words[1]].parse(words[2:])
            assert args.output not in folders
            folders.append(args.output)
            assert runs.setdefault(args.output, words) == words
            init = args.init or "none"  # pre-training: no flag
            assert init == "none" or os.path.dirname(init) in folders
    assert len(set(map(str, runs.values()))) == len(runs)
    # 6 of Table 3, 3 of Table 5; the others have the first of Table 3
    assert sum("pretrain" in name for name in runs) == 9
    args, _ = pretrain.parse(runs["WORK/pretrain-no-detection-25600-seed1"][2:])
    assert args.without == ["detection"] and args.seed == 1


@pytest.fixture
def started(monkeypatch):
    """The folders' names of the runs that were started, each with SMALL's flags."""
    names = []

    def call(words, env, stdin, stdout, stderr):
        done = run_command(os.path.basename(words[1]), *words[2:], *SMALL)
        names.append(os.path.basename(words[words.index("--output") + 1]))
        stdout.write(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(tables.subprocess, "call", call)
    monkeypatch.setattr(tables, "commit", lambda: "abc")
    return names


TABLE_7 = tables.Plan.table_7


def make(monkeypatch, rows, world, folder, *more):
    """Table 7 with these rows (a slice)."""
    table = TABLE_7(tables.Plan(64))
    table.rows = table.rows[rows]
    monkeypatch.setattr(tables.Plan, "table_7", lambda plan: table)
    return tables.main(["--table", "7", "--mini", "--budget", "64", "--jobs", "1", "--data", world,
                        "--output", f"{folder}/out", "--work", f"{folder}/work", *more])


def test_a_table_is_made_and_its_runs_kept(world, tmp_path, started, monkeypatch):
    shapes.write_world(f"{world}-hard", seed=3, train=64, val=8, test=8, hard=True)
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out/README.md"
    readme.write_text("before\n<!-- table 7 -->\nold\n<!-- end -->\nafter\n")
    words = monkeypatch, slice(3, 6, 2), world, tmp_path, "--seeds", "2"
    assert make(*words) == 0
    assert len(set(started)) == len(started) == 2 * 4  # fine-tuned in both worlds
    result = json.loads((tmp_path / "out/table7.json").read_text())
    logs = []
    for seed in (0, 1):  # a value is the last validation's in the run's own log
        log = tmp_path / f"work/detection-all-64-seed{seed}/log.jsonl"
        logs.append(json.loads(log.read_text().splitlines()[-1])["val_AP50"])
    row = result["rows"][0]
    measure = row["measures"]["AP50"]
    assert row["name"] == "fine-tuned, sentence" and len(result["rows"]) == 2
    assert measure["values"] == logs and measure["mean"] == pytest.approx(statistics.fmean(logs))
    assert measure["std"] == pytest.approx(statistics.stdev(logs))
    assert (tmp_path / "out/table7.png").read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("before\n<!-- table 7 -->\n|  | AP | AP50 | AP, hard to see | ")
    assert text.endswith("\n<!-- end -->\nafter\n") and "commit abc" in text and "old" not in text
    assert not list((tmp_path / "work").glob("detection*/*.pt"))  # nothing starts from them

    started.clear()
    assert make(*words) == 0 and not started
    assert json.loads((tmp_path / "out/table7.json").read_text())["rows"] == result["rows"]


def test_a_run_that_fails_is_one_line(tmp_path, started, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert make(monkeypatch, slice(1), str(tmp_path / "empty"), tmp_path, "--seeds", "1") == 2
    output = tmp_path / "work/pretrain-all-64-seed0/output.txt"
    assert f"pretrain-all-64-seed0: exit code 2, see {output}" in capsys.readouterr().err
    assert "README" in output.read_text() and not os.path.exists(tmp_path / "out/runs")


def test_what_is_better_and_what_is_within_the_spread():
    def of(*values):
        return tables.spread(list(values))

    assert tables.compared(of(3, 4, 5), of(0, 1, 2.9)) == "+"
    assert tables.compared(of(0, 1), of(2, 3)) == "-"
    assert tables.compared(of(0, 1, 3), of(2, 3, 4)) == tables.compared(of(9), of(1, 2)) == ""
    assert tables.compared(of(3, 4, 5), of(0, 1, 2.9), smaller=True) == "-"
    assert of(1, 2, 3, 6) == {"mean": 3, "std": pytest.approx((14 / 3) ** 0.5),
                              "values": [1, 2, 3, 6]}


def test_the_page_of_results_has_the_tables_that_were_made():
    folder = os.path.join(ROOT, "results")
    with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
        shown = dict(re.findall(r"<!-- table (\S+) -->\n(.*?)\n\n", file.read(), flags=re.S))
    made = {}
    for path in glob.glob(os.path.join(folder, "table*.json")):
        result = tables.read(path)
        made[str(result["table"])] = tables.markdown(result)
    assert shown == made


def test_the_stages_of_a_question_are_timed():
    """Table 4 at a tiny size: a row a model, each stage takes time."""
    found = tables.stage_times(2, quick=True)
    assert len(found) == len(tables.Plan.table_4(None).rows) == 3
    for row in found:
        assert list(row) == ["picture", "reading", "together"]
        assert all(len(times["values"]) == 2 and times["mean"] > 0 for times in row.values())
