"""The commands of the document that this suite grew from, typed as they stand there, on the real cluster.

What they are typed at is a user's own: paths are those of the test's user, and registries are a local one that the
node's registries.conf names as their mirror. ``docs/seed.md`` has a row for each.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser
from tests.runs import Run, parse_report, until
from tests.runtime import local_registry, podman_service
from tests.runtime.commands import IMAGE
from tests.terminals import INTERRUPT, Terminal, terminal

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

CPU_NODES = ("cpu-a", "cpu-b")
SANDBOX_IMAGE = "ghcr.io/opendevin/sandbox:main"
# FASRC's docker is Podman under another name, as Debian's package podman-docker has it.
DOCKER = '#!/bin/sh\nexec podman "$@"\n'
CONTAINERS_CONF = '[engine]\ncgroup_manager="cgroupfs"\nevents_logger="file"\nruntime="runc"\n'


@pytest.fixture(autouse=True)
def clean(nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


@dataclass(frozen=True)
class Site:
    """What a user finds on the cluster: the checkout, and an environment with the site's containers."""

    user: OrdinaryUser
    checkout: Path
    environment: Mapping[str, str]

    def terminal(self, command: str) -> contextlib.AbstractContextManager[Terminal]:
        """The user's terminal, in the checkout."""
        return terminal(self.user, command, self.checkout, self.environment)


def push(podman: podman_service.Service, target: str, *lines: str) -> None:
    """Put an image that is made of busybox into a registry."""
    dockerfile = podman.home / "t" / "Dockerfile"
    dockerfile.write_text("\n".join((f"FROM {IMAGE}", *lines, "")))
    podman.podman("build", "--quiet", "--tag", target, "--file", str(dockerfile), str(dockerfile.parent))
    podman.podman("push", "--quiet", target)


@contextlib.contextmanager
def mirror(user: OrdinaryUser, home: Path) -> Iterator[str]:
    """A registry with the images that the seed names; yields the registries.conf of a site that mirrors them."""
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(local_registry.registry(home, test_cluster.LOGIN))
        with podman_service.running(pwd.getpwnam(user.name), local_registry.registries_conf(served.name)) as podman:
            push(podman, f"{served.name}/{SANDBOX_IMAGE.partition('/')[2]}")
            push(podman, f"{served.name}/library/hello-world:latest", 'CMD ["echo", "Hello from Docker!"]')
        mirrors = {"ghcr.io": served.name, "docker.io": served.name}
        yield local_registry.registries_conf(mirrors=mirrors)


@pytest.fixture(scope="module")
def site(user: OrdinaryUser, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site: its docker is Podman, its registries are mirrored, and each CPU node has a /tmp of its own."""
    if lacks := local_registry.missing() or podman_service.missing():
        pytest.skip(f"this machine lacks {lacks}")
    folder = user.home / "seed-site"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("bin", *CPU_NODES):
        (folder / part).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        registries = stack.enter_context(mirror(user, tmp_path_factory.mktemp("registry")))
        files = {"bin/docker": DOCKER, "containers.conf": CONTAINERS_CONF, "registries.conf": registries}
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "bin" / "docker").chmod(0o755)
        for node in CPU_NODES:
            (folder / node).chmod(0o1777)
            stack.enter_context(test_cluster.mounted(node, Path("/tmp"), "--bind", str(folder / node)))
        os.chown(folder, user.uid, user.gid)
        yield Site(
            user,
            checkout,
            {
                "PATH": f"{folder}/bin:{user.environment['PATH']}",
                "CONTAINERS_CONF": str(folder / "containers.conf"),
                "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
                "XDG_DATA_HOME": "/tmp/data",  # a home that nodes share holds no store of a node's
            },
        )


PODMAN = """podman system service unix:///tmp/podman.sock --time=0 &
export DOCKER_HOST=unix:///tmp/podman.sock"""
SERVER = """python -m slurm_runtime.api_server \\
    --container-image ghcr.io/opendevin/sandbox:main \\
    --host 0.0.0.0 \\
    --port 8000 \\
    --verbose
"""


SANDBOX = """curl -H "X-API-Key: $key" -H "Content-Type: application/json" http://$(hostname):8000/start -d '{
    "session_id": "by-hand", "working_dir": "/", "image": "ghcr.io/opendevin/sandbox:main",
    "command": ["/bin/sh", "-c", "mkdir -p /w; echo ok > /w/health; exec httpd -f -p 60000 -h /w"]}'"""
# What a cluster ends by the job's cgroup, which the one of the tests has not.
END_PODMAN = "kill %1; wait; podman system migrate"


def allocation(node: Terminal) -> str:
    """The id of the job that a terminal's shell is in."""
    return node.does("echo job=$SLURM_JOB_ID").rpartition("\njob=")[2].split()[0]


def test_the_prerequisites_and_the_runtime_server_standalone(site: Site) -> None:
    command = "srun -p test --cpus-per-task=8 --mem=32G --time=1:00:00 --pty bash"
    with site.terminal(command) as node:
        node.does(PODMAN)
        assert "Hello from Docker!" in node.does("docker run --rm hello-world")
        node.does("podman pull ghcr.io/opendevin/sandbox:main")
        assert "CONTAINER ID" in node.does("docker ps")
        node.does("source .venv/bin/activate")
        assert "--container-image" in node.does("python -m slurm_runtime.api_server --help")
        job = allocation(node)
        node.type(SERVER)
        key_file = node.awaits(r"(?m)^(/\S+)$")[1]
        with site.terminal(f"srun --jobid={job} --overlap --pty bash") as other:
            until("its Podman", lambda: '"connected"' in other.does("curl http://$(hostname):8000/health"), 30)
            other.does(f"key=$(cat {key_file})")
            assert '"total":0' in other.does('curl -H "X-API-Key: $key" http://$(hostname):8000/list')
            assert "401" in other.does("curl -o /dev/null -w '%{http_code}' http://$(hostname):8000/list")
            assert '"status":"running"' in other.does(SANDBOX)
            assert '"total":1' in other.does('curl -H "X-API-Key: $key" http://$(hostname):8000/list')
            other.leave()
        node.type(INTERRUPT)
        node.awaits("stopped; nothing is left")
        assert "by-hand" not in node.does("docker ps --all --no-trunc --format '{{.Labels}}'")
        node.does(END_PODMAN)
        node.leave()


# --- runs, as they are launched and watched --------------------------------------------------------------------------

# dev.conf leaves both to the environment: an image that needs no registry, and a trainer that needs no model.
SMALL = {
    "CONTAINER_IMAGE": "localhost/skyrl-busybox:latest",
    "TRAINING_COMMAND": 'env; echo trainer started; until [ -e "$SKYRL_COORD_DIR/go" ]; do sleep 0.1; done',
}
DRY_RUN = "./slurm/launch.sh --config dev --dry-run"
LAUNCH = "./slurm/launch.sh --config dev"
PRODUCTION = (
    "./slurm/launch.sh --config production --set GPU_PARTITION=gpu_test --set CPU_PARTITION=test --set GPU_NODES=2"
)


@dataclass(frozen=True)
class Login:
    """A user's shell on the login host, in the checkout."""

    user: OrdinaryUser
    checkout: Path

    def does(self, script: str, **environment: str) -> str:
        """Run lines of bash; what they print. They have to succeed."""
        given = {**SMALL, **environment}
        done = self.user.run(["bash", "-ec", script], cwd=self.checkout, env=given, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launches(self, script: str, **environment: str) -> Run:
        return parse_report(self.user, self.does(script, **environment))

    def finishes(self, run: Run) -> None:
        """Let the trainer end, and wait for both jobs."""
        (run.directory / "go").touch()
        run.wait_over(seconds=60)
        assert run.completion["exit_code"] == 0, run.log("training")


@pytest.fixture
def login(user: OrdinaryUser, checkout: Path) -> Login:
    # A new cluster counts its jobs from 1 again; and the folders of results are to be made by a run.
    user.run(["rm", "-rf", str(user.home / ".skyrl_jobs"), str(user.home / "skyrl")])
    return Login(user, checkout)


def test_a_launch_and_all_that_watches_it(login: Login) -> None:
    planned = login.does(DRY_RUN)
    assert "--job-name=skyrl-runtime" in planned and "--job-name=skyrl-train" in planned
    assert not login.does("squeue -h -u $USER").strip() and not login.does("ls -A ~ | grep skyrl_jobs || true")
    run = login.launches(LAUNCH)
    run.wait_for_text("training", "trainer started", 60)
    runtime, training = run.jobs["runtime"], run.jobs["training"]
    for question in ("squeue -u $USER", f"squeue -j {runtime},{training}"):
        assert {runtime, training} <= set(login.does(question).split()), question
    directory = run.directory
    for kind in run.jobs:
        tail = login.does(f"timeout 6 tail -f {directory}/{kind}_*.out || test $? = 124").splitlines()
        assert len(tail) >= 10 and set(tail[:-1]) <= set(run.log(kind).splitlines()), kind  # the last may be cut off
    assert directory.name in login.does("ls -lt ~/.skyrl_jobs/ | head")
    assert login.does(f"cat {directory}/runtime_*.err") == run.log("runtime", "err")
    assert "[ERROR]" not in run.log("runtime", "err")
    url = login.does(f"cat {directory}/runtime_url.txt").strip()
    assert f'"job_id": "{runtime}"' in login.does(f"cat {directory}/runtime_ready.flag")
    key = login.does(f"cat {directory}/runtime_api_key.txt").strip()
    assert '"ok"' in login.does(f'curl -H "X-API-Key: {key}" {url}/health')
    assert "gpu_test" in login.does("sinfo -p test,gpu_test")
    names = {path.name for path in directory.iterdir()}
    logs = {f"{kind}_{number}.{end}" for kind, number in run.jobs.items() for end in ("out", "err")}
    flags = {"runtime_url.txt", "runtime_api_key.txt", "runtime_ready.flag", "dev.conf"}
    assert names >= logs | flags
    login.finishes(run)
    assert (directory / "training_complete.flag").exists()
    login.does("ls -d ~/skyrl/ckpts/skyrl-dev ~/skyrl/rollouts/skyrl-dev/train ~/skyrl/rollouts/skyrl-dev/val")


def test_a_runtime_alone_and_a_training_that_joins_it_by_address(login: Login) -> None:
    runtime = login.launches(f"{LAUNCH} --runtime-only", RUNTIME_PORT="8000")
    until("ready", lambda: runtime.text("runtime_ready.flag"), 60)
    address = runtime.text("runtime_url.txt").strip()
    assert address.endswith(":8000")
    export = f"export ALLHANDS_API_KEY=$(cat {runtime.directory}/runtime_api_key.txt)"
    training = login.launches(f"{export}; {LAUNCH} --runtime-url {address}")
    training.wait_for_text("training", "trainer started", 60)
    assert f"SANDBOX_REMOTE_RUNTIME_API_URL={address}" in training.log("training")
    login.finishes(training)
    assert not runtime.is_over("runtime")
    login.does(f"touch {runtime.directory}/training_complete.flag")
    runtime.wait_over(seconds=30)


SCALED = """source "$SKYRL_CONFIG_DIR/dev.conf"
SKYRL_DEBUG=1
GPUS_PER_NODE=8
MAX_PARALLEL_AGENTS=8
ROLLOUT_N=8
TRAIN_BATCH_SIZE=16
FI_PROVIDER="efa"
SKYRL_LD_LIBRARY_PATH_EXPORT=1
"""


def test_production_debugged_and_a_configuration_that_is_scaled_up(login: Login) -> None:
    """Production has four nodes; the cluster of the tests has two with GPUs, so that is said as well."""
    large = login.launches(f"export SKYRL_DEBUG=1\n{PRODUCTION}")
    file = login.user.home / "scaled.conf"
    file.write_text(SCALED)
    scaled = login.launches(f"./slurm/launch.sh --config {file}")
    for run, nodes in ((large, 2), (scaled, 1)):
        run.wait_for_text("training", "trainer started", 90)
        shown = login.does(f"scontrol show job {run.jobs['training']}")
        assert f"NumNodes={nodes}" in shown and re.search(r"TresPerNode=\S*gpu:8\b", shown), shown
        assert "[DEBUG]" in run.log("runtime") and re.search(r"\[DEBUG\] ran .* scontrol", run.log("training"))
        assert "SKYRL_DEBUG=1" in run.log("training").splitlines()
        login.finishes(run)
    assert "FI_PROVIDER=efa" in scaled.log("training").splitlines()


@pytest.mark.parametrize("suffix", ["sbatch", "py"])
def test_job_files_by_the_names_of_the_seed(login: Login, jobs_base: Path, suffix: str) -> None:
    def submitted(words: str) -> str:
        return login.does(f"cd {jobs_base} && sbatch --parsable {words}").strip()

    jobs = login.checkout / "slurm" / "jobs"
    runtime = submitted(f"-p test {jobs}/runtime_server.{suffix} --config dev --set CPUS_PER_WORKER=0.1")
    log = jobs_base / f"slurm-{runtime}.out"
    until("its directory", lambda: log.exists() and "coordination directory: " in log.read_text(), 60)
    found = re.search(r"coordination directory: (\S+)", log.read_text())
    assert found
    options = f"-p gpu_test --gres=gpu:2 {jobs}/verl_training.{suffix} --config dev --coord-dir {found[1]}"
    run = Run(login.user, Path(found[1]), {"runtime": runtime, "training": submitted(options)})
    run.wait_for_text("training", "trainer started", 60)
    login.finishes(run)


# --- the training's side by hand -------------------------------------------------------------------------------------

PYPROJECT = """[project]
name = "skyrl-agent"
version = "0"
requires-python = ">=3.10"
[tool.uv]
package = false
"""
IMPORT = "uv run --frozen python -c \"from skyrl_agent import *; print('Import OK')\""


def test_the_training_script_by_hand(site: Site) -> None:
    """In a skyrl-agent of one module, by the real uv."""
    agent = site.user.home / "seed-agent"
    shutil.rmtree(agent, ignore_errors=True)
    (agent / "skyrl_agent").mkdir(parents=True)
    (agent / "pyproject.toml").write_text(PYPROJECT)
    (agent / "skyrl_agent" / "__init__.py").write_text('print("on", __import__("socket").gethostname())\n')
    for path in (agent, *agent.rglob("*")):
        os.chown(path, site.user.uid, site.user.gid)
    command = "srun -p gpu_test --gres=gpu:1 --cpus-per-task=8 --mem=32G --time=1:00:00 --pty bash"
    with site.terminal(command) as node:
        node.does(f"export PATH={site.checkout}/.venv/bin:$PATH UV_OFFLINE=1 UV_CACHE_DIR={agent}/.uv TMPDIR={agent}")
        node.does(f"cd {agent} && uv lock")
        node.does('export SANDBOX_REMOTE_RUNTIME_API_URL="http://runtime-host:8000" ALLHANDS_API_KEY="test-key"')
        said = node.does(IMPORT)
        assert re.search(r"^on gpu-[ab]\nImport OK$", said, re.M), said
        assert re.search(r"^0$", node.does("echo $CUDA_VISIBLE_DEVICES"), re.M)
        node.leave()
