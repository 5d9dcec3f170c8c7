"""What is an agent tree, and which commands run what is in it? Pure, but for reading the manifest.

A tree is a folder with a Python of its own, the C library that this Python needs, and the OpenHands agent server. It is
mounted read-only into containers at ``MOUNT_POINT`` and is started through its own loader, so that the container's
userland may be anything: an older or newer glibc, musl, no Python, no bash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from slurm_runtime.sandbox import Mount

MOUNT_POINT = "/opt/skyrl-agent"
MANIFEST = "agent.json"
SHIM = "bin/openhands-agent-server"
SHIM_TARGET = "/usr/local/bin/openhands-agent-server"  # what OpenHands' SDK names in its command
MODULE = "openhands.agent_server"
FORM = 1  # of the manifest; a tree of another form is not used

# What an agent server is told unless the client or the image says otherwise. It looks for a table of prices on the web
# while it is imported, and at each start for a browser: an image without one costs 0.14 s then, for a traceback. A line
# of its log costs 2 ms when it is laid out for a terminal, 0.1 ms as JSON, and each request is a line.
QUIET_DEFAULTS = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENHANDS_SUPPRESS_BANNER": "1",
    "OH_PRELOAD_TOOLS": "false",
    "LOG_JSON": "true",
}


@dataclass(frozen=True)
class AgentTree:
    """One tree. All paths but ``root`` are relative to it.

    ``python`` is the real program, ``executable`` the name under which it finds its library (and a script that runs
    it). ``modules`` are those that the server imports only when it starts. ``packages`` are name → version.
    """

    root: Path
    version: str
    python: str
    executable: str
    loader: str
    library_path: tuple[str, ...]
    holder: str
    modules: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)

    def python_command(self, arguments: Sequence[str], at: str | Path = MOUNT_POINT) -> tuple[str, ...]:
        """The tree's Python with ``arguments``, where the tree lies at ``at``.

        It is isolated (-I): PYTHONPATH and PYTHONHOME of an image are for the image's own Python.
        """
        executable = f"{at}/{self.executable}"
        return (*self._loaded(at), "--argv0", executable, f"{at}/{self.python}", "-I", *arguments)

    def exec_command(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """The agent server as a container's program."""
        return self.python_command(("-m", MODULE, *arguments))

    def holder_command(self) -> tuple[str, ...]:
        """A program that idles until it is killed."""
        return (*self._loaded(MOUNT_POINT), f"{MOUNT_POINT}/{self.holder}", "infinity")

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """The tree, and the name by which clients and users call its server."""
        return (Mount(str(self.root), MOUNT_POINT), Mount(str(self.root / SHIM), SHIM_TARGET))

    def _loaded(self, at: str | Path) -> tuple[str, ...]:
        return (f"{at}/{self.loader}", "--library-path", ":".join(f"{at}/{folder}" for folder in self.library_path))

    def manifest(self) -> str:
        """The text of the manifest."""
        kept = {name: value for name, value in asdict(self).items() if name != "root"}
        return json.dumps({"form": FORM, **kept}, indent=1) + "\n"


def load(root: Path) -> AgentTree:
    """The tree in a folder; ``ValueError`` says what is wrong with it."""
    try:
        kept = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if kept.pop("form", None) != FORM:
            raise ValueError("it was made by another version of this program")
        kept |= {name: tuple(kept[name]) for name in ("library_path", "modules")}
        tree = AgentTree(root=root.resolve(), **kept)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ValueError(
            f"{root} is no agent tree: {problem}; make one with 'python -m slurm_runtime.agent build'"
        ) from None
    for name in (tree.python, tree.loader, tree.holder, SHIM):
        if not (root / name).exists():
            raise ValueError(f"the agent tree {root} is damaged: {name} is missing; build it again")
    return tree


def agent_arguments(words: Sequence[str]) -> tuple[str, ...] | None:
    """The arguments of a command that runs an agent server, None for any other command.

    OpenHands' SDK sends ``/usr/local/bin/openhands-agent-server …`` or ``…/python -m openhands.agent_server …``.
    """
    if not words:
        return None
    program = words[0].rpartition("/")[2]
    if program in {"openhands-agent-server", "agent-server"}:
        return tuple(words[1:])
    if re.fullmatch(r"python[\d.]*", program) and list(words[1:3]) == ["-m", MODULE]:
        return tuple(words[3:])
    return None


def default_cache(environment: Mapping[str, str]) -> Path:
    """Where trees are kept: ``SKYRL_AGENT_CACHE``, else below the user's cache folder."""
    named = environment.get("SKYRL_AGENT_CACHE")
    if named:
        return Path(named)
    base = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '/nonexistent')}/.cache"
    return Path(base) / "skyrl" / "agent"


def newest(cache: Path) -> AgentTree | None:
    """The usable tree of the highest version in a cache folder."""
    found = []
    for manifest in cache.glob(f"*/{MANIFEST}"):
        try:
            found.append(load(manifest.parent))
        except ValueError:
            continue
    return max(found, key=lambda tree: version_key(tree.version), default=None)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
