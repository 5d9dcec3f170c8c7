"""Does a static busybox become an image that Podman loads, and can the small RL loop live in it?"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shell_rl import commands, tasks
from shell_rl.errors import Unreachable
from shell_rl.sandbox import Sandbox
from shell_rl.sandbox_program import start_script
from shell_rl.web import Door, parse_address
from slurm_runtime import busybox_image as image

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = image.installed_busybox()
needs_busybox = pytest.mark.skipif(INSTALLED is None, reason="needs a static busybox (apt-get install busybox-static)")


def elf(machine: int = 62, interpreter: bool = False) -> bytes:
    """A 64-bit little-endian ELF header with one program header; enough for what is read of it."""
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    return head + struct.pack("<I", 3 if interpreter else 1) + bytes(52)


# --- which programs are taken -----------------------------------------------------------------------------------


def test_static_and_dynamic_programs_are_told_apart() -> None:
    assert image.read_program(elf()) == image.Program("amd64", True)
    assert image.read_program(elf(183)) == image.Program("arm64", True)
    assert image.read_program(elf(interpreter=True)) == image.Program("amd64", False)
    for data in (b"", b"#!/bin/sh\n" + bytes(100), elf()[:70], elf(machine=9999)):
        assert image.read_program(data) is None


def test_the_python_that_runs_this_is_not_static(tmp_path: Path) -> None:
    assert not image.is_static(Path(sys.executable).resolve())
    assert not image.is_static(tmp_path / "none")


def test_a_given_busybox_must_be_static(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "busybox"
    program.write_bytes(elf(interpreter=True))
    assert image.main(["--output", str(tmp_path / "a.tar"), "--busybox", str(program)]) == image.EXIT_USAGE
    assert "not a static busybox" in capsys.readouterr().err
    assert not (tmp_path / "a.tar").exists()


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without busybox; returns a folder for executables in front of PATH."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setattr(image, "_PLACES", ())
    monkeypatch.setattr(image, "installed_busybox", lambda: None)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_without_busybox_and_without_packages_the_remedies_are_named(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(bare / "apt-get", "echo 'E: Unable to locate package busybox-static' >&2; exit 100")
    assert image.main(["--output", str(tmp_path / "a.tar")]) == image.EXIT_ENVIRONMENT
    out, err = capsys.readouterr()
    assert out == "" and "Unable to locate package" in err
    assert all(remedy in err for remedy in ("busybox-static", "--busybox", "IMAGE_ARCHIVE", "CONTAINER_IMAGE"))


def test_a_download_that_hangs_ends_at_its_deadline(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(bare / "apt-get", "exec sleep 60")
    monkeypatch.setattr(image, "DOWNLOAD_SECONDS", 0.2)
    assert image.main(["--output", str(tmp_path / "a.tar")]) == image.EXIT_ENVIRONMENT
    assert "did not end within 0.2 s" in capsys.readouterr().err


@needs_busybox
def test_the_package_is_unpacked_without_root(bare: Path, tmp_path: Path) -> None:
    tree = tmp_path / "package" / "bin"
    tree.mkdir(parents=True)
    shutil.copy(str(INSTALLED), tree / "busybox")
    executable(bare / "apt-get", '[ "$1 $2" = "download busybox-static" ] && touch busybox-static_1_all.deb')
    executable(bare / "dpkg-deb", f'[ "$1" = -x ] && cp -r {tmp_path}/package "$3"')
    archive = image.ensure_archive(tmp_path / "a.tar")
    assert image.archive_names(archive) == [image.DEFAULT_NAME]


# --- the archive ------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes_and_another_name_other_bytes() -> None:
    first, second = (image.image_archive(elf(), ["sh", "cat"], "localhost/a:1") for _ in range(2))
    assert first == second != image.image_archive(elf(), ["sh", "cat"], "localhost/b:1")


def content(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


@needs_busybox
def test_the_archive_is_made_once_and_printed_alone(tmp_path: Path) -> None:
    archive = tmp_path / "new folder" / "image.tar"
    command = [sys.executable, "-m", "slurm_runtime.busybox_image", "--output", str(archive)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{archive}\n", "")
    assert [path.name for path in archive.parent.iterdir()] == ["image.tar"]
    inode = archive.stat().st_ino
    assert image.ensure_archive(archive) == archive
    assert archive.stat().st_ino == inode
    with tarfile.open(archive) as tar:
        manifest = json.loads(content(tar, "manifest.json"))
        layer = content(tar, manifest[0]["Layers"][0])
    assert manifest[0]["RepoTags"] == [image.DEFAULT_NAME]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tree:
        members = {member.name: member for member in tree}
    assert members["bin/httpd"].linkname == "busybox"
    assert members["tmp"].mode == 0o1777
    assert all(member.uid == member.gid == member.mtime == 0 for member in members.values())


@needs_busybox
def test_several_at_once_make_one_whole_archive(tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    with ThreadPoolExecutor(8) as workers:
        made = list(workers.map(lambda _: image.ensure_archive(archive), range(8)))
    assert set(made) == {archive} and image.archive_names(archive) == [image.DEFAULT_NAME]
    assert [path.name for path in tmp_path.iterdir()] == ["image.tar"]


@pytest.mark.parametrize("content", [b"", b"not a tar", image.image_archive(elf(), ["sh"], "localhost/other:1")])
def test_a_file_of_somebody_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    archive.write_bytes(content)
    with pytest.raises(image.ImageUsageError, match="remove it or choose another"):
        image.ensure_archive(archive)
    assert archive.read_bytes() == content


@pytest.mark.parametrize("name", ["", "x", "Upper/x:1", "a b:1", "localhost/x:", "localhost/x:1 --privileged"])
def test_impossible_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(image.ImageUsageError, match="not an image name"):
        image.ensure_archive(tmp_path / "image.tar", name)


@needs_busybox
def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert image.main(["--output", str(tmp_path / "file" / "image.tar")]) == image.EXIT_ENVIRONMENT
    assert "Cannot write" in capsys.readouterr().err


# --- in Podman --------------------------------------------------------------------------------------------------


class Podman:
    """Podman with a store of its own."""

    def __init__(self, home: Path) -> None:
        self._home = home
        for name in "grxdt":
            (home / name).mkdir(mode=0o700)
        storage = f'[storage]\ndriver="overlay"\ngraphroot="{home}/g"\nrunroot="{home}/r"\n'
        runtime = 'runtime="runc"\n' if shutil.which("runc") else ""
        engine = f'[engine]\ncgroup_manager="cgroupfs"\nevents_logger="file"\n{runtime}'
        # Podman's own limits are above what some machines let even root set.
        limits = '[containers]\ndefault_ulimits=["nofile=1024:1024","nproc=1024:1024"]\n'
        (home / "storage.conf").write_text(storage)
        (home / "containers.conf").write_text(limits + engine)
        self._environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": f"{home}/x",
            "XDG_DATA_HOME": f"{home}/d",
            "TMPDIR": f"{home}/t",
            "CONTAINERS_STORAGE_CONF": f"{home}/storage.conf",
            "CONTAINERS_CONF": f"{home}/containers.conf",
        }

    def __call__(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *arguments], cwd="/", env=self._environment, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def remove(self) -> None:
        """Containers first, then the store, whose files may belong to the user namespace's users."""
        self("rm", "-f", "-a", "-t", "0", check=False)
        if os.getuid() == 0:
            subprocess.run(["umount", self._home / "g" / "overlay"], capture_output=True, check=False)
        else:
            self("unshare", "rm", "-rf", *(f"{self._home}/{name}" for name in "grd"), check=False)
        for pid_file in (self._home / "x").glob("**/pause.pid"):  # it holds the user namespace, and outlives us
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
        shutil.rmtree(self._home)


@pytest.fixture
def podman() -> Iterator[Podman]:
    # Not tmp_path: socket paths below it would be too long, and other users could not pass through it.
    store = Podman(Path(tempfile.mkdtemp(prefix="skyrl-bb-", dir="/tmp")))
    try:
        yield store
    finally:
        store.remove()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(door: Door, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            assert door.request("GET", "/ready").status == 200
            return
        except Unreachable:
            assert time.monotonic() < deadline, "the sandbox's server did not come up"
            time.sleep(0.02)


def action_of(words: Sequence[str]) -> commands.Action:
    action: commands.Action = ()
    for word in words:
        action += (commands.choices(action).index(word),)
    return action


SOLUTIONS = {
    "count-lines": ("wc", "-l", "< app.log", ""),
    "sort-numbers": ("sort", "-nr", "< numbers.txt", ""),
    "extract-field": ("cut", "-d: -f2", "< people.txt", ""),
    "find-file": ("find", "-name settings.cfg", ".", ""),
    "sum-numbers": ("awk", "'{s += $1} END {print s}'", "< numbers.txt", ""),
    "save-unique": ("sort", "-u", "< app.log", "> result.txt"),
}


@needs_busybox
@pytest.mark.podman
def test_podman_loads_it_and_the_loop_solves_its_tasks_in_it(podman: Podman, tmp_path: Path) -> None:
    archive = image.ensure_archive(tmp_path / "image.tar")
    assert image.DEFAULT_NAME in podman("load", "-i", str(archive))
    port = free_port()
    podman(
        *("run", "-d", "--network", "host", "-e", "SESSION_API_KEY=of-the-sandbox", image.DEFAULT_NAME),
        *("/bin/sh", "-c", start_script(port, "127.0.0.1")),
    )
    box = Sandbox("podman", Door(parse_address(f"http://127.0.0.1:{port}"), {"X-Session-API-Key": "of-the-sandbox"}))
    wait_until_up(box.door)
    stranger = Door(box.door.address, {"X-Session-API-Key": "guess"})
    assert stranger.request("POST", "/cgi-bin/run", b"id").status == 403
    assert box.run("id -u; ls -d /workspace; cat /etc/hostname >/dev/null; exit 7").exit_code == 7
    for task in tasks.TASKS:
        world = tasks.make_world(random.Random(task.name))
        done = box.run(tasks.script(world, commands.render(action_of(SOLUTIONS[task.name])), "mark"))
        assert tasks.reward(task, world, tasks.observe(done, "mark")) == 1.0, (task.name, done)
    assert box.run("ls -d /tmp/shell-rl.*/run.*").stdout.count("\n") == 1  # only its own
