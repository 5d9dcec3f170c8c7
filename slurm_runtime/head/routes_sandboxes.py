"""The routes of sandboxes at the head: starts go to a node, reads are answered from memory, the rest is passed on."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from slurm_runtime.entries import UnknownSandbox
from slurm_runtime.head.answers import Known, packed, stopped
from slurm_runtime.head.directory import unwanted
from slurm_runtime.head.link import Reply
from slurm_runtime.head.members import Members
from slurm_runtime.head.starts import Starts
from slurm_runtime.head.views import Views
from slurm_runtime.head.wish import parsed, read_start
from slurm_runtime.models import (
    ListAnswer,
    PauseAnswer,
    PauseRequest,
    RuntimeAnswer,
    StartRequest,
    StopAnswer,
    StopRequest,
    Wire,
)
from slurm_runtime.openapi import errors
from slurm_runtime.routes_sandboxes import HungUp, SomeId, SomeIds

JSON = "application/json"
START_PATH, STOP_PATH = "/start", "/stop"
SESSION_PATH, RUNTIME_PATH = "/sessions/{session_id}", "/runtime/{runtime_id}"
BATCH_PATH = "/sessions/batch"


def json_body(model: type[Wire]) -> dict[str, Any]:
    """What OpenAPI says of a body that a route reads by itself."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


async def body_of(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise HungUp("the client closed its connection while it sent its request") from None


def passed(reply: Reply) -> Response:
    """A node's answer as the head's."""
    return Response(reply.body, reply.status, media_type=reply.kind)


def add_sandbox_routes(app: FastAPI, views: Views, changer: Changer) -> None:
    _add_start(app, changer)
    _add_reading(app, views)
    _add_changing(app, changer)


def _add_start(app: FastAPI, changer: Changer) -> None:
    @app.post(
        START_PATH,
        status_code=201,
        response_model=RuntimeAnswer,
        responses=errors(403, 404, 409, 499, 502, 503, 504),
        openapi_extra=json_body(StartRequest),
    )
    async def start(request: Request) -> Response:
        """Start a sandbox on the node with most free slots, or find the living one of the session."""
        return await changer.start(request)


def session_of(views: Views, session_id: str) -> bytes:
    """The newest sandbox of a session, as it is answered; ``UnknownSandbox`` for none."""
    body = views.session(session_id)
    if body is None:
        raise UnknownSandbox(f"no sandbox for session {session_id!r}")
    return body


def runtime_of(views: Views, runtime_id: str) -> bytes:
    """One sandbox, as it is answered; ``UnknownSandbox`` for none."""
    body = views.runtime(runtime_id)
    if body is None:
        raise UnknownSandbox(f"no sandbox with runtime_id {runtime_id!r}")
    return body


def _add_reading(app: FastAPI, views: Views) -> None:
    @app.get(BATCH_PATH, response_model=list[RuntimeAnswer], responses=errors())
    async def batch(ids: SomeIds = []) -> Response:  # noqa: B006  # FastAPI copies it
        """The newest sandboxes of several sessions, as a list of those that are known."""
        return Response(views.sessions(ids), media_type=JSON)

    @app.get(SESSION_PATH, response_model=RuntimeAnswer, responses=errors(404))
    async def session(session_id: SomeId) -> Response:
        """The newest sandbox of a session."""
        return Response(session_of(views, session_id), media_type=JSON)

    @app.get(RUNTIME_PATH, response_model=RuntimeAnswer, responses=errors(404))
    async def runtime(runtime_id: SomeId) -> Response:
        """One sandbox."""
        return Response(runtime_of(views, runtime_id), media_type=JSON)

    @app.get("/list", response_model=ListAnswer, responses=errors())
    async def listing() -> Response:
        """All living sandboxes of all nodes."""
        return Response(views.all_living(), media_type=JSON)


class Changer:
    """Passes on what changes a sandbox, and knows of the change before its client does.

    Bodies are read here and not by FastAPI, which would take as long for it as the rest of the head does.
    """

    def __init__(self, members: Members, starts: Starts) -> None:
        self._members = members
        self._directory = members.directory
        self._starts = starts

    async def start(self, request: Request) -> Response:
        return passed(await self._starts.answer(read_start(await body_of(request)), request))

    async def stop(self, request: Request) -> Response:
        runtime_id = parsed(StopRequest, await body_of(request)).runtime_id
        if runtime_id is None:
            return Response(packed({"status": "nothing to stop"}), media_type=JSON)
        start, sandbox = self._starts.of_stand_in(runtime_id), self._found(runtime_id)
        if sandbox is not None:
            refusal = await self._stop(sandbox)
            if refusal is not None:
                return passed(refusal)
        elif start is not None:
            self._starts.stop(start)
        else:
            raise UnknownSandbox(f"no sandbox with runtime_id {runtime_id!r}")
        return Response(packed({"status": "stopped", "runtime_id": runtime_id}), media_type=JSON)

    async def _stop(self, sandbox: Known) -> Reply | None:
        """What its node answers if it does not stop it; one of a lost node is stopped should that come back."""
        if not self._members.is_here(sandbox.node):
            self._directory.put(unwanted(sandbox))
            return None
        self._starts.note_stopped(sandbox.session_id)
        reply = await self._pass_on("/stop", sandbox)
        if not reply.is_good:
            return None if reply.status == 404 and sandbox.is_dead else reply
        if reply.upto > self._members.upto(sandbox.node) and not sandbox.is_dead:
            self._directory.answered(stopped(sandbox, reply.upto))
        return None

    async def pass_on(self, path: str, request: Request) -> Response:
        """Pause or resume."""
        runtime_id = parsed(PauseRequest, await body_of(request)).runtime_id
        if runtime_id is None:
            return Response(packed({"status": "nothing to do"}), media_type=JSON)
        sandbox = self._found(runtime_id)
        if sandbox is None:
            raise UnknownSandbox(f"no sandbox with runtime_id {runtime_id!r}")
        reply = await self._pass_on(path, sandbox)
        if reply.is_good:
            await self._members.heard_upto(sandbox.node, reply.upto)
        return passed(reply)

    def _found(self, runtime_id: str) -> Known | None:
        """The sandbox with this id, or the one of the start that was read under it."""
        start = self._starts.of_stand_in(runtime_id)
        if start is not None:
            return self._directory.living_of_session(start.wish.session_id)
        return self._directory.of_runtime(self._starts.meant_by(runtime_id))

    async def _pass_on(self, path: str, sandbox: Known) -> Reply:
        return await self._members.ask(sandbox.node, "POST", path, packed({"runtime_id": sandbox.runtime_id}))


def _add_changing(app: FastAPI, changer: Changer) -> None:
    failures = errors(404, 409, 502, 503, 504)

    @app.post(STOP_PATH, response_model=StopAnswer, responses=failures, openapi_extra=json_body(StopRequest))
    async def stop(request: Request) -> Response:
        """Remove a sandbox; again is fine."""
        return await changer.stop(request)

    @app.post("/pause", response_model=PauseAnswer, responses=failures, openapi_extra=json_body(PauseRequest))
    async def pause(request: Request) -> Response:
        """Let a sandbox hold still: files, URL, key and running programs are kept; again is fine."""
        return await changer.pass_on("/pause", request)

    @app.post("/resume", response_model=PauseAnswer, responses=failures, openapi_extra=json_body(PauseRequest))
    async def resume(request: Request) -> Response:
        """Let a paused sandbox go on; a running one stays as it is."""
        return await changer.pass_on("/resume", request)
