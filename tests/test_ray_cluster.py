"""What a run's Ray is told, and what is missing of it; real sockets, folders and locks, no Ray."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.locked_folder import LOCK_NAME, remove
from slurm.lib.ray_address import address_of, own_address
from slurm.lib.ray_cluster import (
    SeenNode,
    grace_s,
    head_first,
    missing,
    node_specs,
    parse_seen,
    shared_environment,
    step_environment,
)
from slurm.lib.ray_folder import choose, folder_name, ray_folder, sweep
from slurm.lib.ray_node import Announcement, NodeSpec, node_environment, parse_announcement, start_argv
from slurm.lib.ray_ports import BLOCK_SIZE, DEFAULT_RANGE, PortBlock, blocks, held, taken_port
from slurm.lib.ray_steps import ray_python, wanted
from slurm.lib.scheduler import step_argv
from slurm.lib.settings import Settings, contradictions, gpu_gres, ray_ports

SPEC = NodeSpec(job_id="7", node="gpu-a", rank=0, python=("uv", "run", "python"), cpus=48, gpus=8)


# --- ports -----------------------------------------------------------------------------------------------------------


def test_blocks_lie_side_by_side_within_the_range() -> None:
    found = sorted(block.first for block in blocks("1", range(20000, 22000)))
    assert found == [20000, 20500, 21000, 21500]
    assert all(block.ports[-1] < 32768 for block in blocks("1")), "below the ephemeral ports"


@pytest.mark.parametrize(
    ("job_id", "first"), [("0", 20000), ("1", 20500), ("3", 21500), ("5", 20500), ("pid12", 20000)]
)
def test_the_first_block_comes_from_the_job_id(job_id: str, first: int) -> None:
    assert blocks(job_id, range(20000, 22000))[0].first == first


def test_no_block_fits_a_small_range() -> None:
    assert blocks("1", range(20000, 20000 + BLOCK_SIZE - 1)) == []


@pytest.mark.parametrize("head", [True, False])
def test_every_port_of_a_block_is_named_once(head: bool) -> None:
    block = PortBlock(21000)
    named = [int(option.partition("=")[2]) for option in block.options(head)]
    named += [int(port) for port in block.environment.values()]
    assert len(set(named)) == len(named)
    assert set(named) < set(block.ports) - {block.first}


def free_block() -> PortBlock:
    """A block that nothing on this machine uses right now."""
    return next(block for block in blocks(str(os.getpid())) if taken_port(block.ports) is None)


def test_a_block_is_held_once() -> None:
    block = free_block()
    with held(block) as port, held(block) as other:
        assert port is None
        assert other == block.first
    with held(block) as port:
        assert port is None


def test_a_port_that_is_taken_is_named() -> None:
    block = free_block()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", block.gcs))
        listener.listen()
        with held(block) as port:
            assert port == block.gcs


# --- folder ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_short_enough_for_sockets(tmp_path: Path) -> None:
    deep = tmp_path / "so long a name that no socket below it has room"
    deep.mkdir()
    name = folder_name(1000, "12345678")
    assert choose([str(deep), "/tmp"], name) == Path("/tmp")
    with pytest.raises(EnvironmentProblem, match=r"path too long.*/nowhere: does not exist.*LOCAL_SCRATCH"):
        choose([str(deep), "/nowhere"], name)


def test_the_folder_is_private_and_goes(tmp_path: Path) -> None:
    root = tmp_path / "skyray"
    with ray_folder(root) as is_ours:
        assert is_ours
        assert root.stat().st_mode & 0o777 == 0o700
        (root / "session").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_another_nodes_folder_is_shared_only_where_that_is_meant(tmp_path: Path) -> None:
    root = tmp_path / "skyray"
    with ray_folder(root):
        with pytest.raises(EnvironmentProblem, match="cannot make"), ray_folder(root):
            pass
        with ray_folder(root, shared=True) as is_ours:
            assert not is_ours
        assert root.is_dir()


def test_a_sweep_removes_what_dead_runs_left_and_no_other(tmp_path: Path) -> None:
    dead, elsewhere, alive = (tmp_path / folder_name(os.getuid(), job) for job in ("1", "2", "3"))
    for folder, host in ((dead, socket.gethostname()), (elsewhere, "another-host")):
        folder.mkdir()
        (folder / LOCK_NAME).write_text(json.dumps({"pid": 1, "host": host}))
    with ray_folder(alive):
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {elsewhere.name, alive.name}


def test_a_link_is_not_swept_and_not_shared(tmp_path: Path) -> None:
    """Another user may lay one, so that Ray writes into a folder of ours, or that the next run removes it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / LOCK_NAME).write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    link = tmp_path / folder_name(os.getuid(), "1")
    link.symlink_to(mine)
    sweep(tmp_path)
    assert (mine / LOCK_NAME).exists()
    with pytest.raises(EnvironmentProblem, match="cannot make"), ray_folder(link, shared=True):
        pass


def test_a_folder_keeps_its_lock_while_anything_of_it_is_left(tmp_path: Path) -> None:
    """Without the lock no later run could tell whose the rest is. Files are removed beside it first."""
    root = tmp_path / "skyray"
    (root / "session" / "logs").mkdir(parents=True)
    (root / LOCK_NAME).write_text("{}")
    (root / "link").symlink_to(tmp_path)
    remove(root)
    assert not root.exists()
    assert tmp_path.is_dir()


# --- address ---------------------------------------------------------------------------------------------------------


def test_the_address_is_the_way_to_the_peer_or_the_interfaces() -> None:
    assert own_address("", "127.0.0.1") == "127.0.0.1"
    assert own_address("lo", "192.0.2.1") == "127.0.0.1"


@pytest.mark.parametrize(("interface", "peer"), [("nonesuch0", ""), ("", "no-such-host.invalid")])
def test_an_address_that_cannot_be_found_is_an_error(interface: str, peer: str) -> None:
    with pytest.raises(EnvironmentProblem, match="NETWORK_INTERFACE"):
        own_address(interface, peer)


def test_the_error_names_the_interfaces_that_there_are() -> None:
    with pytest.raises(EnvironmentProblem, match=r"which has .*\blo\b"):
        address_of("nonesuch0")


# --- what a node is told ---------------------------------------------------------------------------------------------


def test_a_spec_travels_as_text() -> None:
    spec = NodeSpec(
        "7", "gpu-b", 1, ("python3",), 4, 2, head="10.0.0.1:20501", folder="/tmp/x", ports=(1, 9), grace_s=1.5
    )
    assert NodeSpec.from_text(replace(spec, integer_devices=True).to_text()).integer_devices
    assert NodeSpec.from_text(spec.to_text()) == spec


def test_the_heads_command() -> None:
    argv = start_argv(SPEC, "10.0.0.1", PortBlock(21000), Path("/tmp/skyray-1-7"))
    assert argv[:7] == ("uv", "run", "python", "-m", "ray.scripts.scripts", "start", "--block")
    assert {"--head", "--port=21001", "--node-ip-address=10.0.0.1", "--node-name=gpu-a", "--num-cpus=48"} <= set(argv)
    assert {"--num-gpus=8", "--include-dashboard=false", "--temp-dir=/tmp/skyray-1-7"} <= set(argv)


def test_another_nodes_command_has_none_of_the_heads_options() -> None:
    spec = NodeSpec(**{**SPEC.__dict__, "head": "10.0.0.1:21001"})
    argv = start_argv(spec, "10.0.0.2", PortBlock(21000), Path("/tmp/skyray-1-7"))
    assert "--address=10.0.0.1:21001" in argv
    # `ray start` refuses or ignores these without --head.
    heads = ("--head", "--port", "--include-dashboard", "--temp-dir", "--ray-client-server-port")
    assert not [word for word in argv if word.partition("=")[0] in heads]


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"},
            {"CUDA_VISIBLE_DEVICES"},
        ),
        ({"ROCR_VISIBLE_DEVICES": "0"}, {"ROCR_VISIBLE_DEVICES"}),
        ({"RAY_ADDRESS": "local", "RAY_TMPDIR": "/x", "HOME": "/h"}, {"HOME"}),
    ],
)
def test_what_ray_must_not_find_in_its_environment(base: dict[str, str], kept: set[str]) -> None:
    ours = {"SKYRL_RAY_NODE", *PortBlock(21000).environment}
    assert node_environment(SPEC, base, PortBlock(21000), "m").keys() - ours == kept


A, B = "MIG-11111111-aaaa", "MIG-22222222-bbbb"


@pytest.mark.parametrize(
    ("visible", "wanted", "found"),
    [
        (f"{A},{B}", True, "0,1"),
        (A, True, "0"),
        (f"{A},{B}", False, f"{A},{B}"),
        ("2,3", True, "2,3"),
        ("", True, ""),
        ("NoDevFiles", True, "NoDevFiles"),
        (None, True, None),
    ],
)
def test_the_slices_of_a_node_become_integers_where_vllm_wants_them(
    visible: str | None, wanted: bool, found: str | None
) -> None:
    spec = replace(SPEC, integer_devices=wanted)
    base = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert node_environment(spec, base, PortBlock(21000), "m").get("CUDA_VISIBLE_DEVICES") == found


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"job_id": "7"}', '{"job_id": "8", "address": "a", "folder": "f"}']
)
def test_foreign_and_unfinished_announcements_are_none(text: str | None) -> None:
    assert parse_announcement(text, "7") is None


def test_an_announcement_is_read_back() -> None:
    said = Announcement("7", "10.0.0.1:21001", "/tmp/skyray-1-7")
    assert parse_announcement(said.to_text(), "7") == said


# --- the cluster -----------------------------------------------------------------------------------------------------

A8, B8, B7 = SeenNode("gpu-a", True, 8.0), SeenNode("gpu-b", True, 8.0), SeenNode("gpu-b", True, 7.0)
DEAD = SeenNode("gpu-b", False, 0.0)


@pytest.mark.parametrize(
    ("seen", "lacks"),
    [
        ([], ["gpu-a is not in the cluster", "gpu-b is not in the cluster"]),
        ([A8], ["gpu-b is not in the cluster"]),
        ([A8, DEAD], ["gpu-b is not in the cluster"]),
        ([A8, B7], ["gpu-b has 7 of 8 GPUs"]),
        ([A8, B8], []),
        ([A8, DEAD, B8], []),
    ],
)
def test_what_is_missing(seen: list[SeenNode], lacks: list[str]) -> None:
    assert missing(["gpu-a", "gpu-b"], 8, seen) == lacks


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b'[{"name": "gpu-a", "alive": true, "gpus": 8.0}]\n', (A8,)),
        (b"[]", ()),
        (b"\x1b[33m(raylet)\x1b[0m a word of Ray's", None),
        (b"{}", ()),
        (b"7", None),
        (b'[{"name": "x"}]', None),
    ],
)
def test_lines_of_the_probe(line: bytes, seen: tuple[SeenNode, ...] | None) -> None:
    assert parse_seen(line) == seen


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (Settings(gpu_nodes=2), True),
        (Settings(gpu_nodes=1), False),
        (Settings(gpu_nodes=2, ray_cluster="off"), False),
        (Settings(gpu_nodes=1, ray_cluster="on"), True),
        (Settings(gpu_nodes=2, training_command="x"), False),
        (Settings(gpu_nodes=2, training_command="x", ray_cluster="on"), True),
        (Settings(gpu_nodes=2, skyrl_backend="local"), False),
    ],
)
def test_when_ray_is_started(settings: Settings, answer: bool) -> None:
    assert wanted(settings) is answer


def test_on_without_slurm_is_a_contradiction() -> None:
    found = contradictions(Settings(ray_cluster="on", skyrl_backend="local", training_command="x"))
    assert any("RAY_CLUSTER" in sentence for _keys, sentence in found)


@pytest.mark.parametrize(
    ("settings", "argv"),
    [
        (Settings(), ("uv", "run", "--frozen", "--extra", "verl", "python")),
        (Settings(training_command="x"), ("python3",)),
        (Settings(training_command="x", ray_python=("/v/bin/python",)), ("/v/bin/python",)),
    ],
)
def test_which_python_has_ray(settings: Settings, argv: tuple[str, ...]) -> None:
    assert ray_python(settings) == argv


@pytest.mark.parametrize(("own", "order"), [("b", ["b", "a", "c"]), ("a", ["a", "b", "c"]), ("", ["a", "b", "c"])])
def test_the_head_is_where_the_trainer_is(own: str, order: list[str]) -> None:
    assert head_first(["a", "b", "c"], own) == order


def test_what_each_node_is_told() -> None:
    settings = Settings(gpu_nodes=3, gpus_per_node=8, training_cpus=96, ray_port_range=range(25000, 26000))
    specs = node_specs(settings, ["a", "b", "c"], "7", "ib0", 5.0, True)
    assert [(spec.node, spec.rank, spec.peer) for spec in specs] == [("a", 0, "b"), ("b", 1, ""), ("c", 2, "")]
    assert {(spec.cpus, spec.gpus, spec.interface, spec.ports) for spec in specs} == {(96, 8, "ib0", (25000, 25999))}
    assert all(spec.integer_devices for spec in specs)
    alone = node_specs(Settings(), ["a"], "7", "", 5.0, False)[0]
    assert (alone.ports, alone.integer_devices) == ((DEFAULT_RANGE[0], DEFAULT_RANGE[-1]), False)


@pytest.mark.parametrize(("kill_wait_s", "seconds"), [(5.0, 1.25), (30.0, 5.0), (300.0, 5.0)])
def test_the_grace_fits_into_kill_wait(kill_wait_s: float, seconds: float) -> None:
    assert grace_s(kill_wait_s) == seconds


def test_a_token_of_the_runs_own_unless_the_user_chose() -> None:
    assert shared_environment({}, "t") == {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t",
    }
    assert "RAY_AUTH_TOKEN" not in shared_environment({"RAY_AUTH_MODE": "disabled"}, "t")


def test_a_step_says_everything_that_it_would_not_inherit() -> None:
    argv = step_argv("gpu-b", cpus=48, gres="gpu:a100:8", cwd=Path("/a b"), command=("python", "-m", "x"))
    assert argv[0] == "srun"
    assert argv[-3:] == ("python", "-m", "x")
    assert {"--nodes=1", "--ntasks=1", "--nodelist=gpu-b", "--overlap", "--cpus-per-task=48"} <= set(argv)
    assert {"--gres=gpu:a100:8", "--mem=0", "--export=ALL", "--chdir=/a b"} <= set(argv)


def test_a_steps_environment() -> None:
    base = {
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_NODE": "4096",
        "SRUN_CPUS_PER_TASK": "1",
        "SKYRL_TRAINER": "7.x",
        "URL": "http://x",
        "PYTHONPATH": "/p",
    }
    found = step_environment(base, Path("/code"))
    assert found == {"SLURM_JOB_ID": "7", "URL": "http://x", "PYTHONPATH": "/code:/p"}


@pytest.mark.parametrize(
    ("settings", "gres"),
    [
        (Settings(gpus_per_node=8), "gpu:8"),
        (Settings(gpus_per_node=2, gpu_type="a100"), "gpu:a100:2"),
        (Settings(gpus_per_node=0), ""),
    ],
)
def test_gres_of_a_node(settings: Settings, gres: str) -> None:
    assert gpu_gres(settings) == gres


@pytest.mark.parametrize("raw", ["20000-20498", "20000", "21000-20000"])
def test_a_range_without_room_for_a_block_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match="must"):
        ray_ports(raw)
    assert ray_ports("20000-20499") == range(20000, 20500)
