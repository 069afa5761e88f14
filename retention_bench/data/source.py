"""Rows of data: a local file or a data set of the Hub becomes rows, checked, in an order that never changes.

This is the only place that reads JSONL or calls `datasets`. Local files are

| suffix | what it holds |
|---|---|
| `.jsonl`, `.json` or none | a JSON object a line, or one list of objects; UTF-8 with or without a byte order mark |
| `.csv` | a header and rows, in UTF-8 too; every cell is text, and an empty one is None |
| `.parquet` | rows by column |

The first two may be compressed: `.jsonl.gz`, `.csv.zst`. Parquet compresses itself. A row has `MAX_LINE` bytes at most.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retention_bench.data.files import (
    MAX_LINE,
    cut,
    find_file,
    has_half,
    json_value,
    may_hold_half,
    open_bytes,
    parse_json,
    raw_lines,
    read_lines,
    read_text,
    shortened,
)
from retention_bench.errors import RetentionBenchError, UsageError

SUFFIXES = (
    *(kind + packed for kind in (".jsonl", ".json", ".csv") for packed in ("", ".gz", ".zst")),
    ".parquet",
)
"""The names of files that are read end in one of these, or have no suffix at all."""

_CSV = (".csv", ".csv.gz", ".csv.zst")

BUFFER = 10_000
"""Rows of a stream among which the next is drawn."""

_BATCH = 1000
"""Rows of a Parquet file that are in memory at once while it is gone through."""


class RowError(RetentionBenchError):
    """Something is wrong with one row.

    Attributes:
        what: What it is, without the place: `"not JSON: Expecting value: line 1 column 1 (char 0)"`.
    """

    def __init__(self, source: object, place: str, what: str) -> None:
        """Say what is wrong and where: in which source, and where in it."""
        super().__init__(f"{source}, {place}: {what}.")
        self.what = what


class HalfCharacterError(RowError):
    """A text in a row holds half a character, as a cut-off emoji leaves it."""

    def __init__(self, source: object, place: str) -> None:
        """Say in which source, and where in it."""
        super().__init__(
            source,
            place,
            "a text holds half a character (a lone surrogate, \\ud800 to \\udfff). Correct the text, or leave the row "
            "out",
        )


class Row(NamedTuple):
    """A row, and where it stands.

    Attributes:
        place: Its place in its source, as errors name it: `"line 3"` of a file of lines, `"row 3"` elsewhere, from 1.
        cells: Its values by column; or what is wrong with it, where the caller asked for that.
    """

    place: str
    cells: Mapping[str, Any] | RowError


class Table(Sequence[Mapping[str, Any]]):
    """Rows of which any can be had at once."""

    def __init__(
        self, source: Source, cells: Sequence[Mapping[str, Any] | RowError], place: Callable[[int], str]
    ) -> None:
        self._source, self._cells, self.place = source, cells, place

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: Any) -> Any:
        """The cells of a row, by column.

        Raises:
            RowError: A text in it holds half a character, or is not UTF-8.
        """
        cells = self.get(index)
        if isinstance(cells, RowError):
            raise cells
        return cells

    def get(self, index: int) -> Mapping[str, Any] | RowError:
        """The cells of a row, or what is wrong with them."""
        if not 0 <= index < len(self._cells):
            raise IndexError(index)
        try:
            return self._cells[index]
        except (ValueError, OSError) as error:  # bytes of a Parquet file that are no text
            return RowError(self._source, self.place(index), f"cannot be read: {_line(error)}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: A local file (see above) or a Hub data set id, `owner/name`.
        revision: The Hub data set's revision, which it must have. This and the three below say nothing about a file.
        config: The Hub data set's configuration.
        split: The Hub data set's split.
        stream: Whether `rows` and `columns` stream a Hub data set, for one that is too large to be downloaded; else it
            is downloaded once into the Hugging Face cache and read from there.
        what: What a local file should be, for errors.
    """

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    stream: bool = dataclasses.field(default=False, compare=False)
    what: str = dataclasses.field(default="data file", compare=False)

    def __str__(self) -> str:
        """The source as errors name it."""
        if self.is_local:
            return self.name
        return f"{self.name}{f' ({self.config})' if self.config else ''}, split {self.split}"

    @property
    def is_local(self) -> bool:
        """Whether a file is meant; see `is_local`."""
        return is_local(self.name)

    def rows(
        self,
        required: Collection[str] | None = None,
        optional: Collection[str] = (),
        *,
        faults: bool = False,
        unique_keys: bool = False,
        shuffle: int | None = None,
    ) -> Iterator[Row]:
        """Go through the rows once, with few of them in memory at a time; a list in JSON is read whole.

        Args:
            required: The columns to read, which the first row must have; a later row that lacks one has None there.
                Without it all columns are read, as they are.
            optional: Columns that are read besides where a row has them, else None.
            faults: What is wrong with one row stands in its place instead of being raised.
            unique_keys: A key that stands twice in an object of JSON is a fault of its row; else the last one counts.
            shuffle: For a stream alone: the seed by which its shards come in a random order, and rows are drawn from a
                buffer of `BUFFER`. A sample is then of a few shards. That is fair where shards are mixed, as those of
                C4 are; rows that stand sorted by origin are better downloaded.

        Raises:
            UsageError: The file does not exist or is of no known kind, or the Hub data set has no revision.
            RetentionBenchError: The data cannot be read, there are no rows, or no such column or split.
            RowError: A row is malformed or too long.
        """
        assert shuffle is None or (self.stream and not self.is_local)
        none, checked = True, required is None
        for place, cells, half in self._cells(required, optional, unique_keys=unique_keys, shuffle=shuffle):
            none = False
            if not isinstance(cells, RowError):
                if not checked and required is not None:
                    _check_columns(f"{self}, {place}", required, cells)
                    checked = True
                if required is not None:
                    cells = {name: cells.get(name) for name in (*required, *optional)}
                if half and has_half(cells):
                    cells = HalfCharacterError(self, place)
            if isinstance(cells, RowError) and not faults:
                raise cells
            yield Row(place, cells)
        if none:
            raise self._no_rows()

    def table(self, required: Collection[str] | None = None, optional: Collection[str] = ()) -> Table:
        """Have all rows at once; a Hub data set is downloaded, whatever `stream` says.

        A JSON or CSV file is checked whole, half characters apart: those, and bytes of a Parquet file that are no text,
        are found when the row is asked for.

        Args:
            required: As in `rows`.
            optional: As in `rows`.

        Raises:
            UsageError: As `rows`.
            RetentionBenchError: As `rows`.
        """
        if self.is_local and not self.is_parquet:
            rows = []
            for row in self.rows(required, optional, faults=True):
                if isinstance(row.cells, RowError) and not isinstance(row.cells, HalfCharacterError):
                    raise row.cells
                rows.append(row)
            return Table(self, [row.cells for row in rows], [row.place for row in rows].__getitem__)
        if self.is_local:
            path = self._path()
            wanted = _wanted(str(self), _parquet_columns(path), required, optional)
            batches = list(_batches(path, wanted))
            dataset = _dataset(path, batches) if batches else ()
        else:
            dataset = self._load(streaming=False)
            dataset = dataset.select_columns(_wanted(str(self), dataset.column_names, required, optional))
        if not len(dataset):
            raise self._no_rows()
        return Table(self, dataset, _row_place)

    def columns(self) -> list[str]:
        """The columns; of JSON and of a stream those of the first row.

        Raises:
            UsageError: As `rows`.
            RetentionBenchError: As `rows`.
        """
        if not self.is_local and not self.stream:
            return list(self._load(streaming=False).column_names)
        if self.is_local and self.is_parquet:
            return _parquet_columns(self._path())
        for _, cells, _ in self._cells(None, (), unique_keys=False, shuffle=None):
            if isinstance(cells, RowError):
                raise cells
            return list(cells)
        raise self._no_rows()

    def unreachable(self) -> str | None:
        """Why the data cannot be looked into now, in words; None where it can, as every local file.

        Raises:
            UsageError: A Hub data set has no revision.
            RetentionBenchError: The Hub knows no such data set, or no such revision of it.
        """
        if self.is_local:
            return None
        self._check_revision()
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import httpx

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        try:
            HfApi().dataset_info(self.name, revision=self.revision, timeout=10)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise self._unreadable(error) from error
        except (OSError, ValueError, httpx.HTTPError) as error:
            return f"the Hub has no answer ({type(error).__name__})"
        return None

    @property
    def is_parquet(self) -> bool:
        """Whether it is a Parquet file, of which `table` parses a row only when it is asked for."""
        return self.name.endswith(".parquet")

    def _path(self) -> Path:
        path = find_file(self.name, self.what)
        if path.suffix and not path.name.endswith(SUFFIXES):
            raise UsageError(f"The {self.what} {cut(self.name)} is of no known kind. Allowed: {', '.join(SUFFIXES)}.")
        return path

    def _cells(
        self,
        required: Collection[str] | None,
        optional: Collection[str],
        *,
        unique_keys: bool,
        shuffle: int | None,
    ) -> Iterator[tuple[str, Mapping[str, Any] | RowError, bool]]:
        """Each row's place, its cells, and whether a text in them may hold half a character."""
        if not self.is_local:
            yield from ((place, cells, False) for place, cells in self._hub_cells(shuffle))
        elif self.is_parquet:
            path, before = self._path(), 0
            for batch in _batches(path, _wanted(str(self), _parquet_columns(path), required, optional)):
                dataset = _dataset(path, [batch])
                cells: Iterable[Mapping[str, Any] | RowError]
                try:
                    cells = list(dataset)
                except (ValueError, OSError):  # of one row alone: which, and what of it, `Table` says
                    cells = map(Table(self, dataset, _places(before)).get, range(batch.num_rows))
                for index, row in enumerate(cells, start=before):
                    yield _row_place(index), row, False
                before += batch.num_rows
        elif (path := self._path()).name.endswith(_CSV):
            yield from ((place, cells, False) for place, cells in _csv_rows(self, path))
        else:
            yield from _json_rows(self, path, unique_keys)

    def _hub_cells(self, shuffle: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        dataset = self._load(streaming=self.stream)
        if self.stream and shuffle is not None:
            dataset = dataset.shuffle(seed=shuffle, buffer_size=BUFFER)
        rows = iter(dataset)
        for index in itertools.count():
            with self._reachable():
                cells = next(rows, None)
            if cells is None:
                return
            yield f"{_row_place(index)}{' of its stream' if self.stream else ''}", cells

    def _load(self, *, streaming: bool) -> Any:
        self._check_revision()
        import datasets

        with self._reachable():
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=streaming
            )

    def _check_revision(self) -> None:
        if self.revision is None:
            raise UsageError(
                f"There is no file {self.name}, and the Hub data set {self.name!r} needs a `revision` (a commit), so "
                f"that its rows cannot change. Set it in the suite; behind `path:` write {self.name}@REVISION."
            )

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever `datasets` and the network and the parsers below it come to raise
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> RetentionBenchError:
        return RetentionBenchError(
            f"The Hub data set {self.name!r} at revision {self.revision}, split {self.split!r}, cannot be read "
            f"({type(error).__name__}: {_line(error)}). Check the id, the revision, the `config`, the network and "
            "HF_HUB_OFFLINE; for a gated data set run `hf auth login`; or give a local file."
        )

    def _no_rows(self) -> RetentionBenchError:
        return RetentionBenchError(f"{self} holds no rows. Give a `source` that does.")


def is_local(name: str) -> bool:
    """Whether a source is meant as a local file, be it there or not; else it is a Hub data set id.

    What is there under the name is meant: `datasets`, too, would take a folder for the data set, whatever its revision.
    """
    if name.startswith(("/", ".", "~")) or name.endswith((*SUFFIXES, ".gz", ".zst")):
        return True
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no Hub id is so long, or has such characters
        return True
    return True


def read_jsonl(path: Path | str, what: str = "file") -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines; blank lines are passed over.

    Raises:
        UsageError: As `find_file`, when this is called.
        RetentionBenchError: A line is not UTF-8, not JSON or too long, when it is reached.
    """
    return ((number, parse_json(line, f"{path}, line {number}")) for number, line in read_lines(path, what))


def _json_rows(
    source: Source, path: Path, unique_keys: bool
) -> Iterator[tuple[str, Mapping[str, Any] | RowError, bool]]:
    """The objects of a JSON file, as `Source._cells` gives them."""
    if _starts_as_list(path):
        text = read_text(path, source.what)
        half = may_hold_half(text)
        for index, value in enumerate(parse_json(text, str(source), halves=True, once=unique_keys)):
            yield _row_place(index), _object(source, _row_place(index), value), half
        return
    for number, line in read_lines(path, source.what):
        place = f"line {number}"
        try:
            value = json_value(line, once=unique_keys)
        except ValueError as error:
            yield place, RowError(source, place, str(error)), False
        else:
            yield place, _object(source, place, value), may_hold_half(line)


def _starts_as_list(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _object(source: Source, place: str, value: Any) -> Mapping[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError(source, place, f"a row must be a JSON object, got {shortened(value)}")


def _csv_rows(source: Source, path: Path) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
    """The rows of a CSV file, with the line that each begins in.

    All cells are text: a guess at types would make something else of a column of answers "1", "NA" or "true".
    """
    csv.field_size_limit(MAX_LINE)  # of the whole process; its default is less than a long text has
    reader = csv.reader((line for _, line in raw_lines(path, source.what)), strict=True)
    names: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise RowError(source, place, f"not CSV: {error}") from error
        if values is None:
            return
        if not values:
            continue
        if names is None:
            names = values
            if twice := [name for name in names if names.count(name) > 1]:
                raise RowError(source, place, f"the column {shortened(twice[0])} stands twice in the header")
        elif len(values) != len(names):
            yield place, RowError(source, place, f"the row has {len(values)} cells, and the header {len(names)}")
        else:
            yield place, {name: value or None for name, value in zip(names, values, strict=True)}


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet

    with _readable(path):
        return list(pyarrow.parquet.read_schema(path).names)


def _batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The rows of a Parquet file in Arrow's batches, in their order."""
    import pyarrow.parquet

    before = 0
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(pyarrow.parquet.ParquetFile(path))
            batches = file.iter_batches(_BATCH, columns=columns)
        while True:
            with _readable(path):
                batch = next(batches, None)
            if batch is None:
                return
            if batch.nbytes > MAX_LINE:
                for index in range(batch.num_rows):
                    if batch.slice(index, 1).nbytes > MAX_LINE:
                        what = f"the row has more than {MAX_LINE // 2**20} MiB, the most that is read. Split it"
                        raise RowError(path, _row_place(before + index), what)
            before += batch.num_rows
            yield batch


def _dataset(path: Path, batches: Iterable[Any]) -> Any:
    """Batches as rows of `datasets`, which knows how it writes what Parquet has no type for."""
    import datasets
    import pyarrow

    with _readable(path):
        return datasets.Dataset(pyarrow.Table.from_batches(batches))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of whatever a damaged Parquet file makes its readers raise that it is damaged."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
        raise RetentionBenchError(f"{path} is not a readable Parquet file: {_line(error)}. Make it again.") from error


def _wanted(
    place: str, given: Sequence[str], required: Collection[str] | None, optional: Collection[str]
) -> Sequence[str]:
    """The columns to read of those there are."""
    if required is None:
        return given
    _check_columns(place, required, given)
    return [name for name in (*required, *optional) if name in given]


def _check_columns(place: str, required: Collection[str], given: Collection[str]) -> None:
    for column in required:
        if column not in given:
            listed = ", ".join(map(str, itertools.islice(given, 30)))
            raise RetentionBenchError(f"{place}: no column {column!r}; there are {listed or 'none'}.")


def _row_place(index: int) -> str:
    return f"row {index + 1}"


def _places(before: int) -> Callable[[int], str]:
    """Where rows stand that come after `before` others."""
    return lambda index: _row_place(before + index)


def _line(error: Exception) -> str:
    """What an error says, in one line and without its full stop."""
    return cut(" ".join(str(error).split()) or type(error).__name__).rstrip(".")
