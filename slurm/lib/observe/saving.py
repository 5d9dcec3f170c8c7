"""Where does a run's training save, and how often? By the settings in its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.checkpoints import Checkpoints
from slurm.lib.coordination import CoordinationDir
from slurm.lib.hydra_grammar import value_said
from slurm.lib.run_record import job_ids, read_record, record_paths

FREQUENCY, FOLDER = "trainer.save_freq", "trainer.default_local_dir"  # VERL's names
LOOP = "shell_rl.train"
UNRECORDED = "its record holds no settings (it was given to sbatch directly), so where it saves is not known"


@dataclass(frozen=True)
class Saving:
    """Where a training saves, and after how many steps, in words; empty where that is its own affair."""

    checkpoints: Checkpoints
    every: str = ""

    @property
    def place(self) -> Path:
        """The folder in which a new checkpoint is seen."""
        of_verl = self.checkpoints.tracked
        return self.checkpoints.folder / self.checkpoints.experiment if of_verl else self.checkpoints.folder


@dataclass(frozen=True)
class SavesNever:
    """A training of which no checkpoint can be expected, or seen: why, as part of a sentence."""

    why: str


def saving_of(directory: CoordinationDir, training: str) -> Saving | SavesNever:
    """How the training job with this id saves."""
    return saving_by(recorded_settings(directory, training), directory)


def recorded_settings(directory: CoordinationDir, job_id: str) -> Mapping[str, str]:
    """The settings in the record that names a job, else in the run's own; empty where there are none."""
    records = [read_record(path) for path in record_paths(directory)]
    own = [data for data in records if job_id in job_ids(data.get("jobs")).values()]
    found = [data.get("settings") for data in (*own, *records)]
    settings = next((said for said in found if isinstance(said, dict)), {})
    return {name: value for name, value in settings.items() if isinstance(value, str)}


def saving_by(settings: Mapping[str, str], directory: CoordinationDir) -> Saving | SavesNever:
    """How a training with these settings saves, whose run has this directory."""
    if not settings:
        return SavesNever(UNRECORDED)
    folder = Path(settings.get("CHECKPOINT_DIR") or directory.checkpoints)
    checkpoints = Checkpoints(folder, settings.get("WANDB_EXPERIMENT", ""), tracked=False)
    if settings.get("TRAINING_COMMAND") and settings.get("TRAINING_COMMAND_IS_VERL") != "true":
        return _of_command(settings, checkpoints)
    return _of_verl(settings, checkpoints)


def _of_command(settings: Mapping[str, str], checkpoints: Checkpoints) -> Saving | SavesNever:
    """A command of the user's own saves where it has done so, or says that it does."""
    command = settings["TRAINING_COMMAND"]
    if checkpoints.mark() or settings.get("RESTARTS", "0") != "0" or "CHECKPOINT_DIR" in command or LOOP in command:
        return Saving(checkpoints)
    return SavesNever(
        f"its TRAINING_COMMAND has saved nothing in {checkpoints.folder}, and does not name CHECKPOINT_DIR, "
        "so it may never save"
    )


def _of_verl(settings: Mapping[str, str], checkpoints: Checkpoints) -> Saving | SavesNever:
    """VERL saves as the keys say, unless VERL_OVERRIDES say something else."""
    overrides = _overrides(settings.get("VERL_OVERRIDES", ""))
    frequency = value_said(overrides, FREQUENCY) or settings.get("SAVE_FREQ", "1")
    if frequency.lstrip("-").isdigit() and int(frequency) <= 0:
        return SavesNever(f"it never saves: SAVE_FREQ={frequency}")
    folder = value_said(overrides, FOLDER)
    place = checkpoints.folder / checkpoints.experiment if folder is None else Path(folder)
    if not place.is_absolute() or "${" in str(place):
        return SavesNever(f"where it saves is not known here: VERL_OVERRIDES say {FOLDER}={folder}")
    return Saving(Checkpoints(place.parent, place.name, tracked=True), f"SAVE_FREQ={frequency}")


def _overrides(text: str) -> tuple[str, ...]:
    from slurm.lib.settings import hydra_overrides  # 8 ms: felt in commands that only look

    try:
        return hydra_overrides(text)
    except ValueError:  # of a record that somebody has changed
        return ()
