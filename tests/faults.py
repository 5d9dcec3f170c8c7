"""What the fault matrix measures: is a run released, how soon, and does everybody read why?

Each case is a row of docs/reliability.md, and what a test of tests/test_slurm_faults_*.py asserts: its bound, and the
words that stand in both logs and in the completion flag. SKYRL_FAULT_TIMES names a file for the measured times.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import NothingLeft, OrdinaryUser
from tests.runs import Run

TIMES = Path(__file__).parent / "fault_times.jsonl"  # those that docs/reliability.md states


@dataclass(frozen=True)
class Case:
    """One fault.

    :param row: its row in the matrix
    :param fault: what happens
    :param outcome: what then holds
    :param bound_s: the seconds within which it does; where time is no matter, infinity
    :param reads: words of the reason as the user reads them, on a node called cpu-a; empty where nothing is to be read
    """

    row: int
    fault: str
    outcome: str
    bound_s: float = math.inf
    reads: str = ""


ENDS = "the training job ends too"
NO_PODMAN = Case(3, "the CPU node has no Podman", ENDS, 10, "cpu-a cannot run this job: not on PATH: podman")
NO_SUBUIDS = Case(3, "`/etc/subuid` of the CPU node is empty", ENDS, 10, "cpu-a cannot run this job: no range for")
FULL_DISK = Case(3, "the CPU node's local disk is full", ENDS, 10, "too little for images and sandboxes")
NO_PORT = Case(3, "all of `RUNTIME_PORT_RANGE` is in use", ENDS, 10, "no free port in RUNTIME_PORT_RANGE on cpu-a")
NO_IMAGE = Case(3, "the image is nowhere", ENDS, 10, "CONTAINER_IMAGE=localhost/nonesuch is not on cpu-a")
ALL_GOES_ON = "the same address, key and sandboxes answer; the run goes on"
RECOVERED = "the API server and the Podman service answer again, after"
CANCELLED_EARLY = Case(
    2,
    "`scancel` of the training job while the runtime job still loads its image",
    "the runtime job ends too",
    10,
    "before the trainer started",
)
SERVER_KILLED = Case(
    4, "`kill -9` of the API server, with three sandboxes, one of them paused", ALL_GOES_ON, 5, RECOVERED
)
INNER_KILLED = Case(
    5, "`kill -9` of the Podman service, the process that serves, in the middle of a start", ALL_GOES_ON, 5, RECOVERED
)
OUTER_KILLED = Case(
    5,
    "`kill -9` of the Podman service, the process that waits for it, in the middle of a start",
    ALL_GOES_ON,
    5,
    RECOVERED,
)
THREE_CRASHES = Case(
    4,
    "the API server or the Podman service is killed for the third time within a minute",
    ENDS,
    10,
    "the API server or the Podman service ended 3 times within 60 s; the last time: the API server on cpu-a ended with",
)
DEAD_JOB = Case(
    19,
    "`kill -9` of a runtime job's body, guardian, API server and Podman service at once; its sandboxes live on",
    "the next job on that node removes them; a living job's sandbox goes on answering",
    20,
    "removing Podman storage that a dead job left",
)
MANY_LAUNCHES = Case(13, "20 launches at once by one user", "all 20 runs complete, each with a key of its own", 60)
OTHER_USER = Case(
    13,
    "another user on the same node tries the key file, the run directory, the environments of the run's processes, its "
    "Podman socket, and its API with the key of a run of its own",
    "all refused",
)
SANDBOX_ATTACKS = Case(
    18,
    "a sandbox tries the API without a key and with its own, the node's files, processes, loopback and namespaces, "
    "Podman's socket, munge, the job's environment, mounts, devices and the kernel's settings",
    "all refused",
)
HOME_FULL = Case(15, "the home is full", "the run completes; in the home nothing has changed")
BAD_NEIGHBOURS = Case(
    6,
    "in one run one sandbox runs out of memory, another is a fork bomb, another fills the node's disk",
    "each has failed with its reason; a fourth answers, starts processes and writes again; the run completes",
    20,
)
WRONG_KEYS = Case(
    17,
    "20,000 requests without a key, with a wrong one or with another run's, on few connections, of a server that logs "
    "each of them",
    "each is answered with 401; no key stands in an answer or in the log, the server's memory grows by less than "
    "5 MiB, and a client with the key is answered meanwhile within a second",
)
HOSTILE_UPLOADS = Case(
    16,
    "an image's build context has paths and links out of it, devices, pipes, or names that a shell would run",
    "nothing outside of it is changed or read; what leads out of it is refused with its name",
)
HOSTILE_BODIES = Case(
    16,
    "a request's body is nested half a million times, holds numbers beyond all bounds, wrong types or 100 MB",
    "refused with 4xx, in little memory, without a traceback",
)
ENDURANCE = Case(
    20,
    "2,000 sandboxes come and go, 8 at a time; every 4 s one of them is killed, every 35 s the API server or Podman's "
    "service",
    "the others serve; descriptors, memory, slots, ports, containers and storage of the run are as before",
    600,
)
CASES = (
    NO_PODMAN,
    NO_SUBUIDS,
    FULL_DISK,
    NO_PORT,
    NO_IMAGE,
    CANCELLED_EARLY,
    SERVER_KILLED,
    INNER_KILLED,
    OUTER_KILLED,
    THREE_CRASHES,
    MANY_LAUNCHES,
    OTHER_USER,
    HOME_FULL,
    SANDBOX_ATTACKS,
    DEAD_JOB,
    BAD_NEIGHBOURS,
    WRONG_KEYS,
    HOSTILE_UPLOADS,
    HOSTILE_BODIES,
)


def released(run: Run, nothing_left: NothingLeft, case: Case, reads: str = "") -> float:
    """Wait until a run is released and return the seconds that took, which the case bounds.

    Released: both jobs are out of the queue (one that is completing is in it); no process, container, port, socket or
    storage of the user is left on a node that was not there before; and the reason (``reads``, else the case's) stands
    in the logs of both jobs, in the completion flag and in run.json. A training job that was taken out of the queue
    before it began has written no log; the runtime job's then says so.
    """
    begin = time.monotonic()
    while left := [*(f"{kind} job" for kind in run.jobs if not run.is_over(kind)), *nothing_left.now()]:
        assert time.monotonic() - begin < case.bound_s, f"{case.fault}: after {case.bound_s:g} s still there: {left}"
        time.sleep(0.1)
    seconds = time.monotonic() - begin
    reason = reads or case.reads
    silent = [place for place, text in _places(run) if reason not in text]
    assert not silent, f"{case.fault}: {reason!r} does not stand in {', '.join(silent)} of {run.directory}"
    return within(case, seconds)


def _places(run: Run) -> Iterator[tuple[str, str]]:
    withdrawn = f"cancelled the pending training job {run.jobs['training']}" in run.log("runtime")
    for kind in ("runtime",) if withdrawn else ("runtime", "training"):
        yield f"the {kind} job's log", run.log(kind) + run.log(kind, "err")
    yield "training_complete.flag", str(run.completion.get("reason", ""))
    for kind in ("runtime", "training"):
        yield f"run.json about the {kind} job", _recorded(run, kind)


def _recorded(run: Run, kind: str) -> str:
    """How a job ended, as run.json says it."""
    record = json.loads(run.text("run.json") or "{}")
    return str(record.get("jobs", {}).get(kind, {}).get("ended", {}).get("reason", ""))


def within(case: Case, seconds: float) -> float:
    """Assert the case's bound, and note what was measured where SKYRL_FAULT_TIMES says so."""
    assert seconds < case.bound_s, f"{case.fault}: {seconds:.1f} s, not within {case.bound_s:g} s"
    if path := os.environ.get("SKYRL_FAULT_TIMES"):
        entry = {"row": case.row, "case": case.fault, "bound": case.bound_s, "measured": round(seconds, 1)}
        with Path(path).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return seconds


def measured(case: Case) -> float:
    """The longest time that the kept measurements say of a case."""
    entries = [json.loads(line) for line in TIMES.read_text().splitlines()]
    return max(float(entry["measured"]) for entry in entries if entry["case"] == case.fault)


def runtime_processes(user: OrdinaryUser, run: Run, words: str) -> list[int]:
    """The processes of a run's runtime job whose command line has these words, by the numbers that their node sees."""
    job = f"SLURM_JOB_ID={run.jobs['runtime']}".encode()
    pids = [pid for pid, line in user.processes().items() if words in line]
    found = [pid for pid in pids if job in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert found, f"no {words} of job {run.jobs['runtime']}"
    return sorted(found)
