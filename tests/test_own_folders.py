"""Which folders in /tmp a sweep may remove."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm.lib.own_folders import is_own, own_folders


def test_a_folder_of_another_user_is_not_ours(tmp_path: Path) -> None:
    own, foreign = tmp_path / "skyrl-own", tmp_path / "skyrl-foreign"
    own.mkdir()
    foreign.mkdir()
    if os.geteuid() == 0:
        os.chown(foreign, 1, -1)
        assert own_folders(tmp_path, "skyrl-*") == [own]
    assert is_own(own)
    assert not is_own(foreign if os.geteuid() == 0 else Path("/"))


@pytest.mark.parametrize("name", ["link", "file", "nothing"])
def test_what_is_no_folder_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    assert not is_own(tmp_path / name)
