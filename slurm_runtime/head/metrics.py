"""What does Prometheus read at GET /metrics of the head? The figures of each node, by name, and what was answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slurm_runtime.head.fleet import Node, Standing
from slurm_runtime.metrics import Described, Traffic, traffic_metrics

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True)
class Figures:
    """The fleet at one moment: its nodes, the living sandboxes by node and state, and the starts in the line."""

    nodes: tuple[Node, ...]
    standings: Counter[Standing]
    sandboxes: Counter[tuple[str, str]]
    waiting: int


def exposition(figures: Callable[[], Figures], traffic: Traffic) -> tuple[bytes, str]:
    """The text for Prometheus and its content type; ``figures`` is asked once."""
    # 0.1 s, and only few ask
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield from _gauges(figures())
            yield from traffic_metrics(traffic)

    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(Described(Collector().collect))
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _gauges(figures: Figures) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    sandboxes = GaugeMetricFamily("skyrl_sandboxes", "Living sandboxes by node and state", labels=["node", "state"])
    for (node, state), count in sorted(figures.sandboxes.items()):
        sandboxes.add_metric([node, state], count)
    yield sandboxes
    yield from _of_nodes([node for node in figures.nodes if node.is_here and node.facts])
    nodes = GaugeMetricFamily("skyrl_nodes", "Nodes that have joined, by state", labels=["state"])
    for standing in Standing:
        nodes.add_metric([standing.value], figures.standings[standing])
    yield nodes
    yield GaugeMetricFamily("skyrl_head_starts_waiting", "Starts in the line of the head", value=figures.waiting)


def _of_nodes(nodes: Iterable[Node]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    used = GaugeMetricFamily("skyrl_slots_used", "Slots that sandboxes hold", labels=["node"])
    total = GaugeMetricFamily("skyrl_slots_total", "Slots of the node", labels=["node"])
    waiting = GaugeMetricFamily("skyrl_starts_waiting", "Starts that wait for a slot on the node", labels=["node"])
    for node in nodes:
        assert node.facts is not None
        used.add_metric([node.name], node.facts.used)
        total.add_metric([node.name], node.facts.slots)
        waiting.add_metric([node.name], node.facts.waiting)
    yield from (used, total, waiting)
