"""What do clients read? What the nodes have told, and of a start that no node has told of, what it waits for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slurm_runtime.head.answers import Known, joined, known, listing, waiting
from slurm_runtime.head.directory import Directory
from slurm_runtime.head.starts import NOBODY, Start, Starts


@dataclass(frozen=True)
class Views:
    """Answers as ready-made bytes, from memory; None for what is not known."""

    directory: Directory
    starts: Starts

    def session(self, session_id: str) -> bytes | None:
        """The newest sandbox of a session; a start under way is newer than what is dead."""
        found, start = self.directory.of_session(session_id), self.starts.of_session(session_id)
        if start is not None and (found is None or found.is_dead):
            return self.starts.told(start)
        return None if found is None else self.directory.told(found)

    def runtime(self, runtime_id: str) -> bytes | None:
        found = self.directory.of_runtime(self.starts.meant_by(runtime_id))
        if found is not None:
            return self.directory.told(found)
        start = self.starts.of_stand_in(runtime_id)
        return None if start is None else self.session(start.wish.session_id)

    def sessions(self, session_ids: Iterable[str]) -> bytes:
        """Those that are known, each once."""
        found = (self.session(session_id) for session_id in dict.fromkeys(session_ids))
        return joined([body for body in found if body is not None])

    def all_living(self) -> bytes:
        """The answer of GET /list."""
        lines = [sandbox.line for sandbox in self.directory.living()]
        return listing(lines + [self._line(start) for start in self.untold()])

    def untold(self) -> list[Start]:
        """Starts that no node has told of."""
        return [
            start
            for start in self.starts.under_way()
            if self.directory.living_of_session(start.wish.session_id) is None
        ]

    def _line(self, start: Start) -> bytes:
        start.is_read = True
        return self._stand_in(start).line

    def _stand_in(self, start: Start) -> Known:
        wish = start.wish
        return known(NOBODY, waiting(start.stand_in, wish.session_id, wish.image, self.starts.reason(start)), 0)
