"""Podman's service is killed under a living server and another one is started on its socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from slurm_runtime import podman
from slurm_runtime.control import ControlError
from slurm_runtime.podman import EngineFacts
from slurm_runtime.remains import Monitor, monitors
from slurm_runtime.warden.client import Warden
from tests.runtime import podman_service
from tests.runtime.commands import IMAGE
from tests.runtime.conftest import CONFIG, Api, KillablePodman, serving
from tests.runtime.test_contract import eventually, started

pytestmark = pytest.mark.podman

REMAINS_S = 15.0  # as the fault matrix: what a start leaves that was cut off is gone


@pytest.fixture
def outage_api(rootless_podman: podman_service.Service) -> Iterator[Api]:
    with serving(KillablePodman(rootless_podman.socket), warden=True) as api:
        yield api


def word(api: Api) -> str:
    return str(api.client.get("/health").json()["podman"])


def settled(api: Api, path: str) -> str:
    """What becomes of a sandbox that is being started."""
    return str(eventually(lambda: (word := api.client.get(path).json()["pod_status"]) != "pending" and word))


def test_a_podman_that_ends_right_after_its_first_answer_is_one_that_was_not_there_yet(
    rootless_podman: podman_service.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again, and the server does not end by it."""
    look = podman._service
    gone: list[Exception | tuple[int, int]] = [ConnectionRefusedError("refused"), (2**22 + 1, 0)]

    def service(path: Path) -> tuple[int, int]:
        if not gone:
            return look(path)
        if isinstance(found := gone.pop(0), Exception):
            raise found
        return found

    monkeypatch.setattr(podman, "_service", service)
    with serving(KillablePodman(rootless_podman.socket), warden=True) as api:
        eventually(lambda: word(api) == "connected")
        assert started(api)["pod_status"] == "ready"
    assert not gone


@contextlib.contextmanager
def back_after(service: podman_service.Service, seconds: float) -> Iterator[None]:
    """The service is gone when the block begins, and another one is there after so long."""
    service.kill()
    timer = threading.Timer(seconds, service.begin)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_what_meets_the_outage_waits_and_nobody_is_declared_dead(
    outage_api: Api, rootless_podman: podman_service.Service
) -> None:
    api = outage_api
    kept, stopped, paused = (started(api) for _ in range(3))
    pid = rootless_podman.server_pid()

    def post(path: str, sandbox: dict[str, Any]) -> httpx.Response:
        return api.client.post(path, json={"runtime_id": sandbox["runtime_id"]})

    with ThreadPoolExecutor(4) as pool:
        with back_after(rootless_podman, 2.0):
            starting = pool.submit(api.start, image=IMAGE, command=api.serve, session_id="meanwhile")
            stopping, pausing = pool.submit(post, "/stop", stopped), pool.submit(post, "/pause", paused)
            eventually(lambda: word(api) == "unreachable")
            assert api.client.get(f"/runtime/{kept['runtime_id']}").json()["pod_status"] == "ready"
            assert httpx.get(f"{kept['url']}/health", trust_env=False).status_code == 200
            assert not starting.done()
        answers = [starting.result(), stopping.result(), pausing.result()]
    assert [answer.status_code for answer in answers] == [201, 200, 200], [answer.text for answer in answers]
    assert word(api) == "connected"
    assert rootless_podman.server_pid() != pid
    assert eventually(lambda: api.client.get("/sessions/meanwhile").json()["pod_status"] == "ready")
    assert post("/resume", paused).json()["status"] == "running"
    assert httpx.get(f"{kept['url']}/health", trust_env=False).status_code == 200
    assert api.client.get("/list").json()["total"] == 3
    assert len(api.names()) == 3
    assert api.manager.admission.slots.used == 3
    assert api.run(api.engine.facts()).pid == rootless_podman.server_pid()


def test_a_start_that_podman_was_at_is_done_again(outage_api: Api, rootless_podman: podman_service.Service) -> None:
    """Killed at moments spread over a start: whatever was half made is removed, and one container stands."""
    for delay_s in (0.02, 0.1, 0.2, 0.35):
        with ThreadPoolExecutor(2) as pool:
            starting = [pool.submit(outage_api.start, image=IMAGE, command=outage_api.serve) for _ in range(2)]
            time.sleep(delay_s)
            with back_after(rootless_podman, 0.1):
                pass
            answers = [future.result() for future in starting]
        assert [answer.status_code for answer in answers] == [201, 201], [answer.text for answer in answers]
        names = {f"sandbox-{answer.json()['runtime_id']}" for answer in answers}
        assert set(outage_api.names()) == names
        for answer in answers:
            path = f"/runtime/{answer.json()['runtime_id']}"
            assert settled(outage_api, path) == "ready"
            stop = outage_api.client.post("/stop", json={"runtime_id": answer.json()["runtime_id"]})
            assert stop.status_code == 200, stop.text


def until_watched(facts: EngineFacts, names: list[str]) -> None:
    """Wait until the containers that are watched are those with these names."""
    end = time.monotonic() + REMAINS_S
    while found := monitors(facts):
        if [one.name for one in found] == names:
            return
        assert time.monotonic() < end, found
        time.sleep(0.05)
    assert not names


def cut_at_its_monitor(api: Api, service: podman_service.Service, facts: EngineFacts) -> bool:
    """Start a sandbox and kill the service once the monitor of its container is there; whether that cut the start off.

    Then the container is one that never ran, for Podman: its removal, before the start is made again, ends no process.
    """
    before = {one.pid for one in monitors(facts)}
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(api.start, image=IMAGE, command=api.serve)
        cut: list[Monitor] = []
        while not cut:
            cut = [one for one in monitors(facts) if one.pid not in before]
            assert cut or not starting.done()
        with back_after(service, 0.3):
            time.sleep(0.2)
            never_ran = (service.home / "x" / "runc" / cut[0].container / "exec.fifo").exists()
        answer = starting.result()
    assert answer.status_code == 201, answer.text
    runtime_id = answer.json()["runtime_id"]
    eventually(lambda: api.client.get(f"/runtime/{runtime_id}").json()["pod_status"] == "ready", 40)
    until_watched(facts, [f"sandbox-{runtime_id}"])
    assert api.client.post("/stop", json={"runtime_id": runtime_id}).status_code == 200
    return never_ran


def assert_only_networks_of_sandboxes(api: Api, service: podman_service.Service, sandboxes: int = 0) -> None:
    """Once those in which nothing lives are taken away."""
    control = api.manager.launcher.control
    assert control is not None
    api.run(control.tidy_networks(0.0))
    folder = service.home / "x" / "netns"
    mounted = service.podman("unshare", "sh", "-c", f"grep {folder}/ /proc/self/mountinfo || true")
    assert len(list(folder.iterdir())) == len(mounted.splitlines()) == sandboxes


def test_what_a_cut_start_leaves_is_ended(outage_api: Api, rootless_podman: podman_service.Service) -> None:
    """Its monitor and processes, what the runtime has noted of it, and in the end its network namespace."""
    facts = rootless_podman.facts()
    strays = 0
    for _ in range(20):
        strays += cut_at_its_monitor(outage_api, rootless_podman, facts)
        if strays == 3:
            break
    assert strays, "of 20 starts none was cut off"
    until_watched(facts, [])
    eventually(lambda: list((rootless_podman.home / "x" / "runc").iterdir()) == [])
    assert_only_networks_of_sandboxes(outage_api, rootless_podman)


def test_a_network_in_which_nothing_lives_goes_once_that_is_so_for_long(
    outage_api: Api, rootless_podman: podman_service.Service
) -> None:
    """As a start leaves it that is cut off before the container has a process; a sandbox's own stays."""
    sandbox = started(outage_api)
    assert_only_networks_of_sandboxes(outage_api, rootless_podman, sandboxes=1)
    left = rootless_podman.home / "x" / "netns" / "netns-of-a-cut-start"
    rootless_podman.podman("unshare", "sh", "-c", f"touch {left} && unshare --net={left} true")
    control = outage_api.manager.launcher.control
    assert control is not None
    assert outage_api.run(control.tidy_networks(60.0)) == 0
    assert left.exists()
    assert outage_api.run(control.tidy_networks(0.0)) == 1
    assert not left.exists()
    assert_only_networks_of_sandboxes(outage_api, rootless_podman, sandboxes=1)
    assert httpx.get(f"{sandbox['url']}/health", trust_env=False).status_code == 200


def test_an_outage_that_lasts_is_an_error_after_its_patience(rootless_podman: podman_service.Service) -> None:
    config = replace(CONFIG, outage_s=0.5)
    with serving(KillablePodman(rootless_podman.socket), config, warden=True) as api:
        sandbox = started(api)
        rootless_podman.kill()
        try:
            began = time.monotonic()
            answer = api.start(image=IMAGE, command=api.serve)
            assert answer.status_code == 502
            assert "no Podman service listens" in answer.json()["detail"]
            assert api.start(image=IMAGE, command=api.serve).status_code == 502  # also where the outage is known
            assert time.monotonic() - began < 5
            assert word(api) == "unreachable"
            assert api.client.get(f"/runtime/{sandbox['runtime_id']}").json()["pod_status"] == "ready"
        finally:
            rootless_podman.begin()
        eventually(lambda: word(api) == "connected")


def test_a_sandbox_that_dies_in_an_outage_has_failed_with_its_exit_code(
    outage_api: Api, rootless_podman: podman_service.Service
) -> None:
    sandbox = started(outage_api)
    path = f"/runtime/{sandbox['runtime_id']}"
    holder = outage_api.run(outage_api.engine.inspect(f"sandbox-{sandbox['runtime_id']}")).pid
    with back_after(rootless_podman, 0.5):
        os.kill(holder, signal.SIGKILL)
    dead = eventually(lambda: (found := outage_api.client.get(path).json())["pod_status"] == "failed" and found)
    assert "137 (SIGKILL)" in dead["pod_logs"]
    eventually(lambda: outage_api.names() == [] and outage_api.manager.admission.slots.used == 0)


def test_a_service_that_was_replaced_unnoticed_is_noticed_and_the_next_warden_joins_it(
    outage_api: Api, rootless_podman: podman_service.Service
) -> None:
    sandbox = started(outage_api)
    with back_after(rootless_podman, 0.0):
        pass
    control = outage_api.manager.launcher.control
    assert isinstance(control, Warden)
    eventually(lambda: control.podman_pid == rootless_podman.server_pid())
    assert control._process is not None
    before = control._process.pid
    os.kill(before, signal.SIGKILL)
    eventually(lambda: control._writer is not None and control._process and control._process.pid != before)
    name = f"sandbox-{sandbox['runtime_id']}"
    eventually(lambda: outage_api.run(control.usage()).get(name, {}).get("processes", 0) > 0)


def test_a_warden_of_a_service_that_is_gone_says_so() -> None:
    gone = 2**22 - 3  # the highest process id is one less than 2**22
    assert not Path(f"/proc/{gone}").exists()

    async def begin() -> None:
        await Warden(gone, lambda _event: None).start()

    with pytest.raises(ControlError, match=f"process {gone}, has ended"):
        asyncio.run(begin())
