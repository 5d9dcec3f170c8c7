"""Are the data files there, with the columns and the rows that a training needs? Their footers tell."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.preflight.asked import override
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.preflight.shape import VAL_BATCH
from slurm.lib.preflight.words import duration, number_of
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.settings import Settings, slurm_seconds

OVERRIDES = {"TRAIN_DATA": "data.train_files", "VAL_DATA": "data.val_files"}
START_WAIT_S = 105  # how long /start waits for a slot at least (docs/api-server.md, "Slots and waiting")
MOST_STEPS = "trainer.total_training_steps"
MAKE = "`data/swe_data.py --output DATA_DIR` in skyrl-agent makes one"  # read in SkyRL, commit eea40bc
NEEDED = ("prompt", "data_source")
EITHER = (("instance",), ("reward_model", "extra_info"))  # as SkyRL-agent's tasks read them


@dataclass(frozen=True)
class Footer:
    """One file: its columns and rows, or ``problem`` that says why they are not known.

    ``unread`` is true where only the reader is missing.
    """

    columns: frozenset[str] = frozenset()
    rows: int = 0
    problem: str = ""
    unread: bool = False


def read_footer(path: Path | None) -> Footer:
    """The footer of a parquet file."""
    if path is None:
        return Footer(problem="is not set, and neither is DATA_DIR")
    if path.is_dir():
        return Footer(problem=f"={path} is a folder")
    if not path.is_file():
        return Footer(problem=f"={path} is not there")
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # 0.2 s; brings no types
    except ImportError:
        return Footer(problem=f"={path} is not read: {sys.executable} lacks pyarrow", unread=True)
    try:
        with parquet.ParquetFile(path) as file:
            return Footer(frozenset(file.schema_arrow.names), file.metadata.num_rows)
    except (ArrowException, OSError) as found:
        return Footer(problem=f"={path} cannot be read: {' '.join(str(found).split())}")


def data_findings(settings: Settings, train: Footer, val: Footer, *, joins: bool = False) -> list[Finding]:
    """Columns, and rows against the batch. Of a runtime that this launch ``joins`` the slots are not known."""
    used, found = files_used(settings), list[Finding]()
    if "TRAIN_DATA" in used:
        found += _file_findings("TRAIN_DATA", settings.train_data, train)
        found += _step_findings(settings, train.rows) if not train.problem else []
    if "VAL_DATA" in used and validates(settings):
        found += _file_findings("VAL_DATA", settings.val_data, val)
        found += _validation_findings(settings, val.rows, joins) if not val.problem else []
    return found


def files_used(settings: Settings) -> dict[str, Path | None]:
    """The files of the keys that VERL reads; where VERL_OVERRIDES name others, those are the user's own affair."""
    files = {"TRAIN_DATA": settings.train_data, "VAL_DATA": settings.val_data}
    return {key: path for key, path in files.items() if override(settings, OVERRIDES[key]) is None}


def validates(settings: Settings) -> bool:
    """Whether there is a validation."""
    return (override(settings, "trainer.test_freq") or str(settings.test_freq)) != "-1"


def _file_findings(key: str, path: Path | None, footer: Footer) -> list[Finding]:
    if footer.unread:
        fix = f"scripts/setup brings it, as does '{sys.executable} -m pip install pyarrow'"
        return [warning("data", f"{key}{footer.problem}", fix)]
    if footer.problem:
        fix = f"set DATA_DIR to a data set's folder ({MAKE}), or {key} itself to a parquet file"
        return [error("data", f"{key}{footer.problem}", fix)]
    missing = [name for name in NEEDED if name not in footer.columns]
    if not any(footer.columns.issuperset(names) for names in EITHER):
        missing.append("instance (or reward_model and extra_info)")
    if not missing:
        return []
    sentence = f"{key}={path} lacks the columns {', '.join(missing)}; it has {', '.join(sorted(footer.columns))}"
    return [error("data", sentence, f"prepare it as SkyRL-agent's examples do: {MAKE}")]


def _step_findings(settings: Settings, rows: int) -> list[Finding]:
    batch = settings.train_batch_size
    if rows < batch:
        there = f"TRAIN_DATA={settings.train_data} has {number_of(rows, 'row')}"
        sentence = f"{there}, fewer than TRAIN_BATCH_SIZE={batch}: not one step"
        return [error("data", sentence, "give more rows, or lower TRAIN_BATCH_SIZE")]
    steps = number_of(total_steps(settings, rows), "step")
    epoch = number_of(rows // batch, "step")
    sentence = f"{number_of(rows, 'row')}, {epoch} an epoch, {steps} in all (fewer if long prompts are left out)"
    return [estimate("data", sentence)]


def total_steps(settings: Settings, rows: int) -> int:
    """The steps that a training on so many rows has at most; VERL ends at ``trainer.total_training_steps`` before."""
    steps, most = rows // settings.train_batch_size * settings.total_epochs, override(settings, MOST_STEPS) or ""
    return min(steps, int(most)) if most.isdigit() else steps


def _validation_estimate(settings: Settings, rows: int, batch: int) -> Finding:
    batches = "at once" if rows <= batch else f"in {-(-rows // batch)} batches of at most {batch}"
    sentence = f"a validation is {number_of(rows, 'row')} {batches}, every {number_of(settings.test_freq, 'step')}"
    return estimate("data", sentence)


def _validation_findings(settings: Settings, rows: int, joins: bool) -> list[Finding]:
    """SkyRL-agent starts a sandbox for each row of a validation's batch first; VAL_BATCH_SIZE is as many as have one.

    What gets no slot does not end the run: its row counts as unsolved (read in SkyRL, commit eea40bc). But its fork
    starts one sandbox after another before any agent runs, so that each such row holds up all GPUs for as long as
    ``/start`` waits. An error where that alone outlasts the job.
    """
    if rows == 0:
        sentence = (
            f"VAL_DATA={settings.val_data} has no rows: the validation after TEST_FREQ={settings.test_freq} fails"
        )
        return [error("data", sentence, "give it rows, or set TEST_FREQ=-1")]
    slots, given = sandbox_room(settings).first_slots, override(settings, VAL_BATCH) or ""
    batch = min(rows, int(given) if given.isdigit() else settings.val_batch_size or slots)
    if batch <= slots:
        return [_validation_estimate(settings, rows, batch)]
    idle_s = (batch - slots) * START_WAIT_S
    there, shorter = number_of(slots, "slot"), f"shorten VAL_DATA to {number_of(slots, 'row')}"
    sentence = (
        f"a validation starts a sandbox for each of {number_of(batch, 'row')} of VAL_DATA, and the runtime has {there}"
        f": what gets none ({batch - slots}) counts as unsolved, and while it waits the GPUs may be idle for "
        f"{duration(idle_s)}"
    )
    fix = f"{shorter}, leave VAL_BATCH_SIZE unset ({slots} then), or set TEST_FREQ=-1"
    if joins or settings.skyrl_backend == "local" or idle_s < slurm_seconds(settings.time_limit):
        return [warning("data", sentence, fix)]
    return [error("data", f"{sentence}, which TIME_LIMIT={settings.time_limit} ends", fix)]
