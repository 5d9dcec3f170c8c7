"""The HTTP application of the head: the same guard, the same API and the same errors as those of a node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from slurm_runtime import __version__
from slurm_runtime.app import StatusCodes, add_error_handlers
from slurm_runtime.background import Background
from slurm_runtime.guard import Guard, Hold
from slurm_runtime.head.config import HeadConfig
from slurm_runtime.head.directory import Directory
from slurm_runtime.head.fleet import NameTaken
from slurm_runtime.head.hot import Hot
from slurm_runtime.head.members import Members, UnknownNode
from slurm_runtime.head.routes_images import Images, add_image_routes
from slurm_runtime.head.routes_nodes import NODES_PATH, add_node_routes, beat
from slurm_runtime.head.routes_operator import add_operator_routes
from slurm_runtime.head.routes_sandboxes import (
    BATCH_PATH,
    RUNTIME_PATH,
    SESSION_PATH,
    START_PATH,
    STOP_PATH,
    Changer,
    add_sandbox_routes,
    runtime_of,
    session_of,
)
from slurm_runtime.head.starts import Starts
from slurm_runtime.head.views import Views
from slurm_runtime.heartbeats import Heartbeats
from slurm_runtime.metrics import Traffic
from slurm_runtime.openapi import describe
from slurm_runtime.routes_operator import add_heartbeat_routes

MORE_CODES: StatusCodes = ((UnknownNode, 404), (NameTaken, 409))


@dataclass(frozen=True)
class Head:
    """The parts of a head. ``run`` it in the background; ``close`` ends all that is under way."""

    members: Members
    starts: Starts
    background: Background

    @classmethod
    def of(cls, config: HeadConfig) -> Head:
        background, directory = Background(), Directory()
        members = Members(config.api_key, directory, background, config.gather_s, config.silence_s)
        starts = Starts(members, directory, background, config)
        directory.placed_on = starts.placed_on
        return cls(members, starts, background)

    async def run(self) -> None:
        """Watch the nodes; ends only by cancellation."""
        await self.members.run()

    async def close(self) -> None:
        self.starts.close()
        await self.members.close()
        await self.background.close()


class HoldAtHead:
    """ASGI middleware: as ``Hold``, but nodes may always join: what is held waits for them."""

    def __init__(self, app: ASGIApp, settled: Callable[[], Awaitable[bool]]) -> None:
        self.app = app
        self.held = Hold(app, settled)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_of_nodes = scope["type"] == "http" and scope["path"].startswith(NODES_PATH)
        await (self.app if is_of_nodes else self.held)(scope, receive, send)


def create_app(head: Head, config: HeadConfig) -> FastAPI:
    """The application; the caller runs and closes the head."""
    app = FastAPI(
        title="SkyRL sandbox API head", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    traffic = Traffic()
    views = Views(head.members.directory, head.starts)
    app.openapi = lambda: describe(app, with_key=True)  # type: ignore[method-assign]  # FastAPI's own way
    changer = Changer(head.members, head.starts)
    app.add_middleware(
        Hot,
        changing={START_PATH: changer.start, STOP_PATH: changer.stop, NODES_PATH: partial(beat, head.members)},
        reading={SESSION_PATH: partial(session_of, views), RUNTIME_PATH: partial(runtime_of, views)},
        besides={BATCH_PATH},
        more=MORE_CODES,
    )
    app.add_middleware(HoldAtHead, settled=head.members.settled)
    app.add_middleware(Guard, api_key=config.api_key, on_answer=traffic.note)
    add_error_handlers(app, MORE_CODES)
    add_sandbox_routes(app, views, changer)
    add_image_routes(app, Images(head.members))
    add_heartbeat_routes(app, Heartbeats())
    add_node_routes(app, head.members)
    add_operator_routes(app, head.members, views, traffic)
    return app
