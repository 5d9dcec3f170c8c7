#!/usr/bin/env python3
"""How far does the head carry? The real head with hundreds of simulated nodes, driven over HTTP by clients.

The head runs on one CPU; the simulated nodes and the clients, processes of their own, share the others. A node answers
as a real one does, with delays measured on the real Podman (``simulator/delays.json``) in the place of containers.

    python benchmarks/head_scale.py [--nodes 200] [--slots 64] [--parts raw,rate,growth,full,fairness,churn,losses]
                                    [--seconds 20] [--step 50] [--rate 100] [--json] [--plot FILE]

It ends with exit code 1 where something that is aimed at was missed, and says what.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.simulator import parts
from benchmarks.simulator.delays import read
from benchmarks.simulator.figures import Summary
from benchmarks.simulator.parts import BOUND_MS, Churn, Fairness, Full, Growth, Loaded, Loss, Setting
from benchmarks.simulator.stage import Stage, cpus_from, stage

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
AIM = 300.0  # starts a second, with the head and all else on a CPU each
Rows = list[tuple[str, ...]]


def works(setting: Setting, rate: float, stage_: Stage) -> dict[str, Callable[[], Any]]:
    """What each part does, by its name."""
    counts = [count for count in COUNTS if count <= setting.nodes]
    return {
        "raw": lambda: [parts.raw(stage_, setting, many) for many in (rate, 3 * rate)],
        "rate": lambda: parts.steps(stage_, setting),
        "growth": lambda: parts.growth(stage_, setting, counts, min(rate / 2, setting.slots / 2)),
        "full": lambda: parts.full(stage_, setting, 2 * rate),
        "fairness": lambda: parts.fairness(stage_, setting),
        "churn": lambda: parts.churn(stage_, setting, rate),
        "losses": lambda: parts.losses(stage_, setting, 2 * rate),
    }


def of(summary: Summary) -> tuple[str, ...]:
    """Median and 99th percentile of what the head added, of a whole /start, and of a look."""
    return tuple(f"{one.median:.1f} / {one.p99:.1f}" for one in (summary.added, summary.whole, summary.look))


OF = ("added, ms", "whole /start, ms", "a look, ms")


def of_loads(found: Sequence[Loaded]) -> Rows:
    rows: Rows = [
        ("nodes", "starts/s", "starts", "failed", *OF, "head, CPU ms each", "head, of a CPU", "nodes, of a CPU")
    ]
    for one in found:
        made = one.summary
        shares = (f"{one.head_ms:.2f}", f"{one.head_busy:.0%}", f"{one.others_busy:.0%}")
        rows.append((str(one.nodes), f"{one.rate:g}", str(made.starts), str(made.failed), *of(made), *shares))
    return rows


def of_raw(found: Sequence[Loaded]) -> str:
    return "Clients at the nodes themselves, without a head (the simulator's own cost)\n\n" + measure.table(
        [(*row[:-3], row[-1]) for row in of_loads(found)]
    )


def of_rate(found: Sequence[Loaded]) -> str:
    best, why = parts.highest(found), found[-1].summary.why
    return (
        f"Highest rate with no failed start and p99 of what the head adds < {BOUND_MS:g} ms: "
        f"{best:g} starts a second\n\n"
        f"{measure.table(of_loads(found))}" + (f"\n\n{why}" if why else "")
    )


def of_growth(found: Sequence[Growth]) -> str:
    head, *rows = of_loads([one.load for one in found])
    idle = [f"{one.idle_busy:.1%}" for one in found]
    return "The same load on ever more nodes\n\n" + measure.table(
        [(*head, "head without load, of a CPU"), *((*row, share) for row, share in zip(rows, idle, strict=True))]
    )


def of_full(found: Full) -> str:
    return "All slots at once\n\n" + measure.table(
        [
            ("what", "figure"),
            ("alive at once", f"{found.held} of {found.wanted}, {found.listed} in GET /list"),
            ("after", f"{found.seconds:.0f} s"),
            ("GET /list of all", f"{found.list_ms:.0f} ms"),
            ("GET /nodes", f"{found.nodes_ms:.0f} ms"),
            *zip(OF, of(found.summary), strict=True),
            ("failed", f"{found.summary.failed} {found.summary.why or ''}"),
            ("head, PSS: empty, full, after all have ended", _memory([found.empty_mb, found.full_mb, found.after_mb])),
        ]
    )


def of_fairness(found: Fairness) -> str:
    waits = [
        (f"wait for a node, {group}", f"median {one.median:.0f}, p99 {one.p99:.0f}, longest {one.longest:.0f} ms")
        for group, one in found.waits.items()
    ]
    return "More starts than slots\n\n" + measure.table(
        [
            ("what", "figure"),
            ("slots in all", str(found.slots)),
            ("starts a second", f"{found.rate:.0f}, {found.summary.starts} in all, {found.summary.failed} failed"),
            ("in the line at the end of the load", str(found.waiting)),
            *waits,
            ("overtaken by one that was due 50 ms later or more", f"{found.overtaken} of {found.placed}"),
        ]
    )


def of_churn(found: Churn) -> str:
    return "A node leaves and another joins every second\n\n" + measure.table(
        [
            ("what", "figure"),
            ("load", f"{found.rate:g} starts a second for {found.seconds:g} s, {found.changed} nodes changed"),
            ("starts", f"{found.summary.starts}; on the nodes that left lived {found.there}"),
            ("failed elsewhere", f"{found.bystanders} {found.why or ''}"),
            *zip(OF, of(found.summary), strict=True),
            ("head, PSS, from begin to end", _memory(found.memory_mb)),
        ]
    )


def of_losses(found: Sequence[Loss]) -> str:
    rows: Rows = [("way", "nodes", "sandboxes there", "told as failed", "first, last told after", "failed elsewhere")]
    for one in found:
        after = f"{one.first_s:.1f}, {one.last_s:.1f} s"
        there = (str(one.there), str(one.told), after, f"{one.failed_elsewhere} of {one.elsewhere}")
        rows.append((one.way, str(one.nodes), *there))
    return f"Nodes lost at once\n\n{measure.table(rows)}\n\nas told: {found[0].reason}"


def _memory(megabytes: Sequence[float]) -> str:
    return ", ".join(f"{one:.0f}" for one in megabytes) + " MB"


SHOWN: Mapping[str, Callable[[Any], str]] = {
    "raw": of_raw,
    "rate": of_rate,
    "growth": of_growth,
    "full": of_full,
    "fairness": of_fairness,
    "churn": of_churn,
    "losses": of_losses,
}


def machine() -> str:
    """What was measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    return f"{model}, {measure.load()}, Python {platform.python_version()}, Linux {platform.release()}"


def plain(found: Any) -> Any:
    """As JSON takes it."""
    if isinstance(found, list):
        return [plain(one) for one in found]
    return asdict(found) if is_dataclass(found) and not isinstance(found, type) else found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=200, help="simulated nodes")
    parser.add_argument("--slots", type=int, default=64, help="slots of each")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a load")
    parser.add_argument("--step", type=float, default=50.0, help="starts a second that each step of 'rate' adds")
    parser.add_argument("--most", type=float, default=1000.0, help="starts a second at which 'rate' ends")
    parser.add_argument("--rate", type=float, default=100.0, help="starts a second of the other parts")
    parser.add_argument("--parts", default=",".join(SHOWN), help="which, separated by commas (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print all figures as JSON; the tables go to standard error"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw 'growth', as .svg or .png")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts.split(",")
    if unknown := set(arguments.parts) - set(SHOWN):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(SHOWN)}")
    return arguments


def missed(found: Mapping[str, Any], most: float) -> list[str]:
    """What is aimed at and was not reached, a sentence each. Pure."""
    sentences = []
    aim = min(AIM, most)
    if "rate" in found and (best := parts.highest(found["rate"])) < aim:
        sentences.append(f"{best:g} starts a second were kept, {aim:g} are aimed at")
    if "full" in found and not found["full"].held == found["full"].listed == found["full"].wanted:
        sentences.append(f"{found['full'].held} of {found['full'].wanted} sandboxes were alive at once")
    if "fairness" in found and found["fairness"].overtaken:
        sentences.append(f"{found['fairness'].overtaken} starts were overtaken by later ones")
    if "churn" in found and found["churn"].bystanders:
        sentences.append(f"{found['churn'].bystanders} starts failed on nodes that stayed")
    for loss in found.get("losses", ()):
        if loss.failed_elsewhere or loss.told < loss.there:
            sentences.append(f"{loss.way}: {loss.told} of {loss.there} told, {loss.failed_elsewhere} failed elsewhere")
    return sentences


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    tables = sys.stderr if arguments.json else sys.stdout
    setting = Setting(arguments.nodes, arguments.slots, arguments.seconds, arguments.step, arguments.most)
    found: dict[str, Any] = {"machine": machine(), "delays": read().source}
    print(f"{found['machine']}\ndelays of nodes: {found['delays']}", file=tables, flush=True)
    with tempfile.TemporaryDirectory(prefix="head-scale-") as folder, stage(Path(folder), _cpus()) as made:
        todo = works(setting, arguments.rate, made)
        for name in arguments.parts:
            found[name] = todo[name]()
            print(f"\n{SHOWN[name](found[name])}", file=tables, flush=True)
    if arguments.plot and "growth" in found:
        from benchmarks.simulator.plot import plot

        plot(found["growth"], arguments.plot)
    if arguments.json:
        print(json.dumps({name: plain(one) for name, one in found.items()}, indent=1))
    for sentence in (sentences := missed(found, arguments.most)):
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


def _cpus() -> Any:
    return cpus_from(sorted(os.sched_getaffinity(0)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
