"""Which containers should wait, initialised, for sandboxes that are likely to be asked for next? Pure.

An initialised container has its mounts, namespaces, network and published port; only its program has not begun. What it
was made with cannot be changed. So a warm one is made exactly as one of the last requests asked, with an id, a key and
a port chosen in advance, and only a request that asks for the same gets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from slurm_runtime.agent_support import StartPlan
from slurm_runtime.podman import ContainerState
from slurm_runtime.ports import Reservation
from slurm_runtime.sandbox import Specification
from slurm_runtime.slots import units_for

# What of a request its container does not depend on, or is chosen anew for each.
INDEPENDENT = frozenset({"runtime_id", "session_id", "session_api_key", "pull_policy", "dialect"})


@dataclass(frozen=True)
class Warm:
    """A container that waits: the request that it was made for, which has no session; the image it was made of."""

    specification: Specification
    plan: StartPlan
    image_id: str
    port: Reservation
    state: ContainerState

    @cached_property
    def shape(self) -> Hashable:
        """As ``shape_of``."""
        return shape_of(self.specification)


def shape_of(wish: Specification) -> Hashable:
    """Equal for requests whose containers differ in nothing but what is chosen for each."""
    depends = (value for name, value in vars(wish).items() if name not in INDEPENDENT)
    return tuple(frozenset(value.items()) if isinstance(value, Mapping) else value for value in depends)


def fits(warm: Warm, wish: Specification) -> bool:
    """Whether a container made for ``wish`` would be like this one, as long as its image has not been replaced."""
    return wish.pull_policy != "always" and warm.shape == shape_of(wish)


def wanted(recent: Sequence[Specification], most: int, idle: int) -> list[Specification]:
    """What should wait: what was asked for last, newest first, as often, within ``idle`` slots."""
    found, units = [], 0
    for wish in itertools.islice(itertools.cycle(recent), most):
        units += units_for(wish.resource_factor)
        if units > idle:
            break
        found.append(wish)
    return found


def compared(have: Iterable[Warm], wishes: Iterable[Specification]) -> tuple[list[Warm], list[Specification]]:
    """Those that nobody is likely to ask for, and the requests for which none waits."""
    waiting: dict[Hashable, list[Warm]] = {}
    for warm in have:
        waiting.setdefault(warm.shape, []).append(warm)
    missing = []
    for wish in wishes:
        found = waiting.get(shape_of(wish))
        found.pop() if found else missing.append(wish)
    return [warm for surplus in waiting.values() for warm in surplus], missing


def units_of(warm: Iterable[Warm]) -> int:
    """The slots that sandboxes in these containers would hold."""
    return sum(units_for(one.specification.resource_factor) for one in warm)
