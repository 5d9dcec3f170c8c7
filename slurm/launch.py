#!/usr/bin/env python3
"""Launch a training run: a runtime job with sandboxes and a training job, on Slurm or on this machine.

Starts under any Python 3 and restarts itself in the project's environment; the command line stands in
slurm/lib/cli.py.
"""

import fcntl
import gc
import os
import sys

FEW_PASSES = 50_000  # new objects between two passes of the garbage collector over all that there are; else 700


def open_closed_streams() -> None:
    """Lead a standard stream that the caller closed nowhere; its number would go to the first file that is opened."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if not is_usable(number):
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def is_usable(number: int) -> bool:
    """Whether a standard stream is open for what it is there for; a wrapper's script may have taken a closed one."""
    try:
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
    except OSError:
        return False
    return number == 0 or bool(flags & (os.O_WRONLY | os.O_RDWR))


def main() -> None:
    gc.set_threshold(FEW_PASSES)  # importing makes no garbage: 2 ms that a person waits for
    open_closed_streams()
    script = os.path.realpath(__file__)
    code = os.path.dirname(os.path.dirname(script))
    sys.path[0] = code  # instead of this file's folder, whose names are nobody's modules
    from slurm.lib.bootstrap import ensure_interpreter

    ensure_interpreter(code, script)
    from slurm.lib.cli import ONLY_LOOK
    from slurm.lib.cli import main as command

    exit_code = command(sys.argv[1:])
    if sys.argv[1:2] and sys.argv[1] in ONLY_LOOK:
        end_at_once(exit_code)
    sys.exit(exit_code)


def end_at_once(exit_code: int) -> None:
    """End without taking the modules apart, which takes 10 ms; returns if what was written cannot be."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(exit_code)


if __name__ == "__main__":
    main()
