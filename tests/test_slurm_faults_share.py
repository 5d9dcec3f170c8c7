"""Faults of what the nodes share: the run directory, the files in it, the clocks, the code and the interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from slurm.lib.coordination import Flag, server_digest
from slurm.lib.deadlines import EXPIRY_NAME
from tests import cluster as test_cluster
from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import Case, within
from tests.runs import SMALL, Run, faulty, launch, launch_argv, own_environment, scontrol_job, squeue, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

NO_GPU = "GPUS_PER_NODE=0"
LATE_S, NEVER = 30, 1e6  # seconds
SKEWED_CLOCK = Path(__file__).with_name("skewed_clock.c")
TOLD = "hf_told_by_the_launch_alone"


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


@dataclass
class Lab:
    """Several runs side by side, each in a jobs base of its own, and what is mounted for them."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    mounts: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def folder(self, name: str) -> Path:
        folder = self.base / name
        if not folder.exists():
            folder.mkdir()
            os.chown(folder, self.user.uid, self.user.gid)
        return folder

    def launch(
        self, name: str, nodes: str, command: str, *settings: str, cpu: str = "", gpu: str = "", **more: object
    ) -> Run:
        """Launch a run on cpu-X and gpu-X, without checks, which are other tests' matter."""
        words = (
            f"TRAINING_COMMAND={command}",
            NO_GPU,
            f"CPU_SBATCH_ARGS=--nodelist=cpu-{nodes} {cpu}",
            f"GPU_SBATCH_ARGS=--nodelist=gpu-{nodes} {gpu}",
        )
        options = ("--no-check",)
        return launch(self.user, self.checkout, self.folder(name), *words, *settings, options=options, **more)


@pytest.fixture
def lab(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Iterator[Lab]:
    made = Lab(user, checkout, jobs_base)
    with made.mounts:
        yield made
        user.run(["scancel", "-u", user.name])
        until("an empty queue", lambda: not squeue(user, "-u", user.name).strip(), 60)


def over(run: Run, case: Case, begin: float | None, *reads: str) -> float:
    """Wait for the end of both jobs; the case's words then stand in both logs (``reads``: which). Seconds since.

    The end is Slurm's word, not when it is looked at. ``begin``: a monotonic moment; None: when the training was
    submitted.
    """
    run.wait_over(seconds=case.bound_s + 60)
    since = moment_of(run, "training", "SubmitTime") if begin is None else time.time() - time.monotonic() + begin
    seconds = within(case, max(0.0, max(end_of(run, kind) for kind in run.jobs) - since))
    for kind in reads or (("runtime", "training") if case.reads else ()):
        text = run.log(kind) + run.log(kind, "err")
        assert case.reads in text, f"{case.fault}: {case.reads!r} does not stand in the {kind} job's log: {text}"
    return seconds


def remove(folder: Path) -> None:
    """At one moment, whoever makes a file in it just then."""
    aside = folder.with_name(f".{folder.name}.gone")
    folder.rename(aside)
    shutil.rmtree(aside)


# --- 9: files that are late -------------------------------------------------------------------------------------------

ASKED = 'printf %s "$HF_TOKEN" > "$SKYRL_COORD_DIR/token"; printf %s "$PYTHONPATH" > "$SKYRL_COORD_DIR/path"'


def test_files_that_are_late_or_never_come(lab: Lab) -> None:
    late = ["code", "secrets.json", "runtime_api_key.txt"]
    lab.mounts.enter_context(faulty("gpu-a", lab.folder("late"), late=late, late_s=LATE_S))
    lab.mounts.enter_context(faulty("gpu-a", lab.folder("secrets"), late=["secrets.json"], late_s=NEVER))
    lab.mounts.enter_context(faulty("gpu-b", lab.folder("code"), late=["code"], late_s=NEVER))
    lab.mounts.enter_context(faulty("cpu-b", lab.folder("flag"), late=["training_complete.flag"], late_s=NEVER))
    lab.mounts.enter_context(faulty("gpu-b", lab.folder("ready"), late=["runtime_ready.flag"], late_s=LATE_S))
    lab.mounts.enter_context(faulty("gpu-b", lab.folder("url"), late=["runtime_url.txt"], late_s=LATE_S))
    for name in ("success", "failure"):
        lab.mounts.enter_context(faulty("cpu-b", lab.folder(name), late=["training_complete.flag"], late_s=LATE_S))
    secret = {"HF_TOKEN": TOLD, "ALLHANDS_API_KEY": "the-key-of-this-launch"}
    all_late = lab.launch("late", "a", ASKED, env=secret)
    no_secrets = lab.launch("secrets", "a", "touch never", env=secret)
    no_code = lab.launch("code", "b", "touch never")
    no_flag, success = lab.launch("flag", "b", "true"), lab.launch("success", "b", "true")
    failure = lab.launch("failure", "b", "exit 3")
    ready, address = lab.launch("ready", "b", "true"), lab.launch("url", "b", "true")

    unseen = {
        faults.NO_FLAG: (no_flag, 0, 0),
        faults.LATE_SUCCESS: (success, 0, 0),
        faults.LATE_FAILURE: (failure, 69, 3),
    }
    for case, (run, runtimes, trainings) in unseen.items():
        run.wait_over(seconds=90)
        within(case, end_of(run, "runtime") - end_of(run, "training"))
        assert case.reads in run.log("runtime")
        assert (run.exit_code("runtime"), run.exit_code("training")) == (str(runtimes), str(trainings))
        assert (run.completion["job_id"], run.completion["exit_code"]) == (run.jobs["training"], trainings)

    waited_for = (
        (ready, faults.LATE_READY, "runtime_ready.flag"),
        (address, faults.LATE_ADDRESS, "runtime_url.txt"),
    )
    for run, case, name in waited_for:
        over(run, case, None)
        written = (run.directory / name).stat().st_mtime
        assert end_of(run, "training") - written > LATE_S - 1, f"{name} was not late"
        assert run.completion["exit_code"] == 0, run.log("training")
    over(all_late, faults.LATE_FILES, None)
    started = moment_of(all_late, "training", "StartTime")
    assert end_of(all_late, "training") - started > LATE_S - 1, "its code was not late"
    assert all_late.completion["exit_code"] == 0, all_late.log("training")
    assert all_late.text("token") == TOLD
    assert all_late.text("path").startswith(f"{all_late.directory}/code")

    for run, case in ((no_secrets, faults.NO_SECRETS), (no_code, faults.NO_CODE)):
        over(run, case, None)
        assert run.exit_code("training") == "71"
        assert case.reads in run.completion["reason"]
        assert not (run.directory / "never").exists()


# --- 9: a directory that is full, read-only, removed, slow ------------------------------------------------------------

WAITING = 'echo trainer started; until [ -e "{}" ]; do sleep 0.2; done; {}'
# Fills the page of the log that is begun, too, so that the job's last lines find no room.
LOUD = "head -c 8192 /dev/zero | tr '\\0' x; exit 3"


def test_a_directory_that_is_full_read_only_removed_or_slow(lab: Lab, nothing_left: NothingLeft) -> None:
    go = lab.folder("signals")
    disk = small_disk(lab, "small")
    slow = [lab.mounts.enter_context(faulty(node, lab.folder("slow"))) for node in ("cpu-b", "gpu-b")]

    def begun(name: str, nodes: str, end: str, base: Path | None = None) -> Run:
        words = (f"SKYRL_JOBS_BASE={base}",) if base else ()
        return lab.launch(name, nodes, WAITING.format(go / name, end), *words)

    full, read_only = begun("full", "a", LOUD, disk), begun("ro", "a", "true")
    removed, tardy = begun("removed", "b", "true"), begun("slow", "b", "true")
    for run in (full, read_only, removed, tardy):
        run.wait_for_text("training", "trainer started", 60)
    for node in (read_only.node("runtime"), read_only.node("training")):
        make_read_only(lab, node, read_only.directory)
    remove(removed.directory)
    fill(disk)
    for change in slow:
        change(delay_s=2)
    begin = time.monotonic()
    for name in ("full", "ro", "removed"):
        (go / name).touch()
    lab.user.run(["scancel", tardy.jobs["training"]])

    over(full, faults.FULL_SHARE, begin)
    assert (full.exit_code("training"), full.exit_code("runtime")) == ("3", "69")
    over(read_only, faults.READ_ONLY, begin, "runtime")
    assert (read_only.exit_code("training"), read_only.exit_code("runtime")) == ("0", "0")
    over(removed, faults.NO_DIRECTORY, begin)
    assert removed.exit_code("training") == "0"
    over(tardy, faults.SLOW_SHARE, begin)
    # Its body may have written the flag within KillWait, or not.
    assert tardy.completion["job_id"] == tardy.jobs["training"]
    assert re.search("SIGTERM .scancel.|CANCELLED", tardy.completion["reason"]), tardy.completion
    nothing_left()

    begin = time.monotonic()
    argv = launch_argv(
        lab.checkout, f"SKYRL_JOBS_BASE={disk}", NO_GPU, "TRAINING_COMMAND=true", options=("--no-check",)
    )
    refused = lab.user.run(argv)
    within(faults.LAUNCH_FULL, time.monotonic() - begin)
    assert refused.returncode == 73, refused.stderr
    assert "No space left on device" in refused.stderr
    assert not squeue(lab.user, "-u", lab.user.name)


LATER = "--begin=now+600"  # until it is to start


def test_a_directory_that_is_full_or_read_only_when_a_job_starts(lab: Lab) -> None:
    disks = [small_disk(lab, name) for name in ("first", "second")]
    never = "touch never"
    full_first = lab.launch("full1", "a", never, f"SKYRL_JOBS_BASE={disks[0]}", cpu=LATER)
    full_second = lab.launch("full2", "a", never, f"SKYRL_JOBS_BASE={disks[1]}", gpu=LATER)
    closed_first = lab.launch("closed1", "b", never, cpu=LATER)
    closed_second = lab.launch("closed2", "b", never, gpu=LATER)
    for run in (full_second, closed_second):
        until("ready", lambda run=run: run.text("runtime_ready.flag"), 40)  # type: ignore[misc]
    for disk in disks:
        fill(disk)
    make_read_only(lab, "cpu-b", closed_first.directory)
    make_read_only(lab, "gpu-b", closed_second.directory)
    begin = time.monotonic()
    started = (full_first, "runtime"), (full_second, "training"), (closed_first, "runtime"), (closed_second, "training")
    for run, kind in started:
        run.start_now(kind)

    over(closed_first, faults.READ_ONLY_RUNTIME, begin, "training")
    assert closed_first.exit_code("training") == "69"
    over(closed_second, faults.READ_ONLY_TRAINING, begin, "runtime")
    assert closed_second.exit_code("runtime") == "69"
    for run, case in ((closed_first, faults.READ_ONLY_RUNTIME), (closed_second, faults.READ_ONLY_TRAINING)):
        assert case.reads in run.completion["reason"]
    for run, kind in started[:2]:
        over(run, replace(faults.FULL_AT_START, reads=""), begin)
        assert not (run.directory / "never").exists()
        told = {name: comment(run, name) or run.log(name, "err") for name in run.jobs}
        assert all("No space left on device" in words for words in told.values()), told
        assert faults.FULL_AT_START.reads in told[kind]
    assert (full_first.exit_code("runtime"), full_first.exit_code("training")) == ("71", "69")
    assert (full_second.exit_code("training"), full_second.exit_code("runtime")) == ("71", "69")


def comment(run: Run, kind: str) -> str:
    """What a job's comment says to people."""
    found = re.search(r"^ *Comment=skyrl: (.+)$", scontrol_job(run.user, run.jobs[kind]), re.MULTILINE)
    return found[1].strip() if found else ""


def small_disk(lab: Lab, name: str) -> Path:
    """A disk of its own that all nodes share."""
    disk = test_cluster.SHARE / name
    disk.mkdir()
    lab.mounts.callback(disk.rmdir)
    tmpfs = ("-t", "tmpfs", "-o", f"size=8m,uid={lab.user.uid},mode=755", "tmpfs")
    lab.mounts.enter_context(test_cluster.mounted_here(disk, *tmpfs))
    return disk


def make_read_only(lab: Lab, node: str, folder: Path) -> None:
    """Let one node write nothing in a folder any more; what is open there stays so."""
    lab.mounts.enter_context(test_cluster.mounted(node, folder, "--bind", str(folder)))
    test_cluster.on_node(node, "mount", "-o", "remount,ro,bind", str(folder))


def fill(disk: Path) -> None:
    """Take every free byte of a disk."""
    with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# --- 10: files not to believe -----------------------------------------------------------------------------------------

URL, KEY = "http://127.0.0.1:9", "key-of-another-run"
OTHERS = Flag("9", "9", "cpu-x", "2020-01-01T00:00:00+00:00")


def ready(url: str, key: str) -> str:
    return Flag("8", "8", "cpu-x", server=server_digest(url, key)).to_text()


@dataclass(frozen=True)
class Plant:
    """What lies in a training job's directory, ``files`` at first and ``later`` once it runs; what it then says."""

    exit_code: int
    says: str
    files: Mapping[str, str]
    later: str = ""
    runtime: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


HERE = {"runtime_url.txt": URL, "runtime_api_key.txt": KEY}
DISAGREE = "runtime_url.txt or runtime_api_key.txt is not what it names"
PLANTS = {
    "half a flag": Plant(75, "to be ready", {**HERE, "runtime_ready.flag": ready(URL, KEY)[:40]}),
    "a list": Plant(75, "to be ready", {**HERE, "runtime_ready.flag": "[]", "run.json": "{", "run_7.json": "[1]"}),
    "another attempt's": Plant(
        75,
        "to be ready",
        {**HERE, "runtime_ready.flag": OTHERS.to_text(), "runtime_failed.flag": OTHERS.to_text()},
        runtime="999999",  # of which Slurm knows nothing
    ),
    "an old address": Plant(75, DISAGREE, {**HERE, "runtime_ready.flag": ready("http://cpu-x:1", KEY)}),
    "an old key": Plant(75, DISAGREE, {**HERE, "runtime_ready.flag": ready(URL, "the new one")}),
    "no address": Plant(75, "to be ready", {"runtime_url.txt": "", "runtime_ready.flag": ""}),
    "an address by hand": Plant(69, f"{URL} cannot be reached from", {**HERE, "runtime_ready.flag": ""}),
    "secrets that are none": Plant(71, "it holds no names with their values", {"secrets.json": "[]"}),
    "a failure by hand": Plant(69, "runtime_failed.flag was set by hand", {}, later="runtime_failed.flag"),
}


def submitted(lab: Lab, name: str, plant: Plant) -> Run:
    """A training job submitted directly into a directory that is prepared."""
    folder = lab.folder(name.replace(" ", "_"))
    for file, text in plant.files.items():
        (folder / file).write_text(text)
        os.chown(folder / file, lab.user.uid, lab.user.gid)
    timeout = 60 if plant.later else 4
    words = (*SMALL, NO_GPU, "TRAINING_COMMAND=touch never", f"RUNTIME_READY_TIMEOUT={timeout}")
    sets = [word for setting in words for word in ("--set", setting)]
    options = ["--partition=gpu_test", "--mem=300M", "--output=%j.out", "--error=%j.err"]
    script = str(lab.checkout / "slurm/jobs/verl_training.py")
    env = {"SKYRL_RUNTIME_JOB_ID": plant.runtime} if plant.runtime else {}
    argv = ["sbatch", "--parsable", *options, script, "--config", "dev", *sets, "--coord-dir", str(folder)]
    done = lab.user.run(argv, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return Run(lab.user, folder, {"training": done.stdout.strip()})


def output(run: Run) -> str:
    job_id = next(iter(run.jobs.values()))
    return run.text(f"{job_id}.out") + run.text(f"{job_id}.err")


def test_files_that_are_not_to_be_believed(lab: Lab) -> None:
    runs = {name: submitted(lab, name, plant) for name, plant in PLANTS.items()}
    for name, plant in PLANTS.items():
        if plant.later:
            until("the wait", lambda run=runs[name]: "for the runtime in" in output(run), 40)  # type: ignore[misc]
            (runs[name].directory / plant.later).touch()
    for run in runs.values():
        run.wait_over(seconds=faults.PLANTED.bound_s + 60)
    took = (end_of(run, "training") - moment_of(run, "training", "StartTime") for run in runs.values())
    within(faults.PLANTED, max(took))
    for name, plant in PLANTS.items():
        run = runs[name]
        assert (name, run.exit_code("training")) == (name, str(plant.exit_code)), output(run)
        assert plant.says in str(run.completion.get("reason")), f"{name}: {run.completion}"
        assert not (run.directory / "never").exists(), name
    assert "runtime_ready.flag was set by hand; believing it" in output(runs["an address by hand"])


DEEP = "[" * 100_000  # more than Python's reader takes
# What lies in a runtime job's directory before it begins: it ends at once.
RUNTIME_PLANTS = {
    "half the secrets": Plant(71, "secrets.json", {"secrets.json": '{"ALLHANDS_API_KEY": "hal'}),
    "empty secrets": Plant(71, "secrets.json", {"secrets.json": ""}),
    "secrets that are no text": Plant(71, "it holds no names with their", {"secrets.json": '{"HF_TOKEN": {"a": 1}}'}),
    "a key of two words": Plant(2, "ALLHANDS_API_KEY", {"secrets.json": '{"ALLHANDS_API_KEY": "two words"}'}),
    "half an attempt": Plant(
        76,
        "saved no checkpoint at all",
        {"attempt_1.json": '{"checkpoint": "global_st', "training_complete.flag": OTHERS.to_text()},
        environment={"SKYRL_AFTER_JOB_ID": "999999", "SKYRL_ATTEMPT": "2"},
    ),
    "an end by hand": Plant(
        0,
        "training_complete.flag was set by hand); there is nothing to go on with",
        {"attempt_1.json": DEEP, "training_complete.flag": ""},
        environment={"SKYRL_AFTER_JOB_ID": "999999", "SKYRL_ATTEMPT": "2"},
    ),
}
GIVEN = "the-key-of-this-run"
SERVES = {  # with this it serves
    "training_complete.flag": "",
    "runtime_failed.flag": OTHERS.to_text(),
    "runtime_ready.flag": ready(URL, KEY),
    **HERE,
    "secrets.json": json.dumps({"ALLHANDS_API_KEY": GIVEN}),
    "run.json": "{",
    "run_4.json": json.dumps({"jobs": {"training": {"id": "--me"}}}),
    "run_5.json": json.dumps({"jobs": {"training": {"id": None}}}),
    "run_6.json": DEEP,
    "run_7.json": "[1]",
    "run_8.json": json.dumps({"jobs": {"runtime": {"id": "8"}, "training": {"id": "9"}}}),
    "attempt_1.json": json.dumps({"successor": {"training": "10"}, "jobs": ["9"]}),
    "heartbeat_training_9.txt": "1",
}


def served(lab: Lab, name: str, plant: Plant) -> Run:
    """A runtime job submitted directly into a directory that is prepared."""
    folder = lab.folder(name.replace(" ", "_"))
    for file, text in plant.files.items():
        put(lab, folder / file, text)
    sets = [word for setting in (*SMALL, *plant.settings) for word in ("--set", setting)]
    options = ["--mem=1G", "--output=%j.out", "--error=%j.err"]
    script = str(lab.checkout / "slurm/jobs/runtime_server.py")
    argv = ["sbatch", "--parsable", *options, script, "--config", "dev", *sets, "--coord-dir", str(folder)]
    done = lab.user.run(argv, cwd=folder, env=plant.environment)
    assert done.returncode == 0, done.stderr
    return Run(lab.user, folder, {"runtime": done.stdout.strip()})


def put(lab: Lab, path: Path, text: str) -> None:
    """A new file of the user's in place of what is there."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(text.encode("utf-8", "surrogateescape"))
    os.chown(beside, lab.user.uid, lab.user.gid)
    beside.replace(path)


def flags_of_nobody(job_id: str) -> list[str]:
    """Completion flags that do not end the runtime job ``job_id``."""
    own = json.loads(Flag("9", job_id, "gpu-x", exit_code=0, reason="done").to_text())
    texts = [json.dumps({**own, **wrong}) for wrong in ({"schema": 2}, {"exit_code": "0"}, {"reason": ["done"]})]
    return [*texts, json.dumps(own)[:-20], "[]", DEEP, "\0" * 200, "\udcff", OTHERS.to_text()]


def test_files_that_a_runtime_job_is_not_to_believe(lab: Lab) -> None:
    """Those that come while it serves are there for longer than it takes between two looks."""
    begin = time.monotonic()
    go = lab.folder("signals") / "go"
    serving = served(lab, "serving", Plant(0, "", SERVES))
    pair = lab.launch("pair", "b", WAITING.format(go, "true"))
    waiting = lab.launch("waiting", "a", "true", cpu="--begin=now+3600")
    others = json.dumps({"jobs": {"training": {"id": waiting.jobs["training"]}}})
    plants = {
        **RUNTIME_PLANTS,
        "the training of another run": Plant(
            71, f"of the run {waiting.directory}", {"run_7.json": others}, settings=("SANDBOX_PORT_RANGE=1-1",)
        ),
    }
    runs = {name: served(lab, name, plant) for name, plant in plants.items()}
    until("ready", lambda: f'"job_id": "{serving.jobs["runtime"]}"' in serving.text("runtime_ready.flag"), 60)
    assert serving.text("runtime_api_key.txt").strip() == GIVEN
    assert URL not in serving.text("runtime_url.txt")
    pair.wait_for_text("training", "trainer started", 60)
    foreign = {"runtime": {"id": serving.jobs["runtime"]}, "training": {"id": "999999"}}
    put(lab, pair.directory / "run.json", json.dumps({"schema": 1, "jobs": foreign}))
    put(lab, pair.directory / f"run_{serving.jobs['runtime']}.json", "")
    for text in flags_of_nobody(serving.jobs["runtime"]):
        put(lab, serving.directory / "training_complete.flag", text)
        put(lab, pair.directory / "training_complete.flag", text)
        time.sleep(1)
    assert {serving.state("runtime"), pair.state("runtime"), pair.state("training")} == {"RUNNING"}, output(serving)
    put(lab, serving.directory / "training_complete.flag", "")
    put(lab, pair.directory / "run.json", "{")
    go.touch()
    for run in (serving, pair, *runs.values()):
        run.wait_over(seconds=faults.PLANTED_RUNTIME.bound_s)
    within(faults.PLANTED_RUNTIME, time.monotonic() - begin)

    assert faults.PLANTED_RUNTIME.reads in output(serving)
    assert serving.exit_code("runtime") == "0", output(serving)
    assert (pair.exit_code("training"), pair.exit_code("runtime")) == ("0", "0"), pair.log("runtime")
    assert f"training job {pair.jobs['training']} is complete" in pair.log("runtime")
    for name, plant in plants.items():
        run = runs[name]
        assert (name, run.exit_code("runtime")) == (name, str(plant.exit_code)), output(run)
        assert plant.says in output(run), f"{name}: {output(run)}"
        told = run.text("runtime_failed.flag")
        assert plant.environment or plant.settings or plant.says in told, name
    assert waiting.state("training") == "PENDING", "it could not start, by the word of another run's runtime job"
    for run in (serving, *runs.values()):
        assert "Traceback" not in output(run)


def test_a_directory_that_is_removed_before_the_runtime_is_ready(lab: Lab) -> None:
    folder = lab.folder("run")
    words = [word for setting in (*SMALL, NO_GPU, "TRAINING_COMMAND=true") for word in ("--set", setting)]
    argv = ["sbatch", "--parsable", "--partition=gpu_test", "--mem=300M", "--output=%j.out", "--error=%j.err"]
    script = str(lab.checkout / "slurm/jobs/verl_training.py")
    elsewhere = lab.folder("logs")
    done = lab.user.run([*argv, script, "--config", "dev", *words, "--coord-dir", str(folder)], cwd=elsewhere)
    run = Run(lab.user, elsewhere, {"training": done.stdout.strip()})
    until("the wait", lambda: "for the runtime in" in output(run), 40)
    remove(folder)
    begin = time.monotonic()
    run.wait_over(seconds=faults.GONE_BEFORE.bound_s)
    within(faults.GONE_BEFORE, time.monotonic() - begin)
    assert faults.GONE_BEFORE.reads in output(run)
    assert run.exit_code("training") == "71"


# --- 14: clocks -------------------------------------------------------------------------------------------------------

TELLING = f'touch started; echo "$(( {EXPIRY_NAME} - $(date +%s) ))" > told; '


SKEWS = {"gpu ahead": 300, "gpu behind": -300}  # seconds, of the clock that stamps the training's log


def skewed(library: Path, seconds: int) -> str:
    """An option of sbatch that has a job's processes see a clock that is wrong by so much."""
    return f"--export=ALL,LD_PRELOAD={library},SKEW_S={seconds}"


def end_of(run: Run, kind: str) -> float:
    """When a job has ended, or its time limit while it runs."""
    return moment_of(run, kind, "EndTime")


def moment_of(run: Run, kind: str, what: str) -> float:
    """A time that Slurm knows of a job; by the controller's clock, in whole seconds."""
    shown = scontrol_job(run.user, run.jobs[kind])
    found = re.search(rf"\b{what}=(\d+)", shown)
    assert found, shown
    return float(found[1])


def test_clocks_that_differ_by_minutes(lab: Lab) -> None:
    library = lab.folder("clock") / "skewed_clock.so"
    build = ["gcc", "-shared", "-fPIC", "-nostdlib", "-ffreestanding", "-O1", "-Wall", "-o", str(library)]
    subprocess.run([*build, str(SKEWED_CLOCK)], check=True)
    ahead, behind = skewed(library, 300), skewed(library, -300)
    short = ("TIME_LIMIT=00:04:00", "MIN_RUN_TIME=60", "RESTARTS=1", "RESTART_LEAD=30")
    command = f'cd "$SKYRL_COORD_DIR"; {TELLING} sleep 600'
    runs = {
        "gpu ahead": lab.launch("g1", "a", command, *short, gpu=ahead),
        "gpu behind": lab.launch("g2", "b", command, *short, gpu=behind),
        "cpu ahead": lab.launch("c1", "a", command, *short, cpu=ahead),
        "cpu behind": lab.launch("c2", "b", command, *short, cpu=behind),
    }
    for name, run in runs.items():
        until(f"the trainer, {name}", lambda run=run: run.text("told").strip(), 60)  # type: ignore[misc]
        ends = min(end_of(run, kind) for kind in run.jobs)
        said = re.search(r"^(\S+ \S+) \[INFO\] this training may go on for (\d+) s", run.log("training"), re.MULTILINE)
        assert said, run.log("training")
        at = time.mktime(time.strptime(said[1], "%Y-%m-%d %H:%M:%S")) - SKEWS.get(name, 0)
        assert abs(int(said[2]) - (ends - at)) < 5, f"{name}: says {said[2]} s, {ends - at:.0f} s were left"
        left = ends - (run.directory / "started").stat().st_mtime
        assert abs(int(run.text("told")) - left) < 5, f"{name}: tells {run.text('told')} s, {left:.0f} s are left"
    lab.user.run(["scancel", *(run.jobs["training"] for run in runs.values())])
    for name, run in runs.items():
        run.wait_over(seconds=40)
        assert run.completion["ended"] == "cancelled", f"{name}: {run.completion}"
    within(faults.SKEWED, 0.0)


# --- 22: the code and the interpreter of queued jobs ------------------------------------------------------------------


def rebuilt(python: Path) -> None:
    """Another version of a package in an environment."""
    old = next(python.parent.parent.glob("lib/python3*/site-packages/fastapi-*.dist-info"))
    text = (old / "METADATA").read_text()
    old.unlink()
    old.mkdir()
    (old / "METADATA").write_text(re.sub(r"^Version: .*", "Version: 99.9", text, flags=re.MULTILINE))


@dataclass(frozen=True)
class Repository:
    """A user's checkout that git knows."""

    user: OrdinaryUser
    path: Path

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
        done = self.user.run(["git", "-C", str(self.path), *who, *words])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit(self) -> str:
        """Commit everything; the commit's id."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=all of it")
        return self.git("rev-parse", "HEAD")

    def upgrade(self) -> str:
        """Where to pull a version from, of which no module can be used."""
        newer = Repository(self.user, self.path.with_name("upstream"))
        self.git("clone", "--quiet", str(self.path), str(newer.path))
        for folder in ("slurm", "slurm_runtime", "shell_rl", "local_verl"):
            for module in (newer.path / folder).rglob("*.py"):
                module.write_text("#!/usr/bin/env python3\nraise SystemExit('upgraded')\n")
        newer.commit()
        return str(newer.path)


def test_code_and_interpreter_while_jobs_are_queued(lab: Lab) -> None:
    again, gone = own_environment(lab.folder("env-rebuilt")), own_environment(lab.folder("env-gone"))
    moving, upgrading = (lab.folder(name) / "SkyRL" for name in ("moving", "upgrading"))
    for copy in (moving, upgrading):
        subprocess.run(["cp", "-a", str(lab.checkout), str(copy)], check=True)
    repository = Repository(lab.user, upgrading)
    repository.git("init", "--quiet")
    launched, upstream = repository.commit(), repository.upgrade()
    command = 'printf %s "$PYTHONPATH" > "$SKYRL_COORD_DIR/path"'
    renewed = lab.launch("rebuilt", "a", command, gpu=LATER, env={"SKYRL_PYTHON": str(again)})
    lost = lab.launch("gone", "b", "true", gpu=LATER, env={"SKYRL_PYTHON": str(gone)})
    queued = ("TRAINING_COMMAND=" + command, NO_GPU, f"CPU_SBATCH_ARGS={LATER}")
    moved = launch(lab.user, moving, lab.folder("moved"), *queued, options=("--no-check",))
    upgraded = launch(lab.user, upgrading, lab.folder("upgraded"), *queued, options=("--no-check",))
    for run in (renewed, lost):
        until("ready", lambda run=run: run.text("runtime_ready.flag"), 40)  # type: ignore[misc]
    rebuilt(again)
    shutil.rmtree(gone.parent.parent)
    moving.parent.rename(moving.parent.with_name("elsewhere"))
    repository.git("pull", "--quiet", "--ff-only", upstream, "HEAD")
    assert {run.state("training") for run in (renewed, lost, moved, upgraded)} == {"PENDING"}
    assert {run.state("runtime") for run in (moved, upgraded)} == {"PENDING"}
    assert "upgraded" in lab.user.run([str(upgrading / "slurm" / "launch.py"), "--version"]).stderr
    begin = time.monotonic()
    for run, kind in ((renewed, "training"), (lost, "training"), (moved, "runtime"), (upgraded, "runtime")):
        run.start_now(kind)

    over(renewed, faults.REBUILT, begin, "training")
    assert renewed.completion["exit_code"] == 0
    over(lost, faults.NO_PYTHON, begin)
    assert (lost.exit_code("training"), lost.completion["exit_code"]) == ("71", 71)
    assert faults.NO_PYTHON.reads in lost.completion["reason"]
    for run, case in ((moved, faults.MOVED), (upgraded, faults.UPGRADED)):
        over(run, case, begin)
        assert run.completion["exit_code"] == 0, run.log("training")
        assert run.text("path").startswith(f"{run.directory}/code")
    assert json.loads(upgraded.text("run.json"))["git"]["commit"] == launched
