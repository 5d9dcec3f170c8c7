"""The errors a person may see, each with its sentence, and the exit codes of every command.

A message says what happened, where, and what to do next. One function at the edge of each process prints it and ends
with ``exit_code``; nothing in between catches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXIT_OK = 0  # done
EXIT_USAGE = 2  # the command line or the configuration is wrong; nothing was created or submitted
EXIT_UNAVAILABLE = 69  # the partner job is gone or never became ready (EX_UNAVAILABLE)
EXIT_INTERNAL = 70  # a fault of this suite (EX_SOFTWARE)
EXIT_ENVIRONMENT = 71  # something this machine lacks: an interpreter, Podman, a folder (EX_OSERR)
EXIT_SUBMISSION = 73  # Slurm refused or did not answer; the message names what may be left (EX_CANTCREAT)
EXIT_NODE_LOST = 74  # a node of the training job was lost (EX_IOERR)
EXIT_TIMEOUT = 75  # a deadline of ours passed, or a training was stopped to go on in another job (EX_TEMPFAIL)
EXIT_NO_PROGRESS = 76  # a restart did not begin: the attempt before it was interrupted and had saved nothing new
EXIT_SIGNAL_BASE = 128  # ended by signal N: 128 + N, as shells count

# What a person does about each; the message itself is more exact.
WHAT_TO_DO: Mapping[int, str] = {
    EXIT_OK: "",
    EXIT_USAGE: "correct what the message names",
    EXIT_UNAVAILABLE: "read the other job's `.err`, or see by `launch.py status` how the run is",
    EXIT_INTERNAL: "report it, with the traceback in the `.err` or on the terminal",
    EXIT_ENVIRONMENT: "the message says what is missing, and how to get it; `launch.py doctor` looks at all of it",
    EXIT_SUBMISSION: "read Slurm's words in the message; cancel what it says may be left, and launch again",
    EXIT_NODE_LOST: "read `ray_<id>_<node>.log` of the node that the message names; with RESTARTS it goes on by itself",
    EXIT_TIMEOUT: "the message names what was waited for, and the key or option that says how long",
    EXIT_NO_PROGRESS: "read the logs of the attempt before it, mend the cause, and go on by hand",
    EXIT_SIGNAL_BASE: "nothing, if it was you; else ask Slurm: `sacct -j ID`, `scontrol show job ID`",
}


class SuiteError(Exception):
    """Base of every error meant for a person; ``str()`` is the whole message."""

    exit_code = EXIT_INTERNAL


class UsageError(SuiteError):
    """The command line asks for something impossible."""

    exit_code = EXIT_USAGE


class EnvironmentProblem(SuiteError):
    """This machine lacks something that the run needs; the message names it and how to get it."""

    exit_code = EXIT_ENVIRONMENT


class SubmissionError(SuiteError):
    """Slurm did not take the jobs, or did not answer; what had been submitted is cancelled.

    ``leaves_jobs`` where that could not be done, or is not known: then a held job may be in the queue. ``may_start``
    where all is ready and only Slurm's word about the last step is missing: then nothing is taken back.
    """

    exit_code = EXIT_SUBMISSION

    def __init__(self, message: str, *, leaves_jobs: bool = False, may_start: bool = False) -> None:
        super().__init__(message)
        self.leaves_jobs = leaves_jobs
        self.may_start = may_start


class PartnerGone(SuiteError):
    """The other job of the run has ended, said that it failed, or cannot be reached."""

    exit_code = EXIT_UNAVAILABLE


class NotRunning(SuiteError):
    """What is wanted of a run needs a job or a sandbox of it that does not run; the message says how it is instead."""

    exit_code = EXIT_UNAVAILABLE


class NodeLost(SuiteError):
    """A node of the training job has left the run's Ray cluster; the message names it."""

    exit_code = EXIT_NODE_LOST


class WaitTimeout(SuiteError):
    """A wait reached its deadline; the message says for what, how long, and what was seen last."""

    exit_code = EXIT_TIMEOUT


class TooLate(SuiteError):
    """So little time is left to a job that the training does not begin."""

    exit_code = EXIT_TIMEOUT


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    ``where`` is ``FILE:LINE``, ``--set KEY`` or ``environment``; ``what`` a sentence naming key, value and
    what would be right; ``fix`` what to do, where that is more than to correct the place.
    """

    where: str
    what: str
    fix: str = ""

    @property
    def sentence(self) -> str:
        """What is wrong and where."""
        return f"{self.where}: {self.what}"

    def __str__(self) -> str:
        return self.sentence + (f"; {self.fix}" if self.fix else "")


class ConfigError(SuiteError):
    """All mistakes of a configuration, reported together."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = [f"{len(self.problems)} {noun} in the configuration; nothing was created or submitted:"]
        super().__init__("\n".join(lines + [f"  {problem}" for problem in self.problems]))
