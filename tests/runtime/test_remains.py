"""Which monitors of containers are nobody's? Decided from what /proc and Podman tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from slurm_runtime.control import Control
from slurm_runtime.podman import EngineFacts
from slurm_runtime.remains import Monitor, Remains, monitor_of, monitors, strays, suspects
from slurm_runtime.warden.client import Warden
from slurm_runtime.warden.proc import all_pids, command_line, name_of, stat_of
from slurm_runtime.warden.remains import Networks, Stray, end_stray, networks_in
from tests.runtime.commands import SERVE_SCRIPT
from tests.runtime.conftest import KillablePodman, serving
from tests.runtime.test_contract import eventually, started

ROOT = "/tmp/skyrl-1-2/data/containers/storage"
ID = "0123456789abcdef" * 4
LINE = (
    f"/usr/bin/conmon --api-version 1 -c {ID} -u {ID} -r /usr/bin/runc "
    f"-b {ROOT}/overlay-containers/{ID}/userdata -n sandbox-x --exit-dir /tmp/skyrl-1-2/run/libpod/tmp/exits "
    "--exit-command /usr/bin/podman --exit-command-arg container --exit-command-arg cleanup"
).split()


def monitor(container: str, name: str = "sandbox-x", has_program: bool = True) -> Monitor:
    return Monitor(7, 100, container, name, has_program)


def test_a_monitor_says_whose_it_is() -> None:
    assert monitor_of(LINE, ROOT) == (ID, "sandbox-x", "/usr/bin/podman")


@pytest.mark.parametrize("container", ["", "x", "../../info?", ID[1:], f"{ID}0", f"{ID[1:]}G", f"{ID}\n"])
def test_what_watches_no_container_is_no_monitor(container: str) -> None:
    assert monitor_of([container if word == ID else word for word in LINE], ROOT) is None


def test_a_monitor_of_another_store_is_none_of_ours() -> None:
    assert monitor_of(LINE, "/tmp/skyrl-1-20/data/containers/storage") is None
    assert monitor_of(LINE, f"{ROOT}2") is None
    assert monitor_of(LINE, ROOT[:-1]) is None
    assert monitor_of(LINE, "") is None
    assert monitor_of(["conmon", "-b"], ROOT) is None


def test_of_a_sandbox_that_serves_podman_is_not_asked() -> None:
    assert suspects([monitor("abc"), monitor("def", "sandbox-y")], {"sandbox-x", "sandbox-y"}) == []


def test_a_start_that_was_made_again_leaves_two_of_one_name() -> None:
    both = [monitor("old"), monitor("new")]
    assert suspects(both, {"sandbox-x"}) == both
    assert strays(both, {"new"}) == both[:1]


def test_one_whose_sandbox_is_gone_is_nobodys_unless_podman_knows_it() -> None:
    """Such as one that is being started by another server on the same Podman."""
    one = [monitor("abc")]
    assert suspects(one, set()) == one
    assert strays(one, {"abc"}) == []
    assert strays(one, set()) == one


def test_one_that_only_tells_podman_of_the_end_ends_by_itself() -> None:
    assert suspects([monitor("abc", has_program=False)], set()) == []


def test_what_is_no_sandbox_is_left_alone() -> None:
    assert suspects([monitor("abc", "database")], set()) == []


def test_networks_of_one_folder() -> None:
    mountinfo = (
        "22 21 0:4 net:[4026532252] /run/u/a\\040b/netns/netns-1 rw shared:7 - nsfs nsfs rw\n"
        "23 21 0:4 net:[4026532253] /run/netns/cpu-a rw shared:8 - nsfs nsfs rw\n"
        "24 21 0:4 net:[4026532255] /run/u/a\\040b/netns/rootless-netns-1 rw shared:9 - nsfs nsfs rw\n"
        "24 21 0:4 mnt:[4026532254] /run/u/a\\040b/netns/netns-2 rw shared:9 - nsfs nsfs rw\n"
        "25 21 8:1 / /run/u/a\\040b/netns/netns-3 rw - ext4 /dev/sda1 rw\n"
    )
    assert networks_in(Path("/run/u/a b/netns"), mountinfo) == {"/run/u/a b/netns/netns-1": 4026532252}


def test_a_place_without_a_mount_that_we_see_is_left(tmp_path: Path) -> None:
    """Podman's service may have come back in another mount namespace: sandboxes live in the one before it."""
    place = tmp_path / "netns-1"
    place.touch()
    networks = Networks(tmp_path)
    assert [networks.tidy(0.0), networks.tidy(0.0)] == [0, 0]
    assert place.exists()


# --- processes that play a monitor ------------------------------------------------------------------------------------

HIDDEN = ("unshare", *([] if os.geteuid() == 0 else ["--user"]), "--pid", "--fork", "--kill-child")


@pytest.fixture
def facts(tmp_path: Path) -> EngineFacts:
    """Of a Podman whose conmon is a copy of the shell."""
    program = tmp_path / "conmon"
    shutil.copy(Path("/bin/sh").resolve(), program)
    return EngineFacts("x", True, frozenset(), uid=os.geteuid(), graph_root=ROOT, monitor=str(program))


@contextlib.contextmanager
def playing(facts: EngineFacts, *before: str) -> Iterator[Stray]:
    """A process with the name and arguments of a monitor."""
    argv = [*before, facts.monitor, "-s", "--", *LINE[1:]]
    environment = {**os.environ, "PLAYED": "yes"}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment) as process:
        try:
            [pid] = eventually(lambda: [pid for pid in all_pids() if command_line(pid)[:1] == [facts.monitor]])
            yield Stray(pid, int(stat_of(pid)[19]), ID, facts.monitor)
        finally:
            process.kill()


def test_what_only_looks_like_a_monitor_is_not_taken(facts: EngineFacts, tmp_path: Path) -> None:
    with playing(facts) as real:
        assert [one.pid for one in monitors(facts)] == [real.monitor]
        assert monitors(replace(facts, uid=os.geteuid() + 1)) == []
        other = tmp_path / "other" / "conmon"
        other.parent.mkdir()
        shutil.copy(facts.monitor, other)
        for program in (str(other), str(tmp_path / "none" / "conmon"), ""):
            assert monitors(replace(facts, monitor=program)) == []
            assert not end_stray(replace(real, program=program), "", {})
        assert not end_stray(replace(real, container=ID[::-1]), "", {})
        assert not end_stray(replace(real, started=real.started + 1), "", {})
        assert name_of(real.monitor) == "conmon"


def test_a_process_of_another_pid_namespace_is_no_monitor(facts: EngineFacts) -> None:
    """As those of sandboxes, whose root may be of our own user."""
    with playing(facts, *HIDDEN) as played:
        assert monitors(facts) == []
        assert not end_stray(played, "", {})
        assert name_of(played.monitor) == "conmon"


def test_the_warden_ends_a_stray_beside_its_other_work(facts: EngineFacts, tmp_path: Path) -> None:
    """With the runtime that it is told, and nothing of the process's own environment."""
    said, go = tmp_path / "said", tmp_path / "go"
    runtime = tmp_path / "runtime"
    runtime.write_text(f'#!/bin/sh\necho "$@" ${{PLAYED-nothing}} > {said}\nuntil [ -e {go} ]; do sleep 0.05; done\n')
    runtime.chmod(0o755)

    async def work(real: Stray) -> list[bool]:
        warden = Warden(os.getpid(), lambda _event: None)
        await warden.start()
        words = (real.monitor, real.started, real.container, real.program, str(runtime))
        try:
            ending = asyncio.create_task(warden.end_stray(*words))
            await asyncio.sleep(0)
            await warden.usage()
            assert not ending.done(), "other requests waited for the runtime"
            go.touch()
            return [await ending, await warden.end_stray(*words)]
        finally:
            await warden.close()

    with playing(facts) as real:
        assert asyncio.run(work(real)) == [True, False]
        assert stat_of(real.monitor)[0] == "Z"
    assert said.read_text() == f"delete --force {ID} nothing\n"


@dataclass
class Ender:
    """A warden that finds this much to end."""

    ended: bool

    async def end_stray(self, *_words: object) -> bool:
        return self.ended


@pytest.mark.parametrize("ended", [True, False])
def test_only_of_what_was_ended_is_warned(ended: bool, facts: EngineFacts, caplog: pytest.LogCaptureFixture) -> None:
    """A container that Podman removed between the look and the question has left nothing."""
    asyncio.run(Remains._end(monitor(ID), cast(Control, Ender(ended)), facts))
    assert ("ended what was left of a start of sandbox-x" in caplog.text) == ended
    assert ended or not caplog.text


@pytest.mark.podman
@pytest.mark.parametrize("podman", ["rootless", "root"])
def test_of_a_sandbox_that_plays_a_monitor_nothing_is_run(podman: str, request: pytest.FixtureRequest) -> None:
    service = request.getfixturevalue(f"{podman}_podman")
    mark, evil = service.home / "ran", service.home / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {mark}\n")
    evil.chmod(0o755)
    line = f"/tmp/conmon -b {service.facts().graph_root}/x -c {ID} -n sandbox-y -r {evil}"
    prelude = f"printf '#!/bin/sh\\nsleep 1000\\nexit\\n' > /tmp/conmon; chmod +x /tmp/conmon; {line} &\n"
    with serving(KillablePodman(service.socket), warden=True) as api:
        sandbox = started(api, command=["/bin/sh", "-c", prelude + SERVE_SCRIPT, "server", "60000"])
        facts = api.run(api.engine.facts())

        def playing() -> list[int]:
            """Without what it is just forking, for ``sleep``, which has its words until then."""
            found = [pid for pid in all_pids() if name_of(pid) == "conmon" and str(evil) in command_line(pid)]
            return [pid for pid in found if (stat := stat_of(pid)) and int(stat[1]) not in found]

        [played] = eventually(playing)
        assert [one.name for one in monitors(facts)] == [f"sandbox-{sandbox['runtime_id']}"]
        api.run(api.manager.remains.end(facts))
        control = api.manager.launcher.control
        assert control is not None
        words = (played, int(stat_of(played)[19]), ID, facts.monitor, str(evil))
        assert not api.run(control.end_stray(*words))
        assert name_of(played) == "conmon"
    assert not mark.exists()
