"""What Prometheus reads: parsed by Prometheus' own client library."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slurm_runtime.metrics import BOUNDS_S, Traffic, exposition
from slurm_runtime.page import Snapshot
from slurm_runtime.steps import StepTimes
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.conftest import API_KEY, Api
from tests.runtime.test_page import BUSY


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scope(path: str, method: str = "GET") -> dict[str, Any]:
    class Route:
        pass

    route = Route()
    route.path = path  # type: ignore[attr-defined]
    return {"method": method, "route": route}


@pytest.fixture
def busy(fake: Api, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(fake.manager, "snapshot", lambda: BUSY)
    return fake


def test_the_state_of_the_server() -> None:
    found = samples(exposition(lambda: BUSY, Traffic(), StepTimes())[0].decode())
    assert found["skyrl_slots_used", ()] == 4
    assert found["skyrl_slots_total", ()] == 7
    assert found["skyrl_starts_waiting", ()] == 2
    assert found["skyrl_pulls_under_way", ()] == 1
    assert found["skyrl_builds_under_way", ()] == 1
    assert found["skyrl_sandboxes", (("state", "paused"),)] == 1
    assert found["process_resident_memory_bytes", ()] > 1e6


def test_states_without_a_sandbox_are_zero() -> None:
    found = samples(exposition(Snapshot, Traffic(), StepTimes())[0].decode())
    values = {labels[0][1]: value for (name, labels), value in found.items() if name == "skyrl_sandboxes"}
    assert values == {"pending": 0, "starting": 0, "ready": 0, "paused": 0}


def test_answers_and_durations() -> None:
    traffic = Traffic()
    for seconds in (0.001, 0.06, 400.0):
        traffic.note(scope("/list"), 200, seconds)
    traffic.note(scope("/list", "BREW"), 405, 0.001)
    found = samples(exposition(Snapshot, traffic, StepTimes())[0].decode())
    assert found["skyrl_http_answers_total", (("method", "GET"), ("route", "/list"), ("status", "200"))] == 3
    assert found["skyrl_http_answers_total", (("method", "other"), ("route", "/list"), ("status", "405"))] == 1
    buckets = [found["skyrl_http_seconds_bucket", (("le", str(b)), ("route", "/list"))] for b in (*BOUNDS_S, "+Inf")]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[-1]) == (2, 4)
    assert found["skyrl_http_seconds_sum", (("route", "/list"),)] == pytest.approx(400.062)


def test_a_scrape_with_the_key_as_password(busy: Api) -> None:
    assert httpx.get(f"{busy.client.base_url}/metrics", trust_env=False).status_code == 401
    answer = httpx.get(f"{busy.client.base_url}/metrics", auth=("prometheus", API_KEY), trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    assert found["skyrl_http_answers_total", (("method", "GET"), ("route", "-"), ("status", "401"))] == 1


def test_names_that_clients_choose_do_not_become_series(busy: Api) -> None:
    for number in range(50):
        busy.client.get(f"/sessions/s{number}")
        busy.client.get(f"/nonesuch/{number}")
        busy.client.request(f"VERB{number}", "/list")
    text = busy.client.get("/metrics").text
    routes = {dict(labels).get("route") for _, labels in samples(text)} - {None}
    assert "/sessions/{session_id}" in routes
    assert len(routes) < 10
    assert API_KEY not in text


def test_the_steps_of_a_start_are_counted(fake: Api) -> None:
    assert fake.start(image=IMAGE, command=SERVE).status_code == 201
    found = samples(fake.client.get("/metrics").text)
    counts = {labels[0][1]: value for (name, labels), value in found.items() if name.endswith("step_seconds_count")}
    assert counts == {"slot": 1, "image": 1, "create": 1, "run": 1, "inspect": 1, "fork": 0, "answer": 1}
    assert found["skyrl_start_step_seconds_sum", (("step", "create"),)] > 0


def test_a_step_that_fails_counts_too() -> None:
    steps = StepTimes()
    with pytest.raises(ZeroDivisionError), steps.of("create"):
        _ = 1 / 0
    assert (steps.counts["create"], steps.seconds["create"] > 0) == (1, True)
