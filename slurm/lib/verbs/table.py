"""How does a table fit the terminal? Columns are shortened in a fixed order, then dropped in another; pure.

Where there is no terminal every value is whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.lib.logs import wants_colour
from slurm.lib.reports.run_words import shortened

GAP = "  "
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Column:
    """A column: ``least`` is the width it may be shortened to; that with the highest ``loss`` goes first, 0 never."""

    title: str
    least: int = 0
    loss: int = 0


def terminal_width() -> int | None:
    """The width of the terminal that stdout is; None where it is none."""
    if not sys.stdout.isatty():
        return None
    import shutil  # 1 ms, felt where there is no terminal

    return shutil.get_terminal_size().columns


def lines_of(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[list[str]]:
    """The cells of each line, the titles first, padded so that they stand below each other."""
    widths = fitting(columns, [[column.title for column in columns], *rows], width)
    kept = [at for at, room in enumerate(widths) if room]
    lines = [[column.title for column in columns], *rows]
    return [[shortened(line[at], widths[at]).ljust(widths[at]) for at in kept] for line in lines]


def fitting(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """The width of each column, 0 for one that is dropped."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(columns))]
    if width is None:
        return widths
    order = sorted(range(len(columns)), key=lambda at: -columns[at].loss)
    for at in order:
        over = _needed(widths) - width
        if over > 0 and columns[at].least:
            widths[at] = max(min(columns[at].least, widths[at]), widths[at] - over)
    for at in order:
        if _needed(widths) > width and columns[at].loss:
            widths[at] = 0
    return widths


def _needed(widths: Sequence[int]) -> int:
    kept = [room for room in widths if room]
    return sum(kept) + len(GAP) * max(0, len(kept) - 1)


def printed(lines: Sequence[Sequence[str]], paint: dict[str, str]) -> str:
    """The lines as text; on a terminal a cell whose word is in ``paint`` gets that colour."""
    coloured = wants_colour(sys.stdout)

    def cell(text: str) -> str:
        colour = paint.get(text.strip(), "") if coloured else ""
        return f"{colour}{text}\x1b[0m" if colour else text

    return "".join(_trimmed(GAP.join(map(cell, line))) + "\n" for line in lines)


def _trimmed(line: str) -> str:
    return line.rstrip() if not _COLOUR.search(line) else line
