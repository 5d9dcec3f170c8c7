"""What is asked most, without the layers of a web framework: a head of thousands of sandboxes has one CPU for it.

These are starts, stops, the polls for one sandbox and the beats of nodes, by the same handlers as those of the routes.
All else goes on to the routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from slurm_runtime.app import STATUS_CODES, StatusCodes, error_answer
from slurm_runtime.routes_sandboxes import LONGEST_ID

Handler = Callable[[Request], Awaitable[Response]]
Read = Callable[[str], bytes]


@dataclass(frozen=True)
class Served:
    """What the metrics call the route of a request."""

    path: str


class Hot:
    """ASGI middleware. ``changing`` are handlers of POST by path, ``reading`` what GET of a path with a name finds.

    ``besides`` are paths that only look like those.
    """

    def __init__(
        self,
        app: ASGIApp,
        changing: dict[str, Handler],
        reading: dict[str, Read],
        besides: Collection[str],
        more: StatusCodes,
    ) -> None:
        self.app = app
        self._besides = frozenset(besides)
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
        path: str = scope["path"]
        prefix, slash, name = path.rpartition("/")
        served, read = self._reading.get(prefix + slash, (None, None))
        if read is None or not 0 < len(name) <= LONGEST_ID or path in self._besides:
            return None
        scope["route"] = served
        try:
            return Response(read(name), media_type="application/json")
        except self._known as problem:
            return error_answer(problem, self._more)

    async def _handled(self, handler: Handler, request: Request) -> Response:
        try:
            return await handler(request)
        except self._known as problem:
            return error_answer(problem, self._more)
