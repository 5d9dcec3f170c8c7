"""Do the documents make a site on which every link leads somewhere, and that loads nothing from another host?"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from scripts import site_pages
from tests.runtime.test_page import chromium

ROOT = Path(__file__).resolve().parent.parent
COUNTED = ("h1", "h2", "h3", "li", "table", "td", "pre", "strong", "em")
TOO_SHORT = 1000


@dataclass
class Links(HTMLParser):
    """What a page loads, where its links lead, and which anchors it has."""

    loads: list[str] = field(default_factory=list)
    leads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self.anchors |= {said[name] for name in ("id", "name") if name in said}
        if tag == "a" and "href" in said:
            self.leads.append(said["href"])
        elif tag == "link" and "href" in said and said.get("rel") not in {"canonical", "prev", "next"}:
            self.loads.append(said["href"])
        self.loads += [said[name] for name in ("src", "srcset", "poster", "data") if name in said]


def links_of(page: Path) -> Links:
    found = Links()
    found.feed(page.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Built:
    """A site that was built, and what the command said."""

    folder: Path
    code: int
    said: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The site, as ``scripts/docs build`` makes it. It is there too where a mistake ends that with an exit code."""
    folder = tmp_path_factory.mktemp("site")
    argv = [str(ROOT / "scripts" / "docs"), "build", "--site-dir", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (folder / "index.html").is_file(), done.stderr
    return Built(folder, done.returncode, done.stderr)


@pytest.fixture(scope="module")
def site(built: Built) -> Path:
    return built.folder


def test_the_site_is_built_without_a_warning(built: Built) -> None:
    assert built.code == 0, built.said
    assert "WARNING" not in built.said


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def page_of(site: Path, document: str) -> Path:
    return site / re.sub(r"\.md$", ".html", document.replace("README.md", "index.md"))


def test_every_document_is_a_page_and_in_the_navigation(site: Path) -> None:
    navigation = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(site_pages.documents()), "mkdocs.yml: nav has each document once"
    assert all(page_of(site, name).is_file() for name in navigation)


def leads_nowhere(site: Path, page: Path, link: str) -> bool:
    """Whether a link of a page, not to another host, has no target."""
    parts = urlsplit(link)
    path = unquote(parts.path)
    target = site / path.lstrip("/") if path.startswith("/") else page.parent / path if path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return True
    return bool(parts.fragment) and unquote(parts.fragment) not in links_of(target).anchors


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    broken = [
        f"{page.relative_to(site)}: {link}"
        for page in pages(site)
        for link in {*links_of(page).leads, *links_of(page).loads}
        if not urlsplit(link).scheme and leads_nowhere(site, page, link)
    ]
    assert len(pages(site)) > len(site_pages.documents())
    assert not broken


def test_no_page_names_another_host_to_load_from(site: Path) -> None:
    foreign = [
        f"{page.relative_to(site)}: {address}"
        for page in pages(site)
        for address in links_of(page).loads
        if urlsplit(address).netloc or urlsplit(address).scheme not in {"", "data"}
    ]
    styles = [
        f"{path.relative_to(site)}: {address}"
        for path in site.rglob("*.css")
        for address in re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')]+)", path.read_text("utf-8"))
    ]
    assert not foreign + styles


LOADED = """
<script>addEventListener("load", () => setTimeout(() => {
  const names = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.title = JSON.stringify(names);
}, 500))</script>
"""


class Served(http.server.SimpleHTTPRequestHandler):
    """The site, each page with a script that makes what the page has loaded its title."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix != ".html":
            super().do_GET()
            return
        body = path.read_bytes() + LOADED.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the server's log is no part of a test's output."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Served, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("page", ["index.html", "docs/architecture.html"])
def test_a_real_browser_loads_nothing_from_another_host(
    address: str, page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    dom = chromium(
        f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=10000", "--dump-dom", f"{address}/{page}"
    )
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title and title[1].startswith("["), dom[:TOO_SHORT]
    loaded = json.loads(html.unescape(title[1]))
    assert [name for name in loaded if "/assets/javascripts/bundle" in name], loaded
    assert not [name for name in loaded if not name.startswith((address, "data:", "blob:"))]


def test_the_search_knows_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert not [name for name in site_pages.documents() if str(page_of(site, name).relative_to(site)) not in found]


@pytest.mark.parametrize("document", site_pages.documents())
def test_the_site_reads_a_document_as_git_hosts_do(site: Path, document: str) -> None:
    """Lists, tables, blocks: Python-Markdown wants four spaces where others take two."""
    text = (ROOT / document).read_text(encoding="utf-8")
    page = page_of(site, document).read_text(encoding="utf-8")
    article = page[page.index("<article") : page.index("</article")]
    there = MarkdownIt("commonmark").enable("table").render(text)

    def counts(made: str) -> dict[str, int]:
        return {tag: len(re.findall(rf"<{tag}[ >]", made)) for tag in COUNTED}

    advice = "an inner list begins four spaces further in; before and after a table or list is an empty line"
    assert counts(article) == counts(there), f"{document}: {advice}"
    assert not re.search(r"\\\|", re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL)), "an escaped pipe is seen"
    assert "<!-- run" not in article


def external_links() -> list[str]:
    """Every address that the documents link to or name, once."""
    found: set[str] = set()
    for name in site_pages.documents():
        text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        found |= {link for _, link, _ in site_pages.LINK.findall(text) if urlsplit(link).scheme}
    return sorted(found)


@pytest.mark.parametrize("link", external_links())
def test_a_link_to_another_host_has_the_form_of_one(link: str) -> None:
    """Whether somebody answers there is not asked: no test needs the network."""
    parts = urlsplit(link)
    assert parts.scheme == "https", "others can be changed on the way"
    assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), "a host's name, without port and user"
    assert re.fullmatch(r"[\w.~!$&'()*+,;=:@%/?#-]*", link[len("https://") :])
    assert not link.endswith((".", ",", ";"))


def test_a_wrong_use_of_the_command_is_said() -> None:
    done = subprocess.run([str(ROOT / "scripts" / "docs")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "docs: build or serve? (see --help)\n")
