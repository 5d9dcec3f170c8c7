"""Which sandboxes of a killed server are taken over: the decisions by themselves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from slurm_runtime.adoption import (
    HALF_MADE,
    NO_SERVER,
    NO_SLOTS,
    NOT_ALONE,
    Decision,
    Fate,
    Found,
    Process,
    decide,
    forked_server,
    is_paused,
)
from slurm_runtime.failures import Failures
from slurm_runtime.guard import is_unheld
from slurm_runtime.labels import SANDBOX_LABEL, Labels, Notes, read
from slurm_runtime.ownership import process_mark
from slurm_runtime.podman import ContainerSpec, ContainerState
from slurm_runtime.ports import Ports
from slurm_runtime.sandbox import Dialect
from slurm_runtime.slots import Slots
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.conftest import CONFIG, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.test_contract import eventually
from tests.runtime.test_failures import failed

NOTES = Notes((0,), 1.0, "SDK", "PLAIN", "http://node:1", "image:1", 60000)
LABELS = Labels({"skyrl.job": "4711", "skyrl.server": "mark"})
STATE = ContainerState(
    "sandbox-1", True, "running", 0, host_port=1, pid=10, variables={"SESSION_API_KEY": "key"}, created="2026-01-01"
)
HOLDER = Process(10, 9, "S", 100)


def found(
    notes: Notes | None = NOTES, session: str = "s", processes: tuple[Process, ...] = (HOLDER,), **changes: object
) -> Found:
    return Found(replace(STATE, **changes), LABELS.of(session, notes), processes)  # type: ignore[arg-type]


def only(one: Found, job: str = "4711", slots: int = 4) -> Decision:
    [decision] = decide([one], job, slots)
    return decision


def test_one_that_runs_is_what_its_client_asked_for() -> None:
    decision = only(found(replace(NOTES, slots=(1, 3), factor=2.0, dialect="PLACEHOLDER")))
    assert (decision.fate, decision.server, decision.notes) == (Fate.RUNNING, 0, decision.notes)
    wish = decision.specification
    assert wish is not None
    assert (wish.runtime_id, wish.session_id, wish.session_api_key, wish.image) == ("1", "s", "key", "image:1")
    assert (wish.resource_factor, wish.dialect, wish.container_port) == (2.0, Dialect.PLACEHOLDER, 60000)
    assert wish.container_name == "sandbox-1"


@pytest.mark.parametrize(
    ("one", "job"),
    [
        (found(), "4712"),
        (found(None), "4711"),
        (found(name="agent-1"), "4711"),
        (found(session=""), "4711"),
        (found(variables={}), "4711"),
        (Found(STATE, {**LABELS.of("s"), SANDBOX_LABEL: "{}"}), "4711"),
        (Found(STATE, {**LABELS.of("s"), SANDBOX_LABEL: "no json"}), "4711"),
    ],
)
def test_what_is_not_a_sandbox_of_this_job_is_left_to_the_sweep(one: Found, job: str) -> None:
    decision = only(one, job)
    assert (decision.fate, decision.specification) == (Fate.FOREIGN, None)


@pytest.mark.parametrize(
    ("status", "reason"),
    [("created", HALF_MADE), ("configured", HALF_MADE), ("initialized", HALF_MADE), ("exited", "")],
)
def test_one_that_does_not_run_is_lost_and_its_session_is_told(status: str, reason: str) -> None:
    decision = only(found(running=False, status=status))
    assert (decision.fate, decision.reason) == (Fate.LOST, reason)
    assert decision.specification is not None


FORK = replace(NOTES, start="FORK")
PROGRAM, ITS_CHILD = Process(11, 10, "S", 101), Process(12, 11, "S", 102)
SERVER, ENTERED, TASK = Process(20, 1, "S", 200), Process(30, 1, "S", 300), Process(21, 20, "S", 201)


def test_a_forked_server_is_the_oldest_process_whose_parent_is_outside() -> None:
    one = found(FORK, processes=(ENTERED, TASK, SERVER, ITS_CHILD, PROGRAM, HOLDER))
    assert forked_server(one) == 20
    assert (only(one).fate, only(one).server) == (Fate.RUNNING, 20)
    without = found(FORK, processes=(HOLDER, PROGRAM, ITS_CHILD))
    assert (only(without).fate, only(without).reason) == (Fate.LOST, NO_SERVER)


@pytest.mark.parametrize(
    ("one", "server", "paused"),
    [
        (found(status="paused"), 0, True),
        (found(processes=(HOLDER, PROGRAM)), 0, False),
        (found(processes=(replace(HOLDER, state="T"), PROGRAM)), 0, True),
        (found(processes=(HOLDER, replace(PROGRAM, state="T"))), 0, True),
        (found(processes=(HOLDER, PROGRAM, replace(ITS_CHILD, parent=10, state="T"))), 0, False),  # a stopped job
        (found(FORK, processes=(HOLDER, PROGRAM, replace(SERVER, state="T"))), 20, True),
        (found(FORK, processes=(HOLDER, PROGRAM, SERVER, replace(TASK, state="t"))), 20, False),
    ],
)
def test_a_sandbox_is_paused_when_its_server_holds_still(one: Found, server: int, paused: bool) -> None:
    assert is_paused(one, server) is paused
    assert only(one).fate is (Fate.PAUSED if paused else Fate.RUNNING)


def test_of_two_of_a_session_or_of_a_slot_the_later_one_is_kept() -> None:
    first = found(session="a")
    same_session = found(replace(NOTES, slots=(1,)), "a", name="sandbox-2", created="2026-01-02")
    same_slot = found(replace(NOTES, slots=(1, 2)), "b", name="sandbox-3", created="2026-01-03")
    third = found(replace(NOTES, slots=(3,)), "c", name="sandbox-4", created="2026-01-04")
    decisions = decide([third, same_slot, first, same_session], "4711", 4)
    assert [one.found.state.name for one in decisions] == [f"sandbox-{number}" for number in (1, 2, 3, 4)]
    assert [one.reason for one in decisions] == ["", NO_SLOTS, "", ""]
    assert [one.reason for one in decide([same_session, first], "4711", 4)] == [NOT_ALONE, ""]


@pytest.mark.parametrize("slots", [(), (4,), (0, 4)])
def test_slots_that_are_not_there_are_not_taken_over(slots: tuple[int, ...]) -> None:
    assert only(found(replace(NOTES, slots=slots))).reason == NO_SLOTS


def test_labels_hold_the_notes_and_no_key() -> None:
    notes = replace(NOTES, slots=(2, 5), agent_folder="/tmp/skyrl-agent-x", factor=1.5)
    labels = LABELS.of("s", notes)
    assert read(labels) == notes
    assert json.loads(labels[SANDBOX_LABEL])["url"] == "http://node:1"
    assert SANDBOX_LABEL not in LABELS.of("s")
    assert LABELS.job == "4711"


def test_slots_and_ports_that_a_sandbox_holds_are_taken() -> None:
    taken = Slots(4, 1.0).take_these({1, 3})
    assert taken is not None
    slots, lease = taken
    assert (slots.taken, slots.give(lease).taken) == (frozenset({1, 3}), frozenset())
    assert [slots.take_these(numbers) for numbers in ({1, 2}, {4}, set())] == [None] * 3
    ports = Ports("127.0.0.1", range(20000, 20001))
    held = ports.adopt(20000)
    assert ports.taken == {20000}
    ports.give(held)
    assert ports.taken == set()


def test_only_what_is_not_about_sandboxes_is_answered_before_they_are_known() -> None:
    assert all(map(is_unheld, ("/health", "/heartbeat/trainer", "/docs", "/openapi.json")))
    assert not any(
        map(is_unheld, ("/", "/list", "/sessions/s", "/runtime/r", "/start", "/stop", "/metrics", "/healthy"))
    )


def test_the_agent_folder_of_the_killed_server_lives_as_long_as_what_has_it_mounted(tmp_path: Path) -> None:
    folder, strange = tmp_path / "skyrl-agent-old", tmp_path / "home"
    engine, dead = FakePodman(), "/".join([*process_mark().split("/")[:3], "1", "12345"])
    with serving(engine) as api:
        for number, mounted in enumerate((folder, strange)):
            mounted.mkdir()
            notes = replace(NOTES, slots=(number,), agent_folder=str(mounted))
            labels = {**api.manager.launcher.labels.of(mounted.name, notes), "skyrl.server": dead}
            spec = ContainerSpec(
                f"sandbox-{number}", IMAGE, tuple(SERVE), {"SESSION_API_KEY": "key"}, "/", labels, 60000
            )
            api.run(engine.create(spec))
            api.run(engine.start(spec.name))
        api.run(api.manager.supervisor.adopt(api.run(api.manager.connection.ready())))
        assert api.client.get("/list").json()["total"] == 2
        askers = [entry.askers for entry in api.manager.register.living()]
        assert askers == [1, 1], "one who asks again and hangs up does not take it away"
        assert folder.is_dir()
    assert not folder.exists()
    assert strange.is_dir()  # a label may name anything


def test_one_noted_as_failed_whose_container_is_still_there_is_known_and_removed(tmp_path: Path) -> None:
    """As a server leaves it that is killed between the two."""
    path, engine = tmp_path / "failures", FakePodman()
    dead = "/".join([*process_mark().split("/")[:3], "1", "12345"])
    labels = {**Labels({"skyrl.job": "4711"}).of("s1", NOTES), "skyrl.server": dead}
    asyncio.run(engine.create(ContainerSpec("sandbox-r1", IMAGE, tuple(SERVE), {}, "/", labels, 60000)))
    Failures(path, goes_on=False).note(failed("r1", "s1", "exit code 3"))
    with serving(engine, replace(CONFIG, adopt=True, failures_file=path)) as api:
        eventually(lambda: engine.containers == {})
        answer = api.client.get("/runtime/r1").json()
    assert (answer["pod_status"], answer["session_id"]) == ("failed", "s1")
    assert "exit code 3" in answer["pod_logs"]
