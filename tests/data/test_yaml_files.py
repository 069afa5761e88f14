"""YAML of others: keys that are texts and stand once, no bombs, the line of what is wrong."""

import time

import pytest

from retention_bench.data.yaml_files import MOST_VALUES, read_yaml
from retention_bench.errors import UsageError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGED_BOMB = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{k{i}: 1, <<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML: the key 'a' stands here again, after line 1"),
        ("a: {b: 1, c: {d: 1, 'd': 2}}", "the key 'd' stands here again, after line 1"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "the key '<<' stands here again"),
        ("x: 1\non: 1", "line 2: not valid YAML: the key 'on' is no text; write it in quotes"),
        ("1: 2", "the key '1' is no text"),
        ("null: 2", "the key 'null' is no text"),
        ("? [a]\n: 1", "a key is no text"),
        (f"a: {'[' * 20_000}{']' * 20_000}", "more than 50 levels stand within one another"),
        (BOMB, f"more than {MOST_VALUES:,} values, with what the aliases stand for"),
        (MERGED_BOMB, f"more than {MOST_VALUES:,} values, with what the aliases stand for"),
        (f"a: [{'x, ' * 100_000}x]", f"more than {MOST_VALUES:,} values"),
        ("a: &a [*a]", "an alias stands within what it is an alias of"),
        ("a: *b", "undefined alias 'b'"),
        ('a: "x\\0y"', "a text holds a NUL or half a character"),
        ('a: "\\ud800"', "a text holds a NUL or half a character"),
        ("a: \x07", "unacceptable character #x0007"),
        ("a: 010", "line 1: not valid YAML: '010' is read as 8; write that, or put it in quotes"),
        ("a: 1:30", "'1:30' is read as 90; write that, or put it in quotes"),
        ("a: 10000000000000000000000000", "an integer is larger than any here may be"),
        (f"a: {'9' * 5000}", "is no int"),
        ("a: 0x_", "'0x_' is no int"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("--- 1\n--- 2", "another document"),
        ("a: [", "line 1: not valid YAML"),
        ("a: 'x", "line 1: not valid YAML"),
        ("x" * 600_000, "has 600,000 characters; a suite file has 500,000 at most"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_at_once(tmp_path, text, says):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        read_yaml(path, "suite file")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 5


def test_latin1_is_refused_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: caf\xe9")
    with pytest.raises(UsageError, match="line 1: the byte 0xe9 is not UTF-8"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(path) == {"a": 1}


def test_settings_in_common_are_what_aliases_are_for(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {b: 1, c: 2, when: 2023-11-01}\nd: *a\ne: {<<: *a, b: 3}\n'on': yes\n")
    common = {"b": 1, "c": 2, "when": "2023-11-01"}
    assert read_yaml(path) == {"a": common, "d": common, "e": {**common, "b": 3}, "on": True}
