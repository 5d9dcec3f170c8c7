"""Where the fork server lives: a mount namespace of its own in which the agent tree lies where containers have it.

Python remembers the paths that it imported from, and a forked server has to find them again in its container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from slurm_runtime.agent.tree import QUIET_DEFAULTS
from slurm_runtime.warden.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_RELATIME,
    MS_REMOUNT,
    mount,
    pivot_root,
    umount,
    unshare,
)

TREE, CODE = "opt/skyrl-agent", "opt/skyrl-warden/slurm_runtime"
SHIELD = "/tmp"  # hidden by the room's own file system, in the room's namespace only
# As Podman sets them for a program of a container, so that nothing read at import differs from there.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "xterm",
    "container": "podman",
    **QUIET_DEFAULTS,
}


def furnish(tree: Path, code: Path) -> None:
    """Make the room and move this process into it."""
    unshare(CLONE_NEWNS)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    sources = {TREE: os.open(tree, os.O_PATH), CODE: os.open(code, os.O_PATH)}
    mount("room", SHIELD, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ("proc", "dev", "sys", "tmp", "root", "etc", "old", TREE, CODE):
        Path(SHIELD, name).mkdir(parents=True)
    Path(SHIELD, "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="ascii")
    for name, descriptor in sources.items():
        target = f"{SHIELD}/{name}"
        mount(f"/proc/self/fd/{descriptor}", target, flags=MS_BIND)
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept_flags(target))
        os.close(descriptor)
    for name in ("proc", "dev", "sys"):
        mount(f"/{name}", f"{SHIELD}/{name}", flags=MS_BIND | MS_REC)
    os.chdir(SHIELD)
    pivot_root(".", "old")
    os.chdir("/")
    umount("/old", MNT_DETACH)


def kept_flags(path: str) -> int:
    """Flags of the mount that a user namespace may not take away."""
    found = os.statvfs(path).f_flag
    flags = {os.ST_NOEXEC: MS_NOEXEC, os.ST_NOATIME: MS_NOATIME, os.ST_RELATIME: MS_RELATIME}
    return sum(flag for bit, flag in flags.items() if found & bit)


def start(command: tuple[str, ...], tree: Path, code: Path, channel: socket.socket) -> int:
    """Fork and run ``command`` with the number of its end of ``channel`` as last argument; its process id.

    ``command`` names paths of the room. The child ends with its parent.
    """
    child = os.fork()
    if child:
        return child
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()
        os.set_inheritable(channel.fileno(), True)
        keep = {0, 1, 2, channel.fileno()}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in keep:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        furnish(tree, code)
        os.execve(command[0], [*command, str(channel.fileno())], environment())
    except OSError as problem:
        os.write(2, f"the fork server's room cannot be made: {problem}\n".encode())
    finally:
        os._exit(127)


def environment() -> Mapping[str, str]:
    return dict(ENVIRONMENT)
