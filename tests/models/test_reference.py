"""Checkpoints as they are named: on the command line, by a pattern, in a manifest."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import Named, Reference, parse_reference, read_manifest, read_references


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders and files as they lie in a folder of runs; the working folder is above it."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "broken", "empty", "adapter"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    (tmp_path / "runs" / "broken" / "model.safetensors").write_text("")
    (tmp_path / "runs" / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base", "revision": "abc"})
    )
    for name in ("notes.txt", "log.json", "x.safetensors"):
        (tmp_path / "runs" / name).write_text("")
    os.mkfifo(tmp_path / "runs" / "pipe")
    return tmp_path / "runs"


def test_a_pattern_takes_folders_of_models_and_adapters_and_names_the_rest(runs):
    told = []
    references, unreadable = read_references(["runs/*"], told.append)
    assert [r.name for r in references] == ["runs/a", "runs/adapter", "runs/b", "runs/broken"]
    assert references[1] == Reference("runs/adapter", "owner/base", "abc", adapter="runs/adapter")
    assert unreadable == {}
    (text,) = told
    assert "passed over: runs/empty, runs/log.json, runs/notes.txt, runs/pipe, runs/x.safetensors." in text


def test_behind_a_plus_a_pattern_takes_deltas_and_adapters(runs):
    told = []
    references, _ = read_references(["runs/a+runs/*"], told.append)
    assert [(r.base, r.delta, r.adapter) for r in references] == [
        ("runs/a", None, "runs/adapter"),
        ("runs/a", "runs/x.safetensors", None),
    ]
    assert "runs/b" in told[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("runs/*.txt", "Nothing that fits 'runs/.*' is a model or an adapter: runs/notes.txt"),
        ("runs/a+runs/*.txt", "is a delta or an adapter: runs/notes.txt"),
        ("none/*", "No folder fits 'none/"),
        ('{"checkpoint": "runs/[ab]", "name": "x"}', "The name 'x' stands for 2 checkpoints"),
        ('{"checkpoint": 3, "name": "x"}', "checkpoint: Input should be a valid string, got 3"),
        ('{"checkpoint": "x"}', "name: Field required"),
        ("{", "no JSON object with name and checkpoint"),
        (f"{{{'[' * 100_000}", "no JSON object with name and checkpoint"),
        ('{"checkpoint": "x", "name": "\\ud800"}', "half a character"),
        ("a\0*", "no path can hold a NUL"),
    ],
)
def test_what_names_no_checkpoint_is_refused(runs, text, says):
    with pytest.raises(UsageError, match=says):
        read_references([text])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("runs/notes.txt", "'runs/notes.txt' is a file, and a checkpoint is a folder"),
        ("runs/pipe", "is a file, and a checkpoint is a folder"),
        ("", "There is no model folder at ''"),
        ("a b", "There is no model folder at 'a b'"),
        ("a" * 300, "There is no model folder at 'aaa"),
        ("~nobody-of-this-name/m", "home directory"),
        ("runs/a+runs/notes", "'runs/notes' in .* is neither a delta's file nor an adapter's folder"),
        ("runs/a+", "is neither a delta's file"),
        ("+runs/x.safetensors", "There is no model folder at ''"),
    ],
)
def test_one_bad_name_does_not_end_a_batch(runs, text, says):
    references, unreadable = read_references([text, "runs/a"])
    assert [r.name for r in references] == ["runs/a"]
    assert list(unreadable) == [text]
    with pytest.raises(RetentionBenchError, match=says):
        raise RetentionBenchError(unreadable[text])


def test_a_name_that_is_not_utf8_is_recorded_in_characters_that_are(runs):
    folder = os.fsencode(runs) + b"/\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    with open(folder + b"/config.json", "w"):
        pass
    references, unreadable = read_references(["runs/*"])
    assert len(references) == 4
    assert unreadable == {"runs/\\udcff": "Its name is not UTF-8. Rename the folder."}


def test_a_manifest_may_have_a_byte_order_mark_comments_and_objects(runs):
    (runs / "list").write_bytes(b'\xef\xbb\xbfruns/a\r\n# no\r\n\r\n {"checkpoint": "runs/b", "name": "\xc3\xa9"} \r\n')
    named = read_manifest("runs/list")
    assert named == [Named("runs/a"), Named("runs/b", "\xe9")]
    assert [r.name for r in read_references(named)[0]] == ["runs/a", "\xe9"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"runs/a\ng\xf6od\n", "list, line 2: the byte 0xf6 is not UTF-8"),
        (b'runs/a\n{"checkpoint": []}\n', "list, line 2: checkpoint: Input should be a valid string, got a list of 0"),
        (b'{"checkpoint": "a", "name": NaN}', "list, line 1: not JSON"),
        (b"runs/a\n\x00\n", "list, line 2: no path can hold a NUL"),
    ],
)
def test_a_bad_line_of_a_manifest_is_named(runs, data, says):
    (runs / "list").write_bytes(data)
    with pytest.raises(RetentionBenchError, match=says) as caught:
        read_manifest("runs/list")
    assert "\n" not in str(caught.value)


def test_an_adapter_without_its_base_is_refused(runs):
    unsaid = r"does not say which model it adapts. Give BASE\+runs/adapter"
    for base in (None, 3, "", {}):
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (runs / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        says = "base_model_name_or_path: Input should be a valid string" if base in (3, {}) else unsaid
        with pytest.raises(RetentionBenchError, match=says):
            parse_reference("runs/adapter")


LINES = st.lists(
    st.text(max_size=30)
    | st.builds(json.dumps, st.dictionaries(st.sampled_from(["checkpoint", "name", "x"]), st.text() | st.integers()))
    | st.sampled_from(
        ["runs/a", "runs/*", "runs/a+runs/x.safetensors", "runs/a+*", "[", "{", "~", "+", "@", "\0", "a" * 400]
    )
)


def read_whatever(runs, data):
    (runs / "list").write_bytes(data)
    try:
        references, unreadable = read_references(read_manifest("runs/list"))
    except RetentionBenchError:
        return
    assert all(isinstance(r, Reference) for r in references)
    json.dumps([[r.name for r in references], unreadable], ensure_ascii=False).encode()


FUZZ = {"deadline": 5000, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
MANIFESTS = LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")) | st.binary(max_size=100)


@settings(max_examples=30, **FUZZ)
@given(data=MANIFESTS)
def test_any_manifest_is_read_or_refused(runs, data):
    read_whatever(runs, data)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(data=MANIFESTS)
def test_many_manifests_are_read_or_refused(runs, data):
    read_whatever(runs, data)
