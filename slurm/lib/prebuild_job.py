"""The prebuild job: fetches every image that a dataset names into archives on shared storage, before training.

Podman storage and service are private to the job and end with it, as in the runtime job. The work is done by
``slurm_runtime.prebuild_images``, a child that goes on where an earlier job was interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slurm.lib.api_server_child import copy_log
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import EXIT_INTERNAL, EnvironmentProblem
from slurm.lib.guardian import guarded
from slurm.lib.images import archives_folder
from slurm.lib.job_context import code_folder, load_job_config, own_job_id
from slurm.lib.job_environment import scratch_folders
from slurm.lib.logs import log, setup_job_logging
from slurm.lib.podman_service import PodmanService, podman_service
from slurm.lib.podman_storage import PodmanStorage, choose_scratch, podman_storage, readable_stores
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.registries import registries_conf, site_conf
from slurm.lib.scheduler import Slurm
from slurm.lib.secrets import is_secret_name
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes

LOOK_EVERY_S = 0.4


def main(argv: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    arguments = parser().parse_args(argv)
    setup_job_logging()

    def work(notes: SignalNotes) -> int:
        loaded = load_job_config(arguments.config, arguments.set, os.environ, shortcomings)
        return run(loaded.settings, {**os.environ, **loaded.exported}, notes)

    try:
        return exit_code_of(work, "the prebuild job ends by %s; submitted again it goes on from here")
    except Exception:  # the edge of the process: what no code of ours expected ends here, with its traceback
        log.exception("an internal error of the prebuild job")
        return EXIT_INTERNAL


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="prebuild_images.py", description="The prebuild job; submit it with sbatch.")
    made.add_argument("--config", metavar="NAME|PATH", help="settings, as for launch.py")
    made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting; repeatable")
    return made


def shortcomings(settings: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the job cannot do without: the key, and a sentence."""
    host = socket.gethostname()
    dataset, logins = settings.dataset_path, settings.registry_auth_file
    if dataset is None:
        yield ("DATASET_PATH",), "DATASET_PATH is not set: name the data set (parquet) whose images are wanted"
    elif not os.access(dataset, os.R_OK) or not dataset.is_file():
        yield ("DATASET_PATH",), f"DATASET_PATH={dataset} is not a file that can be read on {host}"
    if logins is not None and not os.access(logins, os.R_OK):
        yield ("REGISTRY_AUTH_FILE",), f"REGISTRY_AUTH_FILE={logins} cannot be read on {host}"
    archives = archives_folder(settings)
    existing = next(folder for folder in (archives, *archives.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield ("IMAGE_ARCHIVES",), f"IMAGE_ARCHIVES={archives} cannot be written to on {host}"


def run(settings: Settings, environment: Mapping[str, str], notes: SignalNotes) -> int:
    """Bring Podman up, have the images fetched, leave nothing; the exit code of the work."""
    job_id, code = own_job_id(environment), code_folder()
    open_environment = {name: value for name, value in environment.items() if not is_secret_name(name)}
    log.info("prebuild job %s on %s, archives in %s", job_id, socket.gethostname(), archives_folder(settings))
    grace_s = max(1.0, Slurm().kill_wait_s() - 2.0) / 2
    scratch = choose_scratch(scratch_folders(settings.local_scratch, environment), job_id)
    registries = registries_conf(settings.registry_mirrors, site_conf(environment))
    stores = readable_stores(os.environ)
    with (
        guarded(code) as guardian,
        podman_storage(scratch, job_id, stores, registries, guardian.own_storage) as storage,
        podman_service(storage, open_environment, notes.check, grace_s / 4) as service,
    ):
        spec = child_spec(settings, storage, open_environment, code)
        with Child(spec, stop_grace_s=grace_s) as child:
            guardian.own_session(child.pid)
            copy_log(child, deque(maxlen=1))
            exit_code = await_end(child, service, notes)
    log.info("prebuild job %s ends with exit code %d", job_id, exit_code)
    return exit_code


def flags(settings: Settings) -> tuple[str, ...]:
    """What prebuild_images is told; its report lies beside the archives."""
    archives = archives_folder(settings)
    assert settings.dataset_path is not None
    given = [
        ("--dataset", str(settings.dataset_path)),
        ("--archives", str(archives)),
        ("--output-json", str(archives / f"{settings.dataset_path.stem}.json")),
        ("--image-prefix", settings.image_prefix),
        ("--max-workers", str(settings.max_workers or "")),
        ("--registry-auth-file", str(settings.registry_auth_file or "")),
    ]
    switches = [
        "--archive-only",  # the store lies on the node's own disk, and goes with the job
        *(["--force-rebuild"] if settings.force_rebuild else []),
        *(["--verbose"] if settings.skyrl_debug else []),
    ]
    return (*(word for flag in given if flag[1] for word in flag), *switches)


def child_spec(settings: Settings, storage: PodmanStorage, environment: Mapping[str, str], code: Path) -> ChildSpec:
    argv = (sys.executable, "-m", "slurm_runtime.prebuild_images", *flags(settings))
    given = storage.environment({**environment, "PYTHONPATH": str(code)})
    return ChildSpec(argv, given, "prebuild_images", cwd=code, stderr=subprocess.PIPE)


def await_end(child: Child, service: PodmanService, notes: SignalNotes) -> int:
    """The child's exit code once it has ended; a signal and the death of Podman's service end it early."""
    while (code := child.exit_code) is None:
        notes.check()
        try:
            service.check_alive()
        except EnvironmentProblem:
            notes.sleep(LOOK_EVERY_S)  # scancel signals every process of the job, perhaps the service first
            notes.check()
            raise
        notes.sleep(LOOK_EVERY_S)
    if notes.stop_signal is not None:
        log.error("ended by %s; submitted again it goes on from here", signal.Signals(notes.stop_signal).name)
    return code
