"""What is asked most, without the layers of a web framework: a head of thousands of sandboxes has one CPU for it.

These are starts, stops and the polls for one sandbox, by the same handlers as those of the routes. All else, and a poll
for what is not known, goes on to the routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from slurm_runtime.app import STATUS_CODES, StatusCodes, error_answer

Handler = Callable[[Request], Awaitable[Response]]
Read = Callable[[str], "bytes | None"]


@dataclass(frozen=True)
class Served:
    """What the metrics call the route of a request."""

    path: str


class Hot:
    """ASGI middleware. ``changing`` are handlers of POST by path, ``reading`` what GET of a path with a name finds."""

    def __init__(self, app: ASGIApp, changing: dict[str, Handler], reading: dict[str, Read], more: StatusCodes) -> None:
        self.app = app
        self._changing = {path: (Served(path), handler) for path, handler in changing.items()}
        self._reading = {path.partition("{")[0]: (Served(path), read) for path, read in reading.items()}
        self._more = more
        self._known: tuple[type[Exception], ...] = (*(kind for kind, _ in (*STATUS_CODES, *more)), HTTPException)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        answer = None
        if method == "GET":
            answer = self._read(scope)
        elif method == "POST" and scope["path"] in self._changing:
            served, handler = self._changing[scope["path"]]
            scope["route"] = served
            answer = await self._handled(handler, Request(scope, receive))
        await (self.app if answer is None else answer)(scope, receive, send)

    def _read(self, scope: Scope) -> Response | None:
        prefix, slash, name = scope["path"].rpartition("/")
        served, read = self._reading.get(prefix + slash, (None, None))
        body = read(name) if read else None
        if body is None:
            return None
        scope["route"] = served
        return Response(body, media_type="application/json")

    async def _handled(self, handler: Handler, request: Request) -> Response:
        try:
            return await handler(request)
        except self._known as problem:
            return error_answer(problem, self._more)
