"""The one boundary for files of others: a value or one line that says what is wrong, quickly."""

import gzip
import json
import os

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.data import (
    checked,
    find_file,
    locate,
    output_file,
    output_folder,
    parse_json,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
)
from retention_bench.errors import RetentionBenchError, UsageError

FUZZ = {"deadline": 5000, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


class Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    name: str
    counts: list[int] = []


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with one of each kind of thing, as the working folder."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_one_line(says, function, *arguments):
    with pytest.raises(RetentionBenchError) as caught:
        function(*arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    return caught.value


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none", "There is no file at none. Correct the path"),
        ("file/none", "There is no file at file/none: Not a directory"),
        ("folder", "folder is a folder, where a file is needed"),
        ("pipe", "pipe is a pipe or a device"),
        ("/dev/zero", "/dev/zero is a pipe or a device"),
        ("dangling", "There is no file at dangling"),
        ("loop", "There is no file at loop"),
        ("a" * 5000, "aaa...: File name too long"),
        ("a\0b", "null byte"),
        ("~nobody-of-this-name/x", "home directory"),
    ],
)
def test_what_is_no_file_is_refused(places, path, says):
    for reader in (find_file, read_text, read_lines, read_jsonl):
        assert in_one_line(says, reader, path).exit_code == 2


def test_a_link_to_a_file_is_a_file(places):
    assert (read_text("link"), locate("link").name, locate("none"), locate("a" * 300)) == ("x", "link", None, None)


@pytest.mark.parametrize(
    ("path", "folder", "file"),
    [
        ("file", "file is a file, where a folder is needed", None),
        ("folder", None, "folder is a folder, where a file to write is needed"),
        ("pipe", "is a file, where", "is a pipe or a device"),
        ("dangling", "dangling is a link to nothing", None),
        ("file/below/it", "There can be no folder file/below/it: file is a file", "There is no folder file/below"),
        ("new", None, None),
        ("new/in/new", None, "There is no folder new/in to write new into"),
        ("a" * 300, "so long a name", "so long a name"),
        ("", "must not be empty", "must not be empty"),
        ("a\0b", "No path can be 'a\\x00b'", "No path can be 'a\\x00b'"),
        ("~nobody-of-this-name/x", "home directory", "home directory"),
    ],
)
def test_where_nothing_can_be_written_is_known_before(places, path, folder, file):
    for function, says in ((output_folder, folder), (output_file, file)):
        if says is None:
            assert str(function(path)) == path
        else:
            in_one_line(says, function, path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"caf\xe9", "file, line 1: the byte 0xe9 is not UTF-8"),
        (b"{}\n\xff{}", "line 2: the byte 0xff is not UTF-8"),
        ("\ufeff{}".encode("utf-16-le"), "line 1: the byte 0xff is not UTF-8"),
        (b'{"a": NaN}', "line 1: not JSON: NaN is no number that JSON knows"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is larger than any number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON: Exceeds the limit"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\udfffa": 1}', "half a character"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"{'a': 1}", "line 1: not JSON"),
        (b'{"a": 1', "line 1: not JSON"),
        (b"\x00", "line 1: not JSON"),
    ],
)
def test_what_is_not_json_is_said_with_its_line(places, data, says):
    (places / "file").write_bytes(data)
    in_one_line(says, lambda: list(read_jsonl("file")))


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(places):
    (places / "file").write_bytes(b'\xef\xbb\xbf{"a": "\xc2\x85x"}\r\n\r\n{"a": 2}')
    assert list(read_jsonl("file")) == [(1, {"a": "\x85x"}), (3, {"a": 2})]
    (places / "file").write_bytes(b"\xef\xbb\xbf\xe2\x82\xac")
    assert read_text("file") == "\u20ac"


def test_a_damaged_gz_file_is_named(places):
    whole = gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)
    for damaged in (whole[:40], b"no gzip", whole[:30] + b"\xff\xff\xff" + whole[33:]):
        (places / "x.gz").write_bytes(damaged)
        in_one_line("x.gz is no gzip file, or is cut off", lambda: list(read_lines("x.gz")))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "x: name: Field required, got an object with 0 keys."),
        ([1] * 9, "x: Input should be a valid dictionary or instance of Row, got a list of 9."),
        ({"name": 3}, "x: name: Input should be a valid string, got 3."),
        ({"name": "a", "counts": [1, "b" * 999]}, "x: counts.1: Input should be a valid integer, got 'bbb"),
        ({"name": "a", "counts": {"b" * 9: 1}}, "x: counts: Input should be a valid list, got an object with 1 keys."),
    ],
)
def test_what_does_not_fit_a_schema_is_said_with_its_place(places, value, says):
    in_one_line(says, checked, Row, value, "x")
    (places / "file").write_text(json.dumps(value))
    in_one_line(says[1:], read_json, "file", Row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
DAMAGED = st.builds(
    lambda value, cut, byte: (lambda text: text[: cut % (len(text) + 1)] + byte + text[cut % (len(text) + 1) :])(
        json.dumps(value).encode()
    ),
    JSON,
    st.integers(0, 500),
    st.binary(max_size=2),
)


def read_whatever(folder, data):
    (folder / "file").write_bytes(data)
    try:
        rows, said = list(read_jsonl("file")), ""
    except RetentionBenchError as error:
        rows, said = [], str(error)
    assert "\n" not in said
    json.dumps(rows, ensure_ascii=False, allow_nan=False).encode()  # what is read can be written


@settings(max_examples=30, **FUZZ)
@given(data=st.binary(max_size=200) | DAMAGED)
def test_any_bytes_are_json_lines_or_refused(places, data):
    read_whatever(places, data)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(data=st.binary(max_size=2000) | DAMAGED)
def test_many_bytes_are_json_lines_or_refused(places, data):
    read_whatever(places, data)


@settings(max_examples=30, **FUZZ)
@given(value=JSON)
def test_any_json_fits_a_schema_or_is_refused(value):
    try:
        row, said = checked(Row, value, "x"), ""
    except RetentionBenchError as error:
        row, said = None, str(error)
    assert isinstance(row, Row) or 0 < len(said) < 500


def test_json_is_the_value_that_it_says():
    value = {"a": [1, 2.5, None, True, "\U0001f600", {"b": ""}]}
    assert parse_json(json.dumps(value), "x") == parse_json(json.dumps(value, ensure_ascii=False), "x") == value


def test_an_error_is_a_usage_error_where_the_name_is_wrong_alone(places):
    with pytest.raises(UsageError):
        read_text("none")
    (places / "file").write_bytes(b"\xff")
    with pytest.raises(RetentionBenchError) as caught:
        read_text("file")
    assert caught.value.exit_code == 1
