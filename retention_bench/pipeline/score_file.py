"""`scores.jsonl`: a JSON object a line for every checkpoint and task, which grows while scoring and outlives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retention_bench.errors import RetentionBenchError
from retention_bench.pipeline.store import canonical


class ScoreFile:
    """The lines of one file, to be added to.

    Every line has a `sha256` of the rest of it. What a kill left of a last line is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, or make one.

        Args:
            path: The file.

        Raises:
            RetentionBenchError: A line other than the last is damaged.
        """
        self.path = path
        path.touch()
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and (not lines[-1].endswith(b"\n") or _parsed(lines[-1]) is None):
            with path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
                os.fsync(file.fileno())
            lines.pop()
        self._rows = []
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is None:
                raise RetentionBenchError(
                    f"{path}, line {number} is damaged: it is not what its sha256 says. Remove the line, and what it "
                    "held is scored again; or give another folder with --out."
                )
            self._rows.append(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a line, see to it that it is on the disk, and return it with its `sha256`."""
        line = {**row, "sha256": _hash(row)}
        with self.path.open("ab") as file:
            file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows.append(line)
        return line

    def find(self, key: str, task: str) -> dict[str, Any] | None:
        """The line with a task's score of what a key stands for, or None."""
        return next((row for row in self._rows if (row.get("key"), row.get("task")) == (key, task)), None)

    def latest(self, checkpoint: str, task: str) -> dict[str, Any] | None:
        """The last line with a task's score under a checkpoint's name, or None."""
        own = (row for row in reversed(self._rows) if "key" in row and row["checkpoint"] == checkpoint)
        return next((row for row in own if row["task"] == task), None)


def _hash(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(row).encode()).hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object, or None where it is not whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.get("sha256") != _hash({k: v for k, v in row.items() if k != "sha256"}):
        return None
    return row
