"""Whatever clients send: a clear error as JSON, no traceback in the log, no slot lost, no memory kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from slurm_runtime.guard import Guard, access_line, basic_password, may_pass
from tests.runtime.commands import IMAGE
from tests.runtime.conftest import API_KEY, Api, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.test_contract import eventually

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Api]:
    """One server for all: what one test leaves behind would be seen by the next."""
    with serving(FakePodman()) as api:
        yield api


@pytest.fixture(autouse=True)
def unharmed(shared: Api, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test: no traceback, no sandbox, no slot, nobody in the queue, and the server answers."""
    with caplog.at_level(logging.WARNING):
        yield
    tracebacks = [record.getMessage() for record in caplog.records if record.exc_info or "Traceback" in record.msg]
    assert tracebacks == []
    assert shared.client.get("/health").status_code == 200
    assert shared.client.get("/list").json()["total"] == 0
    assert shared.manager.admission.slots.used == 0
    assert shared.manager.admission.waiting == 0


def refused(answer: httpx.Response, *statuses: int) -> str:
    """The sentence of an error."""
    assert answer.status_code in (statuses or range(400, 500)), answer.text
    assert list(answer.json()) == ["detail"]
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and detail
    assert "Traceback" not in detail and len(detail) < 3000
    return detail


BODIES = [
    b"",
    b"{",
    b"nul",
    b"[]",
    b"0",
    b'"x"',
    b'{"runtime_id": "\xff"}',
    b'{"runtime_id": "\xed\xa0\x80"}',
    b'{"runtime_id": "\\ud800"}',
    b'{"runtime_id": ["x"]}',
    b'{"runtime_id": {}}',
    b'{"runtime_id": true}',
    b'{"runtime_id": "' + b"x" * 10_000 + b'"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"runtime_id": ' + b"9" * 5000 + b"}",
    b'{"runtime_id": "nobody", "x": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("path", ["/stop", "/pause", "/resume"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:24]))
def test_bodies_that_are_wrong(shared: Api, path: str, body: bytes) -> None:
    refused(shared.client.post(path, content=body, headers=JSON), 400, 404, 422)


STARTS: list[Any] = [
    {"image": ["x"]},
    {"image": "x\0y"},
    {"image": "x" * 2000},
    {"image": IMAGE, "command": {"a": 1}},
    {"image": IMAGE, "command": ["\0"]},
    {"image": IMAGE, "environment": {"A\0": "b"}},
    {"image": IMAGE, "environment": {"": "b"}},
    {"image": IMAGE, "environment": [1]},
    {"image": IMAGE, "resource_factor": 10**400},
    {"image": IMAGE, "resource_factor": -(10**30)},
    {"image": IMAGE, "resource_factor": float("nan")},
    {"image": IMAGE, "resource_factor": float("inf")},
    {"image": IMAGE, "resource_factor": [1]},
    {"image": IMAGE, "resource_factor": 1e-400},
    {"image": IMAGE, "session_id": "s" * 10_000},
    {"image": IMAGE, "session_id": "../../../etc/passwd"},
    {"image": IMAGE, "session_id": ""},
    {"image": IMAGE, "working_dir": "../up"},
    {"image": IMAGE, "working_dir": "/" + "x" * 5000},
    {"image": IMAGE, "runtime_mounts": "x"},
    {"image": IMAGE, "runtime_mounts": [{}]},
    {"image": IMAGE, "runtime_mounts": [{"host_path": "/etc", "container_path": "/x"}]},
    {"image": IMAGE, "runtime_mounts": [{"host_path": "/" + "x" * 4000, "container_path": "/x"}]},
    {"image": IMAGE, "runtime_mounts": [{"host_path": "/etc\0", "container_path": "/x"}]},
    {"image": IMAGE, "runtime_mounts": [{"host_path": "/etc", "container_path": "/x"}] * 1000},
    {"image": IMAGE, "image_pull_policy": 7},
    {"image": IMAGE, "image_pull_policy": "x" * 100_000},
]


@pytest.mark.parametrize("fields", STARTS, ids=lambda fields: json.dumps(fields)[:60])
def test_starts_that_are_wrong(shared: Api, fields: Any) -> None:
    refused(shared.client.post("/start", content=json.dumps(fields), headers=JSON), 403, 422)


@pytest.mark.parametrize(
    "path",
    [
        "/sessions/" + "s" * 10_000,
        "/sessions/%00",
        "/sessions/%ff%fe",
        "/sessions/..%2f..%2fetc%2fpasswd",
        "/sessions/%2e%2e",
        "/runtime/" + "%F0%9F%92%A9" * 60,
        "/runtime/nobody?x=" + "y" * 10_000,
        "/heartbeat/%0d%0aX-Evil:1",
        "/nonesuch",
        "/list/",
        "/build_status?build_id=" + "x" * 1000,
        "/build_status",
        "/image_exists",
        "/image_exists?image=%00",
        "/image_exists?image=x&pull_from_repo=perhaps",
        "/sessions/batch?ids=" + "x" * 1000,
    ],
)
def test_paths_that_are_wrong(shared: Api, path: str) -> None:
    refused(shared.client.get(path), 404, 422)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/start", "/list", "/health", "/", "/sessions/x", "/build"])
def test_wrong_methods(shared: Api, method: str, path: str) -> None:
    refused(shared.client.request(method, path), 405)


def resident_kib(path: Path = Path("/proc/self/status")) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", path.read_text())
    assert found
    return int(found[1])


def test_a_body_of_100_mb_is_refused_and_not_kept(shared: Api) -> None:
    def flood() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1 << 20)

    before = resident_kib()
    for _ in range(2):
        with contextlib.suppress(httpx.WriteError):  # the server may close before all was sent
            refused(shared.client.post("/start", content=flood(), headers=JSON), 413)
    assert resident_kib() - before < 60 << 10
    with raw(shared, HEAD + b"Content-Length: 104857600\r\n\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_ten_thousand_requests_without_a_key_keep_nothing() -> None:
    application = Guard(_unreachable, API_KEY)
    before = resident_kib()

    async def ask() -> set[int]:
        seen: set[int] = set()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen.add(message["status"])

        for number in range(10_000):
            scope: dict[str, Any] = {
                "type": "http",
                "method": "POST",
                "path": f"/start/{number}",
                "headers": [],
                "client": None,
            }
            await application(scope, _nothing, send)
        return seen

    assert asyncio.run(ask()) == {401}
    assert resident_kib() - before < 8 << 10


async def _unreachable(*_: Any) -> None:
    raise AssertionError("the guard let it pass")


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


def raw(api: Api, text: bytes) -> socket.socket:
    url = api.client.base_url
    connection = socket.create_connection((url.host, url.port or 0), 20)
    connection.sendall(text)
    return connection


HEAD = b"POST /start HTTP/1.1\r\nHost: x\r\nX-API-Key: " + API_KEY.encode() + b"\r\nContent-Type: application/json\r\n"


def test_a_body_that_dribbles_in_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm_runtime.app.create_app.__defaults__", (0.5,))
    with serving(FakePodman()) as api, raw(api, HEAD + b"Content-Length: 1000\r\n\r\n") as connection:
        answer, deadline = b"", time.monotonic() + 20
        connection.settimeout(0.1)
        while b"}" not in answer and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                connection.sendall(b" ")
            with contextlib.suppress(OSError):
                answer += connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"detail":"the body did not arrive within 0.5 s"' in answer


def test_a_body_that_ends_early(shared: Api) -> None:
    raw(shared, HEAD + b"Content-Length: 1000\r\n\r\n{").close()
    raw(shared, HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{").close()
    eventually(lambda: shared.client.get("/list").json()["total"] == 0)


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\r\n\r\n"]
)
def test_what_is_no_http(shared: Api, garbage: bytes) -> None:
    with raw(shared, garbage) as connection:
        assert connection.recv(4096).startswith((b"HTTP/1.1 4", b""))


@pytest.mark.parametrize("length", [b"-1", b"x", b"9" * 400, b"1e3"])
def test_lengths_that_are_none(shared: Api, length: bytes) -> None:
    with raw(shared, HEAD + b"Content-Length: " + length + b"\r\n\r\n{}") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 4")


def test_a_client_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm_runtime.guard.ANSWER_S", 0.1)

    async def ask() -> tuple[int, float]:
        told: list[int] = []

        async def application(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x"})

        async def stuck(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(3600)

        guard = Guard(application, None, lambda _scope, status, _seconds: told.append(status))
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await asyncio.wait_for(guard(scope, _nothing, stuck), 10)
        return told[0], len(told)

    assert asyncio.run(ask()) == (200, 1)


def test_a_line_of_the_access_log_stays_one_line() -> None:
    scope = {"method": "GET", "path": "/a\nb c\udc80" + "x" * 500, "client": None}
    line = access_line(scope, 0, 404, 0.0123)
    assert re.fullmatch(r"method=GET path=/a%0Ab%20c\S+ status=404 ms=12\.3 client=-:0 request_bytes=0", line)
    assert len(line) < 300


def test_who_may_pass() -> None:
    def scope(path: str, *headers: tuple[bytes, bytes], method: str = "GET") -> dict[str, Any]:
        return {"method": method, "path": path, "headers": list(headers)}

    assert may_pass(scope("/list", (b"x-api-key", b"k")), b"k")
    assert may_pass(scope("/"), None)
    assert may_pass(scope("/health"), b"k")
    for refused_scope in (
        scope("/health", method="POST"),
        scope("/list", (b"x-api-key", b"K")),
        scope("/list", (b"x-api-key", b"\xff")),
        scope("/list", (b"authorization", b"Basic eDpr")),
        scope("/healthy"),
    ):
        assert not may_pass(refused_scope, b"k")
    assert may_pass(scope("/", (b"authorization", b"basic eDpr")), b"k")
    assert basic_password(b"Basic eDprOms=") == b"k:k"


# --- against the description ------------------------------------------------------------------------------------------

load_all_checks()
CHECKED = [
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
]


class Refusing(FakePodman):
    """No image is to be had, so that random starts end at once."""

    def __post_init__(self) -> None:
        self.images = set()


@pytest.fixture(scope="module")
def described() -> Iterator[Api]:
    with serving(Refusing()) as api:
        yield api


def test_every_answer_to_random_requests_is_as_described(described: Api) -> None:
    schema = schemathesis.openapi.from_dict(described.client.get("/openapi.json").json())
    checks = CHECKS.get_by_names(CHECKED)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) >= 18
    for operation in operations:
        _try(described, operation, checks)
    eventually(lambda: described.manager.admission.slots.used == 0)


def _try(api: Api, operation: Any, checks: list[Any]) -> None:
    from hypothesis import given

    @settings(
        max_examples=12,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def asked(case: Any) -> None:
        answer = case.call(base_url=str(api.client.base_url), headers={"X-API-Key": API_KEY})
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=checks)

    asked()
