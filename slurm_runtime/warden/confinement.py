"""What is a process of a container confined to, and how does another process take on exactly that?

``read`` looks at the container's first process from outside; ``enter`` joins its namespaces; ``confine`` takes on the
rest in the child that then runs. Standard library only: this runs under the agent tree's Python.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from slurm_runtime.warden.syscalls import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    capset,
    install_filter,
    prctl,
    setns,
)

NAMESPACES = ("cgroup", "ipc", "uts", "net", "pid", "time", "mnt")  # the mount namespace last: it changes all paths
LIMITS = sorted(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


class Different(Exception):
    """A process of ours cannot be made like one of the container; ``str()`` says in what."""


class Gone(Exception):
    """The container's process has ended."""


@dataclass(frozen=True)
class Confinement:
    """What the container's first process has. Ids are as this process sees them."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: Mapping[str, int]
    no_new_privileges: bool
    seccomp: int
    umask: int
    limits: Mapping[int, tuple[int, int]]
    oom_score_adj: int
    cpus: frozenset[int]
    nice: int
    label: str
    cgroups: tuple[str, ...]
    blocked: frozenset[int]
    environment: Mapping[str, str]


def status_fields(text: str) -> dict[str, str]:
    """The lines of a /proc/PID/status."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def read(pid: int) -> Confinement:
    """The confinement of process ``pid``; ``Gone`` if it has ended."""
    proc = Path("/proc", str(pid))
    try:
        status = status_fields((proc / "status").read_text())
        return Confinement(
            uid=int(status["Uid"].split()[1]),
            gid=int(status["Gid"].split()[1]),
            groups=tuple(int(word) for word in status["Groups"].split()),
            capabilities={name: int(status[name], 16) for name in SETS},
            no_new_privileges=status["NoNewPrivs"] == "1",
            seccomp=int(status["Seccomp"]),
            umask=int(status["Umask"], 8),
            limits={kind: resource.prlimit(pid, kind) for kind in LIMITS},
            oom_score_adj=int((proc / "oom_score_adj").read_text()),
            cpus=frozenset(os.sched_getaffinity(pid)),
            nice=os.getpriority(os.PRIO_PROCESS, pid),
            label=_label(proc),
            cgroups=tuple((proc / "cgroup").read_text().splitlines()),
            blocked=_blocked(proc),
            environment=parse_environment((proc / "environ").read_bytes()),
        )
    except (ProcessLookupError, FileNotFoundError, KeyError):
        raise Gone(f"process {pid} of the container has ended") from None


def parse_environment(block: bytes) -> dict[str, str]:
    """The variables of a /proc/PID/environ."""
    pairs = (os.fsdecode(entry).partition("=") for entry in block.split(b"\0") if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _blocked(proc: Path) -> frozenset[int]:
    """The signals that a program starts with blocked: an init blocks more for itself than for what it starts."""
    children = (proc / "task" / proc.name / "children").read_text().split()
    source = Path("/proc", children[0]) if children else proc
    with contextlib.suppress(OSError, KeyError):
        mask = int(status_fields((source / "status").read_text())["SigBlk"], 16)
        return frozenset(number for number in range(1, 65) if mask >> (number - 1) & 1)
    return frozenset()


def _label(proc: Path) -> str:
    """What a security module (SELinux, AppArmor) calls it; empty without one."""
    with contextlib.suppress(OSError, ValueError):
        return (proc / "attr" / "current").read_text().rstrip("\0\n")
    return ""


def namespaces_to_join(pid: int) -> list[tuple[str, int]]:
    """Name and open descriptor of each namespace in which it differs from us, its user namespace first."""
    found = []
    for name in ("user", *NAMESPACES):
        path = f"/proc/{pid}/ns/{name}"
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(path) != os.readlink(f"/proc/self/ns/{name}"):
                found.append((name, os.open(path, os.O_RDONLY)))
    return found


def join_cgroups(lines: tuple[str, ...], own: tuple[str, ...]) -> None:
    """Move this process into each cgroup of ``lines`` that it is not in; ``Different`` where it may not."""
    for line in lines:
        if line in own:
            continue
        _, controllers, path = line.split(":", 2)
        folder = _cgroup_folder(controllers)
        try:
            Path(f"{folder}{path}", "cgroup.procs").write_text("0")
        except OSError as problem:
            raise Different(f"its cgroup {path} cannot be joined ({problem.strerror})") from None


def _cgroup_folder(controllers: str) -> str:
    """Where a hierarchy is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, options = tail.split()[:3]
        if kind == "cgroup2" and not controllers:
            return fields.split()[4]
        if kind == "cgroup" and controllers and set(controllers.split(",")) <= set(options.split(",")):
            return fields.split()[4]
    raise Different(f"the cgroup hierarchy {controllers or 'v2'} is not mounted")


def enter(namespaces: list[tuple[str, int]]) -> None:
    """Join them. What the container's user namespace owns is joined after it, the rest before."""
    late = []
    for name, descriptor in namespaces:
        if name == "user":
            continue
        try:
            setns(descriptor)
        except PermissionError:
            late.append(descriptor)
    for name, descriptor in namespaces:
        if name == "user":
            setns(descriptor)
    for descriptor in late:
        setns(descriptor)
    for _, descriptor in namespaces:
        os.close(descriptor)


def inside(id_map: str, number: int) -> int:
    """An id of ours as the user namespace with this ``uid_map`` or ``gid_map`` has it; ``Different`` if it has none."""
    for line in id_map.splitlines():
        first, ours, count = (int(word) for word in line.split())
        if ours <= number < ours + count:
            return first + number - ours
    raise Different(f"id {number} does not exist in its user namespace")


def translated(wanted: Confinement, pid: int) -> Confinement:
    """With the ids that the user namespace of process ``pid`` has for them."""
    uids, gids = (Path(f"/proc/{pid}/{kind}_map").read_text() for kind in ("uid", "gid"))
    return replace(
        wanted,
        uid=inside(uids, wanted.uid),
        gid=inside(gids, wanted.gid),
        groups=tuple(inside(gids, group) for group in wanted.groups),
    )


def confine(wanted: Confinement, program: bytes | None) -> None:
    """Take on everything else, least reversible last. Ends with ``PR_SET_DUMPABLE`` as after an exec."""
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as every Python has it
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, wanted.blocked)
    os.umask(wanted.umask)
    os.sched_setaffinity(0, wanted.cpus)
    _set_nice(wanted.nice)
    _set_limits(wanted.limits)
    _write("/proc/self/oom_score_adj", str(wanted.oom_score_adj), "OOM score")
    _set_label(wanted.label)
    if tuple(os.getgroups()) != wanted.groups:
        os.setgroups(wanted.groups)
    os.setresgid(wanted.gid, wanted.gid, wanted.gid)
    _drop_bounding(wanted.capabilities["CapBnd"])
    os.setresuid(wanted.uid, wanted.uid, wanted.uid)
    _set_capabilities(wanted.capabilities)
    if wanted.no_new_privileges:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if program is not None:
        install_filter(program)
    prctl(PR_SET_DUMPABLE, 1)


def _write(path: str, text: str, what: str) -> None:
    try:
        if Path(path).read_text().strip() != text:
            Path(path).write_text(text)
    except OSError as problem:
        raise Different(f"its {what} {text} cannot be set ({problem.strerror})") from None


def _set_nice(wanted: int) -> None:
    if os.getpriority(os.PRIO_PROCESS, 0) != wanted:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, wanted)
        except OSError as problem:
            raise Different(f"its priority {wanted} cannot be set ({problem.strerror})") from None


def _set_limits(limits: Mapping[int, tuple[int, int]]) -> None:
    for kind, wanted in limits.items():
        if resource.getrlimit(kind) != wanted:
            try:
                resource.setrlimit(kind, wanted)
            except (OSError, ValueError) as problem:
                raise Different(f"its resource limit {kind} is above ours ({problem})") from None


def _set_label(wanted: str) -> None:
    own = _label(Path("/proc/self"))
    if wanted != own:
        try:
            Path("/proc/self/attr/current").write_text(wanted)
        except OSError as problem:
            raise Different(f"its security label {wanted} cannot be set ({problem.strerror})") from None


def _drop_bounding(kept: int) -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if not kept >> number & 1:
            prctl(PR_CAPBSET_DROP, number)


def _set_capabilities(sets: Mapping[str, int]) -> None:
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    capset(sets["CapEff"], sets["CapPrm"], sets["CapInh"])
    for number in range(64):
        if sets["CapAmb"] >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
