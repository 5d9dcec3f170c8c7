"""Can what the run needs on this machine be found, and its folders be made and written?"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem, WaitTimeout
from slurm.lib.plan import LaunchPlan
from slurm.lib.podman_storage import LONGEST_ROOT, NETWORK_FILE_SYSTEMS, PREFIX, file_system_of
from slurm.lib.preflight.finding import Finding, error, warning
from slurm.lib.processes import run
from slurm.lib.settings import Settings
from slurm.lib.trainer import Missing, missing_parts

LONGEST_JOB_ID = "4294967295"  # MaxJobId of slurm.conf(5) can be no larger
SUBID_FILES = (Path("/etc/subuid"), Path("/etc/subgid"))
GETSUBIDS_TIMEOUT_S = 3.0
SLURM_PROGRAMS = ("sbatch", "scontrol", "squeue", "scancel")


def missing_here(plan: LaunchPlan, checkout: Path) -> list[Missing]:
    """What the run cannot do without on this machine, and does not find."""
    missing = missing_parts(plan.settings) if plan.training else []
    is_local = plan.settings.skyrl_backend == "local"
    programs = ["podman"] if is_local else SLURM_PROGRAMS
    path = {**plan.inherited, **plan.environment}.get("PATH")
    absent = [name for name in programs if not shutil.which(name, path=path)]
    if absent:
        fix = f"run {checkout / 'scripts' / 'setup'}" if is_local else "without Slurm, try --config local"
        missing.append(Missing(f"not on PATH: {', '.join(absent)}", fix))
    return missing


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))  # noqa: PTH110  Path's raises in others' folders


@dataclass(frozen=True)
class Folder:
    """A folder that the run writes into: the nearest one that exists, and whether it takes new files."""

    key: str
    path: Path
    there: Path
    is_folder: bool
    writable: bool


def look_at_folders(settings: Settings) -> list[Folder]:
    """The run's folders that the settings name."""
    named = {
        "SKYRL_JOBS_BASE": settings.skyrl_jobs_base,
        "CHECKPOINT_DIR": settings.checkpoint_dir,
        "ROLLOUT_DIR": settings.rollout_dir,
    }
    return [look_at_folder(key, path) for key, path in named.items() if path is not None]


def look_at_folder(key: str, path: Path) -> Folder:
    """A folder as this host sees it."""
    there = nearest(path)
    return Folder(key, path, there, there.is_dir(), os.access(there, os.W_OK | os.X_OK))


def folder_findings(folders: Sequence[Folder], where: str = "here") -> list[Finding]:
    """Those that cannot be made or written."""
    found = []
    for folder in folders:
        if not folder.is_folder:
            sentence = f"{folder.key}={folder.path}: {folder.there} is not a folder"
        elif not folder.writable:
            sentence = f"{folder.key}={folder.path}: {folder.there} cannot be written {where}"
        else:
            continue
        found.append(error("folders", sentence, f"set {folder.key} to a folder of yours on shared storage"))
    return found


@dataclass(frozen=True)
class Scratch:
    """LOCAL_SCRATCH as this host sees it; ``file_system`` is empty where it is not there."""

    path: Path
    file_system: str
    uid: int


def look_at_scratch(path: Path) -> Scratch:
    return Scratch(path, file_system_of(path) if path.is_dir() else "", os.getuid())


def scratch_findings(scratch: Scratch) -> list[Finding]:
    """What speaks against Podman's storage there, as far as this host can tell."""
    name, fix = f"LOCAL_SCRATCH={scratch.path}", "set LOCAL_SCRATCH to a folder on the nodes' own disks"
    found = []
    if scratch.file_system in NETWORK_FILE_SYSTEMS:
        sentence = f"{name} lies on {scratch.file_system} here, where Podman cannot keep containers (a node may differ)"
        found.append(warning("storage", sentence, fix))
    root = scratch.path / f"{PREFIX}-{scratch.uid}-{LONGEST_JOB_ID}"
    if len(str(root)) > LONGEST_ROOT:
        sentence = f"{name} is too long a path for Podman's sockets: {root} has more than {LONGEST_ROOT} characters"
        found.append(warning("storage", sentence, fix))
    return found


@dataclass(frozen=True)
class SubordinateIds:
    """Whose ranges are looked for, whether that is root (who needs none), and the files that lack them."""

    user: str
    uid: int
    lacking: tuple[str, ...]


def look_at_ids() -> SubordinateIds:
    """Ranges of this user in the files, else in whatever directory ``getsubids`` asks."""
    uid = os.getuid()
    user = user_name()
    lacking = () if uid == 0 else tuple(str(file) for file in SUBID_FILES if not _has_range(file, user, uid))
    return SubordinateIds(user, uid, lacking)


def user_name() -> str:
    """Who we are, by the user database; by number where that knows no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _has_range(file: Path, user: str, uid: int) -> bool:
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    if any(line.split(":")[0] in {user, str(uid)} for line in lines):
        return True
    try:
        groups = ["-g"] if file.name == "subgid" else []
        answer = run(["getsubids", *groups, user], timeout_s=GETSUBIDS_TIMEOUT_S)
    except (EnvironmentProblem, WaitTimeout):
        return False
    return answer.ok and bool(answer.stdout.strip())


def id_findings(ids: SubordinateIds) -> list[Finding]:
    """Rootless Podman needs ranges in both files."""
    if not ids.lacking:
        return []
    sentence = (
        f"no range for {ids.user} in {' and '.join(ids.lacking)} here: rootless Podman cannot start containers (a "
        "node may differ: the runtime job looks again and says so at once)"
    )
    fix = f"ask the administrator for: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {ids.user}"
    return [warning("storage", sentence, fix)]
