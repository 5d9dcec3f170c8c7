"""``launch.py clean``: remove the directories of old runs: none of one that may live, and no file of a trainer."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.cleaning import Candidate, Stay, candidates, clock_of, removed
from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import jobs_base
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_TIMEOUT
from slurm.lib.lookout import answered
from slurm.lib.observe.run_files import printable
from slurm.lib.observe.survey import Survey
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.agreement import is_agreed
from slurm.lib.verbs.named import runs_below
from slurm.lib.verbs.spans import seconds_in, words_of

SCHEMA = 1
OLDER_THAN = "7d"
EPILOG = """\
exit codes: 0 what could go is gone, also where that was nothing; 2 the command line is wrong, or there is nobody to
ask: nothing was removed; 71 SKYRL_JOBS_BASE cannot be read, or a directory cannot be removed; 75 Slurm did not answer,
so that runs stay of which only it knows; 128+N stopped by signal N: the rest stays, and the next clean finishes what
was begun.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="launch.py clean",
        description="Remove the directories of your runs below SKYRL_JOBS_BASE that ended some time ago.",
        epilog=EPILOG,
    )
    age = f"since the run's end and the last change in its directory, such as 12h, 7d, 2w (default: {OLDER_THAN})"
    parser.add_argument("--older-than", metavar="AGE", type=seconds_in, default=seconds_in(OLDER_THAN), help=age)
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="what was removed and what stays as one JSON object")
    return parser


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    base = jobs_base(os.environ)
    runs_below(base)  # says why it cannot be read, if so
    look = Looking(base, float(arguments.older_than), Survey(Slurm(), notes), notes)
    found = look.now()
    doomed = [candidate for candidate in found if candidate.goes]
    done = not arguments.dry_run
    if done and doomed and not arguments.yes:
        title = f"{len(doomed)} run directories, {size_words(sum(one.size or 0 for one in doomed))}:"
        lines = list(map(_line, doomed))
        done = is_agreed(title, lines, "remove them?", "nothing was removed", notes)
        if not done:
            return EXIT_OK
    if done:
        found = look.carried_out(found)
    report = Report(base, found, done, look.survey.heard, _not_touched(base))
    said = say(report.as_json() if arguments.json else report.as_text(look.older_s))
    return report.exit_code if said else EXIT_ENVIRONMENT


@dataclass(frozen=True)
class Looking:
    """Looks for what may go, and again before it goes: a person's answer takes its time."""

    base: Path
    older_s: float
    survey: Survey
    notes: SignalNotes

    def now(self, only: frozenset[Path] | None = None) -> list[Candidate]:
        """All directories of runs; with ``only`` these alone."""
        clock = clock_of(self.base) if self.base.is_dir() else 0.0
        return answered(lambda: candidates(self.base, self.older_s, self.survey, clock, only), self.notes)

    def carried_out(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Remove what may still go; a signal raises ``Interrupted``, and what was begun is finished next time."""
        again = {one.path: one for one in self.now(frozenset(one.path for one in found if one.goes))}
        now = [again.get(one.path, one) if one.goes else one for one in found]
        return removed(now, self.notes.check)


# --- what is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was removed, or would be, and what stays."""

    base: Path
    found: Sequence[Candidate]
    done: bool
    heard: bool
    not_touched: Sequence[tuple[str, Path]]

    @property
    def gone(self) -> list[Candidate]:
        return [one for one in self.found if one.goes]

    @property
    def exit_code(self) -> int:
        if any(one.verdict.stay is Stay.FAILED for one in self.found):
            return EXIT_ENVIRONMENT
        return EXIT_OK if self.heard else EXIT_TIMEOUT

    def as_text(self, older_s: float) -> str:
        """The directories that go, those that stay with the reason, and how many of the others there are."""
        size = size_words(sum(one.size or 0 for one in self.gone))
        verb = "removed" if self.done else "would remove"
        lines = [f"{verb} {len(self.gone)} of {len(self.found)} run directories below {self.base}: {size}"]
        lines += [f"  {_line(one)}" for one in self.gone]
        counted = Counter(one.verdict.stay for one in self.found)
        named = [one for one in self.found if one.verdict.stay not in {None, Stay.LIVES, Stay.YOUNG}]
        lines += ["stays:"] if len(self.gone) < len(self.found) else []
        lines += [f"  {counted[Stay.LIVES]} of runs that live"] if counted[Stay.LIVES] else []
        young = f"  {counted[Stay.YOUNG]} that ended, or were changed, within {words_of(older_s)}"
        lines += [young] if counted[Stay.YOUNG] else []
        lines += [f"  {_line(one)}: {one.verdict.why}" for one in named]
        lines += [f"not touched, as it is no run's: {what}: {path}" for what, path in self.not_touched]
        return "".join(f"{printable(line)}\n" for line in lines)

    def as_json(self) -> str:
        """The same for scripts, every directory with its reason."""
        told = {
            "schema": SCHEMA,
            "base": str(self.base),
            "dry_run": not self.done,
            "slurm_answers": self.heard,
            "freed_bytes": sum(one.size or 0 for one in self.gone),
            "removed": [_dict(one) for one in self.gone],
            "kept": [{**_dict(one), **_why(one)} for one in self.found if not one.goes],
            "not_touched": [{"what": what, "path": str(path)} for what, path in self.not_touched],
        }
        return json.dumps(told, indent=2) + "\n"


def _dict(one: Candidate) -> dict[str, object]:
    return {"run": one.path.name, "directory": str(one.path), "state": one.state or None, "bytes": one.size}


def _why(one: Candidate) -> dict[str, object]:
    return {"kept_as": one.verdict.stay.value if one.verdict.stay else None, "why": one.verdict.why}


def _line(one: Candidate) -> str:
    """A directory in a line: its name, how its run ended, how long ago, how much it is."""
    age = f"{words_of(one.age_s)} ago" if one.age_s is not None and one.age_s >= 0 else ""
    size = size_words(one.size) if one.size is not None else ""
    state = "half removed before" if one.is_rest else one.state
    return "  ".join([one.path.name, *filter(None, [" ".join(filter(None, [state, age])), size])])


def size_words(size: int) -> str:
    """Bytes in the largest unit of which there is at least one: ``14.2 GiB``."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(max(0, size.bit_length() - 1) // 10, len(units) - 1)
    return f"{size / 1024**power:.1f} {units[power]}" if power else f"{size} {units[0]}"


def _not_touched(base: Path) -> list[tuple[str, Path]]:
    """What else of ours lies on the disk, as far as it is there."""
    home = Path("~/.cache/skyrl").expanduser()
    named = {name: os.environ.get(name) for name in ("SKYRL_AGENT_CACHE", "SKYRL_VERL_CACHE")}
    places = [
        ("image archives and caches", base / ".cache"),
        ("agent trees", Path(named["SKYRL_AGENT_CACHE"] or home / "agent")),
        ("VERL's environment of --config local-verl", Path(named["SKYRL_VERL_CACHE"] or home / "verl-0.5.0")),
    ]
    return [(what, path) for what, path in places if path.is_dir()]
