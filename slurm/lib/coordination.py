"""How the two jobs meet: names every shared file, publishes each whole, reads them without believing too much.

The directory lies on a shared file system, perhaps NFS, whose clients cache what they saw. So a writer writes beside,
syncs and renames; a reader lists the directory before it takes an absence as true. Flags carry JSON that names the
attempt, and one of another attempt is ignored. A flag that a person made with ``touch`` is empty and counts as that
person's word if it is newer than the attempt.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from slurm.lib.errors import EnvironmentProblem

T = TypeVar("T")

STAMP_FORMAT = "%Y%m%d_%H%M%S"
PRESENCE_PATIENCE_S = 10.0
# For how long an NFS client may believe what it saw before (nfs(5): acdirmax), an absence too.
LATE_S = 60.0
_ID = r"(\d+|local\d+\.\d+)"
_BODY = rf"((runtime|training)_{_ID}|worker_\d+_\d+)"  # a job with its id; a worker's is that of a task of an array
# The files at the top of a run's directory that launchers, jobs and the commands that look write there: regular
# expressions of their names. Copies of .conf files bear those' names. Whatever else lies there is somebody's own.
OWN_FILES = (
    rf"run(_{_ID}|_\d+_\d+)?(\.json|_(suite|agent)\.diff)",
    rf"{_BODY}\.(out|err)",
    r"runtime_(head|ready|failed)\.flag",
    r"training_complete\.flag",
    r"runtime_(url|api_key)\.txt",
    rf"secrets(_{_ID})?\.json",
    r"training\.env",
    r"task\.yaml",
    r"attempt_\d+\.json",
    rf"notified_{_ID}\.json",
    rf"heartbeat_{_BODY}\.txt",
    rf"ray_{_ID}_([^/]+\.log|head\.json)",
    rf"usage_{_BODY}\.jsonl",
    rf"sandbox_statistics_({_ID}|\d+_\d+)\.json",
    r"submission_[^/]+\.json",
    r"local_jobs\.txt",
)
# What API servers write into ``CoordinationDir.images``.
SHARED_IMAGE = r"[^/]+\.tar|\.(part|claim|failed)-[^/]+"


def host_name() -> str:
    """This host's name, as ``socket.gethostname()`` has it, whose module is felt in the start-up."""
    return os.uname().nodename


def jobs_base(environment: Mapping[str, str] = os.environ) -> Path:
    """SKYRL_JOBS_BASE, by default ~/.skyrl_jobs."""
    said = environment.get("SKYRL_JOBS_BASE") or "~/.skyrl_jobs"
    return Path(os.path.expanduser(said)).absolute()  # noqa: PTH111  Path's raises for an unknown user


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Make ``path`` appear whole, with ``mode`` from its first moment: written beside, synced, renamed."""
    _write(path, text, mode, lambda beside: beside.replace(path))


def write_if_absent(path: Path, text: str, mode: int = 0o644) -> bool:
    """The same, unless ``path`` is there already: by the word of the file server, not of what this host remembers.

    Returns whether it was written.
    """
    return _write(path, text, mode, lambda beside: _link(beside, path))


def replace_if_unchanged(path: Path, text: str, before: str, mode: int = 0o644) -> bool:
    """``write_atomically``, unless ``path`` no longer holds ``before``; returns whether it was written.

    Another host's write within the last microseconds is not seen, nor on NFS one that its client's cache still hides.
    """
    return _write(path, text, mode, lambda beside: _replace(beside, path, before))


def _replace(beside: Path, path: Path, before: str) -> bool:
    if read_if_there(path) != before:
        beside.unlink(missing_ok=True)
        return False
    beside.replace(path)
    return True


def _link(beside: Path, path: Path) -> bool:
    try:
        os.link(beside, path)
    except FileExistsError:
        beside.unlink(missing_ok=True)
        return False
    except OSError:  # a file system without hard links
        absent = not is_listed(path)
        beside.replace(path) if absent else beside.unlink(missing_ok=True)
        return absent
    beside.unlink(missing_ok=True)
    return True


def _write(path: Path, text: str, mode: int, put: Callable[[Path], T]) -> T:
    beside = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:  # by the umask; else a call of the server less
                os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return put(beside)
    except OSError as problem:
        with contextlib.suppress(OSError):  # on a read-only file system even of what is not there
            beside.unlink()
        raise EnvironmentProblem(f"cannot write {path}: {problem.strerror}") from None


def is_listed(path: Path) -> bool:
    """Whether the folder's own listing shows ``path``; a listing refreshes what an NFS client believes is absent."""
    try:
        with os.scandir(path.parent) as entries:
            return any(entry.name == path.name for entry in entries)
    except OSError:
        return False


def read_if_there(path: Path) -> str | None:
    """The text of a file, or None if there is none (or it cannot be read right now)."""
    if not is_listed(path):
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def tail_if_there(path: Path, most: int) -> str:
    """The last ``most`` bytes of a file as text; empty if there is none, or it cannot be read right now."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def parse_object(text: str | None) -> dict[str, Any]:
    """The JSON object that a text holds; empty for anything else: half-written, a list, nested beyond measure."""
    try:
        data = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def utc_now() -> str:
    """The time of this host, for people; no decision compares it with another host's."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Flag:
    """One job's statement to the other.

    ``job_id`` wrote it on ``host``; ``runtime_job_id`` is the attempt it belongs to (the runtime job that the run is
    about); ``exit_code`` and ``reason`` say how the writer ended, where it has ended, and ``ended`` the same in a word
    of ``restarts.Ended`` (empty where that is not known). ``server`` is the ``server_digest`` of a runtime that is
    ready. ``by_hand`` marks an empty flag that a person touched.
    """

    job_id: str = ""
    runtime_job_id: str = ""
    host: str = ""
    time: str = ""
    exit_code: int | None = None
    reason: str = ""
    by_hand: bool = False
    ended: str = ""
    server: str = ""

    @staticmethod
    def of_this_host(
        job_id: str, runtime_job_id: str, exit_code: int | None = None, reason: str = "", ended: str = ""
    ) -> Flag:
        return Flag(job_id, runtime_job_id, host_name(), utc_now(), exit_code, reason, ended=ended)

    def to_text(self) -> str:
        return json.dumps({"schema": 1, **{k: v for k, v in asdict(self).items() if k != "by_hand"}}) + "\n"


def server_digest(url: str, key: str | None) -> str:
    """What ties an address and a key to the ready flag: each is a file, and one may be old or seen late."""
    import hashlib  # 2 ms: felt in commands that only look at runs

    return hashlib.sha256(f"{url.strip()}\n{(key or '').strip()}".encode()).hexdigest()


def parse_flag(text: str) -> Flag | None:
    """The flag that a text holds; None for anything half-written or foreign."""
    if not text.strip():
        return Flag(by_hand=True)
    data = parse_object(text)
    if data.get("schema") != 1:
        return None
    known = {field.name: data[field.name] for field in fields(Flag) if field.name in data and field.name != "by_hand"}
    exit_code = known.get("exit_code")
    well_formed = (exit_code is None or isinstance(exit_code, int)) and all(
        isinstance(value, str) for name, value in known.items() if name != "exit_code"
    )
    return Flag(**known) if well_formed else None


# The copies that SNAPSHOT=1 takes: the launch's own, and that of a training which joined, named after its job.
AGENT, JOINED_AGENT = "agent", "agent_%j"
AGENT_COPIES = (AGENT, "agent_[0-9]*")  # as patterns of file names: all that may be such a copy


@dataclass(frozen=True)
class CoordinationDir:
    """The shared directory of one run; every file in it is a property.

    ``agent_name`` is the folder in it that is the copy of skyrl-agent of the training that looks at it.
    """

    path: Path
    agent_name: str = AGENT

    @property
    def runtime_url(self) -> Path:
        return self.path / "runtime_url.txt"

    @property
    def runtime_api_key(self) -> Path:
        return self.path / "runtime_api_key.txt"

    @property
    def runtime_head(self) -> Path:
        """Where a runtime on several nodes has a head that its nodes may join; it may not be ready yet."""
        return self.path / "runtime_head.flag"

    @property
    def runtime_ready(self) -> Path:
        return self.path / "runtime_ready.flag"

    @property
    def runtime_failed(self) -> Path:
        """Present only if the runtime job ended before the training did; says why."""
        return self.path / "runtime_failed.flag"

    @property
    def training_complete(self) -> Path:
        return self.path / "training_complete.flag"

    @property
    def run_record(self) -> Path:
        return self.path / "run.json"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets.json"

    @property
    def training_env(self) -> Path:
        return self.path / "training.env"

    @property
    def task_yaml(self) -> Path:
        """SkyRL-agent's task file, where TASK_YAML=auto had one made."""
        return self.path / "task.yaml"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def agent(self) -> Path:
        """The copy of skyrl-agent that SNAPSHOT=1 takes."""
        return self.path / self.agent_name

    @property
    def images(self) -> Path:
        """The images that the nodes of a runtime on several nodes leave for each other."""
        return self.path / "images"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    def log(self, job: str, job_id: str, suffix: str) -> Path:
        """The log of ``job`` ("runtime", "worker" or "training"), suffix "out" or "err"."""
        return self.path / f"{job}_{job_id}.{suffix}"

    def ray_log(self, job_id: str, node: str) -> Path:
        """What Ray on a node of the training job ``job_id`` said."""
        return self.path / f"ray_{job_id}_{node}.log"

    def ray_head(self, job_id: str) -> Path:
        """Where that job's Ray cluster is joined, as its head says."""
        return self.path / f"ray_{job_id}_head.json"

    def usage(self, job: str, job_id: str) -> Path:
        """What the job used, a line of JSON for each moment at which it was looked at."""
        return self.path / f"usage_{job}_{job_id}.jsonl"

    def sandbox_statistics(self, job_id: str) -> Path:
        """What the API server of the runtime job ``job_id``, or of the worker of that id, has counted."""
        return self.path / f"sandbox_statistics_{job_id}.json"

    def attempt(self, number: int) -> Path:
        """What is known of the run's attempt ``number``, where it can be restarted."""
        return self.path / f"attempt_{number}.json"

    def notified(self, job_id: str) -> Path:
        """There once somebody has taken on to send NOTIFY's message about the end of this job."""
        return self.path / f"notified_{job_id}.json"

    def heartbeat(self, job: str, job_id: str) -> Path:
        return self.path / f"heartbeat_{job}_{job_id}.txt"

    def publish_key(self, key: str) -> None:
        write_atomically(self.runtime_api_key, key + "\n", 0o600)

    def publish_url(self, url: str) -> None:
        write_atomically(self.runtime_url, url + "\n")

    def publish_server(self, url: str, key: str | None, flag: Flag) -> None:
        """Key, address and ready flag, in this order; the flag names the other two by their digest."""
        if key:
            self.publish_key(key)
        self.publish_url(url)
        self.publish(self.runtime_ready, replace(flag, server=server_digest(url, key)))

    def publish_head(self, url: str, key: str, flag: Flag) -> None:
        """Key, address, and the flag by which the nodes of a runtime know that they are the head's."""
        self.publish_key(key)
        self.publish_url(url)
        self.publish(self.runtime_head, replace(flag, server=server_digest(url, key)))

    def publish(self, path: Path, flag: Flag) -> None:
        write_atomically(path, flag.to_text())

    def publish_if_absent(self, path: Path, flag: Flag) -> bool:
        """Publish a flag unless there is one, of whatever job, even one unseen here; returns whether it did."""
        return write_if_absent(path, flag.to_text())

    def speak_for(self, path: Path, flag: Flag) -> None:
        """Publish a flag about a job that cannot say it itself: never over that job's own, not even one unseen here.

        A person's word stays, too.
        """
        if self.publish_if_absent(path, flag):
            return
        text = read_if_there(path)
        if text is None:
            return
        there = parse_flag(text)
        if there is None or not (there.by_hand or there.job_id == flag.job_id):
            self.publish(path, flag)

    def read_url(self) -> str | None:
        return (read_if_there(self.runtime_url) or "").strip() or None

    def read_key(self) -> str | None:
        return (read_if_there(self.runtime_api_key) or "").strip() or None

    def read_server(self, ready: Flag) -> tuple[str, str | None] | None:
        """Address and key of the server that a ready flag is about; None while what is to be read here is another's.

        A flag without a digest, a person's or an older release's, is believed.
        """
        url, key = self.read_url(), self.read_key()
        if url is None or ready.server not in {"", server_digest(url, key)}:
            return None
        return url, key


@dataclass(frozen=True)
class FlagReader:
    """Reads one flag for one attempt.

    ``wanted`` says which flags belong to the attempt. Empty flags count only if they changed after ``seen_before``
    was recorded, so that one left over in a reused directory is not taken for a person's word.
    """

    path: Path
    wanted: Callable[[Flag], bool]
    seen_before: tuple[int, int] | None

    @staticmethod
    def from_now(path: Path, wanted: Callable[[Flag], bool]) -> FlagReader:
        """A reader for whom an empty flag that is there already is an old one."""
        return FlagReader(path, wanted, _identity(path))

    @staticmethod
    def of_new_directory(path: Path, wanted: Callable[[Flag], bool]) -> FlagReader:
        """A reader for a directory made for this attempt, in which every flag is the attempt's own."""
        return FlagReader(path, wanted, None)

    def read(self) -> Flag | None:
        text = read_if_there(self.path)
        flag = None if text is None else parse_flag(text)
        if flag is None:
            return None
        if flag.by_hand:
            return flag if _identity(self.path) != self.seen_before else None
        return flag if self.wanted(flag) else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@dataclass
class Presence:
    """Is a directory still there? A file server that stumbles for a moment is no reason to give a run up."""

    path: Path
    clock: Callable[[], float] = time.monotonic
    _missing_since: float | None = field(default=None, init=False)

    def is_lost(self) -> bool:
        """Whether every look at it has failed for ``PRESENCE_PATIENCE_S``."""
        try:
            with os.scandir(self.path):
                self._missing_since = None
        except OSError:
            self._missing_since = self.clock() if self._missing_since is None else self._missing_since
        return self._missing_since is not None and self.clock() - self._missing_since >= PRESENCE_PATIENCE_S


class Counter:
    """A heartbeat in the directory, for partners that share no HTTP server: a number that grows.

    The reader looks only at whether the number changed since it last looked, by its own clock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def beat(self) -> None:
        self._count += 1
        with contextlib.suppress(EnvironmentProblem):  # a full disk must not end a run whose partner is well
            write_atomically(self.path, f"{self._count}\n")


class CounterWatch:
    """How long ago a partner's counter last changed, by this host's monotonic clock."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._last: str | None = None
        self._changed_at: float | None = None

    def age_s(self) -> float | None:
        """Seconds since the last change was seen; None if there never was one."""
        text = read_if_there(self.path)
        if text is not None and text != self._last:
            self._last, self._changed_at = text, self._clock()
        return None if self._changed_at is None else self._clock() - self._changed_at


def make_run_dir(path: Path) -> CoordinationDir:
    """Make the directory of a run, readable by its owner alone; its parents as the umask says."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except OSError as problem:
        raise EnvironmentProblem(
            f"cannot make the run directory {path}: {problem.strerror}; set SKYRL_JOBS_BASE to a folder on shared "
            "storage that you can write"
        ) from None
    return CoordinationDir(path)


def make_base(path: Path) -> None:
    """Make the jobs base for a run's directory, as the umask says; ``make_run_dir`` says why that fails."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)


def server_time(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which on shared storage is the file server's."""
    import tempfile  # felt in the start-up of commands that only look

    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError as problem:
        raise EnvironmentProblem(f"cannot write in {folder}: {problem.strerror}") from None


def is_run_dir(path: Path) -> bool:
    """Whether a folder is one of ours: by its name and by what lies in it."""
    stamp, _, job_id = path.name.rpartition("_")
    try:
        datetime.strptime(stamp, STAMP_FORMAT)
    except ValueError:
        return False
    directory = CoordinationDir(path)
    marks = (directory.run_record, directory.runtime_url, directory.training_complete)
    try:
        return bool(job_id) and path.is_dir() and not path.is_symlink() and any(mark.exists() for mark in marks)
    except OSError:  # another user's
        return False
