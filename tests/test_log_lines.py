"""Lines of logs: how they are cut, when they were written, in which order they come, and what a terminal sees of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir
from slurm.lib.observe import log_files, log_lines
from slurm.lib.observe.log_files import LogFile, Logs, created_at, last_stamp, log_names, origins, start_of_last
from slurm.lib.observe.log_lines import Anchor, Cutter, RawLine, between, cleaned, stamp_of
from slurm.lib.observe.log_merge import REMEMBERED, Line, Origin, Repeats, merged
from slurm.lib.observe.record import Pair, RecordedJob, RunRecord, read_record
from slurm.lib.observe.unknown import Unknown
from slurm.lib.verbs.moment import moment
from tests.observed_runs import folder_of

OUT, ERR = Origin("training", "12", 1, "out"), Origin("training", "12", 1, "err")
HUNDREDS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # a busy machine
NOON = datetime(2026, 11, 28, 12, 0, 0, tzinfo=timezone.utc)


def our(moment: float, text: str = "a line") -> bytes:
    """A line of a job's, of a moment in whole seconds."""
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S} [INFO] {text}\n".encode()


# --- cutting ----------------------------------------------------------------------------------------------------------

BYTES = st.lists(st.sampled_from([b"a", b"bcd", b" ", b"\n", b"\r", b"\r\n", b"\xff", b"x" * 9]), max_size=40)


def last_state(line: bytes) -> bytes:
    """What a terminal would show of it last."""
    *before, last = line.split(b"\r")
    if last.strip():
        return last
    return next((state for state in reversed(before) if state.strip()), last)


@HUNDREDS
@given(BYTES, st.integers(1, 7))
def test_every_line_is_cut_once_however_it_is_read(parts: list[bytes], piece: int) -> None:
    data = b"".join(parts)
    *whole, rest = data.split(b"\n")
    cutter = Cutter(100)
    found = [line for at in range(0, len(data), piece) for line in cutter.feed(data[at : at + piece])]
    assert [line.data for line in found] == [last_state(line) for line in whole]
    starts = [100 + data.find(b"\n" * bool(at)) for at in range(1)]
    assert [line.start for line in found][:1] == starts[: len(found)] or not found or found[0].start == 100
    unfinished = cutter.rest()
    assert (unfinished is None) == (rest == b"")
    assert unfinished is None or unfinished.data == last_state(rest)
    assert cutter.position == 100 + len(data)


@HUNDREDS
@given(BYTES, st.integers(1, 7))
def test_of_a_long_line_only_its_beginning_is_kept(
    monkeypatch: pytest.MonkeyPatch, parts: list[bytes], piece: int
) -> None:
    monkeypatch.setattr(log_lines, "LONGEST", 4)
    data = b"".join(parts)
    cutter = Cutter()
    found: list[RawLine] = []
    for at in range(0, len(data), piece):
        found += cutter.feed(data[at : at + piece])
        assert len(cutter._state) <= 4
    for line, whole in zip(found, data.split(b"\n"), strict=False):
        state = last_state(whole) if any(s[:4].strip() for s in whole.split(b"\r")) else None
        if state is not None and state[:4].strip():
            assert (line.data, line.lost) == (state[:4], max(0, len(state) - 4))


def test_what_is_lost_of_a_line_is_said() -> None:
    (line,) = Cutter().feed(b"x" * (log_lines.LONGEST + 7) + b"\n")
    assert line.text() == "x" * log_lines.LONGEST + " … (7 more bytes)"


def test_a_progress_bar_is_one_line_with_its_last_state() -> None:
    bar = b"\r  0%|    | 0/3\r 33%|#   | 1/3\r100%|####| 3/3\r\n"
    assert [line.data for line in Cutter().feed(bar)] == [b"100%|####| 3/3"]
    assert [line.data for line in Cutter().feed(b"dos\r\n\r\n")] == [b"dos", b""]


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        (b"2026-11-28 12:00:01 [INFO] ours", 1.0),
        (b"2026-11-28 12:00:01,250\tINFO worker.py:2012 -- Started a local Ray instance.", 1.25),
        (b"(TaskRunner pid=158922) 2026-11-28 12:00:01,5 INFO", 1.5),
        (b"\x1b[36m(WorkerDict pid=1, ip=10.0.0.1)\x1b[0m 2026-11-28 12:00:01 x", 1.0),
        (b'time="2026-11-28T12:00:01Z" level=warning msg="x"', 1.0),
        (b"2026-11-28T14:00:01+02:00 x", 1.0),
        (b"2026-11-28T06:30:01.123456789-0530 x", 1.123456),
        (b"[2026-11-28 12:00:01,1] x", 1.1),
        (b"slurmstepd-gpu-a: error: *** JOB 157 ON gpu-a CANCELLED AT 2026-11-28T12:00:01 DUE TO PREEMPTION ***", 1.0),
        (b"Step 3/5 at 2026-11-28 12:00:01", None),
        (b"2026-13-28 12:00:01 x", None),
        (b"2026-11-28 12:61:01 x", None),
        (b"", None),
    ],
)
def test_when_a_line_says_it_was_written(line: bytes, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    in_utc(monkeypatch)
    at = stamp_of(line)
    assert (at is None) == (seconds is None)
    assert at is None or at == pytest.approx(NOON.timestamp() + (seconds or 0))


def in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    log_lines._epoch.cache_clear()
    monkeypatch.callback = None  # type: ignore[attr-defined]


@HUNDREDS
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.floats(0, 1e9), st.floats(0, 1e9))
def test_an_estimate_lies_between_what_is_known(begin: int, end: int, at: int, first: float, last: float) -> None:
    assume(begin <= at <= end)
    found = between(Anchor(begin, first), Anchor(end, last), at)
    assert first <= found <= max(first, last)
    assert between(Anchor(begin, first), Anchor(end, last), min(end, at + 1)) >= found
