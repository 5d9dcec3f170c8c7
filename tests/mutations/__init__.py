"""Mutations: the code broken on purpose, each with the test that has to notice; ``tests/mutations/run`` tries them.

A mutation is a patch, ``NAME.patch``. Its first lines say what it breaks, which test must turn red (a pytest node id)
and words of that test's failure; the rest is ``git diff --unified=0``, so that it applies wherever its lines stand.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
HEADER = re.compile(r"Breaks: (?P<breaks>.+)\nTest: (?P<test>tests/\S+::\S+)\nRed: (?P<red>.+)\n\n(?=diff --git )")


@dataclass(frozen=True)
class Mutation:
    """One patch: what it ``breaks``, the ``test`` that must turn red, and words of its failure (``red``)."""

    path: Path
    breaks: str
    test: str
    red: str

    @property
    def name(self) -> str:
        return self.path.stem

    def applied(self, tree: Path, *, only_look: bool = False) -> str:
        """Apply it to ``tree``; returns what git says against that, empty if it applies."""
        options = ("--check",) if only_look else ()
        argv = ["git", "apply", "--unidiff-zero", *options, str(self.path)]
        inside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}  # no checkout around a copy matters
        return subprocess.run(argv, cwd=tree, env=inside, capture_output=True, text=True, check=False).stderr.strip()


def mutation_of(path: Path) -> Mutation:
    """The mutation in a file; ``ValueError`` where its first lines are not as above."""
    found = HEADER.match(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path}: must begin with the lines Breaks:, Test: and Red:, an empty line, and the diff")
    return Mutation(path, found["breaks"], found["test"], found["red"])


def mutations() -> list[Mutation]:
    """All, by name."""
    return [mutation_of(path) for path in sorted(FOLDER.glob("*.patch"))]
