"""Brings the sandbox image into the job's store where that needs no registry.

In this order: an archive on shared storage (IMAGE_ARCHIVE), the user's own store, the small image that the suite makes
itself. Any other image is left to the API server, which pulls it when it is first asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.podman_storage import PodmanStorage, image_names, user_image_store
from slurm.lib.processes import run

BUSYBOX_IMAGE = "localhost/skyrl-busybox:latest"
MAKE_TIMEOUT_S = 180.0
LOAD_TIMEOUT_S = 900.0  # an archive of many gigabytes from shared storage


def image_source(image: str, archive: Path | None, store: tuple[Path, str] | None) -> str:
    """Where the image comes from: ``archive``, ``user store``, ``user store copy``, ``made here`` or ``registry``."""
    if archive is not None:
        return "archive"
    if store is not None and has_image(image_names(*store), image):
        return "user store" if store[1] == "overlay" else "user store copy"
    return "made here" if image == BUSYBOX_IMAGE else "registry"


def has_image(names: frozenset[str], image: str) -> bool:
    """Whether an image is among the full names of a store's index; a short name means localhost or Docker Hub."""
    tagged = image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"
    return bool(names & {tagged, f"localhost/{tagged}", f"docker.io/{tagged}", f"docker.io/library/{tagged}"})


def load_images(job: JobContext, storage: PodmanStorage) -> None:
    """Make CONTAINER_IMAGE usable in the job's store, or leave it to be pulled."""
    settings = job.settings
    store = user_image_store(os.environ)
    source = image_source(settings.container_image, settings.image_archive, store)
    log.info("sandbox image %s: from %s", settings.container_image, source)
    environment = storage.environment(job.environment)
    if source == "archive" and settings.image_archive:
        load_archive(settings.image_archive, storage, environment)
    elif source == "user store copy" and store:
        copy_image(settings.container_image, store, storage, environment)
    elif source == "made here":
        load_archive(busybox_archive(job), storage, environment)


def load_archive(archive: Path, storage: PodmanStorage, environment: Mapping[str, str]) -> None:
    """``podman load`` through the running service."""
    if not archive.is_file():
        raise EnvironmentProblem(f"IMAGE_ARCHIVE={archive} is not a file on this node")
    _podman(["--url", storage.url, "load", "--quiet", "--input", str(archive)], environment)


def copy_image(image: str, store: tuple[Path, str], storage: PodmanStorage, environment: Mapping[str, str]) -> None:
    """Copy an image out of a store whose driver ours cannot read from; that store is only read."""
    graphroot, driver = store
    archive = storage.root / "tmp" / "image.tar"
    home = {**os.environ, "TMPDIR": str(storage.root / "tmp")}
    _podman(["--root", str(graphroot), "--storage-driver", driver, "save", "--output", str(archive), image], home)
    load_archive(archive, storage, environment)
    archive.unlink()


def _podman(arguments: list[str], environment: Mapping[str, str]) -> None:
    import sh  # 80 ms, spent while the API server starts beside us

    try:
        sh.podman(*arguments, _env=dict(environment), _timeout=LOAD_TIMEOUT_S, _tty_out=False)
    except sh.TimeoutException:
        raise EnvironmentProblem(f"podman {arguments[-1]} did not end within {LOAD_TIMEOUT_S:g} s") from None
    except sh.ErrorReturnCode as problem:
        words = " ".join(problem.stderr.decode("utf-8", "replace").split())
        raise EnvironmentProblem(f"podman could not take the image {arguments[-1]}: {words}") from None
    except sh.CommandNotFound:
        raise EnvironmentProblem("podman: not found; is it on PATH?") from None


def busybox_archive(job: JobContext) -> Path:
    """The archive of the image that the suite makes itself, made once for each jobs base."""
    archive = job.settings.skyrl_jobs_base / ".cache" / "skyrl-busybox.tar"
    if archive.is_file():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "slurm_runtime.busybox_image", "--output", str(archive), "--name", BUSYBOX_IMAGE]
    answer = run(argv, timeout_s=MAKE_TIMEOUT_S, environment={**os.environ, "PYTHONPATH": str(job.code)})
    if not answer.ok:
        raise EnvironmentProblem(f"could not make the sandbox image: {answer.complaint}")
    return archive
