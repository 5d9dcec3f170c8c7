"""What is an image's full name, which registry holds it, and under which file name is it archived? Pure."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote

ARCHIVE_SUFFIX = ".tar"
LONGEST_FILE_NAME = 255  # bytes, on every file system that clusters use
# Registry (a host, which has a dot or a port or is localhost) and folders, then a tag or a digest.
FULL_NAME = re.compile(
    r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|\[[0-9a-fA-F:]+\]|[A-Za-z0-9-]+(?=:))(?::\d{1,5})?"
    r"(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)+"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)


def full_name(reference: str) -> str:
    """``registry/folder/name:tag``, as Podman's store calls it; a short name means Docker Hub.

    ``ValueError`` for what is no name of an image.
    """
    registry, slash, path = reference.partition("/")
    if not (slash and (registry == "localhost" or "." in registry or ":" in registry)):
        registry, path = "docker.io", reference
    if registry == "docker.io" and "/" not in path:
        path = f"library/{path}"
    if ":" not in path.rpartition("/")[2]:  # neither a tag nor a digest
        path += ":latest"
    name = f"{registry}/{path}"
    if not FULL_NAME.fullmatch(name):
        raise ValueError(f"{reference[:200]!r} is not the name of an image, such as docker.io/folder/name:tag")
    return name


def registry_of(reference: str) -> str:
    """The host that holds the image, with its port."""
    return full_name(reference).partition("/")[0]


def archive_name(reference: str) -> str:
    """The file that holds an image's archive: its full name, quoted as in a URL. ``reference_of`` reads it back.

    ``ValueError`` for what can have none: a digest is not kept in an archive.
    """
    name = full_name(reference)
    if "@" in name:
        raise ValueError(f"{reference} is named by its digest, which an archive does not keep; name a tag")
    file = quote(name, safe="") + ARCHIVE_SUFFIX
    if len(os.fsencode(file)) > LONGEST_FILE_NAME:
        raise ValueError(f"{reference} is longer than the name of a file can be")
    return file


def reference_of(file_name: str) -> str | None:
    """The full name of the image that a file is the archive of; None for a file that is none."""
    name = unquote(file_name.removesuffix(ARCHIVE_SUFFIX))
    try:
        return name if archive_name(name) == file_name else None
    except ValueError:
        return None
