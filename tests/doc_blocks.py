"""The fenced blocks of the documents, and what their comments tell the test that runs them (CONTRIBUTING.md).

A comment right before a block begins with ``run:`` and has one word to each line::

    <!-- run: skip: why -->
    <!-- run:
    with: dev = check
    leave out: scripts/test (an hour)
    before: COMMAND
    then: COMMAND
    -->

All here is pure: text → ``Block``, and the blocks of a document → the script that its reader would type.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.site_pages import ROOT, documents

COMMANDS = frozenset({"bash", "sh", "console"})
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(\w*)$")
COMMENT = re.compile(r"^<!-- run:(.*?)-->$", re.DOTALL)
EXCEPTION = re.compile(r"(.+) \(([^()].*)\)")
ANYTHING = re.compile(r".+")
WORDS = {
    "skip": ANYTHING,
    "leave out": EXCEPTION,
    "with": re.compile(r".+ = .+"),
    "before": ANYTHING,
    "then": ANYTHING,
    "may end with": re.compile(r"\d+ \(.+\)"),
    "configuration": re.compile(".*"),
}
PRELUDE = """\
set -eE
at() { HERE="$1"; printf '\\n== %s after %s s\\n' "$1" "$SECONDS"; }
trap 'code=$?; printf "%s: exit code %s of: %s\\n" "$HERE" "$code" "$BASH_COMMAND"' ERR
# The directory of the newest run, or of the Nth newest; the id of its job; the directory of a job's run; a command that
# is tried until it succeeds.
newest() { ls -d ~/.skyrl_jobs/[0-9]*_* | sort -V | tail -n "${1:-1}" | head -n 1; }
newest_id() { local run; run="$(newest "$@")"; printf '%s' "${run##*_}"; }
run_of() { ls -d ~/.skyrl_jobs/[0-9]*_"$1"; }
soon() { local end=$((SECONDS + 180)); until "$@" 2>/dev/null; do ((SECONDS < end)) || "$@" || return; sleep 1; done; }
"""


class Mistake(Exception):
    """A comment that says nothing to the test, with its place."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    :param place: its document and the line of its fence
    :param said: what the comment before it says, each line as (word, rest)
    """

    place: str
    language: str
    text: str
    said: tuple[tuple[str, str], ...] = ()

    @property
    def document(self) -> str:
        return self.place.rpartition(":")[0]

    def rests(self, word: str) -> list[str]:
        """What follows each use of a word."""
        return [rest for said, rest in self.said if said == word]

    @property
    def is_configuration(self) -> bool:
        """Whether it is part of a ``.conf``, which bash reads, and nothing to type."""
        return "configuration" in dict(self.said)

    @property
    def is_run(self) -> bool:
        return self.language in COMMANDS and not self.is_configuration and "skip" not in dict(self.said)

    @property
    def commands(self) -> list[str]:
        """What is typed, a command each, those of several lines in one; of ``console`` blocks what follows ``$``."""
        text = self.text.replace("\\\n", "")
        if self.language != "console":
            return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        return [line[2:] for line in text.splitlines() if line.startswith("$ ")]

    @property
    def left_out(self) -> dict[str, str]:
        """The beginning of each command that is not run → the reason."""
        found = (EXCEPTION.fullmatch(rest) for rest in self.rests("leave out"))
        return {match[1]: match[2] for match in found if match}

    @property
    def replaced(self) -> dict[str, str]:
        """Words that stand for something of the reader's → shell words for it."""
        return dict(rest.split(" = ", 1) for rest in self.rests("with") if " = " in rest)


def words_of(comment: str, place: str) -> tuple[tuple[str, str], ...]:
    """What a comment says; ``Mistake`` for a line that means nothing."""
    found = []
    for line in filter(None, map(str.strip, comment.splitlines())):
        word, _, rest = (part.strip() for part in line.partition(":"))
        if word not in WORDS or not WORDS[word].fullmatch(rest):
            raise Mistake(f"{place}: {line!r} tells the test nothing; CONTRIBUTING.md has the words")
        found.append((word, rest))
    return tuple(found)


def blocks_of(document: str, text: str) -> Iterator[Block]:
    """The blocks of a document in their order; ``Mistake`` for a comment without a block behind it."""
    lines = text.splitlines()
    said: tuple[tuple[str, str], ...] = ()
    at = 0
    while at < len(lines):
        place = f"{document}:{at + 1}"
        if fence := FENCE.match(lines[at]):
            end = next(below for below in range(at + 1, len(lines)) if lines[below].strip() == fence[2])
            body = "".join(f"{line.removeprefix(fence[1])}\n" for line in lines[at + 1 : end])
            yield Block(place, fence[3], body, said)
            said, at = (), end
        elif said:
            raise Mistake(f"{place}: the comment before it wants a block of commands right behind it")
        elif lines[at].startswith("<!-- run:"):
            end = next((below for below in range(at, len(lines)) if lines[below].endswith("-->")), len(lines))
            comment = COMMENT.match("\n".join(lines[at : end + 1]))
            said = words_of(comment[1], place) if comment else ()
            if not said:
                raise Mistake(f"{place}: a comment that tells the test nothing, or has no end")
            at = end
        at += 1
    if said:
        raise Mistake(f"{document}: its last comment has no block behind it")


def all_blocks() -> list[Block]:
    """Every block of every document."""
    return [block for name in documents() for block in blocks_of(name, (ROOT / name).read_text(encoding="utf-8"))]


def exceptions(blocks: list[Block]) -> list[tuple[str, str, str]]:
    """What is not run: its document, how it begins, and why; each once."""
    return list(dict.fromkeys(_exceptions(blocks)))


def _exceptions(blocks: list[Block]) -> Iterator[tuple[str, str, str]]:
    for block in blocks:
        if reasons := block.rests("skip"):
            yield block.document, without_comment(block.commands[0]), reasons[0]
        for command, reason in block.left_out.items():
            yield block.document, command, reason


def without_comment(command: str) -> str:
    """A command without the remark behind it."""
    return re.sub(r"\s+#\s.*$", "", command)


def simple_commands(command: str) -> list[list[str]]:
    """The words of each part of a command line, as between pipes."""
    lexer = shlex.shlex(without_comment(command), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if re.fullmatch(r"[|&;()<>]+", word):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


# --- the script that a reader would type -----------------------------------------------------------------------------


def typed(block: Block) -> str:
    """The commands of a block as its reader types them: some left out, words of theirs in place of those that stand."""
    kept = [line for line in block.commands if not line.lstrip().startswith(tuple(block.left_out))]
    codes = [rest.split()[0] for rest in block.rests("may end with")]
    return "\n".join(checked(with_replaced(line, block.replaced), codes) for line in kept)


def with_replaced(line: str, by: dict[str, str]) -> str:
    """The line with each word replaced by what it stands for, all in one go."""
    if not by:
        return line
    pattern = "|".join(re.escape(word) for word in sorted(by, key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({pattern})(?![\w-])", lambda found: by[found[1]], line)


def checked(line: str, codes: list[str]) -> str:
    """A command that ends the script if it fails with another exit code than these.

    Of a list joined by ``&&`` bash lets all but the last fail unnoticed.
    """
    expected = " || ".join(f"[[ $? == {code} ]]" for code in codes)
    if codes:
        return f"{without_comment(line)} || {expected}"
    return f"{without_comment(line)} || false" if " && " in line else line


def said_again(line: str) -> str:
    """``launch.py cancel`` as its reader says it again where jobs had not ended within its 15 s (exit code 75)."""
    return f"{line} || {{ [[ $? == 75 ]] && {line}; }}" if " cancel " in line else line


def script(blocks: list[Block]) -> str:
    """What the reader of one document types, in order, in one shell; ends with 1 at the first command that fails."""
    parts = [PRELUDE]
    for block in blocks:
        if block.is_run:
            parts += [f"at {shlex.quote(block.place)}", *block.rests("before"), typed(block)]
            parts += [said_again(line) for line in block.rests("then")]
        parts += [f"cat >{path} <<'WRITTEN'\n{block.text}WRITTEN" for path in block.rests("configuration") if path]
    return "\n".join(parts) + "\n"


def with_blocks_to_run(blocks: list[Block]) -> list[str]:
    """The documents that have commands for their reader."""
    return list(dict.fromkeys(block.document for block in blocks if block.is_run))


if __name__ == "__main__":
    for shown in all_blocks():
        how = "run" if shown.is_run else ", ".join(f"{word} {rest}" for word, rest in shown.said) or "looked at"
        print(f"{shown.place}  {shown.language or 'text'}  {how}")
    print(Path(ROOT, "CONTRIBUTING.md"), "has the words for a comment before a block")
