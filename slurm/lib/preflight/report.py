"""How are findings shown: to people in lines, to scripts as JSON?"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from slurm.lib.preflight.finding import Finding, Level

ORDER = (Level.ERROR, Level.WARNING, Level.ESTIMATE)


def ordered(found: Sequence[Finding]) -> list[Finding]:
    """What weighs most first; else as it was found."""
    return sorted(found, key=lambda finding: ORDER.index(finding.level))


def counted(found: Sequence[Finding]) -> dict[str, int]:
    """Level's plural → number of findings."""
    return {f"{level.value}s": sum(finding.level is level for finding in found) for level in ORDER}


def as_text(found: Sequence[Finding], checked: Collection[str]) -> str:
    """A line a finding, below it what to do, then what was ``checked``, and a last line with the numbers."""
    lines = []
    for finding in ordered(found):
        lines.append(f"{finding.level.value:<9}{finding.check:<12} {finding.sentence}")
        lines += [f"{'':<22}-> {finding.fix}"] if finding.fix else []
    numbers = [f"{number} {name[:-1] if number == 1 else name}" for name, number in counted(found).items()]
    lines.append(f"{'checked':<9}{', '.join(checked)}")
    return "\n".join([*lines, ", ".join(numbers)]) + "\n"


def as_json(found: Sequence[Finding], checked: Collection[str]) -> str:
    """One object: numbers, the names of what was checked, and the findings."""
    findings = [
        {"check": finding.check, "level": finding.level.value, "sentence": finding.sentence, "fix": finding.fix}
        for finding in ordered(found)
    ]
    return json.dumps({**counted(found), "checked": list(checked), "findings": findings}, indent=2) + "\n"
