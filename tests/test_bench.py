"""tests/bench.py at a very small size: its rows work. No ratio is asserted, nor a time."""

import json

import bench
import pytest


def test_rows_work_at_a_very_small_size(tmp_path, capsys):
    """Some of each kind, the GPU's on the CPU. Those left out differ from these in their models."""
    wanted = "loader/padding,loader/index,two-step,detr-step,detr-memory,four-losses," \
        "operators,caption,question-bf16,gpu"
    bench.main(["--quick", "--only", wanted, "--json", f"{tmp_path}/rows.json"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == len(lines) - 1
    assert {"loader/memory", "loader/open", "two-step", "detr-step/dropout", "caption",
            "detr-memory/checkpointing", "gpu/detection-time/r50-fp32-compile"} <= set(names)
    for row, line in zip(rows, lines[1:]):
        assert list(row) == ["name", "ours", "peer", "unit", "ratio", "target", "holds", "note",
                             "what"]
        assert line.split()[0] == row["name"]
        assert line.endswith(" holds" if row["ratio"] >= row["target"] else " DOES NOT HOLD")


def test_the_gpus_rows_are_not_run_on_a_cpu(capsys):
    bench.main(["--only", "gpu"])
    assert capsys.readouterr().out.startswith("gpu: left out")


def test_an_unknown_row_is_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "nothing"])
    assert "--only nothing: no such row; there are loader/" in capsys.readouterr().err


def test_a_ratio_says_how_much_better_ours_is():
    less = bench.row("a", 2, 3, "s", 1.5)
    more = bench.row("a", 2, 3, "pictures/s", 1.5, more_is_better=True)
    assert (less["ratio"], less["holds"]) == (1.5, True)
    assert (more["ratio"], more["holds"]) == (0.67, False)
    assert bench.row("a", 0, 10, "MB", 1)["holds"]  # a growth of nothing
