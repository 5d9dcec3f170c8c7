"""Whose is a container that was made before it was asked for? Labels cannot be changed: a file beside it says so.

It lies in the folder that Podman keeps for the container's runtime configuration, is out of the container's sight, and
goes with the container. Its words are those that the labels of other containers have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = "skyrl-claim.json"


def write(oci_config: str, labels: Mapping[str, str]) -> None:
    """Note the labels of the container with this runtime configuration; ``OSError`` where that cannot be done."""
    if not oci_config:
        raise FileNotFoundError("Podman does not tell where the container's configuration lies")
    path = Path(oci_config).with_name(FILE)
    beside = path.with_name(f".{FILE}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(dict(labels), file)
    beside.replace(path)


def read(oci_config: str) -> dict[str, str]:
    """The noted labels; none of a container that nobody has claimed."""
    try:
        found = json.loads(Path(oci_config).with_name(FILE).read_text(encoding="utf-8")) if oci_config else {}
        return {str(name): str(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}
