"""Write rows as compressed JSONL, the same bytes every time."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a `.jsonl.gz` file without a time stamp in it.

    Args:
        path: The file.
        rows: JSON objects.
    """
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row) + "\n").encode())
    path.write_bytes(buffer.getvalue())
