"""The ordinary user that tests run Slurm jobs and rootless Podman as."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from pathlib import Path

USER_NAME = os.environ.get("SKYRL_TEST_USER", "skyrl-test")  # another name lets two test runs share a machine


def ordinary_user() -> pwd.struct_passwd:
    """Ourselves, or for root the tests' user, made where it is missing (useradd gives it subordinate ids)."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam(USER_NAME)
    except KeyError:
        subprocess.run(["useradd", "-m", "-s", "/bin/bash", USER_NAME], check=True)
        return pwd.getpwnam(USER_NAME)


def subordinate_uids(name: str) -> range:
    """The user ids that a user's containers may have; empty where it has none."""
    subuid = Path("/etc/subuid")
    for line in subuid.read_text().splitlines() if subuid.exists() else ():
        owner, first, count = line.split(":")
        if owner == name:
            return range(int(first), int(first) + int(count))
    return range(0)


def open_tun() -> None:
    """Let ordinary users open the device, as slirp4netns does; only root can."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        Path("/dev/net/tun").chmod(0o666)
