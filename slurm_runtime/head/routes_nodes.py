"""The routes of nodes: they join, leave, are drained, and are listed."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path, Query, Request, Response

from slurm_runtime.head.fleet import line_of
from slurm_runtime.head.members import Members
from slurm_runtime.head.routes_sandboxes import body_of, json_body
from slurm_runtime.head.wish import parsed
from slurm_runtime.node_models import DrainRequest, NodeAnswer, NodesAnswer, NodeWish
from slurm_runtime.openapi import errors

NODES_PATH = "/nodes"

SomeName = Annotated[str, Path(max_length=256)]


def line(members: Members, name: str) -> NodeAnswer:
    return line_of(members.get(name), members.directory.living_on(name), members.trouble(name), members.now())


def all_nodes(members: Members) -> NodesAnswer:
    """The answer of GET /nodes."""
    taking = [node.facts for node in members.taking() if node.facts]
    return NodesAnswer(
        nodes=[line(members, name) for name in sorted(members.nodes)],
        slots=sum(facts.slots for facts in taking),
        used=sum(facts.used for facts in taking),
        waiting=members.line.waiting,
    )


async def beat(members: Members, request: Request) -> Response:
    """POST /nodes, hundreds of which come every two seconds from a large fleet."""
    wish = parsed(NodeWish, await body_of(request))
    return Response(
        line(members, members.join(wish).name).model_dump_json(exclude_none=True), media_type="application/json"
    )


def add_node_routes(app: FastAPI, members: Members) -> None:
    @app.get(NODES_PATH, response_model_exclude_none=True, responses=errors())
    async def nodes() -> NodesAnswer:
        """Every node that has joined, also those that have left or were lost."""
        return all_nodes(members)

    @app.post(NODES_PATH, response_model=NodeAnswer, responses=errors(409), openapi_extra=json_body(NodeWish))
    async def join(request: Request) -> Response:
        """A node joins, or says that it lives; the same again is fine."""
        return await beat(members, request)

    @app.delete(NODES_PATH + "/{name}", response_model_exclude_none=True, responses=errors(404))
    async def leave(name: SomeName, reason: Annotated[str, Query(max_length=1000)] = "") -> NodeAnswer:
        """A node says that it ends: its sandboxes are gone with it."""
        return line(members, members.leave(name, reason).name)

    @app.post(NODES_PATH + "/{name}/drain", response_model_exclude_none=True, responses=errors(404, 502))
    async def drain(name: SomeName, wish: DrainRequest) -> NodeAnswer:
        """A node gets no new sandboxes any more; those on it go on."""
        return line(members, (await members.drain(name, wish.reason)).name)
