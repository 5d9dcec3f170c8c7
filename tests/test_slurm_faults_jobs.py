"""What the two jobs of a run notice of each other: ends, cancellations, lost nodes, cut links, a silent controller.

The cases only wait, so those that can go on side by side do; each test then reads what became of one of them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests import faults
from tests.conftest import OrdinaryUser, belongings, fresh_folder, leaving_nothing
from tests.faults import Case, NothingLeftOfRun, released, within
from tests.runs import STARTS_SANDBOXES, WITH_SANDBOXES, Run, answers, launch, until, with_sandboxes

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

NO_GPU = "GPUS_PER_NODE=0"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 600"
RELEASED_S = 15.0  # of a run, after whatever ended it
ON_GO = 'TRAINING_COMMAND=echo trainer started; until [ -e "$SKYRL_COORD_DIR/go" ]; do sleep 0.1; done; '


def at(cpu: str = "", gpu: str = "", more_cpu: str = "", more_gpu: str = "") -> tuple[str, str]:
    """The settings that put the jobs on these nodes."""
    words = {"CPU": (cpu, more_cpu), "GPU": (gpu, more_gpu)}
    return tuple(  # type: ignore[return-value]  # two of them
        f"{kind}_SBATCH_ARGS={' '.join(filter(None, [f'--nodelist={node}' if node else '', more]))}"
        for kind, (node, more) in words.items()
    )


@dataclass
class Scene:
    """Runs of one user that go on side by side."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    runs: dict[str, Run] = field(default_factory=dict)
    folders: Iterator[int] = field(default_factory=itertools.count)

    def begin(self, name: str, *settings: str) -> Run:
        """Launch a small run."""
        folder = self.base / str(next(self.folders))
        self.runs[name] = launch(self.user, self.checkout, folder, NO_GPU, "RUNTIME_MEMORY=2G", *settings)
        return self.runs[name]

    def started(self, *names: str) -> None:
        """Wait until their trainers have started."""
        for name in names:
            self.runs[name].wait_for_text("training", "trainer started", 90)

    def cancel(self, name: str, *kinds: str) -> float:
        """``scancel`` of jobs of a run; the moment at which it was said."""
        moment = time.monotonic()
        jobs = [self.runs[name].jobs[kind] for kind in kinds]
        assert self.user.run(["scancel", *jobs]).returncode == 0
        return moment

    def let_start(self, name: str, kind: str) -> None:
        """A job that was to wait for an hour is to wait no longer."""
        argv = ["scontrol", "update", f"JobId={self.runs[name].jobs[kind]}", "StartTime=now"]
        assert self.user.run(argv).returncode == 0

    def state(self, name: str, kind: str, *wanted: str) -> float:
        """Wait for a job to be in a state; the moment at which it was seen."""
        run = self.runs[name]
        until(f"{kind} job of {name}: {wanted}", lambda: run.state(kind) in wanted, 60)
        return time.monotonic()

    def body_began(self, name: str, kind: str) -> float:
        """Wait for a job's first line; the moment at which it was seen."""
        self.runs[name].wait_for_text(kind, "coordination directory", 60)
        return time.monotonic()

    def released(self, name: str, case: Case, since: float, reads: str = "", mute: tuple[str, ...] = ()) -> float:
        run = self.runs[name]
        off = [node for node in test_cluster.NODES if test_cluster.slurmd_pid(node) is None]
        check = NothingLeftOfRun(self.user, belongings(self.user), run, disk_in_reach="cpu-a" not in off)
        return released(run, check, case, reads, since, mute)


@dataclass
class Seen:
    """What was seen of the cases that go on side by side: of each what fails, or None."""

    scene: Scene
    failures: dict[Case, Exception] = field(default_factory=dict)
    looks: list[threading.Thread] = field(default_factory=list)

    def see(self, case: Case, look: Callable[[], object]) -> None:
        try:
            look()
        except Exception as failure:  # of whatever kind: it is this case's
            self.failures[case] = failure

    def watch(self, case: Case, look: Callable[[], object]) -> None:
        """Begin to see a case beside the others: its clock is not to run while another one is waited for."""
        self.looks.append(threading.Thread(target=self.see, args=(case, look), daemon=True))
        self.looks[-1].start()

    def join(self) -> None:
        """Wait until all that is watched has been seen."""
        for look in self.looks:
            look.join()

    def judge(self, case: Case) -> Run:
        if case in self.failures:
            raise self.failures[case]
        return self.scene.runs[case.fault]


@pytest.fixture
def scene(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Iterator[Scene]:
    with leaving_nothing(user):
        yield Scene(user, checkout, jobs_base)


# --- 1: the trainer ends ----------------------------------------------------------------------------------------------

ENDINGS: Mapping[Case, tuple[str, int]] = {
    faults.TRAINER_FAILS: ("exit 3", 3),
    faults.TRAINER_RAISES: ("python3 -c 'raise RuntimeError(\"no luck\")'", 1),
    faults.TRAINER_KILLED: ("kill -KILL $$", 137),
    faults.TRAINER_CRASHES: ("kill -SEGV $$", 139),
}


def test_a_trainers_end_ends_both_jobs_with_its_exit_code(scene: Scene) -> None:
    for case, (command, _code) in ENDINGS.items():
        scene.begin(case.fault, STARTS_SANDBOXES + "\n" + ON_GO.partition("=")[2] + command)
    scene.started(*scene.runs)
    since = time.monotonic()
    for run in scene.runs.values():
        (run.directory / "go").touch()
    seen = Seen(scene)
    for case in ENDINGS:
        seen.watch(case, partial(scene.released, case.fault, case, since))
    seen.join()
    for case, (_command, code) in ENDINGS.items():
        run = seen.judge(case)
        assert run.completion["exit_code"] == code
        assert run.exit_code("training") == str(code)
        assert run.exit_code("runtime") == "0"


# --- 2: a job is cancelled --------------------------------------------------------------------------------------------


def test_running_jobs_that_are_cancelled(scene: Scene) -> None:
    victims = {
        faults.CANCEL_TRAINING: ("training",),
        faults.CANCEL_RUNTIME: ("runtime",),
        faults.CANCEL_BOTH: ("runtime", "training"),
    }
    for case in victims:
        scene.begin(case.fault, WITH_SANDBOXES)
    for run in scene.runs.values():
        until("its sandboxes", lambda run=run: run.text("sandboxes.json"), 90)  # type: ignore[misc]
    moments = {case: scene.cancel(case.fault, *kinds) for case, kinds in victims.items()}
    seen = Seen(scene)
    for case, since in moments.items():
        seen.watch(case, partial(scene.released, case.fault, case, since))
    seen.join()
    for case in moments:
        seen.judge(case)


def cancelled_as_it_starts(scene: Scene, case: Case, kinds: tuple[str, ...]) -> None:
    scene.begin(case.fault, TRAIN_LONG)
    scene.state(case.fault, kinds[-1], "RUNNING")
    scene.released(case.fault, case, scene.cancel(case.fault, *kinds), mute=kinds)


def test_jobs_that_are_cancelled_the_moment_they_start(scene: Scene) -> None:
    """A body that is signalled before it notes signals dies without a word; then Slurm's word is the other's reason."""
    victims = {
        faults.CANCEL_STARTING_RUNTIME: ("runtime",),
        faults.CANCEL_STARTING_TRAINING: ("training",),
        faults.CANCEL_STARTING_BOTH: ("runtime", "training"),
    }
    seen = Seen(scene)
    for case, kinds in victims.items():
        seen.watch(case, partial(cancelled_as_it_starts, scene, case, kinds))
    seen.join()
    runs = {case: seen.judge(case) for case in victims}
    for case in (faults.CANCEL_STARTING_RUNTIME, faults.CANCEL_STARTING_TRAINING):
        reason = runs[case].completion["reason"]
        assert "SIGTERM" in reason or faults.GONE in reason


def test_jobs_that_are_cancelled_in_the_queue(scene: Scene) -> None:
    waits = "--begin=now+3600"
    training, runtime, first, both = (
        faults.CANCEL_PENDING_TRAINING.fault,
        faults.CANCEL_PENDING_RUNTIME.fault,
        faults.CANCEL_TRAINING_FIRST.fault,
        faults.CANCEL_PENDING_BOTH.fault,
    )
    scene.begin(training, TRAIN_LONG, *at(more_gpu=waits))
    scene.begin(runtime, TRAIN_LONG, *at(more_cpu=waits))
    scene.begin(first, TRAIN_LONG, *at(more_cpu=waits))
    scene.begin(both, TRAIN_LONG, *at(more_cpu=waits))
    scene.cancel(first, "training")
    at_once = scene.cancel(both, "runtime", "training")
    scene.released(both, faults.CANCEL_PENDING_BOTH, at_once, mute=("runtime", "training"))
    scene.runs[training].wait_for_text("runtime", "API server ready")
    time.sleep(5)  # the first questions about the training have been asked
    moment = scene.cancel(training, "training")
    scene.released(training, faults.CANCEL_PENDING_TRAINING, moment, mute=("training",))
    scene.cancel(runtime, "runtime")
    start = scene.body_began(runtime, "training")
    scene.released(runtime, faults.CANCEL_PENDING_RUNTIME, start, mute=("runtime",))
    scene.let_start(first, "runtime")
    start = scene.body_began(first, "runtime")
    scene.released(first, faults.CANCEL_TRAINING_FIRST, start, mute=("training",))
    assert scene.runs[training].completion["job_id"] == scene.runs[training].jobs["training"]
    assert "trainer started" not in scene.runs[runtime].log("training")


# --- 7: nodes and links; 11: time limits, which are waited for in the same minutes ------------------------------------

# Of the 2.5 s that a trainer has to save it needs few: up to four runs reach their limits in one look of Slurm's.
SAVES = """TRAINING_COMMAND=trap 'sleep 0.3; echo trainer saved; exit 0' TERM
echo "trainer started, to end by ${MLP_CURRENT_CAPACITY_BLOCK_EXPIRATION_TIMESTAMP}"; while :; do sleep 0.2; done"""
ONE_MINUTE = "--time=1"
LIMITS = {
    faults.RUNTIMES_LIMIT: ("runtime", at("cpu-b", "gpu-a", more_cpu=ONE_MINUTE)),
    faults.TRAININGS_LIMIT: ("training", at("cpu-b", "gpu-a", more_gpu=ONE_MINUTE)),
    faults.BOTH_LIMITS: ("runtime", at("cpu-b", "gpu-a", ONE_MINUTE, ONE_MINUTE)),
}
# Saves when it is told that the limit comes, or when the limit is there; in the next attempt it is done.
GOES_ON = """TRAINING_COMMAND=cd "$CHECKPOINT_DIR"; [ ! -e saved ] || { echo "trainer went on, $(cat saved)"; exit 0; }
save() { sleep 0.3; echo "saved $*" > part; mv part saved; }
trap '[ -e saved ] || save at the limit; exit 0' TERM; WHEN_TOLD
echo "trainer started"; while :; do sleep 0.2; done"""
CHAINS = {
    faults.CHAINED_AT_LIMIT: (GOES_ON.replace("WHEN_TOLD", "trap '' USR1"), "TIME_LIMIT=1"),
    faults.CHAINED_BEFORE_LIMIT: (GOES_ON.replace("WHEN_TOLD", "trap 'save before it' USR1"), "TIME_LIMIT=2"),
}


def limit_ends(seen: Seen, case: Case) -> None:
    """Wait for a time limit: the clock starts when Slurm, which looks every half minute, ends the job."""
    run, kind = seen.scene.runs[case.fault], LIMITS[case][0]
    seen.scene.started(case.fault)
    assert run.state(kind) == "RUNNING", f"{case.fault}: its limit came before anybody looked"
    end = time.monotonic() + 150
    while (state := run.state(kind)) == "RUNNING" and time.monotonic() < end:
        time.sleep(0.5)
    since = time.monotonic()
    assert state != "RUNNING", f"{case.fault}: its limit of a minute is over, and it runs"
    seen.scene.released(case.fault, case, since)


def chain_goes_on(seen: Seen, case: Case) -> None:
    """Wait for the end of an attempt, of which nothing is to be left, and for the trainer of the next one."""
    scene, run = seen.scene, seen.scene.runs[case.fault]
    scene.started(case.fault)
    assert {run.state(kind) for kind in run.jobs} == {"RUNNING"}, f"{case.fault}: it ended before anybody looked"
    following = run.queued_attempt()
    check = NothingLeftOfRun(scene.user, belongings(scene.user), run, url=run.text("runtime_url.txt"))
    until(f"the first end of {case.fault}", lambda: {run.state(kind) for kind in run.jobs} != {"RUNNING"}, 180, 0.5)
    since = time.monotonic()
    until(f"release: {case.fault}", lambda: all(map(run.is_over, run.jobs)) and not check.now(), RELEASED_S)
    following.wait_for_text("training", "trainer went on", case.bound_s)
    within(case, time.monotonic() - since)
    assert case.reads in run.log("training")
    following.wait_over(seconds=30)


def begin_limits(seen: Seen) -> None:
    """Runs that reach a time limit, each watched from its launch on: a minute is short where a launch is slow."""
    for case, (_kind, settings) in LIMITS.items():
        seen.scene.begin(case.fault, SAVES, *settings)
        seen.watch(case, partial(limit_ends, seen, case))
    for case, (trainer, limit) in CHAINS.items():
        chained = ("RESTARTS=1", "RESTART_LEAD=30", "CPUS_FOR_RUNTIME=2")
        seen.scene.begin(case.fault, trainer, *at("cpu-b", "gpu-a"), limit, *chained)
        seen.watch(case, partial(chain_goes_on, seen, case))


def cut_link(seen: Seen, sandboxes: list[str]) -> None:
    """30 s without a link; then the sandboxes are to answer, and the run to go on."""
    with test_cluster.unplug("cpu-a"):
        time.sleep(28)
        assert not answers(sandboxes[0], 2), "the link was not cut"
    begin = time.monotonic()
    until("the sandboxes answer", lambda: all(answers(url, 1) for url in sandboxes), 30)
    within(faults.LINK_CUT, time.monotonic() - begin)


def lose_node(seen: Seen, case: Case, node: str, mute: str) -> None:
    since = time.monotonic()
    try:
        test_cluster.power_off(node)
        seen.scene.released(case.fault, case, since, mute=(mute,))
    finally:
        test_cluster.power_on(node)


def sweep_storage(scene: Scene) -> None:
    """A run on the nodes that were off, whose jobs remove first what lies there."""
    scene.begin("next", "TRAINING_COMMAND=true", *at("cpu-a", "gpu-a")).wait_over(seconds=60)


@pytest.fixture(scope="module")
def apart(user: OrdinaryUser, checkout: Path) -> Iterator[Seen]:
    """Nodes that lose each other, links and power, while time limits are waited for."""
    with leaving_nothing(user) as check:
        scene = Scene(user, checkout, fresh_folder(user, "apart"))
        seen = Seen(scene)
        run, sandboxes = with_sandboxes(user, checkout, scene.base / "cut", *at("cpu-a", "gpu-a"), NO_GPU)
        scene.runs[faults.LINK_CUT.fault] = run
        scene.begin(faults.PARTED.fault, TRAIN_LONG, *at("cpu-b", "gpu-b"), "PARTNER_PATIENCE=60")
        scene.started(faults.PARTED.fault)
        parted_at = time.monotonic()
        with test_cluster.isolate("cpu-b", "gpu-b"):
            seen.see(faults.LINK_CUT, lambda: cut_link(seen, sandboxes))
            seen.watch(faults.PARTED, lambda: scene.released(faults.PARTED.fault, faults.PARTED, parted_at))
            begin_limits(seen)  # only now: else these runs and the parted one end on cpu-b in the same seconds
            seen.join()
        scene.runs[faults.RUNTIME_NODE_OFF.fault] = run
        still_there = [kind for kind in run.jobs if run.state(kind) == "RUNNING"]
        scene.begin(faults.TRAINING_NODE_OFF.fault, TRAIN_LONG, *at("cpu-b", "gpu-a"))
        scene.started(faults.TRAINING_NODE_OFF.fault)
        seen.see(faults.RUNTIME_NODE_OFF, lambda: lose_node(seen, faults.RUNTIME_NODE_OFF, "cpu-a", "runtime"))
        seen.see(faults.TRAINING_NODE_OFF, lambda: lose_node(seen, faults.TRAINING_NODE_OFF, "gpu-a", "training"))
        sweep_storage(scene)
        if len(still_there) < len(run.jobs):
            seen.failures[faults.LINK_CUT] = AssertionError(f"after the cut only these went on: {still_there}")
        scene.user.run(["scancel", "-u", user.name])
        check()
        yield seen


def test_a_link_that_is_cut_for_half_a_minute_ends_nothing(apart: Seen) -> None:
    apart.judge(faults.LINK_CUT)


def test_jobs_that_do_not_reach_each_other_end_by_themselves(apart: Seen) -> None:
    run = apart.judge(faults.PARTED)
    of_runtime = f"the runtime job {run.jobs['runtime']} on cpu-b was not heard of" in run.log("training")
    of_training = f"the training job {run.jobs['training']} on gpu-b was not heard of" in run.log("runtime")
    assert of_runtime or of_training
    assert run.exit_code("training") == "69"


@pytest.mark.parametrize("case", [faults.RUNTIME_NODE_OFF, faults.TRAINING_NODE_OFF], ids=lambda case: case.fault)
def test_a_node_that_is_lost_ends_the_other_job_with_its_name(apart: Seen, case: Case) -> None:
    apart.judge(case)


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: case.fault)
def test_a_time_limit_leaves_the_trainer_time_to_save(apart: Seen, case: Case) -> None:
    """The trainer was told the earlier limit, and had time to save."""
    run = apart.judge(case)
    assert "trainer saved" in run.log("training")
    whose = LIMITS[case][0]
    name = {"runtime": f"the time limit of the runtime job {run.jobs['runtime']}", "training": "this job"}[whose]
    if case is not faults.BOTH_LIMITS:
        assert name in run.log("training")
        assert run.state(whose) == "TIMEOUT"


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.fault)
def test_a_time_limit_is_followed_by_the_next_attempt(apart: Seen, case: Case) -> None:
    run = apart.judge(case)
    following = run.next_attempt()
    how, code = {
        faults.CHAINED_AT_LIMIT: ("at the limit", {"69", "143"}),  # of whichever job the limit is seen first
        faults.CHAINED_BEFORE_LIMIT: ("before it", {"75"}),
    }[case]
    assert f"trainer went on, saved {how}" in following.log("training")
    assert run.exit_code("training") in code
    assert ("TIMEOUT" in map(run.state, run.jobs)) == (case is faults.CHAINED_AT_LIMIT)
    assert following.completion["job_id"] == following.jobs["training"]
    assert following.completion["exit_code"] == 0
