"""How does Hydra spell an override? What one says is read, and a value written so that Hydra reads it back; pure.

Sources: Hydra's override grammar (1.3), and OmegaConf's for ``${``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Text that Hydra takes as text without quotes: nothing of its grammar, no number, none of its words.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./@+-]*")
_WORDS_OF_HYDRA = frozenset({"true", "false", "null", "nan", "inf"})
_IN_QUOTES = re.compile(r"(['\"])(.*)\1", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """What one says: ``value`` as it is written, but without quotes around the whole; None takes the name out."""

    name: str
    value: str | None


def read_override(text: str) -> Override:
    """What ``NAME=VALUE``, with ``+`` or ``++`` before it, or ``~NAME``, with a value or without, says."""
    name, _, value = text.lstrip("+~").partition("=")
    return Override(name, None if text.startswith("~") else _unquoted(value.strip()))


def value_said(overrides: Iterable[str], name: str) -> str | None:
    """The value that overrides give ``name``, of several the last one's, as for Hydra; None where they give none."""
    return {said.name: said.value for said in map(read_override, overrides)}.get(name)


def _unquoted(text: str) -> str:
    """Text without the quotes around it; within them backslashes mean what ``_quotable`` says."""
    quoted = _IN_QUOTES.fullmatch(text)
    if quoted is None:
        return text
    return re.sub(
        rf"(\\+)({quoted[1]}|\Z)", lambda match: match[1][: len(match[1]) // 2] + match[2], quoted[2], flags=re.DOTALL
    )


def hydra_value(value: object) -> str:
    """A value as Hydra's override grammar reads it back, type and all; text keeps every character."""
    if isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS_OF_HYDRA:
        return text
    return f"'{_quotable(_uninterpolated(text))}'"


def _uninterpolated(text: str) -> str:
    """OmegaConf takes ``${`` for a reference unless a backslash stands before it, which in turn doubles others."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _quotable(text: str) -> str:
    """Within Hydra's quotes a backslash means itself, except before a quote and before the end."""
    return re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
