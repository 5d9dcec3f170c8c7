"""The routes of operators and of the run's own jobs: health, heartbeats, the page, metrics, documentation."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import FastAPI, HTTPException, Path, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from slurm_runtime.builds import Builds
from slurm_runtime.guard import OPEN_PATH
from slurm_runtime.heartbeats import LONGEST_NAME, Beat, Heartbeats
from slurm_runtime.manager import Manager
from slurm_runtime.metrics import Traffic, exposition
from slurm_runtime.models import HealthAnswer, HeartbeatAnswer
from slurm_runtime.openapi import documentation, errors
from slurm_runtime.page import Snapshot, render

HeartbeatName = Annotated[str, Path(max_length=LONGEST_NAME)]
# Nothing to fetch and nothing to run: what a sandbox writes can do nothing in an operator's browser.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_operator_routes(app: FastAPI, manager: Manager, builds: Builds, traffic: Traffic) -> None:
    def snapshot() -> Snapshot:
        return replace(manager.snapshot(), builds=builds.under_way())

    @app.get(OPEN_PATH, responses=errors())
    async def health() -> HealthAnswer:
        """This server answers."""
        return HealthAnswer(status="ok", podman=manager.connection.word)

    @app.get("/", response_class=HTMLResponse, responses=errors())
    async def page() -> HTMLResponse:
        """A page for people: sandboxes, slots, queue, images, last failures."""
        return HTMLResponse(render(snapshot()), headers=PAGE_HEADERS)

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors())
    async def metrics() -> Response:
        """Figures for Prometheus."""
        body, kind = exposition(snapshot, traffic, manager.launcher.steps)
        return Response(body, media_type=kind)

    @app.get("/docs", response_class=HTMLResponse, responses=errors())
    async def docs() -> HTMLResponse:
        """This description as a page."""
        return HTMLResponse(documentation(app.openapi()), headers=PAGE_HEADERS)


def add_heartbeat_routes(app: FastAPI, heartbeats: Heartbeats) -> None:
    def heard(name: str, beat: Beat) -> HeartbeatAnswer:
        return HeartbeatAnswer(name=name, age_s=heartbeats.age_s(beat), count=beat.count)

    @app.post("/heartbeat/{name}", responses=errors(429))
    async def beat(name: HeartbeatName) -> HeartbeatAnswer:
        """The process called ``name`` lives."""
        return heard(name, heartbeats.beat(name))

    @app.get("/heartbeat/{name}", responses=errors(404))
    async def last_beat(name: HeartbeatName) -> HeartbeatAnswer:
        """When it was last heard of."""
        found = heartbeats.get(name)
        if found is None:
            raise HTTPException(404, f"nothing was ever heard of {name!r}")
        return heard(name, found)
