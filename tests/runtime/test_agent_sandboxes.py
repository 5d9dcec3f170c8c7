"""Sandboxes with the real agent server on real rootless Podman: a forked one is what a plain one would be."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from slurm.lib.processes import descendants
from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.slots import Slots
from slurm_runtime.warden.proc import members, namespace_of, private_bytes
from tests.runtime import podman_service
from tests.runtime.agent_tree import ASK_FOR_KEYRING, COMMAND, REFUSED
from tests.runtime.commands import IMAGE
from tests.runtime.conftest import CONFIG, Api, KillablePodman, serving
from tests.runtime.test_contract import command, eventually, session, started

pytestmark = pytest.mark.podman

MakeApi = Callable[..., Api]
PATIENT = replace(CONFIG, string_patience_s=120.0, ready_grace_s=15.0)


@pytest.fixture
def agents(rootless_podman: podman_service.Service, agent_tree: AgentTree) -> Iterator[MakeApi]:
    """Make a server whose sandboxes get the agent server, with changes to the configuration."""
    with ExitStack() as stack:

        def make(start: str = "fork", slots: int | Slots = 20, **changes: Any) -> Api:
            config = replace(PATIENT, agent_start=start, **changes)
            engine = KillablePodman(rootless_podman.socket)
            return stack.enter_context(serving(engine, config, slots, agent_tree, warden=True))

        yield make


def server_of(api: Api, sandbox: dict[str, Any]) -> int:
    """The agent server's process."""
    holder = api.holder_of(sandbox)
    found = [
        pid
        for pid in members(namespace_of(holder))
        if pid != holder
        and b"agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(found) == 1
    return found[0]


# What two processes that do the same may differ in: identity, time, memory, scheduling.
OWN_STATUS = re.compile(
    r"Name|State|Tgid|Ngid|Pid|PPid|NStgid|NSpid|NSpgid|NSsid|FDSize|Vm.*|Rss.*|Hugetlb.*|Threads|SigQ|.*ctxt_switches|"
    r"CoreDumping|x86_Thread.*|untag_mask"
)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {name: value for name, value in fields.items() if not OWN_STATUS.fullmatch(name)}


def look_at(pid: int, holder: int) -> dict[str, object]:
    """Everything that a process of a container is confined to, comparable between containers."""
    proc = Path(f"/proc/{pid}")
    environment = sorted(proc.joinpath("environ").read_bytes().rstrip(b"\0").split(b"\0"))
    mounts = sorted(line.split(" - ")[0].split()[4:6] for line in proc.joinpath("mountinfo").read_text().splitlines())
    namespaces = {link.name: link.readlink() == Path(f"/proc/{holder}/ns", link.name).readlink()
                  for link in proc.joinpath("ns").iterdir()}  # fmt: skip
    stat = proc.joinpath("stat").read_text().rpartition(")")[2].split()
    session_id = int(stat[3])
    return {
        **{f"status {name}": value for name, value in status(pid).items()},
        "limits": proc.joinpath("limits").read_text(),
        "cgroup": proc.joinpath("cgroup").read_text(),
        "namespaces": namespaces,
        "environment": [entry for entry in environment if not entry.startswith((b"SESSION_API_KEY=", b"HOSTNAME="))],
        "names": sorted(entry.partition(b"=")[0] for entry in environment),
        "cwd": str(proc.joinpath("cwd").readlink()),
        "root": str(proc.joinpath("root").readlink()),
        "mounts": mounts,
        "uid_map": proc.joinpath("uid_map").read_text(),
        "gid_map": proc.joinpath("gid_map").read_text(),
        "oom_score_adj": proc.joinpath("oom_score_adj").read_text(),
        "label": label(proc),
        "affinity": os.sched_getaffinity(pid),
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "policy": os.sched_getscheduler(pid),
        "leads_a_session": session_id in {pid, holder},
        "tty": stat[4],
        "personality": proc.joinpath("personality").read_text(),
        "descriptors": {kind(link) for link in proc.joinpath("fd").iterdir()},
        "streams": [kind(proc / "fd" / str(number)) for number in range(3)],
    }


def label(proc: Path) -> bytes:
    """What a security module calls it; empty where none is loaded."""
    try:
        return (proc / "attr" / "current").read_bytes()
    except OSError:
        return b""


def kind(link: Path) -> str:
    """``pipe``, ``socket``, ``anon_inode:[eventpoll]`` or a path; empty for one that was closed meanwhile."""
    try:
        return re.sub(r":\[\d+\]$", "", str(link.readlink()))
    except FileNotFoundError:
        return ""


def test_a_forked_server_has_exactly_what_podman_gives_a_plain_one(agents: MakeApi) -> None:
    wish = {"environment": {"COLOUR": "green blue"}, "working_dir": "/"}
    looks = []
    for api in (agents("fork"), agents("exec")):
        sandbox = started(api, **wish)
        looks.append(look_at(server_of(api, sandbox), api.holder_of(sandbox)))
    forked, plain = looks
    different = {name: (forked[name], plain[name]) for name in plain if forked[name] != plain[name]}
    assert different == {}


def test_a_forked_server_is_root_of_its_container_and_nothing_more(agents: MakeApi) -> None:
    api = agents("fork")
    sandbox = started(api)
    fields = status(server_of(api, sandbox))
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert int(fields["CapBnd"], 16) & 1 << 21 == 0  # SYS_ADMIN
    assert command(sandbox, "id -u; mount -t tmpfs none /mnt 2>&1; unshare -U true 2>&1")["stdout"].startswith("0\n")
    assert command(sandbox, "mount -t tmpfs none /mnt")["exit_code"] != 0


def test_a_container_that_idles_has_the_native_profile_and_its_server_the_whole_one(
    agents: MakeApi, rootless_podman: podman_service.Service
) -> None:
    api = agents()
    first, second = (started(api, session_id=name) for name in ("first", "second"))
    found = []
    for sandbox in (first, second):
        name = f"sandbox-{sandbox['runtime_id']}"
        config = Path(api.run(api.engine.inspect(name)).oci_config).read_text()
        found.append(json.loads(config)["linux"]["seccomp"]["architectures"])
        assert status(server_of(api, sandbox))["Seccomp"] == "2"
        assert rootless_podman.podman("exec", name, "echo", "entered") == "entered\n"
    assert len(found[0]) > 1
    assert found[1] == found[0][:1]


def test_no_keyring_of_the_kernel_is_within_reach_of_a_forked_server(agents: MakeApi, agent_tree: AgentTree) -> None:
    """It would be the one of whoever started the server, with tickets and tokens, and one for all sandboxes."""
    ask = shlex.join(agent_tree.python_command(("-c", ASK_FOR_KEYRING)))
    assert command(started(agents()), ask)["stdout"] == REFUSED


def test_17_keys_are_enforced_and_each_sandbox_has_its_own(agents: MakeApi) -> None:
    api = agents("fork")
    one, other = started(api), started(api)
    for key in (None, "", other["session_api_key"], "the-key-of-these-tests"):
        headers = {} if key is None else {"X-Session-API-Key": key}
        url = f"{one['url']}/api/bash/execute_bash_command"
        assert httpx.post(url, json={"command": "true"}, headers=headers, trust_env=False).status_code == 401
    assert command(one, "echo in")["stdout"] == "in\n"
    assert command(other, "echo in")["stdout"] == "in\n"


def test_settings_of_one_sandbox_reach_its_server_and_no_other(agents: MakeApi) -> None:
    api = agents("fork")
    chosen = started(api, environment={"OH_ALLOW_CORS_ORIGINS_0": "http://a.example"})
    usual = started(api)

    def allowed(sandbox: dict[str, Any]) -> str | None:
        headers = {"Origin": "http://a.example"}
        answer = httpx.get(f"{sandbox['url']}/health", headers=headers, trust_env=False)
        found: str | None = answer.headers.get("access-control-allow-origin")
        return found

    assert allowed(chosen) == "http://a.example"
    assert allowed(usual) is None


def test_a_variable_that_is_read_at_import_is_served_by_the_plain_program(agents: MakeApi) -> None:
    api = agents("fork")
    sandbox = started(api, environment={"LOG_LEVEL": "DEBUG"})
    line = Path(f"/proc/{server_of(api, sandbox)}/cmdline").read_bytes()
    assert b"ld-linux" in line
    assert command(sandbox, "echo $LOG_LEVEL")["stdout"] == "DEBUG\n"


def test_the_parent_holds_no_key(agents: MakeApi) -> None:
    api = agents("fork")
    keys = [started(api)["session_api_key"].encode() for _ in range(3)]
    parents = [pid for pid in own_pids() if is_fork_server(pid)]
    assert parents
    for pid in parents:
        memory = memory_of(pid)
        assert b"openhands" in memory  # it can be read at all
        for key in keys:
            assert key not in memory


def own_pids() -> set[int]:
    """What these tests have started: another run of them may go on beside."""
    return descendants({os.getpid()})


def is_fork_server(pid: int) -> bool:
    try:
        return b"fork_server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def memory_of(pid: int) -> bytes:
    """All that a process has written to: its private memory and its environment."""
    pieces = [Path(f"/proc/{pid}/environ").read_bytes()]
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, *_ = line.split()
            if permissions.startswith("rw"):
                first, last = (int(word, 16) for word in span.split("-"))
                memory.seek(first)
                try:
                    pieces.append(memory.read(last - first))
                except OSError:
                    continue
    return b"".join(pieces)


def test_children_differ_in_what_should_be_random(agents: MakeApi) -> None:
    api = agents("fork")
    found = {command(started(api), "true")["id"] for _ in range(3)}
    assert len(found) == 3


def test_24_a_server_that_is_killed_fails_its_sandbox_with_exit_code_and_last_lines(agents: MakeApi) -> None:
    api = agents("fork")
    sandbox = started(api, session_id="victim")
    os.kill(server_of(api, sandbox), signal.SIGKILL)
    failed = eventually(lambda: (found := session(api, "victim"))["pod_status"] == "failed" and found)
    assert "137 (SIGKILL)" in failed["pod_logs"]
    assert "Uvicorn running" in failed["pod_logs"] or "startup" in failed["pod_logs"].lower()
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0)


def test_a_server_that_nobody_asks_wakes_up_once_a_second_and_ends_at_a_signal_at_once(agents: MakeApi) -> None:
    api = agents("fork")
    started(api, session_id="idle")
    server = server_of(api, session(api, "idle"))
    time.sleep(2)
    before = wakeups(server)
    time.sleep(5)
    assert 1 <= wakeups(server) - before < 25  # uvicorn's own loop: 50
    os.kill(server, signal.SIGTERM)
    failed = eventually(lambda: (found := session(api, "idle"))["pod_status"] == "failed" and found)
    assert "Received signal SIGTERM" in failed["pod_logs"]
    assert "Finished server process" in failed["pod_logs"]


def test_a_forked_server_shares_nearly_all_of_its_memory(agents: MakeApi) -> None:
    """Its own are 9 MB of 350. It was 21 MB while each reference that it took made it copy a page."""
    api = agents("fork")
    sandbox = started(api, session_id="small")
    headers = {"X-Session-API-Key": sandbox["session_api_key"]}
    with httpx.Client(base_url=sandbox["url"], headers=headers, trust_env=False, timeout=30) as client:
        for _ in range(3):
            client.post("/api/bash/execute_bash_command", json={"command": "true", "timeout": 20}).raise_for_status()
            client.get("/health").raise_for_status()
    assert 0 < private_bytes(server_of(api, session(api, "small"))) < 14_000 * 1024


def test_a_forked_server_holds_the_first_look_at_a_command_until_it_has_ended(agents: MakeApi) -> None:
    sandbox = started(agents("fork"))
    headers = {"X-Session-API-Key": sandbox["session_api_key"]}
    with httpx.Client(base_url=f"{sandbox['url']}/api/bash", headers=headers, trust_env=False, timeout=30) as client:
        # Without the hold none of these looks sees the end, unless this machine stalls for longer than the command.
        told = [first_look(client, "sleep 0.05; exit 7") for _ in range(20)]
    assert 7 in told


def first_look(client: httpx.Client, text: str) -> int | None:
    """The exit code that the look right after a command's start tells."""
    name = client.post("/start_bash_command", json={"command": text, "timeout": 20}).json()["id"]
    found = client.get("/bash_events/search", params={"command_id__eq": name}).json()["items"]
    return next((event["exit_code"] for event in found if event.get("exit_code") is not None), None)


def wakeups(pid: int) -> int:
    """How often the process has gone to sleep, all threads together."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    lines = [line for task in tasks for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def test_a_fork_server_that_dies_is_started_again_and_its_children_live_on(agents: MakeApi) -> None:
    api = agents("fork")
    before = started(api)
    (parent,) = [pid for pid in own_pids() if is_fork_server(pid)]
    os.kill(parent, signal.SIGKILL)
    eventually(lambda: not api.manager.agent.fork_ready)
    assert command(before, "echo alive")["stdout"] == "alive\n"
    meanwhile = started(api)  # by the plain program
    eventually(lambda: api.manager.agent.fork_ready, 60)
    after = started(api)
    assert b"sleep" in Path(f"/proc/{api.holder_of(after)}/cmdline").read_bytes()
    for sandbox in (before, meanwhile, after):
        assert command(sandbox, "echo alive")["stdout"] == "alive\n"
    os.kill(server_of(api, before), signal.SIGKILL)
    eventually(lambda: session(api, before["session_id"])["pod_status"] == "failed")


def warden_of_this_test() -> int:
    (found,) = [pid for pid in own_pids() if b"warden/process.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def test_a_warden_that_dies_is_started_again_and_sandboxes_live_on(agents: MakeApi) -> None:
    api = agents("fork")
    before = started(api)
    os.kill(warden_of_this_test(), signal.SIGKILL)
    eventually(lambda: not api.manager.agent.fork_ready)
    eventually(lambda: api.manager.agent.fork_ready, 60)
    assert command(before, "echo alive")["stdout"] == "alive\n"
    assert command(started(api), "echo alive")["stdout"] == "alive\n"
    assert api.client.post("/stop", json={"runtime_id": before["runtime_id"]}).status_code == 200


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_29_pause_and_resume_keep_everything(agents: MakeApi, start: str) -> None:
    api = agents(start)
    sandbox = started(api, session_id="sleeper")
    command(sandbox, "echo kept > /workspace/file; (while :; do date +%s%N >> /tmp/ticks; sleep 0.05; done) &")
    runtime = {"runtime_id": sandbox["runtime_id"]}
    for _ in range(2):  # again is fine
        assert api.client.post("/pause", json=runtime).status_code == 200
    paused = session(api, "sleeper")
    assert (paused["status"], paused["url"]) == ("paused", sandbox["url"])
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
              for pid in members(namespace_of(api.holder_of(sandbox)))]  # fmt: skip
    assert set(states) <= {"T", "Z"}
    for _ in range(2):
        assert api.client.post("/resume", json=runtime).status_code == 200
    eventually(lambda: session(api, "sleeper")["pod_status"] == "ready")
    resumed = session(api, "sleeper")
    for name in ("runtime_id", "url", "session_api_key"):
        assert resumed[name] == sandbox[name]
    assert command(sandbox, "cat /workspace/file")["stdout"] == "kept\n"
    ticks = int(command(sandbox, "wc -l < /tmp/ticks")["stdout"])
    eventually(lambda: int(command(sandbox, "wc -l < /tmp/ticks")["stdout"]) > ticks)


def test_a_paused_sandbox_can_be_stopped(agents: MakeApi) -> None:
    api = agents("fork")
    runtime = {"runtime_id": started(api)["runtime_id"]}
    api.client.post("/pause", json=runtime)
    assert api.client.post("/stop", json=runtime).status_code == 200
    assert api.names() == []


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_deny_leaves_no_way_out_and_the_port_answers(agents: MakeApi, start: str) -> None:
    api = agents(start, network="deny")
    sandbox = started(api)
    assert command(sandbox, "echo in")["stdout"] == "in\n"
    assert command(sandbox, "ip route")["stdout"] in {"", None}
    port = api.client.base_url.port
    for address in ("10.0.2.2", os.uname().nodename):
        assert command(sandbox, f"wget -T 2 -q -O - http://{address}:{port}/health")["exit_code"] != 0
    assert command(sandbox, "ip route add default via 10.0.2.2")["exit_code"] != 0


def test_taskset_pins_where_podman_cannot(agents: MakeApi) -> None:
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    for method in ("taskset", "docker_cpuset"):
        api = agents("fork", Slots(len(cpus), 1, cpus), pinning=method)
        sandbox = started(api)
        assert os.sched_getaffinity(server_of(api, sandbox)) == {cpus[0]}
        assert command(sandbox, "grep Cpus_allowed_list /proc/self/status")["stdout"].split()[1] == str(cpus[0])


OFFENCES = {
    "memory": ("dd if=/dev/zero of=/dev/null bs=200M count=100000", {"memory_bytes": 100 << 20}, "of memory"),
    "processes": ("for i in $(seq 80); do sleep 60 & done; wait", {"pids_limit": 60}, "processes"),
    "fork bomb": ("bomb() { bomb | bomb & }; bomb; sleep 60", {"pids_limit": 60}, "processes"),
    "disk": ("head -c 60000000 /dev/zero > /workspace/big; sleep 60", {"disk_bytes": 20 << 20}, "of disk"),
    "disk elsewhere": ("head -c 60000000 /dev/zero > /tmp/big; sleep 60", {"disk_bytes": 20 << 20}, "of disk"),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_24_who_takes_more_than_it_may_is_stopped_and_named(agents: MakeApi, offence: str) -> None:
    program, limits, words = OFFENCES[offence]
    api = agents("fork", **limits)
    offender, neighbour = started(api, session_id="offender"), started(api)
    post = httpx.post(
        f"{offender['url']}/api/bash/start_bash_command",
        json={"command": program},
        headers={"X-Session-API-Key": offender["session_api_key"]},
        trust_env=False,
    )
    assert post.status_code == 200
    failed = eventually(lambda: (found := session(api, "offender"))["pod_status"] == "failed" and found, 20)
    assert words in failed["pod_logs"]
    assert words in failed["restart_reasons"][0]
    eventually(lambda: len(api.names()) == 1)
    assert command(neighbour, "echo alive")["stdout"] == "alive\n"


def test_38_sixty_four_forked_sandboxes_leave_nothing(agents: MakeApi) -> None:
    from concurrent.futures import ThreadPoolExecutor

    api = agents("fork", 64)
    for _ in range(2):
        with ThreadPoolExecutor(64) as pool:
            sandboxes = list(pool.map(lambda number: started(api, session_id=f"s{number}"), range(64)))
            outputs = list(pool.map(lambda sandbox: command(sandbox, "echo $((6 * 7))")["stdout"], sandboxes))
            assert outputs == ["42\n"] * 64
            stops = pool.map(
                lambda sandbox: api.client.post("/stop", json={"runtime_id": sandbox["runtime_id"]}).status_code,
                sandboxes,
            )
            assert set(stops) == {200}
        assert api.names() == []
        assert api.manager.admission.slots.used == 0
        assert api.manager.launcher.ports.taken == set()


def test_an_image_that_brings_its_own_server_keeps_it(agents: MakeApi) -> None:
    api = agents("fork")
    answer = api.start(image=IMAGE, command="/bin/sh -c 'exit 5'", session_id="plain")
    assert answer.status_code == 201
    failed = eventually(lambda: (found := session(api, "plain"))["pod_status"] == "failed" and found)
    assert "exit code 5" in failed["pod_logs"]
    assert COMMAND.startswith("/usr/local/bin/")


def test_an_agent_image_is_taken_out_once_and_removed_with_the_server(
    rootless_podman: podman_service.Service, agent_tree: AgentTree, tmp_path: Path
) -> None:
    image = "localhost/agent-tree:1"
    archive = rootless_podman.home / "agent.tar"
    with rootless_podman.popen("tar", "-C", str(agent_tree.root), "-cf", str(archive), ".") as tar:
        assert tar.wait(120) == 0
    rootless_podman.podman("import", "--quiet", str(archive), image)
    archive.unlink()
    tmp_path.chmod(0o755)
    config = replace(PATIENT, agent_start="exec", agent_image=image)
    with serving(KillablePodman(rootless_podman.socket), config, warden=True, has_agent=True) as api:
        assert command(started(api), "echo in")["stdout"] == "in\n"
        folder = Path(api.manager.launcher.agent_folder)
        assert folder.is_dir() and folder.name.startswith("skyrl-agent-")
        command(started(api), "true")
        assert Path(api.manager.launcher.agent_folder) == folder, "once"
    assert not folder.exists()


def test_an_agent_image_without_a_tree_is_named_in_the_error(rootless_podman: podman_service.Service) -> None:
    config = replace(PATIENT, agent_image=IMAGE)
    with serving(KillablePodman(rootless_podman.socket), config, has_agent=True) as api:
        answer = api.start(image=IMAGE, command=COMMAND)
        assert answer.status_code == 502
        assert f"--agent-image {IMAGE} holds no agent tree" in answer.json()["detail"]


def test_nothing_of_the_warden_outlives_the_server(agents: MakeApi) -> None:
    api = agents("fork")
    started(api)
    parents = [pid for pid in own_pids() if is_fork_server(pid)]
    assert parents
    helpers = [warden_of_this_test(), *parents]
    api.run(api.manager.close(10))
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
