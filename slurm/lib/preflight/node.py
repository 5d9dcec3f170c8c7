"""What only a compute node can answer, as the first act of each job: all problems at once, within seconds."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.job_environment import scratch_folders
from slurm.lib.logs import log
from slurm.lib.podman_storage import choose_scratch
from slurm.lib.preflight.data import files_used, validates
from slurm.lib.preflight.finding import Finding, Level, error, warning
from slurm.lib.preflight.places import SubordinateIds, folder_findings, look_at_folders, look_at_ids
from slurm.lib.preflight.words import size
from slurm.lib.settings import Settings
from slurm.lib.trainer import missing_parts

# An image of a task and what its sandboxes write; the smallest images of data sets have 0.3 G (docs/images.md).
LEAST_FREE, SCANT_FREE = 256 * 1024**2, 10 * 1024**3
SMALL_IMAGE = "localhost/"  # images of the user's own store or made here, whose size is nobody's worry


def ready_runtime_node(settings: Settings, environment: Mapping[str, str], job_id: str) -> Path:
    """The folder for Podman's storage on this node; ``EnvironmentProblem`` names all that speaks against this node."""
    found: list[Finding] = []
    scratch = None
    try:
        scratch = choose_scratch(scratch_folders(settings.local_scratch, environment), job_id)
        found += disk_findings(scratch, shutil.disk_usage(scratch).free, settings.container_image)
    except EnvironmentProblem as problem:
        found.append(error("storage", str(problem), ""))
    found += program_findings(absent_programs(environment))
    found += node_id_findings(look_at_ids())
    if settings.sandbox_port_range and not settings.slurm_runtime_dir:  # another's server has its own ports
        found += sandbox_port_findings(settings.sandbox_port_range, is_free)
    refuse(found)
    if scratch is None:  # refused above
        raise EnvironmentProblem("no folder for Podman storage")
    return scratch


def absent_programs(environment: Mapping[str, str]) -> list[str]:
    """What is not on PATH of what Podman needs: without root it maps ids by setuid programs."""
    needed = ("podman",) if os.geteuid() == 0 else ("podman", "newuidmap", "newgidmap")
    return [name for name in needed if not shutil.which(name, path=environment.get("PATH"))]


def program_findings(absent: Sequence[str]) -> list[Finding]:
    """Programs that the runtime cannot do without."""
    fix = "scripts/setup --packages run, started on such a node, says what to install"
    return [error("storage", f"not on PATH: {', '.join(absent)}", fix)] if absent else []


def node_id_findings(ids: SubordinateIds) -> list[Finding]:
    """Here a missing range is sure to end the first sandbox."""
    if not ids.lacking:
        return []
    fix = f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {ids.user}"
    sentence = f"no range for {ids.user} in {' and '.join(ids.lacking)}"
    return [error("storage", sentence, f"ask the administrator for: {fix}")]


def disk_findings(scratch: Path, free: int, image: str) -> list[Finding]:
    """Free space for images and what sandboxes write."""
    sentence, fix = f"{size(free)} are free on {scratch}", "set LOCAL_SCRATCH to a larger disk of the node"
    if free < LEAST_FREE:
        return [error("storage", f"{sentence}, too little for images and sandboxes", fix)]
    if free < SCANT_FREE and not image.startswith(SMALL_IMAGE):
        return [warning("storage", f"{sentence}, which few images fill", fix)]
    return []


def sandbox_port_findings(ports: range, is_free: Callable[[int], bool]) -> list[Finding]:
    """A range of which not one port is free: the first sandbox would fail, long after the GPUs are there."""
    if any(map(is_free, ports)):
        return []
    range_ = f"SANDBOX_PORT_RANGE={ports.start}-{ports[-1]}"
    fix = "widen it, or leave it unset; ss -tln on that node shows who listens"
    return [error("storage", f"no free port in {range_} on {socket.gethostname()}", fix)]


def is_free(port: int) -> bool:
    """Whether this node's port could be had now, as a sandbox would have it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one with connections in TIME_WAIT is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def check_training_node(settings: Settings, environment: Mapping[str, str], copy: Path | None = None) -> None:
    """``EnvironmentProblem`` names everything that this node lacks for the trainer; ``copy`` is that of SNAPSHOT=1."""
    found = [error("parts", part.sentence, part.fix) for part in missing_parts(settings, copy)]
    results = [folder for folder in look_at_folders(settings) if folder.key != "SKYRL_JOBS_BASE"]  # the job is in it
    found += folder_findings(results, f"on {socket.gethostname()}")
    if not settings.training_command:
        found += gpu_findings(settings, visible_gpus(environment))
        found += input_findings(settings)
        found += uv_findings(shutil.which("uv", path=environment.get("PATH")) is not None)
    refuse(found)


def uv_findings(is_there: bool) -> list[Finding]:
    """VERL is started by uv."""
    fix = "install it on storage that this node shares, and add its folder to PATH"
    return [] if is_there else [error("environment", "uv, which starts the trainer, is not on PATH", fix)]


def visible_gpus(environment: Mapping[str, str]) -> int | None:
    """GPUs that Slurm gave to this job on this node; None where nothing says."""
    devices = environment.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        return len([device for device in devices.split(",") if device.strip() and device != "NoDevFiles"])
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdigit() else None


def gpu_findings(settings: Settings, visible: int | None) -> list[Finding]:
    """GPUs that are there against GPUS_PER_NODE, which is what VERL is told."""
    if visible == settings.gpus_per_node:
        return []
    if visible is None:
        sentence = "neither CUDA_VISIBLE_DEVICES nor SLURM_GPUS_ON_NODE says which GPUs this job has"
        return [warning("slurm", sentence, "see nvidia-smi on this node")]
    sentence = f"GPUs of this job on this node: {visible}, and GPUS_PER_NODE={settings.gpus_per_node}"
    return [
        error("slurm", sentence, "ask for as many: --gres=gpu:N for a job submitted directly, else GPU_SBATCH_ARGS")
    ]


def input_findings(settings: Settings) -> list[Finding]:
    """Data that this node cannot read, of the files that the keys name."""
    fix = "put it on storage that the GPU nodes share"
    wanted = {key: path for key, path in files_used(settings).items() if key == "TRAIN_DATA" or validates(settings)}
    return [
        error("data", f"{key}={path} cannot be read", fix)
        for key, path in wanted.items()
        if path is None or not os.access(path, os.R_OK)
    ]


def refuse(found: Sequence[Finding]) -> None:
    """Log the warnings; raise one error that names all errors."""
    for finding in found:
        if finding.level is not Level.ERROR:
            log.warning("%s", finding)
    errors = [
        finding.sentence + (f"; {finding.fix}" if finding.fix else "")
        for finding in found
        if finding.level is Level.ERROR
    ]
    if errors:
        raise EnvironmentProblem(f"{socket.gethostname()} cannot run this job: {'; '.join(errors)}")
