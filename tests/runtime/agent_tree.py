"""The agent tree of the tests: built once for this machine, kept between runs, readable for every user."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from slurm_runtime.agent.build import DEFAULT_VERSION, build, say_on_stderr
from slurm_runtime.agent.tree import AgentTree

CACHE = Path(os.environ.get("SKYRL_TEST_AGENT_CACHE", "/var/tmp/skyrl-tests/agent"))
# Prints what the kernel answers to "which is my session keyring?": its number, or -1 and the error.
ASK_FOR_KEYRING = (
    "import ctypes, os; c = ctypes.CDLL(None, use_errno=True); "
    "print(c.syscall({'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, -3, 0) >= 0, ctypes.get_errno())"
)
REFUSED = f"False {errno.ENOSYS}\n"
COMMAND = "/usr/local/bin/openhands-agent-server --port 60000"


def tests_tree() -> AgentTree:
    """The tree of the default version; about a minute the first time on a machine."""
    umask = os.umask(0o022)
    try:
        return build(CACHE, DEFAULT_VERSION, "auto", say_on_stderr)
    finally:
        os.umask(umask)
