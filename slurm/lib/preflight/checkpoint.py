"""Where does the training begin: from scratch or from which checkpoint, does that fit, and is there room for more?

VERL's layout: ``latest_checkpointed_iteration.txt`` (a number, written last), and ``global_step_N`` with ``data.pt``
and ``actor/{model,optim,extra_state}_world_size_W_rank_R.pt``, a file for each of W GPUs.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.checkpoints import TRACKER
from slurm.lib.preflight.asked import override
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.preflight.memory import parameters
from slurm.lib.preflight.model import Model, ModelFacts, read_model
from slurm.lib.preflight.places import nearest
from slurm.lib.preflight.shape import world_size
from slurm.lib.preflight.words import size
from slurm.lib.settings import Settings

PARTS = ("model", "optim", "extra_state")
BYTES = 12  # a parameter: float32 and two Adam moments (measured on VERL 0.5.0)


@dataclass(frozen=True)
class Saved:
    """What lies in a checkpoint folder.

    ``tracker`` is the tracker file's text, None where there is none; ``steps`` the folders that there are; ``files``
    the names in the tracker's step, ``actor/`` in front of those there; ``model`` what its config.json describes.
    """

    tracker: str | None
    steps: tuple[int, ...]
    files: frozenset[str]
    model: Model | None = None


@dataclass(frozen=True)
class Wanted:
    """What the training is to do: ``steps`` in all at most, of ``model``; None where it is not known here."""

    steps: int | None = None
    model: Model | None = None


def look_at_folder(folder: Path) -> Saved:
    """What the folder holds; nothing for one that does not exist."""
    tracker = folder / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else None
    names = [path.name.removeprefix("global_step_") for path in folder.glob("global_step_*")]
    steps = tuple(sorted(int(name) for name in names if name.isdigit()))
    step = folder / f"global_step_{text}"
    inside = [*step.glob("*"), *step.glob("actor/*")] if text and text.isdigit() else []
    files = frozenset(str(path.relative_to(step)) for path in inside)
    return Saved(text, steps, files, _model_in(step / "actor" / "huggingface" / "config.json") if files else None)


def _model_in(config: Path) -> Model | None:
    try:
        return read_model(config)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def resume_findings(settings: Settings, folder: Path | None, saved: Saved, wanted: Wanted = Wanted()) -> list[Finding]:
    """Whether it starts from scratch or goes on, and what speaks against going on. ``folder`` None: a new one."""
    if folder is None or (saved.tracker is None and not saved.steps):
        where = "" if folder is None else f": no checkpoint in {folder}"
        return [estimate("resume", f"starts from scratch{where}")]
    if override(settings, "trainer.resume_mode") == "disable":
        return [warning("resume", f"starts from scratch over the checkpoints in {folder}", "drop resume_mode=disable")]
    if saved.tracker is None:
        sentence = f"{folder} has steps {_list(saved.steps)} and no {TRACKER}: VERL would start from scratch over them"
        return [error("resume", sentence, f"write {saved.steps[-1]} into {TRACKER}, or set another WANDB_EXPERIMENT")]
    return _tracked(settings, folder, saved, saved.tracker, wanted)


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _tracked(settings: Settings, folder: Path, saved: Saved, tracker: str, wanted: Wanted) -> list[Finding]:
    fix = f"write the number of a whole step into it (there: {_list(saved.steps)}), or set another WANDB_EXPERIMENT"
    if not saved.steps:
        fix = f"remove {TRACKER}, or set WANDB_EXPERIMENT"
    if not tracker.isdigit():
        return [error("resume", f"{folder / TRACKER} says {tracker[:40]!r}, which is no step", fix)]
    if int(tracker) not in saved.steps:
        sentence = (
            f"{folder / TRACKER} names step {tracker}, and there is no global_step_{tracker}: VERL would start over"
        )
        return [error("resume", sentence, fix)]
    step = folder / f"global_step_{tracker}"
    problems = [*_rank_findings(settings, step, saved.files), *_other_findings(settings, step, saved.model, wanted)]
    if wanted.steps and int(tracker) >= wanted.steps:
        sentence = f"{folder} is at step {tracker} of at most {wanted.steps}: this training is complete"
        problems.append(error("resume", sentence, "raise TOTAL_EPOCHS, or set WANDB_EXPERIMENT to another name"))
    if problems:
        return problems
    found = [estimate("resume", f"resumes from step {tracker} of {folder}")]
    if "data.pt" not in saved.files:
        sentence = f"global_step_{tracker} has no data.pt: the data begins anew from its first row"
        found.append(warning("resume", sentence, "expect rows to be seen twice, or resume from another step"))
    return found


def _rank_findings(settings: Settings, step: Path, files: frozenset[str]) -> list[Finding]:
    matches = [re.fullmatch(r"actor/model_world_size_(\d+)_rank_\d+\.pt", name) for name in files]
    sizes = tuple(sorted({int(match[1]) for match in matches if match}))
    gpus = world_size(settings)
    if gpus not in sizes:
        made = (
            f"was saved on {_list(sizes)} {'GPU' if sizes == (1,) else 'GPUs'}"
            if sizes
            else "has no model files in actor/"
        )
        sentence = f"{step} {made}; this run has GPU_NODES × GPUS_PER_NODE = {gpus}"
        fix = "use as many GPUs as then, or set another WANDB_EXPERIMENT to start from scratch"
        return [error("resume", sentence, fix)]
    wanted = [f"actor/{part}_world_size_{gpus}_rank_{rank}.pt" for part in PARTS for rank in range(gpus)]
    missing = [name for name in wanted if name not in files]
    if not missing:
        return []
    shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
    sentence = f"{step} lacks {len(missing)} of {len(wanted)} files ({shown})"
    return [error("resume", sentence, f"write the number of a whole step into {TRACKER}")]


def _other_findings(settings: Settings, step: Path, saved: Model | None, wanted: Wanted) -> list[Finding]:
    model = wanted.model
    if saved is None or model is None or not (saved.hidden and model.hidden):
        return []
    if (saved.hidden, saved.layers) == (model.hidden, model.layers):
        return []
    sentence = (
        f"{step} was saved from a model of {saved.layers} layers with hidden_size {saved.hidden}, "
        f"MODEL={settings.model} has {model.layers} with {model.hidden}"
    )
    return [error("resume", sentence, "name the MODEL of then, or set WANDB_EXPERIMENT to another name")]


def space_findings(settings: Settings, facts: ModelFacts, place: Path, free: int) -> list[Finding]:
    """Size of all checkpoints that are there at once against the free space."""
    count, source = parameters(settings, facts)
    if not count or settings.save_freq == -1:
        return []
    one, copies = BYTES * count, settings.max_ckpt_to_keep * (settings.restarts + 1) + 1  # each attempt keeps its own
    sentence = (
        f"a checkpoint takes {size(one)} ({BYTES} bytes a parameter, their number from {source}), up to {copies} of "
        f"them {size(one * copies)}; {size(free)} are free on {place}"
    )
    if free < one and facts.model:
        return [error("space", sentence + ": not one fits", "free space, or set CHECKPOINT_DIR elsewhere")]
    if free < one * copies:
        return [warning("space", sentence, "lower MAX_CKPT_TO_KEEP, free space, or set CHECKPOINT_DIR elsewhere")]
    return [estimate("space", f"{sentence} (a quota may allow less)")]


def free_space(folder: Path) -> tuple[Path, int]:
    """The nearest folder that exists, and the bytes that are free there."""
    there = nearest(folder)
    return there, shutil.disk_usage(there).free
