"""What does a job's whole log tell: when it did what, and which steps it finished? Read once, as a stream.

A log of a gigabyte takes some seconds, and no more memory than a small one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from slurm.lib.observe.phase import mark_in, mark_words
from slurm.lib.observe.run_files import opened, printable
from slurm.lib.observe.steps import Step, placed, step_in, with_lengths
from slurm.lib.observe.timeline import Mark, local_epoch

BLOCK = 1 << 20  # bytes that are read at once
LONGEST = 1 << 16  # bytes of a line that are looked at; a step of VERL's is 4 KiB
MOST_STEPS, MOST_MARKS = 50_000, 1_000
STAMPED = 19  # characters of a time
_STEP = re.compile(rb"tep[ :]\d")
_NODES = re.compile(rb"\] node \S+ (?:\(job \S*\) )?(?:joins|was lost|left|drains)\b")


@dataclass(frozen=True)
class JobLog:
    """What a log tells.

    ``steps`` are with their lengths and, as far as can be known, their times; ``cut`` is true where there are more than
    ``MOST_STEPS``, and the rest is left out; ``node`` is where the job ran, of several nodes the first. ``nodes``: what
    a head says of its nodes, that they joined, or were lost.
    """

    marks: tuple[Mark, ...] = ()
    steps: tuple[Step, ...] = ()
    cut: bool = False
    node: str = ""
    nodes: tuple[Mark, ...] = ()


def read_job_log(path: Path, kind: str, check: Callable[[], None] = lambda: None) -> JobLog:
    """What a job's log tells; ``OSError`` where it cannot be read. ``check`` is called again and again, to end it."""
    with opened(path) as file:
        written = os.fstat(file.fileno()).st_mtime
        return scan(kind, _blocks(file, check), written)


def _blocks(file: BinaryIO, check: Callable[[], None]) -> Iterator[bytes]:
    """Blocks of whole lines; of a line that is longer than a block the beginning."""
    rest, is_rest = b"", False
    while data := file.read(BLOCK):
        check()
        if is_rest:  # of a long line
            data = data.partition(b"\n")[2]
            is_rest = not data
        lines, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            yield lines
        elif len(rest) >= BLOCK:
            yield rest[:LONGEST]
            rest, is_rest = b"", True
    yield rest


def scan(kind: str, blocks: Iterable[bytes], written: float | None = None) -> JobLog:
    """What the lines of a log tell that was written to last at ``written``, where it still grows."""
    found = _Scan(kind)
    for block in blocks:
        found.read(b"\n" + block + b"\n")
    after = found.after_steps if found.after_steps is not None else written
    steps = with_lengths(placed(found.steps, found.before_steps, after))
    return JobLog(tuple(found.marks), steps, found.cut, found.node, tuple(found.nodes))


@dataclass
class _Scan:
    """Looks only at lines that have one of the words of a mark or of a step, and for the times around them."""

    kind: str
    marks: list[Mark] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    cut: bool = False
    node: str = ""
    nodes: list[Mark] = field(default_factory=list)
    stamp: bytes = b""  # the last one that was seen
    before_steps: float | None = None  # the last time before the first step
    after_steps: float | None = None  # the first time after the last step

    def __post_init__(self) -> None:
        words = [re.compile(re.escape(words.encode())) for words in mark_words(self.kind)]
        self.wanted = [*words, *{"training": [_STEP], "runtime": [_NODES]}.get(self.kind, [])]

    def read(self, block: bytes) -> None:
        """Lines with a newline before each and at the end."""
        seen = -1  # the line until which times were looked for
        for start in _line_starts(block, self.wanted):
            if self.steps and self.after_steps is None:
                self.after_steps = _first_stamp(block, seen, start + 3)
            self._look_back(block, seen, start)
            seen = start
            self._line(block[start + 1 : block.index(b"\n", start + 1)][:LONGEST])
        if self.steps and self.after_steps is None:
            self.after_steps = _first_stamp(block, seen, len(block))
        self._look_back(block, seen, len(block))

    def _look_back(self, block: bytes, begin: int, end: int) -> None:
        at = block.rfind(b"\n20", max(0, begin), end)
        self.stamp = block[at + 1 : at + 1 + STAMPED] if at >= 0 else self.stamp

    def _line(self, line: bytes) -> None:
        is_stamped = line.startswith(b"20")
        self.stamp = line[:STAMPED] if is_stamped else self.stamp
        text = line.decode("utf-8", "replace")
        words = mark_in(self.kind, text)
        if words:
            self._mark(words, text)
        if self.kind == "runtime" and _NODES.search(line):
            self._news(text)
        step = step_in(printable(text)) if self.kind == "training" and _STEP.search(line) else None
        if step:
            self._step(step, is_stamped)

    def _mark(self, words: str, text: str) -> None:
        at = _epoch(self.stamp)
        self.node = self.node or (node_in(text) if not self.marks else "")
        is_new = not self.marks or self.marks[-1].words != words
        if at is not None and is_new and len(self.marks) < MOST_MARKS:
            self.marks.append(Mark(at, words))

    def _news(self, text: str) -> None:
        """What a head says of a node."""
        at = _epoch(self.stamp)
        if at is not None and len(self.nodes) < MOST_MARKS:
            self.nodes.append(Mark(at, " ".join(printable(text.partition("] ")[2]).split())))

    def _step(self, step: Step, is_stamped: bool) -> None:
        at = _epoch(self.stamp)
        self.before_steps = at if not self.steps else self.before_steps
        self.after_steps = None
        if len(self.steps) >= MOST_STEPS:
            self.cut = True
        else:
            self.steps.append(replace(step, at=at if is_stamped else None))


def _line_starts(block: bytes, wanted: Iterable[re.Pattern[bytes]]) -> list[int]:
    """Where the newlines are before the lines in which something that is wanted stands, in order."""
    starts: set[int] = set()
    for pattern in wanted:
        found = pattern.search(block)
        while found:
            starts.add(block.rfind(b"\n", 0, found.start()))
            found = pattern.search(block, block.index(b"\n", found.start()))
    return sorted(starts)


def _first_stamp(block: bytes, begin: int, end: int) -> float | None:
    """The first time that a line after the one at ``begin`` begins with."""
    at = block.find(b"\n20", begin + 1, end)
    return _epoch(block[at + 1 : at + 1 + STAMPED]) if at >= 0 else None


def _epoch(stamp: bytes) -> float | None:
    return local_epoch(stamp.decode("ascii", "replace"))


def node_in(line: str) -> str:
    """The node in a body's first line."""
    own = r" (?:(?:runtime|training) job \S+|worker \S+ of the runtime job [^,]+,) on ([\w.-]{1,253})(?:, |$)"
    match = re.search(own, line.rstrip(), re.ASCII | re.MULTILINE)
    return match[1] if match else ""
