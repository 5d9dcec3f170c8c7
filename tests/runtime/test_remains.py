"""Which monitors of containers are nobody's? Decided from what /proc and Podman tell."""

from __future__ import annotations

from pathlib import Path

from slurm_runtime.remains import Monitor, monitor_of, strays, suspects
from slurm_runtime.warden.remains import networks_in

ROOT = "/tmp/skyrl-1-2/data/containers/storage"
LINE = (
    "/usr/bin/conmon --api-version 1 -c abc -u abc -r /usr/bin/runc "
    f"-b {ROOT}/overlay-containers/abc/userdata -n sandbox-x --exit-dir /tmp/skyrl-1-2/run/libpod/tmp/exits "
    "--exit-command /usr/bin/podman --exit-command-arg container --exit-command-arg cleanup"
).split()


def monitor(container: str, name: str = "sandbox-x", has_program: bool = True) -> Monitor:
    return Monitor(7, 100, container, name, "/usr/bin/runc", has_program)


def test_a_monitor_says_whose_it_is() -> None:
    assert monitor_of(LINE, ROOT) == ("abc", "sandbox-x", "/usr/bin/runc", "/usr/bin/podman")


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
        "24 21 0:4 mnt:[4026532254] /run/u/a\\040b/netns/other rw shared:9 - nsfs nsfs rw\n"
        "25 21 8:1 / /run/u/a\\040b/netns/disk rw - ext4 /dev/sda1 rw\n"
    )
    assert networks_in(Path("/run/u/a b/netns"), mountinfo) == {"/run/u/a b/netns/netns-1": 4026532252}
