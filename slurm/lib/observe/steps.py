"""Which steps has a trainer finished, how long did each take, and what did it earn? By the lines of its log; pure.

VERL tells each step with its parts (``timing_s/…``) and without a time of day; the RL loop of ``shell_rl`` tells some
steps with a time of day. A trainer of your own is understood if it prints ``step 12/300``, and ``reward 0.4`` after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

# The parts of a step of VERL's that follow each other; its other timers run inside of these (VERL 0.5.0 to 0.9).
PARTS = (
    "gen",
    "gen_max",
    "reward",
    "old_log_prob",
    "ref",
    "ref_log_prob",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "update_weights",
    "dump_rollout_generations",
    "testing",
    "save_checkpoint",
)
OTHER = "other"
_NUMBER = r"(?:np\.\w+\()?(-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"  # VERL prints NumPy's numbers as they are
_VERL = re.compile(r"\bstep:(\d{1,10}) - ", re.ASCII)
_OWN = re.compile(r"\b[Ss]tep (\d{1,10})(?:/| of )(\d{1,10})\b", re.ASCII)
_TIMING = re.compile(rf" timing_s/(\w{{1,60}}):{_NUMBER}", re.ASCII)
_SCORE = re.compile(rf" critic/(?:score|rewards)/mean:{_NUMBER}", re.ASCII)
_REWARD = re.compile(rf"\breward[ =:]+{_NUMBER}", re.ASCII | re.IGNORECASE)
_MEASURED = re.compile(r" - (?!val-)\w")  # a line that tells only of a validation is no step
OWN_SHOWN = 400  # characters after which a line with ``step 12/300`` is another's prose
MOST_TOLD = 1000  # steps that one line of a trainer can stand for


@dataclass(frozen=True)
class Step:
    """A step that was finished.

    ``parts`` are seconds by VERL's names; ``at`` is its end in epoch seconds of the trainer's node, where ``is_about``
    counted from the lengths of the steps. A trainer that tells every fifth step has lines that ``stand_for`` 5, with
    their mean length.
    """

    number: int
    of: int | None = None
    seconds: float | None = None
    reward: float | None = None
    parts: tuple[tuple[str, float], ...] = ()
    at: float | None = None
    is_about: bool = False
    stands_for: int = 1

    @property
    def begin(self) -> float | None:
        """When it, or the first of those that it stands for, began."""
        return None if self.at is None or self.seconds is None else self.at - self.seconds * self.stands_for


def step_in(line: str) -> Step | None:
    """The step that a line of a trainer's log tells."""
    found = _VERL.search(line)
    if found:
        is_step = int(found[1]) > 0 and _MEASURED.search(line, found.end() - 3)
        return _of_verl(int(found[1]), line[found.end() - 2 :]) if is_step else None
    own = _OWN.search(line[:OWN_SHOWN])
    if not own:
        return None
    reward = _REWARD.search(line[:OWN_SHOWN], own.end())
    return Step(int(own[1]), int(own[2]), reward=_finite(reward[1]) if reward else None)


def _of_verl(number: int, words: str) -> Step:
    timings = {name: seconds for name, text in _TIMING.findall(words) if (seconds := _length(text)) is not None}
    score = _SCORE.search(words)
    parts = tuple((name, timings[name]) for name in PARTS if name in timings)
    return Step(number, None, timings.get("step"), _finite(score[1]) if score else None, parts)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _length(text: str) -> float | None:
    value = float(text)
    return value if 0 <= value < 1e8 else None


def with_lengths(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, those that only have a time of day with the time since the one before."""
    made: list[Step] = []
    for step in steps:
        before = made[-1] if made else None
        if step.seconds is None and before and before.at is not None and step.at is not None:
            count = step.number - before.number
            if 0 < count <= MOST_TOLD and step.at >= before.at:
                step = replace(step, seconds=(step.at - before.at) / count, stands_for=count)
        made.append(step)
    return tuple(made)


def placed(steps: Sequence[Step], not_before: float | None, not_after: float | None) -> tuple[Step, ...]:
    """The steps with the times of day that follow from their lengths, if they have none.

    VERL's follow each other: the last one ended before ``not_after``, and the first did not begin before
    ``not_before``. Without a ``not_after``, or where a length is missing, they stay without.
    """
    lengths = [step.seconds for step in steps]
    if not_after is None or None in lengths or any(step.at is not None for step in steps):
        return tuple(steps)
    total = sum(length or 0.0 for length in lengths)
    moment = max(not_after - total, not_before if not_before is not None else -math.inf)
    made = []
    for step in steps:
        moment += step.seconds or 0.0
        made.append(replace(step, at=moment, is_about=True))
    return tuple(made)


def merged(attempts: Iterable[Sequence[Step]]) -> tuple[Step, ...]:
    """The steps of all attempts by number; of one that was done again the last counts."""
    last: dict[int, Step] = {}
    for steps in attempts:
        last |= {step.number: step for step in steps}
    return tuple(last[number] for number in sorted(last))


def done_again(attempts: Iterable[Sequence[Step]]) -> int:
    """How many steps were done by an attempt, and again by a later one."""
    seen: set[int] = set()
    again = 0
    for steps in attempts:
        numbers = {step.number for step in steps}
        again += len(seen & numbers)
        seen |= numbers
    return again


# --- what they say together -------------------------------------------------------------------------------------------

LEAST_FOR_TREND = 10


@dataclass(frozen=True)
class StepTimes:
    """The lengths of steps, in seconds. ``trend`` is the median of the last tenth against that of the first, less 1."""

    count: int
    median: float
    p90: float
    slowest: float
    slowest_step: int
    total: float
    trend: float | None = None


def step_times(steps: Iterable[Step]) -> StepTimes | None:
    """What the lengths of steps say; None where none is known."""
    known = [(step.number, step.seconds, step.stands_for) for step in steps if step.seconds is not None]
    if not known:
        return None
    lengths = [seconds for _number, seconds, count in known for _one in range(count)]
    ordered = sorted(lengths)
    slowest = max(known, key=lambda step: step[1])
    return StepTimes(
        len(lengths),
        median(ordered),
        ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)],
        slowest[1],
        slowest[0],
        sum(lengths),
        _trend(lengths),
    )


def _trend(lengths: Sequence[float]) -> float | None:
    """None where there are too few steps; the first is left out, since it warms up."""
    counted = lengths[1:]
    if len(counted) < LEAST_FOR_TREND:
        return None
    tenth = max(3, len(counted) // 10)
    first, last = median(counted[:tenth]), median(counted[-tenth:])
    return last / first - 1 if first > 0 else None


def part_shares(steps: Iterable[Step]) -> tuple[tuple[str, float], ...]:
    """The share of each part in the time of all steps that tell parts, the largest first, what is left as ``other``."""
    told = [step for step in steps if step.parts and step.seconds]
    total = sum(step.seconds or 0.0 for step in told)
    if not total:
        return ()
    sums: dict[str, float] = {}
    for step in told:
        for name, seconds in with_rest(step):
            sums[name] = sums.get(name, 0.0) + seconds
    return tuple(sorted(((name, one / total) for name, one in sums.items()), key=lambda pair: -pair[1]))


def with_rest(step: Step) -> tuple[tuple[str, float], ...]:
    """The parts of a step, and what is left of it."""
    rest = max(0.0, (step.seconds or 0.0) - sum(seconds for _name, seconds in step.parts))
    return (*step.parts, (OTHER, rest)) if step.parts else ()


@dataclass(frozen=True)
class Rewards:
    """The reward of steps: of the first and the last one that tell it, the best, and the mean of the last tenth."""

    first: float
    last: float
    best: float
    best_step: int
    late_mean: float


def rewards(steps: Iterable[Step]) -> Rewards | None:
    """What the rewards of steps say; None where none is told."""
    told = [(step.number, step.reward) for step in steps if step.reward is not None]
    if not told:
        return None
    values = [reward for _number, reward in told]
    best = max(told, key=lambda pair: pair[1])
    return Rewards(values[0], values[-1], best[1], best[0], fmean(values[-max(1, len(values) // 10) :]))
