"""The wire: what clients send and get. Unknown fields are accepted, because every client sends some of its own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL character cannot be passed to a process")
    return text


def _variable_names(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not name or "=" in name:
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return variables


Text = Annotated[str, AfterValidator(_no_nul)]
RuntimeId = Annotated[str, Field(max_length=256)]


class Wire(BaseModel):
    """Base of all wire types."""

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True, str_max_length=1_000_000)


class StartRequest(Wire):
    """POST /start: one sandbox, please."""

    image: Annotated[Text, Field(min_length=1, max_length=1024)] | None = None
    """Image reference; --container-image of the server where it is absent."""
    command: Text | list[Text] | None = None
    """Program and arguments, as a list or as a string that is split like a shell's; absent: what the image runs."""
    working_dir: Annotated[Text, Field(max_length=4096)] | None = None
    """Working directory in the container, created if it is not there; absent: ``/``."""
    environment: Annotated[dict[Text, Text], AfterValidator(_variable_names)] | None = None
    """Environment variables of the container; one that holds the server's API key is dropped."""
    session_id: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    """The client's name for this sandbox; the same name again finds the same sandbox while it lives."""
    resource_factor: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] | None = None
    """Multiple of a slot's CPUs and memory; absent: 1."""
    image_pull_policy: str | None = None
    """``Always``, ``IfNotPresent`` (default) or ``Never``."""


# Fields that clients send and this server does not act on, with what it does instead.
FIELDS_WITHOUT_EFFECT = {
    "run_as_user": "the program runs as the image's user, root by default",
    "run_as_group": "the program runs as the image's user, root by default",
    "fs_group": "files keep their owners",
    "enable_gpu": "sandboxes get no GPU",
    "runtime_mounts": "nothing of the host is mounted into a sandbox",
    "runtime_class": "sandboxes are Podman containers in a user namespace",
}


class StopRequest(Wire):
    """POST /stop: one sandbox less."""

    runtime_id: RuntimeId | None = None
    """The sandbox to stop; null or absent (a client closing after a failed start) is answered and does nothing."""


class RuntimeAnswer(BaseModel):
    """One sandbox, as /start, /sessions/{session_id} and /runtime/{runtime_id} tell it."""

    runtime_id: str
    """The server's name for the sandbox."""
    session_id: str
    """The client's name for it."""
    url: str | None = None
    """``http://host:port`` of the sandbox's own server; absent until its port is known."""
    status: str
    """The session's life: ``starting`` (no URL yet), ``running``, ``stopped``."""
    pod_status: str
    """The container's health: ``pending``, ``ready``, ``failed``, ``not found`` (stopped).

    For a command with the port placeholder ``running`` stands where others read ``ready``.
    """
    session_api_key: str
    """Value of SESSION_API_KEY in the container, which its server asks for."""
    work_hosts: dict[str, int] = {}
    """Further published URLs with their ports; none."""
    restart_count: int = 0
    """How often the container was restarted; never here."""
    restart_reasons: list[str] = []
    """Why; a sandbox killed for memory is named here."""
    events: list[str] = []
    """Why the sandbox is in this state, in words."""
    container_statuses: list[dict[str, Any]] = []
    """One entry: the state's name and its reason."""
    pod_logs: str | None = None
    """Why the sandbox failed and the last lines of its log; only when ``failed``."""
    image: str
    """The image it was asked with."""


class RuntimeSummary(BaseModel):
    """One line of GET /list."""

    runtime_id: str
    """The server's name for the sandbox."""
    session_id: str
    """The client's name for it."""
    status: str
    """As in ``RuntimeAnswer``."""
    pod_status: str
    """As in ``RuntimeAnswer``."""
    url: str | None = None
    """As in ``RuntimeAnswer``."""
    image: str
    """The image it was asked with."""


class ListAnswer(BaseModel):
    """GET /list: the sandboxes that are not stopped or failed."""

    runtimes: list[RuntimeSummary]
    """One entry each."""
    total: int
    """Their number."""


class StopAnswer(BaseModel):
    """POST /stop: done."""

    status: str
    """``stopped``, or ``nothing to stop`` where no runtime_id was given."""
    runtime_id: str | None = None
    """The sandbox that is stopped."""


class HealthAnswer(BaseModel):
    """GET /health: this server answers."""

    status: str
    """Always ``ok``."""
    podman: str
    """``connecting``, ``connected`` or ``unreachable``: sandboxes start only when connected."""


class HeartbeatAnswer(BaseModel):
    """POST or GET /heartbeat/{name}: when a process of the run was last heard of."""

    name: str
    """Who beats."""
    age_s: float
    """Seconds since the last beat, by this server's monotonic clock."""
    count: int
    """Beats so far."""


class ErrorAnswer(BaseModel):
    """Every error."""

    detail: str
    """What went wrong and what to do about it."""
