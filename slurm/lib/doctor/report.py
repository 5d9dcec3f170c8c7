"""How are verdicts shown: to people in lines below the place, to scripts as JSON?"""

from __future__ import annotations

import json
from collections.abc import Sequence

from slurm.lib.doctor.verdict import Health, Section, Verdict
from slurm.lib.logs import COLOURS
from slurm.lib.preflight.report import broken

COLOUR = {Health.OK: COLOURS["INFO"], Health.WARN: COLOURS["WARN"], Health.FAIL: COLOURS["ERROR"]}
INDENT = 20  # columns before a sentence
SCHEMA = 1


def counted(sections: Sequence[Section]) -> dict[Health, int]:
    """How many verdicts of each kind."""
    everything = [verdict for section in sections for verdict in section.verdicts]
    return {health: sum(verdict.health is health for verdict in everything) for health in Health}


def as_text(sections: Sequence[Section], columns: int | None = None) -> str:
    """The place, its verdicts, below each what to do; a last line with the numbers.

    For a terminal of so many ``columns`` long lines are broken, and the first word is in colour.
    """
    lines: list[str] = []
    for section in sections:
        lines.append(section.place)
        for verdict in section.verdicts:
            lines += _lines(verdict, columns)
        lines.append("")
    numbers = counted(sections)
    return "\n".join([*lines, ", ".join(f"{numbers[health]} {health.value}" for health in Health)]) + "\n"


def _lines(verdict: Verdict, columns: int | None) -> list[str]:
    word = verdict.health.value
    line = broken(f"  {word:<6}{verdict.check:<11} {verdict.sentence}", columns, INDENT)
    if columns:
        line = line.replace(word, f"{COLOUR[verdict.health]}{word}\x1b[0m", 1)
    return [line, *([broken(f"{'':<{INDENT}}-> {verdict.fix}", columns, INDENT + 3)] if verdict.fix else [])]


def as_json(sections: Sequence[Section]) -> str:
    """One object: numbers, and the places with their verdicts."""
    places = [
        {
            "place": section.place,
            "verdicts": [
                {"check": each.check, "health": each.health.value, "sentence": each.sentence, "fix": each.fix}
                for each in section.verdicts
            ],
        }
        for section in sections
    ]
    numbers = {health.value: number for health, number in counted(sections).items()}
    return json.dumps({"schema": SCHEMA, **numbers, "places": places}, indent=2) + "\n"
