#!/usr/bin/env python3
"""The shared helpers under the names that the bash suite gave them: for Python by import, for shells by command.

    from slurm.lib.common import wait_for_runtime_url
    python slurm/lib/common.py wait-for-runtime-url DIR        # the value, and only the value, on stdout
    eval "$(python slurm/lib/common.py shell-functions)"       # all of them as functions of a bash script

As a script it starts under any Python 3 and restarts itself in the project's environment; what the helpers do stands
in slurm/lib/helpers.py.
"""

# The names are the point of the import, and pathlib is not yet needed before the restart.
# ruff: noqa: F403, PTH120
import os
import sys

if __name__ == "__main__":
    SCRIPT = os.path.realpath(__file__)
    CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(SCRIPT)))
    sys.path[0] = CHECKOUT  # instead of this file's folder, whose `secrets` would stand in for the standard library's
    from slurm.lib.bootstrap import ensure_interpreter

    ensure_interpreter(CHECKOUT, SCRIPT)

from slurm.lib.helpers import *
from slurm.lib.helpers import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
