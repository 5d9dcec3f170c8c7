"""A real Slurm of one login host and four nodes on this one machine, for the tests.

Each node has a network namespace and a host name of its own on a private bridge, so that jobs see distinct hosts and
reach each other only over the network. Each has a mount namespace too, so that one node alone can lack a file or have a
full disk; what is mounted below ``SHARE`` is seen on every node. GPU nodes have a disk of their own, at ``LOCAL_DISK``;
the rest is shared. Everything lies below ``HOME`` and is found again by pid files; only the logs, in ``LOGS``, stay
until the next start.
Needs root and the Debian packages that ``MISSING_HINT`` names; no systemd.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slurm.lib.processes import descendants, start_ticks
from tests.users import open_tun

HOME = Path("/run/skyrl-test-cluster")
CONF = HOME / "etc" / "slurm.conf"
LOCAL_DISK = HOME / "t"  # the same path on each GPU node, another folder; a short one, for Ray's sockets
SHARE = HOME / "share"  # what is mounted below it, also later, is seen by every node
NOTHING = HOME / "nothing"  # an empty file: what a hidden one shows
LOGS = Path("/var/log/skyrl-test-cluster")
MAILS = HOME / "mails.txt"  # what Slurm would have sent: a line each, the subject and who gets it
LOCK = Path("/run/skyrl-test-cluster.lock")
CONTROLLER_PID = HOME / "slurmctld.pid"
ACCOUNTING_PID_FILES = (HOME / "slurmdbd.pid", HOME / "mariadbd.pid")  # of ``accounting``, in the order of their end
NODES = {"cpu-a": "10.79.0.11", "cpu-b": "10.79.0.12", "gpu-a": "10.79.0.13", "gpu-b": "10.79.0.14"}
LOGIN = "10.79.0.1"
BRIDGE = "sktest0"
HOSTS_MARK = "# skyrl-test-cluster"
GPUS = 8
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "podman", "newuidmap", "slirp4netns")
MISSING_HINT = "scripts/test installs them on Debian when it runs as root"
UP_DEADLINE_S = 40.0
STOP_DEADLINE_S = 10.0
LOCK_DEADLINE_S = 1800.0
SHOWN_LOG_LINES = 15
LISTEN = "0A"  # TCP_LISTEN in the kernel's tables

CONFIG = """\
ClusterName=skyrltest
SlurmctldHost={host}({login})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={logs}/slurmctld.log
SlurmdLogFile={logs}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
MailProg={home}/mail
ReturnToService=2
JobCompType=jobcomp/filetxt
JobCompLoc={logs}/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=5
MinJobAge=3600
SlurmdTimeout=60
NodeName=cpu-a NodeAddr=10.79.0.11 CPUs=128 RealMemory=600000 State=UNKNOWN
NodeName=cpu-b NodeAddr=10.79.0.12 CPUs=128 RealMemory=600000 State=UNKNOWN
NodeName=gpu-a NodeAddr=10.79.0.13 CPUs=128 RealMemory=1100000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=gpu-b NodeAddr=10.79.0.14 CPUs=128 RealMemory=1100000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=test Nodes=cpu-a,cpu-b Default=YES MaxTime=12:00:00 State=UP
PartitionName=gpu_test Nodes=gpu-a,gpu-b MaxTime=12:00:00 State=UP
PartitionName=urgent Nodes=gpu-a,gpu-b MaxTime=12:00:00 PriorityTier=10 State=UP
"""


class ClusterError(Exception):
    """The cluster did not come up; the message says which log to read."""


def missing() -> list[str]:
    """What this machine lacks for the cluster; empty where nothing is."""
    lacks = [] if os.geteuid() == 0 else ["root"]
    return lacks + [name for name in PROGRAMS if not _which(name)]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def environment() -> dict[str, str]:
    """What Slurm's commands need to find this cluster."""
    return {"SLURM_CONF": str(CONF)}


def _call(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **environment()}, check=False)
    if check and done.returncode:
        raise ClusterError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _alive(pid_file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        # A pid file may outlive its process, and the pid be another's by now; each daemon's words name a path of ours.
        if str(HOME).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def pid_files() -> list[Path]:
    """The daemons' pid files, in the order in which they are stopped."""
    return [*(HOME / f"slurmd-{name}.pid" for name in NODES), CONTROLLER_PID, HOME / "munge" / "pid"]


def is_up() -> bool:
    """Whether all of it runs, and nothing else: accounting that a killed test left is none of it."""
    if any(map(_alive, ACCOUNTING_PID_FILES)):
        return False
    return all(_alive(path) for path in pid_files()) and set(_idle_or_busy()) == set(NODES)


def _idle_or_busy() -> list[str]:
    return _call("sinfo", "-h", "-N", "-t", "idle,alloc,mix,comp", "-o", "%N", check=False).split()


def up() -> float:
    """Start what is not running; returns the seconds until all nodes were ready. ``ClusterError`` says why not."""
    begin = time.monotonic()
    if is_up():
        return 0.0
    down()
    _make_folders()
    _make_network()
    _write_config()
    _start_munge()
    _call(_which("slurmctld") or "slurmctld", "-f", str(CONF))
    for name in NODES:
        _start_node(name)
    _await_nodes()
    return time.monotonic() - begin


def _await(what: str, condition: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + UP_DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {UP_DEADLINE_S:g} s for {what}; {log} ends with:\n{_end_of(log)}")
        time.sleep(0.1)


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["(nothing: it does not exist)"]
    return "\n".join(lines[-SHOWN_LOG_LINES:])


def _make_folders() -> None:
    shutil.rmtree(LOGS, ignore_errors=True)
    spools = [HOME / "spool" / name for name in NODES]
    for folder in (LOGS, *spools, *(HOME / name for name in ("etc", "state", "dev", "munge"))):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in (HOME, HOME / "etc", HOME / "munge"):
        folder.chmod(0o755)
    for number in range(GPUS):
        device = HOME / "dev" / f"nvidia{number}"
        if not device.exists():
            os.mknod(device, 0o020666, os.makedev(195, number))
    for folder in (LOCAL_DISK, SHARE, *map(disk_of, NODES)):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    NOTHING.touch(0o644)
    _call("mount", "--bind", str(SHARE), str(SHARE))
    _call("mount", "--make-shared", str(SHARE))
    open_tun()


def disk_of(node: str) -> Path:
    """Where a GPU node's own disk is seen from outside of the node."""
    return HOME / "disks" / node


def _outer(number: int) -> str:
    """The bridge's end of a node's cable."""
    return f"sktest-n{number}"


def _inside(node: str) -> str:
    """The network namespace of a node."""
    return f"sk-{node}"


def _make_network() -> None:
    _call("ip", "link", "add", BRIDGE, "type", "bridge")
    _call("ip", "addr", "add", f"{LOGIN}/24", "dev", BRIDGE)
    _call("ip", "link", "set", BRIDGE, "up")
    for number, (name, address) in enumerate(NODES.items()):
        outer, inside = _outer(number), _inside(name)
        _call("ip", "netns", "add", inside)
        _call("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", inside)
        _call("ip", "link", "set", outer, "master", BRIDGE, "up")
        _call("ip", "-n", inside, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _call("ip", "-n", inside, "link", "set", device, "up")
        _call("ip", "-n", inside, "route", "add", "default", "via", LOGIN)
    with Path("/etc/hosts").open("a") as hosts:
        hosts.writelines(f"{address} {name} {HOSTS_MARK}\n" for name, address in NODES.items())


def _write_config() -> None:
    mail = HOME / "mail"
    mail.write_text(f'#!/bin/sh\nshift\nprintf "%s | %s\\n" "$@" >>{MAILS}\n')
    mail.chmod(0o755)
    CONF.write_text(CONFIG.format(host=socket.gethostname(), login=LOGIN, home=HOME, logs=LOGS, gpus=GPUS))
    gres = f"NodeName=gpu-a,gpu-b Name=gpu File={HOME}/dev/nvidia[0-{GPUS - 1}]\n"
    (CONF.parent / "gres.conf").write_text(gres)


def _start_munge() -> None:
    folder = HOME / "munge"
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    log = LOGS / "munged.log"
    options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
    words = [f"--{name}={folder / file}" for name, file in options.items()]
    _call(_which("munged") or "munged", "--force", f"--log-file={log}", *words)
    _await("munge", lambda: (folder / "socket").exists(), log)


def _start_node(name: str) -> None:
    """nsenter, not ``ip netns exec``: the latter remounts /sys, and slurmd no longer finds the cgroups."""
    own_disk = f"mount --bind {disk_of(name)} {LOCAL_DISK} && " if name.startswith("gpu") else ""
    command = f"hostname {name}; {own_disk}exec slurmd -f {CONF} -N {name}"
    spaces = ("--uts", "--mount", "--propagation=slave")
    _call("nsenter", f"--net=/var/run/netns/{_inside(name)}", "unshare", *spaces, "sh", "-c", command)


def slurmd_pid(name: str) -> int | None:
    """The pid of a node's slurmd, whose namespaces are the node; None while the node is off."""
    return _alive(HOME / f"slurmd-{name}.pid")


def on_node(name: str, *argv: str) -> str:
    """Run a command on a node as root, as a person who logs in there would; what it printed."""
    pid = slurmd_pid(name)
    if pid is None:
        raise ClusterError(f"{name} is off; power_on starts it")
    return _call("nsenter", f"--target={pid}", "--net", "--mount", "--uts", *argv)


@contextlib.contextmanager
def mounted(name: str, target: Path, *what: str) -> Iterator[None]:
    """``mount WHAT TARGET`` on one node alone, for the length of the block."""
    on_node(name, "mount", *what, str(target))
    pid = slurmd_pid(name)
    try:
        yield
    finally:
        if slurmd_pid(name) == pid:  # else the node was off meanwhile, and its mounts are gone
            on_node(name, "umount", "--lazy", str(target))


@contextlib.contextmanager
def mounted_here(target: Path, *what: str) -> Iterator[None]:
    """``mount WHAT TARGET`` on the login host for the length of the block; below ``SHARE`` on every node too."""
    _call("mount", *what, str(target))
    try:
        yield
    finally:
        _call("umount", "--lazy", str(target))


@contextlib.contextmanager
def hide(name: str, path: Path) -> Iterator[None]:
    """A file of one node is empty, and no program, for the length of the block."""
    with mounted(name, path, "--bind", str(NOTHING)):
        yield


@contextlib.contextmanager
def unplug(name: str) -> Iterator[None]:
    """A node's cable is out for the length of the block: it reaches nobody, and nobody it."""
    _call("ip", "link", "set", _cable(name), "down")
    try:
        yield
    finally:
        _call("ip", "link", "set", _cable(name), "up")


@contextlib.contextmanager
def isolate(*names: str) -> Iterator[None]:
    """These nodes do not reach each other for the length of the block; the login host, and so Slurm, reaches all."""
    try:
        for name in names:
            _call("ip", "link", "set", _cable(name), "type", "bridge_slave", "isolated", "on")
        yield
    finally:
        for name in names:
            _call("ip", "link", "set", _cable(name), "type", "bridge_slave", "isolated", "off")


@contextlib.contextmanager
def silent_controller() -> Iterator[None]:
    """slurmctld takes connections and answers nothing for the length of the block, as one that is overloaded."""
    pid = _alive(CONTROLLER_PID)
    if pid is None:
        raise ClusterError("slurmctld does not run")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def slow_controller(silent_s: float = 20.0, works_s: float = 1.0) -> Iterator[None]:
    """slurmctld works for a second and does nothing for 20, again and again, as one that is kept busy.

    It does all that it is told. An answer takes up to 20 s, and Slurm's commands wait for one 10 s (MessageTimeout).
    """
    over = threading.Event()

    def alternate() -> None:
        while not over.is_set():
            with silent_controller():
                over.wait(silent_s)
            over.wait(works_s)

    turns = threading.Thread(target=alternate)
    turns.start()
    try:
        yield
    finally:
        over.set()
        turns.join()


@contextlib.contextmanager
def no_controller() -> Iterator[None]:
    """slurmctld is down for the length of the block; then it goes on with the jobs that it knew."""
    _stop(CONTROLLER_PID)
    try:
        yield
    finally:
        start_controller()


def start_controller() -> None:
    """Start slurmctld again beside nodes that run, and wait until it knows of all of them."""
    _call(_which("slurmctld") or "slurmctld", "-f", str(CONF))
    _call("scontrol", "reconfigure")  # has the nodes register now, not when they are next asked
    _await_nodes()


def _await_nodes() -> None:
    _await("all nodes to be idle", lambda: set(_idle_or_busy()) == set(NODES), LOGS / "slurmctld.log")


def _cable(name: str) -> str:
    return _outer(list(NODES).index(name))


def listeners(name: str) -> set[tuple[int, int]]:
    """The TCP ports on which somebody listens on a node, each with its owner's uid (/proc/net/tcp, proc(5))."""
    pid = slurmd_pid(name)
    tables = [Path(f"/proc/{pid}/net/{table}").read_text() for table in ("tcp", "tcp6")] if pid else []
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {(int(row[1].rpartition(":")[2], 16), int(row[7])) for row in rows if row[3] == LISTEN}


def sockets(name: str) -> list[str]:
    """The Unix sockets of a node, a line each with its address at the end (/proc/net/unix, proc(5))."""
    pid = slurmd_pid(name)
    return Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:] if pid else []


def power_off(name: str) -> None:
    """What a node's power going off is to the others: it says nothing any more, and Slurm finds it to be down."""
    _call("ip", "link", "set", _cable(name), "down")
    _freeze(name)  # power takes all at one moment: nobody is to see another one's end
    _empty_node(name)
    _stop(HOME / f"slurmd-{name}.pid")
    _call("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=power")


def power_on(name: str) -> None:
    """Start a node that is off, and wait until Slurm can use it."""
    _call("ip", "link", "set", _cable(name), "up")
    if _alive(HOME / f"slurmd-{name}.pid") is None:
        _start_node(name)
    _await(f"{name} to be idle", lambda: name in _idle_or_busy(), LOGS / f"slurmd-{name}.log")


@contextlib.contextmanager
def most_nodes(partition: str, nodes: int) -> Iterator[None]:
    """A partition that gives a job at most so many nodes, for the length of the block."""
    _call("scontrol", "update", f"PartitionName={partition}", f"MaxNodes={nodes}")
    try:
        yield
    finally:
        _call("scontrol", "update", f"PartitionName={partition}", "MaxNodes=UNLIMITED")


def set_time_limit(job_id: str, minutes: int) -> None:
    """What only an administrator may do: give a job more time."""
    _call("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")


def down() -> None:
    """Stop by pid what ``up`` started, and remove what it made but the logs; nothing else."""
    if _alive(CONTROLLER_PID):
        _cancel_jobs()
    for path in (*pid_files(), *ACCOUNTING_PID_FILES):
        _stop(path)
    for number, name in enumerate(NODES):
        _empty_node(name)
        _call("ip", "link", "del", _outer(number), check=False)  # else it lingers a while after its namespace
        _call("ip", "netns", "del", _inside(name), check=False)
    _call("ip", "link", "del", BRIDGE, check=False)
    _forget_hosts()
    _unmount_all()
    shutil.rmtree(HOME, ignore_errors=True)


def _unmount_all() -> None:
    """What is mounted below ``HOME`` on this host, the last one first: removing files must not reach into a mount."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split()[4]
        if target.startswith(f"{HOME}/"):
            _call("umount", target)


def _cancel_jobs() -> None:
    """All jobs there are, awaited for as long as Slurm itself gives them to end."""
    end = time.monotonic() + STOP_DEADLINE_S
    while (jobs := set(_call("squeue", "-h", "-o", "%A", check=False).split())) and time.monotonic() < end:
        _call("scancel", *sorted(jobs), check=False)
        time.sleep(0.2)


def _stop(pid_file: Path) -> None:
    pid = _alive(pid_file)
    begin = time.monotonic()
    while pid is not None and _alive(pid_file) == pid:
        waited = time.monotonic() - begin
        if waited > STOP_DEADLINE_S:
            raise ClusterError(f"process {pid} of {pid_file} does not end, not even by SIGKILL")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM if waited < STOP_DEADLINE_S / 2 else signal.SIGKILL)
        time.sleep(0.1)


def _freeze(name: str) -> None:
    """Stop all processes of a node where they are."""
    on_node = _on_node(name)
    for pid in on_node | descendants(on_node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


def _empty_node(name: str) -> None:
    """Kill by pid what still runs on a node, as its power going off would, and see its end.

    Containers have networks of their own: their processes are known as descendants of the node's.
    """
    end = time.monotonic() + STOP_DEADLINE_S
    doomed: dict[int, int | None] = {}
    while left := _on_node(name) | {pid for pid, ticks in doomed.items() if ticks and start_ticks(pid) == ticks}:
        if time.monotonic() > end:
            raise ClusterError(f"processes {sorted(left)} of {name} do not end, not even by SIGKILL")
        for pid in left | descendants(left):
            doomed[pid] = start_ticks(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _on_node(name: str) -> set[int]:
    """The processes in a node's network."""
    return {int(pid) for pid in _call("ip", "netns", "pids", _inside(name), check=False).split()}


def _forget_hosts() -> None:
    hosts = Path("/etc/hosts")
    kept = [line for line in hosts.read_text().splitlines(keepends=True) if HOSTS_MARK not in line]
    hosts.write_text("".join(kept))  # in place: /etc/hosts may be a bind mount


@contextlib.contextmanager
def exclusive(deadline_s: float = LOCK_DEADLINE_S) -> Iterator[None]:
    """The cluster for this process alone; waits for another that has it. ``ClusterError`` names that one in the end."""
    begin = time.monotonic()
    with LOCK.open("a+") as lock:
        while not _try_lock(lock.fileno()):
            if time.monotonic() - begin >= deadline_s:
                raise ClusterError(f"{_owner()} uses the test cluster (waited {deadline_s:g} s); end it, or try later")
            time.sleep(1)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _owner() -> str:
    return f"process {LOCK.read_text().strip() or 'unknown'}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def running() -> Iterator[None]:
    """The cluster for the length of the block; one that was up already, or that is to be kept, stays."""
    with exclusive():
        was_up = is_up()
        up()
        try:
            yield
        finally:
            if not was_up and not os.environ.get("SKYRL_KEEP_CLUSTER"):
                down()
