"""Whatever a facts file holds: its facts, or one line that says what is wrong."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet, load_pool

from .test_pool import EASYEDIT, KNOWN, MQUAKE, OURS, RECENT, ROME, TRACING, ZSRE

RECORDS = [ROME, TRACING, EASYEDIT, KNOWN, OURS, ZSRE, RECENT, MQUAKE]
odd = st.sampled_from(
    [
        "",
        " ",
        "{}",
        "{} {}",
        "\ud800",
        "\x00",
        "\x1b[2J",
        "[/x]",
        "a" * 150_000,
        [],
        {},
        [[]],
        10**400,
        -0.0,
        True,
        None,
    ]
)
values = st.recursive(
    odd | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value, path=()):
    """The paths of everything in a record."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in children:
        yield from places(inner, (*path, key))


@st.composite
def records(draw):
    """A real record with up to three parts replaced or taken out, or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from([p for p in places(record) if p] or [()]))
        if not path:
            break
        inner = record
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()):
            inner[path[-1]] = draw(values)
        else:
            del inner[path[-1]]
    return record


@st.composite
def files(draw):
    """JSONL or a JSON list of such records, or these bytes with some changed, or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    lines = [json.dumps(record) for record in draw(st.lists(records(), max_size=5))]
    data = bytearray(("\n".join(lines) if draw(st.booleans()) else f"[{','.join(lines)}]").encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        if data:
            place = draw(st.integers(0, len(data) - 1))
            data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


def tried(read, path):
    try:
        return read(path)
    except RetentionBenchError as error:
        return error


def check(folder, data, suffix):
    path = folder / f"facts{suffix}"
    path.write_bytes(data)
    began = time.monotonic()
    for read in (load_pool, FactSet.read):
        found = tried(read, path)
        if isinstance(found, RetentionBenchError):
            says = str(found)
            assert says.startswith(str(path)) or f": {path} (" in says
            assert "\n" not in says
            assert len(says) < 2_000
            continue
        facts = found if isinstance(found, FactSet) else found.facts
        assert len(facts) > 0
        facts.write(folder / "again.jsonl")
        assert FactSet.read(folder / "again.jsonl") == facts
        if not isinstance(found, FactSet):
            assert found.rows.kept == len(facts)
            assert len(str(found.rows)) < 2_000
            json.dumps(found.rows.to_json(), allow_nan=False)
    assert time.monotonic() - began < 5


suffixes = st.sampled_from([".jsonl", ".json", ""])
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=30, **common)
@given(files(), suffixes)
def test_a_facts_file_is_read_or_refused_in_one_line(tmp_path_factory, data, suffix):
    check(tmp_path_factory.mktemp("facts"), data, suffix)


@pytest.mark.slow
@settings(max_examples=300, **common)
@given(files(), suffixes)
def test_many_facts_files_are_read_or_refused_in_one_line(tmp_path_factory, data, suffix):
    check(tmp_path_factory.mktemp("facts"), data, suffix)
