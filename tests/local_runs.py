"""Runs on this machine alone, as a user starts and watches them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import OrdinaryUser
from tests.runs import until

GONE_WITHIN_S = 10.0  # promised for a launcher that is killed


@dataclass
class Place:
    """Who launches, from which checkout, into which jobs base."""

    checkout: Path
    base: Path
    user: OrdinaryUser | None
    environment: Mapping[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self,
        *settings: str,
        terminal: int | None = None,
        options: tuple[str, ...] = (),
        config: str = "local",
    ) -> Local:
        """Start a local run; its streams go to files, or to a terminal that is the run's own."""
        number = len(self.started)
        words = [word for setting in settings for word in ("--set", setting)]
        argv = [str(self.checkout / "slurm" / "launch.py"), "--config", config, *words, *options]
        out, err = self.base / f"stdout{number}", self.base / f"stderr{number}"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=stdout if terminal is None else terminal,
                stderr=stderr if terminal is None else terminal,
                cwd=self.base,
                env={**self.environment, "SKYRL_JOBS_BASE": str(self.base)},
                user=self.user.uid if self.user else None,
                group=self.user.gid if self.user else None,
                extra_groups=[] if self.user else None,
                start_new_session=True,
                preexec_fn=None if terminal is None else _own_terminal,
            )
        self.started.append(process)
        return Local(self, process, out, err, set(self.base.glob("2*")))

    def leftovers(self) -> list[str]:
        """Processes, storage and sockets of the runs that were launched here; those of others do not count."""
        ids = [path.name.rpartition("_")[2] for path in self.base.glob("2*")]
        marks = [os.fsencode(self.base), *(f"-{job_id}".encode() for job_id in ids)]
        launchers = {process.pid for process in self.started if process.poll() is None}
        found = [f"process {pid}: {words!r}" for pid, words in processes(marks) if pid not in launchers]
        names = [f"*{name}-*{job_id}*" for job_id in ids for name in ("skyrl", "skyray")]
        storage = [str(path) for name in names for path in Path("/tmp").glob(name)]
        sockets = [line for line in Path("/proc/net/unix").read_text().splitlines() if any(i in line for i in ids)]
        return found + storage + sockets

    def assert_nothing_left(self, within_s: float = GONE_WITHIN_S) -> float:
        """Wait until nothing of this place's runs is left, and return the seconds that took."""
        begin = time.monotonic()
        while left := self.leftovers():
            assert time.monotonic() - begin < within_s, left
            time.sleep(0.1)
        return time.monotonic() - begin

    @contextlib.contextmanager
    def lent(self) -> Iterator[Place]:
        """This place for the length of the block, after which nothing of its runs may be left."""
        try:
            yield self
            self.assert_nothing_left()
        finally:
            for process in self.started:
                process.kill()
                process.wait()


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def processes(marks: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Living processes whose arguments, environment or folder hold one of the marks."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            words = (entry / "cmdline").read_bytes()
            said = words + (entry / "environ").read_bytes() + os.fsencode((entry / "cwd").readlink())
            if any(mark in said for mark in marks):
                yield int(entry.name), words.replace(b"\0", b" ")[:150]


@dataclass
class Local:
    """A local run that has been started."""

    place: Place
    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    before: set[Path]

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def directory(self) -> Path:
        """The run's directory, as stdout names it."""
        until("the run directory", lambda: "\n" in self.out.read_text(), 60)
        named = re.fullmatch(r"coordination directory: (.+)\n", self.out.read_text())
        assert named, self.out.read_text()
        return Path(named[1])

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def wait_for(self, text: str, seconds: float = 30) -> None:
        until(f"{text!r} on stderr", lambda: text in self.stderr or self.process.poll() is not None, seconds)
        assert text in self.stderr, self.stderr

    def completion(self) -> dict[str, object]:
        return dict(json.loads((self.directory / "training_complete.flag").read_text()))
