"""One sandbox does harm: it fails with its reason, and what its neighbours notice of it is measured."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.runtime import podman_service
from tests.runtime.commands import SERVE, SERVE_SCRIPT
from tests.runtime.conftest import CONFIG, Api, KillablePodman, serving
from tests.runtime.test_contract import eventually, session, started

pytestmark = pytest.mark.podman

ROOM = 40 << 20
LIMITS = replace(CONFIG, memory_bytes=100 << 20, pids_limit=100, cpus_per_worker=0.5, disk_bytes=ROOM)
SLOTS = 4
# Answers, and turns into an offender as soon as it is asked for /cgi-bin/go.
OFFENDER = """
mkdir -p /www/cgi-bin; cd /www; echo '"OK"' > health; cp health ready
printf '#!/bin/sh\\ntouch /www/go; echo; echo begun\\n' > cgi-bin/go; chmod +x cgi-bin/go
httpd -p 60000 -h /www
until [ -e go ]; do sleep 0.01; done
"""
# Its shells may be refused a fork and end before the watchdog comes; then the first process begins anew.
BOMB = "bomb() { bomb | bomb & }; while :; do bomb; done"
BOMBS = f"while :; do ({BOMB}); sleep 0.1; done"
FILL = "head -c 3000000000 /dev/zero > /workspace/big; sleep 60"
OFFENCES = {
    "killed": ("sleep 60", "SIGKILL"),
    "out of memory": ("exec dd if=/dev/zero of=/dev/null bs=200M count=100000", "out of memory"),
    "fork bomb": (BOMB, "can't fork|processes"),  # its first process too may be refused a fork, and end
    "fork bomb beside": (BOMBS, "can't fork|processes"),
    "full disk": (FILL, "of disk"),
}
STOPPED_S, RECOVERED_S = 2.0, 5.0
PERIOD_S = 0.02
NOISE_S = 0.03  # what the noise of the machine measured on makes of an answer that takes 2 ms


def ask(url: str) -> str:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return str(answer.read().decode())


@dataclass
class Latency:
    """What a client notices that asks a sandbox every 20 ms: the seconds of each answer by the time it was asked."""

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
                ask(f"{self.url}/health")
                self.samples.append((begin, time.monotonic() - begin))
            except OSError:
                self.samples.append((begin, math.inf))

    def p90(self, begin: float, end: float) -> float:
        """Of the answers that were asked for between two moments; so few samples have no higher percentile."""
        found = sorted(seconds for at, seconds in self.samples if begin <= at < end)
        return found[int(0.9 * len(found))]

    def last_slow(self, bound_s: float) -> float:
        """When the last answer ended that took longer: it, and one just before or after it."""
        slow = [seconds > bound_s for _, seconds in self.samples]
        pairs = [index for index in range(1, len(slow)) if slow[index] and slow[index - 1]]
        at, seconds = self.samples[pairs[-1]] if pairs else (0.0, 0.0)
        return at + (seconds if seconds < math.inf else 2)


@dataclass(frozen=True)
class Harm:
    """What one offence did: its reason, when it was over, and the neighbour's p90 before, during and after."""

    reason: str
    stopped_s: float
    recovered_s: float
    before_s: float
    during_s: float
    after_s: float


def harm(api: Api, program: str) -> Harm:
    """Have a sandbox turn into an offender, and measure what its neighbour notices."""
    neighbour = started(api, command=SERVE)
    offender = started(api, command=["/bin/sh", "-c", OFFENDER + program], session_id="offender")
    with Latency(neighbour["url"]).measured() as latency:
        time.sleep(2)
        begin = time.monotonic()
        ask(f"{offender['url']}/cgi-bin/go")
        if program == OFFENCES["killed"][0]:
            api.run(api.engine.kill(f"sandbox-{offender['runtime_id']}"))
        eventually(lambda: session(api, "offender")["pod_status"] == "failed", 20)
        stopped = time.monotonic()
        time.sleep(2)
        end = time.monotonic()
    before = latency.p90(0, begin)
    over = latency.last_slow(max(2 * before, NOISE_S))
    found = session(api, "offender")
    return Harm(
        reason=" ".join([*found["restart_reasons"], found["pod_logs"]]),
        stopped_s=stopped - begin,
        recovered_s=max(0.0, over - begin),
        before_s=before,
        during_s=latency.p90(begin, max(stopped, begin + 1)),
        after_s=latency.p90(end - 1, end),
    )


def watched(found: Harm, words: str, stopped_s: float = STOPPED_S) -> None:
    """What holds where no cgroup bounds a sandbox."""
    print(found)
    assert re.search(words, found.reason)
    assert found.stopped_s < stopped_s
    assert found.recovered_s < found.stopped_s + RECOVERED_S
    assert found.after_s < max(2 * found.before_s, NOISE_S)


@pytest.mark.parametrize("offence", OFFENCES)
def test_where_no_limit_bites_the_offender_is_stopped_and_neighbours_recover(
    rootless_podman: podman_service.Service, offence: str
) -> None:
    program, words = OFFENCES[offence]
    with serving(KillablePodman(rootless_podman.socket), LIMITS, SLOTS, warden=True) as api:
        watched(harm(api, program), words)


@pytest.mark.parametrize("offence", [name for name in OFFENCES if name != "fork bomb beside"])
def test_where_limits_bite_neighbours_answer_as_before(root_podman: podman_service.Service, offence: str) -> None:
    program, words = OFFENCES[offence]
    with serving(KillablePodman(root_podman.socket), LIMITS, SLOTS, warden=True) as api:
        if not {"memory", "pids", "cpu"} <= api.run(api.engine.facts()).controllers:
            pytest.skip("root's Podman lacks cgroup controllers")
        found = harm(api, program)
        print(found)
        assert re.search(words, found.reason)
        assert found.during_s < max(2 * found.before_s, NOISE_S)


def test_a_bomb_within_the_usual_limit_of_processes(rootless_podman: podman_service.Service) -> None:
    """2048 of them, which a bomb reaches before anybody can look."""
    usual = replace(LIMITS, pids_limit=CONFIG.pids_limit)
    with serving(KillablePodman(rootless_podman.socket), usual, SLOTS, warden=True) as api:
        watched(harm(api, BOMBS), "can't fork|processes")


def free_of(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.fixture
def small_disk(rootless_podman: podman_service.Service) -> Iterator[podman_service.Service]:
    """A Podman service whose storage lies on a disk of 400 MB of its own."""
    folder = Path(tempfile.mkdtemp(prefix="skd-", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m,mode=1777", "tmpfs", folder], check=True)
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
        found = harm(api, FILL)
        watched(found, "of the node's disk, more than any other", stopped_s=8)  # Podman is slow on a full disk
        assert session(api, "innocent")["pod_status"] == "ready"
        assert ask(f"{innocent['url']}/workspace") == "yes\n"

        eventually(lambda: free_of(small_disk.home) > 300 << 20)
        assert started(api, command=SERVE)["pod_status"] == "ready"
