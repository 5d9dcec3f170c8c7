"""Podman storage of one job: private, complete at its end, and nobody else's is touched."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.lib import podman_storage as ps
from slurm.lib.api_server_child import AlarmFilter, listening_socket
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.images import has_image, image_source, is_nowhere, refusal
from slurm.lib.podman_storage import PodmanStorage
from slurm.lib.processes import pids
from slurm_runtime.agent.tree import MOUNT_POINT
from slurm_runtime.references import archive_name
from tests.conftest import OrdinaryUser
from tests.runs import until
from tests.runtime import agent_tree
from tests.runtime.agent_tree import ASK_FOR_KEYRING, REFUSED

STORE = "from slurm.lib.podman_storage import podman_storage, processes_of, readable_stores, sweep\n"


def test_every_path_of_podman_lies_in_the_store() -> None:
    storage = PodmanStorage(Path("/tmp/skyrl-1-2"))
    environment = storage.environment({"HOME": "/home/x", "XDG_RUNTIME_DIR": "/run/user/1"})
    assert environment.pop("HOME") == "/home/x"
    assert all("/tmp/skyrl-1-2" in value for value in environment.values())
    conf = ps.storage_conf(storage, [Path("/a b/store")])
    assert 'graphroot = "/tmp/skyrl-1-2/data/containers/storage"' in conf
    assert 'additionalimagestores = ["/a b/store"]' in conf


def test_each_folder_that_will_not_do_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(ps, "file_system_of", lambda path: "nfs4" if path == tmp_path else "ext4")
    with pytest.raises(EnvironmentProblem) as caught:
        ps.choose_scratch(["/nowhere", str(tmp_path), str(long)], "7")
    message = str(caught.value)
    assert "/nowhere: does not exist" in message
    assert "lies on nfs4" in message
    assert "path too long" in message
    assert "LOCAL_SCRATCH" in message


def test_the_first_that_will_do_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ps.choose_scratch(["/nowhere", "/tmp"], "7") == Path("/tmp")


def test_what_a_slow_look_found_is_killed_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        monkeypatch.setattr(ps, "processes_of", lambda _storage: [process.pid])
        ps.kill_processes(PodmanStorage(tmp_path), deadline_s=0)
        assert process.wait(10) == -signal.SIGKILL


def test_a_podman_that_has_no_namespace_of_its_own_yet_is_one_of_the_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would make after the last look, a namespace and a process that holds it, nobody would end.

    Another user's, which an ordinary user cannot end, is none of the store's.
    """
    assert ps._owner(os.getpid()) == os.geteuid()
    assert ps._owner(2**22 + 1) is None
    users: dict[int, int] = {}
    monkeypatch.setattr(ps, "_owner", lambda pid: users.get(pid, 1000))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    storage = PodmanStorage(tmp_path)
    podman, other = (tmp_path / "bin" / name for name in ("podman", "trainer"))
    podman.parent.mkdir()
    environment = storage.environment(os.environ)
    for program in (podman, other):
        shutil.copy("/bin/sleep", program)
    its = subprocess.Popen([podman, "60"], env=environment)
    no = subprocess.Popen([other, "60"], env=environment)
    others = subprocess.Popen([podman, "60"], env=environment)
    users[others.pid] = 1001
    children = (its, no, others)
    try:
        until("all run", lambda: [ps._command_name(one.pid) for one in children] == ["podman", "trainer", "podman"], 10)
        assert ps.processes_of(storage) == [its.pid]
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert ps.processes_of(storage) == sorted([its.pid, others.pid])
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_what_a_sandbox_says_of_its_store_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may guess the name of another job's; the processes of its user namespace would be ended with that one."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(ps, "_owner", lambda _pid: 1000)
    storage = PodmanStorage(tmp_path / "store")
    guess = tmp_path / "guess"
    guess.write_text(f"{storage.root}/x")
    script = f'GUESS="$(cat {guess})" exec sleep 60'
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    with subprocess.Popen(apart) as sandbox:
        try:
            until("it says so", lambda: any(map(_is_named(storage), pids())), 10)
            assert ps.processes_of(storage) == []
        finally:
            sandbox.kill()


def _is_named(storage: PodmanStorage) -> Callable[[int], bool]:
    return lambda pid: ps._mentions(pid, f"{storage.root}/".encode())


def test_file_system_of_a_mount() -> None:
    assert ps.file_system_of(Path("/proc/self")) == "proc"
    assert ps.file_system_of(Path("/sys/kernel")) == "sysfs"


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("localhost/a:latest", True),
        ("localhost/a", True),
        ("a", True),
        ("docker.io/library/busybox:1.36", True),
        ("busybox:1.36", True),
        ("busybox", False),
        ("b", False),
        ("host:5000/a", False),
    ],
)
def test_image_names(image: str, found: bool) -> None:
    assert has_image(frozenset({"localhost/a:latest", "docker.io/library/busybox:1.36"}), image) is found


def test_where_an_image_comes_from(tmp_path: Path) -> None:
    index = tmp_path / "overlay-images" / "images.json"
    index.parent.mkdir()
    index.write_text('[{"names": ["docker.io/org/x:1"]}, {"names": null}]')
    overlay = (tmp_path, "overlay")
    assert image_source("docker.io/org/x:1", None, overlay) == "user store"
    assert image_source("docker.io/org/x:2", None, overlay) == "registry"
    assert image_source("docker.io/org/x:1", tmp_path / "a.tar", overlay) == "archive"
    assert image_source("localhost/skyrl-busybox:latest", None, None) == "made here"


def test_a_full_disk_is_said_first(tmp_path: Path) -> None:
    said = "writing blob: storing blob to file: write /x/1: No space left on device"
    assert refusal("/a.tar", said, tmp_path).startswith("no space left on the local disk of ")
    assert (
        refusal("/a.tar", "invalid tar header", tmp_path)
        == "podman could not take the image /a.tar: invalid tar header"
    )


def test_an_image_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / archive_name("localhost/kept:1")).touch()
    wanted = ["localhost/kept:1", "localhost/kept", "localhost/kept@sha256:" + "0" * 64, "docker.io/org/x:1", "x"]
    assert [is_nowhere(image, tmp_path) for image in wanted] == [False, True, True, False, False]


def test_a_taken_port_is_replaced_and_a_full_range_is_an_error() -> None:
    with listening_socket("127.0.0.1", None, None) as first:
        port = first.getsockname()[1]
        with listening_socket("127.0.0.1", port, None) as second:
            assert second.getsockname()[1] != port
        with pytest.raises(EnvironmentProblem, match="no free port in RUNTIME_PORT_RANGE"):
            listening_socket("127.0.0.1", None, range(port, port + 1))


def test_only_warnings_and_errors_go_to_err() -> None:
    log = textwrap.dedent("""\
        2026-01-01 00:00:00 [INFO] fine
        2026-01-01 00:00:00 [WARN] careful
        2026-01-01 00:00:00 [INFO] fine
        2026-01-01 00:00:00 [ERROR] broken
        Traceback (most recent call last):
          File "x"
        ValueError: y
        2026-01-01 00:00:00 [INFO] fine
        """)
    alarms = AlarmFilter()
    passed = [line for line in log.encode().splitlines() if alarms.wants(line)]
    assert [line.split()[-1] for line in passed] == [b"careful", b"broken", b"last):", b'"x"', b"y"]


def python(user: OrdinaryUser, checkout: Path, code: str) -> subprocess.CompletedProcess[str]:
    argv = [str(checkout / ".venv" / "bin" / "python"), "-c", STORE + textwrap.dedent(code)]
    return user.run(argv, env={"PYTHONPATH": str(checkout)})


@pytest.mark.podman
def test_a_dead_jobs_storage_is_swept_and_a_living_ones_is_not(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    dead, living, foreign = (Path(f"/tmp/skyrl-{user.uid}-{name}") for name in ("dead", "living", "foreign"))
    user.run(["mkdir", "-p", *map(str, (dead, living, foreign))])
    for path in (dead, living):
        lay_lock(user, path)
    unreadable, elsewhere = (Path(f"/tmp/skyrl-{user.uid}-{name}") for name in ("unreadable", "elsewhere"))
    user.run(["mkdir", str(unreadable), str(elsewhere)])
    lay_lock(user, unreadable, "")
    lay_lock(user, elsewhere, json.dumps({"host": "another-host"}))
    try:
        with (living / "owner.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = python(user, checkout, "from pathlib import Path\nsweep(Path('/tmp'))")
            assert done.returncode == 0, done.stderr
            assert not dead.exists()
            assert living.exists()
            assert foreign.exists(), "without a lock it is none of ours"
            assert unreadable.exists(), "whose it is is not known"
            assert elsewhere.exists(), "its lock is not seen here"
    finally:
        user.run(["rm", "-rf", *map(str, (dead, living, foreign, unreadable, elsewhere))])


def lay_lock(user: OrdinaryUser, folder: Path, text: str | None = None) -> None:
    """The lock of an owner on this host that is dead, or another text in it."""
    said = json.dumps({"pid": 1, "host": socket.gethostname()}) if text is None else text
    done = user.run(["sh", "-c", 'printf %s "$1" > "$2"', "sh", said, str(folder / "owner.lock")])
    assert done.returncode == 0, done.stderr


@pytest.mark.podman
def test_what_could_not_be_removed_is_named_and_the_next_sweep_knows_it(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    dead = Path(f"/tmp/skyrl-{user.uid}-dead")
    user.run(["mkdir", "-p", str(dead / "run" / "busy"), str(dead / "data")])
    user.run(["touch", str(dead / "storage.conf"), str(dead / "run" / "busy" / "file")])
    lay_lock(user, dead)
    try:
        os.chown(dead / "run" / "busy", 0, 0)
        done = python(user, checkout, "from pathlib import Path\nsweep(Path('/tmp'))")
        assert f"could not remove all of {dead} (left: run); the next job" in done.stderr
        assert {path.name for path in dead.iterdir()} == {"run", "owner.lock"}
        os.chown(dead / "run" / "busy", user.uid, user.gid)
        done = python(user, checkout, "from pathlib import Path\nsweep(Path('/tmp'))")
        assert not dead.exists(), done.stderr
    finally:
        shutil.rmtree(dead, ignore_errors=True)


@pytest.mark.podman
def test_what_podman_leaves_that_is_killed_as_it_begins_is_removed(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    """The kernel's work folder of an overlay mount, in a store that was made only to remove another's files."""
    dead = Path(f"/tmp/skyrl-{user.uid}-dead")
    work = dead / ".skyrl-rm-killed" / "data" / "compat1" / "work" / "work"
    precious = user.home / "precious"
    user.run(["mkdir", "-p", str(work / "index"), str(precious)])
    user.run(["ln", "-s", str(precious), str(work.parent / "link")])
    user.run(["chmod", "555", str(precious)])
    user.run(["chmod", "000", str(work)])
    lay_lock(user, dead)
    try:
        done = python(user, checkout, "from pathlib import Path\nsweep(Path('/tmp'))")
        assert not dead.exists(), done.stderr
        assert precious.stat().st_mode & 0o777 == 0o555
    finally:
        user.run(["chmod", "700", str(work), str(precious)])
        user.run(["rm", "-rf", str(dead), str(precious)])


@pytest.mark.podman
def test_a_sweep_follows_no_link_that_another_user_laid(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    """Whose name is in a folder's name does not say who made it: here root did, and its links lead into the home."""
    home = user.home / "not to be removed"
    trap, link = (Path(f"/tmp/skyrl-{user.uid}-{name}") for name in ("trap", "link"))
    user.run(["mkdir", "-p", str(home / "containers")])
    user.run(["touch", str(home / "containers" / "precious")])
    lay_lock(user, home)
    try:
        trap.mkdir()
        trap.chmod(0o777)
        (trap / "data").symlink_to(home)
        (trap / "owner.lock").write_text((home / "owner.lock").read_text())
        (trap / "owner.lock").chmod(0o666)
        link.symlink_to(home)
        done = python(user, checkout, "from pathlib import Path\nsweep(Path('/tmp'))")
        assert done.returncode == 0, done.stderr
        assert (home / "containers" / "precious").exists()
        assert trap.exists()
    finally:
        shutil.rmtree(trap, ignore_errors=True)
        link.unlink(missing_ok=True)
        user.run(["rm", "-rf", str(home)])


@pytest.mark.podman
def test_a_sweep_removes_what_was_never_finished(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    old, new, throwaway = (Path(f"/tmp/.skyrl-{name}") for name in (f"{user.uid}-1.old", f"{user.uid}-2.new", "rm-old"))
    user.run(["mkdir", *map(str, (old, new, throwaway))])
    user.run(["touch", "-d", "2 hours ago", str(old), str(throwaway)])
    try:
        done = python(user, checkout, "from pathlib import Path\nsweep(Path('/tmp'))")
        assert done.returncode == 0, done.stderr
        assert [path.exists() for path in (old, new, throwaway)] == [False, True, False]
    finally:
        user.run(["rm", "-rf", *map(str, (old, new, throwaway))])


@pytest.mark.podman
def test_the_users_own_store_is_read_and_left_as_it_is(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    """An image that the user pulled beforehand is usable without a registry, from an overlay store."""
    archive = _tiny_image(user)
    own = user.home / "own store"
    conf = user.home / "own.conf"
    script = f"""
        set -e
        printf '[storage]\\ndriver = "overlay"\\nrootless_storage_path = "{own}"\\n' > '{conf}'
        export CONTAINERS_STORAGE_CONF='{conf}'
        podman import -q '{archive}' localhost/pulled >/dev/null
        find '{own}' -type f | sort | xargs -d '\\n' md5sum > before
    """
    made = user.run(["bash", "-c", textwrap.dedent(script)])
    assert made.returncode == 0, made.stderr
    done = python(
        user,
        checkout,
        f"""
        import os, subprocess
        from pathlib import Path
        os.environ["CONTAINERS_STORAGE_CONF"] = {str(conf)!r}
        with podman_storage(Path("/tmp"), "mine", readable_stores(os.environ)) as storage:
            words = ["podman", "images", "--format", "{{{{.Repository}}}}"]
            print(subprocess.run(words, env=storage.environment(os.environ), capture_output=True, text=True).stdout)
        """,
    )
    assert "localhost/pulled" in done.stdout, done.stderr
    compare = f"cd; find '{own}' -type f | sort | xargs -d '\\n' md5sum | grep -v '\\.lock$' > after; diff before after"
    changed = user.run(["bash", "-c", compare])
    assert [line for line in changed.stdout.splitlines() if line[:1] in "<>" and ".lock" not in line] == []
    user.run(["bash", "-c", f"podman unshare rm -rf '{own}'; rm -f '{conf}'"])
    _forget_default_podman(user)


def _tiny_image(user: OrdinaryUser) -> Path:
    path = user.home / "tiny.tar"
    with tarfile.open(path, "w") as archive:
        archive.add("/bin/busybox", "bin/busybox")
    os.chown(path, user.uid, user.gid)
    return path


def _forget_default_podman(user: OrdinaryUser) -> None:
    """End and remove what Podman keeps for this user's default store; started by this test."""
    for pid, words in user.processes().items():
        if words.startswith("catatonit -P"):
            os.kill(pid, 9)
    traces = [f"/tmp/containers-user-{user.uid}", f"/tmp/podman-run-{user.uid}", str(user.home / ".local")]
    user.run(["rm", "-rf", *traces, f"/dev/shm/libpod_rootless_lock_{user.uid}"])


@pytest.mark.parametrize(
    ("default", "forbids"), [("SCMP_ACT_ERRNO", []), ("SCMP_ACT_ALLOW", [["add_key", "keyctl", "request_key"]])]
)
def test_a_profile_without_keys(default: str, forbids: list[list[str]]) -> None:
    allowed = {"names": ["read", "keyctl"], "action": "SCMP_ACT_ALLOW"}
    profile = {"defaultAction": default, "syscalls": [allowed, {**allowed, "names": ["add_key"]}], "archMap": [1]}
    found = json.loads(ps.profile_without_keys(json.dumps(profile)))
    assert found["archMap"] == [1]
    assert [rule["names"] for rule in found["syscalls"]] == [["read"], *forbids]
    assert [rule["action"] for rule in found["syscalls"][1:]] == ["SCMP_ACT_ERRNO"] * len(forbids)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"syscalls": 3}', '{"defaultAction": "x", "syscalls": [{}]}'])
def test_what_is_no_profile(text: str) -> None:
    with pytest.raises(ValueError):
        ps.profile_without_keys(text)


@pytest.mark.podman
def test_a_container_takes_no_key_of_the_user_and_reaches_no_keyring(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    archive, tree = _tiny_image(user), agent_tree.tests_tree()
    done = python(
        user,
        checkout,
        f"""
        import os, re, subprocess
        from pathlib import Path

        def keys():
            rows = re.findall(r"^ *{user.uid}: .*? (\\d+)/\\d+ ", Path("/proc/key-users").read_text(), re.M)
            return rows or ["0"]  # a user without keys has no row

        with podman_storage(Path("/tmp"), "keys", []) as storage:
            def podman(*words):
                return subprocess.run(["podman", *words], env=storage.environment(os.environ), check=True,
                                      capture_output=True, text=True).stdout
            podman("import", "-q", {str(archive)!r}, "localhost/tiny")
            limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
            mounts = ["-v", {f"{tree.root}:{MOUNT_POINT}:ro"!r}]
            podman("run", "-d", *limits, "localhost/tiny", "/bin/busybox", "sleep", "600")
            before = keys()
            podman("run", "-d", *limits, "localhost/tiny", "/bin/busybox", "sleep", "600")
            print("keys", before == keys())
            print(podman("run", *limits, *mounts, "localhost/tiny", *{tree.python_command(("-c", ASK_FOR_KEYRING))!r}))
        """,
    )
    assert "keys True" in done.stdout, done.stderr
    assert REFUSED in done.stdout


@pytest.mark.podman
@pytest.mark.parametrize("end", ["orderly", "kill -9"])
def test_everything_is_gone_at_the_end(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None], end: str
) -> None:
    archive = _tiny_image(user)
    code = f"""
        import os, subprocess, time
        from contextlib import suppress
        from pathlib import Path
        from slurm.lib.guardian import guarded
        guardian = guarded(Path({str(checkout)!r}))

        def count(storage):
            commands = []
            for pid in processes_of(storage):
                with suppress(OSError):  # what Podman is about to end
                    commands.append(Path(f"/proc/{{pid}}/cmdline").read_bytes())
            return commands.count(b"/bin/busybox\\0sleep\\000600\\0")

        with guardian as ours, podman_storage(Path("/tmp"), "end", [], announce=ours.own_storage) as storage:
            environment = storage.environment(os.environ)
            subprocess.run(["podman", "import", "-q", {str(archive)!r}, "localhost/tiny"], env=environment, check=True)
            limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
            command = ["podman", "run", "-d", *limits, "-p", "60000", "localhost/tiny", "/bin/busybox", "sleep", "600"]
            for _ in range(3):
                subprocess.run(command, env=environment, check=True)
            for _ in range(200):
                if (alive := count(storage)) == 3:
                    break
                time.sleep(0.05)  # runc's init begins its program a moment later
            print("alive", alive, flush=True)
            if {end!r} == "kill -9":
                os.kill(os.getpid(), 9)
    """
    done = python(user, checkout, code)
    assert "alive 3" in done.stdout, done.stderr
    nothing_left()


@pytest.mark.podman
@pytest.mark.parametrize("moment", ["made._furnish", "locked_folder.utc_now", "Path.open"])
def test_a_store_whose_owner_is_killed_while_it_is_made_is_gone(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None], moment: str
) -> None:
    """With its name, and before it has one."""
    code = f"""
        import os
        from pathlib import Path
        from slurm.lib import locked_folder, podman_storage as made
        from slurm.lib.guardian import guarded

        def killed(*_):
            print(*(path.name for path in Path("/tmp").glob(f"*skyrl-{{os.getuid()}}-making*")), flush=True)
            os.kill(os.getpid(), 9)

        {moment} = killed
        with guarded(Path({str(checkout)!r})) as ours:
            with podman_storage(Path("/tmp"), "making", [], announce=ours.own_storage):
                pass
    """
    done = python(user, checkout, code)
    assert done.returncode == -9, done.stderr
    assert f"skyrl-{user.uid}-making" in done.stdout, "it was not there yet"
    nothing_left()


@pytest.mark.podman
def test_a_store_that_another_user_laid_in_wait_is_left_alone(
    user: OrdinaryUser, checkout: Path, nothing_left: Callable[[], None]
) -> None:
    """With a link in it that leads into our home: the owner cannot make its store, and the guardian removes nothing."""
    precious = user.home / "precious" / "containers" / "file"
    laid = Path(f"/tmp/skyrl-{user.uid}-laid")
    user.run(["mkdir", "-p", str(precious.parent)])
    user.run(["touch", str(precious)])
    try:
        laid.mkdir()  # root's
        (laid / "data").symlink_to(precious.parent.parent)
        (laid / "owner.lock").touch()
        (laid / "owner.lock").chmod(0o666)
        code = f"""
            import json, os, socket, sys
            from pathlib import Path
            from slurm.lib.errors import EnvironmentProblem
            from slurm.lib.guardian import guarded

            def announce(root, token):  # the other user has found it out
                Path(root, "owner.lock").write_text(json.dumps({{"token": token, "host": socket.gethostname()}}))
                ours.own_storage(root, token)

            try:
                with guarded(Path({str(checkout)!r})) as ours, podman_storage(Path("/tmp"), "laid", [], "", announce):
                    pass
            except EnvironmentProblem as problem:
                print(problem)
        """
        done = python(user, checkout, code)
        assert f"cannot make Podman storage {laid}" in done.stdout, done.stderr
        nothing_left()  # the guardian, too
        assert precious.exists()
        assert (laid / "data").is_symlink()
    finally:
        shutil.rmtree(laid)
        user.run(["rm", "-rf", str(user.home / "precious")])
