"""Is an image here, and if not, how is it brought? Once however many ask: from an archive, else from its registry,
where several nodes share images by one of them (``shared_images``).

Everyone who waits for an image hears how far it is. A registry that limits us is asked again later, by no more than a
few at the same time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from slurm_runtime.known_images import KnownImages
from slurm_runtime.logs import log
from slurm_runtime.page import Progress
from slurm_runtime.podman import BadArchive, Engine, EngineError, ImageFacts, NoSuchImage, PullFailed, ignored
from slurm_runtime.references import archive_name, full_name, registry_of
from slurm_runtime.refusals import Meaning, Patience, meaning, next_step
from slurm_runtime.shared_images import SharedImages, Work

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState

POLICIES = {"always": "always", "ifnotpresent": "missing", "missing": "missing", "never": "never", "": "missing"}
AT_ONCE = 4  # images from one registry; Podman itself loads several layers of each at a time
TELL_EVERY_S = 0.2  # hundreds may listen
LINE = 200
ARCHIVES = "archives"  # where an image comes from, beside the registries

Tell = Callable[[str], None]


def pull_policy(word: str | None) -> str:
    """Podman's word for a client's; ``ValueError`` for an unknown one."""
    policy = POLICIES.get((word or "").lower())
    if policy is None:
        raise ValueError(f"image_pull_policy {word!r} is none of Always, IfNotPresent, Never")
    return policy


class News:
    """What is known of one image under way, told to everyone who listens, at most a few times a second."""

    def __init__(self, image: str) -> None:
        self.last = f"image {image} is being pulled"
        self._listeners: list[Tell] = []
        self._timer: asyncio.TimerHandle | None = None

    def listen(self, tell: Tell) -> None:
        self._listeners.append(tell)
        tell(self.last)

    def leave(self, tell: Tell) -> None:
        self._listeners.remove(tell)

    def hear(self, sentence: str) -> None:
        """Note it; of several that come together the last one is told."""
        self.last = sentence
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TELL_EVERY_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        for tell in list(self._listeners):
            tell(self.last)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()


class Images:
    """The images of one store. What is under way is shared; one that nobody waits for any more goes on, so that asking
    again finds it.

    ``archives`` is a folder that is looked into before a registry is asked, None for none. ``known`` hears of what is
    in the store. ``shared`` are images of other nodes, None where there are none.
    """

    def __init__(
        self,
        engine: Engine,
        archives: Path | None = None,
        patience: Patience = Patience(),  # noqa: B008  frozen
        at_once: int = AT_ONCE,
        known: KnownImages | None = None,
        shared: SharedImages | None = None,
    ) -> None:
        self.engine = engine
        self.archives = archives
        self.patience = patience
        self.at_once = at_once
        self.known = known or KnownImages()
        self.shared = shared
        self._facts: dict[str, ImageFacts] = {}
        self._under_way: dict[tuple[str, str], tuple[asyncio.Task[None], News]] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}

    async def need(self, image: str, policy: str, tell: Tell = ignored) -> ImageFacts:
        """The image in the store, brought first where the policy says so. Facts are kept once it is there.

        ``EngineError`` with Podman's words, and what to do, if it cannot be had.
        """
        if policy == "always":
            await self.pull(image, policy, tell)
        elif image in self._facts:
            return self._facts[image]
        try:
            found = await self.engine.image(image)
        except NoSuchImage as problem:
            if policy != "missing":
                raise EngineError(f"image {image} is not here: {problem}") from None
            await self.pull(image, policy, tell)
            found = await self.engine.image(image)
        self._facts[image] = found
        self.known.note([image])
        return found

    async def find(self, image: str) -> ImageFacts:
        """The image as this node has it, or could have it from another without a registry; else ``NoSuchImage``."""
        try:
            return await self.engine.image(image)
        except NoSuchImage:
            if self.shared is None or not await self.shared.has(image):
                raise
        return await self.need(image, "missing")

    async def offer(self, image: str) -> None:
        """Note an image that was built here, and let other nodes have it."""
        self._facts.pop(image, None)  # those of an older one of the same name
        self.known.note([image])
        if self.shared is not None:
            await self.shared.offer(image)

    def forget(self, image: str) -> None:
        """Look again: somebody removed it from the store."""
        self._facts.pop(image, None)
        self.known.forget(image)

    async def pull(self, image: str, policy: str, tell: Tell = ignored) -> None:
        """Return when the image is in the store; ``PullFailed`` with Podman's words if it cannot be had."""
        key = (image, policy)
        if key not in self._under_way:
            news = News(image)
            task = asyncio.create_task(self._bring(image, policy, news))
            self._under_way[key] = (task, news)
            task.add_done_callback(lambda done: self._ended(key, done))
        task, news = self._under_way[key]
        news.listen(tell)
        try:
            await asyncio.shield(task)
        finally:
            news.leave(tell)

    def under_way(self) -> tuple[Progress, ...]:
        """What the operator's page shows."""
        return tuple(Progress(image, news.last) for (image, _), (_, news) in self._under_way.items())

    async def close(self) -> None:
        tasks = [task for task, _ in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.shared is not None:
            await self.shared.close()

    def _ended(self, key: tuple[str, str], done: asyncio.Task[None]) -> None:
        _, news = self._under_way.pop(key)
        news.close()
        if not done.cancelled():
            done.exception()  # read, so that a pull which nobody waits for is not reported as lost

    async def _bring(self, image: str, policy: str, news: News) -> None:
        archive = await asyncio.to_thread(self._archive_of, image) if policy == "missing" else None
        if archive is not None and await self._load(image, archive, news):
            return
        if policy == "missing" and self.shared is not None:
            await self.shared.bring(image, self._work(image, news))
        else:
            await self._pull(image, policy, news)

    def _work(self, image: str, news: News) -> Work:
        return Work(
            pull=lambda: self._pull(image, "missing", news),
            load=lambda archive: self._load(image, archive, news),
            hear=news.hear,
        )

    def _archive_of(self, image: str) -> Path | None:
        if self.archives is None:
            return None
        try:
            path = self.archives / archive_name(image)
        except ValueError:
            return None
        return path if path.is_file() else None

    async def _load(self, image: str, archive: Path, news: News) -> bool:
        """Whether the archive held the image; if not, the log says what is wrong with it."""
        async with self._turn(ARCHIVES):
            news.hear(f"image {image} is being loaded from {archive}")
            try:
                names = await self.engine.load(archive)
                self.known.note(names)
                if full_name(image) in names:
                    return True
                problem = f"{archive} holds {', '.join(names) or 'nothing'}"
            except BadArchive as broken:
                problem = str(broken)
        log.warning("the registry is asked for %s, because %s", image, problem)
        return False

    async def _pull(self, image: str, policy: str, news: News) -> None:
        turn = self._turn(_registry(image))
        if turn.locked():
            news.hear(f"image {image} waits until one of {self.at_once} images from its registry is here")
        async with turn:  # also between tries: the others would only be refused too
            prefix = f"image {image} is being pulled"
            news.hear(prefix)
            try:
                async for attempt in self._tries(image, news):
                    with attempt:
                        await self.engine.pull(image, policy, lambda line: news.hear(f"{prefix}: {line[:LINE]}"))
            except PullFailed as problem:
                step = next_step(str(problem), image)
                raise PullFailed(f"{problem}; {step}" if step else str(problem)) from None

    def _tries(self, image: str, news: News) -> AsyncRetrying:
        """tenacity's loop around a pull; whether and when there is a next try is decided by ``patience``."""
        import tenacity  # 35 ms: the server answers /health before it needs it

        pause_s: float | None = None
        failures: Counter[Meaning] = Counter()

        def again(state: RetryCallState) -> bool:
            nonlocal pause_s
            problem = state.outcome.exception() if state.outcome else None
            if not isinstance(problem, PullFailed):
                return False
            why = meaning(str(problem), image)
            failures[why] += 1
            pause_s = self.patience.pause_s(why, failures[why], state.seconds_since_start or 0.0)
            if pause_s is not None:
                _tell_again(image, why, pause_s, problem, news)
            return pause_s is not None

        return tenacity.AsyncRetrying(retry=again, wait=lambda _state: pause_s or 0.0, reraise=True)

    def _turn(self, source: str) -> asyncio.Semaphore:
        return self._turns.setdefault(source, asyncio.Semaphore(self.at_once))


def _registry(image: str) -> str:
    try:
        return registry_of(image)
    except ValueError:
        return ""


def _tell_again(image: str, why: Meaning, pause_s: float, problem: PullFailed, news: News) -> None:
    when = (datetime.now() + timedelta(seconds=pause_s)).strftime("%H:%M:%S")
    sentence = f"image {image}: {why.value}; it is asked again in {pause_s:.0f} s, at {when}"
    news.hear(sentence)
    log.warning("%s (%s)", sentence, problem)
