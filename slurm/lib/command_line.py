"""What every verb of launch.py has: a parser whose complaint is an error of ours, and values on stdout."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any, NoReturn

from slurm.lib.errors import EnvironmentProblem, UsageError
from slurm.lib.logs import PLAINLY, give_up, log

SOME_WIDTH = 80


class Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` for a wrong command line, in place of ending the process."""

    def __init__(self, *, formatter_class: type[argparse.HelpFormatter] = argparse.HelpFormatter, **options: Any):
        # argparse makes a formatter for each argument as it is added, to no end that has a width; to look that up it
        # imports shutil, which is felt in the start-up.
        super().__init__(formatter_class=partial(formatter_class, width=SOME_WIDTH), **options)
        self._shown_by = formatter_class

    def format_help(self) -> str:
        self.formatter_class = self._shown_by
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = self._shown_by
        return super().format_usage()

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
