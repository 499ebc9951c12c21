"""Wrong files and flags end in one line; `python tests/fuzz.py` tries many more."""

import os
import subprocess
import sys

from conftest import ROOT


def test_twenty_cases_have_no_fault():
    words = [sys.executable, "tests/fuzz.py", "--cases", "20", "--seed", "0"]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(" 0 faults")
