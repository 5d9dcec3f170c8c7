"""What of a diff may be kept with a run? Without ``.env`` files, and without values that names say are secret; pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

from slurm.lib.dot_env import is_dot_env
from slurm.lib.secrets import MASK, is_secret_name, mask_values, without_url_passwords

# In these only what is quoted is a value: ``key=len`` and ``token = decode(x)`` are code.
_PROGRAMS = frozenset(
    {".py", ".pyi", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".rs", ".go", ".js", ".ts", ".java", ".lua"}
    | {".md", ".rst", ".html"}
)
_NAME = r"(?<![\w$-])(?P<name>[A-Za-z_][\w-]*)"
_QUOTED = r"(?P<quote>\\?[\"'])(?P<value>.*?)(?<!\\)(?P=quote)"
_LITERAL = re.compile(
    rf"(?P<head>{_NAME}\\?[\"']?\]?(?:\s*:[\w\[\]|. ]{{1,60}})?\s*(?::=|[:=](?!=))\s*[A-Za-z]{{0,2}}){_QUOTED}"
)
_DEFAULT = re.compile(rf"(?P<head>(?:getenv|get|setdefault|setenv)\(\\?[\"']{_NAME}\\?[\"']\s*,\s*){_QUOTED}")
_SHELL = re.compile(rf"(?P<head>{_NAME}=)(?P<value>[^\s\"'(){{}}\[\],;$][^\s\"',;)]{{7,}})")
_LINE = re.compile(rf"(?P<head>{_NAME}\\?[\"']?\]?\s*\+?(?::=|[:=](?!=))\s*)(?P<value>\S.*)")
_REFERENCE = re.compile(r"[\"']?(\$\{?\w+\}?|\$\{\w+:?[-?]\}|\$\(.*)[\"']?[,;]?\s*", re.DOTALL)
_SPECIAL = re.compile(r"[<\[{].*[>\]}]")  # <pad>, [MASK], {name}: a word of a tokenizer's, or to be filled in
_BEGIN, _END = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), re.compile(r"-----END [A-Z ]*PRIVATE KEY-----")
_UPPER = re.compile(r"[A-Z][A-Z0-9_]*")
_SHORTEST = 4  # characters of a value in a program


def open_diff(text: str, secrets: Iterable[str]) -> tuple[str, list[str]]:
    """The diff without what may be secret, and the ``.env`` files that it had: their changes are left out whole."""
    kept, left_out = [], []
    for section in re.split(r"^(?=diff --git )", text, flags=re.MULTILINE):
        names = list(_names(section))
        hidden = [name for name in names if is_dot_env(name)]
        left_out += hidden[-1:]
        if not hidden:
            kept.append(_without_values(section, names[-1] if names else ""))
    return mask_values("".join(kept), secrets), left_out


def _names(section: str) -> Iterator[str]:
    """The paths that a section of the diff is about, the new one last; without quotes that git puts round odd ones."""
    head, _, rest = section.partition("\n")
    if not head.startswith("diff --git "):
        return
    said = head.removeprefix("diff --git ")
    half = len(said) // 2
    old, new = said[:half].strip('"'), said[half + 1 :].strip('"')
    if old[2:] == new[2:]:
        yield new[2:]
        return
    for line in rest.split("\n@@", 1)[0].splitlines():
        if moved := re.match(r"(?:rename|copy) (?:from|to) (.*)", line):
            yield moved[1].strip('"')


def _without_values(section: str, name: str) -> str:
    """A file's section with the values of secret names masked."""
    is_program = PurePosixPath(name).suffix in _PROGRAMS
    in_key = False  # between the lines that begin and end a private key
    lines = []
    for line in section.splitlines(keepends=True):
        said = line
        if line[:1] in "+- @" and not line.startswith(("+++ ", "--- ")):
            ends = bool(_END.search(line))
            said = f"{line[:1]}{MASK}\n" if in_key and not ends else _masked_line(line, is_program)
            in_key = (in_key or bool(_BEGIN.search(line))) and not ends
        lines.append(said)
    return "".join(lines)


def _masked_line(line: str, is_program: bool) -> str:
    """A line of a hunk, or its heading, which repeats a line of the file."""
    text, newline = line.rstrip("\r\n"), line[len(line.rstrip("\r\n")) :]
    for pattern in (_LITERAL, _DEFAULT):
        text = _replaced(pattern, text, lambda found: _literal(found, is_program))
    text = _replaced(_SHELL if is_program else _LINE, text, lambda found: _bare(found, is_program))
    return without_url_passwords(text) + newline


def _replaced(pattern: re.Pattern[str], text: str, new: Callable[[re.Match[str]], str | None]) -> str:
    """``text`` with what ``new`` says in place of what it finds at a secret name; None leaves that as it is.

    Goes on behind the name that is none: in ``export PLACE=x API_KEY=y`` the first one is no reason to pass the other.
    """
    kept, at = [], 0
    while found := pattern.search(text, at):
        other = new(found) if is_secret_name(found["name"]) and not _is_open(found["value"]) else None
        kept.append(text[at : found.end("name")] if other is None else text[at : found.start()] + other)
        at = found.end("name") if other is None else found.end()
    return "".join([*kept, text[at:]])


def _literal(found: re.Match[str], is_program: bool) -> str | None:
    value = found["value"]
    if is_program and (len(value) < _SHORTEST or _SPECIAL.fullmatch(value)):
        return None
    return f"{found['head']}{found['quote']}{MASK}{found['quote']}"


def _bare(found: re.Match[str], is_program: bool) -> str | None:
    if is_program and not _UPPER.fullmatch(found["name"]):
        return None
    is_quoted = re.match(_QUOTED, found["value"])  # masked by now, or a reference; the line may go on
    return None if is_quoted else f"{found['head']}{MASK}"


def _is_open(value: str) -> bool:
    return value in {"", MASK} or bool(_REFERENCE.fullmatch(value))
