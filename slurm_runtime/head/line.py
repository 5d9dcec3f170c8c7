"""Who gets the next free slots of the fleet? One line for all nodes, and what is on its way to each of them."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from slurm_runtime.deadlines import within
from slurm_runtime.head.choice import Room, Wanted, choose, grants
from slurm_runtime.head.fleet import Node


@dataclass(eq=False)
class Claim:
    """Slots of a node that one start has been promised, until the node's own count has them.

    ``at`` is the number of the change at which the node has answered the start; None until it has.
    """

    node: str
    session_id: str
    units: int
    image: str
    at: int | None = None


@dataclass(eq=False)
class Waiter:
    """A start in the line. Its place is its number, also where it comes back because a node has refused it."""

    number: int
    session_id: str
    wanted: Wanted
    granted: asyncio.Future[Claim]


@dataclass
class Line:
    """First come, first served, among the nodes that it was told of."""

    _rooms: dict[str, Room] = field(default_factory=dict)
    _claims: dict[str, list[Claim]] = field(default_factory=dict)
    _waiters: list[Waiter] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def number(self) -> int:
        """A place at the end of the line."""
        return next(self._numbers)

    async def claim(self, number: int, session_id: str, wanted: Wanted, timeout_s: float) -> Claim:
        """Slots for a start, as soon as a node has them; ``asyncio.TimeoutError`` if none has in time."""
        room = choose(self._rooms.values(), wanted) if not self._waiters else None
        if room is not None:
            room.free -= wanted.units
            return self._promise(room, session_id, wanted)
        waiter = Waiter(number, session_id, wanted, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiters, waiter, key=lambda one: one.number)
        self.grant()
        try:
            return await within(timeout_s, asyncio.shield(waiter.granted))
        except BaseException:
            self._withdraw(waiter)
            raise

    def follow(self, node: str, session_id: str) -> Claim:
        """No slots, but the same to hold in hand, for a session that lives on this node already."""
        claim = Claim(node, session_id, 0, "")
        self._claims.setdefault(node, []).append(claim)
        return claim

    def release(self, claim: Claim) -> None:
        """The start has come to nothing: whoever waits gets the slots."""
        if claim in self._claims.get(claim.node, ()):
            self._claims[claim.node].remove(claim)
            if claim.node in self._rooms:
                self._rooms[claim.node].free += claim.units
            self.grant()

    def counted(self, node: str, upto: int, leased: Collection[str], complete: bool) -> None:
        """A node has told of itself up to a change, with sandboxes of the ``leased`` sessions: its count has these.

        Where that was all there is (``complete``), it has those too that it answered in a life before.
        """
        self._claims[node] = [
            claim
            for claim in self._claims.get(node, ())
            if claim.session_id not in leased and (claim.at is None or (claim.at > upto and not complete))
        ]

    def has(self, node: str) -> bool:
        """Whether starts are given to this node."""
        return node in self._rooms

    def open(self, node: Node) -> None:
        """This node takes sandboxes, and has as many slots free as it says."""
        self._rooms[node.name] = room_of(node, self._claims.get(node.name, ()))
        self.grant()

    def shut(self, node: str) -> None:
        """This node takes no sandboxes, as it seems; those on their way to it may still arrive."""
        self._rooms.pop(node, None)

    def forget(self, node: str) -> None:
        """A node is lost or has left, with all that was on its way to it."""
        self.shut(node)
        self._claims.pop(node, None)

    def grant(self) -> None:
        """Give free slots to those who wait."""
        if not self._waiters:
            return
        waiters = [waiter for waiter in self._waiters if not waiter.granted.done()]
        served = set()
        for place, room in grants([waiter.wanted for waiter in waiters], list(self._rooms.values())):
            waiter = waiters[place]
            waiter.granted.set_result(self._promise(room, waiter.session_id, waiter.wanted))
            served.add(waiter)
        self._waiters = [waiter for waiter in waiters if waiter not in served]

    def _promise(self, room: Room, session_id: str, wanted: Wanted) -> Claim:
        """For slots that were taken out of the room already."""
        claim = Claim(room.node, session_id, wanted.units, wanted.image)
        self._claims.setdefault(room.node, []).append(claim)
        room.coming.add(wanted.image)
        return claim

    def _withdraw(self, waiter: Waiter) -> None:
        if waiter.granted.done():
            self.release(waiter.granted.result())
        elif waiter in self._waiters:
            self._waiters.remove(waiter)
            self.grant()


def room_of(node: Node, claims: Iterable[Claim]) -> Room:
    """What a node has free, less what was promised. Pure."""
    facts = node.facts
    assert facts is not None, "a node that takes sandboxes has been heard out"
    promised, coming = 0, set()
    for claim in claims:
        promised += claim.units
        coming.add(claim.image)
    return Room(node.name, facts.slots, facts.slots - facts.used - facts.waiting - promised, node.images, coming)
