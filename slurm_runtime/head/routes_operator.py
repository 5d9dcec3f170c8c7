"""The routes of operators at the head: health, the page, metrics, documentation."""

from __future__ import annotations

import itertools
from collections import Counter

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from slurm_runtime import __version__
from slurm_runtime.guard import OPEN_PATH
from slurm_runtime.head.members import Members
from slurm_runtime.head.metrics import Figures, exposition
from slurm_runtime.head.page import Overview, render
from slurm_runtime.head.routes_nodes import all_nodes
from slurm_runtime.head.views import Views
from slurm_runtime.metrics import Traffic
from slurm_runtime.models import HealthAnswer
from slurm_runtime.openapi import documentation, errors
from slurm_runtime.page import MOST_ROWS
from slurm_runtime.routes_operator import PAGE_HEADERS


def podman_word(members: Members) -> str:
    """Whether sandboxes can be started: on one node at least."""
    words = {node.facts.podman for node in members.here() if node.facts is not None}
    return next((word for word in ("connected", "connecting", "unreachable") if word in words), "connecting")


def figures(members: Members) -> Figures:
    nodes, now = tuple(members.nodes.values()), members.now()
    return Figures(
        nodes,
        Counter(node.standing(now) for node in nodes),
        Counter((sandbox.node, sandbox.state) for sandbox in members.directory.living()),
        members.line.waiting,
    )


def overview(members: Members, views: Views) -> Overview:
    living = sum(1 for _ in members.directory.living())
    untold = views.untold()
    bodies = itertools.chain(map(views.starts.told, untold), (one.body for one in members.directory.living()))
    return Overview(
        all_nodes(members),
        living + len(untold),
        tuple(itertools.islice(bodies, MOST_ROWS)),
        tuple(members.directory.last_failures()),
        __version__,
    )


def add_operator_routes(app: FastAPI, members: Members, views: Views, traffic: Traffic) -> None:
    @app.get(OPEN_PATH, responses=errors())
    async def health() -> HealthAnswer:
        """This head answers; whether one of its nodes can start sandboxes."""
        return HealthAnswer(status="ok", podman=podman_word(members))

    @app.get("/", response_class=HTMLResponse, responses=errors())
    async def page() -> HTMLResponse:
        """A page for people: nodes, slots, the line, sandboxes, last failures."""
        return HTMLResponse(render(overview(members, views)), headers=PAGE_HEADERS)

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors())
    async def metrics() -> Response:
        """Figures for Prometheus, those of a node with its name."""
        body, kind = exposition(lambda: figures(members), traffic)
        return Response(body, media_type=kind)

    @app.get("/docs", response_class=HTMLResponse, responses=errors())
    async def docs() -> HTMLResponse:
        """This description as a page."""
        return HTMLResponse(documentation(app.openapi()), headers=PAGE_HEADERS)
