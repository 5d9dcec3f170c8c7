"""A sandbox image without a registry: how a static busybox becomes an archive that ``podman load`` reads.

``python -m slurm_runtime.busybox_image --output ARCHIVE`` prints the archive's path, and nothing else, on stdout. The
same busybox and name give the same bytes. Exit codes: 0 there is an archive; 2 usage; 71 no busybox to be had.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 71  # this machine has no static busybox, and Debian's package could not be fetched (EX_OSERR)

DEFAULT_NAME = "localhost/skyrl-busybox:latest"
NEEDED_APPLETS = {"sh", "httpd", "cat", "env", "head", "mkdir", "mktemp", "rm", "setsid", "timeout", "wc"}
LIST_SECONDS = 10
DOWNLOAD_SECONDS = 120
UNPACK_SECONDS = 60

_PLACES = ("/bin/busybox", "/usr/bin/busybox", "/bin/busybox-static", "/usr/bin/busybox-static")
_MACHINES = {3: "386", 40: "arm", 62: "amd64", 183: "arm64", 21: "ppc64le", 22: "s390x", 243: "riscv64"}
_NAME = re.compile(r"[a-z0-9][a-z0-9._:-]*(/[a-z0-9._-]+)*:[A-Za-z0-9_][A-Za-z0-9._-]*")
_PROGRAM_INTERPRETER = 3  # PT_INTERP: present exactly in programs that need a dynamic loader


class ImageError(Exception):
    """The archive cannot be made; ``str()`` says why and what to do."""

    exit_code = EXIT_ENVIRONMENT


class ImageUsageError(ImageError):
    """What was asked for is impossible."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class Program:
    """What an ELF header says: the architecture in container terms, and whether it runs without a loader."""

    architecture: str
    static: bool


def read_program(data: bytes) -> Program | None:
    """Read an ELF program's header; None where the bytes are not an ELF file of a known architecture."""
    if len(data) < 64 or data[:4] != b"\x7fELF" or data[4] not in (1, 2) or data[5] not in (1, 2):
        return None
    order, wide = "<" if data[5] == 1 else ">", data[4] == 2
    (machine,) = struct.unpack_from(f"{order}H", data, 18)
    (offset,) = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", data, 32 if wide else 28)
    size, number = struct.unpack_from(f"{order}HH", data, 54 if wide else 42)
    if machine not in _MACHINES or offset + size * number > len(data):
        return None
    types = [struct.unpack_from(f"{order}I", data, offset + size * index)[0] for index in range(number)]
    return Program(_MACHINES[machine], _PROGRAM_INTERPRETER not in types)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def is_static(path: Path) -> bool:
    """Whether a file is a program that runs in an image with nothing else in it."""
    data = _read(path)
    program = read_program(data) if data is not None else None
    return program is not None and program.static


def installed_busybox() -> Path | None:
    """A static busybox of this machine."""
    found = shutil.which("busybox")
    return next((path for path in map(Path, [*([found] if found else []), *_PLACES]) if is_static(path)), None)


def _run(command: Sequence[str], seconds: float, folder: Path | None = None) -> str:
    """Run a command; its stdout.

    :raises ImageError: it is missing, failed, or took too long
    """
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise ImageError(f"{command[0]} did not end within {seconds:g} s") from None
    except OSError as error:
        raise ImageError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        raise ImageError(f"{' '.join(command[:3])} failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return done.stdout


def _downloaded_busybox(folder: Path) -> Path:
    """Debian's busybox-static, fetched and unpacked below ``folder``; needs no root."""
    _run(["apt-get", "download", "busybox-static"], DOWNLOAD_SECONDS, folder)
    package = next(iter(folder.glob("*.deb")), None)
    if package is None:
        raise ImageError("apt-get download left no package")
    _run(["dpkg-deb", "-x", str(package), str(folder / "root")], UNPACK_SECONDS)
    found = next(filter(is_static, (folder / "root").glob("**/bin/busybox")), None)
    if found is None:
        raise ImageError(f"{package.name} holds no static busybox")
    return found


@contextlib.contextmanager
def find_busybox(given: Path | None = None) -> Iterator[Path]:
    """A static busybox while the block lasts: the one given, else one installed, else Debian's package.

    :raises ImageError: none is to be had; the message names the remedies
    """
    if given is not None and not is_static(given):
        raise ImageUsageError(f"{given} is not a static busybox (no such file, not ELF, or it needs a dynamic loader).")
    if path := given or installed_busybox():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="busybox-") as folder:
        try:
            path = _downloaded_busybox(Path(folder))
        except ImageError as error:
            raise ImageError(
                f"No static busybox on this machine, and Debian's package could not be fetched: {error}. Install it "
                "(apt-get install busybox-static), pass one (--busybox PATH), or set IMAGE_ARCHIVE or CONTAINER_IMAGE "
                "to any image that has busybox."
            ) from error
        yield path


def _applets(busybox: Path) -> list[str]:
    names = sorted(
        {line.strip().rpartition("/")[2] for line in _run([str(busybox), "--list"], LIST_SECONDS).split("\n")}
    )
    missing = NEEDED_APPLETS - set(names)
    if missing:
        raise ImageUsageError(f"{busybox} lacks the applets {', '.join(sorted(missing))}; use Debian's busybox-static.")
    return [name for name in names if name and name != "busybox"]


def _entry(name: str, kind: bytes, mode: int, content: bytes = b"", target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, len(content), target
    return info, content


def _tar(entries: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar file; owner root and time 0, so that the same entries give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _layer(program: bytes, applets: Sequence[str]) -> bytes:
    """The image's only layer: busybox, a link for each applet, and the folders that programs expect."""
    folders = {
        "bin": 0o755,
        "etc": 0o755,
        "root": 0o700,
        "tmp": 0o1777,
        "usr": 0o755,
        "var": 0o755,
        "workspace": 0o1777,
    }
    files = {
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    }
    entries = [_entry(name, tarfile.DIRTYPE, mode) for name, mode in folders.items()]
    entries += [_entry(name, tarfile.REGTYPE, 0o644, content) for name, content in files.items()]
    entries.append(_entry("bin/busybox", tarfile.REGTYPE, 0o755, program))
    entries += [_entry(f"bin/{applet}", tarfile.SYMTYPE, 0o777, target="busybox") for applet in applets]
    entries += [_entry(name, tarfile.SYMTYPE, 0o777, target=target) for name, target in _MERGED]
    return _tar(entries)


_MERGED = (("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin"), ("var/tmp", "../tmp"))


def _config(architecture: str, layer: bytes) -> bytes:
    """The image's configuration (image-spec's config.json)."""
    config = {
        "architecture": architecture,
        "created": "1970-01-01T00:00:00Z",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "slurm_runtime.busybox_image"}],
    }
    return json.dumps(config, sort_keys=True).encode()


def image_archive(program: bytes, applets: Sequence[str], name: str) -> bytes:
    """The bytes of a docker-archive with one image. Pure.

    :param program: a static busybox
    :param applets: the commands that it shall answer to
    :param name: repository and tag, as ``localhost/NAME:TAG``
    :raises ImageUsageError: the program is not a static ELF program
    """
    header = read_program(program)
    if header is None or not header.static:
        raise ImageUsageError("The program is not a static busybox.")
    layer = _layer(program, applets)
    config = _config(header.architecture, layer)
    layer_name, config_name = (f"{hashlib.sha256(layer).hexdigest()}.tar", f"{hashlib.sha256(config).hexdigest()}.json")
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": [layer_name]}]).encode()
    files = {config_name: config, layer_name: layer, "manifest.json": manifest}
    return _tar([_entry(file, tarfile.REGTYPE, 0o644, content) for file, content in files.items()])


def archive_names(archive: Path) -> list[str] | None:
    """The image names in a docker-archive; None where the file is not one."""
    try:
        with tarfile.open(archive) as tar:
            manifest = tar.extractfile("manifest.json")
            images = json.load(manifest) if manifest else []
        return [name for image in images for name in image.get("RepoTags") or []]
    except (OSError, tarfile.TarError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename: readers and writers at the same time see one whole file or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            os.fchmod(stream.fileno(), 0o644)  # loaded by jobs of other nodes, perhaps of other users
            stream.flush()
            os.fsync(stream.fileno())
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ImageUsageError(f"{name!r} is not an image name with a tag, such as {DEFAULT_NAME}.")
    return name


def ensure_archive(archive: Path, name: str = DEFAULT_NAME, busybox: Path | None = None) -> Path:
    """The archive of a busybox image called ``name``: made where it is absent, used as it is where it exists.

    Safe when several processes do this at once: each makes the same bytes and moves them into place whole.

    :param busybox: a static busybox to use instead of this machine's
    :raises ImageError: no busybox is to be had, or the place cannot be written
    :raises ImageUsageError: the file exists and is not an archive of this image; it is left alone
    """
    _check_name(name)
    if archive.exists():
        if name not in (names := archive_names(archive) or []):
            raise ImageUsageError(
                f"{archive} exists and does not hold {name} (but {names}); remove it or choose another."
            )
        return archive
    with find_busybox(busybox) as path:
        content = image_archive(path.read_bytes(), _applets(path), name)
    try:
        _write_whole(archive, content)
    except OSError as error:
        raise ImageError(f"Cannot write {archive}: {error.strerror}; choose another place.") from error
    return archive


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm_runtime.busybox_image",
        description="Make a container image of a static busybox, without registry or root, for `podman load -i`. "
        "Prints the archive's path. An archive that exists is used as it is.",
        epilog="Exit codes: 0 there is an archive; 2 usage; 71 no static busybox to be had, or the place not writable.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="ARCHIVE")
    parser.add_argument("--name", default=DEFAULT_NAME, help="image name and tag (%(default)s)")
    parser.add_argument("--busybox", type=Path, metavar="PATH", help="a static busybox (default: this machine's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    try:
        print(ensure_archive(flags.output, flags.name, flags.busybox))
    except ImageError as error:
        print(f"busybox_image: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
