"""How a line of the server's log looks: to stderr, uvicorn's lines like our own."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s [%(levelname)s] %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"

log = logging.getLogger("slurm_runtime")


def setup(verbose: bool) -> None:
    """Log to stderr; ``verbose`` adds debug lines and one line for each request."""
    logging.addLevelName(logging.WARNING, "WARN")
    logging.addLevelName(logging.CRITICAL, "ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))
    ours = logging.DEBUG if verbose else logging.INFO
    for name, level in {
        "slurm_runtime": ours,
        "uvicorn": logging.WARNING,
        "asyncio": logging.WARNING,
    }.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = [handler]
        logger.propagate = False
