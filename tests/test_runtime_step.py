"""PAIRING=het: what is submitted, what the runtime's step is started with, and what its end tells."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from slurm.lib.attempts import Chain, refused
from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.errors import SubmissionError
from slurm.lib.git import GitState
from slurm.lib.job_context import JobContext, own_job_id
from slurm.lib.job_environment import without_slurm
from slurm.lib.plan import LaunchPlan, Request, make_plan
from slurm.lib.preflight.cluster import submissions_asked
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.restarts import Ended
from slurm.lib.run_record import Provenance, partner_of, read_jobs
from slurm.lib.runtime_step import SIGNAL_SOON_S, RuntimeStep, as_a_job_alone, component_of, step_argv, step_environment
from slurm.lib.scheduler import JobFacts, JobState, Slurm, parse_components, parse_facts, parse_status
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.submission import submit
from tests.fake_slurm import FakeSlurm
from tests.test_restarts import SHOWN
from tests.test_scheduler import answer

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
HET = Settings(pairing="het")


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def plan_for(slurm: FakeSlurm, *overrides: str, request: Request | None = None) -> LaunchPlan:
    seen = {"PATH": slurm.path, "HOME": str(slurm.folder), "HF_TOKEN": "hf-token-of-somebody"}
    words = [f"SKYRL_JOBS_BASE={slurm.jobs}", "TRAINING_COMMAND=true", "CHECKPOINT_DIR=", "PAIRING=het", *overrides]
    config = load_config("dev", words, without_slurm(seen), ROOT / "slurm" / "config", NOW, ROOT.parent)
    return make_plan(config, request or Request(), seen, ROOT, sys.executable, NOW)


def git() -> Provenance:
    return Provenance(GitState("c0ffee", False))


def launched(slurm: FakeSlurm, *overrides: str) -> CoordinationDir:
    return submit(plan_for(slurm, *overrides), SignalNotes(), git, ROOT).directory


# --- Slurm's words about the components -------------------------------------------------------------------------------


def test_the_components_of_a_job_in_their_order() -> None:
    assert parse_components("7+1|8\n7+0|7\n") == ["7", "8"]
    assert parse_components("CLUSTER: far\n   7+0|7\n   7+1|8\n") == ["7", "8"]
    assert parse_components("7|7\n") == []


def test_of_two_components_the_jobs_own_counts() -> None:
    shown = answer("CANCELLED|None|cpu1|N/A|8\nRUNNING|None|gpu1|1795870054|7\n")
    assert parse_status(shown, "7").state is JobState.RUNNING
    assert parse_status(shown, "8").state is JobState.ENDED_BADLY
    leader = SHOWN.format("RUNNING", "00:02:00", "1000", "1120", "1030")
    other = SHOWN.format("RUNNING", "00:04:00", "1000", "1240", "None")
    ids = [text.replace("JobId=8", f"JobId={job_id}", 1) for text, job_id in ((leader, 7), (other, 8))]
    assert parse_facts("\n".join(ids), "7") == JobFacts(1120.0, preempted=True)
    assert parse_facts("\n".join(ids), "8") == JobFacts(1240.0)


# --- what is submitted ------------------------------------------------------------------------------------------------


def test_one_job_held_then_complete_then_one_release(slurm: FakeSlurm) -> None:
    done = submit(plan_for(slurm), SignalNotes(), git, ROOT)
    assert done.jobs == {"training": "101", "runtime": "102"}
    assert done.directory.path.name == "20260304_050607_101"
    assert slurm.names == ["sbatch", "squeue", "scontrol release"]
    sbatch, _, release = slurm.calls
    assert release.argv == ["release", "101"]
    assert f"{done.directory.path.name}/run.json" in release.modes
    assert not any(word.startswith("--dependency") for word in sbatch.argv)
    training, runtime = (" ".join(sbatch.argv).split(" : ")[n] for n in range(2))
    assert "--hold" in training and "--partition=gpu_test" in training and "--gres=gpu:2" in training
    assert "--partition=test" in runtime and "--cpus-per-task=32" in runtime and "gres" not in runtime
    assert "--output" not in runtime, "its step writes its logs"
    assert sbatch.environment["SKYRL_COORD_DIR"] == f"{slurm.jobs}/20260304_050607_%j"
    assert "SKYRL_RUNTIME_JOB_ID" not in sbatch.environment
    record = json.loads(done.directory.run_record.read_text())
    assert record["pairing"] == "het"
    assert read_jobs(done.directory) == done.jobs
    assert partner_of(done.directory, "runtime", "102") == "101"


def no_components(slurm: FakeSlurm) -> str:
    slurm.answer("squeue", {"stdout": "", "code": 1, "stderr": "slurm_load_jobs error: Unable to contact"})
    return "does not name the components of job 101: .*Unable to contact; cancelled 101"


def single(slurm: FakeSlurm) -> str:
    slurm.answer("squeue", {"stdout": "101+0|101\n"})
    return "job 101 has 1 components in Slurm, not 2; cancelled 101"


def no_release(slurm: FakeSlurm) -> str:
    slurm.answer("scontrol", {"code": 1, "stderr": "Access denied"})
    return "did not release job 101: Access denied; cancelled 101"


@pytest.mark.parametrize("fail", [no_components, single, no_release])
def test_a_failure_takes_the_one_job_back(slurm: FakeSlurm, fail: Callable[[FakeSlurm], str]) -> None:
    with pytest.raises(SubmissionError, match=fail(slurm)):
        launched(slurm)
    assert [call.argv for call in slurm.of("scancel")] == [["101"]]
    assert not slurm.jobs.is_dir() or not list(slurm.jobs.iterdir())


@pytest.mark.parametrize(
    ("request_", "settings"),
    [
        (Request(training=False), ()),
        (Request(runtime=False, runtime_url="http://h:1"), ()),
        (Request(), ("SKYRL_BACKEND=local",)),
    ],
)
def test_without_a_pair_of_slurms_jobs_it_means_nothing(
    slurm: FakeSlurm, request_: Request, settings: tuple[str, ...]
) -> None:
    plan = plan_for(slurm, *settings, request=request_)
    assert plan.combined is None
    assert plan.pairing == "jobs"
    assert plan.submissions == plan.jobs
    assert not settings or any("PAIRING=het has no effect" in str(warning) for warning in plan.config.warnings)


def test_the_checks_ask_about_each_component_as_a_job(slurm: FakeSlurm) -> None:
    plan = plan_for(slurm)
    alone = plan_for(slurm, "PAIRING=jobs")
    assert [job.argv for job in plan.jobs] == [job.argv for job in alone.jobs]


# --- restarts ---------------------------------------------------------------------------------------------------------


def first(slurm: FakeSlurm, directory: CoordinationDir, more: Mapping[str, str]) -> JobContext:
    """The training job 101 as its body has it."""
    given = {**slurm.of("sbatch")[0].environment, "SKYRL_COORD_DIR": str(directory.path), **more}
    settings = load_config(None, [], given, ROOT / "slurm" / "config", NOW, ROOT.parent).settings
    environment = {name: value for name, value in given.items() if name != "LC_CTYPE"}
    return JobContext("101", directory, settings, environment, Slurm(environment), directory.code, own_dir=True)


INSIDE = {
    "SLURM_JOB_ID": "101",
    "SLURM_JOB_ID_HET_GROUP_0": "101",
    "SLURM_JOB_ID_HET_GROUP_1": "102",
    "SLURM_HET_SIZE": "2",
    "CUDA_VISIBLE_DEVICES": "0",
}


def test_anothers_components_are_not_this_jobs(slurm: FakeSlurm) -> None:
    """A job submitted from a shell inside of a heterogeneous job inherits that one's names."""
    settings = plan_for(slurm).settings
    assert component_of(settings, INSIDE) == "102"
    assert component_of(settings, {**INSIDE, "SLURM_JOB_ID": "200"}) == ""
    assert component_of(replace(settings, pairing="jobs"), INSIDE) == ""


def test_one_job_holds_no_part_while_it_waits_for_the_other(slurm: FakeSlurm) -> None:
    starts = [f"sbatch: Job 1 to start at 2026-11-25T{hour}:00:00 using 8 processors" for hour in ("10", "19")]
    slurm.answer("sbatch --test-only", *({"stderr": text} for text in starts))
    asked = Slurm({"PATH": slurm.path})
    found = submissions_asked(asked, plan_for(slurm))
    assert not [finding for finding in found if "holds" in finding.sentence], found


def test_the_next_attempt_is_one_job_too(slurm: FakeSlurm) -> None:
    directory = launched(slurm, "RESTARTS=2")
    job = first(slurm, directory, INSIDE)
    chain = Chain(job)
    chain.begin("102", SignalNotes().check)
    assert chain.successor["training"] == "102", "the fake's next number"
    following = slurm.of("sbatch")[-1]
    assert {"--hold", "--dependency=afterany:101", "--signal=B:USR1@900"} <= set(following.argv)
    assert following.argv.index("--dependency=afterany:101") < following.argv.index(":")
    assert [word for word in following.argv if word.startswith("--signal")] == ["--signal=B:USR1@900"]
    assert following.environment["SKYRL_AFTER_JOB_ID"] == "101"
    assert following.environment["SKYRL_ATTEMPT"] == "2"
    assert not [name for name in following.environment if "HET" in name or name == "CUDA_VISIBLE_DEVICES"]
    assert following.argv[-1] == f"{directory.path}/code/slurm/jobs/verl_training.py"
    record = json.loads((directory.path / "run_102.json").read_text())
    assert record["pairing"] == "het"
    chain.conclude(Ended.COMPLETED)
    assert slurm.of("scancel")[-1].argv == ["102"], "of a queued one Slurm cancels no component by itself"


def test_the_training_alone_judges_whether_it_goes_on(slurm: FakeSlurm) -> None:
    directory = launched(slurm, "RESTARTS=2")
    job = first(slurm, directory, INSIDE | {"SKYRL_AFTER_JOB_ID": "99", "SKYRL_ATTEMPT": "2"})
    directory.publish(directory.training_complete, Flag.of_this_host("99", "98", 0, "done", Ended.COMPLETED.value))
    assert refused(job, "training", SignalNotes()) == 0
    theirs = step_environment(job.environment, directory.path, "102")
    runtime = JobContext("102", directory, job.settings, theirs, job.scheduler, job.code, own_dir=True)
    assert refused(runtime, "runtime", SignalNotes()) is None


# --- the step ---------------------------------------------------------------------------------------------------------


def test_only_the_first_component_of_such_a_job_starts_a_runtime() -> None:
    assert component_of(HET, INSIDE) == "102"
    assert component_of(HET, {"SLURM_JOB_ID": "101"}) == ""
    assert component_of(Settings(), INSIDE) == "", "a heterogeneous job of the user's own"


def test_nothing_of_the_trainings_misleads_the_runtime() -> None:
    alien = {"SLURM_MEM_PER_NODE": "1024", "SLURM_NTASKS_PER_NODE": "1", "SKYRL_AFTER_JOB_ID": "99", "SRUN_DEBUG": "3"}
    own = {"PATH": "/bin", "SKYRL_PYTHON": "/p", "TMPDIR": "/t", "SLURM_CONF": "/c", "MODEL": "m"}
    coord = {"SKYRL_COORD_DIR": "/runs/x_%j", "SKYRL_CODE_DIR": "/runs/x_%j/code"}
    found = step_environment({**INSIDE, **alien, **own, **coord}, Path("/runs/x_101"), "102")
    assert own.items() <= found.items()
    assert not (alien.keys() | {"CUDA_VISIBLE_DEVICES"}) & found.keys()
    assert found["SKYRL_COORD_DIR"] == "/runs/x_101"
    assert found["SKYRL_CODE_DIR"] == "/runs/x_101/code"
    assert own_job_id(found) == "102"


def test_the_trainer_finds_what_it_finds_in_a_job_of_its_own() -> None:
    given = {"SLURM_CPUS_PER_TASK_HET_GROUP_0": "2", "SLURM_CPUS_PER_TASK_HET_GROUP_1": "8"}
    given |= {"SLURM_JOB_ID_HET_GROUP_0": "101", "SLURM_JOB_ID": "100"}
    assert as_a_job_alone(given) == {**given, "SLURM_CPUS_PER_TASK": "2"}
    assert as_a_job_alone({"SLURM_CPUS_PER_TASK": "3"}) == {"SLURM_CPUS_PER_TASK": "3"}


def context(slurm: FakeSlurm, tmp_path: Path) -> JobContext:
    return JobContext("101", CoordinationDir(tmp_path), HET, {}, Slurm({"PATH": slurm.path}), ROOT, own_dir=True)


@pytest.mark.parametrize(("cpus", "asked"), [("7", 7), ("", HET.cpus_for_runtime)])
def test_the_step_asks_for_the_components_cpus(slurm: FakeSlurm, tmp_path: Path, cpus: str, asked: int) -> None:
    base = {"SLURM_CPUS_PER_TASK_HET_GROUP_1": cpus, "SLURM_CPUS_PER_TASK": "2"}
    argv = step_argv(context(slurm, tmp_path), "102", base)
    assert argv[0] == "srun"
    assert {"--het-group=1", "--overlap", "--gres=none", "--mem=0", f"--cpus-per-task={asked}"} <= set(argv)
    assert argv[-1] == str(ROOT / "slurm/jobs/runtime_server.py")


def test_the_command_of_the_step_writes_its_own_logs(slurm: FakeSlurm, tmp_path: Path) -> None:
    argv = step_argv(context(slurm, tmp_path), "102", {})
    words = [*argv[argv.index("bash") :]]
    words[-2:] = ["sh", "-c", "echo out; echo err >&2; exit 3"]
    assert subprocess.run(words, check=False).returncode == 3
    assert (tmp_path / "runtime_102.out").read_text() == "out\n"
    assert (tmp_path / "runtime_102.err").read_text() == "err\n"


Starter = Callable[[str], RuntimeStep]


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Starter]:
    """Starts a step whose srun is a script."""
    children = []

    def start(script: str) -> RuntimeStep:
        child = Child(ChildSpec(("bash", "-c", script), {"PATH": "/usr/bin:/bin"}, "x", stderr=subprocess.PIPE))
        children.append(child)
        found = RuntimeStep("102", child, CoordinationDir(tmp_path))
        child.copy_stderr(found.note)
        return found

    yield start
    for child in children:
        child.stop(0.0)


def test_a_runtime_of_its_own_job_has_no_step() -> None:
    assert RuntimeStep().ended() is None
    assert RuntimeStep().pids == set()
    RuntimeStep().stop(Slurm({}), 5.0)


def test_the_end_of_a_step_in_words(step: Starter, tmp_path: Path) -> None:
    running = step("sleep 60")
    assert running.ended() is None
    assert running.child and running.pids == {running.child.pid}
    refusal = step("echo 'srun: error: Unable to create step' >&2; exit 1")
    assert refusal.child and refusal.child.wait(5)
    refusal.child.kill()  # has its last lines copied
    expected = "the runtime job 102 has ended: exit code 1 of its step (srun: error: Unable to create step)"
    assert refusal.ended() == expected
    (tmp_path / "runtime_102.err").write_text("a\nb\nc\nd\n")
    assert refusal.ended() == f"{expected}; the end of {tmp_path}/runtime_102.err: b | c | d"
    assert refusal.ended_by_itself() is None, "the signal of a job that was cancelled may still come"
    refusal._seen_at = time.monotonic() - SIGNAL_SOON_S
    assert refusal.ended_by_itself() == refusal.ended()


def test_a_step_that_ends_by_the_flag_is_not_asked(step: Starter, slurm: FakeSlurm) -> None:
    step("sleep 0.2").stop(Slurm({"PATH": slurm.path}), 5.0)
    assert slurm.names == []


def test_a_step_that_does_not_see_the_flag_is_asked(
    step: Starter, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.runtime_step.STEP_END_S", 0.0)
    stuck = step("sleep 60")
    stuck.stop(Slurm({"PATH": slurm.path}), 0.3)
    assert [call.words for call in slurm.calls] == [["scancel", "--signal=TERM", "102"]]
    assert stuck.child and stuck.child.exit_code is None, "left to the block's end, which kills it"
    stuck.child.stop()
    assert stuck.child.exit_code == 128 + signal.SIGTERM


def test_the_dry_run_can_be_read_by_a_shell(slurm: FakeSlurm) -> None:
    plan = plan_for(slurm)
    assert plan.combined
    assert shlex.split(shlex.join(plan.combined.argv)) == list(plan.combined.argv)
