"""The only door to a person's webhook: one POST, whose complaint never repeats the address, which is a secret."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

AGAIN = frozenset({429, 502, 503, 504})  # answers of a server that has not taken the message, and may do so soon
PAUSE_S = 0.5  # before the second attempt
HEADERS = {"Content-Type": "application/json", "User-Agent": "skyrl-launch"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: what holds a token is not sent on to another host."""

    def redirect_request(self, *_said: object) -> None:
        return None


def host_of(url: str) -> str:
    """What of a webhook's address may be shown."""
    return urlsplit(url).hostname or "?"


def post(url: str, body: str, environment: Mapping[str, str], timeout_s: float) -> str | None:
    """Post ``body`` within about ``timeout_s`` seconds, through the proxy that ``environment`` names.

    Returns what went wrong, without the address. Tried once more where the message was surely not taken.
    """
    end = time.monotonic() + timeout_s
    complaint, may_try_again = _post(url, body, environment, timeout_s)
    if complaint and may_try_again and (left := end - time.monotonic() - PAUSE_S) > PAUSE_S:
        time.sleep(PAUSE_S)
        complaint, _ = _post(url, body, environment, left)
    return complaint


def _post(url: str, body: str, environment: Mapping[str, str], timeout_s: float) -> tuple[str | None, bool]:
    """One attempt: its complaint, and whether another one cannot send the message twice."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies(environment)), _NoRedirect)
        request = urllib.request.Request(url, body.encode(), HEADERS, method="POST")
        with opener.open(request, timeout=timeout_s):
            return None, False
    except urllib.error.HTTPError as answer:
        answer.close()
        return _refused(answer.code), answer.code in AGAIN
    except urllib.error.URLError as problem:  # not connected, or not all was sent
        return _words(problem.reason), True
    except (OSError, http.client.HTTPException, ValueError) as problem:  # no answer, or none that HTTP knows
        return _words(problem), False


def _refused(code: int) -> str:
    fix = "; it redirects, which is not followed: name the address that it redirects to" if 300 <= code < 400 else ""
    return f"HTTP {code} {http.client.responses.get(code, '')}".rstrip() + fix


def _words(problem: object) -> str:
    """The system's words; of other errors, which may repeat the address, only the kind."""
    if isinstance(problem, TimeoutError):
        return "no answer in time"
    said = problem.strerror if isinstance(problem, OSError) else None
    return said or type(problem).__name__


def proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The proxies by scheme, as curl and urllib read them: the name in small letters counts before the other."""
    found: dict[str, str] = {}
    for scheme in ("http", "https"):
        name = f"{scheme}_proxy"
        said = environment.get(name, environment.get(name.upper(), ""))
        found |= {scheme: said} if said else {}
    return found
