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


def _session_name(name: str) -> str:
    if name in {".", "..", "batch"}:
        raise ValueError(f"{name!r} cannot be a session's name: GET /sessions/{name} would mean something else")
    return name


Text = Annotated[str, AfterValidator(_no_nul)]
RuntimeId = Annotated[str, Field(max_length=256)]
SessionId = Annotated[
    Text, Field(min_length=1, max_length=256, pattern=r"^[^/?#%\\\x00-\x1f\x7f]+$"), AfterValidator(_session_name)
]


class Wire(BaseModel):
    """Base of all wire types."""

    model_config = ConfigDict(
        extra="allow", coerce_numbers_to_str=True, str_max_length=1_000_000, use_attribute_docstrings=True
    )


class MountWish(Wire):
    """A file or folder of the sandboxes' node that a sandbox should see."""

    host_path: Annotated[Text, Field(min_length=1, max_length=4096)]
    """Absolute path on the node, below a folder that the operator allows (--allow-mount)."""
    container_path: Annotated[Text, Field(min_length=1, max_length=4096)]
    """Absolute path in the sandbox."""
    mode: Text | None = None
    """``ro`` (default) or ``rw``."""


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
    session_id: SessionId | None = None
    """The client's name for this sandbox, fit for a URL; the same name again finds the same sandbox while it lives."""
    resource_factor: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] | None = None
    """Multiple of a slot's CPUs and memory; absent: 1."""
    image_pull_policy: Annotated[str, Field(max_length=64)] | None = None
    """``Always``, ``IfNotPresent`` (default) or ``Never``."""
    runtime_mounts: Annotated[list[MountWish], Field(max_length=64)] | None = None
    """Files and folders of the node to mount; only below folders that the operator allows, else 403."""


# Fields that clients send and this server does not act on, with what it does instead.
FIELDS_WITHOUT_EFFECT = {
    "run_as_user": "the program runs as root of its sandbox, which is an ordinary user outside of it",
    "run_as_group": "the program runs as root of its sandbox, which is an ordinary user outside of it",
    "fs_group": "files keep their owners",
    "enable_gpu": "sandboxes get no GPU",
    "runtime_class": "sandboxes are Podman containers in a user namespace",
}


class StopRequest(Wire):
    """POST /stop: one sandbox less."""

    runtime_id: RuntimeId | None = None
    """The sandbox to stop; null or absent (a client closing after a failed start) is answered and does nothing."""


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RuntimeAnswer(Answer):
    """One sandbox, as /start, /sessions/{session_id} and /runtime/{runtime_id} tell it."""

    runtime_id: str
    """The server's name for the sandbox."""
    session_id: str
    """The client's name for it."""
    url: str | None = None
    """``http://host:port`` of the sandbox's own server; absent until its port is known."""
    status: str
    """The session's life: ``starting`` (no URL yet), ``running``, ``paused``, ``stopped``."""
    pod_status: str
    """The container's health: ``pending``, ``ready``, ``failed``, ``not found`` (stopped).

    For a command with the port placeholder ``running`` stands where others read ``ready``.
    """
    session_api_key: str
    """Value of SESSION_API_KEY in the container, which its server asks for."""
    work_hosts: dict[str, int] = {}
    """Further published URLs with their ports; none."""
    restart_count: int = 0
    """How often the container was restarted; always 0, because a sandbox that died stays dead."""
    restart_reasons: list[str] = []
    """What a restart would have to mend: a sandbox killed for memory is named here."""
    events: list[str] = []
    """Why the sandbox is in this state, in words."""
    container_statuses: list[dict[str, Any]] = []
    """One entry: the state's name and its reason."""
    pod_logs: str | None = None
    """Why the sandbox failed and the last lines of its log; only when ``failed``."""
    image: str
    """The image it was asked with."""


class RuntimeSummary(Answer):
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


class ListAnswer(Answer):
    """GET /list: the sandboxes that are not stopped or failed."""

    runtimes: list[RuntimeSummary]
    """One entry each."""
    total: int
    """Their number."""


class StopAnswer(Answer):
    """POST /stop: done."""

    status: str
    """``stopped``, or ``nothing to stop`` where no runtime_id was given."""
    runtime_id: str | None = None
    """The sandbox that is stopped."""


class PauseRequest(Wire):
    """POST /pause and POST /resume: a sandbox holds still, or goes on."""

    runtime_id: RuntimeId | None = None
    """The sandbox; null or absent is answered and does nothing."""


class PauseAnswer(Answer):
    """POST /pause and POST /resume: done."""

    status: str
    """The session's life after it (``paused``, ``running``), or ``nothing to do`` where no runtime_id was given."""
    runtime_id: str | None = None
    """The sandbox that was paused or resumed."""
    session_id: str | None = None
    """Its client's name for it."""
    url: str | None = None
    """Its URL, the same as before."""
    session_api_key: str | None = None
    """Its key, the same as before."""


class PrefixAnswer(Answer):
    """GET /registry_prefix: where built images belong."""

    registry_prefix: str
    """What the names of built images begin with; clients add ``/runtime`` and a tag."""


class ImageDetails(Answer):
    """An image in the store of this node."""

    upload_time: str
    """When it was made, as an ISO 8601 time."""
    image_size_bytes: int
    """Its size in bytes."""


class ImageExistsAnswer(Answer):
    """GET /image_exists: is this image here?"""

    exists: bool
    """Whether it is in the store of this node."""
    url: str
    """This server's own address, to which later calls go."""
    image: ImageDetails | None = None
    """Its details; absent where it is not here."""


class BuildAnswer(Answer):
    """POST /build: the build goes on in the background."""

    build_id: str
    """What GET /build_status asks for."""
    url: str
    """This server's own address, to which later calls go."""
    status: str
    """The build's state, as in ``BuildStatusAnswer``."""


class BuildStatusAnswer(Answer):
    """GET /build_status: how far a build is."""

    build_id: str
    """The build."""
    status: str
    """``QUEUED``, ``BUILDING``, then ``SUCCESS``, ``FAILURE``, ``TIMEOUT`` or ``CANCELLED``."""
    image: str
    """The image that is built."""
    error: str | None = None
    """Why it failed, with Podman's last lines; absent otherwise."""
    progress: str | None = None
    """The last line that Podman wrote; absent before the first one."""


class HealthAnswer(Answer):
    """GET /health: this server answers."""

    status: str
    """Always ``ok``."""
    podman: str
    """``connecting``, ``connected`` or ``unreachable``: sandboxes start only when connected."""


class HeartbeatAnswer(Answer):
    """POST or GET /heartbeat/{name}: when a process of the run was last heard of."""

    name: str
    """Who beats."""
    age_s: float
    """Seconds since the last beat, by this server's monotonic clock."""
    count: int
    """Beats so far."""


class ErrorAnswer(Answer):
    """Every error."""

    detail: str
    """What went wrong and what to do about it."""
