"""What does git say of a folder: commit, branch, changes, and which files it tracks? Never for longer than seconds.

Nothing of the user's repository is written, its index included, and no program that it configures is run.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ASK_S = 10.0  # of a repository on slow shared storage
MOST_DIFF = 10 * 1024**2  # bytes
MOST_NAMES = 64 * 1024**2  # bytes
QUIETLY = ("git", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false")
DIFF = ("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=diff")


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

    def as_record(self, diff_file: str | None) -> dict[str, object]:
        """The state as ``run.json`` has it."""
        return {"commit": self.commit, "branch": self.branch, "dirty": self.dirty, "diff": diff_file}


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
    diff = ask(folder, *DIFF, most=MOST_DIFF + 1) if state.dirty and state.commit else None
    is_cut = diff is not None and len(diff) > MOST_DIFF
    return replace(state, diff=(diff or b"")[:MOST_DIFF] or None, is_cut=is_cut)


def ask(folder: Path, *words: str, most: int = MOST_NAMES) -> bytes | None:
    """What a command of git's prints in a folder, its first ``most`` bytes; None for a failure, and after ``ASK_S``.

    A git that its file server does not let end, even when it is killed, is left behind.
    """
    answers: list[bytes | None] = []
    asking = threading.Thread(target=lambda: answers.append(_answer(folder, words, most)), daemon=True)
    asking.start()
    asking.join(ASK_S + 1)
    return answers[0] if answers else None


def _answer(folder: Path, words: Sequence[str], most: int) -> bytes | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            [*QUIETLY, *words],
            cwd=folder,
            env={name: value for name, value in environment.items() if name not in _ELSEWHERE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    assert process.stdout
    late = threading.Timer(ASK_S, process.kill)
    late.start()
    try:
        text = process.stdout.read(most)
        is_whole = len(text) < most
        if not is_whole:
            process.kill()
        return text if process.wait() == 0 or not is_whole else None
    finally:
        late.cancel()
        process.stdout.close()


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
