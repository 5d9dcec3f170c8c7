"""The real OpenHands clients against the real server on real rootless Podman."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.head.config import HeadConfig
from tests.runtime import podman_service, real_clients
from tests.runtime.conftest import API_KEY, CONFIG, Api, KillablePodman, serving
from tests.runtime.fleet import head_over
from tests.runtime.real_clients import HERE, LEGACY, NEWEST, SDK, SHARED, Clients

SDK_DRIVER = "drive_api_remote_workspace.py"

pytestmark = pytest.mark.podman

MakeApi = Callable[[str, int], Api]


@pytest.fixture(scope="session")
def clients() -> Clients:
    lacks = real_clients.missing()
    if lacks:
        pytest.skip(f"real clients: this machine lacks {lacks}")
    return real_clients.installed()


@pytest.fixture
def agents(rootless_podman: podman_service.Service, agent_tree: AgentTree) -> Iterator[MakeApi]:
    with ExitStack() as stack:

        def make(start: str, slots: int = 4) -> Api:
            config = replace(CONFIG, agent_start=start, string_patience_s=270.0, list_patience_s=105.0)
            return stack.enter_context(
                serving(KillablePodman(rootless_podman.socket), config, slots, agent_tree, warden=True)
            )

        yield make


@pytest.fixture
def head(rootless_podman: podman_service.Service, agent_tree: AgentTree) -> Iterator[Api]:
    """A head over two servers, both on the Podman of an ordinary user."""
    with ExitStack() as stack:
        config = replace(CONFIG, agent_start="fork", string_patience_s=270.0, list_patience_s=105.0)
        nodes = [
            stack.enter_context(
                serving(
                    KillablePodman(rootless_podman.socket), replace(config, node_name=name), 4, agent_tree, warden=True
                )
            )
            for name in ("cpu-a", "cpu-b")
        ]
        yield stack.enter_context(head_over(nodes, HeadConfig(API_KEY, gather_s=0.0), shares=True))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(API_KEY)
    return path


def drive(clients: Clients, venv: str, script: str, api: Api, image: str, key: Path, *words: str) -> Any:
    url = str(api.client.base_url).rstrip("/")
    arguments = ("--api", url, "--image", image, "--key-file", f"/mnt/{key.name}", *words)
    return clients.run(venv, HERE / script, *arguments, files=(key,))


def assert_nothing_left(api: Api) -> None:
    assert api.names() == []
    assert api.manager.admission.slots.used == 0
    assert api.manager.launcher.ports.taken == set()


FULL = {
    "command": [3, "out\n", "err\n", False],
    "timeout": [-1, True],
    "upload": True,
    "download": [True, "payload\n"],
    "missing": False,
    "git": [0, True],
    "root": "0\nmade\nwritten\n",
    "alive": True,
    "environment": "demo-value\n",
}


@pytest.mark.parametrize("start", ["fork", "exec"])
@pytest.mark.parametrize("venv", [SDK, NEWEST])
def test_36_the_sdks_workspace(
    clients: Clients,
    agents: MakeApi,
    key_file: Path,
    rootless_podman: podman_service.Service,
    venv: str,
    start: str,
) -> None:
    api, image = agents(start, 4), real_clients.userland_image(rootless_podman)
    assert drive(clients, venv, "drive_sdk.py", api, image, key_file, "full") == FULL
    assert_nothing_left(api)


@pytest.mark.parametrize(
    ("scenario", "result"),
    [
        ("source_target", "here\n"),
        ("pause_resume", "kept\n"),
        ("attach_running", "kept\n"),
        ("attach_paused", "kept\n"),
        ("dropped", "here\n"),
    ],
)
def test_36_the_sdks_workspace_in_other_ways(
    clients: Clients,
    agents: MakeApi,
    key_file: Path,
    rootless_podman: podman_service.Service,
    scenario: str,
    result: str,
) -> None:
    api, image = agents("fork", 4), real_clients.userland_image(rootless_podman)
    assert drive(clients, SDK, "drive_sdk.py", api, image, key_file, scenario) == result
    assert_nothing_left(api)


@pytest.mark.parametrize(("start", "count"), [("exec", 16), ("fork", 64)])
def test_38_workspaces_in_parallel_leave_nothing_twice(
    clients: Clients,
    agents: MakeApi,
    key_file: Path,
    rootless_podman: podman_service.Service,
    start: str,
    count: int,
) -> None:
    api, image = agents(start, count), real_clients.userland_image(rootless_podman)
    for _ in range(2):
        words = ("--count", str(count), "parallel")
        found = drive(clients, SDK, "drive_sdk.py", api, image, key_file, *words)
        assert found == [f"{number}\n" for number in range(count)]
        assert_nothing_left(api)


def test_37_the_legacy_runtime(
    clients: Clients, agents: MakeApi, key_file: Path, rootless_podman: podman_service.Service
) -> None:
    api, image = agents("exec", 4), real_clients.legacy_image(rootless_podman)
    found = drive(clients, LEGACY, "drive_legacy.py", api, image, key_file, "full")
    assert found == {
        "command": [3, True],
        "write": "FileWriteObservation",
        "read": True,
        "files": ["a.txt"],
        "zip": True,
    }
    assert_nothing_left(api)
    assert "kept" in drive(clients, LEGACY, "drive_legacy.py", api, image, key_file, "paused_and_attached")
    assert_nothing_left(api)


@pytest.mark.parametrize(
    ("driver", "venv"),
    [(SDK_DRIVER, SDK), (SDK_DRIVER, NEWEST), ("drive_remote_runtime.py", LEGACY)],
)
def test_36_37_the_drivers_of_the_recordings(
    clients: Clients,
    agents: MakeApi,
    key_file: Path,
    rootless_podman: podman_service.Service,
    driver: str,
    venv: str,
) -> None:
    if not (SHARED / driver).is_file():
        pytest.skip(f"the recordings' driver {SHARED / driver} is not here")
    is_legacy = venv == LEGACY
    make_image = real_clients.legacy_image if is_legacy else real_clients.userland_image
    api, image = agents("fork", 4), make_image(rootless_podman)
    url = str(api.client.base_url).rstrip("/")
    arguments = (f"/mnt/{driver}", "--api", url, "--image", image, "--key-file", f"/mnt/{key_file.name}", "full")
    files = (key_file, SHARED / driver)
    result = clients.run(venv, HERE / "run_shared_driver.py", *arguments, files=files)
    assert "raised" not in result
    assert "close_raised" not in result
    assert result["action"]["command"][0] == 3
    assert_nothing_left(api)


def test_36_37_both_clients_at_a_head_over_two_nodes(
    clients: Clients, head: Api, key_file: Path, rootless_podman: podman_service.Service
) -> None:
    image = real_clients.userland_image(rootless_podman)
    assert drive(clients, NEWEST, "drive_sdk.py", head, image, key_file, "full") == FULL
    assert_nothing_left(head)
    image = real_clients.legacy_image(rootless_podman)
    assert "kept" in drive(clients, LEGACY, "drive_legacy.py", head, image, key_file, "paused_and_attached")
    assert_nothing_left(head)
