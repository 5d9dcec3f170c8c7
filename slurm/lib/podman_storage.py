"""Podman storage of one job: makes it on node-local disk, hands out its environment, removes exactly that.

Every process of a rootless store lives in one user namespace of its own, made by the first Podman that used the
store. That is how the end is quick and complete whatever the number of sandboxes: all processes of that namespace
are killed, then the files go. A lock held by the owner tells a living job's store from a dead one's; the next job of
the same user on the node removes what a dead one left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem, WaitTimeout
from slurm.lib.locked_folder import LOCK_NAME, Announce, dead_owners_lock, locked_folder, tell_nobody
from slurm.lib.logs import log
from slurm.lib.own_folders import is_own, own_folders, remove_half_made
from slurm.lib.processes import descendants, living_fields, pids, run

PREFIX = "skyrl"
# A unix socket's path ends at 107 bytes (unix(7)); conmon puts up to 60 more below the store's runtime folder.
LONGEST_ROOT = 45
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "fuse.sshfs", "9p"}
)
REMOVE_TIMEOUT_S = 20.0
# A process that starts after the last look at all processes may make files once more; one that was killed may, on a
# busy node, be gone a moment later.
REMOVE_TRIES, TRY_AGAIN_S = 5, 0.3
SECCOMP_PROFILES = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))  # Podman's order
KEY_CALLS = frozenset({"add_key", "keyctl", "request_key"})


@dataclass(frozen=True)
class PodmanStorage:
    """The store of one job, all of it below ``root``."""

    root: Path

    @property
    def socket(self) -> Path:
        return self.root / "podman.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def runtime_dir(self) -> Path:
        return self.root / "run"

    @property
    def graphroot(self) -> Path:
        return self.root / "data" / "containers" / "storage"

    @property
    def seccomp(self) -> Path:
        return self.root / "seccomp.json"

    @property
    def lock(self) -> Path:
        return self.root / LOCK_NAME

    @property
    def registries(self) -> Path:
        """registries.conf, where the job has one of its own."""
        return self.root / "registries.conf"

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with everything that points Podman at this store and nothing else."""
        registries = {"CONTAINERS_REGISTRIES_CONF": str(self.registries)} if self.registries.is_file() else {}
        return {
            **base,
            **registries,
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
            "XDG_DATA_HOME": str(self.root / "data"),
            "TMPDIR": str(self.root / "tmp"),
            "CONTAINERS_STORAGE_CONF": str(self.root / "storage.conf"),
            "CONTAINERS_CONF": str(self.root / "containers.conf"),
            "CONTAINERS_CONF_OVERRIDE": str(self.root / "containers.conf"),  # wins from Podman 4.6 on
            "DOCKER_HOST": self.url,
        }


def storage_conf(storage: PodmanStorage, image_stores: Sequence[Path]) -> str:
    """storage.conf: overlay on this job's own folders, with further stores to read images from."""
    stores = ", ".join(json.dumps(str(path)) for path in image_stores)
    return (
        "[storage]\n"
        'driver = "overlay"\n'
        f"graphroot = {json.dumps(str(storage.graphroot))}\n"
        f"runroot = {json.dumps(str(storage.runtime_dir / 'containers'))}\n"
        "[storage.options]\n"
        f"additionalimagestores = [{stores}]\n"
    )


def profile_without_keys(text: str) -> str:
    """A seccomp profile in which no program can use the kernel's keyrings: ``ValueError`` if the text is none."""
    try:
        profile = json.loads(text)
        kept = [{**rule, "names": [n for n in rule["names"] if n not in KEY_CALLS]} for rule in profile["syscalls"]]
        rules = [rule for rule in kept if rule["names"]]
        if profile["defaultAction"] != "SCMP_ACT_ERRNO":  # one that lists what is forbidden
            rules.append({"names": sorted(KEY_CALLS), "action": "SCMP_ACT_ERRNO"})
        return json.dumps({**profile, "syscalls": rules})
    except (KeyError, TypeError) as problem:
        raise ValueError(f"not a seccomp profile: {problem}") from None


def _write_profile(storage: PodmanStorage) -> bool:
    """Make the store's own seccomp profile from the machine's; False where there is none that can be used."""
    for source in SECCOMP_PROFILES:
        with contextlib.suppress(OSError, ValueError):
            storage.seccomp.write_text(profile_without_keys(source.read_text()))
            return True
    return False


def containers_conf(storage: PodmanStorage, runtime: str | None, has_profile: bool) -> str:
    """containers.conf: no systemd, no journal, locks of its own, and no keyring for each container.

    The kernel grants a user 200 keys as a rule (keyrings(7)), and a keyring is one: the 200th sandbox could not start.
    Without one of its own a container would reach the keyring of whoever started Podman, so the profile forbids it.

    Podman's default locks lie in one shared memory segment for all stores of a user, which a new store resets: two
    jobs of one user on a node would share locks.
    """
    lines = ["[engine]", 'cgroup_manager = "cgroupfs"', 'events_logger = "file"', 'lock_type = "file"']
    lines += [f"runtime = {json.dumps(runtime)}"] if runtime else []
    if os.geteuid() == 0:
        lines += [f"tmp_dir = {json.dumps(str(storage.runtime_dir / 'libpod'))}"]
    if has_profile:
        lines += ["[containers]", "keyring = false", f"seccomp_profile = {json.dumps(str(storage.seccomp))}"]
    networks = f"network_config_dir = {json.dumps(str(storage.root / 'networks'))}"  # not in the user's home
    return "\n".join([*lines, "[network]", networks, ""])


def preferred_runtime() -> str | None:
    """crun where it works, else runc, else Podman's own choice; crun 1.8 refuses hybrid cgroup hierarchies."""
    hybrid = Path("/sys/fs/cgroup/unified").is_dir()
    names = ["runc", "crun"] if hybrid else ["crun", "runc"]
    return next((name for name in names if shutil.which(name)), None)


def file_system_of(path: Path) -> str:
    """The type of the file system that holds ``path``, from /proc/self/mountinfo."""
    best, kind = "", "unknown"
    resolved = str(path.resolve())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        mount = fields.split()[4].replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, tail.split()[0]
    return kind


def choose_scratch(candidates: Sequence[str], job_id: str) -> Path:
    """The first folder that a store can lie in; ``EnvironmentProblem`` names what is wrong with each."""
    faults: list[str] = []
    for name in candidates:
        fault = _scratch_fault(Path(name), job_id)
        if fault is None:
            if faults:
                log.warning("Podman storage goes to %s, not to %s", name, "; ".join(faults))
            return Path(name)
        faults.append(f"{name}: {fault}")
    raise EnvironmentProblem(
        f"no folder for Podman storage on {socket.gethostname()}: {'; '.join(faults)}. "
        "Set LOCAL_SCRATCH to a folder on this node's own disk"
    )


def _scratch_fault(folder: Path, job_id: str) -> str | None:
    if not folder.is_dir():
        return "does not exist"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "not writable"
    if file_system_of(folder) in NETWORK_FILE_SYSTEMS:
        return f"lies on {file_system_of(folder)}, where Podman cannot keep containers"
    if len(str(_root_of(folder, job_id))) > LONGEST_ROOT:
        return f"path too long for Podman's sockets (room for {LONGEST_ROOT} characters with the job's name)"
    return None


def _root_of(scratch: Path, job_id: str) -> Path:
    return scratch / f"{PREFIX}-{os.getuid()}-{job_id}"


def user_image_store(environment: Mapping[str, str]) -> tuple[Path, str] | None:
    """The user's own store and its driver, if images lie in it; nothing is started or created to find out."""
    data_home = environment.get("XDG_DATA_HOME") or f"{environment.get('HOME', '/nonexistent')}/.local/share"
    default = Path("/var/lib/containers/storage") if os.geteuid() == 0 else Path(data_home) / "containers" / "storage"
    for graphroot in [*_configured_graphroots(environment), default]:
        for driver in ("overlay", "vfs"):
            if (graphroot / f"{driver}-images" / "images.json").is_file():
                return graphroot, driver
    return None


def _configured_graphroots(environment: Mapping[str, str]) -> list[Path]:
    """Where storage.conf puts the store; Podman 4 as an ordinary user heeds only ``rootless_storage_path``."""
    config_home = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME', '/nonexistent')}/.config"
    own = Path(environment.get("CONTAINERS_STORAGE_CONF") or f"{config_home}/containers/storage.conf")
    found = {}
    for line in own.read_text(errors="replace").splitlines() if own.is_file() else []:
        key, _, value = line.partition("=")
        found[key.strip()] = Path(os.path.expandvars(value.strip().strip('"')))
    return [found[key] for key in ("rootless_storage_path", "graphroot") if key in found]


def image_names(graphroot: Path, driver: str) -> frozenset[str]:
    """The names of the images in a store, read from its index."""
    try:
        images = json.loads((graphroot / f"{driver}-images" / "images.json").read_text())
        return frozenset(name for image in images for name in image.get("names") or [])
    except (OSError, ValueError):
        return frozenset()


def readable_stores(environment: Mapping[str, str]) -> list[Path]:
    """The stores that this job's store may read images from: the user's own, where it is overlay on a local disk."""
    found = user_image_store(environment)
    if found is None or found[1] != "overlay" or file_system_of(found[0]) in NETWORK_FILE_SYSTEMS:
        return []
    return [found[0]]


@contextlib.contextmanager
def podman_storage(
    scratch: Path,
    job_id: str,
    image_stores: Sequence[Path],
    registries: str = "",
    announce: Announce = tell_nobody,
) -> Iterator[PodmanStorage]:
    """The store of job ``job_id`` below ``scratch``: made here, and with all its processes gone afterwards.

    ``registries`` is the text of its registries.conf, empty for the site's own. ``announce`` is told of the store
    before there is anything of it, so that a guardian knows of it whenever this process is killed.
    """
    sweep(scratch)
    storage = PodmanStorage(_root_of(scratch, job_id))
    with _made_and_locked(storage, image_stores, registries, announce):
        try:
            yield storage
        finally:
            remove(storage)


@contextlib.contextmanager
def _made_and_locked(
    storage: PodmanStorage, image_stores: Sequence[Path], registries: str, announce: Announce
) -> Iterator[None]:
    """The store, made and locked for the length of the block."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(storage.root, announce))
            _furnish(storage, image_stores, registries)
        except OSError as problem:
            sentence = f"cannot make Podman storage {storage.root}: {problem.strerror}; see LOCAL_SCRATCH"
            raise EnvironmentProblem(sentence) from None
        yield


def _furnish(storage: PodmanStorage, image_stores: Sequence[Path], registries: str = "") -> None:
    for folder in (storage.runtime_dir, storage.root / "tmp", storage.graphroot):
        folder.mkdir(mode=0o700, parents=True)
    (storage.root / "storage.conf").write_text(storage_conf(storage, image_stores))
    conf = containers_conf(storage, preferred_runtime(), _write_profile(storage))
    (storage.root / "containers.conf").write_text(conf)
    if registries:
        storage.registries.write_text(registries)


def _namespace(pid: int | str, kind: str = "user") -> str | None:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    return None


def _mentions(pid: int, marker: bytes) -> bool:
    for source in ("environ", "cmdline"):
        with contextlib.suppress(OSError):
            if marker in Path(f"/proc/{pid}/{source}").read_bytes():
                return True
    return False


def processes_of(storage: PodmanStorage) -> list[int]:
    """Every process of the store: Podman, conmon, port forwarders, and all that runs in its containers.

    Podman and conmon that name the store in environment or command line, and what descends from them; as an ordinary
    user also all processes in the user namespaces of those that name it. A Podman that starts is in none of its own
    yet, and would make one, with a process that holds it, after the last look.
    """
    marker = f"{storage.root}/".encode()
    named = {pid for pid in pids() if _mentions(pid, marker)}
    if os.geteuid() != 0:
        named = {pid for pid in named if _may_be_podmans(pid)}
    engine = {pid for pid in named if _command_name(pid) in {"podman", "conmon", "netavark", "aardvark-dns"}}
    found = engine | descendants(engine)
    if os.geteuid() != 0:
        spaces = {_namespace(pid) for pid in named} - {_namespace("self"), None}
        found |= {pid for pid in pids() if _namespace(pid) in spaces}
    return sorted(found)


def store_of(job_id: str) -> PodmanStorage | None:
    """The store of a job of this user that runs on this host, as the job's own processes name it; None for none.

    A sandbox's processes are not believed: what they name would decide which programs Podman starts.
    """
    name, key = f"{PREFIX}-{os.getuid()}-{job_id}", b"CONTAINERS_STORAGE_CONF="
    for pid in filter(_may_be_podmans, pids()):
        with contextlib.suppress(OSError):
            said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found = next((word[len(key) :] for word in said if word.startswith(key)), b"")
            root = Path(os.fsdecode(found)).parent
            if root.name == name and is_own(root):
                return PodmanStorage(root)
    return None


def _may_be_podmans(pid: int) -> bool:
    """Whether what a process says of its store is believed: one of ours, in no container.

    Another user's could not be ended, and a sandbox might name the store of another job. A process that is being
    started cannot be looked into.
    """
    return _owner(pid) == os.geteuid() and _namespace(pid, "pid") in {_namespace("self", "pid"), None}


def _owner(pid: int) -> int | None:
    """The effective user of a process; its folder in /proc is root's where it may not be looked into (proc(5))."""
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Uid:")).split()[2])
    return None


def _command_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def kill_processes(storage: PodmanStorage, deadline_s: float = 10.0) -> None:
    """Kill every process of the store, and look again until none is left or the deadline has passed; say what is.

    On a node with a high load a look at all processes takes seconds: whatever one has found is killed, however late.
    """
    end = time.monotonic() + deadline_s
    while left := [pid for pid in processes_of(storage) if living_fields(pid) is not None]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() >= end:
            log.warning("sent SIGKILL to processes of %s, not seen to end: %s", storage.root, left)
            return
        time.sleep(0.02)


def remove(storage: PodmanStorage) -> None:
    """End the store: kill its processes, then remove its files. Says so if something had to be left."""
    if os.geteuid() == 0:
        _remove_containers_as_root(storage)
    end = time.monotonic() + REMOVE_TIMEOUT_S
    for again in range(REMOVE_TRIES):
        if again and time.monotonic() > end:
            break
        time.sleep(again * TRY_AGAIN_S)
        kill_processes(storage)
        _unmount_below(storage.root)
        left = _remove_files(storage)
        if not left:
            log.info("Podman storage %s is gone, with every process in it", storage.root)
            return
    names = ", ".join(path.name for path in left)
    log.warning(
        "could not remove all of %s (left: %s); the next job of yours on this node will try again", storage.root, names
    )


def _remove_files(storage: PodmanStorage) -> list[Path]:
    """Remove the store's files and return what is left of them.

    The lock goes last: by it the next job's sweep knows the folder for a store.
    """
    shutil.rmtree(storage.graphroot.parent, ignore_errors=True)
    if storage.graphroot.parent.exists():
        _remove_in_namespace(storage.graphroot.parent)
    for path in list(storage.root.glob("*")):
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        elif path != storage.lock:
            with contextlib.suppress(OSError):
                path.unlink()
    if left := [path for path in storage.root.glob("*") if path != storage.lock]:
        return left
    shutil.rmtree(storage.root, ignore_errors=True)
    return [storage.root] if storage.root.exists() else []


def _remove_tree(folder: Path) -> None:
    """Remove a folder, also where folders in it may not be looked into.

    The kernel makes such a one (mode 000) for each overlay mount, and Podman tries one as it begins: killed just then,
    it leaves it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for place, names, _ in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_containers_as_root(storage: PodmanStorage) -> None:
    """As root containers have networks and mounts outside any namespace of ours; Podman itself undoes those."""
    if not (storage.graphroot / "overlay-containers").is_dir():
        return
    environment = storage.environment(os.environ)
    environment.pop("DOCKER_HOST")
    with contextlib.suppress(EnvironmentProblem, WaitTimeout):
        run(["podman", "rm", "--all", "--force", "--time", "0"], timeout_s=REMOVE_TIMEOUT_S, environment=environment)


def _unmount_below(root: Path) -> None:
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        mount = line.split()[4].replace("\\040", " ")
        if mount.startswith(f"{root}/") and os.geteuid() == 0:
            run(["umount", "--lazy", mount], timeout_s=REMOVE_TIMEOUT_S)


def _remove_in_namespace(folder: Path) -> None:
    """Remove files that belong to subordinate ids.

    Podman's own store must not be in use for it (its bind mount would be busy), so a throwaway store lends the
    namespace; the pause process that this leaves is ended the same way as every other.
    """
    scratch = folder.parent.parent
    throwaway = PodmanStorage(Path(tempfile.mkdtemp(prefix=f".{PREFIX}-rm-", dir=scratch)))
    try:
        _furnish(throwaway, [])
        command = ["podman", "unshare", "rm", "-rf", "--", str(folder)]
        answer = run(command, timeout_s=REMOVE_TIMEOUT_S, environment=throwaway.environment(os.environ))
        if not answer.ok:
            log.warning("could not remove %s: %s", folder, answer.complaint)
    except (EnvironmentProblem, WaitTimeout) as problem:
        log.warning("could not remove %s: %s", folder, problem)
    finally:
        kill_processes(throwaway)
        _remove_tree(throwaway.root)


def sweep(scratch: Path) -> None:
    """Remove what dead jobs of this user left below ``scratch``; a living job holds its store's lock."""
    for name in (f"{PREFIX}-{os.getuid()}", f"{PREFIX}-rm"):
        remove_half_made(scratch, f".{name}-*")
    for root in own_folders(scratch, f"{PREFIX}-{os.getuid()}-*"):
        storage = PodmanStorage(root)
        with dead_owners_lock(root) as dead:
            if dead:
                log.info("removing Podman storage that a dead job left: %s", root)
                remove(storage)
