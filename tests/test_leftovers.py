"""What a killed launch left, and what is none of it: decided from marks, ages and files; cleared by fake commands."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from slurm.lib.coordination import CoordinationDir
from slurm.lib.launch_mark import Launcher, launcher_of, new_mark, own_launcher, state_of
from slurm.lib.leftovers import DEAD_AFTER_S, Fate, Marker, clear, discard, fate, markers, write_marker
from slurm.lib.scheduler import Slurm, parse_queue
from tests.fake_slurm import FakeSlurm

OWN = "host/boot/9/100/555"


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def door(fake: FakeSlurm) -> Slurm:
    return Slurm({"PATH": fake.path})


@pytest.mark.parametrize(
    ("launcher", "ticks", "state"),
    [
        ("host/boot/9/7/50", 50, Launcher.LIVES),
        ("host/boot/9/7/50", 51, Launcher.IS_DEAD),  # another process has its number
        ("host/boot/9/7/50", None, Launcher.IS_DEAD),
        ("host/another/9/7/50", None, Launcher.IS_ELSEWHERE),  # two login nodes may have one name
        ("host/boot/8/7/50", None, Launcher.IS_ELSEWHERE),
        ("login2/boot/9/7/50", None, Launcher.IS_ELSEWHERE),
        ("host/boot/9/x/50", None, Launcher.IS_ELSEWHERE),
        ("host", None, Launcher.IS_ELSEWHERE),
    ],
)
def test_whether_a_launcher_lives(launcher: str, ticks: int | None, state: Launcher) -> None:
    assert state_of(launcher, OWN, lambda pid: ticks) is state


def test_the_mark_of_this_process() -> None:
    first, second = new_mark(), new_mark()
    assert first != second
    assert launcher_of(f"skyrl:{first}") == launcher_of(f"skyrl:{second}") == own_launcher()
    assert state_of(own_launcher(), own_launcher()) is Launcher.LIVES
    assert [launcher_of(comment) for comment in ("", "(null)", first, "skyrl:x", "of a person: a/b/c/d/e/f")] == [
        None
    ] * 5


@pytest.mark.parametrize(
    ("launcher", "age_s", "is_finished", "expected"),
    [
        (Launcher.LIVES, None, False, Fate.STAYS),
        (Launcher.IS_DEAD, None, False, Fate.GOES),
        (Launcher.IS_DEAD, None, True, Fate.STAYS),  # a person holds it
        (Launcher.IS_ELSEWHERE, None, False, Fate.IS_UNSURE),
        (Launcher.IS_ELSEWHERE, DEAD_AFTER_S - 1, False, Fate.IS_UNSURE),
        (Launcher.IS_ELSEWHERE, DEAD_AFTER_S + 1, False, Fate.GOES),
        (Launcher.IS_ELSEWHERE, DEAD_AFTER_S + 1, True, Fate.STAYS),
        (Launcher.IS_DEAD, None, None, Fate.IS_UNSURE),  # the jobs base is not there
        (Launcher.IS_ELSEWHERE, DEAD_AFTER_S + 1, None, Fate.IS_UNSURE),
        (Launcher.LIVES, None, None, Fate.STAYS),
    ],
)
def test_the_fate_of_a_held_job(
    launcher: Launcher, age_s: float | None, is_finished: bool | None, expected: Fate
) -> None:
    assert fate(launcher, age_s, is_finished) is expected


def test_the_queue_is_read_with_any_comment() -> None:
    jobs = parse_queue(
        "7|PENDING|JobHeldUser|1795884803|a|b\nnoise\n5|RUNNING|None|N/A|(null)\n6|PENDING|Resources|1|\n"
    )
    assert [(job.job_id, job.is_held, job.submitted_at, job.comment) for job in jobs] == [
        ("5", False, None, "(null)"),
        ("6", False, 1.0, ""),
        ("7", True, 1795884803.0, "a|b"),
    ]


def dead() -> str:
    """The launcher's name of a process of this host that has ended."""
    with subprocess.Popen(["true"]) as process:
        pid = process.pid
    return "/".join([*own_launcher().split("/")[:3], str(pid), "1"])


def unfinished(slurm: FakeSlurm, launcher: str, *, made: bool = True) -> Path:
    """A run's directory whose launch was not finished, as a launcher of this name left it."""
    folder = slurm.jobs / "29990304_050607_101"
    folder.mkdir(parents=True)
    path = write_marker(CoordinationDir(folder), ["101", "102"], made=made)
    path.write_text(json.dumps({**json.loads(path.read_text()), "launcher": launcher}))
    return folder


HELD = "102|PENDING|JobHeldUser|1|skyrl:{0}/1\n101|PENDING|JobHeldUser|1|skyrl:{0}/0\n"


@pytest.mark.parametrize("after", range(7))
def test_a_launch_whose_removal_was_killed_is_removed_by_the_next_one(slurm: FakeSlurm, after: int) -> None:
    """It had been killed right before its commit: its record is there."""
    folder = unfinished(slurm, dead())
    for name in ("run.json", "a.conf", "z.conf", "code/slurm.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    seen: list[None] = []

    def killed() -> None:
        seen.append(None)
        if len(seen) > after:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        discard(folder, killed)
    assert len(seen) == after + 1 or after == 6, "there are six things in it"
    clear(door(slurm), slurm.jobs)
    assert list(slurm.jobs.iterdir()) == []


def test_a_dead_launchers_jobs_go_the_training_first_and_then_the_directory(slurm: FakeSlurm) -> None:
    launcher = dead()
    folder = unfinished(slurm, launcher)
    slurm.answer("squeue --user", {"stdout": HELD.format(launcher)})
    clear(door(slurm), slurm.jobs)
    assert [call.argv for call in slurm.of("scancel")] == [["102"], ["101"]]
    at_work = [[name for name in call.modes if "/submission_" in name] for call in slurm.of("scancel")]
    assert all(at_work), "until they are gone"
    assert not folder.exists()


def test_a_marker_that_names_jobs_of_another_launcher_is_of_a_copied_directory(slurm: FakeSlurm) -> None:
    """Or Slurm has given their ids anew."""
    unfinished(slurm, dead())
    slurm.answer("squeue --user", {"stdout": HELD.format(own_launcher())})
    clear(door(slurm), slurm.jobs)
    assert not slurm.of("scancel")


@pytest.mark.parametrize(("found", "goes"), [([], True), ([".submission_101.json.vm.1"], True), (["run.json"], False)])
def test_a_launcher_that_died_before_it_wrote_the_marker(slurm: FakeSlurm, found: list[str], goes: bool) -> None:
    folder = slurm.jobs / "29990304_050607_101"
    folder.mkdir(parents=True)
    for name in found:
        (folder / name).touch()
    slurm.answer("squeue --user", {"stdout": HELD.format(dead())})
    slurm.answer("scontrol", *[{"stdout": f"   StdOut={folder}/runtime_101.out\n"}] * 2)
    clear(door(slurm), slurm.jobs)
    assert [call.argv for call in slurm.of("scancel")] == ([["102"], ["101"]] if goes else [])
    assert folder.exists() is not goes


@pytest.mark.parametrize("is_there", [True, False])
def test_a_jobs_base_that_this_host_does_not_see(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, is_there: bool
) -> None:
    """A person's hold of a run there looks like a launch that was killed before it made a directory."""
    base = slurm.folder / "scratch" / "jobs"
    if is_there:
        base.mkdir(parents=True)
    slurm.answer("squeue --user", {"stdout": HELD.format(dead())})
    slurm.answer("scontrol", *[{"stdout": f"   StdOut={base}/29990304_050607_101/runtime_101.out\n"}] * 2)
    clear(door(slurm), slurm.jobs)
    assert bool(slurm.of("scancel")) is is_there
    assert (f"this host does not see {base}" in caplog.text) is not is_there


@pytest.mark.parametrize(("name", "goes"), [("29990304_050607_%j", False), ("29990304_050608_%j", True)])
def test_a_log_that_slurm_shows_as_a_pattern(slurm: FakeSlurm, name: str, goes: bool) -> None:
    base = slurm.jobs / "50% of it"
    (base / "29990304_050607_101").mkdir(parents=True)
    (base / "29990304_050607_101" / "run.json").touch()
    slurm.answer("squeue --user", {"stdout": HELD.format(dead()).splitlines()[1] + "\n"})
    shown = str(base).replace("%", "%%")
    slurm.answer("scontrol", {"stdout": f"   StdOut={shown}/{name}/runtime_%j.out\n"})
    clear(door(slurm), slurm.jobs)
    assert bool(slurm.of("scancel")) is goes


@pytest.mark.parametrize(("now", "goes"), [(1000.0 + DEAD_AFTER_S + 1, True), (1000.0 + DEAD_AFTER_S - 1, False)])
def test_a_launcher_on_another_host_by_slurms_clock(slurm: FakeSlurm, now: float, goes: bool) -> None:
    slurm.jobs.mkdir()
    slurm.answer("squeue --user", {"stdout": "101|PENDING|JobHeldUser|1000|skyrl:login9/boot/1/2/3/0\n"})
    config = {"stdout": f"Configuration data as of {now:.0f}\nAccountingStorageHost = localhost\n"}
    slurm.answer("scontrol", {"stdout": f"   StdOut={slurm.jobs}/29990304_050607_101/runtime_101.out\n"})
    slurm.answer("scontrol show config", config)
    clear(door(slurm), slurm.jobs)
    assert bool(slurm.of("scancel")) is goes
    asked = [call for call in slurm.questions if call.name == "scontrol show config"]
    assert [call.environment.get("SLURM_TIME_FORMAT") for call in asked] == ["%s"]


def test_jobs_that_cannot_be_cancelled_keep_their_directory(slurm: FakeSlurm) -> None:
    launcher = dead()
    folder = unfinished(slurm, launcher)
    slurm.answer("squeue --user", {"stdout": HELD.format(launcher)})
    slurm.answer("scancel", *[{"code": 1, "stderr": "Unable to contact slurm controller"}] * 9)
    clear(door(slurm), slurm.jobs)
    assert markers(folder)


def test_what_a_living_launcher_is_about_to_release_stays(slurm: FakeSlurm) -> None:
    folder = unfinished(slurm, own_launcher())
    slurm.answer("squeue --user", {"stdout": HELD.format(own_launcher())})
    clear(door(slurm), slurm.jobs)
    assert not slurm.of("scancel")
    assert markers(folder)


def test_a_launcher_that_died_after_its_commit_leaves_a_run(slurm: FakeSlurm) -> None:
    launcher = dead()
    folder = unfinished(slurm, launcher)
    slurm.answer("squeue --user", {"stdout": HELD.format(launcher).replace("JobHeldUser", "Priority")})
    clear(door(slurm), slurm.jobs)
    assert not slurm.of("scancel")
    assert folder.is_dir()
    assert not markers(folder)


def test_jobs_in_hidden_partitions_are_in_the_queue_too(slurm: FakeSlurm) -> None:
    launcher = dead()
    folder = unfinished(slurm, launcher)
    queued = HELD.format(launcher).replace("JobHeldUser", "Priority")
    slurm.answer("squeue --user", {"stdout": "", "hidden": queued})
    clear(door(slurm), slurm.jobs)
    assert folder.is_dir()


@pytest.mark.parametrize("used", ["runtime_101.out", "training_complete.flag"])
def test_the_directory_of_a_run_that_has_been_stays(slurm: FakeSlurm, used: str) -> None:
    folder = unfinished(slurm, dead())
    (folder / used).touch()
    clear(door(slurm), slurm.jobs)  # its jobs are out of the queue
    assert [path.name for path in folder.iterdir()] == [used]


def test_the_directory_that_was_joined_stays(slurm: FakeSlurm) -> None:
    folder = unfinished(slurm, dead(), made=False)
    clear(door(slurm), slurm.jobs)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_a_directory_that_cannot_be_looked_into_hinders_no_other(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = slurm.jobs / "29990304_050608_103"  # the newest, so that it is looked into first
    stale.mkdir(parents=True)
    folder, launcher = unfinished(slurm, dead()), dead()

    def look(at: Path) -> list[Marker]:
        if at == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return markers(at)

    monkeypatch.setattr("slurm.lib.leftovers.markers", look)
    slurm.answer("squeue --user", {"stdout": f"103|PENDING|JobHeldUser|1|skyrl:{launcher}/0\n"})
    slurm.answer("scontrol", {"stdout": f"   StdOut={stale}/runtime_103.out\n"})
    clear(door(slurm), slurm.jobs)
    assert not folder.exists()
    assert stale.is_dir()
    assert not slurm.of("scancel")


def joined(slurm: FakeSlurm, launcher: str, jobs: list[str]) -> Path:
    """The directory of a run that somebody joined, or went on with, and was killed before the commit."""
    folder = slurm.jobs / "29990304_050607_101"
    folder.mkdir(parents=True)
    for name in ("run.json", "runtime_101.out", "secrets.json", "secrets_201.json", "secrets_202.json"):
        (folder / name).touch()
    path = write_marker(CoordinationDir(folder), jobs, made=False)
    path.write_text(json.dumps({**json.loads(path.read_text()), "launcher": launcher}))
    return folder


GOING_ON = HELD.replace("102|", "202|").replace("101|", "201|")
HET = "203|PENDING|JobHeldUser|1|skyrl:{0}/0\n202|PENDING|JobHeldUser|1|skyrl:{0}/0\n"


@pytest.mark.parametrize(
    ("queue", "jobs", "cancelled"),
    [
        (GOING_ON, [], ["202", "201"]),
        (GOING_ON.replace("JobHeldUser", "Dependency"), [], ["202", "201"]),  # none was released yet
        (GOING_ON, ["201", "202"], ["202", "201"]),
        (HET, [], ["202"]),  # a component cannot be cancelled alone
        (HET, ["202"], ["202"]),
        ("", [], []),
    ],
)
def test_a_dead_launchers_jobs_go_from_a_run_that_was_there(
    slurm: FakeSlurm, queue: str, jobs: list[str], cancelled: list[str]
) -> None:
    launcher = dead()
    folder = joined(slurm, launcher, jobs)
    stays = {"run.json", "runtime_101.out", "secrets.json", *(f"secrets_{n}.json" for n in ("201", "202"))}
    slurm.answer("squeue --user", {"stdout": queue.format(launcher)})
    clear(door(slurm), slurm.jobs)
    assert [call.argv for call in slurm.of("scancel")] == [[job] for job in cancelled]
    assert {path.name for path in folder.iterdir()} == stays - {f"secrets_{job}.json" for job in jobs}


@pytest.mark.parametrize(("now", "goes"), [(1000.0 + DEAD_AFTER_S + 1, True), (1000.0 + DEAD_AFTER_S - 1, False)])
def test_a_launcher_elsewhere_that_went_on_with_a_run(slurm: FakeSlurm, now: float, goes: bool) -> None:
    """Such as a training job that was queueing the next attempt."""
    folder = joined(slurm, "gpu-a/boot/1/2/3", [])
    slurm.answer("squeue --user", {"stdout": GOING_ON.replace("|1|", "|1000|").format("gpu-a/boot/1/2/3")})
    shown = {"stdout": f"   StdOut={folder}/any.out\n"}
    slurm.answer("scontrol", shown, shown)
    slurm.answer("scontrol show config", *[{"stdout": f"Configuration data as of {now:.0f}\n"}] * 2)
    clear(door(slurm), slurm.jobs)
    assert [call.argv for call in slurm.of("scancel")] == ([["202"], ["201"]] if goes else [])
    assert bool(markers(folder)) is not goes


@pytest.mark.parametrize("launcher", ["login9/boot/1/2/3", ""])
def test_a_hold_of_one_job_after_the_commit_is_a_persons(slurm: FakeSlurm, launcher: str) -> None:
    """The launcher was killed between its release of the runtime job, the last one, and the removal of its marker."""
    launcher = launcher or dead()
    folder = unfinished(slurm, launcher)
    (folder / "run.json").touch()
    queue = HELD.format(launcher).replace("101|PENDING|JobHeldUser", "101|RUNNING|None")
    slurm.answer("squeue --user", {"stdout": queue})
    slurm.answer("scontrol", {"stdout": f"   StdOut={folder}/training_102.out\n"})
    clear(door(slurm), slurm.jobs)
    assert folder.is_dir()
    assert not slurm.of("scancel")


def test_a_directory_without_jobs_goes(slurm: FakeSlurm) -> None:
    folder = unfinished(slurm, dead())
    clear(door(slurm), slurm.jobs)
    assert not folder.exists()


def test_a_silent_slurm_changes_nothing(slurm: FakeSlurm) -> None:
    folder = unfinished(slurm, dead())
    slurm.answer("squeue --user", {"code": 1, "stderr": "Unable to contact slurm controller"})
    clear(door(slurm), slurm.jobs)
    assert markers(folder)
    assert not slurm.of("scancel")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"jobs": 3}', '{"launcher": "x"}', "\x00"])
def test_a_marker_that_is_half_written_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "submission_1.json").write_text(text)
    assert markers(tmp_path) == []


def test_an_own_mark_names_this_process() -> None:
    assert own_launcher().split("/")[3] == str(os.getpid())
