"""How far is a job, by the lines of its own log and of its trainer's?

The trainers' words for their steps are in ``trainer_words``; here are Ray's, shell_rl's and our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from slurm.lib.observe.run_files import LogEnds, printable
from slurm.lib.trainer_words import steps_said

# Lines of a job's body, in the order in which they come, and what it does from then on.
_OURS = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[\w+\] "
_TRAINING = (
    (rf"{_OURS}training job \S+ on ", "checking its node"),
    (rf"{_OURS}waiting up to \S+ s for the runtime in ", "waiting for its runtime"),
    (rf"{_OURS}runtime server at \S+ answers", "preparing the trainer"),
    (rf"{_OURS}starting Ray on ", "starting Ray"),
    (rf"{_OURS}starting the trainer in ", "trainer started"),
    (r"\bStarted a local Ray instance|\bConnected to Ray cluster", "Ray is up, loading model and data"),
    (rf"{_OURS}.*\bEvaluating the untrained policy", "evaluating the untrained policy"),
    (rf"{_OURS}the time limit comes in ", "saving before the time limit"),
    (rf"{_OURS}received SIG\w+; stopping the trainer", "stopping the trainer"),
    (rf"{_OURS}the trainer has saved ", "stopping the trainer"),
    (rf"{_OURS}training job \S+ ends with exit code ", "ended"),
)
_RUNTIME = (
    (rf"{_OURS}runtime job \S+ on ", "making its Podman storage"),
    (rf"{_OURS}serving on ", "starting its API server"),
    (rf"{_OURS}sandbox image ", "loading images"),
    (rf"{_OURS}API server ready at ", "serving"),
    (rf"{_OURS}.*; starting it again, the sandboxes stay", "starting its server again"),
    (rf"{_OURS}the API server and the Podman service answer again", "serving"),
    (rf"{_OURS}stopping everything: ", "stopping"),
    (rf"{_OURS}runtime job \S+ ends: ", "ended"),
)
_WORKER = (
    (rf"{_OURS}worker \S+ of the runtime job ", "making its Podman storage"),
    (rf"{_OURS}waiting up to \S+ s for the head ", "waiting for its head"),
    (rf"{_OURS}serving on ", "starting its API server"),
    (rf"{_OURS}sandbox image ", "loading images"),
    (rf"{_OURS}API server ready at ", "serving"),
    (rf"{_OURS}.*; starting it again, the sandboxes stay", "starting its server again"),
    (rf"{_OURS}the API server and the Podman service answer again", "serving"),
    (rf"{_OURS}stopping everything: ", "stopping"),
    (rf"{_OURS}worker \S+ ends: ", "ended"),
)
_MARKS = {"training": _TRAINING, "runtime": _RUNTIME, "worker": _WORKER}


def _plain(pattern: str) -> tuple[str, ...]:
    """Plain words, one of which every line has that matches the pattern: they are found faster than it."""
    parts = (re.sub(r"\\[A-Za-z]", "|", part) for part in pattern.replace(_OURS, "").split("|"))
    return tuple(max(re.findall(r"[A-Za-z ]+", part), key=len) for part in parts)


@cache
def _marks(kind: str) -> list[tuple[tuple[str, ...], str, str]]:
    """The lines of a kind of job, each with its plain words; a pattern is compiled once a line has one of those."""
    return [(_plain(pattern), pattern, words) for pattern, words in _MARKS[kind]]


@cache
def mark_words(kind: str) -> tuple[str, ...]:
    """Plain words, some of which every line has that marks a phase."""
    return tuple(dict.fromkeys(word for plain, _pattern, _words in _marks(kind) for word in plain))


SHOWN = 400  # characters of a line that are looked at


@dataclass(frozen=True)
class Phase:
    """What a job does, in words; with the steps that its trainer has finished, and is to do, where it says so."""

    words: str
    step: int | None = None
    steps: int | None = None

    def __str__(self) -> str:
        if self.step is None:
            return self.words
        of = f" of {self.steps}" if self.steps is not None else ""
        step = f"step {self.step}{of}"
        return step if self.words == TRAINING else f"{self.words} (after {step})"


TRAINING = "training"
NOTHING_YET = Phase("starting")


def phase_of(kind: str, log: LogEnds) -> Phase:
    """The phase of a job of a kind, by its log."""
    lines = log.head.splitlines() + (log.tail.splitlines() if log.tail != log.head else [])
    return steps_in(lines, phase_in(kind, lines)) if kind == "training" else phase_in(kind, lines)


def phase_in(kind: str, lines: Sequence[str]) -> Phase:
    """What the last line that marks a phase says."""
    marks = (mark_in(kind, line) for line in reversed(lines))
    return next((Phase(words) for words in marks if words), NOTHING_YET)


def mark_in(kind: str, line: str) -> str | None:
    """What a job of a kind does from this line of its log on; None for a line that marks nothing."""
    if line.startswith("20") or "Ray" in line:  # a log may have thousands of others
        said = line[:SHOWN]
        marks = (mark for mark in _marks(kind) if any(word in said for word in mark[0]))
        return next((words for _plain, pattern, words in marks if re.search(pattern, said)), None)
    return None


def steps_in(lines: Sequence[str], phase: Phase) -> Phase:
    """The phase with the steps; a trainer that has finished one is training, until its job says otherwise."""
    step, total = steps_said(lines[_last_start(lines) :])
    if not step and phase.words != TRAINING:
        return replace(phase, steps=total)
    later = {"saving before the time limit", "stopping the trainer", "ended"}
    return Phase(phase.words if phase.words in later else TRAINING, step, total)


def _last_start(lines: Sequence[str]) -> int:
    """Where the trainer was started: what stands before is not its word."""
    starts = re.compile(rf"{_OURS}starting the trainer in ")
    return next((at for at in range(len(lines) - 1, -1, -1) if starts.match(lines[at])), 0)


def last_error(log: LogEnds) -> str:
    """The last line of an ``.err`` that says what went wrong, without its time; empty where none does.

    A warning is none, nor is the frame of a traceback, nor the job's own last line, which tells its end.
    """
    lines = (" ".join(printable(raw).split()) for raw in reversed(log.tail.splitlines()))
    found = next((line for line in lines if _ERROR.search(line) and not _LAST_WORD.search(line)), "")
    return re.sub(_OURS, "", found)


def last_failed_start(log: LogEnds) -> str:
    """What the ``.err`` of a runtime job says of the last sandbox that did not start, or ended by itself."""
    lines = (" ".join(printable(raw).split()) for raw in reversed(log.tail.splitlines()))
    return next((match[1] for line in lines if (match := re.match(_SANDBOX, line))), "")


_SANDBOX = rf"{_OURS}sandbox \S+ of session .*?: (.+)"


def end_of_worker(log: LogEnds) -> str:
    """Why a worker has ended, by its ``.out``; empty where it does not say."""
    lines = (" ".join(printable(raw).split()) for raw in reversed(log.tail.splitlines()))
    return next((match[1] for line in lines if (match := re.match(_WORKER_END, line))), "")


_WORKER_END = rf"{_OURS}worker \S+ ends: (.+)"
_LAST_WORD = re.compile(rf"{_OURS}(?:(?:training|runtime) job|worker) \S+ ends(?: with exit code|:)")
_ERROR = re.compile(
    r"\[(?:ERROR|CRITICAL)\]"
    r"|^(?:\([\w ]+ pid=\d+[^)]*\) )?(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Timeout)\b"  # Python's last line
    r"|^(?:slurmstepd|srun): error: "
    r"|\b(?:CUDA )?out of memory\b|\bOut Of Memory\b|\boom[-_ ]kill|\bSegmentation fault\b|: command not found$"
    r"|\bNCCL error\b|^(?:FATAL|ERROR|Error)\b"
)
