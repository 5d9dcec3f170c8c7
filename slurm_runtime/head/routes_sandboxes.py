"""The routes of sandboxes at the head: starts go to a node, reads are answered from memory, the rest is passed on."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from slurm_runtime.entries import UnknownSandbox
from slurm_runtime.head.answers import Known, packed, stopped
from slurm_runtime.head.directory import unwanted
from slurm_runtime.head.link import Reply
from slurm_runtime.head.members import Members
from slurm_runtime.head.starts import Starts
from slurm_runtime.head.views import Views
from slurm_runtime.head.wish import read_start
from slurm_runtime.models import (
    ListAnswer,
    PauseAnswer,
    PauseRequest,
    RuntimeAnswer,
    StartRequest,
    StopAnswer,
    StopRequest,
)
from slurm_runtime.openapi import errors
from slurm_runtime.routes_sandboxes import SomeId, SomeIds

JSON = "application/json"


def json_body(model: type[StartRequest]) -> dict[str, Any]:
    """What OpenAPI says of a body that a route reads by itself."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


def passed(reply: Reply) -> Response:
    """A node's answer as the head's."""
    return Response(reply.body, reply.status, media_type=reply.kind)


def add_sandbox_routes(app: FastAPI, members: Members, starts: Starts, views: Views) -> None:
    _add_start(app, starts)
    _add_reading(app, views)
    _add_changing(app, Changer(members, starts))


def _add_start(app: FastAPI, starts: Starts) -> None:
    @app.post(
        "/start",
        status_code=201,
        response_model=RuntimeAnswer,
        responses=errors(403, 404, 409, 499, 502, 503, 504),
        openapi_extra=json_body(StartRequest),
    )
    async def start(request: Request) -> Response:
        """Start a sandbox on the node with most free slots, or find the living one of the session."""
        return passed(await starts.answer(read_start(await request.body()), request))


def _add_reading(app: FastAPI, views: Views) -> None:
    def found(body: bytes | None, what: str, name: str) -> Response:
        if body is None:
            raise UnknownSandbox(f"no sandbox {what} {name!r}")
        return Response(body, media_type=JSON)

    @app.get("/sessions/batch", response_model=list[RuntimeAnswer], responses=errors())
    async def batch(ids: SomeIds = []) -> Response:  # noqa: B006  # FastAPI copies it
        """The newest sandboxes of several sessions, as a list of those that are known."""
        return Response(views.sessions(ids), media_type=JSON)

    @app.get("/sessions/{session_id}", response_model=RuntimeAnswer, responses=errors(404))
    async def session(session_id: SomeId) -> Response:
        """The newest sandbox of a session."""
        return found(views.session(session_id), "for session", session_id)

    @app.get("/runtime/{runtime_id}", response_model=RuntimeAnswer, responses=errors(404))
    async def runtime(runtime_id: SomeId) -> Response:
        """One sandbox."""
        return found(views.runtime(runtime_id), "with runtime_id", runtime_id)

    @app.get("/list", response_model=ListAnswer, responses=errors())
    async def listing() -> Response:
        """All living sandboxes of all nodes."""
        return Response(views.all_living(), media_type=JSON)


class Changer:
    """Passes on what changes a sandbox, and knows of the change before its client does."""

    def __init__(self, members: Members, starts: Starts) -> None:
        self._members = members
        self._directory = members.directory
        self._starts = starts

    async def stop(self, runtime_id: str) -> Response:
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
        reply = await self._pass_on("/stop", sandbox)
        if not reply.is_good:
            return None if reply.status == 404 and sandbox.is_dead else reply
        if reply.upto > self._members.upto(sandbox.node) and not sandbox.is_dead:
            self._directory.answered(stopped(sandbox, reply.upto))
        return None

    async def hold_or_go_on(self, path: str, runtime_id: str) -> Response:
        """Pause or resume."""
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

    @app.post("/stop", response_model=StopAnswer, responses=failures)
    async def stop(wish: StopRequest) -> Response:
        """Remove a sandbox; again is fine."""
        if wish.runtime_id is None:
            return Response(packed({"status": "nothing to stop"}), media_type=JSON)
        return await changer.stop(wish.runtime_id)

    @app.post("/pause", response_model=PauseAnswer, responses=failures)
    async def pause(wish: PauseRequest) -> Response:
        """Let a sandbox hold still: files, URL, key and running programs are kept; again is fine."""
        return await _unless_null("/pause", wish)

    @app.post("/resume", response_model=PauseAnswer, responses=failures)
    async def resume(wish: PauseRequest) -> Response:
        """Let a paused sandbox go on; a running one stays as it is."""
        return await _unless_null("/resume", wish)

    async def _unless_null(path: str, wish: PauseRequest) -> Response:
        if wish.runtime_id is None:
            return Response(packed({"status": "nothing to do"}), media_type=JSON)
        return await changer.hold_or_go_on(path, wish.runtime_id)
