"""A day of a run in a few minutes: thousands of sandboxes come and go while processes are killed; nothing adds up."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import runtime_processes, within
from tests.runs import Run, body_pid, launch, monitored, podman_ps, storage_of, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

CYCLES = int(os.environ.get("SKYRL_ENDURANCE_CYCLES", "2000"))
CLIENTS = 8
KILL_EVERY_S = 4.0
CRASH_EVERY_S = 35.0  # three crashes within a minute end a run
SERVER, SERVICE = "slurm_runtime.api_server", "podman system service"
CRASHES = (SERVER, SERVICE)
SERVES = "mkdir -p /w; echo ok > /w/health; exec httpd -f -p 60000 -h /w"
GROWTH = 1.1
# The body looks at all processes of the node every half minute, and keeps the memory that most of them took once: 3 to
# 4 MB here. That looks do not add up is tested by itself (test_usage_sampler.py); without them it grows by 0.03 MB.
LOOKS_KIB = 6144
CUT_FILES = 2  # of a start that was cut off: a volume, the name of a network (for minutes), Podman's temporary files


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


@dataclass(frozen=True)
class State:
    """What a run holds while no sandbox lives; ``server`` is its pid, ``body`` stands for the job that starts it."""

    server: int
    descriptors: int
    resident_kib: int
    body_descriptors: int
    body_resident_kib: int
    containers: frozenset[str]
    ports: int
    monitors: int
    runtime_notes: int
    slots: int
    storage_files: int

    def exceeds(self, before: State, cut_starts: int = 0) -> list[str]:
        """What is more than it was. Each start that the death of Podman's service cut off may have left files."""
        files = before.storage_files * GROWTH + CUT_FILES * cut_starts
        grown = {
            "descriptors": self.descriptors > before.descriptors + 5,
            "memory": self.resident_kib > before.resident_kib * GROWTH,
            "descriptors of the body": self.body_descriptors > before.body_descriptors + 5,
            "memory of the body": self.body_resident_kib > before.body_resident_kib * GROWTH + LOOKS_KIB,
            "containers": bool(self.containers - before.containers),
            "ports": self.ports > before.ports,
            "monitors": self.monitors > before.monitors,
            "notes of the container runtime": self.runtime_notes > before.runtime_notes,
            "slots": self.slots > before.slots,
            "files of the storage": self.storage_files > files,
        }
        return [what for what, is_more in grown.items() if is_more]


def resources(pid: int) -> tuple[int, int]:
    """The descriptors of a process, and the KiB of memory that it has."""
    status = Path(f"/proc/{pid}/status").read_text()
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status.partition("VmRSS:")[2].split()[0])


@dataclass
class Load:
    """Clients that start, ask and stop sandboxes of a run, and what became of each cycle."""

    user: OrdinaryUser
    run: Run
    outcomes: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return self.run.text("runtime_url.txt").strip()

    @property
    def storage(self) -> Path:
        return storage_of(self.run, self.user.uid)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"X-API-Key": self.run.text("runtime_api_key.txt").strip(), "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
            return dict(json.load(answer))

    def slots_used(self) -> int:
        headers = {"X-API-Key": self.run.text("runtime_api_key.txt").strip()}
        with urllib.request.urlopen(urllib.request.Request(self.url + "/metrics", None, headers), timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("skyrl_slots_used"))))

    def cycle(self, number: int) -> str:
        """One sandbox from its start to its end; a word for how it went."""
        body = {
            "image": "localhost/skyrl-busybox:latest",
            "session_id": f"s{number}",
            "working_dir": "/",
            "command": ["/bin/sh", "-c", SERVES],
        }
        try:
            sandbox = self.ask("/start", body)
            with urllib.request.urlopen(f"{sandbox['url']}/health", timeout=10) as answer:
                served = answer.read() == b"ok\n"
            self.ask("/stop", {"runtime_id": sandbox["runtime_id"]})
            return "served" if served else "wrong answer"
        except (OSError, http.client.HTTPException) as problem:
            until(f"the end of session s{number}", lambda: self.is_ended(f"s{number}"), 40)
            return f"failed: {str(problem)[:80]}"

    def is_ended(self, session: str) -> bool:
        """Whether a session whose cycle broke off has no sandbox any more; stops one that it has."""
        try:
            found = self.ask(f"/sessions/{session}")
            self.ask("/stop", {"runtime_id": found["runtime_id"]})
        except urllib.error.HTTPError as refusal:
            return refusal.code == 404
        except (OSError, http.client.HTTPException):  # the server is being started again
            return False
        return True

    def cycles(self, numbers: range) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            self.outcomes.update(pool.map(self.cycle, numbers))

    def sandboxes(self) -> list[int]:
        """The first processes of living sandboxes: they have no environment of the job's."""
        return [pid for pid, line in self.user.processes().items() if line.startswith("httpd -f -p 60000")]

    @contextlib.contextmanager
    def being_killed(self, *crashes: str) -> Iterator[None]:
        """Some sandbox of the run is killed every few seconds, and one of ``crashes`` in turn every 35 s."""
        stop = threading.Event()
        thread = threading.Thread(target=self._kill, args=(stop, crashes))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _kill(self, stop: threading.Event, crashes: tuple[str, ...]) -> None:
        choice, crash_at = random.Random(20), time.monotonic() + CRASH_EVERY_S / 2
        turns = itertools.cycle(crashes)
        while not stop.wait(KILL_EVERY_S):
            if crashes and time.monotonic() > crash_at:
                crash_at += CRASH_EVERY_S
                words = next(turns)
                self._end(words, runtime_processes(self.user, self.run, words))
            elif victims := self.sandboxes():
                self._end("sandbox", [choice.choice(victims)])

    def _end(self, what: str, pids: list[int]) -> None:
        """SIGKILL for all of them: of a rootless Podman service, the one that serves and the one that waits for it."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.killed[what] += 1

    def is_empty(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return not self.sandboxes() and self.ask("/list")["total"] == 0
        return False

    def state(self, before: State | None = None, cut_starts: int = 0) -> State:
        """Once all sandboxes are gone; what starts left that were cut off goes by the second look for it, at 30 s."""
        until("the last sandbox's end", self.is_empty, 30)
        end = time.monotonic() + 45
        while True:
            time.sleep(2)
            state = self._state()
            if before is None or not state.exceeds(before, cut_starts) or time.monotonic() > end:
                return state

    def _state(self) -> State:
        server = runtime_processes(self.user, self.run, SERVER)[0]
        return State(
            server,
            *resources(server),
            *resources(body_pid(self.run, "runtime")),
            containers=frozenset(podman_ps(self.storage / "podman.sock", every=True)),
            ports=sum(self.user.is_id(uid) for _, uid in test_cluster.listeners("cpu-a")),
            monitors=len(monitored(self.storage)),
            runtime_notes=sum(1 for _ in (self.storage / "run" / "runc").iterdir()),
            slots=self.slots_used(),
            storage_files=sum(len(names) + len(files) for _, names, files in os.walk(self.storage)),
        )


def test_a_days_sandboxes_add_up_to_nothing(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    settings = ("TRAINING_COMMAND=sleep 1000", "CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPUS_PER_NODE=0")
    run = launch(user, checkout, jobs_base, *settings)
    try:
        load = Load(user, run)
        until("the API server", lambda: run.text("runtime_ready.flag"), 40)
        warm, steady = CYCLES // 4, CYCLES // 2
        begin = time.monotonic()
        load.cycles(range(warm))
        before = load.state()
        with load.being_killed():
            load.cycles(range(warm, steady))
        same_server = load.state(before)
        crashing_at = time.monotonic()
        with load.being_killed(*CRASHES):
            load.cycles(range(steady, CYCLES))
        crashing_s = time.monotonic() - crashing_at
        after = load.state(before, load.killed[SERVICE] * CLIENTS)
        seconds = time.monotonic() - begin
    finally:
        user.run(["scancel", *run.jobs.values()])
        run.wait_over(seconds=20)
    states = f"{before}; {same_server}; {after}"
    print(f"{seconds:.0f} s; {dict(load.outcomes)}; killed {dict(load.killed)}; {states}")
    assert load.killed["sandbox"] > CYCLES // 100, "some were killed"
    crashes = load.killed[SERVER] + load.killed[SERVICE]
    assert crashes >= crashing_s // CRASH_EVERY_S // 2
    assert load.outcomes["served"] >= CYCLES - load.killed["sandbox"] - CLIENTS * crashes
    assert same_server.server == before.server
    assert not same_server.exceeds(before), (before, same_server)
    assert not after.exceeds(before, load.killed[SERVICE] * CLIENTS), (before, after)
    within(faults.ENDURANCE, seconds)
