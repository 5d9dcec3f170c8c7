"""What a ``.conf`` says: bash sources it in a child, and every variable it set comes back exactly, with its line.

Values travel NUL-separated through an unlinked file on a private descriptor, and bash's own trace (``BASH_XTRACEFD``)
tells which variables were assigned and where, so nothing that the file prints can end up in a value.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import stat
import string
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slurm.lib.errors import Problem
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.secrets import is_secret_name

Value = str | tuple[str, ...]

# These change what bash itself does before or while it reads the file; the caller's copies do not reach the child.
_DROPPED = frozenset({"BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "POSIXLY_CORRECT", "PS4", "BASH_XTRACEFD"})
# Bash keeps these for itself; they are never values of a configuration.
_INTERNAL = frozenset(
    re.findall(
        r"\w+",
        """
        _ BASH BASHOPTS BASHPID COMP_WORDBREAKS COPROC DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME GROUPS
        HISTCMD IFS LINENO MAPFILE OLDPWD OPTARG OPTERR OPTIND PIPESTATUS POSIXLY_CORRECT PPID PS4 PWD RANDOM REPLY
        SECONDS SHELLOPTS SHLVL SRANDOM UID
        """,
    )
)
_OWN_PREFIX = "__skyrl_"
_LOWEST_FD = 60  # out of the way of a file that says `exec 3>…`

_ALL_NAMES = " ".join(f'"${{!{first}@}}"' for first in string.ascii_letters + "_")

# Only builtins and no fork. xtrace starts last before, and stops first after, the user's file.
_DRIVER = """
__skyrl_conf=$1
for __skyrl_name in @NAMES@; do builtin printf '%s\\0' "$__skyrl_name"; done >&@DUMP@
builtin printf '\\0' >&@DUMP@
builtin set --
PS4='+@MARK@${BASH_SUBSHELL}\x1f${LINENO}\x1f${BASH_SOURCE[0]-}\x1f'
BASH_XTRACEFD=@TRACE@
builtin set -x
builtin source "$__skyrl_conf"
__skyrl_status=$?
{ builtin set +xveuf; IFS=$' \\t\\n'; } 2>/dev/null
for __skyrl_name in @NAMES@; do
  builtin printf '%s\\0' "$__skyrl_name"
  builtin declare -p "$__skyrl_name" 2>/dev/null
  __skyrl_all="$__skyrl_name[@]"
  builtin set -- "${!__skyrl_all}"
  builtin printf '\\0'
  builtin printf '%s\\0' "$#" "$@"
done >&@DUMP@
builtin printf '\\0%s\\0' "$__skyrl_status" >&@DUMP@
"""

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[[^\]]*\])?\+?=", re.ASCII)
_WORD = re.compile(r"(?:\$'(?:\\.|[^'\\])*'|'[^']*'|\\.|[^\s'\\])+", re.S)
_DECLARING = frozenset({"export", "declare", "typeset", "readonly"})
_DIAGNOSTIC = re.compile(r"(?P<file>.+?): \S+ (?P<line>\d+): (?P<what>.+)")  # `line` is translated in other locales
_SPACED = re.compile(r"\s*(?:export\s+|declare\s+|readonly\s+)?([A-Za-z_]\w*)(?:\s+=|=\s+\S)", re.ASCII)
_TWO_WORDS = re.compile(r"(?:^|[;{(]|\b(?:then|else|do))\s*([A-Za-z_]\w*)=[^\s;|&#'\"()]+[ \t]+[^\s#&|;]", re.ASCII)
_NOT_THERE = ("command not found", "No such file or directory")


@dataclass(frozen=True)
class SourcedConf:
    """What sourcing a file did.

    ``values``: every variable that the file assigned or changed, one assigned to what the environment already had
    included; arrays are tuples of their elements in index order. ``lines``: where each was assigned last, in the file
    or in one it sources. ``problems``: what bash rejected; a complaint that the file itself sends to /dev/null is
    none. ``unset``: variables of the environment that the file removed. ``associative``: associative arrays, which no
    job can inherit; the file may use them, but they are not values. ``files``: the file and those it sourced.
    ``for_a_command``: what the file set for one command alone (``X=1 command``), and where.
    """

    values: dict[str, Value]
    lines: dict[str, tuple[Path, int]]
    problems: tuple[Problem, ...] = ()
    unset: frozenset[str] = frozenset()
    associative: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()
    for_a_command: dict[str, tuple[Path, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """One command as bash traced it."""

    subshell: int
    line: int
    file: str
    text: str


@dataclass(frozen=True)
class _Variable:
    name: str
    attributes: str
    elements: tuple[str, ...]

    @property
    def value(self) -> Value:
        return self.elements if "a" in self.attributes else self.elements[0]


@dataclass(frozen=True)
class _Dump:
    """The names before the file ran, and, where bash got to its end, the variables and the status after it."""

    before: frozenset[str]
    after: dict[str, _Variable]
    status: int | None


def source_conf(path: Path, environment: Mapping[str, str], timeout_s: float = 10) -> SourcedConf:
    """Source ``path`` with bash and read back what it set.

    The child sees ``environment`` without BASH_ENV, ENV and the like, an empty stdin and the caller's folder; what
    the file prints goes to our stderr. After ``timeout_s`` seconds its process group is killed and that is a problem,
    as everything else that goes wrong is: nothing is raised for a bad file.
    """
    path = _absolute(path)
    refusal = _unreadable(path)
    if refusal:
        return SourcedConf({}, {}, (Problem(str(path), refusal),))
    mark = f"\x1f{os.urandom(8).hex()}\x1f"
    with _private_file() as dump, _private_file() as trace, _private_file() as complaints:
        spec = _child(path, environment, mark, dump, trace, complaints)
        with Child(spec, stop_grace_s=0.0) as child:
            ended = child.wait(timeout_s)
            code = child.exit_code
        steps = _parse_trace(_content(trace), mark)
        dumped = _parse_dump(_content(dump))
        said = _content(complaints)
    sources = _Sources(path, steps)
    problems = _diagnostics(said, sources) + _end_problems(ended, code, dumped, steps, sources, timeout_s)
    return _result(dumped, steps, environment, sources, problems)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  resolve() would follow links that the user chose


def _unreadable(path: Path) -> str | None:
    """Why bash need not even try, or None."""
    try:
        if _is_stream(path):
            return "is not a regular file (a pipe can be read only once); write the settings into a file and name that"
        content = path.read_bytes()
    except OSError as problem:
        return f"cannot read this configuration file: {problem.strerror}"
    if b"\r\n" in content:
        return (
            f"has Windows line ends, which bash takes into the values; run: sed -i 's/\\r$//' {shlex.quote(str(path))}"
        )
    if b"\0" in content:
        return "is not a text file (it holds NUL bytes)"
    return None


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe or a device, or stands for what only this process has open (/dev/stdin, /dev/fd/3)."""
    mode = path.stat().st_mode
    folder = str(path.parent.resolve())
    own = folder == "/dev" or folder.startswith("/proc/")
    return not stat.S_ISDIR(mode) and (own or not stat.S_ISREG(mode))


@contextlib.contextmanager
def _private_file() -> Iterator[int]:
    """A descriptor, numbered high, of a file without a name that only we can read."""
    file = _nameless_file()
    try:
        descriptor = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD)
    finally:
        os.close(file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("skyrl-conf")
    import tempfile  # 10 ms, needed only by a Python built for kernels older than 3.17

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _content(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.fsdecode(os.pread(descriptor, size, 0))


def _child(path: Path, environment: Mapping[str, str], mark: str, dump: int, trace: int, complaints: int) -> ChildSpec:
    script = _DRIVER
    for name, text in (("NAMES", _ALL_NAMES), ("DUMP", str(dump)), ("TRACE", str(trace)), ("MARK", mark)):
        script = script.replace(f"@{name}@", text)
    kept = {name: value for name, value in environment.items() if name not in _DROPPED}
    kept.pop("BASH_FUNC_command_not_found_handle%%", None)  # a distribution's "did you mean to install"
    return ChildSpec(
        argv=("bash", "--noprofile", "--norc", "-c", script, "skyrl-conf", str(path)),
        environment=kept,
        name="bash for the configuration",
        stdout=2,
        stderr=complaints,
        pass_fds=(dump, trace),
    )


def _parse_trace(text: str, mark: str) -> list[_Step]:
    """The commands of the files, in order; those of a function from the environment count where it was called."""
    steps: list[_Step] = []
    for record in text.split(mark)[1:]:
        subshell, line, file, command = (*record.split("\x1f", 3), "", "", "")[:4]
        command = command.rstrip("+").rstrip("\n")
        if file == "environment" and steps:
            steps.append(replace(steps[-1], subshell=int(subshell), text=command))
        elif file:  # none: a command of the driver, or a record cut off by the deadline
            steps.append(_Step(int(subshell), int(line), file, command))
    return steps


def _parse_dump(text: str) -> _Dump:
    fields = iter(text.split("\0"))
    before = frozenset(_until_empty(fields))
    after = {}
    try:
        for name in _until_empty(fields):
            declaration = next(fields)
            count = int(next(fields))
            elements = tuple(next(fields) for _ in range(count))
            attributes = declaration.split(" ", 2)[1] if declaration.startswith("declare ") else ""
            after[name] = _Variable(name, attributes, elements)
        return _Dump(before, after, int(next(fields)))
    except (StopIteration, RuntimeError, ValueError):  # bash ended in the middle
        return _Dump(before, {}, None)


def _until_empty(fields: Iterator[str]) -> Iterator[str]:
    return iter(lambda: next(fields, ""), "")


class _Sources:
    """The file and those it sources: their names as bash says them, and their lines."""

    def __init__(self, main: Path, steps: Iterable[_Step]) -> None:
        self.main = main
        self._lines: dict[str, list[str]] = {}
        self.names = list(dict.fromkeys([str(main), *_names_sourced(steps)]))

    def lines(self, name: str) -> list[str]:
        if name not in self._lines:
            try:
                self._lines[name] = os.fsdecode(Path(name).read_bytes()).split("\n")
            except OSError:
                self._lines[name] = []
        return self._lines[name]

    def line(self, name: str, number: int) -> str:
        lines = self.lines(name)
        return lines[number - 1] if 0 < number <= len(lines) else ""

    def start_of(self, variable: str, name: str, number: int) -> int:
        """The line on which an assignment begins; bash names the one on which it ends."""
        pattern = re.compile(rf"(?<!\w){variable}(?:\[.*?\])?\+?=", re.ASCII)
        above = (n for n in range(number, 0, -1) if pattern.search(self.line(name, n)))
        return next(above, number)

    def mention(self, variable: str, steps: Iterable[_Step]) -> tuple[Path, int]:
        """Where a variable that no traced assignment explains was set: `read X`, `printf -v X`, `${X:=…}`."""
        pattern = re.compile(rf"(?<!\w){variable}(?!\w)", re.ASCII)
        for step in reversed(list(steps)):
            if pattern.search(step.text):
                return Path(step.file), step.line
        for name in self.names:
            for number, line in enumerate(self.lines(name), start=1):
                if pattern.search(line.partition("#")[0]):
                    return Path(name), number
        return self.main, 1


def _names_sourced(steps: Iterable[_Step]) -> Iterator[str]:
    for step in steps:
        yield step.file
        words = _WORD.findall(step.text)
        if len(words) > 1 and words[0] in ("source", "."):
            yield _unquoted(words[1]) or words[1]


def _unquoted(word: str) -> str | None:
    """A word of the trace without its quotes, or None where it holds an escape of bash's."""
    if "$'" in word:
        return None
    try:
        return "".join(shlex.split(word))
    except ValueError:
        return None


def _diagnostics(said: str, sources: _Sources) -> list[Problem]:
    """Bash's complaints about the files as problems; everything else that was said goes on to our stderr."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in said.splitlines(keepends=True):
        match = _DIAGNOSTIC.fullmatch(line.rstrip("\n"))
        if match and match["file"] in sources.names:
            found.setdefault((match["file"], int(match["line"])), []).append(match["what"])
        else:
            sys.stderr.write(line.encode("utf-8", "replace").decode("utf-8"))
    return [_complaint(sources, file, number, words) for (file, number), words in found.items()]


def _complaint(sources: _Sources, file: str, number: int, words: list[str]) -> Problem:
    line = sources.line(file, number)
    what = "bash says: " + "; ".join(words)
    if any(is_secret_name(name) for name in re.findall(r"\w+", line)):
        what = "bash rejects this line (its words are withheld, for it names a secret)"
    spaced = _SPACED.match(line)
    if spaced:
        what += f"; an assignment has no space around '=': write {spaced[1]}=VALUE"
    elif (split := _TWO_WORDS.search(line)) and all(word.endswith(_NOT_THERE) for word in words):
        what += f'; if the value has a space, quote it: {split[1]}="…"'
    elif any("command not found" in word for word in words):
        what += "; correct the command, or add 2>/dev/null where it may be missing"
    return Problem(f"{file}:{number}", what)


def _last(steps: Sequence[_Step]) -> _Step | None:
    """Where bash was at the end; what a background job traced late, from further up, does not count."""
    own = [step for step in steps if step.subshell == 0]
    if own and own[-1].file == steps[-1].file and own[-1].line > steps[-1].line:
        return own[-1]
    return steps[-1] if steps else None


def _end_problems(
    ended: bool, code: int | None, dumped: _Dump, steps: list[_Step], sources: _Sources, timeout_s: float
) -> list[Problem]:
    """What is wrong with how the file ended: at the deadline, by ``exit``, by ``return`` with a failure."""
    last = _last(steps) or _Step(0, 1, str(sources.main), "")
    where = f"{last.file}:{last.line}"
    if not ended:
        return [
            Problem(where, f"bash was still at this line after {timeout_s:g} s and was stopped; what does it wait for?")
        ]
    if dumped.status is None:
        return [Problem(where, f"the file ended bash here with exit code {code}; what follows was not read")]
    if dumped.status and re.match(r"return\s+[1-9]", last.text):
        return [Problem(where, f"the file gave up here: {last.text.strip()}")]
    return []


def _result(
    dumped: _Dump, steps: list[_Step], environment: Mapping[str, str], sources: _Sources, problems: list[Problem]
) -> SourcedConf:
    traced = _traced_assignments(steps, dumped, environment)
    ours = {name: variable for name, variable in dumped.after.items() if _is_value(variable)}
    changed = {
        name: variable
        for name, variable in ours.items()
        if name in traced
        or variable.value != environment.get(name, None if name not in dumped.before else variable.value)
    }
    lines = {}
    for name in changed:
        file, number = traced.get(name) or sources.mention(name, steps)
        lines[name] = (_absolute(file), sources.start_of(name, str(file), number))
    return SourcedConf(
        values={name: variable.value for name, variable in changed.items() if "A" not in variable.attributes},
        lines=lines,
        problems=tuple(problems),
        unset=_removed(dumped, environment),
        associative=frozenset(name for name, variable in changed.items() if "A" in variable.attributes),
        files=tuple(_absolute(name) for name in sources.names if Path(name).is_file()),
        for_a_command=_for_a_command(steps, dumped, environment, sources) if dumped.status is not None else {},
    )


def _is_value(variable: _Variable) -> bool:
    """Whether a variable is set, and neither bash's, nor ours, nor a reference to another one."""
    name, attributes = variable.name, variable.attributes
    if name in _INTERNAL or name.startswith(("BASH_", _OWN_PREFIX)) or "n" in attributes:
        return False
    return bool(variable.elements) or "a" in attributes or "A" in attributes


def _traced_assignments(
    steps: Iterable[_Step], dumped: _Dump, environment: Mapping[str, str]
) -> dict[str, tuple[str, int]]:
    """Where each variable was last assigned in the shell itself (not in a subshell)."""
    found = {}
    for step in steps:
        if step.subshell == 0:
            for name, value in _assigned(step.text):
                if not _was_temporary(name, value, dumped, environment):
                    found[name] = (step.file, step.line)
    return found


def _assigned(text: str) -> Iterator[tuple[str, str | None]]:
    """The names that a traced command assigns, each with its value where that can be told."""
    match = _ASSIGNMENT.match(text)
    if match:
        yield match[1], _unquoted(text[match.end() :])
        return
    words = _WORD.findall(text)
    if words and words[0] in _DECLARING:
        for word in words[1:]:
            match = _ASSIGNMENT.match(word.lstrip("$'"))
            if match:
                yield match[1], None


def _was_temporary(name: str, value: str | None, dumped: _Dump, environment: Mapping[str, str]) -> bool:
    """Whether it was an ``X=1 command``: the variable still has the environment's value, which is another one."""
    variable = dumped.after.get(name)
    if variable is None or value is None or name not in environment or "a" in variable.attributes:
        return False
    return variable.elements == (environment[name],) and value != environment[name]


def _for_a_command(
    steps: Sequence[_Step], dumped: _Dump, environment: Mapping[str, str], sources: _Sources
) -> dict[str, tuple[Path, int]]:
    """What ``X=1 command`` set, and nothing after it: traced as an assignment, on a line of this form, and gone."""
    found: dict[str, tuple[Path, int]] = {}
    for step in (step for step in steps if step.subshell == 0):
        split = _TWO_WORDS.search(sources.line(step.file, step.line))
        for name, value in _assigned(step.text):
            gone = name not in dumped.after or _was_temporary(name, value, dumped, environment)
            if gone and split and split[1] == name:
                found[name] = (_absolute(step.file), step.line)
    return found


def _removed(dumped: _Dump, environment: Mapping[str, str]) -> frozenset[str]:
    if dumped.status is None:
        return frozenset()
    gone = dumped.before & environment.keys() - dumped.after.keys()
    return frozenset(name for name in gone if name not in _INTERNAL)
