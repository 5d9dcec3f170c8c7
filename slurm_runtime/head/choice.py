"""Which node gets which start? Most free slots, with a bonus for an image at hand; first come, first served. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

IMAGE_IS_WORTH = 0.25  # of a node's slots: as many may be taken before another node fetches the image too
OF_ONE_NODE = "localhost/"  # images that no registry has: only the nodes that have them can start them


@dataclass
class Room:
    """What a node that takes sandboxes has free, less what is on its way to it, and the images that it has at hand.

    ``coming`` are images that starts on their way will fetch there.
    """

    node: str
    slots: int
    free: int
    images: Collection[str] = field(default_factory=frozenset)
    coming: set[str] = field(default_factory=set)

    def has(self, image: str) -> bool:
        return image in self.images or image in self.coming


@dataclass(frozen=True)
class Wanted:
    """What one start needs; it is not sent to the nodes in ``avoid``, which have refused it."""

    units: int
    image: str = ""
    avoid: Collection[str] = frozenset()


def fits(room: Room, wanted: Wanted) -> bool:
    return room.free >= wanted.units and room.node not in wanted.avoid


def choose(rooms: Iterable[Room], wanted: Wanted) -> Room | None:
    """The room for a start: the one with most free slots, where an image at hand counts for some; None for none.

    An image that no registry has, and that some node has, is started nowhere else.
    """
    best, most = None, -1.0
    for room in _able(rooms, wanted.image):  # a loop, since hundreds of rooms are looked at for each start
        if room.free + IMAGE_IS_WORTH * room.slots > most and fits(room, wanted):
            worth = _worth(room, wanted.image)
            if worth > most:
                best, most = room, worth
    return best


def _able(rooms: Iterable[Room], image: str) -> Iterable[Room]:
    if not image.startswith(OF_ONE_NODE):
        return rooms
    rooms = list(rooms)
    return [room for room in rooms if image in room.images] or rooms


def _worth(room: Room, image: str) -> float:
    return room.free + (IMAGE_IS_WORTH * room.slots if room.has(image) else 0.0)


def grants(waiting: Sequence[Wanted], rooms: Sequence[Room]) -> list[tuple[int, Room]]:
    """Which of the waiting starts, by their place in line, begin now, and where.

    One that does not fit yet keeps a node for itself, on which it will fit first, so that smaller ones cannot overtake
    it there for ever; they may on other nodes. Rooms are used up as they are granted.
    """
    granted: list[tuple[int, Room]] = []
    open_rooms = list(rooms)
    for place, wanted in enumerate(waiting):
        if not any(room.free > 0 for room in open_rooms):
            break
        room = choose(open_rooms, wanted)
        if room is not None:
            room.free -= wanted.units
            granted.append((place, room))
            continue
        able = [
            room
            for room in _able(open_rooms, wanted.image)
            if room.slots >= wanted.units and room.node not in wanted.avoid
        ]
        if able:
            open_rooms.remove(max(able, key=lambda room: room.free))
    return granted
