"""What every verb of launch.py has: a parser whose complaint is an error of ours, and values on stdout."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from slurm.lib.errors import EnvironmentProblem, UsageError
from slurm.lib.logs import PLAINLY, give_up, log


class Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` for a wrong command line, in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the options")

    def _print_message(self, message: str, file: object = None) -> None:
        """What argparse prints, of which all but --help and --version is an error of ours."""
        if not say(message):
            raise EnvironmentProblem("stdout cannot be written")


def say(text: str) -> bool:
    """Write to stdout in its encoding, undecodable bytes as they came; returns whether that went well.

    A reader that has left is no error. What cannot be written goes to the log.
    """
    try:
        sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "utf-8", PLAINLY))
        sys.stdout.flush()
    except OSError as problem:
        give_up(sys.stdout)
        if not isinstance(problem, BrokenPipeError):
            log.error("cannot write to stdout: %s; it would have said:\n%s", problem.strerror, text)
            return False
    return True
