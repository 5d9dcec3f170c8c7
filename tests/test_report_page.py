"""The page of a report, and ``launch.py report`` around it: what it may hold, how a real browser shows it, mistakes."""

from __future__ import annotations

import html
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.reports import MARK
from slurm.lib.reports.page import POLICY
from tests.fake_slurm import FakeSlurm
from tests.long_run import make_long_run
from tests.observed_runs import HERE, folder_of
from tests.test_looking_verbs import Terminal
from tests.test_looking_verbs import call as call_without_cache

OBSERVED = sorted(path.name for path in HERE.iterdir())
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><a href=javascript:alert(1)>&lt;b&gt;]]>{{7*7}}"
MOST_BYTES = 2_000_000


CACHE = Path(tempfile.gettempdir()) / f"skyrl-test-matplotlib-{os.getuid()}"  # its list of fonts takes seconds to make


def call(slurm: FakeSlurm, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return call_without_cache(slurm, *words, **{"MPLCONFIGDIR": str(CACHE), **more})


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


@pytest.fixture
def base(slurm: FakeSlurm) -> Path:
    slurm.jobs.mkdir()
    for name in ("verl_completed", "failed", "het_withdrawn"):
        shutil.copytree(folder_of(name), slurm.jobs / folder_of(name).name)
    return slurm.jobs


class Page(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "img", "link", "input", "use"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag == "use":
            return
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""

    def close(self) -> None:
        super().close()
        assert not self._open, self._open

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(slurm: FakeSlurm, run: str) -> str:
    done = call(slurm, "report", run, "--html", "-")
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_harmless(text: str) -> Page:
    """It loads nothing and runs nothing."""
    page = Page(text)
    loading = {"script", "link", "img", "iframe", "object", "embed", "base", "a"}
    assert not {tag for tag, _attributes in page.tags} & loading
    for _tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    (policy,) = [meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == POLICY == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return page


@pytest.mark.parametrize("name", OBSERVED)
def test_the_page_of_every_run_that_was_seen(name: str, slurm: FakeSlurm) -> None:
    slurm.jobs.mkdir()
    shutil.copytree(folder_of(name), slurm.jobs / folder_of(name).name)
    text = page_of(slurm, folder_of(name).name)
    page = assert_harmless(text)
    assert len(text.encode()) < 400_000
    figures = page.named("figure")
    assert [figure["id"] for figure in figures] == ["timeline", "start-up", "steps", "reward", "starts", "use"]
    drawn = [svg for svg in page.named("svg") if svg.get("role") == "img"]
    assert len(drawn) == len(page.named("svg")) <= len(figures)
    assert all(svg["aria-label"] and len(str(svg["aria-label"])) > 30 for svg in drawn)
    assert len(re.findall(r"<figcaption>[^<]{10,}</figcaption>", text)) == len(figures), "a plot, or why there is none"
    ids = [attributes["id"] for _tag, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([\w.-]+)', text)
    assert set(used) <= set(ids)


def test_axes_have_titles_with_units(slurm: FakeSlurm, base: Path) -> None:
    words = Page(page_of(slurm, folder_of("verl_completed").name)).text
    for title in ("seconds since the launch", "seconds since the first job started", "seconds", "step"):
        assert title in words


def test_nothing_of_a_run_becomes_html(slurm: FakeSlurm, base: Path) -> None:
    folder = base / folder_of("failed").name
    data: dict[str, Any] = json.loads((folder / "run.json").read_text())
    data |= {"user": HOSTILE, "host": HOSTILE, "config_files": [f"/x/{HOSTILE}.conf"], "pairing": HOSTILE}
    for job in data["jobs"].values():
        job["ended"]["reason"] = HOSTILE
    (folder / "run.json").write_text(json.dumps(data))
    for flag in ("training_complete.flag", "runtime_ready.flag"):
        told = json.loads((folder / flag).read_text())
        (folder / flag).write_text(json.dumps({**told, "reason": HOSTILE, "host": HOSTILE}))
    for path in folder.glob("*.err"):
        path.write_text(f"ValueError: {HOSTILE.replace('1', '2')}\n")
    kinds = {path.name.partition("_")[0]: path.stem.partition("_")[2] for path in folder.glob("*.out")}
    statistics = {"schema": 1, "at": 5, "starts": {"asked": 1, "failed": {HOSTILE: 1}}, "ended": {HOSTILE: 2}}
    (folder / f"sandbox_statistics_{kinds['runtime']}.json").write_text(json.dumps(statistics))
    sample = {"schema": 1, "node": HOSTILE, "cpus": 1, "gpus": [{"index": 0, "name": HOSTILE, "busy_percent": 1}]}
    lines = [json.dumps({**sample, "at": at, "cpu_s": at, "memory_bytes": 5}) for at in (10, 40, 70)]
    (folder / f"usage_training_{kinds['training']}.jsonl").write_text("\n".join(lines))
    (folder / "run_99.json").write_text(HOSTILE)
    renamed = base / f"20991231_235959_<b>{HOSTILE.replace('/', '∕')}"
    folder.rename(renamed)
    text = page_of(slurm, str(renamed))
    page = assert_harmless(text)
    assert page.text.count(HOSTILE) >= 5, "it is shown as it is"
    assert HOSTILE.replace("1", "2") in page.text
    assert not page.named("b")


def test_a_path_that_is_no_utf_8_is_no_error(slurm: FakeSlurm, base: Path) -> None:
    renamed = base / os.fsdecode(b"20991231_235959_7\xff")
    (base / folder_of("failed").name).rename(renamed)
    argv = [sys.executable, str(HERE.parent.parent / "slurm" / "launch.py"), "report", str(renamed), "--html", "-"]
    given = {"PATH": slurm.path, "HOME": str(slurm.folder), "TZ": "UTC", "MPLCONFIGDIR": str(CACHE)}
    done = subprocess.run(argv, env=given, capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "\ufffd" in done.stdout.decode("utf-8")


def test_a_secret_of_the_run_is_not_on_the_page(slurm: FakeSlurm, base: Path) -> None:
    folder = base / folder_of("verl_completed").name
    for name in ("runtime_api_key.txt", "secrets.json", "training.env"):
        (folder / name).write_text("s3cr3t-value\n")
    for options in (["--html", "-"], ["--json"], []):
        assert "s3cr3t" not in call(slurm, "report", folder.name, *options).stdout


def test_a_long_run_has_a_small_page(slurm: FakeSlurm) -> None:
    slurm.jobs.mkdir()
    folder = make_long_run(slurm.jobs / "20261201_000000_501", steps=10_000)
    text = page_of(slurm, folder.name)
    page = assert_harmless(text)
    assert len(text.encode()) < MOST_BYTES
    assert len(page.named("svg")) == 6
    assert "Each point is the mean of 25 steps" in text
    told = json.loads(call(slurm, "report", folder.name, "--json").stdout)
    assert told["step_times"]["count"] == 10_000
    assert told["done_again"] == 8
    assert [len(attempt["jobs"]) for attempt in told["attempts"]] == [2, 2]
    words = call(slurm, "report", folder.name).stdout
    assert re.search(r"\n  done again +8, after a restart\n", words)
    assert "own samples" in words


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["report"], 2, "the following arguments are required: RUN"),
        (["report", "nonesuch"], 2, "there is no run 'nonesuch'"),
        (["report", "latest", "--html", "-", "--json"], 2, "both would be on stdout"),
        (["report", "latest", "--html", ""], 2, "--html needs the name of a file"),
        (["report", "latest", "--force"], 2, "--force goes with --html FILE"),
        (
            ["report", "latest", "--html", "/nonexistent/report.html"],
            71,
            "cannot write /nonexistent/report.html: No such",
        ),
        (["report", "latest", "--html", "/dev"], 71, "--html /dev: cannot be written: Is a directory"),
        (["report", "latest", "--html", "/dev/null/x"], 71, "/dev/null/x: "),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], code: int, what: str, slurm: FakeSlurm, base: Path) -> None:
    done = call(slurm, *words)
    assert done.returncode == code, done.stderr
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_file_that_somebody_may_miss_is_not_replaced(slurm: FakeSlurm, base: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("thesis")
    done = call(slurm, "report", "latest", "--html", str(target))
    assert done.returncode == 2
    assert "is there and is no report of ours; choose another, or add --force" in done.stderr
    assert target.read_text() == "thesis"
    for before in ("thesis", MARK, ""):  # by --force, as a report of ours, as an empty file of mktemp
        target.write_text(before)
        done = call(slurm, "report", "latest", "--html", str(target), *(["--force"] if before == "thesis" else []))
        assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
        assert f"wrote {target} (" in done.stderr
        assert MARK in target.read_text()[:2048]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "report"))] == ["report.html"]
    both = call(slurm, "report", "latest", "--html", str(target), "--json")
    assert json.loads(both.stdout)["schema"] == 1


def test_a_page_is_as_public_as_the_umask_says(slurm: FakeSlurm, base: Path, tmp_path: Path) -> None:
    for mask, mode in ((0o077, 0o600), (0o022, 0o644)):
        target = tmp_path / f"{mask}.html"
        before = os.umask(mask)
        try:
            assert call(slurm, "report", "latest", "--html", str(target)).returncode == 0
        finally:
            os.umask(before)
        assert target.stat().st_mode & 0o777 == mode


def test_a_pipe_is_written_to(slurm: FakeSlurm, base: Path) -> None:
    done = call(slurm, "report", "latest", "--html", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    assert MARK in done.stdout


@pytest.mark.parametrize(
    "trouble",
    ["ModuleNotFoundError('no matplotlib', name='matplotlib')", "ImportError('libstdc++.so.6: cannot open')"],
)
def test_without_matplotlib_the_text_and_json_work(trouble: str, slurm: FakeSlurm, base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise {trouble}")
    without = {"PYTHONPATH": str(broken.parent)}
    done = call(slurm, "report", "latest", "--html", str(tmp_path / "x.html"), **without)
    assert done.returncode == 71
    assert "the page needs matplotlib" in done.stderr
    assert "-m pip install 'matplotlib>=3.7'" in done.stderr
    assert not (tmp_path / "x.html").exists()
    for options in ([], ["--json"]):
        assert call(slurm, "report", "latest", *options, **without).returncode == 0


def test_a_home_that_cannot_be_written_is_no_matter(slurm: FakeSlurm, base: Path) -> None:
    done = call_without_cache(slurm, "report", "latest", "--html", "-", HOME="/proc")
    assert (done.returncode, done.stderr) == (0, "")


def test_on_a_terminal_lines_are_broken_and_without_one_whole(slurm: FakeSlurm, base: Path) -> None:
    for columns in (50, 100):
        terminal = Terminal(slurm, columns, "report", folder_of("failed").name)
        shown = terminal.read()
        assert terminal.end() == 0
        long = [line for line in shown.splitlines() if len(line) > columns]
        assert not [line for line in long if "/" not in line], "a path stays whole, to be copied"
    whole = call(slurm, "report", folder_of("failed").name).stdout
    assert max(map(len, whole.splitlines())) > 70


# --- a real browser ---------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt install chromium)")
# Tells, as the page's title, what the page says of itself once it is drawn.
PROBE = """<script>
addEventListener("load", () => {
  const told = {};
  const root = document.documentElement;
  told.width = innerWidth;
  told.scrolls = Math.max(root.scrollWidth, document.body.scrollWidth) - innerWidth;
  told.wider = [...document.querySelectorAll("main *")].filter(one =>
    !one.closest(".drawing") && !one.closest(".table") && one.getBoundingClientRect().right > innerWidth + 1).length;
  told.svgs = [...document.querySelectorAll("svg")].map(one => {
    const box = one.getBoundingClientRect();
    return [Math.round(box.width), Math.round(box.height)];
  });
  told.small = [...document.querySelectorAll("svg text")].map(one => one.getBoundingClientRect().height)
    .filter(height => height > 0 && height < 7).length;
  told.texts = document.querySelectorAll("svg text").length;
  told.loaded = performance.getEntriesByType("resource").length;
  const style = getComputedStyle(document.body);
  told.colours = [style.color, style.backgroundColor];
  const bar = document.querySelector("#timeline svg path[style*='fill: var']");
  told.fill = bar ? getComputedStyle(bar).fill : "";
  parent.document.title = "told " + JSON.stringify(told);
});
</script>
"""


class Browser:
    """Headless Chromium, which is given no network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, page: Path, *options: str, width: int = 1400, scheme: str = "") -> subprocess.CompletedProcess[str]:
        assert CHROMIUM
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        argv += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self.folder / 'profile'}"]
        argv += ["--hide-scrollbars", "--enable-logging=stderr", f"--window-size={width},1200", *dark, *options]
        given = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "TZ": "UTC"}
        try:
            return subprocess.run(
                [*argv, page.as_uri()], env=given, capture_output=True, text=True, timeout=120, check=False
            )
        finally:
            shutil.rmtree(self.folder / "profile", ignore_errors=True)

    def console(self, page: Path) -> list[str]:
        """What the page itself, without the probe, brings about in the console."""
        done = self.run(page, "--dump-dom")
        assert MARK in done.stdout, done.stderr
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def told(self, page: Path, width: int = 1400, **how: Any) -> dict[str, Any]:
        """What a copy of the page says of itself, whose policy allows the probe's script."""
        text = page.read_text().replace(POLICY, "script-src 'unsafe-inline'; style-src 'unsafe-inline'; default-src *")
        frame = html.escape(text.replace("</body>", f"{PROBE}</body>"))  # a window is at least 500 wide
        copy = page.with_suffix(".probe.html")
        copy.write_text(
            f'<!DOCTYPE html><iframe style="width:{width}px;height:2000px;border:0" srcdoc="{frame}"></iframe>'
        )
        done = self.run(copy, "--dump-dom", "--virtual-time-budget=5000", **how)
        found = re.search(r"<title>told (\{.*?\})</title>", done.stdout)
        assert found, done.stderr[-2000:]
        told: dict[str, Any] = json.loads(found[1])
        return told


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    folder = tmp_path / "browser"
    folder.mkdir()
    yield Browser(folder)


@pytest.fixture
def page(slurm: FakeSlurm, tmp_path: Path) -> Path:
    """The page of a run that has everything that is drawn."""
    slurm.jobs.mkdir()
    folder = make_long_run(slurm.jobs / "20261201_000000_501", steps=300)
    path = tmp_path / "report.html"
    done = call(slurm, "report", folder.name, "--html", str(path))
    assert done.returncode == 0, done.stderr
    return path


@needs_chromium
def test_a_browser_draws_it_and_has_no_complaint(page: Path, browser: Browser) -> None:
    assert browser.console(page) == []
    told = browser.told(page)
    assert told["loaded"] == 0, "it asks for nothing"
    assert len(told["svgs"]) == 6
    assert all(width > 300 and height > 80 for width, height in told["svgs"]), told["svgs"]
    assert told["texts"] > 60


@needs_chromium
@pytest.mark.parametrize("width", [1400, 800, 400])
def test_it_fits_a_screen_and_a_phone(width: int, page: Path, browser: Browser) -> None:
    told = browser.told(page, width=width)
    assert told["width"] == width
    assert told["scrolls"] <= 0, "no scrolling sideways"
    assert told["wider"] == 0
    assert told["small"] == 0, "text in a plot can be read"


@needs_chromium
def test_it_suits_the_light_and_the_dark(page: Path, browser: Browser) -> None:
    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    for scheme, is_dark in (("light", False), ("dark", True)):
        told = browser.told(page, scheme=scheme)
        ink, paper = map(brightness, told["colours"])
        assert (ink > paper) is is_dark, (scheme, told["colours"])
        assert abs(ink - paper) > 120, "text can be read"
        assert told["fill"].startswith("rgb("), "a drawing has its colours from the page"


@needs_chromium
def test_the_policy_stops_what_would_run_or_load(page: Path, browser: Browser) -> None:
    """Should something get through all the same."""
    bad = page.with_name("bad.html")
    image = '<img src="http://127.0.0.1:9/x.png" onerror="document.title=1">'
    bad.write_text(page.read_text().replace("</main>", f"<script>document.title='ran'</script>{image}</main>"))
    console = browser.console(bad)
    assert len([line for line in console if "Content Security Policy" in line]) >= 2, console
    dom = browser.run(bad, "--dump-dom").stdout
    assert "<title>ran" not in dom and "<title>1" not in dom


@needs_chromium
def test_it_can_be_printed(page: Path, browser: Browser, tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    browser.run(page, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    data = target.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert data.startswith(b"%PDF") and 1 <= pages <= 8, pages


def test_a_report_names_what_goes_on(slurm: FakeSlurm, base: Path) -> None:
    """A run that trains: its last phases have no end yet."""
    folder = base / folder_of("failed").name
    for name in ("training_complete.flag",):
        (folder / name).unlink()
    data: dict[str, Any] = json.loads((folder / "run.json").read_text())
    jobs: Mapping[str, dict[str, Any]] = data["jobs"]
    for job in jobs.values():
        del job["ended"]
    (folder / "run.json").write_text(json.dumps(data))
    lines = [f"{job['id']}|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n" for job in jobs.values()]
    for path in folder.glob("*.out"):
        kept = [line for line in path.read_text().splitlines() if not re.search(r" ends|stopping everything", line)]
        path.write_text("".join(f"{line}\n" for line in kept))
    slurm.answer("squeue", *[{"stdout": "".join(lines)}] * 4)
    told = json.loads(call(slurm, "report", folder.name, "--json").stdout)
    assert told["run"]["state"] == "running"
    (attempt,) = told["attempts"]
    assert [job["phases"][-1]["end"] for job in attempt["jobs"]] == [None, None]
    assert [job["phases"][-1]["name"] for job in attempt["jobs"]] == ["trainer started", "serving"]
    assert "so far" in call(slurm, "report", folder.name).stdout
    assert_harmless(page_of(slurm, folder.name))


def test_only_the_command_line_knows_verbs() -> None:
    """What verbs use knows none of them; cli.py names them, to import one when it is asked for."""
    code = Path(__file__).resolve().parent.parent / "slurm" / "lib"
    others = [path for path in code.rglob("*.py") if path.parent.name != "verbs" and path.name != "cli.py"]
    assert len(others) > 50
    assert not [str(path) for path in others if "slurm.lib.verbs" in path.read_text(encoding="utf-8")]
