"""Are images, their archives, logins and the agent server for them what they are said to be?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from slurm.lib.preflight.finding import Finding, error, warning
from slurm.lib.settings import Settings


def image_findings(settings: Settings, absent: Mapping[str, Path]) -> list[Finding]:
    """Names of images that are none, and files that are ``absent`` (key → path)."""
    named = {"CONTAINER_IMAGE": settings.container_image, "AGENT_IMAGE": settings.agent_image}
    found = [_name_finding(key, name) for key, name in named.items() if name and not is_image_name(name)]
    for key, path in absent.items():
        found.append(
            error("images", f"{key}={path} is not there or cannot be read", f"correct {key}, or leave it unset")
        )
    return found


def is_image_name(name: str) -> bool:
    from slurm_runtime.references import full_name  # the server's own rule

    try:
        full_name(name)
    except ValueError:
        return False
    return True


def _name_finding(key: str, name: str) -> Finding:
    sentence = f"{key}={name} is not the name of an image"
    return error("images", sentence, "write it as registry/folder/name:tag, in lower case but for the tag")


def absent_files(settings: Settings) -> dict[str, Path]:
    """Key → path of what the settings name and this host does not find."""
    named = {
        "IMAGE_ARCHIVE": settings.image_archive,
        "IMAGE_ARCHIVES": settings.image_archives,
        "REGISTRY_AUTH_FILE": settings.registry_auth_file,
        "AGENT_DIR": settings.agent_dir,
    }
    return {key: path for key, path in named.items() if path is not None and not os.access(path, os.R_OK)}


def agent_findings(settings: Settings, environment: Mapping[str, str]) -> list[Finding]:
    """Whether sandboxes get an agent server; images that have one of their own need none."""
    from slurm_runtime.agent.tree import default_cache, newest  # the server's own rule

    cache = default_cache(environment)
    if settings.agent_dir or settings.agent_image or newest(cache):
        return []
    sentence = (
        f"there is no agent server in {cache}, nor by AGENT_DIR or AGENT_IMAGE: a sandbox of an image that has none of "
        "its own, as those of R2E and SWE-bench, does not start"
    )
    return [warning("images", sentence, "make one, once: .venv/bin/python -m slurm_runtime.agent build")]


def login_findings(path: Path | None, mode: int | None) -> list[Finding]:
    """Logins that others can read. ``mode`` None: there is no such file."""
    if path is None or mode is None or not mode & 0o077:
        return []
    sentence = f"REGISTRY_AUTH_FILE={path} can be read by others (mode {mode & 0o777:o})"
    return [warning("images", sentence, f"chmod 600 {path}")]


def mode_of(path: Path | None) -> int | None:
    return path.stat().st_mode if path is not None and path.is_file() else None
