"""The plots of a report, as SVG that takes its colours from the page; drawn by matplotlib.

Colours are told apart with every kind of colour vision (Okabe and Ito's), and never alone: names stand beside them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from slurm.lib.observe.run_report import AttemptReport, RunReport
from slurm.lib.observe.sandbox_statistics import SandboxStatistics
from slurm.lib.observe.steps import done_again, rewards, step_times
from slurm.lib.reports import series
from slurm.lib.reports.report_words import (
    PART_WORDS,
    all_starts_words,
    latency_words,
    reward_words,
    slowest_words,
    step_words,
    trend_words,
    whole,
)

# Colours that stand in a drawing for those of the page (page.py), which differ in light and dark.
INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
BLUE, SKY, ORANGE, GREEN, RED, PURPLE, GREY = (f"#0a0c0{number}" for number in range(1, 8))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    BLUE: "blue",
    SKY: "sky",
    ORANGE: "orange",
    GREEN: "green",
    RED: "red",
    PURPLE: "purple",
    GREY: "grey",
}
STYLE: Any = {  # the keys' type is a new one with each matplotlib
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "font.size": 11.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "figure.constrained_layout.use": True,
}
WIDE, HALF = 15.2, 7.3  # inches; about 72 pixels of the page each
CATEGORIES = {
    series.QUEUED: GREY,
    series.STARTING: ORANGE,
    series.WAITING: PURPLE,
    series.WORKING: BLUE,
    series.SERVING: SKY,
    series.STOPPING: MUTED,
}
KINDS = {"training": BLUE, "runtime": ORANGE, series.QUEUED: GREY}
KIND_WORDS = {"training": "training job", "runtime": "runtime job", series.QUEUED: "training in the queue"}
DASHED = "dashed"
PARTS = (BLUE, ORANGE, GREEN, PURPLE, SKY)


@dataclass(frozen=True)
class Plot:
    """A plot: ``svg`` is empty where there is nothing to draw, and ``words`` say why; else they say what is seen.

    ``legend``: what is drawn, and the page's name of its colour.
    """

    name: str
    title: str
    words: str
    svg: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    is_wide: bool = False


def plots(report: RunReport) -> tuple[Plot, ...]:
    """All plots of a report, in the order in which they are shown."""
    with matplotlib.rc_context(STYLE):
        return (timeline(report), start_up(report), step_lengths(report), reward(report), starts(report), use(report))


# --- from a figure to SVG that fits into a page -----------------------------------------------------------------------


def drawn(name: str, width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """What ``draw`` puts on a figure, as an ``svg`` element; its ids are its own, its colours the page's."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    draw(figure)
    stream = io.StringIO()
    salt: Any = {"svg.hashsalt": name}
    with matplotlib.rc_context(salt):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return of_page(stream.getvalue(), name)


def of_page(text: str, name: str) -> str:
    """Matplotlib's file as an element of a page that has several of them."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text)


def axes_of(figure: Figure, x: str = "", y: str = "") -> Axes:
    """One pair of axes, with lines across alone."""
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)
    return axes


def time_unit(longest: float) -> tuple[float, str]:
    """In what lengths of time are told: seconds of it, and its name."""
    for least, unit, name in ((3 * 86400, 86400.0, "days"), (3 * 3600, 3600.0, "hours"), (180, 60.0, "minutes")):
        if longest >= least:
            return unit, name
    return 1.0, "seconds"


def in_units(axes: Axes, unit: float) -> None:
    """Seconds on the x axis, labelled in a unit."""
    axes.xaxis.set_major_locator(_locator(unit))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value / unit:g}"))


class _Scaled(MaxNLocator):
    """Round numbers of a unit."""

    def __init__(self, unit: float) -> None:
        super().__init__(nbins=9, steps=[1, 2, 3, 5, 6, 10] if unit in {60.0, 3600.0} else [1, 2, 5, 10])
        self.unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return [value * self.unit for value in super().tick_values(vmin / self.unit, vmax / self.unit)]


def _locator(unit: float) -> MaxNLocator:
    return _Scaled(unit)


# --- the plots --------------------------------------------------------------------------------------------------------


def timeline(report: RunReport) -> Plot:
    title = "What the jobs did"
    rows = series.timeline(report)
    longest = max((bar.begin + bar.seconds for row in rows for bar in row.bars), default=0.0)
    if not rows or longest <= 0:
        return Plot("timeline", title, "No job has begun yet, and when they were submitted is not known.", is_wide=True)
    unit, unit_name = time_unit(longest)
    seen = {bar.category for row in rows for bar in row.bars if bar.seconds}

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, f"{unit_name} since the launch")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        for at, row in enumerate(rows):
            for bar in row.bars:
                axes.barh(at, bar.seconds, left=bar.begin, height=0.62, color=CATEGORIES[bar.category], linewidth=0)
            axes.vlines(row.ticks, at - 0.31, at + 0.31, colors=PAPER, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.01)
        axes.spines["left"].set_visible(False)
        in_units(axes, unit)

    named = tuple((name, VARIABLES[colour]) for name, colour in CATEGORIES.items() if name in seen)
    marked = " White lines in a training are the ends of its steps." if any(row.ticks for row in rows) else ""
    words = f"A row for each job, by time since the launch; {whole(longest)} in all.{marked}"
    return Plot("timeline", title, words, drawn("timeline", WIDE, 0.75 + 0.4 * len(rows), draw), named, is_wide=True)


def start_up(report: RunReport) -> Plot:
    title = "Start-up by phase"
    attempt = _shown_attempt(report)
    found = series.start_up_phases(attempt.jobs, report.now) if attempt else ()
    phases = [phase for phase in found if phase.seconds >= last_of(found) / 200]
    last = last_of(phases)
    if not attempt or last <= 0:
        return Plot("start-up", title, "No job has begun yet, or its start took less than a second.")
    unit, unit_name = time_unit(last)

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, f"{unit_name} since the first job started")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        for at, phase in enumerate(phases):
            axes.barh(at, phase.seconds, left=phase.begin, height=0.62, color=KINDS[phase.kind], linewidth=0)
            end = phase.begin + phase.seconds
            axes.annotate(whole(phase.seconds), (end, at), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(phases)), [phase.words for phase in phases])
        axes.set_ylim(len(phases) - 0.4, -0.6)
        axes.set_xlim(0, last * 1.12)
        axes.spines["left"].set_visible(False)
        in_units(axes, unit)

    named = _kinds(phase.kind for phase in phases)
    several = f" of attempt {attempt.number}" if len(report.attempts) > 1 else ""
    longest = max(phases, key=lambda phase: phase.seconds)
    what = f"{longest.words}, {whole(longest.seconds)}"
    words = f"From the start of the first job{several} to the first step. Longest: {what}."
    return Plot("start-up", title, words, drawn("start-up", HALF, max(2.2, 0.8 + 0.32 * len(phases)), draw), named)


def _kinds(found: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The legend of what is drawn by kind of job."""
    seen = set(found)
    return tuple((KIND_WORDS[kind], VARIABLES[colour]) for kind, colour in KINDS.items() if kind in seen)


def last_of(phases: Sequence[series.Phase]) -> float:
    return max((phase.begin + phase.seconds for phase in phases), default=0.0)


def _shown_attempt(report: RunReport) -> AttemptReport | None:
    """The last attempt that began."""
    return next((one for one in reversed(report.attempts) if any(job.started is not None for job in one.jobs)), None)


def step_lengths(report: RunReport) -> Plot:
    title = "Time of a step"
    bars, times = series.step_bars(report.steps), step_times(report.steps)
    if bars is None or times is None:
        return Plot("steps", title, "The trainer has told the length of no step.")
    colours = {**dict(zip([name for name, _ in bars.parts], PARTS, strict=False)), "other": GREY, "": BLUE}

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, "step", "seconds")
        _stack(axes, bars, colours)
        if bars.per_point > 1:
            axes.plot(bars.numbers, bars.highest, color=INK, linewidth=0.7)
        axes.axhline(times.median, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_ylim(0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        _restarts(axes, report)

    shown = [(PART_WORDS.get(name, name), colours[name]) for name, values in bars.parts if name and any(values)]
    named = (*((name, VARIABLES[colour]) for name, colour in shown), ("median", DASHED))
    many = f" Each point is the mean of {bars.per_point} steps, the thin line their longest."
    words = f"{step_words(times)} ({slowest_words(times)}).{many if bars.per_point > 1 else ''}"
    trend = f" {trend_words(times).capitalize()}." if trend_words(times) else ""
    return Plot("steps", title, words[0].upper() + words[1:] + trend, drawn("steps", HALF, 3.2, draw), named)


def _stack(axes: Axes, bars: series.StepBars, colours: dict[str, str]) -> None:
    """Bars for few steps, areas for many."""
    shown = [(name, values) for name, values in bars.parts if any(values)]
    if len(bars.numbers) > 60:
        axes.stackplot(
            bars.numbers, *[values for _name, values in shown], colors=[colours[name] for name, _values in shown]
        )
        return
    gaps = [after - before for before, after in zip(bars.numbers, bars.numbers[1:], strict=False)]
    width = 0.8 * min(gaps, default=1.0)
    bottom = [0.0] * len(bars.numbers)
    for name, values in shown:
        axes.bar(bars.numbers, values, bottom=bottom, width=width, color=colours[name], linewidth=0)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]


def _restarts(axes: Axes, report: RunReport) -> None:
    """A dotted line where an attempt begins, but for the first."""
    for attempt in report.attempts[1:]:
        if attempt.steps:
            axes.axvline(attempt.steps[0].number - 0.5, color=MUTED, linewidth=1.0, linestyle=":")
            axes.annotate(
                f"attempt {attempt.number}",
                (attempt.steps[0].number - 0.5, 1.0),
                (3, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                color=MUTED,
            )


def reward(report: RunReport) -> Plot:
    title = "Reward"
    found, told = series.reward_curve(report.steps), rewards(report.steps)
    if found is None or told is None:
        return Plot("reward", title, "The trainer has told no reward.")

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, "step", "mean reward of a step")
        many = len(found.x) > 30
        if found.per_point > 1:
            axes.fill_between(found.x, found.low, found.high, color=SKY, alpha=0.35, linewidth=0)
        faint = (
            {"color": SKY, "linewidth": 1.0, "alpha": 0.6} if many else {"color": BLUE, "linewidth": 1.8, "marker": "o"}
        )
        axes.plot(found.x, found.mean, markersize=4, **faint)  # type: ignore[arg-type]
        if many:
            axes.plot(found.x, series.smoothed(found.mean, max(5, len(found.x) // 20)), color=BLUE, linewidth=2.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if min(found.low) >= 0:
            axes.set_ylim(0, max(found.high) * 1.08 or 1.0)
        _restarts(axes, report)

    again = done_again(attempt.steps for attempt in report.attempts)
    words = reward_words(told)
    words = f"{words[0].upper()}{words[1:]}."
    words += " The strong line is the mean of the steps around." if len(found.x) > 30 else ""
    words += f" {again} steps were done again after a restart; the later time is shown." if again else ""
    return Plot("reward", title, words, drawn("reward", HALF, 3.2, draw))


def use(report: RunReport) -> Plot:
    title = "Use of CPUs, memory and GPUs"
    curves = series.use_curves(report)
    panels = [
        ("CPU, %", [(one.kind, one.cpu) for one in curves if one.cpu], 100.0),
        ("memory, GiB", [(one.kind, one.memory) for one in curves if one.memory], None),
        ("GPU, %", [(one.kind, one.gpu) for one in curves if one.gpu], 100.0),
    ]
    shown = [(name, found, top) for name, found, top in panels if any(len(line.x) > 1 for _kind, line in found)]
    if not shown:
        return Plot("use", title, "There are too few samples: jobs take one every half minute.", is_wide=True)
    longest = max(line.x[-1] for _name, found, _top in shown for _kind, line in found)
    unit, unit_name = time_unit(longest)

    def draw(figure: Figure) -> None:
        many = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
        for (axes,), (name, found, top) in zip(many, shown, strict=True):
            for kind, line in found:
                axes.plot(line.x, line.mean, color=KINDS[kind], linewidth=1.6)
            axes.set_ylabel(name)
            axes.set_ylim(0, top)
            axes.grid(axis="x", visible=False)
            axes.tick_params(length=0)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        many[-1][0].set_xlabel(f"{unit_name} since the launch")
        many[-1][0].set_xlim(0, longest * 1.01)
        in_units(many[-1][0], unit)

    named = _kinds(one.kind for one in curves)
    words = "Samples of the jobs, of what each was given; of several nodes a line each."
    return Plot("use", title, words, drawn("use", WIDE, 0.6 + 1.3 * len(shown), draw), named, is_wide=True)


def starts(report: RunReport) -> Plot:
    title = "How long sandboxes took to start"
    found = [one.sandboxes for one in report.attempts if isinstance(one.sandboxes, SandboxStatistics)]
    rows = series.start_bins([one.start_seconds for one in found])
    if not rows:
        why = "No sandbox was started." if found else "The API server has left no statistics."
        return Plot("starts", title, why)

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, "seconds from the request to the first answer (logarithmic)", "sandboxes")
        widths = [0.94 * (high - low) for low, high, _count in rows]
        lows = [low for low, _high, _count in rows]
        axes.bar(lows, [count for _low, _high, count in rows], width=widths, align="edge", color=BLUE, linewidth=0)
        axes.set_xscale("log")
        ticks = series.round_ticks(rows[0][0], rows[-1][1])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    counts = f"{all_starts_words(found)}."
    words = counts + (f" {latency_words(found[0]).capitalize()}." if len(found) == 1 else "")
    return Plot("starts", title, words, drawn("starts", HALF, 3.2, draw))
