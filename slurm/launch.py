#!/usr/bin/env python3
"""Launch a training run: a runtime job with sandboxes and a training job, on Slurm or on this machine.

Starts under any Python 3 and restarts itself in the project's environment; the command line stands in
slurm/lib/cli.py.
"""

import os
import sys


def main() -> None:
    script = os.path.realpath(__file__)
    code = os.path.dirname(os.path.dirname(script))
    sys.path[0] = code  # instead of this file's folder, whose names are nobody's modules
    from slurm.lib.bootstrap import ensure_interpreter

    ensure_interpreter(code, script)
    from slurm.lib.cli import main as command

    sys.exit(command(sys.argv[1:]))


if __name__ == "__main__":
    main()
