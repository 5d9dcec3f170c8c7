"""Which trainings go on in another pair of jobs, and with which words: the decisions, all of them pure."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from slurm.lib.config import LoadedConfig, load_config
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.deadlines import EXPIRY_NAME, Deadline, announce, earlier, told_variables
from slurm.lib.errors import ConfigError, TooLate
from slurm.lib.plan import JobPlan, LaunchPlan, Request, Restart, make_plan
from slurm.lib.processes import Completed
from slurm.lib.restarts import Cause, Ended, cause_of, how_it_ended, verdict
from slurm.lib.scheduler import JobFacts, JobState, JobStatus, parse_facts, parse_status
from slurm.lib.settings import Settings
from slurm.lib.trainer import trainer_of

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
RUN = Path("/home/me/.skyrl_jobs/20260304_050607_7")
SILENT = JobStatus(JobState.UNKNOWN, "Unable to contact slurm controller")


def load(*overrides: str, config: str = "dev") -> LoadedConfig:
    return load_config(config, overrides, {"HOME": "/home/me"}, ROOT / "slurm" / "config", NOW, Path("/project"))


def settings_of(*overrides: str, config: str = "dev") -> Settings:
    return load(*overrides, config=config).settings


def flag(ended: str = "", code: int = 1, job: str = "8") -> Flag:
    return Flag(job, "7", exit_code=code, reason="the reason", ended=ended)


def said(words: str) -> JobStatus:
    return JobStatus(JobState.ENDED_BADLY, words)


# --- how did the attempt before end? ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "status", "expected"),
    [
        (flag("completed", 0), SILENT, Ended.COMPLETED),
        (flag("failed", 7), SILENT, Ended.FAILED),
        (flag("cancelled", 143), SILENT, Ended.CANCELLED),
        (flag("interrupted", 143), said("CANCELLED"), Ended.INTERRUPTED),
        (flag("", 0), SILENT, Ended.COMPLETED),
        (flag("", 7), said("TIMEOUT"), Ended.FAILED),
        (flag("a word of a later version", 1), SILENT, Ended.FAILED),
        (Flag(by_hand=True), said("TIMEOUT"), Ended.CANCELLED),
        (flag("completed", 0, job="5"), said("NODE_FAIL, None"), Ended.INTERRUPTED),
        (None, said("NODE_FAIL, NodeDown, on gpu1"), Ended.INTERRUPTED),
        (None, said("PREEMPTED"), Ended.INTERRUPTED),
        (None, said("TIMEOUT, TimeLimit"), Ended.INTERRUPTED),
        (None, said("FAILED, NonZeroExitCode"), Ended.INTERRUPTED),
        (None, said("OUT_OF_MEMORY"), Ended.INTERRUPTED),
        (None, said("CANCELLED, None"), Ended.CANCELLED),
        (None, JobStatus(JobState.ENDED_WELL, "COMPLETED"), Ended.COMPLETED),
        (None, JobStatus(JobState.PURGED, "not in the queue any more"), Ended.INTERRUPTED),
        (None, SILENT, Ended.INTERRUPTED),
    ],
)
def test_how_the_attempt_before_ended(found: Flag | None, status: JobStatus, expected: Ended) -> None:
    """The flag tells most; one of another job tells nothing."""
    assert how_it_ended("8", found, status)[0] is expected


@pytest.mark.parametrize(
    ("ended", "before", "now", "goes_on", "code", "words"),
    [
        ("interrupted", "", "step 3", True, 0, "was interrupted (the reason); going on from step 3"),
        ("interrupted", "step 3", "step 5", True, 0, "going on from step 5"),
        (
            "interrupted",
            "step 3",
            "step 3",
            False,
            76,
            "saved no checkpoint since it began at step 3; not trying again",
        ),
        ("interrupted", "", "", False, 76, "saved no checkpoint at all"),
        ("interrupted", "step 3", "", False, 76, "saved no checkpoint since"),
        ("completed", "", "step 3", False, 0, "8 completed (the reason); there is nothing to go on with"),
        ("failed", "", "step 3", False, 0, "8 failed (the reason); there is nothing"),
        ("cancelled", "", "step 3", False, 0, "8 was cancelled (the reason); there is nothing"),
    ],
)
def test_only_what_was_interrupted_and_has_saved_goes_on(
    ended: str, before: str, now: str, goes_on: bool, code: int, words: str
) -> None:
    found = verdict("8", flag(ended), SILENT, before, now)
    assert (found.goes_on, found.exit_code) == (goes_on, code)
    assert words in found.reason


@pytest.mark.parametrize("words", ["RUNNING, on gpu1", "PENDING, Resources", "SUSPENDED"])
def test_none_goes_on_beside_a_training_that_has_not_ended(words: str) -> None:
    found = verdict("8", None, parse_status(Completed((), 0, words.replace(", ", "|"), "")), "", "step 3")
    assert (found.goes_on, found.exit_code) == (False, 76)
    assert "the training job 8 has not ended, by Slurm's word" in found.reason
    ending = verdict("8", None, parse_status(Completed((), 0, "COMPLETING", "")), "", "step 3")
    assert ending.goes_on


# --- why did Slurm end this job? -------------------------------------------------------------------------------------

STEPD = "slurmstepd: error: *** JOB {} ON gpu1 CANCELLED AT 2026-03-04T05:06:07{} ***\n"


@pytest.mark.parametrize(
    ("facts", "known_end", "stderr", "expected"),
    [
        (JobFacts(None), None, "", Cause.PERSON),
        (JobFacts(2000), 2000, STEPD.format(8, ""), Cause.PERSON),
        (JobFacts(1000), None, "", Cause.TIME_LIMIT),
        (JobFacts(1020), None, "", Cause.TIME_LIMIT),
        (JobFacts(None), 990, "", Cause.TIME_LIMIT),
        (JobFacts(5000), 990, "", Cause.PERSON),  # an administrator had given it more time
        (JobFacts(2000), None, STEPD.format(8, " DUE TO TIME LIMIT"), Cause.TIME_LIMIT),
        (JobFacts(2000, preempted=True), 990, "", Cause.PREEMPTION),
        (JobFacts(2000), None, STEPD.format(8, " DUE TO PREEMPTION"), Cause.PREEMPTION),
        (
            JobFacts(2000),
            None,
            STEPD.format(8, " DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"),
            Cause.NODE_FAILURE,
        ),
        (JobFacts(2000), None, STEPD.format(9, " DUE TO PREEMPTION"), Cause.PERSON),
        (JobFacts(2000), None, STEPD.format(8, " DUE TO SOMETHING NEW"), Cause.PERSON),
    ],
)
def test_why_this_job_was_ended(facts: JobFacts, known_end: float | None, stderr: str, expected: Cause) -> None:
    assert cause_of(facts, known_end, stderr, "8", now=1000.0) is expected


def test_a_person_ends_the_chain_and_nobody_else() -> None:
    assert {cause for cause in Cause if cause.ended is Ended.CANCELLED} == {Cause.PERSON}


SHOWN = (
    "JobId=8 JobName=x\n   JobState={} Reason=None Dependency=(null)\n   RunTime=00:00:10 TimeLimit={} TimeMin=N/A\n"
)
SHOWN += "   SubmitTime=900 EligibleTime=900\n   StartTime={} EndTime={} Deadline=N/A\n   PreemptTime={}\n"


@pytest.mark.parametrize(
    ("state", "limit", "start", "end", "preempt", "expected"),
    [
        ("RUNNING", "00:02:00", "1000", "1120", "None", JobFacts(1120.0)),
        ("RUNNING", "00:02:00", "1000", "1060", "1030", JobFacts(1060.0, preempted=True)),
        ("COMPLETING", "00:02:00", "1000", "1010", "None", JobFacts(1120.0)),
        ("CANCELLED", "1-00:00:00", "1000", "1010", "None", JobFacts(87400.0)),
        ("PREEMPTED", "00:02:00", "1000", "1010", "None", JobFacts(1120.0, preempted=True)),
        ("RUNNING", "UNLIMITED", "1000", "31537000", "None", JobFacts(None)),
        ("PENDING", "00:02:00", "Unknown", "Unknown", "None", JobFacts(None)),
    ],
)
def test_what_slurm_says_about_time(
    state: str, limit: str, start: str, end: str, preempt: str, expected: JobFacts
) -> None:
    assert parse_facts(SHOWN.format(state, limit, start, end, preempt)) == expected


def test_slurms_standard_times_are_this_hosts() -> None:
    shown = SHOWN.format("RUNNING", "00:02:00", "2026-03-04T05:06:07", "2026-03-04T05:08:07", "None")
    assert parse_facts(shown).ends_at == datetime(2026, 3, 4, 5, 8, 7).timestamp()


def test_a_silent_controller_tells_nothing() -> None:
    assert parse_facts("") == JobFacts(None, False)


# --- until when? -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"this job": 200.0, "the runtime job 7": 100.0}, Deadline(100.0, "the runtime job 7")),
        ({"this job": 50.0, "the runtime job 7": 100.0}, Deadline(50.0, "this job")),
        ({"this job": None, "the runtime job 7": 100.0}, Deadline(100.0, "the runtime job 7")),
        ({"this job": None}, Deadline(None, "")),
    ],
)
def test_the_earlier_limit_is_the_deadline_of_both(ends: dict[str, float | None], expected: Deadline) -> None:
    assert earlier(ends) == expected


def test_a_training_does_not_begin_with_less_than_it_needs() -> None:
    settings = settings_of("MIN_RUN_TIME=600")
    deadline = Deadline(1000.0, "the runtime job 7")
    announce(deadline, settings, 400.0)
    announce(Deadline(), settings, 400.0)
    with pytest.raises(TooLate, match=r"599 s are left until .*the time limit of the runtime job 7, less than MIN_RUN"):
        announce(deadline, settings, 401.0)


def test_what_the_trainer_is_told() -> None:
    once, again = settings_of(), settings_of("RESTARTS=1")
    deadline = Deadline(time.monotonic() + 100, "this job")
    when = told_variables(deadline, once, "run1", {})
    assert when.keys() == {EXPIRY_NAME}
    assert abs(int(when[EXPIRY_NAME]) - time.time() - 100) < 2, "by this host's clock"
    told = {"WANDB_RUN_ID": "run1", "WANDB_RESUME": "allow"}
    assert told_variables(deadline, again, "run1", {}).items() >= told.items()
    assert told_variables(Deadline(), again, "run1", {"WANDB_RUN_ID": "mine"}) == {"WANDB_RESUME": "allow"}


def test_verl_saves_in_the_last_minutes_and_the_user_has_the_last_word() -> None:
    def words(*overrides: str) -> tuple[str, ...]:
        return trainer_of(settings_of(*overrides), CoordinationDir(RUN)).argv

    told = ("trainer.esi_redundant_time=900", "trainer.resume_mode=auto")
    assert set(words("RESTARTS=1")) - set(words("WANDB_EXPERIMENT=skyrl")) == set(told)
    last = words("RESTARTS=1", "VERL_OVERRIDES=trainer.esi_redundant_time=5 a=b")
    assert last[-2:] == ("trainer.esi_redundant_time=5", "a=b")


# --- settings and plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("RESTARTS=1", "TIME_LIMIT=15"), "RESTARTS=1: the training saves RESTART_LEAD=900 s before TIME_LIMIT"),
        (("MIN_RUN_TIME=900", "TIME_LIMIT=15"), "MIN_RUN_TIME=900 must be less than TIME_LIMIT=15 (900 s)"),
        (("RESTARTS=2", "SAVE_FREQ=-1"), "RESTARTS=2 with SAVE_FREQ=-1: without checkpoints"),
        (("RESTART_LEAD=65536",), "must be 1 to 65535"),
        (("RESTARTS=1", "VERL_OVERRIDES=trainer.resume_mode=disable"), "the suite decides trainer.resume_mode"),
        (("RESTARTS=1", "VERL_OVERRIDES=~trainer.resume_mode=auto"), "the suite decides trainer.resume_mode"),
        (
            ("RESTARTS=1", "SAVE_FREQ=-1", "TRAINING_COMMAND=true", "TRAINING_COMMAND_IS_VERL=true"),
            "RESTARTS=1 with SAVE_FREQ=-1",
        ),
        (("RESTARTS=1", "VERL_OVERRIDES=+trainer.default_local_dir=/x"), "the suite decides trainer.default_local_dir"),
        (("RESTARTS=1", "VERL_OVERRIDES=trainer.default_local_dir=auto"), "decides trainer.default_local_dir"),
    ],
)
def test_what_cannot_hold_together(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(*overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("TIME_LIMIT=15",),
        ("SAVE_FREQ=-1",),
        ("RESTARTS=1", "TIME_LIMIT=UNLIMITED"),
        ("RESTARTS=1", "TIME_LIMIT=16"),
        ("RESTARTS=1", "TIME_LIMIT=15", "SKYRL_BACKEND=local"),
        ("RESTARTS=1", "SAVE_FREQ=-1", "TRAINING_COMMAND=true"),
        ("RESTARTS=1", "VERL_OVERRIDES=trainer.resume_mode=auto"),
        ("RESTARTS=1", "VERL_OVERRIDES=\"++trainer.resume_mode='auto'\""),
    ],
)
def test_what_can(overrides: tuple[str, ...]) -> None:
    assert settings_of(*overrides)


def test_a_local_run_has_no_restarts_and_says_so() -> None:
    assert any("RESTARTS=1 has no effect" in str(warning) for warning in load("RESTARTS=1", config="local").warnings)


def test_the_checkpoint_folder_of_a_run_that_may_be_restarted_has_no_date() -> None:
    assert settings_of("RESTARTS=1").wandb_experiment == "skyrl"
    assert settings_of().wandb_experiment == "skyrl-20260304-050607"
    assert settings_of("RESTARTS=1", "WANDB_EXPERIMENT=mine").wandb_experiment == "mine"


def plan_for(*overrides: str, request: Request | None = None, **environment: str) -> LaunchPlan:
    seen = {"HOME": "/home/me", **environment}
    return make_plan(load(*overrides), request or Request(), seen, Path("/project/SkyRL"), "/py", NOW)


def jobs_of(plan: LaunchPlan) -> tuple[JobPlan, JobPlan]:
    assert plan.runtime and plan.training
    return plan.runtime, plan.training


def test_slurm_is_asked_to_tell_both_jobs() -> None:
    for job in jobs_of(plan_for("RESTARTS=1", "RESTART_LEAD=300")):
        assert "--signal=B:USR1@300" in job.argv
        assert job.environment["SKYRL_ATTEMPT"] == "1"
        assert "SKYRL_AFTER_JOB_ID" not in job.environment
    for job in jobs_of(plan_for("RESTARTS=1", "RESTART_LEAD=300", "TIME_LIMIT=00:07:00")):
        assert not any(word.startswith("--signal") for word in job.argv), "it might come before the body can take it"
    for job in jobs_of(plan_for()):
        assert not any(word.startswith("--signal") for word in job.argv)
        assert "SKYRL_ATTEMPT" not in job.environment


def test_a_pair_that_goes_on() -> None:
    request = Request(attach_dir=RUN, restart=Restart(3, "8"))
    runtime, training = jobs_of(plan_for("RESTARTS=4", request=request, SKYRL_RUNTIME_JOB_ID="7", SKYRL_ATTEMPT="2"))
    assert {"--hold", "--dependency=afterany:8", f"--output={RUN}/runtime_%j.out"} <= set(runtime.argv)
    assert runtime.argv[-1] == f"{RUN}/code/slurm/jobs/runtime_server.py"
    assert "--dependency=after:<runtime job id>,afterany:8" in training.argv
    assert training.argv[-1] == f"{RUN}/code/slurm/jobs/verl_training.py"
    for job in (runtime, training):
        assert job.environment["SKYRL_COORD_DIR"] == str(RUN)
        assert job.environment["SKYRL_ATTEMPT"] == "3"
        assert job.environment["SKYRL_AFTER_JOB_ID"] == "8"
    assert "SKYRL_RUNTIME_JOB_ID" not in runtime.environment


@pytest.mark.parametrize("theirs", ["--dependency=afterok:5", "--dependency afterok:5", "-d afterok:5", "-dafterok:5"])
def test_what_the_user_waits_for_is_waited_for_too_and_once(theirs: str) -> None:
    waits = f"GPU_SBATCH_ARGS={theirs} --begin=now+60 --nice=5"
    runtime, training = jobs_of(plan_for(waits, f"CPU_SBATCH_ARGS={theirs}"))
    assert runtime.argv.count("--hold") == 1
    assert set(theirs.split()) <= set(runtime.argv)
    assert "--dependency=after:<runtime job id>,afterok:5" in training.argv
    assert {"--begin=now+60", "--nice=5"} <= set(training.argv)
    request = Request(attach_dir=RUN, restart=Restart(3, "8"))
    runtime, training = jobs_of(plan_for("RESTARTS=4", waits, f"CPU_SBATCH_ARGS={theirs}", request=request))
    assert "--nice=5" in training.argv
    for job in (runtime, training):
        assert not [word for word in job.argv if "afterok" in word or "begin" in word]
    assert "--dependency=afterany:8" in runtime.argv
    assert "--dependency=after:<runtime job id>,afterany:8" in training.argv


def test_a_launch_from_inside_of_a_run_is_no_attempt_at_it() -> None:
    plan = plan_for(
        SKYRL_ATTEMPT="2", SKYRL_AFTER_JOB_ID="8", SKYRL_RUNTIME_JOB_ID="7", SKYRL_JOB_ID="9", SKYRL_LOCAL_JOBS="/jobs"
    )
    assert not [name for name in plan.inherited if name.startswith("SKYRL_")]
