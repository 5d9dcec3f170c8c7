"""What does a /start request ask for, once settled: image, command, key, mounts. Pure, but for resolving symlinks."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Sequence
from pathlib import Path

from slurm_runtime.config import ServerConfig
from slurm_runtime.images import pull_policy
from slurm_runtime.models import MountWish, StartRequest
from slurm_runtime.sandbox import (
    Mount,
    Specification,
    container_port,
    dialect_of,
    fill_port,
    split_command,
    without_secret,
)

AGENT_PROGRAM = "/usr/local/bin/openhands-agent-server"  # as the clients' commands name it
# Where a sandbox's own parts lie: a mount there would break it or pose as the agent server.
RESERVED_TARGETS = ("/proc", "/sys", "/dev", "/run", "/opt/skyrl-agent", "/opt/skyrl-warden", AGENT_PROGRAM)


class BadRequest(Exception):
    """A field of a request cannot be served."""


class Forbidden(Exception):
    """A request asks for something of the host that the operator has not allowed."""


def settled(wish: StartRequest, config: ServerConfig) -> Specification:
    """What a request asks for; ``BadRequest`` or ``Forbidden`` says which field is wrong."""
    try:
        return specify(wish, config)
    except ValueError as problem:
        raise BadRequest(str(problem)) from None


def specify(wish: StartRequest, config: ServerConfig) -> Specification:
    """What a request asks for; ``ValueError`` says which field is wrong."""
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
        mounts=tuple(mount_of(mount, config.allowed_mounts) for mount in wish.runtime_mounts or ()),
    )


def working_dir(text: str | None) -> str:
    """An absolute path; absent means ``/``."""
    if text and not text.startswith("/"):
        raise ValueError(f"working_dir {text[:200]!r} is not an absolute path")
    return text or "/"


def mount_of(wish: MountWish, allowed: Sequence[Path]) -> Mount:
    """The mount that a request asks for, its source without symlinks; ``Forbidden`` outside of ``allowed``."""
    read_only = {"": True, "ro": True, "rw": False}.get((wish.mode or "").lower())
    if read_only is None:
        raise ValueError(f"runtime_mounts: mode {str(wish.mode)[:20]!r} is neither ro nor rw")
    target = posixpath.normpath(wish.container_path)
    if not target.startswith("/") or target.strip("/") == "":
        raise ValueError(
            f"runtime_mounts: container_path {wish.container_path[:200]!r} is not an absolute path below /"
        )
    target = "/" + target.lstrip("/")
    if any(is_inside(target, reserved) or is_inside(reserved, target) for reserved in RESERVED_TARGETS):
        raise ValueError(
            f"runtime_mounts: container_path {target[:200]} holds parts of the sandbox; choose another one"
        )
    return Mount(str(allowed_source(wish.host_path, allowed)), target, read_only)


def allowed_source(text: str, allowed: Sequence[Path]) -> Path:
    """The file or folder behind ``text``, which must lie below an allowed folder, symlinks resolved.

    One answer for all that is outside, so that nobody learns which files of the host exist.
    """
    refusal = Forbidden(
        f"runtime_mounts: host_path {text[:200]!r} is not below a folder that requests may mount; "
        "the server's operator allows folders by --allow-mount FOLDER"
    )
    if not text.startswith("/"):
        raise ValueError(f"runtime_mounts: host_path {text[:200]!r} is not an absolute path")
    try:
        found = Path(text).resolve()
        roots = [folder.resolve() for folder in allowed]
    except (OSError, RuntimeError):  # too long, or a loop of symlinks
        raise refusal from None
    if not any(is_inside(str(found), str(root)) for root in roots):
        raise refusal
    if not found.exists():
        raise ValueError(f"runtime_mounts: host_path {text[:200]!r} does not exist on the sandboxes' node")
    return found


def is_inside(path: str, folder: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
