"""Submission is all or nothing: what Slurm is asked, in which order, and what is left after each failure."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import EXIT_SUBMISSION, EnvironmentProblem, SubmissionError
from slurm.lib.git import GitState, git_state, parse_git_status
from slurm.lib.job_environment import without_slurm
from slurm.lib.launch_mark import own_launcher
from slurm.lib.plan import SECRETS_FILE, LaunchPlan, Request, Requeue, Restart, make_plan
from slurm.lib.run_record import (
    Provenance,
    await_secrets,
    join,
    partner_of,
    provenance,
    read_jobs,
    read_secrets,
    recorded_git,
    workers_of,
)
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.submission import Submitted, submit
from tests.fake_slurm import Call, FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
RUN = "20260304_050607_101"
GIT = Provenance(GitState("c0ffee", True))
KEY = "sk-the-key-of-the-server"
TOKEN = "wandb-token-of-somebody"


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def plan_for(
    slurm: FakeSlurm,
    *overrides: str,
    config: str = "dev",
    request: Request | None = None,
    environment: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """A plan whose trainer is a command of our own."""
    seen = {"PATH": slurm.path, "HOME": str(slurm.folder), "SLURM_CONF": "/nowhere/slurm.conf", **(environment or {})}
    words = [f"SKYRL_JOBS_BASE={slurm.jobs}", "TRAINING_COMMAND=true", *overrides]
    loaded = load_config(config, words, without_slurm(seen), ROOT / "slurm" / "config", NOW, ROOT.parent)
    return make_plan(loaded, request or Request(), seen, ROOT, sys.executable, NOW)


def marker_name() -> str:
    """The file by which another launch knows what this process has not finished."""
    host, _, _, pid, ticks = own_launcher().split("/")
    return f"submission_{host}_{pid}_{ticks}.json"


def carry_out(plan: LaunchPlan, notes: SignalNotes | None = None, **options: Any) -> Submitted:
    git: Callable[[], Provenance] = options.get("git", lambda: GIT)
    return submit(plan, notes or SignalNotes(), git, options.get("checkout", ROOT))


def test_held_then_dependent_then_complete_then_one_release(slurm: FakeSlurm) -> None:
    done = carry_out(plan_for(slurm))
    assert done.jobs == {"runtime": "101", "training": "102"}
    assert slurm.names == ["sbatch", "sbatch", "scontrol release", "scontrol release"]
    runtime, training, *releases = slurm.calls
    assert "--hold" in runtime.argv
    assert runtime.argv[-1] == str(ROOT / "slurm/jobs/runtime_server.py")
    assert "--dependency=after:101" in training.argv
    assert "--hold" in training.argv, "the end of a runtime job that is taken back would let it start"
    assert training.argv[-1] == str(ROOT / "slurm/jobs/verl_training.py")
    assert [call.argv for call in releases] == [["release", "102"], ["release", "101"]]
    for call in (runtime, training):
        assert {"--parsable", "--no-requeue", "--export=ALL"} <= set(call.argv)
        assert not call.modes  # nothing was made before both ids were known


MANY = ("RUNTIME_NODES=4", "RUNTIME_MIN_SLOTS=20")  # two of the workers are needed, one is not


def test_worker_arrays_are_submitted_and_released_with_the_pair(slurm: FakeSlurm) -> None:
    done = carry_out(plan_for(slurm, *MANY))
    assert done.jobs == {"runtime": "101", "workers": "102", "more_workers": "103", "training": "104"}
    submissions, releases = slurm.of("sbatch"), slurm.of("scontrol")
    assert all("--hold" in call.argv for call in submissions)
    assert [word for call in submissions for word in call.argv if word.startswith("--array")] == [
        "--array=1-2",
        "--array=3",
    ]
    assert "--dependency=after:101" in submissions[1].argv
    assert f"--output={slurm.jobs}/{RUN}/worker_%A_%a.out" in submissions[1].argv
    assert submissions[1].environment["SKYRL_RUNTIME_JOB_ID"] == "101"
    assert all("--dependency=after:101:102_1:102_2" in call.argv for call in submissions[2:])
    assert [call.argv[1] for call in releases] == ["102", "103", "104", "101"], "first what starts first; the commit"
    record = json.loads(done.directory.run_record.read_text())["jobs"]
    assert record["workers"] == {"id": "102", "name": "skyrl-worker", "tasks": [1, 2]}
    assert record["more_workers"] == {"id": "103", "name": "skyrl-worker", "tasks": [3]}
    assert [array.task_ids for array in workers_of(done.directory, "101")] == [("102_1", "102_2"), ("103_3",)]
    assert workers_of(done.directory, "105") == ()


@pytest.mark.parametrize("failing", range(4))
def test_a_release_that_fails_takes_worker_arrays_back_too(slurm: FakeSlurm, failing: int) -> None:
    slurm.answer("scontrol", *([{}] * failing), {"code": 1, "stderr": "no such thing"})
    with pytest.raises(SubmissionError):
        carry_out(plan_for(slurm, *MANY))
    assert [call.argv[-1] for call in slurm.of("scancel")] == ["104", "103", "102", "101"], "what waits goes first"
    assert list(slurm.jobs.iterdir()) == []


def test_the_jobs_base_is_there_before_the_first_job(slurm: FakeSlurm) -> None:
    """So a base that is missing at a later launch is one that its host does not see."""
    slurm.answer("sbatch", {"code": 1, "stderr": "no"})
    with pytest.raises(SubmissionError):
        carry_out(plan_for(slurm))
    assert slurm.jobs.is_dir()


def test_the_directory_is_complete_at_the_release(slurm: FakeSlurm) -> None:
    plan = plan_for(slurm, environment={"WANDB_API_KEY": TOKEN})
    carry_out(plan)
    modes = slurm.of("scontrol")[0].modes
    assert modes[RUN] == 0o700
    assert modes[f"{RUN}/secrets.json"] == 0o600
    assert {f"{RUN}/{name}" for name in ("run.json", "dev.conf", "code/slurm/lib/runtime_job.py")} <= modes.keys()
    after = {str(path.relative_to(slurm.jobs)) for path in slurm.jobs.rglob("*")}
    assert modes.keys() - after == {f"{RUN}/{marker_name()}"}, "what says that it is not finished"
    assert after < modes.keys()
    assert not [name for name in modes if Path(name).name.startswith(".")]  # nothing half-written


def test_the_environment_of_the_jobs(slurm: FakeSlurm) -> None:
    carry_out(plan_for(slurm))
    runtime, training = (call.environment for call in slurm.of("sbatch"))
    base = slurm.jobs
    assert runtime["SKYRL_COORD_DIR"] == f"{base}/20260304_050607_%j"
    assert training["SKYRL_COORD_DIR"] == str(base / RUN)
    assert training["SKYRL_CODE_DIR"] == str(base / RUN / "code")
    assert training["SKYRL_RUNTIME_JOB_ID"] == "101"
    assert training["SKYRL_PYTHON"] == sys.executable
    assert training["MODEL"] == "Qwen/Qwen3-1.7B"
    assert f"--output={base}/{RUN}/training_%j.out" in slurm.of("sbatch")[1].argv


def test_what_slurm_set_around_us_is_dropped_and_what_a_person_set_is_kept(slurm: FakeSlurm) -> None:
    around = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3", "SLURM_MEM_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}
    person = {"SBATCH_ACCOUNT": "lab", "SLURM_CONF": "/etc/x/slurm.conf", "MY_OWN": "x"}
    carry_out(plan_for(slurm, environment={**around, **person}))
    for call in slurm.calls:
        assert not around.keys() & call.environment.keys(), call.name
        assert person.items() <= call.environment.items(), call.name


def test_path_and_slurm_conf_of_the_conf_reach_every_command(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Where Slurm is only found by what the .conf sets, the release and the cancellation need it too."""
    conf = tmp_path / "site.conf"
    conf.write_text(f"export PATH='{slurm.bin}':$PATH\nexport SLURM_CONF=/site/slurm.conf\n")
    slurm.answer("scontrol", {"code": 1, "stderr": "no"})
    environment = {"PATH": os.environ["PATH"]}
    with pytest.raises(SubmissionError, match="cancelled 101 102"):
        carry_out(plan_for(slurm, config=str(conf), environment=environment))
    assert slurm.names == ["sbatch", "sbatch", "scontrol release", "squeue", "scancel", "scancel"]
    assert {call.environment["SLURM_CONF"] for call in slurm.calls} == {"/site/slurm.conf"}


def test_secrets_go_by_a_private_file_alone(slurm: FakeSlurm, tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    conf.write_text(f'source "{ROOT}/slurm/config/dev.conf"\nALLHANDS_API_KEY="{KEY}"\nNOTE="uses {KEY}"\n')
    done = carry_out(plan_for(slurm, config=str(conf), environment={"WANDB_API_KEY": TOKEN, "HF_TOKEN": "hf_12345"}))
    for call in slurm.calls:
        said = json.dumps([call.argv, [v for n, v in call.environment.items() if n != "NOTE"]])
        for secret in (KEY, TOKEN, "hf_12345"):
            assert secret not in said, call.name
    secrets = done.directory.secrets
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert json.loads(secrets.read_text()).items() >= {
        ("ALLHANDS_API_KEY", KEY),
        ("WANDB_API_KEY", TOKEN),
        ("HF_TOKEN", "hf_12345"),
    }
    for path in (path for path in done.directory.path.rglob("*") if path.is_file() and path != secrets):
        assert KEY.encode() not in path.read_bytes(), path
        assert TOKEN.encode() not in path.read_bytes(), path
    assert "ALLHANDS_API_KEY" in (done.directory.path / "mine.conf").read_text()


def test_a_value_that_holds_a_secret_goes_by_the_file_too(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Slurm keeps a job's environment where others may read it: no value of it may hold a key."""
    conf = tmp_path / "mine.conf"
    conf.write_text(f'ALLHANDS_API_KEY="{KEY}"\nHEADER="Bearer $ALLHANDS_API_KEY"\n')
    done = carry_out(plan_for(slurm, config=str(conf)))
    for call in slurm.calls:
        assert KEY not in json.dumps(call.environment), call.name
    assert read_secrets(done.directory, "101")["HEADER"] == f"Bearer {KEY}"


def test_the_record(slurm: FakeSlurm) -> None:
    done = carry_out(plan_for(slurm, "GPU_NODES=2", environment={"WANDB_API_KEY": TOKEN}))
    record = json.loads(done.directory.run_record.read_text())
    assert record["schema"] == 1
    assert datetime.fromisoformat(record["created"]).tzinfo is not None
    assert record["git"] == {"commit": "c0ffee", "dirty": True, "branch": None, "diff": None}
    assert record["agent_git"] is None
    assert record["interpreter"] == sys.executable
    assert record["settings"]["GPU_NODES"] == "2"
    assert record["settings"]["MODEL"] == "Qwen/Qwen3-1.7B"
    assert record["sources"]["GPU_NODES"] == "--set"
    assert record["sources"]["MODEL"].startswith(str(ROOT / "slurm/config/dev.conf") + ":")
    assert record["config_files"] == [str(ROOT / "slurm/config/dev.conf")]
    assert record["jobs"]["training"] == {"id": "102", "name": "skyrl-train"}
    assert read_jobs(done.directory) == done.jobs
    assert (done.directory.path / "dev.conf").read_text() == (ROOT / "slurm/config/dev.conf").read_text()


def git(folder: Path, *words: str) -> str:
    argv = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder), *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_a_record_that_is_late_is_not_overwritten_by_its_own_job(tmp_path: Path) -> None:
    directory = CoordinationDir(tmp_path)
    join(directory, "runtime", "7", launched=True)
    assert not directory.run_record.exists()
    directory.run_record.write_text(json.dumps({"jobs": {"runtime": {"id": "7"}, "training": {"id": "8"}}}))
    assert partner_of(directory, "runtime", "7") == "8"
    join(directory, "runtime", "9", launched=False)
    assert partner_of(directory, "runtime", "7") == "8", "nor by one that joins"


def test_the_commit_and_whether_it_is_what_ran(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "symbolic-ref", "HEAD", "refs/heads/trying")
    assert git_state(tmp_path) == GitState(None, False, "trying")
    (tmp_path / "a").touch()
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == GitState(commit, False, "trying")
    (tmp_path / "a").write_text("changed")
    state = git_state(tmp_path)
    assert (state.commit, state.dirty, state.branch, state.is_cut) == (commit, True, "trying", False)
    assert state.diff is not None and b"+changed" in state.diff
    git(tmp_path, "checkout", "-q", "--detach")
    assert git_state(tmp_path).branch is None
    assert parse_git_status(f"# branch.oid {commit}\n? new\n") == GitState(commit, True)


def test_what_had_changed_lies_beside_the_record_without_secrets(slurm: FakeSlurm) -> None:
    changed = f"+key = '{TOKEN}'\n".encode()
    suite = GitState("c0ffee", True, "main", changed)
    agent = GitState("decaf", True, "trying", changed, is_cut=True)
    plan = plan_for(slurm, environment={"WANDB_API_KEY": TOKEN})
    directory = carry_out(plan, git=lambda: Provenance(suite, agent)).directory
    record = json.loads(directory.run_record.read_text())
    assert record["git"] == {"commit": "c0ffee", "dirty": True, "branch": "main", "diff": "run_suite.diff"}
    assert record["agent_git"] == {"commit": "decaf", "dirty": True, "branch": "trying", "diff": "run_agent.diff"}
    for name, more in (("run_suite.diff", ""), ("run_agent.diff", "\n# cut after 33 bytes: there was more\n")):
        path = directory.path / name
        assert path.read_text() == "+key = '***'\n" + more
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "left_out" not in record["git"]
    goes_on = recorded_git(directory)
    assert (goes_on.suite.branch, goes_on.agent) == ("main", GitState("decaf", True, "trying"))


def test_a_change_of_keys_alone_is_named_and_not_kept(slurm: FakeSlurm) -> None:
    changed = b"diff --git a/.env b/.env\n--- a/.env\n+++ b/.env\n@@ -1 +1 @@\n-A=1\n+A=unheard-of\n"
    directory = carry_out(plan_for(slurm), git=lambda: Provenance(GitState("c0ffee", True, "main", changed))).directory
    record = json.loads(directory.run_record.read_text())
    assert (record["git"]["diff"], record["git"]["left_out"]) == (None, [".env"])
    assert not list(directory.path.glob("*.diff"))


def test_both_trees_are_asked_about(slurm: FakeSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "root" / "SkyRL" / "skyrl-agent"
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "agents")
    found = provenance(ROOT, plan_for(slurm, f"SKYRL_PROJECT_ROOT={tmp_path / 'root'}").settings)
    assert found.agent is not None and found.agent.branch == "agents"
    assert found.suite.commit == git(ROOT, "rev-parse", "HEAD")
    assert provenance(ROOT, plan_for(slurm, f"SKYRL_PROJECT_ROOT={tmp_path}").settings).agent is None


def test_outside_of_git_nothing_is_known(tmp_path: Path) -> None:
    assert git_state(tmp_path) == GitState(None, None)


def test_the_copy_of_the_code_is_complete(slurm: FakeSlurm) -> None:
    done = carry_out(plan_for(slurm))
    code = done.directory.code
    packages = ("slurm", "slurm_runtime", "shell_rl")
    listed = git(ROOT, "ls-files", "-z", "-co", "--exclude-standard", "--", *packages).split("\0")
    expected = {name for name in listed if name and (ROOT / name).is_file() and not name.endswith(".conf")}
    assert expected == {str(path.relative_to(code)) for name in packages for path in (code / name).rglob("*.*")}
    program = (
        "import slurm.lib.runtime_job as job, slurm.lib.training_job, slurm.lib.cli, slurm_runtime.api_server\n"
        "import shell_rl.train\nprint(job.__file__)"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=code, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(code / "slurm/lib/runtime_job.py")


# --- failures ---------------------------------------------------------------------------------------------------------


def refuse(slurm: FakeSlurm) -> str:
    slurm.answer("sbatch", {"code": 1, "stdout": "", "stderr": "sbatch: error: invalid account\n"})
    return "invalid account; nothing was queued"


def refuse_second(slurm: FakeSlurm) -> str:
    words = "sbatch: error: Batch job submission failed:\nsbatch: error: invalid partition specified: x\n"
    slurm.answer("sbatch", {}, {"code": 1, "stdout": "", "stderr": words})
    return "Batch job submission failed:; sbatch: error: invalid partition specified: x; cancelled 101"


def babble(slurm: FakeSlurm) -> str:
    slurm.answer("sbatch", {}, {"stdout": "Welcome to the cluster\n"})
    return "Slurm did not take the job: Welcome to the cluster; cancelled 101"


def no_base(slurm: FakeSlurm) -> str:
    slurm.jobs.write_text("a file, not a folder")
    return "cannot make the run directory .*; set SKYRL_JOBS_BASE .*; cancelled 101 102"


def no_release(slurm: FakeSlurm) -> str:
    slurm.answer("scontrol", {"code": 1, "stderr": "slurm_update error: Access denied"})
    return "did not release job 102: slurm_update error: Access denied; cancelled 101 102"


def no_cancel(slurm: FakeSlurm) -> str:
    slurm.answer("scancel", {"code": 1, "stderr": "scancel: error: controller is away"})
    return no_release(slurm).replace("cancelled 101 102", "could not cancel 101 102 .*away.*: cancel by hand")


@pytest.mark.parametrize("fail", [refuse, refuse_second, babble, no_base, no_release, no_cancel])
def test_a_failure_takes_everything_back(slurm: FakeSlurm, fail: Callable[[FakeSlurm], str]) -> None:
    words = fail(slurm)
    with pytest.raises(SubmissionError, match=words) as caught:
        carry_out(plan_for(slurm))
    assert caught.value.exit_code == EXIT_SUBMISSION
    left = list(slurm.jobs.iterdir()) if slurm.jobs.is_dir() else []
    assert bool(left) is (fail is no_cancel), "the directory of a job that may live stays"
    taken = [str(101 + n) for n, call in enumerate(slurm.of("sbatch")) if succeeded(slurm, n)]
    asked = [call.argv[0] for call in slurm.of("scancel")]
    assert asked == (["102"] if fail is no_cancel else list(reversed(taken)))
    assert slurm.names[-1] == ("scancel" if taken else "sbatch")


def succeeded(slurm: FakeSlurm, number: int) -> bool:
    answers = slurm.answers.get("sbatch", [])
    return number >= len(answers) or not answers[number]


def test_a_code_that_cannot_be_copied_takes_everything_back(slurm: FakeSlurm, tmp_path: Path) -> None:
    broken = tmp_path / "checkout" / "slurm"
    broken.mkdir(parents=True)
    (broken / "gone.py").symlink_to("nowhere")
    with pytest.raises(SubmissionError, match=r"cannot copy the code into .*; cancelled 101 102"):
        carry_out(plan_for(slurm), checkout=tmp_path / "checkout")
    assert [call.argv for call in slurm.of("scancel")] == [["102"], ["101"]]
    assert not list(slurm.jobs.iterdir())


def test_no_sbatch_on_path(slurm: FakeSlurm) -> None:
    (slurm.bin / "sbatch").unlink()
    (slurm.bin / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    with pytest.raises(SubmissionError, match=r"sbatch: not found .*is it on PATH"):
        carry_out(plan_for(slurm, environment={"PATH": str(slurm.bin)}))
    assert slurm.calls == []


def test_a_signal_during_submission_takes_everything_back(slurm: FakeSlurm) -> None:
    notes = SignalNotes()

    def signalled() -> Provenance:
        notes.note(signal.SIGTERM)
        return GIT

    with pytest.raises(Interrupted):
        carry_out(plan_for(slurm), notes, git=signalled)
    assert slurm.names == ["sbatch", "sbatch", "scancel", "scancel"]
    assert [call.argv for call in slurm.of("scancel")] == [["102"], ["101"]]
    assert not list(slurm.jobs.iterdir())


LAUNCH = [str(ROOT / "slurm/launch.py"), "--config", "dev", "--set", "TRAINING_COMMAND=true"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("step", [0, 1])
def test_a_real_signal_to_the_launcher(slurm: FakeSlurm, number: signal.Signals, step: int) -> None:
    """It arrives while the nth sbatch runs; the job that this one submits is known and taken back too."""
    slurm.answer("sbatch", *[{} for _ in range(step)], {"signal": number})
    environment = {**os.environ, "PATH": slurm.path, "SKYRL_JOBS_BASE": str(slurm.jobs)}
    done = subprocess.run(LAUNCH, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 128 + number
    assert number.name in done.stderr
    taken = [str(101 + n) for n in range(step + 1)]
    assert f"cancelled {' '.join(taken)}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [call.argv for call in slurm.of("scancel")] == [[job] for job in reversed(taken)]
    assert "scontrol release" not in slurm.names
    assert not slurm.jobs.exists() or not list(slurm.jobs.iterdir())


def test_a_signal_while_leftovers_are_looked_for_ends_the_launch_at_once(slurm: FakeSlurm) -> None:
    slurm.answer("squeue --user", {"signal": signal.SIGINT, "pause_s": 7})
    environment = {**os.environ, "PATH": slurm.path, "SKYRL_JOBS_BASE": str(slurm.jobs)}
    begin = time.monotonic()
    done = subprocess.run(LAUNCH, env=environment, stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 128 + signal.SIGINT
    assert not slurm.of("sbatch")
    assert time.monotonic() - begin < 6


def test_a_signal_after_the_commit_changes_nothing(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", {}, {"signal": signal.SIGTERM})
    environment = {**os.environ, "PATH": slurm.path, "SKYRL_JOBS_BASE": str(slurm.jobs)}
    done = subprocess.run(LAUNCH, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "training job: 102" in done.stdout
    assert slurm.names == ["sbatch", "sbatch", "scontrol release", "scontrol release"]


# --- a Slurm that is silent -------------------------------------------------------------------------------------------

SILENT = {
    "code": 1,
    "stdout": "",
    "stderr": "sbatch: error: Batch job submission failed: Socket timed out on send/recv",
}


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mark for all, and no pauses between questions."""
    monkeypatch.setattr("slurm.lib.submission.new_mark", lambda: "m/a/r/k/5/0")
    for name in ("PAUSE_S", "LOOK_PAUSE_S"):
        monkeypatch.setattr(f"slurm.lib.unheard.{name}", 0.0)


def patient(plan: LaunchPlan, patience_s: float = 60.0) -> Submitted:
    return submit(plan, SignalNotes(), lambda: GIT, ROOT, patience_s=patience_s)


def test_a_job_that_was_taken_without_an_answer_is_found(slurm: FakeSlurm, unhurried: None) -> None:
    slurm.answer("sbatch", SILENT)
    found = {"stdout": "77|PENDING|JobHeldUser|1|skyrl:m/a/r/k/5/0\n78|RUNNING|None|1|skyrl:m/a/r/k/5/1\n"}
    slurm.answer("squeue --user", {"code": 1}, {"code": 1}, found)
    assert patient(plan_for(slurm)).jobs == {"runtime": "77", "training": "102"}
    assert slurm.names == ["sbatch", "sbatch", "scontrol release", "scontrol release"]


def test_a_job_that_was_taken_into_a_hidden_partition_is_found(slurm: FakeSlurm, unhurried: None) -> None:
    slurm.answer("sbatch", SILENT)
    slurm.answer("squeue --user", {"stdout": "", "hidden": "77|PENDING|JobHeldUser|1|skyrl:m/a/r/k/5/0\n"})
    assert patient(plan_for(slurm)).jobs == {"runtime": "77", "training": "102"}


def test_a_job_that_was_not_taken_is_submitted_once_more(slurm: FakeSlurm, unhurried: None) -> None:
    slurm.answer("sbatch", {}, SILENT)
    assert patient(plan_for(slurm)).jobs == {"runtime": "101", "training": "103"}
    assert len(slurm.of("sbatch")) == 3


def test_a_slurm_that_stays_silent_is_an_error_that_says_what_may_be_left(slurm: FakeSlurm, unhurried: None) -> None:
    slurm.answer("sbatch", {}, SILENT)
    slurm.answer("squeue --user", *[{"code": 1}] * 50)
    with pytest.raises(
        SubmissionError, match=r"it may have been queued all the same, held: .*; cancelled 101"
    ) as caught:
        patient(plan_for(slurm), patience_s=0.0)
    assert caught.value.leaves_jobs
    slurm.forget()
    slurm.answer("sbatch", SILENT)
    with pytest.raises(SubmissionError, match=r"it may have been queued all the same.*; nothing else was queued"):
        patient(plan_for(slurm), patience_s=0.0)


def test_a_persons_own_comment_is_kept_and_such_a_job_is_not_looked_for(slurm: FakeSlurm, unhurried: None) -> None:
    slurm.answer("sbatch", SILENT)
    plans = [plan_for(slurm, "CPU_SBATCH_ARGS=--comment=mine"), plan_for(slurm, environment={"SBATCH_COMMENT": "mine"})]
    for plan in plans:
        slurm.forget()
        with pytest.raises(SubmissionError, match="it may have been queued all the same"):
            patient(plan)
        assert len(slurm.of("sbatch")) == 1
        assert not slurm.questions
    assert not [word for word in slurm.of("sbatch")[0].argv if word.startswith("--comment")]


def test_a_release_is_said_again_until_it_is_heard(slurm: FakeSlurm, unhurried: None) -> None:
    silent = {"code": 1, "stderr": "slurm_update error: Unable to contact slurm controller (connect failure)"}
    slurm.answer("scontrol", silent, {}, silent, {"code": 1, "stderr": "Job is no longer pending execution"})
    slurm.answer("squeue", {"stdout": "RUNNING|None|cpu1||101\n"})
    assert patient(plan_for(slurm)).jobs == {"runtime": "101", "training": "102"}
    assert [call.argv[-1] for call in slurm.of("scontrol")] == ["102", "102", "101", "101"]
    assert not slurm.of("scancel")


def test_a_commit_that_may_have_been_heard_is_not_taken_back(slurm: FakeSlurm, unhurried: None) -> None:
    silent = {"code": 1, "stderr": "slurm_update error: Unable to contact slurm controller (connect failure)"}
    slurm.answer("scontrol", {}, silent)
    with pytest.raises(SubmissionError, match=r"is complete, and may start: .* launch.py cancel") as caught:
        patient(plan_for(slurm), patience_s=0.0)
    assert caught.value.may_start
    assert not slurm.of("scancel")
    assert (slurm.jobs / RUN / "run.json").exists()


def test_a_marker_that_cannot_be_removed_does_not_hide_the_run(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unlink = Path.unlink

    def stale(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("submission_"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", stale)
    assert carry_out(plan_for(slurm)).jobs == {"runtime": "101", "training": "102"}
    assert "released all the same" in caplog.text
    assert not slurm.of("scancel")


# --- joining a runtime ------------------------------------------------------------------------------------------------


@pytest.fixture
def running(slurm: FakeSlurm) -> CoordinationDir:
    """The directory of a runtime job that was launched alone."""
    done = carry_out(plan_for(slurm, request=Request(training=False), environment={"WANDB_API_KEY": "of-the-runtime"}))
    slurm.forget()
    slurm.answer("sbatch", {"stdout": "202\n"})
    return done.directory


def joining(slurm: FakeSlurm, directory: CoordinationDir) -> LaunchPlan:
    request = Request(runtime=False, attach_dir=directory.path, attach_id="101")
    return plan_for(slurm, request=request, environment={"WANDB_API_KEY": TOKEN})


def test_joining_a_running_runtime(slurm: FakeSlurm, running: CoordinationDir) -> None:
    done = carry_out(joining(slurm, running))
    call, release = slurm.calls
    assert "--hold" in call.argv
    assert not any(word.startswith("--dependency") for word in call.argv)
    assert call.environment["SKYRL_RUNTIME_JOB_ID"] == "101"
    assert call.environment["SKYRL_COORD_DIR"] == str(running.path)
    assert release.argv == ["release", "202"]
    assert done.directory == running
    assert read_jobs(running) == {"runtime": "101", "training": "202"}


def test_a_joining_job_gets_the_secrets_of_its_own_launch(slurm: FakeSlurm, running: CoordinationDir) -> None:
    carry_out(joining(slurm, running))
    assert read_secrets(running, "202")["WANDB_API_KEY"] == TOKEN
    assert read_secrets(running, "101")["WANDB_API_KEY"] == "of-the-runtime"
    assert stat.S_IMODE((running.path / "secrets_202.json").stat().st_mode) == 0o600


def test_a_job_knows_which_file_its_secrets_are_in(slurm: FakeSlurm, running: CoordinationDir) -> None:
    """So that it can wait for one that its node sees late; one of a launch without secrets waits for none."""
    carry_out(joining(slurm, running))
    carry_out(plan_for(slurm, environment={"WANDB_API_KEY": TOKEN}))
    carry_out(plan_for(slurm, environment={"WANDB_API_KEY": ""}))
    named = [call.environment.get(SECRETS_FILE) for call in slurm.of("sbatch")[-5:]]
    assert named == ["secrets_%j.json", "secrets.json", "secrets.json", None, None]


def test_secrets_that_come_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.lib.run_record.LATE_S", 0.5)
    path, naps = tmp_path / "secrets.json", list[float]()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(seconds)

    with pytest.raises(EnvironmentProblem, match=r"waited 0.5 s for .*secrets.json to be seen on .*: the launch"):
        await_secrets(path, lambda: None, nap)
    path.touch()
    naps.clear()
    await_secrets(path, lambda: None, nap)
    assert not naps


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "{", '"x"', '{"A": 1}', '{"A": null}', '{"A=B": "x"}', '{"A": "\\u0000"}', "[" * 10**5]
)
def test_secrets_that_are_none_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "secrets.json").write_text(text)
    with pytest.raises(EnvironmentProblem, match=r"cannot read .*secrets.json"):
        read_secrets(CoordinationDir(tmp_path), "1")


def test_a_job_that_failed_to_join_is_never_seen_by_the_runtime(slurm: FakeSlurm, running: CoordinationDir) -> None:
    """The runtime job takes a recorded training job that is gone for a failed training, and ends."""
    before = sorted(running.path.iterdir())
    slurm.answer("scontrol", {"code": 1, "stderr": "no"})
    with pytest.raises(SubmissionError, match="cancelled 202"):
        carry_out(joining(slurm, running))
    assert sorted(running.path.iterdir()) == before
    at_release: Call = slurm.of("scontrol")[0]
    assert f"{running.path.name}/run_202.json" not in at_release.modes


def going_on(slurm: FakeSlurm, directory: CoordinationDir, which: str) -> LaunchPlan:
    """A submission to a directory that is there: of a job that joins, of the next attempt, of a pair queued again."""
    if which == "join":
        return joining(slurm, directory)
    restart = Restart(2, "102") if which == "restart" else None
    requeue = Requeue(1, "", "101", 0) if which == "requeue" else None
    return plan_for(slurm, "RESTARTS=1", request=Request(attach_dir=directory.path, restart=restart, requeue=requeue))


@pytest.mark.parametrize(("which", "is_marked"), [("join", True), ("restart", True), ("requeue", False)])
def test_a_submission_to_a_directory_that_is_there_is_marked_before_its_first_job(
    slurm: FakeSlurm, running: CoordinationDir, which: str, is_marked: bool
) -> None:
    """A launcher that is killed right after an sbatch would leave a held job that looks like a person's."""
    carry_out(going_on(slurm, running, which))
    marker = f"{running.path.name}/{marker_name()}"
    before = [call for call in slurm.calls if call.name == "sbatch" or call.argv[0] == "release"]
    assert [marker in call.modes for call in before] == [is_marked] * len(before)
    assert not (running.path / marker_name()).exists()


@pytest.mark.parametrize(
    ("answer", "stays"),
    [
        ({"code": 1, "stderr": "sbatch: error: invalid account"}, False),
        ({"code": 1, "stderr": "sbatch: error: Socket timed out on send/recv operation"}, True),
    ],
)
def test_the_mark_stays_where_a_job_may_be_queued_that_nobody_knows(
    slurm: FakeSlurm, running: CoordinationDir, unhurried: None, answer: dict[str, Any], stays: bool
) -> None:
    slurm.answer("sbatch", answer)
    slurm.answer("squeue --user", {"code": 1})
    with pytest.raises(SubmissionError):
        carry_out(going_on(slurm, running, "join"))
    assert (running.path / marker_name()).exists() is stays


@pytest.mark.parametrize(("which", "is_cleared"), [("restart", True), ("requeue", False)])
def test_only_what_the_next_launch_removes_is_left_to_it(
    slurm: FakeSlurm, running: CoordinationDir, which: str, is_cleared: bool
) -> None:
    slurm.answer("scontrol", {"code": 1, "stderr": "no"})
    slurm.answer("scancel", {"code": 1, "stderr": "away"})
    with pytest.raises(SubmissionError, match="by hand with scancel") as caught:
        carry_out(going_on(slurm, running, which))
    assert ("or let the next launch do it" in str(caught.value)) is is_cleared
    assert (running.path / marker_name()).exists() is is_cleared


def test_the_runtime_of_somebody_else(slurm: FakeSlurm) -> None:
    request = Request(runtime=False, runtime_url="http://host:1")
    done = carry_out(plan_for(slurm, request=request, environment={"ALLHANDS_API_KEY": KEY}))
    assert done.directory.path.name == "20260304_050607_101"
    assert done.directory.read_url() == "http://host:1"
    assert done.directory.read_key() == KEY
    assert done.directory.runtime_ready.exists()
    assert stat.S_IMODE(done.directory.runtime_api_key.stat().st_mode) == 0o600
    assert "SKYRL_RUNTIME_JOB_ID" not in slurm.of("sbatch")[0].environment


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.podman
def test_a_per_cent_sign_in_the_jobs_base_on_real_slurm(
    user: Any, checkout: Path, jobs_base: Path, nothing_left: Callable[[], None]
) -> None:
    from tests.runs import launch

    run = launch(user, checkout, jobs_base / "50% of 100%x", "TRAINING_COMMAND=pwd")
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 0, run.log("training")
    assert str(jobs_base / "50% of 100%x") in run.log("training")
    nothing_left()


def test_calls_are_recorded_in_order(slurm: FakeSlurm) -> None:
    """The fake itself: a recorder that lost calls would make the tests above weaker than they look."""
    for number in range(3):
        argv = [str(slurm.bin / "sbatch"), f"--job-name=a b\n{number}"]
        answer = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert answer.stdout == f"{101 + number}\n"
    assert [call.argv for call in slurm.calls] == [[f"--job-name=a b\n{number}"] for number in range(3)]
