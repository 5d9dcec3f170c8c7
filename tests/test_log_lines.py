"""Lines of logs: how they are cut, when they were written, in which order they come, what a terminal sees of them."""

from __future__ import annotations

import itertools
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir
from slurm.lib.observe import log_files, log_lines
from slurm.lib.observe.log_files import JobLogs, LogFile, Logs, created_at, log_names, origins
from slurm.lib.observe.log_lines import Anchor, Cutter, RawLine, between, cleaned, stamp_of
from slurm.lib.observe.log_merge import WINDOW, Line, Origin, Pairing, merged, together
from slurm.lib.observe.record import Pair, RecordedJob, RunRecord, read_record
from slurm.lib.observe.unknown import Unknown
from slurm.lib.verbs.moment import moment
from tests.observed_runs import folder_of

OUT, ERR = Origin("training", "12", 1, "out"), Origin("training", "12", 1, "err")
HUNDREDS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # a busy machine
NOON = datetime(2026, 11, 28, 12, 0, 0, tzinfo=timezone.utc)


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This host is in UTC."""
    with monkeypatch.context() as here:
        here.setenv("TZ", "UTC")
        time.tzset()
        log_lines._epoch.cache_clear()
        yield
    time.tzset()
    log_lines._epoch.cache_clear()


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
    assert [line.start for line in found] == [100 + len(b"\n".join([*whole[:at], b""])) for at in range(len(whole))]
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
def test_when_a_line_says_it_was_written(line: bytes, seconds: float | None, utc: None) -> None:
    at = stamp_of(line)
    assert (at is None) == (seconds is None)
    assert at is None or at == pytest.approx(NOON.timestamp() + (seconds or 0))


@HUNDREDS
@given(st.tuples(*[st.integers(0, 100)] * 3).map(sorted), st.floats(0, 1e9), st.floats(0, 1e9))
def test_an_estimate_lies_between_what_is_known(places: list[int], first: float, last: float) -> None:
    begin, at, end = places
    found = between(Anchor(begin, first), Anchor(end, last), at)
    assert first <= found <= max(first, last)
    assert between(Anchor(begin, first), Anchor(end, last), min(end, at + 1)) >= found


# --- order ------------------------------------------------------------------------------------------------------------

TIMES = st.lists(st.lists(st.integers(0, 50), max_size=20), max_size=6)


def lines_of(times: Sequence[Sequence[int]]) -> list[list[Line]]:
    return [
        [Line(at, f"{number}.{count}", replace(OUT, job_id=str(number))) for count, at in enumerate(file)]
        for number, file in enumerate(times)
    ]


@HUNDREDS
@given(TIMES)
def test_every_line_comes_once_and_each_logs_order_is_kept(times: list[list[int]]) -> None:
    logs = lines_of(times)
    found = list(merged(logs))
    assert sorted(line.text for line in found) == sorted(line.text for log in logs for line in log)
    for log in logs:
        assert [line for line in found if line in log] == log


@HUNDREDS
@given(TIMES.map(lambda files: [sorted(file) for file in files]))
def test_times_never_go_back_where_they_do_not_in_any_log(times: list[list[int]]) -> None:
    found = list(merged(lines_of(times)))
    assert [line.at for line in found] == sorted(line.at for line in found)
    for one, other in itertools.pairwise(found):
        assert one.at < other.at or one.origin.job_id <= other.origin.job_id, "one moment: in the order of the logs"


def test_a_merge_reads_no_further_than_it_shows() -> None:
    read: list[int] = []

    def endless(number: int) -> Iterator[Line]:
        for at in range(10**9):
            read.append(number)
            yield Line(at, "", OUT)

    lines = merged([endless(0), endless(1)])
    for _ in range(10):
        next(lines)
    assert len(read) <= 12


LONG = [f"a warning of a number of words: {number}" for number in range(3)]
# What a job wrote, in order: to which of its logs, and the line. What the .err alone has is not in the .out.
JOB = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.sampled_from("abc")),
        st.tuples(st.just("both"), st.sampled_from(["a", "b", "c", *LONG])),
        st.tuples(st.just("err"), st.sampled_from("xy")),
    ),
    max_size=40,
)


def in_log(written: Sequence[tuple[str, str]], stream: str, origin: Origin) -> list[Line]:
    return [Line(0.0, text, origin, is_own=False) for where, text in written if where in {stream, "both"}]


@HUNDREDS
@given(JOB)
def test_what_stands_in_both_logs_of_a_job_comes_once(written: list[tuple[str, str]]) -> None:
    out, err = in_log(written, "out", OUT), in_log(written, "err", ERR)
    pairing = Pairing()
    found = [*together(iter(out), iter(err), pairing), *pairing.rest()]
    assert [line.text for line in found if line.text not in "xy"] == [line.text for line in out]
    assert [line.text for line in found if line.text in "xy"] == [line.text for line in err if line.text in "xy"]
    marked = [line.text for line in found if line.origin == ERR and line.text in [*LONG, "x", "y"]]
    assert marked == [line.text for line in err if line.text in [*LONG, "x", "y"]], "they are known as the .err's"


@HUNDREDS
@given(JOB, st.lists(st.integers(0, 40), max_size=5))
def test_and_so_it_does_while_it_is_written(written: list[tuple[str, str]], looks: list[int]) -> None:
    """The .out is written first; the look at the .err may come before a line has reached that."""
    pairing, seen = Pairing(), 0
    found: list[Line] = []
    for at in [*sorted(looks), len(written)]:
        some, seen = written[seen:at], max(seen, at)
        late = some[-1:] if some and some[-1][0] == "both" else []
        for line in in_log(some[: len(some) - len(late)], "err", ERR):
            found += pairing.take_err(line)
        for line in in_log(some, "out", OUT):
            found += pairing.take_out(line)
        for line in in_log(late, "err", ERR):
            found += pairing.take_err(line)
    found += pairing.rest()
    assert [line.text for line in found if line.text not in "xy"] == [line.text for line in in_log(written, "out", OUT)]
    assert sorted(line.text for line in found if line.text in "xy") == sorted(t for w, t in written if w == "err")


def test_little_is_held_of_long_lines() -> None:
    pairing, long = Pairing(), "x" * (1 << 18)
    out, err = ((Line(0.0, f"{n}{long}", origin) for n in range(40)) for origin in (OUT, ERR))
    count = 0
    for line in together(out, err, pairing):
        count += 1
        assert line.origin == ERR
        assert sum(len(waits.text) for waits in pairing.waiting) < 6 * len(long)
        assert sum(map(len, pairing._seen)) < 40 * 1000
    assert (count, list(pairing.rest())) == (40, [])


def test_few_lines_are_held_of_logs_that_have_nothing_in_common() -> None:
    pairing = Pairing()
    lines = together(
        (Line(0.0, f"out {number}", OUT) for number in range(10 * WINDOW)),
        (Line(0.0, f"err {number}", ERR) for number in range(10 * WINDOW)),
        pairing,
    )
    count = 0
    for _line in lines:
        count += 1
        assert len(pairing.waiting) <= WINDOW
        assert len(pairing._seen) <= WINDOW
    assert count + len(list(pairing.rest())) == 20 * WINDOW


def test_what_the_err_alone_has_comes_by_its_own_time() -> None:
    out = [Line(float(at), f"step {at}", OUT) for at in range(0, 100, 10)]
    err = [Line(42.0, "slurmstepd: error: *** JOB 12 CANCELLED ***", ERR), Line(42.0, "more", ERR, is_own=False)]
    pairing = Pairing()
    found = [line.text for line in [*together(iter(out), iter(err), pairing), *pairing.rest()]]
    assert found.index(err[0].text) == 5


def test_what_is_older_than_the_last_lines_is_left_out() -> None:
    """It stands in the .out before them."""
    old, first, *_ = texts = ["a warning of old, of the start", "Traceback (most recent call last):", "error"]
    err = [Line(5.0, text, ERR, is_own=False) for text in texts]
    out = [Line(5.0, text, OUT, is_own=False) for text in (first, "step", "error")]
    for is_whole, shown in ((False, [first, "step", "error"]), (True, [old, first, "step", "error"])):
        assert [line.text for line in together(iter(out), iter(err), Pairing(is_whole))] == shown


# --- files ------------------------------------------------------------------------------------------------------------

BEGAN = 1_795_000_000
# Steps of time of lines that say it (None: one that does not), of whatever length.
WRITTEN = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 5)), st.sampled_from([0, 3, 40])), max_size=30)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in pieces that end anywhere."""
    monkeypatch.setattr(log_files, "CHUNK", 17)
    monkeypatch.setattr(log_files, "BLOCK", 23)
    monkeypatch.setattr(log_files, "PIECE", 20)


def written(path: Path, steps: Sequence[tuple[int | None, int]]) -> list[tuple[bytes, float | None]]:
    """Write a log; returns its lines and when those were written that say it."""
    at = BEGAN
    lines: list[tuple[bytes, float | None]] = []
    for number, (step, length) in enumerate(steps):
        text = f"{number} " + "x" * length
        at += step or 0
        lines.append((f"{text}\n".encode(), None) if step is None else (our(at, text), float(at)))
    path.write_bytes(b"".join(line for line, _at in lines))
    os.utime(path, (at + 100, at + 100))
    return lines


def texts(lines: Sequence[tuple[bytes, float | None]]) -> list[str]:
    return [line.decode().rstrip("\n") for line, _at in lines]


@HUNDREDS
@given(WRITTEN)
def test_a_log_is_read_whole_with_times_that_never_go_back(
    tmp_path: Path, small: None, steps: list[tuple[int | None, int]]
) -> None:
    path = tmp_path / "training_12.out"
    lines = written(path, steps)
    found = list(LogFile(OUT, path).there())
    assert [line.text for line in found] == texts(lines)
    assert [line.at for line in found] == sorted(line.at for line in found)
    assert [line.at if line.is_own else None for line in found] == [at for _line, at in lines]
    assert all(BEGAN <= line.at <= path.stat().st_mtime for line in found)


@HUNDREDS
@given(WRITTEN, st.integers(0, 40), st.booleans())
def test_the_last_lines_of_a_log(
    tmp_path: Path, small: None, steps: list[tuple[int | None, int]], count: int, is_whole: bool
) -> None:
    path = tmp_path / "training_12.out"
    lines = texts(written(path, steps))
    if not is_whole:
        with path.open("ab") as file:
            file.write(b"no end")
        lines.append("no end")
    log = LogFile(OUT, path)
    log.skip(count, -math.inf)
    found = [*log.there(), *log.unfinished(0.0)]
    assert [line.text for line in found] == lines[len(lines) - min(count, len(lines)) :]
    whole = LogFile(OUT, path)
    times = [line.at for line in [*whole.there(), *whole.unfinished(0.0)]][len(lines) - len(found) :]
    assert [line.at for line in found] == pytest.approx(times), "the same as of the whole"


@HUNDREDS
@given(WRITTEN, st.integers(-2, 60))
def test_the_lines_since_a_moment(tmp_path: Path, small: None, steps: list[tuple[int | None, int]], after: int) -> None:
    path = tmp_path / "training_12.out"
    written(path, steps)
    whole = [line for line in LogFile(OUT, path).there() if line.at >= BEGAN + after]
    log = LogFile(OUT, path)
    log.skip(None, BEGAN + after)
    assert [line for line in log.there() if line.at >= BEGAN + after] == whole


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "training_12.out"
    with path.open("wb") as file:
        file.write(our(BEGAN))
        file.truncate(1 << 36)  # 64 GiB of nothing
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + our(BEGAN + 10, "the last but one") + our(BEGAN + 20, "the last"))
    begin = time.monotonic()
    for lines, since in ((1, -math.inf), (None, BEGAN + 15.0)):
        log = LogFile(OUT, path)
        log.skip(lines, since)
        assert [line.text[20:] for line in log.there() if line.at >= since] == ["[INFO] the last"]
    assert time.monotonic() - begin < 30


def test_a_time_that_is_later_than_the_file_is_about_something_else(tmp_path: Path) -> None:
    path = tmp_path / "training_12.out"
    path.write_bytes(our(BEGAN) + b"2099-01-01 00:00:00 the horizon\n" + our(BEGAN + 1))
    os.utime(path, (BEGAN + 1, BEGAN + 1))
    first, second, third = LogFile(OUT, path).there()
    assert (first.is_own, second.is_own, third.is_own) == (True, False, True)
    assert first.at <= second.at <= third.at


def test_a_log_without_any_time_begins_with_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    err, out = tmp_path / "training_12.err", tmp_path / "training_12.out"
    err.write_bytes(b"one\ntwo\n")
    os.utime(err, (BEGAN + 9, BEGAN + 9))
    just_before = BEGAN + 9 - log_files.JUST_S
    assert [line.at for line in LogFile(ERR, err).there()] == [BEGAN + 9] * 2
    assert [line.at for line in LogFile(ERR, err, float(BEGAN)).there()] == [just_before] * 2
    monkeypatch.setattr(log_files, "PIECE", 4)
    assert [line.at for line in LogFile(ERR, err, float(BEGAN)).there()] == pytest.approx([BEGAN + 4.5, just_before])
    out.write_bytes(our(BEGAN + 1))
    assert [line.at for line in LogFile(ERR, err, float(BEGAN)).there()] == pytest.approx([BEGAN + 5, just_before])


def test_a_traceback_comes_whole_before_what_it_led_to(tmp_path: Path) -> None:
    out, err = tmp_path / "training_12.out", tmp_path / "training_12.err"
    traceback = [f"  line {number} of a traceback" for number in range(200)]
    err.write_bytes(("\n".join(traceback) + "\n").encode() + our(BEGAN + 9000, "it ends"))
    steps = [our(BEGAN + 60 * number, f"step {number}") for number in range(100)]
    out.write_bytes(b"".join(steps) + our(BEGAN + 9000, "it ends"))
    found = [line.text for line in merged([LogFile(OUT, out).there(), LogFile(ERR, err).there()])]
    assert found[100:300] == traceback
    assert all("it ends" in text for text in found[300:])


# --- what comes -------------------------------------------------------------------------------------------------------


def new(log: LogFile, now: float = BEGAN) -> list[str]:
    return [line.text for line in log.new(now)]


def test_a_log_is_followed_through_whatever_becomes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "training_12.out"
    log = LogFile(OUT, path)
    assert new(log) == []
    assert "cannot be read: No such file" in log.problem
    path.write_text("one\ntw")
    assert new(log) == ["one"]
    assert log.problem == ""
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert new(log) == ["two", "three"]
    assert not log.was_replaced
    path.write_text("new\n")  # shorter than it was
    assert (new(log), log.was_replaced) == (["new"], True)
    log.was_replaced = False
    beside = tmp_path / "beside"
    beside.write_text("another, which is longer\nand has")
    beside.replace(path)
    assert (new(log), log.was_replaced) == (["another, which is longer"], True)
    path.unlink()
    assert new(log) == []
    assert [line.text for line in log.unfinished(BEGAN)] == ["and has"]
    assert [line.text for line in log.unfinished(BEGAN)] == []


@HUNDREDS
@given(BYTES, st.lists(st.integers(0, 60), max_size=6))
def test_what_is_followed_is_what_is_there(tmp_path: Path, small: None, parts: list[bytes], cuts: list[int]) -> None:
    """However the file grows meanwhile."""
    path, data = tmp_path / "training_12.out", b"".join(parts)
    path.write_bytes(b"")
    log = LogFile(OUT, path)
    found: list[Line] = []
    for at in [*sorted(cuts), len(data)]:
        path.write_bytes(data[:at])
        found += log.new(BEGAN)
    found += log.unfinished(BEGAN)
    whole = LogFile(OUT, path)
    assert [line.text for line in found] == [line.text for line in [*whole.there(), *whole.unfinished(BEGAN)]]


def test_a_line_that_comes_is_of_its_own_time_or_of_this_moment(tmp_path: Path) -> None:
    path = tmp_path / "training_12.out"
    path.write_bytes(our(BEGAN) + b"step 1\n2099-01-01 00:00:00 the horizon\n")
    os.utime(path, (BEGAN, BEGAN))
    found = [(line.at, line.is_own) for line in LogFile(OUT, path).new(BEGAN + 5)]
    assert found == [(BEGAN, True), (BEGAN + 5, False), (BEGAN + 5, False)]


def test_a_progress_bar_without_an_end_is_shown_from_time_to_time(tmp_path: Path) -> None:
    path = tmp_path / "training_12.err"
    path.write_bytes(b"no bar")
    log = LogFile(ERR, path)
    assert [new(log), list(log.bar(0.0))] == [[], []]
    path.write_bytes(b"no bar\r1/3")
    assert new(log) == []
    assert [line.text for line in log.bar(1000.0)] == ["1/3"]
    path.write_bytes(b"no bar\r1/3\r2/3")
    assert new(log) == []
    assert [line.text for line in log.bar(1001.0)] == []
    assert [line.text for line in log.bar(1031.0)] == ["2/3"]
    assert [line.text for line in log.bar(1099.0)] == [], "it rests"
    path.write_bytes(b"no bar\r1/3\r2/3\r3/3\n")
    assert new(log) == ["3/3"]


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    pipe, folder, link = (tmp_path / f"training_{number}.out" for number in (1, 2, 3))
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to("/nonexistent/slurm-3.out")
    for path, why in (
        (pipe, "it is no regular file"),
        (folder, "it is no regular file"),
        (link, "it is a link to /nonexistent/slurm-3.out: No such file or directory"),
    ):
        log, opened = LogFile(OUT, path), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        log.skip(3, BEGAN)
        assert list(log.there()) == []
        assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208
        assert log.problem == f"{path.name} cannot be read: {why}"


# --- the logs of a run ------------------------------------------------------------------------------------------------


def test_the_logs_of_a_chain_come_by_attempt() -> None:
    directory = CoordinationDir(folder_of("chained"))
    names = log_names(directory)
    assert not isinstance(names, Unknown)
    found = [(o.attempt, o.kind, o.job_id, o.stream) for o in origins(read_record(directory), names)]
    assert found == [
        (attempt, kind, job, stream)
        for attempt, jobs in ((1, ("233", "234")), (2, ("241", "242")))
        for kind, job in zip(("runtime", "training"), jobs, strict=True)
        for stream in ("out", "err")
    ]


def test_a_log_of_a_job_that_no_record_names_is_shown_too() -> None:
    pair = Pair((RecordedJob("training", "12"),), 2, "2026-11-28T12:00:00+00:00")
    record = RunRecord(None, (pair,))
    names = frozenset({"training_12.out", "training_9.out", "training_x.out", "ray_12_gpu-a.log", "run.json"})
    assert [(o.attempt, o.job_id) for o in origins(record, names)] == [(1, "9"), (2, "12")]
    assert (created_at(record, "12"), created_at(record, "9")) == (NOON.timestamp(), None)


def test_a_log_is_taken_up_once(tmp_path: Path) -> None:
    logs, record = Logs(["training"]), RunRecord(None)
    names = frozenset({"training_12.out", "runtime_11.out"})
    directory = CoordinationDir(tmp_path)
    (job,) = logs.add(directory, record, names)
    assert [file.path.name for file in job.files] == ["training_12.out"]
    assert logs.add(directory, record, names) == []
    assert logs.add(directory, record, names | {"training_12.err"}) == []
    assert [file.origin.stream for file in logs.files] == ["out", "err"]
    assert isinstance(log_names(CoordinationDir(tmp_path / "gone")), Unknown)


def job_logs(folder: Path, out: str, err: str) -> JobLogs:
    paths = folder / "training_12.out", folder / "training_12.err"
    for path, text in zip(paths, (out, err), strict=True):
        path.write_text(text)
        os.utime(path, (BEGAN, BEGAN))
    return JobLogs(LogFile(OUT, paths[0]), LogFile(ERR, paths[1]))


def test_the_last_lines_of_a_job(tmp_path: Path) -> None:
    steps = "".join(f"step {number}\n" for number in range(100))
    early, late = (our(BEGAN - ago, "a line that says its time").decode() for ago in (600, 0))
    for out, err, lines, shown in (
        (f"old\n{steps}", "old\n", 2, ["step 98", "step 99"]),
        (f"old\n{steps}{LONG[0]}\nb\n", f"old\n{LONG[0]}\nb\n", 2, [LONG[0], "b"]),
        (f"old\n{steps}a\nb\n", "old\na\nb\n", 1, ["b"]),
        (steps, "oom\n", 1, ["step 99", "oom"]),
        (f"{early}{steps}{late}", early, 1, [late.strip()]),
        (f"{early}{steps}{late}", f"{early}oom\n", 1, [late.strip(), "oom"]),
        (steps, "", 0, []),
    ):
        job = job_logs(tmp_path, out, err)
        if err == "old\n":  # long ago
            os.utime(tmp_path / "training_12.err", (BEGAN - 3600, BEGAN - 3600))
        job.skip(lines, -math.inf)
        assert [line.text for line in [*job.there(), *job.unfinished()]] == shown


def test_what_only_the_err_has_comes_after_a_moment(tmp_path: Path) -> None:
    job = job_logs(tmp_path, "one\n", "oom\n")
    assert [line.text for line in job.new(0.0)] == ["one"]
    assert [line.text for line in job.new(log_files.HOLD_S - 1)] == []
    assert [line.text for line in job.new(log_files.HOLD_S)] == ["oom"]
    with (tmp_path / "training_12.err").open("a") as file:
        file.write("late\n")  # whose like has not been seen yet
    assert [line.text for line in job.new(100.0)] == []
    with (tmp_path / "training_12.out").open("a") as file:
        file.write("late\ntwo")
    assert [(line.text, line.origin.stream) for line in job.new(101.0)] == [("late", "err")]
    assert [line.text for line in job.unfinished()] == ["two"]


# --- what a terminal sees ---------------------------------------------------------------------------------------------

HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(
            ["\x1b", "\x1b[", "\x9b", "\x1b]0;", "\x07", "\x1b\\", "m", "31", ";", "\x1bP", "\x9d", "\x1b[2J"]
        ),
    ),
    max_size=12,
).map("".join)


@HUNDREDS
@given(HOSTILE)
def test_no_log_steers_a_terminal(text: str) -> None:
    steering = r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    assert not re.search(steering, cleaned(text))
    coloured = cleaned(text, colour=True)
    assert not re.search(steering, re.sub(r"\x1b\[[\d;]*m", "", coloured))
    assert "\x1b" not in coloured or coloured.endswith(log_lines.RESET)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == cleaned(text)


@pytest.mark.parametrize(
    ("text", "plain", "coloured"),
    [
        ("plain\ttext ü 漢", "plain\ttext ü 漢", "plain\ttext ü 漢"),
        ("\x1b[1;31mred", "red", "\x1b[1;31mred\x1b[0m"),
        ("\x1b[38;5;208mx\x1b[38;2;1;2;3my", "xy", "\x1b[38;5;208mx\x1b[38;2;1;2;3my\x1b[0m"),
        ("\x1b[8mhidden\x1b[0;8mtoo", "hiddentoo", "hiddentoo"),
        ("\x1b[2J\x1b[Hgone\x1b[1A", "gone", "gone"),
        ("\x1b]0;title\x07a\x1b]52;c;Zm9v\x1b\\b", "ab", "ab"),
        ("\x1b]8;;file:///etc\x1b\\link", "link", "link"),
        ("\x1b]0;no end", "0;no end", "0;no end"),
        ("\x1bcreset\x1b(0", "reset", "reset"),
        ("a\x00\x08b\u202edesrever", "abdesrever", "abdesrever"),
    ],
)
def test_what_is_let_through(text: str, plain: str, coloured: str) -> None:
    assert (cleaned(text), cleaned(text, colour=True)) == (plain, coloured)


# --- since when -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10m", "2026-11-28T11:50:00+00:00"),
        ("10min", "2026-11-28T11:50:00+00:00"),
        ("1h30m", "2026-11-28T10:30:00+00:00"),
        ("2d", "2026-11-26T12:00:00+00:00"),
        ("45s", "2026-11-28T11:59:15+00:00"),
        ("11:20", "2026-11-28T11:20:00+00:00"),
        ("9:05:07", "2026-11-28T09:05:07+00:00"),
        ("12:00", "2026-11-28T12:00:00+00:00"),
        ("14:20", "2026-11-27T14:20:00+00:00"),
        ("2026-11-28", "2026-11-28T00:00:00+00:00"),
        ("2026-11-28 11:20", "2026-11-28T11:20:00+00:00"),
        ("2026-11-28T11:20:30+01:00", "2026-11-28T11:20:30+01:00"),
        ("2026-11-28T11:20:30Z", "2026-11-28T11:20:30+00:00"),
    ],
)
def test_a_moment(text: str, found: str) -> None:
    assert moment(text, NOON) == datetime.fromisoformat(found)


@pytest.mark.parametrize("text", ["", "10", "soon", "-5m", "25:00", "12:60", "10m5", "2026-13-01", "5m10h", "１０m"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no time; write it as 10m, "):
        moment(text, NOON)


def test_a_moment_to_come() -> None:
    with pytest.raises(ValueError, match="is still to come: it is 2026-11-28T12:00:00"):
        moment("2026-11-28T12:00:01Z", NOON)
    with pytest.raises((ValueError, OverflowError)):
        moment("999999d", NOON)


@HUNDREDS
@given(st.timedeltas(timedelta(0), timedelta(hours=23, minutes=59)))
def test_a_time_of_the_day_is_the_last_one(ago: timedelta) -> None:
    then = (NOON - ago).replace(microsecond=0)
    assert moment(f"{then:%H:%M:%S}", NOON) == then
