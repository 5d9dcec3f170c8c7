"""Does skyrl-agent's ``.env`` say what the run uses, and is there a login for wandb?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.preflight.finding import Finding, error, warning
from slurm.lib.settings import Settings
from slurm.lib.trainer import KEY_NAME, URL_NAME

PLACEHOLDER = "<REPLACE>"
DECIDED = frozenset({KEY_NAME, URL_NAME})  # the run's own values stand in for these, whatever the file says
UNASKED = frozenset({"offline", "disabled", "dryrun"})  # WANDB_MODE in which no login is needed


@dataclass(frozen=True)
class DotEnv:
    """The file's values, or ``problem`` that says why there are none; ``netrc`` is the text of ~/.netrc."""

    path: Path
    values: Mapping[str, str]
    netrc: str = ""
    problem: str = ""


def read_dot_env(path: Path, home: Path) -> DotEnv:
    """The file as the trainer's readers understand it, placeholders included; empty where there is none."""
    netrc = home / ".netrc"
    text = netrc.read_text(errors="replace") if netrc.is_file() else ""
    if not path.is_file():
        return DotEnv(path, {}, text)
    from dotenv import dotenv_values  # 30 ms

    try:
        values = dotenv_values(path, interpolate=False)
    except (OSError, UnicodeDecodeError) as problem:
        return DotEnv(path, {}, text, str(problem))
    return DotEnv(path, {name: value for name, value in values.items() if value is not None}, text)


def dot_env_findings(settings: Settings, environment: Mapping[str, str], dot_env: DotEnv) -> list[Finding]:
    """Placeholders that are left, and wandb without a login. The shell's values win over the file's."""
    if dot_env.problem:
        return [
            error("dotenv", f"cannot read {dot_env.path}: {dot_env.problem}", "write it as text with NAME=VALUE lines")
        ]
    left = {name for name, value in dot_env.values.items() if PLACEHOLDER in value} - DECIDED
    said = {**{name: value for name, value in dot_env.values.items() if name not in left}, **environment}
    found = _wandb_findings(settings, said, dot_env, left) if "wandb" in settings.loggers else []
    unused = sorted(left - {"WANDB_API_KEY"} - environment.keys())
    if unused:
        sentence = (
            f"{dot_env.path} still says {PLACEHOLDER} for {', '.join(unused)}: left out of the trainer's environment"
        )
        found.append(warning("dotenv", sentence, "write a value, or remove the line"))
    return found


def _wandb_findings(settings: Settings, said: Mapping[str, str], dot_env: DotEnv, left: set[str]) -> list[Finding]:
    host = (said.get("WANDB_BASE_URL") or "https://api.wandb.ai").partition("://")[2].split("/")[0]
    if said.get("WANDB_API_KEY") or said.get("WANDB_MODE") in UNASKED or host in dot_env.netrc.split():
        return []
    where = f"{dot_env.path} says {PLACEHOLDER} for WANDB_API_KEY" if "WANDB_API_KEY" in left else "no WANDB_API_KEY"
    sentence = f"LOGGERS={','.join(settings.loggers)} needs a login for wandb: {where}, and none in ~/.netrc"
    fix = f"write WANDB_API_KEY into {dot_env.path}, or set WANDB_MODE=offline, or LOGGERS=console"
    return [error("dotenv", sentence, fix)]
