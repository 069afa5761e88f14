"""Rows of a data set with their cells checked: those that can be trained on, and a count of the others."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from retention_bench.data import HalfCharacterError, Source, Table
from retention_bench.data import Row as SourceRow
from retention_bench.errors import RetentionBenchError
from retention_bench.finetune.dropped import Dropped, Unusable, shown

Row = dict[str, Any]
"""A row's parsed cells by column."""

Columns = Mapping[str, Callable[[Any], Any]]
"""The columns to read, each with what makes a value of a cell; None stands for a cell that a row lacks. It raises
`Unusable` where the row is to be left out, and ValueError where the file is not what it should be."""

_HALF = Unusable(
    "hold half a character", "a text holds half a character (a lone surrogate), as a cut-off emoji leaves it"
)


class Rows:
    """Rows that are parsed when they are asked for; a cell that cannot be parsed is named by its place."""

    def __init__(self, source: Source, table: Table, columns: Columns) -> None:
        """Keep where the rows are from, the rows, and how to parse their cells."""
        self._source, self._table, self._columns = source, table, columns
        self.place = table.place

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """A row.

        Raises:
            Unusable: It is to be left out.
            RetentionBenchError: It is malformed.
        """
        return _parse(SourceRow(self.place(index), self._table.get(index)), self._columns, self._source)


def open_rows(source: Source, columns: Columns, optional: Columns | None = None) -> Rows:
    """Open some columns of a data set.

    A JSON or CSV file is checked whole. Parquet and Hub rows are parsed as they are used.

    Args:
        source: Where the rows come from; a Hub data set is downloaded.
        columns: The columns to read.
        optional: Columns that are read too where they are there.

    Raises:
        UsageError: The file does not exist, its kind is not known, or a Hub data set has no revision.
        RetentionBenchError: There are no rows, no such column or split, a malformed row (named by file, row and
            column), or the data cannot be read.
    """
    rows = Rows(source, source.table(columns, optional or ()), {**columns, **(optional or {})})
    if source.is_local and not source.is_parquet:
        for index in range(len(rows)):
            with contextlib.suppress(Unusable):
                rows[index]  # whether a file is refused must not depend on which of its rows a seed happens to draw
    return rows


def shuffled_rows(
    source: Source, columns: Columns, rng: random.Random, dropped: Dropped, *, optional: Columns | None = None
) -> Iterator[tuple[str, Row]]:
    """Go through a data set once, in an order drawn at random.

    Args:
        source: Where the rows come from. Where a Hub data set is streamed, see `Source.rows` for what is sampled.
        columns: The columns to read.
        rng: Source of chance.
        dropped: Counts the rows that are left out on the way.
        optional: Columns that are read too where they are there.

    Yields:
        Where a row stands in its file, and the row.

    Raises:
        UsageError: As `open_rows`, when the first row is asked for.
        RetentionBenchError: As `open_rows`; or a stream breaks off.
    """
    if source.stream and not source.is_local:
        stream = source.rows(columns, optional or (), shuffle=rng.randrange(2**31))
        yield from _streamed(source, stream, columns, optional, dropped)
        return
    rows = open_rows(source, columns, optional)
    yield from _usable(rows, rng.sample(range(len(rows)), len(rows)), dropped)


def first_rows(
    source: Source, columns: Columns, dropped: Dropped, *, optional: Columns | None = None, hub: int
) -> Iterator[tuple[str, Row]]:
    """The rows of a file in their order; of a Hub data set that is streamed the first `hub`.

    Args:
        source: Where the rows come from.
        columns: The columns to read.
        dropped: As in `shuffled_rows`.
        optional: As in `shuffled_rows`.
        hub: How many rows of a Hub data set are asked for.

    Raises:
        UsageError: As `open_rows`.
        RetentionBenchError: As `open_rows`.
    """
    if source.is_local:
        rows = open_rows(source, columns, optional)
        return _usable(rows, range(len(rows)), dropped)
    stream = itertools.islice(source.rows(columns, optional or ()), hub)
    return _streamed(source, stream, columns, optional, dropped)


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


def _parse(row: SourceRow, columns: Columns, source: Source) -> Row:
    if isinstance(row.cells, HalfCharacterError):
        raise _HALF
    if isinstance(row.cells, RetentionBenchError):
        raise row.cells
    parsed = {}
    for column, parse in columns.items():
        try:
            parsed[column] = parse(row.cells.get(column))
        except Unusable as error:
            raise Unusable(error.reason, f"column {column!r}: {error}") from error
        except ValueError as error:
            raise RetentionBenchError(f"{source}, {row.place}, column {column!r}: {error}.") from error
    return parsed


def _usable(rows: Rows, order: Sequence[int], dropped: Dropped) -> Iterator[tuple[str, Row]]:
    for index in order:
        try:
            row = rows[index]
        except Unusable as error:
            dropped.count(rows.place(index), error)
        else:
            yield rows.place(index), row


def _streamed(
    source: Source, stream: Iterable[SourceRow], columns: Columns, optional: Columns | None, dropped: Dropped
) -> Iterator[tuple[str, Row]]:
    for row in stream:
        try:
            parsed = _parse(row, {**columns, **(optional or {})}, source)
        except Unusable as error:
            dropped.count(row.place, error)
        else:
            yield row.place, parsed
