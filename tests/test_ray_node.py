"""One node's part with the real Ray, without Slurm: it ends in order, and leaves nothing however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.lib.ray_node import NodeSpec, parse_announcement
from slurm.lib.ray_ports import PortBlock, blocks, taken_port
from tests.ray_environment import ray_python
from tests.runs import until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[1]
START_S, END_S = 90.0, 20.0
PORTS = (24000, 25999)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short folder, which must be empty at the end."""
    folder = Path(f"/tmp/r{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        until("an empty folder", lambda: not list(folder.iterdir()), END_S)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


@contextlib.contextmanager
def node(spec: NodeSpec, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node's part as its step would run it; the caller ends it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    argv = [sys.executable, "-m", "slurm.lib.ray_node", spec.to_text()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def spec_of(job_id: str, scratch: Path, tmp_path: Path) -> NodeSpec:
    python = (str(ray_python()),)
    announce = str(tmp_path / f"head{job_id}.json")
    return NodeSpec(
        job_id, "here", 0, python, cpus=1, gpus=2, announce=announce, ports=PORTS, scratch=str(scratch), grace_s=5.0
    )


def address(spec: NodeSpec) -> str:
    path = Path(spec.announce)
    found = parse_announcement(path.read_text() if path.exists() else None, spec.job_id)
    return found.address if found else ""


def processes_below(folder: Path) -> list[int]:
    """The processes whose command line names the folder: Ray's all name their session in it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{folder}/".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("end", ["stdin", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_however_it_ends(end: str, scratch: Path, tmp_path: Path) -> None:
    spec, log = spec_of("1", scratch, tmp_path), tmp_path / "log"
    with node(spec, log) as process:
        until("the head", lambda: address(spec) or process.poll() is not None, START_S)
        assert process.poll() is None, log.read_text()
        assert len(processes_below(scratch)) >= 3
        if end == "stdin":
            assert process.stdin
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[end])
        assert process.wait(END_S) == {"stdin": 0, "SIGTERM": 143, "SIGKILL": -9}[end], log.read_text()
        until("the end of all processes", lambda: not processes_below(scratch), END_S)
    assert all(taken_port(block.ports) is None for block in blocks("1", range(PORTS[0], PORTS[1] + 1)))


def test_two_runs_on_one_node_do_not_meet_and_a_taken_port_is_passed_over(scratch: Path, tmp_path: Path) -> None:
    """The second run's first block is the first one's, its second has a port that a stranger listens on."""
    first, second = spec_of("1", scratch, tmp_path), spec_of("5", scratch, tmp_path)
    tried = blocks("1", range(PORTS[0], PORTS[1] + 1))
    assert tried == blocks("5", range(PORTS[0], PORTS[1] + 1))
    with socket.socket() as stranger:
        stranger.bind(("", tried[1].node_manager))
        stranger.listen()
        with node(first, tmp_path / "log1") as one, node(second, tmp_path / "log2") as two:
            for spec in (first, second):
                until("both heads", lambda spec=spec: address(spec), START_S)  # type: ignore[misc]
            found = {PortBlock(int(address(spec).rpartition(":")[2]) - 1) for spec in (first, second)}
            assert found == {tried[0], tried[2]}
            text = (tmp_path / "log1").read_text() + (tmp_path / "log2").read_text()
            assert re.search(rf"port {tried[0].first} of the block .* is taken", text)
            assert re.search(rf"port {tried[1].node_manager} of the block .* is taken", text)
            for process in (one, two):
                process.communicate(timeout=END_S)
            assert [one.returncode, two.returncode] == [0, 0], text


@pytest.mark.parametrize(("integers", "found"), [(True, "0,1"), (False, "MIG-a,MIG-b")])
def test_workers_find_a_nodes_slices_as_their_vllm_reads_them(
    integers: bool, found: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program in Ray's place that tells what it was started with."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    teller = tmp_path / "teller"
    teller.write_text('#!/bin/sh\necho "devices: $CUDA_VISIBLE_DEVICES."\nexit 3\n')
    teller.chmod(0o755)
    spec = replace(spec_of("1", scratch, tmp_path), python=(str(teller),), integer_devices=integers)
    with node(spec, tmp_path / "log") as process:
        assert process.wait(START_S) == 71
    assert f"devices: {found}." in (tmp_path / "log").read_text()


def test_a_python_without_ray_is_an_error_with_its_words(scratch: Path, tmp_path: Path) -> None:
    python = ("/usr/bin/env", "-i", sys.executable, "-S")
    spec = replace(spec_of("1", scratch, tmp_path), python=python)
    with node(spec, tmp_path / "log") as process:
        assert process.wait(START_S) == 71
    text = (tmp_path / "log").read_text()
    assert "No module named" in text
    assert "Ray on here has ended by itself with exit code 1" in text
