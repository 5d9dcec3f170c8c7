"""How do nodes of one run share images? One fetches an image and leaves its archive in a folder; the others load that.

``Images`` comes here once neither its store nor the archives that were made beforehand have an image. Sharing spares
the registry, and never stands in the way: where the folder cannot be written each node fetches by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from slurm_runtime.archive_folder import ArchiveFolder
from slurm_runtime.claims import Claim, Claims, Failure, Owner, Seen
from slurm_runtime.logs import log
from slurm_runtime.podman import Engine, EngineError, PullFailed
from slurm_runtime.references import archive_name
from slurm_runtime.refusals import LOCAL, is_registrys_word

BEAT_S = 5.0  # between an owner's signs of life
SILENT_S = 60.0  # without one, until another node takes over
FIRST_LOOK_S, LONGEST_LOOK_S = 0.2, 2.0  # between looks of those who wait: hundreds may, on one file server
WAIT_S = 5400.0  # for one image; a pull and an archive have their own deadlines, which are shorter
FRESH_S = 30.0  # a failure counts for those who come later
PAUSE_S = 600.0  # after the folder could not be written to
WRITES_AT_ONCE = 2


@dataclass(frozen=True)
class Work:
    """What ``Images`` does: ask the registry, load an archive (False if it does not hold the image), tell who waits."""

    pull: Callable[[], Awaitable[None]]
    load: Callable[[Path], Awaitable[bool]]
    hear: Callable[[str], None]


@dataclass(frozen=True)
class Archived:
    """There is an archive; ``identity`` tells it from one that is written later."""

    path: Path
    identity: tuple[int, int, int]


@dataclass(frozen=True)
class Taken:
    """Another one fetches it."""

    owner: Owner


Found = Archived | Claim | Taken | Failure


@dataclass
class Wait:
    """What one who waits for an image remembers from look to look."""

    silent_s: float
    clock: Callable[[], float] = time.monotonic
    began: float = field(default_factory=time.monotonic)
    broken: set[tuple[int, int, int]] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    _seen: Seen | None = None
    _since: float = 0.0
    _pause_s: float = FIRST_LOOK_S

    def is_over(self, seen: Seen) -> bool:
        """Whether the owner is dead, or has given no sign of life for too long."""
        now = self.clock()
        self.tokens.add(seen.owner.token)
        if seen != self._seen:
            self._seen, self._since = seen, now
        return seen.owner.is_dead() or now - self._since >= self.silent_s

    def next_pause_s(self) -> float:
        pause_s, self._pause_s = self._pause_s, min(LONGEST_LOOK_S, self._pause_s * 1.3)
        return pause_s

    def heeds(self, failure: Failure, now: float) -> bool:
        """Whether a failure is an answer to this one: of an owner that it waited for, or noted just now."""
        return failure.token in self.tokens or now - failure.noted_at < FRESH_S


class SharedImages:
    """The images that one node shares with others through ``folder``, as the node ``host``."""

    def __init__(
        self, folder: Path, engine: Engine, host: str, silent_s: float = SILENT_S, beat_s: float = BEAT_S
    ) -> None:
        self.archives = ArchiveFolder(folder)
        self.claims = Claims(folder, host)
        self.engine = engine
        self.silent_s = silent_s
        self.beat_s = beat_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Semaphore(WRITES_AT_ONCE)
        self._is_prepared = False
        self._off_until = float("-inf")
        self._has_said = False

    async def bring(self, image: str, work: Work) -> None:
        """Have the image in this node's store: from its archive, else from the registry, for all nodes where it can.

        ``PullFailed`` also where another node has just been refused by the registry.
        """
        wait = Wait(self.silent_s)
        while (found := await self._found(image, wait)) is not None:
            if isinstance(found, Claim):
                await self._fetch(image, found, work)
                return
            if isinstance(found, Failure):
                raise PullFailed(f"{found.words} (as {found.host} was told, which asked for all nodes)")
            if isinstance(found, Taken):
                work.hear(f"waits for {found.owner.host} to fetch image {image}")
                await asyncio.sleep(wait.next_pause_s())
            elif await work.load(found.path):
                return
            else:
                wait.broken.add(found.identity)
        await work.pull()

    async def has(self, image: str) -> bool:
        """Whether an archive of the image is there."""
        try:
            return await asyncio.to_thread(self._archive, image, Wait(self.silent_s)) is not None
        except (OSError, ValueError):
            return False

    async def offer(self, image: str) -> None:
        """Leave the archive of an image that was built here; where that cannot be, this node alone has it."""
        if self._is_on():
            with contextlib.suppress(ValueError):  # a name that no archive can have
                archive_name(image)
                await self._write(image)

    async def close(self) -> None:
        """Leave unfinished what is unfinished: others find the claims free."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _found(self, image: str, wait: Wait) -> Found | None:
        """What there is of an image; None where this node has to see for itself."""
        if not self._is_on():
            return None
        if time.monotonic() - wait.began > WAIT_S:
            log.warning("image %s: not fetched by another node within %g s; fetching it here", image, WAIT_S)
            return None
        try:
            return await asyncio.to_thread(self._look, image, wait)
        except ValueError:  # a digest, which an archive does not keep
            return None
        except OSError as problem:
            self._give_up(problem)
            return None

    def _look(self, image: str, wait: Wait) -> Found | None:
        """Archive, own claim, another's, or a failure that answers; the one or other is there at every moment."""
        self._prepare()
        archive = self._archive(image, wait)
        if archive is not None or image.startswith(LOCAL):  # those were built, and no registry has them
            return archive
        claim = self.claims.take(image)
        if claim is not None:
            return self._still_needed(image, claim, wait)
        seen = self.claims.seen(image)
        if seen is not None and wait.is_over(seen):
            log.warning("%s fetches image %s no more; another node does", seen.owner.host, image)
            self.claims.clear(image, seen.owner)
        return Taken(seen.owner if seen else Owner("", host="another node"))

    def _still_needed(self, image: str, claim: Claim, wait: Wait) -> Found:
        """The claim, unless the one who held it before has left an archive, or the reason why there is none."""
        try:
            answer: Found | None = self._archive(image, wait)
            failure = None if answer else self.claims.failure(image)
            if failure is not None and wait.heeds(failure, claim.taken_at):
                answer = failure
        except BaseException:
            claim.release()
            raise
        if answer is None:
            return claim
        claim.release()
        return answer

    def _archive(self, image: str, wait: Wait) -> Archived | None:
        path = self.archives.find(image)
        if path is None:
            return None
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        identity = (status.st_ino, status.st_mtime_ns, status.st_size)
        return None if identity in wait.broken else Archived(path, identity)

    def _prepare(self) -> None:
        if not self._is_prepared:
            self.archives.folder.mkdir(mode=0o700, exist_ok=True)  # in a run's directory, which is there or has ended
            _check_owner(self.archives.folder)
            self.archives.prepare()
            self._is_prepared = True

    async def _fetch(self, image: str, claim: Claim, work: Work) -> None:
        """Return once the image is in this node's store; its archive is written meanwhile, and owned here."""
        pulled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._fetch_for_all(image, claim, work, pulled))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await pulled

    async def _fetch_for_all(self, image: str, claim: Claim, work: Work, pulled: asyncio.Future[None]) -> None:
        async with self._held(claim):
            try:
                await work.pull()
            except Exception as problem:  # for who asked; this task has no more to do
                await self._note_failure(claim, problem)
                _settle(pulled, problem)
                return
            except asyncio.CancelledError:
                pulled.cancel()
                raise
            _settle(pulled, None)
            await asyncio.to_thread(self.claims.forget_failure, image)
            await self._write(image)

    @contextlib.asynccontextmanager
    async def _held(self, claim: Claim) -> AsyncIterator[None]:
        """Give signs of life during the block, and release the claim at its end."""
        beating = asyncio.create_task(self._beat(claim))
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await asyncio.to_thread(claim.release)

    async def _beat(self, claim: Claim) -> None:
        with contextlib.suppress(OSError):  # it will be taken over; ours is then one fetch too many, and no harm
            while await asyncio.to_thread(claim.beat):
                await asyncio.sleep(self.beat_s)

    async def _note_failure(self, claim: Claim, problem: Exception) -> None:
        """Only what the registry said is the same for all; a full disk or a missing route may be this node's own."""
        if isinstance(problem, PullFailed) and is_registrys_word(str(problem), claim.owner.image):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.claims.note_failure, claim, str(problem))

    async def _write(self, image: str) -> None:
        try:
            async with self._writing:
                await asyncio.to_thread(self._prepare)
                await self.archives.write(self.engine, image)
        except OSError as problem:
            self._give_up(problem)
        except EngineError as problem:
            log.warning("image %s is not left for other nodes: %s", image, problem)

    def _is_on(self) -> bool:
        return time.monotonic() >= self._off_until

    def _give_up(self, problem: OSError) -> None:
        """For a while; what is said once is said for good."""
        self._off_until = time.monotonic() + PAUSE_S
        level = log.debug if self._has_said else log.warning
        self._has_said = True
        level(
            "images are not shared with other nodes in %s: %s; each node fetches them by itself",
            self.archives.folder,
            problem.strerror or problem,
        )


def _check_owner(folder: Path) -> None:
    """``OSError`` where others could put an image of their own making in the place of one that is asked for."""
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "it is another user's, or others may write there (chmod go-w)")


def _settle(future: asyncio.Future[None], problem: Exception | None) -> None:
    """Tell who waits, if anybody still does."""
    if future.done():
        return
    if problem is not None:
        future.set_exception(problem)
    else:
        future.set_result(None)
