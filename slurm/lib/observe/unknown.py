"""What is not known, and why: a value of its own, so that nothing takes silence for an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unknown:
    """In place of a value: the reason why it is not known, as part of a sentence."""

    why: str
