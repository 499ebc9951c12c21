"""The list of mistakes fits the source. `python tests/mutants.py` itself takes too long here."""

import os

from mutants import MISTAKES, ROOT, TESTS, put_in


def test_each_mistake_has_its_place_and_compiles():
    names = [name for mistakes in MISTAKES.values() for name, *_ in mistakes]
    assert len(names) >= 40 and len(set(names)) == len(names) and MISTAKES.keys() == TESTS.keys()
    for file, mistakes in MISTAKES.items():
        with open(os.path.join(ROOT, file), encoding="utf-8") as source:
            right = source.read()
        for name, _, old, new in mistakes:
            compile(put_in(name, right, old, new), name, "exec")
