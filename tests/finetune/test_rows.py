import gzip
import os
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from retention_bench.data import Source
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.rows import open_rows, shuffled_rows


def parse(cell):
    if not isinstance(cell, list):
        raise ValueError(f"not a list, got {cell!r}")
    return cell


def read(source, revision=None):
    rows = open_rows(Source(str(source), revision), {"messages": parse})
    return [rows[i]["messages"] for i in range(len(rows))]


def count(cell):
    if cell < 0:
        raise ValueError(f"negative: {cell}")
    return cell


CELLS = [[{"role": "user", "content": "Ä"}], [{"role": "user", "content": "b"}]]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = b'{"id": 1, "messages": [{"role": "user", "content": "\xc3\x84"}]}\n\n'
    lines += b'{"id": 2, "messages": [{"role": "user", "content": "b"}]}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "messages": CELLS}), tmp_path / "a.parquet")
    for kind in ("jsonl", "jsonl.gz", "parquet"):
        assert read(tmp_path / f"a.{kind}") == CELLS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"messages": []}\n\n{"messages": [\n', "a.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            b'{"messages": []}\n{"messages": "hi"}\n',
            "a.jsonl, line 2, column 'messages': not a list, got 'hi'",
        ),
        ("a.jsonl", b'{"messages": []}\n["hi"]\n', "a.jsonl, line 2: a row must be a JSON object, got a list of 1"),
        ("a.jsonl", b'{"text": "hi"}\n', "a.jsonl, line 1: no column 'messages'; there are text"),
        ("a.jsonl", b'{"messages": []}\n{"text": "hi"}\n', "a.jsonl, line 2, column 'messages': not a list, got None"),
        ("a.jsonl", b'{"messages": ["\xff"]}\n', "a.jsonl, line 1: the byte 0xff is not UTF-8; .* Latin-1"),
        ("a.jsonl", b"\xff\xfe{\x00", "a.jsonl, line 1: the byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"messages": [], "x": NaN}\n', "a.jsonl, line 1: not JSON: NaN"),
        ("a.jsonl", b'{"messages": ' + b"[" * 100_000 + b"\n", "a.jsonl, line 1: .* nested too deeply"),
        ("a.json", b'[{"messages": []}, {"messages": "hi"}]', "a.json, row 2, column 'messages': not a list, got 'hi'"),
        ("a.json", b'[{"messages": []}, 5]', "a.json, row 2: a row must be a JSON object, got 5"),
        ("a.json", b'[{"messages": []}', "a.json: not JSON"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is no gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"messages": []}\n', mtime=0)[:-9], "a.jsonl.gz is no gzip file, or is cut off"),
        ("a.parquet", b"no parquet", "a.parquet is not a readable Parquet file"),
    ],
)
def test_a_malformed_file_is_refused_by_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RetentionBenchError, match=message):
        read(tmp_path / name)


def test_a_malformed_line_is_refused_before_any_row_is_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n{"messages": "hi"}\n')
    with pytest.raises(RetentionBenchError, match="line 2"):
        open_rows(Source(str(tmp_path / "a.jsonl")), {"messages": parse})


def test_a_parquet_file_without_the_column_or_rows_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(RetentionBenchError, match="no column 'messages'; there are text"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"messages": CELLS}).slice(0, 0), path)
    with pytest.raises(RetentionBenchError, match="holds no rows"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["a", "b"]}), path)
    with pytest.raises(RetentionBenchError, match=r"a.parquet, row 1, column 'messages': not a list"):
        read(path)


def test_a_path_that_is_no_data_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("messages\n")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source, says in (
        (tmp_path / "none.jsonl", "no data file"),
        ("./none", "no data file"),
        ("none.parquet", "no data file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.jsonl", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
    ):
        with pytest.raises(UsageError, match=says):
            read(source)
    with pytest.raises(UsageError, match=r"\.jsonl\.gz"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_several_columns_are_read_together(tmp_path, suffix):
    path, rows = tmp_path / f"a.{suffix}", {"id": ["x", "y"], "n": [3, -4], "messages": CELLS}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.to_json(path) if suffix == "jsonl" else dataset.to_parquet(path)
    assert Source(str(path)).columns() == ["id", "n", "messages"]
    rows = open_rows(Source(str(path)), {"messages": parse, "n": abs})
    assert [rows[i] for i in range(2)] == [{"messages": CELLS[0], "n": 3}, {"messages": CELLS[1], "n": 4}]
    with pytest.raises(RetentionBenchError, match=rf"a.{suffix}, (line|row) 2, column 'n': negative: -4"):
        open_rows(Source(str(path)), {"messages": parse, "n": count})[1]
    with pytest.raises(RetentionBenchError, match="no column 'label'; there are id, n, messages"):
        open_rows(Source(str(path)), {"messages": parse, "label": count})


def test_a_file_is_gone_through_once_in_an_order_that_the_seed_decides(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(20)))

    def order(seed):
        rows = shuffled_rows(
            Source(str(tmp_path / "a.jsonl"), stream=True), {"n": count}, random.Random(seed), Dropped()
        )
        return [row["n"] for _, row in rows]

    assert sorted(order(0)) == list(range(20))
    assert order(0) == order(0) != order(1)


@pytest.fixture
def hub(monkeypatch):
    """A Hub data set `owner/chats`; gives what was asked of it."""
    asked = []

    def load(source, config, *, split, revision, streaming):
        asked.append((source, config, split, revision, streaming))
        if split not in ("train", "empty"):
            raise ValueError(f'Unknown split "{split}".')
        if split == "empty" and streaming:
            return datasets.IterableDataset.from_generator(lambda: iter(()))
        dataset = datasets.Dataset.from_dict({"n": list(range(20)), "messages": CELLS * 10})
        dataset = dataset.select(range(0 if split == "empty" else 20))
        return dataset.to_iterable_dataset(num_shards=2) if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_data_set_is_read_at_its_revision(hub):
    source = Source("owner/chats", "abc", "en")
    assert open_rows(source, {"messages": parse})[1] == {"messages": CELLS[1]}
    assert source.columns() == ["n", "messages"]
    assert hub == [("owner/chats", "en", "train", "abc", False)] * 2
    with pytest.raises(RetentionBenchError, match=r"owner/chats \(en\), split train: no column 'text'; there are n"):
        open_rows(source, {"text": parse})
    with pytest.raises(RetentionBenchError, match=r"split train, row 4, column 'n': 3 is odd"):
        open_rows(source, {"n": even})[3]


def even(cell):
    if cell % 2:
        raise ValueError(f"{cell} is odd")
    return cell


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_split_and_one_that_there_is_not_are_named(hub, stream):
    rng = random.Random(0)
    with pytest.raises(RetentionBenchError, match="owner/chats, split empty holds no rows"):
        next(shuffled_rows(Source("owner/chats", "abc", split="empty", stream=stream), {"n": count}, rng, Dropped()))
    with pytest.raises(RetentionBenchError, match="'owner/chats' at revision abc, split 'none', cannot be read"):
        next(shuffled_rows(Source("owner/chats", "abc", split="none", stream=stream), {"n": count}, rng, Dropped()))


def test_a_stream_is_gone_through_once_in_an_order_that_the_seed_decides(hub):
    source = Source("owner/chats", "abc", stream=True)

    def order(seed):
        return [row["n"] for _, row in shuffled_rows(source, {"n": count}, random.Random(seed), Dropped())]

    assert sorted(order(0)) == list(range(20))
    assert order(0) == order(0) != order(1)
    assert source.columns() == ["n", "messages"]
    assert all(streaming for *_, streaming in hub)
    with pytest.raises(RetentionBenchError, match="row 1 of its stream: no column 'text'; there are n, messages"):
        next(shuffled_rows(source, {"text": count}, random.Random(0), Dropped()))
    with pytest.raises(RetentionBenchError, match="row [0-9]+ of its stream, column 'n': [0-9]+ is odd"):
        list(shuffled_rows(source, {"n": even}, random.Random(0), Dropped()))


def test_a_stream_that_breaks_off_is_no_short_data_set(monkeypatch):
    def broken():
        yield {"n": 1}
        raise ConnectionError("connection reset")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: datasets.IterableDataset.from_generator(broken)
    )
    with pytest.raises(RetentionBenchError, match="'owner/chats' at revision abc.* connection reset"):
        list(shuffled_rows(Source("owner/chats", "abc", stream=True), {"n": count}, random.Random(0), Dropped()))


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_data_set_needs_a_revision(stream):
    with pytest.raises(UsageError, match="'owner/chats' needs a `revision`.* owner/chats@REVISION"):
        next(shuffled_rows(Source("owner/chats", stream=stream), {"n": count}, random.Random(0), Dropped()))


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch, stream):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(RetentionBenchError, match=r"'owner/none' at revision abc, .* cannot be read .* local file"):
        next(shuffled_rows(Source("owner/none", "abc", stream=stream), {"n": count}, random.Random(0), Dropped()))
