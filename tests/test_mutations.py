"""Do the kept mutations still mean something: does each apply, name a test that there is, and get judged rightly?

Whether they are noticed is what ``tests/mutations/run`` tries.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import FOLDER, ROOT, Mutation, mutation_of, mutations
from tests.mutations.__main__ import MARKER, judged
from tests.runs import until

PATCHES = sorted(FOLDER.glob("*.patch"))
QUICK = "missing-once-is-gone"
MUTATION = Mutation(FOLDER / "x.patch", "something", "tests/test_x.py::test_y", "42")


def test_there_are_enough() -> None:
    assert len(PATCHES) >= 16


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_each_applies_to_the_code_as_it_is(path: Path) -> None:
    fault = mutation_of(path).applied(ROOT, only_look=True)
    assert not fault, f"{fault}\nbreak the code anew, then: tests/mutations/run --remake {path.stem}"


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_each_change_replaces_lines_by_which_its_place_is_found(path: Path) -> None:
    """One that only adds lines would fit anywhere."""
    for change in path.read_text(encoding="utf-8").split("\n@@")[1:]:
        assert "\n-" in change


@pytest.mark.parametrize("mutation", mutations(), ids=lambda mutation: mutation.name)
def test_each_names_a_test_that_there_is(mutation: Mutation) -> None:
    file, _, name = mutation.test.partition("::")
    assert name in names_of_tests(ROOT / file)


def names_of_tests(path: Path) -> set[str]:
    """The functions of a file that are tests."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_a_patch_that_no_longer_fits_is_told(tmp_path: Path) -> None:
    mutation = mutation_of(PATCHES[0])
    assert "No such file" in mutation.applied(tmp_path, only_look=True)
    file = next(line[6:] for line in PATCHES[0].read_text().splitlines() if line.startswith("--- a/"))
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("something else\n")
    assert "does not apply" in mutation.applied(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "diff --git a/x b/x\n",
        "Breaks: x\nTest: tests/x.py::test_x\n\ndiff --git a/x b/x\n",
        "Breaks: x\nTest: tests/x.py\nRed: x\n\ndiff --git a/x b/x\n",
        "Breaks: x\nTest: tests/x.py::test_x\nRed: \n\ndiff --git a/x b/x\n",
    ],
)
def test_a_patch_that_does_not_say_what_it_is_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.patch"
    path.write_text(text)
    with pytest.raises(ValueError, match="must begin with the lines Breaks:, Test: and Red:"):
        mutation_of(path)


@pytest.mark.parametrize(
    ("ends", "noticed", "said"),
    [
        ([("failure", "assert 41 == 42\n…")], True, "assert 41 == 42"),
        ([("failure", "AssertionError: no\nassert 42")], True, "AssertionError: no"),
        ([("failure", "Failed: DID NOT RAISE 42")], True, "Failed: DID NOT RAISE 42"),
        ([("passed", ""), ("failure", "assert 42")], True, "assert 42"),
        ([("passed", "")], False, "its test is green"),
        ([("failure", "assert 41")], False, "red, but without '42': assert 41"),
        ([("failure", "NameError: 42")], False, "red, but not by an assertion: NameError: 42"),
        ([("error", "collection failure\n42")], False, "error: collection failure"),
        ([("failure", "assert 42"), ("error", "assert 42")], False, "error: assert 42"),
        ([("skipped", "no Podman\n42")], False, "skipped: no Podman"),
        ([("nothing", "no test ran")], False, "nothing: no test ran"),
    ],
)
def test_what_counts_as_noticed(ends: list[tuple[str, str]], noticed: bool, said: str) -> None:
    assert judged(MUTATION, ends) == (noticed, said)


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """``tests/mutations/run`` with its copies in ``folder``."""
    environment = {**os.environ, "TMPDIR": str(folder), "SKYRL_VENV": sys.prefix}
    return subprocess.Popen([FOLDER / "run", *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def test_one_is_tried_in_a_copy(tmp_path: Path) -> None:
    with started(tmp_path, "--json", QUICK) as process:
        out, _ = process.communicate(timeout=120)
    (verdict,) = json.loads(out)
    assert (process.returncode, verdict["name"], verdict["noticed"]) == (0, QUICK, True), verdict
    assert "is gone" in verdict["said"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_one_that_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, QUICK) as process:
        until("a test of a copy", lambda: processes_in(tmp_path), 30)
        process.send_signal(number)
        assert process.wait(30) in {-number, 128 + number}
    until("its end", lambda: not processes_in(tmp_path) and not list(tmp_path.iterdir()), 30)


def processes_in(folder: Path) -> list[str]:
    """The processes that test a copy below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARKER}={folder}/".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("arguments", [["nonesuch"], ["--remake"], ["--remake", QUICK, PATCHES[0].stem]])
def test_names_that_are_wrong(tmp_path: Path, arguments: list[str]) -> None:
    with started(tmp_path, *arguments) as process:
        process.communicate(timeout=30)
    assert process.returncode == 2
