"""One simulated worker node: what an API server answers to a head and to clients, with delays in place of Podman."""

from __future__ import annotations

import json
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.simulator.delays import Delays, drawn
from benchmarks.simulator.http import Call, header
from slurm_runtime import __version__
from slurm_runtime.changes import Changes
from slurm_runtime.node_models import DRAINING, FULL, GATHER_S, MOST_POLLS, REFUSED, UPTO, WAIT

MOST_DEAD = 64  # that a node still tells of
PATIENCE_S = 270.0  # of a start that waits for a slot
CHANGING = frozenset({"/start", "/stop", "/pause", "/resume", "/drain"})
WAIT_HEADER = WAIT.lower().encode()


class Timer(Protocol):
    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Timer]


@dataclass
class Sandbox:
    """One simulated sandbox; ``state`` as in ``slurm_runtime.sandbox``."""

    runtime_id: str
    session_id: str
    image: str
    units: int
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    state: str = "pending"
    reason: str = "waits for a free slot"
    url: str | None = None
    has_slots: bool = False
    askers: list[Call] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list)

    @property
    def is_dead(self) -> bool:
        return self.state in {"stopped", "failed"}

    @property
    def status(self) -> str:
        if self.is_dead:
            return "stopped"
        return "paused" if self.state == "paused" else "running" if self.url else "starting"

    @property
    def pod_status(self) -> str:
        return {"ready": "ready", "failed": "failed", "stopped": "not found"}.get(self.state, "pending")

    def told(self) -> dict[str, Any]:
        """As a ``RuntimeAnswer``."""
        return {
            "runtime_id": self.runtime_id,
            "session_id": self.session_id,
            **({"url": self.url} if self.url else {}),
            "status": self.status,
            "pod_status": self.pod_status,
            "session_api_key": self.key,
            "work_hosts": {},
            "restart_count": 0,
            "restart_reasons": [],
            "events": [self.reason],
            "container_statuses": [{"state": self.state, "reason": self.reason}],
            **({"pod_logs": self.reason} if self.state == "failed" else {}),
            "image": self.image,
        }


@dataclass(eq=False)
class Poll:
    """A GET /changes that is held open."""

    call: Call
    since: int
    boot: str
    timer: Timer | None = None


class Node:
    """The whole node; ``later`` runs something after so many seconds.

    ``times`` gets when each start came and when it was answered, by the monotonic clock.
    """

    def __init__(
        self,
        name: str,
        url: str,
        slots: int,
        images: Sequence[str],
        delays: Delays,
        later: Later,
        key: str,
        times: dict[str, tuple[float, float]],
        chance: random.Random,
    ) -> None:
        self.name, self.url, self.slots, self.images = name, url, slots, list(images)
        self.boot = secrets.token_hex(8)
        self.used = 0
        self.draining = ""
        self.is_mute = False
        self.log = Changes()
        self._delays, self._later, self._key, self._times, self._chance = delays, later, key.encode(), times, chance
        self._queue: deque[Sandbox] = deque()
        self._sandboxes: dict[str, Sandbox] = {}
        self._of_session: dict[str, Sandbox] = {}
        self._dead: deque[str] = deque()
        self._polls: list[Poll] = []
        self._gathering: Timer | None = None
        self._told_at = 0.0
        self._ports = 20_000

    # Requests.

    def handle(self, call: Call) -> None:
        """Answer a request, now or later; a mute node never does."""
        if self.is_mute:
            return
        parts = urlsplit(call.target)
        if header(call.head, b"x-api-key") != self._key and parts.path != "/health":
            call.answer_json(401, {"detail": "missing or wrong API key: send it as header X-API-Key"})
            return
        try:
            self._route(call, parts.path, parse_qs(parts.query))
        except (ValueError, TypeError, AttributeError) as problem:
            self._answer(call, 422, {"detail": f"the request cannot be read: {problem}"})

    def _answer(self, call: Call, status: int, found: object, refused: str = "") -> None:
        """With the headers that a head reads; a mute node answers nothing that it was asked before either."""
        if self.is_mute:
            return
        more = f"\r\n{UPTO}: {self.log.upto}" if call.target in CHANGING else ""
        call.answer_json(status, found, (more + (f"\r\n{REFUSED}: {refused}" if refused else "")).encode())

    def _route(self, call: Call, path: str, query: dict[str, list[str]]) -> None:
        plain: dict[tuple[str, str], Callable[[], None]] = {
            ("GET", "/changes"): lambda: self._changes(call, query),
            ("POST", "/start"): lambda: self._start(call),
            ("POST", "/stop"): lambda: self._with(call, self._stop),
            ("POST", "/pause"): lambda: self._with(call, lambda call, one: self._turn(call, one, "paused")),
            ("POST", "/resume"): lambda: self._with(call, lambda call, one: self._turn(call, one, "ready")),
            ("POST", "/drain"): lambda: self._drain(call),
            ("GET", "/node"): lambda: self._answer(call, 200, self.facts(-1)),
            ("GET", "/health"): lambda: self._answer(call, 200, {"status": "ok", "podman": "connected"}),
            ("GET", "/list"): lambda: self._answer(call, 200, self._list()),
            ("GET", "/sessions/batch"): lambda: self._answer(call, 200, self._batch(query.get("ids", []))),
        }
        if found := plain.get((call.method, path)):
            found()
        elif call.method == "GET" and path.startswith("/sessions/"):
            self._tell(call, self._of_session.get(unquote(path[10:])))
        elif call.method == "GET" and path.startswith("/runtime/"):
            self._tell(call, self._sandboxes.get(unquote(path[9:])))
        else:
            self._answer(call, 404, {"detail": "Not Found"})

    def _tell(self, call: Call, one: Sandbox | None) -> None:
        if one is None:
            self._answer(call, 404, {"detail": "no such sandbox here"})
        else:
            self._answer(call, 200, one.told())

    def _with(self, call: Call, do: Callable[[Call, Sandbox], None]) -> None:
        runtime_id = json.loads(call.body).get("runtime_id")
        if runtime_id is None:
            nothing = "nothing to stop" if call.target == "/stop" else "nothing to do"
            self._answer(call, 200, {"status": nothing})
        elif one := self._sandboxes.get(runtime_id):
            do(call, one)
        else:
            self._answer(call, 404, {"detail": "no such sandbox here"})

    def _list(self) -> dict[str, Any]:
        names = ("runtime_id", "session_id", "status", "pod_status", "url", "image")
        living = [one.told() for one in self._sandboxes.values() if not one.is_dead]
        return {"runtimes": [{name: one.get(name) for name in names} for one in living], "total": len(living)}

    def _batch(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return [self._of_session[name].told() for name in dict.fromkeys(ids) if name in self._of_session]

    # Lives of sandboxes.

    def _start(self, call: Call) -> None:
        wish = json.loads(call.body)
        session = wish.get("session_id") or f"session-{secrets.token_hex(8)}"
        units = max(1, math.ceil(wish.get("resource_factor") or 1))
        one = self._of_session.get(session)
        if one is not None and not one.is_dead:
            self._ask(call, one)
            if one.state in {"ready", "paused"}:
                self._answer_askers(one, 201)
        elif units > self.slots:
            self._answer(call, 422, {"detail": f"resource_factor needs {units} slots; this node has {self.slots}"})
        elif self.draining:
            self._answer(call, 503, {"detail": f"node {self.name} drains ({self.draining})"}, DRAINING)
        elif header(call.head, WAIT_HEADER) == b"0" and (self._queue or self.used + units > self.slots):
            self._answer(call, 503, {"detail": f"no room: {self.used} of {self.slots} slots are in use"}, FULL)
        else:
            self._enter(call, Sandbox(secrets.token_hex(8), session, str(wish.get("image") or "image"), units))

    def _enter(self, call: Call, one: Sandbox) -> None:
        self._times[one.session_id] = (time.monotonic(), 0.0)
        self._sandboxes[one.runtime_id] = self._of_session[one.session_id] = one
        self._ask(call, one)
        self._changed(one)
        self._queue.append(one)
        one.timers.append(self._later(PATIENCE_S, lambda: self._no_room(one)))
        self._grant()

    def _ask(self, call: Call, one: Sandbox) -> None:
        one.askers.append(call)
        call.on_gone = lambda: self._hung_up(call, one)

    def _hung_up(self, call: Call, one: Sandbox) -> None:
        if call in one.askers:
            one.askers.remove(call)
        if not one.askers and not one.is_dead:
            self._die(one, "stopped", "the client hung up during /start")

    def _grant(self) -> None:
        """First come, first served."""
        while self._queue and self.used + self._queue[0].units <= self.slots:
            one = self._queue.popleft()
            self.used += one.units
            one.has_slots = True
            self._cancel(one)
            self._ports = 20_000 + (self._ports - 19_999) % 40_000
            one.url = f"http://127.0.0.1:{self._ports}"
            self._become(one, "pending", "its container is being started")
            self._bring_up(one, drawn(self._delays.start_s, self._chance))

    def _bring_up(self, one: Sandbox, seconds: float) -> None:
        running = seconds * self._delays.running_share
        one.timers = [
            self._later(running, lambda: self._become(one, "starting", "its server does not answer yet")),
            self._later(seconds, lambda: self._ready(one)),
        ]

    def _ready(self, one: Sandbox) -> None:
        self._become(one, "ready", f"its server answers at {one.url}")
        self._times[one.session_id] = (self._times[one.session_id][0], time.monotonic())
        self._answer_askers(one, 201)

    def _no_room(self, one: Sandbox) -> None:
        self._queue.remove(one)
        self._die(one, "stopped", f"no room: {self.used} of {self.slots} sandbox slots are in use")

    def _answer_askers(self, one: Sandbox, status: int) -> None:
        found = one.told() if status == 201 else {"detail": one.reason}
        askers, one.askers = one.askers, []
        for call in askers:
            self._answer(call, status, found, FULL if status == 503 else "")

    def _stop(self, call: Call, one: Sandbox) -> None:
        done = {"status": "stopped", "runtime_id": one.runtime_id}
        if one.is_dead:
            self._answer(call, 200, done)
            return
        self._cancel(one)

        def removed() -> None:
            self._die(one, "stopped", "stopped on request")
            self._answer(call, 200, done)

        one.timers.append(self._later(drawn(self._delays.stop_s, self._chance), removed))

    def _die(self, one: Sandbox, state: str, reason: str) -> None:
        if one.is_dead:
            return
        self._cancel(one)
        if one in self._queue:
            self._queue.remove(one)
        self.used -= one.units if one.has_slots else 0
        one.has_slots = False
        self._become(one, state, reason)
        self._answer_askers(one, 409 if one.url else 503)
        self._dead.append(one.runtime_id)
        self._forget_old()
        self._grant()

    def _forget_old(self) -> None:
        while len(self._dead) > MOST_DEAD:
            one = self._sandboxes.pop(self._dead.popleft())
            if self._of_session.get(one.session_id) is one:
                del self._of_session[one.session_id]
            self.log.note_gone(one.runtime_id)

    @staticmethod
    def _cancel(one: Sandbox) -> None:
        for timer in one.timers:
            timer.cancel()
        one.timers = []

    def _turn(self, call: Call, one: Sandbox, state: str) -> None:
        if one.state not in {"ready", "paused"}:
            self._answer(call, 409, {"detail": f"the sandbox is {one.state}"})
            return
        self._become(one, state, "paused on request" if state == "paused" else f"its server answers at {one.url}")
        told = one.told()
        names = ("status", "runtime_id", "session_id", "url", "session_api_key")
        self._answer(call, 200, {name: told[name] for name in names})

    def _drain(self, call: Call) -> None:
        self.draining = self.draining or str(json.loads(call.body or b"{}").get("reason", "on request"))
        self.log.note_server()
        self._wake()
        self._answer(call, 200, self.facts(-1))

    # What the head hears.

    def facts(self, since: int) -> dict[str, Any]:
        """As ``NodeFacts``; its images only to who does not know them yet."""
        return {
            "name": self.name,
            "boot": self.boot,
            "slots": self.slots,
            "used": self.used,
            "waiting": len(self._queue),
            "draining": bool(self.draining),
            "reason": self.draining,
            **({"images": self.images} if since < 0 else {}),
            "podman": "connected",
            "version": __version__,
        }

    def _become(self, one: Sandbox, state: str, reason: str) -> None:
        one.state, one.reason = state, reason
        self._changed(one)

    def _changed(self, one: Sandbox) -> None:
        self.log.note(one.runtime_id)
        self._wake()

    def _wake(self) -> None:
        """Answer who waits, a little later where the last answer is not long ago: changes come in bunches."""
        if self._polls and self._gathering is None:
            pause_s = max(0.0, self._told_at + GATHER_S - time.monotonic())
            self._gathering = self._later(pause_s, self._tell_all)

    def _tell_all(self) -> None:
        self._gathering = None
        polls, self._polls = self._polls, []
        for poll in polls:
            self._tell_poll(poll)

    def _tell_poll(self, poll: Poll) -> None:
        if poll.timer:
            poll.timer.cancel()
        self._told_at = time.monotonic()
        self._answer(poll.call, 200, self.changes(poll.since, poll.boot))

    def _changes(self, call: Call, query: dict[str, list[str]]) -> None:
        since, wait_s = int(query.get("since", ["-1"])[0]), float(query.get("wait_s", ["0"])[0])
        poll = Poll(call, since, query.get("boot", [""])[0])
        if wait_s <= 0 or poll.boot != self.boot or not 0 <= since <= self.log.upto:
            self._tell_poll(poll)
            return
        if len(self._polls) >= MOST_POLLS:
            self._answer(call, 429, {"detail": "too many requests wait for changes already; a run has one head"})
            return
        poll.timer = self._later(wait_s, lambda: self._time_is_up(poll))
        self._polls.append(poll)
        call.on_gone = lambda: self._drop(poll)
        if since != self.log.upto:
            self._wake()

    def _time_is_up(self, poll: Poll) -> None:
        self._drop(poll)
        self._tell_poll(poll)

    def _drop(self, poll: Poll) -> None:
        if poll.timer:
            poll.timer.cancel()
        if poll in self._polls:
            self._polls.remove(poll)

    def changes(self, number: int, boot: str) -> dict[str, Any]:
        """As ``ChangesAnswer``."""
        since = self.log.since(number if boot == self.boot else -1)
        ids: Iterable[str] = self._sandboxes if since.changed is None else since.changed
        found = [self._sandboxes[one] for one in ids if one in self._sandboxes]
        return {
            "node": self.facts(-1 if since.changed is None else number),
            "upto": self.log.upto,
            "complete": since.changed is None,
            "sandboxes": [one.told() for one in found],
            "earlier": [one.runtime_id for one in found if self._of_session.get(one.session_id) is not one],
            "gone": list(since.gone),
        }

    @property
    def living(self) -> list[str]:
        """Sessions of the sandboxes that live."""
        return [one.session_id for one in self._sandboxes.values() if not one.is_dead]
