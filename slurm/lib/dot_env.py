"""What skyrl-agent's ``.env`` says: read once, for the checks before a launch and for the trainer alike.

And which files are like it: they may hold keys, so that no copy of a run has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem

PLACEHOLDER = "<REPLACE>"  # the template's word for a value that the user has to fill in


_TEMPLATES = (".example", ".sample", ".template", ".dist")  # .env.example: made to be shown, with no value in it


def is_dot_env(name: str) -> bool:
    """Whether a path names a ``.env`` file: ``sub/.env``, ``.env.local``, ``.envrc``; not ``.env.example``."""
    return any(part.startswith(".env") for part in name.split("/")) and not name.endswith(_TEMPLATES)


def dot_env_values(path: Path) -> dict[str, str]:
    """All values of the file, placeholders included; empty where there is none.

    Raises ``OSError`` or ``UnicodeDecodeError`` for one that cannot be read.
    """
    if not path.is_file():
        return {}
    from dotenv import dotenv_values  # 30 ms

    return {name: value for name, value in dotenv_values(path, interpolate=False).items() if value is not None}


def without_placeholders(values: Mapping[str, str]) -> dict[str, str]:
    """The values that the user has filled in."""
    return {name: value for name, value in values.items() if PLACEHOLDER not in value}


def read_dot_env(path: Path) -> dict[str, str]:
    """The filled-in values; ``EnvironmentProblem`` says why a file cannot be read."""
    try:
        return without_placeholders(dot_env_values(path))
    except (OSError, UnicodeDecodeError) as problem:
        raise EnvironmentProblem(f"cannot read the environment file {path}: {problem}") from None
