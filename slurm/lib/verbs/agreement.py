"""Does the person at the terminal agree to what cannot be taken back?"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence

from slurm.lib.errors import UsageError
from slurm.lib.logs import log
from slurm.lib.signals import Interrupted, SignalNotes

NOTE_EVERY_S = 0.1  # how soon a signal ends the question
LONGEST = 1024  # bytes of an answer


def is_agreed(title: str, lines: Sequence[str], question: str, undone: str, notes: SignalNotes) -> bool:
    """Whether a person at the terminal says yes; all else is no, and ``undone`` then says what that means.

    ``UsageError`` where there is no terminal to ask at. A signal raises ``Interrupted``.
    """
    shown = "\n  ".join([title, *lines])
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{shown}\nthere is no terminal to ask at: add --yes to mean them; {undone}")
    sys.stderr.write(f"{shown}\n{question} [y/N] ")
    sys.stderr.flush()
    try:
        is_meant = _answer(notes).strip().lower() in {"y", "yes"}
    except Interrupted:
        sys.stderr.write("\n")
        log.info("%s", undone)
        raise
    if not is_meant:
        log.info("%s", undone)
    return is_meant


def _answer(notes: SignalNotes) -> str:
    """The line that is typed; of a terminal that has gone an empty one."""
    while not select.select([sys.stdin], [], [], NOTE_EVERY_S)[0]:
        notes.check()
    notes.check()
    try:
        return os.read(sys.stdin.fileno(), LONGEST).decode("utf-8", "replace")
    except OSError:
        return ""
