"""Does SkyRL-agent's task file fit the configuration? Nobody compares the two before a training has begun."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from slurm.lib import task_yaml
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.settings import KEYS, Settings
from slurm.lib.task_yaml import TaskYaml, read_task_yaml

CHECK = "task"
AUTO_FIX = "or set TASK_YAML=auto, which makes a file that fits"


def task_file_findings(settings: Settings, path: Path, sources: Mapping[str, str]) -> list[Finding]:
    """The findings on the task file at ``path``, one of them that it cannot be read.

    With TASK_YAML=auto ``path`` is the example that a file is made from, whose numbers do not matter: one is made here
    too, in memory, since the launch makes it when the jobs are queued already. ``sources`` says where each key's value
    comes from, as ``LoadedConfig.sources`` does.
    """
    automatic = settings.task_yaml == task_yaml.AUTO
    try:
        if automatic:
            task_yaml.matching_text(path, settings)
            return []
        return task_findings(settings, read_task_yaml(path), sources)
    except EnvironmentProblem as problem:
        fix = f"correct it or name another one (TASK_YAML, {_from('TASK_YAML', sources)})"
        return [Finding(CHECK, Level.ERROR, str(problem), fix if automatic else f"{fix}, {AUTO_FIX}")]


def task_findings(settings: Settings, task: TaskYaml, sources: Mapping[str, str]) -> list[Finding]:
    """How a task file differs from the settings; pure. Each sentence names both places."""
    return [*_rollouts(settings, task, sources), *_budget(settings, task, sources), *_agents(settings, task, sources)]


def _from(key: str, sources: Mapping[str, str]) -> str:
    return sources.get(key, "default")


def _key(settings: Settings, key: str, sources: Mapping[str, str]) -> str:
    return f"{key}={getattr(settings, KEYS[key].attribute)} ({_from(key, sources)})"


def _rollouts(settings: Settings, task: TaskYaml, sources: Mapping[str, str]) -> Iterator[Finding]:
    """VERL's driver compares the two when all nodes are up, and ends with an AssertionError."""
    found = task.num_trajectories
    if found is None or found == settings.rollout_n:
        return
    sentence = (
        f"{_key(settings, 'ROLLOUT_N', sources)} is not {task_yaml.NUM_TRAJECTORIES}: {found} ({task.path}); "
        "SkyRL-agent would end with an AssertionError on the GPU node"
    )
    yield Finding(CHECK, Level.ERROR, sentence, f"make both the same, {AUTO_FIX}")


def _budget(settings: Settings, task: TaskYaml, sources: Mapping[str, str]) -> Iterator[Finding]:
    """VERL pads a batch to the longer of the two; neither it nor SkyRL-agent compares them."""
    budget, response = task.max_prompt_length, settings.max_response_length
    if budget is not None and budget != response:
        sentence = (
            f"{_key(settings, 'MAX_RESPONSE_LENGTH', sources)} is not {task_yaml.MAX_PROMPT_LENGTH}: {budget} "
            f"({task.path}), SkyRL-agent's budget of a whole response in tokens; "
        )
        longer = "batches are padded to the longer one, which may not fit into the GPU's memory"
        shorter = f"no response is longer than {budget}"
        fix = f"make both the same, {AUTO_FIX}"
        yield Finding(CHECK, Level.WARNING, sentence + (longer if budget > response else shorter), fix)
    if task.max_tokens is not None and budget is not None and task.max_tokens > budget:
        sentence = (
            f"{task_yaml.MAX_TOKENS}: {task.max_tokens} is more than {task_yaml.MAX_PROMPT_LENGTH}: {budget} "
            f"({task.path}): one turn may ask for more than the whole response has"
        )
        yield Finding(CHECK, Level.WARNING, sentence, f"lower {task_yaml.MAX_TOKENS}, {AUTO_FIX}")


def _agents(settings: Settings, task: TaskYaml, sources: Mapping[str, str]) -> Iterator[Finding]:
    agents, rollouts = task.max_parallel_agents, settings.train_batch_size * settings.rollout_n
    if agents is None:
        return
    place = f"{task_yaml.MAX_PARALLEL_AGENTS}: {agents} ({task.path})"
    step = (
        f"a step has {rollouts} rollouts, {_key(settings, 'TRAIN_BATCH_SIZE', sources)} × "
        f"{_key(settings, 'ROLLOUT_N', sources)}"
    )
    slots = settings.max_parallel_agents
    if slots is not None and slots < min(agents, rollouts):
        sentence = f"{_key(settings, 'MAX_PARALLEL_AGENTS', sources)} sandboxes are fewer than {place} agents; {step}"
        fix = f"raise MAX_PARALLEL_AGENTS to {rollouts}"
        yield Finding(CHECK, Level.WARNING, sentence, fix)
    if agents < rollouts:
        yield Finding(CHECK, Level.ESTIMATE, f"{place} agents run at once, but {step}: they run in turns")
