"""What does git say of a folder: commit, branch, changes, and which files it tracks? Never for longer than seconds.

Nothing of the user's repository is written, its index included. Of the programs that it configures only filters are
run (``filter.*``, as git-lfs is): without them git would take every file of theirs for changed. Its monitor of the file
system, its programs for diffs, and those of its submodules are not run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.lib.processes import first_bytes
from slurm.lib.under_way import follow

ASK_S = 10.0  # of a repository on slow shared storage
MOST_DIFF = 10 * 1024**2  # bytes
MOST_NAMES = 64 * 1024**2  # bytes
QUIETLY = ("git", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false")
# Submodules are asked one by one: for its own look into them (--submodule=diff) git starts their programs for diffs.
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=log")
SUBMODULE = "160000"  # the mode of one in a tree or an index


@dataclass(frozen=True)
class GitState:
    """What a folder's code was: None where that is not known, as outside of git.

    ``diff`` is what had changed since the commit, None where nothing had; ``is_cut`` where there was more of it.
    """

    commit: str | None
    dirty: bool | None
    branch: str | None = None
    diff: bytes | None = None
    is_cut: bool = False

    def as_record(self) -> dict[str, object]:
        """The state as ``run.json`` has it, its diff not yet kept."""
        return {"commit": self.commit, "branch": self.branch, "dirty": self.dirty, "diff": None}


def parse_git_status(text: str) -> GitState:
    """From ``git status --porcelain=v2 --branch``."""
    lines = text.splitlines()
    heads = {line.split(" ", 2)[1]: line.split(" ", 2)[2] for line in lines if line.startswith("# branch.")}
    commit, branch = heads.get("branch.oid"), heads.get("branch.head")
    return GitState(
        None if commit == "(initial)" else commit,
        any(not line.startswith("#") for line in lines),
        None if branch == "(detached)" else branch,
    )


def git_state(folder: Path) -> GitState:
    """The state of a folder, with what has changed in it; nothing known where git is missing, silent or slow."""
    status = ask(folder, "status", "--porcelain=v2", "--branch")
    if status is None:
        return GitState(None, None)
    state = parse_git_status(status.decode("utf-8", "replace"))
    if not state.dirty or not state.commit:
        return state
    diff, is_cut = b"", False
    for part in _diffs(folder, "HEAD", "", time.monotonic() + ASK_S):
        diff += part or b""
        is_cut = part is None or len(diff) > MOST_DIFF
        if is_cut:
            break
    return replace(state, diff=diff[:MOST_DIFF] or None, is_cut=is_cut)


def _diffs(folder: Path, commit: str, prefix: str, end: float) -> Iterator[bytes | None]:
    """What has changed in a repository since a commit, then in its submodules since those that this commit names.

    A submodule that lacks such a commit is compared with its own. None in place of what there is no time for.
    """
    words = (*DIFF, f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}")
    changed = ask(folder, *words, commit, most=MOST_DIFF + 1)
    yield changed if changed is not None else ask(folder, *words, "HEAD", most=MOST_DIFF + 1) or b""
    for path, inside, recorded in _submodules(folder, commit):
        if time.monotonic() > end:
            yield None
            return
        yield from _diffs(path, recorded, f"{prefix}{inside}/", end)


def _submodules(folder: Path, commit: str) -> list[tuple[Path, str, str]]:
    """The submodules of a repository that are fetched: where, their path in it, and what a commit of it names."""
    top = Path(os.fsdecode((ask(folder, "rev-parse", "--show-toplevel") or b"").rstrip(b"\n")) or folder)
    if not (top / ".gitmodules").is_file():
        return []
    recorded = dict(_links(ask(top, "ls-tree", "-r", "-z", commit)))
    staged = dict(_links(ask(top, "ls-files", "--stage", "-z")))
    there = [name for name in staged if (top / name / ".git").exists()]
    return [(top / name, name, recorded.get(name, "HEAD")) for name in there]


def _links(listed: bytes | None) -> Iterator[tuple[str, str]]:
    """The submodules in a listing of ``MODE … COMMIT …<tab>PATH``, by their paths."""
    for entry in _names(listed) or []:
        facts, _, name = entry.partition("\t")
        words = facts.split()
        if words[0] == SUBMODULE:  # a tree names its kind before the commit, an index the stage behind
            yield name, next(word for word in words[1:] if len(word) >= 40)


def ask(folder: Path, *words: str, most: int = MOST_NAMES) -> bytes | None:
    """What a command of git's prints in a folder, its first ``most`` bytes; None for a failure, and after ``ASK_S``.

    A git that its file server does not let end, even when it is killed, is left behind.
    """
    answers: list[bytes | None] = []
    asker = threading.current_thread()

    def answer() -> None:
        follow(asker)
        answers.append(_answer(folder, words, most))

    asking = threading.Thread(target=answer, daemon=True)
    asking.start()
    asking.join(ASK_S + 1)
    return answers[0] if answers else None


def _answer(folder: Path, words: Sequence[str], most: int) -> bytes | None:
    said = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    environment = {name: value for name, value in said.items() if name not in _ELSEWHERE}
    return first_bytes([*QUIETLY, *words], most, timeout_s=ASK_S, environment=environment, cwd=folder)


# By these git would look at another repository than the folder's, as within a hook of git's.
_ELSEWHERE = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"})


def tracked_files(folder: Path) -> list[str] | None:
    """The files below a folder that git tracks, submodules' too, relative to it; None where it is in no repository."""
    return _names(ask(folder, "ls-files", "-z", "--cached", "--recurse-submodules"))


def untracked_files(folder: Path) -> list[str]:
    """The files below a folder that git neither tracks nor ignores."""
    return _names(ask(folder, "ls-files", "-z", "--others", "--exclude-standard")) or []


def _names(listed: bytes | None) -> list[str] | None:
    return None if listed is None else [os.fsdecode(name) for name in listed.split(b"\0") if name]
