"""How is a length of time written on a command line: ``90``, ``15m``, ``2h``, ``7d``, ``2w``?"""

from __future__ import annotations

import argparse
import re

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LONGEST_S = 100 * 366 * 86400.0
_SPAN = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([smhdw]?)", re.ASCII)


def seconds_in(text: str, *, unit: str = "") -> float:
    """The seconds of a length of time; ``unit`` is that of a bare number, which is none where that is empty.

    Raises what argparse shows as a sentence.
    """
    match = _SPAN.fullmatch(text.strip())
    word = (match[2] or unit) if match else ""
    seconds = float(match[1]) * UNITS[word] if match and word else -1.0
    if not 0 <= seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time such as 30m, 12h, 7d or 2w")
    return seconds


def words_of(seconds: float) -> str:
    """A length of time as its largest unit tells it: ``27 d``, ``3 h``."""
    unit = next((unit for unit in ("d", "h", "m") if seconds >= UNITS[unit]), "s")
    return f"{int(seconds // UNITS[unit])} {unit}"
