"""A real Podman service with a store of its own, run by an ordinary user or by root; no trace of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm_runtime.podman import EngineFacts, Podman
from tests.runtime import commands
from tests.users import open_tun

DEADLINE_S = 30.0
BUSYBOX = Path("/bin/busybox")

STORAGE_CONF = """[storage]
driver="overlay"
graphroot="{home}/g"
runroot="{home}/r"
"""
CONTAINERS_CONF = """[engine]
cgroup_manager="cgroupfs"
events_logger="file"
runtime="runc"
"""


@dataclass(frozen=True)
class Service:
    """A running service: its folder, whose it is, the environment that its ``podman`` commands need."""

    home: Path
    owner: pwd.struct_passwd
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # one after the other, the last one lives

    @property
    def socket(self) -> Path:
        return self.home / "s.sock"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "USER": self.owner.pw_name,
            "XDG_RUNTIME_DIR": f"{self.home}/x",
            "XDG_DATA_HOME": f"{self.home}/d",
            "TMPDIR": f"{self.home}/t",
            "CONTAINERS_STORAGE_CONF": f"{self.home}/storage.conf",
            "CONTAINERS_CONF": f"{self.home}/containers.conf",
            "CONTAINERS_REGISTRIES_CONF": f"{self.home}/registries.conf",
        }

    def popen(self, *argv: str, **options: int) -> subprocess.Popen[bytes]:
        """Start a command as the owner."""
        return subprocess.Popen(argv, env=self.environment, cwd=self.home, **self.identity(), **options)  # type: ignore[call-overload,no-any-return]

    def identity(self) -> dict[str, Any]:
        """Options of ``Popen`` that make a process the owner's."""
        if os.geteuid() != 0 or self.owner.pw_uid == 0:
            return {}
        return {"user": self.owner.pw_uid, "group": self.owner.pw_gid, "extra_groups": []}

    def podman(self, *argv: str) -> str:
        """Run a podman command on this store; its output."""
        with self.popen("podman", *argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            out, _ = process.communicate(timeout=120)
        if process.returncode:
            raise RuntimeError(f"podman {argv[0]} ended with {process.returncode}")
        return out.decode()

    def begin(self) -> None:
        """Start the service, on the same socket as the one before it."""
        argv = ("podman", "system", "service", "--time=0", f"unix://{self.socket}")
        self.processes.append(self.popen(*argv, stdin=subprocess.DEVNULL))
        _wait_for(self.socket, self.processes[-1])

    def kill(self) -> None:
        """SIGKILL for the process behind the socket and for the one that waits for it; containers live on."""
        process = self.processes[-1]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server_pid(), signal.SIGKILL)
        process.kill()
        process.wait()
        self.socket.unlink()

    def server_pid(self) -> int:
        """The process behind the socket."""
        return server_pid(self.socket)

    def facts(self) -> EngineFacts:
        """What the service that runs now tells of itself."""

        async def asked() -> EngineFacts:
            podman = Podman(self.socket)
            try:
                return await podman.facts()
            finally:
                await podman.close()

        return asyncio.run(asked())

    def containers(self) -> list[str]:
        """Names of all containers of the store."""
        return self.podman("ps", "--all", "--format", "{{.Names}}").split()

    def volumes(self) -> list[str]:
        return self.podman("volume", "ls", "--quiet").split()


def server_pid(path: Path) -> int:
    """The process behind a socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def missing() -> str:
    """What this machine lacks for a service, empty if nothing."""
    lacks = [name for name in ("podman", "runc", "slirp4netns") if shutil.which(name) is None]
    lacks += [] if BUSYBOX.exists() else ["busybox-static"]
    return ", ".join(lacks)


@contextlib.contextmanager
def running(owner: pwd.struct_passwd, registries: str = "", parent: Path = Path("/tmp")) -> Iterator[Service]:
    """The service with the test images in its store; everything of it is removed at the end.

    ``registries`` is its registries.conf; everything lies in a folder below ``parent``, whose path has to be short.
    """
    open_tun()
    service = Service(Path(tempfile.mkdtemp(prefix="sk-", dir=parent)), owner)
    try:
        _prepare(service, registries)
        try:
            service.begin()
            yield service
        finally:
            _stop(service, service.processes[-1])
    finally:
        _remove(service)


def _prepare(service: Service, registries: str) -> None:
    for name in ("g", "r", "x", "d", "t"):
        (service.home / name).mkdir(mode=0o700)
    (service.home / "storage.conf").write_text(STORAGE_CONF.format(home=service.home))
    (service.home / "containers.conf").write_text(CONTAINERS_CONF)
    (service.home / "registries.conf").write_text(registries)
    _busybox_tree(service.home / "tree")
    if os.geteuid() == 0:
        for path in (service.home, *service.home.rglob("*")):
            os.chown(path, service.owner.pw_uid, service.owner.pw_gid, follow_symlinks=False)
    archive = service.home / "tree.tar"
    with service.popen("tar", "-C", str(service.home / "tree"), "-cf", str(archive), ".") as tar:
        tar.wait(DEADLINE_S)
    service.podman("import", "--quiet", str(archive), commands.IMAGE)
    entrypoint = 'ENTRYPOINT ["/bin/sh"]'
    service.podman("import", "--quiet", "--change", entrypoint, str(archive), commands.IMAGE_WITH_ENTRYPOINT)


def _busybox_tree(tree: Path) -> None:
    (tree / "bin").mkdir(parents=True)
    (tree / "tmp").mkdir(mode=0o1777)
    shutil.copy(BUSYBOX, tree / "bin" / "busybox")
    names = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in {*names} - {"busybox"}:
        (tree / "bin" / name).symlink_to("busybox")


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"podman system service did not start (exit code {process.poll()})")
        time.sleep(0.02)


def _stop(service: Service, process: subprocess.Popen[bytes]) -> None:
    """Remove the containers, end the service, and end what else lives in its private user namespace."""
    with contextlib.suppress(RuntimeError):
        service.podman("rm", "--all", "--force", "--time=0")
    namespace = _user_namespace(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()
    if namespace is not None and namespace != _user_namespace(os.getpid()):
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            if _user_namespace(pid) == namespace:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _user_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/user").readlink())
    except OSError:
        return None


def _remove(service: Service) -> None:
    """Files of subordinate ids need the namespace to be removed; its podman gets a store of its own meanwhile."""
    if service.owner.pw_uid == 0:
        _unmount_below(service.home)
    else:
        throwaway = service.home / "rm"
        argv = ["podman", "--root", f"{throwaway}/g", "--runroot", f"{throwaway}/r", "unshare", "rm", "-rf"]
        targets = [str(service.home / name) for name in ("g", "r", "d")]
        with contextlib.suppress(FileNotFoundError), service.popen(*argv, *targets) as process:
            process.wait(60)
        _end_pause_process(service.home / "x" / "libpod" / "tmp" / "pause.pid")
    shutil.rmtree(service.home)


def _end_pause_process(pid_file: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def _unmount_below(folder: Path) -> None:
    """What a root's podman mounted, newest first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", mount], check=False)
