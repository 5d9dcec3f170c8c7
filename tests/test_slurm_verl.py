"""The real VERL across a time limit, on a real Slurm: it saves because its time is nearly over, and goes on elsewhere.

Both jobs run on the cluster's CPU nodes, as docs/local-verl.md tells a researcher to do it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import VERL_CACHE, OrdinaryUser
from tests.local_runs import processes
from tests.runs import Run, parse_report, until
from tests.verl_records import notes, rollouts, sandboxes, saved_step, steps

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.verl]


@pytest.fixture(autouse=True)
def clean(verl_python: Path, nothing_left: Callable[[], None]) -> None:
    """Nothing is left on any node at the end (the fixture checks); VERL's environment is there before time counts."""


# So that it depends on no machine's speed: by VERL's second step, after which it looks at the time for the first time,
# its end is near, for VERL (LEAD_S + 60 s before the limit) and for the training job (45 s after the start, or, by
# Slurm's early signal, some 15 s). The limit itself is far, and so is the last step.
LIMIT_S, LEAD_S = 300, 255
BATCH, LAST = 8, 12  # prompts × rollouts, and the steps of three epochs
SETTINGS = (
    "SKYRL_BACKEND=slurm",
    "CPU_PARTITION=test",
    "GPU_PARTITION=test",
    "CPUS_FOR_RUNTIME=2",
    "TIME_LIMIT=00:05:00",
    "RESTARTS=1",
    f"RESTART_LEAD={LEAD_S}",
    "SAVE_FREQ=1000",
    "TOTAL_EPOCHS=3",
    "ROLLOUT_N=2",
    "SKYRL_DEBUG=1",
)
MORE_MINUTES = 30
SAVES_BY_TIME = "Force saving checkpoint: ESI instance expiration approaching."  # VERL's own words
GONE_WITHIN_S = 10.0


def launch(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Run:
    words = [word for setting in (f"SKYRL_JOBS_BASE={jobs_base}", *SETTINGS) for word in ("--set", setting)]
    argv = [str(checkout / "slurm" / "launch.py"), "--config", "local-verl", *words]
    done = user.run(argv, {"SKYRL_VERL_CACHE": str(VERL_CACHE)}, timeout=60)
    assert done.returncode == 0, done.stderr
    return parse_report(user, done.stdout)


def test_verl_saves_before_the_time_limit_and_goes_on_in_the_next_jobs(
    user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    first = launch(user, checkout, jobs_base)
    first.wait_for_text("training", "starting the trainer", 90)
    second = first.queued_attempt()
    for job_id in second.jobs.values():  # so that its VERL has no reason to hurry
        test_cluster.set_time_limit(job_id, MORE_MINUTES)

    # VERL saves, and nothing of it is left where it was stopped.
    first.wait_for_text("training", " step:1 - ", LIMIT_S)
    folder = Path(f"/tmp/skyray-{user.uid}-{first.jobs['training']}t")
    assert list(folder.glob("ray/session_*"))
    first.wait_over("training", seconds=LIMIT_S)
    of_the_job = f"SLURM_JOB_ID={first.jobs['training']}\0".encode()
    until("VERL's end", lambda: not folder.exists() and not list(processes([of_the_job])), GONE_WITHIN_S)
    assert first.exit_code("training") == "75"
    log = first.log("training")
    assert "attempt 1 of at most 2, from the beginning" in log
    stopped = re.search(r"stopped at its checkpoint \(step (\d+)\) before the time limit", log)
    assert stopped, log
    assert SAVES_BY_TIME in log
    assert steps(log)[0] == 1

    # The next pair goes on from there, with the weights that were saved, to the end.
    second.wait_over(seconds=300)
    checkpoints = first.directory / "checkpoints" / "local-verl"
    saved, loaded = notes(checkpoints, "saved"), notes(checkpoints, "loaded")
    (at,) = loaded
    assert 1 < int(stopped[1]) <= at <= steps(log)[-1] + 1 < LAST
    assert loaded[at] == saved[at]
    assert f"before the time limit); going on from step {at}" in second.log("runtime")
    assert steps(second.log("training")) == list(range(at + 1, LAST + 1))
    assert second.completion["job_id"] == second.jobs["training"]
    assert second.completion["ended"] == "completed"
    assert [first.exit_code("runtime"), second.exit_code("runtime"), second.exit_code("training")] == ["0"] * 3

    # With its end near it saved after every step but its first, and with its end far away only after its last.
    assert {step for step in saved if step <= at} == set(range(2, at + 1))
    assert SAVES_BY_TIME not in second.log("training")
    assert {step for step in saved if step > at + 1} == {LAST}  # at + 1 may have been underway when it was stopped
    assert saved_step(checkpoints) == LAST
    assert len(set(saved.values())) == len(saved), "weights of its own at each save: they were trained"

    # Each rollout of every step had a sandbox of one of the two API servers.
    found = rollouts(first.directory)
    assert len(found) == BATCH * LAST
    assert {rollout["runtime_id"] for rollout in found} <= sandboxes(first.directory)
