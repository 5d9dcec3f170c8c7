"""When is a command's first look at its events answered? Once it has ended, or after 0.1 s.

OpenHands' SDK starts a command, asks for its events at once, and sleeps 0.1 s if it has not ended by then: that first
look comes a millisecond after the start, so ``true`` takes 111 ms, 100 of them asleep. The look is held as long as the
client would have slept after it, so that no end is told later than without it; with less, that of a command which takes
a little longer than the hold would be. Later looks, and looks at commands that have ended, are answered at once. What
is answered is what a look at that time is answered. Standard library only.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

HOLD_S = 0.1  # the SDK's own sleep between two looks


def hold(service: Any) -> None:
    """Give the class ``BashEventService`` the longer first look; a version that is made otherwise keeps its own."""
    start, search = getattr(service, "start_bash_command", None), getattr(service, "search_bash_events", None)
    if not (inspect.iscoroutinefunction(start) and inspect.iscoroutinefunction(search)):
        return
    if "command_id__eq" not in inspect.signature(search).parameters:
        return
    running: dict[Any, asyncio.Task[Any]] = {}  # commands that nobody has asked about yet, by their ids

    async def start_bash_command(self: Any, *words: Any, **fields: Any) -> Any:
        answer = await start(self, *words, **fields)
        _note(running, answer)
        return answer

    async def search_bash_events(self: Any, *words: Any, **fields: Any) -> Any:
        task = running.pop(fields.get("command_id__eq"), None)
        if task is not None:
            await asyncio.wait([task], timeout=HOLD_S)
        return await search(self, *words, **fields)

    service.start_bash_command, service.search_bash_events = start_bash_command, search_bash_events


def _note(running: dict[Any, asyncio.Task[Any]], answer: Any) -> None:
    """Of the command that was started, and the task that ends with it."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], asyncio.Task)):
        return
    name, task = getattr(answer[0], "id", None), answer[1]
    if name is not None and not task.done():
        running[name] = task
        task.add_done_callback(lambda _: running.pop(name, None))
