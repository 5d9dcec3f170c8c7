"""Which share of the machine is free: slots of CPUs, leased and returned. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Lease:
    """Slots held by one sandbox, by number."""

    numbers: frozenset[int]


@dataclass(frozen=True)
class Slots:
    """Equal shares of the machine.

    ``cpus_per_slot`` may be a fraction: then slots share CPUs. ``cpus`` are the ids that slots may be pinned to, empty
    where they are not known.
    """

    total: int
    cpus_per_slot: float
    cpus: tuple[int, ...] = ()
    taken: frozenset[int] = frozenset()

    @property
    def used(self) -> int:
        return len(self.taken)

    def take(self, count: int) -> tuple[Slots, Lease] | None:
        """The slots without ``count`` of them, and the lease; None where so many are not free."""
        free = [number for number in range(self.total) if number not in self.taken][:count]
        if len(free) < count:
            return None
        lease = Lease(frozenset(free))
        return replace(self, taken=self.taken | lease.numbers), lease

    def take_these(self, numbers: Collection[int]) -> tuple[Slots, Lease] | None:
        """As ``take``, for slots that a sandbox holds already; None where one is taken or not there."""
        wanted = frozenset(numbers)
        if not wanted or wanted & self.taken or not wanted <= frozenset(range(self.total)):
            return None
        return replace(self, taken=self.taken | wanted), Lease(wanted)

    def give(self, lease: Lease) -> Slots:
        """The slots with those of the lease free again."""
        return replace(self, taken=self.taken - lease.numbers)

    def cpus_of(self, lease: Lease) -> tuple[int, ...]:
        """The CPU ids that the leased slots cover, a shared one included; empty where ids are not known."""
        touched: set[int] = set()
        for number in lease.numbers:
            first, end = math.floor(number * self.cpus_per_slot), math.ceil((number + 1) * self.cpus_per_slot)
            touched.update(self.cpus[first:end])
        return tuple(sorted(touched))


def units_for(resource_factor: float) -> int:
    """Slots that a sandbox of this factor takes: whole ones, at least one."""
    return max(1, math.ceil(resource_factor))


def share_out(
    cpu_ids: Sequence[int], cpus: int, reserved: int, cpus_per_slot: float, most: int | None
) -> tuple[Slots, str]:
    """The slots of a machine with ``cpus`` CPUs of which ``reserved`` stay free, and a sentence that says how many.

    ``cpu_ids`` are the CPUs this process may use; the reserved ones come off their front. There is always one slot,
    even where the CPUs are fewer than it should have: the sentence says so. ``most`` bounds the number of slots.
    """
    fitting = max(0, math.floor((cpus - reserved) / cpus_per_slot + 1e-9))
    total = min(max(1, fitting), most or fitting or 1)
    usable = tuple(cpu_ids[reserved:cpus]) if cpus <= len(cpu_ids) else ()
    counted = f"{cpus} CPUs less {reserved} reserved, {cpus_per_slot:g} for each sandbox"
    if not fitting:
        sentence = f"1 slot, although {counted} leave room for none: the sandbox has fewer CPUs than asked for"
        usable = tuple(cpu_ids[:cpus])
    elif total < fitting:
        sentence = f"{total} slots, bounded by --max-sandboxes; {counted} would give {fitting}"
    else:
        sentence = f"{total} slot{'s' if total > 1 else ''}: {counted}"
    if cpus_per_slot < 1:
        sentence += "; sandboxes share CPUs"
    return Slots(total, cpus_per_slot, usable), sentence
