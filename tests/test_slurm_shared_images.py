"""A run on several nodes, its image from a registry: pulled once, left for the other nodes, gone with the run."""

from __future__ import annotations

import contextlib
import pwd
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from slurm_runtime.references import archive_name
from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser
from tests.runs import Run, launch, until
from tests.runtime import local_registry, podman_service
from tests.runtime.commands import SERVE
from tests.runtime.local_registry import Registry, push_new, registries_conf, registry

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

UPSTREAM = "localhost:1"  # where nobody listens; the registry is its mirror
NAME = "x/for-all"
IMAGE = f"{UPSTREAM}/{NAME}:1"


@pytest.fixture
def served(user: OrdinaryUser, tmp_path: Path) -> Iterator[Registry]:
    """A registry on the cluster's own network with the image in it."""
    if lacks := local_registry.missing() or podman_service.missing():
        pytest.skip(f"this machine lacks {lacks}")
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(registry(tmp_path / "registry", test_cluster.LOGIN))
        with podman_service.running(pwd.getpwnam(user.name), registries_conf(made.name)) as podman:
            push_new(podman, f"{made.name}/{NAME}:1")
        yield made


TRAINS = 'TRAINING_COMMAND=until [ -e "$SKYRL_COORD_DIR/go" ]; do sleep 0.2; done'


def start(run: Run, session: str) -> None:
    headers = {"X-API-Key": run.text("runtime_api_key.txt").strip()}
    body = {"image": IMAGE, "command": SERVE, "session_id": session}
    url = f"{run.text('runtime_url.txt').strip()}/start"
    answer = httpx.post(url, json=body, headers=headers, timeout=120, trust_env=False)
    assert answer.status_code == 201, answer.text


def test_two_nodes_of_a_run_pull_an_image_once_and_leave_it_as_long_as_the_run_lasts(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, served: Registry, nothing_left: Callable[[], None]
) -> None:
    mirror = f"REGISTRY_MIRRORS={UPSTREAM}=http://{served.name}"
    slots = (
        "RUNTIME_NODES=2",
        "RUNTIME_DRAIN_LEAD=9",
        "CPUS_FOR_RUNTIME=60",
        "CPUS_PER_WORKER=30",
        "RUNTIME_MIN_SLOTS=4",
    )
    run = launch(user, checkout, jobs_base, TRAINS, *slots, mirror)
    until("ready", lambda: run.text("runtime_ready.flag"), 90)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: start(run, f"s-{number}"), range(4)))
    headers = {"X-API-Key": run.text("runtime_api_key.txt").strip()}
    url = f"{run.text('runtime_url.txt').strip()}/nodes"
    told = httpx.get(url, headers=headers, timeout=30, trust_env=False).json()["nodes"]
    assert [node["used"] for node in told] == [2, 2], told
    assert served.requests("manifests", NAME) == 1
    assert served.requests("blobs", NAME) <= 3, "a configuration and two layers"
    assert (run.directory / "images" / archive_name(IMAGE)).is_file()
    (run.directory / "go").touch()
    run.wait_over(seconds=60)
    assert not (run.directory / "images").exists()
