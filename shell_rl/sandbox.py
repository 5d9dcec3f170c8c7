"""One sandbox of the API server: asked for, waited for, used, stopped."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from shell_rl.errors import NoRoom, SandboxDied, SandboxesUnavailable, Unreachable
from shell_rl.sandbox_program import COMMAND_SECONDS, RUN_PATH, Execution, parse_reply, start_command
from shell_rl.web import Door, Reply, parse_address

log = logging.getLogger("shell_rl")

START_SECONDS = 180.0  # for one answer of /start; the server may hold the request while it waits for a slot
STOP_SECONDS = 30.0
READY_SECONDS = 300.0  # from the answer of /start to pod_status ready
ROOM_SECONDS = 60.0  # how long a 503 of /start is tried again
REACH_SECONDS = 10.0  # how long a broken connection to the API server is tried again
GIVE_UP_STATES = {"failed", "crashloopbackoff", "unknown"}


@dataclass(frozen=True)
class Sandbox:
    """A sandbox that answered as ready."""

    runtime_id: str
    door: Door

    def run(self, script: str) -> Execution:
        """Run shell text in a fresh directory of the sandbox.

        :raises SandboxDied: it does not answer, or not as ``sandbox_program`` does
        """
        try:
            reply = self.door.request("POST", RUN_PATH, script.encode(), timeout=COMMAND_SECONDS + 20)
        except Unreachable as error:
            raise SandboxDied(f"Sandbox {self.runtime_id} is gone: {error}") from error
        try:
            if reply.status != 200:
                raise ValueError(f"status {reply.status}, {reply.body[:200]!r}")
            return parse_reply(reply.body)
        except ValueError as error:
            raise SandboxDied(f"Sandbox {self.runtime_id} at {self.door.address} answered wrongly: {error}") from error


def _fields(reply: Reply, what: str) -> dict[str, object]:
    """The JSON object of a reply."""
    try:
        value = json.loads(reply.body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SandboxesUnavailable(f"{what} answered {reply.status} without a JSON object: {reply.body[:200]!r}")
    return value


def _text(fields: Mapping[str, object], name: str, what: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise SandboxesUnavailable(f"{what} answered without {name}; is this a remote runtime API?")
    return value


class RuntimeApi:
    """The API server's verbs, as far as this loop needs them; safe to use from several threads.

    :param url: base URL of the server (SANDBOX_REMOTE_RUNTIME_API_URL)
    :param key: its key (ALLHANDS_API_KEY)
    :param image: container image of the sandboxes; needs busybox
    """

    def __init__(self, url: str, key: str, image: str) -> None:
        headers = {"X-API-Key": key, "Content-Type": "application/json"}
        self._door = Door(parse_address(url), headers)
        self._image = image

    def _call(self, method: str, path: str, body: object = None, timeout: float = STOP_SECONDS) -> Reply:
        reply = self._door.request(method, path, json.dumps(body).encode() if body is not None else None, timeout)
        if reply.status == 401:
            raise SandboxesUnavailable(
                f"The API server at {self._door.address} refuses the key (401); "
                "ALLHANDS_API_KEY must be the key of this server."
            )
        return reply

    def _refusal(self, what: str, reply: Reply) -> str:
        detail = reply.body[:500].decode(errors="replace").strip()
        return f"{what} of the API server at {self._door.address} answered {reply.status}: {detail}"

    def _start(self, session_id: str) -> dict[str, object]:
        body = {
            "image": self._image,
            "command": start_command(),
            "working_dir": "/",
            "environment": {},
            "session_id": session_id,
            "resource_factor": 1,
        }
        reply = self._call("POST", "/start", body, START_SECONDS)
        if reply.status == 503:
            raise NoRoom(self._refusal("/start", reply))
        if not 200 <= reply.status < 300:
            raise SandboxesUnavailable(self._refusal("/start", reply))
        return _fields(reply, "/start")

    def _start_patiently(self, session_id: str, closing: threading.Event) -> dict[str, object]:
        """/start, again after 503 or a broken connection; the same session id makes the repetition harmless."""
        begin, pause = time.monotonic(), 0.5
        while True:
            try:
                return self._start(session_id)
            except (NoRoom, Unreachable) as error:
                patience = ROOM_SECONDS if isinstance(error, NoRoom) else REACH_SECONDS
                if time.monotonic() - begin + pause > patience or closing.wait(pause):
                    raise
            pause = min(2 * pause, 8.0)

    def start(self, session_id: str, closing: threading.Event) -> Sandbox:
        """A sandbox that is ready. Ends early when ``closing`` is set. Whoever calls must call ``stop`` afterwards,
        also when this raises.

        :raises NoRoom: no slot within ``ROOM_SECONDS``
        :raises SandboxesUnavailable: refused, failed, or not ready within ``READY_SECONDS``
        """
        fields = self._start_patiently(session_id, closing)
        runtime_id, url = _text(fields, "runtime_id", "/start"), _text(fields, "url", "/start")
        key = _text(fields, "session_api_key", "/start")
        self._wait_until_ready(session_id, closing)
        return Sandbox(runtime_id, Door(parse_address(url), {"X-Session-API-Key": key}))

    def _wait_until_ready(self, session_id: str, closing: threading.Event) -> None:
        deadline, pause, state = time.monotonic() + READY_SECONDS, 0.05, "?"
        while time.monotonic() < deadline:
            reply = self._call("GET", f"/sessions/{quote(session_id)}")
            if reply.status != 200:
                raise SandboxesUnavailable(self._refusal(f"/sessions/{session_id}", reply))
            fields = _fields(reply, "/sessions")
            state = _text(fields, "pod_status", "/sessions").lower()
            if state == "ready":
                return
            if state in GIVE_UP_STATES:
                raise SandboxesUnavailable(self._failure(state, fields))
            if closing.wait(pause):
                raise SandboxesUnavailable("Stopped while a sandbox was starting.")
            pause = min(1.5 * pause, 2.0)
        raise SandboxesUnavailable(
            f"A sandbox of {self._image} was not ready after {READY_SECONDS:.0f} s (still {state})."
        )

    def _failure(self, state: str, fields: Mapping[str, object]) -> str:
        logs = str(fields.get("pod_logs") or fields.get("restart_reasons") or "no pod_logs given")
        return (
            f"A sandbox of {self._image} ended before it was ready (pod_status {state}): {logs.strip()[-1000:]} "
            "(it needs an image with /bin/sh and busybox: CONTAINER_IMAGE or --image)"
        )

    def stop(self, session_id: str) -> None:
        """Stop whatever the session has, also where its /start has not been answered yet. Never raises: what could
        not be stopped is logged with its name."""
        for attempt in range(3):
            try:
                return self._stop(session_id)
            except SandboxesUnavailable as error:
                last = error
                time.sleep(0.2 * attempt)
        log.warning("Session %s could not be stopped: %s", session_id, last)
        return None

    def _stop(self, session_id: str) -> None:
        reply = self._call("GET", f"/sessions/{quote(session_id)}", timeout=5)
        if reply.status == 404:
            return
        fields = _fields(reply, "/sessions")
        reply = self._call("POST", "/stop", {"runtime_id": _text(fields, "runtime_id", "/sessions")})
        if not (200 <= reply.status < 300 or reply.status == 404):
            raise SandboxesUnavailable(self._refusal("/stop", reply))
