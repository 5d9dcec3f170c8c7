"""Which images are here: pulled once, however many sandboxes ask at the same time."""

from __future__ import annotations

import asyncio

from slurm_runtime.podman import Engine

POLICIES = {"always": "always", "ifnotpresent": "missing", "missing": "missing", "never": "never", "": "missing"}


def pull_policy(word: str | None) -> str:
    """Podman's word for a client's; ``ValueError`` for an unknown one."""
    policy = POLICIES.get((word or "").lower())
    if policy is None:
        raise ValueError(f"image_pull_policy {word!r} is none of Always, IfNotPresent, Never")
    return policy


class Images:
    """Pulls under way, shared; one that nobody waits for any more goes on, so that asking again finds the image."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._under_way: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def pull(self, image: str, policy: str) -> None:
        """Return when the image is in the store; ``PullFailed`` with Podman's words if it cannot be had."""
        key = (image, policy)
        if key not in self._under_way:
            task = asyncio.create_task(self.engine.pull(image, policy))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        await asyncio.shield(self._under_way[key])

    def _forget(self, key: tuple[str, str], done: asyncio.Task[None]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # read, so that a pull which nobody waits for is not reported as lost

    async def close(self) -> None:
        for task in list(self._under_way.values()):
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
