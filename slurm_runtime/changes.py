"""What has changed on this server since a head last asked? A number for each sandbox: that of its last change.

Memory is bounded by the sandboxes that are known and ``GONE_KEPT`` ids of forgotten ones, not by how much happens. A
change costs two operations of a dictionary: a pull that hundreds of sandboxes wait for changes all of them, five times
a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from slurm_runtime.deadlines import within
from slurm_runtime.node_models import GATHER_S, GONE_KEPT, MOST_POLLS


class TooManyPolls(Exception):
    """More long polls are open than a head needs."""


@dataclass(frozen=True)
class Since:
    """Ids that have changed and ids that are gone since a number; None, None where it is not known any more."""

    changed: tuple[str, ...] | None
    gone: tuple[str, ...] = ()


class Changes:
    """``upto`` is the number of the last change, 0 for none. ``gone_kept`` bounds the forgotten ids."""

    def __init__(self, gone_kept: int = GONE_KEPT, gather_s: float = GATHER_S) -> None:
        self.upto = 0
        self._changed: dict[str, int] = {}  # in the order of the last change
        self._gone: dict[str, int] = {}
        self._gone_kept = gone_kept
        self._known_from = 0  # of what changed before it something was forgotten
        self._gather_s = gather_s
        self._polls: set[asyncio.Event] = set()
        self._told_at = 0.0
        self._closed = False

    def note(self, runtime_id: str) -> None:
        """A sandbox is another than before, or new."""
        self.upto += 1
        self._changed.pop(runtime_id, None)
        self._changed[runtime_id] = self.upto
        self._gone.pop(runtime_id, None)
        self._wake()

    def note_gone(self, runtime_id: str) -> None:
        """A sandbox is forgotten."""
        self.upto += 1
        self._changed.pop(runtime_id, None)
        self._gone.pop(runtime_id, None)
        self._gone[runtime_id] = self.upto
        if len(self._gone) > self._gone_kept:
            oldest = next(iter(self._gone))
            self._known_from = self._gone.pop(oldest)
        self._wake()

    def note_server(self) -> int:
        """Something of the server itself is another than before: its slots, its images, whether it drains."""
        self.upto += 1
        self._wake()
        return self.upto

    def since(self, number: int) -> Since:
        """What is new since change ``number``, in the order of change."""
        if not self._known_from <= number <= self.upto:
            return Since(None)
        return Since(_newer(self._changed, number), _newer(self._gone, number))

    async def beyond(self, number: int, timeout_s: float) -> None:
        """Return once there is a change after ``number``, after ``timeout_s``, or when the server ends.

        Changes that come close together are told together: a little later than the first, unless the last poll was
        answered a while ago. ``TooManyPolls`` at once for one too many.
        """
        with self._poll() as changed:
            deadline = time.monotonic() + timeout_s
            if number == self.upto and not self._closed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(timeout_s, changed.wait())
            pause_s = min(self._told_at + self._gather_s, deadline) - time.monotonic()
            if pause_s > 0 and not self._closed:
                await asyncio.sleep(pause_s)
        self._told_at = time.monotonic()

    @contextlib.contextmanager
    def _poll(self) -> Iterator[asyncio.Event]:
        if len(self._polls) >= MOST_POLLS:
            raise TooManyPolls(f"{len(self._polls)} requests wait for changes already; a run has one head")
        changed = asyncio.Event()
        self._polls.add(changed)
        try:
            yield changed
        finally:
            self._polls.discard(changed)

    def close(self) -> None:
        """Nobody waits for a change any more."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for poll in self._polls:
            poll.set()


def _newer(numbers: dict[str, int], number: int) -> tuple[str, ...]:
    """The ids whose number is above ``number``; as many are looked at as are found. Pure."""
    found = []
    for runtime_id, changed in reversed(numbers.items()):
        if changed <= number:
            break
        found.append(runtime_id)
    return tuple(reversed(found))
