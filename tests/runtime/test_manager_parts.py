"""The parts of the manager by themselves: why a sandbox died, which ones there are, whether Podman answers."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import cast

import pytest

from slurm_runtime import register as register_module
from slurm_runtime.background import Background
from slurm_runtime.config import ServerConfig
from slurm_runtime.connection import Connection
from slurm_runtime.diagnostics import OUT_OF_MEMORY, Diagnosis, judged
from slurm_runtime.entries import Entry, UnknownSandbox
from slurm_runtime.podman import Engine, EngineBroke, EngineError, EngineFacts, EngineUnreachable
from slurm_runtime.register import Register
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State
from slurm_runtime.warden import proc
from tests.runtime.commands import IMAGE

FACTS = EngineFacts("4.3.1", rootless=True, controllers=frozenset())

# --- why a sandbox died -----------------------------------------------------------------------------------------------

FOUND = Diagnosis("as its container shows", "lines", exit_code=137)


@pytest.mark.parametrize(
    ("found", "offence", "server_exit", "kernel_killed", "memory_bites", "said", "out_of_memory"),
    [
        (replace(FOUND, exit_code=3), None, None, True, True, "as its container shows", False),
        (FOUND, None, None, False, False, "as its container shows", False),
        (FOUND, None, None, False, True, "most likely because it used more memory", True),
        (FOUND, None, None, True, True, OUT_OF_MEMORY, True),
        (replace(FOUND, out_of_memory=True), None, None, False, True, "as its container shows", True),
        (FOUND, None, 3, True, True, "ended with exit code 3", False),
        (replace(FOUND, exit_code=0), None, 137, True, True, OUT_OF_MEMORY, True),
        (replace(FOUND, exit_code=0), None, 137, False, False, "137 (SIGKILL)", False),
        (FOUND, "it took too much disk", 137, True, True, "the sandbox was stopped: it took too much disk", False),
    ],
)
def test_why_a_sandbox_died(
    found: Diagnosis,
    offence: str | None,
    server_exit: int | None,
    kernel_killed: bool,
    memory_bites: bool,
    said: str,
    out_of_memory: bool,
) -> None:
    judgement = judged(found, offence, server_exit, kernel_killed, memory_bites)
    assert said in judgement.sentence
    assert (judgement.out_of_memory, judgement.last_lines) == (out_of_memory, "lines")


# --- which sandboxes there are ----------------------------------------------------------------------------------------


def made(runtime_id: str, session_id: str) -> Entry:
    return Entry(
        Sandbox(
            Specification(runtime_id, session_id, "key", IMAGE, ("true",), "/", {}, 1.0, "missing", Dialect.SDK, 60000)
        )
    )


def stopped(found: Entry) -> Entry:
    found.become(found.sandbox.changed(State.STOPPED, "stopped"))
    return found


def test_a_session_has_its_latest_sandbox_and_each_is_found_by_its_id() -> None:
    register, first, second = Register(), stopped(made("1", "a")), made("2", "a")
    register.add(first)
    assert (register.of_session("a"), register.living_of_session("a")) == (first, None)
    register.add(second)
    assert (register.of_session("a"), register.living_of_session("a")) == (second, second)
    assert (register.of_runtime("1"), register.living(), register.entries()) == (first, [second], [first, second])
    register.forget(first)  # whose session is the second's by now
    assert register.of_session("a") is second
    assert register.find("1") is None
    with pytest.raises(UnknownSandbox, match="runtime_id '1'"):
        register.of_runtime("1")
    register.forget(second)
    with pytest.raises(UnknownSandbox, match="session 'a'"):
        register.of_session("a")


def test_only_the_last_dead_are_kept_and_none_that_still_holds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_module, "DEAD_KEPT", 2)
    register = Register()
    for number in range(6):
        found = made(str(number), str(number))
        found.has_container = number == 0
        register.add(found if number == 1 else stopped(found))
    assert [found.specification.runtime_id for found in register.entries()] == ["0", "1", "3", "4", "5"]


# --- Podman, and work beside requests ---------------------------------------------------------------------------------


@dataclass
class SlowPodman:
    """Answers on the nth question; another error than silence ends the asking."""

    answers: list[Exception | None]
    asked: int = 0

    async def facts(self) -> EngineFacts:
        self.asked += 1
        problem = self.answers[min(self.asked, len(self.answers)) - 1]
        if problem:
            raise problem
        return FACTS


def connection_to(podman: SlowPodman, told: list[EngineFacts]) -> Connection:
    async def tell(facts: EngineFacts) -> None:
        told.append(facts)

    return Connection(ServerConfig(connect_timeout_s=2.0), cast(Engine, podman), Background(), tell)


def test_podman_is_asked_once_for_all_who_wait() -> None:
    podman = SlowPodman([EngineUnreachable("silent"), EngineUnreachable("silent"), None])
    told: list[EngineFacts] = []

    async def three() -> list[EngineFacts]:
        connection = connection_to(podman, told)
        assert connection.word == "connecting"
        found = await asyncio.gather(*(connection.ready() for _ in range(3)))
        assert connection.stands
        return found

    assert asyncio.run(three()) == [FACTS] * 3
    assert (podman.asked, told) == (3, [FACTS])


def test_a_connection_that_failed_is_tried_again() -> None:
    podman = SlowPodman([EngineError("no right to it"), None])

    async def twice() -> EngineFacts:
        connection = connection_to(podman, [])
        with pytest.raises(EngineError, match="no right"):
            await connection.ready()
        return await connection.ready()

    assert asyncio.run(twice()) == FACTS


def test_work_under_which_podman_went_away_is_done_again_with_the_next_ones_facts() -> None:
    told: list[EngineFacts] = []
    tries: list[str] = []

    async def live() -> str:
        connection = connection_to(SlowPodman([None, EngineUnreachable("silent"), None]), told)
        await connection.ready()

        async def work() -> str:
            tries.append(connection.word)
            if len(tries) == 1:
                raise EngineBroke("in the middle")
            return "done"

        return await connection.patiently(work)

    assert asyncio.run(live()) == "done"
    assert tries == ["connected", "connected"]
    assert told == [FACTS, FACTS]


@pytest.mark.parametrize(("closing", "expected"), [(False, 3), (True, 1)])
def test_work_that_podman_always_dies_of_is_given_up(closing: bool, expected: int) -> None:
    tries: list[str] = []

    async def live() -> None:
        connection = connection_to(SlowPodman([None]), [])
        await connection.ready()

        async def work() -> None:
            tries.append(connection.word)
            raise EngineBroke("in the middle")

        if closing:
            connection.close()
        with pytest.raises(EngineBroke, match="in the middle"):
            await connection.patiently(work)

    asyncio.run(live())
    assert len(tries) == expected


def test_another_error_than_an_outage_is_no_reason_to_try_again() -> None:
    tries: list[int] = []

    async def live() -> None:
        connection = connection_to(SlowPodman([None]), [])

        async def work() -> None:
            tries.append(1)
            raise EngineError("no such file")

        with pytest.raises(EngineError, match="no such file"):
            await connection.patiently(work)
        assert connection.word != "unreachable"

    asyncio.run(live())
    assert len(tries) == 1


@pytest.mark.parametrize(("what", "is_said"), [("lasts", True), ("is short", False), ("is the end", False)])
def test_an_outage_is_an_error_if_it_lasts(
    what: str, is_said: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a job's end its Podman service may end a moment before the server is told to stop."""
    monkeypatch.setattr("slurm_runtime.connection.SAID_AFTER_S", 0.02)
    caplog.set_level(logging.INFO)

    async def live() -> None:
        connection = connection_to(SlowPodman([None]), [])
        await connection.ready()
        connection.fails(EngineUnreachable("nobody listens"))
        if what == "is short":
            connection.answers()
        if what == "is the end":
            connection.close()
        await asyncio.sleep(0.1)
        connection.answers()

    asyncio.run(live())
    assert ("nobody listens" in caplog.text) == is_said
    assert ("Podman answers again" in caplog.text) == is_said


def test_work_in_the_background_ends_with_it_and_its_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def endless() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def failing() -> None:
        raise EngineError("no container")

    async def live() -> None:
        background = Background()
        background.start(failing())
        background.start(endless())
        await asyncio.sleep(0.01)
        await background.close()

    asyncio.run(live())
    assert ended == ["cancelled"]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["no container"]


def test_a_few_of_many_newcomers_tell_how_many_there_are_and_a_single_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 4,000 new processes two of three have ended when they are looked at; one is a neighbour's."""
    monkeypatch.setattr(proc, "all_pids", lambda: list(range(4000)))
    monkeypatch.setattr(proc, "namespace_of", lambda pid: 8 if pid == 1000 else 7 if pid % 3 == 0 else 0)
    told, is_exact = proc.Scanner().newcomers(200)
    assert not is_exact
    assert told == {7: pytest.approx(4000, rel=0.05)}


def test_few_newcomers_are_counted_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "all_pids", lambda: list(range(10)))
    monkeypatch.setattr(proc, "namespace_of", lambda pid: 7 + pid % 2)
    assert proc.Scanner().newcomers(200) == ({7: 5, 8: 5}, True)
