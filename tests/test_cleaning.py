"""``launch.py clean``: what may go, what stays and why, what is said, and that nothing else is touched.

Among runs of a real Slurm it is used in test_slurm_clean.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib import cleaning, leftovers, mounts
from slurm.lib.cleaning import GOES, Candidate, Stay, by_age, by_files, by_users, candidates, removed
from slurm.lib.coordination import CoordinationDir
from slurm.lib.observe.remains import Known, Remains, is_of_checkpoint, is_ours, remains_of
from slurm.lib.observe.survey import Survey
from slurm.lib.reports import MARK
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import Interrupted
from slurm.lib.verbs.clean import size_words
from slurm.lib.verbs.spans import UNITS, seconds_in, words_of
from tests.fake_slurm import FakeSlurm
from tests.terminals import INTERRUPT, own_terminal

ROOT = Path(__file__).resolve().parent.parent
DAY = 86400.0
SILENT = {"code": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"}


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    """Slurm's commands, which know no job."""
    return FakeSlurm(tmp_path / "fake")


def ended(kind: str, days_ago: float) -> dict[str, object]:
    """How a job says that it ended."""
    moment = datetime.fromtimestamp(time.time() - days_ago * DAY, timezone.utc).isoformat(timespec="seconds")
    return {"exit_code": 0, "reason": "it is done", "said_by": kind, "time": moment}


def aged(folder: Path, days: float) -> Path:
    """The folder with everything in it as if unchanged for so many days."""
    then = time.time() - days * DAY
    for root, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            os.utime(Path(root, name), (then, then), follow_symlinks=False)
    os.utime(folder, (then, then))
    return folder


def run_in(base: Path, number: int, days: float = 8.0, said: bool = True, **settings: str) -> Path:
    """The directory of a run that ended so many days ago, in its jobs' own words where ``said``."""
    folder = base / f"20260101_000000_{number}"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "x.py").write_text("pass\n")
    (folder / "checkpoints").mkdir()  # made for every trainer
    ids = {"runtime": number, "training": number + 1}
    jobs = {kind: {"id": str(job), **({"ended": ended(kind, days)} if said else {})} for kind, job in ids.items()}
    record = {"schema": 1, "jobs": jobs, "settings": {"SKYRL_BACKEND": "slurm", **settings}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / f"training_{number + 1}.out").write_text("a log\n" * 1000)
    return aged(folder, days)


def clean(slurm: FakeSlurm, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs), **more}
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "clean", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)


def told(done: subprocess.CompletedProcess[str]) -> tuple[set[str], dict[str, str]]:
    """The names of what went, and why the others stayed."""
    said = json.loads(done.stdout)
    return {one["run"] for one in said["removed"]}, {one["run"]: one["kept_as"] for one in said["kept"]}


def tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime) for path in sorted(folder.rglob("*"))}


# --- pure -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_what_is_younger_stays(age_s: float, older_s: float) -> None:
    assert (by_age(age_s, older_s) == GOES) is (age_s > older_s)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)))
def test_a_length_of_time(number: int, unit: str) -> None:
    wanted = number * UNITS[unit]
    if wanted <= 100 * 366 * DAY:
        assert seconds_in(f"{number}{unit}") == seconds_in(str(number), unit=unit) == wanted
        assert 0 <= wanted - seconds_in(words_of(wanted).replace(" ", "")) < max(1, wanted)
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            seconds_in(f"{number}{unit}")


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_other_text_is_no_length_of_time(text: str) -> None:
    try:
        assert 0 <= seconds_in(text) < 1e11
        assert text.strip()[-1] in UNITS
    except argparse.ArgumentTypeError as problem:
        assert "such as 30m" in str(problem)


PARTS = st.sampled_from(["a", "code", "checkpoints", "global_step_7", "ckpts-old", "rollouts", "my model"])
FILES = st.sampled_from(
    ["model.pt", "x.safetensors", "latest_checkpointed_iteration.txt", "checkpoint.json", "log.txt"]
)


@settings(deadline=None)
@given(st.lists(PARTS, max_size=4), FILES)
def test_a_checkpoint_is_known_by_its_folders_and_its_name(folders: list[str], name: str) -> None:
    path = "/".join([*folders, name])
    by_folder = any(part in {"checkpoints", "global_step_7", "ckpts-old"} for part in folders)
    ours = folders[:1] == ["code"]
    assert is_of_checkpoint(path) is (not ours and (by_folder or name != "log.txt"))
    assert is_of_checkpoint(f"mine/{path}", ["mine"])
    assert by_files(Remains(checkpoint=path)).stay is Stay.CHECKPOINT


FOREIGN = [
    "final_model.bin",
    "out/adapter_model.bin",
    "weights.npz",
    "state.pkl",
    "model.h5",
    "policy.zip",
    "ckpt-1.index",
    "ckpt-1.data-00000-of-00001",
    "model.gguf",
    "params.msgpack",
    "training_final.out",
    "run_best.json",
    "my.html",
    "agent/policy.bin",
    "wandb/offline-run-1/run.wandb",
    "other.conf",
]


@pytest.mark.parametrize("path", FOREIGN)
def test_what_is_none_of_ours_keeps_a_directory(tmp_path: Path, path: str) -> None:
    folder = run_in(tmp_path, 11)
    assert by_files(remains_of(folder)) == GOES
    for name in (path, "zz/more", "zz/even more"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("w")
    verdict = by_files(remains_of(folder))
    assert verdict.stay is Stay.FILES
    assert verdict.why.startswith("files of the trainer's own: ")
    assert verdict.why.endswith(" and 2 more")


def test_all_that_the_suite_writes_is_ours() -> None:
    directory = CoordinationDir(Path("/run"))
    named = [getattr(directory, name) for name, what in vars(CoordinationDir).items() if isinstance(what, property)]
    folders = {directory.code, directory.agent, directory.checkpoints, directory.rollouts, directory.images}
    for job_id in ("12", "local12.0"):
        for kind in ("runtime", "training"):
            named += [directory.log(kind, job_id, "out"), directory.log(kind, job_id, "err")]
            named += [directory.usage(kind, job_id), directory.heartbeat(kind, job_id)]
        named += [directory.ray_log(job_id, "gpu-1.site"), directory.ray_head(job_id), directory.notified(job_id)]
        named += [directory.sandbox_statistics(job_id), directory.path / f"run_{job_id}.json", directory.attempt(3)]
    for path in set(named) - folders:
        assert is_ours(path.name), path.name
        assert is_ours(f".{path.name}.host.site.4711"), "written half"
    seen = [path.name for path in (ROOT / "tests" / "observed").glob("*/*/*")]
    assert len(seen) > 50
    assert [name for name in seen if not is_ours(name)] == []
    assert all(is_ours(name, ["my.conf"]) for name in ("my.conf", "my.2.conf", "code/a/b", "rollouts/1.json"))
    assert not any(is_ours(name, ["my.conf"]) for name in ("my.x.conf", "code", "a/my.conf"))
    shared = ("docker.io%2Fa%2Fb%3A1.tar", ".part-cpu-a-7-1", ".claim-0f", ".failed-0f", ".claim-0f.cpu-a-7-2")
    assert all(is_ours(f"images/{name}") for name in shared)
    assert not any(is_ours(f"images/{name}") for name in ("mine.png", "folder/a.tar", ".tar", "claim-1"))


def test_a_page_is_ours_by_its_mark(tmp_path: Path) -> None:
    folder = run_in(tmp_path, 11)
    (folder / "report.html").write_text(f"<!doctype html><html><head>{MARK}")
    assert by_files(remains_of(folder)) == GOES
    (folder / "report.html").write_text("<!doctype html><html><head>")
    assert by_files(remains_of(folder)).stay is Stay.FILES


def test_a_snapshot_is_no_checkpoint_but_what_a_trainer_saves_in_it_is(tmp_path: Path) -> None:
    folder = run_in(tmp_path, 11)
    for name in ("checkpoints/utils.py", "tests/tiny.pt", "x.py", "outputs/a/b/.hydra/c.yaml", "a/__pycache__/x.pyc"):
        (folder / "agent" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "agent" / name).write_text("x")
    assert by_files(remains_of(folder)).stay is Stay.CHECKPOINT, "without SNAPSHOT=1"
    assert by_files(remains_of(folder, Known(copies={"agent": time.time() + 1}))) == GOES
    early = Known(copies={"agent": time.time() - 1})
    assert by_files(remains_of(folder, early)).stay is Stay.CHECKPOINT
    shutil.rmtree(folder / "agent" / "checkpoints")
    (folder / "agent" / "tests" / "tiny.pt").unlink()
    assert remains_of(folder, early).foreign == "agent/x.py"
    (folder / "agent" / "x.py").unlink()
    assert by_files(remains_of(folder, early)) == GOES


@pytest.mark.parametrize(
    ("used", "stays"),
    [
        ("/base/20260101_000000_9/checkpoints", True),
        ("/base/20260101_000000_9", True),
        ("/base/20260101_000000_91/x", False),
        ("/base", False),
        ("exec train --from ~/.skyrl_jobs/20260101_000000_9/rollouts --lr 1", True),
        ("data.files=['/base/20260101_000000_9/a.json','/b']", True),
        ('cat "$BASE"/120260101_000000_9/x', False),
    ],
)
def test_a_directory_that_a_living_run_names_stays(used: str, stays: bool) -> None:
    folder = Path("/base/20260101_000000_9")
    verdict = by_users(folder, {used: "20260101_000000_11"}, is_submitted_to=False)
    assert (verdict.stay is Stay.USED) is stays
    assert by_users(folder, {}, is_submitted_to=True).stay is Stay.USED


def test_a_living_run_uses_a_directory_by_a_command_a_link_or_below_another_base(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    names = {run_in(slurm.jobs, number).name: number for number in (11, 21, 31, 41)}
    first, second, third, free = sorted(names)
    link = tmp_path / "link"
    link.symlink_to(slurm.jobs / second)
    run_in(slurm.jobs, 51, said=False, TRAINING_COMMAND=f"eval ~/jobs/{first}/rollouts", CHECKPOINT_DIR=f"{link}/more")
    other = run_in(tmp_path / "other", 61, VERL_OVERRIDES=f"data.train_files={slurm.jobs / third}/x.parquet")
    slurm.answer("squeue", *[{"stdout": "51|RUNNING|None|n1|test|me|N/A|0:09|1:00|x\n"}] * 4)
    slurm.answer("squeue --user", *[{"stdout": "51\n61\n"}] * 2)
    slurm.answer("scontrol", *[{"stdout": f"JobId=61 JobName=skyrl-train\n   StdOut={other}/training_61.out\n"}] * 2)
    gone, kept = told(clean(slurm, "--yes", "--json"))
    assert gone == {free}
    assert [kept[name] for name in (first, second, third)] == ["used"] * 3


@settings(deadline=None)
@given(st.integers(0, 2**50))
def test_a_size_is_at_least_one_of_its_unit(size: int) -> None:
    number, unit = size_words(size).split()
    assert size < 1024 or 1 <= float(number) <= 1024
    assert unit in {"bytes", "KiB", "MiB", "GiB", "TiB"}


def test_what_lies_in_a_folder_is_counted_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.pt").write_bytes(b"x" * 10**6)
    folder = tmp_path / "run"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "log").write_bytes(b"x" * 20000)
    (folder / "link").symlink_to(outside)
    aged(folder, 3)
    found = remains_of(folder)
    assert 20000 <= found.size < 200000
    assert not found.checkpoint
    assert 2.9 * DAY < time.time() - found.changed_at < 3.1 * DAY
    assert remains_of(tmp_path / "nowhere").problem


# --- the command ------------------------------------------------------------------------------------------------------


def test_what_goes_and_what_stays(slurm: FakeSlurm, tmp_path: Path) -> None:
    base = slurm.jobs
    lines = "".join(f"{job}|RUNNING|None|n1|test|me|N/A|0:09|1:00|x\n" for job in ("31", "62"))
    slurm.answer("squeue", *[{"stdout": lines}] * 4)
    old = run_in(base, 11)
    outside = tmp_path / "data"
    outside.mkdir()
    (outside / "kept.txt").write_text("mine")
    (old / "data").symlink_to(outside)
    aged(old, 8)
    expected: dict[str, Stay] = {}

    def stays(number: int, why: Stay, change: Callable[[Path], object] = lambda _: None, **more: Any) -> Path:
        folder = run_in(base, number, **more)
        change(folder)
        expected[folder.name] = why
        return aged(folder, 8) if "days" not in more else folder

    stays(21, Stay.YOUNG, days=6.0)
    noted = stays(23, Stay.YOUNG, days=8.0)
    (noted / "my notes.txt").write_text("changed today")
    stays(31, Stay.LIVES, said=False)
    stays(33, Stay.UNKNOWN, lambda folder: (folder / "run.json").write_text('{"jobs": {'))

    def foreign(folder: Path) -> None:
        (folder / "run.json").write_text('{"jobs": {"other": 3}}')
        (folder / "training_36.out").unlink()  # its name would tell of a job

    stays(35, Stay.UNKNOWN, foreign)
    stays(37, Stay.UNKNOWN, lambda folder: (folder / "attempt_1.json").write_text("half"))
    stays(41, Stay.CHECKPOINT, lambda folder: (folder / "checkpoints" / "anything").write_text("w"))
    stays(43, Stay.CHECKPOINT, lambda folder: (folder / "model.safetensors").write_text("w"))
    own = str(base / "20260101_000000_45" / "saved")

    def saved(folder: Path) -> None:
        (folder / "saved").mkdir()
        (folder / "saved" / "weights").write_text("w")

    stays(45, Stay.CHECKPOINT, saved, CHECKPOINT_DIR=own)
    stays(51, Stay.USED, lambda folder: (folder / "submission_h_1_2.json").write_text("{}"))
    used = stays(53, Stay.USED)
    stays(61, Stay.LIVES, said=False, CHECKPOINT_DIR=str(used / "checkpoints"))
    rest = base / f"{leftovers.DISCARDED}20260101_000000_71"
    rest.mkdir()
    (rest / "half").write_text("x")
    untouched: dict[str, Callable[[Path], object]] = {
        "data set": lambda path: path.mkdir(),
        "20260101_000000_81": lambda path: path.mkdir(),  # no run: nothing of one lies there
        "20260101_000000_83": lambda path: path.symlink_to(outside),
        ".discarded_mine": lambda path: path.mkdir(),
        "file": lambda path: path.write_text("x"),
    }
    for name, make in untouched.items():
        make(base / name)
    before = tree(base)

    dry = clean(slurm, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert tree(base) == before
    slurm.forget()
    slurm.answer("squeue", *[{"stdout": lines}] * 4)
    done = clean(slurm, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    gone, kept = told(done)
    assert told(dry) == (gone, kept)
    assert gone == {old.name, rest.name}
    assert kept == {name: stay.value for name, stay in expected.items()}
    assert {path.name for path in base.iterdir()} == {*kept, *untouched}
    assert (outside / "kept.txt").read_text() == "mine"
    assert json.loads(done.stdout)["freed_bytes"] >= 6000
    again = clean(slurm, "--yes")
    assert again.stdout.startswith("removed 0 of ")
    assert "a checkpoint is in it: checkpoints/anything" in again.stdout


def test_a_silent_slurm_keeps_what_only_it_knows(slurm: FakeSlurm) -> None:
    slurm.answer("squeue", *[SILENT] * 4)
    paths = [run_in(slurm.jobs, 11, said=False), run_in(slurm.jobs, 21)]
    done = clean(slurm, "--yes")
    assert done.returncode == 75
    assert all(path.is_dir() for path in paths)
    assert "whether its job 12 lives is not known: Slurm does not answer" in done.stdout
    shutil.rmtree(paths[0])
    slurm.forget()
    done = clean(slurm, "--yes")
    assert done.returncode == 75
    assert "whether its job 22 was queued again is not known: Slurm does not answer" in done.stdout
    assert paths[1].is_dir()


def test_a_local_run_needs_no_slurm(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, 11, SKYRL_BACKEND="local")
    record = (folder / "run.json").read_text().replace('"11"', '"local11.0"').replace('"12"', '"local12.0"')
    (folder / "run.json").write_text(record)
    aged(folder, 8)
    slurm.answer("squeue", *[SILENT] * 4)
    assert clean(slurm, "--yes").returncode == 0
    assert not folder.exists()


def test_copies_of_conf_files_and_of_skyrl_agent_go_as_the_record_names_them(slurm: FakeSlurm) -> None:
    def furnished(number: int, **record: object) -> Path:
        folder = run_in(slurm.jobs, number, SNAPSHOT="true")
        (folder / "agent" / "checkpoints").mkdir(parents=True)
        (folder / "agent" / "checkpoints" / "utils.py").write_text("pass\n")
        (folder / "mine.2.conf").write_text("A=1\n")
        said = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**said, **record}))
        return aged(folder, 8)

    # aged() changes them now, so a launch that is recorded a minute from now has taken the copy
    launched = datetime.fromtimestamp(time.time() + 60, timezone.utc).isoformat(timespec="seconds")
    gone = furnished(11, created=launched, config_files=["/home/me/mine.conf"])
    other = furnished(21, created=launched, config_files=["/home/me/dev.conf"])
    joined = furnished(41, created=launched, config_files=["/home/me/mine.conf"])
    (joined / "agent").rename(joined / "agent_46")
    own = json.loads((joined / "run.json").read_text())
    training = {**own["jobs"]["training"], "id": "46"}
    (joined / "run_46.json").write_text(json.dumps({**own, "jobs": {"training": training}}))
    aged(joined, 8)
    late = furnished(31, created="2026-01-01T00:00:00+00:00", config_files=["/home/me/mine.conf"])
    assert told(clean(slurm, "--yes", "--json")) == (
        {gone.name, joined.name},
        {other.name: "files", late.name: "checkpoint"},
    )


def test_a_job_that_was_queued_again_lives(slurm: FakeSlurm) -> None:
    requeued, other, odd, over = (run_in(slurm.jobs, number) for number in (11, 21, 31, 41))
    lines = "12|PENDING|BeginTime||test|me|N/A|0:00|1:00|x\n32|A_NEW_STATE|||test|me|N/A|0:00|1:00|x\n"
    lines += "42|COMPLETED|None|n1|test|me|N/A|0:09|1:00|x\n"
    slurm.answer("squeue", *[{"stdout": lines}] * 2)
    done = clean(slurm, "--yes", "--json")
    gone, kept = told(done)
    assert gone == {other.name, over.name}
    assert kept == {requeued.name: "lives", odd.name: "unknown"}
    assert "its job 12, which said that it ended, is PENDING in Slurm: was it queued again?" in done.stdout
    first = next(call.argv[call.argv.index("-j") + 1] for call in slurm.of("squeue"))
    assert sorted(first.split(",")) == ["11", "12", "21", "22", "31", "32", "41", "42"], "one question for all"


def test_a_job_that_this_slurm_never_knew_may_be_another_clusters(slurm: FakeSlurm) -> None:
    pending, begun, old = (
        run_in(slurm.jobs, number, days=days, said=False) for number, days in ((11, 8), (21, 0), (31, 8))
    )
    for folder, days in ((begun, 0.0), (old, 8.0)):
        (folder / f"runtime_{folder.name[-2:]}.out").write_text("it began\n")
        aged(folder, days)
    time.sleep(0.01)
    done = clean(slurm, "--yes", "--older-than", "0s", "--json")
    assert told(done) == ({old.name}, {pending.name: "unknown", begun.name: "unknown"})
    assert "its runtime job 11 was never seen to begin, and this Slurm does not know it" in done.stdout
    assert "this Slurm does not know its training job 22, which never said that it ended" in done.stdout


@pytest.mark.parametrize("words", [["7"], ["a week"], ["-1d"], ["7 days"], ["nand"], ["1e3d"], ["999999999w"], [""]])
def test_a_wrong_age_is_a_sentence(slurm: FakeSlurm, words: list[str]) -> None:
    folder = run_in(slurm.jobs, 11)
    done = clean(slurm, "--yes", f"--older-than={words[0]}")
    assert done.returncode == 2
    assert "is no length of time such as 30m, 12h, 7d or 2w" in done.stderr
    assert folder.is_dir()


def test_a_base_that_is_not_there_or_cannot_be_read(slurm: FakeSlurm, tmp_path: Path) -> None:
    done = clean(slurm, "--yes", SKYRL_JOBS_BASE=str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout.splitlines()[0][:23]) == (0, "removed 0 of 0 run dire")
    (tmp_path / "file").write_text("x")
    assert clean(slurm, "--yes", SKYRL_JOBS_BASE=str(tmp_path / "file")).returncode == 0


def test_nobody_is_there_to_ask(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, 11)
    done = clean(slurm)
    assert done.returncode == 2
    assert folder.name in done.stderr
    assert "no terminal to ask at: add --yes to mean them; nothing was removed" in done.stderr
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("typed", "code", "goes"),
    [("y\n", 0, True), ("n\n", 0, False), ("\n", 0, False), ("\x04", 0, False), (INTERRUPT, 130, False)],
)
def test_a_person_is_asked(slurm: FakeSlurm, typed: str, code: int, goes: bool) -> None:
    folder = run_in(slurm.jobs, 11)
    environment = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs)}
    with own_terminal([sys.executable, str(ROOT / "slurm" / "launch.py"), "clean"], environment) as screen:
        screen.awaits(r"\[y/N\]")
        screen.type(typed)
        assert screen.process.wait(60) == code
    assert folder.exists() is not goes


# --- accidents --------------------------------------------------------------------------------------------------------


def test_one_that_is_killed_is_finished_by_the_next(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, 11)
    killed = "from slurm.lib import leftovers, cli; import os; "
    killed += "leftovers.remove_run_dir = lambda path, _: ((path / 'run.json').unlink(), os.kill(os.getpid(), 9)); "
    killed += "cli.main(['clean', '--yes'])"
    environment = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs)}
    done = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not folder.exists(), "half a directory has no run's name"
    half = slurm.jobs / f"{leftovers.DISCARDED}{folder.name}"
    assert (half / "code").is_dir()
    assert "half removed before" in clean(slurm, "--dry-run").stdout
    assert half.is_dir()
    assert clean(slurm, "--yes").returncode == 0
    assert list(slurm.jobs.iterdir()) == []


def test_several_at_once(slurm: FakeSlurm) -> None:
    for number in range(10, 90, 2):
        run_in(slurm.jobs, number)
    environment = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs)}
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "clean", "--yes"]
    started = [subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert list(slurm.jobs.iterdir()) == []


def test_what_is_joined_while_a_person_thinks_stays(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, 11)
    survey = Survey(Slurm({"PATH": slurm.path}))
    (found,) = candidates(slurm.jobs, 7 * DAY, survey, time.time())
    assert found.goes
    (folder / "run_13.json").write_text(json.dumps({"jobs": {"training": {"id": "13"}}}))
    slurm.answer("squeue", {}, {"stdout": "13|PENDING|Priority||test|me|N/A|0:00|1:00|skyrl-train\n"})
    (found,) = candidates(slurm.jobs, 7 * DAY, survey, time.time(), only={folder})
    assert found.verdict.stay is Stay.LIVES
    assert removed([found]) == [found]
    assert folder.is_dir()


def test_a_share_that_cannot_be_written(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in(slurm.jobs, 11)

    def refused(path: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        (found,) = removed([Candidate(folder)])
    assert found.verdict.stay is Stay.FAILED
    assert f"{folder}: Read-only file system" in found.verdict.why
    assert (folder / "run.json").is_file()


def test_what_cannot_be_removed_is_named(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in(slurm.jobs, 11)
    real = os.unlink

    def busy(path: str, *, dir_fd: int | None = None) -> None:
        if path == "run.json":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", busy)
    (found,) = removed([Candidate(folder)])
    assert found.verdict.stay is Stay.FAILED
    assert "run.json: Device or resource busy" in found.verdict.why


def test_a_signal_ends_it_between_files_and_the_record_is_the_last_to_go(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, 11)
    (folder / "rollouts").mkdir()
    for number in range(20):
        (folder / "rollouts" / f"{number}.json").write_text("x")
    calls: list[None] = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 10:
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        removed([Candidate(folder)], stop)
    (rest,) = slurm.jobs.iterdir()
    assert (rest / "run.json").is_file()
    assert 0 < len([path for path in rest.rglob("*") if path.is_file()]) < 23
    leftovers.clear(Slurm({"PATH": slurm.path}), slurm.jobs)
    assert (rest / "run.json").is_file(), "a launch does not take the time"
    (rest / "run.json").unlink()
    leftovers.clear(Slurm({"PATH": slurm.path}), slurm.jobs)
    assert not rest.exists(), "what a launch has left is small"


# --- other file systems -----------------------------------------------------------------------------------------------

BIND, TMPFS = "mount --bind {outside} {place}", "mount -t tmpfs none {place}; touch {place}/x.txt"
LINE = "36 35 98:0 / {} rw,noatime master:1 - ext3 /dev/root rw\n"


def test_where_something_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(mounts.mount_points(LINE.format("/a\\040b\\134c") + "half a line\n")) == ["/a b\\c"]
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    assert mounts.mount_in(tmp_path) == "", "it cannot be read"
    for place, found in ((tmp_path / "run" / "x", True), (tmp_path / "run", True), (tmp_path / "run2", False)):
        (tmp_path / "mountinfo").write_text(LINE.format("/") + LINE.format(place))
        assert mounts.mount_in(tmp_path / "run") == (str(place) if found else "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
@pytest.mark.parametrize(("mount", "seen"), [(BIND, True), (TMPFS, True), (TMPFS, False)])
def test_what_is_mounted_in_a_directory_is_not_gone_into(
    slurm: FakeSlurm, tmp_path: Path, mount: str, seen: bool
) -> None:
    """Also where only its device tells of it, as it does of another file system."""
    folder, half = run_in(slurm.jobs, 11), slurm.jobs / f"{leftovers.DISCARDED}20260101_000000_21"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.txt").write_text("mine")
    program = "import sys; from pathlib import Path; from slurm.lib import mounts, cli, leftovers; "
    program += f"mounts.MOUNTINFO = mounts.MOUNTINFO if {seen} else Path('/nowhere'); "
    program += f"print(leftovers.remove_run_dir(Path({str(tmp_path / 'run')!r}))); "
    program += "sys.exit(cli.main(['clean', '--yes']))"
    lines = []
    for place in (folder / "data", half / "data", tmp_path / "run" / "data"):
        place.mkdir(parents=True)
        lines.append(mount.format(outside=outside, place=place))
    lines.append(f"{sys.executable} -c {shlex.quote(program)}")
    lines.append(f"cat {folder}/data/x.txt {half}/data/x.txt {tmp_path}/run/data/x.txt {folder}/run.json")
    environment = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs)}
    aged(folder, 8)
    argv = ["unshare", "--mount", "sh", "-euc", "\n".join(lines)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "removed 0 of 2 run directories" in done.stdout
    assert done.stdout.count(f"another file system is mounted at {folder}/data") == 1
    assert done.stdout.count(f"another file system is mounted at {half}/data") == 1


def test_the_time_of_a_share_that_cannot_be_written_is_this_hosts(tmp_path: Path) -> None:
    assert abs(cleaning.clock_of(tmp_path / "nowhere") - time.time()) < 5


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's file")
def test_another_users_runs_stay(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, 11)
    os.chown(folder, 65534, 65534)
    done = clean(slurm, "--yes")
    assert done.returncode == 0
    assert folder.is_dir()
    assert folder.name not in done.stdout
