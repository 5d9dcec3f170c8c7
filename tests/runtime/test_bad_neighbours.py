"""One sandbox does harm: it fails with its reason, and what its neighbours notice of it is measured."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import ge
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest

from slurm_runtime.slots import Slots
from tests import faults
from tests.faults import Case, within
from tests.runtime import podman_service
from tests.runtime.commands import SERVE, SERVE_SCRIPT
from tests.runtime.conftest import CONFIG, Api, KillablePodman, serving
from tests.runtime.test_contract import eventually, session, started

pytestmark = [pytest.mark.podman, pytest.mark.faults]

ROOM = 40 << 20
LIMITS = replace(CONFIG, memory_bytes=100 << 20, pids_limit=100, cpus_per_worker=1, disk_bytes=ROOM)
SLOTS = 8
# Answers, and turns into an offender as soon as it is asked for /cgi-bin/go.
OFFENDER = """
mkdir -p /www/cgi-bin; cd /www; echo '"OK"' > health; cp health ready; mkfifo nothing
printf '#!/bin/sh\\ntouch /www/go; echo; echo begun\\n' > cgi-bin/go; chmod +x cgi-bin/go
httpd -p 60000 -h /www
until [ -e go ]; do sleep 0.01; done
"""
# Each request for /cgi-bin/work is a process that computes, for some 70 ms on a core of its own.
WORKER = """
mkdir -p /www/cgi-bin; cd /www; echo '"OK"' > health; cp health ready
printf '#!/bin/sh\\necho; exec awk "BEGIN { while (i < 500000) sum += i++; print sum }"\\n' > cgi-bin/work
chmod +x cgi-bin/work; exec httpd -f -p 60000 -h /www
"""
WORKED = "124999750000"
GREEDY = "dd if=/dev/zero of=/dev/null bs=200M count=100000"
# Its shells may be refused a fork and end before the watchdog comes; then the first process begins anew.
BOMB = "bomb() { bomb | bomb & }; while :; do bomb; done"
BOMBS = f"while :; do ({BOMB}); sleep 0.1; done"
FILL = "head -c 3000000000 /dev/zero > /workspace/big; sleep 60"


@dataclass(frozen=True)
class Offence:
    """What a sandbox turns into, and the reason that is then read.

    ``lasting`` is the program where a limit bites: it does the same again and again for a second or more before it ends
    of it; what ends at once is done by several ``sandboxes``, one after the other.
    """

    program: str
    reason: str
    lasting: str = ""
    sandboxes: int = 1


KILLED = Offence("sleep 60", "SIGKILL", sandboxes=3)
REFUSED = "can't fork|processes"  # its first process too may be refused a fork, and end
OFFENCES = {
    "killed": KILLED,
    "out of memory": Offence(
        f"exec {GREEDY}", "out of memory", f"for i in $(seq 20); do {GREEDY}; done; exec {GREEDY}"
    ),
    "fork bomb": Offence(BOMB, REFUSED, f"({BOMBS}) & read -t 1 never <> nothing; {BOMB}"),
    "full disk": Offence(FILL, "of disk", sandboxes=2),
}
BESIDE = Offence(BOMBS, REFUSED)
PERIOD_S = 0.01
QUIET_S = 1.0
MOST_ROUNDS = 5
AS_BEFORE = 2.0  # times as long, at most


def ask(url: str) -> str:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return str(answer.read().decode())


@dataclass
class Latency:
    """What a client notices that asks a sandbox for the same work again and again.

    ``samples`` has when it asked and how many seconds the answer took, infinitely many if none came or another one.
    """

    url: str
    samples: list[tuple[float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def measured(self) -> Iterator[Latency]:
        stop = threading.Event()
        thread = threading.Thread(target=self._measure, args=(stop,))
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()

    def _measure(self, stop: threading.Event) -> None:
        while not stop.wait(PERIOD_S):
            begin = time.monotonic()
            try:
                worked = ask(f"{self.url}/cgi-bin/work").strip() == WORKED
            except OSError:
                worked = False
            self.samples.append((begin, time.monotonic() - begin if worked else math.inf))

    def between(self, begin: float, end: float) -> list[float]:
        """The seconds of each answer that was under way at some moment between these two."""
        return [seconds for at, seconds in [*self.samples] if at < end and at + min(seconds, 2) > begin]

    def usual(self, end: float) -> float:
        """The median of two quiet seconds."""
        found = median(self.between(end - 2 * QUIET_S, end))
        assert math.isfinite(found), "it did not answer before anybody did harm"
        return found


def worker(api: Api) -> dict[str, Any]:
    return started(api, command=["/bin/sh", "-c", WORKER])


@dataclass(frozen=True)
class Offender:
    """A sandbox that will do harm when it is told to."""

    api: Api
    offence: Offence
    sandbox: dict[str, Any]

    @classmethod
    def of(cls, api: Api, offence: Offence, program: str, number: int = 0) -> Offender:
        name = f"offender-{number}"
        return cls(api, offence, started(api, command=["/bin/sh", "-c", OFFENDER + program], session_id=name))

    @property
    def found(self) -> dict[str, Any]:
        return session(self.api, self.sandbox["session_id"])

    @property
    def reason(self) -> str:
        return " ".join([*self.found["restart_reasons"], self.found["pod_logs"]])

    def begin(self) -> float:
        """Have it do harm; the moment at which it was told to."""
        begin = time.monotonic()
        with contextlib.suppress(OSError, http.client.HTTPException):  # its harm may swallow the word that it begins
            ask(f"{self.sandbox['url']}/cgi-bin/go")
        if self.offence is KILLED:
            self.api.run(self.api.engine.kill(self._container))
        return begin

    def failed(self) -> float:
        """The moment at which its clients see that it has failed."""
        eventually(lambda: self.found["pod_status"] == "failed", 20)
        return time.monotonic()

    def gone(self) -> float:
        """The moment at which nothing of it is left."""
        eventually(lambda: self._container not in self.api.names(), 60)
        return time.monotonic()

    @property
    def _container(self) -> str:
        return f"sandbox-{self.sandbox['runtime_id']}"


# --- where limits bite ------------------------------------------------------------------------------------------------


def harmful(offenders: Sequence[Offender]) -> tuple[float, float]:
    """Have them do harm one after the other: from the first one's beginning until all are gone, a second at least."""
    begin = time.monotonic()
    for offender in offenders:
        offender.begin()
        offender.failed()
    end = max(offender.gone() for offender in offenders)
    time.sleep(max(0.0, begin + QUIET_S - end))
    return begin, max(end, begin + QUIET_S)


def slowdown(api: Api, latency: Latency, offence: Offence) -> tuple[float]:
    """How many times as long the neighbour's answers take during an offence as in the quiet before it, or after it.

    On average: it is asked for one after the other, so a median would count the slow ones too little. It may still be
    slow after it: so the quicker of the two quiet times counts. One with an answer that did not come is none to compare
    with, and as bad as no answer during the offence.
    """
    program = offence.lasting or offence.program
    offenders = [Offender.of(api, offence, program, number) for number in range(offence.sandboxes)]
    time.sleep(QUIET_S)
    begin, end = harmful(offenders)
    time.sleep(QUIET_S)
    assert all(re.search(offence.reason, offender.reason) for offender in offenders)
    quiet = [fmean(latency.between(*times)) for times in ((begin - QUIET_S, begin), (end, end + QUIET_S))]
    during = fmean(latency.between(begin, end))
    print(f"{offence.reason}: {during:.3f} s beside it; {quiet[0]:.3f} s before, {quiet[1]:.3f} s after it")
    return (during / min(quiet) if all(map(math.isfinite, quiet)) else math.inf,)


def settled(measure: Callable[[], tuple[float, ...]], *bounds: float) -> list[float]:
    """The medians of one measurement; of three or five, where the machine was busy with something else meanwhile."""
    found = [measure()]
    while any(map(ge, medians(found), bounds)) and len(found) < MOST_ROUNDS:
        found += [measure(), measure()]
    return medians(found)


def medians(found: Sequence[tuple[float, ...]]) -> list[float]:
    return [median(values) for values in zip(*found, strict=True)]


@contextlib.contextmanager
def favoured(pid: int) -> Iterator[None]:
    """The group of cgroups that a sandbox's is in gets CPU time before what else runs on this machine.

    Sandboxes share the time of their group. What others leave to it is halved as soon as a second one runs, and that is
    not the offence that is measured.
    """
    weight, most = weight_of(pid)
    before = weight.read_text()
    weight.write_text(str(most))
    try:
        yield
    finally:
        weight.write_text(before)


def weight_of(pid: int) -> tuple[Path, int]:
    """The file with the weight of the group around a process's cgroup, of either version, and a high one."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        group = path.rpartition("/")[0]
        if "cpu" in controllers.split(","):
            return Path(f"/sys/fs/cgroup/cpu{group}/cpu.shares"), 20 * 1024
        if not controllers and Path(f"/sys/fs/cgroup{group}/cpu.weight").exists():
            return Path(f"/sys/fs/cgroup{group}/cpu.weight"), 20 * 100
    raise AssertionError("no cgroup for CPU time")


@pytest.mark.parametrize("name", OFFENCES)
def test_where_limits_bite_neighbours_answer_as_before(root_podman: podman_service.Service, name: str) -> None:
    """With CPUs of their own, as runs have: the neighbour has the first one, all offenders have the second."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    slots = Slots(SLOTS, LIMITS.cpus_per_worker, (first, *[second] * (SLOTS - 1)))
    pinned = replace(LIMITS, pinning="docker_cpuset")
    with serving(KillablePodman(root_podman.socket), pinned, slots, warden=True) as api:
        if not {"memory", "pids", "cpu", "cpuset"} <= api.run(api.engine.facts()).controllers:
            pytest.skip("root's Podman lacks cgroup controllers")
        neighbour = worker(api)
        latency = Latency(neighbour["url"])
        with favoured(api.holder_of(neighbour)), latency.measured():
            (found,) = settled(lambda: slowdown(api, latency, OFFENCES[name]), faults.LIMITS_BITE.bound_s)
    within(faults.LIMITS_BITE, found)


# --- where none does: the watchdog ------------------------------------------------------------------------------------


def recovered(latency: Latency, begin: float, usual: float) -> float:
    """The seconds from ``begin`` until the neighbour had answered as before for a second, less that second."""
    found = 0.0

    def has_recovered() -> bool:
        nonlocal found
        found = time.monotonic() - QUIET_S
        answers = latency.between(found, math.inf)
        return found > begin and len(answers) > 1 and median(answers) < AS_BEFORE * usual

    try:
        eventually(has_recovered, 20)
    except AssertionError:  # ``settled`` measures again, as the machine may be busy elsewhere
        return math.inf
    return found - begin


def watched(api: Api, offence: Offence) -> tuple[float, float]:
    """Have a sandbox do harm where no cgroup bounds it; the seconds until it has failed, and its neighbour answers."""
    latency, offender = Latency(worker(api)["url"]), Offender.of(api, offence, offence.program)
    with latency.measured():
        time.sleep(2 * QUIET_S)
        begin = offender.begin()
        usual = latency.usual(begin)
        failed = offender.failed()
        seconds = recovered(latency, begin, usual)
    assert re.search(offence.reason, offender.reason)
    offender.gone()
    return failed - begin, seconds


def recovers(api: Api, offence: Offence, stops: Case = faults.WATCHDOG_STOPS) -> None:
    cases = (stops, faults.NEIGHBOURS_RECOVER)
    for case, seconds in zip(
        cases, settled(lambda: watched(api, offence), *(case.bound_s for case in cases)), strict=True
    ):
        within(case, seconds)


@pytest.mark.parametrize("offence", [*OFFENCES.values(), BESIDE], ids=[*OFFENCES, "fork bomb beside"])
def test_where_no_limit_bites_the_offender_is_stopped_and_neighbours_recover(
    rootless_podman: podman_service.Service, offence: Offence
) -> None:
    with serving(KillablePodman(rootless_podman.socket), LIMITS, SLOTS, warden=True) as api:
        recovers(api, offence)


def test_a_bomb_within_the_usual_limit_of_processes(rootless_podman: podman_service.Service) -> None:
    """2048 of them, which a bomb reaches before anybody can look."""
    usual = replace(LIMITS, pids_limit=CONFIG.pids_limit)
    with serving(KillablePodman(rootless_podman.socket), usual, SLOTS, warden=True) as api:
        recovers(api, BESIDE, stops=faults.LARGE_BOMB_STOPS)


def free_of(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


DISK = 400 << 20
RESERVE = DISK // 20  # as docs/api-server.md says


@pytest.fixture
def small_disk(rootless_podman: podman_service.Service) -> Iterator[podman_service.Service]:
    """A Podman service whose storage lies on a small disk of its own."""
    folder = Path(tempfile.mkdtemp(prefix="skd-", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=1777", "tmpfs", folder], check=True)
    try:
        with podman_service.running(rootless_podman.owner, parent=folder) as service:
            yield service
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_without_a_limit_the_one_that_fills_the_disk_is_stopped(small_disk: podman_service.Service) -> None:
    unlimited = replace(LIMITS, disk_bytes=0)
    with serving(KillablePodman(small_disk.socket), unlimited, SLOTS, warden=True) as api:
        some = f"head -c {ROOM} /dev/zero > /workspace/some; {SERVE_SCRIPT}"
        innocent = started(api, command=["/bin/sh", "-c", some, "server", "60000"], session_id="innocent")
        latency, offender = Latency(worker(api)["url"]), Offender.of(api, OFFENCES["full disk"], FILL)
        with latency.measured():
            time.sleep(2 * QUIET_S)
            begin = offender.begin()
            usual = latency.usual(begin)
            crossed = reached(small_disk.home)
            failed = offender.failed()
            seconds = recovered(latency, crossed, usual)
        assert "of the node's disk, more than any other" in offender.reason
        within(faults.DISK_FILLED, failed - crossed)
        within(faults.NEIGHBOURS_RECOVER, seconds)
        assert session(api, "innocent")["pod_status"] == "ready"
        assert ask(f"{innocent['url']}/workspace") == "yes\n"

        eventually(lambda: free_of(small_disk.home) > 300 << 20)
        assert started(api, command=SERVE)["pod_status"] == "ready"


def reached(folder: Path) -> float:
    """The moment at which less than the reserve of a disk is left."""
    deadline = time.monotonic() + 20
    while free_of(folder) >= RESERVE:
        assert time.monotonic() < deadline, "nobody fills the disk"
        time.sleep(0.002)
    return time.monotonic()
