"""How does a sandbox get its agent server: from its image, from the mounted tree, or forked into it?

The decision is ``decide``; ``AgentSupport`` knows what there is to decide with.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from slurm_runtime.agent.tree import QUIET_DEFAULTS, AgentTree, agent_arguments
from slurm_runtime.podman import ImageFacts
from slurm_runtime.sandbox import Mount, Specification

# HOME is what Podman takes from an image's /etc/passwd for root; it is told to images that have no such file too.
DEFAULTS = {**QUIET_DEFAULTS, "HOME": "/root"}


class Start(enum.Enum):
    """How the program of a sandbox is started."""

    PLAIN = "the command as it is, from the image"
    EXEC = "the mounted agent server, as the container's program"
    FORK = "the mounted agent server, forked into a container that only idles"


@dataclass(frozen=True)
class StartPlan:
    """The container's command, what is mounted into it, and the arguments for the forked server.

    ``environment`` holds variables that the client's own and the image's override.
    """

    start: Start
    command: tuple[str, ...] | None
    mounts: tuple[Mount, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def decide(
    wish: Specification, image: ImageFacts, tree: AgentTree | None, image_brings_it: bool, fork: bool
) -> StartPlan:
    """The plan for one sandbox. Pure.

    An agent server in the image is the user's own choice and is used as it is; so is any other program.
    """
    arguments = agent_arguments(wish.command) if wish.command else None
    if tree is None or arguments is None or image_brings_it:
        return StartPlan(Start.PLAIN, wish.command, wish.mounts)
    mounts = wish.mounts + tree.mounts
    environment = {name: value for name, value in DEFAULTS.items() if name not in image.variables}
    if fork:
        return StartPlan(Start.FORK, tree.holder_command(), mounts, arguments, environment)
    return StartPlan(Start.EXEC, tree.exec_command(arguments), mounts, (), environment)


def brings(image: ImageFacts, command: tuple[str, ...] | None) -> bool:
    """Whether the program of an agent server's command is a file of the image: looked up in its layers."""
    program = command[0] if command else ""
    if not program.startswith("/"):
        return False
    return any(os.path.lexists(layer + os.path.normpath(program)) for layer in image.layers)


class AgentSupport:
    """The tree of this server, once it is known, and whether it can be forked.

    ``tree`` is awaited by sandboxes that need it: with --agent-image it is taken out of an image first.
    """

    def __init__(self, wants_fork: bool) -> None:
        self.wants_fork = wants_fork
        self.fork_ready = False
        self.why_exec = "" if wants_fork else "AGENT_START=exec"
        self._tree: asyncio.Future[AgentTree | None] | None = None
        self._brought: dict[tuple[str, str], bool] = {}

    def provide(self, tree: AgentTree | None) -> None:
        """Tell the tree, or that there is none."""
        if not self._future().done():
            self._future().set_result(tree)

    def fail(self, problem: Exception) -> None:
        """There should be a tree and there is none: sandboxes that need it fail with this."""
        if not self._future().done():
            self._future().set_exception(problem)
            self._future().exception()  # read, so that one that nobody waits for is not reported as lost

    async def tree(self) -> AgentTree | None:
        return await asyncio.shield(self._future())

    def _future(self) -> asyncio.Future[AgentTree | None]:
        if self._tree is None:
            self._tree = asyncio.get_running_loop().create_future()
        return self._tree

    def described(self) -> str:
        """Version and way of start, for people."""
        known = self._future().done() and self._future().exception() is None
        tree = self._future().result() if known else None
        if tree is None:
            return "from the images"
        how = "forked" if self.fork_ready else f"a plain program ({self.why_exec or 'the fork server is starting'})"
        return f"{tree.version}, {how}"

    def is_wanted_by(self, wish: Specification) -> bool:
        """Whether the command names an agent server."""
        return bool(wish.command) and agent_arguments(wish.command or ()) is not None

    def image_brings_it(self, image: ImageFacts, wish: Specification) -> bool:
        key = (image.id, (wish.command or ("",))[0])
        if key not in self._brought:
            self._brought[key] = brings(image, wish.command)
        return self._brought[key]
