"""How a line of log looks, and where it goes.

Commands log to stderr, so that stdout carries values only. Job bodies log to stdout, which Slurm writes into their
``.out`` (what users ``tail -f``), and repeat warnings and errors on stderr, their ``.err``.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from collections.abc import Mapping
from typing import IO, TextIO

FORMAT = "%(asctime)s [%(levelname)s] %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
COLOURS = {"DEBUG": "\x1b[2m", "INFO": "\x1b[32m", "WARN": "\x1b[33m", "ERROR": "\x1b[31m"}
# Where lines of several jobs are shown.
KIND_COLOURS = {"runtime": "\x1b[36m", "worker": "\x1b[34m", "training": "\x1b[35m"}

logging.addLevelName(logging.WARNING, "WARN")
log = logging.getLogger("skyrl")


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Colour only on a terminal, and never where NO_COLOR is set (https://no-color.org)."""
    return not environment.get("NO_COLOR") and stream.isatty()


def give_up(stream: IO[str]) -> None:
    """Send what is still written to a stream nowhere: its reader or terminal is gone, its disk is full.

    Python flushes once more at its end, and would end with code 120.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# What a terminal without UTF-8 gets in place of the characters that our texts have beside ASCII.
_PLAIN = {
    "…": "...",
    "–": "-",
    "—": "-",
    "→": "->",
    "·": "-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "’": "'",
    "“": '"',
    "”": '"',
}


def _plainly(problem: UnicodeError) -> tuple[bytes, int]:
    """An error handler of codecs: what the encoding lacks becomes ASCII; undecodable bytes go out as they came in."""
    if not isinstance(problem, UnicodeEncodeError):  # whoever reads back what was written to a file
        return codecs.lookup_error("surrogateescape")(problem)  # type: ignore[return-value]
    lacking = problem.object[problem.start : problem.end]
    return b"".join(map(_as_bytes, lacking)), problem.end


def _as_bytes(character: str) -> bytes:
    number = ord(character)
    return bytes([number - 0xDC00]) if 0xDC80 <= number <= 0xDCFF else _PLAIN.get(character, "?").encode("ascii")


PLAINLY = "skyrl-plainly"
codecs.register_error(PLAINLY, _plainly)


class ColourFormatter(logging.Formatter):
    """The plain format with the level in colour."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        level = f"[{record.levelname}]"
        return line.replace(level, f"{COLOURS.get(record.levelname, '')}{level}\x1b[0m", 1)


def flush_or_give_up() -> str | None:
    """Write what is still to be written, as the last act of a job body; a full disk does not change its exit code.

    Returns why something could not be written, None where all is.
    """
    complaint = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as problem:
            complaint = problem.strerror
            give_up(stream)
    return complaint


def debug_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """SKYRL_DEBUG, read as the bash suite did: 1 (or true, yes, on) turns debug lines on."""
    return environment.get("SKYRL_DEBUG", "").lower() in {"1", "true", "yes", "on"}


def _handler(stream: TextIO, level: int) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    formatter = ColourFormatter if wants_colour(stream) else logging.Formatter
    handler.setFormatter(formatter(FORMAT, TIME_FORMAT))
    handler.setLevel(level)
    return handler


def setup_command_logging(debug: bool = False) -> None:
    """Logging of a command: everything to stderr. No text is too much for the encoding of the streams afterwards."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAINLY)
    log.handlers[:] = [_handler(sys.stderr, logging.DEBUG)]
    log.setLevel(logging.DEBUG if debug or debug_wanted() else logging.INFO)
    log.propagate = False


def setup_job_logging(debug: bool = False) -> None:
    """Logging of a job body: everything to stdout, warnings and errors to stderr too."""
    log.handlers[:] = [_handler(sys.stdout, logging.DEBUG), _handler(sys.stderr, logging.WARNING)]
    log.setLevel(logging.DEBUG if debug or debug_wanted() else logging.INFO)
    log.propagate = False
