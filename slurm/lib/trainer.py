"""Which trainer runs, where, and in which environment: TRAINING_COMMAND if it is set, else VERL; pure."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.coordination import CoordinationDir
from slurm.lib.settings import Settings
from slurm.lib.task_yaml import AUTO, EXAMPLE
from slurm.lib.verl_command import command
from slurm.lib.verl_versions import VerlVersion, find_verl

# What SkyRL-agent reads to find its sandboxes.
KEY_NAME = "ALLHANDS_API_KEY"
URL_NAME = "SANDBOX_REMOTE_RUNTIME_API_URL"
TRAINER_MARKER = "SKYRL_TRAINER"  # in the environment of everything that the trainer starts


@dataclass(frozen=True)
class Trainer:
    """The trainer's command and the folder that it starts in."""

    argv: tuple[str, ...]
    cwd: Path
    checkpoint_dir: Path
    rollout_dir: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        """What must exist before the first step: VERL writes its rollouts into a folder that it does not make."""
        return (self.checkpoint_dir, self.rollout_dir / "train", self.rollout_dir / "val")


def agent_folder(settings: Settings) -> Path:
    """skyrl-agent below SKYRL_PROJECT_ROOT."""
    return settings.skyrl_project_root / "SkyRL" / "skyrl-agent"


def agent_code(settings: Settings, directory: CoordinationDir) -> Path:
    """The skyrl-agent whose code a run uses: with SNAPSHOT=1 the run's own copy."""
    return directory.agent if settings.snapshot else agent_folder(settings)


def snapshot_variables(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """With SNAPSHOT=1: uv takes the environment of the original as it is.

    For each copy uv would make one of its own, of gigabytes; and a sync from the copy would have the original's
    environment import from the copy ever after.
    """
    if not settings.snapshot:
        return {}
    original = agent_folder(settings) / (environment.get("UV_PROJECT_ENVIRONMENT") or ".venv")
    return {"UV_PROJECT_ENVIRONMENT": str(original), "UV_NO_SYNC": "1"}


def import_folders(settings: Settings, directory: CoordinationDir) -> list[Path]:
    """Where Python is to look before skyrl-agent's environment, in which the original is installed as editable."""
    return [directory.agent, directory.agent / "src"] if settings.snapshot else []


def dot_env_file(settings: Settings, trainer: Trainer) -> Path:
    """The ``.env`` that the trainer gets its values from: skyrl-agent's own, which is never copied."""
    return (trainer.cwd if settings.training_command else agent_folder(settings)) / ".env"


def verl_of(settings: Settings, environment: Mapping[str, str]) -> VerlVersion | None:
    """The VERL of skyrl-agent, as its files name it; None where they do not, or where another trainer runs."""
    told = {**environment, **snapshot_variables(settings, environment)}
    return None if settings.training_command else find_verl(agent_folder(settings), told)


def task_file(settings: Settings, directory: CoordinationDir) -> Path:
    """SkyRL-agent's task file as an absolute path; that of TASK_YAML=auto is made in the run's ``directory``."""
    if settings.task_yaml == AUTO:
        return directory.task_yaml
    return Path(os.path.normpath(agent_code(settings, directory) / settings.task_yaml))


def task_example(settings: Settings) -> Path | None:
    """What the task file of a run with TASK_YAML=auto is made from; None where none is made."""
    automatic = settings.task_yaml == AUTO and not settings.training_command
    return agent_folder(settings) / EXAMPLE if automatic else None


def trainer_of(settings: Settings, directory: CoordinationDir, version: VerlVersion | None = None) -> Trainer:
    """The trainer of a run whose directory is ``directory``, for the VERL that skyrl-agent has, where it is known."""
    checkpoints = settings.checkpoint_dir or directory.checkpoints
    rollouts = settings.rollout_dir or directory.rollouts
    if settings.training_command:
        argv: tuple[str, ...] = ("bash", "-c", settings.training_command)
        return Trainer(argv, directory.path, checkpoints, rollouts)
    task_yaml = task_file(settings, directory)
    argv = command(settings, directory.training_env, checkpoints, rollouts, task_yaml=task_yaml, version=version)
    return Trainer(argv, agent_code(settings, directory), checkpoints, rollouts)


@dataclass(frozen=True)
class Missing:
    """Something that a run needs and that is not there, and what to do about it."""

    sentence: str
    fix: str

    def __str__(self) -> str:
        return f"{self.sentence}; {self.fix}"


def missing_parts(settings: Settings, copy: Path | None = None) -> list[Missing]:
    """What the VERL trainer needs below SKYRL_PROJECT_ROOT, or in the run's ``copy``, and does not find."""
    if settings.training_command:
        return []
    folder = copy or agent_folder(settings)
    if not os.path.isdir(folder):  # noqa: PTH112  Path's raises below a folder of somebody else's
        fix = "set SKYRL_PROJECT_ROOT to the folder that holds SkyRL/skyrl-agent"
        return [Missing(f"{folder} (skyrl-agent) is missing", fix)]
    example = folder / EXAMPLE if task_example(settings) else None
    needed = {
        folder / "pyproject.toml": "set SKYRL_PROJECT_ROOT to the folder whose SkyRL/skyrl-agent is whole",
        folder / "uv.lock": f"make it: cd {folder} && uv lock",
        **({example: "restore it from SkyRL's repository, or name a task file of yours: TASK_YAML"} if example else {}),
    }
    absent = [path for path in needed if not os.path.isfile(path)]  # noqa: PTH113  as above
    return [Missing(f"{path} is missing", needed[path]) for path in absent]


def trainer_environment(base: Mapping[str, str], dot_env: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment: the job's, over it skyrl-agent's ``.env``, over both what this run decided.

    A URL or key of an earlier run in ``.env`` never beats the run's own.
    """
    return {**base, **dot_env, **own}


def env_file_values(
    environment: Mapping[str, str], dot_env: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    """What ``training.env`` says: the names of skyrl-agent's ``.env``, with the values that the trainer has.

    uv gives them to each worker that Ray starts, where they count unless Ray's own environment has the name: what a
    step of ours took out must not come back this way, and no value may differ from the trainer's.
    """
    return {**{name: environment[name] for name in dot_env if name in environment}, **own}


def env_file_text(values: Mapping[str, str]) -> str:
    """Values as a ``.env`` file that ``uv run --env-file`` reads back unchanged.

    python-dotenv (without interpolation) does too, but for a carriage return, and ``$`` in a value that also holds
    ``'`` or ``\\\\`` or ends in a backslash: the two readers have no common spelling for it. Names that neither
    takes are left out; one of them would end uv's reading.
    """
    return "".join(f"{name}={_quoted(value)}\n" for name, value in sorted(values.items()) if _NAME.fullmatch(name))


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def _quoted(value: str) -> str:
    """Single quotes where both readers take the value as it stands, else double quotes and escapes."""
    if "'" not in value and "\\\\" not in value and not value.endswith("\\"):
        return f"'{value}'"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f'"{escaped}"'
