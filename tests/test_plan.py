"""The plan: compared whole with golden files, and submitted word by word as it was shown.

After a wanted change: ``SKYRL_WRITE_GOLDEN=1 pytest tests/test_plan.py``, then read the difference in git.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.git import GitState
from slurm.lib.job_environment import without_slurm
from slurm.lib.plan import JobPlan, LaunchPlan, Request, make_plan, shown
from slurm.lib.ray_steps import node_step
from slurm.lib.run_record import Provenance
from slurm.lib.signals import SignalNotes
from slurm.lib.submission import submit
from slurm.lib.trainer import trainer_of
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
NOW = datetime(2026, 3, 4, 5, 6, 7)
PROJECT = Path("/project")
CHECKOUT = PROJECT / "SkyRL"
PYTHON = "/project/SkyRL/.venv/bin/python"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/home/me", "LANG": "C.UTF-8", "WANDB_API_KEY": "wandb-0123456789"}


def plan_for(
    *overrides: str,
    config: str = "dev",
    request: Request | None = None,
    environment: Mapping[str, str] | None = None,
) -> LaunchPlan:
    seen = {**ENVIRONMENT, **(environment or {})}
    loaded = load_config(config, overrides, without_slurm(seen), ROOT / "slurm" / "config", NOW, PROJECT)
    return make_plan(loaded, request or Request(), seen, CHECKOUT, PYTHON, NOW)


ATTACHED = Request(runtime=False, attach_dir=Path("/home/me/.skyrl_jobs/20260101_000000_77"), attach_id="77")
GOLDEN_PLANS = {
    "dev": plan_for(),
    "production": plan_for(config="production"),
    "runtime-only": plan_for(request=Request(training=False)),
    "skip-runtime": plan_for(request=ATTACHED),
    "het": plan_for("PAIRING=het", "RESTARTS=2"),
    "many-nodes": plan_for("RUNTIME_NODES=4", "RUNTIME_MIN_SLOTS=18", "RESTARTS=1"),
}


@pytest.mark.parametrize("name", GOLDEN_PLANS)
def test_the_whole_dry_run(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = shown(GOLDEN_PLANS[name])
    if os.environ.get("SKYRL_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_every_golden_file_is_compared() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == GOLDEN_PLANS.keys()


def argv(plan: LaunchPlan, kind: str) -> tuple[str, ...]:
    return next(job.argv for job in plan.jobs if job.kind == kind)


SITE = {
    "ACCOUNT": "--account",
    "QOS": "--qos",
    "CONSTRAINT": "--constraint",
    "RESERVATION": "--reservation",
    "EXCLUDE_NODES": "--exclude",
}


@pytest.mark.parametrize("kind", ["runtime", "training"])
@pytest.mark.parametrize("key", SITE)
def test_the_sites_keys_are_options_of_both_jobs(key: str, kind: str) -> None:
    assert f"{SITE[key]}=a_b,c" in argv(plan_for(f"{key}=a_b,c"), kind)
    assert not any(word.startswith(SITE[key]) for word in argv(plan_for(), kind))


def test_partitions_resources_and_gpus() -> None:
    plan = plan_for("GPU_PARTITION=g", "CPU_PARTITION=c", "GPU_TYPE=a100", "GPU_NODES=3", "TIME_LIMIT=1-0")
    runtime, training = argv(plan, "runtime"), argv(plan, "training")
    expected = {"--partition=c", "--nodes=1", "--ntasks=1", "--cpus-per-task=32", "--mem=64G", "--time=1-0"}
    assert expected <= set(runtime)
    expected = {"--partition=g", "--nodes=3", "--ntasks-per-node=1", "--gres=gpu:a100:2", "--cpus-per-task=16"}
    assert expected | {"--mem=64G", "--time=1-0"} <= set(training)
    assert not any("gpu" in word for word in runtime)


def dependency(job: JobPlan) -> str:
    (found,) = [word for word in job.argv if word.startswith("--dependency=")]
    return found.partition("=")[2]


@pytest.mark.parametrize(
    ("slots", "needed", "more"), [(8, (), (1, 2, 3)), (9, (1,), (2, 3)), (24, (1, 2), (3,)), (25, (1, 2, 3), ())]
)
def test_the_training_waits_for_the_workers_that_bring_enough_slots(
    slots: int, needed: tuple[int, ...], more: tuple[int, ...]
) -> None:
    """Of four nodes with eight slots each the first is the runtime job's; the rest are at most two arrays."""
    plan = plan_for("RUNTIME_NODES=4", f"RUNTIME_MIN_SLOTS={slots}")
    assert {job.kind: job.tasks for job in plan.workers} == {
        kind: tasks for kind, tasks in (("workers", needed), ("more_workers", more)) if tasks
    }
    assert plan.training
    all_needed = ":".join(["after:<runtime job id>", *(f"<workers job id>_{n}" for n in needed)])
    assert dependency(plan.training) == all_needed
    for job in plan.workers:
        assert dependency(job) == ("after:<runtime job id>" if job.kind == "workers" else all_needed), "these go first"
        first, last = job.tasks[0], job.tasks[-1]
        assert (f"--array={first}-{last}" if first != last else f"--array={first}") in job.argv


def test_a_worker_is_asked_for_like_the_runtime_job_but_waits_for_that_alone() -> None:
    plan = plan_for(
        "RUNTIME_NODES=2", "RESTARTS=1", "CPU_SBATCH_ARGS=--nice=5 --dependency=afterok:1 -d after:2 --begin=now+1"
    )
    assert plan.runtime
    (workers,) = plan.workers
    alike = {word for word in plan.runtime.argv if re.match(r"--(partition|cpus|mem|time|nodes|ntasks|nice)", word)}
    assert alike <= set(workers.argv)
    assert not any(word.startswith(("--begin", "--signal", "-d", "--mail")) for word in workers.argv)
    assert dependency(workers) == "after:<runtime job id>"


def test_one_allocation_is_one_job_that_outlives_a_node() -> None:
    plan = plan_for("RUNTIME_NODES=3", "RUNTIME_MODE=allocation")
    assert plan.runtime
    assert plan.training
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--no-kill"} <= set(plan.runtime.argv)
    assert (plan.workers, dependency(plan.training)) == ((), "after:<runtime job id>")


def test_a_training_that_joins_brings_no_workers() -> None:
    assert plan_for("RUNTIME_NODES=3", request=ATTACHED).workers == ()


def test_no_gpus_are_no_gres() -> None:
    training = argv(plan_for("GPUS_PER_NODE=0", "TRAINING_COMMAND=true"), "training")
    assert not any(word.startswith("--gres") for word in training)


def test_further_options_of_either_job(tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    conf.write_text(
        'CPU_SBATCH_ARGS=(--comment "two words" --nice=5)\nGPU_SBATCH_ARGS="--switches=1 --comment=\'a b\'"'
    )
    plan = plan_for("TRAINING_COMMAND=true", config=str(conf))
    runtime, training = argv(plan, "runtime"), argv(plan, "training")
    assert runtime[-6:-3] == ("--comment", "two words", "--nice=5")
    assert {"--switches=1", "--comment=a b"} <= set(training)
    assert "--comment" not in training


def test_the_script_is_the_last_word() -> None:
    """What stands behind the script goes to the script, not to sbatch."""
    for plan in GOLDEN_PLANS.values():
        for job in plan.jobs:
            assert job.argv[-1] == str(job.script)
            assert all(word.startswith("--") for word in job.argv[1:-1])


def test_a_jobs_base_with_spaces_and_per_cent_signs() -> None:
    """A per cent sign means something in Slurm's log paths alone: it is doubled there and nowhere else."""
    plan = plan_for("SKYRL_JOBS_BASE=/data/50% of me/%u")
    assert plan.runtime
    assert "--output=/data/50%% of me/%%u/20260304_050607_%j/runtime_%j.out" in plan.runtime.argv
    assert plan.runtime.directory == "/data/50% of me/%u/20260304_050607_%j"
    assert plan.runtime.environment["SKYRL_COORD_DIR"] == "/data/50% of me/%u/20260304_050607_%j"
    assert "'--output=/data/50%% of me/%%u/20260304_050607_%j/runtime_%j.out'" in shown(plan)


KEY = "sk-T0p/S3cret+key=="


def spellings(secret: str) -> set[str]:
    """The secret as it is, and in base64 alone and inside a longer text at each of its three alignments."""
    raw = secret.encode()
    inside = {base64.b64encode(b"x" * offset + raw + b"xxx").decode()[4:-8] for offset in range(3)}
    return {secret, base64.b64encode(raw).decode().rstrip("=")} | inside


@pytest.mark.parametrize("place", ["conf", "environment", "set", "inside"])
def test_a_secret_is_masked_in_every_spelling(place: str, tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    encoded = base64.b64encode(f"user:{KEY}".encode()).decode()
    lines = {
        "conf": f"ALLHANDS_API_KEY='{KEY}'",
        "inside": f"MY_TOKEN='{KEY}'\nNOTE='a {KEY} b'\nAUTH='Basic {encoded}'\nTRAINING_COMMAND=\"run --key '{KEY}'\"",
    }
    conf.write_text(f'source "{ROOT}/slurm/config/dev.conf"\n{lines.get(place, "")}\n')
    overrides = [f"ALLHANDS_API_KEY={KEY}"] if place == "set" else []
    environment = {"ALLHANDS_API_KEY": KEY, "PROXY": f"http://me:{KEY}@proxy"} if place == "environment" else {}
    text = shown(plan_for(*overrides, config=str(conf), environment=environment))
    assert not [spelling for spelling in spellings(KEY) if spelling in text]
    assert "_API_KEY=***" in text or "MY_TOKEN=***" in text


def test_spellings_find_a_key_that_is_not_masked() -> None:
    for offset in range(3):
        text = base64.b64encode(b"y" * offset + KEY.encode() + b"zz").decode()
        assert any(spelling in text for spelling in spellings(KEY))


INSIDE = {
    "SLURM_JOB_ID": "7",
    "SLURM_CPU_BIND": "x",
    "SLURM_NTASKS": "3",
    "SLURMD_NODENAME": "n",
    "SBATCH_MEM_BIND": "local",
    "PMIX_RANK": "0",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "GPU_DEVICE_ORDINAL": "0",
}
OVERRULING = {
    **dict.fromkeys(["SBATCH_WAIT", "SBATCH_ARRAY_INX", "SBATCH_REQUEUE", "SBATCH_GET_USER_ENV"], "1"),
    "SBATCH_GRES": "gpu:1",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_SIGNAL": "B:USR1@60",
    "SQUEUE_PARTITION": "other",
    "SCANCEL_INTERACTIVE": "1",
    "SCONTROL_ALL": "1",
}
ON_PURPOSE = {
    "SLURM_CONF": "/c",
    "SLURM_CONF_SERVER": "ctl1,ctl2",
    "SLURM_CLUSTERS": "a",
    "SBATCH_ACCOUNT": "lab",
    "SBATCH_QOS": "q",
    "SBATCH_PARTITION": "p",
    "SBATCH_RESERVATION": "r",
    "SBATCH_WCKEY": "w",
    "SLURM_RUNTIME_DIR": "/r",
    "MY": "x",
}


def test_inside_an_allocation_what_slurm_set_is_dropped() -> None:
    marks = {"SKYRL_SHELL": "of launch.py shell", "SKYRL_TRAINER": "of a trainer"}
    assert without_slurm({**INSIDE, **ON_PURPOSE, **marks, "SLURM_JWT": "j"}) == {**ON_PURPOSE, "SLURM_JWT": "j"}
    text = shown(plan_for(environment={**INSIDE, **ON_PURPOSE}))
    assert not [name for name in INSIDE if f"\n{name}=" in text]
    assert all(f"\n{name}=" in text for name in ON_PURPOSE)


def test_defaults_that_would_overrule_the_suite_are_dropped_anywhere() -> None:
    assert without_slurm({**OVERRULING, **ON_PURPOSE}) == ON_PURPOSE
    assert not [name for name in OVERRULING if f"\n{name}=" in shown(plan_for(environment=OVERRULING))]


def test_outside_an_allocation_a_choice_of_gpus_is_the_persons() -> None:
    assert without_slurm({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_name_that_the_conf_unsets_does_not_reach_the_jobs(tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    conf.write_text("unset LD_PRELOAD\nMODEL=m\n")
    plan = plan_for("TRAINING_COMMAND=true", config=str(conf), environment={"LD_PRELOAD": "/x.so", "KEPT": "1"})
    assert "LD_PRELOAD" not in plan.inherited
    assert plan.inherited["KEPT"] == "1"


def test_the_file_has_the_last_word_on_the_shells_secrets(tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    environment = {"ALLHANDS_API_KEY": "sk-of-the-shell", "HF_TOKEN": "hf-of-the-shell"}
    lines = {"": "sk-of-the-shell", "unset ALLHANDS_API_KEY": None, 'ALLHANDS_API_KEY=""': None}
    lines |= {"export ALLHANDS_API_KEY=sk-of-the-file": "sk-of-the-file", "GPU_NODES=1": "sk-of-the-shell"}
    for line, key in lines.items():
        conf.write_text(f"{line}\nTRAINING_COMMAND=true\n")
        plan = plan_for(config=str(conf), environment=environment)
        assert plan.secrets.get("ALLHANDS_API_KEY") == key, line
        assert plan.secrets["HF_TOKEN"] == "hf-of-the-shell"
        assert "sk-of-the-shell" not in {*plan.inherited.values(), *plan.environment.values()}
    conf.write_text("unset HF_TOKEN\nTRAINING_COMMAND=true\n")
    assert "HF_TOKEN" not in plan_for(config=str(conf), environment=environment).secrets
    assert "ALLHANDS_API_KEY" not in plan_for("ALLHANDS_API_KEY=", environment=environment).secrets


def test_a_value_of_the_file_replaces_the_shells_even_if_only_one_is_a_secret(tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    conf.write_text('HEADER="Bearer $HF_TOKEN"\nTRAINING_COMMAND=true\n')
    plan = plan_for(config=str(conf), environment={"HF_TOKEN": "hf-0123456789", "HEADER": "none"})
    assert plan.secrets["HEADER"] == "Bearer hf-0123456789"
    assert "HEADER" not in {**plan.inherited, **plan.environment}


def test_slurms_own_token_reaches_sbatch_and_is_not_shown() -> None:
    plan = plan_for("VERL_NOTE=jwt-0123456789", environment={"SLURM_JWT": "jwt-0123456789"})
    assert plan.inherited["SLURM_JWT"] == "jwt-0123456789"
    assert "SLURM_JWT" not in plan.secrets
    text = shown(plan)
    assert "jwt-0123456789" not in text
    assert "\nSLURM_JWT='***'" in text or "\nSLURM_JWT=***" in text


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (("GPU_NODES=2",), "uv run --frozen --extra verl python"),
        (("GPU_NODES=2", "TRAINING_COMMAND=x", "RAY_CLUSTER=on"), "python3"),
        (("GPU_NODES=1",), ""),
        (("GPU_NODES=2", "TRAINING_COMMAND=x"), ""),
        (("GPU_NODES=2", "SKYRL_BACKEND=local"), ""),
    ],
)
def test_the_steps_of_ray_are_shown_where_it_is_started(words: tuple[str, ...], starts: str) -> None:
    plan = plan_for(*words)
    text = shown(plan)
    assert (f"# {starts} -m ray.scripts.scripts start --block …\nsrun " in text) == bool(starts)
    assert ("slurm.lib.ray_node" in text) == bool(starts)
    cwd = trainer_of(plan.settings, CoordinationDir(Path(plan.directory))).cwd
    told = node_step(plan.settings, "<node>", cwd, PYTHON, "<ports, folder, and where the head is>")
    assert (" \\\n    ".join(map(shlex.quote, told)) in text) == bool(starts), "by the function that the job calls"


@pytest.mark.parametrize("request_", [Request(), Request(training=False)])
def test_a_local_plan_shows_a_local_runs_ids(request_: Request) -> None:
    plan = plan_for(config="local", request=request_)
    text = shown(plan)
    assert "%j" not in text and "job id>" not in text
    assert "run directory: /home/me/.skyrl_jobs/20260304_050607_local<pid>.0\n" in text
    assert "/20260304_050607_local<pid>.0/code/slurm/jobs/runtime_server.py" in text
    assert ("SKYRL_RUNTIME_JOB_ID='local<pid>.0'" in text) == request_.training
    assert plan.local_ids(7) == dict(zip([job.kind for job in plan.jobs], ["local7.0", "local7.1"], strict=False))


# --- what is shown is what is done ------------------------------------------------------------------------------------


def command_lines(text: str) -> list[list[str]]:
    """The command lines of a dry run, read as a shell reads them."""
    part = text.partition("# environment of the jobs")[0]
    blocks = part.split("\n\n")
    commands = (block.partition("\n")[2].replace("\\\n", " ") for block in blocks if block.strip())
    return [shlex.split(command) for command in commands]


def environment_of(text: str) -> dict[str, str]:
    """The environment that a dry run shows, read as a shell reads it; secrets come by a file."""
    part = text.partition("# environment of the jobs")[2].partition("\n# the trainer")[0]
    words = shlex.split("#" + part, comments=True)
    shown_values = dict(word.partition("=")[::2] for word in words)
    return {name: value for name, value in shown_values.items() if value != "***"}


awkward = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
folders = st.text(st.sampled_from("ab %'\"$\\&;é*~<>"), min_size=1, max_size=10).filter(lambda name: name.strip())


def with_shown_ids(words: list[str]) -> list[str]:
    """A command as it is shown, where nobody knows yet what the mark of its submission will be."""
    return [re.sub(r"^--comment=skyrl:\S+$", "--comment=skyrl:<mark>", word) for word in words]


# Without shrinking: an example is a whole submission, and a minute of smaller ones tells nothing more.
@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(folder=folders, option=awkward, value=awkward)
def test_submitting_runs_what_was_shown(slurm: FakeSlurm, folder: str, option: str, value: str) -> None:
    """Word for word, environment included, whatever stands in paths, options and variables."""
    slurm.forget()
    shutil.rmtree(slurm.jobs, ignore_errors=True)
    conf = slurm.folder / "mine.conf"
    conf.write_bytes(f"CPU_SBATCH_ARGS=({shlex.quote('--comment=' + option)})\n".encode())
    environment = {"PATH": slurm.path, "AWKWARD": value, "SLURM_CONF": "/nowhere", "A_TOKEN": "t-0123456789"}
    words = [f"SKYRL_JOBS_BASE={slurm.jobs / folder}", "TRAINING_COMMAND=echo 'a  b' \"$HOME\""]
    plan = plan_for(*words, config=str(conf), environment=environment)
    text = shown(plan).replace("<runtime job id>", "101").replace("<training job id>", "102")
    done = submit(plan, SignalNotes(), lambda: Provenance(GitState(None, None)), ROOT)
    assert [with_shown_ids(call.words) for call in slurm.calls] == command_lines(text)
    assert text.endswith(f"run directory: {done.directory.path}\n")
    shown_values = environment_of(text)
    assert {*plan.inherited, *plan.environment, "SKYRL_RUNTIME_JOB_ID"} <= shown_values.keys()
    runtime, training = (call.environment for call in slurm.of("sbatch"))
    assert {name: training.get(name) for name in shown_values} == shown_values
    assert runtime.keys() == training.keys() - {"SKYRL_RUNTIME_JOB_ID"}
    assert {name: runtime[name].replace("%j", "101") for name in OWN} == {name: training[name] for name in OWN}
    assert {name: runtime[name] for name in runtime.keys() - OWN} == {
        name: training[name] for name in runtime.keys() - OWN
    }
    assert "t-0123456789" not in {*runtime.values(), *training.values()}


OWN = {"SKYRL_COORD_DIR", "SKYRL_CODE_DIR"}


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def test_what_the_jobs_are_is_no_generated_script() -> None:
    for plan in GOLDEN_PLANS.values():
        for job in plan.jobs:
            assert (ROOT / job.script.relative_to(CHECKOUT)).is_file()
            assert os.access(ROOT / job.script.relative_to(CHECKOUT), os.X_OK)
    assert sys.executable not in shown(GOLDEN_PLANS["dev"])


def test_jobs_of_another_cluster_are_released_and_cancelled_there() -> None:
    assert without_slurm({"SBATCH_CLUSTERS": "far"}) == {"SLURM_CLUSTERS": "far"}
    assert without_slurm({"SBATCH_CLUSTERS": "far", "SLURM_CLUSTERS": "near"}) == {"SLURM_CLUSTERS": "near"}
