"""Which host port does a sandbox get? Known before its container exists, so that its URL can be told at once."""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass, field

from slurm_runtime.podman import EngineError


@dataclass
class Reservation:
    """One port. It is held by a bound socket until ``release``, so that no other program gets it meanwhile."""

    number: int
    holder: socket.socket | None = None

    def release(self) -> None:
        """Let Podman bind it; again is fine."""
        if self.holder is not None:
            self.holder.close()
            self.holder = None


@dataclass
class Ports:
    """The ports of sandboxes: those of ``allowed``, or any that the kernel calls free, on address ``host_ip``."""

    host_ip: str
    allowed: range | None = None
    taken: set[int] = field(default_factory=set)
    _turn: int = -1

    def reserve(self) -> Reservation:
        """A port that nobody uses, the least recently tried first; ``EngineError`` where the range has none left."""
        reservation = self._any() if self.allowed is None else self._of_range(self.allowed)
        self.taken.add(reservation.number)
        return reservation

    def adopt(self, number: int) -> Reservation:
        """The port of a container that runs already."""
        self.taken.add(number)
        return Reservation(number)

    def give(self, reservation: Reservation) -> None:
        """It may be had again."""
        reservation.release()
        self.taken.discard(reservation.number)

    def _any(self) -> Reservation:
        holder = self._bound(0)
        if holder is None:
            raise EngineError(f"this machine has no free port left on {self.host_ip}")
        return Reservation(holder.getsockname()[1], holder)

    def _of_range(self, allowed: range) -> Reservation:
        for _ in range(len(allowed)):
            self._turn = (self._turn + 1) % len(allowed)
            number = allowed[self._turn]
            if number not in self.taken and (holder := self._bound(number)) is not None:
                return Reservation(number, holder)
        raise EngineError(f"all {len(allowed)} ports of --sandbox-port-range are in use; widen it")

    def _bound(self, number: int) -> socket.socket | None:
        """A socket that is bound and does not listen; None where the port is in use."""
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # A port whose last connections are still in TIME_WAIT is free; one that somebody listens on is not.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((self.host_ip, number))
            return holder
        except OSError as problem:
            with contextlib.suppress(OSError):
                holder.close()
            if problem.errno in {errno.EADDRINUSE, errno.EACCES}:
                return None
            raise EngineError(f"cannot bind a port on {self.host_ip}: {problem.strerror}") from None
