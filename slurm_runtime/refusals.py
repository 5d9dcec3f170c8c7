"""What did a registry's refusal mean, is it asked again and when, and what can the user do? Pure."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class Meaning(Enum):
    """What a failed pull means for the next try."""

    LIMITED = "the registry limits how often it is asked"
    PASSING = "there is trouble that may pass"
    FINAL = "asking again would change nothing"


LIMITED = re.compile(r"too ?many ?requests|rate limit|\b429\b", re.I)
# What somebody who has been reached says of the image, be it the registry or its mirror.
DENIED = re.compile(r"unauthorized|authentication required|access denied|resource is denied|denied:", re.I)
UNKNOWN = re.compile(r"(manifest|name|repository|tag)[ a-z]* (unknown|not known)|not found|\b404\b", re.I)
PASSING = re.compile(
    r"connection (refused|reset)|broken pipe|timeout|timed out|deadline exceeded|\bEOF\b|no route to host"
    r"|network is unreachable|server misbehaving|temporary failure|(http status:?|statuscode:|status code) 5\d\d"
    r"|internal server error|bad gateway|service unavailable|gateway time-?out"
    # Podman's own: an image that shared the layer was removed while this one was pulled (seen with 4.3.1).
    r"|layer not known",
    re.I,
)

NEXT_STEPS = (
    (
        DENIED,
        "check the image's name; if it needs a login, make a file with 'podman login --authfile FILE REGISTRY' and "
        "name it with --registry-auth-file (REGISTRY_AUTH_FILE in a .conf)",
    ),
    (UNKNOWN, "check the image's name and tag"),
    (
        re.compile(r"no such host", re.I),
        "check the registry's name, or name a mirror that this node reaches (REGISTRY_MIRRORS in a .conf, else "
        "registries.conf of the Podman service)",
    ),
    (
        re.compile(r"HTTP response to HTTPS|x509|certificate|TLS handshake$", re.I),
        "the registry is not reached by HTTPS with a certificate that this node trusts: REGISTRY_MIRRORS="
        "'REGISTRY=http://REGISTRY' in a .conf allows plain HTTP, as does 'insecure = true' in registries.conf",
    ),
    (
        re.compile(r"no space left", re.I),
        "make room where Podman's storage lies, or move it (LOCAL_SCRATCH in a .conf)",
    ),
    (
        LIMITED,
        "log in (--registry-auth-file), name a mirror (REGISTRY_MIRRORS in a .conf), or fetch the images beforehand "
        "with slurm_runtime.prebuild_images",
    ),
)


LOCAL = "localhost/"  # Podman's own prefix of images that were built or loaded and have no registry
LOCAL_STEP = (
    "an image of this name is in no registry: build or load it on this node, or put its archive in the folder of "
    "--image-archives (IMAGE_ARCHIVES in a .conf)"
)


def meaning(words: str, image: str = "") -> Meaning:
    """What Podman's words about a failed pull mean; the image's own name in them says nothing."""
    if image.startswith(LOCAL):
        return Meaning.FINAL
    said = words.replace(image, "") if image else words
    if LIMITED.search(said):
        return Meaning.LIMITED
    if DENIED.search(said) or UNKNOWN.search(said):
        return Meaning.FINAL
    return Meaning.PASSING if PASSING.search(said) else Meaning.FINAL


def is_registrys_word(words: str, image: str = "") -> bool:
    """Whether the registry itself refused, as it would refuse every node; else it may be this node's own trouble."""
    said = words.replace(image, "") if image else words
    return bool(LIMITED.search(said) or DENIED.search(said) or UNKNOWN.search(said))


def next_step(words: str, image: str = "") -> str:
    """What the user can do about it, empty where nothing is known."""
    if image.startswith(LOCAL):
        return LOCAL_STEP
    said = words.replace(image, "") if image else words
    return next((step for sign, step in NEXT_STEPS if sign.search(said)), "")


@dataclass(frozen=True)
class Patience:
    """For how long and how often an image is asked for again.

    A registry that limits us is asked for up to ``limited_s`` seconds, after pauses that double from
    ``limited_first_s`` to ``longest_s``; trouble that may pass gets ``tries`` in all. Every pause is spread by up to
    half of it, so that those who were refused together do not come back together.
    """

    limited_s: float = 1800.0
    limited_first_s: float = 10.0
    longest_s: float = 300.0
    tries: int = 4
    first_s: float = 1.0
    spread: Callable[[], float] = field(default=random.random, compare=False)

    def pause_s(self, why: Meaning, failures: int, since_first_s: float) -> float | None:
        """Seconds until the next try after so many failures; None for no further one."""
        if why is Meaning.FINAL or (why is Meaning.PASSING and failures >= self.tries):
            return None
        first_s = self.limited_first_s if why is Meaning.LIMITED else self.first_s
        pause_s = min(self.longest_s, first_s * 2.0 ** (failures - 1)) * (1 + self.spread() / 2)
        if why is Meaning.LIMITED and since_first_s + pause_s > self.limited_s:
            return None
        return pause_s
