"""Every verb of launch.py, also those to come: on poor terminals, without one, and with a stdout that goes away.

The command lines are made from the verbs' own parsers. A verb that takes what is not known here fails these tests until
``WORDS`` says what.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slurm.lib import cli
from slurm.lib.verbs.completion import verb_parser
from tests.fake_slurm import FakeSlurm
from tests.observed_runs import folder_of
from tests.test_looking_verbs import ROOT, base, environment, slurm  # noqa: F401  fixtures

RUN = folder_of("failed").name
LAUNCH = "launch"  # the command without a verb
# Of verbs that need, or must be spared, something: these words in place of what their parser asks for.
WORDS: Mapping[str, tuple[str, ...]] = {
    LAUNCH: ("--config", "dev", "--dry-run"),
    "doctor": ("--set", "SKYRL_BACKEND=nonsense"),  # its looks at this machine take their time: test_doctor
}
POSITIONALS = {"RUN": RUN, "SHELL": "bash"}
VERBS = sorted([LAUNCH, *cli.VERBS])
ENCODINGS = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
}
ESCAPE = re.compile(r"\x1b")


def words_of(verb: str) -> list[str]:
    """A whole command line of a verb, about a run that has ended."""
    if verb in WORDS:
        return [*([] if verb == LAUNCH else [verb]), *WORDS[verb]]
    required = [action for action in verb_parser(verb)._actions if is_wanted(action)]
    unknown = [action.metavar for action in required if action.metavar not in POSITIONALS]
    assert not unknown, f"say in WORDS what {verb} is tried with: it takes {unknown}"
    return [verb, *(POSITIONALS[str(action.metavar)] for action in required)]


def is_wanted(action: argparse.Action) -> bool:
    return not action.option_strings and (action.nargs in {None, "+"} or action.metavar == "RUN")


def help_of(verb: str) -> list[str]:
    return ["--help"] if verb == LAUNCH else [verb, "--help"]


@dataclass
class Call:
    """A call with streams of its own."""

    slurm: FakeSlurm
    words: list[str]
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        return [sys.executable, str(ROOT / "slurm" / "launch.py"), *self.words]

    def run(self, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
        shell = environment(self.slurm, **self.more)
        return subprocess.run(
            self.argv, env=shell, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, timeout=120
        )

    def on_terminal(self, columns: int) -> tuple[int, str]:
        """Exit code, and all that is shown on a terminal of so many columns."""
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        shell = environment(self.slurm, TERM="xterm", **self.more)
        with subprocess.Popen(
            self.argv, env=shell, stdin=side, stdout=side, stderr=side, start_new_session=True
        ) as process:
            os.close(side)
            shown = b"".join(iter(lambda: read(main), b""))
            os.close(main)
        return process.returncode, shown.decode().replace("\r\n", "\n")


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other side is closed
        return b""


Lines = Callable[[str], list[str]]
every_verb = pytest.mark.parametrize("verb", VERBS)
both = pytest.mark.parametrize("lines", [help_of, words_of], ids=["help", "run"])


_USUAL: dict[tuple[str, ...], tuple[int, bool]] = {}


def usual(slurm: FakeSlurm, words: list[str]) -> tuple[int, bool]:  # noqa: F811
    """The exit code with nothing in the way, and whether stdout says something; without a terminal, so uncoloured."""
    key = tuple(words)
    if key not in _USUAL:
        done = Call(slurm, words, {"LC_ALL": "C.UTF-8"}).run()
        assert not ESCAPE.search((done.stdout + done.stderr).decode())
        _USUAL[key] = done.returncode, bool(done.stdout)
    return _USUAL[key]


@every_verb
@both
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_stdout_without_utf_8(
    verb: str,
    lines: Lines,
    encoding: str,
    slurm: FakeSlurm,  # noqa: F811
    base: Path,  # noqa: F811
) -> None:
    """What the encoding lacks is written in other words, and the end is the same."""
    done = Call(slurm, lines(verb), ENCODINGS[encoding]).run()
    assert (done.returncode, bool(done.stdout)) == usual(slurm, lines(verb)), done.stderr
    written = done.stdout + done.stderr
    assert written.isascii() if encoding == "C" else b"\xe2\x80" not in written, written
    assert not [words for words in (b"Traceback", b"\\u20") if words in written]


@every_verb
@both
def test_a_narrow_terminal_without_colour(verb: str, lines: Lines, slurm: FakeSlurm, base: Path) -> None:  # noqa: F811
    code, shown = Call(slurm, lines(verb), {"NO_COLOR": "1"}).on_terminal(40)
    assert code == usual(slurm, lines(verb))[0], shown
    assert shown.strip()
    assert not ESCAPE.search(shown)
    assert "Traceback" not in shown


@every_verb
@both
def test_a_reader_that_has_left(verb: str, lines: Lines, slurm: FakeSlurm, base: Path) -> None:  # noqa: F811
    """As ``| head -1``, at its soonest: no word about it, and no other exit code."""
    reading, writing = os.pipe()
    os.close(reading)
    done = Call(slurm, lines(verb)).run(writing)
    os.close(writing)
    assert done.returncode == usual(slurm, lines(verb))[0], done.stderr
    assert not [words for words in (b"Traceback", b"Broken pipe", b"Exception ignored") if words in done.stderr]


@every_verb
@both
def test_a_stdout_that_is_closed(verb: str, lines: Lines, slurm: FakeSlurm, base: Path) -> None:  # noqa: F811
    argv = ["sh", "-c", 'exec "$@" >&-', "sh", *Call(slurm, lines(verb)).argv]
    done = subprocess.run(argv, env=environment(slurm), stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == usual(slurm, lines(verb))[0], done.stderr
    assert b"Traceback" not in done.stderr


@every_verb
@both
def test_a_stdout_that_is_full(verb: str, lines: Lines, slurm: FakeSlurm, base: Path) -> None:  # noqa: F811
    """It is said, and is no success."""
    code, says = usual(slurm, lines(verb))
    with Path("/dev/full").open("wb") as full:
        done = Call(slurm, lines(verb)).run(full.fileno())
    assert done.returncode != 0 if says else done.returncode == code
    assert (b"No space left on device" in done.stderr) is says
    assert not [words for words in (b"Traceback", b"Exception ignored") if words in done.stderr]
