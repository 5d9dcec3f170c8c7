"""The operator's page: what it tells, that it escapes everything, and that a real browser shows it."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from slurm_runtime.page import Failure, Progress, SandboxRow, Snapshot, age, render
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State
from tests.runtime.commands import EXIT, IMAGE
from tests.runtime.conftest import API_KEY, Api
from tests.runtime.test_contract import eventually, started

HOSTILE = "<script>alert('x')</script>&\"'\udc80"
VOID = {"meta", "br"}


def sandbox(session: str, state: State = State.READY, **fields: Any) -> Sandbox:
    wish = Specification(
        "r-" + session[:8],
        session,
        "the-session-key",
        fields.pop("image", "docker.io/example/task:1"),
        None,
        "/",
        {},
        1.0,
        "missing",
        Dialect.SDK,
        60000,
    )
    return Sandbox(wish, state, **{"reason": "its server answers", **fields})


BUSY = Snapshot(
    sandboxes=(
        SandboxRow(sandbox("agent-server-1", url="http://node7:31001"), 42.0),
        SandboxRow(sandbox("agent-server-2", State.PENDING, reason="image is being pulled: 41 %"), 3.0),
        SandboxRow(sandbox("agent-server-3", State.STARTING, url="http://node7:31002"), 1.0),
        SandboxRow(sandbox("agent-server-4", State.PAUSED, url="http://node7:31003"), 7300.0),
    ),
    slots_used=4,
    slots_total=7,
    waiting=2,
    pulls=(Progress("docker.io/example/large:2", "layer 3 of 9, 410 MB"),),
    builds=(Progress("localhost/skyrl/runtime:abc", "STEP 4/11: RUN pip install"),),
    failures=(Failure(sandbox("agent-0", State.FAILED, reason="exit code 3", last_lines="one\nlast words"), 65.0),),
    notes=("Limits of memory do not bite here: a watchdog stops offenders.",),
    agent="agent server 1.19.1, forked",
    podman="Podman 4.3.1, rootless",
    node="node7",
    version="0.1.0",
)


class Shape(HTMLParser):
    """The elements and the words of a page; notes what is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + "\n"


def shape(html: str) -> Shape:
    found = Shape()
    found.feed(html)
    assert found.open == []
    return found


def test_everything_an_operator_asks_for_is_there() -> None:
    words = shape(render(BUSY)).words
    for wanted in (
        "4 / 7",
        "agent-server-2",
        "41 %",
        "2 h 1 min",
        "http://node7:31003",
        "paused",
        "layer 3 of 9",
        "STEP 4/11",
        "exit code 3",
        "last words",
        "watchdog",
        "1.19.1, forked",
        "Podman 4.3.1",
        "node7",
    ):
        assert wanted in words, wanted


def test_an_idle_server_has_a_page_too() -> None:
    assert "No sandbox lives" in shape(render(Snapshot(slots_total=3))).words


def test_no_key_is_on_the_page() -> None:
    assert "the-session-key" not in render(BUSY)


def test_what_sandboxes_and_clients_write_is_only_text() -> None:
    evil = sandbox(HOSTILE, State.FAILED, reason=HOSTILE, image=HOSTILE, last_lines=HOSTILE, url="javascript:alert(1)")
    page = render(
        Snapshot(
            sandboxes=(SandboxRow(evil, 1.0),),
            pulls=(Progress(HOSTILE, HOSTILE),),
            builds=(Progress(HOSTILE, HOSTILE),),
            failures=(Failure(evil, 1.0),),
            notes=(HOSTILE,),
            agent=HOSTILE,
            podman=HOSTILE,
            node=HOSTILE,
        )
    )
    page.encode("utf-8")
    found = shape(page)
    assert not [tag for tag, _ in found.tags if tag in {"script", "img", "iframe", "link"}]
    assert not [attributes for tag, attributes in found.tags if tag == "a"]
    assert found.words.count("<script>alert('x')</script>") >= 8


def test_the_page_fetches_nothing_and_asks_for_itself_again() -> None:
    page = render(BUSY)
    assert not re.search(r"\bsrc=|@import|url\(", page)
    assert ("meta", {"http-equiv": "refresh", "content": "5"}) in shape(page).tags


def test_a_thousand_sandboxes_are_shown_and_the_rest_is_counted() -> None:
    page = render(replace(BUSY, sandboxes=BUSY.sandboxes[:1] * 1500))
    assert page.count("agent-server-1<") == 1000
    assert "500 more" in page


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (7260, "2 h 1 min"), (90000, "1 d 1 h")],
)
def test_ages(seconds: float, words: str) -> None:
    assert age(seconds) == words


def test_a_browser_gets_the_page_with_the_key_as_password(fake: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.manager, "snapshot", lambda: BUSY)
    url = str(fake.client.base_url)
    asked = httpx.get(url, trust_env=False)
    assert asked.status_code == 401
    assert asked.headers["WWW-Authenticate"].startswith("Basic ")
    answer = httpx.get(url, auth=("anybody", API_KEY), trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "agent-server-4" in answer.text


def test_the_documentation_names_every_endpoint_and_fetches_nothing(fake: Api) -> None:
    answer = fake.client.get("/docs")
    assert answer.status_code == 200
    words = shape(answer.text).words
    for path, operations in fake.client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in words
    assert not re.search(r"\bsrc=|<script|<link|url\(", answer.text)
    assert "resource_factor" in words
    assert "Multiple of a slot" in words


@pytest.mark.parametrize("path", ["/list", "/start", "/sessions/x", "/health/"])
def test_the_password_opens_only_pages(fake: Api, path: str) -> None:
    answer = httpx.get(f"{fake.client.base_url}{path}", auth=("x", API_KEY), trust_env=False)
    assert answer.status_code == 401
    assert "WWW-Authenticate" not in answer.headers


@pytest.mark.parametrize(
    "header",
    [b"Basic", b"Basic %%%", b"Basic \xff", b"Bearer " + API_KEY.encode(), b"Basic " + base64.b64encode(b"x:wrong")],
)
def test_other_passwords_are_refused(fake: Api, header: bytes) -> None:
    answer = httpx.get(str(fake.client.base_url), headers=[(b"Authorization", header)], trust_env=False)
    assert answer.status_code == 401


def chromium(*words: str) -> str:
    """What a headless Chromium writes; it has a home of its own below the last word's folder."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    return subprocess.run(
        [program, *common, *words], capture_output=True, text=True, timeout=120, check=True, encoding="utf-8"
    ).stdout


def test_a_real_browser_shows_the_page(fake: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fake.manager, "snapshot", lambda: BUSY)
    monkeypatch.setenv("HOME", str(tmp_path))
    address = str(fake.client.base_url).replace("http://", f"http://operator:{API_KEY}@")
    dom = chromium(f"--user-data-dir={tmp_path}/profile", "--dump-dom", address)
    assert "agent-server-1" in dom
    assert "last words" in dom


def test_a_real_browser_runs_nothing_that_a_sandbox_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    evil = "</pre><script>document.title='changed'</script><img src=x onerror=\"document.title='changed'\">"
    failed = Failure(sandbox("s", State.FAILED, reason=evil, last_lines=evil), 1.0)
    file = tmp_path / "page.html"
    file.write_text(render(replace(BUSY, failures=(failed,))), encoding="utf-8")
    dom = chromium(f"--user-data-dir={tmp_path}/profile", "--dump-dom", file.as_uri())
    assert "<title>Sandboxes</title>" in dom
    assert "<img" not in dom


@pytest.mark.parametrize("width", [420, 1280])
def test_a_real_browser_paints_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(render(BUSY), encoding="utf-8")
    chromium(
        f"--user-data-dir={tmp_path}/profile", f"--window-size={width},1000", f"--screenshot={picture}", file.as_uri()
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000  # an empty page of this size has about 5 kB


def test_the_managers_own_snapshot_makes_a_page(fake: Api) -> None:
    started(fake, session_id="on-the-page")
    fake.start(image=IMAGE, command=EXIT, session_id="short-lived")
    words = eventually(lambda: "last words" in (text := fake.client.get("/").text) and shape(text).words)
    assert "on-the-page" in words
    assert "1 / 20" in words
    assert 'skyrl_sandboxes{state="ready"} 1.0' in fake.client.get("/metrics").text
