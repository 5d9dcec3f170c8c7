"""The trainer's environment on this node: what is here is looked up, the steps are applied, checked and logged."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.gpu_environment import Applied, composed, doubts, wants_integers
from slurm.lib.guardian import Guardian
from slurm.lib.job_context import JobContext
from slurm.lib.job_environment import scratch_folders
from slurm.lib.logs import log
from slurm.lib.node_facts import NodeFacts, look
from slurm.lib.preflight.finding import Level
from slurm.lib.preflight.mig import visible_findings
from slurm.lib.ray_address import address_of
from slurm.lib.ray_folder import choose, folder_name, ray_folder
from slurm.lib.secrets import mask_values, masked, secret_values
from slurm.lib.settings import Settings


@dataclass(frozen=True)
class TrainerEnvironment:
    """What the trainer finds in its environment on this node.

    ``integer_devices``: its vLLM reads the names of devices as integers. ``variables`` name them so already, but Slurm
    names them anew for each step of the job, in which other processes of the trainer run.
    """

    variables: Mapping[str, str]
    integer_devices: bool

    def plus(self, more: Mapping[str, str]) -> TrainerEnvironment:
        """This one with more variables."""
        return replace(self, variables={**self.variables, **more})


@contextlib.contextmanager
def job_folder(job: JobContext, guardian: Guardian) -> Iterator[Path]:
    """This job's own folder on this node's disk, which Ray's may lie in; gone afterwards, also after ``kill -9``.

    ``EnvironmentProblem`` says why no folder will do.
    """
    name = f"{folder_name(os.getuid(), job.job_id)}t"  # without the t it is Ray's on every node of several
    candidates = scratch_folders(job.settings.local_scratch, job.environment)
    root = choose(candidates, f"{name}/ray").joinpath(name)  # Ray makes `ray` below RAY_TMPDIR
    with ray_folder(root, announce=guardian.own_folder):
        yield root


def for_trainer(
    settings: Settings, base: Mapping[str, str], agent: Path, folder: Path, runtime_host: str
) -> TrainerEnvironment:
    """``base`` as the trainer needs it on this node; ``EnvironmentProblem`` for what cannot work here."""
    if settings.network_interface:
        address_of(settings.network_interface)  # says which interfaces there are, if this is none
    facts = look(settings, base, agent, folder, runtime_host)
    check_slices(settings, facts, base)
    for sentence in doubts(settings, facts, base):
        log.warning("%s", sentence)
    environment, applied = composed(settings, facts, base)
    for line in lines(applied, base):
        log.info("environment: %s", line)
    return TrainerEnvironment(environment, wants_integers(settings, facts))


def check_slices(settings: Settings, facts: NodeFacts, base: Mapping[str, str]) -> None:
    """Refuse or mention several MIG slices; other trainers than VERL may know what they do with them."""
    if settings.training_command:
        return
    for finding in visible_findings(base.get("CUDA_VISIBLE_DEVICES", ""), facts.cards, facts.nccl):
        if finding.level is Level.ERROR:
            raise EnvironmentProblem(f"{finding.sentence}; {finding.fix}")
        log.warning("%s; %s", finding.sentence, finding.fix)


def lines(applied: list[Applied], base: Mapping[str, str]) -> list[str]:
    """The steps for people, a line each, without secrets."""
    secrets = secret_values(base)
    return [mask_values(f"{settings_of(one)}  # {one.step.name}: {one.step.why}", secrets) for one in applied]


def settings_of(one: Applied) -> str:
    """What a step sets and unsets, as a shell says it."""
    words = [f"{name}={shlex.quote(value)}" for name, value in masked(one.set).items()]
    return " ".join([*words, *(["unset", *one.unset] if one.unset else [])])
