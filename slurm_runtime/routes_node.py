"""The routes of a head: what this node is, what has changed on it, and that it takes no new sandboxes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slurm_runtime import __version__
from slurm_runtime.changes import Changes
from slurm_runtime.manager import Manager
from slurm_runtime.node_models import LONGEST_POLL_S, UPTO, ChangesAnswer, DrainRequest, NodeFacts
from slurm_runtime.openapi import errors
from slurm_runtime.routes_sandboxes import answer, until_gone

CHANGES_PATH = "/changes"
CHANGING = frozenset({"/start", "/stop", "/pause", "/resume", "/drain"})


def facts(manager: Manager, since: int = -1) -> NodeFacts:
    """The node now; its images only where they have changed after ``since``."""
    node, slots, known = manager.node, manager.admission.slots, manager.images.known
    return NodeFacts(
        name=node.name,
        boot=node.boot,
        slots=slots.total,
        used=slots.used,
        waiting=manager.admission.waiting,
        draining=node.draining,
        reason=node.reason,
        until=node.until,
        images=known.names if known.changed_at > since else None,
        podman=manager.connection.word,
        version=__version__,
    )


def news(manager: Manager, number: int, boot: str) -> ChangesAnswer:
    """What GET /changes answers now; no await, so that its parts belong together."""
    since = manager.changes.since(number if boot == manager.node.boot else -1)
    if since.changed is None:
        number, entries = -1, manager.register.entries()
    else:
        entries = [entry for one in since.changed if (entry := manager.register.find(one)) is not None]
    return ChangesAnswer(
        node=facts(manager, number),
        upto=manager.changes.upto,
        complete=since.changed is None,
        sandboxes=[answer(entry.sandbox) for entry in entries],
        earlier=[entry.specification.runtime_id for entry in entries if not manager.register.is_newest(entry)],
        gone=list(since.gone),
    )


async def wait_for_change(changes: Changes, number: int, wait_s: float, request: Request) -> None:
    """Until there is something to tell, the time is over, or the client has left."""
    waiting = asyncio.create_task(changes.beyond(number, wait_s))
    leaving = asyncio.create_task(until_gone(request))
    try:
        await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


def add_node_routes(app: FastAPI, manager: Manager) -> None:
    @app.get("/node", response_model_exclude_none=True, responses=errors())
    async def node() -> NodeFacts:
        """This server as a node of a head: slots, whether it drains, until when it is there, its images."""
        return facts(manager)

    @app.get(CHANGES_PATH, response_model=ChangesAnswer, responses=errors(429))
    async def changes(
        request: Request,
        since: Annotated[int, Query(ge=-1, le=1 << 62)] = -1,
        boot: Annotated[str, Query(max_length=64)] = "",
        wait_s: Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """The sandboxes that have changed since an earlier answer, as soon as there are some; all for the first one."""
        if boot == manager.node.boot and wait_s:
            await wait_for_change(manager.changes, since, min(wait_s, LONGEST_POLL_S), request)
        # Made by hand: FastAPI would look at each of a thousand sandboxes twice more.
        return Response(news(manager, since, boot).model_dump_json(exclude_none=True), media_type="application/json")

    @app.post("/drain", response_model_exclude_none=True, responses=errors())
    async def drain(wish: DrainRequest) -> NodeFacts:
        """Take no new sandboxes; those that are here go on. Again is fine."""
        manager.node.drain(wish.reason)
        return facts(manager)


class Numbered:
    """ASGI middleware: says in a header up to which change the answer to a request that changes something may tell."""

    def __init__(self, app: ASGIApp, upto: Callable[[], int]) -> None:
        self.app = app
        self.upto = upto

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                number = str(self.upto()).encode("ascii")
                message = {**message, "headers": [*message.get("headers", ()), (UPTO.lower().encode("ascii"), number)]}
            await send(message)

        is_change = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in CHANGING
        await self.app(scope, receive, numbered if is_change else send)
