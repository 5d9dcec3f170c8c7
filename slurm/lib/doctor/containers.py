"""Containers on this node, really started: does one run, do its limits bite, is its published port to be reached?

They are of our own small image and lie in a store of their own, as a job's do; nothing of it outlives the block.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.lib.doctor.facts import Limit, Sandboxes, Trial
from slurm.lib.errors import EnvironmentProblem, SuiteError
from slurm.lib.guardian import guarded
from slurm.lib.images import BUSYBOX_IMAGE, busybox_archive
from slurm.lib.podman_storage import PodmanStorage, podman_storage
from slurm.lib.processes import Completed, run

COMMAND_S = 45.0  # one command of Podman's; a node's first rootless start can take many seconds
PAGE_S, REACH_S = 20.0, 10.0  # until a container serves its page, and for one connection to it
MIB = 1024**2
GIVEN_MIB, TAKEN_MIB = 48, 160  # what a container may have of memory, and what it takes
GIVEN_PIDS, TAKEN_PIDS = 8, 24
PAGE_PORT = 8000
ROOT_LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")  # what a small container needs
DONE = "all of it"
# Busybox's tail keeps in memory what it is to print.
TAKE_MEMORY = f"head -c {TAKEN_MIB}m /dev/zero | tail -c {TAKEN_MIB}m | wc -c"
TAKE_PIDS = f"for n in $(seq {TAKEN_PIDS}); do sleep 2 & done; echo {DONE}"
SERVE = "mkdir /tmp/www; echo {token} > /tmp/www/index.html; exec httpd -f -p {port} -h /tmp/www"


@dataclass(frozen=True)
class _Podman:
    """Podman's commands on the store; ``check`` raises to end one early."""

    storage: PodmanStorage
    environment: Mapping[str, str]
    check: Callable[[], None]

    def __call__(self, *words: str) -> Completed:
        argv = ("podman", *words)
        try:
            return run(argv, timeout_s=COMMAND_S, environment=self.environment, check=self.check)
        except SuiteError as problem:
            return Completed(argv, 124, "", str(problem))

    def in_container(self, script: str, *options: str) -> Completed:
        """What a shell in a container of our image prints."""
        return self.run("--rm", "--network=none", *options, script=script)

    def run(self, *options: str, script: str) -> Completed:
        """A container of our image; root's would have more of ulimit than a job may give it."""
        limits = () if os.geteuid() else ROOT_LIMITS
        return self("run", *limits, *options, BUSYBOX_IMAGE, "sh", "-c", script)


@contextlib.contextmanager
def tried(
    found: Sandboxes, base: Path, code: Path, job_id: str, environment: Mapping[str, str], check: Callable[[], None]
) -> Iterator[Sandboxes]:
    """``found`` with what containers have shown; one with a published port runs for the length of the block.

    Nothing is started where Podman, a range of ids or a folder for the store is missing.
    """
    if found.absent or found.lacking or not found.scratch:
        yield found
        return
    with guarded(code) as guardian, contextlib.ExitStack() as stack:
        try:
            storage = stack.enter_context(
                podman_storage(Path(found.scratch), job_id, [], announce=guardian.own_storage)
            )
        except EnvironmentProblem as problem:
            yield replace(found, info_problem=str(problem))
            return
        yield _try(found, _Podman(storage, storage.environment(environment), check), base, code)


def _try(found: Sandboxes, podman: _Podman, base: Path, code: Path) -> Sandboxes:
    found = _informed(found, podman("info", "--format", "json"))
    if found.info_problem:
        return found
    found = replace(found, image=_image(podman, base, code))
    if found.image is None or found.image.problem:
        return found
    found = replace(found, hello=_hello(podman))
    if found.hello is None or found.hello.problem:
        return found
    found = replace(found, limits=(_memory_limit(podman), _pids_limit(podman)))
    return _published(found, podman)


def _informed(found: Sandboxes, answer: Completed) -> Sandboxes:
    """What ``podman info`` says."""
    from slurm_runtime.podman import parse_facts  # the API server's own reading of it

    try:
        info = json.loads(answer.stdout) if answer.ok else {}
        facts = parse_facts(info, ())
        return replace(
            found,
            version=facts.version,
            driver=str(info["store"]["graphDriverName"]),
            runtime=str(info["host"]["ociRuntime"]["name"]),
            controllers=tuple(sorted(facts.controllers)),
            cgroups=facts.cgroup_version,
            network=facts.private_network,
        )
    except (ValueError, KeyError, TypeError):
        return replace(found, info_problem=f"podman info: {answer.complaint[:500]}")


def _timed(act: Callable[[], str]) -> Trial:
    """An act and its complaint."""
    begin = time.monotonic()
    problem = act()
    return Trial(time.monotonic() - begin, problem)


def _image(podman: _Podman, base: Path, code: Path) -> Trial:
    def act() -> str:
        try:
            archive = busybox_archive(base, code, podman.check)
        except SuiteError as problem:
            return str(problem)
        answer = podman("load", "--quiet", "--input", str(archive))
        return "" if answer.ok else answer.complaint

    return _timed(act)


def _hello(podman: _Podman) -> Trial:
    def act() -> str:
        answer = podman.in_container("echo hello")
        return "" if answer.ok and answer.stdout.strip() == "hello" else answer.complaint

    return _timed(act)


def _memory_limit(podman: _Podman) -> Limit:
    given = (f"--memory={GIVEN_MIB}m", f"--memory-swap={GIVEN_MIB}m")
    return limit_of("memory", podman.in_container(TAKE_MEMORY, *given), str(TAKEN_MIB * MIB))


def _pids_limit(podman: _Podman) -> Limit:
    return limit_of("pids", podman.in_container(TAKE_PIDS, f"--pids-limit={GIVEN_PIDS}"), DONE)


def limit_of(name: str, answer: Completed, all_of_it: str) -> Limit:
    """Whether a limit bit: the container took more than it was given, and printed ``all_of_it`` if it got that."""
    if answer.returncode in {124, 125, 126, 127}:  # of Podman itself: the container was not started
        return Limit(name, None, answer.complaint)
    return Limit(name, bites=answer.stdout.strip() != all_of_it)


def _published(found: Sandboxes, podman: _Podman) -> Sandboxes:
    """A container that serves a page on a port that Podman chose, until its store goes."""
    token = secrets.token_hex(8)
    script = SERVE.format(token=token, port=PAGE_PORT)
    answer = podman.run("--detach", f"--network={found.network}", f"--publish={PAGE_PORT}", script=script)
    shown = podman("port", answer.stdout.strip(), str(PAGE_PORT)) if answer.ok else answer
    port = shown.stdout.strip().partition("\n")[0].rpartition(":")[2]
    if not shown.ok or not port.isdigit():
        return replace(found, port_problem=shown.complaint)
    problem = _await_page(socket.gethostname(), int(port), token, podman.check)
    return replace(found, port=int(port), token=token, port_problem=problem)


def _await_page(host: str, port: int, token: str, check: Callable[[], None], deadline_s: float = PAGE_S) -> str:
    """Why the page cannot be had on its own node; empty once it can."""
    end = time.monotonic() + deadline_s
    while (problem := reach(host, port, token)) and time.monotonic() < end:
        check()
        time.sleep(0.1)
    return problem


def reach(host: str, port: int, token: str, timeout_s: float = REACH_S) -> str:
    """Why the page of ``token`` cannot be had from here; empty where it can. No proxy is asked."""
    import http.client

    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/index.html")
        text = connection.getresponse().read(200).decode("utf-8", "replace").strip()
        return "" if text == token else f"http://{host}:{port} answers, but not as the container: {text[:80]}"
    except (OSError, http.client.HTTPException) as problem:
        return f"http://{host}:{port}: {getattr(problem, 'strerror', None) or problem}"
    finally:
        connection.close()
