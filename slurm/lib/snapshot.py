"""A copy of skyrl-agent for one run (SNAPSHOT=1): the files that git tracks, as they are now; submodules' too.

What is not tracked is left out, and so is every ``.env``, which may hold keys; the trainer reads its own where it is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from slurm.lib.dot_env import is_dot_env
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.git import tracked_files


def copied_files(source: Path) -> tuple[list[str], list[str]] | None:
    """The files that a copy of ``source`` has, relative to it, and those left out as a ``.env``.

    None where git tracks none there. Tracked files that were removed, and submodules that were never fetched, are no
    files.
    """
    tracked = tracked_files(source)
    if not tracked:
        return None
    there = [name for name in tracked if _is_file(source / name)]
    return [name for name in there if not is_dot_env(name)], list(filter(is_dot_env, there))


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def take_snapshot(source: Path, target: Path) -> None:
    """Make ``target``, for its owner alone, a copy of what git tracks in ``source``.

    What is there already is somebody's, and stays. A copy that fails leaves nothing.
    """
    files = copied_files(source)
    if files is None:
        raise EnvironmentProblem(f"SNAPSHOT=1: git tracks no files in {source}, or did not answer; see --check")
    try:
        target.mkdir(mode=0o700)
    except FileExistsError:
        raise EnvironmentProblem(f"SNAPSHOT=1: {target} is there already, and a run may be using it") from None
    except OSError as problem:
        raise EnvironmentProblem(f"SNAPSHOT=1: cannot make {target}: {problem.strerror}") from None
    try:
        for name in files[0]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(source, name, target / name)
    except (OSError, shutil.Error) as problem:
        shutil.rmtree(target, ignore_errors=True)
        raise EnvironmentProblem(f"SNAPSHOT=1: cannot copy {source} to {target}: {problem}") from None
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _copy(tree: Path, name: str, target: Path) -> None:
    """Copy a file with its mode and time; a link that leads out of the tree still leads where it did."""
    source = tree / name
    if not source.is_symlink():
        shutil.copy2(source, target)
        return
    said = os.readlink(source)  # noqa: PTH115  as it stands, with a slash at its end
    leads_to = Path(os.path.normpath(source.parent / said))
    target.symlink_to(said if leads_to.is_relative_to(tree) else leads_to)
