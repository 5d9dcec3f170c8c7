"""Which commands can the policy say: a grammar of four slots, the same for every task.

A command is a verb, an option of that verb, the file or folder it reads, and an ending (a filter behind a pipe,
or a file for the output). An action is the tuple of the indices chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

Action = tuple[int, ...]

RESULT_FILE = "result.txt"
FILES = ("< app.log", "< numbers.txt", "< people.txt")
FOLDERS = (".", "conf", "conf/site")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "wc": ("-l", "-w", "-c"),
    "sort": ("-n", "-nr", "-u"),
    "grep": ("ERROR", "-c ERROR", "-v ERROR"),
    "cut": ("-d: -f1", "-d: -f2", "-d: -f3"),
    "awk": ("'{print $1}'", "'{s += $1} END {print s}'", "'{s += NF} END {print s}'"),
    "find": ("-name settings.cfg", "-type d", "-name '*.log'"),
}
VERBS = tuple(OPTIONS)
ENDINGS = ("", "| sort -u", f"> {RESULT_FILE}")
LENGTH = 4


def choices(prefix: Action) -> tuple[str, ...]:
    """The words that may follow ``prefix``, an action of fewer than ``LENGTH`` indices."""
    if not prefix:
        return VERBS
    verb = VERBS[prefix[0]]
    sources = FOLDERS if verb == "find" else FILES
    return (OPTIONS[verb], sources, ENDINGS)[len(prefix) - 1]


def count(prefix: Action) -> int:
    """How many words may follow ``prefix``; 0 where the command is complete."""
    return len(choices(prefix)) if len(prefix) < LENGTH else 0


def render(action: Action) -> str:
    """The shell command of a complete action."""
    words = [choices(action[:slot])[index] for slot, index in enumerate(action)]
    if words[0] == "find":
        words[1], words[2] = words[2], words[1]  # find takes the folder first
    return " ".join(word for word in words if word)


def fingerprint() -> str:
    """A text that changes whenever the meaning of an action changes; checkpoints of another grammar are not resumed."""
    return repr((sorted(OPTIONS.items()), VERBS, FILES, FOLDERS, ENDINGS))
