"""From whatever Python started us to the one that has our packages.

Slurm starts a job script under the node's system Python, perhaps 3.6, and people start ``launch.py`` under any
``python3``; so this file and those that import it parse on 3.6 and import nothing of ours before the right
interpreter runs. The process is replaced, so the pid that Slurm watches stays.
"""

import os
import sys

MINIMUM = (3, 10)
MARKER = "SKYRL_BOOTSTRAPPED"  # the interpreters that have been tried, so that broken ones cannot take turns
EXIT_ENVIRONMENT = 71  # as in errors.py, which does not parse here


class NoInterpreter(SystemExit):
    """There is none that has our packages; ends the process with the exit code for that."""

    def __init__(self, reason: str) -> None:
        SystemExit.__init__(self, EXIT_ENVIRONMENT)
        self.reason = reason


def candidates(code: str) -> "list[tuple[str, str]]":
    """The interpreters to try, with where each was named: recorded at submission, then the checkout's own."""
    found = []
    recorded = os.environ.get("SKYRL_PYTHON")
    if recorded:
        found.append((recorded, "SKYRL_PYTHON"))
    folder = os.environ.get("SKYRL_VENV") or os.path.join(code, ".venv")
    found.append((os.path.join(folder, "bin", "python"), "the project's environment"))
    return found


def suitable(version: "tuple[int, ...]", packages: "tuple[str, ...]") -> bool:
    """Whether the running interpreter is new enough and has the packages."""
    if version < MINIMUM:
        return False
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in packages)


# Of the suite and of its API server, which the runtime job starts under the same interpreter.
PACKAGES = ("tenacity", "sh", "dotenv", "yaml", "fastapi", "uvicorn", "aiohttp")


def _restart(python: str, script: str) -> None:
    """Go on as ``python``; returns only if the system cannot start it."""
    try:
        os.execv(python, [python, script] + sys.argv[1:])
    except OSError:
        return


def ensure_interpreter(code: str, script: str, packages: "tuple[str, ...]" = PACKAGES) -> None:
    """Return if this interpreter will do; else restart ``script`` under one that does, or end saying what to do.

    The caller has put ``code`` on the path; a restarted script does so again.
    """
    if suitable(tuple(sys.version_info[:2]), packages):
        os.environ.pop(MARKER, None)
        return
    tried = []
    been = os.environ.get(MARKER, "").split("\n")
    for python, origin in candidates(code):
        if python in been:
            tried.append("%s (%s) is too old or lacks packages" % (python, origin))
        elif os.path.isfile(python) and os.access(python, os.X_OK):
            os.environ[MARKER] = "\n".join(been + [python])
            sys.stdout.flush()
            _restart(python, script)
            tried.append("%s (%s) cannot be started" % (python, origin))
        else:
            tried.append("%s (%s) is not there" % (python, origin))
    reason = "no suitable Python: %s; %s" % (", ".join(tried), _remedy(os.environ.get("SKYRL_CHECKOUT") or code))
    sys.stderr.write("%s: %s\n" % (script, reason))
    raise NoInterpreter(reason)


def _remedy(checkout: str) -> str:
    if not os.path.isdir(checkout):
        return "the checkout %s is gone: launch again from where it is now" % checkout
    return "make the environment with:  '%s'" % os.path.join(checkout, "scripts", "setup")
