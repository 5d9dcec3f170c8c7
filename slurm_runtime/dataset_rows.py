"""What do the rows of a parquet file say of images? Only the columns that matter are read, a few rows at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slurm_runtime.dataset_images import COLUMNS, NoImages

ROWS_AT_ONCE = 512


class NoPyarrow(Exception):
    """pyarrow is not installed."""


def rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows, with only the columns that name images; ``NoImages`` where there are none, or no parquet."""
    try:
        import pyarrow  # type: ignore[import-untyped]  # it brings no types
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise NoPyarrow(
            f"this needs pyarrow, which {sys.executable} lacks: scripts/setup without --minimal brings it, as does "
            f"'{sys.executable} -m pip install pyarrow'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _rows(file)
    except OSError as problem:
        raise NoImages(f"it cannot be read: {os.strerror(problem.errno) if problem.errno else problem}") from None
    except pyarrow.ArrowException as problem:
        raise NoImages(f"it is no parquet file that can be read: {problem}") from None


def _rows(file: Any) -> Iterator[Mapping[str, Any]]:
    columns = list(file.schema_arrow.names)
    wanted = [name for name in COLUMNS if name in columns]
    if not {"instance", "extra_info", "instance_id", "image_name"} & {*wanted}:
        raise NoImages(
            "it has no column that names images (instance, extra_info, instance_id or image_name); "
            f"its columns are {', '.join(columns) or 'none'}"
        )
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
        yield from batch.to_pylist()
