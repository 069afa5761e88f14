import gzip

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune.rows import open_rows


def parse(cell):
    if not isinstance(cell, list):
        raise ValueError(f"not a list, got {cell!r}")
    return cell


def read(source, revision=None):
    rows = open_rows(str(source), revision, "messages", parse)
    return [rows[i] for i in range(len(rows))]


CELLS = [[{"role": "user", "content": "Ä"}], [{"role": "user", "content": "b"}]]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = b'{"id": 1, "messages": [{"role": "user", "content": "\xc3\x84"}]}\n\n'
    lines += b'{"id": 2, "messages": [{"role": "user", "content": "b"}]}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "messages": CELLS}), tmp_path / "a.parquet")
    for kind in ("jsonl", "jsonl.gz", "parquet"):
        assert read(tmp_path / f"a.{kind}") == CELLS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"messages": []}\n\n{"messages": [\n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"messages": []}\n{"messages": "hi"}\n', "a.jsonl, line 2: not a list, got 'hi'"),
        ("a.jsonl", b'{"messages": []}\n["hi"]\n', "a.jsonl, line 2: a row must be a JSON object, got list"),
        ("a.jsonl", b'{"messages": []}\n{"text": "hi"}\n', "a.jsonl, line 2: no column 'messages'; there are text"),
        ("a.jsonl", b'{"messages": ["\xff"]}\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"messages": []}\n')[:-9], "a.jsonl.gz is damaged"),
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
        open_rows(str(tmp_path / "a.jsonl"), None, "messages", parse)


def test_a_parquet_file_without_the_column_or_rows_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(RetentionBenchError, match="no column 'messages'; there are text"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"messages": CELLS}).slice(0, 0), path)
    with pytest.raises(RetentionBenchError, match="holds no rows"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["a", "b"]}), path)
    with pytest.raises(RetentionBenchError, match=r"a.parquet, row 1: not a list"):
        read(path)


def test_a_path_that_is_no_data_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("messages\n")
    for source in (tmp_path / "none.jsonl", "./none", "none.parquet", tmp_path):
        with pytest.raises(UsageError, match="no data file"):
            read(source)
    with pytest.raises(UsageError, match=r"\.jsonl\.gz"):
        read(tmp_path / "a.csv")


def test_a_hub_data_set_is_read_at_its_revision(monkeypatch):
    asked = []

    def load(source, *, split, revision):
        asked.append((source, split, revision))
        return datasets.Dataset.from_dict({"id": [1, 2], "messages": CELLS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/chats", "abc") == CELLS
    assert asked == [("owner/chats", "train", "abc")]
    with pytest.raises(RetentionBenchError, match="no column 'text'; there are id, messages"):
        open_rows("owner/chats", "abc", "text", parse)


def test_a_hub_data_set_needs_a_revision():
    with pytest.raises(UsageError, match="'owner/chats' needs a `revision`"):
        read("owner/chats")


def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(RetentionBenchError, match=r"'owner/none' at revision abc cannot be read .* local file"):
        read("owner/none", "abc")
