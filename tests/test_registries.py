"""registries.conf of a job: our mirrors before the site's own tables, read back by a TOML reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slurm.lib.registries import registries_conf, site_conf
from slurm.lib.settings import mirrors

tomllib = pytest.importorskip("tomllib", reason="tomllib is of Python 3.11")

SITE = """# the site's
unqualified-search-registries = [
  "docker.io",
]
short-name-mode = "disabled"

[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "site.example"
"""


def read(*entries: str, site: str = "") -> dict[str, Any]:
    return dict(tomllib.loads(registries_conf(mirrors(" ".join(entries)), site)))


def test_mirrors_in_order_and_plain_http_where_it_is_said() -> None:
    found = read("docker.io=http://a.example:5000/cache", "ghcr.io=b.example", "docker.io=https://c.example")
    assert found["registry"] == [
        {
            "location": "docker.io",
            "mirror": [{"location": "a.example:5000/cache", "insecure": True}, {"location": "c.example"}],
        },
        {"location": "ghcr.io", "mirror": [{"location": "b.example"}]},
    ]


def test_a_registry_itself_by_plain_http() -> None:
    assert read("r.example:5000=http://r.example:5000")["registry"] == [
        {"location": "r.example:5000", "insecure": True}
    ]


def test_what_the_site_says_stays_and_ours_comes_first() -> None:
    found = read("docker.io=a.example", site=SITE)
    assert found["unqualified-search-registries"] == ["docker.io"]
    assert found["short-name-mode"] == "disabled"
    assert [table["mirror"][0]["location"] for table in found["registry"]] == ["a.example", "site.example"]


def test_without_mirrors_the_sites_file_is_left_alone() -> None:
    assert registries_conf((), SITE) == ""


def test_the_first_format_cannot_be_mixed() -> None:
    assert "search" not in registries_conf(("a.b=c.d",), '[registries.search]\nregistries = ["docker.io"]\n')


def test_the_users_own_file_comes_before_the_sites(tmp_path: Path) -> None:
    own = tmp_path / ".config" / "containers" / "registries.conf"
    own.parent.mkdir(parents=True)
    own.write_text("# mine\n")
    assert site_conf({"HOME": str(tmp_path)}) == "# mine\n"
    named = tmp_path / "named.conf"
    named.write_text("# named\n")
    assert site_conf({"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(named)}) == "# named\n"


@pytest.mark.parametrize("entry", ["docker.io", "=x", "docker.io=", "docker.io=ftp://x", "a b=c", 'a=b"', "a=b=c"])
def test_entries_that_are_none(entry: str) -> None:
    with pytest.raises(ValueError, match="must be REGISTRY=MIRROR"):
        mirrors((entry,))
