"""Where the test cluster keeps accounts, ended jobs are found by sacct; afterwards it is as it was before."""

from __future__ import annotations

import pytest

from tests import cluster as test_cluster
from tests.cluster.accounting import ACCOUNT, FOLDER, accounting, missing
from tests.conftest import NothingLeft, OrdinaryUser
from tests.runs import until

pytestmark = pytest.mark.slurm

ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def submitted(user: OrdinaryUser, *words: str) -> str:
    done = user.run(["sbatch", "--parsable", "--output=/dev/null", *words])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def accounts(user: OrdinaryUser, *job_ids: str) -> dict[str, tuple[str, ...]]:
    """Job id → account, partition, state and exit code, of those that are said to have ended."""
    question = ["sacct", "-j", ",".join(job_ids), "-X", "-n", "-P", "--format=JobID,Account,Partition,State,ExitCode"]
    rows = [line.split("|") for line in user.run(question).stdout.splitlines()]
    return {row[0]: tuple(row[1:]) for row in rows if row[3].startswith(ENDED)}


def test_sacct_knows_ended_jobs_only_where_accounts_are_kept(
    user: OrdinaryUser, other_user: OrdinaryUser, nothing_left: NothingLeft
) -> None:
    if missing():
        pytest.skip(f"needs {', '.join(missing())}; {test_cluster.MISSING_HINT}")
    plain = test_cluster.CONF.read_text()
    with accounting(user.name):
        good = submitted(user, "--partition=test", "--wrap=sleep 2")  # two samples of its memory
        bad = submitted(user, "--partition=gpu_test", "--gres=gpu:1", "--wrap=exit 3")
        ended = submitted(user, "--hold", "--wrap=true")
        user.run(["scancel", ended])
        expected = {good: (ACCOUNT, "test", "COMPLETED", "0:0"), bad: (ACCOUNT, "gpu_test", "FAILED", "3:0")}
        # An ended job is known some seconds before all is known of it.
        until("two ended jobs in the accounts", lambda: accounts(user, good, bad) == expected, 60)
        until("a cancelled one", lambda: [row[2][:9] for row in accounts(user, ended).values()] == ["CANCELLED"], 60)
        refused = other_user.run(["sbatch", "--output=/dev/null", "--wrap=true"])
        assert "Invalid account" in refused.stderr
        memory = user.run(["sacct", "-j", good, "-n", "-P", "--format=MaxRSS"]).stdout.split()
        assert memory and memory[0].endswith("K"), memory
        shown = user.run(["bash", "-c", "sacctmgr show associations user=$USER"]).stdout  # as the seed has it
        assert ACCOUNT in shown.split(), shown
    assert test_cluster.CONF.read_text() == plain
    assert not FOLDER.exists() and test_cluster.is_up()
    assert "accounting" in user.run(["sacct", "-j", good]).stderr.lower()
    assert submitted(other_user, "--hold", "--wrap=true").isdigit()
    other_user.run(["scancel", "--me"])
