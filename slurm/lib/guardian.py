"""Ends what a job body owned if the body itself is killed with SIGKILL.

The body starts it first and holds the only write end of its stdin, over which it says what it owns: ``session SID
TICKS``, ``marker NAME=VALUE``, and folders before it makes them, ``storage TOKEN PATH``, ``folder TOKEN PATH``. When
the pipe closes, for whatever reason, the guardian ends what is still there of it and goes; after an orderly end that is
nothing. It leaves the job's process tree (two forks), so that a scheduler that follows parents does not end it before
it has done its work; where the scheduler follows cgroups, it ends everything itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from slurm.lib import locked_folder
from slurm.lib.errors import SuiteError
from slurm.lib.podman_storage import PodmanStorage, remove
from slurm.lib.processes import ignore_stops, living_fields, pids, start_ticks


def remove_storage(root: Path) -> None:
    """End what is in a storage, and remove it."""
    remove(PodmanStorage(root))


ON_DISK: Mapping[str, Callable[[Path], None]] = {"storage": remove_storage, "folder": locked_folder.remove}


class Guardian:
    """The body's end of the pipe."""

    def __init__(self, pipe: IO[bytes], starter: subprocess.Popen[bytes]) -> None:
        self._pipe = pipe
        self._starter = starter

    def await_detached(self) -> None:
        """Wait until it has left this process's tree (which takes it one start of Python)."""
        self._starter.wait()

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(line.encode() + b"\n")
            self._pipe.flush()

    def own_storage(self, root: Path, token: str) -> None:
        """Podman storage that this process is about to make; another of that name stays."""
        self._say(f"storage {token} {root}")

    def own_folder(self, root: Path, token: str) -> None:
        """The same for another locked folder."""
        self._say(f"folder {token} {root}")

    def own_session(self, sid: int) -> None:
        """``sid`` leads a session of its own; all processes of that session are the guardian's to end."""
        self._say(f"session {sid} {start_ticks(sid) or 0}")

    def own_marker(self, name: str, value: str) -> None:
        """All processes of this job that were started with this variable are the guardian's to end."""
        self._say(f"marker {name}={value}")


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
        cwd=code,  # Python looks there first: in the folder where a person stands there may be a ctypes.py
        start_new_session=True,
        preexec_fn=ignore_stops,
    )
    assert process.stdin
    try:
        yield Guardian(process.stdin, process)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def session_members(sid: int) -> list[int]:
    """The processes of a session, from /proc."""
    return [pid for pid in pids() if (fields := living_fields(pid)) is not None and int(fields[3]) == sid]


def end_session(sid: int, ticks: int) -> None:
    """Kill every process of a session, unless its id is by now somebody else's."""
    leader = start_ticks(sid)
    if leader is not None and leader != ticks:
        return
    for pid in session_members(sid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def end_marked(entry: bytes) -> None:
    """Kill every process that was started with ``entry`` (``NAME=VALUE``) in its environment.

    Not those of another job, which sbatch has given it.
    """
    for pid in pids():
        with contextlib.suppress(OSError):
            started_with = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if entry in started_with and not _is_of_another_job(started_with):
                os.kill(pid, signal.SIGKILL)


def _is_of_another_job(started_with: Sequence[bytes]) -> bool:
    """Whether Slurm runs such a process in another job than this one. What has no job's number may be in a sandbox."""
    prefix = b"SLURM_JOB_ID="
    own = prefix + os.environb.get(b"SLURM_JOB_ID", b"")
    return any(entry.startswith(prefix) and entry != own for entry in started_with)


def end(line: str) -> None:
    """End one thing that the body owned."""
    kind, _, name = line.rstrip("\n").partition(" ")
    if kind == "session":
        sid, ticks = name.split(" ")
        end_session(int(sid), int(ticks))
    elif kind == "marker":
        end_marked(name.encode())
    else:
        token, _, root = name.partition(" ")
        locked_folder.remove_of_dead_owner(Path(root), token, ON_DISK[kind])


def main() -> None:
    if os.fork():
        os._exit(0)
    ignore_stops()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    processes_first = sorted(sys.stdin.readlines(), key=lambda line: line.startswith(tuple(ON_DISK)))
    for line in processes_first:  # then what they had on disk
        with contextlib.suppress(OSError, SuiteError):  # the others are to end all the same
            end(line)


if __name__ == "__main__":
    main()
