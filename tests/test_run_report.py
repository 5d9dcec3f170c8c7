"""What a report makes of logs, of steps and of what was measured; the runs are real, or made up where they are long."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir
from slurm.lib.observe.job_log import BLOCK, LONGEST, MOST_STEPS, JobLog, read_job_log, scan
from slurm.lib.observe.phase import mark_in, mark_words
from slurm.lib.observe.record import read_record
from slurm.lib.observe.run_report import (
    JobReport,
    RunReport,
    figure,
    first_step_at,
    job_report,
    read_report,
    start_up,
    with_accounting,
    with_measurements,
)
from slurm.lib.observe.run_view import JobView, RunState, Stage, Word
from slurm.lib.observe.sandbox_statistics import SandboxStatistics, Seconds
from slurm.lib.observe.steps import (
    Step,
    done_again,
    merged,
    part_shares,
    placed,
    rewards,
    step_in,
    step_times,
    with_lengths,
)
from slurm.lib.observe.survey import SILENT, record_of, with_logs, without_logs
from slurm.lib.observe.timeline import QUEUE, TRAINING, Mark, Span, local_epoch, spans, utc_epoch, zone_shift
from slurm.lib.observe.unknown import Unknown
from slurm.lib.observe.usage import Usage
from slurm.lib.reports import series
from slurm.lib.reports.report_words import heading, length, sparkline, use_lines
from slurm.lib.runs import FoundRun, RunJob
from slurm.lib.scheduler import AccountedUse, ShownJob, Slurm
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.verbs.report_json import report_dict
from slurm.lib.verbs.report_text import as_text
from tests.observed_runs import HERE, folder_of

OBSERVED = sorted(path.name for path in HERE.iterdir())
TRAINED = JobView("training", "12", Stage.ENDED, exit_code=0, end_time="2026-11-28T12:00:00+00:00", has_log=True)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recorded logs are those of nodes in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    local_epoch.cache_clear()
    yield
    monkeypatch.undo()
    time.tzset()
    local_epoch.cache_clear()


def report_of(folder: Path, **words: ShownJob) -> RunReport:
    """The report of a run of which Slurm knows no more than is said: ``j12=…`` of job 12."""
    known = {job[1:]: word for job, word in words.items()}
    view = with_logs(without_logs(read_record(CoordinationDir(folder)), known))
    return read_report(view, Slurm({"PATH": "/nonexistent"}), SignalNotes())


def training(report: RunReport, attempt: int = 0) -> JobReport:
    found = report.attempts[attempt].job("training")
    assert found
    return found


def lengths(found: tuple[Span, ...]) -> dict[str, float]:
    return {span.words: span.seconds(0) for span in found}


# --- steps ------------------------------------------------------------------------------------------------------------

VERL = (
    "(TaskRunner pid=1) step:7 - actor/entropy:0.1 - critic/score/mean:np.float64(0.25) - critic/score/max:1.0"
    " - timing_s/start_profile:3e-06 - timing_s/generate_sequences:9.0 - timing_s/gen:10.0 - timing_s/reward:5.5"
    " - timing_s/agent_loop/tool_calls/max:8.1 - timing_s/update_actor:np.float32(2.0) - timing_s/step:20.0"
    " - timing_per_token_ms/gen:0.8 - perf/time_per_step:20.0"
)


def test_a_step_of_verl() -> None:
    step = step_in(VERL)
    assert step
    assert (step.number, step.seconds, step.reward) == (7, 20.0, 0.25)
    assert dict(step.parts) == {"gen": 10.0, "reward": 5.5, "update_actor": 2.0}, "timers inside of others are no parts"
    assert dict(part_shares([step])) == {"gen": 0.5, "reward": 0.275, "update_actor": 0.1, "other": 0.125}


@pytest.mark.parametrize(
    "line",
    [
        "step:0 - val-core/gsm8k/acc/mean@1:0.5",
        "step:4 - val-aux/x/reward/mean@1:0.5 - val-core/x/acc/mean@1:0.5",  # before the first step after a restart
        "the step: 4 - 5",
        "footstep 3/5x",
        "Training Progress:   8%|▊         | 1/12 [00:01<00:13,  1.24s/it]",
        "step 99999999999/5",
        "",
    ],
)
def test_what_is_no_step(line: str) -> None:
    assert step_in(line) is None


@pytest.mark.parametrize(
    ("line", "number", "of", "reward"),
    [
        ("2026-11-28 19:04:15 [INFO] Step 5/40: mean reward 0.027, 2 % solved.", 5, 40, 0.027),
        ("step 12 of 300, reward: -1.5e-1", 12, 300, -0.15),
        ("step 3/5", 3, 5, None),
        ("step 3/5 reward=1e999", 3, 5, None),
    ],
)
def test_a_step_of_another_trainer(line: str, number: int, of: int, reward: float | None) -> None:
    assert step_in(line) == Step(number, of, reward=reward)


def test_a_verl_that_prints_no_numbers_has_steps_all_the_same() -> None:
    assert step_in("step:3 - actor/loss:nan - timing_s/step:nan - critic/score/mean:nan") == Step(3)
    assert step_in("step:3 - critic/score/mean:1e999 - timing_s/step:-4") == Step(3)


def test_lengths_from_times_of_day() -> None:
    told = [Step(1, at=100.0), Step(5, at=108.0), Step(10, at=128.0), Step(9, at=130.0), Step(11, at=90.0)]
    steps = with_lengths(told)
    assert [(step.seconds, step.stands_for) for step in steps] == [(None, 1), (2.0, 4), (4.0, 5), (None, 1), (None, 1)]
    assert steps[2].begin == 108.0
    assert with_lengths([Step(1, at=0.0), Step(10**9, at=1.0)])[1].seconds is None, "no line stands for so many"


def test_steps_without_a_time_of_day_follow_each_other_back_from_the_end() -> None:
    steps = placed([Step(1, seconds=10.0), Step(2, seconds=5.0)], 0.0, 100.0)
    assert [(step.at, step.is_about) for step in steps] == [(95.0, True), (100.0, True)]
    assert placed([Step(1, seconds=10.0)], 97.0, 100.0)[0].at == 107.0, "not before what is known to be before"
    for unknown in (placed([Step(1)], 0.0, 100.0), placed([Step(1, seconds=3.0)], 0.0, None)):
        assert unknown[0].at is None


def test_steps_of_attempts() -> None:
    first, second = [Step(1, seconds=1.0), Step(2, seconds=1.0)], [Step(2, seconds=9.0), Step(3, seconds=1.0)]
    assert [(step.number, step.seconds) for step in merged([first, second])] == [(1, 1.0), (2, 9.0), (3, 1.0)]
    assert done_again([first, second, second]) == 3


def test_what_lengths_say_together() -> None:
    steps = [Step(number, seconds=float(number)) for number in range(1, 101)]
    times = step_times(steps)
    assert times
    assert (times.count, times.median, times.p90) == (100, 50.5, 90.0)
    assert (times.slowest, times.slowest_step, times.total) == (100.0, 100, 5050.0)
    assert times.trend == 96 / 6 - 1, "the first step warms up, and is left out"
    assert step_times([Step(1)]) is None
    few = step_times(steps[:5])
    assert few and few.trend is None
    sparse = step_times([Step(5, seconds=2.0, stands_for=5), Step(6, seconds=8.0)])
    assert sparse and (sparse.count, sparse.median, sparse.total) == (6, 2.0, 18.0)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=60))
def test_quantiles_are_lengths_of_steps_in_order(seconds: list[float]) -> None:
    times = step_times([Step(at, seconds=value) for at, value in enumerate(seconds, 1)])
    assert times
    assert min(seconds) <= times.median <= times.slowest == max(seconds)
    assert times.p90 in seconds
    assert sum(value <= times.p90 for value in seconds) >= 0.9 * len(seconds)


def test_rewards() -> None:
    found = rewards([Step(1, reward=0.5), Step(2), Step(3, reward=0.9), Step(4, reward=0.7)])
    assert found and (found.first, found.last, found.best, found.best_step) == (0.5, 0.7, 0.9, 3)
    assert rewards([Step(1)]) is None


# --- when what was done -----------------------------------------------------------------------------------------------


def test_spans_of_a_training() -> None:
    marks = [Mark(0.0, "checking its node"), Mark(2.0, "trainer started"), Mark(30.0, "ended")]
    steps = (Step(1, seconds=4.0, at=14.0), Step(2, seconds=4.0, at=18.0))
    found = spans(marks, steps, 31.0, goes_on=False)
    assert found == (
        Span("checking its node", 0.0, 2.0),
        Span("trainer started", 2.0, 10.0),
        Span(TRAINING, 10.0, 31.0),  # the log tells whole seconds, and so does the flag, which came after
    )
    assert spans([Mark(31.0, "ended")], (), 31.0, goes_on=False) == ()
    assert spans(marks[:2], steps, None, goes_on=True)[-1] == Span(TRAINING, 10.0, None), "it goes on"
    assert spans(marks[:2], (), None, goes_on=False)[-1] == Span("trainer started", 2.0, 2.0), "nobody said its end"
    assert spans((), (), None, goes_on=False) == ()


def test_marks_of_one_second_stay_in_their_order() -> None:
    marks = [Mark(5.0, "serving"), Mark(5.0, "stopping"), Mark(5.0, "ended")]
    assert [span.words for span in spans(marks, (), 5.0, goes_on=False)] == ["serving", "stopping"]
    steps = (Step(1, seconds=0.0, at=5.0),)
    marks = [Mark(5.0, "trainer started"), Mark(5.0, "stopping the trainer"), Mark(5.0, "ended")]
    assert [span.words for span in spans(marks, steps, 5.0, goes_on=False)] == [
        "trainer started",
        TRAINING,
        "stopping the trainer",
    ]


def test_a_node_in_another_time_zone() -> None:
    """Its log says 07:00, its flag 12:00 UTC."""
    marks = (Mark(local_epoch("2026-11-28 06:00:00") or 0, "checking its node"), Mark(_at("07:00:01"), "ended"))
    assert zone_shift(marks, utc_epoch("2026-11-28T12:00:00+00:00")) == 5 * 3600
    log = JobLog(marks, (Step(1, seconds=60.0, at=_at("07:00:00")),))
    made = job_report(TRAINED, log, _at("10:50:00"))
    assert made.started == _at("11:00:00")
    assert made.queue_s(0) == 600
    assert first_step_at_of(made) == _at("11:59:00")
    assert zone_shift(marks[:1], 0.0) == 0.0
    assert zone_shift(marks, _at("12:00:00") + 86400 * 30) == 0.0, "that is no time zone"


def _at(clock: str) -> float:
    return datetime.fromisoformat(f"2026-11-28T{clock}+00:00").timestamp()


def first_step_at_of(job: JobReport) -> float | None:
    return next((span.begin for span in job.spans if span.words == TRAINING), None)


def test_a_submission_after_the_start_is_not_believed() -> None:
    log = JobLog((Mark(1000.0, "checking its node"),))
    view = replace(TRAINED, end_time="")
    assert job_report(view, log, 900.0).queue_s(0) == 100.0
    differs_a_little = job_report(view, log, 1010.0)
    assert differs_a_little.queue_s(0) == 0.0
    assert differs_a_little.spans == (Span(QUEUE, 1000.0, 1000.0), Span("checking its node", 1000.0, 1000.0))
    assert job_report(view, log, 9000.0).queue_s(0) is None
    assert job_report(view, log, None).queue_s(0) is None


def test_where_slurm_is_silent_nothing_is_taken_for_an_end() -> None:
    log = JobLog((Mark(1000.0, "checking its node"), Mark(1010.0, "trainer started")))
    silent = replace(TRAINED, stage=Stage.UNKNOWN, end_time="", exit_code=None)
    made = job_report(silent, log, 900.0)
    assert (made.ended, made.spans[-1]) == (None, Span("trainer started", 1010.0, None))
    told = job_report(replace(silent, end_time="1970-01-01T00:20:00+00:00"), log, 900.0)
    assert (told.ended, told.spans[-1].end) == (1200.0, 1200.0)
    gone = job_report(replace(silent, stage=Stage.ENDED), log, 900.0)
    assert (gone.ended, gone.spans[-1].end) == (1010.0, 1010.0), "the last that is known of it"
    killed = job_report(replace(gone.job, starts_at=999.0, elapsed_s=500.0), log, 900.0)
    assert (killed.ended, killed.spans[-1].end) == (1499.0, 1499.0), "by Slurm's word"


def test_a_pending_job_has_a_queue_time_that_grows(tmp_path: Path) -> None:
    folder = tmp_path / folder_of("het_withdrawn").name
    shutil.copytree(folder_of("het_withdrawn"), folder)
    data = json.loads((folder / "run.json").read_text())
    created = datetime.now(timezone.utc) - timedelta(seconds=500)
    (folder / "run.json").write_text(json.dumps({**data, "created": created.isoformat(timespec="seconds")}))
    pending = {f"j{one['id']}": ShownJob(one["id"], "", "PENDING", "Resources") for one in data["jobs"].values()}
    report = report_of(folder, **pending)
    assert report.view.state is RunState.PENDING
    waited = training(report).queue_s(report.now)
    assert waited is not None and 500 <= waited < 560
    assert training(report).spans == (Span(QUEUE, created.replace(microsecond=0).timestamp(), None),)
    text = as_text(report, 80)
    assert "8:2" in text and "so far  in the queue" in text
    assert not series.start_up_phases(report.attempts[0].jobs, report.now)


# --- logs -------------------------------------------------------------------------------------------------------------


def test_a_long_line_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "log"
    begin = "2026-11-28 12:00:00 [INFO] training job 12 on gpu-a, coordination directory /x\n"
    path.write_text(begin + "x" * (3 * LONGEST) + " step 4/5\n2026-11-28 12:00:09 [INFO] Step 2/5: x\n")
    log = read_job_log(path, "training")
    assert ([step.number for step in log.steps], log.node) == ([2], "gpu-a")


def test_a_log_of_many_steps_is_cut_and_says_so() -> None:
    lines = (f"step {number}/99999999" for number in range(1, MOST_STEPS + 10))
    log = scan("training", ["\n".join(lines).encode()])
    assert (len(log.steps), log.cut) == (MOST_STEPS, True)


def test_a_large_log_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        for _ in range(32):
            file.write(b"2026-11-28 12:00:00 [INFO] a line of a log that is long, and says nothing\n" * 10_000)
        file.write(b"2026-11-28 12:00:01 [INFO] Step 2/5: x\n")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        log = read_job_log(path, "training")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [step.number for step in log.steps] == [2]
    assert peak < 8 * BLOCK


def test_blocks_of_a_log_end_anywhere(tmp_path: Path) -> None:
    """The same is read, wherever a block ends: amid a line, a time or the words of a mark."""
    folder = folder_of("verl_completed")
    path = next(folder.glob("training_*.out"))
    whole = read_job_log(path, "training")
    lines = path.read_bytes().split(b"\n")
    for each in (1, 2, 7, 100):
        blocks = [b"\n".join(lines[at : at + each]) for at in range(0, len(lines), each)]
        assert scan("training", blocks, None) == whole
    longer = tmp_path / "log"
    for shift in range(0, 5000, 617):
        longer.write_bytes(b"x" * (BLOCK - shift) + b"\n" + path.read_bytes())
        assert read_job_log(longer, "training") == whole
    longer.write_bytes(b"x" * (3 * BLOCK) + b" step 4/5\n" + path.read_bytes())
    assert read_job_log(longer, "training") == whole


@pytest.mark.parametrize("kind", ["training", "runtime"])
def test_every_mark_is_found_by_its_words(kind: str) -> None:
    logs = [path.read_text() for path in HERE.glob(f"*/*/{kind}_*.out")]
    marked = {words: line for text in logs for line in text.splitlines() if (words := mark_in(kind, line))}
    for line in marked.values():
        assert any(words in line for words in mark_words(kind)), line
    assert len(marked) >= len(mark_words(kind)) - 2


def test_a_signal_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x\n" * BLOCK)
    notes = SignalNotes()
    notes.note(signal.SIGINT)
    with pytest.raises(Interrupted):
        read_job_log(path, "training", notes.check)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError):
        read_job_log(tmp_path / "log", "training")


LINES = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.sampled_from(
            [
                b"2026-11-28 12:00:00 [INFO] training job 1 on a, x",
                b"2026-13-45 99:00:00 [INFO] starting Ray on x",
                b"20\xff\xfe [INFO] Step 1/2",
                VERL.encode(),
                b"2026-11-28 12:00:09 [INFO] Step 2/5: mean reward nan",
                b"2026-11-28 12:00:00 [INFO] training job 1 ends with exit code 1: x",
            ]
        ),
    ),
    max_size=12,
)


@settings(deadline=None)  # the machine may be busy
@given(
    LINES,
    st.integers(0, 12),
    st.sampled_from(["training", "runtime"]),
    st.sampled_from(["", "2026-11-28T12:00:00+00:00", "x"]),
)
def test_no_log_is_an_error(lines: list[bytes], at: int, kind: str, ended: str) -> None:
    log = scan(kind, [b"\n".join(lines[:at]), b"\n".join(lines[at:])], 1795867300.0)
    made = job_report(replace(TRAINED, kind=kind, end_time=ended), log, 1795867100.0)
    for span in made.spans:
        assert span.end is None or span.end >= span.begin or made.ended is not None
        assert span.seconds(made.started or 0.0) >= 0
    assert all(step.seconds is None or math.isfinite(step.seconds) for step in made.steps)


# --- real runs --------------------------------------------------------------------------------------------------------


def test_the_rl_loop() -> None:
    report = report_of(folder_of("local_completed"))
    job = training(report)
    assert (report.launched, report.finished) == (_on_28("19:04:07"), _on_28("19:04:55"))
    assert (len(job.steps), job.steps[-1].of, job.job.node) == (9, 40, "login1")
    times = step_times(report.steps)
    assert times and (times.count, times.total, times.median) == (39, 40.0, 1.0)
    assert lengths(job.spans)["evaluating the untrained policy"] == 2
    assert first_step_at(report) == _on_28("19:04:10")
    earned = rewards(report.steps)
    assert earned and (earned.first, earned.last) == (0.016, 1.0)


def test_verl() -> None:
    report = report_of(folder_of("verl_completed"))
    job = training(report)
    text = next(folder_of("verl_completed").glob("training_*.out")).read_text()
    told = [line for line in text.splitlines() if " step:" in line]
    assert [step.number for step in job.steps] == list(range(1, 21)) and len(told) == 20
    for line, step in zip(told, job.steps, strict=True):
        assert f"timing_s/step:{step.seconds}" in line
        assert f"critic/score/mean:{step.reward}" in line
    total = sum(step.seconds or 0 for step in job.steps)
    assert job.spans[-1].is_about and job.spans[-1].words == TRAINING
    assert job.spans[-1].seconds(0) == pytest.approx(total, abs=3)
    assert [span.words for span in start_up(job)][-2:] == ["trainer started", "Ray is up, loading model and data"]
    shares = dict(part_shares(job.steps))
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]) == "reward", "here the sandboxes are what takes the time"


def test_all_attempts_of_a_run() -> None:
    report = report_of(folder_of("chained"))
    assert [attempt.number for attempt in report.attempts] == [1, 2, 3]
    first, second, third = (training(report, at) for at in range(3))
    assert (first.queue_s(0), lengths(first.spans)["saving before the time limit"]) == (6, 4)
    assert second.queue_s(0) == 75, "it was in the queue while the first one ran"
    assert third.spans == ()
    text = as_text(report, None)
    assert "Attempt 3\n              did not begin (jobs 291, 290)\n" in text
    assert first.job.end_reason in text


def _on_28(clock: str) -> float:
    return _at(clock)


@pytest.mark.parametrize("name", OBSERVED)
def test_every_run_that_was_seen_has_a_report(name: str) -> None:
    report = report_of(folder_of(name))
    assert report.problems == ()
    told = json.loads(json.dumps(report_dict(report), allow_nan=False))
    assert told["schema"] == 1 and told["run"]["run"] == folder_of(name).name
    for width in (40, 80, 200):
        for line in as_text(report, width).splitlines():
            assert len(line) <= width or len(line.split()) <= 2 or " " * 10 in line, (width, line)
    assert report.view.state.value in as_text(report, None).splitlines()[0]


def test_half_a_directory_has_a_report_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / folder_of("verl_completed").name
    shutil.copytree(folder_of("verl_completed"), folder)
    (folder / "run.json").write_text('{"jobs": {"runtime"')
    next(folder.glob("training_*.out")).unlink()
    next(folder.glob("runtime_*.err")).unlink()
    report = report_of(folder)
    assert "run.json holds no JSON" in report.problems
    assert report.launched == report.jobs[-1].started
    text = as_text(report, 80)
    assert "not known   run.json holds no JSON" in text
    next(folder.glob("runtime_*.out")).unlink()
    (folder / "training_complete.flag").unlink()
    assert "not known" in as_text(report_of(folder), 80)


def test_a_log_that_may_not_be_read_is_a_problem_and_no_error(tmp_path: Path) -> None:
    folder = tmp_path / folder_of("failed").name
    shutil.copytree(folder_of("failed"), folder)
    log = next(folder.glob("training_*.out"))
    log.unlink()
    os.mkfifo(log)
    report = report_of(folder)
    assert report.problems == (f"{log.name}: it is no regular file",)
    assert f"not known   {log.name}" in as_text(report, None)


@pytest.mark.parametrize(
    ("word", "what"),
    [
        (ShownJob("12", "x", "PENDING", "Resources"), "job 12: PENDING (Resources)"),
        (ShownJob("12", "x", "RUNNING", starts_at=1796000000.0, elapsed_s=60.0), "unknown  in the queue"),
        (SILENT, "job 12: unknown: Slurm does not answer"),
        (None, "did not begin (jobs 12)"),
    ],
)
def test_a_job_without_a_directory(word: Word, what: str) -> None:
    view = with_logs(without_logs(record_of(FoundRun("12", None, RunJob("training", "12"))), {"12": word}))
    report = read_report(view, Slurm({"PATH": "/nonexistent"}), SignalNotes())
    text = as_text(report, None)
    assert what in text
    assert "not known   it has no run directory yet" in text
    assert json.loads(json.dumps(report_dict(report), allow_nan=False))["launched"] == report.launched


# --- what was measured ------------------------------------------------------------------------------------------------


def sample(at: float, cpu_s: float, gib: float, busy: float | None = None) -> str:
    gpus = [] if busy is None else [{"index": 0, "busy_percent": busy, "used_mib": 1024, "total_mib": 2048}]
    told = {"schema": 1, "at": at, "node": "a", "cpus": 4, "cpu_s": cpu_s, "memory_bytes": gib * 2**30}
    return json.dumps({**told, "memory_limit_bytes": 8 * 2**30, "gpus": gpus})


def test_own_samples_and_accounting_each_with_its_name() -> None:
    job = JobReport(TRAINED)
    samples = "\n".join([sample(0, 0, 1, 0), sample(30, 60, 2, 100)])
    measured = with_measurements(job, samples, Unknown("x"))
    assert use_lines(measured) == [
        ("CPU", "50 % of 4 CPUs", "own samples"),
        ("memory", "2.0 GiB of 8.0 GiB, 25 % at the peak", "own samples"),
        ("GPU", "50 % of 1 GPUs busy", "own samples"),
        ("GPU memory", "1.0 GiB of 2.0 GiB at the peak, of the fullest card", "own samples"),
    ]
    rows = [AccountedUse("12", elapsed_s=100.0, cpu_s=100.0, cpus=4, memory_bytes=4 * 2**30)]
    both = with_accounting(measured, rows)
    assert use_lines(both)[:2] == [
        ("CPU", "25 % of 4 CPUs", "Slurm's accounting"),
        ("memory", "2.0 GiB of 8.0 GiB, 25 % at the peak", "own samples"),
    ]
    running = replace(measured, job=replace(TRAINED, stage=Stage.RUNNING))
    assert with_accounting(running, rows) == running, "accounting knows the use of what has ended"
    assert with_accounting(measured, []) == measured
    assert figure([Usage("sacct")], lambda usage: usage.cpu_share) is None
    assert use_lines(job) == []


def test_the_statistics_of_a_server() -> None:
    job = JobReport(replace(TRAINED, kind="runtime"))
    told = {"schema": 1, "at": 5.0, "starts": {"asked": 3, "succeeded": 2, "failed": {"no such image": 1}}}
    found = with_measurements(job, Unknown("x"), json.dumps(told)).sandboxes
    assert isinstance(found, SandboxStatistics) and found.starts.asked == 3
    for text in ("", "{", "[]", '{"schema": 9}'):
        damaged = with_measurements(job, "x\n{}", text)
        assert isinstance(damaged.sandboxes, Unknown) and damaged.usages == ()


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_thinned_points_keep_the_mean_and_the_longest() -> None:
    steps = [Step(at, seconds=1.0 + (at == 777), reward=float(at % 2)) for at in range(1, 10_001)]
    bars, curve = series.step_bars(steps), series.reward_curve(steps)
    assert bars and curve
    assert len(bars.numbers) <= series.MOST_POINTS and len(curve.x) <= series.MOST_POINTS
    assert max(bars.highest) == 2.0
    assert (min(curve.low), max(curve.high), curve.per_point) == (0.0, 1.0, 25)
    assert sum(curve.mean) / len(curve.mean) == pytest.approx(0.5, abs=0.02)


def test_parts_and_the_rest_add_up_to_the_step() -> None:
    steps = [Step(at, seconds=10.0, parts=(("gen", 6.0), ("adv", 0.01), ("reward", 2.0))) for at in range(1, 4)]
    bars = series.step_bars(steps)
    assert bars
    assert [name for name, _values in bars.parts] == ["gen", "reward", "other"], "what is too thin to see is other"
    assert [sum(values[at] for _name, values in bars.parts) for at in range(3)] == [10.0] * 3


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.integers(0, 145), min_size=1, max_size=300).map(sorted),
)
def test_no_start_is_lost_in_the_bins(places: list[int]) -> None:
    bounds = [round(0.001 * 1.1**place, 6) for place in places]
    pairs = tuple((bound, sum(one <= bound for one in bounds)) for bound in sorted(set(bounds)))
    bins = series.start_bins([Seconds(buckets=pairs)])
    assert sum(count for _low, _high, count in bins) == len(bounds)
    assert len(bins) <= series.MOST_BINS
    for low, high, count in bins:
        inside = sum(low * 1.001 < bound <= high * 1.001 for bound in bounds)
        assert inside == count
    assert series.start_bins([]) == ()


@settings(deadline=None)  # the machine may be busy
@given(st.floats(1e-3, 1e3), st.floats(1.01, 1e4))
def test_ticks_lie_on_the_axis(low: float, times: float) -> None:
    ticks = series.round_ticks(low, low * times)
    assert all(low <= tick <= low * times for tick in ticks)
    assert len(ticks) <= 20


def test_a_row_for_each_job_and_the_wait_for_gpus() -> None:
    report = report_of(folder_of("too_late"))
    rows = {row.label: row for row in series.timeline(report)}
    assert set(rows) == {"runtime", "training"}
    assert [bar.category for bar in rows["training"].bars] == [series.QUEUED]
    assert rows["training"].bars[0].seconds == pytest.approx(22, abs=1)
    categories = [bar.category for bar in rows["runtime"].bars]
    assert categories == [series.QUEUED, series.STARTING, series.SERVING, series.STOPPING], "phases of one kind are one"


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "unknown"), (0.0, "0.00 s"), (0.0042, "0.004 s"), (0.5, "0.50 s"), (59.9, "59.9 s"), (61.0, "1:01")],
)
def test_lengths_in_words(seconds: float | None, words: str) -> None:
    assert length(seconds) == words


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 60))
def test_a_sparkline_is_as_wide_as_there_is_room(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == (min(width, len(values)) if len(values) > 1 else 0)
    if len(values) > 1 and max(values) - min(values) > 1e-3 and len(values) <= width:
        assert {"▁", "█"} <= set(line)


def test_a_reason_is_said_once() -> None:
    report = report_of(folder_of("failed"))
    text = as_text(report, None)
    assert text.count("the trainer failed with exit code 7") == 1
    (attempt,) = report.attempts
    assert [heading(report, job) for job in attempt.jobs] == [
        "job 75 on gpu-a: ended with exit code 7",
        "job 74 on cpu-a: ended with exit code 0",
    ]
