"""The build path of the legacy clients: prefix, image_exists, build, build_status, and what is left on the disk."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.client
import io
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm_runtime import builds, uploads
from slurm_runtime.podman import EngineError, ImageFacts, NoSuchImage
from slurm_runtime.wishes import BadRequest
from tests.runtime import podman_service
from tests.runtime.commands import IMAGE
from tests.runtime.conftest import API_KEY, CONFIG, Api, KillablePodman, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.test_contract import eventually

MakeServer = Callable[..., Api]
TARGET = "localhost/skyrl/runtime:abc"
HERE = "localhost/skyrl/here:1"


@dataclass
class BuildingPodman(FakePodman):
    """Builds as told by the name: one that ends with ``bad`` fails, one with ``slow`` waits for ``go_on``."""

    built: list[tuple[str, bytes]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    go_on: bool = False

    async def image(self, name: str) -> ImageFacts:
        if name not in {HERE, *self.images}:
            raise NoSuchImage(f"{name}: image not known")
        return ImageFacts("abc", "2026-01-02T03:04:05Z", 123456, ("/bin/sh",), (), "")

    async def build(
        self, context: Path, tag: str, on_line: Callable[[str], None], arguments: Mapping[str, str] | None = None
    ) -> None:
        self.folders.append(context.parent)
        self.modes.append(context.parent.stat().st_mode & 0o777)
        on_line("STEP 1/2: FROM scratch")
        while tag.endswith("slow") and not self.go_on:
            await asyncio.sleep(0.01)
        if tag.endswith("bad"):
            raise EngineError("Podman could not build it: exit status 1; its last lines: no such package")
        self.built.append((tag, context.read_bytes()))


@cache  # gzip notes the time
def tar_gz(content: bytes = b"FROM scratch\n") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def parts(target: str | None = TARGET, context: bytes | None = None, tags: tuple[str, ...] = ()) -> list[Any]:
    """The body that the legacy client sends."""
    encoded = base64.b64encode(tar_gz()) if context is None else context
    fields: list[Any] = [("context", ("context.tar.gz", encoded))]
    fields += [] if target is None else [("target_image", (None, target))]
    return fields + [("tags", (None, tag)) for tag in tags]


def post(api: Api, *args: Any, **more: Any) -> httpx.Response:
    return api.client.post("/build", files=parts(*args, **more))


def ended(api: Api, build_id: str, deadline_s: float = 10.0) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        answer = api.client.get("/build_status", params={"build_id": build_id})
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()
        return None if found["status"] in {"QUEUED", "BUILDING"} else found

    result: dict[str, Any] = eventually(look, deadline_s)
    return result


@pytest.fixture
def engine() -> BuildingPodman:
    return BuildingPodman()


@pytest.fixture
def api(server_with: MakeServer, engine: BuildingPodman, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """A server that builds, its temporary files below ``tmp_path``."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return server_with(engine, build_images=True, registry_prefix="registry.example/skyrl")


def nothing_left(folder: Path) -> bool:
    return not list(folder.glob("skyrl-build-*"))


def test_34_registry_prefix(api: Api) -> None:
    assert api.client.get("/registry_prefix").json() == {"registry_prefix": "registry.example/skyrl"}


def test_34_image_exists_with_its_time_and_size(api: Api) -> None:
    found = api.client.get("/image_exists", params={"image": HERE}).json()
    assert found == {
        "exists": True,
        "url": str(api.client.base_url).rstrip("/"),
        "image": {"upload_time": "2026-01-02T03:04:05Z", "image_size_bytes": 123456},
    }


def test_34_an_image_that_is_not_here(api: Api, engine: BuildingPodman) -> None:
    query = {"image": "example/none:1"}
    expected = {"exists": False, "url": str(api.client.base_url).rstrip("/")}
    assert api.client.get("/image_exists", params=query).json() == expected
    assert engine.pulls == []
    assert api.client.get("/image_exists", params={**query, "pull_from_repo": "true"}).json() == expected
    assert engine.pulls[-1] == "example/none:1"


def test_34_an_image_is_fetched_where_asked_for(api: Api, engine: BuildingPodman) -> None:
    engine.registry.add("example/new:1")
    query = {"image": "example/new:1", "pull_from_repo": "true"}
    assert api.client.get("/image_exists", params=query).json()["exists"] is True


@pytest.mark.parametrize("image", ["", "a b", "x" * 2000, "a\nb"])
def test_names_that_are_none(api: Api, image: str) -> None:
    answer = api.client.get("/image_exists", params={"image": image})
    assert answer.status_code == 422
    assert isinstance(answer.json()["detail"], str)


def test_35_a_build_succeeds_under_all_its_names(api: Api, engine: BuildingPodman, tmp_path: Path) -> None:
    answer = post(api, tags=("localhost/skyrl/runtime:lock", TARGET))
    assert answer.status_code == 200, answer.text
    assert answer.json()["url"] == str(api.client.base_url).rstrip("/")
    found = ended(api, answer.json()["build_id"])
    assert (found["status"], found["image"]) == ("SUCCESS", TARGET)
    assert "error" not in found
    assert engine.built == [(TARGET, tar_gz()), ("localhost/skyrl/runtime:lock", tar_gz())]
    assert set(engine.modes) == {0o700}
    eventually(lambda: nothing_left(tmp_path))


def test_what_was_built_is_told_to_a_head(api: Api) -> None:
    names = {TARGET, "localhost/skyrl/runtime:lock"}
    assert not names & set(api.client.get("/node").json()["images"])
    assert ended(api, post(api, tags=tuple(names)).json()["build_id"])["status"] == "SUCCESS"
    assert names <= set(api.client.get("/node").json()["images"])


def test_35_a_failed_build_says_why(api: Api, tmp_path: Path) -> None:
    found = ended(api, post(api, f"{TARGET}bad").json()["build_id"])
    assert found["status"] == "FAILURE"
    assert "no such package" in found["error"]
    eventually(lambda: nothing_left(tmp_path))


def test_35_words_before_the_end_are_not_final_and_the_same_image_is_one_build(
    api: Api, engine: BuildingPodman
) -> None:
    first = post(api, f"{TARGET}slow").json()
    assert post(api, f"{TARGET}slow").json()["build_id"] == first["build_id"]
    assert post(api, f"{TARGET}-2-slow").json()["build_id"] != first["build_id"]
    queued = post(api, f"{TARGET}-3-slow").json()
    status = eventually(
        lambda: (found := api.client.get("/build_status", params=first).json()).get("progress") and found
    )
    assert (status["status"], status["progress"]) == ("BUILDING", "STEP 1/2: FROM scratch")
    assert api.client.get("/build_status", params=queued).json()["status"] == "QUEUED"
    engine.go_on = True
    assert ended(api, queued["build_id"])["status"] == "SUCCESS"
    assert post(api, f"{TARGET}slow").json()["build_id"] != first["build_id"]


def test_35_where_building_is_off_it_says_what_to_do(fake: Api) -> None:
    answer = post(fake)
    assert answer.status_code == 501
    assert "runtime_container_image" in answer.json()["detail"]
    assert fake.client.get("/build_status?build_id=x").status_code == 501


def test_an_unknown_build_is_404(api: Api) -> None:
    assert api.client.get("/build_status", params={"build_id": "none"}).status_code == 404


B64 = base64.b64encode(tar_gz())
BAD_PARTS = {
    "no name": parts(None),
    "two names": [*parts(), ("target_image", (None, "other"))],
    "a name with ..": parts("../../etc/passwd"),
    "a name with a space": parts("a b"),
    "a name with options": parts("--help"),
    "an empty name": parts(""),
    "a bad tag": parts(tags=("UPPER CASE",)),
    "no context": [("target_image", (None, TARGET))],
    "an empty context": parts(context=b""),
    "no base64": parts(context=b"%%%%"),
    "cut base64": parts(context=B64.rstrip(b"=")[:-1]),
    "base64 that goes on": parts(context=b"H4s=AAAA"),
    "no gzip": parts(context=base64.b64encode(b"plain text")),
    "two contexts": parts() + parts(),
    "too many fields": [*parts(), *[("x", (None, "y"))] * 200],
    "a long field": [*parts(), ("x", (None, "y" * 5000))],
}


@pytest.mark.parametrize("files", BAD_PARTS.values(), ids=list(BAD_PARTS))
def test_bad_bodies(api: Api, engine: BuildingPodman, tmp_path: Path, files: list[Any]) -> None:
    answer = api.client.post("/build", files=files)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"]
    assert engine.built == []
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=" + "b" * 500, b"x"),
        ("multipart/form-data; boundary=b", b"garbage"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\ncut"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"H: " + b"h" * 10_000),
        ("multipart/form-data; boundary=b", b""),
    ],
)
def test_bodies_that_are_no_form(api: Api, tmp_path: Path, kind: str, body: bytes) -> None:
    answer = api.client.post("/build", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert answer.json()["detail"]
    assert nothing_left(tmp_path)


def test_a_context_that_is_too_large(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads.receive, "__defaults__", (2 << 20,))
    large = base64.b64encode(gzip.compress(b"", 0) + bytes(4 << 20))
    answer = post(api, context=large)
    assert answer.status_code == 413
    assert nothing_left(tmp_path)


def test_a_full_disk_is_507(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonesuch")
    answer = post(api)
    assert answer.status_code == 507
    assert "cannot be written" in answer.json()["detail"]


def test_a_client_that_leaves_while_it_uploads_leaves_no_file(api: Api, tmp_path: Path) -> None:
    url = api.client.base_url
    with contextlib.closing(http.client.HTTPConnection(url.host, url.port or 0)) as connection:
        connection.putrequest("POST", "/build")
        connection.putheader("X-API-Key", API_KEY)
        connection.putheader("Content-Type", "multipart/form-data; boundary=b")
        connection.putheader("Content-Length", "1000000")
        connection.endheaders()
        connection.send(b'--b\r\nContent-Disposition: form-data; name="context"\r\n\r\nH4sI')
        eventually(lambda: not nothing_left(tmp_path))
    eventually(lambda: nothing_left(tmp_path))


def test_more_builds_than_are_taken_is_429(api: Api, engine: BuildingPodman, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "MOST_UNFINISHED", 2)
    assert [post(api, f"{TARGET}-{n}-slow").status_code for n in range(3)] == [200, 200, 429]
    engine.go_on = True


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


def submit(store: builds.Builds, target: str) -> Any:
    request = httpx.Request("POST", "http://x/", files=parts(target))
    return store.submit(pieces(request.read()), request.headers["content-type"])


def test_finished_builds_are_kept_up_to_a_number() -> None:
    async def scenario() -> None:
        store = builds.Builds(BuildingPodman().build, kept=3)
        for number in range(6):
            made = await submit(store, f"localhost/x:{number}")
            while store.under_way():
                await asyncio.sleep(0.001)
        assert store.get(made.build_id).status == "SUCCESS"
        assert len(store._builds) == 3

    asyncio.run(scenario())


def test_a_build_that_hangs_ends_and_a_closed_store_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scenario() -> None:
        store = builds.Builds(BuildingPodman().build, build_s=0.05)
        hung = await submit(store, "localhost/x:slow")
        while store.under_way():
            await asyncio.sleep(0.01)
        assert (store.get(hung.build_id).status, nothing_left(tmp_path)) == ("TIMEOUT", True)
        patient = builds.Builds(BuildingPodman().build)
        ids = [(await submit(patient, f"localhost/x:{n}-slow")).build_id for n in range(4)]
        await patient.close()
        assert {patient.get(build_id).status for build_id in ids} == {"CANCELLED"}
        assert nothing_left(tmp_path)

    asyncio.run(scenario())


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(1, 50), min_size=1))
def test_base64_in_pieces_of_any_size(content: bytes, sizes: list[int]) -> None:
    text, decoder, found, at, turn = base64.encodebytes(content), uploads.Base64Pieces(), b"", 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        found, at, turn = found + decoder.decode(text[at : at + size]), at + size, turn + 1
    decoder.finish()
    assert found == content


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_base64_of_anything_is_decoded_or_refused(text: bytes) -> None:
    decoder = uploads.Base64Pieces()
    try:
        decoder.decode(text)
        decoder.finish()
    except BadRequest as problem:
        assert "base64" in str(problem)


@pytest.mark.podman
def test_35_a_real_podman_builds_it_and_finds_it(
    rootless_podman: podman_service.Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = KillablePodman(rootless_podman.socket)
    target, other = "localhost/skyrl/built:1", "localhost/skyrl/built:other"
    with serving(engine, replace(CONFIG, build_images=True)) as api:
        context = base64.b64encode(tar_gz(f"FROM {IMAGE}\nENV BUILT=yes\n".encode()))
        begun = post(api, target, context=context, tags=(other,))
        assert begun.status_code == 200, begun.text
        found = ended(api, begun.json()["build_id"], 120.0)
        assert found["status"] == "SUCCESS", found
        for name in (target, other):
            there = api.client.get("/image_exists", params={"image": name}).json()
            assert there["exists"] is True
            assert there["image"]["image_size_bytes"] > 0
            datetime.fromisoformat(there["image"]["upload_time"][:19])
        failing = post(api, f"{target}-bad", context=base64.b64encode(tar_gz(b"FROM scratch\nCOPY none /\n")))
        wrong = ended(api, failing.json()["build_id"], 120.0)
        assert wrong["status"] == "FAILURE"
        assert "none" in wrong["error"]
        eventually(lambda: nothing_left(tmp_path))
