"""Runtimes on several nodes: a head and workers on a real Slurm with real Podman, as an ordinary user."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.runs import STARTS_SANDBOXES, Run, User, answers, body_pid, launch, squeue, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

# Two slots on each node, and two nodes on each of the cluster's hosts.
TWO_SLOTS = ("CPUS_FOR_RUNTIME=60", "CPUS_PER_WORKER=30", "RUNTIME_DRAIN_LEAD=200")
STARTS_SIX = STARTS_SANDBOXES.replace("range(2)", "range(6)") + "\nexec sleep 600"
STARTS_FOUR = STARTS_SANDBOXES.replace("range(2)", "range(4)")
END_S = 40.0


@pytest.fixture(autouse=True)
def clean(user: User, nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


def ask(run: Run, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """What the head of a run answers."""
    headers = {"X-API-Key": run.text("runtime_api_key.txt").strip(), "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(run.text("runtime_url.txt").strip() + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as problem:
        return problem.code, json.load(problem)


def nodes(run: Run) -> dict[str, dict[str, Any]]:
    """The nodes of a run by the jobs that they belong to."""
    return {node["job"]: node for node in ask(run, "GET", "/nodes")[1]["nodes"]}


def tasks(run: Run) -> dict[str, str]:
    """Slurm's words for the states of a run's workers, by their ids."""
    jobs = json.loads(run.text("run.json"))["jobs"]
    ids = ",".join(jobs[kind]["id"] for kind in ("workers", "more_workers") if kind in jobs)
    rows = squeue(run.user, "-r", "-t", "all", "-j", ids, "-o", "%F_%K|%T").split()
    return dict(row.split("|") for row in rows)


def sandboxes(run: Run) -> list[dict[str, Any]]:
    until("its sandboxes", lambda: run.text("sandboxes.json"), 120)
    return list(json.loads(run.text("sandboxes.json")))


def living(run: Run, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sandboxes that the head says are running."""
    told = [ask(run, "GET", f"/runtime/{sandbox['runtime_id']}")[1] for sandbox in made]
    return [sandbox for sandbox, word in zip(made, told, strict=True) if word.get("status") == "running"]


def living_nodes(run: Run) -> dict[str, str]:
    """The names of the nodes that live by their jobs; none while the head is away."""
    over = {"joining", "left", "lost"}
    try:
        return {job: node["name"] for job, node in nodes(run).items() if node["state"] not in over}
    except OSError:
        return {}


def submitted_by_hand(run: Run, checkout: Path) -> str:
    """A worker that a person gives to sbatch; the id of its array."""
    sizes = ["--cpus-per-task=60", "--mem=4G", "--time=2", "--output=/dev/null"]
    argv = ["sbatch", "--parsable", "--array=1", *sizes, str(checkout / "slurm" / "jobs" / "runtime_worker.py")]
    done = run.user.run(argv, env={"SKYRL_COORD_DIR": str(run.directory)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def is_over(user: User, job_id: str) -> bool:
    return not squeue(user, "-j", job_id).strip()


def pid_of(module: str) -> int:
    """The one process that runs a module."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and module.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"nobody runs {module}")


def all_over(run: Run) -> bool:
    words = {*tasks(run).values(), *(run.state(kind) for kind in run.jobs)}
    return not words & LIVING


def test_nodes_join_a_head_take_sandboxes_and_are_lost_by_themselves(
    user: User, checkout: Path, jobs_base: Path
) -> None:
    """A run of four nodes, three of which its training waits for; the fourth finds no room until later."""
    taken = ["sbatch", "--parsable", "-n1", "-c60", "--mem=1G", "-o", "/dev/null", "--wrap", "exec sleep 600"]
    other = user.run(taken).stdout.strip()
    settings = (*TWO_SLOTS, "RUNTIME_NODES=4", "RUNTIME_MIN_SLOTS=5", "RESTARTS=1", "RESTART_LEAD=40", STARTS_SIX)
    run = launch(user, checkout, jobs_base, *settings)
    record = json.loads(run.text("run.json"))["jobs"]
    array, more = record["workers"]["id"], record["more_workers"]["id"]
    assert (record["workers"]["tasks"], record["more_workers"]["tasks"]) == ([1, 2], [3])

    made = sandboxes(run)
    runtime, first, second = run.jobs["runtime"], f"{array}_1", f"{array}_2"
    assert tasks(run) == {first: "RUNNING", second: "RUNNING", f"{more}_3": "PENDING"}, "it is not waited for"
    assert "6 of 5 slots have joined" in run.log("runtime")
    assert "API server ready at" in run.log("runtime")
    joined = nodes(run)
    assert {job: node["used"] for job, node in joined.items()} == {runtime: 2, first: 2, second: 2}
    assert {node["state"] for node in joined.values()} == {"ready"}
    hosts = {job: urlsplit(node["url"]).hostname for job, node in joined.items()}
    assert len(set(hosts.values())) == 2, "Slurm has spread them over both hosts"
    at = [urlsplit(sandbox["url"]).hostname for sandbox in made]
    assert sorted(map(str, at)) == sorted(str(host) for host in hosts.values() for _ in range(2)), "at their nodes"
    assert all(answers(sandbox["url"]) for sandbox in made)

    user.run(["scancel", other])
    until("the fourth node", lambda: f"{more}_3" in nodes(run), 60)
    until("its room", lambda: ask(run, "GET", "/nodes")[1]["slots"] == 8, 30)

    user.run(["scancel", second])
    until("its end", lambda: nodes(run)[second]["state"] in {"left", "lost"}, 30)
    until("the end of its sandboxes", lambda: len(living(run, made)) == 4, 30)
    assert all(answers(sandbox["url"]) == (sandbox in living(run, made)) for sandbox in made), "only its own"
    assert not run.is_over("training")

    name = nodes(run)[f"{more}_3"]["name"]
    assert ask(run, "POST", f"/nodes/{name}/drain", {"reason": "for the test"})[0] == 200
    until("that it takes no more", lambda: ask(run, "GET", "/nodes")[1]["slots"] == 4, 30)

    by_hand = submitted_by_hand(run, checkout)
    until("the node that was submitted by hand", lambda: nodes(run).get(f"{by_hand}_1", {}).get("slots"), 60)
    late = nodes(run)[f"{by_hand}_1"]
    assert late["state"] == "draining", "its time limit is nearer than RUNTIME_DRAIN_LEAD"
    assert "time limit" in late["reason"]
    assert 0 < late["until"] - time.time() <= 120
    assert nodes(run)[runtime]["state"] == "ready"

    before = living_nodes(run)
    assert len(before) == 4
    os.kill(pid_of("slurm_runtime.head"), signal.SIGKILL)
    until("the head's return", lambda: living_nodes(run) == before, 30)
    assert len(living(run, made)) == 4, "it knows them again"

    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    until("the end of all", lambda: all_over(run) and is_over(user, by_hand), 90)
    assert run.completion["exit_code"] == 69

    follows = run.next_attempt()  # which has nothing to go on from: it ends before it begins, with its workers
    assert set(follows.jobs) == {"runtime", "workers", "more_workers", "training"}
    arrays = ",".join(follows.jobs[kind] for kind in ("workers", "more_workers"))
    until("the end of the next attempt", lambda: follows.is_over("runtime") and is_over(user, arrays), 60)
    assert follows.exit_code("runtime") == "76"
    assert "is gone" in run.text(f"worker_{first}.out")


def test_the_end_of_the_training_is_that_of_all_workers(user: User, checkout: Path, jobs_base: Path) -> None:
    """Also of those that still wait for a node: they are taken out of the queue."""
    settings = ("RUNTIME_NODES=3", "RUNTIME_MIN_SLOTS=2", "CPUS_FOR_RUNTIME=100", "CPUS_PER_WORKER=100")
    run = launch(user, checkout, jobs_base, *settings, "RUNTIME_DRAIN_LEAD=100", "TRAINING_COMMAND=env > env.txt")
    until("the end of all", lambda: all_over(run), 90)
    assert {run.exit_code(kind) for kind in run.jobs} == {"0"}
    record = json.loads(run.text("run.json"))["jobs"]
    first = f"{record['workers']['id']}_1"
    assert record["more_workers"]["tasks"] == [2]
    states = tasks(run)
    assert states.pop(first) == "COMPLETED"
    assert set(states.values()) == {"CANCELLED"}
    assert "is complete" in run.text(f"worker_{first}.out")
    assert "2 of 2 slots have joined" in run.log("runtime")


def test_workers_of_one_allocation_are_steps_whose_loss_is_not_the_jobs(
    user: User, checkout: Path, jobs_base: Path
) -> None:
    """Their runtime is one job of two nodes; what dies with one of them are its sandboxes."""
    wait = "\nuntil [ -e go ]; do sleep 0.2; done"
    settings = (*TWO_SLOTS, "RUNTIME_NODES=2", "RUNTIME_MODE=allocation", "RUNTIME_MIN_SLOTS=4", STARTS_FOUR + wait)
    run = launch(user, checkout, jobs_base, *settings)
    made, worker = sandboxes(run), f"{run.jobs['runtime']}_1"
    assert sorted(json.loads(run.text("run.json"))["jobs"]) == ["runtime", "training"]
    rows = {node["name"]: node for node in ask(run, "GET", "/nodes")[1]["nodes"]}
    assert {name: node["used"] for name, node in rows.items()} == {"cpu-a": 2, "cpu-b": 2}
    assert sorted(str(urlsplit(sandbox["url"]).hostname) for sandbox in made) == ["cpu-a"] * 2 + ["cpu-b"] * 2

    os.kill(worker_pid(worker), signal.SIGKILL)
    until("its loss", lambda: sum(answers(sandbox["url"]) for sandbox in made) == 2, 30)
    until("that it is said", lambda: "its sandboxes are failed, the others go on" in run.log("runtime", "err"), 30)
    assert not run.is_over("runtime")
    until("the head's word", lambda: ask(run, "GET", "/nodes")[1]["slots"] == 2, 30)
    words = [json.dumps(ask(run, "GET", f"/runtime/{sandbox['runtime_id']}")[1]) for sandbox in made]
    assert sum("its step has ended" in word for word in words) == 2

    (run.directory / "go").touch()
    run.wait_over(seconds=END_S)
    assert {run.exit_code(kind) for kind in run.jobs} == {"0"}, run.log("runtime", "err")


LIVING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}


def worker_pid(worker: str) -> int:
    """The pid of the body of a worker that is a step: the outermost process that has its id."""
    own = f"SKYRL_JOB_ID={worker}".encode()
    for entry in sorted(Path("/proc").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else 0):
        try:
            is_own = entry.name.isdigit() and own in (entry / "environ").read_bytes().split(b"\0")
            if is_own and b"runtime_worker.py" in (entry / "cmdline").read_bytes().split(b"\0")[1]:
                return int(entry.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"no body of the worker {worker}")
