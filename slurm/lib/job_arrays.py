"""What are the ids of a job array's tasks, as Slurm prints them and as people write them? Pure.

A task is ``124_1``. Slurm has a number of its own for each, which some of its commands alone take; a task in the queue
has that of its array. What has not begun it prints as one, ``124_[2-5%3]``, and, once cancelled there, as ``124``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

MOST_TASKS = 100_000  # slurm.conf(5) allows more; no run of ours has as many nodes
_TASK = re.compile(r"(\d{1,12})_(\d{1,7})", re.ASCII)
_QUEUED = re.compile(r"(\d{1,12})_\[([\d,:-]{1,4096})(?:%\d+)?\]", re.ASCII)
_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7}))?)?", re.ASCII)


def is_task(job_id: str) -> bool:
    """Whether it is the id of a task, ``124_1``."""
    return bool(_TASK.fullmatch(job_id))


def is_slurms(job_id: str) -> bool:
    """Whether it is the id of a job or a task of Slurm's, and not of a local run's process."""
    return job_id.isdigit() or is_task(job_id)


def array_of(job_id: str) -> str:
    """The id of the array that a task belongs to; any other id as it is."""
    match = _TASK.fullmatch(job_id)
    return match[1] if match else job_id


def arrays_of(job_ids: Iterable[str]) -> list[str]:
    """The ids to ask Slurm about: of tasks that of their array, each once."""
    return list(dict.fromkeys(map(array_of, job_ids)))


def shown_ids(number: str, shown: str) -> list[str]:
    """The ids that one line of Slurm's is about: ``number`` is its own for the job, ``shown`` what it prints (``%i``).

    A component of a heterogeneous job, ``1+0``, is known by its number.
    """
    if _TASK.fullmatch(shown):
        return [shown]
    queued = _QUEUED.fullmatch(shown)
    return [f"{queued[1]}_{task}" for task in _numbers(queued[2])] if queued else [number]


def _numbers(text: str) -> list[int]:
    """The numbers in Slurm's ``1,3-5,10-20:2``; none where it is anything else, or too many."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            return []
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        numbers = range(first, last + 1, max(1, step))
        if len(found) + len(numbers) > MOST_TASKS:
            return []
        found += numbers
    return found


def with_arrays(found: Mapping[str, T], job_ids: Iterable[str], rank: Callable[[T], int]) -> dict[str, T]:
    """What was found, by the ids that were asked about.

    A task that is not listed is as its array, where that is: Slurm keeps one line of what was cancelled in the queue.
    An array is as that of its tasks which has the lowest ``rank``.
    """
    arrays: dict[str, T] = {}
    for listed, one in found.items():
        array = array_of(listed)
        if array != listed and (array not in arrays or rank(one) < rank(arrays[array])):
            arrays[array] = one
    known = {**arrays, **found}
    told = {job_id: known.get(job_id, found.get(array_of(job_id))) for job_id in job_ids}
    return {job_id: one for job_id, one in told.items() if one is not None}


def folded(job_ids: Sequence[str]) -> str:
    """Ids for people, the tasks of an array as Slurm writes them: ``124_[1-3]``."""
    by_array: dict[str, list[int]] = {}
    for job_id in job_ids:
        match = _TASK.fullmatch(job_id)
        by_array.setdefault(match[1] if match else job_id, []).extend([int(match[2])] if match else [])
    return ", ".join(array + _folded(sorted(set(tasks))) for array, tasks in by_array.items())


def _folded(tasks: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for task in tasks:
        if parts and parts[-1][-1] == task - 1:
            parts[-1] = [parts[-1][0], task]
        else:
            parts.append([task])
    words = ["-".join(map(str, part)) for part in parts]
    return "" if not words else f"_{words[0]}" if len(tasks) == 1 else f"_[{','.join(words)}]"
