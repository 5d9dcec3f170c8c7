"""With SNAPSHOT=1, does git track all of skyrl-agent that the run needs, and how much is that?"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.git import untracked_files
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.preflight.words import number_of, size
from slurm.lib.settings import Settings
from slurm.lib.snapshot import copied_files
from slurm.lib.task_yaml import AUTO, EXAMPLE

SHOWN = 5  # names of files in a message
MUCH, MOST = 200 * 1024**2, 2 * 1024**3  # bytes
NEEDED = ("pyproject.toml", "uv.lock")
# What uv.lock says of a package that is installed from a folder beside skyrl-agent.
_BESIDE = re.compile(r'\{ (?:editable|directory|virtual) = "(\.\./[^"]*)" \}')


@dataclass(frozen=True)
class Tree:
    """skyrl-agent as git sees it: the files that are copied (None: git knows none), their size, and what is not.

    ``dot_envs`` are tracked, and left out all the same.
    """

    folder: Path
    copied: Sequence[str] | None
    bytes: int = 0
    untracked: Sequence[str] = ()
    dot_envs: Sequence[str] = ()
    beside: Sequence[str] = ()


def look_at_tree(folder: Path) -> Tree:
    """Ask git about skyrl-agent, and measure what is copied."""
    files = copied_files(folder) if folder.is_dir() else None
    if files is None:
        return Tree(folder, None)
    copied, dot_envs = files
    total = sum(_size(folder / name) for name in copied)
    lock = folder / "uv.lock"
    locked = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""
    return Tree(folder, copied, total, untracked_files(folder), dot_envs, sorted(set(_BESIDE.findall(locked))))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # removed just now
        return 0


def snapshot_findings(settings: Settings, tree: Tree) -> list[Finding]:
    """What stops the copy, what it lacks, and its size."""
    if tree.copied is None:
        sentence = f"SNAPSHOT=1 copies what git tracks, and git tracks nothing in {tree.folder}, or did not answer"
        fix = f"try: git -C {tree.folder} ls-files; make it a repository (git init, git add), or leave SNAPSHOT unset"
        return [error("snapshot", sentence, fix)]
    found = [_untracked_need(tree, name, why) for name, why in _needs(settings, tree) if name not in tree.copied]
    if tree.bytes > MOST:
        sentence = f"SNAPSHOT=1 would copy {size(tree.bytes)} of {tree.folder}, more than {size(MOST)}"
        return [*found, error("snapshot", sentence, "take large files out of git (git rm --cached), or SNAPSHOT=0")]
    return [*found, *_left_out(settings, tree), _amount(tree)]


def _needs(settings: Settings, tree: Tree) -> list[tuple[str, str]]:
    """The files without which VERL would not start, and who asks for each."""
    if settings.training_command:
        return []
    said = EXAMPLE if settings.task_yaml == AUTO else settings.task_yaml
    task = os.path.relpath(os.path.normpath(tree.folder / said), tree.folder)
    inside = not task.startswith("..")
    return [*((name, "uv") for name in NEEDED), *([(task, "TASK_YAML")] if inside else [])]


def _untracked_need(tree: Tree, name: str, why: str) -> Finding:
    sentence = f"git does not track {tree.folder / name} ({why}), so that the copy of SNAPSHOT=1 would lack it"
    return error("snapshot", sentence, f"git -C {tree.folder} add {name}")


def _left_out(settings: Settings, tree: Tree) -> list[Finding]:
    found = []
    own = set() if settings.training_command else {".env"}  # which the trainer gets all the same, from the original
    if missed := [name for name in tree.dot_envs if name not in own]:
        sentence = f"SNAPSHOT=1 leaves out {_named(missed)} of {tree.folder}, which may hold keys"
        place = "this shell" if settings.training_command else f"{tree.folder / '.env'}"
        fix = f"put what the run needs of it into {place}, or into a file of another name"
        found.append(warning("snapshot", sentence, fix))
    if tree.untracked:
        names = _named(tree.untracked)
        sentence = f"SNAPSHOT=1 leaves out {number_of(len(tree.untracked), 'untracked file')} of {tree.folder}: {names}"
        found.append(warning("snapshot", sentence, "git add what the run needs; list the rest in .gitignore"))
    if tree.beside:
        sentence = f"outside of the copy of SNAPSHOT=1 are the packages {', '.join(tree.beside)} beside {tree.folder}"
        found.append(warning("snapshot", sentence, "the jobs use them as they are then: leave them as they are"))
    return found


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(_printable, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")


def _printable(name: str) -> str:
    """A file's name in a line of text, whatever bytes it has."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _amount(tree: Tree) -> Finding:
    assert tree.copied is not None
    sentence = f"{number_of(len(tree.copied), 'file')} of {tree.folder} ({size(tree.bytes)}) are copied for this run"
    if tree.bytes <= MUCH:
        return estimate("snapshot", sentence)
    return warning("snapshot", sentence, "take large files out of git, or keep them elsewhere")
