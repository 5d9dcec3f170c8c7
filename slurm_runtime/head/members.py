"""Which nodes are here? They join, are followed, drained, given up when they fall silent, and leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from slurm_runtime.background import Background
from slurm_runtime.head.answers import Known, packed
from slurm_runtime.head.directory import Directory, Double, News
from slurm_runtime.head.feed import Feed
from slurm_runtime.head.fleet import ENDED, Node, Standing, ended, heard, joined, shifted, wanted
from slurm_runtime.head.line import Line
from slurm_runtime.head.link import CutOff, Link, NotSent, Reply
from slurm_runtime.logs import log
from slurm_runtime.node_models import BEAT_S, PATIENCE_S, DrainRequest, NodeFacts, NodeWish
from slurm_runtime.podman import EngineUnreachable

LOOK_S = 0.5  # between looks whether a node has fallen silent
MOST_POLLS_A_SECOND = 300  # of all nodes together, where nobody waits; each costs as much as a client's
POLLS_IN_PATIENCE = 3
ENDED_KEPT = 1000  # nodes that are lost or have left, for GET /nodes
SETTLING_S = 10.0  # at most, after the first beats, until the nodes that were heard of are heard out


class UnknownNode(Exception):
    """No node of this name has ever joined."""


class NodeAway(EngineUnreachable):
    """The node that has the sandbox does not answer."""


@dataclass(frozen=True)
class Tie:
    """What ties the head to one life of a node: the connections, the feed, and the task that follows it."""

    link: Link
    feed: Feed
    task: asyncio.Task[None]


class Members:
    """The nodes. ``run`` it in the background; ``close`` lets go of all of them, which go on by themselves.

    ``gather_s`` is how long the first requests wait for nodes of a head before this one to be heard of.
    """

    def __init__(
        self,
        key: str,
        directory: Directory,
        background: Background,
        gather_s: float = 2 * BEAT_S,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.directory = directory
        self.line = Line()
        self._key = key
        self._background = background
        self._gather_s = gather_s
        self._patience_s = patience_s
        self._clock = clock
        self._ties: dict[str, Tie] = {}
        self._stopping: dict[tuple[str, str], asyncio.Task[None]] = {}  # by node and session
        self._began = clock()
        self._settled = False

    # What others ask.

    def now(self) -> float:
        """The clock by which nodes are heard of."""
        return self._clock()

    def here(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_here]

    def taking(self) -> list[Node]:
        """Those that take new sandboxes."""
        now = self._clock()
        return [node for node in self.nodes.values() if node.takes(now)]

    def most_slots(self) -> int:
        """Of the largest node that is here, 0 before one was heard out."""
        return max((node.facts.slots for node in self.here() if node.facts), default=0)

    def get(self, name: str) -> Node:
        if name not in self.nodes:
            raise UnknownNode(f"no node named {name!r} has joined; GET /nodes tells those that have")
        return self.nodes[name]

    def is_here(self, name: str) -> bool:
        node = self.nodes.get(name)
        return node is not None and node.is_here

    def upto(self, name: str) -> int:
        """The number of the last change that was heard of this node."""
        return self._ties[name].feed.upto if name in self._ties else -1

    def trouble(self, name: str) -> str:
        """Why the node did not answer when it was asked last; empty where it did."""
        return self._ties[name].feed.trouble if name in self._ties else ""

    async def ask(self, name: str, method: str, path: str, body: bytes | None = None, again: bool = True) -> Reply:
        """A node's answer to what may be asked twice; ``NodeAway`` where there is none."""
        tie = self._ties.get(name)
        if tie is None:
            raise NodeAway(f"{self.get(name).called} is not here any more: {self.get(name).reason}")
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            return await tie.link.ask(method, path, body, headers)
        except (NotSent, CutOff) as problem:
            if again and self.is_here(name):
                return await self.ask(name, method, path, body, again=False)
            raise NodeAway(f"{self.get(name).called} does not answer: {problem}; ask again") from None

    def link(self, name: str) -> Link | None:
        """The connections to a node that is here."""
        return self._ties[name].link if name in self._ties else None

    async def heard_upto(self, name: str, upto: int, timeout_s: float = 1.0) -> bool:
        """Whether a change of a node was heard in time."""
        return name in self._ties and await self._ties[name].feed.until(upto, timeout_s)

    async def settled(self) -> bool:
        """True once each node that a head before this one knew is heard out, as far as that can be awaited."""
        while not self._settled:
            now = self._clock()
            waited_s = now - self._began
            all_out = all(node.facts is not None for node in self.here())
            self._settled = waited_s >= self._gather_s + SETTLING_S or (waited_s >= self._gather_s and all_out)
            if not self._settled:
                await asyncio.sleep(0.02)
        return True

    # What happens to nodes.

    def _become(self, node: Node) -> Node:
        """Know a node as it is now, and whether the line may give it starts."""
        self.nodes[node.name] = node
        self.line.open(node) if node.takes(self._clock()) else self.line.shut(node.name)
        return node

    def join(self, wish: NodeWish) -> Node:
        """A node registers, again or anew; ``NameTaken`` where another one has its name."""
        before = self.nodes.get(wish.name)
        node = joined(before, wish, self._clock())
        is_same = before is not None and before.is_here and (before.url, before.boot) == (node.url, node.boot)
        if not is_same:
            log.info("%s joins at %s", node.called, node.url)
            self._untie(wish.name)
            self._tie(node)
            self._forget_oldest()
        if not is_same or not self.line.has(node.name):  # else nothing of it is another than before
            return self._become(node)
        self.nodes[node.name] = node
        return node

    def leave(self, name: str, reason: str) -> Node:
        """A node says that it ends."""
        node = self.get(name)
        if node.is_here:
            self._end(node, Standing.LEFT, " ".join(reason.split()) or "it has ended")
        return self.nodes[name]

    async def drain(self, name: str, reason: str) -> Node:
        """A node gets no new sandboxes any more; it is told so, again if that fails now."""
        node = self.get(name)
        if not node.is_here:
            raise NodeAway(f"{node.called} is not here any more: {node.reason}")
        node = self._become(wanted(node, reason))
        log.info("%s drains: %s", node.called, node.wanted)
        await self._pass_drain_on(name)
        return self.nodes[name]

    async def run(self) -> None:
        """Give up nodes that are silent for too long; ends only by cancellation."""
        looked = self._clock()
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._clock()
            asleep_s = max(0.0, now - looked - LOOK_S)
            if asleep_s > LOOK_S:  # this head stood still: nodes are not silent for that
                self.nodes = {name: shifted(node, asleep_s) for name, node in self.nodes.items()}
            looked = now
            for node in self.here():
                if now - node.heard_at > self._patience_s:
                    self._end(node, Standing.LOST, f"nothing was heard of it for {now - node.heard_at:.0f} s")
                elif node.takes(now) != self.line.has(node.name):
                    self._become(node)

    async def close(self) -> None:
        ties, self._ties = list(self._ties.values()), {}
        for tie in ties:
            tie.task.cancel()
        await asyncio.gather(*(tie.task for tie in ties), return_exceptions=True)
        for tie in ties:
            await tie.link.close()

    def _tie(self, node: Node) -> None:
        link = Link(node.url, self._key)

        def hear(facts: NodeFacts, news: News) -> None:
            self._hear(node.name, facts, news)

        feed = Feed(node.name, link, hear, self._rest_s, self._patience_s / POLLS_IN_PATIENCE)
        self._ties[node.name] = Tie(link, feed, self._background.own(feed.follow()))

    def _untie(self, name: str) -> None:
        tie = self._ties.pop(name, None)
        if tie is not None:
            tie.task.cancel()
            self._background.start(tie.link.close())

    def _rest_s(self) -> float:
        return 0.0 if self.line.waiting else len(self._ties) / MOST_POLLS_A_SECOND

    def _hear(self, name: str, facts: NodeFacts, news: News) -> None:
        before = self.nodes[name]
        node = heard(before, facts, self._clock())
        if before.facts is None:
            log.info("%s is heard out: %d slots, %d sandboxes", node.called, facts.slots, len(news.sandboxes))
        doubles = self.directory.hear(name, news)
        leased = {one.session_id for one in news.sandboxes if one.has_url and not one.is_dead}
        self.line.counted(name, news.upto, leased, news.complete)
        self._become(node)
        for double in doubles:
            self.resolve(double)
        if node.wanted and not facts.draining:
            self._background.start(self._pass_drain_on(name))

    def resolve(self, double: Double) -> None:
        """Stop what the head has given up, or what a session has beside its sandbox."""
        extra, kept = double.extra, double.kept
        log.warning(
            "sandbox %s of session %s on node %s is stopped: %s",
            extra.runtime_id,
            extra.session_id,
            extra.node,
            "it was given up"
            if extra.runtime_id == kept.runtime_id
            else f"the session has another on node {kept.node}",
        )
        place = (extra.node, extra.session_id)
        task = self._stopping[place] = self._background.start(self.stop_there(extra))

        def over(_task: object) -> None:
            if self._stopping.get(place) is task:
                del self._stopping[place]

        task.add_done_callback(over)

    async def stopped_there(self, node: str, session_id: str, timeout_s: float) -> None:
        """Wait until a node has stopped what it is to stop of a session: a start would find it, and lose it then."""
        task = self._stopping.get((node, session_id))
        if task is not None:
            await asyncio.wait([task], timeout=max(0.0, timeout_s))

    async def stop_there(self, sandbox: Known) -> None:
        """Stop a sandbox that nobody waits for, as soon as its node answers; one of a lost node when that is back."""
        reply = await self.ask_patiently(sandbox.node, "POST", "/stop", packed({"runtime_id": sandbox.runtime_id}))
        if reply is not None and not reply.is_good and reply.status != 404:
            log.error("node %s does not stop %s: %s", sandbox.node, sandbox.runtime_id, reply.body[:300])

    async def ask_patiently(self, name: str, method: str, path: str, body: bytes | None = None) -> Reply | None:
        """A node's answer, whenever it comes; None once the node is lost or has left."""
        while self.is_here(name):
            try:
                return await self.ask(name, method, path, body)
            except NodeAway:
                await asyncio.sleep(LOOK_S)
        return None

    async def _pass_drain_on(self, name: str) -> None:
        body = DrainRequest(reason=self.nodes[name].wanted).model_dump_json().encode()
        reply = await self.ask(name, "POST", "/drain", body)
        if not reply.is_good:
            log.error("node %s answers POST /drain with %d: %s", name, reply.status, reply.body[:300])

    def _end(self, node: Node, end: Standing, reason: str) -> None:
        self.nodes[node.name] = ended(node, end, reason)
        verb = "was lost" if end is Standing.LOST else "left"
        sentence = f"{node.called} {verb}: {reason}"
        failed = self.directory.give_up(node.name, sentence)
        say = log.warning if failed or end is Standing.LOST else log.info
        say("%s; %d sandboxes have failed with it", sentence, failed)
        self.line.forget(node.name)
        self._untie(node.name)

    def _forget_oldest(self) -> None:
        gone = [name for name, node in self.nodes.items() if node.end in ENDED]
        for name in gone[: max(0, len(gone) - ENDED_KEPT)]:
            del self.nodes[name]
