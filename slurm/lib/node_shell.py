"""A shell on a job's own node: in one of the job's sandboxes, or beside them. Runs there, as a step of the job.

It ends with the job: a step's processes get SIGTERM when the job ends, which shells ignore, so it is passed on as a
hang-up. However it ends, what was started in it ends too, in a sandbox as well: a process there does not end with the
Podman that started it, so all carry a marker. What runs in a sandbox gets nothing else of this environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.lib.coordination import host_name
from slurm.lib.errors import EnvironmentProblem, NotRunning, UsageError
from slurm.lib.guardian import guarded
from slurm.lib.job_context import code_folder
from slurm.lib.logs import log
from slurm.lib.podman_storage import PodmanStorage, store_of
from slurm.lib.processes import attached, run
from slurm.lib.signals import SignalNotes

MARKER = "SKYRL_SHELL"
PODMAN_S = 30.0  # to list containers; 50 ms, and more while many sandboxes start
SHOWN = 20  # sandboxes in a message
SESSION_LABEL = "skyrl.session"  # as slurm_runtime labels containers, and names them
NAME_PREFIX = "sandbox-"
CLAIM = "userdata/skyrl-claim.json"  # in place of labels, of a container that was made before it was asked for
ELSEWHERE = ("CONTAINER_HOST", "CONTAINER_CONNECTION", "CONTAINER_SSHKEY")  # they would send Podman to another machine
# bash where the image has it; the words are the sandbox's, not this shell's.
ANY_SHELL = ("sh", "-c", "if command -v bash >/dev/null 2>&1; then exec bash; else exec sh; fi")


@dataclass(frozen=True)
class Container:
    """A living sandbox's container, as ``podman ps`` tells it."""

    container_id: str
    name: str
    session: str
    image: str
    state: str

    @property
    def names(self) -> tuple[str, ...]:
        """By which it may be called, as the API server has them first: session id, runtime id; then Podman's."""
        return (*filter(None, (self.session, self.name.removeprefix(NAME_PREFIX))), self.name, self.container_id)

    def __str__(self) -> str:
        return f"{self.names[0]} ({self.image}, {self.state})"


def parse_containers(text: str) -> list[Container]:
    """The containers in the output of ``podman ps --format json``, by their first names."""
    try:
        entries = json.loads(text or "[]")
    except ValueError:
        raise EnvironmentProblem(f"podman ps --format json did not print JSON: {text[:200]}") from None
    found = [_container(entry) for entry in entries or () if isinstance(entry, dict)]
    return sorted(found, key=lambda container: container.names[0])


def _container(entry: Mapping[str, object]) -> Container:
    names, labels = entry.get("Names"), entry.get("Labels")
    name = str(names[0]) if isinstance(names, list) and names else ""
    session = str(labels.get(SESSION_LABEL, "")) if isinstance(labels, dict) else ""
    return Container(
        str(entry.get("Id", "")), name, session, str(entry.get("Image", "")), str(entry.get("State", "")).lower()
    )


def with_claim(container: Container, graphroot: Path) -> Container:
    """With the session that claimed it, where it was made without one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for claim in [] if container.session else graphroot.glob(f"*-containers/{container.container_id}/{CLAIM}"):
            found = json.loads(claim.read_text(encoding="utf-8")).get(SESSION_LABEL, "")
            return replace(container, session=str(found))
    return container


def chosen(containers: Sequence[Container], name: str, where: str) -> Container:
    """The sandbox that a person means; ``UsageError`` with those that live, ``NotRunning`` where none does."""
    if not containers:
        raise NotRunning(f"no sandbox lives on {where}; without SANDBOX you get a shell on the node itself")
    found = [one for one in containers if name in one.names]
    found = found or [one for one in containers if name and any(known.startswith(name) for known in one.names)]
    if not found:
        raise UsageError(f"no sandbox {name!r} lives on {where}; there are {_listed(containers)}")
    if len(found) > 1:
        raise UsageError(f"{name!r} means {len(found)} sandboxes: {_listed(found)}; write more of one")
    if found[0].state == "paused":
        raise NotRunning(f"sandbox {found[0].names[0]} on {where} is paused: nothing runs in it until it is resumed")
    return found[0]


def _listed(containers: Sequence[Container]) -> str:
    more = f" and {len(containers) - SHOWN} more" if len(containers) > SHOWN else ""
    return ", ".join(map(str, containers[:SHOWN])) + more


def enter(job_id: str, sandbox: str | None, command: Sequence[str], notes: SignalNotes) -> int:
    """Run a shell, or ``command``, in a sandbox of a job that runs here, or on this node; returns its exit code."""
    marker = secrets.token_hex(8)
    with guarded(code_folder()) as guardian:
        guardian.own_marker(MARKER, marker)
        guardian.await_detached()
        storage = store_of(job_id)
        if sandbox is not None:
            argv, environment = _into_sandbox(job_id, storage, sandbox, command, marker)
        else:
            argv = tuple(command) or (os.environ.get("SHELL") or "/bin/sh",)
            environment = {**(_of(storage, os.environ) if storage else os.environ), MARKER: marker}
        return attached(argv, environment, notes, ask_by=signal.SIGHUP, leaves_interrupts=True)


def _of(storage: PodmanStorage, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which ``podman`` is about the job's own store."""
    return storage.environment({name: value for name, value in environment.items() if name not in ELSEWHERE})


def _into_sandbox(
    job_id: str, storage: PodmanStorage | None, sandbox: str, command: Sequence[str], marker: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Command and environment of the Podman that goes into it."""
    where = f"{host_name()} (runtime job {job_id})"
    if storage is None:
        raise NotRunning(f"runtime job {job_id} has no Podman storage on {host_name()}: it is starting, or ending")
    environment = _of(storage, os.environ)
    answer = run(("podman", "ps", "--format", "json"), timeout_s=PODMAN_S, environment=environment)
    if not answer.ok:
        raise EnvironmentProblem(f"podman ps on {where}: {answer.complaint}")
    containers = [with_claim(container, storage.graphroot) for container in parse_containers(answer.stdout)]
    container = chosen(containers, sandbox, where)
    log.debug("sandbox %s is container %s", container, container.container_id)
    options = ["--interactive", *(["--tty"] if os.isatty(0) and os.isatty(1) else []), f"--env={MARKER}={marker}"]
    return ("podman", "exec", *options, container.container_id, *(command or ANY_SHELL)), environment
