"""The list of mistakes fits the source. `python tests/mutants.py` itself takes too long for each run of the tests."""

import os

from mutants import MISTAKES, ROOT, TESTS, put_in


def test_each_mistake_has_its_place_and_compiles():
    names = [name for mistakes in MISTAKES.values() for name, *_ in mistakes]
    assert len(names) >= 44 and len(set(names)) == len(names) and MISTAKES.keys() == TESTS.keys()
    for file, mistakes in MISTAKES.items():
        with open(os.path.join(ROOT, file), encoding="utf-8") as source:
            right = together = source.read()
        for name, _, old, new, *_ in mistakes:
            wrong = put_in(name, right, old, new)
            if together.count(old) == 1:  # all that do not touch one another are compiled at once: quicker
                together = together.replace(old, new)
            else:
                compile(wrong, name, "exec")
        compile(together, f"all mistakes of {file}", "exec")
