"""How does the head's cost grow with the nodes? The plot of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulator.parts import Growth

SIZE = (9.0, 3.6)
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "head"}  # text stays text; the same picture for the same figures


def plot(found: Sequence[Growth], to: Path) -> None:
    """CPU of the head and what it adds to a start, over the number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    nodes = [one.nodes for one in found]
    rate = found[0].load.rate
    figure, (left, right) = pyplot.subplots(1, 2, figsize=SIZE, layout="constrained")
    left.plot(nodes, [one.load.head_ms for one in found], "o-", label="one start, with its looks and its stop")
    left.plot(nodes, [1000 * one.idle_busy for one in found], "s--", label="one second without any start")
    left.set_ylabel("CPU time of the head (ms)")
    right.plot(nodes, [one.load.summary.added.median for one in found], "o-", label="median")
    right.plot(nodes, [one.load.summary.added.p99 for one in found], "s--", label="99th percentile")
    right.set_ylabel("added to a start by the head (ms)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(nodes, [str(count) for count in nodes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nodes")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"The head under {rate:g} starts a second")
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    pyplot.close(figure)
