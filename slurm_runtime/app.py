"""The HTTP application: the guard around it, its route families, and the one table from errors to status codes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Scope

from slurm_runtime import __version__
from slurm_runtime.builds import Builds, NoDisk, TooManyBuilds, UnknownBuild
from slurm_runtime.changes import TooManyPolls
from slurm_runtime.config import ServerConfig
from slurm_runtime.entries import (
    Draining,
    NeverFits,
    NoRoom,
    StoppedEarly,
    Stopping,
    TooSlow,
    UnknownSandbox,
    WrongState,
)
from slurm_runtime.guard import BODY_S, Guard, Hold, error, is_unheld
from slurm_runtime.heartbeats import Heartbeats, TooManyNames
from slurm_runtime.manager import Manager
from slurm_runtime.metrics import Traffic
from slurm_runtime.node_models import DRAINING, FULL, REFUSED, STOPPING
from slurm_runtime.openapi import describe
from slurm_runtime.podman import EngineError, EngineSilent
from slurm_runtime.routes_images import BuildingIsOff, add_image_routes
from slurm_runtime.routes_node import CHANGES_PATH, Numbered, add_node_routes
from slurm_runtime.routes_operator import add_heartbeat_routes, add_operator_routes
from slurm_runtime.routes_sandboxes import HungUp, add_sandbox_routes
from slurm_runtime.uploads import TooLarge
from slurm_runtime.wishes import BadRequest, Forbidden

StatusCodes = tuple[tuple[type[Exception], int], ...]
# The first match counts. 503 is kept for "full" and "stopping": clients take it elsewhere for a paused sandbox.
STATUS_CODES: StatusCodes = (
    (UnknownSandbox, 404),
    (UnknownBuild, 404),
    (StoppedEarly, 409),
    (WrongState, 409),
    (TooLarge, 413),
    (NeverFits, 422),
    (BadRequest, 422),
    (Forbidden, 403),
    (TooManyNames, 429),
    (TooManyBuilds, 429),
    (TooManyPolls, 429),
    (HungUp, 499),
    (BuildingIsOff, 501),
    (EngineSilent, 504),
    (EngineError, 502),
    (NoRoom, 503),
    (Draining, 503),
    (Stopping, 503),
    (TooSlow, 504),
    (NoDisk, 507),
)
# What a head is told: another node may take the start.
REFUSALS: tuple[tuple[type[Exception], str], ...] = ((NoRoom, FULL), (Draining, DRAINING), (Stopping, STOPPING))


def status_for(problem: Exception, more: StatusCodes = ()) -> int:
    """The status code of an error; 500 for one that is neither in the table nor in ``more``."""
    return next((code for kind, code in (*more, *STATUS_CODES) if isinstance(problem, kind)), 500)


def validation_sentence(errors: Any) -> str:
    """What is wrong with a request, in one line: the field and the complaint, for each; never the value."""
    parts = []
    for found in list(errors)[:5]:
        where = ".".join(str(step) for step in found["loc"] if step != "body")[:200]
        parts.append(f"{where}: {found['msg']}" if where else str(found["msg"]))
    return "; ".join(parts)


def create_app(manager: Manager, config: ServerConfig, heartbeats: Heartbeats, body_s: float = BODY_S) -> FastAPI:
    """The application; the caller runs and closes the manager, and closes ``app.state.builds`` before it.

    A request's body may take ``body_s`` seconds.
    """
    app = FastAPI(
        title="SkyRL sandbox API server", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    builds = Builds(lambda *build: manager.engine.build(*build), lambda image: manager.images.offer(image))
    traffic = Traffic()

    def heard(scope: Scope, status: int, seconds: float) -> None:
        traffic.note(scope, status, seconds)
        if not is_unheld(scope["path"]) and scope["path"] != CHANGES_PATH:  # a head's waiting is no work
            manager.statistics.requests.note(seconds)

    app.state.builds = builds
    app.openapi = lambda: describe(app, config.api_key is not None)  # type: ignore[method-assign]  # FastAPI's own way
    app.add_middleware(Hold, settled=lambda: manager.settled())
    app.add_middleware(Numbered, upto=lambda: manager.changes.upto)
    app.add_middleware(Guard, api_key=config.api_key, on_answer=heard, body_s=body_s)
    add_error_handlers(app)
    add_sandbox_routes(app, manager, config)
    add_image_routes(app, manager, config, builds)
    add_heartbeat_routes(app, heartbeats)
    add_operator_routes(app, manager, builds, traffic)
    add_node_routes(app, manager)
    return app


def error_answer(problem: Exception, more: StatusCodes = ()) -> JSONResponse:
    """An error of the table, or one that is an HTTP error already, as clients get it."""
    if isinstance(problem, StarletteHTTPException):
        return error(problem.status_code, str(problem.detail), dict(problem.headers or {}))
    word = next((word for kind, word in REFUSALS if isinstance(problem, kind)), None)
    return error(status_for(problem, more), str(problem), {REFUSED: word} if word else None)


def add_error_handlers(app: FastAPI, more: StatusCodes = ()) -> None:
    """Answer errors as every client gets them: those of the table, of ``more``, and all others."""

    async def known(_request: Request, problem: Exception) -> JSONResponse:
        return error_answer(problem, more)

    async def invalid(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, RequestValidationError)
        return error(422, validation_sentence(problem.errors()))

    async def unknown(_request: Request, problem: Exception) -> JSONResponse:
        return error(500, f"an internal error ({type(problem).__name__}); the server's log has the details")

    for kind, _ in (*STATUS_CODES, *more):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(StarletteHTTPException, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unknown)
