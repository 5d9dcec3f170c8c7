"""Does skyrl-agent's ``.env`` say what the run uses, and is there a login for wandb?"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from slurm.lib.dot_env import PLACEHOLDER, dot_env_values, without_placeholders
from slurm.lib.preflight.finding import Finding, error, warning
from slurm.lib.settings import Settings
from slurm.lib.trainer import KEY_NAME, URL_NAME

DECIDED = frozenset({KEY_NAME, URL_NAME})  # the run's own values stand in for these, whatever the file says
CLOUD = "https://api.wandb.ai"  # what wandb talks to unless it is told otherwise
UNASKED = frozenset({"offline", "disabled", "dryrun"})  # WANDB_MODE in which no login is needed


@dataclass(frozen=True)
class DotEnv:
    """The file's values, or ``problem`` that says why there are none.

    ``netrc_path`` is where wandb keeps its login, ``netrc`` the text of that file; ``base_url`` what wandb's own
    settings name.
    """

    path: Path
    values: Mapping[str, str]
    netrc_path: Path = Path("~/.netrc")
    netrc: str = ""
    base_url: str = ""
    problem: str = ""

    @property
    def given(self) -> dict[str, str]:
        """The values that are no placeholders."""
        return without_placeholders(self.values)


def read_dot_env(path: Path, environment: Mapping[str, str]) -> DotEnv:
    """The file as the trainer's readers understand it, placeholders included; empty where there is none."""
    home = Path(environment.get("HOME") or "/nonexistent")
    netrc = _in_home(environment.get("NETRC") or "~/.netrc", home)
    text = netrc.read_text(errors="replace") if netrc.is_file() else ""
    folder = _in_home(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb", home)
    found = DotEnv(path, {}, netrc, text, _base_url(folder / "settings"))
    try:
        return replace(found, values=dot_env_values(path))
    except (OSError, UnicodeDecodeError) as problem:
        return replace(found, problem=str(problem))


def _in_home(name: str, home: Path) -> Path:
    return home / name[2:] if name.startswith("~/") else Path(name)


def _base_url(path: Path) -> str:
    """``base_url`` in wandb's settings; empty where that file is absent or says none."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return ""
    return parser.get("default", "base_url", fallback="")


def dot_env_findings(settings: Settings, environment: Mapping[str, str], dot_env: DotEnv) -> list[Finding]:
    """Placeholders that are left, and wandb without a login. The file's values win, as they do for the trainer."""
    if dot_env.problem:
        return [
            error("dotenv", f"cannot read {dot_env.path}: {dot_env.problem}", "write it as text with NAME=VALUE lines")
        ]
    left = {name for name, value in dot_env.values.items() if PLACEHOLDER in value} - DECIDED
    said = {**environment, **{name: value for name, value in dot_env.values.items() if name not in left}}
    found = _wandb_findings(settings, said, dot_env, left) if "wandb" in settings.loggers else []
    unused = sorted(left - {"WANDB_API_KEY"} - environment.keys())
    if unused:
        sentence = (
            f"{dot_env.path} still says {PLACEHOLDER} for {', '.join(unused)}: left out of the trainer's environment"
        )
        found.append(warning("dotenv", sentence, "write a value, or remove the line"))
    return found


def _wandb_findings(settings: Settings, said: Mapping[str, str], dot_env: DotEnv, left: set[str]) -> list[Finding]:
    host = _host(said.get("WANDB_BASE_URL") or dot_env.base_url or CLOUD)
    hosts = {host, re.sub(r":\d*$", "", host)}  # a .netrc may name it without its port
    if said.get("WANDB_API_KEY") or said.get("WANDB_MODE") in UNASKED or hosts & set(dot_env.netrc.split()):
        return []
    where = f"{dot_env.path} says {PLACEHOLDER} for WANDB_API_KEY" if "WANDB_API_KEY" in left else "no WANDB_API_KEY"
    sentence = (
        f"LOGGERS={','.join(settings.loggers)} needs a login for wandb: {where}, and none for {host} in "
        f"{dot_env.netrc_path}"
    )
    fix = "export WANDB_API_KEY=… , or `wandb login`, or export WANDB_MODE=offline before the launch"
    level = error if host == _host(CLOUD) else warning  # a server of one's own may ask for no login
    return [level("dotenv", sentence, fix)]


def _host(address: str) -> str:
    """The host of a URL with its port, and without a user's name."""
    return urlsplit(address if "://" in address else f"//{address}").netloc.rpartition("@")[2].lower()
