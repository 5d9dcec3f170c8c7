"""Ends what a job body owned if the body itself is killed with SIGKILL.

The body starts it first and holds the only write end of its stdin. It tells it what it owns (``own storage PATH``,
``own session SID TICKS``) and what it has ended itself (``ended …``). When the pipe closes, for whatever reason, the
guardian ends the rest and goes. It leaves the job's process tree (two forks), so that a scheduler that follows parents
does not end it before it has done its work; where the scheduler follows cgroups, it ends everything itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from slurm.lib.podman_storage import remove_when_ownerless
from slurm.lib.processes import ignore_stops, start_ticks


class Guardian:
    """The body's end of the pipe."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(line.encode() + b"\n")
            self._pipe.flush()

    def own_storage(self, root: Path) -> None:
        self._say(f"own storage {root}")

    def own_session(self, sid: int) -> None:
        """``sid`` leads a session of its own; all processes of that session are the guardian's to end."""
        self._say(f"own session {sid} {start_ticks(sid) or 0}")

    def ended(self, kind: str, name: object) -> None:
        self._say(f"ended {kind} {name}")


@contextlib.contextmanager
def guarded(code: Path) -> Iterator[Guardian]:
    """A guardian for the length of the block."""
    argv = [sys.executable, "-m", "slurm.lib.guardian"]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        preexec_fn=ignore_stops,
    )
    assert process.stdin
    try:
        yield Guardian(process.stdin)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def session_members(sid: int) -> list[int]:
    """The processes of a session, from /proc."""
    members = []
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{int(entry.name)}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == sid and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def end_session(sid: int, ticks: int) -> None:
    """Kill every process of a session, unless its id is by now somebody else's."""
    leader = start_ticks(sid)
    if leader is not None and leader != ticks:
        return
    for pid in session_members(sid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def remember(owned: dict[tuple[str, str], list[str]], line: str) -> None:
    """Take one line of the body into account."""
    verb, _, rest = line.strip().partition(" ")
    kind, _, details = rest.partition(" ")
    name = details if kind == "storage" else details.split(" ")[0]
    if verb == "own":
        owned[kind, name] = details.split(" ")
    else:
        owned.pop((kind, name), None)


def end_all(owned: dict[tuple[str, str], list[str]]) -> None:
    for (kind, name), details in owned.items():
        if kind == "session":
            end_session(int(name), int(details[1]))
    for kind, name in owned:
        if kind == "storage":
            remove_when_ownerless(Path(name))


def main() -> None:
    if os.fork():
        os._exit(0)
    ignore_stops()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    owned: dict[tuple[str, str], list[str]] = {}
    for line in sys.stdin:
        remember(owned, line)
    end_all(owned)


if __name__ == "__main__":
    main()
