"""A terminal, as a person has it: what is typed reaches the command in it, and all that it prints is kept."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import OrdinaryUser
from tests.runs import until

INTERRUPT = "\x03"  # Ctrl-C
LINE_S = 60.0


@dataclass
class Terminal:
    """A terminal with a running command in it."""

    process: subprocess.Popen[bytes]
    screen: int
    _text: str = field(default="", init=False)

    @property
    def text(self) -> str:
        """All that was printed so far, what was typed among it."""
        while select.select([self.screen], [], [], 0)[0]:
            try:
                piece = os.read(self.screen, 65536)
            except OSError:  # its command is gone
                break
            self._text += piece.decode(errors="replace").replace("\r", "")
        return self._text

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self.screen, keys.encode())

    def awaits(self, pattern: str, seconds: float = LINE_S) -> re.Match[str]:
        """Wait until something is printed."""
        until(f"{pattern!r} on the terminal", lambda: re.search(pattern, self.text), seconds)
        found = re.search(pattern, self.text)
        assert found
        return found

    def does(self, lines: str, seconds: float = LINE_S) -> str:
        """Type lines to a shell, wait until they are done, and return what they printed; they have to succeed."""
        begin = len(self.text)
        self.type(f"{lines}\necho exit code=$?\n")
        until(f"{lines!r} on the terminal", lambda: re.search(r"^exit code=\d", self.text[begin:], re.M), seconds)
        printed = self.text[begin:]
        assert "\nexit code=0" in printed, printed
        return printed

    def leave(self) -> None:
        """Say goodbye to its shell, and wait until the command is over."""
        self.type("exit\n")
        until("the end of its command", lambda: [self.text] and self.process.poll() is not None, LINE_S)


@contextlib.contextmanager
def terminal(user: OrdinaryUser, command: str, cwd: Path, environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A user's terminal in which bash runs a command; closed at the end, as a window is."""
    screen, inside = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", command],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env={**user.environment, "TERM": "dumb", **environment},
        cwd=cwd,
        user=user.uid,
        group=user.gid,
        extra_groups=[],
        start_new_session=True,
    )
    os.close(inside)
    with _closed(process, screen) as shown:
        yield shown


@contextlib.contextmanager
def own_terminal(argv: list[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A command of ours in a terminal that is its own, so that Ctrl-C reaches it; closed at the end."""
    screen, inside = pty.openpty()
    setsid = shutil.which("setsid")
    assert setsid
    process = subprocess.Popen(
        [setsid, "--ctty", *argv], stdin=inside, stdout=inside, stderr=inside, env=dict(environment)
    )
    os.close(inside)
    with _closed(process, screen) as shown:
        yield shown


@contextlib.contextmanager
def _closed(process: subprocess.Popen[bytes], screen: int) -> Iterator[Terminal]:
    """The terminal of a command, until the end of the block."""
    with process:
        try:
            yield Terminal(process, screen)
        finally:
            os.close(screen)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
