"""Files of tensors that are damaged, or hold something else than they should: one line, whatever reads them."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from retention_bench.editors import Covariance
from retention_bench.editors.locate.linalg import not_positive_semidefinite
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import LowRank, WeightDelta, check_place, read_tensors, write_tensors

MOMENT = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
DELTA = WeightDelta({"w": torch.ones(2, 3), "v": LowRank(torch.ones(4, 1), torch.ones(1, 2))}, base="tiny")
COVARIANCE = Covariance({0: MOMENT, 2: 2 * MOMENT}, 7, "texts", {0: torch.ones(2)})
ABOUT = {
    WeightDelta: {"kind": "weight delta", "version": 1, "base": None},
    Covariance: {"kind": "covariance", "version": 3, "tokens": 7, "source": "texts", "measured": {}},
}
TENSORS = {WeightDelta: {"w:dense": torch.ones(2, 2)}, Covariance: {"mom2.0": MOMENT}}
NAME = {WeightDelta: "w:dense", Covariance: "mom2.0"}


@pytest.fixture(params=[WeightDelta, Covariance])
def reader(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def raw(header, data=b"", length=None):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def stating(about):
    """The metadata of a file."""
    return {"retention_bench": about if isinstance(about, str) else json.dumps(about)}


def one(dtype, shape, size):
    """Header and data of a file with one tensor of zeros."""

    def make(reader):
        tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
        return raw({"__metadata__": stating(ABOUT[reader]), NAME[reader]: tensor}, bytes(size))

    return make


def broken(header, data=b"", length=None):
    return lambda reader: raw(header, data, length)


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (lambda _: b"", "no safetensors file, or is cut off"),
        (lambda _: b"junk", "no safetensors file"),
        (broken({}, length=1 << 45), "no safetensors file"),  # a header of terabytes
        (broken(b"[" * 100_000), "no safetensors file"),
        (broken(b"\xff\xfe{}"), "no safetensors file"),
        (broken({"__metadata__": {"retention_bench": {"kind": "x"}}}), "no safetensors file"),
        (broken({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 50]}}, b"1234"), "no safetensors file"),
        (broken({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]}}, bytes(8)), "no safetensors"),
        (
            broken({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)),
            "no safetensors file",  # one on top of the other
        ),
        (broken({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "no safetensors file"),
        (one("F99", [1], 4), "no safetensors file"),
        (one("F8_E4M3", [2, 2], 4), "the dtype F8_E4M3; float32, float64, float16, bfloat16 are allowed"),
        (one("C64", [2, 2], 32), "the dtype C64|no safetensors file"),
        (one("I64", [2, 2], 32), "the dtype I64"),
        (one("BOOL", [2, 2], 4), "the dtype BOOL"),
        (one("F4", [2, 2], 2), "the dtype F4|no safetensors file"),
        (one("F32", [0], 0), r"the shape \[0\]: it is empty"),
        (one("F32", [0, 1 << 40], 0), "it is empty"),
    ],
)
def test_a_damaged_file_is_one_line(reader, tmp_path, contents, why):
    path = tmp_path / "f.safetensors"
    path.write_bytes(contents(reader))
    with pytest.raises(RetentionBenchError, match=f"f.safetensors.*({why})") as error:
        reader.load(path)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ("", "not JSON"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"kind": NaN}', "NaN is no number"),
        ('{"kind": "\\ud800"}', "half a character"),
        ("[]", "valid dictionary, got a list of 0"),
        ("null", "valid dictionary, got None"),
        ("{}", "holds something else"),
        ('{"kind": ["weight delta"]}', "holds a list of 1 of version None"),
        ('{"kind": "x"}', "holds 'x' of version None"),
    ],
)
def test_what_stands_beside_the_tensors_is_checked(reader, tmp_path, about, why):
    path = tmp_path / "f.safetensors"
    save_file(TENSORS[reader], path, stating(about))
    with pytest.raises(RetentionBenchError, match=f"f.safetensors.*{why}"):
        reader.load(path)


@pytest.mark.parametrize(
    ("reader", "change", "why"),
    [
        (WeightDelta, {"version": 2}, "of version 1, and holds 'weight delta' of version 2"),
        (WeightDelta, {"version": "1"}, "holds 'weight delta' of version '1'"),
        (WeightDelta, {"base": 3}, "base: .*valid string, got 3"),
        (WeightDelta, {"sha256": "0"}, "damaged: its numbers are not those that were written"),
        (Covariance, {"tokens": 0}, "tokens: .*greater than or equal to 1, got 0"),
        (Covariance, {"tokens": -5}, "tokens: .*got -5"),
        (Covariance, {"tokens": 1.5}, "tokens: .*valid integer, got 1.5"),
        (Covariance, {"tokens": True}, "tokens: .*got True"),
        (Covariance, {"tokens": "7"}, "tokens: .*got '7'"),
        (Covariance, {"tokens": 10**30}, "tokens: .*less than or equal"),
        (Covariance, {"tokens": None}, "tokens: .*got None"),
        (Covariance, {"source": []}, "source: .*got a list of 0"),
        (Covariance, {"measured": []}, "measured: .*got a list of 0"),
        (Covariance, {"measured": {"texts": -1}}, "measured.texts: .*got -1"),
        (Covariance, {"measured": {"shard": [2, 2]}}, "no shard 2/2"),
        (Covariance, {"measured": {"shard": [0]}}, "measured.shard"),
        (Covariance, {"measured": {"modules": {"x": "y"}}}, "measured.modules"),
        (Covariance, {"measured": {"settings": 5}}, "measured.settings: .*got 5"),
    ],
)
def test_values_beside_the_tensors_have_a_range(tmp_path, reader, change, why):
    path = tmp_path / "f.safetensors"
    save_file(TENSORS[reader], path, stating(ABOUT[reader]))
    reader.load(path)
    save_file(TENSORS[reader], path, stating(ABOUT[reader] | change))
    with pytest.raises(RetentionBenchError, match=f"f.safetensors.*{why}"):
        reader.load(path)
    del change
    for key in ABOUT[reader].keys() - {"base"}:
        save_file(TENSORS[reader], path, stating({k: v for k, v in ABOUT[reader].items() if k != key}))
        with pytest.raises(RetentionBenchError, match="f.safetensors"):
            reader.load(path)


def test_nothing_but_a_file_is_opened(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for path, why in {
        tmp_path / "pipe": "a pipe or a device",
        "/dev/zero": "a pipe or a device",
        tmp_path: "a folder",
        tmp_path / "none": "There is no file with a",
        tmp_path / "link": "There is no file with a",
        "a\0b": "There is no file with a",
        "x" * 5000: "There is no file with a",
    }.items():
        with pytest.raises(UsageError, match=why):
            reader.load(path)


def test_half_precision_is_read_and_becomes_float32(reader, tmp_path):
    path = tmp_path / "f.safetensors"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({name: t.to(dtype) for name, t in TENSORS[reader].items()}, path, stating(ABOUT[reader]))
        loaded = reader.load(path)
        [found] = (loaded.entries if reader is WeightDelta else loaded.mom2).values()
        assert found.dtype == torch.float32
        assert torch.equal(found, TENSORS[reader][NAME[reader]])
    save_file({name: t.double() * 1e300 for name, t in TENSORS[reader].items()}, path, stating(ABOUT[reader]))
    with pytest.raises(RetentionBenchError, match="f.safetensors.*not finite"):
        reader.load(path)


@pytest.mark.parametrize("written", [DELTA, COVARIANCE])
def test_any_byte_that_flips_in_a_tensor_is_noticed(tmp_path, written):
    path = tmp_path / "f.safetensors"
    written.save(path)
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    for place in range(8 + length, len(contents), 3):
        path.write_bytes(contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :])
        with pytest.raises(RetentionBenchError, match="f.safetensors"):
            type(written).load(path)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, -1, 1 << 31, 1 << 63, 1 << 70]) | st.just("2") | st.none(), max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([10**30, "1e9", 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["w:dense", "w:left", "w:right", ":dense", "w", "mom2.0", "mom2.1", "fingerprint.0", "mom2.-1"])
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "F16", "BF16", "F8_E5M2", "I32", "BOOL", "C64", "U8", "F32 ", ""]),
        "shape": SHAPES | st.sampled_from([[2, 2], [2], [4], []]),
        "data_offsets": st.sampled_from([[0, 16], [0, 8], [8, 16], [16, 0], [0, 0], [0, 1 << 60], [0], "x"]),
    }
)


@st.composite
def files(draw, reader):
    """A file that is damaged in some of its bytes, or one of another structure."""
    if draw(st.booleans()):
        contents = bytearray(draw(st.sampled_from(GOOD[reader])))
        for _ in range(draw(st.integers(1, 4))):
            contents[draw(st.integers(0, len(contents) - 1))] = draw(st.integers(0, 255))
        return bytes(contents[: draw(st.none() | st.integers(0, len(contents)))])
    about = dict(ABOUT[reader])
    for key in draw(st.lists(st.sampled_from(sorted(about)), max_size=2)):
        about[key] = draw(JSON)
    header = {"__metadata__": draw(st.just(stating(about)) | JSON), **draw(st.dictionaries(NAMES, TENSOR, max_size=3))}
    return raw(header, struct.pack("<4f", 2, 1, 1, 3), draw(st.none() | st.sampled_from([0, 1 << 40, 1 << 63])))


GOOD = {}


@pytest.fixture(scope="module", autouse=True)
def _good(folder):
    for number, written in enumerate((DELTA, COVARIANCE)):
        path = folder / f"good{number}"
        written.save(path)
        GOOD[type(written)] = [path.read_bytes()]


def check_delta(folder, contents):
    path = folder / "d.safetensors"
    path.write_bytes(contents)
    try:
        delta = WeightDelta.load(path)
    except RetentionBenchError:
        return
    for entry in delta.entries.values():
        factors = [entry] if isinstance(entry, torch.Tensor) else [entry.left, entry.right]
        assert all(f.dtype == torch.float32 and f.numel() and f.isfinite().all() for f in factors)
    assert all(norm >= 0 for norm in delta.norms().values())


def check_covariance(folder, contents):
    path = folder / "s.safetensors"
    path.write_bytes(contents)
    try:
        found = Covariance.load(path)
    except RetentionBenchError:
        return
    assert found.tokens >= 1
    assert found.mom2
    assert all(not_positive_semidefinite(matrix) is None for matrix in found.mom2.values())
    assert all(len(keys) == len(found.mom2[layer]) for layer, keys in found.fingerprint.items())


@settings(max_examples=30, deadline=5000)
@given(files(WeightDelta))
def test_fuzz_delta(folder, contents):
    check_delta(folder, contents)


@settings(max_examples=30, deadline=5000)
@given(files(Covariance))
def test_fuzz_covariance(folder, contents):
    check_covariance(folder, contents)


@pytest.mark.slow
@settings(max_examples=300, deadline=5000)
@given(files(WeightDelta), files(Covariance))
def test_fuzz_at_length(folder, delta, covariance):
    check_delta(folder, delta)
    check_covariance(folder, covariance)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync") or sync(file))
    monkeypatch.setattr(type(tmp_path), "replace", lambda path, to: done.append("rename") or replace(path, to))
    write_tensors(tmp_path / "t", {"a": torch.ones(2)}, kind="thing", version=1)
    assert done == ["sync", "rename", "sync"]
    tensors, about = read_tensors(tmp_path / "t", dict, kind="thing", version=1)
    assert torch.equal(tensors["a"], torch.ones(2))
    assert about["kind"] == "thing"


def test_tensors_in_one_memory_are_written(tmp_path):
    shared = torch.ones(3, 4)
    tensors = {"a": shared, "b": shared, "c": shared[1:], "d": shared.T}
    write_tensors(tmp_path / "t", tensors, kind="thing", version=1)
    found, _ = read_tensors(tmp_path / "t", dict, kind="thing", version=1)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in tensors.items()}


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / ("n" * 250)  # as long as a name may be, nearly
    DELTA.save(path)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        WeightDelta({"w": torch.ones(1)}).save(path)
    assert WeightDelta.load(path).base == "tiny"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    check_place(tmp_path / "file")
    check_place(tmp_path / "new")
    for path in ("", "file/below", "missing/x", "n" * 300, "pipe", "a\0b"):
        with pytest.raises(UsageError, match="Give the path of a file"):
            check_place(tmp_path / path)
    with pytest.raises(UsageError, match="Give the path of a file"):
        DELTA.save(tmp_path / "missing" / "x")
    with pytest.raises(UsageError, match="Give the path of a file"):
        DELTA.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "pipe"]
