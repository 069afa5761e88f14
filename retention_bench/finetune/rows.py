"""Rows of a data set: a JSON, JSONL or Parquet file, or a data set of the Hub, downloaded or streamed."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retention_bench.data import find_file, has_half, parse_json, read_lines, read_text
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune.dropped import Dropped, Unusable, shown

Row = dict[str, Any]
"""A row's parsed cells by column."""

Columns = Mapping[str, Callable[[Any], Any]]
"""The columns to read, each with what makes a value of a cell; None stands for a cell that a row lacks. It raises
`Unusable` where the row is to be left out, and ValueError where the file is not what it should be."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Files that are read; a `.json` file holds a list of rows, or a row a line."""

BUFFER = 10_000
"""Rows of a stream among which the next is drawn."""


class Origin(NamedTuple):
    """Where rows come from.

    Attributes:
        source: A local file with one of `SUFFIXES`, or a Hub data set id.
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

    def __init__(
        self, cells: Sequence[Mapping[str, Any] | Unusable], columns: Columns, name: str, place: Callable[[int], str]
    ) -> None:
        """Keep the cells, how to parse them, what they are from and how to say where a row stands."""
        self._cells, self._columns, self._name, self.place = cells, columns, name, place

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Row:
        """A row.

        Raises:
            Unusable: It is to be left out.
            RetentionBenchError: It is malformed.
        """
        if not 0 <= index < len(self._cells):
            raise IndexError(index)
        place = self.place(index)
        try:
            cells = self._cells[index]
        except (ValueError, OSError) as error:  # bytes of a Parquet file that are no text
            raise RetentionBenchError(f"{self._name}, {place}: cannot be read: {_line(error)}.") from error
        if isinstance(cells, Unusable):
            raise cells
        return _parse(cells, self._columns, self._name, place)


def is_local(source: str) -> bool:
    """Whether a source is meant as a local file, be it there or not; else it is a Hub data set id."""
    return source.endswith(SUFFIXES) or os.path.exists(source) or os.path.isabs(source) or source.startswith((".", "~"))


def column_names(origin: Origin, *, stream: bool = False) -> list[str]:
    """The columns of a data set; of a JSON file or a stream those of its first row.

    Raises:
        UsageError: As `open_rows`.
        RetentionBenchError: There are no rows, or the data cannot be read.
    """
    rows: Iterator[Mapping[str, Any]]
    if is_local(origin.source):
        path = _file(origin.source)
        if path.suffix == ".parquet":
            return _parquet_columns(path)
        rows = (row for _, row, _ in _objects(path))
    elif stream:
        rows = _cells(_load(origin, streaming=True), origin)
    else:
        return list(_load(origin, streaming=False).column_names)
    for row in rows:
        return list(row)
    raise _no_rows(origin)


def open_rows(origin: Origin, columns: Columns, optional: Columns | None = None) -> Rows:
    """Open some columns of a data set.

    A JSON file is read and checked whole. Parquet and Hub rows are parsed as they are used. A Hub data set is
    downloaded once into the Hugging Face cache and read from there.

    Args:
        origin: Where the rows come from.
        columns: The columns to read.
        optional: Columns that are read too where they are there.

    Raises:
        UsageError: The file does not exist, its kind is not known, or a Hub data set has no revision.
        RetentionBenchError: There are no rows, no such column or split, a malformed row (named by file, row and
            column), or the data cannot be read.
    """
    wanted = {**columns, **(optional or {})}
    if not is_local(origin.source):
        dataset = _load(origin, streaming=False)
        _check_columns(str(origin), columns, dataset.column_names)
        there = [name for name in wanted if name in dataset.column_names]
        rows = Rows(dataset.select_columns(there), wanted, str(origin), lambda index: f"row {index + 1}")
    else:
        path = _file(origin.source)
        rows = (_parquet if path.suffix == ".parquet" else _json)(path, columns, wanted)
    if len(rows) == 0:
        raise _no_rows(origin)
    return rows


def shuffled_rows(
    origin: Origin,
    columns: Columns,
    rng: random.Random,
    dropped: Dropped,
    *,
    optional: Columns | None = None,
    stream: bool = False,
) -> Iterator[tuple[str, Row]]:
    """Go through a data set once, in an order drawn at random.

    Args:
        origin: Where the rows come from.
        columns: The columns to read.
        rng: Source of chance.
        dropped: Counts the rows that are left out on the way.
        optional: Columns that are read too where they are there.
        stream: Whether a Hub data set is streamed, for one that is too large to be downloaded. Its shards come in
            random order and rows are drawn from a buffer of `BUFFER`, so a sample is of a few shards. That is fair
            where shards are mixed, as those of C4 are; rows that stand sorted by origin are better downloaded.

    Yields:
        Where a row stands in its file, and the row.

    Raises:
        UsageError: As `open_rows`, when the first row is asked for.
        RetentionBenchError: As `open_rows`; or a stream breaks off.
    """
    if stream and not is_local(origin.source):
        shuffled = _load(origin, streaming=True).shuffle(seed=rng.randrange(2**31), buffer_size=BUFFER)
        yield from _streamed(origin, shuffled, columns, optional, dropped)
        return
    rows = open_rows(origin, columns, optional)
    yield from _usable(rows, rng.sample(range(len(rows)), len(rows)), dropped)


def first_rows(
    origin: Origin, columns: Columns, dropped: Dropped, *, optional: Columns | None = None, hub: int
) -> Iterator[tuple[str, Row]]:
    """The rows of a file in their order; of a Hub data set the first `hub`, streamed.

    Args:
        origin: Where the rows come from.
        columns: The columns to read.
        dropped: As in `shuffled_rows`.
        optional: As in `shuffled_rows`.
        hub: How many rows of a Hub data set are asked for.

    Raises:
        UsageError: As `open_rows`.
        RetentionBenchError: As `open_rows`.
    """
    if is_local(origin.source):
        rows = open_rows(origin, columns, optional)
        return _usable(rows, range(len(rows)), dropped)
    stream = itertools.islice(_load(origin, streaming=True), hub)
    return _streamed(origin, stream, columns, optional, dropped)


def unreachable(origin: Origin) -> str | None:
    """Why a data set cannot be looked into now, in words; None where it can, as every local file.

    Raises:
        UsageError: A Hub data set has no revision.
        RetentionBenchError: The Hub knows no such data set, or no such revision of it.
    """
    if is_local(origin.source):
        return None
    _check_revision(origin)
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(origin.source, revision=origin.revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _unreadable(origin, error) from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        return f"the Hub has no answer ({type(error).__name__})"
    return None


def parse_text(cell: Any) -> str:
    """Check a cell of text.

    Raises:
        Unusable: It has nothing, or nothing but spaces.
        ValueError: It is no text.
    """
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise Unusable("have an empty text", f"must be a text that is not empty, got {shown(cell)}")
    if not isinstance(cell, str):
        raise ValueError(f"must be a text that is not empty, got {shown(cell)}")
    return cell


def _parse(cells: Mapping[str, Any], columns: Columns, name: str, place: str) -> Row:
    row = {}
    for column, parse in columns.items():
        try:
            row[column] = parse(cells.get(column))
        except Unusable as error:
            raise Unusable(error.reason, f"column {column!r}: {error}") from error
        except ValueError as error:
            raise RetentionBenchError(f"{name}, {place}, column {column!r}: {error}.") from error
    return row


def _usable(rows: Rows, order: Sequence[int], dropped: Dropped) -> Iterator[tuple[str, Row]]:
    for index in order:
        try:
            row = rows[index]
        except Unusable as error:
            dropped.count(rows.place(index), error)
        else:
            yield rows.place(index), row


def _file(source: str) -> Path:
    path = find_file(source, "data file")
    if not source.endswith(SUFFIXES):
        raise UsageError(f"The data file {source} is of no known kind. Allowed: {', '.join(SUFFIXES)}.")
    return path


def _json(path: Path, columns: Columns, wanted: Columns) -> Rows:
    cells: list[Mapping[str, Any] | Unusable] = []
    places: list[str] = []
    for place, row, halves in _objects(path):
        if not cells:
            _check_columns(f"{path}, {place}", columns, row)
        read = {column: row.get(column) for column in wanted}
        cells.append(_HALF if halves and has_half(read) else read)
        places.append(place)
    rows = Rows(cells, wanted, str(path), places.__getitem__)
    for index in range(len(rows)):
        with contextlib.suppress(Unusable):
            rows[index]  # whether a file is refused must not depend on which of its rows a seed happens to draw
    return rows


_HALF = Unusable(
    "hold half a character", "a text holds half a character (a lone surrogate), as a cut-off emoji leaves it"
)


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The objects of a file, with where each stands and whether a text in it may hold half a character."""
    values: Iterator[tuple[str, Any, bool]]
    text = read_text(path, "data file").lstrip() if path.name.endswith((".json", ".json.gz")) else ""
    if text.startswith("["):
        halves = _may_hold_half(text)
        items = parse_json(text, str(path), halves=True)
        values = ((f"row {number}", item, halves) for number, item in enumerate(items, start=1))
    else:
        values = (
            (f"line {number}", parse_json(line, f"{path}, line {number}", halves=True), _may_hold_half(line))
            for number, line in read_lines(path, "data file")
        )
    for place, value, halves in values:
        if not isinstance(value, dict):
            raise RetentionBenchError(f"{path}, {place}: a row must be a JSON object, got {type(value).__name__}.")
        yield place, value, halves


def _may_hold_half(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _parquet(path: Path, columns: Columns, wanted: Columns) -> Rows:
    import datasets
    import pyarrow.parquet

    names = _parquet_columns(path)
    _check_columns(str(path), columns, names)
    with _readable(path):
        table = pyarrow.parquet.read_table(path, columns=[name for name in wanted if name in names])
        cells = datasets.Dataset(table)
    return Rows(cells, wanted, str(path), lambda index: f"row {index + 1}")


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet

    with _readable(path):
        return list(pyarrow.parquet.read_schema(path).names)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of whatever a damaged Parquet file makes its readers raise that it is damaged."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
        raise RetentionBenchError(f"{path} is not a readable Parquet file: {_line(error)}. Make it again.") from error


def _line(error: Exception) -> str:
    """What an error says, in one line and without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:297]}...").rstrip(".")


def _streamed(
    origin: Origin, stream: Any, columns: Columns, optional: Columns | None, dropped: Dropped
) -> Iterator[tuple[str, Row]]:
    number, wanted = 0, {**columns, **(optional or {})}
    for number, cells in enumerate(_cells(stream, origin), start=1):
        place = f"row {number} of its stream"
        _check_columns(f"{origin}, {place}", columns, cells)
        try:
            row = _parse(cells, wanted, str(origin), place)
        except Unusable as error:
            dropped.count(place, error)
        else:
            yield place, row
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
    _check_revision(origin)
    import datasets

    with _reachable(origin):
        return datasets.load_dataset(source, origin.config, split=origin.split, revision=revision, streaming=streaming)


def _check_revision(origin: Origin) -> None:
    if origin.revision is None:
        raise UsageError(
            f"The Hub data set {origin.source!r} needs a `revision` (a commit), so that its rows cannot change. Set it "
            f"in the suite; behind `path:` write {origin.source}@REVISION."
        )


@contextlib.contextmanager
def _reachable(origin: Origin) -> Iterator[None]:
    import datasets
    from huggingface_hub.utils import httpx

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise _unreadable(origin, error) from error


def _unreadable(origin: Origin, error: Exception) -> RetentionBenchError:
    return RetentionBenchError(
        f"The data set {origin.source!r} at revision {origin.revision}, split {origin.split!r}, cannot be read "
        f"({type(error).__name__}: {' '.join(str(error).split())}). Check the id, the revision, the `config` and the "
        "network; for a gated data set run `hf auth login`; or give a local file."
    )


def _check_columns(place: str, wanted: Columns, given: Collection[str]) -> None:
    for column in wanted:
        if column not in given:
            listed = ", ".join(map(str, itertools.islice(given, 30)))
            raise RetentionBenchError(f"{place}: no column {column!r}; there are {listed or 'none'}.")


def _no_rows(origin: Origin) -> RetentionBenchError:
    return RetentionBenchError(f"{origin} holds no rows. Give a `source` that does.")
