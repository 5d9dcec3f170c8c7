"""How are amounts written for people, and which word did a person mean?"""

from __future__ import annotations

from collections.abc import Collection


def nearest_word(word: str, known: Collection[str]) -> str | None:
    """The known word that a misspelt one is most like; None where none is much like it."""
    import difflib  # 5 ms, spent only on words that are wrong

    return next(iter(difflib.get_close_matches(word.lower(), known, n=1)), None)


def number_of(number: int, what: str) -> str:
    """A number of things: ``1 node``, ``2 nodes``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def duration(seconds: float) -> str:
    """Seconds with the unit that fits: ``105 s``, ``35 min``, ``14 h``."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def size(amount: float) -> str:
    """Bytes with the unit that fits, K = 1024 as everywhere in the suite: ``16G``, ``1.5T``."""
    for unit in ("", "K", "M", "G"):
        if abs(amount) < 1000:
            return f"{amount:.3g}{unit}"
        amount /= 1024
    return f"{amount:.3g}T"
