"""Images from a real registry through real Podman: once, with progress, with patience, with logins, through mirrors."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm_runtime.refusals import Patience
from tests.runtime import local_registry, podman_service
from tests.runtime.commands import SERVE
from tests.runtime.conftest import Api, KillablePodman, serving
from tests.runtime.local_registry import (
    PASSWORD,
    USER,
    Refuser,
    Registry,
    push_new,
    refuser_before,
    registries_conf,
    registry,
)
from tests.runtime.server_process import server_process
from tests.test_no_leaks import Sampler, shows
from tests.users import ordinary_user, subordinate_uids

pytestmark = pytest.mark.podman

HURRIED = Patience(limited_s=60, limited_first_s=1.0, longest_s=1.0, first_s=0.2)
UNREACHABLE = "upstream.invalid"  # a name that resolves nowhere (RFC 2606)


@dataclass(frozen=True)
class Place:
    """An open registry, one that asks for a login, one that refuses now and then, and a Podman that may use them."""

    open: Registry
    closed: Registry
    refuser: Refuser
    podman: podman_service.Service

    def push(self, name: str) -> str:
        """Make an image in the registry; Podman's own store does not have it then. Its full name."""
        target = f"{name}:1" if "/" in name else f"{self.open.name}/{name}:1"
        push_new(self.podman, target, login=target.startswith(self.closed.name))
        return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    owner = ordinary_user()
    lacks = local_registry.missing() or podman_service.missing()
    if lacks or not subordinate_uids(owner.pw_name):
        pytest.skip(f"this machine lacks {lacks or 'subordinate ids of ' + owner.pw_name}")
    home = tmp_path_factory.mktemp("registry")
    with (
        registry(home / "open") as open_one,
        registry(home / "closed", login=True) as closed,
        refuser_before(open_one) as refuser,
    ):
        mirrors = {UNREACHABLE: f"{open_one.name}/cache"}
        conf = registries_conf(open_one.name, closed.name, refuser.name, mirrors=mirrors)
        with podman_service.running(owner, conf) as podman:
            yield Place(open_one, closed, refuser, podman)


@pytest.fixture
def api(place: Place) -> Iterator[Api]:
    with serving(KillablePodman(place.podman.socket)) as server:
        server.manager.images.patience = HURRIED
        yield server


def started(api: Api, image: str, session: str) -> dict[str, object]:
    answer = api.start(image=image, command=SERVE, session_id=session)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


class Events:
    """What a session's events said while it started."""

    def __init__(self, api: Api, session: str) -> None:
        self.seen: list[str] = []
        self._api, self._session, self._stop = api, session, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Events:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            answer = self._api.client.get(f"/sessions/{self._session}")
            if answer.status_code == 200:
                self.seen += [event for event in answer.json()["events"] if event not in self.seen[-1:]]

    def have(self, *words: str) -> bool:
        return all(any(word in event for event in self.seen) for word in words)


def test_pulled_once_however_many_ask(place: Place, api: Api) -> None:
    image = place.push("once")
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda number: started(api, image, f"once-{number}"), range(12)))
    assert all(sandbox["url"] for sandbox in found)
    assert place.open.requests("manifests", "once") == 1


def test_its_progress_is_in_the_events_of_everyone_who_waits(place: Place, api: Api) -> None:
    place.push("slow")
    image = f"{place.refuser.name}/slow:1"
    place.refuser.delay_s = 1.5
    try:
        with Events(api, "slow-1") as first, Events(api, "slow-2") as second, ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda session: started(api, image, session), ("slow-1", "slow-2")))
    finally:
        place.refuser.delay_s = 0.0
    for events in (first, second):
        assert events.have(f"image {image} is being pulled: Copying blob sha256:"), events.seen
    assert place.open.requests("manifests", "slow") == 1


def test_a_registry_that_limits_is_asked_again(place: Place, api: Api) -> None:
    place.push("limited")
    image = f"{place.refuser.name}/limited:1"
    place.refuser.status, place.refuser.refused = 429, 0
    place.refuser.refusals = 25  # Podman itself asks twenty times before it says so
    with Events(api, "limited") as events:
        assert started(api, image, "limited")["pod_status"] in {"pending", "running", "ready"}
    assert place.refuser.refused == 25
    assert events.have("the registry limits how often it is asked; it is asked again in", " s, at "), events.seen


def test_trouble_of_the_registry_passes(place: Place, api: Api) -> None:
    place.push("trouble")
    place.refuser.status, place.refuser.refusals, place.refuser.refused = 503, 2, 0
    started(api, f"{place.refuser.name}/trouble:1", "trouble")
    assert place.refuser.refused == 2


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("{open}/nonesuch:1", ("manifest unknown", "check the image's name and tag")),
        ("{closed}/private:1", ("unauthorized", "podman login --authfile")),
        ("nonesuch.invalid/x/y:1", ("no such host", "REGISTRY_MIRRORS")),
    ],
)
def test_what_will_not_come_fails_at_once_with_podmans_words_and_a_next_step(
    place: Place, api: Api, image: str, words: tuple[str, ...]
) -> None:
    began = time.monotonic()
    answer = api.start(image=image.format(open=place.open.name, closed=place.closed.name), command=SERVE)
    assert answer.status_code >= 400
    assert time.monotonic() - began < 10
    for word in words:
        assert word in answer.json()["detail"]


def auth_file(folder: Path, registry: str, password: str) -> Path:
    path = folder / "auth.json"
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {registry: {"auth": auth}}}))
    path.chmod(0o600)
    return path


def test_a_login_from_a_file_opens_the_registry(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = place.push(f"{place.closed.name}/private")
    path = auth_file(tmp_path, place.closed.name, "wrong")
    with serving(KillablePodman(place.podman.socket, path)) as api:
        refused = api.start(image=image, command=SERVE)
        assert "unauthorized" in refused.json()["detail"]
        auth_file(tmp_path, place.closed.name, PASSWORD)  # read anew with each pull
        started(api, image, "private")
    assert PASSWORD not in caplog.text + refused.text


def test_a_mirror_stands_in_for_a_registry_that_cannot_be_reached(place: Place, api: Api) -> None:
    place.push(f"{place.open.name}/cache/folder/mirrored")
    started(api, f"{UNREACHABLE}/folder/mirrored:1", "mirrored")
    assert place.open.requests("manifests", "cache/folder/mirrored") == 1


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_login_shows_in_no_command_line_and_no_log(place: Place, tmp_path: Path, by_environment: bool) -> None:
    image = place.push(f"{place.closed.name}/secret-{by_environment}".lower())
    path = auth_file(tmp_path, place.closed.name, PASSWORD)
    path.chmod(0o644)
    flags = () if by_environment else ("--registry-auth-file", str(path))
    variables = {"REGISTRY_AUTH_FILE": str(path)} if by_environment else {}
    with (
        Sampler() as sampler,
        server_process(tmp_path, place.podman.socket, "--verbose", *flags, ends_with=0, **variables) as api,
    ):
        answer = api.start(image=image)
        assert answer.status_code == 201, answer.text
        assert sampler.looks > 2
    assert sampler.showing(PASSWORD) == []
    assert shows(api.log().encode(), PASSWORD) == []
    assert f"others can read the registry passwords in {path}" in api.log()
