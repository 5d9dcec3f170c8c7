"""Is Ray started for a run, and by which job step on each node? Pure, so that a dry run shows what will be run."""

from __future__ import annotations

from pathlib import Path

from slurm.lib.scheduler import step_argv
from slurm.lib.settings import Settings, gpu_gres

RAY = ("-m", "ray.scripts.scripts", "start", "--block")  # the module behind the command `ray`


def wanted(settings: Settings) -> bool:
    """Whether this run's trainer finds a Ray cluster that we started."""
    if settings.skyrl_backend == "local":
        return False
    automatic = settings.gpu_nodes > 1 and not settings.training_command
    return settings.ray_cluster == "on" or (settings.ray_cluster == "auto" and automatic)


def ray_python(settings: Settings) -> tuple[str, ...]:
    """The command that starts the Python which has Ray."""
    if settings.ray_python:
        return settings.ray_python
    return ("python3",) if settings.training_command else ("uv", "run", "--frozen", "--extra", "verl", "python")


def node_step(settings: Settings, node: str, cwd: Path, python: str, told: str) -> tuple[str, ...]:
    """The ``srun`` of one node's part, in the trainer's folder; ``told`` is its ``NodeSpec`` as text."""
    command = (python, "-m", "slurm.lib.ray_node", told)
    return step_argv(node, cpus=settings.training_cpus, gres=gpu_gres(settings) or "none", cwd=cwd, command=command)
