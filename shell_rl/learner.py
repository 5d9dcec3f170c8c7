"""One step of learning, one evaluation: sample commands, have them run, turn what they did into rewards.

Every random draw comes from the seed and the place where it is used (``seed/step/task``), so a step does not depend
on the order in which sandboxes answer, nor on whether the run was interrupted before it: the step number and the
seed are the whole state of the random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from shell_rl.commands import Action, render
from shell_rl.policy import Policy
from shell_rl.sandbox_program import Execution
from shell_rl.tasks import TASKS, Task, World, make_world, observe, reward, script

RunAll = Callable[[Sequence[str]], list[Execution]]


@dataclass(frozen=True)
class Rollout:
    """One command, and what it was worth."""

    task: str
    action: Action
    exit_code: int
    reward: float

    @property
    def command(self) -> str:
        """The command as the shell saw it."""
        return render(self.action)


@dataclass(frozen=True)
class Score:
    """Rewards of many rollouts: their mean, the mean of each task, the fraction that got 1."""

    reward: float
    per_task: dict[str, float]
    solved: float
    commands: int


@dataclass(frozen=True)
class _Attempt:
    task: Task
    world: World
    action: Action
    mark: str

    def script(self) -> str:
        return script(self.world, render(self.action), self.mark)

    def judge(self, execution: Execution) -> Rollout:
        value = reward(self.task, self.world, observe(execution, self.mark))
        return Rollout(self.task.name, self.action, execution.exit_code, value)


def score(rollouts: Sequence[Rollout]) -> Score:
    """Summarise rollouts (at least one)."""
    groups = {task.name: [r.reward for r in rollouts if r.task == task.name] for task in TASKS}
    return Score(
        reward=fmean(rollout.reward for rollout in rollouts),
        per_task={name: fmean(group) for name, group in groups.items() if group},
        solved=fmean(rollout.reward == 1.0 for rollout in rollouts),
        commands=len(rollouts),
    )


def _group(policy: Policy, task: Task, rng: random.Random, size: int, same_world: bool) -> list[_Attempt]:
    shared = make_world(rng)
    worlds = [shared if same_world else make_world(rng) for _ in range(size)]
    return [
        _Attempt(task, world, policy.sample(task.name, rng), f"mark-{rng.getrandbits(64):016x}") for world in worlds
    ]


def _rollouts(policy: Policy, run_all: RunAll, place: str, size: int, same_world: bool) -> list[Rollout]:
    attempts = [
        attempt
        for task in TASKS
        for attempt in _group(policy, task, random.Random(f"{place}/{task.name}"), size, same_world)
    ]
    executions = run_all([attempt.script() for attempt in attempts])
    return [attempt.judge(execution) for attempt, execution in zip(attempts, executions, strict=True)]


def evaluate(policy: Policy, run_all: RunAll, seed: int, per_task: int) -> list[Rollout]:
    """Sample ``per_task`` commands of each task, each over files of its own, without learning.

    The same seed gives the same files, before training and after.
    """
    return _rollouts(policy, run_all, f"{seed}/evaluation", per_task, same_world=False)


def train_step(
    policy: Policy, run_all: RunAll, seed: int, step: int, rollouts: int, learning_rate: float
) -> list[Rollout]:
    """One step: ``rollouts`` commands a task over the same new files, then one policy-gradient update a task."""
    done = _rollouts(policy, run_all, f"{seed}/{step}", rollouts, same_world=True)
    for task in TASKS:
        group = [rollout for rollout in done if rollout.task == task.name]
        policy.reinforce(task.name, [r.action for r in group], [r.reward for r in group], learning_rate)
    return done
