"""Rows of a data set: a JSONL or Parquet file, or a data set of the Hub, downloaded or streamed."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retention_bench.errors import RetentionBenchError, UsageError

Row = dict[str, Any]
"""A row's parsed cells by column."""

Columns = Mapping[str, Callable[[Any], Any]]
"""The columns to read, each with what makes a value of a cell, or raises ValueError with what is wrong with it."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

BUFFER = 10_000
"""Rows of a stream among which the next is drawn."""


class Origin(NamedTuple):
    """Where rows come from.

    Attributes:
        source: A local `.jsonl`, `.jsonl.gz` or `.parquet` file, or a Hub data set id.
        revision: The Hub data set's revision. This and the two below say nothing about a local file.
        config: The Hub data set's configuration.
        split: The Hub data set's split.
    """

    source: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        """The origin as errors name it."""
        if is_local(self.source):
            return self.source
        return f"{self.source}{f' ({self.config})' if self.config else ''}, split {self.split}"


class Rows:
    """Rows that are parsed when they are asked for; a cell that cannot be parsed is named by its place."""

    def __init__(self, cells: Sequence[Mapping[str, Any]], columns: Columns, place: Callable[[int], str]) -> None:
        """Keep the cells, how to parse them and how to say where a row stands."""
        self._cells, self._columns, self._place = cells, columns, place

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self._cells):
            raise IndexError(index)
        return _parse(self._cells[index], self._columns, self._place(index))


def is_local(source: str) -> bool:
    """Whether a source is meant as a local file, be it there or not; else it is a Hub data set id."""
    path = Path(source)
    return source.endswith(SUFFIXES) or path.exists() or path.is_absolute() or source.startswith((".", "~"))


def column_names(origin: Origin, *, stream: bool = False) -> list[str]:
    """The columns of a data set; of a JSONL file or a stream those of its first row.

    Raises:
        UsageError: As `open_rows`.
        RetentionBenchError: There are no rows, or the data cannot be read.
    """
    rows: Iterator[Mapping[str, Any]]
    if is_local(origin.source):
        path = _file(origin.source)
        if path.suffix == ".parquet":
            return _parquet_columns(path)
        rows = (row for _, row in _objects(path))
    elif stream:
        rows = _cells(_load(origin, streaming=True), origin)
    else:
        return list(_load(origin, streaming=False).column_names)
    for row in rows:
        return list(row)
    raise _no_rows(origin)


def open_rows(origin: Origin, columns: Columns) -> Rows:
    """Open some columns of a data set.

    A JSONL file is read and checked whole. Parquet and Hub rows are parsed as they are used. A Hub data set is
    downloaded once into the Hugging Face cache and read from there.

    Args:
        origin: Where the rows come from.
        columns: The columns to read.

    Raises:
        UsageError: The file does not exist, its kind is not known, or a Hub data set has no revision.
        RetentionBenchError: There are no rows, no such column or split, a malformed row (named by file, row and
            column), or the data cannot be read.
    """
    if not is_local(origin.source):
        dataset = _load(origin, streaming=False)
        _check_columns(str(origin), columns, dataset.column_names)
        rows = Rows(dataset.select_columns(list(columns)), columns, lambda index: f"{origin}, row {index + 1}")
    else:
        path = _file(origin.source)
        rows = _parquet(path, columns) if path.suffix == ".parquet" else _jsonl(path, columns)
    if len(rows) == 0:
        raise _no_rows(origin)
    return rows


def shuffled_rows(origin: Origin, columns: Columns, rng: random.Random, *, stream: bool = False) -> Iterator[Row]:
    """Go through a data set once, in an order drawn at random.

    Args:
        origin: Where the rows come from.
        columns: The columns to read.
        rng: Source of chance.
        stream: Whether a Hub data set is streamed, for one that is too large to be downloaded. Its shards come in
            random order and rows are drawn from a buffer of `BUFFER`, so a sample is of a few shards. That is fair
            where shards are mixed, as those of C4 are; rows that stand sorted by origin are better downloaded.

    Raises:
        UsageError: As `open_rows`, when the first row is asked for.
        RetentionBenchError: As `open_rows`; or a stream breaks off.
    """
    if stream and not is_local(origin.source):
        yield from _streamed(origin, columns, rng.randrange(2**31))
        return
    rows = open_rows(origin, columns)
    for index in rng.sample(range(len(rows)), len(rows)):
        yield rows[index]


def parse_text(cell: Any) -> str:
    """Check a cell of text.

    Raises:
        ValueError: It is no text, or has nothing but spaces.
    """
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError(f"must be a text that is not empty, got {cell!r:.80}")
    return cell


def _parse(cells: Mapping[str, Any], columns: Columns, place: str) -> Row:
    row = {}
    for column, parse in columns.items():
        try:
            row[column] = parse(cells[column])
        except ValueError as error:
            raise RetentionBenchError(f"{place}, column {column!r}: {error}.") from error
    return row


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UsageError(f"There is no data file at {source}. Correct the `source`, or put the file there.")
    if not source.endswith(SUFFIXES):
        raise UsageError(f"The data file {source} is of no known kind. Allowed: {', '.join(SUFFIXES)}.")
    return path


def _jsonl(path: Path, columns: Columns) -> Rows:
    cells, lines = [], []
    for number, row in _objects(path):
        _check_columns(f"{path}, line {number}", columns, row)
        cells.append({column: row[column] for column in columns})
        lines.append(number)
    rows = Rows(cells, columns, lambda index: f"{path}, line {lines[index]}")
    for index in range(len(rows)):
        rows[index]  # whether a file is refused must not depend on which of its rows a seed happens to draw
    return rows


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:  # also of bytes that are no UTF-8
            raise RetentionBenchError(f"{path}, line {number}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise RetentionBenchError(f"{path}, line {number}: a row must be a JSON object, got {type(row).__name__}.")
        yield number, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RetentionBenchError(f"{path} is damaged: {error}. Copy or compress it again.") from error


def _parquet(path: Path, columns: Columns) -> Rows:
    import datasets
    import pyarrow.parquet

    _check_columns(str(path), columns, _parquet_columns(path))
    with _readable(path):
        table = pyarrow.parquet.read_table(path, columns=list(columns))
    return Rows(datasets.Dataset(table), columns, lambda index: f"{path}, row {index + 1}")


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet

    with _readable(path):
        return list(pyarrow.parquet.read_schema(path).names)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowInvalid as error:
        raise RetentionBenchError(f"{path} is not a readable Parquet file: {error}.") from error


def _streamed(origin: Origin, columns: Columns, seed: int) -> Iterator[Row]:
    rows, number = _load(origin, streaming=True).shuffle(seed=seed, buffer_size=BUFFER), 0
    for number, cells in enumerate(_cells(rows, origin), start=1):
        place = f"{origin}, row {number} of its stream"
        _check_columns(place, columns, cells)
        yield _parse(cells, columns, place)
    if not number:
        raise _no_rows(origin)


def _cells(stream: Any, origin: Origin) -> Iterator[Mapping[str, Any]]:
    rows = iter(stream)
    while True:
        with _reachable(origin):
            cells = next(rows, None)
        if cells is None:
            return
        yield cells


def _load(origin: Origin, *, streaming: bool) -> Any:
    source, revision = origin.source, origin.revision
    if revision is None:
        raise UsageError(
            f"The Hub data set {source!r} needs a `revision` (a commit), so that its rows cannot change. Set it in the "
            f"suite; behind `path:` write {source}@REVISION."
        )
    import datasets

    with _reachable(origin):
        return datasets.load_dataset(source, origin.config, split=origin.split, revision=revision, streaming=streaming)


@contextlib.contextmanager
def _reachable(origin: Origin) -> Iterator[None]:
    import datasets
    from huggingface_hub.utils import httpx

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RetentionBenchError(
            f"The data set {origin.source!r} at revision {origin.revision}, split {origin.split!r}, cannot be read "
            f"({reason}). Check the id, the revision, the `config` and the network; for a gated data set run "
            "`hf auth login`; or give a local file."
        ) from error


def _check_columns(place: str, wanted: Columns, given: Collection[str]) -> None:
    for column in wanted:
        if column not in given:
            raise RetentionBenchError(f"{place}: no column {column!r}; there are {', '.join(given) or 'none'}.")


def _no_rows(origin: Origin) -> RetentionBenchError:
    return RetentionBenchError(f"{origin} holds no rows. Give a `source` that does.")
