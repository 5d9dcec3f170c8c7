"""What does Prometheus read at GET /metrics? The state of this server at the moment of asking, and what it answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import Scope

from slurm_runtime.guard import route_of
from slurm_runtime.page import Snapshot
from slurm_runtime.sandbox import State
from slurm_runtime.steps import STEPS, StepTimes

if TYPE_CHECKING:
    from prometheus_client.core import Metric

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BOUNDS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0, 300.0)  # from a poll to a /start that pulls


@dataclass
class Traffic:
    """Answers so far, by method, route and status; how long they took, by route. Bounded: routes, not paths."""

    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    durations: dict[str, list[int]] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        """One answer; status 0 is a client that left before it."""
        route = route_of(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.answers[(method, route, status)] += 1
        counts = self.durations.setdefault(route, [0] * (len(BOUNDS_S) + 1))
        counts[next((at for at, bound in enumerate(BOUNDS_S) if seconds <= bound), len(BOUNDS_S))] += 1
        self.seconds[route] += seconds  # type: ignore[assignment]  # a Counter of seconds

    def buckets(self, route: str) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.durations[route], strict=True):
            total += count
            found.append((bound, float(total)))
        return found


def exposition(snapshot: Callable[[], Snapshot], traffic: Traffic, steps: StepTimes) -> tuple[bytes, str]:
    """The text for Prometheus and its content type; ``snapshot`` is asked once."""
    # 0.1 s, and only few ask
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

    class Collector:
        def collect(self) -> Iterator[Metric]:
            now = snapshot()
            yield from _gauges(now)
            yield from _node(now)
            yield from traffic_metrics(traffic)
            yield _steps(steps)

    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(Described(Collector().collect))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class Described:
    """A collector that is not asked for values when it is registered."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> list[Metric]:
        return []


def _gauges(snapshot: Snapshot) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    sandboxes = GaugeMetricFamily("skyrl_sandboxes", "Living sandboxes by state", labels=["state"])
    counts = Counter(row.sandbox.state for row in snapshot.sandboxes)
    for state in State:
        if not state.is_dead:
            sandboxes.add_metric([state.name.lower()], counts[state])
    yield sandboxes
    for name, words, value in (
        ("skyrl_slots_used", "Slots that sandboxes hold", snapshot.slots_used),
        ("skyrl_slots_total", "Slots of this server", snapshot.slots_total),
        ("skyrl_starts_waiting", "Starts that wait for a slot", snapshot.waiting),
        ("skyrl_warm_containers", "Containers that wait for the next sandboxes", snapshot.warm),
        ("skyrl_pulls_under_way", "Images being pulled", len(snapshot.pulls)),
        ("skyrl_builds_under_way", "Images being built or queued", len(snapshot.builds)),
        ("skyrl_failures_kept", "Failed sandboxes that the operator's page still shows", len(snapshot.failures)),
    ):
        yield GaugeMetricFamily(name, words, value=float(value))


def _node(snapshot: Snapshot) -> Iterator[Metric]:
    """What only makes sense for a node is there only for one."""
    from prometheus_client.core import GaugeMetricFamily

    draining = bool(snapshot.drain_reason)
    yield GaugeMetricFamily("skyrl_draining", "1 where no new sandboxes are taken", value=float(draining))
    if snapshot.until is not None:
        words = "When this node ends, in seconds since the epoch"
        yield GaugeMetricFamily("skyrl_until_timestamp_seconds", words, value=snapshot.until)
    if snapshot.head is not None:
        words = "1 where the last registration with the head went well"
        yield GaugeMetricFamily("skyrl_registered", words, value=float(snapshot.head.registered))
        if snapshot.head.heard_s_ago is not None:
            words = "Seconds since the head last answered this node"
            yield GaugeMetricFamily("skyrl_head_heard_seconds", words, value=snapshot.head.heard_s_ago)


def traffic_metrics(traffic: Traffic) -> Iterator[Metric]:
    """What was answered, and how long that took."""
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    answers = CounterMetricFamily(
        "skyrl_http_answers", "Answers; route - is a refused or unknown path", labels=["method", "route", "status"]
    )
    for (method, route, status), count in sorted(traffic.answers.items()):
        answers.add_metric([method, route, str(status)], count)
    yield answers
    durations = HistogramMetricFamily("skyrl_http_seconds", "Seconds from request to answer", labels=["route"])
    for route in sorted(traffic.durations):
        durations.add_metric([route], traffic.buckets(route), traffic.seconds[route])
    yield durations


def _steps(steps: StepTimes) -> Metric:
    from prometheus_client.core import SummaryMetricFamily

    found = SummaryMetricFamily("skyrl_start_step_seconds", "Seconds of the steps of starts", labels=["step"])
    for step in STEPS:
        found.add_metric([step], steps.counts[step], steps.seconds[step])
    return found
