"""What SkyRL-agent's task file says, and how one is made that fits the other keys of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.lib.coordination import write_atomically
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.settings import Settings

AUTO = "auto"
EXAMPLE = Path("examples/run_verl/verl_oh.yaml")  # in skyrl-agent; what TASK_YAML=auto starts from

NUM_TRAJECTORIES = "generator.num_trajectories"
MAX_PROMPT_LENGTH = "generator.max_prompt_length"
MAX_TOKENS = "generator.sampling_params.max_tokens"
MAX_ITERATIONS = "generator.max_iterations"
MAX_PARALLEL_AGENTS = "dispatcher.max_parallel_agents"
VAL_NUM_TRAJECTORIES = "generator.val_config.num_trajectories"


@dataclass(frozen=True)
class TaskYaml:
    """The numbers of a task file that have to fit the configuration; None where the file does not say them.

    ``max_prompt_length`` is SkyRL-agent's name for the budget of a whole response, all turns together, in tokens;
    ``max_tokens`` what one turn may take of it; ``max_iterations`` the turns of a trajectory.
    """

    path: Path
    num_trajectories: int | None = None
    max_prompt_length: int | None = None
    max_tokens: int | None = None
    max_iterations: int | None = None
    max_parallel_agents: int | None = None
    val_num_trajectories: int | None = None


def read_task_yaml(path: Path) -> TaskYaml:
    """The task file at ``path``; ``EnvironmentProblem`` says why it cannot be read, or which value is wrong."""
    return parse_task(load_task(path), path)


def load_task(path: Path) -> dict[str, Any]:
    """The whole file as YAML gives it; ``EnvironmentProblem`` for what is no mapping."""
    import yaml  # 20 ms, so only where there is a task file

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise EnvironmentProblem(f"cannot read the task file {path} (TASK_YAML): {problem.strerror}") from None
    except UnicodeDecodeError:
        raise EnvironmentProblem(f"the task file {path} (TASK_YAML) is not text in UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: a date like 2026-13-45
        words = " ".join(str(problem).split())
        raise EnvironmentProblem(f"the task file {path} (TASK_YAML) is not valid YAML: {words}") from None
    if not isinstance(data, dict):
        raise EnvironmentProblem(f"the task file {path} (TASK_YAML) must hold keys and values, like generator: …")
    return data


def parse_task(data: Mapping[str, Any], path: Path) -> TaskYaml:
    """The numbers in a task file's contents; ``EnvironmentProblem`` names a value of a wrong kind."""
    return TaskYaml(
        path,
        num_trajectories=_number(data, NUM_TRAJECTORIES, path),
        max_prompt_length=_number(data, MAX_PROMPT_LENGTH, path),
        max_tokens=_number(data, MAX_TOKENS, path),
        max_iterations=_number(data, MAX_ITERATIONS, path),
        max_parallel_agents=_number(data, MAX_PARALLEL_AGENTS, path),
        val_num_trajectories=_number(data, VAL_NUM_TRAJECTORIES, path),
    )


def _number(data: Mapping[str, Any], name: str, path: Path) -> int | None:
    value: Any = data
    seen: list[str] = []
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise EnvironmentProblem(f"{path} (TASK_YAML): {'.'.join(seen)} must hold keys and values, not {value!r}")
        value = value.get(part)
        seen.append(part)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise EnvironmentProblem(f"{path} (TASK_YAML): {name} must be a whole number, at least 1, not {value!r}")


def matching(example: Mapping[str, Any], settings: Settings, path: Path) -> dict[str, Any]:
    """The contents of ``example`` (read from ``path``) with the numbers that these settings ask for.

    Those of validation and the turns of a trajectory, which no key decides, stay. A turn may take no more than the
    budget, and all rollouts of a step run at once; how many have a sandbox is the runtime's affair.
    """
    old = parse_task(example, path)
    budget = settings.max_response_length
    numbers = {
        NUM_TRAJECTORIES: settings.rollout_n,
        MAX_PROMPT_LENGTH: budget,
        MAX_TOKENS: min(old.max_tokens or budget, budget),
        MAX_PARALLEL_AGENTS: settings.train_batch_size * settings.rollout_n,
    }
    made = dict(example)
    for name, number in numbers.items():
        made = _with(made, name.split("."), number)
    return made


def _with(data: Mapping[str, Any] | None, names: list[str], value: int) -> dict[str, Any]:
    """A copy in which one value is set, sections made where they are absent."""
    first, *rest = names
    changed = _with((data or {}).get(first), rest, value) if rest else value
    return {**(data or {}), first: changed}


def write_matching(example: Path, target: Path, settings: Settings) -> None:
    """Make the task file of TASK_YAML=auto; ``EnvironmentProblem`` where the example cannot be read."""
    write_atomically(target, matching_text(example, settings))


def matching_text(example: Path, settings: Settings) -> str:
    """What ``write_matching`` writes."""
    import yaml

    text = yaml.safe_dump(matching(load_task(example), settings, example), sort_keys=False, allow_unicode=True)
    head = f"# Made from {example}, with the numbers of this run's settings (TASK_YAML=auto).\n"
    return head.replace("\r", " ") + text
