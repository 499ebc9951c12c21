"""tests/bench.py at a very small size: every row works and says what it should. No ratio is asserted, nor a time."""

import json
import os
import subprocess
import sys

import bench
import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(*words):
    return subprocess.run([sys.executable, "tests/bench.py", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_row_works_at_a_very_small_size(tmp_path):
    """The GPU's rows too, on the CPU."""
    done = run("--quick", "--json", f"{tmp_path}/rows.json", "--picture", f"{tmp_path}/growth.png")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.json") as file:
        rows = json.load(file)
    names = [r["name"] for r in rows]
    assert len(set(names)) == len(names)
    for name in bench.ROWS:
        assert any(n.startswith(name) for n in names), name
    assert {"loader/memory", "table-6/448x448", "table-6/448x746", "table-6/600x1000", "growth/cells", "growth/words",
            "growth/batch", "growth/layers", "growth/queries", "gpu/time/r50-bf16-compile", "gpu/memory/r152-fp32",
            "gpu/best", "gpu/largest-batch", "retrieval/r152", "retrieval/r50", "detr-memory/dropout"} <= set(names)
    for r in rows:
        assert list(r) == ["name", "ours", "peer", "unit", "ratio", "target", "holds", "how"]
        assert r["holds"] == (r["ratio"] >= r["target"]) and len(r["how"]) > 20
        if r["name"] == "plan":  # a prediction, which may be wrong in either direction
            assert r["ratio"] == pytest.approx(min(r["ours"] / r["peer"], r["peer"] / r["ours"]), abs=0.006)
        elif min(r["ours"], r["peer"]) > 1:  # small numbers have too few digits for this
            more_is_better = r["unit"] in ("pictures/s", "pictures", "TFLOP/s")
            ratio = r["ours"] / r["peer"] if more_is_better else r["peer"] / r["ours"]
            assert r["ratio"] == pytest.approx(ratio, abs=0.006, rel=2e-3)
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{r['name']} "))
        assert line.endswith("holds" if r["holds"] else "DOES NOT HOLD") and f"target {r['target']:g}" in line
    assert "1 threads, torch" in done.stdout.splitlines()[0]
    with Image.open(tmp_path / "growth.png") as image:
        assert image.format == "PNG" and 800 <= image.width <= 2000 and 400 <= image.height <= 1200
        assert len(image.convert("RGB").getcolors(2 ** 20)) > 20


def test_the_gpus_rows_are_not_run_on_a_cpu():
    done = run("--only", "gpu")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "gpu rows: not run (python tests/bench.py --only gpu --device cuda)"


def test_an_unknown_row_is_an_error_of_one_line():
    done = run("--only", "loader,nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--only nothing" in done.stderr


def test_a_rows_ratio_says_how_much_better_ours_is():
    less, more = bench.row("a", 2, 3, "s", 1.5, "how"), bench.row("a", 2, 3, "pictures/s", 1.5, "how", True)
    assert less["ratio"] == 1.5 and less["holds"] and more["ratio"] == 0.67 and not more["holds"]
    assert bench.row("a", 0, 50, "MB", 1, "how")["holds"]  # a growth of nothing


def test_the_exponent_is_that_of_the_power_law():
    sizes = [3, 6, 12, 24]
    assert bench.exponent(sizes, [0.7 * n ** 2 for n in sizes]) == pytest.approx(2)
    assert bench.exponent(sizes[-2:], [5, 10]) == pytest.approx(1)
