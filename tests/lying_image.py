"""An image whose sandboxes lie: every command "succeeds" with exit code 0 and no output, and none is run."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

NAME = "localhost/skyrl-liar:latest"
WRAPPER = b"""#!/bin/busybox-real sh
if [ "$1" = httpd ]; then
  for root; do :; done
  printf '#!/bin/busybox-real sh\\nprintf "Content-Type: application/octet-stream\\\\r\\\\n\\\\r\\\\n0 0 0\\\\n"\\n' \\
    > "$root/cgi-bin/run"
fi
exec /bin/busybox-real "$@"
"""


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    archive.addfile(info, io.BytesIO(content))


def _layer() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for folder in ("bin", "tmp", "root"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(info)
        _add(archive, "bin/busybox-real", Path("/bin/busybox").read_bytes(), 0o755)
        _add(archive, "bin/busybox", WRAPPER, 0o755)
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox-real"
        archive.addfile(link)
    return data.getvalue()


def write(path: Path) -> None:
    """Write the image as an archive for ``podman load``."""
    layer = _layer()
    _write(path, NAME, layer, hashlib.sha256(layer).hexdigest())


class _Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


class _Packed(io.RawIOBase):
    """What is written, gzipped, and the digest of what it was."""

    def __init__(self) -> None:
        self.data, self.digest = io.BytesIO(), hashlib.sha256()
        self.packer = gzip.GzipFile(fileobj=self.data, mode="wb", compresslevel=1)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.packer.write(data)


def write_large(path: Path, name: str, megabytes: int) -> None:
    """Write an image whose archive is small, as its layer is packed, and which needs so much room on a disk."""
    layer = _Packed()
    with layer.packer, tarfile.open(fileobj=layer, mode="w|") as archive:
        info = tarfile.TarInfo("zeros")
        info.size = megabytes * 1024**2
        archive.addfile(info, _Zeros())
    _write(path, name, layer.data.getvalue(), layer.digest.hexdigest())


def _write(path: Path, name: str, layer: bytes, digest: str) -> None:
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        _add(archive, "layer.tar", layer)
        _add(archive, "config.json", json.dumps(config).encode())
        _add(archive, "manifest.json", json.dumps(manifest).encode())
