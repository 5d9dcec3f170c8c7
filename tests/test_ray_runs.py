"""Runs on two nodes of a real Slurm with the real Ray: one cluster for each run, whole, and gone with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.ray_ports import DEFAULT_RANGE, blocks
from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser
from tests.ray_environment import ray_python
from tests.runs import Run, User, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.ray]

NODES = ("gpu-a", "gpu-b")
GPUS = 2
START_S, END_S = 150.0, 40.0
LISTEN = (
    "import socket, sys, time; s = socket.create_server(('', int(sys.argv[1]))); print(s, flush=True); time.sleep(999)"
)


@pytest.fixture(autouse=True)
def clean(user: User, nothing_left: Callable[[], None]) -> Iterator[None]:
    """Every test here ends with nothing left on any node, its own disk and its ports included."""
    yield
    nothing_left()
    with contextlib.suppress(AssertionError):
        until("empty disks of the nodes", lambda: not on_disks(), END_S)
    assert on_disks() == []
    for name in NODES:
        listening = subprocess.run(in_node(name, "ss", "-Hltn"), capture_output=True, text=True, check=True).stdout
        ports = [int(port) for port in re.findall(r":(\d+)\s", listening)]
        assert not [port for port in ports if port in DEFAULT_RANGE], listening


def on_disks() -> list[Path]:
    """What lies on the nodes' own disks."""
    return [path for name in NODES for path in test_cluster.disk_of(name).iterdir()]


def in_node(node: str, *argv: str) -> list[str]:
    """A command in a node's network."""
    return ["nsenter", f"--net=/var/run/netns/sk-{node}", *argv]


@dataclass(frozen=True)
class TwoNodes:
    """Launches runs on both GPU nodes."""

    user: OrdinaryUser
    checkout: Path
    jobs_base: Path

    def launch(
        self,
        *more: str,
        hold: bool = False,
        python: Path | None = None,
        no_check: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> Run:
        driver = f"exec {ray_python()} {self.checkout}/tests/ray_driver.py {len(NODES)} {GPUS} {'hold' if hold else ''}"
        settings = (
            f"GPU_NODES={len(NODES)}",
            f"GPUS_PER_NODE={GPUS}",
            "RAY_CLUSTER=on",
            f"RAY_PYTHON={python or ray_python()}",
            f"TRAINING_COMMAND={driver}",
            f"LOCAL_SCRATCH={test_cluster.LOCAL_DISK}",
        )
        options = ("--no-check",) if no_check else ()
        return launch(self.user, self.checkout, self.jobs_base, *settings, *more, options=options, env=env)


@pytest.fixture
def two_nodes(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> TwoNodes:
    return TwoNodes(user, checkout, jobs_base)


def seen(run: Run) -> dict[str, Any]:
    """What the driver found; fails with the run's words if it ended before."""
    until("the driver's word", lambda: "DRIVER" in run.log("training") or run.is_over("training"), START_S)
    found = re.search(r"^DRIVER (.+)$", run.log("training"), re.MULTILINE)
    logs = "\n".join(path.read_text() for path in run.directory.glob("ray_*.log"))
    assert found, f"{run.log('training')[-3000:]}\n{logs[-3000:]}"
    return dict(json.loads(found[1]))


@contextlib.contextmanager
def listener(node: str, port: int) -> Iterator[None]:
    """A stranger that listens on a port of a node."""
    argv = in_node(node, sys.executable, "-c", LISTEN, str(port))
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline()
            yield
        finally:
            process.kill()


def step_pid(run: Run, node: str) -> int:
    """The pid of a node's part of a run's Ray."""
    for pid, words in OrdinaryUser.processes(run.user).items():  # type: ignore[arg-type]  # the user is one
        if "-m slurm.lib.ray_node" in words and f'"job_id": "{run.jobs["training"]}", "node": "{node}"' in words:
            with contextlib.suppress(OSError):
                # srun has the same words; the part itself runs in the node.
                if Path(f"/proc/{pid}/comm").read_text().strip() != "srun":
                    return pid
    raise AssertionError(f"no part on {node}")


def test_the_driver_finds_both_nodes_and_all_gpus(two_nodes: TwoNodes) -> None:
    """Also with a port of the head's first block taken by a stranger; then the next block is used."""
    run = two_nodes.launch()
    first, second = blocks(run.jobs["training"])[:2]
    with listener("gpu-a", first.gcs):
        found = seen(run)
        run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 0, run.log("training")[-3000:]
    assert found["gpus"] == [float(GPUS)] * len(NODES)
    assert found["host"] == "gpu-a"
    assert found["address"] == f"{test_cluster.NODES['gpu-a']}:{second.gcs}"
    hosts = [host for host, _url, _key, _devices in found["workers"]]
    assert hosts == ["gpu-a"] * GPUS + ["gpu-b"] * GPUS
    url, key = run.text("runtime_url.txt").strip(), run.text("runtime_api_key.txt").strip()
    assert {(said, length) for _host, said, length, _devices in found["workers"]} == {(url, str(len(key)))}
    for node in NODES:
        assert {devices for host, _url, _key, devices in found["workers"] if host == node} == {"0", "1"}
    log = run.text(f"ray_{run.jobs['training']}_gpu-a.log")
    assert f"port {first.gcs} of the block {first} is taken on gpu-a; trying the next block" in log
    assert f"ports {first}" in run.text(f"ray_{run.jobs['training']}_gpu-b.log"), "each node chooses for itself"


def test_workers_on_every_node_find_its_slices_as_integers(two_nodes: TwoNodes) -> None:
    """As VERL with vLLM 0.8.5. Slurm's own prolog names slices, which no node here has; `uv` starts the driver."""
    agent, bin_folder = two_nodes.jobs_base / "project/SkyRL/skyrl-agent", two_nodes.jobs_base / "bin"
    (agent / ".venv/lib/python3.12/site-packages/vllm-0.8.5.dist-info").mkdir(parents=True)
    for name in ("pyproject.toml", "uv.lock", "rows.parquet"):
        (agent / name).touch()
    driver = f"{ray_python()} {two_nodes.checkout}/tests/ray_driver.py {len(NODES)} {GPUS}"
    programs = {
        "prolog": 'h=$(hostname); echo "export CUDA_VISIBLE_DEVICES=MIG-$h-0,MIG-$h-1"',
        "srun": f'exec /usr/bin/srun --task-prolog={bin_folder}/prolog "$@"',
        "uv": f"[[ $1 = run ]] && exec {driver}",
    }
    bin_folder.mkdir()
    for name, text in programs.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    data = [f"{key}={agent}/rows.parquet" for key in ("TRAIN_DATA", "VAL_DATA")]
    project = f"SKYRL_PROJECT_ROOT={two_nodes.jobs_base}/project"
    environment = {"PATH": f"{bin_folder}:{two_nodes.user.environment['PATH']}"}
    run = two_nodes.launch("TRAINING_COMMAND=", "TASK_YAML=task.yaml", project, *data, no_check=True, env=environment)
    workers = seen(run)["workers"]
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 0, run.log("training")[-3000:]
    assert sorted((host, devices) for host, _url, _key, devices in workers) == [
        (node, str(number)) for node in NODES for number in range(GPUS)
    ]


def test_a_lost_node_ends_the_run_with_its_name(two_nodes: TwoNodes) -> None:
    run = two_nodes.launch(hold=True)
    seen(run)
    os.kill(step_pid(run, "gpu-b"), signal.SIGKILL)
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 74, run.log("training")[-3000:]
    assert run.completion["reason"].startswith("node gpu-b was lost: its step has ended with exit code")
    assert run.exit_code("training") == "74"


def test_two_runs_on_the_same_nodes_do_not_meet(two_nodes: TwoNodes) -> None:
    """The one is cancelled then, the other's body killed: neither leaves anything."""
    runs = [two_nodes.launch(hold=True) for _ in range(2)]
    found = [seen(run) for run in runs]
    assert found[0]["address"] != found[1]["address"]
    assert [one["gpus"] for one in found] == [[float(GPUS)] * len(NODES)] * 2
    assert len(on_disks()) == len(NODES) * len(runs), "a folder for each run on each node"
    two_nodes.user.run(["scancel", runs[0].jobs["training"]])
    runs[0].wait_over(seconds=END_S)
    assert runs[0].completion["reason"].startswith("ended by SIGTERM")
    assert not runs[1].is_over("training")
    os.kill(body_pid(runs[1]), signal.SIGKILL)
    runs[1].wait_over(seconds=END_S)


def body_pid(run: Run) -> int:
    """The pid of the training job's body."""
    words = f"{run.directory}/code/slurm/jobs/verl_training.py"
    marker = f"SLURM_JOB_ID={run.jobs['training']}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_body = entry.name.isdigit() and words.encode() in (entry / "cmdline").read_bytes()
            if is_body and marker in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
    raise AssertionError("no body of the training job")


@pytest.mark.parametrize(
    ("on_gpu_b", "code", "words"),
    [
        ("exec sleep 600", 75, r"RAY_READY_TIMEOUT=25.*, in vain: gpu-b is not in the cluster"),
        ("echo no Ray here >&2; exit 3", 71, r"Ray on gpu-b: its step has ended with exit code 71.*no Ray here"),
    ],
    ids=["silent", "failing"],
)
def test_a_node_that_does_not_join_is_named(two_nodes: TwoNodes, on_gpu_b: str, code: int, words: str) -> None:
    python = two_nodes.jobs_base / "python"
    python.write_text(f'#!/bin/bash\n[[ $(hostname) != gpu-b ]] || {{ {on_gpu_b}; }}\nexec {ray_python()} "$@"\n')
    python.chmod(0o755)
    run = two_nodes.launch("RAY_READY_TIMEOUT=25", python=python)
    run.wait_over(seconds=START_S)
    assert run.completion["exit_code"] == code, run.log("training")[-3000:]
    assert re.search(words, run.completion["reason"]), run.completion["reason"]
