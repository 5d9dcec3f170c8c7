"""Which pages has the site of the documents, and what stands in them? A hook of MkDocs (mkdocs.yml).

A page's place on the site is its file's place in the repository. So one relative link works on a Git host and on the
site, and documents may lie outside of ``docs/``. A file that a document links to and that is none itself, such as a
``.conf``, becomes a page that shows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.livereload import LiveReloadServer
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md", "docs/*.md")
STYLE = "docs/site.css"
SHOWN = ".shown.md"  # what the page of a shown file adds to its name
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^( *)(`{3,}|~{3,})")
ROW = re.compile(r"^\|.*")
CODE = re.compile(r"`[^`]+`")
PICTURES = frozenset({".png", ".svg", ".gif", ".jpg", ".webp", ".cast"})
LANGUAGES = {".conf": "bash", ".sh": "bash", ".py": "python", ".json": "json", ".toml": "toml"}


def documents() -> list[str]:
    """The documents, by their places in the repository."""
    return [str(path.relative_to(ROOT)) for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def outside_of_code(markdown: str, change: re.Pattern[str], by: str | Callable[[re.Match[str]], str]) -> str:
    """The text with a pattern replaced in all lines that are not in a fenced block."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        found = FENCE.match(line)
        if found and not fence:
            fence = found[2]
        elif fence and line.strip() == fence:
            fence = ""
        lines.append(line if fence or found else change.sub(by, line))
    return "\n".join(lines)


def linked(document: str, link: str) -> str | None:
    """The file of the repository, not a document, that a link of a document means; None for other links."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path or parts.path.endswith(".md"):
        return None
    target = (ROOT / document).parent.joinpath(parts.path).resolve()
    return str(target.relative_to(ROOT)) if target.is_file() and target.is_relative_to(ROOT) else None


def is_picture(path: str) -> bool:
    """Whether a file is on the site as it is."""
    return PurePosixPath(path).suffix in PICTURES


def linked_files() -> list[str]:
    """All files that documents link to and that are none."""
    links = ((name, found[2]) for name in documents() for found in LINK.finditer((ROOT / name).read_text("utf-8")))
    return sorted({target for name, link in links if (target := linked(name, link))})


def page_showing(path: str) -> str:
    """A page with a file's text as one block."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"# {PurePosixPath(path).name}\n\n~~~~~~{LANGUAGES.get(PurePosixPath(path).suffix, 'text')}\n{text}~~~~~~\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files: those of the theme, the documents with their pictures, and the files that they show."""
    linked_to = linked_files()
    as_they_are = [*documents(), STYLE, *filter(is_picture, linked_to)]
    shown = [path for path in linked_to if not is_picture(path)]
    return Files(
        [
            *(file for file in files if file.src_dir != config.docs_dir),
            *(_generated(config, name, abs_src_path=str(ROOT / name)) for name in as_they_are),
            *(_generated(config, f"{path}{SHOWN}", content=page_showing(path)) for path in shown),
        ]
    )


def _generated(config: MkDocsConfig, name: str, **what: str) -> File:
    """A file of the site; that it has no place in the navigation is a mistake, except for a shown file."""
    inclusion = InclusionLevel.NOT_IN_NAV if name.endswith(SHOWN) else InclusionLevel.INCLUDED
    return File.generated(config, name, inclusion=inclusion, **what)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text without comments, which tests and generators read, and with links to the pages that show files."""
    name = page.file.src_uri

    def to_page(found: re.Match[str]) -> str:
        target = linked(name, found[2])
        return f"{found[1]}{found[2]}{SHOWN if target and not is_picture(target) else ''}{found[3]}"

    if name.endswith(SHOWN):
        return markdown
    return outside_of_code(outside_of_code(COMMENT.sub("", markdown), LINK, to_page), ROW, row)


def row(found: re.Match[str]) -> str:
    """A row of a table with the pipes of its code bare: Git hosts want them escaped, Python-Markdown does not."""
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), found[0])


def on_serve(server: LiveReloadServer, config: MkDocsConfig, builder: object) -> LiveReloadServer:
    """Documents outside of ``docs/`` are watched too."""
    for name in documents():
        server.watch(str(ROOT / name))
    return server
