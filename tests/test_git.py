"""What git says of a folder, with the real git: bounded in time and size, and without a trace in the repository."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from slurm.lib import git as asked
from slurm.lib.git import GitState, git_state, tracked_files, untracked_files


def git(folder: Path, *words: str) -> str:
    argv = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"]
    return subprocess.run([*argv, *words], check=True, capture_output=True, text=True).stdout.strip()


def repository(folder: Path) -> Path:
    """A repository with one commit of one file."""
    folder.mkdir()
    git(folder, "init", "-qb", "main")
    (folder / "a.py").write_text("one\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return repository(tmp_path / "tree")


def test_what_has_changed_can_be_applied_to_the_commit(tree: Path, tmp_path: Path) -> None:
    """Staged or not, text or not, and in names of any kind."""
    (tree / "a.py").write_text("two\n")
    (tree / "ä b").write_bytes(bytes(range(256)))
    git(tree, "add", "ä b")
    state = git_state(tree)
    assert state.diff
    diff = tmp_path / "diff"
    diff.write_bytes(state.diff)
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(tree), str(again))
    git(again, "apply", str(diff))
    assert (again / "a.py").read_text() == "two\n"
    assert (again / "ä b").read_bytes() == bytes(range(256))


def test_a_large_diff_is_cut(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "MOST_DIFF", 1000)
    (tree / "a.py").write_text("x" * 5000)
    state = git_state(tree)
    assert state.is_cut
    assert state.diff is not None and len(state.diff) == 1000


def test_a_git_that_hangs_is_not_waited_for(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(asked, "ASK_S", 0.3)
    begin = time.monotonic()
    assert git_state(tree) == GitState(None, None)
    assert time.monotonic() - begin < 30


def test_nothing_of_the_repository_is_run_or_written(tree: Path, tmp_path: Path) -> None:
    """A monitor of the file system and programs for diffs are what a repository may name; its submodules may, too."""
    part = with_submodule(tree, tmp_path)
    for folder in (tree, part):
        (folder / "b.txt").write_text("b\n")
        (folder / ".gitattributes").write_text("*.txt diff=mine\n")
        git(folder, "add", ".gitattributes", "b.txt")
        for key in ("core.fsmonitor", "diff.external", "diff.mine.command", "diff.mine.textconv"):
            git(folder, "config", key, f"touch {tmp_path}/was-run; false")
        (folder / "a.py").write_text("two\n")
        (folder / "b.txt").write_text("c\n")
    before = (tree / ".git" / "index").stat().st_mtime_ns
    assert b"+two" in (git_state(tree).diff or b"")
    assert tracked_files(tree) is not None
    assert not (tmp_path / "was-run").exists()
    assert (tree / ".git" / "index").stat().st_mtime_ns == before


def test_a_filter_is_asked_what_has_changed(tree: Path) -> None:
    """As git-lfs is: without it every file of its would be a change."""
    git(tree, "config", "filter.mine.clean", "tr a-z A-Z")
    (tree / ".gitattributes").write_text("*.txt filter=mine\n")
    (tree / "b.txt").write_text("b\n")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "b")
    (tree / "b.txt").write_text("c\n")
    assert b"-B\n+C\n" in (git_state(tree).diff or b"")


def with_submodule(tree: Path, tmp_path: Path) -> Path:
    git(tree, "submodule", "--quiet", "add", str(repository(tmp_path / "part")), "lib/part")
    git(tree, "commit", "-qm", "with a part")
    return tree / "lib" / "part"


def test_what_has_changed_in_submodules_can_be_applied_too(tree: Path, tmp_path: Path) -> None:
    """Committed there or not, and seen from a folder within the repository."""
    part = with_submodule(tree, tmp_path)
    git(tmp_path, "clone", "-q", "--recurse-submodules", str(tree), str(tmp_path / "again"))
    (part / "a.py").write_text("two\n")
    git(part, "commit", "-qam", "there alone")
    (part / "a.py").write_text("three\n")
    (tree / "sub").mkdir()
    diff = git_state(tree / "sub").diff or b""
    assert b"there alone" in diff
    (tmp_path / "diff").write_bytes(diff)
    git(tmp_path / "again", "apply", str(tmp_path / "diff"))
    assert (tmp_path / "again" / "lib" / "part" / "a.py").read_text() == "three\n"


def test_a_new_submodule_is_compared_with_its_own_commit(tree: Path, tmp_path: Path) -> None:
    git(tree, "submodule", "--quiet", "add", str(repository(tmp_path / "part")), "lib/part")
    (tree / "lib" / "part" / "a.py").write_text("two\n")
    assert b"+two" in (git_state(tree).diff or b"")


def test_submodules_for_which_no_time_is_left_are_not_asked(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (with_submodule(tree, tmp_path) / "a.py").write_text("two\n")
    (tree / "a.py").write_text("two\n")
    clock = iter([0.0])
    # The module's alone: other threads of the tests may look at the clock first.
    monkeypatch.setattr("slurm.lib.git.time", SimpleNamespace(monotonic=lambda: next(clock, 1000.0)))
    state = git_state(tree)
    assert state.is_cut
    assert (state.diff or b"").count(b"+two") == 1


def test_a_shell_within_a_hook_of_git_names_another_repository(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert git_state(tree).branch == "main"


def test_tracked_files_are_those_of_submodules_too(tree: Path, tmp_path: Path) -> None:
    part = repository(tmp_path / "part")
    git(tree, "submodule", "--quiet", "add", str(part), "lib/part")
    (tree / "new.py").touch()
    (tree / ".gitignore").write_text("*.log\n")
    (tree / "x.log").touch()
    (tree / "sub").mkdir()
    (tree / "sub" / "b.py").touch()
    git(tree, "add", "sub")
    assert tracked_files(tree) == [".gitmodules", "a.py", "lib/part/a.py", "sub/b.py"]
    assert untracked_files(tree) == [".gitignore", "new.py"]
    assert tracked_files(tree / "sub") == ["b.py"], "of a folder within a repository, its own"
    assert tracked_files(tmp_path) is None
