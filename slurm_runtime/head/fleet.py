"""What is known of one node of the fleet, and what do people read of it? Pure: a change is another value."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from slurm_runtime.node_models import BEAT_S, NodeAnswer, NodeFacts, NodeWish

QUIET_S = 3 * BEAT_S  # of silence, until a node gets no new sandboxes


class Standing(str, enum.Enum):
    """What a node is to the head; the words of GET /nodes."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    SILENT = "silent"
    LOST = "lost"
    LEFT = "left"


ENDED = frozenset({Standing.LOST, Standing.LEFT})


@dataclass(frozen=True)
class Node:
    """One node at one moment.

    ``heard_at`` is when it last said anything, by the head's monotonic clock. ``facts`` are what it last said of
    itself, None until it was heard out. ``wanted`` is why the head has it drained; ``end`` and ``reason`` say that it
    is lost or has left, and why.
    """

    name: str
    url: str
    boot: str
    heard_at: float
    job: str = ""
    until: float | None = None
    facts: NodeFacts | None = None
    images: frozenset[str] = field(default_factory=frozenset)
    wanted: str = ""
    end: Standing | None = None
    reason: str = ""

    @property
    def called(self) -> str:
        """How sentences name it: ``node cpu-b (job 123_4)``."""
        return f"node {self.name} (job {self.job})" if self.job else f"node {self.name}"

    @property
    def is_here(self) -> bool:
        """Neither lost nor gone."""
        return self.end is None

    def standing(self, now: float) -> Standing:
        if self.end is not None:
            return self.end
        if now - self.heard_at > QUIET_S:
            return Standing.SILENT
        if self.facts is None:
            return Standing.JOINING
        return Standing.DRAINING if self.wanted or self.facts.draining else Standing.READY

    def takes(self, now: float) -> bool:
        """Whether it may get new sandboxes."""
        return self.standing(now) is Standing.READY

    def why(self, now: float) -> str:
        """Why it takes none, as far as that needs a word."""
        standing = self.standing(now)
        if standing in ENDED:
            return self.reason
        if standing is Standing.SILENT:
            return f"nothing was heard of it for {now - self.heard_at:.0f} s"
        if standing is Standing.DRAINING:
            return self.wanted or (self.facts.reason if self.facts else "")
        return ""


class NameTaken(Exception):
    """Another node with this name is here."""


def joined(before: Node | None, wish: NodeWish, now: float) -> Node:
    """The node after it has registered: the same one again, another life of it, or a new one.

    One that was to be drained stays so in the next life that it has in the same job.

    ``NameTaken`` where a node of this name answers at another address, or where this life of it has left.
    """
    if before is not None and before.boot == wish.boot:
        if before.end is Standing.LEFT:
            raise NameTaken(f"{before.called} has left ({before.reason}); only a new life of it can join again")
        if before.end is None and before.url == wish.url:
            return replace(before, heard_at=max(now, before.heard_at), job=wish.job, until=wish.until)
    elif before is not None and before.url != wish.url and before.standing(now) not in {Standing.SILENT, *ENDED}:
        raise NameTaken(f"a node named {wish.name} is here already, at {before.url}; give this one another --node-name")
    is_same_job = before is not None and before.job == wish.job and before.end is not Standing.LEFT
    wanted = before.wanted if before is not None and is_same_job else ""
    return Node(wish.name, wish.url, wish.boot, now, wish.job, wish.until, wanted=wanted)


def heard(node: Node, facts: NodeFacts, now: float) -> Node:
    """The node after it has said how it is; images are told only where they have changed."""
    images = node.images if facts.images is None else frozenset(facts.images)
    until = node.until if facts.until is None else facts.until
    return replace(node, facts=facts, images=images, until=until, heard_at=max(now, node.heard_at))


def ended(node: Node, end: Standing, reason: str) -> Node:
    """The node once it is lost or has left, for ``reason``."""
    return replace(node, end=end, reason=reason)


def wanted(node: Node, reason: str) -> Node:
    """The node once the head has it drained; the first reason stays."""
    return replace(node, wanted=node.wanted or " ".join(reason.split()) or "on request")


def shifted(node: Node, seconds: float) -> Node:
    """The node as if it had been heard of so much later."""
    return replace(node, heard_at=node.heard_at + seconds)


def line_of(node: Node, living: int, trouble: str, now: float) -> NodeAnswer:
    """A node as GET /nodes tells it; ``trouble`` is why it was not heard out when it was asked last."""
    facts = node.facts
    return NodeAnswer(
        name=node.name,
        job=node.job,
        url=node.url,
        state=node.standing(now).value,
        reason=node.why(now) or trouble,
        slots=facts.slots if facts else 0,
        used=facts.used if facts and node.is_here else 0,
        sandboxes=living,
        images=len(node.images),
        until=node.until,
        heard_s_ago=round(max(0.0, now - node.heard_at), 1),
    )
