"""Whole runs on a real Slurm with real Podman, as an ordinary user."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import lying_image
from tests.runs import Run, User, body_pid, launch, launch_argv, parse_report, podman_ps, squeue, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 300"


@pytest.fixture(autouse=True)
def clean(user: User, nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


def training(user: User, checkout: Path, jobs_base: Path, *settings: str) -> Run:
    """A run whose trainer has started and goes on."""
    run = launch(user, checkout, jobs_base, TRAIN_LONG, *settings)
    run.wait_for_text("training", "trainer started")
    return run


def trainer_pid(run: Run) -> int | None:
    marker = f"SKYRL_COORD_DIR={run.directory}".encode()
    for entry in Path("/proc").iterdir():
        try:
            sleeps = entry.name.isdigit() and (entry / "cmdline").read_bytes() == b"sleep\x00300\x00"
            if sleeps and marker in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    return None


def test_a_run_to_completion_with_the_rl_loop(user: User, checkout: Path, jobs_base: Path) -> None:
    command = 'TRAINING_COMMAND="$SKYRL_PYTHON" -m shell_rl.train --sandboxes 4'
    run = launch(user, checkout, jobs_base, command)
    until("ready", lambda: run.text("runtime_ready.flag"), 30)
    containers: set[str] = set()
    uid = run.directory.stat().st_uid
    podman = Path(f"/tmp/skyrl-{uid}-{run.jobs['runtime']}/podman.sock")

    def seen() -> bool:
        containers.update(podman_ps(podman))
        return run.is_over("training")

    until("end of the training", seen, 240)
    run.wait_over(seconds=30)
    assert run.completion["exit_code"] == 0, run.log("training")[-3000:]
    assert len(containers) >= 4
    assert run.node("runtime").startswith("cpu")
    assert run.node("training").startswith("gpu")
    summary = json.loads(next(run.directory.rglob("summary.json")).read_text())
    assert summary["trained_reward"] >= 3 * summary["untrained_reward"]
    names = {path.name for path in run.directory.iterdir()}
    logs = {f"{kind}_{run.jobs[kind]}.{suffix}" for kind in run.jobs for suffix in ("out", "err")}
    assert names >= logs | {
        "runtime_url.txt",
        "runtime_api_key.txt",
        "runtime_ready.flag",
        "training_complete.flag",
        "dev.conf",
        "run.json",
    }
    assert stat.S_IMODE(run.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((run.directory / "runtime_api_key.txt").stat().st_mode) == 0o600


def test_sandboxes_that_always_answer_exit_0_are_no_success(user: User, checkout: Path, jobs_base: Path) -> None:
    """The rewards come from the sandboxes: with ones that lie the same loop does not learn, and says so."""
    archive = jobs_base / "liar.tar"
    lying_image.write(archive)
    archive.chmod(0o644)
    command = 'TRAINING_COMMAND="$SKYRL_PYTHON" -m shell_rl.train --sandboxes 2 --steps 4'
    image = (f"CONTAINER_IMAGE={lying_image.NAME}", f"IMAGE_ARCHIVE={archive}")
    run = launch(user, checkout, jobs_base, command, *image)
    run.wait_over(seconds=120)
    summary = json.loads(next(run.directory.rglob("summary.json")).read_text())
    assert summary["commands_run"] > 100
    assert not summary["learned"]
    assert run.completion["exit_code"] == 3
    assert "did not learn" in run.log("training", "err")


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_a_failing_trainer_ends_both_jobs(user: User, checkout: Path, jobs_base: Path, command: str, code: int) -> None:
    run = launch(user, checkout, jobs_base, f"TRAINING_COMMAND={command}")
    until("the completion flag", lambda: run.completion, 30)
    run.wait_over(seconds=15)
    assert run.completion["exit_code"] == code
    assert run.exit_code("training") == str(code)
    assert f"training job {run.jobs['training']} is complete" in run.log("runtime")


def test_a_trainer_killed_from_outside_ends_both_jobs(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    until("the trainer's own program", lambda: trainer_pid(run), 10)
    os.kill(trainer_pid(run) or 0, signal.SIGKILL)
    run.wait_over(seconds=15)
    assert run.completion["exit_code"] == 137
    assert "SIGKILL" in run.completion["reason"]


def test_a_cancelled_training_ends_the_runtime(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    user.run(["scancel", run.jobs["training"]])
    run.wait_over(seconds=15)
    assert run.completion["exit_code"] == 143
    assert "SIGTERM" in run.log("runtime")


def test_a_killed_training_body_ends_the_runtime(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    os.kill(body_pid(run, "training"), signal.SIGKILL)
    run.wait_over(seconds=15)
    assert f"the training job {run.jobs['training']} is gone" in run.log("runtime")


def test_a_cancelled_runtime_ends_the_training(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    user.run(["scancel", run.jobs["runtime"]])
    run.wait_over(seconds=15)
    assert f"the runtime job {run.jobs['runtime']} failed: ended by" in run.log("training")
    assert run.completion["exit_code"] == 69


def test_a_killed_runtime_body_ends_the_training(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    run.wait_over(seconds=15)
    assert f"the runtime job {run.jobs['runtime']} is gone" in run.log("training")


def test_a_runtime_that_cannot_start_ends_the_training(user: User, checkout: Path, jobs_base: Path) -> None:
    options = ("--no-check=images",)  # as where the login node sees what the CPU node does not
    run = launch(user, checkout, jobs_base, "IMAGE_ARCHIVE=/nowhere/image.tar", TRAIN_LONG, options=options)
    until("the runtime's end", lambda: run.is_over("runtime"), 30)
    run.wait_over(seconds=15)
    assert "IMAGE_ARCHIVE=/nowhere/image.tar is not a file" in run.log("runtime", "err")
    started = "IMAGE_ARCHIVE=/nowhere/image.tar is not a file" in run.log("training", "err")
    cancelled = f"cancelled the pending training job {run.jobs['training']}" in run.log("runtime")
    assert started or cancelled


def test_two_launches_in_the_same_second_on_one_node(user: User, checkout: Path, jobs_base: Path) -> None:
    argv = launch_argv(
        checkout, f"SKYRL_JOBS_BASE={jobs_base}", "TRAINING_COMMAND=sleep 2", "CPU_SBATCH_ARGS=--nodelist=cpu-a"
    )
    launcher = " ".join(f"'{word}'" for word in argv)
    done = user.run(["bash", "-c", f"{launcher} > a & {launcher} > b & wait; cat a; echo ====; cat b"], cwd=jobs_base)
    runs = [parse_report(user, part) for part in done.stdout.split("====")]
    for run in runs:
        run.wait_over(seconds=60)
        assert run.completion["exit_code"] == 0, run.log("training")
    assert {run.node("runtime") for run in runs} == {"cpu-a"}
    assert len({run.text("runtime_url.txt") for run in runs}) == 2
    assert len({run.text("runtime_api_key.txt") for run in runs}) == 2


def test_launching_from_inside_an_allocation(user: User, checkout: Path, jobs_base: Path) -> None:
    argv = launch_argv(checkout, f"SKYRL_JOBS_BASE={jobs_base}", "TRAINING_COMMAND=env > env.txt; sleep 1")
    allocation = ["salloc", "-Q", "-p", "gpu_test", "--gres=gpu:2", "-c", "3", "-N1"]
    done = user.run([*allocation, *argv], timeout=60)
    assert done.returncode == 0, done.stderr
    run = parse_report(user, done.stdout)
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 0
    environment = run.text("env.txt").splitlines()
    assert "SLURM_CPUS_PER_TASK=2" in environment
    assert f"SLURM_JOB_ID={run.jobs['training']}" in environment


def test_paths_with_a_space(user: User, checkout: Path, jobs_base: Path) -> None:
    spaced = user.home / "a folder"
    user.run(["bash", "-c", f"rm -rf '{spaced}' && mkdir '{spaced}' && cp -a '{checkout}' '{spaced}/SkyRL'"])
    run = launch(user, spaced / "SkyRL", jobs_base / "my jobs", "TRAINING_COMMAND=pwd")
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 0, run.log("training")
    assert str(jobs_base / "my jobs") in run.log("training")


def submit(user: User, *argv: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = user.run(["sbatch", "--parsable", *argv], cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_direct_sbatch_of_both_job_files(user: User, checkout: Path, jobs_base: Path) -> None:
    """From another folder with nothing exported; the training joins the runtime by --coord-dir."""
    image = "CONTAINER_IMAGE=localhost/skyrl-busybox:latest"
    elsewhere = jobs_base
    jobs = checkout / "slurm" / "jobs"
    user.run(["rm", "-rf", str(user.home / ".skyrl_jobs")])  # a new cluster counts its jobs from 1 again
    runtime = submit(user, str(jobs / "runtime_server.py"), "--set", image, cwd=elsewhere)

    def directories() -> list[Path]:
        return list((user.home / ".skyrl_jobs").glob(f"*_{runtime}"))

    shown = user.run(["scontrol", "show", "job", runtime]).stdout
    assert "JobName=skyrl-runtime" in shown, "the #SBATCH lines count"
    assert "Requeue=0" in shown
    until("the runtime's directory", directories, 30)
    directory = directories()[0]
    until("ready", lambda: (directory / "runtime_ready.flag").exists(), 30)
    assert f"coordination directory: {directory}" in (elsewhere / f"slurm-{runtime}.out").read_text()
    options = ["-p", "gpu_test", "--gres=gpu:1"]
    words = ["--coord-dir", str(directory), "--set", "TRAINING_COMMAND=echo hello from the trainer"]
    trained = submit(user, *options, str(jobs / "verl_training.py"), *words, cwd=elsewhere)
    run = Run(user, directory, {"runtime": runtime, "training": trained})
    run.wait_over(seconds=60)
    assert "hello from the trainer" in run.log("training")
    assert run.completion["exit_code"] == 0
    assert run.exit_code("runtime") == "0"


def test_direct_training_with_url_and_key_only(user: User, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, options=("--runtime-only",))
    until("ready", lambda: run.text("runtime_ready.flag"), 30)
    environment = {
        "SKYRL_JOBS_BASE": str(jobs_base),
        "SANDBOX_REMOTE_RUNTIME_API_URL": run.text("runtime_url.txt").strip(),
        "ALLHANDS_API_KEY": run.text("runtime_api_key.txt").strip(),
        "TRAINING_COMMAND": "echo key length ${#ALLHANDS_API_KEY}",
    }
    script = checkout / "slurm" / "jobs" / "verl_training.py"
    trained = submit(user, "-p", "gpu_test", str(script), cwd=jobs_base, env=environment)
    log = jobs_base / f"slurm-{trained}.out"
    until("its log", lambda: log.exists() and "key length" in log.read_text(), 30)
    user.run(["touch", str(run.directory / "training_complete.flag")])
    run.wait_over(seconds=15)
    assert "set by hand" in run.log("runtime")


def test_joining_a_runtime_that_was_launched_alone(user: User, checkout: Path, jobs_base: Path) -> None:
    runtime = launch(user, checkout, jobs_base, options=("--runtime-only",))
    joined = launch(
        user,
        checkout,
        jobs_base,
        "TRAINING_COMMAND=true",
        options=("--skip-runtime",),
        env={"SKYRL_COORD_DIR": str(runtime.directory)},
    )
    assert joined.directory == runtime.directory
    run = Run(user, runtime.directory, {**runtime.jobs, **joined.jobs})
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 0


def test_a_refused_training_job_takes_the_runtime_back(user: User, checkout: Path, jobs_base: Path) -> None:
    words = (f"SKYRL_JOBS_BASE={jobs_base}", "GPU_PARTITION=nonesuch", TRAIN_LONG)
    argv = launch_argv(checkout, *words, options=("--no-check",))  # which would find that before
    done = user.run(argv)
    assert done.returncode == 73
    assert "invalid partition" in done.stderr
    assert "cancelled" in done.stderr
    assert not list(jobs_base.glob("2*"))
    assert squeue(user, "-u", str(user.home.name)).strip() == ""


SCRIPT = """set -euo pipefail
{load}
log_info "from bash"
dir=$(create_job_coordination_dir bash1)
write_runtime_url "$dir" http://h:1
signal_runtime_ready "$dir"
url=$(wait_for_runtime_url "$dir" 5)
[ "$url" = http://h:1 ] || exit 9
signal_training_complete "$dir"
wait_for_training_complete "$dir" 5 >/dev/null
load_config dev
printf '%s\\n' "$GPU_PARTITION" "$(get_first_node)" "$(get_node_count)"
printf 'A="x y"\\nB=<REPLACE>\\n' > "$dir/e"
load_env_file "$dir/e"
[ "$A" = "x y" ] && [ -z "${{B:-}}" ] || exit 8
is_slurm_job
setup_graceful_shutdown cleanup_isolated_podman_storage
setup_isolated_podman_storage
podman images >/dev/null
echo "graphroot $(podman info --format '{{{{.Store.GraphRoot}}}}')"
cleanup_isolated_podman_storage
"""


@pytest.mark.parametrize("way", ["shell-functions", "shim"])
def test_a_bash_script_with_the_helpers(user: User, checkout: Path, jobs_base: Path, way: str) -> None:
    common = checkout / "slurm" / "lib" / "common"
    load = f"source '{common}.sh'" if way == "shim" else f"eval \"$(python3 '{common}.py' shell-functions)\""
    script = jobs_base / "old.sh"
    script.write_text("#!/bin/bash\n" + SCRIPT.format(load=load))
    job = submit(user, str(script), cwd=jobs_base, env={"SKYRL_JOBS_BASE": str(jobs_base)})
    Run(user, jobs_base, {"script": job}).wait_over(seconds=60)
    output = (jobs_base / f"slurm-{job}.out").read_text()
    assert "[INFO] from bash" in output
    values = [line for line in output.splitlines() if not line.startswith(("20", "time="))]
    assert values[0] == "gpu_test", output
    assert values[1].startswith("cpu")
    assert values[2] == "1"
    assert values[3].startswith(f"graphroot /tmp/skyrl-{script.parent.stat().st_uid}-{job}/")


def test_a_cancelled_runtime_with_many_sandboxes_is_gone_within_kill_wait(
    user: User, checkout: Path, jobs_base: Path, nothing_left: Callable[[], None]
) -> None:
    """KillWait is 5 s on this cluster; 24 sandboxes one after another would take longer."""
    trainer = """TRAINING_COMMAND="$SKYRL_PYTHON" - <<'END'
import json, os, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
url, key = os.environ["SANDBOX_REMOTE_RUNTIME_API_URL"], os.environ["ALLHANDS_API_KEY"]
def start(number):
    body = {"image": os.environ["CONTAINER_IMAGE"], "session_id": f"s{number}", "working_dir": "/",
            "command": ["/bin/sh", "-c", "mkdir -p /w; echo ok > /w/health; exec httpd -f -p 60000 -h /w"]}
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    request = urllib.request.Request(url + "/start", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60).status
with ThreadPoolExecutor(4) as pool:
    print("started", sum(200 <= status < 300 for status in pool.map(start, range(24))), flush=True)
time.sleep(300)
END"""
    size = ("RUNTIME_MEMORY=32G",)
    run = launch(
        user, checkout, jobs_base, trainer, *size, "CPUS_FOR_RUNTIME=24", "CPUS_PER_WORKER=0.5", "MAX_PARALLEL_AGENTS="
    )
    run.wait_for_text("training", "started 24", 90)
    user.run(["scancel", run.jobs["runtime"]])
    run.wait_over(seconds=15)
    assert "runtime job" in run.log("runtime", "err")
    assert f"runtime job {run.jobs['runtime']} ends: ended by" in run.log("runtime"), "Slurm's KILL came first"
    nothing_left()


def test_a_users_own_remote_runtime_takes_the_place_of_ours(user: User, checkout: Path, jobs_base: Path) -> None:
    """SLURM_RUNTIME_DIR: another checkout's server with its own .venv; heartbeats then go by counters."""
    own = jobs_base / "slurm-remote-runtime"
    script = f"mkdir '{own}' && cp -a '{checkout}/slurm_runtime' '{own}/' && ln -s '{checkout}/.venv' '{own}/.venv'"
    user.run(
        ["bash", "-c", f"{script} && echo 'print(\"another server\", flush=True)' >> '{own}/slurm_runtime/__init__.py'"]
    )
    run = training(user, checkout, jobs_base, f"SLURM_RUNTIME_DIR={own}")
    assert "another server" in run.log("runtime")
    until("heartbeats", lambda: len(list(run.directory.glob("heartbeat_*"))) == 2, 10)
    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    run.wait_over(seconds=20)
    assert f"the runtime job {run.jobs['runtime']} is gone" in run.log("training")


def test_a_relaunch_in_a_used_directory_ignores_old_flags(user: User, checkout: Path, jobs_base: Path) -> None:
    """Direct sbatch into a directory that holds the flags of an ended attempt, a touched one among them."""
    run = launch(user, checkout, jobs_base, "TRAINING_COMMAND=true")
    run.wait_over(seconds=60)
    image = "CONTAINER_IMAGE=localhost/skyrl-busybox:latest"
    script = checkout / "slurm" / "jobs" / "runtime_server.py"
    environment = {"SKYRL_JOBS_BASE": str(jobs_base)}
    second = submit(
        user, str(script), "--coord-dir", str(run.directory), "--set", image, cwd=jobs_base, env=environment
    )
    again = Run(user, run.directory, {"runtime": second})
    until("ready again", lambda: f'"job_id": "{second}"' in run.text("runtime_ready.flag"), 30)
    again.wait_for_text("runtime", "API server ready")
    assert not again.is_over("runtime"), "the old completion flag is not this attempt's"
    user.run(["touch", str(run.directory / "training_complete.flag")])
    assert not again.is_over("runtime"), "touching changes no word that another attempt wrote"
    user.run(["bash", "-c", f": > '{run.directory}/training_complete.flag'"])
    again.wait_over(seconds=15)
    assert "set by hand" in again.log("runtime")


def test_a_direct_training_that_fails_early_ends_the_runtime(user: User, checkout: Path, jobs_base: Path) -> None:
    """Without skyrl-agent it ends before it has looked for the server; the runtime must not wait for a minute."""
    runtime = launch(user, checkout, jobs_base, options=("--runtime-only",))
    until("ready", lambda: runtime.text("runtime_ready.flag"), 30)
    script = checkout / "slurm" / "jobs" / "verl_training.py"
    words = ["--config", "dev", "--coord-dir", str(runtime.directory)]
    trained = submit(user, "-p", "gpu_test", str(script), *words, cwd=jobs_base)
    run = Run(user, runtime.directory, {**runtime.jobs, "training": trained})
    run.wait_over(seconds=20)
    assert run.completion["exit_code"] == 71
    assert "(skyrl-agent) is missing" in run.completion["reason"]


TRAPPING = """TRAINING_COMMAND=trap 'echo got TERM; n=$((n + 1))' TERM; n=0; echo trainer started
for i in $(seq 300); do sleep 0.1 & wait $!; [ $n = 0 ] || break; done; sleep 1; echo "signals: $n"; exit 0"""


@pytest.mark.parametrize("how", ["scancel", "scancel --batch --signal=TERM"])
def test_the_trainer_gets_one_term_and_time(user: User, checkout: Path, jobs_base: Path, how: str) -> None:
    """Whether Slurm signalled every process or the body alone; a second TERM would be a second trap."""
    run = launch(user, checkout, jobs_base, TRAPPING)
    run.wait_for_text("training", "trainer started")
    user.run([*how.split(), run.jobs["training"]])
    run.wait_over(seconds=15)
    assert "signals: 1" in run.log("training"), run.log("training")
    assert run.completion["exit_code"] == 143


def test_daemons_of_the_trainer_end_with_it(
    user: User, checkout: Path, jobs_base: Path, nothing_left: Callable[[], None]
) -> None:
    command = "TRAINING_COMMAND=setsid sleep 333 & setsid setsid sleep 333 & sleep 0.3; exit 3"
    run = launch(user, checkout, jobs_base, command)
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 3
    nothing_left()


def test_a_training_body_that_cannot_begin_says_so(user: User, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, TRAIN_LONG, "HF_TOKEN=hf_secret_value", "GPU_SBATCH_ARGS=--begin=now+600")
    until("ready", lambda: run.text("runtime_ready.flag"), 60)
    (run.directory / "secrets.json").write_text("{")
    assert run.state("training") == "PENDING"
    run.start_now("training")
    run.wait_over(seconds=60)
    assert "cannot read" in run.completion["reason"]
    assert f"training job {run.jobs['training']} is complete" in run.log("runtime")


def test_slurms_filters_of_a_person_do_not_end_a_run(user: User, checkout: Path, jobs_base: Path) -> None:
    """SQUEUE_PARTITION hides the runtime job from squeue; the run goes past the first question to Slurm."""
    command = "TRAINING_COMMAND=echo trainer started; sleep 65"
    run = launch(user, checkout, jobs_base, command, env={"SQUEUE_PARTITION": "gpu_test"})
    run.wait_over(seconds=110)
    assert run.completion["exit_code"] == 0, run.completion
