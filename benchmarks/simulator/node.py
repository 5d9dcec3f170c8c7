"""One simulated worker node: what an API server answers to a head and to clients, with delays in place of Podman."""

from __future__ import annotations

import json
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.simulator.delays import Delays, drawn
from benchmarks.simulator.http import Call, header
from slurm_runtime import __version__

MOST_DEAD = 64  # that a node still tells of
MOST_GONE = 1024  # forgotten ones that are told to who asks with an older number
PATIENCE_S = 270.0  # of a start that waits for a slot


class Timer(Protocol):
    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Timer]


@dataclass
class Sandbox:
    """One simulated sandbox; ``number`` is that of its last change, ``state`` as in ``slurm_runtime.sandbox``."""

    runtime_id: str
    session_id: str
    image: str
    units: int
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    state: str = "pending"
    reason: str = "waits for a free slot"
    url: str | None = None
    number: int = 0
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


@dataclass
class Poll:
    """A GET /changes that is held open."""

    call: Call
    since: int
    timer: Timer


class Node:
    """The whole node; ``later`` runs something after so many seconds. ``times`` gets when a start came and was answered."""

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
        self.upto = 0
        self.draining = False
        self.is_mute = False
        self._delays, self._later, self._key, self._times, self._chance = delays, later, key.encode(), times, chance
        self._queue: deque[Sandbox] = deque()
        self._sandboxes: dict[str, Sandbox] = {}  # in the order of their last change
        self._of_session: dict[str, Sandbox] = {}
        self._dead: deque[str] = deque()
        self._gone: deque[tuple[int, str]] = deque()
        self._oldest_gone = 0  # who asks with an older number gets everything
        self._polls: list[Poll] = []
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
        except (ValueError, TypeError) as problem:
            call.answer_json(422, {"detail": f"the request cannot be read: {problem}"})

    def _route(self, call: Call, path: str, query: dict[str, list[str]]) -> None:
        plain = {
            ("GET", "/changes"): lambda: self._changes(call, query),
            ("POST", "/start"): lambda: self._start(call),
            ("POST", "/stop"): lambda: self._with(call, self._stop),
            ("POST", "/pause"): lambda: self._with(call, lambda call, one: self._turn(call, one, "paused")),
            ("POST", "/resume"): lambda: self._with(call, lambda call, one: self._turn(call, one, "ready")),
            ("POST", "/drain"): lambda: self._drain(call),
            ("GET", "/node"): lambda: call.answer_json(200, self.facts()),
            ("GET", "/health"): lambda: call.answer_json(200, {"status": "ok", "podman": "connected"}),
            ("GET", "/list"): lambda: call.answer_json(200, self._list()),
            ("GET", "/sessions/batch"): lambda: call.answer_json(200, self._batch(query.get("ids", []))),
        }
        if found := plain.get((call.method, path)):
            found()
        elif call.method == "GET" and path.startswith("/sessions/"):
            self._tell(call, self._of_session.get(unquote(path[10:])))
        elif call.method == "GET" and path.startswith("/runtime/"):
            self._tell(call, self._sandboxes.get(unquote(path[9:])))
        else:
            call.answer_json(404, {"detail": "Not Found"})

    @staticmethod
    def _tell(call: Call, one: Sandbox | None) -> None:
        if one is None:
            call.answer_json(404, {"detail": "no such sandbox here"})
        else:
            call.answer_json(200, one.told())

    def _with(self, call: Call, do: Callable[[Call, Sandbox], None]) -> None:
        runtime_id = json.loads(call.body).get("runtime_id")
        one = self._sandboxes.get(runtime_id or "")
        if runtime_id is None:
            call.answer_json(200, {"status": "nothing to do"})
        elif one is None:
            call.answer_json(404, {"detail": "no such sandbox here"})
        else:
            do(call, one)

    def _list(self) -> dict[str, Any]:
        names = ("runtime_id", "session_id", "status", "pod_status", "url", "image")
        living = [one.told() for one in self._sandboxes.values() if not one.is_dead]
        return {"runtimes": [{name: one.get(name) for name in names} for one in living], "total": len(living)}

    def _batch(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return [self._of_session[name].told() for name in dict.fromkeys(ids) if name in self._of_session]

    # Lives of sandboxes.

    def _start(self, call: Call) -> None:
        wish, received = json.loads(call.body), time.monotonic()
        session = wish.get("session_id") or f"session-{secrets.token_hex(8)}"
        one = self._of_session.get(session)
        if one is not None and not one.is_dead:
            self._ask(call, one)
            if one.state in {"ready", "paused"}:
                self._answer_askers(one, 201)
        elif self.draining:
            call.answer_json(503, {"detail": f"node {self.name} is draining and takes no new sandboxes"})
        else:
            units = max(1, math.ceil(wish.get("resource_factor") or 1))
            if units > self.slots:
                call.answer_json(422, {"detail": f"resource_factor needs {units} slots; this node has {self.slots}"})
                return
            self._times[session] = (received, 0.0)
            one = Sandbox(secrets.token_hex(8), session, str(wish.get("image") or "image"), units)
            self._of_session[session] = one
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
        body = json.dumps(one.told() if status == 201 else {"detail": one.reason}).encode()
        askers, one.askers = one.askers, []
        for call in askers:
            call.answer(status, body)

    def _stop(self, call: Call, one: Sandbox) -> None:
        done = {"status": "stopped", "runtime_id": one.runtime_id}
        if one.is_dead:
            call.answer_json(200, done)
            return
        self._cancel(one)

        def removed() -> None:
            self._die(one, "stopped", "stopped on request")
            call.answer_json(200, done)

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
            self.upto += 1
            self._gone.append((self.upto, one.runtime_id))
        while len(self._gone) > MOST_GONE:
            self._oldest_gone = self._gone.popleft()[0]

    @staticmethod
    def _cancel(one: Sandbox) -> None:
        for timer in one.timers:
            timer.cancel()
        one.timers = []

    def _turn(self, call: Call, one: Sandbox, state: str) -> None:
        if one.state not in {"ready", "paused"}:
            call.answer_json(409, {"detail": f"the sandbox is {one.state}"})
            return
        self._become(one, state, "paused on request" if state == "paused" else f"its server answers at {one.url}")
        told = one.told()
        names = ("status", "runtime_id", "session_id", "url", "session_api_key")
        call.answer_json(200, {name: told[name] for name in names})

    def _drain(self, call: Call) -> None:
        json.loads(call.body or b"{}")
        self.draining = True
        self._wake()
        call.answer_json(200, self.facts())

    # What the head hears.

    def facts(self) -> dict[str, Any]:
        """As ``NodeFacts``."""
        return {
            "name": self.name,
            "boot": self.boot,
            "slots": self.slots,
            "used": self.used,
            "waiting": len(self._queue),
            "draining": self.draining,
            "images": self.images,
            "podman": "connected",
            "version": __version__,
        }

    def _become(self, one: Sandbox, state: str, reason: str) -> None:
        one.state, one.reason = state, reason
        self._changed(one)

    def _changed(self, one: Sandbox) -> None:
        self.upto += 1
        one.number = self.upto
        self._sandboxes.pop(one.runtime_id, None)
        self._sandboxes[one.runtime_id] = one
        self._wake()

    def _wake(self) -> None:
        polls, self._polls = self._polls, []
        for poll in polls:
            poll.timer.cancel()
            poll.call.answer_json(200, self.changes(poll.since, self.boot))

    def _changes(self, call: Call, query: dict[str, list[str]]) -> None:
        since, wait_s = int(query.get("since", ["0"])[0]), float(query.get("wait_s", ["0"])[0])
        boot = query.get("boot", [""])[0]
        if wait_s <= 0 or boot != self.boot or since != self.upto:
            call.answer_json(200, self.changes(since, boot))
            return
        poll = Poll(call, since, self._later(wait_s, lambda: self._time_is_up(poll)))
        self._polls.append(poll)
        call.on_gone = lambda: self._drop(poll)

    def _time_is_up(self, poll: Poll) -> None:
        self._drop(poll)
        poll.call.answer_json(200, self.changes(poll.since, self.boot))

    def _drop(self, poll: Poll) -> None:
        poll.timer.cancel()
        if poll in self._polls:
            self._polls.remove(poll)

    def changes(self, since: int, boot: str) -> dict[str, Any]:
        """As ``ChangesAnswer``."""
        complete = boot != self.boot or since < self._oldest_gone or since > self.upto
        found, gone = [], []
        for one in reversed(self._sandboxes.values()):
            if not complete and one.number <= since:
                break
            found.append(one.told())
        if not complete:
            for number, runtime_id in reversed(self._gone):
                if number <= since:
                    break
                gone.append(runtime_id)
        return {
            "node": self.facts(),
            "upto": self.upto,
            "complete": complete,
            "sandboxes": found[::-1],
            "gone": gone,
        }

    @property
    def living(self) -> list[str]:
        """Sessions of the sandboxes that live."""
        return [one.session_id for one in self._sandboxes.values() if not one.is_dead]
