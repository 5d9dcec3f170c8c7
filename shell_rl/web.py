"""The only door to HTTP: one request, one reply, always with a time limit and never through a proxy."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from shell_rl.errors import Unreachable, UsageError

REPLY_BYTES = 1 << 20  # a longer reply is an error of the other side


@dataclass(frozen=True)
class Reply:
    """Status code and body of an answer."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Address:
    """Where to send requests: ``http://host:port`` or https, perhaps with a path in front of every request."""

    scheme: str
    host: str
    port: int | None
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{f':{self.port}' if self.port else ''}{self.path}"

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """A connection, not opened yet. Proxies of the environment are not used: sandboxes are inside the cluster."""
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=timeout)


def parse_address(url: str) -> Address:
    """Read a URL.

    :raises UsageError: it is not an http or https URL with a host
    """
    try:
        parts = urlsplit(url)
        address = Address(parts.scheme, parts.hostname or "", parts.port, parts.path.rstrip("/"))
    except ValueError:
        raise UsageError(f"Not a usable URL: {url!r}.") from None
    if address.scheme not in {"http", "https"} or not address.host:
        raise UsageError(f"Not a usable URL: {url!r}; it must look like http://host:port.")
    return address


@dataclass(frozen=True)
class Door:
    """One address with the headers (keys) that every request to it carries; they are never shown."""

    address: Address
    headers: Mapping[str, str] = field(repr=False)

    def request(self, method: str, path: str, body: bytes | None = None, timeout: float = 30.0) -> Reply:
        """Send one request.

        :param timeout: seconds for connecting, and for each wait for the other side
        :raises Unreachable: no connection, or no complete HTTP answer in time
        """
        connection = self.address.connection(timeout)
        try:
            connection.request(method, self.address.path + path, body=body, headers=dict(self.headers))
            response = connection.getresponse()
            return Reply(response.status, response.read(REPLY_BYTES))
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{method} {self.address}{path}: {str(error) or type(error).__name__}.") from error
        finally:
            connection.close()
