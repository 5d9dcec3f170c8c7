"""Names of images, what a registry's refusal means, logins, and who brings an image: without a registry."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_runtime import registry_login
from slurm_runtime.images import Images
from slurm_runtime.podman import EngineError, Podman, PullFailed
from slurm_runtime.references import archive_name, full_name, reference_of, registry_of
from slurm_runtime.refusals import Meaning, Patience, meaning, next_step
from tests.runtime.fake_podman import FakePodman
from tests.runtime.server_process import server_process
from tests.runtime.test_server_process import environment_for, run

NEW = "docker.io/example/new:1"
HURRIED = Patience(limited_s=5, limited_first_s=0.01, longest_s=0.02, first_s=0.01)
DIGEST = "sha256:" + "0" * 64


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("example/tool", "docker.io/example/tool:latest"),
        ("ghcr.io/openhands/agent-server", "ghcr.io/openhands/agent-server:latest"),
        ("localhost/bb:latest", "localhost/bb:latest"),
        ("registry:5000/a/b:c", "registry:5000/a/b:c"),
        ("xingyaoww/sweb.eval.x86_64.a_s_b-1", "docker.io/xingyaoww/sweb.eval.x86_64.a_s_b-1:latest"),
        (f"quay.io/a/b@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
    ],
)
def test_full_names(given: str, full: str) -> None:
    assert full_name(given) == full
    assert full_name(full) == full
    assert full.startswith(f"{registry_of(given)}/")


@pytest.mark.parametrize("name", ["", "/", "A/B", "a b", "a:", "../../etc/passwd", "x/..", "a\n", "a/b:c/d", "-a"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of an image"):
        full_name(name)


words = st.text("abz09", min_size=1, max_size=40)
parts = st.builds(lambda first, middle, last: first + middle + last, words, st.sampled_from("._-"), words)


@given(parts, parts, parts)
def test_an_archives_name_is_a_file_name_and_can_be_read_back(folder: str, name: str, tag: str) -> None:
    reference = f"docker.io/{folder}/{name}:{tag}"
    try:
        file = archive_name(reference)
    except ValueError as problem:
        assert "longer" in str(problem)
        return
    assert "/" not in file
    assert reference_of(file) == reference


@pytest.mark.parametrize("file", ["", ".tar", "x.tar", "docker.io%2Fa%2Fb.tar", "docker.io%2fa%2fb%3a1.tar", "a.part"])
def test_files_that_are_no_archives(file: str) -> None:
    assert reference_of(file) is None


def test_a_digest_has_no_archive() -> None:
    with pytest.raises(ValueError, match="name a tag"):
        archive_name(f"a/b@{DIGEST}")


# --- refusals, in Podman's words -------------------------------------------------------------------------------------

LIMITED = (
    "initializing source docker://r/bb:latest: pinging container registry r: too many requests to registry",
    "reading manifest 1 in docker.io/x/y: toomanyrequests: You have reached your pull rate limit.",
    "copying system image from manifest list: received unexpected HTTP status: 429 Too Many Requests",
)
PASSING = (
    'Get "https://r/v2/": dial tcp 127.0.0.1:5999: connect: connection refused',
    "read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer",
    "reading blob sha256:0: received unexpected HTTP status: 503 Service Unavailable",
    'Get "https://r/v2/": net/http: TLS handshake timeout',
    "unexpected EOF",
    'writing blob: adding layer with blob "sha256:0": layer not known',
)
FINAL = (
    "reading manifest latest in r/nonesuch: manifest unknown: manifest unknown",
    "reading manifest latest in r/bb: unauthorized: authentication required",
    "reading manifest 1 in docker.io/x/y: requested access to the resource is denied",
    'Get "https://nonesuch.invalid/v2/": dial tcp: lookup nonesuch.invalid on 127.0.0.53:53: no such host',
    'Get "https://r/v2/": http: server gave HTTP response to HTTPS client',
    "(Mirrors also failed: [m/x/y:1: connect: connection refused]): docker.io/x/y:1: manifest unknown",
    "(Mirrors also failed: [m/x/y:1: manifest unknown]): upstream/x/y:1: dial tcp: lookup upstream: i/o timeout",
    "something that nobody has seen",
)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(w, Meaning.LIMITED) for w in LIMITED]
    + [(w, Meaning.PASSING) for w in PASSING]
    + [(w, Meaning.FINAL) for w in FINAL],
)
def test_what_a_refusal_means(words: str, wanted: Meaning) -> None:
    assert meaning(words) is wanted


def test_an_images_own_name_is_no_refusal() -> None:
    image = "docker.io/o/toomanyrequests:429"
    assert meaning(f"reading {image}: manifest unknown", image) is Meaning.FINAL


def test_an_image_of_localhost_is_asked_of_no_registry_again() -> None:
    words = "pinging container registry localhost: connection refused"
    assert meaning(words, "localhost/built:1") is Meaning.FINAL
    assert "in no registry" in next_step(words, "localhost/built:1")
    assert meaning(words, "localhost:5000/pushed:1") is Meaning.PASSING


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (FINAL[0], "check the image's name and tag"),
        (FINAL[1], "podman login"),
        (FINAL[3], "REGISTRY_MIRRORS"),
        (FINAL[4], "insecure"),
        (FINAL[5], "check the image's name and tag"),
        (FINAL[6], "check the image's name and tag"),
        (FINAL[7], ""),
        (LIMITED[0], "prebuild_images"),
    ],
)
def test_what_to_do_next(words: str, step: str) -> None:
    found = next_step(words)
    assert step in found
    assert bool(step) == bool(found)


def test_how_long_it_waits() -> None:
    patience = Patience(limited_s=100, limited_first_s=10, longest_s=40, tries=3, first_s=1, spread=lambda: 1.0)
    limited = [patience.pause_s(Meaning.LIMITED, failures, 0) for failures in (1, 2, 3, 4, 50)]
    assert limited == [15, 30, 60, 60, 60]
    assert patience.pause_s(Meaning.LIMITED, 2, 69) == 30
    assert patience.pause_s(Meaning.LIMITED, 2, 71) is None
    assert [patience.pause_s(Meaning.PASSING, failures, 0) for failures in (1, 2, 3)] == [1.5, 3, None]
    assert patience.pause_s(Meaning.FINAL, 1, 0) is None


# --- logins ----------------------------------------------------------------------------------------------------------


def auth_file(folder: Path, text: str) -> Path:
    path = folder / "auth.json"
    path.write_text(text)
    path.chmod(0o600)
    return path


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def test_logins_travel_in_a_header(tmp_path: Path) -> None:
    entries = {"r:5000": {"auth": encoded("me", "pass:word")}, "helper.io": {}, "q.io/o": {"auth": encoded("a", "b")}}
    path = auth_file(tmp_path, json.dumps({"auths": entries}))
    header = registry_login.headers(path)[registry_login.HEADER]
    assert json.loads(base64.urlsafe_b64decode(header)) == {
        "r:5000": {"username": "me", "password": "pass:word"},
        "q.io/o": {"username": "a", "password": "b"},
    }
    assert list(registry_login.doubts(path)) == []


def test_without_a_file_podman_uses_its_own(tmp_path: Path) -> None:
    assert registry_login.headers(None) == {}
    assert registry_login.headers(auth_file(tmp_path, '{"auths": {}}')) == {}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "PlantedSecret", '{"auths": []}', '{"auths": {"r": "PlantedSecret"}}']
    + [
        json.dumps({"auths": {"r": {"auth": auth}}})
        for auth in ("PlantedSecret!", base64.b64encode(b"Planted").decode())
    ],
)
def test_a_file_that_is_none_is_said_without_its_contents(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"is no auth file of Podman; make it with 'podman login") as caught:
        registry_login.read(auth_file(tmp_path, text))
    assert "Planted" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        registry_login.read(tmp_path / "none")


def test_a_file_that_others_can_read_is_doubted(tmp_path: Path) -> None:
    path = auth_file(tmp_path, json.dumps({"auths": {"r": {"auth": encoded("a", "b")}}}))
    path.chmod(0o644)
    assert "chmod 600" in next(registry_login.doubts(path))
    assert "no login of its own" in " ".join(registry_login.doubts(auth_file(tmp_path, '{"auths": {"r": {}}}')))


# --- who brings an image ---------------------------------------------------------------------------------------------


def told(said: list[str]) -> Callable[[str], None]:
    return said.append


def test_one_pull_for_all_and_all_hear_of_it() -> None:
    engine = FakePodman(pull_delay_s=0.4, registry={NEW})
    said: list[list[str]] = [[] for _ in range(20)]

    async def ask() -> None:
        images = Images(engine)
        await asyncio.gather(*(images.need(NEW, "missing", told(lines)) for lines in said))
        assert images.under_way() == ()
        await images.need(NEW, "missing")

    asyncio.run(ask())
    assert engine.pulls == [NEW]
    for lines in said:
        assert lines[0] == f"image {NEW} is being pulled"
        assert lines[-1] == f"image {NEW} is being pulled: Copying blob sha256:0123"
        assert len(lines) <= 3


def test_what_is_under_way_is_shown() -> None:
    async def ask() -> str:
        images = Images(FakePodman(pull_delay_s=5, registry={NEW}))
        asker = asyncio.create_task(images.need(NEW, "missing"))
        await asyncio.sleep(0.3)
        (shown,) = images.under_way()
        asker.cancel()
        await asyncio.gather(asker, return_exceptions=True)
        assert images.under_way(), "a pull that nobody waits for goes on"
        await images.close()
        assert images.under_way() == ()
        return f"{shown.image}: {shown.progress}"

    assert asyncio.run(ask()) == f"{NEW}: image {NEW} is being pulled: Copying blob sha256:0123"


def test_a_registry_that_limits_is_asked_again_and_everyone_hears_when() -> None:
    engine = FakePodman(registry={NEW}, refusals=[*LIMITED, PASSING[0]])
    said: list[str] = []
    slow = Patience(limited_first_s=0.3, first_s=0.3)
    asyncio.run(Images(engine, patience=slow).need(NEW, "missing", told(said)))
    assert len(engine.pulls) == 5
    assert any("the registry limits how often it is asked; it is asked again in" in line for line in said)
    assert any("trouble that may pass" in line for line in said)


def test_a_limit_that_lasts_is_a_failure_with_a_next_step() -> None:
    engine = FakePodman(registry={NEW}, refusals=[LIMITED[1]] * 1000)
    patience = Patience(limited_s=1.0, limited_first_s=0.05, longest_s=0.1)
    began = time.monotonic()
    with pytest.raises(PullFailed, match=r"pull rate limit\.; log in .*prebuild_images"):
        asyncio.run(Images(engine, patience=patience).need(NEW, "missing"))
    assert time.monotonic() - began < 10
    assert len(engine.pulls) > 2


@pytest.mark.parametrize(("words", "pulls"), [(FINAL[0], 1), (FINAL[1], 1), (PASSING[0], HURRIED.tries)])
def test_what_does_not_pass_fails(words: str, pulls: int) -> None:
    engine = FakePodman(registry={NEW}, refusals=[words] * 10)
    with pytest.raises(PullFailed) as caught:
        asyncio.run(Images(engine, patience=HURRIED).need(NEW, "missing"))
    assert words in str(caught.value)
    assert len(engine.pulls) == pulls


def test_a_registry_is_asked_for_a_few_images_at_once() -> None:
    names = [f"docker.io/example/new:{number}" for number in range(6)]
    other = "quay.io/example/new:1"
    engine = FakePodman(pull_delay_s=0.5, registry={*names, other})
    said: list[str] = []

    async def ask() -> list[str]:
        images = Images(engine, at_once=2)
        asked = [asyncio.create_task(images.need(name, "missing", told(said))) for name in (*names, other)]
        await asyncio.sleep(0.3)
        begun = list(engine.pulls)
        await asyncio.gather(*asked)
        return begun

    assert asyncio.run(ask()) == [*names[:2], other]
    assert any("waits until one of 2 images from its registry is here" in line for line in said)


def test_policies() -> None:
    engine = FakePodman(registry={NEW}, images={NEW})

    async def ask() -> None:
        images = Images(engine)
        await images.need(NEW, "never")
        await images.need(NEW, "missing")
        assert engine.pulls == []
        await images.need(NEW, "always")
        assert engine.pulls == [NEW]
        with pytest.raises(EngineError, match="is not here"):
            await images.need("docker.io/example/none:1", "never")

    asyncio.run(ask())


def archived(folder: Path, image: str) -> Path:
    path = folder / archive_name(image)
    path.write_bytes(b"archive")
    return path


@pytest.mark.parametrize("asked", [NEW, "example/new:1"])
def test_an_archive_comes_before_the_registry(tmp_path: Path, asked: str) -> None:
    path = archived(tmp_path, NEW)
    engine = FakePodman(archives={path: NEW})
    engine.images.add(asked)  # the fake knows no short names

    async def ask() -> None:
        images = Images(engine, tmp_path)
        await images.pull(asked, "missing")

    asyncio.run(ask())
    assert engine.loads == [path]
    assert engine.pulls == []


@pytest.mark.parametrize("holds", [None, "docker.io/example/other:1"])
def test_a_broken_archive_is_reported_and_the_registry_asked(
    tmp_path: Path, holds: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm_runtime.logs.log.propagate", True)
    path = archived(tmp_path, NEW)
    engine = FakePodman(registry={NEW}, archives={path: holds} if holds else {})
    asyncio.run(Images(engine, tmp_path).need(NEW, "missing"))
    assert engine.pulls == [NEW]
    assert f"the registry is asked for {NEW}, because {path} holds" in caplog.text


def test_always_means_the_registry(tmp_path: Path) -> None:
    engine = FakePodman(registry={NEW}, archives={archived(tmp_path, NEW): NEW})
    asyncio.run(Images(engine, tmp_path).need(NEW, "always"))
    assert engine.loads == []
    assert engine.pulls == [NEW]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--registry-auth-file", "/nonesuch"], "--registry-auth-file: /nonesuch cannot be read"),
        (["--image-archives", "/nonesuch"], "--image-archives /nonesuch is no folder"),
    ],
)
def test_a_server_that_is_told_what_is_not_there_does_not_start(tmp_path: Path, flags: list[str], said: str) -> None:
    done = run("--host", "127.0.0.1", "--port", "0", *flags, environment=environment_for(tmp_path / "none.sock", "k"))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_logins_that_only_the_environment_names_fail_no_more_than_pulls(tmp_path: Path) -> None:
    """They may be meant for the machine that the job was submitted from."""
    with server_process(tmp_path, tmp_path / "none.sock", REGISTRY_AUTH_FILE="/nonesuch") as api:
        assert "REGISTRY_AUTH_FILE: /nonesuch cannot be read" in api.log()
    with pytest.raises(PullFailed, match=r"/nonesuch cannot be read: .*podman login"):
        asyncio.run(Podman(tmp_path / "none.sock", Path("/nonesuch")).pull(NEW, "missing"))
