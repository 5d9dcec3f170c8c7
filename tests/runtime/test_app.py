"""The HTTP surface and the manager on the fake Podman: authentication, bad input, capacity, ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from slurm_runtime.diagnostics import SETTLE_S
from slurm_runtime.ownership import process_mark
from slurm_runtime.podman import ContainerSpec, EngineError, EngineUnreachable
from slurm_runtime.sandbox import Mount
from tests.runtime.commands import IMAGE, SERVE, SILENT
from tests.runtime.conftest import Api, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.test_contract import eventually, session, started

MakeServer = Callable[..., Api]
KEYED = [("GET", "/sessions/x"), ("GET", "/runtime/x"), ("GET", "/list"), ("GET", "/heartbeat/x"), ("GET", "/nonesuch")]
KEYED += [("POST", path) for path in ("/start", "/stop", "/pause", "/resume", "/build", "/heartbeat/x")]
KEYED += [("GET", path) for path in ("/", "/docs", "/openapi.json", "/metrics", "/sessions/batch", "/registry_prefix")]
KEYED += [("GET", "/image_exists?image=x"), ("GET", "/build_status?build_id=x"), ("POST", "/health"), ("HEAD", "/list")]


@pytest.fixture(scope="module")
def shared() -> Iterator[Api]:
    """One server for tests that only ask and are refused."""
    with serving(FakePodman()) as api:
        yield api


def refusal(answer: httpx.Response) -> str:
    """The ``detail`` of an error; every error has one."""
    assert list(answer.json()) == ["detail"], answer.text
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    return detail


@pytest.mark.parametrize(("method", "path"), KEYED)
@pytest.mark.parametrize("key", [None, "wrong", "", "the-key-of-these-test\xe9"])
def test_without_the_key_everything_but_health_is_401(shared: Api, method: str, path: str, key: str | None) -> None:
    headers = [] if key is None else [(b"X-API-Key", key.encode("latin-1"))]
    answer = httpx.request(method, f"{shared.client.base_url}{path}", headers=headers, trust_env=False)
    assert answer.status_code == 401
    assert method == "HEAD" or "X-API-Key" in refusal(answer)


def test_health_needs_no_key(shared: Api) -> None:
    answer = httpx.get(f"{shared.client.base_url}/health", trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"


def test_without_authentication_no_header_is_needed(server_with: MakeServer) -> None:
    api = server_with(api_key=None)
    assert httpx.get(f"{api.client.base_url}/list", trust_env=False).json() == {"runtimes": [], "total": 0}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 20000,
        b'{"image": ""}',
        b'{"image": "x", "command": ""}',
        b'{"image": "x", "command": []}',
        b'{"image": "x", "command": "sh -c \'unclosed"}',
        b'{"image": "x", "command": [["nested"]]}',
        b'{"image": "x", "command": {"a": 1}}',
        b'{"image": "x", "command": ["a\\u0000b"]}',
        b'{"image": "x", "environment": {"A=B": "c"}}',
        b'{"image": "x", "environment": ["A=B"]}',
        b'{"image": "x", "environment": {"A": {"b": 1}}}',
        b'{"image": "x", "working_dir": "relative"}',
        b'{"image": "x", "resource_factor": 0}',
        b'{"image": "x", "resource_factor": -1}',
        b'{"image": "x", "resource_factor": NaN}',
        b'{"image": "x", "resource_factor": "many"}',
        b'{"image": "x", "resource_factor": 1000}',
        b'{"image": "x", "image_pull_policy": "Sometimes"}',
        b'{"image": "x", "session_id": "\\ud800"}',
        b'{"image": "x", "session_id": "' + b"s" * 10_000 + b'"}',
        b"{}",
    ],
)
def test_bad_starts_are_refused_with_a_sentence(shared: Api, body: bytes) -> None:
    answer = shared.client.post("/start", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert refusal(answer)
    assert shared.client.get("/list").json()["total"] == 0
    assert shared.manager.admission.slots.used == 0


def test_a_body_that_is_too_large(shared: Api) -> None:
    answer = shared.client.post("/start", content=b" " * (5 << 20))
    assert answer.status_code == 413
    assert "bytes" in refusal(answer)

    def pieces() -> Any:
        for _ in range(80):
            yield b" " * (1 << 16)

    answer = shared.client.post("/start", content=pieces())
    assert answer.status_code == 413


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nonesuch", 404), ("GET", "/start", 405)])
def test_other_paths_and_methods(shared: Api, method: str, path: str, status: int) -> None:
    answer = shared.client.request(method, path)
    assert answer.status_code == status
    assert refusal(answer)


def test_23_unknown_ids_are_404(fake: Api) -> None:
    for path in ("/sessions/nobody", "/runtime/nobody"):
        answer = fake.client.get(path)
        assert answer.status_code == 404
        assert "nobody" in refusal(answer)


def test_06_every_field_that_clients_send_is_accepted(fake: Api) -> None:
    fields = {
        "run_as_user": 10001,
        "run_as_group": 10001,
        "fs_group": 10001,
        "image_pull_policy": "IfNotPresent",
        "runtime_class": "sysbox-runc",
        "resource_factor": 2.0,
        "enable_gpu": False,
        "runtime_mounts": [],
        "something_new": {"a": [1]},
    }
    sandbox = started(fake, environment={}, **fields)
    assert fake.engine.containers.keys() == {f"sandbox-{sandbox['runtime_id']}"}  # type: ignore[union-attr]


@pytest.mark.parametrize("fields", [{}, {"environment": None, "session_id": None, "resource_factor": None}])
def test_most_fields_may_be_absent_or_null(fake: Api, fields: dict[str, None]) -> None:
    started(fake, **fields)


def test_the_servers_own_image_serves_a_request_without_one(server_with: MakeServer) -> None:
    api = server_with(default_image=IMAGE)
    assert api.start(command=SERVE).status_code == 201


def test_10_a_sandbox_is_known_before_start_has_answered(server_with: MakeServer) -> None:
    api = server_with(FakePodman(delay_s=0.5))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.start, image=IMAGE, command=SERVE, session_id="early")
        found = eventually(lambda: (seen := api.client.get("/sessions/early")).status_code == 200 and seen.json())
        assert not answer.done()
        assert found["status"] == ("running" if "url" in found else "starting")
        assert found["pod_status"] == "pending"
        assert api.client.get(f"/runtime/{found['runtime_id']}").json()["session_id"] == "early"
        assert answer.result().json()["runtime_id"] == found["runtime_id"]


def test_13_no_room_is_503_with_used_and_total_and_leaves_nothing(server_with: MakeServer) -> None:
    api = server_with(slots=2, string_patience_s=0.3, list_patience_s=0.3)
    started(api)
    started(api)
    answer = api.start(image=IMAGE, command=SERVE, session_id="late")
    assert answer.status_code == 503
    assert "2 of 2" in refusal(answer)
    assert api.client.get("/sessions/late").status_code == 404
    assert api.manager.admission.waiting == 0


def test_13_a_slot_that_becomes_free_in_time_is_taken(server_with: MakeServer) -> None:
    api = server_with(slots=1)
    first = started(api)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(api.start, image=IMAGE, command=SERVE)
        eventually(lambda: api.manager.admission.waiting == 1)
        api.client.post("/stop", json={"runtime_id": first["runtime_id"]})
        assert second.result().status_code == 201


def test_19_resource_factor_multiplies_the_share_and_takes_slots(server_with: MakeServer) -> None:
    engine = FakePodman()
    api = server_with(engine, slots=4, cpus_per_worker=0.5, memory_bytes=1 << 30)
    sandbox = started(api, resource_factor=2)
    spec = engine.containers[f"sandbox-{sandbox['runtime_id']}"].spec
    assert (spec.cpus, spec.memory_bytes) == (1.0, 2 << 30)
    assert api.manager.admission.slots.used == 2
    answer = api.start(image=IMAGE, command=SERVE, resource_factor=8)
    assert answer.status_code == 422
    assert "8 slots" in refusal(answer)


def test_starts_under_way_in_podman_are_bounded(server_with: MakeServer) -> None:
    engine = FakePodman(delay_s=0.05)
    api = server_with(engine, starters=3)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: api.start(image=IMAGE, command=SERVE), range(12)))
    assert engine.most_under_way == 3


def test_an_image_is_pulled_once_for_all_who_ask(server_with: MakeServer) -> None:
    engine = FakePodman(delay_s=0.4, registry={"example/new:1"})
    api = server_with(engine, starters=1)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: api.start(image="example/new:1", command=SERVE), range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    assert engine.pulls == ["example/new:1"]


def test_a_pull_holds_up_nobody_else(server_with: MakeServer) -> None:
    engine = FakePodman(pull_delay_s=3.0, registry={"example/large:1"})
    api = server_with(engine, starters=1)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(api.start, image="example/large:1", command=SERVE)
        eventually(lambda: engine.pulls)
        assert api.start(image=IMAGE, command=SERVE).status_code == 201
        assert not slow.done()


def test_pull_policy_always_asks_the_registry_although_the_image_is_here(server_with: MakeServer) -> None:
    engine = FakePodman(registry={IMAGE})
    api = server_with(engine)
    started(api, image_pull_policy="Always")
    assert engine.pulls == [IMAGE]


def test_11_a_start_that_waits_for_its_image_is_answered_as_pending_in_time(server_with: MakeServer) -> None:
    api = server_with(FakePodman(pull_delay_s=1.0, registry={"example/new:1"}), list_patience_s=0.3)
    answer = api.start(image="example/new:1", command=SERVE, session_id="slow")
    assert answer.status_code == 201
    assert answer.json()["pod_status"] == "pending"
    assert "example/new:1 is being pulled" in answer.json()["events"][0]
    ready = eventually(lambda: (found := session(api, "slow"))["pod_status"] == "ready" and found)
    assert ready["url"] == answer.json()["url"]


def test_ports_of_the_range_are_used_and_taken_ones_passed_over(server_with: MakeServer) -> None:
    ports = range(24610, 24614)
    engine = FakePodman(ports_taken_by_others={24611})
    api = server_with(engine, sandbox_ports=ports)
    urls = {started(api)["url"] for _ in range(3)}
    assert urls == {f"http://127.0.0.1:{port}" for port in (24610, 24612, 24613)}
    answer = api.start(image=IMAGE, command=SERVE)
    assert answer.status_code == 502
    assert "port" in refusal(answer)


def test_a_silent_server_fails_after_its_time(server_with: MakeServer) -> None:
    api = server_with(startup_timeout_s=0.5, ready_grace_s=0.0)
    assert api.start(image=IMAGE, command=SILENT, session_id="silent").json()["pod_status"] == "pending"
    failed = eventually(lambda: (found := session(api, "silent"))["pod_status"] == "failed" and found)
    assert "0.5 s" in failed["pod_logs"]
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0)


def test_14_a_client_that_hangs_up_leaves_no_sandbox(server_with: MakeServer) -> None:
    api = server_with(FakePodman(delay_s=0.4))
    body = json.dumps({"image": IMAGE, "command": SERVE, "session_id": "gone"})
    headers = {"X-API-Key": api.client.headers["X-API-Key"], "Content-Type": "application/json"}
    url = api.client.base_url
    with contextlib.closing(http.client.HTTPConnection(url.host, url.port or 0)) as connection:
        connection.request("POST", "/start", body, headers)
        eventually(lambda: api.client.get("/sessions/gone").status_code == 200)
    eventually(lambda: session(api, "gone")["status"] == "stopped")
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0)


def test_an_offender_has_failed_although_podman_never_learns_that_it_ended(fake: Api) -> None:
    """As on a full disk, where Podman cannot note it: of one that ended by itself its word would be waited for."""
    sandbox = started(fake)
    entry = fake.manager.register.of_runtime(sandbox["runtime_id"])

    def killed() -> None:
        entry.has_ended = True
        fake.manager.supervisor.hear({"event": "offender", "sandbox": entry.name, "reason": "it filled the disk"})

    fake.loop.call_soon_threadsafe(killed)
    eventually(lambda: session(fake, sandbox["session_id"])["pod_status"] == "failed", SETTLE_S / 2)
    assert "it filled the disk" in session(fake, sandbox["session_id"])["pod_logs"]


def test_stop_while_starting(server_with: MakeServer) -> None:
    api = server_with(FakePodman(delay_s=0.4))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.start, image=IMAGE, command=SERVE, session_id="early")
        eventually(lambda: api.client.get("/sessions/early").status_code == 200)
        runtime_id = session(api, "early")["runtime_id"]
        assert api.client.post("/stop", json={"runtime_id": runtime_id}).status_code == 200
        assert answer.result().status_code == 409
    assert api.names() == []
    assert api.manager.admission.slots.used == 0


class SlowToGoOn(FakePodman):
    async def unpause(self, name: str) -> None:
        await super().unpause(name)
        await asyncio.sleep(0.4)


def test_stop_while_it_is_resumed(server_with: MakeServer) -> None:
    """Neither comes to harm; the resumed one is told that nothing is left."""
    api = server_with(SlowToGoOn())
    wish = {"runtime_id": started(api)["runtime_id"]}
    assert api.client.post("/pause", json=wish).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.client.post, "/resume", json=wish)
        time.sleep(0.1)
        assert api.client.post("/stop", json=wish).status_code == 200
        assert answer.result().status_code == 404
        assert "nothing is left to resume" in refusal(answer.result())
    assert api.names() == []


def test_a_removal_that_podman_refuses_keeps_the_slot_until_it_works(server_with: MakeServer) -> None:
    engine = FakePodman()
    api = server_with(engine, watch_period_s=0.5)
    runtime_id = started(api)["runtime_id"]
    engine.unremovable[f"sandbox-{runtime_id}"] = EngineError("device or resource busy")
    answer = api.client.post("/stop", json={"runtime_id": runtime_id})
    used = api.manager.admission.slots.used
    engine.unremovable.clear()
    assert answer.status_code == 502
    assert "busy" in refusal(answer)
    assert used == 1
    eventually(lambda: api.manager.admission.slots.used == 0)
    assert api.names() == []


def podman_word(api: Api) -> str:
    return str(api.client.get("/health").json()["podman"])


def test_a_container_that_podman_never_removes_holds_up_nothing_else(
    server_with: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakePodman()
    api = server_with(engine, slots=2, watch_period_s=0.05, list_patience_s=0.5)
    stuck, other = started(api)["runtime_id"], started(api)["runtime_id"]
    for runtime_id in (stuck, other):
        engine.unremovable[f"sandbox-{runtime_id}"] = EngineError("device or resource busy")
        assert api.client.post("/stop", json={"runtime_id": runtime_id}).status_code == 502
    del engine.unremovable[f"sandbox-{other}"]
    eventually(lambda: api.names() == [f"sandbox-{stuck}"])
    eventually(lambda: api.manager.admission.slots.used == 1)
    started(api, session_id="second")
    tries = engine.removals.count(f"sandbox-{stuck}")
    eventually(lambda: engine.removals.count(f"sandbox-{stuck}") > tries + 3)
    assert podman_word(api) == "connected"
    full = api.start(image=IMAGE, command=SERVE)
    assert (full.status_code, "no room" in refusal(full)) == (503, True)
    said = [record for record in caplog.records if f"container sandbox-{stuck} is not removed yet" in record.message]
    assert len(said) == 1
    engine.unremovable.clear()
    eventually(lambda: api.manager.admission.slots.used == 1)


def test_a_dead_sandbox_that_cannot_be_removed_does_not_make_podman_unreachable(server_with: MakeServer) -> None:
    engine = FakePodman()
    api = server_with(engine, watch_period_s=0.5)
    name = f"sandbox-{started(api, session_id='killed')['runtime_id']}"
    engine.unremovable[name] = EngineError("device or resource busy")
    api.run(engine.kill(name))
    eventually(lambda: name in engine.removals)
    assert session(api, "killed")["pod_status"] == "failed"
    time.sleep(0.2)  # within the same period
    assert podman_word(api) == "connected"
    engine.unremovable.clear()


def test_podman_that_goes_away_during_a_removal_is_unreachable(server_with: MakeServer) -> None:
    engine = FakePodman()
    api = server_with(engine, watch_period_s=0.1)
    runtime_id = started(api)["runtime_id"]
    engine.unremovable[f"sandbox-{runtime_id}"] = EngineUnreachable("nobody listens")
    api.client.post("/stop", json={"runtime_id": runtime_id})
    eventually(lambda: podman_word(api) == "unreachable")
    engine.unremovable.clear()
    eventually(lambda: podman_word(api) == "connected")
    assert api.names() == []


def orphaned(name: str) -> ContainerSpec:
    """A container of a server that is dead: number 1 started at another time."""
    dead = "/".join([*process_mark().split("/")[:3], "1", "12345"])
    return ContainerSpec(name, IMAGE, tuple(SERVE), {}, "/", {"skyrl.server": dead}, 60000)


def test_an_orphan_that_podman_never_removes_holds_up_nothing_else(
    server_with: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakePodman(unremovable={"stuck": EngineError("device or resource busy")})
    for name in ("stuck", "other"):
        asyncio.run(engine.create(orphaned(name)))
    api = server_with(engine, watch_period_s=0.05)
    eventually(lambda: engine.removals.count("stuck") > 3)
    assert (api.names(), podman_word(api)) == (["stuck"], "connected")
    api.run(engine.kill(f"sandbox-{started(api, session_id='killed')['runtime_id']}"))
    eventually(lambda: session(api, "killed")["pod_status"] == "failed")
    assert caplog.text.count("container stuck is not removed yet") == 1
    engine.unremovable.clear()
    eventually(lambda: api.names() == [])


def test_a_server_that_stops_while_it_takes_the_agent_out_leaves_no_container(server_with: MakeServer) -> None:
    engine = FakePodman(delay_s=0.5, registry={IMAGE})
    api = server_with(engine, agent_image=IMAGE)
    eventually(lambda: engine.under_way == 1)
    assert api.run(api.manager.close(5)) == []
    assert (engine.most_under_way, engine.containers) == (1, {})


def test_a_stopping_server_refuses_starts_and_removes_all(server_with: MakeServer) -> None:
    engine = FakePodman(delay_s=0.3)
    api = server_with(engine, slots=3)
    for _ in range(3):
        started(api)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.start, image=IMAGE, command=SERVE)
        eventually(lambda: api.manager.admission.waiting == 1)
        assert api.run(api.manager.close(5)) == []
        assert waiting.result().status_code == 503
    assert api.start(image=IMAGE, command=SERVE).status_code == 503
    assert engine.containers == {}


def test_what_cannot_be_removed_in_time_is_named(server_with: MakeServer) -> None:
    engine = FakePodman()
    api = server_with(engine, watch_period_s=60.0)  # else it tries again by itself
    runtime_id = started(api)["runtime_id"]
    engine.refuse_removal = 1
    assert api.run(api.manager.close(5)) == [f"sandbox-{runtime_id}"]
    assert api.run(api.manager.close(5)) == []


def test_a_start_whose_container_is_just_made_hears_that_the_server_stops(server_with: MakeServer) -> None:
    """Its URL is known by then, and it is no start that somebody stopped."""
    engine = FakePodman(delay_s=1.0)
    api = server_with(engine)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.start, image=IMAGE, command=SERVE, session_id="late")
        eventually(lambda: engine.under_way and session(api, "late")["url"])
        assert api.run(api.manager.close(5)) == []
        assert answer.result().status_code == 503
    assert "the server is stopping" in refusal(answer.result())


def test_who_asks_for_a_session_in_the_moment_that_its_client_leaves_gets_it_anew(server_with: MakeServer) -> None:
    """Not the sandbox that is being removed for the one that left."""
    api = server_with(FakePodman(delay_s=1.0), slots=1)
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            api.client.post("/start", json={"image": IMAGE, "command": SERVE, "session_id": "again"}, timeout=0.2)
        answer = api.start(image=IMAGE, command=SERVE, session_id="again")
        assert answer.status_code == 201, answer.text
        assert api.names() == [f"sandbox-{answer.json()['runtime_id']}"]
        assert api.client.post("/stop", json={"runtime_id": answer.json()["runtime_id"]}).status_code == 200


def test_heartbeats(fake: Api) -> None:
    assert fake.client.get("/heartbeat/training").status_code == 404
    assert fake.client.post("/heartbeat/training").json()["count"] == 1
    assert fake.client.post("/heartbeat/training").json()["count"] == 2
    time.sleep(0.05)
    beat = fake.client.get("/heartbeat/training").json()
    assert beat["name"] == "training"
    assert beat["count"] == 2
    assert 0.04 < beat["age_s"] < 5


def test_heartbeats_are_bounded(fake: Api) -> None:
    assert fake.client.post("/heartbeat/" + "n" * 1000).status_code == 422
    codes = [fake.client.post(f"/heartbeat/n{number}").status_code for number in range(65)]
    assert codes == [200] * 64 + [429]


def test_a_thousand_requests_without_a_key_leave_no_trace(fake: Api) -> None:
    """One connection, so that it takes a moment only; the counters that could grow stay empty."""

    def ask() -> int:
        with httpx.Client(base_url=str(fake.client.base_url), trust_env=False) as client:
            return sum(client.post("/start", json={"image": IMAGE}).status_code == 401 for _ in range(500))

    threads = ThreadPoolExecutor(2)
    assert sum(threads.map(lambda _: ask(), range(2))) == 1000
    threads.shutdown()
    assert fake.manager.living() == []
    assert threading.active_count() < 50


def raw_start(api: Api, body: Mapping[str, object]) -> http.client.HTTPConnection:
    """A connection that has sent /start and does not read its answer."""
    url = api.client.base_url
    connection = http.client.HTTPConnection(url.host, url.port or 0)
    headers = {"X-API-Key": api.client.headers["X-API-Key"], "Content-Type": "application/json"}
    connection.request("POST", "/start", json.dumps(body), headers)
    return connection


def test_14_a_hang_up_is_heeded_at_once_and_not_when_the_start_is_over(server_with: MakeServer) -> None:
    engine = FakePodman(pull_delay_s=60.0, registry={"example/large:1"})
    api = server_with(engine)
    with contextlib.closing(raw_start(api, {"image": "example/large:1", "command": SERVE, "session_id": "gone"})):
        eventually(lambda: engine.pulls)
    eventually(lambda: session(api, "gone").get("status") == "stopped")
    eventually(lambda: api.manager.admission.slots.used == 0)


def test_14_a_hang_up_while_it_waits_for_a_slot_leaves_the_queue(server_with: MakeServer) -> None:
    api = server_with(slots=1)
    started(api)
    with contextlib.closing(raw_start(api, {"image": IMAGE, "command": SERVE, "session_id": "gone"})):
        eventually(lambda: api.manager.admission.waiting == 1)
    eventually(lambda: api.manager.admission.waiting == 0)


def test_14_a_session_that_somebody_else_waits_for_survives_a_hang_up(server_with: MakeServer) -> None:
    api = server_with(FakePodman(delay_s=0.4))
    fields = {"image": IMAGE, "command": SERVE, "session_id": "shared"}
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(api.start, **fields)
        eventually(lambda: api.client.get("/sessions/shared").status_code == 200)
        before = api.manager.register.of_runtime(session(api, "shared")["runtime_id"])
        with contextlib.closing(raw_start(api, fields)):
            eventually(lambda: before.askers == 2)
        eventually(lambda: before.askers == 1)
        assert patient.result().status_code == 201
    eventually(lambda: session(api, "shared")["pod_status"] == "ready")


def test_26_batch_is_a_list_of_the_known_ones(fake: Api) -> None:
    first, second = started(fake, session_id="a"), started(fake, session_id="b")
    answer = fake.client.get("/sessions/batch", params={"ids": ["a", "nobody", "b", "a"]})
    assert answer.status_code == 200
    found = [(one["session_id"], one["session_api_key"]) for one in answer.json()]
    assert found == [(one["session_id"], one["session_api_key"]) for one in (first, second)]
    assert fake.client.get("/sessions/batch").json() == []


@pytest.mark.parametrize("name", ["batch", ".", "..", "../../etc", "a/b", "a?b", "a#b", "a%2fb", "a\nb", "a\\b"])
def test_a_session_that_could_not_be_asked_for_is_refused(shared: Api, name: str) -> None:
    answer = shared.start(image=IMAGE, command=SERVE, session_id=name)
    assert answer.status_code == 422
    assert "session_id" in refusal(answer)


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_30_pause_and_resume_of_nothing_and_of_unknown_ones(shared: Api, verb: str) -> None:
    for body in ({}, {"runtime_id": None}):
        assert shared.client.post(f"/{verb}", json=body).json() == {"status": "nothing to do"}
    answer = shared.client.post(f"/{verb}", json={"runtime_id": "nobody"})
    assert answer.status_code == 404
    assert "nobody" in refusal(answer)


def test_30_resume_of_a_running_one_is_fine(fake: Api) -> None:
    sandbox = started(fake)
    answer = fake.client.post("/resume", json={"runtime_id": sandbox["runtime_id"]})
    assert answer.status_code == 200
    assert {name: answer.json()[name] for name in ("status", "url", "session_api_key")} == {
        name: sandbox[name] for name in ("status", "url", "session_api_key")
    }


def test_mounts_only_below_allowed_folders(server_with: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "allowed" / "tools").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "allowed" / "way-out").symlink_to(tmp_path / "secret")
    (tmp_path / "way-in").symlink_to(tmp_path / "allowed")
    engine = FakePodman()
    api = server_with(engine, allowed_mounts=(tmp_path / "way-in",))

    def ask(host: str, container: str = "/tools", mode: str | None = None) -> httpx.Response:
        mount = {"host_path": host, "container_path": container, "mode": mode}
        return api.start(image=IMAGE, command=SERVE, runtime_mounts=[mount])

    for folder in ("allowed/way-out", "secret", "allowed/../secret", "allowed-too", "nonesuch", "."):
        answer = ask(f"{tmp_path}/{folder}")
        assert answer.status_code == 403, folder
        assert "--allow-mount" in refusal(answer)
    for wrong in (
        ask("allowed/tools"),
        ask(f"{tmp_path}/allowed/nonesuch"),
        ask(f"{tmp_path}/allowed/tools", "/"),
        ask(f"{tmp_path}/allowed/tools", "/x/../../proc"),
        ask(f"{tmp_path}/allowed/tools", "relative"),
        ask(f"{tmp_path}/allowed/tools", "/opt"),
        ask(f"{tmp_path}/allowed/tools", "/tools", "rwx"),
    ):
        assert wrong.status_code == 422
    assert engine.containers == {}
    assert ask(f"{tmp_path}/way-in/tools", "//tools/./here").status_code == 201
    assert ask(f"{tmp_path}/allowed/tools", "/data", "rw").status_code == 201
    mounts = [mount for one in engine.containers.values() for mount in one.spec.mounts if "tools" in mount.source]
    assert mounts == [
        Mount(f"{tmp_path}/allowed/tools", "/tools/here", read_only=True),
        Mount(f"{tmp_path}/allowed/tools", "/data", read_only=False),
    ]


def test_mounts_are_refused_unless_allowed(shared: Api) -> None:
    mount = {"host_path": "/etc", "container_path": "/b", "mode": "ro"}
    answer = shared.start(image=IMAGE, command=SERVE, runtime_mounts=[mount])
    assert answer.status_code == 403
    assert "--allow-mount" in refusal(answer)


def test_the_access_log_has_a_line_a_request_and_no_key(fake: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="slurm_runtime.access"):
        fake.client.get("/sessions/a%0Ab?key=a-secret")
        fake.client.post("/stop", json={"runtime_id": None})
        eventually(lambda: len([r for r in caplog.records if r.name == "slurm_runtime.access"]) == 2)
    lines = [r.getMessage() for r in caplog.records if r.name == "slurm_runtime.access"]
    assert lines[0].startswith("method=GET path=/sessions/a%0Ab status=404 ms=")
    assert re.search(r"^method=POST path=/stop status=200 ms=[\d.]+ client=127.0.0.1:\d+ request_bytes=19$", lines[1])
    assert "a-secret" not in "".join(lines)
    assert fake.client.headers["X-API-Key"] not in caplog.text


def test_a_start_waits_for_podman_to_answer_again(server_with: MakeServer) -> None:
    engine = FakePodman()
    api = server_with(engine)
    living = started(api)
    engine.away = True
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(api.start, image=IMAGE, command=SERVE, session_id="meanwhile")
        stopping = pool.submit(api.client.post, "/stop", json={"runtime_id": living["runtime_id"]})
        eventually(lambda: api.client.get("/health").json()["podman"] == "unreachable")
        time.sleep(0.5)  # some looks of the supervisor
        assert not starting.done()
        assert not stopping.done()
        engine.away = False
        assert (starting.result().status_code, stopping.result().status_code) == (201, 200)
    eventually(lambda: api.client.get("/health").json()["podman"] == "connected")
    assert api.names() == [f"sandbox-{starting.result().json()['runtime_id']}"]
