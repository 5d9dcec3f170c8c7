"""What does a person see at GET /: the sandboxes, the slots, the queue, images under way, the last failures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from urllib.parse import urlsplit

from slurm_runtime.sandbox import Sandbox

REFRESH_S = 5
MOST_ROWS = 1000  # of sandboxes: a browser over an SSH tunnel gets a page of some 100 kB
NOTHING = "–"


@dataclass(frozen=True)
class SandboxRow:
    """A living sandbox and its age in seconds."""

    sandbox: Sandbox
    age_s: float


@dataclass(frozen=True)
class Progress:
    """An image that is being pulled or built, and how far that is, in words."""

    image: str
    progress: str


@dataclass(frozen=True)
class Failure:
    """A sandbox that failed ``age_s`` seconds ago; its ``reason`` and ``last_lines`` say why."""

    sandbox: Sandbox
    age_s: float


@dataclass(frozen=True)
class HeadRow:
    """The head of this node: whether this node is registered there, and seconds since that last went well."""

    url: str
    registered: bool
    heard_s_ago: float | None


@dataclass(frozen=True)
class Snapshot:
    """A server at one moment.

    ``waiting`` counts the starts that wait for a slot. ``failures`` are the last ones, newest first. ``notes`` are
    sentences that an operator should know, such as limits that do not bite. ``agent`` tells version and way of start
    of the agent server, ``podman`` its version or that it does not answer. ``drain_reason`` is why the node takes no
    new sandboxes, empty where it does; ``until`` when it ends (epoch seconds).
    """

    sandboxes: tuple[SandboxRow, ...] = ()
    slots_used: int = 0
    slots_total: int = 0
    waiting: int = 0
    warm: int = 0  # containers that wait for a sandbox
    pulls: tuple[Progress, ...] = ()
    builds: tuple[Progress, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    agent: str = ""
    podman: str = ""
    node: str = ""
    version: str = ""
    drain_reason: str = ""
    until: float | None = None
    head: HeadRow | None = None


STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --faint: #5c6670; --line: #d9dee3; --back: #f6f7f9; --card: #fff;
  --good: #1a7f4b; --busy: #9a6700; --bad: #c0322b; --still: #57606a; --fill: #2f6fdb; --note: #fff7e0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --faint: #9aa5b1; --line: #333a42; --back: #14171a; --card: #1c2126;
    --good: #4cc38a; --busy: #e2b340; --bad: #ff7b72; --still: #9aa5b1; --fill: #5b8def; --note: #33290d; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; }
h1 { font-size: 1.35rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.faint { color: var(--faint); margin: .2rem 0 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; }
.tile, .table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: .7rem 1rem; } .tile b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); } meter { width: 100%; height: .6rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .8rem; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--faint); font-weight: 600; font-size: .85rem; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 7rem; } td:last-child { min-width: 12rem; } td.number { min-width: 0; }
td.state { white-space: nowrap; font-weight: 600; }
.ready { color: var(--good); } .pending, .starting { color: var(--busy); } .failed { color: var(--bad); }
.paused, .stopped { color: var(--still); } a { color: var(--fill); }
.notes { background: var(--note); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem .6rem 2rem; }
pre { margin: .4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; max-height: 14rem;
  overflow-y: auto; background: var(--back); padding: .5rem; border-radius: 6px; }
.empty { color: var(--faint); padding: .8rem 1rem; }
"""


def render(snapshot: Snapshot) -> str:
    """The page: one HTML document without scripts or anything to fetch, which asks for itself again every 5 s."""
    return document(
        "Sandboxes",
        f'<meta http-equiv="refresh" content="{REFRESH_S}">',
        _head(snapshot) + _tiles(snapshot) + _notes([*_node_notes(snapshot), *snapshot.notes]) + _tables(snapshot),
    )


def document(title: str, head: str, body: str) -> str:
    """A self-contained HTML document; ``head`` and ``body`` are markup, escaped already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{head}<style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def text(value: str) -> str:
    """``value`` as markup; lone surrogates, which UTF-8 cannot carry, become question marks."""
    return escape(value.encode("utf-8", "replace").decode("utf-8"))


def age(seconds: float) -> str:
    """``8 s``, ``3 min``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def moment(epoch: float) -> str:
    """``14:05 UTC``."""
    return f"{datetime.fromtimestamp(epoch, timezone.utc):%H:%M} UTC"


def _head(snapshot: Snapshot) -> str:
    head = snapshot.head and f"head {snapshot.head.url}"
    version = snapshot.version and f"server {snapshot.version}"
    end = None if snapshot.until is None else f"ends at {moment(snapshot.until)}"
    facts = [snapshot.node, end, head, snapshot.podman, snapshot.agent, version]
    line = " · ".join(text(fact) for fact in facts if fact)
    return f'<h1>Sandboxes</h1><p class="faint">{line}</p>'


def _node_notes(snapshot: Snapshot) -> Iterable[str]:
    """What an operator should know of this server as a node."""
    if snapshot.drain_reason:
        yield f"draining, no new sandboxes are taken: {snapshot.drain_reason}"
    head = snapshot.head
    if head is not None and not head.registered:
        heard = "it has never answered" if head.heard_s_ago is None else f"it last answered {age(head.heard_s_ago)} ago"
        yield f"not registered with the head at {head.url}: {heard}"


def _tiles(snapshot: Snapshot) -> str:
    used, total = snapshot.slots_used, snapshot.slots_total
    ready = sum(row.sandbox.state.name == "READY" for row in snapshot.sandboxes)
    meter = f'<meter min="0" max="{max(1, total)}" value="{used}" aria-label="slots in use"></meter>'
    return (
        f'<div class="tiles">{tile(f"{used} / {total}", "slots in use", meter)}'
        f"{tile(str(len(snapshot.sandboxes)), f'sandboxes, {ready} ready')}"
        f"{tile(str(snapshot.waiting), 'starts in the queue')}"
        f"{tile(str(len(snapshot.pulls) + len(snapshot.builds)), 'images under way')}"
        f"{tile(str(len(snapshot.failures)), 'last failures')}</div>"
    )


def tile(number: str, words: str, more: str = "") -> str:
    """A number with what it counts; ``more`` is markup."""
    return f'<div class="tile"><b>{text(number)}</b><span>{text(words)}</span>{more}</div>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<h2>Notes</h2><ul class="notes">{items}</ul>'


def _tables(snapshot: Snapshot) -> str:
    shown = snapshot.sandboxes[:MOST_ROWS]
    left_out = len(snapshot.sandboxes) - len(shown)
    more = f'<p class="faint">and {left_out} more, which GET /list tells</p>' if left_out else ""
    more += f'<p class="faint">warm containers that wait for a sandbox: {snapshot.warm}</p>' if snapshot.warm else ""
    headings = ("State", "Session", "Image", "Age", "Reason", "URL")
    return (
        section("Sandboxes", headings, map(_sandbox_row, shown), "No sandbox lives.", more)
        + section("Images being pulled", ("Image", "Progress"), map(_progress_row, snapshot.pulls))
        + section("Images being built", ("Image", "Progress"), map(_progress_row, snapshot.builds))
        + section("Last failures", ("Session", "Image", "Ago", "Why, and its last lines"), _failures(snapshot))
    )


def section(title: str, headings: Sequence[str], rows: Iterable[str], empty: str = "", more: str = "") -> str:
    """A table below its title; nothing where it has no rows and there is no word for that."""
    body = "".join(rows)
    if not body:
        return f'<h2>{title}</h2><div class="table"><div class="empty">{empty}</div></div>' if empty else ""
    head = "".join(
        f'<th class="number">{name}</th>' if name in {"Age", "Ago"} else f"<th>{name}</th>" for name in headings
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{title}</h2><div class="table">{table}</div>{more}'


def _sandbox_row(row: SandboxRow) -> str:
    sandbox, wish = row.sandbox, row.sandbox.specification
    state = sandbox.state.name.lower()
    return (
        f'<tr><td class="state {state}">{state}</td><td>{text(wish.session_id)}</td><td>{text(wish.image)}</td>'
        f'<td class="number">{age(row.age_s)}</td><td>{text(sandbox.reason)}</td><td>{link(sandbox.url)}</td></tr>'
    )


def link(url: str | None) -> str:
    """A link, only for what is plainly a web address."""
    if not url:
        return NOTHING
    return f'<a href="{text(url)}">{text(url)}</a>' if urlsplit(url).scheme in {"http", "https"} else text(url)


def _progress_row(entry: Progress) -> str:
    return f"<tr><td>{text(entry.image)}</td><td>{text(entry.progress)}</td></tr>"


def _failures(snapshot: Snapshot) -> Iterable[str]:
    for failure in snapshot.failures:
        sandbox, wish = failure.sandbox, failure.sandbox.specification
        last = f"<pre>{text(sandbox.last_lines)}</pre>" if sandbox.last_lines.strip() else ""
        yield (
            f"<tr><td>{text(wish.session_id)}</td><td>{text(wish.image)}</td>"
            f'<td class="number">{age(failure.age_s)}</td><td>{text(sandbox.reason)}{last}</td></tr>'
        )
