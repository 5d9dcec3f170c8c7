"""Does a forked agent server write to the objects that it shares with all others? Not to count references to them.

CPython counts the references to an object in the object. So a child that only reads what its parent has made writes to
it all the same, and gets a copy of each page. Since Python 3.12 an object may be immortal (PEP 683): its count is one
special number that nobody changes. None is such an object. Here everything that was made before the first fork becomes
one. A forked server then copies half as many pages.

What was made before is never freed in a child; that is all that changes. Standard library only.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import sysconfig
import types
from collections.abc import Sequence
from typing import Any

# The place of the field and the number in it are those of Include/object.h there.
KNOWN = frozenset({("cpython", 3, 12), ("cpython", 3, 13)})
IMMORTAL = 0xFFFFFFFF  # the lower half of the count, which comes first in memory
# What runs, or is kept at a point of its run, holds what it has to give back when it ends.
LEFT_MORTAL = frozenset({types.FrameType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType})


def immortalise() -> int:
    """Make all immortal that this interpreter can reach; the number of objects, 0 where that is not known to work.

    To be called by a process with one thread, which from then on only forks.
    """
    if not is_known():
        return 0
    everything = _reachable(gc.get_objects())
    field = ctypes.c_uint32.from_address
    for thing in everything:
        field(id(thing)).value = IMMORTAL
    return len(everything)


def is_known() -> bool:
    """Whether this Python counts references as is expected here; ``None``, which is immortal, shows the number."""
    python = (sys.implementation.name, *sys.version_info[:2])
    layout = (ctypes.sizeof(ctypes.c_void_p), sys.byteorder)
    number = ctypes.c_uint32.from_address(id(None)).value
    return counts_so(python, layout, bool(sysconfig.get_config_var("Py_GIL_DISABLED")), number)


def counts_so(python: tuple[str, int, int], layout: tuple[int, str], is_free_threaded: bool, number: int) -> bool:
    """Whether the lower half of a count is where and what is written here. Pure.

    ``layout`` is the size of a pointer in bytes and the byte order, ``number`` what stands there in ``None``.
    """
    return python in KNOWN and layout == (8, "little") and not is_free_threaded and number == IMMORTAL


def _reachable(roots: Sequence[Any]) -> list[Any]:
    """The objects and all that they refer to. The list keeps them alive: none of them may be freed while it is used."""
    level = _by_id(roots)
    found: dict[int, Any] = {}
    left: set[int] = set()
    while level:
        found.update(level)
        # By its type: isinstance asks some objects for their class, and a few import packages to answer.
        left |= {name for name, one in level.items() if type(one) in LEFT_MORTAL}
        level = _by_id(gc.get_referents(*level.values()))
        for name in level.keys() & found.keys():
            del level[name]
    for name in left:
        del found[name]
    return list(found.values())


def _by_id(things: Sequence[Any]) -> dict[int, Any]:
    return dict(zip(map(id, things), things, strict=True))
