"""Which images are in this node's store, as far as this server knows? A head sends a start where its image is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from slurm_runtime.node_models import MOST_IMAGES
from slurm_runtime.references import full_name


class KnownImages:
    """Full names, the last ``MOST_IMAGES``; ``on_change`` gives the change its number, kept as ``changed_at``."""

    def __init__(self, on_change: Callable[[], int] = lambda: 0) -> None:
        self.changed_at = 0
        self._names: dict[str, None] = {}
        self._on_change = on_change

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def note(self, images: Iterable[str]) -> None:
        """These are in the store."""
        new = [name for name in map(_named, images) if name not in self._names]
        if not new:
            return
        self._names.update(dict.fromkeys(new))
        for oldest in list(self._names)[: max(0, len(self._names) - MOST_IMAGES)]:
            del self._names[oldest]
        self.changed_at = self._on_change()

    def forget(self, image: str) -> None:
        """This one was not there after all."""
        name = _named(image)
        if name in self._names:
            del self._names[name]
            self.changed_at = self._on_change()


def _named(image: str) -> str:
    """An image's full name; what is none is left as it is. Pure."""
    try:
        return full_name(image)
    except ValueError:
        return image
