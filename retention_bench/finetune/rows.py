"""One column of a data set, row by row: a JSONL or Parquet file, or a data set of the Hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from retention_bench.errors import RetentionBenchError, UsageError

T = TypeVar("T")

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class Rows(Generic[T]):
    """A column's cells, each parsed when it is asked for; a cell that cannot be parsed is named by its place."""

    def __init__(self, cells: Sequence[Any], parse: Callable[[Any], T], place: Callable[[int], str]) -> None:
        """Keep the cells, how to parse one (ValueError where it is malformed) and how to say where one stands."""
        self._cells, self._parse, self._place = cells, parse, place

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < len(self._cells):
            raise IndexError(index)
        try:
            return self._parse(self._cells[index])
        except ValueError as error:
            raise RetentionBenchError(f"{self._place(index)}: {error}.") from error


def open_rows(source: str, revision: str | None, column: str, parse: Callable[[Any], T]) -> Rows[T]:
    """Open one column of a data set.

    A JSONL file is read and checked whole. Parquet and Hub rows are parsed as they are used. A Hub data set is
    downloaded once into the Hugging Face cache and read from there, not streamed: its rows may stand sorted by origin,
    and a stream that is shuffled in a buffer would sample the first origins only.

    Args:
        source: A local `.jsonl`, `.jsonl.gz` or `.parquet` file, or a Hub data set id (the split `train` is read).
        revision: The Hub data set's revision.
        column: The column to read.
        parse: Makes a row of a cell, or raises ValueError with what is wrong with it.

    Raises:
        UsageError: The file does not exist, its kind is not known, or a Hub data set has no revision.
        RetentionBenchError: There are no rows, no such column, a malformed row, or the data cannot be read.
    """
    path = Path(source)
    if source.endswith(SUFFIXES) or path.exists() or path.is_absolute() or source.startswith("."):
        if not path.is_file():
            raise UsageError(f"There is no data file at {source}. Correct the `source`, or put the file there.")
        if not source.endswith(SUFFIXES):
            raise UsageError(f"The data file {source} is of no known kind. Allowed: {', '.join(SUFFIXES)}.")
        rows = _parquet(path, column, parse) if path.suffix == ".parquet" else _jsonl(path, column, parse)
    else:
        rows = _hub(source, revision, column, parse)
    if len(rows) == 0:
        raise RetentionBenchError(f"{source} holds no rows. Give a `source` that does.")
    return rows


def _jsonl(path: Path, column: str, parse: Callable[[Any], T]) -> Rows[T]:
    cells, lines = [], []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:  # also of bytes that are no UTF-8
            raise RetentionBenchError(f"{path}, line {number}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise RetentionBenchError(f"{path}, line {number}: a row must be a JSON object, got {type(row).__name__}.")
        if column not in row:
            raise _no_column(f"{path}, line {number}", column, row)
        cells.append(row[column])
        lines.append(number)
    rows = Rows(cells, parse, lambda index: f"{path}, line {lines[index]}")
    for index in range(len(rows)):
        rows[index]  # whether a file is refused must not depend on which of its rows a seed happens to draw
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RetentionBenchError(f"{path} is damaged: {error}. Copy or compress it again.") from error


def _parquet(path: Path, column: str, parse: Callable[[Any], T]) -> Rows[T]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise _no_column(str(path), column, names)
        table = pyarrow.parquet.read_table(path, columns=[column])
    except pyarrow.ArrowInvalid as error:
        raise RetentionBenchError(f"{path} is not a readable Parquet file: {error}.") from error
    return Rows(datasets.Dataset(table)[column], parse, lambda index: f"{path}, row {index + 1}")


def _hub(source: str, revision: str | None, column: str, parse: Callable[[Any], T]) -> Rows[T]:
    if revision is None:
        raise UsageError(f"The Hub data set {source!r} needs a `revision` (a commit), so that its rows cannot change.")
    import datasets

    try:
        dataset = datasets.load_dataset(source, split="train", revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RetentionBenchError(
            f"The data set {source!r} at revision {revision} cannot be read ({reason}). Check the id, the revision and "
            "the network; for a gated data set run `hf auth login`; or give a local file."
        ) from error
    if column not in dataset.column_names:
        raise _no_column(source, column, dataset.column_names)
    return Rows(dataset[column], parse, lambda index: f"{source}, row {index + 1}")


def _no_column(place: str, column: str, given: Any) -> RetentionBenchError:
    return RetentionBenchError(f"{place}: no column {column!r}; there are {', '.join(given) or 'none'}.")
