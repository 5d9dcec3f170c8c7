"""A launch that is killed, or whose Slurm falls silent: never half a pair, and nothing left for ever."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from slurm.lib import settings as parsers
from slurm.lib.launch_mark import own_launcher
from slurm.lib.settings import KEYS
from tests import cluster as test_cluster
from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser, belongings
from tests.faults import within
from tests.runs import SMALL, Run, answers, body_pid, launch, launch_argv, parse_report, squeue, until, with_sandboxes

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

NO_GPU = "GPUS_PER_NODE=0"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 600"
TRUE = "TRAINING_COMMAND=true"
LATER = "CPU_SBATCH_ARGS=--begin=now+3600"
HET = "PAIRING=het"
OUTAGE_S = 120.0
ELSEWHERE = "skyrl:login9.example/boot/1/2/3/0"
# Does what Slurm's command does; at one of its calls, before or after it, kills the launcher or waits to go on.
WRAPPER = """#!/bin/sh
case " $* " in *" --test-only "*|*" show "*) exec {real} "$@" ;; esac
n=$(($(cat {folder}/{name}.count 2>/dev/null || echo 0) + 1))
echo $n > {folder}/{name}.count
at() {{
    [ "$SKYRL_TEST_POINT" = "$1" ] || return
    [ "$SKYRL_TEST_ACT" = kill ] && kill -9 $PPID && exit 1
    touch {folder}/reached
    while [ ! -e {folder}/go ]; do sleep 0.1; done
}}
at "{name} $n before"
{real} "$@"
code=$?
at "{name} $n after"
exit $code
"""


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


@dataclass(frozen=True)
class Job:
    """A job in the queue, as squeue prints it."""

    job_id: str
    name: str
    state: str
    reason: str

    @property
    def can_start(self) -> bool:
        """Whether it has been let go: a training that waits for its runtime depends on that one's."""
        return self.reason not in {"JobHeldUser", "Dependency"}


@dataclass
class Desk:
    """Where a user launches from: a folder for wrappers of Slurm's commands, and one for runs."""

    user: OrdinaryUser
    checkout: Path
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "runs"

    def argv(self, *settings: str) -> list[str]:
        return launch_argv(self.checkout, f"SKYRL_JOBS_BASE={self.base}", TRUE, NO_GPU, *settings)

    def wrapped(self, name: str, point: str, act: str) -> dict[str, str]:
        """The environment of a launch that is killed, or waits, at a point such as ``sbatch 2 before``."""
        folder = self.folder / name
        folder.mkdir()
        os.chown(folder, self.user.uid, self.user.gid)
        for command in ("sbatch", "scontrol"):
            real = self.user.run(["sh", "-c", f"command -v {command}"]).stdout.strip()
            script = folder / command
            script.write_text(WRAPPER.format(real=real, folder=shlex.quote(str(folder)), name=command))
            script.chmod(0o755)
        path = f"{folder}:{self.user.environment['PATH']}"
        return {"PATH": path, "SKYRL_TEST_POINT": point, "SKYRL_TEST_ACT": act}

    def start(self, *settings: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return self.user.popen(self.argv(*settings), env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def launch(self, *settings: str) -> tuple[Run, str]:
        """A launch that succeeds: its run, and what it said."""
        done = self.user.run(self.argv(*settings))
        assert done.returncode == 0, done.stderr
        return parse_report(self.user, done.stdout), done.stderr

    def cancel(self, run: object) -> subprocess.CompletedProcess[str]:
        argv = [str(self.checkout / "slurm" / "launch.py"), "cancel", str(run)]
        return self.user.run(argv, {"SKYRL_JOBS_BASE": str(self.base)})

    def queue(self) -> list[Job]:
        lines = squeue(self.user, f"--user={self.user.name}", "-o", "%A|%j|%T|%r").splitlines()
        return [Job(*line.split("|")) for line in lines]

    def calls(self) -> list[str]:
        """The launchers of the user that live, and their calls of Slurm, which go on where a launcher is killed."""
        lines = self.user.processes().values()
        return [line for line in lines if line.startswith(("sbatch ", "scontrol ")) or "/launch.py " in line]

    def folders(self) -> set[Path]:
        """What lies in the jobs base, but for the cache that a runtime job makes there."""
        return set(self.base.iterdir()) - {self.base / ".cache"} if self.base.is_dir() else set()

    def whole_runs(self) -> dict[Path, set[str]]:
        """The runs with a complete directory, whose last file is the record, and the ids of their jobs."""
        finished = [path for path in self.folders() if (path / "run.json").exists()]
        records = {path: json.loads((path / "run.json").read_text()) for path in finished}
        return {path: {job["id"] for job in record["jobs"].values()} for path, record in records.items()}


@pytest.fixture
def desk(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Iterator[Desk]:
    yield Desk(user, checkout, jobs_base)
    user.run(["scancel", "-u", user.name])


def assert_nothing_can_start(desk: Desk) -> None:
    """What may start belongs to a run with its whole directory and all jobs."""
    jobs = desk.queue()
    whole = desk.whole_runs()
    for job in jobs:
        ids = next((ids for ids in whole.values() if job.job_id in ids), set())
        if job.can_start:
            assert ids, jobs
            assert len(ids) in {2, 4}, jobs  # with the arrays of a runtime on several nodes
        if job.reason == "Dependency":
            runtime = [other for other in jobs if other.name == "skyrl-runtime" and other.reason == "JobHeldUser"]
            assert ids or runtime, jobs


@dataclass(frozen=True)
class Killing:
    """A kind of run whose launcher is killed: before and after its calls of Slurm, and at any time.

    ``left`` counts its jobs that are held after each of these kills but the last, which comes after the commit.
    """

    at_a_call: faults.Case
    any_time: faults.Case
    settings: tuple[str, ...]
    calls: tuple[str, ...]
    left: tuple[int, ...]

    @property
    def points(self) -> list[str]:
        return [f"{call} {when}" for call in self.calls for when in ("before", "after")]


KILLINGS = (
    Killing(
        faults.KILLED_AT_A_CALL,
        faults.KILLED_ANY_TIME,
        (),
        ("sbatch 1", "sbatch 2", "scontrol 1", "scontrol 2"),
        (0, 1, 1, 2, 2, 2, 2),
    ),
    Killing(faults.KILLED_AT_A_CALL_HET, faults.KILLED_ANY_TIME_HET, (HET,), ("sbatch 1", "scontrol 1"), (0, 2, 2)),
)
MOMENTS, MORE_MOMENTS = 20, 5


def killed_at(desk: Desk, point: str, *settings: str) -> None:
    """A launch that is killed at a point."""
    with desk.start(*settings, env=desk.wrapped(point.replace(" ", "_"), point, "kill")) as launcher:
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == -signal.SIGKILL, (point, out, err)
    time.sleep(1)
    assert_nothing_can_start(desk)


@pytest.mark.parametrize("killing", KILLINGS, ids=lambda killing: killing.at_a_call.fault)
def test_a_launcher_killed_at_each_call(desk: Desk, killing: Killing) -> None:
    """Without anything to wait for: what could start would have started."""
    *before, committed = killing.points
    for point, count in zip(before, killing.left, strict=True):
        killed_at(desk, point, *killing.settings)
        left = [job for job in desk.queue() if job.name.startswith("skyrl")]
        assert len(left) == count, (point, left)
        assert not [job for job in left if job.can_start], (point, left)
    killed_at(desk, committed, *killing.settings)
    until("the end of the one that was killed after its commit", lambda: not desk.queue(), 60)
    finished = {path for path in desk.folders() if list(path.glob("*.out"))}
    assert len(finished) == 1, finished
    run, said = desk.launch(LATER, *killing.settings)
    assert {job.job_id for job in desk.queue()} == set(run.jobs.values())
    assert desk.folders() == {*finished, run.directory}
    assert not list(desk.base.glob("*/submission_*")), said
    within(killing.at_a_call, 0.0)


@dataclass
class Kills:
    """Launches that are killed at any time: the runs that are whole, by their directories; what was left halfway."""

    desk: Desk
    settings: tuple[str, ...]
    whole: set[Path]
    halfway: int = 0

    def after(self, seconds: float) -> None:
        self._kill(lambda _launcher: time.sleep(seconds))

    def in_sbatch(self) -> None:
        """One that is killed while it queues a job; too late, where that was not seen."""
        self._kill(lambda launcher: until("its sbatch", lambda: self._submits(launcher), 60, 0.01))

    def _submits(self, launcher: subprocess.Popen[str]) -> bool:
        calls = [line for line in self.desk.calls() if line.startswith("sbatch ") and "--test-only" not in line]
        return bool(calls) or launcher.poll() is not None

    def _kill(self, wait: Callable[[subprocess.Popen[str]], object]) -> None:
        launcher = self.desk.start(*self.settings)
        wait(launcher)
        launcher.kill()
        launcher.communicate()
        until("the end of its call of Slurm, which goes on without it", lambda: not self.desk.calls(), 90)
        assert_nothing_can_start(self.desk)
        queue = self.desk.queue()
        committed = {job.job_id for job in queue if job.name == "skyrl-runtime" and job.can_start}
        self.whole |= {path for path, ids in self.desk.whole_runs().items() if ids & committed}
        self.halfway += any(job.reason == "JobHeldUser" for job in queue)


@pytest.mark.parametrize("killing", KILLINGS, ids=lambda killing: killing.any_time.fault)
def test_a_launcher_killed_at_any_time(desk: Desk, killing: Killing) -> None:
    """The moments reach from before its first call of Slurm to after its last, however fast the machine is.

    Where it is not as fast as in the first launch, further ones come during a call of sbatch, and after the last call.
    """
    later = (LATER, *killing.settings)
    begin = time.monotonic()
    kills = Kills(desk, later, {desk.launch(*later)[0].directory})
    usual_s = time.monotonic() - begin
    for number in range(MOMENTS):
        kills.after(usual_s * (0.3 + 1.8 * number / MOMENTS))
    for number in range(MORE_MOMENTS):
        if not kills.halfway:
            kills.in_sbatch()
        if len(kills.whole) == 1:
            kills.after(usual_s * 2.1 * 1.5**number)
    assert len(kills.whole) > 1, "no kill came after the commit"
    assert kills.halfway, "no kill came between the first sbatch and the commit"
    run, _ = desk.launch(*later)
    whole = desk.whole_runs()
    assert desk.folders() == whole.keys()
    assert whole.keys() == {*kills.whole, run.directory}
    assert {job.job_id for job in desk.queue()} == set().union(*whole.values())
    within(killing.any_time, 0.0)


def test_what_is_not_a_leftover_stays(desk: Desk) -> None:
    held, _ = desk.launch(LATER)
    assert desk.user.run(["scontrol", "hold", held.jobs["runtime"]]).returncode == 0
    script = ["sbatch", "--parsable", "--hold", f"--comment={ELSEWHERE}", f"--output={desk.base}/made-later/%j.out"]
    foreign = desk.user.run([*script, "--wrap=true"]).stdout.strip()
    env = desk.wrapped("bin", "sbatch 2 before", "wait")
    with desk.start(LATER, env=env) as living:
        until("its second sbatch", lambda: (desk.folder / "bin" / "reached").exists(), 30)
        other, said = desk.launch(LATER)
        assert f"job {foreign} is held by a launch on login9.example" in said
        assert f"scancel {foreign}" in said
        assert "removed what" not in said
        (desk.folder / "bin" / "go").touch()
        out, err = living.communicate(timeout=60)
    assert living.returncode == 0, err
    ids = {foreign, *held.jobs.values(), *other.jobs.values(), *parse_report(desk.user, out).jobs.values()}
    assert {job.job_id for job in desk.queue()} == ids
    assert len(ids) == 7
    within(faults.NOT_ITS_OWN, 0.0)


# --- 10: records that are not to be believed -------------------------------------------------------------------------

NOT_RECORDS = {
    "half": '{"schema": 1, "jobs": {"training": {"id": "1',
    "empty": "",
    "list": "[1]",
    "deep": "[" * 100_000,
    "hostile": json.dumps(
        {"jobs": {"training": {"id": "--me"}, "runtime": {"id": None}, "; scancel --me": {"id": "1"}}}
    ),
}


def dead_launcher() -> str:
    """A launcher of this host that does not live."""
    host, boot, namespace, _pid, _ticks = own_launcher().split("/")
    return f"{host}/{boot}/{namespace}/{2**22}/1"


def test_records_that_are_not_to_be_believed(desk: Desk) -> None:
    """Run directories that were copied, are older than a job of the same id, or half-written; the newest is one."""
    whole, _ = desk.launch(LATER)
    mine = desk.user.run(["sbatch", "--parsable", "--hold", "--job-name=mine", "--wrap=true"], cwd=desk.base)
    ids = {*whole.jobs.values(), mine.stdout.strip()}
    assert desk.user.run(["scontrol", "hold", *whole.jobs.values()]).returncode == 0
    marker = {"schema": 1, "launcher": dead_launcher(), "jobs": list(whole.jobs.values()), "made": True}
    folders = {name: desk.base / f"29990101_00000{n}_7" for n, name in enumerate(NOT_RECORDS)}
    copied, old, marked = (desk.base / f"29980101_00000{n}_7" for n in range(3))
    for folder in (*folders.values(), old, marked):
        folder.mkdir()
    shutil.copytree(whole.directory, copied, symlinks=True)
    for name, text in NOT_RECORDS.items():
        (folders[name] / "run.json").write_text(text)
        (folders[name] / "submission_x.json").write_text(text)
    (marked / "submission_x.json").write_text(json.dumps(marker))
    (old / "run.json").write_text(json.dumps({"jobs": {"training": {"id": mine.stdout.strip()}}}))
    subprocess.run(["chown", "-R", f"{desk.user.uid}:{desk.user.gid}", str(desk.base)], check=True)

    following, said = desk.launch(LATER)
    ids |= set(following.jobs.values())
    assert {job.job_id for job in desk.queue()} == ids, said
    assert "Traceback" not in said

    for name, folder in folders.items():
        refused = desk.cancel(folder)
        assert refused.returncode == 2, (name, refused.stderr)
        assert f"no job of the run {folder} is known: run.json" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert desk.cancel("latest").returncode == 2
    for folder, words in ((copied, f"is of the run {whole.directory}"), (old, "is another job, mine")):
        done = desk.cancel(folder)
        assert done.returncode == 0, done.stderr
        assert words in done.stderr
        assert faults.PLANTED_RUNS.reads in done.stdout
    assert {job.job_id for job in desk.queue()} == ids
    assert desk.cancel(whole.directory).returncode == 0
    assert {job.job_id for job in desk.queue()} == ids - set(whole.jobs.values())
    within(faults.PLANTED_RUNS, 0.0)


# --- 8: the controller ------------------------------------------------------------------------------------------------


OUTAGES = {
    faults.SILENT_CONTROLLER: test_cluster.silent_controller,
    faults.NO_CONTROLLER: test_cluster.no_controller,
    faults.SLOW_CONTROLLER: test_cluster.slow_controller,
}
CAUGHT_AT = ("sbatch 1 before", "sbatch 2 before", "scontrol 1 before", "scontrol 2 before")


@dataclass
class Launches:
    """Launches that an outage catches at their calls, and one that begins in it."""

    desk: Desk
    end: contextlib.ExitStack
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)  # stdout and stderr of each

    def catch(self) -> None:
        """Have them wait at their calls."""
        self.folders = [self.desk.folder / f"bin{number}" for number in range(len(CAUGHT_AT))]
        for path, point in zip(self.folders, CAUGHT_AT, strict=True):
            self._start(self.desk.wrapped(path.name, point, "wait"))
        until("their calls", lambda: all((path / "reached").exists() for path in self.folders), 60)

    def go_on(self) -> None:
        """Let them make their calls; one more begins."""
        for path in self.folders:
            (path / "go").touch()
        self._start()

    def _start(self, env: dict[str, str] | None = None) -> None:
        self.started.append(self.end.enter_context(self.desk.start(LATER, env=env)))

    def await_ends(self, seconds: float) -> None:
        self.said = [launcher.communicate(timeout=seconds) for launcher in self.started]

    def assert_whole(self) -> None:
        """Each has completed, or says that nothing was queued; in the queue is what has completed, nothing else."""
        taken: set[str] = set()
        for launcher, (out, err) in zip(self.started, self.said, strict=True):
            assert launcher.returncode in {0, 73}, err
            assert launcher.returncode == 0 or "nothing was queued" in err or "cancelled" in err, err
            assert "Traceback" not in err
            if launcher.returncode == 0:
                jobs = set(parse_report(self.desk.user, out).jobs.values())
                assert len(jobs) == 2
                taken |= jobs
        assert taken, "a controller that comes back is worth waiting for"
        jobs_left = self.desk.queue()
        assert {job.job_id for job in jobs_left} == taken, (self.said, jobs_left)
        assert not [job for job in jobs_left if job.reason == "JobHeldUser"], "all of them have been let go"
        assert set().union(*self.desk.whole_runs().values()) == taken
        assert len(self.desk.folders()) * 2 == len(taken)


@contextlib.contextmanager
def unheard_runtime(user: OrdinaryUser, run: Run) -> Iterator[None]:
    """The API server of a run does nothing for the length of the block."""
    servers = faults.runtime_processes(user, run, "slurm_runtime.api_server")
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in servers:
            os.kill(pid, signal.SIGCONT)


def questions(user: OrdinaryUser, run: Run) -> list[int]:
    """What a job of the run asks Slurm at this moment about the other."""
    about_one = re.compile(rf"squeue .*-j ({'|'.join(run.jobs.values())}) ")
    return [pid for pid, line in user.processes().items() if about_one.match(line)]


def signalled(desk: Desk, run: Run, over_at: float) -> None:
    """SIGTERM to the body of a training job; nobody has to hear Slurm for its end.

    Both bodies ask it just then: a ``squeue`` about one job goes on for 18 s where no controller runs.
    """
    with unheard_runtime(desk.user, run):
        until("a question about each job", lambda: len(questions(desk.user, run)) == 2, 15)
        begin = time.monotonic()
        os.kill(body_pid(run, "training"), signal.SIGTERM)
    check, left = faults.NothingLeftOfRun(desk.user, belongings(desk.user), run), ["everything"]
    while left or not run.completion:
        assert time.monotonic() - begin < 60, f"left, with the completion flag {run.completion}: {left}"
        time.sleep(0.1)
        seen, left = left, check.now()
        if left != seen:
            print(f"{time.monotonic() - begin:.1f} s after the signal: {left}")
    within(faults.SIGNAL_IN_SILENCE, time.monotonic() - begin)
    assert "if it is interrupted it goes on" not in run.log("training"), "it was still queueing its next attempt"


def cancelled_again(desk: Desk, run: Run, over_at: float) -> None:
    """``launch.py cancel``, again and again until the run has ended, or the outage; each says what has become of it."""
    check = faults.NothingLeftOfRun(desk.user, belongings(desk.user), run)
    while time.monotonic() < over_at:
        begin = time.monotonic()
        done = desk.cancel(run.directory)
        within(faults.CANCELLED_SLOWLY, time.monotonic() - begin)
        if done.returncode == 0:
            until("the run's end on its nodes", lambda: not check.now(), 15)
            return
        assert done.returncode == 75, done.stderr
        assert faults.CANCELLED_SLOWLY.reads in done.stdout


def to_queue_its_next_attempt(desk: Desk, name: str) -> Run:
    """A run whose training job will wait at its first call of sbatch."""
    env = desk.wrapped(f"bin_{name}", "sbatch 3 before", "wait")
    chained = ("RESTARTS=1", "RESTART_LEAD=60")
    return launch(desk.user, desk.checkout, desk.folder / name, TRAIN_LONG, NO_GPU, *chained, env=env)


def remove_held(desk: Desk) -> None:
    """Remove what Slurm took from a training job that had ended by then: held until a later launch removes it."""
    lines = squeue(desk.user, f"--user={desk.user.name}", "-o", "%A|%r|%k").splitlines()
    jobs = [line.split("|", 2) for line in lines]
    theirs = {job_id: reason for job_id, reason, comment in jobs if comment.startswith("skyrl:gpu-")}
    assert set(theirs.values()) <= {"JobHeldUser"}, jobs
    if theirs:
        assert desk.user.run(["scancel", *theirs]).returncode == 0


END = dict.fromkeys(OUTAGES, signalled) | {faults.SLOW_CONTROLLER: cancelled_again}


@pytest.mark.podman
@pytest.mark.parametrize("case", OUTAGES, ids=lambda case: case.fault)
def test_launches_and_runs_while_the_controller_is_away(desk: Desk, case: faults.Case) -> None:
    """Meanwhile one run goes on; two are about to queue their next attempts, one of which is ended."""
    run, sandboxes = with_sandboxes(desk.user, desk.checkout, desk.folder / "on", NO_GPU)
    with contextlib.ExitStack() as end:
        launches = Launches(desk, end)
        # Side by side: a call of sbatch that takes a minute is given up.
        ending, following = (to_queue_its_next_attempt(desk, name) for name in ("ending", "following"))
        launches.catch()
        folders = [desk.folder / f"bin_{name}" for name in ("ending", "following")]
        until("their sbatch", lambda: all((path / "reached").exists() for path in folders), 60)
        begin = time.monotonic()
        with OUTAGES[case]():
            for path in folders:
                (path / "go").touch()
            launches.go_on()
            for one in (ending, following):
                one.wait_for_text("training", "trainer started", faults.NEXT_IN_SILENCE.bound_s)
            within(faults.NEXT_IN_SILENCE, time.monotonic() - begin)
            END[case](desk, ending, begin + OUTAGE_S)
            assert all(map(answers, sandboxes))
            time.sleep(max(0.0, begin + OUTAGE_S - time.monotonic()))
            assert all(map(answers, sandboxes))
        until("Slurm knows the run's jobs", lambda: {run.state(kind) for kind in run.jobs} == {"RUNNING"}, 30)
        launches.await_ends(case.bound_s)
        within(case, time.monotonic() - begin)
        until("its next attempt", lambda: "it goes on in the jobs" in following.log("training"), case.bound_s)
    queued = following.queued_attempt()
    assert {job.job_id for job in desk.queue()} >= set(queued.jobs.values())
    assert faults.NEXT_IN_SILENCE.reads in following.log("training")
    assert all(map(answers, sandboxes))
    assert not run.completion
    assert "is gone" not in run.log("training") + run.log("runtime")
    within(faults.CONTROLLER_SILENT, 0.0)
    assert all(case.reads in err for _, err in launches.said)
    for one in (run, ending, following):
        assert desk.cancel(one.directory).returncode == 0
    for one in (run, ending, following, queued):
        one.wait_over(seconds=30)
    remove_held(desk)
    launches.assert_whole()


# --- 16: hostile input ------------------------------------------------------------------------------------------------

HOSTILE_NAME = """it's $(touch pwned) "a"; b `c` $HOME & *?"""
DUMPS = """TRAINING_COMMAND="$SKYRL_PYTHON" -c "import json, os
found = {name.decode(): value.hex() for name, value in os.environb.items()}
json.dump(found, open('found.json', 'w'))\""""


def hostile_values(count: int) -> list[bytes]:
    """Arbitrary values; without NUL, which no environment can hold, and Windows' line ends, which are refused."""
    found: list[bytes] = []
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30).map(str.encode)
    pieces = st.sampled_from(
        [b"$(touch pwned)", b"`x`", b"'", b'"', b"\n", b";", b"\\", b"${HOME}", b"%j", b"!", b"\xff"]
    )
    mixed = st.lists(pieces | text, max_size=6).map(b"".join)

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(mixed | st.binary(max_size=20).filter(lambda value: b"\0" not in value))
    def collect(value: bytes) -> None:
        found.append(value.replace(b"\r\n", b"\n"))

    collect()
    return found


# Keys that a run with a TRAINING_COMMAND carries and does not act on, and those whose word Slurm or Podman judges.
CARRIED = (
    *("MODEL", "WANDB_PROJECT", "WANDB_EXPERIMENT", "TASK_YAML", "ADV_ESTIMATOR", "FI_PROVIDER"),
    *("DATA_DIR", "TRAIN_DATA", "VAL_DATA", "CHECKPOINT_DIR", "ROLLOUT_DIR", "CACHE_DIR", "DATASET_PATH"),
    *("IMAGE_PREFIX", "RAY_PYTHON", "CUDA_MODULES", "ALLHANDS_API_KEY"),
)
JUDGED = ("GPU_PARTITION", "CPU_PARTITION", "CONSTRAINT", "RESERVATION", "EXCLUDE_NODES", "CONTAINER_IMAGE")


def hostile_keys(canary: Path) -> dict[str, str]:
    """Values of the keys that a run carries, which a shell would make the file ``canary`` by."""
    word = f"$(touch${{IFS}}{canary})"
    text = f"a' \" ; touch {canary}; `touch {canary}`\n$(touch {canary})"
    free: dict[object, str] = {
        parsers.text: text,
        parsers.path: str(canary.parent / f"a' \" ; touch {canary.name}; `touch {canary.name}`$(touch {canary.name})"),
        parsers.words: shlex.quote(text),
        parsers.experiment: f"$(touch {canary.name}) ; `touch {canary.name}` 'q",
    }
    return {name: free.get(KEYS[name].parse, word) for name in CARRIED}


def test_slurm_runs_nothing_of_a_hostile_word(desk: Desk) -> None:
    """Of keys that reach its commands; all are asked at once, each in a launch of its own."""
    canary = desk.folder / "canary"
    word = f"$(touch${{IFS}}{canary});touch${{IFS}}{canary}"
    words = dict.fromkeys(JUDGED, word) | {"CPU_SBATCH_ARGS": shlex.join([f"--comment={word}", "--begin=now+3600"])}
    with contextlib.ExitStack() as end:
        launchers = {name: end.enter_context(desk.start(LATER, f"{name}={value}")) for name, value in words.items()}
        said = {name: launcher.communicate(timeout=60) for name, launcher in launchers.items()}
    for name, (_, err) in said.items():
        assert launchers[name].returncode in {0, 2, 73}, err
        assert "Traceback" not in err
        assert launchers[name].returncode == 0 or word in err, err
    taken = {name: parse_report(desk.user, out) for name, (out, _) in said.items() if launchers[name].returncode == 0}
    jobs = {job.job_id for job in desk.queue()}
    assert jobs == {job_id for run in taken.values() for job_id in run.jobs.values()}
    shown = desk.user.run(["scontrol", "show", "job", taken["CPU_SBATCH_ARGS"].jobs["runtime"]]).stdout
    assert f"Comment={word}" in shown
    assert {"GPU_PARTITION", "CPU_PARTITION"}.isdisjoint(taken)
    assert not canary.exists()


# Each of these folders may hold the checkout and the .conf; the jobs base only where that is said.
FOLDERS = {
    "line": ("new\nline $(touch pwned)", "must be one path, not several lines"),
    "backslash": ("back\\slash 'q'", "after a backslash Slurm fills in no job id"),
    "percent": ("%j; touch pwned #", "%j would stand for a job's id"),
    "bytes": (os.fsdecode(b"\xff\t%x=`touch pwned`,"), ""),
}


@pytest.mark.podman
def test_folders_with_hostile_names(desk: Desk) -> None:
    places = {kind: desk.folder / name for kind, (name, _) in FOLDERS.items()}
    for place in places.values():
        shutil.copytree(desk.checkout, place / "SkyRL", symlinks=True)
        (place / "mine.conf").write_text('source "$SKYRL_CONFIG_DIR/dev.conf"\n')
    subprocess.run(["chown", "-Rh", f"{desk.user.uid}:{desk.user.gid}", str(desk.folder)], check=True)

    def launched(checkout: Path, conf: object, base: Path, *more: str) -> subprocess.CompletedProcess[str]:
        settings = (*SMALL, NO_GPU, TRUE, f"SKYRL_JOBS_BASE={base}", *more)
        words = [word for setting in settings for word in ("--set", setting)]
        argv = [str(checkout / "slurm" / "launch.py"), "--config", str(conf), *words]
        return desk.user.run(argv, cwd=desk.folder)

    for kind, (_, words) in FOLDERS.items():
        if words:
            refused = launched(desk.checkout, "dev", places[kind] / "runs")
            assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    line = places["line"]
    for refused in (
        launched(line / "SkyRL", "dev", desk.base),
        launched(desk.checkout, "dev", desk.base, f"SKYRL_PROJECT_ROOT={line}"),
    ):
        assert refused.returncode == 2, refused.stderr
        assert f"SKYRL_PROJECT_ROOT={line}: {FOLDERS['line'][1]}" in refused.stderr
    assert not desk.queue()

    done = [launched(desk.checkout, line / "mine.conf", desk.base)]
    done += [
        launched(places[kind] / "SkyRL", places[kind] / "mine.conf", desk.base) for kind in ("backslash", "percent")
    ]
    done.append(launched(places["bytes"] / "SkyRL", places["bytes"] / "mine.conf", places["bytes"] / "runs"))
    for one in done:
        assert one.returncode == 0, one.stderr
        run = parse_report(desk.user, one.stdout)
        run.wait_over(seconds=90)
        assert run.completion["exit_code"] == 0, run.log("training") + run.log("training", "err")
    assert not list(desk.folder.rglob("pwned"))
    assert not (desk.user.home / "pwned").exists()
    within(faults.HOSTILE_PATHS, 0.0)


@pytest.mark.podman
def test_values_reach_the_trainer_exactly(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    values = {f"HOSTILE_{number}": value for number, value in enumerate(hostile_values(300))}
    assert len(values) > 250
    values |= {name: os.fsencode(value) for name, value in hostile_keys(jobs_base / "pwned").items()}
    place = jobs_base / HOSTILE_NAME
    shutil.copytree(checkout, place / "SkyRL", symlinks=True)
    conf = place / "mine.conf"
    quoted = [name.encode() + b"='" + value.replace(b"'", b"'\\''") + b"'\n" for name, value in values.items()]
    conf.write_bytes(b'source "$SKYRL_CONFIG_DIR/dev.conf"\n' + b"".join(quoted))
    subprocess.run(["chown", "-Rh", f"{user.uid}:{user.gid}", str(place)], check=True)
    small = [setting for setting in SMALL if not setting.startswith(CARRIED)]
    words = [word for setting in (*small, NO_GPU, DUMPS) for word in ("--set", setting)]
    argv = [str(place / "SkyRL" / "slurm" / "launch.py"), "--config", str(conf), *words]
    done = user.run([*argv, "--set", f"SKYRL_JOBS_BASE={place / 'runs'}"], cwd=place)
    assert done.returncode == 0, done.stderr
    run = parse_report(user, done.stdout)
    assert run.directory.parent == place / "runs"
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 0, run.log("training") + run.log("training", "err")
    found = {name: bytes.fromhex(value) for name, value in json.loads(run.text("found.json")).items()}
    assert {name: found.get(name) for name in values} == values
    assert not list(jobs_base.rglob("pwned"))
    within(faults.HOSTILE_VALUES, 0.0)
