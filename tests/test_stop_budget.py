"""Does the end of a runtime job fit into the time that Slurm gives it?"""

from __future__ import annotations

import pytest

from slurm.lib.serving import StopBudget


@pytest.mark.parametrize("kill_wait_s", [0, 1, 2, 3, 5, 10, 30, 300])
def test_both_steps_fit_into_kill_wait_with_time_for_the_storage(kill_wait_s: float) -> None:
    budget = StopBudget.within(kill_wait_s)
    assert budget.server_s > 0
    assert budget.service_s > 0
    room_s = max(2.0, kill_wait_s - 1.0)  # whoever sets KillWait below 3 s gets a KILL in the middle of it
    assert budget.server_s + budget.service_s <= 0.7 * room_s, "the storage's end needs the rest"
