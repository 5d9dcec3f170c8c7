"""The pure parts: words and ports of commands, states, slots, what Podman is told and how it is understood."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_runtime import podman, readiness
from slurm_runtime.admission import Admission
from slurm_runtime.api_server import build_parser, config_from, slots_from
from slurm_runtime.config import ServerConfig, parse_label, parse_memory, parse_port_range
from slurm_runtime.connection import greeting
from slurm_runtime.credentials import generated_key, key_folder, read_key_file
from slurm_runtime.diagnostics import explain
from slurm_runtime.heartbeats import Heartbeats
from slurm_runtime.images import pull_policy
from slurm_runtime.ownership import is_orphan, process_mark, start_ticks
from slurm_runtime.podman import ContainerSpec, ContainerState, EngineFacts, create_body
from slurm_runtime.sandbox import (
    Dialect,
    ImpossibleChange,
    Sandbox,
    Specification,
    State,
    container_port,
    dialect_of,
    fill_port,
    sandbox_url,
    split_command,
    without_secret,
)
from slurm_runtime.slots import Slots, share_out, units_for
from slurm_runtime.warden.disk import Folders

# Commands.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "/usr/local/bin/openhands-agent-server --port 60000",
            ("/usr/local/bin/openhands-agent-server", "--port", "60000"),
        ),
        ("sh -c 'echo \"a b\"'", ("sh", "-c", 'echo "a b"')),
        (["/bin/sh", "-c", "a b"], ("/bin/sh", "-c", "a b")),
        (None, None),
    ],
)
def test_commands_are_split_like_a_shell_does(command: Any, words: Any) -> None:
    assert split_command(command) == words


@pytest.mark.parametrize("command", ["", "   ", [], [""], "sh -c 'x"])
def test_commands_that_name_no_program(command: Any) -> None:
    with pytest.raises(ValueError, match="command"):
        split_command(command)


@pytest.mark.parametrize(
    ("command", "port"),
    [
        (["server", "--port", "61000"], 61000),
        (["server", "--port=61000"], 61000),
        (["server", "--port", "88888888"], 60000),
        (["server", "--port", "0"], 60000),
        (["server", "--port", "99999"], 60000),
        (["server", "--report", "61000"], 60000),
        (["python", "-m", "openhands.runtime.action_execution_server", "60000"], 60000),
        (None, 60000),
    ],
)
def test_the_port_that_a_command_names(command: Any, port: int) -> None:
    assert container_port(command) == port


def test_dialects_and_the_placeholder() -> None:
    assert dialect_of("server --port 88888888") is Dialect.SDK
    assert dialect_of(["server", "60000"]) is Dialect.LEGACY
    assert dialect_of(["server", "88888888"]) is Dialect.PLACEHOLDER
    assert fill_port(("server", "88888888", "--x=88888888"), 60000) == ("server", "60000", "--x=60000")
    assert fill_port(None, 60000) is None


def test_a_variable_that_holds_the_key_is_dropped() -> None:
    assert without_secret({"A": "x-secret-y", "B": "1"}, "secret") == {"B": "1"}
    assert without_secret({"A": "", "B": "1"}, None) == {"A": "", "B": "1"}
    assert without_secret({"A": "", "B": "1"}, "") == {"A": "", "B": "1"}


def test_urls() -> None:
    assert sandbox_url("node1", 40000) == "http://node1:40000"
    assert sandbox_url("fe80::1", 40000) == "http://[fe80::1]:40000"


# States.


def sandbox(dialect: Dialect = Dialect.SDK) -> Sandbox:
    wish = Specification("r1", "s1", "key", "image", ("x",), "/", {"A": "1"}, 1.0, "missing", dialect, 60000)
    return Sandbox(wish)


def test_the_life_of_a_sandbox_in_the_clients_words() -> None:
    pending = sandbox()
    starting = pending.changed(State.STARTING, "waits", url="http://h:1")
    ready = starting.changed(State.READY, "answers")
    failed = ready.changed(State.FAILED, "died", last_lines="oops")
    words = [(one.status, one.pod_status, one.url) for one in (pending, starting, ready, failed)]
    assert words == [
        ("starting", "pending", None),
        ("running", "pending", "http://h:1"),
        ("running", "ready", "http://h:1"),
        ("stopped", "failed", "http://h:1"),
    ]
    assert failed.last_lines == "oops"
    assert starting.changed(State.STOPPED, "stopped").pod_status == "not found"


def test_the_placeholder_dialect_reads_running() -> None:
    ready = sandbox(Dialect.PLACEHOLDER).changed(State.STARTING, "", url="u").changed(State.READY, "")
    assert ready.pod_status == "running"


@pytest.mark.parametrize("dead", [State.FAILED, State.STOPPED])
@pytest.mark.parametrize("state", State)
def test_the_dead_stay_dead(dead: State, state: State) -> None:
    with pytest.raises(ImpossibleChange):
        sandbox().changed(dead, "").changed(state, "")


def test_nothing_is_ready_before_it_started() -> None:
    with pytest.raises(ImpossibleChange):
        sandbox().changed(State.READY, "")


# Slots.


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 8))
def test_no_slot_is_leased_twice(sizes: list[int], total: int) -> None:
    slots, leases = Slots(total, 1.0), []
    for size in sizes:
        taken = slots.take(size) if size else None
        if taken:
            slots, lease = taken
            leases.append(lease)
        elif leases:
            slots = slots.give(leases.pop(0))
        held = [number for lease in leases for number in lease.numbers]
        assert len(held) == len(set(held)) == slots.used <= total


@pytest.mark.parametrize(
    ("cpus", "reserved", "each", "most", "total", "said"),
    [
        (32, 4, 8, None, 3, "32 CPUs less 4 reserved"),
        (128, 4, 8, None, 15, "15 slots"),
        (32, 0, 0.5, None, 64, "share CPUs"),
        (2, 4, 8, None, 1, "room for none"),
        (32, 0, 1, 4, 4, "--max-sandboxes"),
        (4, 0, 0.1, None, 40, "40 slots"),
        (1, 0, 8, 4, 1, "room for none"),
    ],
)
def test_sharing_out(cpus: int, reserved: int, each: float, most: int | None, total: int, said: str) -> None:
    slots, sentence = share_out(range(cpus), cpus, reserved, each, most)
    assert slots.total == total
    assert said in sentence


def test_slots_cover_their_cpus() -> None:
    slots, _ = share_out(range(10, 20), 10, 2, 1.5, None)
    assert [slots.cpus_of(lease) for lease in _leases(slots)] == [(12, 13), (13, 14), (15, 16), (16, 17), (18, 19)]
    halves, _ = share_out(range(2), 2, 0, 0.5, None)
    assert [halves.cpus_of(lease) for lease in _leases(halves)] == [(0,), (0,), (1,), (1,)]
    unknown, _ = share_out(range(2), 8, 0, 4, None)
    assert [unknown.cpus_of(lease) for lease in _leases(unknown)] == [(), ()]
    too_few, _ = share_out(range(2), 2, 4, 8, None)
    assert [too_few.cpus_of(lease) for lease in _leases(too_few)] == [(0, 1)]


def _leases(slots: Slots) -> list[Any]:
    leases = []
    while taken := slots.take(1):
        slots, lease = taken
        leases.append(lease)
    return leases


def test_units() -> None:
    assert [units_for(factor) for factor in (0.5, 1, 1.5, 2, 8)] == [1, 1, 2, 2, 8]


def test_admission_is_first_come_first_served_and_survives_cancellation() -> None:
    async def scene() -> list[str]:
        admission, order = Admission(Slots(2, 1.0)), []

        async def ask(name: str, count: int) -> Any:
            lease = await admission.lease(count)
            order.append(name)
            return lease

        first = await ask("first", 2)
        large, small = asyncio.create_task(ask("large", 2)), asyncio.create_task(ask("small", 1))
        given_up = asyncio.create_task(ask("given up", 1))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert admission.waiting == 2
        admission.give(first)
        admission.give(await large)
        await small
        assert admission.slots.used == 1
        large = asyncio.create_task(ask("never", 2))
        await asyncio.sleep(0)
        admission.give(small.result())
        large.cancel()  # granted in the same moment
        await asyncio.wait([large])
        assert admission.slots.used == 0
        return order

    assert asyncio.run(scene()) == ["first", "large", "small"]


def test_admission_loses_no_slot_when_several_give_up_at_once() -> None:
    """All who wait are cancelled before any of them runs again: whoever comes first grants to the next one's wish."""

    async def scene() -> int:
        admission = Admission(Slots(2, 1.0))
        held = await admission.lease(1)
        asking = [asyncio.create_task(admission.lease(count)) for count in (2, 1, 1)]
        await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        gone = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(problem) for problem in gone] == [asyncio.CancelledError] * 3
        admission.give(held)
        assert admission.waiting == 0
        return admission.slots.used

    assert asyncio.run(scene()) == 0


# What Podman is told.

FACTS = EngineFacts("4.3.1", rootless=True, controllers=frozenset())
ALL = frozenset({"cpu", "cpuset", "memory", "pids"})
SPEC = ContainerSpec("n", "i", ("/bin/sh",), {"A": "1"}, "/w", {"l": "v"}, 60000, "0.0.0.0", 0, 1 << 30, 1.5, (2, 3))


def test_a_fork_bomb_is_bounded_where_no_cgroup_does_it() -> None:
    spec = replace(SPEC, pids_together=6144)
    unbounded = replace(FACTS, controllers=frozenset())
    assert create_body(spec, unbounded, None, {})["r_limits"] == [{"type": "NPROC", "soft": 6144, "hard": 6144}]
    assert create_body(spec, unbounded, None, {"NPROC": 4096})["r_limits"][0]["hard"] == 4096  # no more than Podman's
    assert create_body(spec, unbounded, None, {"NPROC": 32768})["r_limits"][0]["hard"] == 6144
    assert "r_limits" not in create_body(spec, replace(FACTS, controllers=frozenset({"pids"})), None, {"NPROC": 9})
    assert "r_limits" not in create_body(replace(spec, pids_together=0), unbounded, None, {})


def test_a_rootless_container() -> None:
    body = create_body(SPEC, FACTS, 500000, {"NOFILE": 1024})
    assert body["entrypoint"] == [] and body["command"] == ["/bin/sh"]
    assert body["no_new_privileges"] is True and body["cap_drop"] == ["ALL"]
    assert body["portmappings"] == [{"container_port": 60000, "protocol": "tcp", "host_ip": "0.0.0.0"}]
    assert body["netns"] == {"nsmode": "slirp4netns"}
    assert body["sysctl"] == {"net.ipv4.ip_local_reserved_ports": "60000"}
    assert not {"userns", "idmappings", "r_limits", "resource_limits"} & body.keys()


@pytest.mark.parametrize(
    ("programs", "version", "rootless", "mode"),
    [
        ({"slirp4netns": "/s"}, "4.3.1", True, "slirp4netns"),
        ({"slirp4netns": "/s", "pasta": "/p"}, "4.9.4", True, "slirp4netns"),
        ({"slirp4netns": "/s", "pasta": "/p"}, "5.4.2", True, "pasta"),
        ({"slirp4netns": "/s", "pasta": ""}, "5.4.2", True, "slirp4netns"),
        ({"slirp4netns": "/s", "pasta": "/p"}, "5.4.2", False, "slirp4netns"),
        ({}, "5.4.2", True, "bridge"),
    ],
)
def test_a_network_of_its_own(programs: dict[str, str], version: str, rootless: bool, mode: str) -> None:
    host = {name: {"executable": path} for name, path in programs.items()}
    assert podman.private_network(host, version, rootless) == mode


def test_a_container_of_root_has_a_user_namespace_and_the_services_limits() -> None:
    facts = EngineFacts("4.3.1", rootless=False, controllers=ALL, private_network="slirp4netns")
    body = create_body(SPEC, facts, 500000, {"NOFILE": 1024})
    assert body["userns"] == {"nsmode": "private"}
    assert body["idmappings"]["UIDMap"] == [{"container_id": 0, "host_id": 500000, "size": 65536}]
    assert body["r_limits"] == [{"type": "NOFILE", "soft": 1024, "hard": 1024}]
    assert body["netns"] == {"nsmode": "slirp4netns"}
    assert body["resource_limits"] == {
        "memory": {"limit": 1 << 30},
        "cpu": {"period": 100000, "quota": 150000, "cpus": "2,3"},
    }


def test_without_a_command_the_image_runs_its_own() -> None:
    from dataclasses import replace

    body = create_body(replace(SPEC, command=None, host_port=4000), FACTS, None, {})
    assert not {"entrypoint", "command"} & body.keys()
    assert body["portmappings"][0]["host_port"] == 4000


@pytest.mark.parametrize(
    ("uid_map", "start"),
    [
        ("         0          0 4294967295\n", 0x70000000),
        ("0 1000 1\n1 100000 300000\n", 300001 - 65536),
        ("0 1000 1\n", None),
        ("", None),
    ],
)
def test_host_ids_for_containers_of_root(uid_map: str, start: int | None) -> None:
    assert podman.free_id_range(uid_map) == start


def test_limits_of_the_service() -> None:
    text = "Limit  Soft  Hard  Units\nMax processes  100  32768  processes\nMax open files  1024  unlimited  files\n"
    assert podman.parse_limits(text) == {"NPROC": 32768, "NOFILE": 1 << 20}


@pytest.mark.parametrize(
    ("environment", "uid", "path"),
    [
        ({"DOCKER_HOST": "unix:///tmp/p.sock"}, 1000, "/tmp/p.sock"),
        ({"XDG_RUNTIME_DIR": "/x"}, 1000, "/x/podman/podman.sock"),
        ({}, 1000, "/run/user/1000/podman/podman.sock"),
        ({"XDG_RUNTIME_DIR": "/x"}, 0, "/run/podman/podman.sock"),
    ],
)
def test_where_podman_listens(environment: dict[str, str], uid: int, path: str) -> None:
    assert podman.socket_path(environment, uid) == Path(path)


@pytest.mark.parametrize("host", ["tcp://h:1", "unix:///" + "l" * 120])
def test_sockets_that_cannot_be_used(host: str) -> None:
    with pytest.raises(ValueError, match=r"DOCKER_HOST|longer"):
        podman.socket_path({"DOCKER_HOST": host}, 0)


@pytest.mark.parametrize(
    ("status", "words", "kind"),
    [  # literal answers of Podman 4.3.1
        (500, "localhost/nope: image not known", podman.NoSuchImage),
        (500, "rootlessport listen tcp 0.0.0.0:33999: bind: address already in use", podman.PortTaken),
        (404, 'no container with name or ID "x" found: no such container', podman.NoSuchContainer),
        (500, "requested CPUs are not available - requested 77, available: 0-1", podman.EngineError),
        (404, "page not found", podman.EngineError),
    ],
)
def test_podmans_words(status: int, words: str, kind: type[Exception]) -> None:
    problem = podman.error_for(status, words)
    assert type(problem) is kind
    assert str(problem) == words


def test_log_frames() -> None:
    stream = b"\x01\0\0\0\0\0\0\x04bye\n\x02\0\0\0\0\0\0\x03\xff\0!" + b"\x01\0\0"
    assert podman.parse_frames(stream) == "bye\n\ufffd!"
    assert podman.parse_frames(b"") == ""


def test_limits_that_do_not_bite_are_said() -> None:
    config = ServerConfig(memory_bytes=1, pinning="docker_cpuset")
    _, limits, pinning = greeting(FACTS, config)
    assert "memory, pids, cpu" in limits
    assert "only which CPUs" in limits
    assert "docker_cpuset is not possible" in pinning
    assert "only which CPUs" not in greeting(FACTS, ServerConfig())[1]
    assert len(greeting(EngineFacts("5", rootless=True, controllers=ALL), config)) == 1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (ContainerState("n", False, "exited", 3), "exit code 3"),
        (ContainerState("n", False, "exited", 137), "137 (SIGKILL)"),
        (ContainerState("n", False, "exited", 250), "exit code 250"),
        (ContainerState("n", False, "exited", 137, out_of_memory=True), "out of memory"),
    ],
)
def test_how_a_container_ended(state: ContainerState, said: str) -> None:
    assert said in explain(state)


# Readiness.


@pytest.mark.parametrize(
    ("dialect", "pages", "ready"),
    [
        (Dialect.SDK, {"/ready": (200, b""), "/health": (500, b"")}, True),
        (Dialect.SDK, {"/ready": (503, b""), "/health": (200, b"")}, False),
        (Dialect.SDK, {"/health": (200, b'"OK"')}, True),
        (Dialect.SDK, {"/alive": (200, b"")}, False),
        (Dialect.SDK, {}, False),
        (Dialect.LEGACY, {"/alive": (200, b'{"status":"not initialized"}'), "/health": (200, b"")}, False),
        (Dialect.LEGACY, {"/alive": (200, b'{"status":"ok"}')}, True),
        (Dialect.LEGACY, {"/alive": (200, b"fine")}, True),
        (Dialect.LEGACY, {"/alive": (200, b"[1]")}, True),
        (Dialect.LEGACY, {"/health": (200, b"")}, True),
        (Dialect.PLACEHOLDER, {"/ready": (302, b"")}, False),
    ],
)
def test_readiness(dialect: Dialect, pages: dict[str, tuple[int, bytes]], ready: bool) -> None:
    async def get(url: str) -> tuple[int, bytes]:
        return pages.get(url.removeprefix("http://h:1"), (404, b""))

    assert asyncio.run(readiness.is_ready("http://h:1", dialect, get)) is ready


# Configuration.


@pytest.mark.parametrize(
    ("text", "size"),
    [("16G", 16 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29), ("16GB", 16 << 30), ("16Gi", 16 << 30), ("100", 100)],
)
def test_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "G", "1 000M", "1PB"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="16G"):
        parse_memory(text)


def test_port_ranges_and_labels() -> None:
    assert parse_port_range("20000-20001") == range(20000, 20002)
    for text in ("", "5", "2-1", "0-5", "1-70000", "a-b"):
        with pytest.raises(ValueError, match="range of ports"):
            parse_port_range(text)
    assert parse_label("a=b=c") == ("a", "b=c")
    for text in ("a", "=b"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse_label(text)


BASH_SUITE_CALL = (
    "--container-image ghcr.io/openhands/agent-server --host 0.0.0.0 --port 8000 --cpus-per-worker 8 "
    "--memory-per-worker 16G --build-reserved-cpus 4 --cpu-pinning-method taskset --worker-startup-timeout 600 "
    "--enable-image-build --disable-auth --verbose"
)


def test_the_bash_suites_call() -> None:
    args = build_parser().parse_args(BASH_SUITE_CALL.split())
    config = config_from(args, {"SLURM_JOB_ID": "7"}, "me")
    assert config.default_image == "ghcr.io/openhands/agent-server"
    assert (config.cpus_per_worker, config.memory_bytes, config.startup_timeout_s) == (8, 16 << 30, 600)
    assert config.labels == {"skyrl.job": "7", "skyrl.owner": "me"}
    assert slots_from(args, range(32))[0].total == 3


@pytest.mark.parametrize(
    ("argv", "publish_ip", "public_host"),
    [
        ([], "0.0.0.0", None),
        (["--host", "127.0.0.1"], "127.0.0.1", "127.0.0.1"),
        (["--host", "localhost"], "127.0.0.1", "localhost"),
        (["--host", "127.0.0.1", "--public-host", "node1"], "0.0.0.0", "node1"),
    ],
)
def test_where_sandboxes_are_published(argv: list[str], publish_ip: str, public_host: str | None) -> None:
    config = config_from(build_parser().parse_args(argv), {}, "me")
    assert (config.publish_ip, config.public_host) == (publish_ip, public_host)


def test_pull_policies() -> None:
    words = [None, "", "Always", "IfNotPresent", "Never", "never"]
    assert [pull_policy(word) for word in words] == ["missing", "missing", "always", "missing", "never", "never"]


# Credentials and ownership.


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for content in (None, b"", b" \n", b"\xff\xfe", "schlüssel".encode()):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="--api-key-file"):
            read_key_file(path)
    path.write_text(" the key\n")
    assert read_key_file(path) == "the key"


def test_a_generated_key_lives_as_long_as_its_block(tmp_path: Path) -> None:
    with generated_key(tmp_path, 8000) as (key, path):
        assert path.read_text().strip() == key
        assert path.stat().st_mode & 0o777 == 0o600
        with generated_key(tmp_path, 8001) as (other, _):
            assert other != key
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    assert key_folder({"XDG_RUNTIME_DIR": str(tmp_path)}, 1) == tmp_path
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = key_folder({}, os.getuid())
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(ValueError, match="yours alone"):
        key_folder({}, os.getuid())


def test_orphans() -> None:
    own = process_mark()
    host, boot, namespace, pid, ticks = own.split("/")
    assert not is_orphan(own, own)
    assert is_orphan(f"{host}/{boot}/{namespace}/{pid}/1{ticks}", own)
    assert is_orphan(f"{host}/other-boot/{namespace}/{pid}/{ticks}", own)
    assert is_orphan(f"{host}/{boot}/{namespace}/999999999/5", own)
    for foreign in ("", "x", f"elsewhere/{boot}/{namespace}/{pid}/1", f"{host}/{boot}/1/999999999/5"):
        assert not is_orphan(foreign, own)
    assert start_ticks(999999999) is None


def test_heartbeats_count_by_their_clock() -> None:
    now = 100.0
    heartbeats = Heartbeats(lambda: now)
    heartbeats.beat("a")
    now = 107.5
    beat = heartbeats.get("a")
    assert beat is not None
    assert heartbeats.age_s(beat) == 7.5


def test_folders_that_are_not_known_are_neither_counted_nor_emptied() -> None:
    """``du`` and ``find`` without a path take the folder that they are in."""
    folders = Folders()
    folders.begin(5)
    assert folders.count is None
    with pytest.raises(AssertionError):
        folders.empty()
