"""Containers that wait for their sandboxes: which fit, and what a sandbox in one is, on real rootless Podman."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm.lib.api_server_child import own_flags
from slurm.lib.podman_storage import PodmanStorage
from slurm.lib.settings import Settings
from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.agent_support import Start, StartPlan
from slurm_runtime.api_server import build_parser
from slurm_runtime.podman import ContainerState
from slurm_runtime.ports import Reservation
from slurm_runtime.sandbox import Dialect, Mount, Specification
from slurm_runtime.slots import Slots
from slurm_runtime.warm import Warm, compared, fits, units_of, wanted
from tests.runtime import podman_service
from tests.runtime.commands import IMAGE, IMAGE_WITH_ENTRYPOINT
from tests.runtime.conftest import Api, KillablePodman, serving
from tests.runtime.test_adoption_process import MakeLineage, figure, get, identity, ready
from tests.runtime.test_adoption_process import lineage as lineage
from tests.runtime.test_agent_sandboxes import PATIENT, look_at, server_of
from tests.runtime.test_contract import command, eventually, session, started

WISH = Specification(
    "id", "session", "key", "image:1", ("agent-server", "--port", "60000"), "/", {"A": "1"}, 1.0, "missing",
    Dialect.SDK, 60000,
)  # fmt: skip


def warm(wish: Specification = WISH, image_id: str = "sha256:1") -> Warm:
    own = replace(wish, runtime_id="other", session_id="", session_api_key="other")
    state = ContainerState("sandbox-other", running=False, status="initialized", exit_code=0)
    return Warm(own, StartPlan(Start.FORK, None), image_id, Reservation(1), state)


def test_one_that_was_made_for_the_same_request_fits_whoever_asks() -> None:
    assert fits(warm(), replace(WISH, session_id="another", dialect=Dialect.LEGACY))


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "image:2"},
        {"command": ("agent-server", "--port", "60001")},
        {"working_dir": "/testbed"},
        {"environment": {"A": "2"}},
        {"environment": {}},
        {"resource_factor": 2.0},
        {"container_port": 60001},
        {"mounts": (Mount("/data", "/data"),)},
        {"pull_policy": "always"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_container_is_made_with_must_be_the_same(changes: dict[str, Any]) -> None:
    assert not fits(warm(), replace(WISH, **changes))


def test_what_was_asked_for_last_is_wanted_as_often_and_never_beyond_idle_slots() -> None:
    a, b, large = WISH, replace(WISH, image="b"), replace(WISH, image="large", resource_factor=2.5)
    assert wanted([], 4, 9) == []
    assert wanted([a], 4, 9) == [a] * 4
    assert wanted([b, a, a, a], 4, 9) == [b, a, a, a]
    assert wanted([a], 4, 3) == [a] * 3
    assert wanted([large, a], 4, 4) == [large, a]
    assert wanted([large], 4, 2) == []
    assert wanted([a], 4, 0) == []


def test_what_waits_is_kept_where_it_is_still_wanted() -> None:
    b = replace(WISH, image="b")
    first, second, third = warm(), warm(), warm(b)
    surplus, missing = compared([first, second, third], [WISH, b, b])
    assert (len(surplus), surplus[0] in (first, second), missing) == (1, True, [b])
    assert units_of([first, warm(replace(WISH, resource_factor=2.5))]) == 4


@pytest.mark.parametrize(("key", "said"), [(0, False), (12, True)])
def test_a_runs_key_reaches_its_server(key: int, said: bool, tmp_path: Path) -> None:
    job: Any = SimpleNamespace(
        settings=Settings(warm_sandboxes=key, skyrl_jobs_base=tmp_path), is_local=True, job_id="1"
    )
    with socket.socket() as listener:
        flags = own_flags(job, listener, tmp_path / "key", PodmanStorage(tmp_path))
    assert ("--warm" in flags) == said
    assert build_parser().parse_args(flags).warm == key


MakeApi = Callable[..., Api]


@pytest.fixture
def agents(rootless_podman: podman_service.Service, agent_tree: AgentTree) -> Iterator[MakeApi]:
    with ExitStack() as stack:

        def make(slots: int | Slots, warm: int, **changes: Any) -> Api:
            config = replace(PATIENT, warm=warm, **changes)
            engine = KillablePodman(rootless_podman.socket)
            return stack.enter_context(serving(engine, config, slots, agent_tree, warden=True))

        yield make
    assert rootless_podman.containers() == []


def waiting(api: Api) -> list[str]:
    """Names of the containers that wait."""
    return [one.specification.container_name for one in api.manager.warm.waiting]


def until_waiting(api: Api, count: int) -> list[str]:
    eventually(lambda: len(waiting(api)) == count, 30)
    return waiting(api)


def name_of(sandbox: dict[str, Any]) -> str:
    return f"sandbox-{sandbox['runtime_id']}"


@pytest.mark.podman
def test_a_sandbox_in_a_container_that_waited_is_like_any_other(agents: MakeApi) -> None:
    api, wish = agents(slots=3, warm=2), {"environment": {"COLOUR": "green blue"}, "working_dir": "/testbed"}
    cold = started(api, **wish)
    names = until_waiting(api, 2)
    assert sorted(api.names()) == sorted([name_of(cold), *names])
    assert [one["runtime_id"] for one in api.client.get("/list").json()["runtimes"]] == [cold["runtime_id"]]
    assert "skyrl_warm_containers 2.0" in api.client.get("/metrics").text
    assert "warm containers" in api.client.get("/").text
    mine = started(api, session_id="mine", **wish)
    assert name_of(mine) in names
    assert session(api, "mine")["runtime_id"] == mine["runtime_id"]
    looks = [look_at(server_of(api, one), api.holder_of(one)) for one in (cold, mine)]
    assert looks[0] == looks[1]
    assert command(mine, "pwd; echo $COLOUR")["stdout"] == "/testbed\ngreen blue\n"
    assert mine["session_api_key"] != cold["session_api_key"]
    counted = api.manager.counted()["starts"]
    assert (counted["succeeded"], counted["warm"]) == (2, 1)


@pytest.mark.podman
def test_one_that_waits_gives_way_to_another_sandbox_at_once(agents: MakeApi) -> None:
    api = agents(slots=2, warm=2)
    first = started(api)
    (spare,) = until_waiting(api, 1)  # there is one idle slot
    other = started(api, environment={"A": "another"})
    assert name_of(other) != spare
    assert waiting(api) == []
    eventually(lambda: sorted(api.names()) == sorted([name_of(first), name_of(other)]))
    assert command(other, "echo $A")["stdout"] == "another\n"
    api.client.post("/stop", json={"runtime_id": first["runtime_id"]})
    until_waiting(api, 1)  # of the kind that was asked for last
    third = started(api, environment={"A": "another"})
    assert api.manager.counted()["starts"]["warm"] == 1
    assert command(third, "echo $A")["stdout"] == "another\n"


@pytest.mark.podman
def test_one_that_cannot_be_used_any_more_is_replaced_by_a_new_container(agents: MakeApi) -> None:
    api = agents(slots=2, warm=1)
    started(api)
    (spare,) = until_waiting(api, 1)
    api.run(api.engine.remove(spare))
    sandbox = started(api)
    assert name_of(sandbox) == spare
    assert command(sandbox, "echo alive")["stdout"] == "alive\n"
    assert api.manager.counted()["starts"] | {"failed": {}} == {"asked": 2, "succeeded": 2, "warm": 0, "failed": {}}


@pytest.mark.podman
def test_an_image_that_was_replaced_meanwhile_is_the_one_that_runs(
    agents: MakeApi, rootless_podman: podman_service.Service
) -> None:
    api, name = agents(slots=2, warm=1), "localhost/replaced:1"
    rootless_podman.podman("tag", IMAGE, name)
    started(api, image=name)
    (spare,) = until_waiting(api, 1)
    rootless_podman.podman("tag", IMAGE_WITH_ENTRYPOINT, name)
    sandbox = started(api, image=name)
    assert name_of(sandbox) == spare
    assert command(sandbox, "echo alive")["stdout"] == "alive\n"
    assert api.manager.counted()["starts"]["warm"] == 0


@pytest.mark.podman
def test_pinning_and_a_network_without_a_way_out_are_kept(agents: MakeApi) -> None:
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    slots = Slots(len(cpus), 1.0, cpus)
    api = agents(slots=slots, warm=1, pinning="taskset", network="deny")
    cold = started(api)
    until_waiting(api, 1)
    mine = started(api)
    assert api.manager.counted()["starts"]["warm"] == 1
    assert [os.sched_getaffinity(server_of(api, one)) for one in (cold, mine)] == [{cpus[0]}, {cpus[1]}]
    assert command(mine, "ip route")["stdout"] in {"", None}


@pytest.mark.podman
def test_the_next_server_takes_over_those_in_use_and_removes_those_that_wait(
    lineage: MakeLineage, agent_tree: AgentTree, rootless_podman: podman_service.Service
) -> None:
    servers = lineage("--agent-dir", str(agent_tree.root), "--agent-start", "fork", "--warm", "2")
    first = servers.begin()
    eventually(lambda: "fork server: ready" in first.log(), 60)
    fields = {"command": "/usr/local/bin/openhands-agent-server --port 60000"}
    before = [ready(first, session_id="cold", **fields)]
    eventually(lambda: figure(first, "skyrl_warm_containers") == 2, 30)
    before.append(ready(first, session_id="warm", **fields))
    eventually(lambda: figure(first, "skyrl_warm_containers") == 2, 30)
    assert len(rootless_podman.containers()) == 4
    servers.kill()
    second = servers.begin("--adopt")
    eventually(lambda: {get(second, f"/sessions/{name}")["pod_status"] for name in ("cold", "warm")} == {"ready"}, 30)
    after = [get(second, f"/sessions/{name}") for name in ("cold", "warm")]
    assert [identity(one) for one in after] == [identity(one) for one in before]
    assert command(after[1], "echo alive")["stdout"] == "alive\n"
    eventually(lambda: sorted(rootless_podman.containers()) == sorted(map(name_of, before)), 30)
    claims = list(rootless_podman.home.rglob("skyrl-claim.json"))
    assert [claim.stat().st_mode & 0o777 for claim in claims] == [0o600]
