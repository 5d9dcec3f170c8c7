"""The HTTP surface: routes, authentication, and the one table from errors to status codes."""

from __future__ import annotations

import hmac
import secrets
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slurm_runtime import __version__
from slurm_runtime.config import ServerConfig
from slurm_runtime.heartbeats import LONGEST_NAME, Beat, Heartbeats, TooManyNames
from slurm_runtime.images import pull_policy
from slurm_runtime.logs import log
from slurm_runtime.manager import Manager, NeverFits, NoRoom, StoppedEarly, Stopping, TooSlow, UnknownSandbox
from slurm_runtime.models import (
    FIELDS_WITHOUT_EFFECT,
    ErrorAnswer,
    HealthAnswer,
    HeartbeatAnswer,
    ListAnswer,
    RuntimeAnswer,
    RuntimeSummary,
    StartRequest,
    StopAnswer,
    StopRequest,
)
from slurm_runtime.podman import EngineError, EngineSilent
from slurm_runtime.sandbox import (
    Sandbox,
    Specification,
    State,
    container_port,
    dialect_of,
    fill_port,
    split_command,
    without_secret,
)

MOST_BODY_BYTES = 4 << 20
OPEN_PATH = "/health"  # the only one without a key

HeartbeatName = Annotated[str, Path(max_length=LONGEST_NAME)]


class BadRequest(Exception):
    """A field of a request cannot be served."""


# The first match counts. 503 is kept for "full" and "stopping": clients take it elsewhere for a paused sandbox.
STATUS_CODES: tuple[tuple[type[Exception], int], ...] = (
    (UnknownSandbox, 404),
    (StoppedEarly, 409),
    (NeverFits, 422),
    (BadRequest, 422),
    (TooManyNames, 429),
    (EngineSilent, 504),
    (EngineError, 502),
    (NoRoom, 503),
    (Stopping, 503),
    (TooSlow, 504),
)


class Guard:
    """Before any route: asks for the API key and bounds the size of a body. ASGI middleware."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif not self._may_pass(scope):
            await _error(401, "missing or wrong API key: send it as header X-API-Key")(scope, receive, send)
        elif _content_length(scope) > MOST_BODY_BYTES:
            await _error(413, f"the body is larger than {MOST_BODY_BYTES} bytes")(scope, receive, send)
        else:
            await self.app(scope, _bounded(receive), send)

    def _may_pass(self, scope: Scope) -> bool:
        if self.api_key is None or (scope["path"] == OPEN_PATH and scope["method"] in {"GET", "HEAD"}):
            return True
        sent = next((value for name, value in scope["headers"] if name == b"x-api-key"), b"")
        return hmac.compare_digest(sent, self.api_key)


def _content_length(scope: Scope) -> int:
    text = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(text) if text.isdigit() else 0


def _bounded(receive: Receive) -> Receive:
    """``receive`` that refuses a body which grows too large without having said so."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MOST_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MOST_BODY_BYTES} bytes")
        return message

    return bounded


def _error(status: int, detail: str) -> JSONResponse:
    return JSONResponse(ErrorAnswer(detail=detail).model_dump(), status)


def status_for(problem: Exception) -> int:
    """The status code of an error; 500 for one that is not in the table."""
    return next((code for kind, code in STATUS_CODES if isinstance(problem, kind)), 500)


def validation_sentence(errors: Any) -> str:
    """What is wrong with a request, in one line: the field and the complaint, for each; never the value."""
    parts = []
    for error in list(errors)[:5]:
        where = ".".join(str(step) for step in error["loc"] if step != "body")[:200]
        parts.append(f"{where}: {error['msg']}" if where else str(error["msg"]))
    return "; ".join(parts)


def specify(wish: StartRequest, config: ServerConfig) -> Specification:
    """What a request asks for, settled; ``ValueError`` says which field is wrong."""
    image = wish.image or config.default_image
    if image is None:
        raise ValueError("image is missing, and the server was started without --container-image")
    words = split_command(wish.command)
    port = container_port(words)
    return Specification(
        runtime_id=secrets.token_hex(8),
        session_id=wish.session_id or f"session-{secrets.token_hex(8)}",
        session_api_key=secrets.token_urlsafe(32),
        image=image,
        command=fill_port(words, port),
        working_dir=working_dir(wish.working_dir),
        environment=without_secret(wish.environment or {}, config.api_key),
        resource_factor=wish.resource_factor or 1.0,
        pull_policy=pull_policy(wish.image_pull_policy),
        dialect=dialect_of(wish.command),
        container_port=port,
    )


def settled(wish: StartRequest, config: ServerConfig) -> Specification:
    try:
        return specify(wish, config)
    except ValueError as problem:
        raise BadRequest(str(problem)) from None


def working_dir(text: str | None) -> str:
    """An absolute path; absent means ``/``."""
    if text and not text.startswith("/"):
        raise ValueError(f"working_dir {text!r} is not an absolute path")
    return text or "/"


def answer(sandbox: Sandbox) -> RuntimeAnswer:
    """A sandbox as clients read it."""
    wish, failed = sandbox.specification, sandbox.state is State.FAILED
    return RuntimeAnswer(
        runtime_id=wish.runtime_id,
        session_id=wish.session_id,
        url=sandbox.url,
        status=sandbox.status,
        pod_status=sandbox.pod_status,
        session_api_key=wish.session_api_key,
        events=[sandbox.reason],
        container_statuses=[{"state": sandbox.state.name.lower(), "reason": sandbox.reason}],
        pod_logs="\n".join(filter(None, (sandbox.reason, sandbox.last_lines))) if failed else None,
        image=wish.image,
    )


def summary(sandbox: Sandbox) -> RuntimeSummary:
    return RuntimeSummary(**answer(sandbox).model_dump(include=set(RuntimeSummary.model_fields)))


class FieldNotes:
    """Says once for each field of a request that it has no effect here."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def note(self, wish: StartRequest) -> None:
        for name in (wish.model_extra or {}).keys() & FIELDS_WITHOUT_EFFECT.keys() - self._said:
            self._said.add(name)
            log.info("clients send %s, which has no effect: %s", name, FIELDS_WITHOUT_EFFECT[name])


def create_app(manager: Manager, config: ServerConfig, heartbeats: Heartbeats) -> FastAPI:
    """The application; the caller runs and closes the manager."""
    app = FastAPI(title="SkyRL sandbox API server", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=config.api_key)
    _add_error_handlers(app)
    _add_sandbox_routes(app, manager, config)
    _add_other_routes(app, manager, heartbeats)
    return app


def _add_sandbox_routes(app: FastAPI, manager: Manager, config: ServerConfig) -> None:
    notes = FieldNotes()

    @app.post("/start", status_code=201, response_model_exclude_none=True)
    async def start(wish: StartRequest, request: Request) -> RuntimeAnswer:
        """Start a sandbox, or find the living one of the session."""
        notes.note(wish)
        sandbox = await manager.start(settled(wish, config))
        if await request.is_disconnected():
            await manager.hung_up(sandbox.specification.runtime_id)
        return answer(sandbox)

    @app.get("/sessions/{session_id}", response_model_exclude_none=True)
    async def session(session_id: str) -> RuntimeAnswer:
        """The newest sandbox of a session."""
        return answer(manager.by_session(session_id))

    @app.get("/runtime/{runtime_id}", response_model_exclude_none=True)
    async def runtime(runtime_id: str) -> RuntimeAnswer:
        """One sandbox."""
        return answer(manager.by_runtime(runtime_id))

    @app.get("/list", response_model_exclude_none=True)
    async def listing() -> ListAnswer:
        """All living sandboxes."""
        runtimes = [summary(sandbox) for sandbox in manager.living()]
        return ListAnswer(runtimes=runtimes, total=len(runtimes))

    @app.post("/stop", response_model_exclude_none=True)
    async def stop(wish: StopRequest) -> StopAnswer:
        """Remove a sandbox; again is fine."""
        if wish.runtime_id is None:
            return StopAnswer(status="nothing to stop")
        await manager.stop(wish.runtime_id)
        return StopAnswer(status="stopped", runtime_id=wish.runtime_id)


def _add_other_routes(app: FastAPI, manager: Manager, heartbeats: Heartbeats) -> None:
    def heard(name: str, beat: Beat) -> HeartbeatAnswer:
        return HeartbeatAnswer(name=name, age_s=heartbeats.age_s(beat), count=beat.count)

    @app.get(OPEN_PATH)
    async def health() -> HealthAnswer:
        """This server answers."""
        return HealthAnswer(status="ok", podman=manager.podman)

    @app.post("/heartbeat/{name}")
    async def beat(name: HeartbeatName) -> HeartbeatAnswer:
        """The process called ``name`` lives."""
        return heard(name, heartbeats.beat(name))

    @app.get("/heartbeat/{name}")
    async def last_beat(name: HeartbeatName) -> HeartbeatAnswer:
        """When it was last heard of."""
        found = heartbeats.get(name)
        if found is None:
            raise HTTPException(404, f"nothing was ever heard of {name!r}")
        return heard(name, found)


def _add_error_handlers(app: FastAPI) -> None:
    async def known(_request: Request, problem: Exception) -> JSONResponse:
        return _error(status_for(problem), str(problem))

    async def http(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, StarletteHTTPException)
        return _error(problem.status_code, str(problem.detail))

    async def invalid(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, RequestValidationError)
        return _error(422, validation_sentence(problem.errors()))

    async def unknown(_request: Request, problem: Exception) -> JSONResponse:
        return _error(500, f"an internal error ({type(problem).__name__}); the server's log has the details")

    for kind, _ in STATUS_CODES:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unknown)
