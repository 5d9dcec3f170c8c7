"""Folders that belong to one process: made, found and removed, whenever it is killed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.locked_folder import LOCK_NAME, dead_owners_lock, remove, remove_of_dead_owner
from slurm.lib.ray_folder import ray_folder

KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {code!r})
from slurm.lib import locked_folder, ray_folder
from slurm.lib.guardian import guarded

def killed(*_):
    os.kill(os.getpid(), 9)

{moment} = killed
with guarded(Path({code!r})) as guardian, ray_folder.ray_folder(Path({root!r}), announce=guardian.own_folder):
    killed()
"""


@pytest.mark.parametrize("moment", ["Path.open", "locked_folder.fcntl.flock", "Path.rename", "locked_folder._"])
def test_the_folder_of_one_that_is_killed_while_it_makes_it_goes(tmp_path: Path, moment: str) -> None:
    code = str(Path(__file__).resolve().parent.parent)
    script = KILLED.format(code=code, moment=moment, root=str(tmp_path / "skyray-1-2t"))
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    end = time.monotonic() + 10
    while list(tmp_path.iterdir()):
        assert time.monotonic() < end, list(tmp_path.iterdir())
        time.sleep(0.05)


def test_a_folder_that_another_made_is_left_to_it_by_the_guardian(tmp_path: Path) -> None:
    root, home = tmp_path / "skyray-1-2t", tmp_path / "home"
    told: list[tuple[Path, str]] = []
    with ray_folder(root, announce=lambda *of: told.append(of)):
        for token in (told[0][1], "another"):  # of the former the owner lives
            remove_of_dead_owner(root, token, remove, deadline_s=0.2)
            assert (root / LOCK_NAME).exists()
    home.mkdir()
    (home / "precious").touch()
    (home / LOCK_NAME).write_text(json.dumps({"token": told[0][1], "host": socket.gethostname()}))
    root.symlink_to(home)
    remove_of_dead_owner(root, told[0][1], remove)
    assert (home / "precious").exists()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"host": "another-host"}'])
def test_who_is_not_known_to_be_dead_lives(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with dead_owners_lock(tmp_path) as dead:
        assert not dead


def test_a_lock_that_another_has_made_anew_is_not_the_dead_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look into it and its being taken: a job of the same number, which has removed the dead one's folder."""
    lock, said = tmp_path / LOCK_NAME, json.dumps({"host": socket.gethostname()})
    lock.write_text(said)
    with dead_owners_lock(tmp_path) as dead:
        assert dead

    def replaced(*_: object) -> None:
        lock.unlink()
        lock.write_text(said)

    monkeypatch.setattr("fcntl.flock", replaced)
    with dead_owners_lock(tmp_path) as dead:
        assert not dead


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "skyray").touch()
    with pytest.raises(EnvironmentProblem, match="cannot make"), ray_folder(tmp_path / "skyray"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["skyray"]
