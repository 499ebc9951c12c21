"""Broken files and odd flags, against every command; `python tests/fuzz.py` tries many more."""

import os
import subprocess
import sys

from conftest import ROOT


def test_a_hundred_cases_have_no_fault():
    done = subprocess.run([sys.executable, "tests/fuzz.py", "--cases", "100", "--seed", "0"], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(" refused with a message, 0 faults")
