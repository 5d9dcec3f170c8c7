"""Where does the time of a start go? Counts and seconds of its steps, over all sandboxes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# In the order of a start: a slot, the image, the container made, run and looked at, the server forked, its answer.
STEPS = ("slot", "image", "create", "run", "inspect", "fork", "answer")


@dataclass
class StepTimes:
    """What the steps took so far; one that failed or was cancelled counts too."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STEPS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Count the block as one ``step``."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.counts[step] += 1
            self.seconds[step] += time.monotonic() - began
