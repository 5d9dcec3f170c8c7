"""What looks at runs, or ends them, where the runtime has several nodes: workers beside the pair of jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from slurm.lib.cancel import Act, SlurmHand, Watched
from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import NotRunning, UsageError
from slurm.lib.job_context import JobContext
from slurm.lib.leftovers import clear, write_marker
from slurm.lib.observe.log_files import log_names, origins
from slurm.lib.observe.nodes import Node, Nodes, of_worker, parse_nodes
from slurm.lib.observe.record import read_record
from slurm.lib.observe.remains import is_ours
from slurm.lib.observe.run_report import read_report
from slurm.lib.observe.run_view import RunState, RunView, Stage
from slurm.lib.observe.sandbox_statistics import SandboxStatistics, Seconds, Starts, all_nodes
from slurm.lib.observe.sandboxes import Sandboxes, parse_metrics
from slurm.lib.observe.survey import LEAVING_S, Survey
from slurm.lib.observe.timeline import Mark
from slurm.lib.observe.whereabouts import Whereabouts, chosen, parse_list
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.reports.node_rows import ALL, COLUMNS, news_of, node_rows, worker_lines
from slurm.lib.reports.page import page
from slurm.lib.reports.run_words import run_dict
from slurm.lib.reports.worker_words import array_lines, node_lines
from slurm.lib.runs import FoundRun, RunJob, find
from slurm.lib.runtime_job import RuntimeJob
from slurm.lib.scheduler import JobState, JobStatus, Slurm
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import Outcome, Stop, Supervisor
from slurm.lib.verbs.list_runs import row
from slurm.lib.verbs.logs import labels
from slurm.lib.verbs.report_text import as_text
from slurm.lib.verbs.shell import wanted_job
from slurm.lib.worker_recall import Recall, withdraw
from slurm.lib.worker_steps import WorkerStep, WorkerSteps
from tests.fake_slurm import FakeSlurm
from tests.observed_runs import folder_of
from tests.test_partner import FakeScheduler

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, TRAINING, ARRAY, MORE = "11", "15", "13", "14"
WORKERS = {"workers": {"id": ARRAY, "tasks": [1, 2]}, "more_workers": {"id": MORE, "tasks": [3]}}


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


@pytest.fixture
def door(slurm: FakeSlurm) -> Slurm:
    return Slurm({"PATH": slurm.path})


def ended(kind: str, seconds_ago: float) -> dict[str, object]:
    moment = datetime.fromtimestamp(time.time() - seconds_ago, timezone.utc).isoformat(timespec="seconds")
    return {"exit_code": 0, "reason": "it is done", "said_by": kind, "time": moment}


def run_in(base: Path, ended_ago: float | None = None) -> FoundRun:
    """A run with a runtime of four nodes, whose pair has said that it ended so many seconds ago."""
    folder = base / f"20260101_000000_{RUNTIME}"
    folder.mkdir(parents=True)
    pair: dict[str, dict[str, object]] = {"runtime": {"id": RUNTIME}, "training": {"id": TRAINING}}
    if ended_ago is not None:
        pair = {kind: {**job, "ended": ended(kind, ended_ago)} for kind, job in pair.items()}
    settings = {"SKYRL_BACKEND": "slurm", "RUNTIME_NODES": "4"}
    (folder / "run.json").write_text(json.dumps({"schema": 1, "jobs": {**pair, **WORKERS}, "settings": settings}))
    (folder / f"training_{TRAINING}.out").touch()
    return FoundRun(folder.name, CoordinationDir(folder))


def line(shown: str, word: str = "RUNNING", reason: str = "None", number: str = "") -> str:
    """A job, or a task, as squeue shows it."""
    node = "n1" if word == "RUNNING" else ""
    return f"{number or shown.partition('_')[0]} {shown}|{word}|{reason}|{node}|test|me|N/A|0:09|1:00|x\n"


PAIR = line(RUNTIME) + line(TRAINING)


def looked(slurm: FakeSlurm, door: Slurm, run: FoundRun, *lines: str) -> RunView:
    slurm.answer("squeue", {"stdout": "".join(lines)})
    (view,) = Survey(door).look([run], servers=False)
    return view


# --- how a run is -----------------------------------------------------------------------------------------------------


def test_the_record_of_a_run_names_its_workers_beside_its_pair() -> None:
    record = read_record(CoordinationDir(folder_of("many_nodes")))
    (pair,) = record.pairs
    assert [job.kind for job in pair.jobs] == ["training", "runtime"]
    assert [(job.job_id, job.array, job.is_needed) for job in pair.workers] == [
        ("4_1", "4", True),
        ("4_2", "4", True),
        ("5_3", "5", False),
    ]
    assert (record.nodes, record.problems) == (4, ())
    assert all(job.has_log for job in pair.workers)
    assert read_record(CoordinationDir(folder_of("joined"))).nodes == 1


@pytest.mark.parametrize(
    ("first", "second", "third"),
    [("PENDING", "PENDING", "PENDING"), ("RUNNING", "NODE_FAIL", "RUNNING"), ("FAILED", "FAILED", "CANCELLED")],
)
def test_a_worker_that_waits_or_is_lost_is_no_failed_run(
    slurm: FakeSlurm, door: Slurm, first: str, second: str, third: str
) -> None:
    run = run_in(slurm.jobs)
    tasks = [line(f"{ARRAY}_1", first), line(f"{ARRAY}_2", second), line(f"{MORE}_3", third)]
    view = looked(slurm, door, run, PAIR, *tasks)
    assert view.state is RunState.RUNNING
    assert [job.word for job in view.unended if job.kind != "worker"] == ["RUNNING", "RUNNING"]
    assert row(view)[6] == f"{RUNTIME},{TRAINING}", "the columns of list are as they were"
    (call,) = slurm.of("squeue")
    assert sorted(call.argv[call.argv.index("-j") + 1].split(",")) == [RUNTIME, ARRAY, MORE, TRAINING], "one question"


def test_what_a_cancelled_worker_waited_for_is_no_reason_of_its_end(slurm: FakeSlurm, door: Slurm) -> None:
    ended = line(f"{ARRAY}_1", "FAILED", "JobLaunchFailure") + line(f"{MORE}_3", "CANCELLED", "Dependency")
    workers = {one.job_id: one for one in looked(slurm, door, run_in(slurm.jobs), PAIR, ended).pairs[0].workers}
    assert workers[f"{ARRAY}_1"].end_reason == "Slurm says FAILED (JobLaunchFailure)"
    assert workers[f"{MORE}_3"].end_reason == "Slurm says CANCELLED"


def test_a_line_for_each_array(slurm: FakeSlurm, door: Slurm) -> None:
    run = run_in(slurm.jobs)
    view = looked(slurm, door, run, PAIR, line(f"{ARRAY}_1", number="21"), line(f"{ARRAY}_2", "PENDING", "Priority"))
    assert view.pair
    lines = array_lines(view.pair.workers, time.time())
    assert lines[0] == "13_[1-2]: 1 of 2 run, 1 PENDING (Priority): others go first"
    assert lines[1].startswith("14_3, beyond what is needed: 1 ended: how it ended is not known")
    told = run_dict(view)
    workers = told["workers"]
    assert isinstance(workers, list)
    assert [(one["id"], one["stage"], one["needed"]) for one in workers] == [
        ("13_1", "running", True),
        ("13_2", "pending", True),
        ("14_3", "ended", False),
    ]
    assert view.pair.workers[0].number == "21"


def test_a_run_lives_until_its_workers_have_left(slurm: FakeSlurm, door: Slurm) -> None:
    """As it lives until its runtime has; of one that is over for long nothing is asked."""
    run = run_in(slurm.jobs, ended_ago=5)
    view = looked(slurm, door, run, line(f"{ARRAY}_1"))
    assert view.state is RunState.COMPLETED and view.lives
    view = looked(slurm, door, run)
    assert not view.lives
    assert view.pair and all(worker.stage is Stage.ENDED for worker in view.pair.workers)
    assert [call.name for call in slurm.everything].count("sacct") == 0, "nobody waits for their ends"
    slurm.forget()
    old = run_in(slurm.folder / "old", ended_ago=LEAVING_S + 60)
    assert not looked(slurm, door, old, line(f"{ARRAY}_1")).lives
    assert not slurm.everything


def test_what_a_training_waits_for_is_said(slurm: FakeSlurm, door: Slurm) -> None:
    run = run_in(slurm.jobs)
    assert run.directory
    run.directory.runtime_ready.write_text(json.dumps({"schema": 1, "job_id": RUNTIME, "runtime_job_id": RUNTIME}))
    waits = [line(RUNTIME), line(TRAINING, "PENDING", "Dependency")]
    tasks = [line(f"{ARRAY}_1", "PENDING"), line(f"{ARRAY}_2", "PENDING")]
    assert str(looked(slurm, door, run, *waits, *tasks).phase) == "waiting for 2 workers"
    slurm.forget()
    assert str(looked(slurm, door, run, *waits, line(f"{ARRAY}_1"), line(f"{ARRAY}_2")).phase) == "waiting for GPUs"


def test_steps_of_a_runtime_job_are_workers_that_live_as_long_as_it_does(slurm: FakeSlurm, door: Slurm) -> None:
    folder = slurm.jobs / f"20260101_000000_{RUNTIME}"
    folder.mkdir(parents=True)
    jobs = {"runtime": {"id": RUNTIME}, "training": {"id": TRAINING}}
    (folder / "run.json").write_text(json.dumps({"schema": 1, "jobs": jobs, "settings": {"RUNTIME_NODES": "3"}}))
    for number in (2, 10):
        (folder / f"worker_{RUNTIME}_{number}.out").touch()
    view = looked(slurm, door, FoundRun(folder.name, CoordinationDir(folder)), PAIR)
    assert view.pair
    assert [(one.job_id, one.stage) for one in view.pair.workers] == [
        ("11_2", Stage.RUNNING),
        ("11_10", Stage.RUNNING),
    ]
    assert array_lines(view.pair.workers, time.time()) == []
    (call,) = slurm.of("squeue")
    assert sorted(call.argv[call.argv.index("-j") + 1].split(",")) == [RUNTIME, TRAINING]


def test_a_worker_that_a_person_submitted_is_known_by_its_log(slurm: FakeSlurm, door: Slurm) -> None:
    run = run_in(slurm.jobs)
    assert run.directory
    for name in ("worker_21_1.out", f"worker_{ARRAY}_1.out", "worker_x_1.out"):
        (run.directory.path / name).touch()
    view = looked(slurm, door, run, PAIR, line("21_1"))
    assert view.pair
    ids = [worker.job_id for worker in view.pair.workers]
    assert ids == [f"{ARRAY}_1", f"{ARRAY}_2", f"{MORE}_3", "21_1"]
    assert array_lines(view.pair.workers, time.time())[-1] == "21_1, beyond what is needed: 1 of 1 run"
    assert find("21_1", slurm.jobs, door, 1.0).directory == run.directory
    assert [job.job_id for job in run.jobs() if job.kind == "worker"] == ids, "and it is cancelled with its run"


@pytest.mark.parametrize("name", [ARRAY, f"{ARRAY}_2", MORE, f"{MORE}_3", RUNTIME, TRAINING])
def test_each_job_of_a_run_names_it(slurm: FakeSlurm, door: Slurm, name: str) -> None:
    run = run_in(slurm.jobs)
    assert find(name, slurm.jobs, door, 1.0).directory == run.directory


def test_slurms_own_number_of_a_task_names_its_run(slurm: FakeSlurm, door: Slurm) -> None:
    run = run_in(slurm.jobs)
    assert run.directory
    log = f"   StdOut={run.directory.path}/worker_{ARRAY}_1.out\n"
    slurm.answer(
        "scontrol", *[{"stdout": f"JobId=21 ArrayJobId={ARRAY} ArrayTaskId=1 JobName=skyrl-worker\n{log}"}] * 2
    )
    assert find("21", slurm.jobs, door, 1.0).directory == run.directory


@pytest.mark.parametrize("name", ["13_9", "12_1", "130_1"])
def test_a_task_of_no_run(slurm: FakeSlurm, door: Slurm, name: str) -> None:
    run_in(slurm.jobs)
    with pytest.raises(UsageError, match=f"no run with a job {name}"):
        find(name, slurm.jobs, door, 1.0)


# --- its nodes --------------------------------------------------------------------------------------------------------

ANSWER = {
    "nodes": [
        {"name": "cpu-b.4_2", "job": "4_2", "url": "http://cpu-b:2", "state": "lost", "reason": "silent", "slots": 2},
        {"name": "cpu-a", "job": "3", "url": "http://cpu-a:1", "state": "ready", "slots": 2, "used": 1, "sandboxes": 1},
    ],
    "slots": 2,
    "used": 1,
    "waiting": 4,
}


def test_the_nodes_of_a_head() -> None:
    found = parse_nodes(json.dumps(ANSWER))
    assert found is not None
    assert [node.name for node in found.nodes] == ["cpu-a", "cpu-b.4_2"]
    assert (found.slots, found.used, found.waiting) == (2, 1, 4)
    first, second, third, last = node_lines(found, time.time())
    assert second.split() == ["cpu-a", "3", "ready", "1", "of", "2", "1"]
    assert third.split() == ["cpu-b.4_2", "4_2", "lost", "silent"], "what is gone has no room"
    assert last == "together 1 of 2 slots used, 4 starts wait for one"
    assert first.split()[0] == "NODE"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nodes": 3}', '{"detail": "no such route"}'])
def test_no_nodes_in_what_is_none(text: str) -> None:
    assert parse_nodes(text) is None


def test_figures_of_wrong_kinds_are_none() -> None:
    odd = {"nodes": [{"name": "a\x1b[2J\nb", "slots": True, "until": 1e300, "job": 7}, 3], "slots": "many"}
    found = parse_nodes(json.dumps(odd))
    assert found == Nodes((Node("a b"),))


def test_the_sandboxes_of_a_head_are_those_of_its_nodes() -> None:
    text = 'skyrl_slots_used{node="a"} 1.0\nskyrl_slots_used{node="b"} 2.0\nskyrl_slots_total{node="a"} 4.0\n'
    text += 'skyrl_sandboxes{node="a",state="running"} 3.0\nskyrl_starts_waiting{node="a"} 0.0\n'
    assert parse_metrics(f"{text}skyrl_head_starts_waiting 5.0\n") == Sandboxes(3, 3, 4, 5)
    assert parse_metrics("skyrl_head_starts_waiting 0.0\n") == Sandboxes(0, 0, 0, 0), "no node has joined"
    assert parse_metrics("skyrl_slots_used 1.0\n") is None


def test_the_node_of_a_worker_is_that_of_its_last_life() -> None:
    nodes = Nodes((Node("a", "4_1", "lost"), Node("b", "4_1", "ready"), Node("c", "4_2", "left")))
    assert of_worker(nodes, "4_1") == nodes.nodes[1]
    assert of_worker(nodes, "4_2") == nodes.nodes[2]
    assert of_worker(nodes, "4_3") is None


# --- which node a person means ----------------------------------------------------------------------------------------

A, B = Node("cpu-a", "3", "ready"), Node("cpu-b.4_1", "4_1", "ready")
LIVING = [Whereabouts("s1", "aaa1", A), Whereabouts("s11", "aab2", B), Whereabouts("t", "bbb", B)]


@pytest.mark.parametrize(("name", "node"), [("s1", A), ("s11", B), ("aaa1", A), ("aab", B), ("t", B)])
def test_a_sandbox_is_looked_for_on_all_nodes(name: str, node: Node) -> None:
    assert chosen(LIVING, [], name) == node


def test_a_sandbox_that_is_on_none() -> None:
    with pytest.raises(UsageError, match=r"there are s1 on cpu-a, s11 on cpu-b\.4_1, t on cpu-b\.4_1; cpu-c did not"):
        chosen(LIVING, ["cpu-c"], "x")
    with pytest.raises(UsageError, match="'aa' means 2 sandboxes"):
        chosen(LIVING, [], "aa")
    with pytest.raises(NotRunning, match="no sandbox lives on the runtime's nodes"):
        chosen([], [], "x")


def test_what_a_node_lists() -> None:
    text = json.dumps({"runtimes": [{"session_id": "s", "runtime_id": "r"}, {"session_id": 3}, 7]})
    assert parse_list(text, A) == [Whereabouts("s", "r", A)]
    assert parse_list("nothing", A) == []


def test_a_worker_is_gone_to_by_its_number_or_its_id(slurm: FakeSlurm, door: Slurm) -> None:
    run = run_in(slurm.jobs)
    tasks = [line(f"{ARRAY}_1", number="21"), line(f"{ARRAY}_2", "PENDING"), line(f"{MORE}_3")]
    view = looked(slurm, door, run, PAIR, *tasks)
    assert wanted_job(view, None, "1").number == "21"
    assert wanted_job(view, None, f"{ARRAY}_1").job_id == f"{ARRAY}_1"
    with pytest.raises(NotRunning, match="worker job 13_2: PENDING"):
        wanted_job(view, None, "2")
    with pytest.raises(NotRunning, match="has no worker 9 job"):
        wanted_job(view, None, "9")


# --- logs -------------------------------------------------------------------------------------------------------------


def test_the_logs_of_workers_stand_between_runtime_and_training() -> None:
    directory = CoordinationDir(folder_of("many_nodes"))
    names = log_names(directory)
    assert isinstance(names, frozenset)
    found = origins(read_record(directory), names)
    assert list(dict.fromkeys((one.kind, one.job_id) for one in found)) == [
        ("runtime", "3"),
        ("worker", "4_1"),
        ("worker", "4_2"),
        ("worker", "5_3"),
        ("training", "6"),
    ]
    assert list(dict.fromkeys(labels(1, found).values())) == [
        "runtime ",
        "worker-1",
        "worker-2",
        "worker-3",
        "training",
    ]


def launch(slurm: FakeSlurm, base: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(base)}
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_one_workers_log_is_shown_alone(slurm: FakeSlurm) -> None:
    folder = folder_of("many_nodes")
    for name in ("3", "5_3"):
        done = launch(slurm, folder.parent, "logs", folder.name, "--worker", name)
        assert done.returncode == 0, done.stderr
        assert {shown.partition(" ")[0] for shown in done.stdout.splitlines()} == {"worker-3"}
    all_of_them = launch(slurm, folder.parent, "logs", folder.name, "--workers").stdout
    assert {shown.partition(" ")[0] for shown in all_of_them.splitlines()} == {"worker-1", "worker-2", "worker-3"}
    wrong = launch(slurm, folder.parent, "logs", folder.name, "--worker", "x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    none = launch(slurm, folder.parent, "logs", folder.name, "--worker", "9")
    assert "has no log of a worker 9" in none.stderr


# --- the report -------------------------------------------------------------------------------------------------------


def seconds(*counts: int, longest: float) -> Seconds:
    """Starts in buckets up to 1, 2 and 4 s."""
    buckets = tuple(zip((1.0, 2.0, 4.0), counts, strict=True))
    return Seconds(counts[-1], sum=float(counts[-1]), p50=1.0, max=longest, buckets=buckets)


def test_the_counts_of_all_nodes() -> None:
    first = SandboxStatistics(5.0, Starts(10, 9, {"no image": 1}), seconds(9, 9, 9, longest=0.5), {}, 4, 4, {"x": 9})
    second = SandboxStatistics(7.0, Starts(3, 1, {"no image": 2}), seconds(0, 0, 1, longest=3.0), {}, 1, 8)
    found = all_nodes([first, second])
    assert (found.at, found.starts) == (7.0, Starts(13, 10, {"no image": 3}))
    assert (found.start_seconds.p50, found.start_seconds.p90, found.start_seconds.p99) == (1.0, 1.0, 3.0)
    assert found.start_seconds.buckets == ((1.0, 9), (2.0, 9), (4.0, 10))
    assert (found.peak_living, found.slots, dict(found.ended)) == (5, 12, {"x": 9})
    assert all_nodes([first]) is first
    without = replace(second, start_seconds=replace(second.start_seconds, buckets=()))
    assert all_nodes([first, without]).start_seconds.p50 is None, "of one node nothing is known"


def test_a_report_of_several_nodes(slurm: FakeSlurm, door: Slurm) -> None:
    run = FoundRun("x", CoordinationDir(folder_of("many_nodes")))
    (view,) = Survey(door).look([run], servers=False)
    report = read_report(view, door, SignalNotes())
    (attempt,) = report.attempts
    rows = [dict(zip(COLUMNS, cells, strict=True)) for cells in node_rows(report, attempt)]
    assert [(one["node"], one["job"], one["starts"]) for one in rows] == [
        ("cpu-a", "3", "2"),
        ("cpu-b", "4_1", "1"),
        ("cpu-b", "4_2", "2"),
        ("cpu-a", "5_3", "1"),
        (ALL, "", "6"),
    ]
    assert rows[2]["end"] == "ended by SIGTERM"
    assert news_of(attempt) == [], "what leaves at the end of all is no news"
    runtime = attempt.job("runtime")
    assert runtime
    stop = next(span.begin for span in runtime.spans if span.words == "stopping")
    lost = Mark(stop - 60, "node cpu-b.4_2 (job 4_2) was lost: it is silent; 2 sandboxes have failed with it")
    other = replace(runtime, nodes=(*runtime.nodes, lost))
    (news,) = news_of(replace(attempt, jobs=(attempt.jobs[0], other)))
    assert news[1] == lost.words
    assert len(runtime.nodes) == 8, "four that joined, and four that left"
    assert [words for name, words in worker_lines(report, attempt) if name == "4_1"] == [
        "on cpu-b, 2 s in the queue, joined 10 s after its start"
    ]
    text = as_text(report, None)
    assert "6 asked for, 6 succeeded, 0 failed" in text
    assert "at most 6 at once on 4 nodes, 8 slots" in text
    shown = page(report)
    assert "<h2>Nodes</h2>" in shown and f"<td>{ALL}</td>" in shown
    for width in (40, 60, 100):
        nodes = as_text(report, width).partition("\nNodes\n")[2].partition("\n\n")[0].splitlines()
        assert all(len(shown) <= width for shown in nodes), width


# --- their end --------------------------------------------------------------------------------------------------------


def watched(run: FoundRun, word: str, *jobs: RunJob) -> list[Watched]:
    state = {"RUNNING": JobState.RUNNING, "PENDING": JobState.PENDING}[word]
    return [Watched(run, job, now=JobStatus(state, word)) for job in jobs]


def test_what_waits_goes_by_its_array_and_what_runs_is_told_one_by_one(slurm: FakeSlurm, door: Slurm) -> None:
    run = run_in(slurm.jobs)
    by_id = {job.job_id: job for job in run.jobs()}
    first, second, third = (by_id[name] for name in (f"{ARRAY}_1", f"{ARRAY}_2", f"{MORE}_3"))
    hand = SlurmHand(door)
    hand.do(Act.WITHDRAW, watched(run, "PENDING", by_id[TRAINING], second, third, by_id[RUNTIME]), 5.0)
    hand.do(Act.TELL, watched(run, "RUNNING", first, third), 5.0)
    hand.do(Act.CANCEL, watched(run, "RUNNING", first, second, third), 5.0)
    assert [call.argv for call in slurm.of("scancel")] == [
        ["--state=PENDING", TRAINING],
        ["--state=PENDING", ARRAY, MORE, RUNTIME],
        ["--batch", "--signal=TERM", f"{ARRAY}_1", f"{MORE}_3"],
        [ARRAY, MORE],
    ]


def test_cancel_ends_the_workers_too_and_tells_of_those_alike_in_a_line(slurm: FakeSlurm) -> None:
    run = run_in(slurm.jobs)
    short = {f"{MORE}_3": "PENDING|Priority|", f"{ARRAY}_1": "RUNNING|None|n1", f"{ARRAY}_2": "RUNNING|None|n1"}
    living = "".join(f"1 {job}|{words}\n" for job, words in {**short, RUNTIME: "RUNNING|None|n1"}.items())
    slurm.answer("squeue", {"stdout": living}, {"stdout": f"{MORE} {MORE}|CANCELLED|None|\n"})
    assert run.directory
    shown = f"JobId=9 JobName=skyrl-worker\n   StdOut={run.directory.path}/x.out\n"
    slurm.answer("scontrol", *[{"stdout": shown}] * 9)
    done = launch(slurm, slurm.jobs, "cancel", run.name)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert "  worker 14_3: was PENDING, Priority; taken out of the queue; ended after" in "\n".join(told)
    assert sum("workers 13_[1-2]: were RUNNING, on n1; told to end; ended after" in shown for shown in told) == 1
    asked = [call.argv[-1] for call in slurm.everything if call.words[:3] == ["scontrol", "show", "job"]]
    assert sorted(asked) == [RUNTIME, ARRAY, MORE, TRAINING], "whose each is, of an array once"


def test_a_worker_that_lives_keeps_its_runs_directory(slurm: FakeSlurm) -> None:
    run = run_in(slurm.jobs, ended_ago=9 * 86400.0)
    assert run.directory
    folder = run.directory.path
    for name in (f"worker_{ARRAY}_1.out", f"usage_worker_{ARRAY}_1.jsonl", f"sandbox_statistics_{ARRAY}_1.json"):
        (folder / name).write_text("x")
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, 0))
    slurm.answer("squeue", *[{"stdout": line(f"{ARRAY}_1")}] * 2)
    kept = json.loads(launch(slurm, slurm.jobs, "clean", "--yes", "--json").stdout)["kept"]
    assert [(one["kept_as"], one["why"]) for one in kept] == [("lives", "its worker 13_1 is RUNNING in Slurm")]
    slurm.forget()
    slurm.answer("squeue", *[{"stdout": ""}] * 4)
    done = launch(slurm, slurm.jobs, "clean", "--yes", "--json")
    assert [one["run"] for one in json.loads(done.stdout)["removed"]] == [run.name], done.stdout


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("worker_124_1.out", True),
        ("worker_124_1.err", True),
        ("usage_worker_124_1.jsonl", True),
        ("sandbox_statistics_124_1.json", True),
        ("heartbeat_worker_124_1.txt", True),
        ("runtime_head.flag", True),
        ("worker_124.out", False),
        ("worker_124_1_2.out", False),
        ("sandbox_statistics_124_x.json", False),
    ],
)
def test_the_files_of_workers_are_ours(name: str, is_own: bool) -> None:
    assert is_ours(name) is is_own


def test_a_killed_launchs_arrays_go_with_its_jobs(slurm: FakeSlurm, door: Slurm) -> None:
    from tests.test_leftovers import dead

    launcher, folder = dead(), slurm.jobs / "29990304_050607_101"
    folder.mkdir(parents=True)
    path = write_marker(CoordinationDir(folder), ["101", "102", "103", "104"], made=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), "launcher": launcher}))
    held = "".join(f"{job}|PENDING|JobHeldUser|1|skyrl:{launcher}/{job}\n" for job in (104, 103, 102, 101))
    slurm.answer("squeue --user", {"stdout": held})
    clear(door, slurm.jobs)
    assert [call.argv for call in slurm.of("scancel")] == [["104"], ["103"], ["102"], ["101"]], "the training first"
    assert not folder.exists()


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_workers_of_a_run_are_offered_at_a_tab(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from slurm.lib.verbs import completion

    run = run_in(slurm.jobs)
    monkeypatch.setenv("SKYRL_JOBS_BASE", str(slurm.jobs))
    parser = completion.with_completers(completion.verb_parser("shell"), "launch.py")
    action = next(one for one in parser._actions if "--worker" in one.option_strings)
    offered: Mapping[str, object] = {"prefix": "", "action": action, "parsed_args": Namespace(run=run.name)}
    assert completion.worker_numbers(**offered) == ["1", "2", "3"]  # type: ignore[arg-type]
    assert action.completer is completion.worker_numbers  # type: ignore[attr-defined]


# --- who takes them out of the queue ----------------------------------------------------------------------------------


def of_job(run: FoundRun, door: Slurm, job_id: str) -> JobContext:
    assert run.directory
    return JobContext(job_id, run.directory, Settings(), {}, door, ROOT, own_dir=True)


def cancelled(slurm: FakeSlurm) -> list[list[str]]:
    return [call.argv for call in slurm.calls if call.name == "scancel"]


def shown(array: str, folder: Path) -> str:
    return f"JobId={array} ArrayJobId={array} JobName=skyrl-worker\n   StdOut={folder}/worker_{array}_1.out\n"


def test_the_training_takes_out_of_the_queue_what_waits_for_a_runtime_that_is_gone(
    slurm: FakeSlurm, door: Slurm
) -> None:
    run = run_in(slurm.jobs)
    withdraw(of_job(run, door, TRAINING), "12")
    assert cancelled(slurm) == [], "those of another attempt are another runtime's"
    withdraw(of_job(run, door, TRAINING), RUNTIME)
    assert cancelled(slurm) == [["--state=PENDING", MORE, ARRAY]]


@pytest.mark.parametrize("as_planned", [True, False])
def test_the_runtime_job_ends_its_arrays_and_no_other_runs(slurm: FakeSlurm, door: Slurm, as_planned: bool) -> None:
    run = run_in(slurm.jobs)
    other = slurm.jobs / "20260102_000000_99"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"jobs": {"runtime": {"id": "99"}, "workers": WORKERS["more_workers"]}}))
    slurm.answer("scontrol", {"stdout": shown(MORE, other)}, {"stdout": shown(ARRAY, slurm.jobs / run.name)})
    with Recall(of_job(run, door, RUNTIME)) as recall:
        recall.begin(as_planned=as_planned)
    first = [["--state=PENDING", ARRAY]] if as_planned else []
    assert cancelled(slurm) == [*first, [ARRAY]]


def test_steps_are_told_to_end_at_the_first_word_of_the_end(tmp_path: Path) -> None:
    """While the job's own server stops: Slurm's KillWait may be running."""
    spec = ChildSpec(("sh", "-c", "cat >/dev/null"), dict(os.environ), "a step", stdin_pipe=True)
    step = WorkerStep("cpu-b", "11_1", Child(spec, 5.0), tmp_path / "worker.err")
    job = JobContext(RUNTIME, CoordinationDir(tmp_path), Settings(), {}, FakeScheduler(), ROOT, own_dir=True)
    body = RuntimeJob(job, SignalNotes(), Supervisor(has_head=True), steps=WorkerSteps([step]))
    body.do(Stop(Outcome(143, "ended by SIGTERM")))
    assert step.child.wait(10)
    assert (step.is_told, body.steps.living()) == (True, ())
    body.steps.stop(1.0)
