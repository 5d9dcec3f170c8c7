"""The rest of the conformance checklist on real rootless Podman; numbers in names are those of ``test_checklist``."""

from __future__ import annotations

import base64
import http.client
import io
import math
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from slurm_runtime.agent.tree import AgentTree
from tests.runtime.commands import IMAGE, SERVE, SILENT
from tests.runtime.conftest import API_KEY, CONFIG, Api, KillablePodman, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.fleet import HEAD_CONFIG, head_over
from tests.runtime.test_contract import command, eventually, session, started

pytestmark = pytest.mark.podman

MakeApi = Callable[..., Api]


# What a node does by itself, whoever asked it, or a head by the same code: shown once, on real Podman.
BY_ITSELF = pytest.mark.parametrize("make", ["server"], indirect=True)


@pytest.fixture(params=["server", "head"])
def make(request: pytest.FixtureRequest) -> Iterator[MakeApi]:
    """A server on real Podman, or a head over two servers on fakes."""
    with ExitStack() as stack:

        def serve(slots: int = 4, tree: AgentTree | None = None, **changes: Any) -> Api:
            engine = KillablePodman(request.getfixturevalue("rootless_podman").socket)
            api = stack.enter_context(serving(engine, replace(CONFIG, **changes), slots, tree, warden=True))
            api.run(api.manager.connection.ready())  # patience is for starts, not for Podman's first answer
            return api

        def lead(slots: int = 4, **changes: Any) -> Api:
            configs = [replace(CONFIG, node_name=name, **changes) for name in ("cpu-a", "cpu-b")]
            nodes = [stack.enter_context(serving(FakePodman(pull_delay_s=30.0), one, slots)) for one in configs]
            patience = {name: changes[name] for name in ("list_patience_s", "string_patience_s") if name in changes}
            return stack.enter_context(head_over(nodes, replace(HEAD_CONFIG, **patience)))

        yield lead if request.param == "head" else serve


ENDPOINTS = [
    ("POST", "/start"),
    ("POST", "/stop"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("GET", "/sessions/x"),
    ("GET", "/sessions/batch"),
    ("GET", "/runtime/x"),
    ("GET", "/list"),
    ("GET", "/registry_prefix"),
    ("GET", "/image_exists"),
    ("POST", "/build"),
    ("GET", "/build_status"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
]


def test_01_02_every_endpoint_but_health_asks_for_the_key_in_json(make: MakeApi) -> None:
    api = make()
    assert httpx.get(f"{api.client.base_url}/health", trust_env=False).status_code == 200
    for method, path in ENDPOINTS:
        for key in (None, "wrong"):
            headers = {} if key is None else {"X-API-Key": key}
            url = f"{str(api.client.base_url).rstrip('/')}{path}"
            answer = httpx.request(method, url, headers=headers, trust_env=False)
            assert answer.status_code == 401, path
            assert isinstance(answer.json()["detail"], str)


@BY_ITSELF
def test_01_without_authentication_no_key_is_asked_for(make: MakeApi) -> None:
    open_api = make(api_key=None)
    assert httpx.get(f"{open_api.client.base_url}/list", trust_env=False).status_code == 200


def test_02_22_25_answers_have_the_fields_and_types_that_clients_read(make: MakeApi) -> None:
    api = make()
    sandbox = started(api)
    for path in (f"/sessions/{sandbox['session_id']}", f"/runtime/{sandbox['runtime_id']}"):
        found = api.client.get(path).json()
        assert type(found["restart_count"]) is int
        assert type(found["restart_reasons"]) is list
        assert found["status"] in {"running", "paused", "stopped"}
        assert None not in found.values()
    for path in ("/sessions/nobody", "/runtime/nobody", "/nowhere"):
        answer = api.client.get(path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["detail"], str)


@BY_ITSELF
def test_04_an_idle_connection_stays_usable(make: MakeApi) -> None:
    api = make()
    with socket.create_connection(("127.0.0.1", api.client.base_url.port or 0), 5) as connection:
        for pause_s in (15.5, 0):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.read()[:1]) == (200, b"{")
            time.sleep(pause_s)


def test_06_every_field_of_every_client_is_accepted(make: MakeApi) -> None:
    api = make()
    fields = {
        "run_as_user": 10001,
        "run_as_group": 10001,
        "fs_group": 10001,
        "image_pull_policy": "IfNotPresent",
        "runtime_class": "sysbox-runc",
        "resource_factor": 1.0,
        "enable_gpu": False,
        "runtime_mounts": [],
        "something_new": {"a": [1]},
        "environment": {},
    }
    assert started(api, **fields)["pod_status"] == "ready"


def test_10_the_session_is_known_before_start_has_answered(make: MakeApi) -> None:
    api = make(ready_grace_s=5.0)
    starting = threading.Thread(target=lambda: api.start(image=IMAGE, command=SILENT, session_id="early"))
    starting.start()
    found = eventually(lambda: (answer := api.client.get("/sessions/early")).status_code == 200 and answer.json())
    assert api.client.get(f"/runtime/{found['runtime_id']}").status_code == 200
    assert starting.is_alive()
    starting.join()


@pytest.fixture
def mute_registry() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_11_a_pull_that_takes_long_is_answered_as_pending(make: MakeApi, mute_registry: int) -> None:
    api = make(list_patience_s=1.0)
    image = f"localhost:{mute_registry}/slow:1"
    answer = api.start(image=image, command=SERVE, session_id="slow")
    assert answer.status_code == 201
    found = answer.json()
    assert found["pod_status"] == "pending"
    assert "pulled" in found["events"][0]
    assert found["url"].startswith("http://127.0.0.1:")
    assert api.client.post("/stop", json={"runtime_id": found["runtime_id"]}).status_code == 200
    assert api.manager.admission.slots.used == 0


def test_13_no_room_is_503_with_both_numbers_and_leaves_no_half_sandbox(make: MakeApi) -> None:
    api = make(1, list_patience_s=1.0)
    total = api.manager.admission.slots.total  # one of each node
    for _ in range(total):
        started(api)
    answer = api.start(image=IMAGE, command=SERVE, session_id="late")
    assert answer.status_code == 503
    assert f"{total} of {total}" in answer.json()["detail"]
    assert api.client.get("/sessions/late").status_code == 404
    assert len(api.names()) == total


def test_14_a_client_that_hangs_up_during_start_leaves_nothing(make: MakeApi) -> None:
    api = make(ready_grace_s=20.0)
    with pytest.raises(httpx.ReadTimeout):
        api.client.post("/start", json={"image": IMAGE, "command": SILENT, "session_id": "gone"}, timeout=1.0)
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0, 60)


@BY_ITSELF
def test_19_a_double_share_takes_two_slots_and_twice_the_memory(make: MakeApi, agent_tree: AgentTree) -> None:
    api = make(3, agent_tree, memory_bytes=60 << 20)
    allocate = "dd if=/dev/zero of=/dev/null bs=80M count=400"
    double = started(api, resource_factor=2)
    assert api.manager.admission.slots.used == 2
    assert command(double, allocate, 60)["exit_code"] == 0
    single = started(api, session_id="single")
    with pytest.raises((httpx.HTTPError, AssertionError)):
        command(single, allocate.replace("400", "100000"), 60)
    eventually(lambda: session(api, "single")["pod_status"] == "failed")
    assert "of memory" in session(api, "single")["pod_logs"]
    answer = api.start(image=IMAGE, command=SERVE, resource_factor=4)
    assert answer.status_code == 422
    assert "3" in answer.json()["detail"]


def test_23_30_unknown_ones_are_404_and_resume_of_a_running_one_is_fine(make: MakeApi) -> None:
    api = make()
    for verb in ("pause", "resume", "stop"):
        assert api.client.post(f"/{verb}", json={"runtime_id": "nobody"}).status_code == 404
        assert api.client.post(f"/{verb}", json={"runtime_id": None}).status_code == 200
    running = started(api)["runtime_id"]
    assert api.client.post("/resume", json={"runtime_id": running}).status_code == 200


def test_26_batch_is_a_list_of_the_known_ones(make: MakeApi) -> None:
    api = make()
    names = [started(api, session_id=name)["session_id"] for name in ("a", "b")]
    found = api.client.get("/sessions/batch", params=[("ids", "a"), ("ids", "nobody"), ("ids", "b")]).json()
    assert [entry["session_id"] for entry in found] == names
    assert all(entry["session_api_key"] for entry in found)


def _commands(api: Api, sandbox: dict[str, Any]) -> int:
    """How many commands run in a sandbox, as the warden sees it."""
    control = api.manager.launcher.control
    assert control is not None
    return int(api.run(control.usage()).get(f"sandbox-{sandbox['runtime_id']}", {}).get("commands", 0))


@BY_ITSELF
def test_33_an_idle_sandbox_is_stopped_and_a_working_one_is_not(
    make: MakeApi, agent_tree: AgentTree, caplog: pytest.LogCaptureFixture
) -> None:
    api = make(4, agent_tree, idle_timeout_s=3.0)
    api.manager.supervisor._next_idle_look = math.inf  # until the command runs
    idle, working = started(api, session_id="idle"), started(api, session_id="working")
    httpx.post(
        f"{working['url']}/api/bash/start_bash_command",
        json={"command": "sleep 600", "timeout": 600},
        headers={"X-Session-API-Key": working["session_api_key"]},
        trust_env=False,
    )
    eventually(lambda: _commands(api, working) > 0)
    api.manager.supervisor._next_idle_look = 0.0
    eventually(lambda: session(api, "idle")["status"] == "stopped", 30)
    assert "--idle-timeout" in caplog.text
    assert idle["runtime_id"] in caplog.text
    time.sleep(4)
    assert session(api, "working")["pod_status"] == "ready"


def context(dockerfile: str, name: str = "") -> bytes:
    """A build context as the legacy client sends it: base64 text of a tar.gz, whose header has its name."""
    buffer = io.BytesIO()
    with tarfile.open(name, fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("Dockerfile")
        info.size = len(dockerfile.encode())
        archive.addfile(info, io.BytesIO(dockerfile.encode()))
    return base64.b64encode(buffer.getvalue())


def test_34_35_an_image_is_built_found_and_started(make: MakeApi) -> None:
    api = make(build_images=True, registry_prefix="localhost/tests")
    prefix = api.client.get("/registry_prefix").json()["registry_prefix"]
    image = f"{prefix}/runtime:{time.time_ns()}"
    assert api.client.get("/image_exists", params={"image": image}).json()["exists"] is False
    dockerfile = f"FROM {IMAGE}\nRUN echo built > /built\n"
    answer = api.client.post("/build", files={"context": context(dockerfile)}, data={"target_image": image})
    assert answer.status_code < 300, answer.text
    assert answer.json()["url"]
    build = {"build_id": answer.json()["build_id"]}
    done = eventually(
        lambda: (found := api.client.get("/build_status", params=build).json())["status"] == "SUCCESS" and found, 60
    )
    found = api.client.get("/image_exists", params={"image": image}).json()
    assert found["exists"] is True
    assert found["image"]["upload_time"]
    assert found["image"]["image_size_bytes"] > 0
    assert started(api, image=done["image"])["pod_status"] == "ready"


def test_35_a_build_that_fails_says_why_and_off_is_501(make: MakeApi) -> None:
    api = make(build_images=True)
    dockerfile = f"FROM {IMAGE}\nRUN echo no such luck && exit 9\n"
    sent = context(dockerfile, "fail.tar.gz")  # for the fake, which runs no command
    answer = api.client.post("/build", files={"context": sent}, data={"target_image": "localhost/x:1"})
    build = {"build_id": answer.json()["build_id"]}
    done = eventually(
        lambda: (found := api.client.get("/build_status", params=build).json())["status"] == "FAILURE" and found, 60
    )
    assert "localhost/x:1" in done["error"]
    off = make().client.post("/build", files={"context": b""}, data={"target_image": "x"})
    assert off.status_code == 501
    assert "runtime_container_image" in off.json()["detail"]


def test_the_page_and_the_metrics_tell_of_a_sandbox(make: MakeApi) -> None:
    api = make()
    sandbox = started(api, session_id="shown")
    page = httpx.get(str(api.client.base_url), auth=("anyone", API_KEY), trust_env=False)
    assert page.status_code == 200
    assert "shown" in page.text
    assert sandbox["session_api_key"] not in page.text
    assert "slots" in api.client.get("/metrics").text
