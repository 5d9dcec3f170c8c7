"""What do the OCI runtimes below Podman take alone? The physical minimum of a container, without network or engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.room import Room

DEADLINE_S = 120.0


class Refused(Exception):
    """The runtime does not run on this machine; its own words."""


@dataclass(frozen=True)
class Bundle:
    """A runtime, and the image's files with a configuration that only says ``sleep``."""

    runtime: str
    folder: Path
    state: Path

    def start(self) -> str:
        """A container in the background, up when this returns; its name."""
        name = f"bench-{uuid.uuid4().hex[:12]}"
        self._call("run", "--detach", "--bundle", str(self.folder), name)
        return name

    def run_true(self, name: str) -> None:
        """The command ``true`` in a container."""
        self._call("exec", name, "true")

    def remove(self, name: str) -> None:
        self._call("delete", "--force", name)

    def _call(self, *words: str) -> None:
        # A container keeps its runtime's stdout; a file, unlike a pipe, does not make the call wait for the container.
        said = self.state / f"{uuid.uuid4().hex}.err"
        with said.open("wb") as err:
            argv = [self.runtime, "--root", str(self.state), *words]
            code = subprocess.call(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err, timeout=DEADLINE_S
            )
        text = said.read_text(errors="replace").strip()
        said.unlink()
        if code:
            raise Refused(
                f"{Path(self.runtime).name} {words[0]}: {text.splitlines()[-1] if text else f'exit code {code}'}"
            )


@contextlib.contextmanager
def bundle(place: Room, runtime: str) -> Iterator[Bundle]:
    """The image's files, unpacked, with the mounts of our sandboxes, for a rootless container on the host's network."""
    folder = place.storage.root / f"bundle-{Path(runtime).name}"
    state = folder / "state"
    (folder / "rootfs").mkdir(parents=True)
    state.mkdir()
    made = Bundle(runtime, folder, state)
    _unpack(place, folder / "rootfs")
    subprocess.run([runtime, "spec", "--rootless"], cwd=folder, check=True, timeout=DEADLINE_S)
    _configure(place, folder / "config.json")
    try:
        yield made
    finally:
        for container in [path.name for path in state.iterdir() if path.is_dir()]:
            with contextlib.suppress(Refused):
                made.remove(container)


def _unpack(place: Room, rootfs: Path) -> None:
    name, archive = place.podman("create", place.image, "true"), rootfs.parent / "image.tar"
    place.podman("export", "--output", str(archive), name)
    place.podman("rm", name)
    subprocess.run(["tar", "-C", str(rootfs), "--exclude=dev/*", "-xf", str(archive)], check=True, timeout=DEADLINE_S)
    for mount in place.tree.mounts:
        target = rootfs / mount.target.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if Path(mount.source).is_dir() else target.touch()


def _configure(place: Room, file: Path) -> None:
    config = json.loads(file.read_text())
    config["process"].update(args=["sleep", "infinity"], terminal=False)
    config["root"]["readonly"] = False
    for mount in place.tree.mounts:
        options = ["rbind", "ro"]
        config["mounts"].append(
            {"destination": mount.target, "type": "bind", "source": os.path.realpath(mount.source), "options": options}
        )
    file.write_text(json.dumps(config))
