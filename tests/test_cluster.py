"""The test cluster is what the tests of runs take it for: several hosts, an ordinary user, rootless Podman."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, belongings, leaving_nothing, leftovers, sweep
from tests.runs import squeue, until

pytestmark = pytest.mark.slurm

PODMAN_JOB = """#!/bin/bash
set -euo pipefail
store=$(mktemp -d /tmp/skyrl-store.XXXX)
export XDG_RUNTIME_DIR="$store/run" XDG_DATA_HOME="$store/data" CONTAINERS_CONF="$store/containers.conf"
mkdir -m 700 "$XDG_RUNTIME_DIR" "$XDG_DATA_HOME"
printf '[engine]\\nruntime="runc"\\ncgroup_manager="cgroupfs"\\nevents_logger="file"\\nlock_type="file"\\n' \\
    > "$CONTAINERS_CONF"
end() {
    podman rm --all --force --time 0 >/dev/null || true
    # Podman's own clean-up of the container may still be writing.
    for _ in 1 2 3 4 5; do podman unshare rm -rf "$store/data" && break; sleep 0.3; done
    kill "$(cat "$XDG_RUNTIME_DIR/libpod/tmp/pause.pid")" || true
    rm -rf "$store"
}
trap end EXIT
podman import -q "$1" localhost/web >/dev/null
podman run -d -p 23456:80 localhost/web /bin/busybox httpd -f -p 80 -h /www >/dev/null
podman info --format '{{.Host.Security.Rootless}} {{.Store.GraphRoot}}' > "$2/info"
until [ -e "$2/done" ]; do sleep 0.1; done
"""


@pytest.fixture(autouse=True)
def clean(nothing_left: object) -> None:
    """Every test here ends with nothing left on any node."""


def sbatch(user: OrdinaryUser, folder: Path, command: str, *options: str) -> str:
    """Run a command as a job to its end; what it printed."""
    output = folder / f"{'-'.join(options).replace('/', '')}.out"
    done = user.run(["sbatch", "-W", f"--output={output}", *options, f"--wrap={command}"], cwd=folder)
    text = output.read_text() if output.exists() else ""
    assert done.returncode == 0, f"{done.stderr}{text}"
    return text


def test_jobs_run_on_hosts_with_their_own_names_and_addresses(user: OrdinaryUser, jobs_base: Path) -> None:
    command = "srun bash -c 'echo $(hostname -f) $(hostname) $(ip -4 -o address show dev eth0)'"
    lines = [
        line
        for partition in ("test", "gpu_test")
        for line in sbatch(user, jobs_base, command, f"--partition={partition}", "--nodes=2").splitlines()
    ]
    seen = {words[0]: words[1:] for words in map(str.split, lines)}
    assert seen.keys() == test_cluster.NODES.keys()
    for name, address in test_cluster.NODES.items():
        assert seen[name][0] == name
        assert f"{address}/24" in seen[name]


def test_jobs_of_the_default_partition_run_as_the_user_on_cpu_nodes(user: OrdinaryUser, jobs_base: Path) -> None:
    name, uid, home = sbatch(user, jobs_base, "hostname; id -u; echo $HOME").split()
    assert name in {"cpu-a", "cpu-b"}
    assert (int(uid), Path(home)) == (user.uid, user.home)
    assert os.geteuid() == 0 != user.uid


def test_gpus_are_handed_out_and_counted(user: OrdinaryUser, jobs_base: Path) -> None:
    devices = sbatch(user, jobs_base, "echo $CUDA_VISIBLE_DEVICES", "--partition=gpu_test", "--gres=gpu:2").strip()
    assert len(devices.split(",")) == 2
    refused = user.run(["sbatch", "--partition=gpu_test", "--gres=gpu:9", "--wrap=true"])
    assert refused.returncode != 0
    assert user.run(["sbatch", "--partition=test", "--gres=gpu:1", "--wrap=true"]).returncode != 0


@pytest.mark.podman
def test_a_port_of_a_rootless_container_is_reachable_from_another_node(user: OrdinaryUser, jobs_base: Path) -> None:
    make_image(jobs_base)
    script = jobs_base / "podman.sh"
    script.write_text(PODMAN_JOB)
    options = ["--nodelist=cpu-a", f"--output={jobs_base / 'out'}"]
    job = user.run(["sbatch", "--parsable", *options, str(script), str(jobs_base / "image.tar"), str(jobs_base)])
    assert job.returncode == 0, job.stderr

    def started() -> bool:
        assert squeue(user, "-j", job.stdout.strip()), (jobs_base / "out").read_text()
        return (jobs_base / "info").exists() and bool((jobs_base / "info").read_text())

    until("the container", started, 60)
    rootless, store = (jobs_base / "info").read_text().split()
    assert rootless == "true"
    assert store.startswith("/tmp/skyrl-store.")
    fetch = r"exec 3<>/dev/tcp/cpu-a/23456; printf 'GET /hello HTTP/1.0\r\n\r\n' >&3; hostname; timeout 10 cat <&3"
    answer = sbatch(user, jobs_base, f'bash -c "{fetch}"', "--partition=gpu_test", "--nodelist=gpu-a")
    assert "gpu-a" in answer
    assert "hello from a sandbox" in answer
    user.run(["touch", str(jobs_base / "done")])
    until("the job's end", lambda: not squeue(user, "-j", job.stdout.strip()), 30)


def make_image(folder: Path) -> None:
    """A root file system of a static busybox and one page."""
    (folder / "hello").write_text("hello from a sandbox\n")
    with tarfile.open(folder / "image.tar", "w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        tar.add(folder / "hello", "www/hello")


def test_the_user_s_environment_is_its_own(user: OrdinaryUser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYRL_STRAY", "1")
    lines = user.run(["env"], env={"GIVEN": "yes"}).stdout.splitlines()
    assert f"HOME={user.home}" in lines
    assert "GIVEN=yes" in lines
    assert not [line for line in lines if line.startswith("SKYRL_")]


@pytest.fixture
def stray(user: OrdinaryUser) -> Iterator[str]:
    """A job, a process that no job knows, and files on a node, all of the user's."""
    before = belongings(user)
    path = f"/tmp/stray-{os.getpid()}"
    user.run(["bash", "-c", f"mkdir {path}; touch {path}.sock; setsid -f sleep 600 </dev/null >/dev/null 2>&1"])
    user.run(["sbatch", "--hold", "--wrap=true"])
    found = leftovers(user, before)
    sweep(user, before)
    yield "; ".join(found)
    assert leftovers(user, before) == []


def test_what_is_left_is_found_and_swept(stray: str) -> None:
    assert re.search(r"job \d+ wrap PENDING", stray)
    assert re.search(r"process \d+: .*sleep 600", stray)
    assert f"left on a node: /tmp/stray-{os.getpid()};" in f"{stray};"
    assert f"left on a node: /tmp/stray-{os.getpid()}.sock" in stray


def test_a_job_that_ignores_sigterm_is_killed_after_killwait(user: OrdinaryUser, jobs_base: Path) -> None:
    mark = jobs_base / "started"
    words = f"trap '' TERM; touch {mark}; while :; do sleep 1; done"
    job = user.run(["sbatch", "--parsable", "--output=/dev/null", f"--wrap={words}"]).stdout.strip()
    until("the job", mark.exists, 30)
    user.run(["scancel", job])
    until("its end by SIGKILL", lambda: not squeue(user, "-j", job), 20)


def test_a_file_is_hidden_on_one_node_alone() -> None:
    words = "grep -c . /etc/subuid; [ -x /usr/bin/podman ] && echo there || echo none"

    def seen(node: str) -> str:
        return test_cluster.on_node(node, "bash", "-c", words)

    with test_cluster.hide("cpu-a", Path("/etc/subuid")), test_cluster.hide("cpu-a", Path("/usr/bin/podman")):
        assert seen("cpu-a").split() == ["0", "none"]
        assert seen("cpu-b").split()[1] == "there"
        assert Path("/etc/subuid").stat().st_size
    assert seen("cpu-a") == seen("cpu-b")


def test_a_disk_of_one_node_and_one_that_all_share() -> None:
    shared, own = test_cluster.SHARE / "disk", test_cluster.SHARE / "own"
    for folder in (shared, own):
        folder.mkdir()
    try:
        with (
            test_cluster.mounted_here(shared, "-t", "tmpfs", "tmpfs"),
            test_cluster.mounted("cpu-b", own, "-t", "tmpfs", "-o", "size=1m", "tmpfs"),
        ):
            (shared / "file").touch()
            test_cluster.on_node("cpu-b", "touch", str(own / "file"))
            for node in test_cluster.NODES:
                assert test_cluster.on_node(node, "ls", str(shared)) == "file\n"
                assert test_cluster.on_node(node, "ls", str(own)) == ("file\n" if node == "cpu-b" else "")
        assert test_cluster.on_node("cpu-b", "ls", str(own)) == ""
    finally:
        for folder in (shared, own):
            folder.rmdir()


def reaches(node: str, address: str, seconds: int = 10) -> bool:
    """Whether a node's slurmd port can be reached from a node; in so many seconds, the start of a shell included."""
    words = ["timeout", str(seconds), "bash", "-c", f": < /dev/tcp/{address}/16818"]
    try:
        test_cluster.on_node(node, *words)
    except test_cluster.ClusterError:
        return False
    return True


def test_cables_are_unplugged_and_nodes_kept_apart() -> None:
    a, b, c = (test_cluster.NODES[name] for name in ("cpu-a", "gpu-a", "gpu-b"))
    assert reaches("cpu-a", b) and reaches("gpu-a", a)
    with test_cluster.isolate("cpu-a", "gpu-a"):
        assert not reaches("cpu-a", b, 1) and not reaches("gpu-a", a, 1)
        assert reaches("cpu-a", c)
        assert "NODE" in test_cluster.on_node("cpu-a", "env", f"SLURM_CONF={test_cluster.CONF}", "sinfo")
    with test_cluster.unplug("cpu-a"):
        assert not reaches("gpu-a", a, 1)
    until("the cable", lambda: reaches("gpu-a", a, 1), 30)
    assert reaches("cpu-a", b)


def test_a_node_that_goes_off_takes_other_networks_on_it_along(user: OrdinaryUser, jobs_base: Path) -> None:
    """As the sandboxes of rootless Podman have, whose processes are not in the node's own network."""
    mark, before = jobs_base / "mark", user.processes().keys()
    words = f"unshare --map-root-user --net sleep 600 & touch {mark}; wait"
    user.run(["sbatch", "--no-requeue", "--nodelist=cpu-b", "--output=/dev/null", f"--wrap={words}"])
    try:
        until("the job", mark.exists, 30)
        until("its sleep", lambda: any(words.startswith("sleep") for words in user.processes().values()), 10)
        test_cluster.power_off("cpu-b")
        assert not user.processes().keys() - before
    finally:
        test_cluster.power_on("cpu-b")


def test_a_port_is_found_on_its_node(user: OrdinaryUser, jobs_base: Path) -> None:
    before = belongings(user)
    serve = "exec busybox httpd -f -p 23457 -h /usr/share"
    job = user.run(["sbatch", "--parsable", "--nodelist=cpu-b", "--output=/dev/null", f"--wrap={serve}"]).stdout
    until("the port", lambda: "port 23457 on cpu-b" in leftovers(user, before), 30)
    user.run(["scancel", job.strip()])
    until("its end", lambda: not leftovers(user, before), 30)


def test_two_users_who_have_no_rights_on_each_other(user: OrdinaryUser, other_user: OrdinaryUser) -> None:
    assert user.uid != other_user.uid
    assert not set(user.subuids) & set(other_user.subuids)
    with leaving_nothing(other_user):
        before = belongings(other_user)
        with user.popen(["sleep", "60"]) as process:
            assert leftovers(other_user, before) == []
            assert other_user.run(["bash", "-c", f"kill {process.pid}"]).returncode != 0
            assert process.poll() is None
            process.kill()


def _try_to_lock(path: Path) -> None:
    test_cluster.LOCK = path
    try:
        with test_cluster.exclusive(deadline_s=0):
            pass
    except test_cluster.ClusterError as problem:
        path.with_suffix(".said").write_text(str(problem))


def test_a_second_session_waits_and_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_cluster, "LOCK", tmp_path / "lock")
    said = tmp_path / "lock.said"
    with test_cluster.exclusive(deadline_s=0):
        in_another_process(tmp_path / "lock")
    assert f"process {os.getpid()} uses the test cluster" in said.read_text()
    said.unlink()
    in_another_process(tmp_path / "lock")
    assert not said.exists()


def in_another_process(lock: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=_try_to_lock, args=(lock,))
    other.start()
    other.join(30)
    assert other.exitcode == 0


def test_a_stale_pid_file_names_nobody(tmp_path: Path) -> None:
    """After a restart of the machine its pid may be anybody's."""
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "pid").write_text(str(other.pid))
        test_cluster._stop(tmp_path / "pid")
        time.sleep(0.2)
        assert other.poll() is None
        other.kill()
    assert all(test_cluster._alive(path) for path in test_cluster.pid_files())
