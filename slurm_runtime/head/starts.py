"""From a request to a sandbox on some node: its place in the line, its node, and what happens when that one fails.

No session gets two sandboxes: while a start may have reached a node it is asked for again there, and only once that
node is lost or has left it goes to another one. What was surely not begun, because the node refused or could not be
connected to, goes to another node at once.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Coroutine, Iterator
from typing import Any
from urllib.parse import quote

from starlette.requests import Request

from slurm_runtime.background import Background
from slurm_runtime.entries import NeverFits, NoRoom, StoppedEarly, Stopping, TooSlow
from slurm_runtime.head.answers import BadNews, changed, known, packed, waiting
from slurm_runtime.head.choice import Wanted
from slurm_runtime.head.config import HeadConfig
from slurm_runtime.head.directory import Directory
from slurm_runtime.head.line import Claim
from slurm_runtime.head.link import CutOff, NotSent, Reply
from slurm_runtime.head.members import Members
from slurm_runtime.head.wish import StartWish
from slurm_runtime.logs import log
from slurm_runtime.node_models import WAIT
from slurm_runtime.routes_sandboxes import HungUp, until_gone

REFUSED_S = 1.0  # until a node that has refused a start may be asked for it again
AGAIN_S = 0.2  # between tries at a node that may have the sandbox
STOPPED_EARLY = 409
LONGEST_S = 600.0  # that a node may take over a start: it gives up by itself before
ALIASES_KEPT = 1000
NOBODY = ""  # the node of a sandbox that no node ever had


class Start:
    """One start under way, of however many clients ask for its session.

    ``stand_in`` is its runtime id until a node has given it one. ``node`` is where it was sent to last; ``is_sent``
    says that a node may have begun it, ``is_new`` that the session had no sandbox before, ``is_stopped`` that somebody
    has stopped its sandbox meanwhile.
    """

    def __init__(self, wish: StartWish, number: int, patience_s: float) -> None:
        self.wish = wish
        self.number = number
        self.patience_s = patience_s
        self.deadline = time.monotonic() + patience_s
        self.stand_in = secrets.token_hex(8)
        self.askers = 0
        self.node: str | None = None
        self.is_sent = False
        self.is_new = True
        self.is_read = False
        self.is_stopped = False
        self.task: asyncio.Task[Reply]

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


class Starts:
    """All starts that are under way."""

    def __init__(self, members: Members, directory: Directory, background: Background, config: HeadConfig) -> None:
        self.members = members
        self.directory = directory
        self.line = members.line
        self._background = background
        self._config = config
        self._under_way: dict[str, Start] = {}
        self._stand_ins: dict[str, Start] = {}
        self._aliases: dict[str, str] = {}  # of stand-ins that somebody has read
        self._ending: dict[str, asyncio.Task[Any]] = {}  # what a next start of the session waits for
        self._closing = False

    # What is read of them.

    def of_session(self, session_id: str) -> Start | None:
        return self._under_way.get(session_id)

    def placed_on(self, session_id: str) -> str | None:
        """The node that a start under way was sent to."""
        start = self._under_way.get(session_id)
        return start.node if start is not None else None

    def of_stand_in(self, runtime_id: str) -> Start | None:
        return self._stand_ins.get(runtime_id)

    def meant_by(self, runtime_id: str) -> str:
        """The runtime id that a node gave to what was read under a stand-in's."""
        return self._aliases.get(runtime_id, runtime_id)

    def under_way(self) -> Iterator[Start]:
        return iter(self._under_way.values())

    def told(self, start: Start) -> bytes:
        """What is answered of a start that no node has told of."""
        start.is_read = True
        wish = start.wish
        return packed(waiting(start.stand_in, wish.session_id, wish.image, self.reason(start)))

    def reason(self, start: Start) -> str:
        """What it waits for."""
        if start.node is not None:
            return f"is being started on node {start.node}"
        nodes = self.members.taking()
        if not nodes:
            return "waits for a node that takes sandboxes"
        slots = sum(node.facts.slots for node in nodes if node.facts)
        return f"waits for a free slot: {slots} on {len(nodes)} nodes are in use"

    # Starting.

    async def answer(self, wish: StartWish, request: Request) -> Reply:
        """What a node answers to the start; ``HungUp`` as soon as its client leaves, the start given up then."""
        start = self._enter(wish)
        start.askers += 1
        leaving = asyncio.create_task(until_gone(request))
        try:
            await asyncio.wait([start.task, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not leaving.done():
                leaving.cancel()
        if not leaving.cancelled() and leaving.done():
            self._hung_up(start)
            raise HungUp("the client closed its connection")
        if start.task.cancelled():
            raise self._stopping() if self._closing else StoppedEarly("the sandbox was stopped before it had started")
        return start.task.result()

    def note_stopped(self, session_id: str) -> None:
        """Somebody has stopped the session's sandbox."""
        start = self._under_way.get(session_id)
        if start is not None:
            start.is_stopped = True

    def stop(self, start: Start) -> None:
        """Stop one that was read under its stand-in's id: nothing of it is left, and its clients hear of it."""
        wish = start.wish
        told = waiting(start.stand_in, wish.session_id, wish.image, "")
        gone = changed(known(NOBODY, told, 0), 0, state="stopped", pod_status="not found", reason="stopped on request")
        self.directory.answered(gone)
        self._give_up(start)

    def close(self) -> None:
        """Start nothing more; whoever waits hears that the head is stopping."""
        self._closing = True
        for start in self._under_way.values():
            start.task.cancel()

    def _enter(self, wish: StartWish) -> Start:
        if self._closing:
            raise self._stopping()
        start = self._under_way.get(wish.session_id)
        if start is not None:
            return start
        config = self._config
        patience_s = config.string_patience_s if wish.is_string else config.list_patience_s
        start = Start(wish, self.line.number(), patience_s)
        self._under_way[wish.session_id] = self._stand_ins[start.stand_in] = start
        start.task = self._background.own(self._run(start))
        start.task.add_done_callback(lambda _task: self._ended(start))
        return start

    def _give_up(self, start: Start) -> None:
        """End it, which closes the connection to its node; whoever asks for the session from now on begins anew."""
        session_id = start.wish.session_id
        if self._under_way.get(session_id) is start:
            del self._under_way[session_id]
            self._next_waits_for(session_id, start.task)
        start.task.cancel()

    def _next_waits_for(self, session_id: str, task: asyncio.Task[Any]) -> None:
        def over(_task: object) -> None:
            if self._ending.get(session_id) is task:
                del self._ending[session_id]

        self._ending[session_id] = task
        task.add_done_callback(over)

    def _ended(self, start: Start) -> None:
        if self._under_way.get(start.wish.session_id) is start:
            del self._under_way[start.wish.session_id]
        self._stand_ins.pop(start.stand_in, None)
        if start.is_read:
            found = self.directory.of_session(start.wish.session_id)
            if found is not None:
                self._aliases[start.stand_in] = found.runtime_id
            if len(self._aliases) > ALIASES_KEPT:
                del self._aliases[next(iter(self._aliases))]
        gave_up = start.task.cancelled() or isinstance(start.task.exception(), TooSlow)
        if gave_up and start.is_sent and start.is_new and start.node is not None and not self._closing:
            self._clean_up(start.wish.session_id, start.node)

    def _hung_up(self, start: Start) -> None:
        start.askers -= 1
        if start.askers > 0:
            return
        log.warning("the client of session %s hung up during /start; stopping it", start.wish.session_id)
        if not start.task.done():
            self._give_up(start)
        elif not start.task.cancelled() and start.task.exception() is None and start.is_new and start.node:
            self._clean_up(start.wish.session_id, start.node)

    def _clean_up(self, session_id: str, node: str) -> None:
        """See to it that a start whose clients have left leaves nothing; another one of the session waits for that."""
        self._next_waits_for(session_id, self._background.own(self._leave_nothing(session_id, node)))

    async def _leave_nothing(self, session_id: str, node: str) -> None:
        reply = await self.members.ask_patiently(node, "GET", f"/sessions/{quote(session_id, safe='')}")
        if reply is None or not reply.is_good:
            return
        try:
            found = known(node, json.loads(reply.body), reply.upto)
        except (BadNews, ValueError) as problem:
            log.error("the sandbox of session %s, whose client left, may go on: %s", session_id, problem)
            return
        if not found.is_dead:
            await self.members.stop_there(found)

    async def _run(self, start: Start) -> Reply:
        """Try one node after the other until one answers; the claims that were made are given back on every path."""
        while start.left_s > 0 and (ending := self._ending.get(start.wish.session_id)) is not None:
            await asyncio.wait([ending], timeout=start.left_s)
        refused: set[str] = set()
        while True:
            self._check(start)
            claim = await self._claim(start, refused)
            reply = None
            try:
                reply = await self._at(start, claim.node)
            finally:
                if reply is None or not reply.is_good:
                    self.line.release(claim)
            if reply is not None and reply.is_good:
                self._note(start, claim, reply)
            if reply is not None and not reply.refused:
                return reply
            refused = refused | {claim.node}
            start.node = None

    def _check(self, start: Start) -> None:
        """Raise why it can never be started, or not in time."""
        units, factor = start.wish.wanted.units, start.wish.factor
        most = self.members.most_slots() if units > 1 else 1
        if most and units > most:
            raise NeverFits(
                f"resource_factor {factor:g} needs {units} slots and the largest node has {most}; ask for less, or "
                "give the runtime's nodes more CPUs"
            )
        if start.left_s <= 0:
            raise self._no_room(start)

    async def _claim(self, start: Start, refused: set[str]) -> Claim:
        """Slots of a node: of the one where the session lives, else of the best one that has not just refused."""
        session_id, wanted = start.wish.session_id, start.wish.wanted
        found = self.directory.living_of_session(session_id)
        if found is not None and found.node not in refused and self.members.is_here(found.node):
            start.is_new = False
            return self.line.follow(found.node, session_id)
        start.is_new = True
        while True:
            self._check(start)
            wait_s = min(start.left_s, REFUSED_S) if refused else start.left_s
            try:
                return await self.line.claim(
                    start.number, session_id, Wanted(wanted.units, wanted.image, frozenset(refused)), wait_s
                )
            except asyncio.TimeoutError:
                refused.clear()

    async def _at(self, start: Start, node: str) -> Reply | None:
        """What this node answers; None if it surely has not begun the start, or is lost with what it had begun."""
        start.node, may_be_there = node, False
        await self.members.stopped_there(node, start.wish.session_id, start.left_s)
        while True:
            link = self.members.link(node)
            if link is None:
                return None
            try:
                start.is_sent = True
                reply = await self._sent(start, link.ask("POST", "/start", start.wish.body, HEADERS, LONGEST_S))
                if not (may_be_there and reply.status == STOPPED_EARLY and not start.is_stopped):
                    return reply  # else the node had taken the broken connection for a client that hung up
            except NotSent as problem:
                if not may_be_there:
                    log.warning("session %s goes to another node: %s", start.wish.session_id, problem)
                    return None
            except CutOff as problem:
                log.warning("session %s is asked for again on node %s: %s", start.wish.session_id, node, problem)
                may_be_there = True
            if start.left_s <= 0:
                raise TooSlow(f"node {node} has not answered within {start.patience_s:g} s; ask again")
            await asyncio.sleep(AGAIN_S)

    async def _sent(self, start: Start, asking: Coroutine[Any, Any, Reply]) -> Reply:
        """The node's answer; where the client's patience ends before, what is known of the sandbox, with its URL."""
        task: asyncio.Task[Reply] = self._background.own(asking)
        try:
            await asyncio.wait([task], timeout=max(0.0, start.left_s))
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        if task.done():
            return task.result()
        found = self.directory.living_of_session(start.wish.session_id)
        if found is not None and found.has_url:
            task.add_done_callback(_read)  # let go of it, and the node would think that its client has left
            return Reply(201, found.body)
        task.cancel()
        await asyncio.wait([task])
        raise TooSlow(f"not started within {start.patience_s:g} s ({self.reason(start)}); ask again")

    def _note(self, start: Start, claim: Claim, reply: Reply) -> None:
        """What the node has answered is known from now on."""
        try:
            double = self.directory.answered(known(claim.node, json.loads(reply.body), reply.upto))
        except (BadNews, ValueError) as problem:
            log.error("the answer of node %s to /start cannot be read: %s", claim.node, problem)
            double = None
        if double is not None:
            self.members.resolve(double)
        claim.at = reply.upto
        if self.members.upto(claim.node) >= reply.upto:
            self.line.release(claim)

    def _stopping(self) -> Stopping:
        return Stopping("the head is stopping and starts no more sandboxes")

    def _no_room(self, start: Start) -> NoRoom:
        nodes = self.members.taking()
        if not nodes:
            here = len(self.members.here())
            which = f"none of the {here} nodes that have joined takes new sandboxes" if here else "no node has joined"
            return NoRoom(f"no room: {which}, waited for {start.patience_s:g} s; GET /nodes tells why")
        slots = sum(node.facts.slots for node in nodes if node.facts)
        used = sum(node.facts.used for node in nodes if node.facts)
        return NoRoom(
            f"no room: {used} of {slots} sandbox slots on {len(nodes)} nodes are in use and none became free within "
            f"{start.patience_s:g} s; run fewer sandboxes at once, or give the runtime more nodes"
        )


HEADERS = {"Content-Type": "application/json", WAIT: "0"}


def _read(task: asyncio.Task[Reply]) -> None:
    if not task.cancelled():
        task.exception()
