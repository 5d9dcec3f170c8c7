"""Takes an agent tree out of an image: the files of a container that never ran, unpacked into a folder."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from slurm_runtime.agent.tree import MANIFEST, MOUNT_POINT, AgentTree, load

# Where in an image a tree may lie: it is all of the image, or lies where sandboxes have it.
PLACES = (".", MOUNT_POINT.lstrip("/"))
TAR = ("tar", "--extract", "--no-same-owner", "--exclude=./dev/*", "--exclude=dev/*", "-f", "-")


class NoTree(Exception):
    """The image has no agent tree; ``str()`` says what to do."""


async def take_out(files: AsyncIterator[bytes], image: str, folder: Path) -> AgentTree:
    """The tree in a tar stream of an image's files, unpacked in ``folder``; ``NoTree`` if there is none in it."""
    unpacking = await asyncio.create_subprocess_exec(
        *TAR, "-C", str(folder), stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert unpacking.stdin is not None
    try:
        async for piece in files:
            unpacking.stdin.write(piece)
            await unpacking.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass  # tar says below why it ended
    except BaseException:
        unpacking.kill()
        await unpacking.wait()
        raise
    unpacking.stdin.close()
    _, complaint = await unpacking.communicate()
    found = next((folder / place for place in PLACES if (folder / place / MANIFEST).is_file()), None)
    if found is None:
        words = complaint.decode("utf-8", "replace").strip()[-200:]
        raise NoTree(
            f"--agent-image {image} holds no agent tree ({MANIFEST} at / or {MOUNT_POINT}){words and f': {words}'}; "
            "make such an image from the folder that 'python -m slurm_runtime.agent path' prints"
        )
    try:
        return load(found)
    except ValueError as problem:
        raise NoTree(f"--agent-image {image}: {problem}") from None


def remove(folder: Path) -> None:
    """Remove what was taken out; its folders may be read-only."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
