"""The ordinary user that tests run Slurm jobs and rootless Podman as."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from pathlib import Path

USER_NAME = os.environ.get("SKYRL_TEST_USER", "skyrl-test")  # another name lets two test runs share a machine
OTHER_NAME = f"{USER_NAME}-other"  # for what one user may not see of another

ALREADY_THERE = 9  # useradd's: another test run that began at the same time has made it


def ordinary_user() -> pwd.struct_passwd:
    """Ourselves, or for root the tests' user, made where it is missing."""
    return pwd.getpwuid(os.geteuid()) if os.geteuid() != 0 else made_user(USER_NAME)


def made_user(name: str) -> pwd.struct_passwd:
    """A user of this name, made where it is missing (useradd gives it subordinate ids); only root can."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        done = subprocess.run(["useradd", "-m", "-s", "/bin/bash", name], check=False)
        if done.returncode not in (0, ALREADY_THERE):
            done.check_returncode()
        return pwd.getpwnam(name)


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
