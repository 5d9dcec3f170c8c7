"""May a build context be unpacked? Podman's own unpacking follows a symbolic link that the archive has made before.

What is refused is in no archive of a real folder: entries below a link, or out of the folder, and what is no file.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from posixpath import normpath

from slurm_runtime.wishes import BadRequest

MOST_UNPACKED_BYTES = 16 << 30
MOST_ENTRIES = 1_000_000
MOST_HEADER_BYTES = 1 << 20
PODMAN_READS = frozenset({"Dockerfile", ".dockerignore", ".containerignore"})  # outside of the build's confinement
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Entry(tarfile.TarInfo):
    """One whose headers are not read where they are too large to be a name."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and self.size > MOST_HEADER_BYTES:
            raise BadRequest(f"context has a header of {self.size} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found


def check_context(path: Path) -> None:
    """Read a tar.gz once; ``BadRequest`` names the first entry that may not be there, or says why it cannot be read."""
    links: set[str] = set()
    size = 0
    try:
        with tarfile.open(path, "r|gz", tarinfo=_Entry) as archive:
            for number, entry in enumerate(archive):
                archive.members.clear()  # type: ignore[attr-defined]  # they add up, and are of no use in a stream
                size += max(0, entry.size)
                if size > MOST_UNPACKED_BYTES or number >= MOST_ENTRIES:
                    raise BadRequest("context is too large when it is unpacked; leave data out of it (.dockerignore)")
                wrong = _wrong(entry, links)
                if wrong:
                    raise BadRequest(f"context may not have {entry.name[:200]!r}: {wrong}")
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as problem:
        raise BadRequest(f"context is not a tar.gz that can be read: {problem}") from None


def _wrong(entry: tarfile.TarInfo, links: set[str]) -> str:
    """What is wrong with an entry, empty if nothing; notes a symbolic link in ``links``."""
    if not (entry.isfile() or entry.isdir() or entry.issym() or entry.islnk()):
        return "it is neither a file nor a folder nor a link"
    if problem := _place(entry.name, links):
        return problem
    if entry.islnk() and (problem := _place(entry.linkname, links)):
        return f"it is a hard link, and of what it links to: {problem}"
    if normpath(entry.name) in PODMAN_READS and not entry.isfile():
        return "it has to be a file"
    if entry.issym():
        links.add(normpath(entry.name))
    return ""


def _place(name: str, links: set[str]) -> str:
    """What is wrong with a path in the archive."""
    if name.startswith("/") or ".." in name.split("/"):
        return "it lies outside of the context"
    parts = normpath(name).split("/")
    before = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return "a symbolic link lies there already, or above it" if any(path in links for path in before) else ""
