"""How do all images of a dataset get here: a few at a time, each fetched, perhaps built on, perhaps archived?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from slurm_runtime.archive_folder import ArchiveFolder
from slurm_runtime.images import Images
from slurm_runtime.logs import log
from slurm_runtime.podman import Engine, EngineError, EngineUnreachable, NoSuchImage
from slurm_runtime.prebuild_report import FAILED, FETCHED, HERE, Outcome, Report
from slurm_runtime.references import full_name
from slurm_runtime.refusals import Patience

PATIENCE_S = 6 * 3600 + 600  # Docker Hub counts pulls over six hours
MOST_ERROR = 1000


class CannotWrite(Exception):
    """An archive or the report cannot be written, nor could the next one."""


def _say_quietly(line: str) -> None:
    log.debug("%s", line)


@dataclass(frozen=True)
class Build:
    """How images are built on others: a context for Podman, and what the new names begin with."""

    context: Path
    prefix: str

    def name_of(self, base: str) -> str:
        """The built image's name: the base's without its registry, below the prefix."""
        return full_name(f"{self.prefix}/{base.partition('/')[2]}")


class Prebuild:
    """The work on one dataset's images, some at the same time."""

    def __init__(
        self,
        engine: Engine,
        report: Report,
        archives: ArchiveFolder | None = None,
        build: Build | None = None,
        *,
        force: bool = False,
        archive_only: bool = False,
        workers: int = 2,
        patience: Patience = Patience(limited_s=PATIENCE_S),  # noqa: B008  frozen
    ) -> None:
        self.engine = engine
        self.report = report
        self.archives = archives
        self.build = build
        self.force = force
        self.archive_only = archive_only
        self.images = Images(engine, patience=patience, at_once=workers)
        self._turn = asyncio.Semaphore(workers)

    async def run(self, on_done: Callable[[str, Outcome], None]) -> None:
        """Work through all images; each outcome is noted and told when it is there."""

        async def one(image: str) -> None:
            async with self._turn:
                began = time.monotonic()
                outcome = await self._outcome(image)
                outcome = replace(outcome, seconds=round(time.monotonic() - began, 3))
                self._note(image, outcome)
                on_done(image, outcome)

        tasks = [asyncio.create_task(one(image)) for image in self.report.outcomes]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.images.close()

    def _note(self, image: str, outcome: Outcome) -> None:
        try:
            self.report.note(image, outcome)
        except OSError as problem:
            raise CannotWrite(f"{self.report.path} cannot be written: {problem.strerror or problem}") from None

    async def _outcome(self, image: str) -> Outcome:
        try:
            name = self.build.name_of(image) if self.build else image
            archive = self.archives.path_of(name) if self.archives else None
            if not self.force and await self._is_there(name, archive):
                return await self._facts(image, replace(self.report.outcomes[image], status=HERE, name=name), archive)
            return await self._provide(image, name)
        except EngineUnreachable:
            raise
        except (EngineError, ValueError) as problem:
            return Outcome(FAILED, error=" ".join(str(problem).split())[:MOST_ERROR])
        except OSError as problem:
            raise CannotWrite(f"an archive cannot be written: {problem}") from None

    async def _is_there(self, name: str, archive: Path | None) -> bool:
        if archive is not None:
            return await asyncio.to_thread(archive.is_file)
        try:
            await self.engine.image(name)
        except NoSuchImage:
            return False
        return True

    async def _provide(self, image: str, name: str) -> Outcome:
        await self.images.need(image, "always" if self.force else "missing", _say_quietly)
        if self.build:
            await self.engine.build(self.build.context, name, _say_quietly, {"BASE_IMAGE": image})
        outcome = await self._facts(image, Outcome(FETCHED, name), None)
        if self.archives:
            outcome = replace(outcome, archive=str(await self.archives.write(self.engine, name)))
            if self.archive_only:
                await self._remove(name, image)
        return outcome

    async def _remove(self, *names: str) -> None:
        """Make room for the next images; one that cannot go, because it lies in a store that is only read, stays."""
        for name in dict.fromkeys(names):
            try:
                await self.engine.remove_image(name)
            except EngineError as problem:
                log.debug("image %s stays in Podman's store: %s", name, problem)

    async def _facts(self, image: str, outcome: Outcome, archive: Path | None) -> Outcome:
        """With id, digest and size as the store knows them; of an archive's image what an earlier run noted."""
        if archive is not None:
            return replace(outcome, archive=str(archive))
        facts = await self.engine.image(outcome.name or image)
        return replace(outcome, id=facts.id, digest=facts.digest, size_bytes=facts.size_bytes)
