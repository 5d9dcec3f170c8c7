"""The routes of sandboxes: start, find, list, pause, resume, stop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

from fastapi import FastAPI, Path, Query, Request

from slurm_runtime.config import ServerConfig
from slurm_runtime.entries import UnknownSandbox
from slurm_runtime.logs import log
from slurm_runtime.manager import Manager
from slurm_runtime.models import (
    FIELDS_WITHOUT_EFFECT,
    ListAnswer,
    PauseAnswer,
    PauseRequest,
    RuntimeAnswer,
    RuntimeSummary,
    StartRequest,
    StopAnswer,
    StopRequest,
)
from slurm_runtime.node_models import WAIT
from slurm_runtime.openapi import errors
from slurm_runtime.sandbox import Sandbox, Specification, State
from slurm_runtime.wishes import settled

LONGEST_ID = 256
MOST_IDS = 10_000

SomeId = Annotated[str, Path(max_length=LONGEST_ID)]
SomeIds = Annotated[
    list[Annotated[str, Query(max_length=LONGEST_ID)]], Query(max_length=MOST_IDS, description="session_id, repeated")
]


class HungUp(Exception):
    """The client closed its connection before it had its answer."""


class FieldNotes:
    """Says once for each field of a request that it has no effect here."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def note(self, wish: StartRequest) -> None:
        for name in (wish.model_extra or {}).keys() & FIELDS_WITHOUT_EFFECT.keys() - self._said:
            self._said.add(name)
            log.info("clients send %s, which has no effect: %s", name, FIELDS_WITHOUT_EFFECT[name])


def answer(sandbox: Sandbox) -> RuntimeAnswer:
    """A sandbox as clients read it."""
    wish, failed = sandbox.specification, sandbox.state is State.FAILED
    return RuntimeAnswer(
        runtime_id=wish.runtime_id,
        session_id=wish.session_id,
        url=sandbox.url,
        status=sandbox.status,
        pod_status=sandbox.pod_status,
        session_api_key=wish.session_api_key,
        restart_reasons=list(sandbox.restart_reasons),
        events=[sandbox.reason],
        container_statuses=[{"state": sandbox.state.name.lower(), "reason": sandbox.reason}],
        pod_logs="\n".join(filter(None, (sandbox.reason, sandbox.last_lines))) if failed else None,
        image=wish.image,
    )


def summary(sandbox: Sandbox) -> RuntimeSummary:
    return RuntimeSummary(**answer(sandbox).model_dump(include=set(RuntimeSummary.model_fields)))


def after_pause(sandbox: Sandbox) -> PauseAnswer:
    wish = sandbox.specification
    return PauseAnswer(
        status=sandbox.status,
        runtime_id=wish.runtime_id,
        session_id=wish.session_id,
        url=sandbox.url,
        session_api_key=wish.session_api_key,
    )


async def start_while_connected(manager: Manager, wish: Specification, request: Request, waits: bool = True) -> Sandbox:
    """The started sandbox; ``HungUp`` as soon as the client leaves, its sandbox given up then."""
    starting = asyncio.create_task(manager.start(wish, waits))
    leaving = asyncio.create_task(until_gone(request))
    try:
        await asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not leaving.done():
            return starting.result()
        starting.cancel()
        await asyncio.wait([starting])
        await _give_up(manager, starting)
        raise HungUp("the client closed its connection")
    finally:
        for task in (starting, leaving):
            task.cancel()
        await asyncio.gather(starting, leaving, return_exceptions=True)


async def until_gone(request: Request) -> None:
    """The body has been read: what comes next is the end of the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _give_up(manager: Manager, starting: asyncio.Task[Sandbox]) -> None:
    """A start that was cancelled has told the manager itself; one that had just ended well has not."""
    if not starting.cancelled() and starting.exception() is None:
        await manager.hung_up(starting.result().specification.runtime_id)


def add_sandbox_routes(app: FastAPI, manager: Manager, config: ServerConfig) -> None:
    _add_start(app, manager, config)
    _add_reading(app, manager)
    _add_changing(app, manager)


def _add_start(app: FastAPI, manager: Manager, config: ServerConfig) -> None:
    notes = FieldNotes()

    @app.post(
        "/start",
        status_code=201,
        response_model_exclude_none=True,
        responses=errors(403, 404, 409, 499, 502, 503, 504),
    )
    async def start(wish: StartRequest, request: Request) -> RuntimeAnswer:
        """Start a sandbox, or find the living one of the session."""
        notes.note(wish)
        waits = request.headers.get(WAIT) != "0"
        return answer(await start_while_connected(manager, settled(wish, config), request, waits))


def _add_reading(app: FastAPI, manager: Manager) -> None:
    # Before /sessions/{session_id}: no session can be called "batch".
    @app.get("/sessions/batch", response_model_exclude_none=True, responses=errors())
    async def batch(ids: SomeIds = []) -> list[RuntimeAnswer]:  # noqa: B006  # FastAPI copies it
        """The newest sandboxes of several sessions, as a list of those that are known."""
        found = []
        for session_id in dict.fromkeys(ids):
            with contextlib.suppress(UnknownSandbox):
                found.append(answer(manager.by_session(session_id)))
        return found

    @app.get("/sessions/{session_id}", response_model_exclude_none=True, responses=errors(404))
    async def session(session_id: SomeId) -> RuntimeAnswer:
        """The newest sandbox of a session."""
        return answer(manager.by_session(session_id))

    @app.get("/runtime/{runtime_id}", response_model_exclude_none=True, responses=errors(404))
    async def runtime(runtime_id: SomeId) -> RuntimeAnswer:
        """One sandbox."""
        return answer(manager.by_runtime(runtime_id))

    @app.get("/list", response_model_exclude_none=True, responses=errors())
    async def listing() -> ListAnswer:
        """All living sandboxes."""
        runtimes = [summary(sandbox) for sandbox in manager.living()]
        return ListAnswer(runtimes=runtimes, total=len(runtimes))


def _add_changing(app: FastAPI, manager: Manager) -> None:
    failures = errors(404, 409, 502, 503, 504)

    @app.post("/stop", response_model_exclude_none=True, responses=failures)
    async def stop(wish: StopRequest) -> StopAnswer:
        """Remove a sandbox; again is fine."""
        if wish.runtime_id is None:
            return StopAnswer(status="nothing to stop")
        await manager.stop(wish.runtime_id)
        return StopAnswer(status="stopped", runtime_id=wish.runtime_id)

    @app.post("/pause", response_model_exclude_none=True, responses=failures)
    async def pause(wish: PauseRequest) -> PauseAnswer:
        """Let a sandbox hold still: files, URL, key and running programs are kept; again is fine."""
        if wish.runtime_id is None:
            return PauseAnswer(status="nothing to do")
        return after_pause(await manager.pause(wish.runtime_id))

    @app.post("/resume", response_model_exclude_none=True, responses=failures)
    async def resume(wish: PauseRequest) -> PauseAnswer:
        """Let a paused sandbox go on; a running one stays as it is."""
        if wish.runtime_id is None:
            return PauseAnswer(status="nothing to do")
        return after_pause(await manager.resume(wish.runtime_id))
