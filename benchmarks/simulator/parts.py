"""The parts of the benchmark of the head: one question each, with a head and a simulator of its own."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from benchmarks.simulator.figures import Spread, Summary, Times, overtaken, summary, waits_by_group
from benchmarks.simulator.load import Plan, Start
from benchmarks.simulator.stage import Process, Stage, until

JOINED_S = 60.0
BOUND_MS = 100.0
LOST_S = 60.0
AROUND_S = 0.4  # that a start and a stop take
FEW_SLOTS = 4  # of each node, so that starts have to wait at a rate that the head can carry
MOST_IDS = 200  # in one GET /sessions/batch


@dataclass(frozen=True)
class Setting:
    """How much of everything: nodes, slots of each, seconds of a load, starts a second to begin with."""

    nodes: int = 200
    slots: int = 64
    seconds: float = 20.0
    step: float = 50.0
    most: float = 1000.0

    @property
    def hold_s(self) -> float:
        """How long a client keeps its sandbox where nothing else is said."""
        return min(2.0, self.seconds / 5)


@dataclass(frozen=True)
class Loaded:
    """One load: its rate, the number of nodes, the outcome, and what each process used of a CPU meanwhile."""

    nodes: int
    rate: float
    summary: Summary
    head_ms: float
    simulator_ms: float
    head_busy: float
    others_busy: float


@dataclass(frozen=True)
class Cluster:
    """A head with simulated nodes that have joined it."""

    stage: Stage
    head: Process
    simulator: Process

    def nodes(self) -> dict[str, str]:
        """States by name, as the head sees them."""
        return {node["name"]: node["state"] for node in self.head.ask("GET", "/nodes")["nodes"]}

    def plan(self, rate: float, seconds: float, hold_s: float, prefix: str) -> Plan:
        return Plan((self.head.url,), self.head.key, rate, seconds, hold_s, prefix)

    def times(self) -> Times:
        found: Times = self.simulator.ask("GET", "/times")
        return found

    def add(self, count: int) -> None:
        """Nodes join; return when the head has heard them out."""
        names = self.simulator.ask("POST", f"/add?count={count}")["nodes"]

        def joined() -> bool:
            states = self.nodes()
            return all(states.get(name) == "ready" for name in names)

        until(joined, JOINED_S, "not all simulated nodes were ready at the head, see simulator.log")


@contextlib.contextmanager
def cluster(stage: Stage, nodes: int, slots: int) -> Iterator[Cluster]:
    with stage.head() as head, stage.simulator(head.url, slots) as simulator:
        made = Cluster(stage, head, simulator)
        made.add(nodes)
        head.ask("GET", "/list")  # a new head lets it wait until the nodes of one before it had time to come back
        yield made


def loaded(cluster: Cluster, nodes: int, plan: Plan) -> tuple[Loaded, list[Start], Times]:
    """What a load costs."""
    busy = _Busy(cluster.head, cluster.simulator)
    with cluster.stage.clients(plan) as clients:
        starts = clients.outcome()
        head_s, simulator_s, whole_s = busy.spent()
    times = cluster.times()
    each = 1000 / max(1, len(starts))
    found = Loaded(
        nodes,
        plan.rate,
        summary(starts, times),
        head_s * each,
        simulator_s * each,
        head_s / whole_s,
        simulator_s / whole_s,
    )
    return found, starts, times


class _Busy:
    """CPU seconds of two processes since now."""

    def __init__(self, head: Process, simulator: Process) -> None:
        self.head, self.simulator = head, simulator
        self.began = (head.cpu_s(), simulator.cpu_s(), time.monotonic())

    def spent(self) -> tuple[float, float, float]:
        now = (self.head.cpu_s(), self.simulator.cpu_s(), time.monotonic())
        head_s, simulator_s, whole_s = (after - before for after, before in zip(now, self.began, strict=True))
        return head_s, simulator_s, whole_s


# Without the head: what the simulator and the clients cost themselves.


def raw(stage: Stage, setting: Setting, rate: float) -> Loaded:
    """Clients that ask the nodes themselves, in turn."""
    with stage.simulator("none", setting.slots) as simulator:
        simulator.ask("POST", f"/add?count={setting.nodes}")
        urls = tuple(node["url"] for node in simulator.ask("GET", "/nodes").values())
        plan = Plan(urls, simulator.key, rate, setting.seconds, setting.hold_s, "raw")
        alone = Cluster(stage, simulator, simulator)
        return loaded(alone, setting.nodes, plan)[0]


# How many starts a second?


def steps(stage: Stage, setting: Setting) -> list[Loaded]:
    """Ever higher rates, until one is missed: a start fails, or the head adds 100 ms to one in a hundred."""
    found: list[Loaded] = []
    with cluster(stage, setting.nodes, setting.slots) as made:
        rate = setting.step
        while rate <= setting.most and (not found or is_kept(found[-1])):
            plan = made.plan(rate, setting.seconds, setting.hold_s, f"rate-{rate:g}")
            found.append(loaded(made, setting.nodes, plan)[0])
            rate += setting.step
    return found


def is_kept(found: Loaded) -> bool:
    """Whether the head keeps up with a rate. Pure."""
    return not found.summary.failed and found.summary.added.p99 < BOUND_MS


def highest(found: Sequence[Loaded]) -> float:
    """The highest rate that was kept; 0 where none was. Pure."""
    return max((one.rate for one in found if is_kept(one)), default=0.0)


# How does the cost grow with the nodes?


@dataclass(frozen=True)
class Growth:
    """The same load on so many nodes, and what the head used of a CPU without any load."""

    nodes: int
    load: Loaded
    idle_busy: float


def growth(stage: Stage, setting: Setting, counts: Sequence[int], rate: float) -> list[Growth]:
    found = []
    for nodes in counts:
        with cluster(stage, nodes, setting.slots) as made:
            busy = _Busy(made.head, made.simulator)
            time.sleep(setting.seconds / 4)
            head_s, _, whole_s = busy.spent()
            load, _, _ = loaded(made, nodes, made.plan(rate, setting.seconds, 0.5, f"grow-{nodes}"))
            found.append(Growth(nodes, load, head_s / whole_s))
    return found


# All slots at once.


@dataclass(frozen=True)
class Full:
    """As many sandboxes as there are slots, all held at once."""

    wanted: int
    held: int
    listed: int
    seconds: float
    list_ms: float
    nodes_ms: float
    look: Spread
    empty_mb: float
    full_mb: float
    after_mb: float
    summary: Summary


def full(stage: Stage, setting: Setting, rate: float) -> Full:
    wanted = setting.nodes * setting.slots
    with cluster(stage, setting.nodes, setting.slots) as made:
        empty_mb, began = made.head.pss_mb(), time.monotonic()
        with stage.clients(made.plan(rate, wanted / rate, 0.0, "full")) as clients:
            held, seconds = clients.held(), time.monotonic() - began
            list_ms, listed = _timed_ms(lambda: int(made.head.ask("GET", "/list")["total"]))
            nodes_ms, _ = _timed_ms(lambda: len(made.nodes()))
            full_mb = made.head.pss_mb()
            clients.say("release")
            starts = clients.outcome()
        found = summary(starts, made.times())
        after_mb = made.head.pss_mb()
    return Full(len(starts), held, listed, seconds, list_ms, nodes_ms, found.look, empty_mb, full_mb, after_mb, found)


def _timed_ms(ask: Callable[[], int]) -> tuple[float, int]:
    began = time.perf_counter()
    found = ask()
    return 1000 * (time.perf_counter() - began), found


# More starts than slots.


@dataclass(frozen=True)
class Fairness:
    """Two groups of clients, one with three times as many starts; most of them wait in the head's line."""

    slots: int
    rate: float
    waiting: int
    waits: dict[str, Spread]
    placed: int
    overtaken: int
    summary: Summary


def fairness(stage: Stage, setting: Setting) -> Fairness:
    slots = min(FEW_SLOTS, setting.slots)
    rate = 1.3 * setting.nodes * slots / (2 * setting.hold_s + AROUND_S)
    with cluster(stage, setting.nodes, slots) as made:
        plan = replace(
            made.plan(rate, setting.seconds, 2 * setting.hold_s, "fair"), groups=("many", "many", "many", "few")
        )
        with stage.clients(plan) as clients:
            time.sleep(setting.seconds)
            waiting = int(made.head.ask("GET", "/nodes")["waiting"])
            starts = clients.outcome()
        times = made.times()
    placed = sum(start.session in times for start in starts)
    waits = waits_by_group(starts, times)
    return Fairness(
        setting.nodes * slots, rate, waiting, waits, placed, overtaken(starts, times), summary(starts, times)
    )


# Nodes that come and go.


@dataclass(frozen=True)
class Churn:
    """A node leaves and another joins every second under load; what it cost those who were not there."""

    rate: float
    seconds: float
    changed: int
    there: int
    bystanders: int
    why: dict[str, int]
    memory_mb: list[float]
    summary: Summary


def churn(stage: Stage, setting: Setting, rate: float) -> Churn:
    with cluster(stage, setting.nodes, setting.slots) as made:
        memory, gone, changed = [made.head.pss_mb()], set[str](), 0
        with stage.clients(made.plan(rate, 3 * setting.seconds, setting.hold_s, "churn")) as clients:
            for second in range(1, int(3 * setting.seconds) + 1):
                left = made.simulator.ask("POST", "/leave?count=1")["nodes"]
                gone.update(itertools.chain.from_iterable(left.values()))
                made.simulator.ask("POST", "/add?count=1")
                changed += 1
                if second % max(1, int(setting.seconds / 2)) == 0:
                    memory.append(made.head.pss_mb())
                time.sleep(1.0)
            starts = clients.outcome()
        times = made.times()
    bystanders = [start for start in starts if start.detail and start.session not in gone]
    found = summary(starts, times)
    return Churn(
        rate,
        3 * setting.seconds,
        changed,
        len(gone),
        len(bystanders),
        summary(bystanders, times).why,
        memory,
        found,
    )


# Nodes that are lost.


@dataclass(frozen=True)
class Loss:
    """Nodes that were lost at the same moment, in one way, and what the head told of sandboxes there and elsewhere."""

    way: str
    nodes: int
    there: int
    told: int
    first_s: float
    last_s: float
    elsewhere: int
    failed_elsewhere: int
    reason: str


def losses(stage: Stage, setting: Setting, rate: float) -> list[Loss]:
    """A tenth of the nodes killed, then as many silent, half of all slots in use."""
    wanted, count = setting.nodes * setting.slots / 2, max(1, setting.nodes // 10)
    found = []
    with (
        cluster(stage, setting.nodes, setting.slots) as made,
        stage.clients(made.plan(rate, wanted / rate, 0.0, "loss")) as clients,
    ):
        clients.held()
        living = {one["session_id"] for one in made.head.ask("GET", "/list")["runtimes"]}
        for way in ("kill", "mute"):
            found.append(_loss(made, way, count, living))
            living -= _failed(made.head, living).keys()
        clients.say("release")
        clients.outcome()
    return found


def _loss(made: Cluster, way: str, count: int, living: Collection[str]) -> Loss:
    nodes = made.simulator.ask("POST", f"/{way}?count={count}")["nodes"]
    began, there = time.monotonic(), set(itertools.chain.from_iterable(nodes.values()))
    first_s = last_s = 0.0
    failed: dict[str, str] = {}
    while len(failed) < len(there) and time.monotonic() - began < LOST_S:
        failed = _failed(made.head, there)
        last_s = time.monotonic() - began
        first_s = first_s or (last_s if failed else 0.0)
        time.sleep(0.1)
    elsewhere = set(living) - there
    reason = next(iter(failed.values()), "")
    wrong = len(_failed(made.head, elsewhere))
    return Loss(way, len(nodes), len(there), len(failed), first_s, last_s, len(elsewhere), wrong, reason)


def _failed(head: Process, sessions: Collection[str]) -> dict[str, str]:
    """Those of the sessions that are not ready, with what the head says of them."""
    found: dict[str, str] = {}
    names = sorted(sessions)
    for at in range(0, len(names), MOST_IDS):
        query = urlencode([("ids", name) for name in names[at : at + MOST_IDS]])
        for one in head.ask("GET", f"/sessions/batch?{query}"):
            if one["pod_status"] != "ready":
                found[one["session_id"]] = " ".join(one["events"])
    return found
