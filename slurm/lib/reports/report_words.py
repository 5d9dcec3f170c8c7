"""How are the figures of a report said? The same words in the text and on the page."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from slurm.lib.observe.run_report import JobReport, RunReport, figure, first_step_at
from slurm.lib.observe.run_view import JobView, RunState
from slurm.lib.observe.sandbox_statistics import SandboxStatistics
from slurm.lib.observe.steps import Rewards, Step, StepTimes
from slurm.lib.observe.timeline import Span
from slurm.lib.observe.usage import Usage
from slurm.lib.reports.run_words import clock, is_worth_a_line, job_words, lead_of, shortened

# VERL's names of a step's parts, in words; what is not here is called as VERL calls it.
PART_WORDS = {
    "gen": "rollouts",
    "gen_max": "greedy rollouts",
    "reward": "rewards",
    "old_log_prob": "old log-probs",
    "ref": "reference log-probs",
    "ref_log_prob": "reference log-probs",
    "values": "values",
    "adv": "advantages",
    "update_critic": "critic update",
    "update_actor": "actor update",
    "update_weights": "weights to the rollout",
    "dump_rollout_generations": "writing rollouts",
    "testing": "validation",
    "save_checkpoint": "saving",
    "other": "other",
}
SOURCES = {"sacct": "Slurm's accounting", "samples": "own samples"}
COMPLETE = re.compile(r"training job \S+ is complete\b")  # the end of a runtime job in order
LONGEST = 200  # characters of a sentence that stands in a row of many
_BARS = "▁▂▃▄▅▆▇█"


def length(seconds: float | None) -> str:
    """A length of time: ``0.12 s``, ``8.4 s``, ``3:04``, ``1-02:03:04``."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3f} s" if 0 < seconds < 0.01 else f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.3g} s"
    return clock(seconds)


def whole(seconds: float) -> str:
    """A length of time that logs tell in whole seconds."""
    return f"{seconds:.0f} s" if seconds < 60 else clock(seconds)


def moment(at: float | None) -> str:
    """A time of day of this host's zone, with its zone."""
    return "unknown" if at is None else time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))


def share(part: float) -> str:
    return "<1 %" if 0 < part < 0.005 else f"{100 * part:.0f} %"


def gib(count: float) -> str:
    size = count / 2**30
    return f"{size:.1f} GiB" if size < 100 else f"{size:.0f} GiB"


def number(value: float) -> str:
    """A reward, to four digits."""
    return f"{value:.4g}"


def span_words(span: Span, now: float) -> str:
    about = "about " if span.is_about else ""
    return f"{about}{whole(span.seconds(now))}{'' if span.end is not None else ' so far'}"


def step_words(times: StepTimes) -> str:
    return f"median {length(times.median)}, 90 % within {length(times.p90)}, slowest {length(times.slowest)}"


def slowest_words(times: StepTimes) -> str:
    return f"step {times.slowest_step}"


def trend_words(times: StepTimes) -> str:
    """Whether steps become longer; empty where there are too few."""
    if times.trend is None:
        return ""
    if abs(times.trend) < 0.05:
        return "steady: the last tenth takes as long as the first"
    if times.trend > 1:
        return f"steps became longer: the last tenth takes {1 + times.trend:.1f} times as long as the first"
    word = "longer" if times.trend > 0 else "shorter"
    return f"steps became {word}: the last tenth takes {share(abs(times.trend))} {word} than the first"


def part_words(shares: Iterable[tuple[str, float]], least: float = 0.005) -> str:
    told = [f"{PART_WORDS.get(name, name)} {share(part)}" for name, part in shares if part >= least]
    return ", ".join(told)


def reward_words(found: Rewards) -> str:
    best = f"best {number(found.best)} (step {found.best_step})"
    return f"{number(found.first)} at first, {number(found.last)} at last, {best}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a row of bars from the least to the largest of them."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    cells = [values[at * len(values) // count : max(1, (at + 1) * len(values) // count)] for at in range(count)]
    means = [sum(cell) / len(cell) for cell in cells if cell]
    low, high = min(means), max(means)
    shares = [(mean - low) / (high - low) if high > low else 0.0 for mean in means]  # 0 to 1, however small the range
    return "".join(_BARS[round(share * (len(_BARS) - 1))] for share in shares)


def reasons(counts: Mapping[str, int], most: int = 5) -> str:
    """What was counted by reason, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f", and {len(ordered) - most} other reasons" if len(ordered) > most else ""
    return ", ".join(f"{count} {reason}" for reason, count in ordered[:most]) + more


def starts_words(found: SandboxStatistics) -> str:
    return all_starts_words([found])


def all_starts_words(found: Sequence[SandboxStatistics]) -> str:
    """The starts of all servers of a run."""
    failed = sum(sum(one.starts.failed.values()) for one in found)
    asked, well = (sum(getattr(one.starts, name) for one in found) for name in ("asked", "succeeded"))
    return f"{asked} asked for, {well} succeeded, {failed} failed"


def latency_words(found: SandboxStatistics) -> str:
    """How long starts took; empty where nothing is known."""
    seconds = found.start_seconds
    named = (("median", seconds.p50), ("90 % within", seconds.p90), ("99 % within", seconds.p99))
    told = [f"{name} {length(value)}" for name, value in named if value is not None]
    return ", ".join([*told, *([f"slowest {length(seconds.max)}"] if seconds.max is not None else [])])


def peak_words(found: SandboxStatistics, nodes: int = 1) -> str:
    """How many lived at once; of several nodes the sum of what each had at its busiest moment."""
    of = f", {found.slots} slots" if found.slots is not None else ""
    return (
        f"{found.peak_living} at once{of}"
        if nodes <= 1
        else f"at most {found.peak_living} at once on {nodes} nodes{of}"
    )


def use_lines(job: JobReport) -> list[tuple[str, str, str]]:
    """What a job used of what it had: name, words, source. Only what is known."""
    found: list[tuple[str, str, str]] = []

    def add(name: str, words: str, source: str) -> None:
        found.append((name, words, SOURCES.get(source, source)))

    def known(name: str) -> float | None:
        pair = figure(job.usages, lambda usage: getattr(usage, name))
        return pair[0] if pair else None

    cpu = figure(job.usages, lambda usage: usage.cpu_share)
    if cpu:
        of = _cpus(_of(job.usages, cpu[1]))
        add("CPU", f"{share(cpu[0])}{of}", cpu[1])
    memory = figure(job.usages, lambda usage: usage.memory_peak_bytes)
    if memory:
        limit = _of(job.usages, memory[1]).memory_limit_bytes or known("memory_limit_bytes")
        of = f" of {gib(limit)}, {share(memory[0] / limit)}" if limit else ""
        add("memory", f"{gib(memory[0])}{of} at the peak", memory[1])
    busy = figure(job.usages, lambda usage: usage.gpu_busy_share)
    if busy:
        cards = known("gpus")
        add("GPU", f"{share(busy[0])}{_cards(cards)} busy", busy[1])
    held = figure(job.usages, lambda usage: usage.gpu_memory_peak_mib)
    if held:
        total = known("gpu_memory_total_mib")
        of = f" of {gib(total * 2**20)}" if total else ""
        add("GPU memory", f"{gib(held[0] * 2**20)}{of} at the peak, of the fullest card", held[1])
    return found


def _of(usages: Iterable[Usage], source: str) -> Usage:
    return next(usage for usage in usages if usage.source == source)


def _cpus(usage: Usage) -> str:
    return f" of {usage.cpus:g} CPUs" if usage.cpus else ""


def _cards(cards: float | None) -> str:
    return f" of {cards:g} GPUs" if cards else ""


def summary_times(report: RunReport) -> list[tuple[str, str]]:
    """The lengths of time that people ask for first, as far as they are known."""
    found: list[tuple[str, str]] = []
    launched, until = report.launched, report.finished
    if launched is not None and (until is not None or not report.view.state.is_over):
        total = (until if until is not None else report.now) - launched
        found.append(("took", whole(max(0.0, total)) + ("" if until is not None else " so far")))
    first = first_step_at(report)
    if launched is not None and first is not None:
        found.append(("first step", f"began {whole(max(0.0, first - launched))} after the launch"))
    return found


def heading(report: RunReport, job: JobReport) -> str:
    """A job, where it ran, and how it ended, unless the run's own end says that."""
    view = job.job
    name = f"job {view.job_id}" + (f" on {view.node}" if view.node else "")
    words = job_words(replace(view, node=""), report.now)
    lead = lead_of(report.view)
    follows = view.kind == "runtime" and COMPLETE.match(view.end_reason)
    if view.end_reason and lead and (follows or view is lead or lead.end_reason in view.end_reason):
        words = "ended" + (f" with exit code {view.exit_code}" if view.exit_code is not None else "")
    return f"{name}: {shortened(words, LONGEST)}"


def troubled(report: RunReport) -> list[JobView]:
    """The jobs whose last error is worth a line; none of a run that went well."""
    if report.view.state is RunState.COMPLETED:
        return []
    return [job.job for job in report.jobs if is_worth_a_line(job.job)]


def told_rewards(steps: Iterable[Step]) -> list[float]:
    return [step.reward for step in steps if step.reward is not None]
