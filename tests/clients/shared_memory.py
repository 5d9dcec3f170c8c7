"""Runs under an agent tree's Python: what a child copies of its parent's memory; prints RESULT and JSON.

The argument is the checkout. Kilobytes are those of a child that reads all that its parent has made, or makes objects
of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, sys.argv[1])

from slurm_runtime.warden import immortal, pages, proc


def copied_kb(work: Callable[[], object]) -> int:
    """What a child of this process has to itself after ``work``, beside what it has of it at its start."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = proc.private_bytes(os.getpid())
        kept = work()
        os.write(writing, str((proc.private_bytes(os.getpid()) - before) // 1024).encode())
        del kept
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return int(told)


def read_all(things: list[Any]) -> int:
    """References to everything, taken and given back."""
    found = 0
    for words, numbers, names in things:
        found += len(words) + len(numbers) + len(names)
    return found


def make_small() -> list[bytes]:
    return [bytes(64 - pages.BYTES_HEAD) for _ in range(1000)]


def work_on() -> list[object]:
    """A bit of everything, with objects from before and new ones."""
    kind = type("Kind", (dict,), {"word": "x"})
    thing = kind(a=1)
    gone = weakref.ref(thing)
    del thing
    gc.collect()

    async def later() -> str:
        await asyncio.sleep(0)
        return "later"

    try:
        json.loads("{")
    except ValueError as problem:
        said = type(problem).__name__
    return [gone() is None, asyncio.run(later()), said, re.sub(r"(\d)", r"<\1>", "a1"), json.dumps({"b": [None]})]


class Held:
    """Something of which there can be a weak reference."""


def waits(ended: list[str], seen: list[weakref.ref[Held]]) -> Iterator[int]:
    sys._getframe()  # makes an object of its frame, to which the generator then refers
    try:
        yield 1
        held = Held()
        seen.append(weakref.ref(held))
        yield 2
    finally:
        ended.append("ended")


def main() -> None:
    made = [(f"word {number}", [number], {"number": number}) for number in range(100_000)]
    many = [bytes(64 - pages.BYTES_HEAD) for _ in range(100_000)]
    del many[::16]
    ended: list[str] = []
    seen: list[weakref.ref[Held]] = []
    waiting = waits(ended, seen)
    next(waiting)
    told: dict[str, Any] = {"known": immortal.is_known()}
    told["mortal_kb"], told["in_gaps_kb"] = copied_kb(lambda: read_all(made)), copied_kb(make_small)
    gc.collect()
    told["objects"] = immortal.immortalise()
    pages.fill_gaps()
    gc.freeze()
    told["immortal_kb"], told["apart_kb"] = copied_kb(lambda: read_all(made)), copied_kb(make_small)
    told["count"] = sys.getrefcount(made[7][1]) & immortal.IMMORTAL
    told["work"] = work_on()
    made.clear()
    next(waiting)
    del waiting
    told["ended"], told["let go"] = ended, seen[0]() is None
    print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
