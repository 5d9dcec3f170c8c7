"""Have enough nodes joined the head, and can they still? What a runtime on several nodes waits for before it is ready.

Workers may wait for hours in Slurm's queue, which is no reason to give up. What is: that all together have too little
room, since some have ended or were cancelled; or that all of them run, and say nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from slurm.lib.api_server_child import ApiServer
from slurm.lib.errors import EXIT_TIMEOUT, EXIT_UNAVAILABLE
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.lookout import Lookout
from slurm.lib.partner import NOT_LAUNCHED
from slurm.lib.run_record import workers_of
from slurm.lib.runtime_client import RuntimeClient
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.scheduler import JobState, JobStatus, Slurm
from slurm.lib.supervisor import Event, Failed, Joined
from slurm.lib.worker_plan import has_arrays, slots_wanted
from slurm.lib.worker_steps import WorkerSteps

LOOK_EVERY_S = 0.4
ASK_EVERY_S = 10.0  # Slurm; sites forbid polling their controller often
TAKES_SANDBOXES, IS_OVER = "ready", frozenset({"lost", "left"})


@dataclass(frozen=True)
class JoinedNode:
    """A node as its head shows it."""

    name: str
    job: str
    state: str
    slots: int
    reason: str = ""


def joined_nodes(said: object) -> tuple[JoinedNode, ...]:
    """The nodes in a head's answer to GET /nodes; empty where it says nothing of the kind."""
    rows = said.get("nodes") if isinstance(said, Mapping) else None
    found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return tuple(map(_joined_node, found))


def _joined_node(row: Mapping[str, object]) -> JoinedNode:
    slots = row.get("slots")
    name, job, state, reason = (str(row.get(name, "")) for name in ("name", "job", "state", "reason"))
    return JoinedNode(name, job, state, slots if isinstance(slots, int) else 0, reason)


@dataclass(frozen=True)
class Hope:
    """What may still join: workers that are pending, and those that run, by their ids; steps by their nodes.

    ``is_known``: whether anything is known of them; nothing is of workers that a person submits by hand. ``ended``: how
    those ended that cannot join, in Slurm's words by their ids.
    """

    pending: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    is_known: bool = True
    ended: tuple[tuple[str, str], ...] = ()

    def beside(self, nodes: tuple[JoinedNode, ...]) -> Hope:
        """The same without those that have joined."""
        there = [node for node in nodes if node.state == TAKES_SANDBOXES or node.state in IS_OVER]
        known = {name for node in there for name in (node.job, node.name)}
        running = tuple(one for one in self.running if one not in known)
        ended = tuple((one, words) for one, words in self.ended if one not in known)
        return Hope(self.pending, running, self.is_known, ended)


def hope_of(tasks: Mapping[str, JobStatus]) -> Hope:
    """What Slurm's word about the tasks of worker arrays lets hope for."""
    by_state = {state: tuple(task for task, status in tasks.items() if status.state is state) for state in JobState}
    ended = tuple((task, status.words) for task, status in tasks.items() if status.state.is_final)
    return Hope(by_state[JobState.PENDING] + by_state[JobState.UNKNOWN], by_state[JobState.RUNNING], ended=ended)


def verdict(wanted: int, each: int, nodes: tuple[JoinedNode, ...], hope: Hope, still_s: float, most_s: float) -> str:
    """Why it is of no use to wait for ``wanted`` slots any longer; empty where it is. Pure.

    ``each`` is the slots of a node; for ``still_s`` seconds nothing has changed, of ``most_s`` at most where nothing is
    in the queue any more.
    """
    slots = sum(node.slots for node in nodes if node.state == TAKES_SANDBOXES)
    left = hope.beside(nodes)
    if not hope.is_known or left.pending:
        return ""
    have = f"{slots} of {wanted} slots have joined"
    over = [(node.name, node.reason or node.state) for node in nodes if node.state in IS_OVER]
    ends = "; ".join(f"{name}: {words}" for name, words in (*over, *left.ended))
    if slots + each * len(left.running) < wanted:
        told = f" ({ends})" if ends else ""
        name, question = NOT_LAUNCHED
        look = question if name in ends else "; read the logs worker_*.err"
        return f"{have}, and the workers that are left cannot bring the rest{told}{look}"
    if still_s > most_s:
        silent = ", ".join(left.running)
        return f"{have}; the workers {silent} run, and have not joined for {most_s:g} s (RUNTIME_READY_TIMEOUT)"
    return ""


@dataclass
class JoinWatch:
    """Watches what joins a head, until it is enough; ``steps`` are workers that are this job's."""

    job: JobContext
    head: ApiServer
    steps: WorkerSteps
    clock: Callable[[], float] = time.monotonic
    _said: str = field(default="", init=False)
    _hope: Hope | None = field(default=None, init=False)
    _asked_at: float = field(default=float("-inf"), init=False)
    _changed_at: float = field(init=False)
    _doubts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._changed_at = self._begun_at = self.clock()
        self._wanted = slots_wanted(self.job.settings)

    @contextlib.contextmanager
    def asking(self) -> Iterator[Callable[[], Event | None]]:
        """A function that says at once what the last looks have come to."""
        lookout: Lookout[Event] = Lookout(self.look, LOOK_EVERY_S)
        with lookout:
            yield lookout.seen

    def look(self) -> Event | None:
        """Ask the head, and from time to time Slurm."""
        answer = RuntimeClient(self.head.local_url, self.head.key).ask("GET", "/nodes")
        if not answer.ok:
            return None
        nodes = joined_nodes(answer.body)
        slots = sum(node.slots for node in nodes if node.state == TAKES_SANDBOXES)
        self._tell(nodes, slots)
        return Joined() if slots >= self._wanted else self._doubt(nodes)

    def _tell(self, nodes: tuple[JoinedNode, ...], slots: int) -> None:
        """Say what has joined, where that is news."""
        who = ", ".join(f"{node.name} ({node.slots})" for node in nodes if node.state == TAKES_SANDBOXES)
        news = f"{slots} of {self._wanted} slots have joined: {who or 'no node yet'}"
        if news != self._said:
            self._said, self._changed_at = news, self.clock()
            log.info("%s", news)

    def _doubt(self, nodes: tuple[JoinedNode, ...]) -> Event | None:
        """Whether the rest can still come; believed when it is seen twice."""
        now, settings = self.clock(), self.job.settings
        if now - self._begun_at > settings.training_complete_timeout:
            reason = f"{self._said}; TRAINING_COMPLETE_TIMEOUT={settings.training_complete_timeout} allows no more"
            return Failed(EXIT_TIMEOUT, reason)
        if now - self._asked_at < ASK_EVERY_S:
            return None
        self._asked_at = now
        hope = self._asked()
        if self._hope is None or hope.pending != self._hope.pending:
            self._changed_at = now
        self._hope = hope
        most_s = settings.runtime_ready_timeout
        why = verdict(self._wanted, sandbox_room(settings).slots, nodes, hope, now - self._changed_at, most_s)
        self._doubts = self._doubts + 1 if why else 0
        return Failed(EXIT_UNAVAILABLE, why) if self._doubts > 1 else None

    def _asked(self) -> Hope:
        """What may still join, by Slurm's word, or by the steps' own."""
        if not has_arrays(self.job.settings):
            return Hope(running=self.steps.living())
        arrays = workers_of(self.job.directory, self.job.job_id)
        slurm = self.job.scheduler
        if not arrays or not isinstance(slurm, Slurm):
            return Hope(is_known=False)
        return hope_of(slurm.statuses([task for array in arrays for task in array.task_ids]))
