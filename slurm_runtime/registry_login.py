"""Which credentials does Podman show a registry? Those of an auth file as ``podman login`` writes it.

They travel in a header over Podman's socket with each pull, whoever started the service; they are in no command line
and in no log.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEADER = "X-Registry-Config"


def auth_file(named: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The file to use: the one that was named, else REGISTRY_AUTH_FILE's; None leaves it to Podman's own defaults."""
    return named or (Path(environment["REGISTRY_AUTH_FILE"]) if environment.get("REGISTRY_AUTH_FILE") else None)


def headers(path: Path | None) -> dict[str, str]:
    """What to send with a pull; read anew each time, since tokens are renewed. ``ValueError`` as ``read`` has it."""
    logins = read(path) if path else {}
    if not logins:
        return {}
    return {HEADER: base64.urlsafe_b64encode(json.dumps(logins).encode()).decode("ascii")}


def read(path: Path) -> dict[str, dict[str, str]]:
    """Registry → its login. ``ValueError`` with a sentence that shows nothing of the contents."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["auths"]
        return {str(registry): login for registry, entry in entries.items() if (login := _login(entry))}
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem.strerror}; {HOW}") from None
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise ValueError(f"{path} is no auth file of Podman; {HOW}") from None


HOW = "make it with 'podman login --authfile FILE REGISTRY'"


def _login(entry: Mapping[str, Any]) -> dict[str, str]:
    """One login in the words of the header; empty for an entry whose secret lies in a credential helper."""
    if not entry.get("auth"):
        return {}
    user, colon, password = base64.b64decode(entry["auth"], validate=True).decode("utf-8").partition(":")
    if not colon:
        raise ValueError("no user")
    login = {"username": user, "password": password}
    return login | ({"identitytoken": str(entry["identitytoken"])} if entry.get("identitytoken") else {})


def doubts(path: Path) -> Iterator[str]:
    """What is hardly meant about a file that can be read: sentences for the log."""
    logins = read(path)
    if path.stat().st_mode & 0o077:
        yield f"others can read the registry passwords in {path}; make it yours alone: chmod 600 '{path}'"
    if not logins:
        yield f"{path} holds no login of its own (credential helpers are not asked); registries are asked without one"
