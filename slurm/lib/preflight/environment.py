"""Is the trainer's environment there: uv, skyrl-agent's .venv and its packages, and can VERL be imported?

Before a submission by their files, since an import takes 9 s (facts about VERL); ``--check`` imports too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.processes import Completed, run

PACKAGES = ("verl", "ray", "torch", "vllm")
IMPORTED = "verl"  # it brings ray and torch; vllm looks for a GPU
IMPORT_DEADLINE_S = 45.0  # from a cold shared file system; less than the deadline of --check


@dataclass(frozen=True)
class Installed:
    """The environment of skyrl-agent.

    ``agent`` is skyrl-agent's folder, None where there is none; ``uv`` its path, None where it is not on PATH;
    ``python_works`` whether the interpreter's links lead somewhere; ``versions`` package → version of those of
    ``PACKAGES`` that are installed.
    """

    agent: Path | None
    folder: Path
    exists: bool
    python_works: bool
    uv: str | None
    versions: Mapping[str, str]


def look_at_environment(agent_folder: Path, environment: Mapping[str, str]) -> Installed:
    """By the files of ``uv``'s environment: .venv, or where UV_PROJECT_ENVIRONMENT says."""
    folder = agent_folder / (environment.get("UV_PROJECT_ENVIRONMENT") or ".venv")
    found = [path.name.removesuffix(".dist-info") for path in folder.glob("lib/python3*/site-packages/*.dist-info")]
    versions = {name.lower(): version for name, _, version in (entry.partition("-") for entry in found)}
    return Installed(
        agent_folder if agent_folder.is_dir() else None,
        folder,
        folder.is_dir(),
        os.access(folder / "bin" / "python", os.X_OK),
        shutil.which("uv", path=environment.get("PATH")),
        {name: versions[name] for name in PACKAGES if name in versions},
    )


def environment_findings(installed: Installed, syncs: bool = True) -> list[Finding]:
    """What is missing of it, and the versions of what is there; ``syncs``: whether uv mends it in the job."""
    level, would = (warning, "uv would") if syncs else (error, "with SNAPSHOT=1 uv would not")
    found = []
    if installed.uv is None:
        sentence = "uv, which starts the trainer, is not on PATH here, and the job gets this PATH"
        found.append(
            error("environment", sentence, "install uv where the GPU nodes see it, and add its folder to PATH")
        )
    if installed.agent is None:
        return found  # which ``parts`` says
    sync = f"cd {installed.agent} && uv sync --frozen --extra verl"
    if not installed.exists:
        waits = ", with the GPUs waiting" if syncs else ""
        sentence = f"{installed.folder} is not there: {would} make it in the job{waits}"
        return [*found, level("environment", sentence, f"make it now: {sync}")]
    if not installed.python_works:
        sentence = f"{installed.folder}/bin/python cannot be started: what it links to is gone"
        return [*found, error("environment", sentence, f"make it anew: rm -r {installed.folder}; {sync}")]
    missing = [name for name in PACKAGES if name not in installed.versions]
    if missing:
        sentence = f"{installed.folder} lacks {', '.join(missing)}: {would} install them in the job"
        return [*found, level("environment", sentence, f"install them now: {sync}")]
    shown = ", ".join(f"{name} {version}" for name, version in installed.versions.items())
    return [*found, estimate("environment", f"{shown} in {installed.folder} (by their files)")]


def import_findings(installed: Installed, environment: Mapping[str, str]) -> list[Finding]:
    """Whether VERL can be imported here; nothing where ``environment_findings`` has said why it cannot."""
    if not installed.python_works or IMPORTED not in installed.versions:
        return []
    python = str(installed.folder / "bin" / "python")
    argv = (python, "-c", f"import {IMPORTED}")
    return judge_import(installed, run(argv, timeout_s=IMPORT_DEADLINE_S, environment=environment, cwd=installed.agent))


def judge_import(installed: Installed, answer: Completed) -> list[Finding]:
    """What an import has shown; a package that is missing is missing everywhere, a library perhaps only here."""
    if answer.ok:
        return [estimate("import", f"{IMPORTED} can be imported in {installed.folder}")]
    last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
    sentence = f"{IMPORTED} cannot be imported in {installed.folder}: {last}"
    if last.startswith("ModuleNotFoundError"):
        return [error("import", sentence, f"cd {installed.agent} && uv sync --frozen --extra verl")]
    fix = f"try it where there is a GPU: {installed.folder}/bin/python -c 'import {IMPORTED}'"
    return [warning("import", sentence, fix)]
