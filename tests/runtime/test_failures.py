"""What is kept of sandboxes that failed, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm_runtime.failures import MOST_KEPT, Failures, line_of, parse
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State


def failed(runtime_id: str = "r1", session_id: str = "s1", reason: str = "exit code 3") -> Sandbox:
    wish = Specification(
        runtime_id, session_id, "its key", "image:1", ("a",), "/w", {"A": "b"}, 2.0, "never", Dialect.LEGACY, 1
    )
    return Sandbox(wish, State.FAILED, reason, "http://node:1", "last \n lines \u2028\n", ("out of memory",))


def test_what_clients_read_of_a_failed_sandbox_is_kept_and_no_key() -> None:
    line = line_of(failed())
    assert "\n" not in line and "its key" not in line
    [one] = parse([line])
    wish, before = one.sandbox.specification, failed().specification
    assert (wish.runtime_id, wish.session_id, wish.image, wish.dialect, wish.resource_factor) == (
        before.runtime_id,
        before.session_id,
        before.image,
        before.dialect,
        before.resource_factor,
    )
    assert (one.sandbox.state, one.sandbox.reason, one.sandbox.url) == (State.FAILED, "exit code 3", "http://node:1")
    assert (one.sandbox.last_lines, one.sandbox.restart_reasons) == (failed().last_lines, ("out of memory",))
    assert one.is_last


def test_of_a_session_only_the_last_sandbox_is_its_own() -> None:
    lines = [line_of(failed("r1")), line_of(failed("r2")), line_of(failed("r3", "s3")), '{"again": "s3"}']
    assert [(one.sandbox.specification.runtime_id, one.is_last) for one in parse(lines)] == [
        ("r1", False),
        ("r2", True),
        ("r3", False),
    ]


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", "null", "{}", line_of(failed())[:-9], line_of(failed()).replace("LEGACY", "OTHER")]
)
def test_a_broken_line_says_nothing_and_spoils_no_other(line: str, tmp_path: Path) -> None:
    path = tmp_path / "failures"
    path.write_text(line)
    Failures(path, goes_on=True).note(failed("r2"))
    assert [one.sandbox.specification.runtime_id for one in Failures(path, goes_on=True).known] == ["r2"]


def test_the_file_is_its_owners_and_does_not_grow_without_end(tmp_path: Path) -> None:
    path = tmp_path / "failures"
    old = os.umask(0)
    try:
        failures = Failures(path, goes_on=False)
        for number in range(5 * MOST_KEPT):
            failures.note(failed(f"r{number}"))
            assert len(path.read_text().split("\n")) <= 2 * MOST_KEPT + 1
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["failures"]
    known = Failures(path, goes_on=True).known
    assert len(known) >= MOST_KEPT
    assert known[-1].sandbox.specification.runtime_id == f"r{5 * MOST_KEPT - 1}"


def test_as_many_are_kept_of_sessions_that_had_another_one_since(tmp_path: Path) -> None:
    path = tmp_path / "failures"
    failures = Failures(path, goes_on=False)
    for number in range(3 * MOST_KEPT):
        failures.note(failed(f"r{number}", f"s{number}"))
        if number % 5:
            failures.note_again(f"s{number}")
        if number == 2 * MOST_KEPT:
            failures = Failures(path, goes_on=True)
        assert len(path.read_text().split("\n")) <= 2 * MOST_KEPT + 1
    known = Failures(path, goes_on=True).known
    assert len(known) >= MOST_KEPT
    numbers = [int(one.sandbox.specification.runtime_id[1:]) for one in known]
    assert numbers == list(range(3 * MOST_KEPT))[-len(known) :]
    assert [one.is_last for one in known] == [number % 5 == 0 for number in numbers]


def test_a_server_that_follows_nobody_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "failures"
    Failures(path, goes_on=False).note(failed())
    assert Failures(path, goes_on=False).known == []
    assert not path.exists()


def test_what_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures(tmp_path / "none" / "failures", goes_on=True)
    failures.note(failed())
    failures.note(failed())
    assert caplog.text.count("a next server will not know which sandboxes had failed") == 1
