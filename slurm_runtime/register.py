"""Which sandboxes does this server know? All that live, one of them for a session, and the last dead ones."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from slurm_runtime.changes import Changes
from slurm_runtime.entries import Entry, UnknownSandbox, unheard
from slurm_runtime.sandbox import State

DEAD_KEPT = 1000  # records of dead sandboxes, for clients that still ask


class Register:
    """The entries by runtime id and by session; all of it in memory, so that nobody waits for Podman.

    ``changes`` hears of every sandbox that comes, changes or goes.
    """

    def __init__(self, changes: Changes | None = None) -> None:
        self.changes = changes or Changes()
        self._entries: dict[str, Entry] = {}
        self._sessions: dict[str, str] = {}

    def add(self, entry: Entry) -> None:
        """Make a sandbox known, as its session's; the oldest dead ones make room."""
        self._forget_oldest_dead()
        wish = entry.specification
        before = self._sessions.get(wish.session_id)
        self._sessions[wish.session_id] = wish.runtime_id
        if before is not None:
            self.changes.note(before)  # it is not its session's any more
        self._enter(entry)

    def add_dead(self, entry: Entry) -> None:
        """Make a dead sandbox known whose session has another one."""
        self._enter(entry)

    def _enter(self, entry: Entry) -> None:
        runtime_id = entry.specification.runtime_id
        self._entries[runtime_id] = entry
        entry.on_change = partial(self.changes.note, runtime_id)
        entry.on_change()

    def forget(self, entry: Entry) -> None:
        wish = entry.specification
        if self._entries.pop(wish.runtime_id, None) is not None:
            entry.on_change = unheard
            self.changes.note_gone(wish.runtime_id)
        if self._sessions.get(wish.session_id) == wish.runtime_id:
            del self._sessions[wish.session_id]

    def _forget_oldest_dead(self) -> None:
        dead = [entry for entry in self.entries() if entry.sandbox.state.is_dead and entry.is_clean]
        for entry in dead[: max(0, len(dead) - DEAD_KEPT)]:
            self.forget(entry)

    def of_session(self, session_id: str) -> Entry:
        """The session's sandbox, living or dead; ``UnknownSandbox`` if there is none."""
        runtime_id = self._sessions.get(session_id)
        if runtime_id is None:
            raise UnknownSandbox(f"no sandbox for session {session_id!r}")
        return self._entries[runtime_id]

    def of_runtime(self, runtime_id: str) -> Entry:
        """The sandbox with this id, living or dead; ``UnknownSandbox`` if there is none."""
        if runtime_id not in self._entries:
            raise UnknownSandbox(f"no sandbox with runtime_id {runtime_id!r}")
        return self._entries[runtime_id]

    def is_newest(self, entry: Entry) -> bool:
        """Whether its session's sandbox is this one."""
        wish = entry.specification
        return self._sessions.get(wish.session_id) == wish.runtime_id

    def find(self, runtime_id: str) -> Entry | None:
        return self._entries.get(runtime_id)

    def living_of_session(self, session_id: str) -> Entry | None:
        entry = self._entries.get(self._sessions.get(session_id, ""))
        return entry if entry and not entry.sandbox.state.is_dead else None

    def of_container(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries() if entry.name == name), None)

    def entries(self) -> list[Entry]:
        """All, in the order of asking."""
        return list(self._entries.values())

    def living(self) -> list[Entry]:
        return [entry for entry in self.entries() if not entry.sandbox.state.is_dead]

    def in_states(self, states: Collection[State]) -> list[Entry]:
        return [entry for entry in self.entries() if entry.sandbox.state in states]
