"""``launch.py report`` of runs on a real Slurm, beside what Slurm, the trainer and the sandboxes' client know."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.reports import MARK
from tests import cluster as test_cluster
from tests.cluster.accounting import accounting, missing
from tests.conftest import NothingLeft, OrdinaryUser, fresh_folder, leaving_nothing
from tests.runs import STARTS_SANDBOXES, Run, answers, body_pid, launch, scontrol_job, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "GPUS_PER_NODE=0")
WAITED_S, STEPS, STEP_S = 15, 4, 2
TRAINER = f"""{STARTS_SANDBOXES}
until [ -e go ]; do sleep 0.2; done
for step in $(seq {STEPS}); do
    sleep {STEP_S}; echo "$(date '+%F %T') [INFO] Step $step/{STEPS}: mean reward 0.$step"
done
until [ -e end ]; do sleep 0.2; done
echo "ValueError: the model is too large" >&2
exit 3"""


@dataclass
class Seen:
    """A run, what Slurm said of its jobs while it knew them, and the reports of it."""

    user: OrdinaryUser
    checkout: Path
    run: Run
    running: dict[str, Any]
    slurm: dict[str, dict[str, float]]

    def report(self, *words: str, user: OrdinaryUser | None = None) -> subprocess.CompletedProcess[str]:
        return reported(user or self.user, self.checkout, str(self.run.directory), *words)


def reported(user: OrdinaryUser, checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return user.run([str(checkout / "slurm" / "launch.py"), "report", *words], timeout=120)


def told_of(user: OrdinaryUser, checkout: Path, run: Run) -> dict[str, Any]:
    done = reported(user, checkout, str(run.directory), "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def slurms_times(run: Run) -> dict[str, dict[str, float]]:
    """When each job was submitted, started and ended, by Slurm's word."""
    found = {}
    for kind, job_id in run.jobs.items():
        times = re.findall(r"\b(SubmitTime|StartTime|EndTime)=(\d+)", scontrol_job(run.user, job_id))
        found[kind] = {name: float(moment) for name, moment in times}
    return found


@pytest.fixture(scope="module")
def seen(user: OrdinaryUser, checkout: Path) -> Iterator[Seen]:
    """A run whose training waits in the queue, starts two sandboxes, makes four steps, and fails."""
    with leaving_nothing(user):
        later = f"GPU_SBATCH_ARGS=--begin=now+{WAITED_S}"
        run = launch(user, checkout, fresh_folder(user, "report"), *SMALL, later, TRAINER)
        until("its sandboxes", lambda: run.text("sandboxes.json"), 120)
        urls = [sandbox["url"] for sandbox in json.loads(run.text("sandboxes.json"))]
        until("their answers", lambda: all(answers(url) for url in urls), 60)
        (run.directory / "go").touch()
        run.wait_for_text("training", f"Step {STEPS}/{STEPS}", 90)
        looks: list[dict[str, Any]] = []

        def is_heard() -> bool:  # a busy controller may be silent for a while
            looks.append(told_of(user, checkout, run))
            return bool(looks[-1]["slurm_answers"])

        until("Slurm's word", is_heard, 120, every_s=1)
        (run.directory / "end").touch()
        run.wait_over(seconds=90)
        yield Seen(user, checkout, run, looks[-1], slurms_times(run))


def job(told: dict[str, Any], kind: str) -> dict[str, Any]:
    (attempt,) = told["attempts"]
    return dict(next(one for one in attempt["jobs"] if one["kind"] == kind))


def phases(told: dict[str, Any], kind: str) -> dict[str, float | None]:
    found = job(told, kind)["phases"]
    return {one["name"]: None if one["end"] is None else one["end"] - one["begin"] for one in found}


def test_a_run_that_trains(seen: Seen) -> None:
    told = seen.running
    assert told["run"]["state"] == "running"
    assert [one["phases"][-1]["name"] for one in told["attempts"][0]["jobs"]] == ["training", "serving"]
    assert phases(told, "training")["training"] is None
    assert [step["step"] for step in told["attempts"][0]["steps"]] == list(range(1, STEPS + 1))
    assert told["finished"] is None


@pytest.mark.parametrize("kind", ["runtime", "training"])
def test_times_are_those_of_slurm(kind: str, seen: Seen) -> None:
    """Slurm's are in whole seconds; the record is written between the submission and the start."""
    found, slurm = job(told_of(seen.user, seen.checkout, seen.run), kind), seen.slurm[kind]
    assert slurm["SubmitTime"] - 1 <= found["submitted"] <= slurm["StartTime"] + 1
    assert slurm["StartTime"] - 1 <= found["started"] <= slurm["StartTime"] + 60
    assert found["started"] <= found["ended"] <= slurm["EndTime"] + 1
    assert found["queue_s"] == found["started"] - found["submitted"]
    assert found["node"] == seen.run.node(kind)
    if kind == "training":
        assert found["queue_s"] >= WAITED_S - 10


def test_steps_are_those_of_the_trainer(seen: Seen) -> None:
    told = told_of(seen.user, seen.checkout, seen.run)
    assert (told["run"]["state"], told["run"]["exit_code"]) == ("failed", 3)
    steps = told["attempts"][0]["steps"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["reward"] for step in steps] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert steps[0]["seconds"] is None, "nothing says when it began"
    assert all(step["seconds"] >= STEP_S - 1 for step in steps[1:])
    stamps = re.findall(r"^(\S+ \S+) \[INFO\] Step", seen.run.log("training"), re.MULTILINE)
    assert [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(step["ended"])) for step in steps] == stamps
    assert told["step_times"]["count"] == STEPS - 1
    assert job(told, "training")["last_error"] == "ValueError: the model is too large"


def test_phases_follow_each_other_from_the_submission_to_the_end(seen: Seen) -> None:
    told = told_of(seen.user, seen.checkout, seen.run)
    for kind, wanted in (
        ("training", {"in the queue", "checking its node", "trainer started", "training"}),
        ("runtime", {"in the queue", "making its Podman storage", "serving", "stopping"}),
    ):
        found = job(told, kind)["phases"]
        assert wanted <= {one["name"] for one in found}
        assert all(one["end"] == after["begin"] for one, after in pairwise(found))
        assert found[0]["begin"] == job(told, kind)["submitted"]
        assert found[-1]["end"] == job(told, kind)["ended"]
    steps = told["attempts"][0]["steps"]
    assert told["first_step"] <= steps[0]["ended"] <= told["finished"]


def test_sandboxes_are_those_that_were_started(seen: Seen) -> None:
    found = job(told_of(seen.user, seen.checkout, seen.run), "runtime")["sandboxes"]
    assert (found["starts"]["asked"], found["starts"]["succeeded"], found["starts"]["failed"]) == (2, 2, {})
    assert found["start_seconds"]["count"] == 2
    assert 0 < found["start_seconds"]["p50"] <= found["start_seconds"]["max"] < 120
    assert (found["peak_living"], found["slots"]) == (2, 2)


def test_use_is_that_of_the_jobs_own_samples(seen: Seen) -> None:
    told = told_of(seen.user, seen.checkout, seen.run)
    for kind, cpus in (("runtime", 2), ("training", None)):
        own = [usage for usage in job(told, kind)["use"] if usage["source"] == "samples"]
        assert own, "each job takes a sample as it starts"
        assert own[0]["memory_peak_bytes"] > 1e6
        assert cpus is None or own[0]["cpus"] == cpus


def test_the_words_and_the_page(seen: Seen) -> None:
    text = seen.report().stdout
    assert re.search(r"^\S+  failed  dev\n", text), text
    assert re.search(r"\n  ended +exit code 3: the trainer failed with exit code 3\n", text), text
    assert re.search(r"\n  training says ValueError: the model is too large\n", text), text
    assert re.search(r"\n  starts +2 asked for, 2 succeeded, 0 failed\n", text), text
    assert re.search(r"\n  finished +4 of 4\n", text), text
    target = seen.user.home / "report.html"
    for _again in range(2):
        done = seen.report("--html", str(target))
        assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    page = target.read_text()
    assert MARK in page and page.count("<svg") >= 4
    assert "ValueError: the model is too large" in page
    key = (seen.run.directory / "runtime_api_key.txt").read_text().strip()
    assert len(key) > 10 and key not in page
    assert key not in text and key not in json.dumps(seen.running)


def test_a_file_that_the_user_may_not_write(seen: Seen) -> None:
    done = seen.report("--html", "/etc/report.html")
    assert done.returncode == 71
    assert done.stderr.count("\n") == 1 and "cannot write /etc/report.html: Permission denied" in done.stderr


def test_another_users_run(seen: Seen, other_user: OrdinaryUser) -> None:
    done = seen.report(user=other_user)
    assert done.returncode == 2
    assert f"cannot be read: it is {seen.user.name}'s" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_silent_controller_takes_nothing_from_a_run_that_ended(seen: Seen) -> None:
    before = told_of(seen.user, seen.checkout, seen.run)
    with test_cluster.silent_controller():
        after = told_of(seen.user, seen.checkout, seen.run)
    for name in ("launched", "finished", "first_step", "step_times", "rewards"):
        assert after[name] == before[name]
    assert [one["phases"] for one in after["attempts"][0]["jobs"]] == [
        one["phases"] for one in before["attempts"][0]["jobs"]
    ]


def test_a_run_in_the_queue_and_one_that_never_began(user: OrdinaryUser, checkout: Path) -> None:
    with leaving_nothing(user):
        base = fresh_folder(user, "report-queue")
        run = launch(user, checkout, base, *SMALL, "CPU_SBATCH_ARGS=--begin=now+3600", "TRAINING_COMMAND=true")
        told = told_of(user, checkout, run)
        assert told["run"]["state"] == "pending"
        for kind in ("runtime", "training"):
            assert list(phases(told, kind).values()) == [None]
            assert 0 <= job(told, kind)["queue_s"] < 120
        assert "so far  in the queue" in reported(user, checkout, str(run.directory)).stdout
        page = reported(user, checkout, str(run.directory), "--html", "-").stdout
        assert "The trainer has told no reward." in page
        user.run([str(checkout / "slurm" / "launch.py"), "cancel", str(run.directory)], timeout=60)
        run.wait_over(seconds=60)
        told = told_of(user, checkout, run)
        assert (told["run"]["state"], told["first_step"]) == ("cancelled", None)
        assert "cancelled" in reported(user, checkout, str(run.directory)).stdout.splitlines()[0]


VERLS_STEPS = """TRAINING_COMMAND=line() {
    sleep 1; echo "(TaskRunner pid=1) step:$1 - critic/score/mean:0.$1 - timing_s/gen:0.5 - timing_s/step:1.0"
}
[ ! -e "$CHECKPOINT_DIR/saved" ] || { line 2; line 3; exit 0; }
line 1; line 2; echo saved > "$CHECKPOINT_DIR/saved"; sleep 600"""


def test_both_attempts_of_a_run_that_was_interrupted(user: OrdinaryUser, checkout: Path) -> None:
    with leaving_nothing(user):
        run = launch(user, checkout, fresh_folder(user, "report-twice"), *SMALL, "RESTARTS=1", VERLS_STEPS)
        run.wait_for_text("training", "step:2 - ", 90)
        run.queued_attempt()
        until("its checkpoint", lambda: list(run.directory.glob("checkpoints/**/saved")), 30)
        user.run(["kill", "-9", str(body_pid(run, "runtime"))])
        done = user.run([str(checkout / "slurm" / "launch.py"), "wait", str(run.directory)], timeout=180)
        assert done.returncode == 0, done.stderr
        told = told_of(user, checkout, run)
    first, second = told["attempts"]
    assert [[step["step"] for step in one["steps"]] for one in (first, second)] == [[1, 2], [2, 3]]
    assert (told["done_again"], told["step_times"]["count"], told["part_shares"]["gen"]) == (1, 3, 0.5)
    assert told["run"]["state"] == "completed"
    trainings = [next(job for job in one["jobs"] if job["kind"] == "training") for one in (first, second)]
    assert trainings[0]["ended"] <= trainings[1]["started"] + 1
    assert trainings[1]["submitted"] <= trainings[0]["ended"], "the next one is queued while the first one runs"
    assert trainings[1]["queue_s"] >= trainings[0]["ended"] - trainings[1]["submitted"] - 1
    for training, attempt in zip(trainings, (first, second), strict=True):
        for step in attempt["steps"]:
            assert step["about"] and training["started"] <= step["ended"] <= training["ended"] + 2


def test_accounting_is_named_where_it_tells(user: OrdinaryUser, checkout: Path, nothing_left: NothingLeft) -> None:
    if missing():
        pytest.skip(f"needs {', '.join(missing())}; {test_cluster.MISSING_HINT}")
    with accounting(user.name), leaving_nothing(user):
        busy = "TRAINING_COMMAND=timeout 6 sh -c 'while :; do :; done'; exit 0"
        run = launch(user, checkout, fresh_folder(user, "report-sacct"), *SMALL, busy)
        run.wait_over(seconds=120)

        def told() -> dict[str, Any]:
            use = job(told_of(user, checkout, run), "training")["use"]
            return next((one for one in use if one["source"] == "sacct"), {})

        until("what accounting knows", lambda: told().get("cpu_share"), 90, every_s=2)
        found = told()
        shown = user.run(["sacct", "-j", run.jobs["training"], "-X", "-n", "-P", "--format=ElapsedRaw,AllocCPUS"])
        elapsed, cpus = map(float, shown.stdout.strip().split("|"))
        assert (found["span_s"], found["cpus"]) == (elapsed, cpus)
        assert 0 < found["cpu_share"] <= 1
        text = reported(user, checkout, str(run.directory)).stdout
        assert re.search(r"\n  CPU +\d+ % of \d+ CPUs  \(Slurm's accounting\)\n", text), text
