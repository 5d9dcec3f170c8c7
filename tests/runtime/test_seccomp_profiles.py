"""Which profile a container gets: decided on its own, and read from what Podman wrote."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm_runtime.config import ServerConfig
from slurm_runtime.launcher import Launcher
from slurm_runtime.podman import ContainerState
from slurm_runtime.seccomp_profiles import ProfileFile, native_only, prefix, profile_in, remove_left

ROOT = Path(__file__).parents[2]
PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}],
}


@pytest.mark.parametrize(
    ("architectures", "machine", "kept"),
    [
        (PROFILE["architectures"], "x86_64", ["SCMP_ARCH_X86_64"]),
        (["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"], "aarch64", ["SCMP_ARCH_AARCH64"]),
        (["SCMP_ARCH_X86_64"], "x86_64", None),  # nothing to gain
        (PROFILE["architectures"], "riscv64", None),
        (PROFILE["architectures"], "aarch64", None),
        (None, "x86_64", None),
    ],
)
def test_only_this_machines_architecture_is_kept(
    architectures: list[str] | None, machine: str, kept: list[str] | None
) -> None:
    found = native_only({**PROFILE, "architectures": architectures}, machine)
    assert (found or {}).get("architectures") == kept
    assert found is None or found["syscalls"] == PROFILE["syscalls"]


def test_the_profile_of_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"linux": {"seccomp": PROFILE}}))
    assert profile_in(str(config)) == PROFILE
    for text in ("{}", '{"linux": null}', "[]", "no json", '{"linux": {"seccomp": 3}}'):
        config.write_text(text)
        assert profile_in(str(config)) is None
    assert profile_in(str(tmp_path / "nonesuch")) is None


def test_the_file_can_be_read_by_podmans_user_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = ProfileFile()
    file.write(None)
    assert file.path == ""
    file.write(PROFILE)
    assert json.loads(Path(file.path).read_text()) == PROFILE
    assert stat.S_IMODE(Path(file.path).stat().st_mode) == 0o644
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_servers_left_goes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = f"""
import tempfile, time
from slurm_runtime import seccomp_profiles
tempfile.tempdir = {str(tmp_path)!r}
file = seccomp_profiles.ProfileFile()
file.write({PROFILE!r})
print(file.path, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout
        try:
            theirs = Path(other.stdout.readline().strip())
            (tmp_path / f"{prefix()}link.json").symlink_to(theirs)
            os.mkfifo(tmp_path / f"{prefix()}fifo.json", 0o200)
            (tmp_path / "skyrl-seccomp-other-host-1.json").touch()
            remove_left()
            assert theirs.exists(), "its server lives"
        finally:
            other.kill()
    remove_left()
    assert not theirs.exists()
    assert (tmp_path / f"{prefix()}link.json").is_symlink()
    assert (tmp_path / "skyrl-seccomp-other-host-1.json").exists()


def test_without_locks_there_is_a_profile_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", no_locks)
    files = [ProfileFile(), ProfileFile()]
    for file in files:
        file.write(PROFILE)
    assert all(json.loads(Path(file.path).read_text()) == PROFILE for file in files)
    Path(files[0].path).unlink()
    assert files[0].path == "", "Podman would refuse to start a container with a file that is not there"
    for file in files:
        file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_leaves_no_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = ProfileFile()
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # EFBIG in place of ENOSPC
    try:
        file.write(PROFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.path == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_podmans_own_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nonesuch"))
    file = ProfileFile()
    file.write(PROFILE)
    assert file.path == ""


def test_starts_that_are_first_together_make_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "temporary", tmp_path / "config.json"
    folder.mkdir()
    config.write_text(json.dumps({"linux": {"seccomp": PROFILE}}))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    nobody: Any = None
    launcher = Launcher(ServerConfig(), nobody, nobody, nobody, nobody, nobody)
    state = ContainerState("c", running=True, status="running", exit_code=0, oci_config=str(config))

    async def together() -> None:
        assert await asyncio.gather(*(launcher._profile(state) for _ in range(4))) == [PROFILE] * 4

    asyncio.run(together())
    launcher.holder_profile.remove()
    assert list(folder.iterdir()) == []
