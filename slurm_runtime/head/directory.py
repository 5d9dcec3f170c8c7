"""Which sandboxes does the head know? All that its nodes told of, by runtime id and by session; memory is bounded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from slurm_runtime.head.answers import Known, given_up

DEAD_KEPT = 5000  # sandboxes of all nodes that do not live, for clients that still ask


@dataclass(frozen=True)
class News:
    """What a node told at change ``upto``: as ``ChangesAnswer``, with its sandboxes made ready."""

    upto: int
    complete: bool = False
    sandboxes: tuple[Known, ...] = ()
    earlier: frozenset[str] = frozenset()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Double:
    """A session that lives on two nodes: ``extra`` is the one to stop."""

    extra: Known
    kept: Known


@dataclass
class Directory:
    """``placed_on`` says to which node the head has sent a start of a session that is not answered yet, None for none.

    That one is right where two nodes have the same session; else the one that was known first.
    """

    placed_on: Callable[[str], str | None] = lambda _session: None
    dead_kept: int = DEAD_KEPT
    _known: dict[str, Known] = field(default_factory=dict)
    _sessions: dict[str, str] = field(default_factory=dict)
    _of_node: dict[str, dict[str, None]] = field(default_factory=dict)
    _dead: dict[str, None] = field(default_factory=dict)  # in the order of death

    def of_session(self, session_id: str) -> Known | None:
        """The newest sandbox of a session."""
        return self._known.get(self._sessions.get(session_id, ""))

    def living_of_session(self, session_id: str) -> Known | None:
        found = self.of_session(session_id)
        return found if found is not None and not found.is_dead else None

    def of_runtime(self, runtime_id: str) -> Known | None:
        return self._known.get(runtime_id)

    def told(self, sandbox: Known) -> bytes:
        """What a client is answered of it. One that is told as failed stays so: nobody asks for it any more."""
        if sandbox.given_up and not sandbox.unwanted:
            self.put(unwanted(sandbox))
        return sandbox.body

    def living(self) -> Iterator[Known]:
        """All that live, in the order in which they were first heard of."""
        return (sandbox for sandbox in self._known.values() if not sandbox.is_dead)

    def of_node(self, node: str) -> list[Known]:
        return [self._known[runtime_id] for runtime_id in self._of_node.get(node, ())]

    def living_on(self, node: str) -> int:
        return sum(not sandbox.is_dead for sandbox in self.of_node(node))

    def last_failures(self, most: int = 20) -> list[bytes]:
        """What is answered of the sandboxes that failed last, the newest first."""
        failed = (self._known[runtime_id] for runtime_id in reversed(self._dead))
        return [sandbox.body for sandbox in itertools.islice((one for one in failed if one.is_failed), most)]

    def __len__(self) -> int:
        return len(self._known)

    # What changes it.

    def hear(self, node: str, news: News) -> list[Double]:
        """Take over what a node told; sessions that live twice now."""
        if news.complete:
            self._miss(node, {sandbox.runtime_id for sandbox in news.sandboxes})
        self._forget(news.gone)
        doubles = [self._take(sandbox, news.earlier) for sandbox in news.sandboxes if self._is_newer(sandbox, news)]
        self._make_room()
        return [double for double in doubles if double is not None]

    def answered(self, sandbox: Known) -> Double | None:
        """Take over what a node answered to a request of the head's, unless it has told of it since."""
        before = self._known.get(sandbox.runtime_id)
        if before is not None and before.at >= sandbox.at:
            return None
        double = self._take(sandbox, frozenset())
        self._make_room()
        return double

    def put(self, sandbox: Known) -> None:
        """The same sandbox as another value."""
        self._store(sandbox)
        self._make_room()

    def give_up(self, node: str, reason: str) -> int:
        """All that live on a node have failed for ``reason``; how many these are."""
        living = [sandbox for sandbox in self.of_node(node) if not sandbox.is_dead]
        for sandbox in living:
            self._store(given_up(sandbox, reason))
        self._make_room()
        return len(living)

    def _miss(self, node: str, told: Collection[str]) -> None:
        """What lived on a node and is not told of any more has failed; what was dead is remembered like others."""
        for sandbox in self.of_node(node):
            if sandbox.runtime_id not in told and not sandbox.is_dead:
                self._store(given_up(sandbox, f"node {node} knows it no more: its API server was started again"))

    def _is_newer(self, sandbox: Known, news: News) -> bool:
        """Not what the node said before it answered the head: that is known already."""
        before = self._known.get(sandbox.runtime_id)
        return news.complete or before is None or before.given_up or before.at <= news.upto

    def _take(self, sandbox: Known, earlier: Collection[str]) -> Double | None:
        before, current = self._known.get(sandbox.runtime_id), self.of_session(sandbox.session_id)
        if before is not None and not sandbox.is_dead and _is_over(before, current):
            return Double(sandbox, current or before)
        if self._is_double(sandbox, current):
            assert current is not None
            return self._settle(sandbox, current)
        self._store(sandbox)
        if self._becomes_current(sandbox, current, before, earlier):
            self._sessions[sandbox.session_id] = sandbox.runtime_id
        return None

    def _is_double(self, sandbox: Known, current: Known | None) -> bool:
        if sandbox.is_dead:
            return False
        placed = self.placed_on(sandbox.session_id)
        if placed is not None and placed != sandbox.node:
            return current is not None
        return current is not None and not current.is_dead and current.node != sandbox.node

    def _settle(self, sandbox: Known, current: Known) -> Double:
        """Of two that live the one stays to which the head has sent the start, else the one that was known first."""
        if self.placed_on(sandbox.session_id) != sandbox.node:
            return Double(sandbox, current)
        self._store(sandbox)
        self._sessions[sandbox.session_id] = sandbox.runtime_id
        return Double(current, sandbox)

    def _becomes_current(
        self, sandbox: Known, current: Known | None, before: Known | None, earlier: Collection[str]
    ) -> bool:
        if current is None or current.runtime_id == sandbox.runtime_id:
            return True
        if sandbox.runtime_id in earlier:
            return False
        if current.node == sandbox.node:
            return True
        return current.is_dead and (before is None or not sandbox.is_dead)

    def _store(self, sandbox: Known) -> None:
        self._known[sandbox.runtime_id] = sandbox
        self._of_node.setdefault(sandbox.node, {})[sandbox.runtime_id] = None
        if not sandbox.is_dead:
            self._dead.pop(sandbox.runtime_id, None)
        elif sandbox.runtime_id not in self._dead:
            self._dead[sandbox.runtime_id] = None

    def _make_room(self) -> None:
        if len(self._dead) > self.dead_kept:
            oldest = iter(list(self._dead))
            self._forget(next(oldest) for _ in range(len(self._dead) - self.dead_kept))

    def _forget(self, runtime_ids: Iterable[str]) -> None:
        for runtime_id in list(runtime_ids):
            sandbox = self._known.pop(runtime_id, None)
            self._dead.pop(runtime_id, None)
            if sandbox is None:
                continue
            of_node = self._of_node[sandbox.node]
            of_node.pop(runtime_id, None)
            if not of_node:
                del self._of_node[sandbox.node]
            if self._sessions.get(sandbox.session_id) == runtime_id:
                del self._sessions[sandbox.session_id]


def unwanted(sandbox: Known) -> Known:
    """One of a lost node that nobody will ask for: if the node comes back, it is stopped there."""
    return replace(sandbox, unwanted=True)


def _is_over(before: Known, current: Known | None) -> bool:
    """Whether a sandbox may not live again: it is unwanted, or its session has had another one since. Pure."""
    return before.unwanted or (before.given_up and current is not before)
