"""What is asked for, as the checks see it: a plan, and which parts of it they concern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.hydra_grammar import value_said
from slurm.lib.plan import LaunchPlan
from slurm.lib.settings import Settings
from slurm.lib.trainer import agent_folder


@dataclass(frozen=True)
class Asked:
    """A launch before it happens; ``checkout`` is the folder that this suite lies in.

    ``at_leisure`` where nothing is submitted afterwards (--check), so that an answer may take a minute.
    """

    plan: LaunchPlan
    checkout: Path
    at_leisure: bool = False

    @property
    def settings(self) -> Settings:
        return self.plan.settings

    @property
    def environment(self) -> Mapping[str, str]:
        """What the jobs will find in their environment, secrets included."""
        return {**self.plan.inherited, **self.plan.environment, **self.plan.secrets}

    @property
    def trains_with_verl(self) -> bool:
        return self.plan.training is not None and not self.settings.training_command

    @property
    def brings_runtime(self) -> bool:
        return self.plan.runtime is not None

    @property
    def uses_slurm(self) -> bool:
        return self.settings.skyrl_backend == "slurm"

    @property
    def agent_folder(self) -> Path:
        return agent_folder(self.settings)


def override(settings: Settings, name: str) -> str | None:
    """What VERL_OVERRIDES say about one of VERL's own keys; None where they say nothing, or take it out."""
    return value_said(settings.verl_overrides, name)
