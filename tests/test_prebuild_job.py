"""The prebuild job on the real test cluster: a real registry that its node reaches, and a run from its archives."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pyarrow  # type: ignore[import-untyped]  # it brings no types
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from slurm_runtime.references import archive_name
from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser
from tests.runs import Run, launch, until
from tests.runtime import local_registry, podman_service
from tests.runtime.commands import SERVE
from tests.runtime.local_registry import PASSWORD, USER, Registry, push_new, registries_conf, registry
from tests.test_no_leaks import shows

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

UPSTREAM = "localhost:1"  # where nobody listens; the registry is its mirror
NAMES = [f"owner__repo-{number}" for number in range(3)]


@pytest.fixture(autouse=True)
def clean(nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


def image(name: str) -> str:
    return f"{UPSTREAM}/x/sweb.eval.x86_64.{name.replace('__', '_s_')}:latest"


@contextlib.contextmanager
def filled_registry(home: Path, login: bool = False) -> Iterator[Registry]:
    """A registry on the cluster's own network."""
    with registry(home, test_cluster.LOGIN, login=login) as served:
        yield served


@pytest.fixture(scope="module")
def data(user: OrdinaryUser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's folder with the images of the data set in it."""
    if lacks := local_registry.missing() or podman_service.missing():
        pytest.skip(f"this machine lacks {lacks}")
    home = tmp_path_factory.mktemp("registry")
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(filled_registry(home))
        owner = pwd.getpwnam(user.name)
        podman = stack.enter_context(podman_service.running(owner, registries_conf(served.name)))
        for name in NAMES:
            push_new(podman, image(name).replace(UPSTREAM, served.name))
    return home


@pytest.fixture
def dataset(user: OrdinaryUser, jobs_base: Path) -> Path:
    path = jobs_base / "train.parquet"
    rows = [{"data_source": "swe-gym", "instance": {"instance_id": name}} for name in NAMES]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    os.chown(path, user.uid, user.gid)
    return path


class Prebuild:
    """A submitted prebuild job."""

    def __init__(self, user: OrdinaryUser, checkout: Path, base: Path, environment: Mapping[str, str]) -> None:
        self.user, self.base = user, base
        self.archives = base / ".cache" / "images"
        given = {"SKYRL_JOBS_BASE": str(base), "IMAGE_PREFIX": f"{UPSTREAM}/x/", **environment}
        script = checkout / "slurm" / "jobs" / "prebuild_images.py"
        done = user.run(["sbatch", "--parsable", "--cpus-per-task=2", str(script)], cwd=base, env=given)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()
        self.run = Run(user, base, {"prebuild": self.id})

    def log(self) -> str:
        path = self.base / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, seconds: float = 60) -> int:
        self.run.wait_over("prebuild", seconds=seconds)
        return int(self.run.exit_code("prebuild"))

    def report(self) -> dict[str, Any]:
        path = self.archives / "train.json"
        return dict(json.loads(path.read_text())) if path.exists() else {"counts": {"fetched": 0}}

    def storage(self) -> Path:
        return Path(f"/tmp/skyrl-{self.user.uid}-{self.id}")


MakeJob = Callable[..., Prebuild]


@pytest.fixture
def job(user: OrdinaryUser, checkout: Path, jobs_base: Path, dataset: Path) -> MakeJob:
    def make(served: Registry | None, **environment: str) -> Prebuild:
        mirrors = {"REGISTRY_MIRRORS": f"{UPSTREAM}=http://{served.name}"} if served else {}
        return Prebuild(user, checkout, jobs_base, {"DATASET_PATH": str(dataset), **mirrors, **environment})

    return make


def run_with_a_sandbox(user: OrdinaryUser, checkout: Path, jobs_base: Path, *settings: str) -> Run:
    """A run in which a sandbox starts from an image of the data set; it is over afterwards."""
    run = launch(user, checkout, jobs_base, "TRAINING_COMMAND=sleep 300", *settings)
    until("ready", lambda: run.text("runtime_ready.flag"), 60)
    headers = {"X-API-Key": run.text("runtime_api_key.txt").strip()}
    body = {"image": image(NAMES[1]), "command": SERVE, "session_id": "s"}
    url = f"{run.text('runtime_url.txt').strip()}/start"
    answer = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 201, answer.text
    user.run(["scancel", *run.jobs.values()])
    run.wait_over(seconds=30)
    return run


def test_archives_of_all_images_and_a_run_without_the_registry(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, data: Path, job: MakeJob
) -> None:
    with filled_registry(data) as served:
        done = job(served, MAX_WORKERS="3")
        assert done.wait() == 0, done.log()
        assert done.report()["counts"] == {"fetched": 3, "here": 0, "failed": 0, "missing": 0}
        assert "[3/3]" in done.log()
        assert {path.name for path in done.archives.iterdir()} == {*map(archive_name, map(image, NAMES)), "train.json"}
        again = job(served)
        assert again.wait() == 0, again.log()
        assert again.report()["counts"]["here"] == 3
        forced = job(served, FORCE_REBUILD="true")
        assert forced.wait() == 0, forced.log()
        assert forced.report()["counts"]["fetched"] == 3
    run_with_a_sandbox(user, checkout, jobs_base)


def test_a_cancelled_job_leaves_nothing_and_the_next_goes_on(data: Path, job: MakeJob, user: OrdinaryUser) -> None:
    with filled_registry(data) as served:
        begun = job(served, MAX_WORKERS="1")
        until("the first image", lambda: begun.report()["counts"]["fetched"] >= 1, 60)
        user.run(["scancel", begun.id])
        begun.run.wait_over("prebuild", seconds=20)
        assert not begun.storage().exists()
        assert not list(begun.archives.glob(".part-*"))
        there = begun.report()["counts"]["fetched"]
        resumed = job(served)
        assert resumed.wait() == 0, resumed.log()
        assert resumed.report()["counts"] == {"fetched": 3 - there, "here": there, "failed": 0, "missing": 0}


def test_a_job_killed_at_once_leaves_nothing(data: Path, job: MakeJob, user: OrdinaryUser) -> None:
    """The body alone is killed, as the kernel does for memory; the guardian ends what it owned."""
    with filled_registry(data) as served:
        begun = job(served, MAX_WORKERS="1")
        until("its work", lambda: "images; Podman" in begun.log(), 60)
        body = [pid for pid, words in user.processes().items() if "prebuild_images.py" in words]
        assert len(body) == 1
        for pid in body:
            os.kill(pid, signal.SIGKILL)
        begun.run.wait_over("prebuild", seconds=20)
        until("the storage to go", lambda: not begun.storage().exists(), 20)


def test_all_mistakes_are_reported_together_before_any_work(job: MakeJob, jobs_base: Path) -> None:
    wrong = {"MAX_WORKERS": "many", "FORCE_REBUILD": "perhaps", "IMAGE_ARCHIVES": "/proc/archives"}
    begun = job(None, DATASET_PATH="/nonesuch.parquet", REGISTRY_MIRRORS="docker.io", **wrong)
    assert begun.wait() == 2
    found = [f"{name}={value}" for name, value in {**wrong, "REGISTRY_MIRRORS": "docker.io"}.items()]
    for words in (*found, "DATASET_PATH=/nonesuch.parquet"):
        assert words in begun.log()
    assert "Traceback" not in begun.log()


def test_without_a_dataset_it_says_so(job: MakeJob) -> None:
    begun = job(None, DATASET_PATH="")
    assert begun.wait() == 2
    assert "DATASET_PATH is not set: name the data set" in begun.log()


def test_what_the_registry_lacks_is_69(data: Path, job: MakeJob) -> None:
    lacking = data.parent / "lacking"
    shutil.copytree(data / "data", lacking / "data")
    with filled_registry(lacking) as served:
        shutil.rmtree(next((lacking / "data").rglob("sweb.eval.x86_64.owner_s_repo-2")))
        begun = job(served)
        assert begun.wait() == 69
    assert begun.report()["counts"] == {"fetched": 2, "here": 0, "failed": 1, "missing": 0}


@contextlib.contextmanager
def logins_for(user: OrdinaryUser, served: Registry) -> Iterator[Path]:
    """What ``podman login --authfile FILE`` writes."""
    path = user.home / "auth.json"
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    path.write_text(json.dumps({"auths": {served.name: {"auth": auth}}}))
    os.chown(path, user.uid, user.gid)
    path.chmod(0o600)
    try:
        yield path
    finally:
        path.unlink()


def test_logins_and_mirrors_of_a_run(user: OrdinaryUser, checkout: Path, jobs_base: Path, data: Path) -> None:
    with filled_registry(data, login=True) as served, logins_for(user, served) as logins:
        settings = (f"REGISTRY_AUTH_FILE={logins}", f"REGISTRY_MIRRORS={UPSTREAM}=http://{served.name}")
        run = run_with_a_sandbox(user, checkout, jobs_base, *settings)
    text = "".join(path.read_text(errors="replace") for path in run.directory.iterdir() if path.is_file())
    assert not shows(text.encode(), PASSWORD)


def test_a_login_on_shared_storage_opens_a_registry(data: Path, job: MakeJob, user: OrdinaryUser) -> None:
    """Both forms of REGISTRY_MIRRORS: the registry as a mirror, and itself by plain HTTP."""
    with filled_registry(data, login=True) as served, logins_for(user, served) as logins:
        refused = job(served)
        assert refused.wait() == 69
        assert "podman login --authfile" in refused.log()
        opened = job(served, REGISTRY_AUTH_FILE=str(logins))
        assert opened.wait() == 0, opened.log()
        itself = {"IMAGE_PREFIX": f"{served.name}/x/", "REGISTRY_MIRRORS": f"{served.name}=http://{served.name}"}
        direct = job(None, REGISTRY_AUTH_FILE=str(logins), SKYRL_DEBUG="1", **itself)
        assert direct.wait() == 0, direct.log()
    assert not shows((refused.log() + opened.log() + direct.log()).encode(), PASSWORD)
