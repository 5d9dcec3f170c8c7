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
    """A length of time in at most two units, rounded down: ``105 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    minutes, hours, days = (int(seconds) // unit for unit in (60, 3600, 86400))
    if minutes == 0 or (minutes < 5 and int(seconds) % 60):
        return f"{int(seconds)} s"
    if hours == 0:
        return f"{minutes} min"
    large, small = (f"{days} d", hours % 24) if days else (f"{hours} h", minutes % 60)
    return f"{large} {small} {'h' if days else 'min'}" if small else large


def size(amount: float) -> str:
    """Bytes with the unit that fits, K = 1024 as everywhere in the suite: ``16G``, ``1.5T``."""
    for unit in ("", "K", "M", "G"):
        if abs(amount) < 1000:
            return f"{amount:.3g}{unit}"
        amount /= 1024
    return f"{amount:.3g}T"
