"""How does a person see the run: metrics and rollouts as JSON lines, a sparkline, a plot."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shell_rl.checkpoint import write_whole
from shell_rl.errors import UsageError
from shell_rl.learner import Rollout, Score

log = logging.getLogger("shell_rl")

BARS = "▁▂▃▄▅▆▇█"


def metrics_line(step: int, score: Score, seconds: float) -> dict[str, object]:
    """The metrics of one step; ``seconds`` is the step's wall-clock time."""
    return {"step": step, **asdict(score), "seconds": round(seconds, 3)}


def rollout_lines(step: int, rollouts: Iterable[Rollout]) -> list[dict[str, object]]:
    """What each command of a step was, and its reward."""
    return [
        {"step": step, "task": r.task, "command": r.command, "exit_code": r.exit_code, "reward": r.reward}
        for r in rollouts
    ]


def append_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Append JSON lines.

    :raises UsageError: the file cannot be written
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}; choose another --output.") from error


def _parse(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path, last_step: int) -> list[dict[str, object]]:
    """The lines of steps up to ``last_step``; half lines that a kill left behind are dropped."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [value for line in text.splitlines() if (value := _parse(line)) is not None]
    return [line for line in lines if isinstance(step := line.get("step"), int) and step <= last_step]


def keep_until(path: Path, last_step: int) -> None:
    """Drop the lines after ``last_step``: a run resumed there writes them again."""
    if path.exists():
        write_whole(path, "".join(json.dumps(line) + "\n" for line in read_lines(path, last_step)))


def sparkline(rewards: Sequence[float]) -> str:
    """Rewards from 0 to 1 as a row of bars."""
    return "".join(BARS[min(len(BARS) - 1, max(0, int(reward * len(BARS))))] for reward in rewards)


def plot(path: Path, lines: Sequence[Mapping[str, object]], untrained: float, trained: float) -> None:
    """Draw reward against step as PNG; one line of log where matplotlib is missing or cannot write."""
    os.environ.setdefault("MPLCONFIGDIR", str(path.parent / ".matplotlib"))  # its font cache, else in the home
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("No plot: matplotlib is not installed (pip install matplotlib).")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="mean reward", ylim=(-0.02, 1.02), title="shell_rl")
    steps = [_number(line["step"]) for line in lines]
    for task, values in _per_task(lines).items():
        axes.plot(steps, values, linewidth=0.8, alpha=0.6, label=task)
    axes.plot(steps, [_number(line["reward"]) for line in lines], color="black", linewidth=2, label="all tasks")
    axes.axhline(untrained, color="grey", linestyle=":", label=f"untrained {untrained:.3f}")
    axes.axhline(trained, color="green", linestyle=":", label=f"trained {trained:.3f}")
    figure.legend(fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        log.warning("No plot: cannot write %s: %s.", path, error.strerror)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _per_task(lines: Sequence[Mapping[str, object]]) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {}
    for line in lines:
        tasks = line.get("per_task")
        for task, value in tasks.items() if isinstance(tasks, dict) else ():
            series.setdefault(str(task), []).append(_number(value))
    return series
