"""Which moment in the past does a person mean: so long ago, a time of today, or a day and time? Pure."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
WAYS = "10m, 1h30m, 14:20, or 2026-11-28T14:20"
_LENGTH = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m(?:in)?)?(?:(\d{1,9})s)?", re.ASCII)
_CLOCK = re.compile(r"\d\d?:\d\d(?::\d\d)?", re.ASCII)


def moment(text: str, now: datetime) -> datetime:
    """The moment, with its zone; ``ValueError`` with what is wrong.

    A time without a day is today's, or yesterday's where today's is still to come; one without a zone is this host's.
    """
    found = _ago(text, now) or _of_the_day(text, now) or _of_a_day(text, now)
    if found is None:
        raise ValueError(f"{text!r} is no time; write it as {WAYS}")
    if found > now:
        raise ValueError(f"{text!r} is still to come: it is {now.isoformat(timespec='seconds')}")
    return found


def _ago(text: str, now: datetime) -> datetime | None:
    match = _LENGTH.fullmatch(text)
    if not text or not match:
        return None
    return now - timedelta(seconds=sum(int(n or 0) * s for n, s in zip(match.groups(), UNITS.values(), strict=True)))


def _of_the_day(text: str, now: datetime) -> datetime | None:
    if not _CLOCK.fullmatch(text):
        return None
    try:
        parts = dict(zip(("hour", "minute", "second"), map(int, text.split(":")), strict=False))
        found = now.replace(**{"second": 0, **parts}, microsecond=0)  # type: ignore[arg-type]  # no zone among them
    except ValueError:
        return None
    return found if found <= now else found - timedelta(days=1)


def _of_a_day(text: str, now: datetime) -> datetime | None:
    try:
        found = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=now.tzinfo)
