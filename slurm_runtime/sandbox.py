"""What is one sandbox: its specification, its state, which changes are allowed, how clients are told. Pure."""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

PORT_PLACEHOLDER = "88888888"  # SkyRL-OpenHands writes it where the server knows the port better
DEFAULT_CONTAINER_PORT = 60000  # what every OpenHands client names in its command
SESSION_KEY_VARIABLE = "SESSION_API_KEY"
CONTAINER_PREFIX = "sandbox-"


class Dialect(enum.Enum):
    """Which client asks; they disagree on words and patience."""

    SDK = "command is a string: OpenHands SDK, APIRemoteWorkspace"
    LEGACY = "command is a list: OpenHands 0.x, RemoteRuntime"
    PLACEHOLDER = "command is a list with the port placeholder: SkyRL-OpenHands"


class State(enum.Enum):
    """A sandbox's life. DEAD states never change again."""

    PENDING = "waits for a slot, its image or Podman"
    STARTING = "its container runs, its server does not answer yet"
    READY = "its server has answered through the published URL"
    PAUSED = "its processes are stopped, its files and its URL kept"
    FAILED = "could not be started, or died"
    STOPPED = "was stopped on request"

    @property
    def is_dead(self) -> bool:
        return self in {State.FAILED, State.STOPPED}


NEXT_STATES: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.STARTING, State.FAILED, State.STOPPED}),
    State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.READY: frozenset({State.PAUSED, State.FAILED, State.STOPPED}),
    State.PAUSED: frozenset({State.STARTING, State.READY, State.FAILED, State.STOPPED}),
    State.FAILED: frozenset(),
    State.STOPPED: frozenset(),
}


class ImpossibleChange(RuntimeError):
    """A state change that the life of a sandbox does not have: a fault of this server."""


@dataclass(frozen=True)
class Mount:
    """A file or folder of the host that a sandbox sees at ``target``."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Specification:
    """What a client asked for, settled.

    ``command`` is the program with its arguments, or None for what the image itself runs. ``container_port`` is the
    port inside the container on which its server listens. ``units`` of ``resource_factor`` slots are leased.
    """

    runtime_id: str
    session_id: str
    session_api_key: str
    image: str
    command: tuple[str, ...] | None
    working_dir: str
    environment: Mapping[str, str]
    resource_factor: float
    pull_policy: str
    dialect: Dialect
    container_port: int
    mounts: tuple[Mount, ...] = ()

    @property
    def container_name(self) -> str:
        return f"{CONTAINER_PREFIX}{self.runtime_id}"

    @property
    def container_environment(self) -> dict[str, str]:
        """The client's variables with this sandbox's own key, which wins over one that the client sent."""
        return {**self.environment, SESSION_KEY_VARIABLE: self.session_api_key}


@dataclass(frozen=True)
class Sandbox:
    """One sandbox at one moment.

    ``url`` is None until its port is reserved. ``reason`` says why it is in this state, ``last_lines`` holds the end
    of a dead container's log, ``restart_reasons`` what the clients show of a sandbox that was killed for its memory.
    """

    specification: Specification
    state: State = State.PENDING
    reason: str = "waits for a free slot"
    url: str | None = None
    last_lines: str = ""
    restart_reasons: tuple[str, ...] = ()

    def changed(self, state: State, reason: str, *, url: str | None = None, last_lines: str = "") -> Sandbox:
        """This sandbox in its next state; ``ImpossibleChange`` if its life has no such step."""
        if state not in NEXT_STATES[self.state]:
            raise ImpossibleChange(f"{self.specification.runtime_id}: {self.state.name} → {state.name}")
        return replace(self, state=state, reason=reason, url=url or self.url, last_lines=last_lines)

    def located(self, url: str) -> Sandbox:
        """The same state with the URL at which its server will answer."""
        return replace(self, url=url)

    def blamed(self, *reasons: str) -> Sandbox:
        """The same state with what the clients call restart reasons."""
        return replace(self, restart_reasons=(*self.restart_reasons, *reasons))

    def explained(self, reason: str) -> Sandbox:
        """The same state with another reason, such as the image that is being pulled."""
        return replace(self, reason=reason)

    @property
    def status(self) -> str:
        """The session's life in the clients' words; ``running`` promises a ``url``."""
        if self.state.is_dead:
            return "stopped"
        if self.state is State.PAUSED:
            return "paused"
        return "running" if self.url else "starting"

    @property
    def pod_status(self) -> str:
        """The container's health in the clients' words; the placeholder dialect calls ready ``running``."""
        if self.state is State.READY:
            return "running" if self.specification.dialect is Dialect.PLACEHOLDER else "ready"
        return {State.FAILED: "failed", State.STOPPED: "not found"}.get(self.state, "pending")


def split_command(command: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Program and arguments; a string is split as a shell would. ``ValueError`` says what is wrong with it."""
    if command is None:
        return None
    try:
        words = tuple(shlex.split(command) if isinstance(command, str) else command)
    except ValueError as problem:
        raise ValueError(f"command cannot be split into words: {problem}") from None
    if not words or not words[0]:
        raise ValueError("command is empty: name the program to run, or leave the field out to run the image's own")
    return words


def dialect_of(command: str | Sequence[str] | None) -> Dialect:
    if command is None or isinstance(command, str):
        return Dialect.SDK
    return Dialect.PLACEHOLDER if any(PORT_PLACEHOLDER in word for word in command) else Dialect.LEGACY


def container_port(words: Sequence[str] | None) -> int:
    """The port that a command names by ``--port N`` or ``--port=N``, else 60000."""
    match = re.search(r"(?:^|\n)--port[=\n](\d{1,5})(?:\n|$)", "\n".join(words or ()))
    port = int(match.group(1)) if match else DEFAULT_CONTAINER_PORT
    return port if 0 < port < 65536 else DEFAULT_CONTAINER_PORT


def fill_port(words: tuple[str, ...] | None, port: int) -> tuple[str, ...] | None:
    """The command with every placeholder replaced by the port."""
    return words and tuple(word.replace(PORT_PLACEHOLDER, str(port)) for word in words)


def without_secret(environment: Mapping[str, str], secret: str | None) -> dict[str, str]:
    """The variables whose value does not hold ``secret``: clients forward their own environment."""
    return {name: value for name, value in environment.items() if not secret or secret not in value}


def sandbox_url(host: str, port: int) -> str:
    """``http://host:port`` without a path: the SDK's client refuses a URL that has one."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
