"""Which images are being built, and how did the last builds end? One build for all who want the same image."""

from __future__ import annotations

import asyncio
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from slurm_runtime.context_check import check_context
from slurm_runtime.deadlines import within
from slurm_runtime.logs import log
from slurm_runtime.page import Progress
from slurm_runtime.podman import EngineError
from slurm_runtime.uploads import Upload, receive
from slurm_runtime.wishes import BadRequest

AT_ONCE = 2  # builds that run; the others are QUEUED
MOST_UNFINISHED = 32
MOST_UPLOADS = 4  # each may fill the disk with half a gigabyte
FINISHED_KEPT = 200  # clients ask for up to half an hour after the end
BUILD_S = 1800.0  # as long as clients ask
MOST_TAGS = 32
MOST_ERROR = 4000
LINE = 300
# A reference as Podman takes it: registry and folders, then a tag.
REFERENCE = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::\d{1,5})?/)?"
    r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
)

Builder = Callable[[Path, str, Callable[[str], None]], Awaitable[None]]
Offer = Callable[[str], Awaitable[None]]


async def nobody(_image: str) -> None:
    """There are no other nodes."""


class UnknownBuild(Exception):
    """No build has this id, or it ended long ago."""


class TooManyBuilds(Exception):
    """More builds or uploads are under way than this server takes."""


class NoDisk(Exception):
    """The context could not be written."""


@dataclass(frozen=True)
class Build:
    """One build: its state in the clients' words, the last line that Podman wrote, why it failed."""

    build_id: str
    image: str
    status: str = "QUEUED"
    progress: str = ""
    error: str = ""


class Builds:
    """The builds of one server; contexts lie in a private folder each, removed on every path.

    ``offer`` is told each image that was built, before clients are: other nodes can start it then, too.
    """

    def __init__(
        self, builder: Builder, offer: Offer = nobody, build_s: float = BUILD_S, kept: int = FINISHED_KEPT
    ) -> None:
        self._builder = builder
        self._offer = offer
        self._build_s = build_s
        self._kept = kept
        self._builds: dict[str, Build] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._uploads = 0

    def get(self, build_id: str) -> Build:
        if build_id not in self._builds:
            raise UnknownBuild(f"no build with build_id {build_id!r}, or it ended long ago")
        return self._builds[build_id]

    def under_way(self) -> tuple[Progress, ...]:
        """What the operator's page shows of builds that have not ended."""
        alive = [self._builds[build_id] for build_id in self._tasks]
        return tuple(Progress(build.image, build.progress or build.status.lower()) for build in alive)

    async def submit(self, pieces: AsyncIterator[bytes], content_type: str) -> Build:
        """Read a request's body and begin its build, or find the one of the same image that is under way."""
        self._check_room()
        # The folder has mode 0700. From the first piece on it has one owner: this call, then the task of the build.
        folder = _private_folder()
        self._uploads += 1
        try:
            upload = await receive(pieces, content_type, Path(folder.name))
            check_names(upload)
            await asyncio.to_thread(check_context, upload.context)
            found = self._living(upload.target_image)
            if found is None:
                return self._begin(upload, folder)
            folder.cleanup()
            return found
        except OSError as problem:
            folder.cleanup()
            raise NoDisk(f"the context cannot be written to {folder.name}: {problem.strerror or problem}") from None
        except BaseException:
            folder.cleanup()
            raise
        finally:
            self._uploads -= 1

    async def close(self) -> None:
        """End all builds; their folders are removed."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _check_room(self) -> None:
        if self._uploads >= MOST_UPLOADS:
            raise TooManyBuilds(f"{self._uploads} build contexts are being uploaded already; ask again in a moment")
        if len(self._tasks) >= MOST_UNFINISHED:
            raise TooManyBuilds(f"{len(self._tasks)} builds are under way or queued already; ask again later")

    def _living(self, image: str) -> Build | None:
        alive = (self._builds[build_id] for build_id in self._tasks)
        return next((build for build in alive if build.image == image), None)

    def _begin(self, upload: Upload, folder: tempfile.TemporaryDirectory[str]) -> Build:
        build = Build(secrets.token_hex(8), upload.target_image)
        self._builds[build.build_id] = build
        task = asyncio.create_task(self._run(build.build_id, upload))
        self._tasks[build.build_id] = task
        task.add_done_callback(lambda _done: self._ended(build.build_id, folder))
        return build

    def _ended(self, build_id: str, folder: tempfile.TemporaryDirectory[str]) -> None:
        """Also of a task that was cancelled before it began."""
        del self._tasks[build_id]
        folder.cleanup()
        if self._builds[build_id].status in {"QUEUED", "BUILDING"}:
            self._change(build_id, status="CANCELLED", error="the server is stopping")
        finished = [known for known in self._builds if known not in self._tasks]
        for old in finished[: max(0, len(finished) - self._kept)]:
            del self._builds[old]

    async def _run(self, build_id: str, upload: Upload) -> None:
        try:
            async with self._turn:
                self._change(build_id, status="BUILDING")
                await within(self._build_s, self._build_all(build_id, upload))
            self._change(build_id, status="SUCCESS")
        except asyncio.TimeoutError:
            self._change(build_id, status="TIMEOUT", error=f"not built within {self._build_s:g} s")
        except EngineError as problem:
            self._change(build_id, status="FAILURE", error=str(problem)[-MOST_ERROR:])
        except Exception as fault:  # a fault of ours must not leave a client asking for half an hour
            log.exception("the build of %s failed unexpectedly", upload.target_image)
            self._change(build_id, status="FAILURE", error=f"an internal error ({type(fault).__name__})")
        build = self._builds[build_id]
        log.info("build of %s: %s %s", build.image, build.status, build.error)

    async def _build_all(self, build_id: str, upload: Upload) -> None:
        """The image, then its further names: of these every layer is in Podman's cache already."""
        for name in dict.fromkeys((upload.target_image, *upload.tags)):
            await self._builder(upload.context, name, lambda line: self._heard(build_id, line))
            await self._offer(name)

    def _heard(self, build_id: str, line: str) -> None:
        if line.strip():
            self._change(build_id, progress=line.strip()[:LINE])

    def _change(self, build_id: str, **changes: str) -> None:
        self._builds[build_id] = replace(self._builds[build_id], **changes)


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="skyrl-build-")
    except OSError as problem:
        sentence = f"the context cannot be written to {tempfile.gettempdir()}: {problem.strerror or problem}"
        raise NoDisk(f"{sentence}; set TMPDIR to a folder with space") from None


def check_names(upload: Upload) -> None:
    """``BadRequest`` where a name is no image reference."""
    if len(upload.tags) > MOST_TAGS:
        raise BadRequest(f"more than {MOST_TAGS} tags")
    for name in (upload.target_image, *upload.tags):
        if len(name) > 512 or not REFERENCE.fullmatch(name):
            raise BadRequest(f"{name[:200]!r} is not the name of an image, such as localhost/skyrl/runtime:tag")
