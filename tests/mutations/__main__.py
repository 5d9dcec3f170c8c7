"""Is every mutation noticed? Each is tried in a fresh copy of the tree, by the one test that it names.

Noticed means red for a reason of the test's own: an assertion that failed, with the words that the patch names. A test
that cannot be collected, is skipped, or stumbles over something else has noticed nothing. Nor has one that is red
without the mutation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn
from xml.etree import ElementTree

from slurm.lib.guardian import end_marked, guarded
from slurm.lib.locked_folder import locked_folder, remove
from tests.mutations import ROOT, Mutation, mutations

EXIT_OK, EXIT_NOT_NOTICED, EXIT_USAGE = 0, 1, 2
MARKER = "SKYRL_MUTATION"
DEADLINE_S = 180.0  # for one test; a mutation that makes it hang is noticed by nobody
ASSERTED = ("assert ", "AssertionError", "Failed: ")  # pytest's words for an assertion, and for its own fail and raises
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Verdict:
    """Whether a mutation was noticed, and what pytest said; in ``seconds``."""

    name: str
    noticed: bool
    said: str
    seconds: float


@contextlib.contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """What git tracks or would track, with the working tree's contents; gone afterwards, and what was started in it.

    Broken code leaves processes behind: they are known by a variable that names the copy. A guardian does the same if
    this process is killed.
    """
    folder = Path(tempfile.gettempdir(), f"skyrl-mutation-{os.getpid()}-{time.monotonic_ns()}")
    with guarded(ROOT) as guardian, locked_folder(folder, guardian.own_folder):
        guardian.own_marker(MARKER, str(folder))
        tree = folder / "tree"
        _fill(tree)
        try:
            yield tree
        finally:
            end_marked(f"{MARKER}={folder}".encode())
            remove(folder)


def _fill(tree: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    (tree / ".venv").symlink_to(sys.prefix)


def tested(tree: Path, tests: Sequence[str]) -> list[tuple[str, str]]:
    """How the tests ended in ``tree``: a pair of kind (passed, failure, error, skipped, nothing) and message each."""
    report = tree / "report.xml"
    # Byte code is kept by a file's second and size, and a mutation may change neither.
    own = {"PYTHONDONTWRITEBYTECODE": "1", "SKYRL_PYTHON": sys.executable, MARKER: str(tree.parent)}
    environment = {**os.environ, **own}
    environment.pop("PYTHONPATH", None)
    argv = [sys.executable, *PYTEST, f"--junit-xml={report}", *tests]
    deadline_s = DEADLINE_S + 10 * len(tests)
    try:
        done = subprocess.run(argv, cwd=tree, env=environment, capture_output=True, text=True, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return [("nothing", f"no end within {deadline_s:g} s")]
    if not report.is_file():
        return [("nothing", " ".join((done.stdout + done.stderr).split())[-300:])]
    return [ended(case) for case in ElementTree.parse(report).iter("testcase")] or [("nothing", "no test ran")]


def ended(case: ElementTree.Element) -> tuple[str, str]:
    """How one test of pytest's report ended."""
    for kind in ("error", "failure", "skipped"):
        if (found := case.find(kind)) is not None:
            return kind, f"{found.get('message', '')}\n{found.text or ''}"
    return "passed", ""


def judged(mutation: Mutation, ends: Sequence[tuple[str, str]]) -> tuple[bool, str]:
    """Whether these ends of its test mean that the mutation was noticed, and a line that says why. Pure."""
    bad = [(kind, message) for kind, message in ends if kind not in {"passed", "failure"}]
    if bad:
        return False, f"{bad[0][0]}: {first_line(bad[0][1])}"
    failures = [message for kind, message in ends if kind == "failure"]
    if not failures:
        return False, "its test is green"
    stumbles = [message for message in failures if not message.startswith(ASSERTED)]
    if stumbles:
        return False, f"red, but not by an assertion: {first_line(stumbles[0])}"
    if not any(mutation.red in message for message in failures):
        return False, f"red, but without {mutation.red!r}: {first_line(failures[0])}"
    return True, first_line(next(message for message in failures if mutation.red in message))


def first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:160]


def tried(mutation: Mutation) -> Verdict:
    """Break a copy of the tree and run the test."""
    began = time.monotonic()
    with copy_of_the_tree() as tree:
        fault = mutation.applied(tree)
        ends = [("nothing", f"does not apply: {fault}")] if fault else tested(tree, [mutation.test])
    noticed, said = judged(mutation, ends)
    return Verdict(mutation.name, noticed, said, round(time.monotonic() - began, 1))


def red_already(chosen: Sequence[Mutation]) -> list[str]:
    """What is wrong with the tests themselves, without any mutation."""
    with copy_of_the_tree() as tree:
        ends = tested(tree, sorted({mutation.test for mutation in chosen}))
    return [f"{kind}: {first_line(message)}" for kind, message in ends if kind != "passed"]


def remade(mutation: Mutation) -> int:
    """Write the patch anew from what git calls changed in the working tree, its first lines kept."""
    diff = subprocess.run(["git", "diff", "--unified=0"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if not diff:
        print("nothing is changed in the working tree: break the code first, as the patch is to do", file=sys.stderr)
        return EXIT_USAGE
    head = mutation.path.read_text(encoding="utf-8").partition("diff --git ")[0]
    mutation.path.write_text(head + diff, encoding="utf-8")
    print(f"written; take the change back with: git apply -R --unidiff-zero {mutation.path.relative_to(ROOT)}")
    return EXIT_OK


def shown(verdict: Verdict) -> str:
    word = "noticed" if verdict.noticed else "NOT NOTICED"
    return f"{word:12}{verdict.seconds:6.1f} s  {verdict.name}: {verdict.said}"


def run(chosen: Sequence[Mutation], as_json: bool) -> int:
    """Try them one after the other."""
    wrong = red_already(chosen)
    if wrong:
        print("without any mutation these tests must be green:", *wrong, sep="\n  ", file=sys.stderr)
        return EXIT_NOT_NOTICED
    verdicts = []
    for mutation in chosen:
        verdicts.append(tried(mutation))
        if not as_json:
            print(shown(verdicts[-1]), flush=True)
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    missed = sum(not verdict.noticed for verdict in verdicts)
    print(f"{len(verdicts) - missed} of {len(verdicts)} mutations noticed", file=sys.stderr)
    return EXIT_NOT_NOTICED if missed else EXIT_OK


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tests/mutations/run", description=__doc__)
    made.add_argument("names", nargs="*", metavar="NAME", help="these mutations alone")
    made.add_argument("--list", action="store_true", help="show them, with their tests, and run nothing")
    made.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    made.add_argument("--remake", action="store_true", help="write NAME's patch from the changes in the working tree")
    return made


def stopped(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # through the blocks that remove the copies


def main(argv: Sequence[str]) -> int:
    made = parser()
    arguments = made.parse_args(argv)
    known = {mutation.name: mutation for mutation in mutations()}
    unknown = [name for name in arguments.names if name not in known]
    if unknown or (arguments.remake and len(arguments.names) != 1):
        made.error(f"no such mutation: {', '.join(unknown)}; see --list" if unknown else "--remake takes one NAME")
    chosen = [known[name] for name in arguments.names] or list(known.values())
    if arguments.remake:
        return remade(chosen[0])
    if arguments.list:
        print("\n".join(f"{mutation.name}: {mutation.breaks}\n    {mutation.test}" for mutation in chosen))
        return EXIT_OK
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stopped)
    return run(chosen, arguments.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
