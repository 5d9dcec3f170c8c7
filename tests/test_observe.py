"""What commands that look at runs make of run directories, of Slurm's words and of logs; the runs in them are real."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.observe import gpus, sandboxes
from slurm.lib.observe.phase import Phase, last_error, phase_of
from slurm.lib.observe.record import Pair, RunRecord, read_record
from slurm.lib.observe.run_files import WINDOW, LogEnds, log_ends, printable, read_small
from slurm.lib.observe.run_view import JobView, RunState, RunView, Stage, Word
from slurm.lib.observe.sandboxes import Sandboxes, parse_metrics
from slurm.lib.observe.survey import SILENT, Survey, with_logs, without_logs
from slurm.lib.observe.unknown import Unknown
from slurm.lib.runs import FoundRun, RunJob
from slurm.lib.scheduler import (
    JobState,
    ShownJob,
    Slurm,
    clock_s,
    parse_accounted,
    parse_config_time,
    parse_exit_code,
    parse_shown,
)
from tests.fake_slurm import FakeSlurm
from tests.observed_runs import folder_of

RUNNING = ShownJob("1", "skyrl-train", "RUNNING", node="gpu-a", elapsed_s=60.0, limit_s=1200.0)


def seen(record: RunRecord, words: Mapping[str, Word]) -> RunView:
    return with_logs(without_logs(record, words))


def record_named(name: str) -> RunRecord:
    return read_record(CoordinationDir(folder_of(name)))


def view_of(name: str, **words: Word) -> RunView:
    """The recorded run, of whose jobs Slurm knows no more than is said here: ``j12=…`` of job 12."""
    return seen(record_named(name), {job[1:]: word for job, word in words.items()})


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "attempt", "exit_code", "phase"),
    [
        ("local_completed", RunState.COMPLETED, 1, 0, "ended (after step 40 of 40)"),
        ("het_completed", RunState.COMPLETED, 1, 0, "ended (after step 2 of 2)"),
        ("verl_chained", RunState.COMPLETED, 2, 0, "ended (after step 12 of 12)"),
        ("chained", RunState.COMPLETED, 2, 0, "ended"),
        ("requeued", RunState.COMPLETED, 2, 0, "ended"),
        ("joined", RunState.COMPLETED, 1, 0, "ended"),
        ("failed", RunState.FAILED, 1, 7, "ended"),
        ("node_lost", RunState.INTERRUPTED, 1, 74, "ended"),
        ("cancelled", RunState.CANCELLED, 1, 143, "ended"),
        ("runtime_failed", RunState.FAILED, 1, 69, "ended"),
        ("too_late", RunState.FAILED, 1, 69, "ended"),
        ("body_killed", RunState.ENDED, 1, None, "ended"),  # nobody could say more
    ],
)
def test_how_a_run_ended(name: str, state: RunState, attempt: int, exit_code: int | None, phase: str) -> None:
    view = view_of(name)
    assert view.pair
    assert (view.state, view.pair.attempt, view.pair.lead.exit_code) == (state, attempt, exit_code)
    assert (view.phase.why if isinstance(view.phase, Unknown) else str(view.phase)) == phase
    assert view.pair.lead.kind == "training"
    assert view.state.is_over
    assert not view.lives
    assert not view.record.problems


def test_an_end_that_the_body_could_not_tell_is_slurms() -> None:
    killed = view_of("body_killed", j207=ShownJob("207", "skyrl-train", "FAILED", "NonZeroExitCode", exit_code=137))
    assert killed.pair
    assert (killed.state, killed.pair.lead.exit_code) == (RunState.FAILED, 137)
    assert killed.pair.lead.end_reason == "Slurm says FAILED (NonZeroExitCode)"


def test_silence_is_no_end() -> None:
    silent = seen(record_named("het_withdrawn"), {"219": SILENT, "220": SILENT})
    assert silent.state is RunState.UNKNOWN
    assert silent.lives
    assert silent.phase == Unknown("Slurm does not answer")
    # What a job has said of itself stands all the same.
    assert seen(record_named("failed"), {"74": SILENT, "75": SILENT}).state is RunState.FAILED


def test_the_attempt_that_counts_and_the_one_that_follows() -> None:
    record = record_named("chained")
    assert [(pair.attempt, [job.job_id for job in pair.jobs]) for pair in record.pairs] == [
        (1, ["234", "233"]),
        (2, ["242", "241"]),
        (3, ["291", "290"]),
    ]
    assert record.attempts == 3
    before = replace(record, completion=None, pairs=tuple(_without_ends(record)))
    pending = {name: ShownJob(name, "skyrl-train", "PENDING", "Dependency") for name in ("242", "241")}
    view = seen(before, {"234": RUNNING, "233": RUNNING, **pending, "290": None, "291": None})
    assert view.pair and view.following
    assert (view.state, view.pair.attempt, view.following.attempt) == (RunState.RUNNING, 1, 2)
    # Between two attempts: the first has ended, the second waits in the queue.
    flag = Flag("234", "233", exit_code=75, ended="interrupted")
    waits = replace(record, completion=flag, pairs=(record.pairs[0], *_without_ends(record)[1:]))
    between = seen(waits, {**pending, "290": None, "291": None})
    assert between.pair
    assert (between.state, between.pair.attempt) == (RunState.PENDING, 2)
    assert between.lives


def _without_ends(record: RunRecord) -> list[Pair]:
    return [replace(pair, jobs=tuple(replace(job, end=None) for job in pair.jobs)) for pair in record.pairs]


def test_a_pair_that_was_queued_again_is_the_same_attempt() -> None:
    found = [(pair.attempt, pair.jobs[0].job_id) for pair in record_named("requeued").pairs]
    assert found == [(1, "157"), (2, "159"), (2, "185")]


def test_a_pair_that_was_queued_again_and_has_not_begun(tmp_path: Path) -> None:
    folder = tmp_path / folder_of("requeued").name
    shutil.copytree(folder_of("requeued"), folder)
    (folder / "attempt_2.json").unlink()  # its training writes it
    found = [(pair.attempt, pair.jobs[0].job_id) for pair in read_record(CoordinationDir(folder)).pairs]
    assert found == [(1, "157"), (2, "159"), (2, "185")]


def test_a_partners_word_does_not_end_a_job_that_slurm_sees() -> None:
    living = view_of("too_late", j177=replace(RUNNING, job_id="177"))
    assert living.pair
    assert (living.pair.lead.stage, living.pair.lead.exit_code) == (Stage.RUNNING, None)
    gone = view_of("too_late", j177=None)
    assert gone.pair
    assert (gone.pair.lead.stage, gone.pair.lead.exit_code) == (Stage.ENDED, 69)


def test_a_training_that_joined_goes_with_the_runtime_that_was_there() -> None:
    (pair,) = record_named("joined").pairs
    assert [(job.kind, job.job_id) for job in pair.jobs] == [("training", "133"), ("runtime", "131")]


@pytest.mark.parametrize(
    ("training", "runtime", "ready", "state"),
    [
        ("PENDING", "PENDING", False, RunState.PENDING),
        ("PENDING", "RUNNING", False, RunState.STARTING),
        ("PENDING", "RUNNING", True, RunState.WAITING),
        ("RUNNING", "RUNNING", True, RunState.RUNNING),
        ("COMPLETED", "RUNNING", True, RunState.ENDING),
        ("CANCELLED", "CANCELLED", False, RunState.CANCELLED),
        ("TIMEOUT", "COMPLETED", True, RunState.INTERRUPTED),
        ("OUT_OF_MEMORY", "COMPLETED", True, RunState.FAILED),
        ("A_NEW_WORD", "RUNNING", True, RunState.UNKNOWN),
    ],
)
def test_the_state_of_a_run_that_slurm_knows(training: str, runtime: str, ready: bool, state: RunState) -> None:
    record = record_named("het_withdrawn")
    record = replace(record, ready=Flag("220", "220") if ready else None)
    words: dict[str, Word] = {"219": ShownJob("219", "", training), "220": ShownJob("220", "", runtime)}
    assert seen(record, words).state is state


def test_a_ready_flag_of_an_earlier_attempt_does_not_count() -> None:
    record = replace(record_named("het_withdrawn"), ready=Flag("1", "1"))
    words: dict[str, Word] = {"219": ShownJob("219", "", "PENDING"), "220": ShownJob("220", "", "RUNNING")}
    assert seen(record, words).state is RunState.STARTING


def test_a_job_id_that_is_another_users_by_now_is_not_believed() -> None:
    record = replace(record_named("het_withdrawn"), user="alice")
    foreign = {name: replace(RUNNING, job_id=name, user="bob") for name in ("219", "220")}
    own = {name: replace(RUNNING, job_id=name, user="alice") for name in ("219", "220")}
    assert seen(record, foreign).state is RunState.ENDED
    assert seen(record, own).state is RunState.RUNNING


# --- what is asked of Slurm -------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def found(*names: str) -> list[FoundRun]:
    return [FoundRun(name, CoordinationDir(folder_of(name))) for name in names]


def test_slurm_is_asked_once_for_all_runs_and_not_for_what_is_known(slurm: FakeSlurm) -> None:
    runs = {"stdout": "219|RUNNING|None|gpu-a|gpu_test|user|1795890000|1:00|20:00|skyrl-train\n"}
    slurm.answer("squeue", runs, runs)
    survey = Survey(Slurm({"PATH": slurm.path}))
    views = survey.look(found("het_withdrawn", "body_killed", "failed", "cancelled"))
    assert [view.state for view in views][:1] == [RunState.RUNNING]
    (asked,) = [call for call in slurm.everything if call.name == "squeue"]
    ids = asked.argv[asked.argv.index("-j") + 1].split(",")
    assert set(ids) == {"219", "220", "207", "282", "283"}  # not those that have said how they ended
    assert [call.name for call in slurm.everything].count("sacct") == 1
    survey.look(found("het_withdrawn", "body_killed"))
    assert [call.name for call in slurm.everything].count("sacct") == 1, "what accounting said is not asked again"


def test_a_job_that_a_restarted_controller_does_not_know_yet(slurm: FakeSlurm) -> None:
    line = "{}|RUNNING|None|gpu-a|gpu_test|user|1795890000|1:00|20:00|skyrl-train\n"
    slurm.answer("squeue", {}, {"stdout": line.format(219) + line.format(220)})
    survey = Survey(Slurm({"PATH": slurm.path}))
    states = [survey.look(found("het_withdrawn"))[0].state for _ in range(2)]
    assert states == [RunState.ENDED, RunState.RUNNING]


def test_accounting_tells_of_jobs_that_the_queue_has_forgotten(slurm: FakeSlurm) -> None:
    line = "207|207|NODE_FAIL|gpu-a|gpu_test|user|1795890000|00:01:00|00:20:00|0:0|skyrl-train\n"
    slurm.answer("sacct", {"stdout": line})
    (view,) = Survey(Slurm({"PATH": slurm.path})).look(found("body_killed"))
    assert view.state is RunState.INTERRUPTED
    (asked,) = [call for call in slurm.everything if call.name == "sacct"]
    assert "--jobs=207" in asked.argv
    day_before = (datetime.fromisoformat("2026-11-27T18:36:33+00:00")).astimezone().replace(tzinfo=None)
    assert f"--starttime={day_before.isoformat()}" in asked.argv, "a job that had this id before is another"


@pytest.mark.parametrize(
    "answer",
    [
        {"code": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"},
        {"code": 1, "stderr": "slurm_load_jobs error: Socket timed out on send/recv operation\n"},
        {"code": 1, "stderr": "a word never seen\n"},
    ],
)
def test_a_silent_controller(answer: dict[str, object], slurm: FakeSlurm) -> None:
    slurm.answer("squeue", answer)
    survey = Survey(Slurm({"PATH": slurm.path}))
    (view,) = survey.look(found("het_withdrawn"))
    assert view.phase == SILENT
    assert not survey.heard
    assert not [call for call in slurm.everything if call.name == "sacct"]


def test_a_machine_without_slurm_says_so() -> None:
    (view,) = Survey(Slurm({"PATH": "/nonexistent"})).look(found("het_withdrawn"))
    assert view.phase == Unknown("this host has no Slurm commands (squeue)")


def test_local_processes_are_known_on_their_host_alone() -> None:
    record = record_named("local_completed")
    record = replace(record, completion=None, pairs=tuple(_without_ends(record)))
    run = FoundRun("x", record.directory)
    (view,) = Survey(Slurm({"PATH": "/nonexistent"})).look([run])
    assert view.state is RunState.COMPLETED  # by its own words, wherever it is looked at
    from slurm.lib.observe import survey

    words = survey._local_words(record, [job for pair in record.pairs for job in pair.jobs])
    elsewhere = Unknown("it is a local run on login1, and its processes are known only there")
    assert words == {"local9351.1": elsewhere, "local9351.0": elsewhere}
    assert seen(record, words).state is RunState.UNKNOWN


def test_a_job_without_a_directory_yet(slurm: FakeSlurm) -> None:
    slurm.answer("squeue", {"stdout": "7|PENDING|Resources|||user|N/A|0:00|20:00|skyrl-runtime\n"})
    (view,) = Survey(Slurm({"PATH": slurm.path})).look([FoundRun("7", None, RunJob("runtime", "7"))])
    assert (view.record.name, view.state) == ("7", RunState.PENDING)


# --- what Slurm prints ------------------------------------------------------------------------------------------------


def test_lines_of_squeue() -> None:
    text = (
        "12|PENDING|Resources||gpu|ann|1795890000|0:00|1-00:00:00|skyrl-train\n"
        "11|RUNNING|None|cpu-a|cpu|ann|1795889000|1-02:03:04|UNLIMITED|skyrl|runtime\n"
        "noise\n"
    )
    shown = parse_shown(text)
    assert shown["12"] == ShownJob("12", "skyrl-train", "PENDING", "Resources", "", "gpu", "ann", 1795890000, 0, 86400)
    assert shown["11"].reason == ""
    assert shown["11"].elapsed_s == 93784
    assert shown["11"].state is JobState.RUNNING
    assert list(shown) == ["12", "11"]


def test_lines_of_sacct() -> None:
    shown = parse_accounted(
        "9|9|CANCELLED by 1000|None assigned|gpu|ann|Unknown|00:00:00|00:20:00|0:15|skyrl-train\n"
        "9.batch|9.batch|CANCELLED||||||||batch\n"
    )
    assert shown["9"].word == "CANCELLED"
    assert (shown["9"].node, shown["9"].starts_at, shown["9"].exit_code) == ("", None, 143)
    assert list(shown) == ["9"]


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 400 * 86400))
def test_a_time_is_read_as_slurm_prints_it(seconds: int) -> None:
    days, rest = divmod(seconds, 86400)
    hours, minutes, left = rest // 3600, rest // 60 % 60, rest % 60
    text = f"{days}-{hours:02}:{minutes:02}:{left:02}" if days else f"{hours}:{minutes:02}:{left:02}"
    assert clock_s(text if days or hours else f"{minutes}:{left:02}") == seconds


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=30))
def test_no_text_of_slurms_is_an_error(text: str) -> None:
    clock_s(text)
    parse_exit_code(text)
    parse_config_time(f"Configuration data as of {text}")
    parse_shown("|".join([text] * 10))
    parse_accounted("|".join(["1", *[text] * 10]))
    parse_shown("|".join([f"1 {text}", *[text] * 9]))


# --- logs -------------------------------------------------------------------------------------------------------------

STAMP = "2026-11-28 13:14:42 [INFO] "


@pytest.mark.parametrize(
    ("lines", "phase"),
    [
        ([], "starting"),
        ([f"{STAMP}training job 7 on gpu-a, coordination directory /x"], "checking its node"),
        ([f"{STAMP}waiting up to 600 s for the runtime in /x"], "waiting for its runtime"),
        ([f"{STAMP}starting Ray on gpu-a, gpu-b, with its head on the first"], "starting Ray"),
        ([f"{STAMP}starting the trainer in /x"], "trainer started"),
        (
            [f"{STAMP}starting the trainer in /x", "2026 INFO worker.py:2012 -- Started a local Ray instance."],
            "Ray is up, loading model and data",
        ),
        (["(TaskRunner pid=5) Total training steps: 300"], "starting"),
        (["(TaskRunner pid=5) Training Progress:   4%|▍         | 12/300 [00:01<00:18,  1.68s/it]"], "step 12 of 300"),
        (["(TaskRunner pid=5) Total training steps: 300", "(TaskRunner pid=5) step:12 - a/b:1"], "step 12 of 300"),
        (["(TaskRunner pid=5) step:12 - global_seqlen/min:83 - x:1"], "step 12"),
        ([f"{STAMP}Step 5/40: mean reward 0.027, 2 % solved."], "step 5 of 40"),
        (["epoch 1, step 7 of 90, loss 0.1"], "step 7 of 90"),
        (["(TaskRunner pid=5) Training Progress:   0%|          | 0/12 [00:00<?, ?it/s]"], "starting"),
        (
            ["step 7/9", f"{STAMP}the time limit comes in 44 s; it is stopped after its next checkpoint (now: none)"],
            "saving before the time limit (after step 7 of 9)",
        ),
        (["step 99999999999999999999/9"], "starting"),  # nobody's step
        (["step 7/9", f"{STAMP}starting the trainer in /x"], "trainer started"),  # of what came before
    ],
)
def test_the_phase_of_a_training(lines: list[str], phase: str) -> None:
    text = "\n".join(lines)
    assert str(phase_of("training", LogEnds(text, text, len(text)))) == phase


def test_the_phases_of_real_logs_come_in_order() -> None:
    out = next(folder_of("verl_chained").glob("training_406.out")).read_text()
    phases: list[str] = []
    for end in range(1, len(out.splitlines()) + 1):
        text = "\n".join(out.splitlines()[:end])
        phase = str(phase_of("training", LogEnds(text, text, len(text))))
        phases += [phase] if phases[-1:] != [phase] else []
    assert phases == [
        "checking its node",
        "waiting for its runtime",
        "preparing the trainer",
        "trainer started",
        "Ray is up, loading model and data",
        "step 1 of 12",
        "step 2 of 12",
        "step 3 of 12",
        "saving before the time limit (after step 3 of 12)",
        "saving before the time limit (after step 4 of 12)",
        "stopping the trainer (after step 4 of 12)",
        "ended (after step 4 of 12)",
    ]
    runtime = log_ends(next(folder_of("verl_chained").glob("runtime_405.out")))
    assert isinstance(runtime, LogEnds)
    assert phase_of("runtime", runtime) == Phase("ended")


def test_only_the_ends_of_a_long_log_are_read(tmp_path: Path) -> None:
    path = tmp_path / "training_1.out"
    with path.open("w") as file:
        file.write(f"{STAMP}starting the trainer in /x\n(TaskRunner pid=5) Total training steps: 300\n")
        file.write("(TaskRunner pid=5) step:1 - x:1\n" + "noise of the middle\n" * 100_000)
        file.write("(TaskRunner pid=5) step:288 - x:1\n" + "noise\n" * 100)
    ends = log_ends(path)
    assert isinstance(ends, LogEnds)
    assert len(ends.head) == len(ends.tail) == WINDOW
    assert ends.size == path.stat().st_size
    assert str(phase_of("training", ends)) == "step 288 of 300"


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=300), st.sampled_from(["training", "runtime"]))
def test_no_log_is_an_error(text: str, kind: str) -> None:
    log = LogEnds(text, text, len(text))
    phase_of(kind, log)
    assert "\x1b" not in last_error(log)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("2026-11-28 19:51:24 [WARN] limits that do NOT bite here", ""),
        ("2026-11-28 13:15:23 [ERROR] node gpu-b was\tlost; stopping", "node gpu-b was lost; stopping"),
        (
            "ValueError: x\n2026-11-28 13:15:23 [ERROR] training job 7 ends with exit code 1: the trainer",
            "ValueError: x",
        ),
        (
            "Traceback (most recent call last):\n  File x, line 1\n    f()\ntorch.cuda.OutOfMemoryError: no room\n",
            "torch.cuda.OutOfMemoryError: no room",
        ),
        (
            "(T pid=5) ray.exceptions.RayTaskError(ValueError): x\nlast",
            "(T pid=5) ray.exceptions.RayTaskError(ValueError): x",
        ),
        ("slurmstepd: error: Detected 1 oom_kill event", "slurmstepd: error: Detected 1 oom_kill event"),
        ("ValueError: \x1b[31mred\x1b[0m\x07", "ValueError: red"),
        ("DeprecationWarning: `ray.state` is private\nQwen2ForCausalLM contains 19 parameters", ""),
        ("bash: line 1: nonesuch: command not found", "bash: line 1: nonesuch: command not found"),
    ],
)
def test_the_last_error_of_a_log(lines: str, error: str) -> None:
    assert last_error(LogEnds(lines, lines, len(lines))) == error


# --- what is damaged --------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**30) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["jobs", "runtime", "training", "id", "ended", "exit_code", "settings", "RESTARTS", "successor"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(run=JUNK, attempt=JUNK, flag=JUNK)
def test_no_content_of_a_run_directory_is_an_error(run: object, attempt: object, flag: object, tmp_path: Path) -> None:
    for name, data in (("run.json", run), ("run_9.json", run), ("attempt_1.json", attempt)):
        (tmp_path / name).write_text(json.dumps(data))
    (tmp_path / "training_complete.flag").write_text(json.dumps(flag))
    (tmp_path / "training_12.out").write_text("step 1/2\n")
    record = read_record(CoordinationDir(tmp_path))
    view = seen(record, {})
    assert view.state in RunState
    assert all(job.job_id.replace(".", "").isalnum() for pair in record.pairs for job in pair.jobs)


@pytest.mark.parametrize("left_out", ["run.json", "run_241.json", "attempt_1.json", "training_complete.flag", "logs"])
def test_a_run_directory_with_a_part_missing_still_tells_the_rest(left_out: str, tmp_path: Path) -> None:
    folder = tmp_path / "20261128_194508_233"
    shutil.copytree(folder_of("chained"), folder)
    for path in folder.glob("*.out") if left_out == "logs" else [folder / left_out]:
        path.unlink()
    view = seen(read_record(CoordinationDir(folder)), {})
    assert view.pair
    assert view.state is (RunState.COMPLETED)
    assert view.record.problems == (("run.json is missing",) if left_out == "run.json" else ())


def test_without_any_record_the_logs_name_the_jobs(tmp_path: Path) -> None:
    for name in ("training_9.out", "training_12.out", "runtime_11.out", "training_x;y.out"):
        (tmp_path / name).touch()
    (pair,) = read_record(CoordinationDir(tmp_path)).pairs
    assert [(job.kind, job.job_id) for job in pair.jobs] == [("training", "12"), ("runtime", "11")]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    (tmp_path / "training_1.out").mkdir()
    record = read_record(CoordinationDir(tmp_path))
    assert record.problems == ("run.json: it is no regular file",)
    view = seen(record, {})
    assert view.pair
    assert view.pair.lead.stage is Stage.ENDED
    assert isinstance(read_small(tmp_path / "nonesuch"), Unknown)
    gone = read_record(CoordinationDir(tmp_path / "nonesuch"))
    assert gone.problems == (f"its directory cannot be read: {tmp_path}/nonesuch: No such file or directory",)
    assert seen(gone, {}).state is RunState.UNKNOWN


@settings(deadline=None)  # the machine may be busy
@given(st.text())
def test_nothing_printed_moves_the_cursor(text: str) -> None:
    shown = printable(text)
    assert not any(ord(char) < 32 and char not in "\t\n" for char in shown)
    shown.encode("utf-8", "surrogateescape")


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_the_lines_of_nvidia_smi() -> None:
    text = "gpu-b, 1, NVIDIA H100, 97, 61440, 81559\ngpu-a, 0, NVIDIA A100 MIG, [N/A], [N/A], 81559\nNo devices found\n"
    assert gpus.parse(text) == (
        gpus.Gpu("gpu-a", 0, "NVIDIA A100 MIG", None, None, 81559),
        gpus.Gpu("gpu-b", 1, "NVIDIA H100", 97, 61440, 81559),
    )
    assert gpus.parse("") == ()


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(max_size=12), max_size=7))
def test_no_word_of_nvidia_smi_is_an_error(cells: list[str]) -> None:
    for gpu in gpus.parse(",".join(cells)):
        assert gpu.index >= 0


# --- API servers ------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_server() -> None:
    text = (
        "# TYPE skyrl_sandboxes gauge\n"
        'skyrl_sandboxes{state="running"} 3.0\nskyrl_sandboxes{state="paused"} 1.0\n'
        "skyrl_slots_used 4.0\nskyrl_slots_total 7.0\nskyrl_starts_waiting 2.0\n"
    )
    assert parse_metrics(text) == Sandboxes(4, 4, 7, 2)
    assert parse_metrics("<html>another server</html>") is None


class Server(BaseHTTPRequestHandler):
    """Wants a key, below a prefix, and tells its figures."""

    def do_GET(self) -> None:
        status = 200 if self.headers.get("X-API-Key") == "right" else 401
        status = status if self.path == "/prefix/metrics" else 404
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"skyrl_sandboxes 3\nskyrl_slots_used 3\nskyrl_slots_total 8\nskyrl_starts_waiting 0\n")

    def log_message(self, *_words: object) -> None:
        pass


def test_a_server_is_asked_with_the_runs_key() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert sandboxes.ask(f"{url}/prefix", "right", 2.0) == Sandboxes(3, 3, 8, 0)
        refused = Unknown("its API server refuses the key in the run directory")
        assert sandboxes.ask(f"{url}/prefix", "wrong", 2.0) == refused
        assert sandboxes.ask(f"{url}/prefix", None, 2.0) == refused
        assert sandboxes.ask(url, "right", 2.0) == Unknown("its API server does not tell (GET /metrics)")
        strange = sandboxes.ask(f"{url}/prefix", "right\r\nX-Other: 1", 2.0)
        assert isinstance(strange, Unknown)
        server.shutdown()
    assert sandboxes.ask(url, "right", 2.0) == Unknown("its API server is not reachable from here")


def test_a_server_that_never_answers_has_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        found = sandboxes.ask(f"http://127.0.0.1:{silent.getsockname()[1]}", "key", 0.3)
    assert found == Unknown("its API server is not reachable from here")
    assert time.monotonic() - begin < 2


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=30), st.text(max_size=10))
def test_no_address_is_an_error(url: str, key: str) -> None:
    assert isinstance(sandboxes.ask(url, key, 0.1), Unknown)


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=200))
def test_no_answer_of_a_server_is_an_error(text: str) -> None:
    parse_metrics(text)
    parse_metrics(f"skyrl_slots_used {text}\nskyrl_slots_total 1e999\n")


# --- sandboxes that did not start -------------------------------------------------------------------------------------


def test_sandboxes_that_did_not_start_are_seen_with_the_last_ones_reason(tmp_path: Path) -> None:
    directory = CoordinationDir(shutil.copytree(folder_of("failed"), tmp_path / folder_of("failed").name))
    starts = {"asked": 3, "succeeded": 1, "failed": {"its image could not be had": 2}}
    statistics = directory.sandbox_statistics(read_record(directory).pairs[0].jobs[1].job_id)
    statistics.write_text(json.dumps({"schema": 1, "at": 1.0, "starts": starts}))
    with next(directory.path.glob("runtime_*.err")).open("a") as err:
        err.write("2026-11-29 00:01:33 [WARN] sandbox cd02 of session s1: Podman could not pull localhost/a:b\n")
        err.write("2026-11-29 00:01:36 [WARN] sandbox 5f05 of session s2: Podman could not pull localhost/c:d: no\n")
    job = runtime_in(seen(read_record(directory), {}))
    assert (job.asked_starts, dict(job.failed_starts)) == (3, {"its image could not be had": 2})
    assert job.failed_start == "Podman could not pull localhost/c:d: no"
    statistics.write_text('{"schema": 1, "at": 1.0, "starts"')
    assert not runtime_in(seen(read_record(directory), {})).failed_starts


def runtime_in(view: RunView) -> JobView:
    found = view.pair.job("runtime") if view.pair else None
    assert found is not None
    return found
