"""`scores.jsonl`: a JSON object a line for every checkpoint and task, which grows while scoring and outlives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from retention_bench.data import checked, find_file, locate, parse_json
from retention_bench.data.durable import canonical
from retention_bench.errors import RetentionBenchError, unknown_name
from retention_bench.results.kinds import KINDS
from retention_bench.results.samples import Sample

_FIRST = re.compile(rb'\{"checkpoint": "(\\.|[^"\\])*", "(key|task|error)": ')


def _ours(task: str) -> str:
    tasks = {kind.task for kind in KINDS.values()}
    if task not in tasks:
        raise ValueError(str(unknown_name("task", task, tasks)).removesuffix("."))
    return task


class _Line(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    checkpoint: str
    sha256: str


class _Failure(_Line):
    error: str
    task: str | None = None


class _Metrics(_Line):
    """Of a task of lm-eval's own, which asks no facts."""

    key: str
    task: str
    metrics: dict[str, float | None]


class _Answers(_Line):
    key: str
    stop_words: int
    task: Annotated[str, pydantic.AfterValidator(_ours)]
    hits: int
    total: int
    rate: float | None
    ci95: Annotated[tuple[float, float], pydantic.Field(strict=False)] | None
    samples: list[Sample]


class ScoreFile:
    """The lines of one file, to be added to.

    Every line has a `sha256` of the rest of it. What a kill left of a last line is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, or make one.

        Args:
            path: The file.

        Raises:
            UsageError: What stands there is no regular file.
            RetentionBenchError: The file is not one that `score` wrote, or a line other than the last is damaged.
        """
        if locate(path) is None:
            path.touch()
        self.path = find_file(path, "file of scores")
        numbered, whole = _read(self.path)
        with self.path.open("r+b") as file:
            file.truncate(whole)
            if whole:
                file.seek(whole - 1)
                if file.read() != b"\n":  # the last line is whole, and only its end is missing
                    file.write(b"\n")
            os.fsync(file.fileno())
        self._rows = [row for _, row in numbered]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a line, see to it that it is on the disk, and return it with its `sha256`.

        Where that fails nothing of it is left in the file.
        """
        line = {**row, "sha256": _hash(row)}
        text = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            whole = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(text)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise
        self._rows.append(line)
        return line

    def find(self, key: str, task: str) -> dict[str, Any] | None:
        """The line with a task's score of what a key stands for, or None."""
        return next((row for row in self._rows if (row.get("key"), row.get("task")) == (key, task)), None)

    def latest(self, checkpoint: str, task: str) -> dict[str, Any] | None:
        """The last line with a task's score under a checkpoint's name, or None."""
        own = (row for row in reversed(self._rows) if "key" in row and row["checkpoint"] == checkpoint)
        return next((row for row in own if row["task"] == task), None)


def read_scores(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a file that `score` wrote, with their numbers; without what a kill left of the last one.

    Raises:
        UsageError: There is no such file.
        RetentionBenchError: It is not one that `score` wrote, or a line is damaged.
    """
    return _read(find_file(path, "file of scores"))[0]


def _read(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """The lines of a file, and how many bytes they take: without what a kill left of a last line of ours."""
    rows: list[tuple[int, dict[str, Any]]] = []
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append((number, _parsed(line, f"{path}, line {number}")))
            except RetentionBenchError:
                # What a kill left lacks its end. Where it is all there is, it must begin as ours do.
                if line.endswith(b"\n") or _is_json(line) or (number == 1 and not _FIRST.match(line)):
                    raise
                break
            read += len(line)
    return rows, read


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    """A line's object.

    Raises:
        RetentionBenchError: It is not one that `score` writes, or not what its sha256 says.
    """
    foreign = "Give a file that `score` wrote, or another folder with --out."
    try:
        row = parse_json(line.decode(), place)
    except UnicodeDecodeError as error:
        raise RetentionBenchError(f"{place}: not UTF-8. {foreign}") from error
    except RetentionBenchError as error:
        raise RetentionBenchError(f"{error} {foreign}") from error
    if not isinstance(row, dict) or not isinstance(row.get("sha256"), str) or "checkpoint" not in row:
        raise RetentionBenchError(f"{place}: no line of scores. {foreign}")
    try:
        intact = row["sha256"] == _hash({k: v for k, v in row.items() if k != "sha256"})
    except RecursionError:  # in what could just be read
        intact = False
    if not intact:
        raise RetentionBenchError(
            f"{place} is damaged: it is not what its sha256 says. Remove the line, and what it held is scored again; "
            "or give another folder with --out."
        )
    if "error" in row or "metrics" in row:
        checked(_Failure if "error" in row else _Metrics, row, place)
        return row
    if "stop_words" not in row:
        raise RetentionBenchError(
            f"{place} was written by an earlier version, whose samples say less. Give another folder with --out."
        )
    checked(_Answers, row, place)
    if wrong := {s["kind"] for s in row["samples"]} - {row["task"].removeprefix("retention_")}:
        raise RetentionBenchError(f"{place}: samples of {wrong.pop()} under task {row['task']}. {foreign}")
    return row


def _is_json(line: bytes) -> bool:
    """Whether a line is a whole JSON value, and thus not one that was cut off."""
    try:
        parse_json(line.decode(), "")
    except (UnicodeDecodeError, RetentionBenchError):
        return False
    return True


def _hash(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(row).encode()).hexdigest()
