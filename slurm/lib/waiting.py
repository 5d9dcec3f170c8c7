"""One wait for everything that waits: a deadline, a check that it can still be fulfilled, a reason at the end.

tenacity keeps the time; this module says what our waits have in common. A wait ends with a value, with whatever
``still_possible`` raises, with ``WaitTimeout``, or with the ``Interrupted`` of a signal.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from slurm.lib.errors import WaitTimeout

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")

# Near the start a run should not lose time to polling; later a busy shared file system should not see us often.
EAGER_S, EAGER_FOR_S, PATIENT_S = 0.25, 30.0, 2.0


def jittered_pause(elapsed_s: float) -> float:
    """Seconds to the next look: at most 0.25 in the first half minute, then about 2, never in step with others."""
    most = EAGER_S if elapsed_s < EAGER_FOR_S else PATIENT_S
    return random.uniform(0.6 * most, most)


def wait_for(
    what: str,
    probe: Callable[[], T | None],
    deadline_s: float,
    *,
    still_possible: Callable[[], None] = lambda: None,
    pause: Callable[[float], float] = jittered_pause,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The first result of ``probe`` that is not None.

    ``still_possible`` runs before each look and raises the reason why waiting has become pointless. After
    ``deadline_s`` seconds ``WaitTimeout`` names ``what`` was waited for.
    """
    import tenacity  # 35 ms: felt in the start-up of commands that never wait

    def look() -> T | None:
        still_possible()
        return probe()

    def pause_after(state: RetryCallState) -> float:
        left = deadline_s - (state.seconds_since_start or 0.0)
        return max(0.0, min(left, pause(state.seconds_since_start or 0.0)))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda result: result is None),
        stop=tenacity.stop_after_delay(deadline_s),
        wait=pause_after,
        sleep=sleep,
    )
    try:
        result = retrying(look)
    except tenacity.RetryError:
        raise WaitTimeout(f"waited {deadline_s:g} s for {what}, in vain") from None
    assert result is not None
    return result
