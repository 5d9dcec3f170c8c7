#!/usr/bin/env python3
"""Draws the plots of docs/benchmarks.md from the figures in ``benchmarks/results/``.

Each file there is what a script printed with ``--json``: peers_side_by_side.json, bash_suite.json. A plot is
drawn anew from a new run by writing that run's output there first.

    python benchmarks/plots.py [--results FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

CHECKOUT = Path(__file__).resolve().parent.parent
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "skyrl", "font.size": 9, "axes.spines.top": False}
COLOURS = {"this server": "#1f77b4", "podman run -d": "#7f7f7f", "runc": "#bcbd22", "SWE-ReX": "#ff7f0e"}
OTHER = "#d62728"


def colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def peers(figures: dict[str, Any], out: Path) -> None:
    """Start, command latency and parallel capacity, a panel each."""
    systems = {name: found for name, found in figures["systems"].items() if not found["refused"]}
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(1, 1, 1.2))
    starts = {name: 1000 * statistics.median(found["starts"]) for name, found in systems.items()}
    bars(panels[0], starts, "one start, ms")
    ways = {
        f"{name}:\n{way}": 1000 * statistics.median(taken)
        for name, found in systems.items()
        for way, taken in found["commands"].items()
    }
    bars(panels[1], ways, "the command true, ms")
    for name, found in systems.items():
        ran = [one for one in found["capacity"] if not one["skipped"] and one["up"]]
        requested, last = [one["requested"] for one in ran], [one["last_s"] for one in ran]
        panels[2].plot(requested, last, "o-", color=colour(name), label=name)
        for one in ran:
            if one["up"] < one["requested"]:
                panels[2].annotate(f"only {one['up']} up", (one["requested"], one["last_s"]))
    panels[2].set(xscale="log", yscale="log", xlabel="requested at once", ylabel="s until the last that came up")
    panels[2].axhline(90, color="black", linewidth=0.6, linestyle=":")
    panels[2].minorticks_off()
    asked = [one["requested"] for one in next(iter(systems.values()))["capacity"]]
    panels[2].set_xticks(asked, [str(count) for count in asked])
    panels[2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    saved(figure, out / "benchmarks-peers.svg")


def bars(panel: Any, values: dict[str, float], label: str) -> None:
    names = list(values)[::-1]
    panel.barh(names, [values[name] for name in names], color=[colour(name.partition(":")[0]) for name in names])
    panel.set(xscale="log", xlabel=label, xlim=(1, 4 * max(values.values())))
    panel.tick_params(axis="y", labelsize=8)
    for place, name in enumerate(names):
        panel.text(values[name], place, f" {significant(values[name])}", va="center", fontsize=7)


def significant(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def endings(figures: dict[str, Any], out: Path) -> None:
    """Until both jobs are gone, of each ending; a job that stays is a bar to the edge."""
    (head,) = [name for name in figures if name not in {"machine", "patience_s", "ours"}]
    patience = figures.get("patience_s", 60.0)
    figure, panel = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for shift, name, tint in ((0.2, "ours", COLOURS["this server"]), (-0.2, head, OTHER)):
        found = figures[name][::-1]
        lengths = [one["end_s"] if not one["stayed"] else patience for one in found]
        places = [place + shift for place in range(len(found))]
        panel.barh(places, lengths, height=0.38, color=tint, label="this suite" if name == "ours" else name)
        for place, one, length in zip(places, found, lengths, strict=True):
            words = f"{one['stayed'][0]} job stays" if one["stayed"] else f"{length:.1f}"
            panel.text(length, place, f" {words}", va="center", fontsize=7)
    panel.set_yticks(range(len(figures["ours"])), [one["what"] for one in figures["ours"][::-1]])
    panel.set(xlabel="s from the cause until both jobs are gone", xlim=(0, patience * 1.2))
    panel.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    saved(figure, out / "benchmarks-endings.svg")


def saved(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "images")
    arguments = parser.parse_args(argv)
    plt.rcParams.update(STYLE)
    for name, draw in (("peers_side_by_side", peers), ("bash_suite", endings)):
        file = arguments.results / f"{name}.json"
        if not file.exists():
            sys.exit(f"{file} is not there; write the output of benchmarks/{name}.py --json to it")
        draw(json.loads(file.read_text()), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
