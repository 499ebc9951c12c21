"""tests/bench.py at a very small size: its rows work. No ratio is asserted, nor a time."""

import json

import bench
import pytest


def test_rows_work_at_a_very_small_size(tmp_path, capsys):
    """Some of each kind, the GPU's on the CPU. Those left out differ from these in their models."""
    wanted = "loader,two-step,detr-step,detr-memory,four-losses,operators,caption,question-bf16,gpu"
    bench.main(["--quick", "--only", wanted, "--json", f"{tmp_path}/rows.json"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) and names == [line.split()[0] for line in lines[1:]]
    assert {"loader/memory", "loader/open", "two-step", "detr-step/dropout", "caption",
            "detr-memory/checkpointing", "gpu/detection-time/r50-fp32-compile"} <= set(names)
    assert all(row["holds"] == (row["ratio"] >= row["target"]) and row["what"] for row in rows)


def test_an_unknown_row_is_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "nothing"])
    assert "--only nothing: no such row; there are loader/" in capsys.readouterr().err


def test_a_ratio_says_how_much_better_ours_is():
    assert bench.row("a", 2, 3, "s", 1)["ratio"] == 1.5
    assert bench.row("a", 2, 3, "pictures/s", 1, more_is_better=True)["ratio"] == 0.67
    assert bench.row("a", 0, 10, "MB", 1)["holds"]  # a growth of nothing
