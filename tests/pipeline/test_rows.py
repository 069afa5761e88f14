import gzip
import json
import os

import datasets
import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.rows import Texts


def test_texts_can_be_gone_through_again(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5))
    texts = Texts(str(path), None, None, 3)
    assert list(texts) == list(texts) == ["text 0", "text 1", "text 2"]
    assert len(list(Texts(str(path), None, None, 9))) == 5


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b\xc2\x85c"}\n')
    assert list(Texts(str(path), None, None, 10**30)) == ["a", "b\x85c"]


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        ('{"text": "a"}\n\n{"text": 3}\n', "line 3: a corpus row needs a `text`"),
        ('{"text": null}\n', "line 1: a corpus row needs a `text`"),
        ('{"text": "\\ud83d"}\n', "line 1: a text holds half a character"),
        ("[" * 200_000, "c.jsonl: the JSON is nested too deeply"),
        ("NaN", "line 1: not JSON"),
        ("", "holds no rows"),
        ('{"text": "a"}\n{"text": " "}\n', "line 2: a corpus row needs a `text`"),
        ('{"text": "a"}\n["b"]\n', "line 2: a row must be a JSON object"),
        ('{"text": "a"}\n{"te', "line 2: not JSON"),
    ],
)
def test_a_corpus_that_is_not_well_formed_is_refused(tmp_path, contents, why):
    path = tmp_path / "c.jsonl"
    path.write_text(contents)
    with pytest.raises(RetentionBenchError, match=why):
        list(Texts(str(path), None, None, 9))


@pytest.mark.parametrize(
    ("name", "contents", "why"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2: the byte 0xe9 is not UTF-8"),
        ("c.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
        ("c.jsonl.gz", b"hello", "is no gzip file"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "is no gzip file, or is cut off"),
    ],
)
def test_bytes_that_are_no_text_are_named(tmp_path, name, contents, why):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(RetentionBenchError, match=f"{name}.*{why}"):
        list(Texts(str(tmp_path / name), None, None, 9))


def test_nothing_but_a_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path), "none.jsonl", "./none", "a\0b", "x" * 5000):
        with pytest.raises(UsageError, match="corpus file"):
            list(Texts(source, None, None, 9))


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route\nto host"), ValueError("BuilderConfig not found"), RuntimeError("x"), KeyError(1)],
)
def test_a_hub_data_set_that_cannot_be_read_is_one_line(monkeypatch, error):
    def stream():
        yield {"text": "a"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream())
    texts = Texts("some/corpus", "abc", None, 9)
    assert next(iter(texts)) == "a"
    with pytest.raises(RetentionBenchError, match="'some/corpus' at revision abc, .* cannot be read") as found:
        list(texts)
    assert "\n" not in str(found.value)
    assert list(Texts("some/corpus", "abc", None, 1)) == ["a"]  # no more is read than is asked for
