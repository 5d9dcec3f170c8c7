"""What does the policy say next, and how does a reward change that: a tabular softmax over command words.

One row of logits for each task and prefix of words, all zero at first (every word equally likely). Pure Python.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from shell_rl.commands import Action

Count = Callable[[Action], int]
DEVIATION = 0.25


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities of logits; safe for large values."""
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards relative to their group: minus its mean, divided by its standard deviation (at least ``DEVIATION``).

    Without that lower bound a group of partial rewards would pull as hard as one with a solution, and the policy would
    settle on half an answer.
    """
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / max(deviation, DEVIATION) for reward in rewards]


def _key(task: str, prefix: Action) -> str:
    return "/".join([task, *map(str, prefix)])


class Policy:
    """The table of logits. ``count(prefix)`` says how many words may follow, 0 at the end of a command."""

    def __init__(self, count: Count, logits: Mapping[str, Sequence[float]] | None = None) -> None:
        self._count = count
        self._logits = {key: list(row) for key, row in (logits or {}).items()}

    def logits(self) -> dict[str, list[float]]:
        """The parameters, for a checkpoint; rows never touched are absent."""
        return {key: list(row) for key, row in self._logits.items()}

    def probabilities(self, task: str, prefix: Action) -> list[float]:
        """How likely each next word is; empty at the end of a command."""
        size = self._count(prefix)
        return softmax(self._logits.get(_key(task, prefix)) or [0.0] * size) if size else []

    def sample(self, task: str, rng: random.Random) -> Action:
        """One complete action, drawn word by word."""
        action: Action = ()
        while chances := self.probabilities(task, action):
            action += (rng.choices(range(len(chances)), chances)[0],)
        return action

    def reinforce(self, task: str, actions: Sequence[Action], rewards: Sequence[float], rate: float) -> None:
        """One REINFORCE step of a group of actions, with the group-relative baseline.

        :param rate: learning rate, applied to the gradient's mean over the group
        """
        gradient = self._gradient(task, actions, advantages(rewards))
        for prefix, row in gradient.items():
            logits = self._logits.setdefault(_key(task, prefix), [0.0] * len(row))
            for word, slope in enumerate(row):
                logits[word] += rate * slope / len(actions)

    def _gradient(self, task: str, actions: Sequence[Action], weights: Sequence[float]) -> dict[Action, list[float]]:
        """The gradient of ``sum(weight * log p(action))``, a row for each prefix visited."""
        gradient: dict[Action, list[float]] = {}
        for action, weight in zip(actions, weights, strict=True):
            for slot, chosen in enumerate(action):
                chances = self.probabilities(task, action[:slot])
                row = gradient.setdefault(action[:slot], [0.0] * len(chances))
                for word, chance in enumerate(chances):
                    row[word] += weight * ((word == chosen) - chance)
        return gradient
