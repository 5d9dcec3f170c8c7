"""Brings the sandbox image into the job's store where that needs no registry.

In this order: an archive on shared storage (IMAGE_ARCHIVE), the user's own store, the small image that the suite makes
itself. Any other image is left to the API server, which takes it from the folder of archives or pulls it when it is
first asked for; one that no registry can have and no archive holds is refused at once.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.podman_storage import PodmanStorage, image_names, user_image_store
from slurm.lib.processes import run
from slurm.lib.settings import Settings

ARCHIVES = "images"  # in the jobs base's .cache: what the prebuild job writes unless IMAGE_ARCHIVES says otherwise
BUSYBOX_IMAGE = "localhost/skyrl-busybox:latest"
MAKE_TIMEOUT_S = 180.0
LOAD_TIMEOUT_S = 900.0  # an archive of many gigabytes from shared storage


def archives_folder(settings: Settings) -> Path:
    """Where the archives of a dataset's images are: IMAGE_ARCHIVES, else a folder that all runs share."""
    return settings.image_archives or settings.skyrl_jobs_base / ".cache" / ARCHIVES


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


def load_images(job: JobContext, storage: PodmanStorage, check: Callable[[], None]) -> None:
    """Make CONTAINER_IMAGE usable in the job's store, or leave it to be pulled; ``check`` raises to end it early."""
    settings = job.settings
    store = user_image_store(os.environ)
    source = image_source(settings.container_image, settings.image_archive, store)
    log.info("sandbox image %s (%s)", settings.container_image, source)
    loader = _Loader(storage, storage.environment(job.open_environment), check)
    if source == "archive" and settings.image_archive:
        loader.load(settings.image_archive)
    elif source == "user store copy" and store:
        loader.copy(settings.container_image, store)
    elif source == "made here":
        loader.load(busybox_archive(job.settings.skyrl_jobs_base, job.code, check))
    elif is_nowhere(settings.container_image, archives_folder(settings)):
        raise EnvironmentProblem(
            f"CONTAINER_IMAGE={settings.container_image} is not on {socket.gethostname()}: neither in your Podman "
            f"store there nor in {archives_folder(settings)}, and images of localhost/ are in no registry; name its "
            "archive by IMAGE_ARCHIVE, or build it on that node"
        )


def is_nowhere(image: str, archives: Path) -> bool:
    """Whether an image outside of the stores cannot be had: no registry has those of localhost/, and no archive is."""
    from slurm_runtime.references import archive_name  # the server's own rule

    if not image.startswith("localhost/"):
        return False
    try:
        return not (archives / archive_name(image)).is_file()
    except ValueError:
        return True  # a digest, which an archive does not keep


@dataclass(frozen=True)
class _Loader:
    """Podman's commands for images, each ended early when ``check`` raises."""

    storage: PodmanStorage
    environment: Mapping[str, str]
    check: Callable[[], None]

    def load(self, archive: Path) -> None:
        """``podman load`` through the running service."""
        if not archive.is_file():
            raise EnvironmentProblem(f"IMAGE_ARCHIVE={archive} is not a file on {socket.gethostname()}")
        self._podman(["--url", self.storage.url, "load", "--quiet", "--input", str(archive)], self.environment)

    def copy(self, image: str, store: tuple[Path, str]) -> None:
        """Copy an image out of a store whose driver ours cannot read from; that store is only read."""
        graphroot, driver = store
        archive = self.storage.root / "tmp" / "image.tar"
        own = {**os.environ, "TMPDIR": str(self.storage.root / "tmp")}
        save = ["--root", str(graphroot), "--storage-driver", driver, "save", "--output", str(archive), image]
        self._podman(save, own)
        self.load(archive)
        archive.unlink()

    def _podman(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        answer = run(["podman", *arguments], timeout_s=LOAD_TIMEOUT_S, environment=environment, check=self.check)
        if not answer.ok:
            raise EnvironmentProblem(refusal(arguments[-1], answer.complaint, self.storage.root))


def refusal(image: str, complaint: str, storage: Path) -> str:
    """Why Podman did not take an image; of a disk that became full meanwhile Podman says much else first."""
    sentence = f"podman could not take the image {image}: {complaint}"
    if "no space left on device" not in complaint.lower():
        return sentence
    fix = "set LOCAL_SCRATCH to a larger disk of the node"
    return f"no space left on the local disk of {socket.gethostname()}, where {storage} is; {fix} ({sentence})"


def busybox_archive(base: Path, code: Path, check: Callable[[], None]) -> Path:
    """The archive of the image that the suite makes itself, made once for each jobs base ``base``."""
    archive = base / ".cache" / "skyrl-busybox.tar"
    if archive.is_file():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "slurm_runtime.busybox_image", "--output", str(archive), "--name", BUSYBOX_IMAGE]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    answer = run(argv, timeout_s=MAKE_TIMEOUT_S, environment=environment, cwd=code, check=check)
    if not answer.ok:
        raise EnvironmentProblem(f"could not make the sandbox image: {answer.complaint}")
    return archive
