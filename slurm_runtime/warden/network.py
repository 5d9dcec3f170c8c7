"""Cutting a sandbox off: no way out, while its published port goes on answering.

The routes of the container's network namespace go, its local addresses stay: what forwards the published port
(rootlessport with slirp4netns, pasta) connects inside that namespace. On a bridge the neighbours' replies need the
route that goes, so there the port would not answer: the caller uses a private network.
"""

from __future__ import annotations

import os
import shutil
import signal
import time

from slurm_runtime.warden.syscalls import setns

DEADLINE_S = 10.0
FLUSHES = (("-4", "route", "flush", "table", "main"), ("-6", "route", "flush", "table", "main"))


class NetworkProblem(Exception):
    """The network could not be cut."""


def deny(holder: int) -> None:
    """Take every route away from the network namespace of ``holder``; ``NetworkProblem`` if it cannot be done."""
    program = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise NetworkProblem("NETWORK=deny needs the program ip (iproute2), which is not on this node")
    for words in FLUSHES:
        code = _inside(holder, [program, *words])
        if code and words[0] == "-4":
            raise NetworkProblem(f"'ip {' '.join(words)}' in the sandbox's network ended with {code}")


def _inside(holder: int, command: list[str]) -> int:
    """Run a command in the network namespace of ``holder``; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            descriptor = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY)
            setns(descriptor)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            os.execv(command[0], command)
        finally:
            os._exit(126)
    return _wait(child)


def _wait(child: int) -> int:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124
