"""Which step has a trainer reached, by its own words? Pure.

The words are VERL's (0.5.0 to 0.9: ``step:12 - ``, tqdm's ``Training Progress: … 12/300``) and shell_rl's. A trainer of
your own says the same with a line ``step 12/300`` or ``step 12 of 300``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_STEP = re.compile(
    r"\bstep:(?P<verl>\d+) - "  # VERL's console logger
    r"|Training Progress: +\d+%\|[^|]*\| *(?P<bar>\d+)/(?P<bar_total>\d+) "  # VERL's bar, which counts what is done
    r"|\b[Ss]tep (?P<own>\d+)(?:/| of )(?P<own_total>\d+)\b",  # shell_rl, and whoever writes so
    re.ASCII,
)
_TOTAL = re.compile(r"\bTotal training steps: (\d+)", re.ASCII)
_SHOWN = 400  # characters of a line that are looked at
_LONGEST = 10  # digits of a step that is believed


def steps_said(lines: Iterable[str]) -> tuple[int | None, int | None]:
    """The step that the last of these lines which names one says is done, and how many are to be done."""
    step = total = None
    for line in (line[:_SHOWN] for line in lines if "tep" in line or "Progress" in line):
        for match in _STEP.finditer(line):
            done, of = _numbers(match)
            step = done if done is not None else step
            total = of if of is not None else total
        said = _TOTAL.search(line)
        total = _number(said[1]) if said else total
    return step, total


def _numbers(match: re.Match[str]) -> tuple[int | None, int | None]:
    found = match.groupdict()
    step = found["verl"] or found["bar"] or found["own"]
    total = found["bar_total"] or found["own_total"]
    return _number(step), _number(total)


def _number(digits: str | None) -> int | None:
    return int(digits) if digits and len(digits) <= _LONGEST else None
