"""The wire between a head and its nodes: how a node joins, and how the head learns what happens on it.

A node is an API server that also serves clients by itself; a head is a router in front of several. The node registers
with the head (POST /nodes at the head) every ``BEAT_S`` seconds with the run's own key; the head holds one long poll
open at the node (GET /changes), and answers clients' reads from what it heard. So a head holds no state that its nodes
cannot tell it again: one that was killed knows all within one beat of its restart.

GET /changes tells each sandbox once, as it is when the answer is made, however often it has changed; a node keeps one
number for each, and the ids of the last ``GONE_KEPT`` that it has forgotten. ``complete`` is true where ``since`` is of
another life, is unknown, or lies before what is kept. What has been heard is applied in this order: with ``complete``
all that was known of the node is dropped; then ``gone``; then ``sandboxes``, each of them the newest of its session but
for those in ``earlier``. Then GET /sessions/{id}, /runtime/{id} and /list of the node say the same.

Every answer of a node to POST /start, /stop, /pause, /resume and /drain, an error too, has the header ``UPTO``: the
number of the last change that it may tell of. A head that has heard of as many changes knows it already; one that has
not can take the answer for the state at that number, or hold its own answer back until it has heard so many (within
``GATHER_S``), so that who has stopped a sandbox does not read that it runs.

A start that a head passes on has the header ``WAIT: 0``: it waits in the head's line and not also in the node's. Where
it would have to wait for a slot the node answers 503 at once, and nothing of it is left. Such a 503, one after waiting
in vain, that of a node that drains and that of one that stops carry the header ``REFUSED``: ``full``, ``draining``,
``stopping``. Any other error means that this node was asked and that asking another would be wrong. The living sandbox
of a session is found whatever the node refuses.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slurm_runtime.config import NODE_NAME
from slurm_runtime.models import Answer, RuntimeAnswer, Wire

BEAT_S = 2.0  # between a node's registrations
PATIENCE_S = 15.0  # of silence, both of its registrations and of its long poll, until a node counts as lost
LONGEST_POLL_S = 30.0  # that a node holds GET /changes open
MOST_POLLS = 16  # that it holds open at once; another one is 429: a run has one head
GATHER_S = 0.02  # between answers of GET /changes: a start changes several times within a few milliseconds
GONE_KEPT = 2000  # ids of forgotten sandboxes
MOST_IMAGES = 2000  # that a node tells of
UPTO = "X-SkyRL-Upto"
WAIT = "X-SkyRL-Wait"
REFUSED = "X-SkyRL-Refused"
FULL, DRAINING, STOPPING = "full", "draining", "stopping"

NodeName = Annotated[str, Field(min_length=1, max_length=256, pattern=NODE_NAME)]


class NodeFacts(Answer):
    """One node at one moment, in GET /changes and GET /node of the node."""

    name: str
    """The node's name within the run: its host name; unique, since Slurm gives a run a node once."""
    boot: str
    """Which life of the server this is; another one after a restart, whose numbers of changes begin anew."""
    slots: int
    """Slots for sandboxes in all."""
    used: int
    """Slots that are leased."""
    waiting: int
    """Starts that wait for a slot."""
    draining: bool
    """Whether new sandboxes are refused (503)."""
    reason: str = ""
    """Why it is draining; empty where it is not."""
    until: Annotated[float | None, Field(allow_inf_nan=False)] = None
    """When the node ends, as seconds since the epoch; absent where that is not known."""
    images: list[str] | None = None
    """Full names of images in the node's store, as far as they are known there, at most ``MOST_IMAGES``; absent in
    GET /changes where they are the same as at ``since``."""
    podman: str
    """As in ``HealthAnswer``."""
    version: str
    """The server's version."""


class ChangesAnswer(Answer):
    """GET /changes?since=N&boot=B&wait_s=S: what is new since change N of life B, at once or within S seconds."""

    node: NodeFacts
    """The node now."""
    upto: int
    """The number of the last change told: ``since`` of the next question."""
    complete: bool
    """Whether ``sandboxes`` are all there are (another life, or a gap), and not only those that have changed."""
    sandboxes: list[RuntimeAnswer]
    """Each sandbox that has changed once, as it is now; those that the node has forgotten are told by ``gone``."""
    earlier: list[str] = Field(default_factory=list)
    """Ids of those in ``sandboxes`` that GET /sessions/{id} does not find: their session has, or had, a newer one."""
    gone: list[str] = Field(default_factory=list)
    """Ids of sandboxes that the node no longer knows."""


class NodeWish(Wire):
    """POST /nodes at the head: a node joins, or says that it lives. The same again is fine."""

    name: NodeName
    """As in ``NodeFacts``."""
    url: Annotated[str, Field(pattern=r"^http://[^/\s]+$", max_length=512)]
    """``http://host:port`` of the node's API server, as the head reaches it."""
    boot: Annotated[str, Field(min_length=1, max_length=64)]
    """As in ``NodeFacts``."""
    job: Annotated[str, Field(max_length=64)] = ""
    """The Slurm job it belongs to, as ``123_4``; empty outside of one."""
    until: Annotated[float | None, Field(allow_inf_nan=False)] = None
    """As in ``NodeFacts``."""


class DrainRequest(Wire):
    """POST /nodes/{name}/drain at the head, POST /drain at a node: it takes no new sandboxes; those it has go on."""

    reason: Annotated[str, Field(max_length=1000)] = "on request"
    """Shown in GET /nodes, and told to whom a start is refused. The first reason stays."""


class NodeAnswer(Answer):
    """One line of GET /nodes."""

    name: str
    """As in ``NodeFacts``."""
    job: str
    """As in ``NodeWish``."""
    url: str
    """As in ``NodeWish``."""
    state: str
    """``joining`` (not yet heard out), ``ready``, ``draining``, ``silent`` (not heard of, not yet given up), ``lost``,
    or ``left``."""
    reason: str = ""
    """Why it is draining, silent, lost or gone."""
    slots: int
    """Slots in all; 0 until it was heard."""
    used: int
    """Slots that are leased."""
    sandboxes: int
    """Living sandboxes."""
    images: int
    """Images in its store, as far as that is known."""
    until: float | None = None
    """As in ``NodeFacts``."""
    heard_s_ago: float
    """Seconds since it was last heard of."""


class NodesAnswer(Answer):
    """GET /nodes at the head: every node that has joined, also those that have left or were lost."""

    nodes: list[NodeAnswer]
    """One entry each, by name."""
    slots: int
    """Slots of the nodes that take sandboxes now."""
    used: int
    """Of these, leased ones."""
    waiting: int
    """Starts that wait at the head for a slot."""
