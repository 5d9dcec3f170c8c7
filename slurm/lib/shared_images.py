"""Where do the nodes of a run leave images for each other, and when does that go? With the run, its last attempt.

``slurm_runtime/shared_images.py`` is what the API servers do with the folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from slurm.lib.coordination import SHARED_IMAGE, CoordinationDir
from slurm.lib.endings import is_followed
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.run_record import partner_of
from slurm.lib.settings import Settings


def are_shared(settings: Settings) -> bool:
    """Whether there are other nodes."""
    return settings.runtime_nodes > 1


@contextlib.contextmanager
def removed_with_the_run(job: JobContext) -> Iterator[None]:
    """Remove the folder at the end of the block, which is that of the runtime job, unless another attempt follows."""
    try:
        yield
    finally:
        if are_shared(job.settings) and not _goes_on(job):
            remove(job.directory)


def _goes_on(job: JobContext) -> bool:
    training = partner_of(job.directory, "runtime", job.job_id)
    return training is not None and is_followed(job.directory, training)


def remove(directory: CoordinationDir) -> None:
    """Remove what the nodes left; what cannot go now goes with the run's directory (``launch.py clean``)."""
    try:
        for path in directory.images.iterdir():
            if re.fullmatch(SHARED_IMAGE, path.name):
                path.unlink(missing_ok=True)
        directory.images.rmdir()
    except FileNotFoundError:
        return
    except OSError as problem:
        log.warning("%s stays until the run's directory goes: %s", directory.images, problem.strerror)
