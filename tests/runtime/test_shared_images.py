"""Nodes that share images: who fetches, who waits, who takes over, and that each blob is pulled once by all of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from slurm_runtime.claims import Claims, Owner, Seen, parse_failure, parse_owner
from slurm_runtime.deadlines import within
from slurm_runtime.images import Images
from slurm_runtime.podman import BadArchive, EngineError, NoSuchImage, PullFailed, ignored
from slurm_runtime.references import archive_name
from slurm_runtime.refusals import Patience
from slurm_runtime.shared_images import SharedImages, Wait
from tests.runtime import local_registry, podman_service
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.fake_podman import FakePodman
from tests.runtime.local_registry import Refuser, Registry, push_new, refuser_before, registries_conf, registry
from tests.runtime.server_process import server_process
from tests.runtime.test_builds import parts, tar_gz
from tests.runtime.test_contract import eventually
from tests.runtime.test_server_process import Server
from tests.users import ordinary_user, subordinate_uids

NEW = "docker.io/example/new:1"
UNKNOWN = "reading manifest 1 in docker.io/example/new: manifest unknown"
LONG_S = 90.0  # for what takes seconds where the machine has nothing else to do
HURRIED = Patience(limited_s=1, limited_first_s=0.01, longest_s=0.02, first_s=0.01)


@dataclass
class Store(FakePodman):
    """A fake whose archives say themselves which image they hold; writing one takes ``save_s``, or fails.

    A pull is not over before ``hold`` is true.
    """

    hold: Callable[[], bool] = lambda: True
    save_s: float = 0.0
    save_fails: BaseException | None = None
    saves: int = 0

    async def pull(self, image: str, policy: str, on_line: Callable[[str], None] = ignored) -> None:
        await super().pull(image, policy, on_line)
        await until(self.hold)

    async def save(self, image: str, target: Path) -> None:
        self.saves += 1
        target.write_text(image)
        await asyncio.sleep(self.save_s)
        if self.save_fails is not None:
            raise self.save_fails

    async def load(self, archive: Path) -> tuple[str, ...]:
        self.loads.append(archive)
        image = archive.read_text()
        if not image.startswith("docker.io/") and not image.startswith("localhost/"):
            raise BadArchive(f"{archive} holds no image that Podman can take")
        self.images.add(image)
        return (image,)


@dataclass
class Node:
    """One node with a store of its own."""

    name: str
    folder: Path
    store: Store
    silent_s: float = 60.0
    heard: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = SharedImages(self.folder, self.store, self.name, self.silent_s, beat_s=0.05)
        self.images = Images(self.store, patience=HURRIED, shared=self.shared)

    async def need(self, image: str = NEW) -> None:
        await self.images.need(image, "missing", self.heard.append)


def nodes(folder: Path, *stores: Store, **fields: Any) -> list[Node]:
    return [
        Node(f"cpu-{letter}", folder / "images", store, **fields)
        for letter, store in zip("abcdef", stores, strict=False)
    ]


def together(made: list[Node], work: Callable[[list[Node]], Awaitable[None]]) -> None:
    """Do something on all nodes, and close them in order."""

    async def live() -> None:
        try:
            await within(40, work(made))
            for node in made:  # archives are written beside all else
                await until(lambda node=node: not node.shared._tasks)  # type: ignore[misc]
        finally:
            for node in made:
                await node.images.close()

    asyncio.run(live())


def pulls(made: list[Node]) -> list[str]:
    return [image for node in made for image in node.store.pulls]


def left(folder: Path) -> list[str]:
    """What lies in the folder beside archives."""
    return sorted(path.name for path in (folder / "images").iterdir() if path.name.startswith("."))


async def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# --- on fakes: the rules ---------------------------------------------------------------------------------------------


def test_one_node_fetches_and_the_others_load(tmp_path: Path) -> None:
    made = nodes(tmp_path, *(Store(registry={NEW}) for _ in range(4)))
    for node in made:
        node.store.hold = lambda: sum(f"to fetch image {NEW}" in " ".join(one.heard) for one in made) == 3

    async def work(made: list[Node]) -> None:
        await asyncio.gather(*(node.need() for node in made for _ in range(8)))
        assert all(NEW in node.store.images for node in made)

    together(made, work)
    assert pulls(made) == [NEW]
    (fetcher,) = (node for node in made if node.store.pulls)
    for node in made:
        assert node is fetcher or f"waits for {fetcher.name} to fetch image {NEW}" in node.heard
    assert left(tmp_path) == []
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700


def test_its_own_starts_do_not_wait_for_the_archive(tmp_path: Path) -> None:
    made = nodes(tmp_path, Store(registry={NEW}, save_s=30), Store(registry={NEW}))

    async def work(made: list[Node]) -> None:
        began = time.monotonic()
        await made[0].need()
        assert time.monotonic() - began < 10
        waiting = asyncio.create_task(made[1].need())
        await until(lambda: any("waits for cpu-a" in line for line in made[1].heard))
        assert not waiting.done()
        await made[0].images.close()  # it ends before the archive is whole: the other one does it itself
        await waiting

    together(made, work)
    assert pulls(made) == [NEW, NEW]
    assert left(tmp_path) == []


def test_what_the_registry_refuses_all_who_wait_learn_at_once(tmp_path: Path) -> None:
    made = nodes(tmp_path, *(Store(pull_delay_s=0.3, refusals=[UNKNOWN] * 9) for _ in range(3)))

    async def work(made: list[Node]) -> None:
        said = await asyncio.gather(*(node.need() for node in made), return_exceptions=True)
        assert all(isinstance(problem, PullFailed) and UNKNOWN in str(problem) for problem in said), said
        assert sum("which asked for all nodes" in str(problem) for problem in said) == 2
        with pytest.raises(PullFailed, match="which asked for all nodes"):  # one that comes a moment later
            await made[0].need()

    together(made, work)
    assert pulls(made) == [NEW]


def test_trouble_of_one_node_is_not_the_others(tmp_path: Path) -> None:
    full = Store(pull_delay_s=0.3, refusals=["writing blob: no space left on device"])
    made = nodes(tmp_path, full, Store(registry={NEW}))

    async def work(made: list[Node]) -> None:
        first = asyncio.create_task(made[0].need())
        await until(lambda: bool(full.pulls))
        await made[1].need()
        with pytest.raises(PullFailed, match="no space left"):
            await first

    together(made, work)
    assert pulls(made) == [NEW, NEW]


def test_an_old_failure_does_not_count(tmp_path: Path) -> None:
    made = nodes(tmp_path, Store(refusals=[UNKNOWN], registry={NEW}))

    async def work(made: list[Node]) -> None:
        with pytest.raises(PullFailed):
            await made[0].need()
        (note,) = (path for path in (tmp_path / "images").iterdir() if path.name.startswith(".failed-"))
        os.utime(note, (time.time() - 3600, time.time() - 3600))
        await made[0].need()

    together(made, work)
    assert pulls(made) == [NEW, NEW]
    assert left(tmp_path) == [], "what was had after all failed no more"


def elsewhere(image: str = NEW) -> Owner:
    """The owner of another host."""
    return replace(Owner.here(image, "cpu-x"), boot="another")


def claimed(folder: Path, owner: Owner) -> Path:
    """A claim in the folder that is nobody's here."""
    (folder / "images").mkdir(exist_ok=True)
    claim = Claims(folder / "images", "cpu-x").take(owner.image)
    assert claim is not None
    text = claim.path.read_text().replace(claim.owner.token, owner.token)
    claim.path.write_text(text.replace(claim.owner.boot, owner.boot).replace(f"{claim.owner.pid}", f"{owner.pid}"))
    return claim.path


def test_an_owner_without_a_sign_of_life_is_replaced(tmp_path: Path) -> None:
    claimed(tmp_path, elsewhere())
    made = nodes(tmp_path, Store(registry={NEW}), silent_s=0.5)
    together(made, lambda made: made[0].need())
    assert pulls(made) == [NEW]
    assert f"waits for cpu-x to fetch image {NEW}" in made[0].heard
    assert left(tmp_path) == []


def test_silence_is_that_of_ones_own_clock() -> None:
    now = 0.0
    wait, owner = Wait(60.0, clock=lambda: now), elsewhere()
    for now, changed_ns, is_over in [
        (0, 7, False),
        (59, 7, False),
        (59.5, 9, False),
        (119, 9, False),
        (119.6, 9, True),
    ]:
        assert wait.is_over(Seen(owner, changed_ns)) is is_over, now


def test_who_fetches_gives_signs_of_life(tmp_path: Path) -> None:
    made = nodes(tmp_path, Store(registry={NEW}, pull_delay_s=30))

    async def work(made: list[Node]) -> None:
        asking = asyncio.create_task(made[0].need())
        await until(lambda: bool(made[0].store.pulls))
        (claim,) = (tmp_path / "images").glob(".claim-*")
        first = claim.stat().st_mtime_ns
        await until(lambda: claim.stat().st_mtime_ns > first)
        asking.cancel()
        await made[0].images.close()

    together(made, work)
    assert left(tmp_path) == []


def test_no_wait_is_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm_runtime.shared_images.WAIT_S", 0.5)
    claimed(tmp_path, elsewhere())
    made = nodes(tmp_path, Store(registry={NEW}))
    together(made, lambda made: made[0].need())
    assert pulls(made) == [NEW]


def test_a_dead_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    claimed(tmp_path, replace(Owner.here(NEW, "cpu-x"), pid=ended.pid))
    made = nodes(tmp_path, Store(registry={NEW}))
    together(made, lambda made: made[0].need())
    assert pulls(made) == [NEW]


def test_who_was_thought_dead_keeps_out_of_the_successors_way(tmp_path: Path) -> None:
    mine, other = Claims(tmp_path, "cpu-a"), Claims(tmp_path, "cpu-b")
    claim = mine.take(NEW)
    assert claim is not None and claim.beat()
    assert other.take(NEW) is None
    other.clear(NEW, claim.owner)
    second = other.take(NEW)
    assert second is not None
    assert not claim.beat()
    claim.release()
    assert other.seen(NEW) is not None
    mine.clear(NEW, claim.owner)  # of one that has been replaced already
    assert second.beat()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    claims = Claims(tmp_path, "cpu-a")
    claim = claims.take(NEW)
    assert claim is not None
    assert claims.take(NEW) is None
    claim.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"token": 3}', '"x"', "[" * 100000, '{"token": "", "pid": "x"}']
)
def test_files_that_hold_nonsense(text: str) -> None:
    assert parse_owner(text).host == "another node"
    assert not parse_owner(text).is_dead()
    assert parse_failure(text, 0.0) is None


def test_a_broken_archive_is_replaced(tmp_path: Path) -> None:
    made = nodes(tmp_path, Store(registry={NEW}), Store())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / archive_name(NEW)).write_text("broken")

    async def work(made: list[Node]) -> None:
        await made[0].need()
        await made[1].need()

    together(made, work)
    assert pulls(made) == [NEW]


@pytest.mark.parametrize("hindrance", ["full", "no folder"])
def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, hindrance: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm_runtime.logs.log.propagate", True)
    full = OSError(errno.ENOSPC, "No space left on device") if hindrance == "full" else None
    names = {f"docker.io/example/new:{number}" for number in range(5)}
    folder = tmp_path if hindrance == "full" else tmp_path / "gone"
    made = nodes(folder, *(Store(registry=names, save_fails=full) for _ in range(2)))

    async def work(made: list[Node]) -> None:
        for name in sorted(names):
            await asyncio.gather(*(node.need(name) for node in made))
            await until(lambda: not any(node.shared._tasks for node in made))

    together(made, work)
    assert all(set(node.store.pulls) == names for node in made)
    warned = {id(record): record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    said = [
        words for words in warned.values() if "each node fetches them by itself" in words
    ]  # caplog may hold it twice
    assert len(said) == len(made), said
    assert hindrance != "full" or [node.store.saves for node in made] == [1, 1], "it is not tried with every image"
    assert hindrance != "full" or list((folder / "images").iterdir()) == []


def test_an_image_that_podman_cannot_save_is_had_all_the_same(tmp_path: Path) -> None:
    made = nodes(tmp_path, *(Store(registry={NEW}, save_fails=EngineError("no")) for _ in range(2)))

    async def work(made: list[Node]) -> None:
        await asyncio.gather(*(node.need() for node in made))

    together(made, work)
    assert pulls(made) == [NEW, NEW]
    assert left(tmp_path) == []


def test_always_asks_the_registry_on_each_node(tmp_path: Path) -> None:
    made = nodes(tmp_path, *(Store(registry={NEW}) for _ in range(2)))

    async def work(made: list[Node]) -> None:
        await asyncio.gather(*(node.images.need(NEW, "always") for node in made))

    together(made, work)
    assert pulls(made) == [NEW, NEW]


def test_archives_made_beforehand_come_first(tmp_path: Path) -> None:
    (tmp_path / archive_name(NEW)).write_text(NEW)
    node = Node("cpu-a", tmp_path / "images", Store())
    node.images.archives = tmp_path
    together([node], lambda made: made[0].need())
    assert node.store.loads == [tmp_path / archive_name(NEW)]
    assert not (tmp_path / "images").exists()


def test_an_image_that_was_built_is_there_for_all(tmp_path: Path) -> None:
    built = "localhost/skyrl/runtime:t1"
    made = nodes(tmp_path, Store(images={built}), Store())

    async def work(made: list[Node]) -> None:
        with pytest.raises(NoSuchImage):
            await made[1].images.find(built)
        await made[0].images.offer(built)
        assert (await made[1].images.find(built)).id
        await made[1].need(built)
        claimed(tmp_path, elsewhere("localhost/skyrl/runtime:t2"))  # nobody is waited for who could only fail
        with pytest.raises(PullFailed, match="in no registry"):
            await made[1].need("localhost/skyrl/runtime:t2")

    together(made, work)
    assert pulls(made) == ["localhost/skyrl/runtime:t2"]


def test_an_image_named_by_its_digest_is_not_shared(tmp_path: Path) -> None:
    image = f"docker.io/example/new@sha256:{'0' * 64}"
    made = nodes(tmp_path, *(Store(registry={image}) for _ in range(2)))

    async def work(made: list[Node]) -> None:
        await asyncio.gather(*(node.need(image) for node in made))

    together(made, work)
    assert pulls(made) == [image, image]


# --- two servers, each with a Podman and a store of its own, and a registry that counts -------------------------------


@dataclass(frozen=True)
class Place:
    """A registry, one before it that can be slow, and two Podmans."""

    open: Registry
    refuser: Refuser
    podmans: tuple[podman_service.Service, podman_service.Service]

    def push(self, name: str) -> str:
        """A new image in the registry; its name by way of the slow one."""
        push_new(self.podmans[0], f"{self.open.name}/{name}:1")
        return f"{self.refuser.name}/{name}:1"

    def asked(self, name: str, kind: str) -> list[str]:
        """The ``blobs`` or ``manifests`` of an image that were asked for, with repetitions."""
        return [path for path in self.refuser.paths if f"/{name}/{kind}/" in path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    owner = ordinary_user()
    lacks = local_registry.missing() or podman_service.missing()
    if lacks or not subordinate_uids(owner.pw_name):
        pytest.skip(f"this machine lacks {lacks or 'subordinate ids of ' + owner.pw_name}")
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(registry(tmp_path_factory.mktemp("registry")))
        refuser = stack.enter_context(refuser_before(served))
        conf = registries_conf(served.name, refuser.name)
        first, second = (stack.enter_context(podman_service.running(owner, conf)) for _ in range(2))
        yield Place(served, refuser, (first, second))


@contextlib.contextmanager
def node_of(place: Place, number: int, folder: Path, *flags: str, ends_with: int = 0) -> Iterator[Server]:
    """A server that shares images in ``folder`` with the others."""
    (own := folder / str(number)).mkdir()
    share = ("--share-images", str(folder / "images"), "--cpus", "8", "--cpus-per-worker", "0.5", *flags)
    with server_process(own, place.podmans[number].socket, *share, ends_with=ends_with) as server:
        yield server


def start(server: Server, image: str, session: str) -> httpx.Response:
    wish = {"image": image, "command": SERVE, "session_id": session}
    return server.request("POST", "/start", wish, timeout=LONG_S)


@pytest.mark.podman
def test_each_blob_is_pulled_once_by_two_nodes(place: Place, tmp_path: Path) -> None:
    image = place.push("shared")
    with (
        node_of(place, 0, tmp_path) as one,
        node_of(place, 1, tmp_path) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        wanted = [(server, image, f"s-{number}") for number in range(4) for server in (one, other)]
        answers = list(pool.map(lambda words: start(*words), wanted))
        assert [answer.status_code for answer in answers] == [201] * 8, [answer.text for answer in answers]
        eventually(lambda: (tmp_path / "images" / archive_name(image)).is_file(), LONG_S)
    blobs = place.asked("shared", "blobs")
    assert blobs and len(blobs) == len(set(blobs)), blobs
    assert len(place.asked("shared", "manifests")) == 1


@pytest.mark.podman
def test_when_the_node_that_fetches_is_killed_another_does_it(place: Place, tmp_path: Path) -> None:
    image = place.push("orphaned")
    place.refuser.delay_s = LONG_S
    with (
        contextlib.ExitStack() as first,
        node_of(place, 1, tmp_path) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        first.callback(setattr, place.refuser, "delay_s", 0.0)
        one = first.enter_context(node_of(place, 0, tmp_path, ends_with=-signal.SIGKILL))
        lost = pool.submit(start, one, image, "lost")
        eventually(lambda: place.asked("orphaned", "blobs"), LONG_S)
        found = pool.submit(start, other, image, "found")
        words = f"waits for {socket.gethostname()} to fetch image {image}"
        eventually(lambda: words in other.request("GET", "/sessions/found").text, LONG_S)
        one.process.kill()
        place.refuser.delay_s = 0.0
        with pytest.raises(httpx.TransportError):
            lost.result(LONG_S)
        assert found.result(LONG_S).status_code == 201, found.result().text
        assert "another node does" in other.log()


@pytest.mark.podman
def test_what_one_node_builds_another_starts(place: Place, tmp_path: Path) -> None:
    image = "localhost/skyrl/built-for-all:1"
    context = base64.b64encode(tar_gz(f"FROM {IMAGE}\nENV BUILT=yes\n".encode()))
    with node_of(place, 0, tmp_path, "--enable-image-build") as one, node_of(place, 1, tmp_path) as other:

        def ask(server: Server, path: str, **query: str) -> Any:
            return server.request("GET", f"{path}?{urlencode(query)}").json()

        assert not ask(other, "/image_exists", image=image)["exists"]
        url, headers = f"http://127.0.0.1:{one.port}/build", {"X-API-Key": one.key or ""}
        begun = httpx.post(url, files=parts(image, context=context), headers=headers, trust_env=False)
        assert begun.status_code == 200, begun.text
        build_id = begun.json()["build_id"]
        eventually(lambda: ask(one, "/build_status", build_id=build_id)["status"] == "SUCCESS", LONG_S)
        assert ask(other, "/image_exists", image=image)["exists"]
        assert start(other, image, "built").status_code == 201
