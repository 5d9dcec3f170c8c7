"""Run directories as real runs left them, for tests of what only looks at runs.

``python -m tests.observed_runs NAME RUN`` records one more: a copy of what is looked at, with paths and the names of
users and of this machine replaced, and without code, keys and most settings.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from socket import gethostname
from typing import Any

HERE = Path(__file__).resolve().parent / "observed"
SETTINGS = ("SKYRL_BACKEND", "RESTARTS", "PAIRING", "TIME_LIMIT", "RUNTIME_NODES", "RUNTIME_MODE")
HOST, USER, BASE = "login1", "user", "/home/user/.skyrl_jobs"
WANTED = re.compile(
    r"(run|attempt)[\w.]*\.json|\w+\.flag|local_jobs\.txt|(runtime|worker|training)_[\w.]+\.(out|err)"
    r"|sandbox_statistics_\w+\.json"
)
LONGEST_LINE, LONGEST_STEP = 240, 4096  # a line in which VERL tells of a step is looked at as a whole


def _record(text: str) -> str:
    data: dict[str, Any] = json.loads(text)
    settings = data.get("settings")
    if settings:
        data["settings"] = {name: settings[name] for name in SETTINGS if name in settings}
    data.pop("sources", None)
    return json.dumps({**data, **({"user": USER} if "user" in data else {})}, indent=2) + "\n"


def _neutral(text: str, folder: Path) -> str:
    text = text.replace(str(folder.parent), BASE)
    text = re.sub(r"(?:/[\w.-]+)+/(python3?\b|site-packages)", r"/home/user/SkyRL/.venv/bin/\1", text)
    text = re.sub(r"/home/(?!user/)[\w-]+", "/home/user", text)
    text = re.sub(rf'(?<=["\s]){re.escape(gethostname())}(?=[",\s])', HOST, text)
    return re.sub(r"/(?:tmp|run)/[\w./-]*(?=skyr)", "/tmp/", text)


def _cut(line: str) -> str:
    return line[: LONGEST_STEP if " step:" in line else LONGEST_LINE]


def record(name: str, folder: Path) -> None:
    """Copy what is looked at of a run's directory."""
    target = HERE / name / folder.name
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if WANTED.fullmatch(path.name):
            text = path.read_text(errors="replace")
            text = _record(text) if path.name.startswith("run") and path.suffix == ".json" else text
            shown = (line for line in _neutral(text, folder).splitlines() if "[DEBUG]" not in line)
            lines = (_cut(line) if path.suffix in {".out", ".err"} else line for line in shown)
            (target / path.name).write_text("".join(f"{line}\n" for line in lines))


def folder_of(name: str) -> Path:
    """The directory of a recorded run."""
    (found,) = (HERE / name).iterdir()
    return found


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]).resolve())
