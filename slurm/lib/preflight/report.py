"""How are findings shown: to people in lines, to scripts as JSON?"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Sequence

from slurm.lib.logs import COLOURS
from slurm.lib.preflight.finding import Finding, Level

ORDER = (Level.ERROR, Level.WARNING, Level.ESTIMATE)
COLOUR = {Level.ERROR: COLOURS["ERROR"], Level.WARNING: COLOURS["WARN"], Level.ESTIMATE: COLOURS["INFO"]}
INDENT, NARROWEST = 22, 60  # columns before a sentence, and the least that a line is broken to


def ordered(found: Sequence[Finding]) -> list[Finding]:
    """What weighs most first; else as it was found."""
    return sorted(found, key=lambda finding: ORDER.index(finding.level))


def counted(found: Sequence[Finding]) -> dict[str, int]:
    """Level's plural → number of findings."""
    return {f"{level.value}s": sum(finding.level is level for finding in found) for level in ORDER}


def as_text(found: Sequence[Finding], checked: Collection[str], columns: int | None = None) -> str:
    """A line a finding, below it what to do, then what was ``checked``, and a last line with the numbers.

    For a terminal of so many ``columns`` long lines are broken, and the word of the level is in colour.
    """
    lines = []
    for finding in ordered(found):
        line = f"{finding.level.value:<9}{finding.check:<12} {finding.sentence}"
        text = broken(line, columns, INDENT)
        lines.append(text.replace(finding.level.value, _coloured(finding.level), 1) if columns else text)
        lines += [broken(f"{'':<{INDENT}}-> {finding.fix}", columns, INDENT + 3)] if finding.fix else []
    numbers = [f"{number} {name[:-1] if number == 1 else name}" for name, number in counted(found).items()]
    lines.append(broken(f"{'checked':<9}{', '.join(checked)}", columns, 9))
    return "\n".join([*lines, ", ".join(numbers)]) + "\n"


def _coloured(level: Level) -> str:
    return f"{COLOUR[level]}{level.value}\x1b[0m"


def broken(line: str, columns: int | None, indent: int) -> str:
    """A line in several below ``indent``; a path or a command's word is not broken, so that it can be copied."""
    if columns is None:
        return line
    width = max(columns, NARROWEST)
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def as_json(found: Sequence[Finding], checked: Collection[str]) -> str:
    """One object: numbers, the names of what was checked, and the findings."""
    findings = [
        {"check": finding.check, "level": finding.level.value, "sentence": finding.sentence, "fix": finding.fix}
        for finding in ordered(found)
    ]
    return json.dumps({**counted(found), "checked": list(checked), "findings": findings}, indent=2) + "\n"
