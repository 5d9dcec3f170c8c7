"""The real clients and the images that they need: made once for a machine, run in namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runtime import podman_service

HERE = Path(__file__).resolve().parents[1] / "clients"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "clients"
ROOT = Path(os.environ.get("SKYRL_TEST_CLIENTS", "/var/tmp/skyrl-tests/clients/trixie"))
SDK, NEWEST, LEGACY = "oh-1.9.0", "oh-1.57.0", "ohai-0.62.0"
USERLAND = "localhost/userland:1"
LEGACY_IMAGE = "localhost/legacy:1"
INSTALL_TIMEOUT_S = 1800
RUN_TIMEOUT_S = 560

# What the legacy client names in its command; ours runs the rest with the environment that the image has.
MICROMAMBA = """#!/bin/sh
while [ "$1" != python ]; do shift; done
shift
exec /opt/ohai-0.62.0/bin/python "$@"
"""


def missing() -> str:
    """What this machine lacks for the clients, empty if nothing."""
    if os.geteuid() != 0:
        return "root, who can enter a tree"
    return "" if shutil.which("debootstrap") else "debootstrap"


@dataclass(frozen=True)
class Clients:
    """The tree with the clients in it."""

    root: Path

    def run(self, venv: str, script: Path, *words: str, files: tuple[Path, ...] = ()) -> Any:
        """Run a driver in the tree; its result. Mounts and processes are gone afterwards."""
        inner = (
            'set -e; mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; mount -t tmpfs none "$0/mnt"; '
            'cp "$@" "$0/mnt/"; mount -t tmpfs none "$0/tmp"; exec chroot "$0" env -i HOME=/tmp PATH=/usr/bin:/bin '
            "LC_ALL=C.UTF-8 LITELLM_LOCAL_MODEL_COST_MAP=True OPENHANDS_SUPPRESS_BANNER=1 DEMO_ENV=demo-value "
            "no_proxy='*' /bin/bash -c \"$COMMAND\""
        )
        line = " ".join([f"/opt/{venv}/bin/python", "-W", "ignore", f"/mnt/{script.name}", *words])
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "bash", "-c", inner]
            + [str(path) for path in (self.root, script, *files)],
            env={**os.environ, "COMMAND": line},
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        results = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
        assert results, f"{script.name} ended with {done.returncode}: {done.stderr[:3000]} … {done.stderr[-1000:]}"
        return json.loads(results[-1].removeprefix("RESULT "))


def installed() -> Clients:
    """The clients, installed if they are not."""
    subprocess.run([str(HERE / "install.sh"), str(ROOT)], check=True, timeout=INSTALL_TIMEOUT_S)
    return Clients(ROOT)


def import_image(service: podman_service.Service, name: str, tree: Path, *, exclude: tuple[str, ...] = ()) -> None:
    """The tree as an image in the store of ``service``; an image that is there already stays."""
    if name in service.podman("images", "--format", "{{.Repository}}:{{.Tag}}").split():
        return
    archive = service.home / "import.tar"
    leave_out = [f"--exclude={pattern}" for pattern in ("./dev/*", "./proc/*", "./sys/*", *exclude)]
    subprocess.run(["tar", "-C", str(tree), *leave_out, "-cf", str(archive), "."], check=True)
    if os.geteuid() == 0:
        os.chown(archive, service.owner.pw_uid, service.owner.pw_gid)
    try:
        service.podman("import", "--quiet", str(archive), name)
    finally:
        archive.unlink()


def userland_image(service: podman_service.Service) -> str:
    """A Debian with bash and git, without a Python for the agent server."""
    import_image(service, USERLAND, ROOT, exclude=("./opt/*",))
    return USERLAND


def legacy_image(service: podman_service.Service) -> str:
    """The same with the action execution server where the legacy client looks for it."""
    program = ROOT / "openhands" / "micromamba" / "bin" / "micromamba"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(MICROMAMBA)
    program.chmod(0o755)
    (ROOT / "openhands" / "code").mkdir(exist_ok=True)
    import_image(service, LEGACY_IMAGE, ROOT, exclude=("./opt/oh-*",))
    return LEGACY_IMAGE
