"""What clients may rely on, on the fake and on real Podman alike. Numbers in names are those of ``test_checklist``."""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.runtime.commands import CHATTY, EXIT, IMAGE, IMAGE_WITH_ENTRYPOINT, NOT_THERE, SERVE, SERVE_ON_PLACEHOLDER
from tests.runtime.conftest import API_KEY, ONE_SERVER, REAL_HEAD_TOO, Api

VOCABULARY = {"pending", "running", "ready", "failed", "crashloopbackoff", "not found", "unknown"}


def eventually(probe: Callable[[], Any], deadline_s: float = 10.0) -> Any:
    """The first true result of ``probe``."""
    deadline = time.monotonic() + deadline_s
    while not (found := probe()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def started(api: Api, **fields: Any) -> dict[str, Any]:
    """A sandbox that is ready."""
    answer = api.start(**{"image": IMAGE, "command": api.serve, **fields})
    assert answer.status_code == 201, answer.text
    sandbox: dict[str, Any] = answer.json()
    ready = "running" if fields.get("command") == SERVE_ON_PLACEHOLDER else "ready"
    path = f"/sessions/{sandbox['session_id']}"
    # Sixteen plain agent servers import 4 s of modules each, on two cores.
    eventually(lambda: api.client.get(path).json()["pod_status"] == ready, 120 if api.agent else 10)
    found: dict[str, Any] = api.client.get(path).json()
    return found


# What the pages of ``commands.SERVE`` show, where the agent server runs instead.
LOOKS = {
    "env": "tr '\\0' '\\n' < /proc/$PPID/environ",  # the server keeps its key from the commands that it runs
    "cwd": "readlink /proc/$PPID/cwd",
    "uid": "id -u",
    "workspace": "touch /workspace/file && echo yes",
    "status": "cat /proc/self/status",
    "uid_map": "cat /proc/self/uid_map",
}


def page(sandbox: dict[str, Any], name: str) -> str:
    """A page of the sandbox's own server; what a command shows where that is the agent server."""
    answer = httpx.get(f"{sandbox['url']}/{name}", trust_env=False)
    if answer.status_code == 404 and name in LOOKS:
        return str(command(sandbox, LOOKS[name])["stdout"])
    assert answer.status_code == 200
    return answer.text


def command(sandbox: dict[str, Any], text: str, timeout_s: int = 20) -> dict[str, Any]:
    """The outcome of a command that the agent server runs."""
    answer = httpx.post(
        f"{sandbox['url']}/api/bash/execute_bash_command",
        json={"command": text, "timeout": timeout_s},
        headers={"X-Session-API-Key": sandbox["session_api_key"]},
        timeout=timeout_s + 10,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_08_09_start_answers_with_all_that_clients_read(api: Api) -> None:
    answer = api.start(image=IMAGE, command=api.serve, session_id="s1").json()
    assert answer["session_id"] == "s1"
    assert answer["runtime_id"]
    assert answer["status"] == "running"
    assert answer["pod_status"] in VOCABULARY
    assert answer["work_hosts"] == {}
    assert answer["restart_count"] == 0
    assert answer["restart_reasons"] == []
    assert len(answer["session_api_key"]) > 20
    assert httpx.URL(answer["url"]).path in {"", "/"}
    assert httpx.URL(answer["url"]).host == "127.0.0.1"


def test_20_ready_means_that_the_url_answers(api: Api) -> None:
    sandbox = started(api)
    assert page(sandbox, "health")


def test_05_string_and_list_start_the_same_process(api: Api) -> None:
    words = shlex.split(api.serve) if isinstance(api.serve, str) else api.serve
    listed, text = started(api, command=words), started(api, command=shlex.join(words))
    assert page(listed, "uid") == page(text, "uid") == "0\n"


def test_07_an_entry_point_that_equals_the_program_is_not_run_twice(api: Api) -> None:
    started(api, image=IMAGE_WITH_ENTRYPOINT)


def test_16_working_directory_is_made_and_workspace_is_writable(api: Api) -> None:
    sandbox = started(api, working_dir="/openhands/code/")
    assert page(sandbox, "cwd").rstrip("/\n") == "/openhands/code"
    assert page(sandbox, "workspace") == "yes\n"


def test_17_the_container_has_its_session_key_and_the_clients_variables(api: Api) -> None:
    sandbox = started(api, environment={"COLOUR": "green blue", "SESSION_API_KEY": "mine"})
    lines = page(sandbox, "env").splitlines()
    assert f"SESSION_API_KEY={sandbox['session_api_key']}" in lines
    assert "COLOUR=green blue" in lines


def test_the_api_key_never_enters_a_container(api: Api) -> None:
    sandbox = started(api, environment={"FORWARDED": f"Bearer {API_KEY}", "OTHER": "1"})
    environment = page(sandbox, "env")
    assert API_KEY not in environment
    assert "OTHER=1" in environment


def test_18_the_placeholder_becomes_the_port_and_running_the_word(api: Api) -> None:
    sandbox = started(api, command=SERVE_ON_PLACEHOLDER)
    assert sandbox["pod_status"] == "running"
    assert page(sandbox, "health")


def test_sandboxes_are_confined(api: Api) -> None:
    sandbox = started(api)
    status = dict(line.split(":\t") for line in page(sandbox, "status").splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) & (1 << 21 | 1 << 12 | 1 << 13) == 0  # SYS_ADMIN, NET_ADMIN, NET_RAW
    first_container_id, first_host_id, count = page(sandbox, "uid_map").split()[:3]
    assert first_container_id == "0"
    assert first_host_id != "0" or int(count) < 1 << 31  # never the host's own root


@REAL_HEAD_TOO
def test_12_a_living_session_is_found_and_a_stopped_one_started_anew(api: Api) -> None:
    first = started(api, session_id="again")
    second = started(api, session_id="again")
    assert first["runtime_id"] == second["runtime_id"]
    assert len(api.names()) == 1
    assert api.client.post("/stop", json={"runtime_id": first["runtime_id"]}).status_code == 200
    assert started(api, session_id="again")["runtime_id"] != first["runtime_id"]


@REAL_HEAD_TOO
def test_12_the_same_session_twice_at_once_is_one_sandbox(api: Api) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.start(image=IMAGE, command=api.serve, session_id="one").json(), range(8)))
    assert len({answer["runtime_id"] for answer in answers}) == 1
    assert len(api.names()) == 1


def at_once(api: Api) -> int:
    """Sixteen; five where each is an agent server that imports for seconds of CPU time."""
    return 5 if api.agent and api.manager.config.agent_start == "exec" else 16


@REAL_HEAD_TOO
def test_03_sixteen_starts_in_parallel(api: Api) -> None:
    def start_one(number: int) -> dict[str, Any]:
        return started(api, session_id=f"s{number}")

    count = at_once(api)
    with ThreadPoolExecutor(count + 1) as pool:
        futures = [pool.submit(start_one, number) for number in range(count)]
        assert api.client.get("/health", timeout=10).status_code == 200
        sandboxes = [future.result() for future in futures]
    assert len({sandbox["url"] for sandbox in sandboxes}) == count
    assert api.client.get("/list").json()["total"] == count


def test_15_a_command_that_exits_at_once_has_failed_with_its_last_lines(api: Api) -> None:
    answer = api.start(image=IMAGE, command=EXIT, session_id="short")
    assert answer.status_code == 201
    failed = eventually(lambda: (found := session(api, "short"))["pod_status"] == "failed" and found)
    assert "last words" in failed["pod_logs"]
    assert "exit code 3" in failed["pod_logs"]
    assert failed["status"] == "stopped"
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0)


def test_15_the_last_lines_of_a_chatty_command_are_kept(api: Api) -> None:
    assert api.start(image=IMAGE, command=CHATTY, session_id="chatty").status_code == 201
    failed = eventually(lambda: (found := session(api, "chatty"))["pod_status"] == "failed" and found)
    assert failed["pod_logs"].endswith("in pieces")
    assert len(failed["pod_logs"]) < 20_000


@REAL_HEAD_TOO
def test_15_a_program_that_is_not_there_is_an_error_or_failed(api: Api) -> None:
    answer = api.start(image=IMAGE, command=NOT_THERE, session_id="nobody")
    if answer.status_code == 201:
        eventually(lambda: session(api, "nobody")["pod_status"] == "failed")
        assert "No such file" in session(api, "nobody")["pod_logs"]
    else:
        assert answer.status_code == 502
        assert "no such file" in answer.json()["detail"]
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0)


def test_15_an_image_that_is_not_to_be_had(api: Api) -> None:
    answer = api.start(image="localhost/nonesuch:1", command=api.serve)
    assert answer.status_code == 502
    assert "localhost/nonesuch:1" in answer.json()["detail"]
    answer = api.start(image="localhost/nonesuch:1", command=api.serve, image_pull_policy="Never")
    assert answer.status_code == 502
    eventually(lambda: api.manager.admission.slots.used == 0)


@REAL_HEAD_TOO
def test_24_a_sandbox_that_dies_is_seen_and_frees_its_slot(api: Api) -> None:
    sandbox = started(api, session_id="victim")
    api.run(api.engine.kill(f"sandbox-{sandbox['runtime_id']}"))
    dead = eventually(lambda: (found := session(api, "victim"))["pod_status"] == "failed" and found)
    assert "137 (SIGKILL)" in dead["pod_logs"]
    eventually(lambda: api.names() == [] and api.manager.admission.slots.used == 0)


def test_24_a_container_that_vanishes_frees_its_slot(api: Api) -> None:
    sandbox = started(api, session_id="victim")
    api.run(api.engine.remove(f"sandbox-{sandbox['runtime_id']}"))
    eventually(lambda: session(api, "victim")["pod_status"] == "failed")
    eventually(lambda: api.manager.admission.slots.used == 0)


def test_21_polls_after_ready(api: Api) -> None:
    sandbox = started(api)
    path = f"/runtime/{sandbox['runtime_id']}"
    assert {api.client.get(path).json()["pod_status"] for _ in range(1000)} == {"ready"}


@REAL_HEAD_TOO
def test_27_list_has_only_the_living(api: Api) -> None:
    first, second = started(api), started(api)
    api.client.post("/stop", json={"runtime_id": first["runtime_id"]})
    listed = api.client.get("/list").json()
    assert listed["total"] == 1
    assert [entry["runtime_id"] for entry in listed["runtimes"]] == [second["runtime_id"]]
    assert listed["runtimes"][0]["session_id"] == second["session_id"]


@REAL_HEAD_TOO
def test_28_stop_removes_and_may_be_repeated(api: Api) -> None:
    runtime_id = started(api)["runtime_id"]
    for _ in range(2):
        answer = api.client.post("/stop", json={"runtime_id": runtime_id})
        assert answer.status_code == 200, answer.text
        assert api.names() == []
        assert api.manager.admission.slots.used == 0
    after = api.client.get(f"/runtime/{runtime_id}").json()
    assert (after["status"], after["pod_status"]) == ("stopped", "not found")
    assert api.client.post("/stop", json={"runtime_id": None}).status_code == 200
    assert api.client.post("/stop", json={}).status_code == 200
    assert api.client.post("/stop", json={"runtime_id": "nonesuch"}).status_code == 404


def test_31_many_stops_at_once(api: Api) -> None:
    count = at_once(api)
    with ThreadPoolExecutor(count) as pool:
        ids = list(pool.map(lambda _: started(api)["runtime_id"], range(count)))
        codes = list(pool.map(lambda i: api.client.post("/stop", json={"runtime_id": i}).status_code, ids))
    assert codes == [200] * count
    assert api.names() == []


def test_labels_say_whose_container_it_is(api: Api) -> None:
    sandbox = started(api, session_id="mine")
    [(state, labels)] = api.run(api.engine.list("skyrl.server"))
    assert state.name == f"sandbox-{sandbox['runtime_id']}"
    assert labels["skyrl.session"] == "mine"
    assert labels["skyrl.job"] == "4711"


@ONE_SERVER
def test_an_orphan_of_a_dead_server_is_removed_and_one_of_a_living_server_is_not(api: Api) -> None:
    from slurm_runtime.ownership import process_mark
    from slurm_runtime.podman import ContainerSpec

    def spec(name: str, mark: str) -> ContainerSpec:
        return ContainerSpec(name, IMAGE, tuple(SERVE), {}, "/", {"skyrl.server": mark}, 60000)

    alive = process_mark()
    dead = "/".join([*alive.split("/")[:3], "1", "12345"])  # number 1 started at another time
    api.run(api.engine.create(spec("orphan", dead)))
    api.run(api.engine.create(spec("neighbour", alive)))
    api.run(api.manager.supervisor.sweep())
    assert api.names() == ["neighbour"]
    api.run(api.engine.remove("neighbour"))


@ONE_SERVER
def test_what_a_dead_server_left_is_taken_over(api: Api) -> None:
    from slurm_runtime.labels import Notes
    from slurm_runtime.ownership import process_mark
    from slurm_runtime.podman import ContainerSpec

    api.manager.supervisor._next_sweep = float("inf")  # it would remove what this test makes
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    dead = "/".join([*process_mark().split("/")[:3], "1", "12345"])  # number 1 started at another time
    for name, slots, is_started in (("theirs", (3, 5), True), ("half", (4,), False)):
        notes = Notes(slots, 2.0, "LEGACY", "PLAIN", url, IMAGE, 60000)
        labels = {**api.manager.launcher.labels.of(name, notes), "skyrl.server": dead}
        variables = {"SESSION_API_KEY": "their-key"}
        spec = ContainerSpec(
            f"sandbox-{name}",
            IMAGE,
            tuple(SERVE),
            variables,
            "/",
            labels,
            60000,
            "127.0.0.1",
            port if is_started else 0,
        )
        api.run(api.engine.create(spec))
        if is_started:
            api.run(api.engine.start(spec.name))
    api.run(api.manager.supervisor.adopt(api.run(api.manager.connection.ready())))
    theirs = eventually(lambda: (found := session(api, "theirs"))["pod_status"] == "ready" and found)
    assert (theirs["runtime_id"], theirs["session_api_key"], theirs["url"]) == ("theirs", "their-key", url)
    assert api.manager.admission.slots.taken == {3, 5}
    assert port in api.manager.launcher.ports.taken
    assert "cut off" in session(api, "half")["pod_logs"]
    eventually(lambda: api.names() == ["sandbox-theirs"])
    assert api.client.post("/stop", json={"runtime_id": "theirs"}).status_code == 200
    assert api.names() == []
    assert api.manager.admission.slots.used == 0
    assert port not in api.manager.launcher.ports.taken


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def session(api: Api, session_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.client.get(f"/sessions/{session_id}").json()
    return found
