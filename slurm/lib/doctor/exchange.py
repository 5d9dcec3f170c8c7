"""Messages between the doctor and its nodes, by files of a shared folder, as the jobs of a run have them.

How long they take is what a run's flags take, and the times that the answers name tell how clocks differ. Each message
is a new file; a node that hears nothing for ``SILENCE_S`` takes the doctor for dead, and ends.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.lib.coordination import read_if_there, write_atomically

SILENCE_S = 60.0
KEEP_ALIVE_S = 5.0
LOOK_EVERY_S = 0.02
PRIVATE = 0o600
TOLD = "told to end"


def report_file(folder: Path, node: str) -> Path:
    """Where a node's report appears."""
    return folder / f"{node}.report.json"


def question_file(folder: Path, node: str) -> Path:
    """What a node is asked."""
    return folder / f"{node}.question.json"


def log_file(folder: Path, node: str) -> Path:
    """What a node's job prints."""
    return folder / f"{node}.log"


def _ping(folder: Path, node: str, number: int) -> Path:
    return folder / f"{node}.ping-{number}.json"


def _pong(folder: Path, node: str, number: int) -> Path:
    return folder / f"{node}.pong-{number}.json"


def parsed(text: str | None) -> dict[str, Any]:
    """A message; empty where there is none, or none that can be read."""
    with contextlib.suppress(ValueError):
        found = json.loads(text or "{}")
        return found if isinstance(found, dict) else {}
    return {}


@dataclass(frozen=True)
class Echo:
    """One message and its answer: seconds there and back, and by how much the other's clock is ahead."""

    seconds: float
    ahead_s: float


@dataclass
class Line:
    """The doctor's end of the exchange with one node: at most one message is on its way.

    ``echoes``: of the messages that asked for nothing but an answer; what else is asked takes its own time.
    """

    folder: Path
    node: str
    echoes: list[Echo] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _sent: float | None = None
    _asks: bool = False
    _sent_at: float = 0.0
    _last: float = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether an answer is awaited."""
        return self._sent is not None

    @property
    def waiting_s(self) -> float:
        """For how long the answer to the last message has been awaited; 0 for none."""
        return 0.0 if self._sent is None else time.monotonic() - self._sent

    @property
    def is_due(self) -> bool:
        """Whether the node should hear that the doctor lives."""
        return not self.is_busy and time.monotonic() - self._last > KEEP_ALIVE_S

    def send(self, **message: object) -> None:
        """Send a message; its answer will be among ``answers``."""
        self._sent, self._sent_at = time.monotonic(), time.time()
        self._last, self._asks = self._sent, bool(message)
        text = json.dumps({"number": self._number, **message})
        write_atomically(_ping(self.folder, self.node, self._number), text, PRIVATE)

    def look(self) -> None:
        """Take the answer, if it has come."""
        if self._sent is None:
            return
        answer = parsed(read_if_there(_pong(self.folder, self.node, self._number)))
        if not answer:
            return
        seconds, now = time.monotonic() - self._sent, time.time()
        with contextlib.suppress(TypeError, ValueError, KeyError):
            if not self._asks:
                self.echoes.append(Echo(seconds, float(answer["time"]) - (self._sent_at + now) / 2))
        self.answers.append(answer)
        self._number, self._sent = self._number + 1, None


def serve(
    folder: Path, node: str, act: Callable[[dict[str, Any]], dict[str, object]], sleep: Callable[[float], None]
) -> str:
    """Answer the doctor's messages until it says the end or is silent; returns how it ended.

    ``act`` makes an answer of a message; ``sleep`` may raise to end it early.
    """
    number, heard = 0, time.monotonic()
    while time.monotonic() - heard < SILENCE_S:
        message = parsed(read_if_there(_ping(folder, node, number)))
        if message.get("end"):
            return TOLD
        if message:
            write_atomically(_pong(folder, node, number), json.dumps({"time": time.time(), **act(message)}), PRIVATE)
            number, heard = number + 1, time.monotonic()
        sleep(LOOK_EVERY_S)
    return f"nothing heard of the doctor for {SILENCE_S:g} s"


def visible_after(echoes: Sequence[Echo]) -> float | None:
    """Seconds until the other host sees a new file, at worst: half of the slowest exchange. None for none."""
    return max(echo.seconds for echo in echoes) / 2 if echoes else None


def clock_ahead(echoes: Sequence[Echo]) -> tuple[float, float] | None:
    """By how much the other host's clock is ahead, and how far that may be wrong; by the quickest exchange."""
    best = min(echoes, key=lambda echo: echo.seconds, default=None)
    return (best.ahead_s, best.seconds / 2) if best else None
