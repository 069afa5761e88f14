"""One reader of rows: every format and compression gives the same rows, and what is damaged is said in one line."""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.data import HalfCharacterError, RowError, Source, files, is_local, read_jsonl, source
from retention_bench.errors import RetentionBenchError, UsageError

FUZZ = {"deadline": 5000, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
ROWS = [{"a": "Ä\u2028b", "b": "1"}, {"a": 'two\nlines, and "quotes"', "b": "true"}, {"a": "\U0001f600", "b": None}]
BOM = b"\xef\xbb\xbf"


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMATS = {
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in rows).encode(),
    ".csv": as_csv,
    ".parquet": as_parquet,
}
PACKED = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
TEXTS = [".jsonl", ".json", ".csv"]


def put(folder, suffix, data):
    path = folder / f"rows{suffix}"
    path.write_bytes(data)
    return str(path)


def cells(source):
    return [dict(row.cells) for row in source.rows()]


def refused(says, function):
    with pytest.raises(RetentionBenchError) as caught:
        function()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_and_compression_gives_the_same_rows(tmp_path, suffix, packed):
    if packed and suffix in ("", ".parquet"):
        path = put(tmp_path, ".parquet" + packed, PACKED[packed](as_parquet(ROWS)))
        error = refused("is of no known kind. Allowed: .jsonl, .jsonl.gz", lambda: list(Source(path).rows()))
        assert isinstance(error, UsageError)
        return
    given = Source(put(tmp_path, suffix + packed, PACKED[packed](FORMATS[suffix](ROWS))))
    assert cells(given) == ROWS
    assert (list(given.table()), given.columns()) == (ROWS, ["a", "b"])
    assert list(given.table(["b"], ["a", "c"]))[1]["b"] == "true"
    assert [row.cells["a"] for row in given.rows(["a"])] == [row["a"] for row in ROWS]
    for read in (given.rows, given.table):
        refused("no column 'c'; there are a, b", lambda read=read: list(read(["c"])))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", TEXTS)
def test_a_byte_order_mark_is_no_text(tmp_path, suffix, packed):
    path = put(tmp_path, suffix + packed, PACKED[packed](BOM + FORMATS[suffix](ROWS)))
    assert cells(Source(path)) == ROWS


def test_a_place_is_where_an_editor_finds_the_row(tmp_path):
    def places(suffix, data):
        return [row.place for row in Source(put(tmp_path, suffix, data)).rows()]

    assert places(".jsonl", b'{"a": 1}\n\n{"a": 2}\n') == ["line 1", "line 3"]
    assert places(".json", b'[{"a": 1},\n{"a": 2}]') == ["row 1", "row 2"]
    assert places(".csv", as_csv(ROWS)) == ["line 2", "line 3", "line 5"]
    assert places(".parquet", as_parquet(ROWS)) == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize(
    ("suffix", "data", "says"),
    [
        (".jsonl", b'{"a": 1}\n{"a"\n', "rows.jsonl, line 2: not JSON"),
        (".jsonl", b'{"a": 1}\n5\n', "line 2: a row must be a JSON object, got 5"),
        (".jsonl", b'{"a": NaN}', "line 1: not JSON: NaN is no number"),
        (".jsonl", b'{"a": "\\ud83d"}', "line 1: a text holds half a character"),
        (".jsonl", b'{"a": 1}\n{"a": "\xe9"}', "line 2: the byte 0xe9 is not UTF-8"),
        (".jsonl", b"", "holds no rows"),
        (".json", b"[]", "holds no rows"),
        (".json", b'[{"a": 1}, 5]', "row 2: a row must be a JSON object, got 5"),
        (".json", b'[{"a": 1}', "rows.json: not JSON"),
        (".json", b'[{"a": "\\ud83d"}]', "row 1: a text holds half a character"),
        (".json", b'[{"a":\n"\xe9"}]', "rows.json, line 2: the byte 0xe9 is not UTF-8"),
        (".csv", b"", "holds no rows"),
        (".csv", b"a,b\n", "holds no rows"),
        (".csv", b"a,b\n1,2\n1,2,3\n", "line 3: the row has 3 cells, and the header 2"),
        (".csv", b"a,a\n1,2\n", "line 1: the column 'a' stands twice in the header"),
        (".csv", b'a,b\n1,"2\n', "line 2: not CSV: unexpected end of data"),
        (".csv", b"a,b\n1,\xe9\n", "line 2: the byte 0xe9 is not UTF-8"),
        (".csv", "a,b\n1,2\n".encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
        (".parquet", b"PAR1", "is not a readable Parquet file"),
        (".parquet", as_parquet(ROWS)[:-9], "is not a readable Parquet file"),
        (".parquet", as_parquet(ROWS)[:4] + b"\xff" * 60 + as_parquet(ROWS)[64:], "rows.parquet"),
        (".jsonl", b"version https://git-lfs.github.com/spec/v1\n" * 2, "is a Git LFS pointer"),
    ],
)
def test_what_is_damaged_is_said_in_one_line(tmp_path, suffix, data, says):
    path = put(tmp_path, suffix, data)
    refused(says, lambda: list(Source(path).rows()))
    refused(says, lambda: list(Source(path).table()))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", TEXTS)
def test_a_damaged_compressed_file_is_named(tmp_path, suffix, packed):
    whole = PACKED[packed](FORMATS[suffix]([{"a": os.urandom(40).hex()} for _ in range(50)]))
    kind = "gzip" if packed == ".gz" else "zstd"
    for damaged in (whole[:40], whole[:-3], b"no such thing", whole[:30] + b"\xff\xff\xff" + whole[33:]):
        path = put(tmp_path, suffix + packed, damaged)
        refused(f"is no {kind} file, or is cut off", lambda path=path: list(Source(path).rows()))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", TEXTS)
def test_several_members_are_one_file(tmp_path, suffix, packed):
    data = FORMATS[suffix](ROWS)
    path = put(tmp_path, suffix + packed, PACKED[packed](data[:20]) + PACKED[packed](data[20:]))
    assert cells(Source(path)) == ROWS


def test_what_is_wrong_with_one_row_can_be_counted(tmp_path):
    path = put(tmp_path, ".jsonl", b'{"a": 1, "a": 2}\n{\n5\n{"a": "\\ud800"}\n{"a": 3}\n')
    rows = list(Source(path).rows(faults=True, unique_keys=True))
    assert [row.cells.what[:24] for row in rows[:4]] == [
        "not JSON: the key 'a' st",
        "not JSON: Expecting prop",
        "a row must be a JSON obj",
        "a text holds half a char",
    ]
    assert rows[4] == ("line 5", {"a": 3})
    assert next(Source(path).rows()).cells == {"a": 2}
    path = put(tmp_path, ".csv", b"a,b\n1\n2,3\n")
    short, good = Source(path).rows(faults=True)
    assert (short.cells.what, good) == ("the row has 1 cells, and the header 2", ("line 3", {"a": "2", "b": "3"}))


def test_half_a_character_counts_in_the_columns_that_are_read(tmp_path):
    given = Source(put(tmp_path, ".jsonl", b'{"a": "x", "b": "\\ud83d"}\n{"a": "\\ud83d", "b": "y"}\n'))
    table = given.table(["a"])
    assert table[0] == {"a": "x"}
    assert isinstance(table.get(1), HalfCharacterError)
    with pytest.raises(RowError, match="line 2: a text holds half"):
        table[1]
    assert given.columns() == ["a", "b"]


def test_bytes_of_parquet_that_are_no_text_are_a_row_of_their_own(tmp_path):
    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.binary()).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, text.buffers())
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path)
    found = [row.cells for row in Source(str(path)).rows(faults=True)]
    assert (found[0], found[2]) == ({"a": "a"}, {"a": "c"})
    assert "row 2: cannot be read" in str(found[1])
    refused("row 2: cannot be read", lambda: list(Source(str(path)).rows()))


# Sizes


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_bomb_is_refused_before_it_has_filled_the_memory(tmp_path, packed):
    """A file of 300 MiB in a line, or in short lines, or as a list; read where 200 MiB more are to be had."""
    line = b'{"a": "' + b"x" * 2**20 + b'"}\n'
    for suffix, one, count in ((".jsonl", b"x" * 2**20, 300), (".jsonl", line, 300), (".json", b"[" + line[:-1], 300)):
        path = tmp_path / f"bomb{suffix}{packed}"
        kind, opened = ("wb", gzip.GzipFile) if packed == ".gz" else ("zstd", pyarrow.CompressedOutputStream)
        with opened(str(path), kind) as out:
            for _ in range(count):
                out.write(one)
        code = (
            "import sys, resource\n"
            "from retention_bench.data import Source\n"
            "import pyarrow\n"
            "from retention_bench.errors import RetentionBenchError\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try:\n"
            "    for row in Source(sys.argv[1]).rows(): pass\n"
            "except RetentionBenchError as error: print(error)\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        said, grown = done.stdout.splitlines()
        assert "expands to more than 200 times" in said or "line 1: the line has more than 32 MiB" in said
        assert int(grown) < 200


def test_what_shrinks_well_is_read_all_the_same(tmp_path, monkeypatch):
    rows = [
        {"a": "the same words again and again " * 40, "n": random.Random(n).randbytes(4).hex()} for n in range(2000)
    ]
    monkeypatch.setattr(files, "_RATIO_FROM", 2**20)
    packed = PACKED[".gz"](FORMATS[".jsonl"](rows))
    assert len(FORMATS[".jsonl"](rows)) > 50 * len(packed)
    assert cells(Source(put(tmp_path, ".jsonl.gz", packed))) == rows


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_row_without_end_is_refused(tmp_path, monkeypatch, suffix):
    for module in (files, source):
        monkeypatch.setattr(module, "MAX_LINE", 1000)
    monkeypatch.setattr(files, "MAX_FILE", 1000)
    path = put(tmp_path, suffix, FORMATS[suffix]([{"a": "x", "b": "y"}, {"a": "x" * 3000, "b": "y"}]))
    message = "the most that is read"
    refused(message, lambda: list(Source(path).rows()))
    refused(message, lambda: list(Source(path).table()))
    if suffix not in (".json", ".parquet"):
        assert "line" in str(refused(message, lambda: list(Source(path).rows())))


# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUE, max_size=3), min_size=1, max_size=5)
TABLES = st.lists(st.fixed_dictionaries({"a": TEXT.filter(bool), "b": TEXT | st.none()}), min_size=1, max_size=5)


@settings(max_examples=40, **FUZZ)
@given(rows=OBJECTS, suffix=st.sampled_from([".jsonl", ".json"]), packed=st.sampled_from(list(PACKED)))
def test_any_objects_come_back_from_json(tmp_path, rows, suffix, packed):
    path = put(tmp_path, suffix + packed, PACKED[packed](FORMATS[suffix](rows)))
    assert cells(Source(path)) == rows


@settings(max_examples=40, **FUZZ)
@given(rows=TABLES, packed=st.sampled_from(list(PACKED)))
def test_any_texts_come_back_from_csv(tmp_path, rows, packed):
    """But for a bare carriage return, which a CSV file in text mode may make a line's end of, and an empty text."""
    path = put(tmp_path, f".csv{packed}", PACKED[packed](as_csv(rows)))
    assert cells(Source(path)) == [{name: value or None for name, value in row.items()} for row in rows]


@settings(max_examples=40, **FUZZ)
@given(rows=TABLES, numbers=st.lists(st.lists(st.integers(-9, 9), max_size=3), min_size=5, max_size=5))
def test_any_texts_and_lists_come_back_from_parquet(tmp_path, rows, numbers):
    rows = [{**row, "n": listed} for row, listed in zip(rows, numbers, strict=False)]
    given = Source(put(tmp_path, ".parquet", as_parquet(rows)))
    assert cells(given) == list(given.table()) == rows


@pytest.mark.parametrize("suffix", [s + p for s in TEXTS for p in PACKED] + [".parquet"])
@settings(max_examples=25, **FUZZ)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6) | st.none())
def test_a_damaged_file_gives_rows_or_an_error_in_one_line(tmp_path, suffix, place, byte, cut):
    packed = next((p for p in (".gz", ".zst") if suffix.endswith(p)), "")
    data = bytearray(PACKED[packed](FORMATS[suffix.removesuffix(packed)](ROWS)))
    data[place % len(data)] = byte
    path = put(tmp_path, suffix, bytes(data if cut is None else data[: cut % len(data)]))
    said = ""
    try:
        rows = cells(Source(path))
    except RetentionBenchError as error:
        rows, said = [], str(error)
    assert bool(rows) != bool(said)
    assert "\n" not in said
    assert len(said) < 1000


# What a name means


def test_a_file_or_a_hub_data_set_is_told_by_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/there").write_text("{}")
    local = ["/x", "./x", "~/x", "x.jsonl", "owner/x.csv.zst", "x.txt.gz", "owner/there", "owner", "a\0b", "x" * 5000]
    for name in local:
        assert is_local(name)
    for name in ("owner/x", "squad", "owner/x.v2"):
        assert not is_local(name)


def test_nothing_but_a_regular_file_of_a_known_kind_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.txt").write_text("{}")
    for name, says in (
        (str(tmp_path / "pipe.jsonl"), "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (str(tmp_path), "is a folder, where a corpus file is needed"),
        (str(tmp_path / "none.jsonl"), "There is no corpus file at"),
        ("a\0b", "There is no corpus file at"),
        (str(tmp_path / "a.txt"), "is of no known kind. Allowed: .jsonl, .jsonl.gz, .jsonl.zst"),
    ):
        given = Source(name, what="corpus file")
        for read in (lambda given=given: list(given.rows()), given.table, given.columns):
            assert isinstance(refused(says, read), UsageError)


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub data set of 30 rows, and what was asked of it."""
    asked = []

    def load(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        found = datasets.Dataset.from_dict({"n": list(range(30)), "a": ["x"] * 30})
        return found.to_iterable_dataset(num_shards=3) if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_data_set_is_downloaded_or_streamed_at_its_revision(hub):
    whole = Source("owner/rows", "abc", "en", "test")
    assert [row.cells["n"] for row in whole.rows()] == [row["n"] for row in whole.table(["n"])] == list(range(30))
    assert (whole.columns(), whole.table(["n"])[3]) == (["n", "a"], {"n": 3})
    assert set(hub) == {("owner/rows", "en", "test", "abc", False)}
    hub.clear()
    stream = Source("owner/rows", "abc", stream=True)
    assert [(row.place, row.cells) for row in stream.rows(["n"])][4] == ("row 5 of its stream", {"n": 4})
    assert stream.columns() == ["n", "a"]
    orders = [[row.cells["n"] for row in stream.rows(shuffle=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(30))
    assert set(hub) == {("owner/rows", None, "train", "abc", True)}
    refused("no column 'z'; there are n, a", lambda: list(stream.rows(["z"])))


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_data_set_needs_a_revision_before_anything_is_asked(hub, stream):
    given = Source("owner/rows", stream=stream)
    for read in (lambda: list(given.rows()), given.table, given.columns, given.unreachable):
        assert isinstance(refused("'owner/rows' needs a `revision`", read), UsageError)
    assert not hub


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("BuilderConfig"), KeyError(1)])
def test_what_the_hub_raises_is_one_line_and_a_broken_stream_no_short_one(monkeypatch, error):
    def broken():
        yield {"n": 1}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: broken())
    rows = Source("owner/rows", "abc", stream=True).rows()
    assert next(rows).cells == {"n": 1}
    refused("The Hub data set 'owner/rows' at revision abc, split 'train', cannot be read", lambda: next(rows))


def test_read_jsonl_gives_any_value_with_its_line(tmp_path):
    assert list(read_jsonl(put(tmp_path, ".jsonl", b"1\n\n[2]\n"))) == [(1, 1), (3, [2])]
