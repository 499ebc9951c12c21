"""The tools at a very small size: the rows of bench.py, without ratios and times; twenty cases of
fuzz.py; the list of mistakes of mutants.py fits the source.
"""

import json
import os
import subprocess
import sys

import bench
from conftest import ROOT
from mutants import MISTAKES, TESTS, put_in


def test_rows_of_bench_work_at_a_very_small_size(tmp_path, capsys):
    """Some of each kind, the GPU's on the CPU. Those left out differ from these in their models."""
    wanted = "loader,two-step,detr-step,detr-memory,four-losses,operators,caption,question-bf16,gpu"
    bench.main(["--quick", "--only", wanted, "--json", f"{tmp_path}/rows.json"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) and names == [line.split()[0] for line in lines[1:]]
    assert {"loader/memory", "loader/open", "two-step", "detr-step/dropout", "caption",
            "detr-memory/checkpointing", "gpu/detection-time/r50-fp32-compile"} <= set(names)
    padding = rows[names.index("loader/padding")]  # images of similar shape go together
    assert padding["ours"] < 0.06 and padding["peer"] > 0.3
    assert all(row["holds"] == (row["ratio"] >= row["target"]) and row["what"] for row in rows)


def test_a_ratio_says_how_much_better_ours_is():
    assert bench.row("a", 2, 3, "s", 1)["ratio"] == 1.5
    assert bench.row("a", 2, 3, "pictures/s", 1, more_is_better=True)["ratio"] == 0.67
    assert bench.row("a", 0, 10, "MB", 1)["holds"]  # a growth of nothing


def test_twenty_cases_of_fuzz_have_no_fault():
    words = [sys.executable, "tests/fuzz.py", "--cases", "20", "--seed", "0"]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(" 0 faults")


def test_each_mistake_has_its_place_and_compiles():
    names = [name for mistakes in MISTAKES.values() for name, *_ in mistakes]
    assert len(names) >= 40 and len(set(names)) == len(names) and MISTAKES.keys() == TESTS.keys()
    for file, mistakes in MISTAKES.items():
        with open(os.path.join(ROOT, file), encoding="utf-8") as source:
            right = source.read()
        for name, *_, old, new in mistakes:
            compile(put_in(name, right, old, new), name, "exec")
