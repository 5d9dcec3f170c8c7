"""Limits that the kernel enforces: root's Podman has cgroups here; where a user's has none, the watchdog is tested."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slurm_runtime.diagnostics import killed_for_memory
from tests.runtime import podman_service
from tests.runtime.commands import IMAGE, SERVE, SERVE_SCRIPT
from tests.runtime.conftest import CONFIG, Api, KillablePodman, serving
from tests.runtime.test_contract import eventually, session, started

pytestmark = pytest.mark.podman
MEMORY = 64 << 20
LIMITED = replace(CONFIG, memory_bytes=MEMORY, pids_limit=40, cpus_per_worker=0.5)
GREEDY = ["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=100"]
FORKING = ["/bin/sh", "-c", "for i in $(seq 100); do sleep 100 & done; echo all were forked; sleep 100"]


@pytest.fixture
def limited(root_podman: podman_service.Service) -> Iterator[Api]:
    with serving(KillablePodman(root_podman.socket), LIMITED, warden=True) as api:
        controllers = api.run(api.engine.facts()).controllers
        if not {"memory", "pids", "cpu"} <= controllers:
            pytest.skip(f"root's Podman has only the cgroup controllers {', '.join(sorted(controllers))}")
        yield api


def test_24_out_of_memory_is_named_in_the_reasons_and_the_log(limited: Api) -> None:
    limited.start(image=IMAGE, command=GREEDY, session_id="greedy")
    eventually(lambda: session(limited, "greedy")["pod_status"] == "failed", 20)
    found = session(limited, "greedy")
    assert "out of memory" in found["pod_logs"]
    assert any("memory" in reason for reason in found["restart_reasons"])
    eventually(lambda: limited.manager.admission.slots.used == 0)


def test_more_processes_than_allowed_cannot_be_made(limited: Api) -> None:
    limited.start(image=IMAGE, command=FORKING, session_id="forking")
    eventually(lambda: session(limited, "forking")["pod_status"] == "failed", 20)
    assert "all were forked" not in session(limited, "forking")["pod_logs"]


def test_nothing_is_said_of_limits_that_bite(limited: Api) -> None:
    assert started(limited, command=SERVE)["pod_status"] == "ready"
    assert not [note for note in limited.manager.connection.notes if "do NOT bite" in note]


def test_a_share_of_the_cpu_is_kept(limited: Api) -> None:
    """Two busy loops under half a CPU use half a CPU: counted by the kernel."""
    loops = f"(while :; do :; done) & (while :; do :; done) & {SERVE_SCRIPT}"
    sandbox = started(limited, command=["/bin/sh", "-c", loops, "server", "60000"])
    holder = limited.holder_of(sandbox)
    began, before = time.monotonic(), used_s(holder)
    time.sleep(3)
    assert (used_s(holder) - before) / (time.monotonic() - began) < 0.75


def used_s(pid: int) -> float:
    """Seconds of CPU of a process's cgroup."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpuacct" in controllers.split(","):
            return int(Path(f"/sys/fs/cgroup/cpuacct{path}/cpuacct.usage").read_text()) / 1e9
        if not controllers and path != "/":
            text = Path(f"/sys/fs/cgroup{path}/cpu.stat").read_text()
            return int(text.split()[1]) / 1e6
    raise AssertionError("no cgroup")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of this test's own, of either version, with a limit."""
    first = Path("/sys/fs/cgroup/memory")
    base = first if first.is_dir() else Path("/sys/fs/cgroup")
    folder = base / f"skyrl-test-{time.monotonic_ns()}"
    try:
        folder.mkdir()
        limit = folder / ("memory.limit_in_bytes" if base == first else "memory.max")
        limit.write_text(str(MEMORY))
    except OSError as problem:
        pytest.skip(f"no memory cgroup can be made here: {problem}")
    yield folder
    folder.rmdir()


def test_whether_the_kernel_killed_for_memory(cgroup: Path) -> None:
    enter = f"echo $$ > {cgroup}/cgroup.procs; exec "
    with subprocess.Popen(["sh", "-c", f"{enter} sleep 1000"]) as idle:
        try:
            eventually(lambda: str(idle.pid) in (cgroup / "cgroup.procs").read_text().split())
            assert not killed_for_memory(idle.pid)
            greedy = subprocess.run(["sh", "-c", f"{enter} {' '.join(GREEDY)}"], capture_output=True, check=False)
            assert greedy.returncode == -9
            assert killed_for_memory(idle.pid)
        finally:
            idle.kill()
    assert not killed_for_memory(idle.pid)
