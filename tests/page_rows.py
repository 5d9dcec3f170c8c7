"""The tables of the documents, and the tests that they name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMED_TEST = re.compile(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`")


@dataclass(frozen=True)
class Row:
    """A row of a table: the heading above the table, and its cells."""

    section: str
    cells: tuple[str, ...]


def rows(page: Path) -> Iterator[Row]:
    """The rows of a page's tables, without their heads."""
    section, before = "", ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("|") and before.startswith("|") and not line.startswith("|---"):
            yield Row(section, tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]))
        before = line


def words(text: str) -> set[str]:
    """What stands in a text as code."""
    return set(re.findall(r"`([^`]+)`", text))


def named_tests(text: str) -> set[tuple[str, str]]:
    """File below ``tests/`` and name of each test that a text names."""
    return set(NAMED_TEST.findall(text))


def collected_tests(files: Iterable[str]) -> set[tuple[str, str]]:
    """File and name of each test that pytest finds in files below ``tests/``."""
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    argv += [f"tests/{file}" for file in sorted(files)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^tests/(\S+?)::(?:\w+::)?(test_\w+)", done.stdout, re.MULTILINE))
