"""Does every statement of the conformance checklist have a test on real Podman?

A test counts for the numbers that its name begins with: ``test_08_09_…``. That none was skipped is seen to by
``tests/no_skips.py``: in CI a skipped test has failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CHECKLIST = frozenset(range(1, 39))
NAME = re.compile(r"::test_((?:\d\d_)+)")


def numbers_of(node_ids: list[str]) -> set[int]:
    """The numbers in the names of tests."""
    found = (NAME.search(node_id) for node_id in node_ids)
    return {int(number) for match in found if match for number in match[1].rstrip("_").split("_")}


def test_numbers_are_read_from_names() -> None:
    assert numbers_of(["a.py::test_08_09_x[fork]", "a.py::test_3_things", "a.py::test_10_y", "a.py::test_z"]) == {
        8,
        9,
        10,
    }


def test_every_statement_has_a_test_on_real_podman() -> None:
    folder = Path(__file__).parent
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "podman",
        "-p",
        "no:cacheprovider",
        str(folder),
    ]
    done = subprocess.run(argv, cwd=folder.parents[1], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert CHECKLIST - numbers_of(done.stdout.splitlines()) == set()
