"""The errors a person may see, each with its sentence, and the exit codes of ``shell_rl.train``."""

from __future__ import annotations

EXIT_OK = 0
EXIT_USAGE = 2  # the command line, the environment or the output directory is not usable; nothing was started
EXIT_DID_NOT_LEARN = 3  # the run went through, but the trained policy is not better enough than the untrained one
EXIT_UNAVAILABLE = 69  # no sandbox could be had, or all of them broke down (EX_UNAVAILABLE)
EXIT_SIGNAL_BASE = 128  # ended by signal N: 128 + N, as shells count


class ShellRlError(Exception):
    """Base of every error meant for a person; ``str()`` is the whole message."""

    exit_code = EXIT_UNAVAILABLE


class UsageError(ShellRlError):
    """The command line, the environment or the output directory asks for something impossible."""

    exit_code = EXIT_USAGE


class DidNotLearn(ShellRlError):
    """The rewards after training do not show that anything was learned."""

    exit_code = EXIT_DID_NOT_LEARN


class SandboxesUnavailable(ShellRlError):
    """The API server gives no sandbox, or the sandboxes do not run what they are sent."""


class NoRoom(SandboxesUnavailable):
    """The API server answers 503: all its slots are taken."""


class Unreachable(SandboxesUnavailable):
    """Nobody answered at an address, or the connection broke."""


class SandboxDied(SandboxesUnavailable):
    """A sandbox that was ready no longer runs commands."""


class Interrupted(ShellRlError):
    """A signal asked for an end; the sandboxes are stopped on the way out."""

    def __init__(self, signal_number: int, name: str) -> None:
        super().__init__(f"Stopped by {name}.")
        self.exit_code = EXIT_SIGNAL_BASE + signal_number
