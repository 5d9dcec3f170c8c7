"""What is judged of one host's report; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from slurm.lib.doctor.facts import Limit, Report, Sandboxes, Trainer, Trial
from slurm.lib.doctor.verdict import Verdict, fail, of_findings, ok, warn
from slurm.lib.gpu_environment import EFA
from slurm.lib.gpu_environment import doubts as environment_doubts
from slurm.lib.interpreter import changes
from slurm.lib.node_facts import NodeFacts
from slurm.lib.podman_storage import NETWORK_FILE_SYSTEMS
from slurm.lib.preflight.finding import error, warning
from slurm.lib.preflight.mig import visible_findings
from slurm.lib.preflight.node import disk_findings, node_id_findings, program_findings, uv_findings
from slurm.lib.preflight.places import Folder, SubordinateIds, folder_findings
from slurm.lib.preflight.words import number_of, size
from slurm.lib.settings import Settings

SLOW_SHARE_S = 0.1  # for one small file; a launch writes some twenty, and each job some ten
SLOW_HELLO_S = 5.0
FEW_FILES, FEW_PROCESSES = 4096, 4096
OLDEST_PODMAN = 4  # scripts/setup wants 4.0
SETUP = "scripts/setup --packages run, started on such a node, says what to install"


def python_verdict(report: Report, here: str) -> Verdict:
    """The interpreter of the jobs against that of the login node, whose mark is ``here``."""
    version = report.mark.partition(",")[0].replace("=", " ").replace("python", "Python")
    differs = changes(here, report.mark)
    if not differs:
        return ok("python", f"{version} with the packages of the login node")
    sentence = f"not the login node's interpreter: {', '.join(differs)}"
    return warn(
        "python", sentence, "have PATH and .venv lead to the same Python on all nodes; see scripts/setup --help"
    )


def share_verdicts(report: Report, share: Path) -> list[Verdict]:
    """The shared directory as one host has it."""
    kind = report.share_file_system
    if report.share.problem:
        fix = "set SKYRL_JOBS_BASE to a folder of yours that login and compute nodes share"
        return [fail("share", f"{share}: {report.share.problem}", fix)]
    took = f"a small file takes {milliseconds(report.share.seconds)} in {share} ({kind})"
    if report.share.seconds > SLOW_SHARE_S:
        return [warn("share", took, "set SKYRL_JOBS_BASE to quicker storage; runs write some dozens of such files")]
    return [ok("share", took)]


def milliseconds(seconds: float) -> str:
    """A short time for people."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def folder_verdicts(report: Report) -> list[Verdict]:
    """Whether the folders that a job writes can be made and written on its node."""
    seen = report.folders
    folders = [Folder(each.key, Path(each.path), Path(each.there), each.is_folder, each.writable) for each in seen]
    if not folders:
        return []
    names = ", ".join(folder.key for folder in folders)
    return of_findings("folders", folder_findings(folders, f"on {report.host}"), f"{names} can be written")


def limit_verdicts(limits: Mapping[str, int]) -> list[Verdict]:
    """What a process of a job may have (ulimit); -1 is no limit."""
    wanted = {"open files": (FEW_FILES, "-n"), "processes": (FEW_PROCESSES, "-u")}
    low = [name for name, (least, _) in wanted.items() if 0 <= limits.get(name, -1) < least]
    if not low:
        shown = ", ".join(f"{name} {shown_limit(limits.get(name, -1))}" for name in wanted)
        return [ok("ulimit", shown)]
    options = " ".join(wanted[name][1] for name in low)
    shown = ", ".join(f"{name} {limits[name]}" for name in low)
    fix = f"raise it where you launch (ulimit {options}), or ask for more (limits.conf, PropagateResourceLimits)"
    return [warn("ulimit", f"little for Ray and many sandboxes: {shown}", fix)]


def shown_limit(number: int) -> str:
    """A resource limit for people."""
    return "unlimited" if number < 0 else str(number)


# --- for sandboxes ----------------------------------------------------------------------------------------------------


def sandbox_verdicts(found: Sandboxes, image: str) -> list[Verdict]:
    """Podman and all around it; what was not tried because of an earlier fault is not spoken of."""
    ids = SubordinateIds(found.user, found.uid, found.lacking)
    well = f"{found.user} has ranges of subordinate ids" if found.uid else "root needs no subordinate ids"
    verdicts = [*_podman_verdicts(found), *of_findings("subuid", node_id_findings(ids), well)]
    verdicts += _store_verdicts(found, image)
    verdicts += _container_verdicts(found)
    return [*verdicts, _docker_verdict(found.docker)]


def _podman_verdicts(found: Sandboxes) -> list[Verdict]:
    if found.absent:
        return of_findings("podman", program_findings(found.absent), "")
    if found.info_problem:
        return [fail("podman", found.info_problem, "try it on such a node: podman info")]
    if not found.version:
        return []
    major = re.match(r"\d+", found.version)
    shown = f"Podman {found.version} with {found.runtime}, cgroups {found.cgroups}"
    if major and int(major[0]) < OLDEST_PODMAN:
        return [fail("podman", f"{shown} is too old", f"Podman 4.0 or newer is needed; {SETUP}")]
    return [ok("podman", shown)]


def _store_verdicts(found: Sandboxes, image: str) -> list[Verdict]:
    """Where stores lie; a driver other than overlay copies every image for each container."""
    if not found.scratch:
        fix = "set LOCAL_SCRATCH to a folder on the nodes' own disks"
        return [fail("store", found.scratch_problem, fix)]
    disk = disk_findings(Path(found.scratch), found.free, image)
    if found.file_system in NETWORK_FILE_SYSTEMS:
        disk.append(error("store", f"{found.scratch} lies on {found.file_system}", "set LOCAL_SCRATCH to a local disk"))
    if found.driver and found.driver != "overlay":
        fix = "ask the administrator for a kernel with rootless overlay, or for fuse-overlayfs"
        disk.append(warning("store", f"Podman uses the driver {found.driver}, which copies images", fix))
    well = f"{found.driver or 'stores'} on {found.scratch} ({found.file_system}, {size(found.free)} free)"
    return of_findings("store", disk, well)


def _container_verdicts(found: Sandboxes) -> list[Verdict]:
    verdicts = [*_image_verdicts(found.image), *_hello_verdicts(found.hello)]
    if found.limits:
        verdicts.append(_limits_verdict(found.limits, found.controllers))
    if found.port_problem:
        fix = "look at the network of rootless containers there: slirp4netns or pasta, /dev/net/tun"
        verdicts.append(fail("port", f"a container's published port: {found.port_problem}", fix))
    return verdicts


def _image_verdicts(image: Trial | None) -> list[Verdict]:
    """Said only where it failed: the container that ran is the better word."""
    if image is None or not image.problem:
        return []
    fix = "install a static busybox on the node (busybox-static), or make the image elsewhere: docs/images.md"
    return [warn("image", f"our small image cannot be had, so no container was tried: {image.problem}", fix)]


def _hello_verdicts(hello: Trial | None) -> list[Verdict]:
    if hello is None:
        return []
    if hello.problem:
        return [
            fail(
                "container", f"no container starts: {hello.problem}", "see docs/images.md and podman run on such a node"
            )
        ]
    took = f"a container ran in {milliseconds(hello.seconds)}"
    if hello.seconds > SLOW_HELLO_S:
        return [warn("container", took, "see whether LOCAL_SCRATCH is a quick local disk, and what else runs there")]
    return [ok("container", took)]


def _limits_verdict(limits: tuple[Limit, ...], controllers: tuple[str, ...]) -> Verdict:
    loose = [limit.name for limit in limits if limit.bites is False]
    unknown = [limit for limit in limits if limit.bites is None]
    fix = "ask for cgroups v2, delegated to users (Delegate=yes); until then a watchdog stops what takes too much"
    if loose:
        may = f"Podman may use: {', '.join(controllers) or 'no controller'}"
        return warn("limits", f"limits of {' and '.join(loose)} do not bite ({may})", fix)
    if unknown:
        said = "; ".join(f"{limit.name}: {limit.problem}" for limit in unknown)
        return warn("limits", f"not found out whether limits bite: {said}", "try podman run --memory on such a node")
    return ok("limits", f"limits of {' and '.join(limit.name for limit in limits)} bite")


def _docker_verdict(docker: str) -> Verdict:
    """People type ``docker``; the suite never does."""
    if not docker:
        return ok("docker", "no command docker, and nothing here needs one")
    if "podman" in docker.lower():
        return ok("docker", f"docker is Podman ({docker})")
    sentence = f"docker is not Podman ({docker}): sandboxes do not see the images that it makes"
    return warn("docker", sentence, "build images with podman, or bring them over: docker save NAME | podman load")


# --- for the trainer --------------------------------------------------------------------------------------------------


def trainer_verdicts(found: Trainer, settings: Settings) -> list[Verdict]:
    """What the trainer finds on its node."""
    verdicts = []
    if not settings.training_command:
        verdicts += of_findings("uv", uv_findings(bool(found.uv)), found.uv)
    if settings.gpus_per_node:
        verdicts += _gpu_verdicts(found)
    return [*verdicts, *_environment_verdicts(found, settings)]


def _gpu_verdicts(found: Trainer) -> list[Verdict]:
    """The job asked for one GPU."""
    if not found.visible_number:
        sentence = f"the job asked for a GPU and sees none (CUDA_VISIBLE_DEVICES={found.visible or 'not set'})"
        return [fail("gpu", sentence, "see gres.conf of the site and GPU_TYPE; nvidia-smi in such a job")]
    if not found.cards:
        why = f": {found.smi_problem}" if found.smi_problem else " on PATH"
        sentence = f"the job has {number_of(found.visible_number, 'GPU')}, and there is no nvidia-smi{why}"
        return [fail("gpu", sentence, "the node's driver is not installed or does not run; ask the administrator")]
    shown = "; ".join(dict.fromkeys(described(line) for line in found.cards))
    kind = "MIG slice" if found.slices or "MIG-" in (found.visible or "") else "GPU"
    verdicts = [ok("gpu", f"{number_of(found.visible_number, kind)}: {shown}")]
    mig = visible_findings(found.visible or "", found.slices, found.nccl)
    return [*verdicts, *(of_findings("mig", mig, "") if mig else [])]


def described(line: str) -> str:
    """A line of nvidia-smi (name, driver, memory, MIG mode) as a phrase."""
    name, driver, memory, mig = [*(word.strip() for word in line.split(",")), "", "", "", ""][:4]
    return f"{name}, driver {driver}, {memory}" + (", MIG on" if mig == "Enabled" else "")


def _environment_verdicts(found: Trainer, settings: Settings) -> list[Verdict]:
    """What the trainer's environment would be doubted for by the training job itself."""
    facts = NodeFacts(
        folder=Path(),
        runtime_host="",
        libcuda=Path(found.libcuda) if found.libcuda else None,
        module_complaint=found.module_problem,
        python=Path(found.python) if found.python else None,
        efa=tuple(map(Path, found.efa)),
    )
    variables = {"UV_PYTHON": found.named_python} if found.named_python else {}
    told = environment_doubts(settings, facts, variables)
    verdicts = [warn("trainer", *_parted(sentence)) for sentence in told]
    return [*verdicts, *_efa_verdicts(found, settings)]


def _parted(doubt: str) -> tuple[str, str]:
    """A doubt's sentence and what to do about it."""
    sentence, _, fix = doubt.partition("; ")
    return sentence, fix or "see docs/gpu-nodes.md"


def _efa_verdicts(found: Trainer, settings: Settings) -> list[Verdict]:
    wanted = settings.skyrl_ld_library_path_export and settings.fi_provider == EFA
    if found.efa_devices and not wanted and settings.gpu_nodes > 1:
        fix = "set SKYRL_LD_LIBRARY_PATH_EXPORT=1 and FI_PROVIDER=efa, so that NCCL uses it"
        return [warn("efa", f"EFA is there ({', '.join(found.efa_devices)}) and not used", fix)]
    if wanted and found.efa and not found.efa_devices:
        fix = "set SKYRL_LD_LIBRARY_PATH_EXPORT=0 and FI_PROVIDER=tcp, or choose nodes that have it"
        return [warn("efa", "EFA's libraries are there, but no device of it", fix)]
    if wanted:
        return [ok("efa", f"EFA: {', '.join(found.efa_devices)}")] if found.efa_devices else []
    return [ok("efa", "no EFA wanted" if not found.efa_devices else f"EFA: {', '.join(found.efa_devices)}, not needed")]
