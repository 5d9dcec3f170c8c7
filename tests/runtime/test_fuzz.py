"""Random requests to a server process whose sandboxes live: every answer is as described, and nothing is lost.

Several clients ask at once, some hang up, sandboxes are started, paused, stopped and asked about while they live. The
server is the program itself, on the fake Podman for many requests and on a real one for fewer.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from tests.runtime import podman_service
from tests.runtime.commands import CHATTY, EXIT, IMAGE, IMAGE_WITH_ENTRYPOINT, NOT_THERE, SERVE, SILENT
from tests.runtime.server_process import server_process
from tests.runtime.test_contract import eventually
from tests.runtime.test_server_process import KEY, Server

load_all_checks()
CHECKED = CHECKS.get_by_names(["status_code_conformance", "content_type_conformance", "response_schema_conformance"])
FLAGS = ("--cpus", "16", "--cpus-per-worker", "0.25", "--worker-startup-timeout", "2", "--container-image", IMAGE)
CLIENTS = 4
IMAGES = st.sampled_from([IMAGE, IMAGE, IMAGE, IMAGE_WITH_ENTRYPOINT, "localhost/nonesuch:1"])
ANY_NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
START = st.fixed_dictionaries(
    {
        "image": IMAGES,
        "command": st.sampled_from([*[SERVE] * 9, EXIT, CHATTY, SILENT, NOT_THERE, ["", "x"], ["-"]]),
        "session_id": st.sampled_from("abcdef"),
    },
    optional={
        "environment": st.dictionaries(ANY_NAME, ANY_NAME, max_size=3),
        "working_dir": ANY_NAME | st.just("/work"),
        "resource_factor": st.sampled_from([0.1, 1, 1.5, 2, 65, 1000]),  # there is always room, or never
        "image_pull_policy": st.sampled_from(["Always", "Never", "IfNotPresent", "often"]),
    },
)
VERBS = st.sampled_from(["pause", "pause", "resume", "stop"])


@dataclass(frozen=True)
class Call:
    """One request: its method, path and body; with ``hangs_up`` its client leaves before the answer.

    ``back`` says which of the sandboxes that the client knows is meant; it fills ``{id}`` and ``{session}``.
    """

    method: str
    path: str
    body: dict[str, Any] | None = None
    back: int = 1
    hangs_up: bool = False


CALLS = st.one_of(
    *[st.builds(Call, st.just("POST"), st.just("/start"), START, hangs_up=st.sampled_from([False] * 7 + [True]))] * 2,
    *[
        st.builds(
            lambda verb, back: Call("POST", f"/{verb}", {"runtime_id": "{id}"}, back),
            VERBS,
            st.integers(1, 4),
        )
    ]
    * 2,
    st.builds(
        lambda path, back: Call("GET", path, back=back),
        st.sampled_from(
            ["/runtime/{id}", "/sessions/{session}", "/list", "/metrics", "/", "/sessions/batch?ids=a&ids=b"]
        ),
        st.integers(1, 4),
    ),
)


@dataclass
class Fuzzed:
    """A server, its description, and what is not as described.

    ``known`` are the sandboxes that answers have named.
    """

    server: Server
    known: list[dict[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        url = f"http://127.0.0.1:{self.server.port}"
        self.client = httpx.Client(base_url=url, headers={"X-API-Key": KEY}, timeout=60, trust_env=False)
        self.description = self.client.get("/openapi.json").json()

    def do(self, call: Call) -> None:
        """Ask, and judge the answer."""
        known = self.known[-call.back :][:1] or [{"runtime_id": "nobody", "session_id": "nothing"}]
        names = {"id": known[0]["runtime_id"], "session": known[0]["session_id"]}
        body = {"runtime_id": names["id"]} if call.body == {"runtime_id": "{id}"} else call.body
        try:
            patience_s = 0.02 if call.hangs_up else 60
            answer = self.client.request(call.method, call.path.format(**names), json=body, timeout=patience_s)
        except httpx.TimeoutException as problem:
            if not call.hangs_up:
                self.faults.append(f"{call}: {problem!r}")
            return
        self.judge(call, answer)

    def judge(self, call: Call, answer: httpx.Response) -> None:
        operation = self.operation(call)
        if answer.status_code == 500 or str(answer.status_code) not in operation["responses"]:
            self.faults.append(f"{call}: {answer.status_code} {answer.text[:200]}")
        elif answer.status_code >= 400 and list(answer.json()) != ["detail"]:
            self.faults.append(f"{call}: {answer.text[:200]}")
        elif call.path == "/start" and answer.status_code == 201:
            self.known.append(answer.json())

    def operation(self, call: Call) -> dict[str, Any]:
        path = call.path.partition("?")[0].replace("{id}", "{runtime_id}").replace("{session}", "{session_id}")
        found: dict[str, Any] = self.description["paths"][path][call.method.lower()]
        return found

    def stop_all(self) -> None:
        """Then nothing is left of them, slots included, and the log tells of no fault of the server's own."""
        for sandbox in self.client.get("/list").json()["runtimes"]:
            self.do(Call("POST", "/stop", {"runtime_id": sandbox["runtime_id"]}))
        eventually(lambda: self.client.get("/list").json()["total"] == 0)
        eventually(lambda: self.number("skyrl_slots_used") == 0)
        assert self.number("skyrl_starts_waiting") == 0
        assert self.faults == []
        log = self.server.log()
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
        assert "internal error" not in log
        assert KEY not in log

    def number(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


def generated(examples: int) -> settings:
    """So many examples, the same ones each time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def fuzz(fuzzed: Fuzzed, examples: int, calls: int) -> None:
    """Programs of calls, by several clients at once."""

    @generated(examples)
    @given(st.lists(CALLS, min_size=calls // 2, max_size=calls))
    def asked(program: list[Call]) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(fuzzed.do, program))
        fuzzed.stop_all()

    asked()


def fuzz_by_description(fuzzed: Fuzzed, examples: int) -> None:
    """Requests that are made up from the description, about sandboxes that live."""
    schema = schemathesis.openapi.from_dict(fuzzed.description)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) >= 18
    for operation in operations:
        _ask_about_the_living(fuzzed, operation, examples)
    fuzzed.stop_all()


def _ask_about_the_living(fuzzed: Fuzzed, operation: Any, examples: int) -> None:
    @generated(examples)
    @given(case=operation.as_strategy(), start=START, alive=st.booleans())
    def asked(case: Any, start: dict[str, Any], alive: bool) -> None:
        if alive:
            fuzzed.do(Call("POST", "/start", {**start, "command": SERVE, "image": IMAGE}))
        known = fuzzed.known[-1] if fuzzed.known else {}
        if isinstance(case.body, dict) and alive and known:
            case.body |= {"runtime_id": known["runtime_id"]}
        if isinstance(case.body, dict) and "image" in case.body:
            case.body["image"] = start["image"]  # no registry of the world is to be asked
        if "image" in (case.query or {}):
            case.query["image"] = start["image"]
        for name in {"runtime_id", "session_id"} & (case.path_parameters or {}).keys() if alive and known else ():
            case.path_parameters[name] = known[name]
        answer = case.call(base_url=f"http://127.0.0.1:{fuzzed.server.port}", headers={"X-API-Key": KEY}, timeout=60)
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=CHECKED)

    asked()


def test_random_requests_about_sandboxes_that_live(tmp_path: Path) -> None:
    flags = (*FLAGS, "--public-host", "127.0.0.1")
    with server_process(tmp_path, tmp_path / "none.sock", *flags, module="tests.runtime.fake_server") as server:
        fuzzed = Fuzzed(server)
        fuzz(fuzzed, 12, 30)
        assert len(fuzzed.known) > 40, "hardly any sandbox came to life"
        fuzz_by_description(fuzzed, 6)
        fuzzed.client.close()


@pytest.mark.podman
def test_random_requests_about_real_sandboxes(tmp_path: Path, rootless_podman: podman_service.Service) -> None:
    flags = (*FLAGS, "--public-host", "127.0.0.1")
    with server_process(tmp_path, rootless_podman.socket, *flags) as server:
        fuzzed = Fuzzed(server)
        fuzz(fuzzed, 4, 24)
        assert len(fuzzed.known) > 8, "hardly any sandbox came to life"
        fuzzed.client.close()
    assert rootless_podman.containers() == []
