"""Where does Podman get images from in place of their registry? REGISTRY_MIRRORS → registries.conf."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

HTTP, HTTPS = "http://", "https://"
_FIRST_TABLE = re.compile(r"^[ \t]*\[\[?[ \t]*[A-Za-z]", re.MULTILINE)
_VERSION_1 = re.compile(r"^[ \t]*\[[ \t]*registries\.", re.MULTILINE)


def registries_conf(mirrors: Sequence[str], site: str) -> str:
    """The site's registries.conf with our mirrors before its tables: of two tables for a registry the first counts.

    Empty without mirrors. A file in the format of version 1, which cannot be mixed with ours, is left out.
    """
    if not mirrors:
        return ""
    if _VERSION_1.search(site):
        site = ""
    first = _FIRST_TABLE.search(site)
    at = first.start() if first else len(site)
    return "\n".join([site[:at], *(_table(name, found) for name, found in _by_registry(mirrors).items()), site[at:]])


def _by_registry(mirrors: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in mirrors:
        registry, _, mirror = entry.partition("=")
        found.setdefault(registry, []).append(mirror)
    return found


def _table(registry: str, mirrors: Sequence[str]) -> str:
    """One registry; a "mirror" that is the registry itself by plain HTTP says that it may be reached so."""
    lines = ["[[registry]]", f"location = {json.dumps(registry)}"]
    if HTTP + registry in mirrors:
        lines.append("insecure = true")
    for mirror in mirrors:
        location = mirror.removeprefix(HTTP).removeprefix(HTTPS)
        if location != registry:
            lines += ["[[registry.mirror]]", f"location = {json.dumps(location)}"]
            lines += ["insecure = true"] if mirror.startswith(HTTP) else []
    return "\n".join([*lines, ""])


def site_conf(environment: Mapping[str, str]) -> str:
    """The registries.conf that Podman would read without us, empty where there is none."""
    config_home = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME', '/nonexistent')}/.config"
    own = environment.get("CONTAINERS_REGISTRIES_CONF") or f"{config_home}/containers/registries.conf"
    usual = "/etc/containers/registries.conf"
    for path in (Path(own), Path(usual)):
        if os.access(path, os.R_OK):
            return path.read_text(encoding="utf-8", errors="replace")
    return ""
