"""What the server was asked to do: one frozen object, and how the words of the command line are read. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # fit for a URL's path
MEMORY_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")


@dataclass(frozen=True)
class ServerConfig:
    """Everything that the manager and the HTTP surface are told.

    Times are seconds. ``api_key`` None means that no key is asked for. ``public_host`` None means this node's name.
    A /start that cannot be served is given up after ``list_patience_s`` or ``string_patience_s``, by the form of its
    command: shortly before the client that writes so gives up itself (120 s and 300 s). It is held back for up to
    ``ready_grace_s`` more so that it can already say ``ready``: clients look again only after 2 s.

    When Podman's service goes away, what was asked of it waits ``outage_s`` for another one on the same socket.

    ``adopt`` takes over the sandboxes of a server of the same job that was killed, instead of removing them. A request
    that comes before that is done waits up to ``adoption_patience_s``. Which had failed is read from ``failures_file``,
    where every server that has one writes it. So are the counts of the job in ``statistics_file``.

    ``node_name`` is this server's name as a node (empty: the host's), ``until`` when it ends (epoch seconds),
    ``drain_lead_s`` how long before that it takes no new sandboxes.

    ``pinning`` is ``docker_cpuset``, ``taskset`` or ``none``; ``agent_start`` is ``fork`` or ``exec``; ``network`` is
    ``private`` or ``deny``. Limits are for one slot, 0 for none. ``idle_timeout_s`` 0 never stops an idle sandbox. At
    most ``warm`` containers wait for the next sandboxes.
    """

    api_key: str | None = field(default=None, repr=False)
    adopt: bool = False
    failures_file: Path | None = None
    statistics_file: Path | None = None
    node_name: str = ""
    until: float | None = None
    drain_lead_s: float = 0.0
    default_image: str | None = None
    public_host: str | None = None
    cpus_per_worker: float = 1.0
    memory_bytes: int = 0
    pinning: str = "none"
    pids_limit: int = 2048
    disk_bytes: int = 0
    network: str = "private"
    agent_start: str = "fork"
    agent_image: str | None = None
    agent_dir: Path | None = None
    agent_cache: Path | None = None
    allowed_mounts: tuple[Path, ...] = ()
    image_archives: Path | None = None
    share_images: Path | None = None
    registry_auth_file: Path | None = None
    registry_prefix: str = "localhost/skyrl"
    build_images: bool = False
    idle_timeout_s: float = 0.0
    startup_timeout_s: float = 600.0
    sandbox_ports: range | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    list_patience_s: float = 105.0
    string_patience_s: float = 270.0
    ready_grace_s: float = 2.0
    connect_timeout_s: float = 60.0
    outage_s: float = 20.0
    adoption_patience_s: float = 30.0
    watch_period_s: float = 2.0
    starters: int = 4  # more in flight only queue in Podman: 20 starts a second with 4, 21 with 8, at twice the time
    removers: int = 8
    warm: int = 0

    @property
    def publish_ip(self) -> str:
        """The address on which sandbox ports are published: all, or loopback where the public host is."""
        if self.public_host is None or not is_loopback(self.public_host):
            return "0.0.0.0"
        return self.public_host if self.public_host[0].isdigit() else "127.0.0.1"


def is_loopback(host: str) -> bool:
    return LOOPBACK.fullmatch(host) is not None


def is_node_name(name: str) -> bool:
    return len(name) <= 256 and re.fullmatch(NODE_NAME, name) is not None


def parse_memory(text: str) -> int:
    """Bytes of ``16G``, ``512M``, ``1.5g``, ``16GB`` or ``16Gi``, in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])I?)?B?", text.strip().upper())
    if not match or float(match.group(1)) <= 0:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 16G or 512M")
    return int(float(match.group(1)) * MEMORY_UNITS[match.group(2) or ""])


def parse_port_range(text: str) -> range:
    """``20000-20999``, both ends included."""
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text.strip())
    first, last = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if not 0 < first <= last < 65536:
        raise ValueError(f"{text!r} is not a range of ports; write it like 20000-20999")
    return range(first, last + 1)


def parse_label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"{text!r} is not a label; write it like KEY=VALUE")
    return name, value
