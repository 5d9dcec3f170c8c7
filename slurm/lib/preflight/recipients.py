"""Can the people in NOTIFY be told: are webhooks' hosts known here, and has a local run a mail program?"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from slurm.lib.preflight.finding import Finding, warning
from slurm.lib.settings import Settings
from slurm.lib.webhook import host_of, proxies


def unknown_hosts(webhooks: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """The hosts of webhooks that this host cannot look up, and that no proxy will look up instead."""
    by_proxy = proxies(environment).keys()
    hosts = {host_of(url): None for url in webhooks if urlsplit(url).scheme not in by_proxy}
    return [host for host in hosts if not _is_known(host)]


def _is_known(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False


def recipient_findings(settings: Settings, unknown: Iterable[str], mail: str | None) -> list[Finding]:
    """Warnings: a run does not fail because nobody can be told. ``mail`` is the host's mail program."""
    found = []
    for host in unknown:
        sentence = f"NOTIFY names a webhook at {host}, which this host does not know"
        fix = "correct the name; if only compute nodes know it, or a proxy does (https_proxy), all is well"
        found.append(warning("notify", sentence, fix))
    if settings.mail_addresses and settings.skyrl_backend == "local" and mail is None:
        sentence = "NOTIFY names mail addresses, and this host has no mail program (sendmail, mail)"
        found.append(warning("notify", sentence, "install one, or name a webhook: of a local run Slurm sends no mail"))
    return found
