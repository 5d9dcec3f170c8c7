"""When can a run be cancelled so that nothing is lost: has its training saved since, is it pending, or has it ended?

The checkpoints are looked at every second, and Slurm, which knows whether there is still something to wait for, less
and less often. A silent Slurm says nothing, and a checkpoint counts all the same.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from slurm.lib.checkpoints import NewCheckpoint
from slurm.lib.coordination import Presence
from slurm.lib.errors import UsageError
from slurm.lib.logs import log
from slurm.lib.observe.run_view import JobView, RunState, RunView, Stage
from slurm.lib.observe.saving import SavesNever, Saving, saving_of
from slurm.lib.observe.survey import Survey
from slurm.lib.runs import FoundRun
from slurm.lib.signals import SignalNotes

LOOK_EVERY_S = 1.0  # at the checkpoints
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 30.0  # between two questions to Slurm
TELL_EVERY_S = 60.0
CERTAIN_S = 10.0  # a controller that was just started may not know a job yet
SERVES = "it is a runtime without a training, which saves nothing"
UNREAD = "nothing is known of its jobs"
UNFOUNDED = "it runs, and has no run directory yet"


class Cause(str, enum.Enum):
    """Why a run is waited for no longer."""

    SAVED = "checkpoint"
    PENDING = "pending"  # its training has not begun: nothing is lost
    ENDED = "ended"  # by itself
    LOST = "lost"  # its directory is gone, so nothing more is seen of it


@dataclass(frozen=True)
class Due:
    """A run that is waited for no longer, why, with which checkpoint, and after how many seconds."""

    run: FoundRun
    cause: Cause
    checkpoint: str = ""
    state: str = ""
    waited_s: float = 0.0

    @property
    def is_to_be_cancelled(self) -> bool:
        return self.cause in {Cause.SAVED, Cause.PENDING}


def cause_of(state: RunState, lead: JobView | None, saved: str | None) -> Cause | None:
    """Why a run in this state is waited for no longer; None while it is.

    ``saved`` names the checkpoint that came since. A run whose training has ended has nothing left to save, and its
    runtime job is ending by itself.
    """
    if state.is_over or state is RunState.ENDING:
        return Cause.ENDED
    if saved:
        return Cause.SAVED
    if lead is not None and lead.kind == "training" and lead.stage is Stage.PENDING:
        return Cause.PENDING
    return None


@dataclass
class Watch:
    """A run that is waited for: how it saves, as it was seen last, and its checkpoint at the beginning."""

    run: FoundRun
    view: RunView
    saving: Saving
    new: NewCheckpoint
    presence: Presence
    over_since: float | None = None

    @property
    def is_certain(self) -> bool:
        """Whether an end is more than Slurm's not knowing the job."""
        lead = self.view.pair.lead if self.view.pair else None
        return lead is not None and (lead.exit_code is not None or bool(lead.word or lead.ended))

    @property
    def sentence(self) -> str:
        """How far it is."""
        step = f"{self.view.phase}, " if getattr(self.view.phase, "step", None) is not None else ""
        every = f" ({self.saving.every})" if self.saving.every else ""
        return f"{step}last checkpoint: {self.new.checkpoints.mark() or 'none'}{every}"

    @property
    def limit(self) -> str:
        """When its time limit ends it, in words; empty where it has none, or that is not known."""
        lead = self.view.pair.lead if self.view.pair else None
        if lead is None or lead.limit_s is None or lead.elapsed_s is None:
            return ""
        return f"; its time limit ends it in {_span(max(0.0, lead.limit_s - lead.elapsed_s))}"


@dataclass
class CheckpointWait:
    """Waits for the next checkpoint of each run, at most ``patience_s`` seconds; a signal raises ``Interrupted``."""

    survey: Survey
    notes: SignalNotes
    patience_s: float
    begin: float = field(default_factory=time.monotonic)
    left: list[Watch] = field(default_factory=list)
    _due: list[Due] = field(default_factory=list)
    _asked_at: float = 0.0
    _pause_s: float = FIRST_PAUSE_S
    _told_at: float | None = None
    _told: dict[str, object] = field(default_factory=dict)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.begin

    def start(self, runs: Sequence[FoundRun]) -> None:
        """Look at all runs once; one ``UsageError`` for those that there is nothing to wait for of."""
        self._asked_at = time.monotonic()
        refused = []
        for run, view in zip(runs, self.survey.look(runs, servers=False), strict=True):
            cause = cause_of(view.state, view.pair.lead if view.pair else None, None)
            saving = SavesNever("") if cause else _saving(run, view)
            if cause:
                self._due.append(Due(run, cause, state=view.state.value))
            elif isinstance(saving, SavesNever):
                refused.append(f"{view.record.name} cannot be waited for: {saving.why}")
            else:
                self._watch(run, view, saving)
        if refused:
            advice = "cancel it without --after-checkpoint, or once it has saved" if len(refused) == 1 else ""
            advice = advice or "cancel these without --after-checkpoint, or once they have saved"
            raise UsageError("\n".join([*refused, f"nothing was cancelled; {advice}"]))

    def _watch(self, run: FoundRun, view: RunView, saving: Saving) -> None:
        if not saving.place.parent.is_dir():
            log.warning("%s is not there, as seen from this host; a checkpoint elsewhere is not seen", saving.place)
        assert run.directory
        self.left.append(Watch(run, view, saving, NewCheckpoint(saving.checkpoints), Presence(run.directory.path)))

    def next_due(self) -> list[Due]:
        """The runs that are due, once there are some; none once all were, or the time is up and some are ``left``."""
        while not self._due and self.left:
            self._ask_slurm()
            self._look()
            if not self._due and self.waited_s >= self.patience_s:
                break
            self._tell()
            if not self._due:
                self.notes.sleep(min(LOOK_EVERY_S, max(0.0, self.patience_s - self.waited_s)))
            self.notes.check()
        due, self._due = self._due, []
        return due

    def _ask_slurm(self) -> None:
        if time.monotonic() - self._asked_at < self._pause_s:
            return
        views = self.survey.look([watch.run for watch in self.left], servers=False)
        for watch, view in zip(self.left, views, strict=True):
            watch.view = view
        self._asked_at = time.monotonic()
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 1.5)

    def _look(self) -> None:
        """Move what is due."""
        for watch in list(self.left):
            lead = watch.view.pair.lead if watch.view.pair else None
            saved = watch.new.arrived()
            cause = Cause.LOST if watch.presence.is_lost() else cause_of(watch.view.state, lead, saved)
            if cause is Cause.ENDED and not self._is_over(watch):
                continue
            if cause:
                self.left.remove(watch)
                self._due.append(Due(watch.run, cause, saved or "", watch.view.state.value, self.waited_s))

    @staticmethod
    def _is_over(watch: Watch) -> bool:
        """Whether its end is certain: by somebody's word at once, for want of any only after a while."""
        if watch.is_certain:
            return True
        watch.over_since = watch.over_since or time.monotonic()
        return time.monotonic() - watch.over_since >= CERTAIN_S

    def _tell(self) -> None:
        """Log how far the runs are, each minute and where a step or a checkpoint has come."""
        is_time = self._told_at is None or time.monotonic() - self._told_at >= TELL_EVERY_S
        for watch in self.left:
            sentence, name = watch.sentence, watch.view.record.name
            if is_time or self._told.get(name) != sentence:
                self._told[name] = sentence
                more = (_span(self.waited_s), _span(self.patience_s), watch.limit)
                log.info("%s: %s; waiting for the next one, since %s of at most %s%s", name, sentence, *more)
        self._told_at = time.monotonic() if is_time else self._told_at
        if not self.survey.heard and is_time:
            log.warning("Slurm does not answer; checkpoints are waited for all the same")


def _saving(run: FoundRun, view: RunView) -> Saving | SavesNever:
    training = view.pair.job("training") if view.pair else None
    if training is None:
        return SavesNever(SERVES if view.pair else UNREAD)
    return saving_of(run.directory, training.job_id) if run.directory else SavesNever(UNFOUNDED)


def _span(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
