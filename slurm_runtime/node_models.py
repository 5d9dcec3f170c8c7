"""The wire between a head and its nodes: how a node joins, and how the head learns what happens on it.

A node is an API server that also serves clients by itself; a head is a router in front of several. The node registers
with the head (POST /nodes at the head) every ``BEAT_S`` seconds with the run's own key; the head holds one long poll
open at the node (GET /changes), and answers clients' reads from what it heard. So a head holds no state that its nodes
cannot tell it again: one that was killed knows all within one beat of its restart.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slurm_runtime.models import Answer, RuntimeAnswer, Wire

BEAT_S = 2.0  # between a node's registrations
PATIENCE_S = 15.0  # of silence, both of its registrations and of its long poll, until a node counts as lost
LONGEST_POLL_S = 30.0  # that a node holds GET /changes open

NodeName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


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
    until: float | None = None
    """When the node ends, as seconds since the epoch; absent where that is not known."""
    images: list[str] = Field(default_factory=list)
    """References of images in the node's store, as far as they are known there."""
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
    gone: list[str] = Field(default_factory=list)
    """Ids of sandboxes that the node no longer knows."""


class NodeWish(Wire):
    """POST /nodes at the head: a node joins, or says that it lives. The same again is fine."""

    name: NodeName
    """As in ``NodeFacts``."""
    url: Annotated[str, Field(pattern=r"^http://[^/\\s]+$", max_length=512)]
    """``http://host:port`` of the node's API server, as the head reaches it."""
    boot: Annotated[str, Field(min_length=1, max_length=64)]
    """As in ``NodeFacts``."""
    job: Annotated[str, Field(max_length=64)] = ""
    """The Slurm job it belongs to, as ``123_4``; empty outside of one."""
    until: float | None = None
    """As in ``NodeFacts``."""


class DrainRequest(Wire):
    """POST /nodes/{name}/drain at the head, POST /drain at a node: it takes no new sandboxes; those it has go on."""

    reason: Annotated[str, Field(max_length=1000)] = "on request"
    """Shown in GET /nodes."""


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
