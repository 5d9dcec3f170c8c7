"""What every verb of launch.py has: a parser whose complaint is an error of ours, and values on stdout."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from slurm.lib.errors import UsageError
from slurm.lib.logs import give_up, log


class Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` for a wrong command line, in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the options")


def say(text: str) -> bool:
    """Write to stdout, undecodable bytes of the command line as they came; returns whether that went well.

    A reader that has left is no error. What cannot be written goes to the log.
    """
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except OSError as problem:
        give_up(sys.stdout)
        if not isinstance(problem, BrokenPipeError):
            log.error("cannot write to stdout: %s; it would have said:\n%s", problem.strerror, text)
            return False
    return True
