"""How is this process's memory laid out so that forking it is cheap? In huge pages, where the kernel makes them.

A fork copies one table entry for each page: of 320 MB in small pages that takes 11 ms, in huge ones 3 ms, and the child
then takes half as many faults, because the kernel splits a huge page only where somebody writes. From Linux 6.1 on;
elsewhere nothing happens. And a child that makes small objects shall not make them in the gaps of pages that it shares:
each of the 1 MB of gaps that an import leaves costs it a copied page. Standard library only.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from slurm_runtime.warden.syscalls import MADV_COLLAPSE, madvise

HUGE = 2 << 20  # on the architectures that we know
# CPython's allocator of small objects (Objects/obmalloc.c, 3.10 to 3.13): blocks of 16, 32, … 512 bytes, each size in
# pools of its own, which begin with a head of 48 bytes.
POOL, POOL_HEAD, SIZES = 16 << 10, 48, range(16, 513, 16)
BYTES_HEAD = 33  # of a bytes object, its closing zero included
MOST_POOLS = 256  # 4 MB of a size: this Python allocates in another way

_fillers: list[object] = []  # what fills the gaps, kept for ever


def collapse() -> None:
    """Put what this process has written so far into huge pages, whatever the machine's setting for others."""
    for start, end in _writable():
        for page in range(-(-start // HUGE) * HUGE, end - HUGE + 1, HUGE):
            with contextlib.suppress(OSError):
                madvise(page, HUGE, MADV_COLLAPSE)


def fill_gaps() -> None:
    """Fill the free blocks of pools that are in use, so that what a child makes comes in pools of its own."""
    for size in SIZES:
        _fillers.append(_filled(size))


def _filled(size: int) -> list[object]:
    """Objects of one size, so many that the last of them have pools to themselves."""
    blocks = (POOL - POOL_HEAD) // size
    made: list[object] = []
    while len(made) < MOST_POOLS * blocks:
        some = [_block(size) for _ in range(4 * blocks)]
        made += some
        if sum(count == blocks for count in Counter(id(one) // POOL for one in some).values()) > 1:
            break
    return made


def _block(size: int) -> object:
    """A new object that takes ``size`` bytes."""
    return object() if size == 16 else float("1.5") if size == 32 else bytes(size - BYTES_HEAD)


def _writable() -> Iterator[tuple[int, int]]:
    """First address and end of each part of memory that is ours alone and no file's."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    for line in lines:
        words = line.split()
        if words[1].startswith("rw") and (len(words) == 5 or words[5] == "[heap]"):
            start, _, end = words[0].partition("-")
            yield int(start, 16), int(end, 16)
