"""Does the fault matrix make its faults as the world does, and does its measure fail where it should?"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import faults
from tests.conftest import Belongings, NothingLeft, OrdinaryUser
from tests.faults import CASES, Case, released, within
from tests.runs import Run

TESTS = Path(__file__).parent
NAMED = sorted(TESTS.glob("test_slurm_faults_*.py"))  # these are of the matrix whole
FORBIDDEN = ("monkeypatch", "mock", "setattr")


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every name that code uses: variables, attributes, parameters, modules and what is imported from them."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


def is_marked(path: Path) -> bool:
    """Whether a file has a test marked ``faults``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(ast.unparse(node) == "pytest.mark.faults" for node in ast.walk(tree) if isinstance(node, ast.Attribute))


FILES = sorted(path for path in TESTS.rglob("test_*.py") if is_marked(path))


def forbidden_in(text: str) -> set[str]:
    return {name for name in names_in(ast.parse(text)) if any(word in name for word in FORBIDDEN)}


@pytest.mark.parametrize(
    "text",
    [
        "def test(monkeypatch): ...",
        "from unittest import mock",
        "import unittest.mock as m",
        "from unittest.mock import patch",
        "setattr(module, 'name', 1)",
        "x.__setattr__('a', 1)",
    ],
)
def test_code_that_changes_code_is_seen(text: str) -> None:
    assert forbidden_in(text)


@pytest.mark.parametrize("path", [Path(faults.__file__), *FILES], ids=lambda path: path.name)
def test_faults_are_made_with_public_commands_signals_mounts_and_cables(path: Path) -> None:
    assert forbidden_in(path.read_text(encoding="utf-8")) == set()


def test_every_file_of_the_matrix_is_marked() -> None:
    assert NAMED
    assert set(NAMED) < set(FILES)


def test_every_case_is_in_the_table_and_is_tried() -> None:
    named = {name: value for name, value in vars(faults).items() if isinstance(value, Case)}
    assert set(named.values()) == set(CASES)
    tests = "".join(path.read_text(encoding="utf-8") for path in FILES)
    assert [name for name in named if f"faults.{name}" not in tests] == []


def test_a_time_beyond_the_bound_is_no_pass_and_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = tmp_path / "times"
    monkeypatch.setenv("SKYRL_FAULT_TIMES", str(times))
    case = Case(1, "a fault", "an end", 10)
    with pytest.raises(AssertionError, match="not within 10 s"):
        within(case, 10.5)
    assert not times.exists()
    within(case, 9.44)
    assert json.loads(times.read_text()) == {"row": 1, "case": "a fault", "bound": 10, "measured": 9.4}


@dataclass(frozen=True)
class Ended:
    """A user whose jobs are all in one state."""

    home: Path
    state: str = "FAILED"

    def run(
        self, argv: list[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
    ) -> CompletedProcess[str]:
        return CompletedProcess(argv, 0, f"7|{self.state}\n8|{self.state}\n", "")


@dataclass(frozen=True)
class Left(NothingLeft):
    """What is left of a run, said beforehand."""

    things: tuple[str, ...] = ()

    def now(self) -> list[str]:
        return list(self.things)


QUICK = Case(1, "a fault", "an end", 0.3, "the cause")
SAID = {
    "runtime_7.out": "ends: the cause",
    "training_8.err": "the runtime failed: the cause",
    "training_complete.flag": '{"reason": "the cause"}',
    "run.json": json.dumps({"jobs": {kind: {"ended": {"reason": "the cause"}} for kind in ("runtime", "training")}}),
}
WITHDRAWN = {
    **{name: SAID[name] for name in ("training_complete.flag", "run.json")},
    "runtime_7.out": "the cause; cancelled the pending training job 8, which could only fail",
}


def release(folder: Path, files: Mapping[str, str], left: tuple[str, ...] = (), state: str = "FAILED") -> float:
    for name, text in files.items():
        (folder / name).write_text(text)
    run = Run(Ended(folder, state), folder, {"runtime": "7", "training": "8"})
    nobody = OrdinaryUser("nobody", 0, 0, folder, range(0), {})
    check = Left(nobody, Belongings({}, frozenset(), frozenset()), left)
    return released(run, check, QUICK)


@pytest.mark.parametrize("files", [SAID, WITHDRAWN], ids=["both began", "the training was pending"])
def test_a_run_is_released_with_its_reason(tmp_path: Path, files: dict[str, str]) -> None:
    assert release(tmp_path, files) < 0.3


@pytest.mark.parametrize("silent", SAID)
def test_a_reason_that_does_not_stand_somewhere_is_missed(tmp_path: Path, silent: str) -> None:
    with pytest.raises(AssertionError, match="'the cause' does not stand in"):
        release(tmp_path, {**SAID, silent: "{}"})


def test_what_holds_a_release_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"still there: .*port 5"):
        release(tmp_path, SAID, left=("port 5 on cpu-a",))
    with pytest.raises(AssertionError, match=r"still there: .*runtime job"):
        release(tmp_path, SAID, state="COMPLETING")


@pytest.mark.parametrize("case", [case for case in CASES if case.bound_s < math.inf], ids=lambda case: case.fault)
def test_what_the_table_states_was_measured_and_is_within_the_bound(case: Case) -> None:
    assert 0 <= faults.measured(case) < case.bound_s


@pytest.mark.parametrize("case", [case for case in CASES if case.shown], ids=lambda case: case.fault)
def test_what_the_table_shows_has_the_words_that_are_tested(case: Case) -> None:
    assert case.reads and case.reads in case.shown


def test_cases_are_told_apart_by_their_words() -> None:
    assert len({case.fault for case in CASES}) == len(CASES)
