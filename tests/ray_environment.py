"""The real Ray, in an environment of its own: made once for a machine, as SkyRL-agent's lock file pins it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "2.51.1"
CACHE = Path(os.environ.get("SKYRL_TEST_CACHE", "/var/tmp/skyrl-tests"))
INSTALL_TIMEOUT_S = 900


def ray_python() -> Path:
    """The Python of an environment with Ray, which any user can start; made if it is not there."""
    folder = CACHE / f"ray-{VERSION}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".ray-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may want it at once
        if not folder.exists():
            _make(folder)
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    """Made under another name, so that one that was interrupted is not taken for a whole one."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    # The system's Python where there is one: our own may lie below a home that others cannot enter.
    base = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable
    python = str(building / "bin" / "python")
    install = ("-m", "pip", "install", "--quiet", "--no-cache-dir", f"ray[default]=={VERSION}")
    for argv in ([base, "-m", "venv", str(building)], [python, *install]):
        subprocess.run(argv, check=True, timeout=INSTALL_TIMEOUT_S, stdout=sys.stderr, umask=0o022)
    building.rename(folder)
