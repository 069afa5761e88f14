"""Covariance files of the reference editors' own code."""

import io
import os
import resource
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.editors import Covariance
from retention_bench.editors.covariance import read_rome_npz, with_fingerprint
from retention_bench.editors.locate.linalg import not_positive_semidefinite
from retention_bench.errors import RetentionBenchError, UsageError


def write(path, total, count, **more):
    """A file as `layer_stats` leaves it: CombinedStat(mom2=SecondMoment()) and the number of texts asked for."""
    arrays = {
        "mom2.constructor": numpy.array("util.runningstats.SecondMoment()"),
        "mom2.count": numpy.array(count),
        "mom2.mom2": numpy.asarray(total),
        "sample_size": numpy.array(1400),
    }
    numpy.savez(path, **arrays | more)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, gpt2_covariance):
    """The golden model's covariance, layers 0 to 2, as the references would have kept them."""
    folder = tmp_path_factory.mktemp("npz")
    return {
        layer: write(folder / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_1400.npz", moment.numpy() * 17604, 17604)
        for layer, moment in gpt2_covariance.mom2.items()
    }


def test_files_of_the_references_are_read_and_get_a_fingerprint(
    files, gpt2, gpt2_covariance, untouched, tmp_path, distance
):
    model, tokenizer = gpt2
    with untouched(model):
        found = with_fingerprint(read_rome_npz(files, source="ROME's files"), model, tokenizer)
    assert (found.tokens, found.source) == (17604, "ROME's files")
    for layer, moment in gpt2_covariance.mom2.items():
        assert distance(found.mom2[layer], moment) < 1e-6
        assert torch.equal(found.fingerprint[layer], gpt2_covariance.fingerprint[layer])
    found.save(tmp_path / "s.safetensors")
    Covariance.load(tmp_path / "s.safetensors").check(model, [0, 1, 2])


def test_without_a_model_there_is_nothing_to_compare_with(files):
    found = read_rome_npz(files)
    assert (list(found.mom2), found.fingerprint, found.measured.modules) == ([0, 1, 2], {}, {})


def test_text_nearer_to_their_corpus_may_be_given(files, gpt2, golden):
    model, tokenizer = gpt2
    with_fingerprint(read_rome_npz(files), model, tokenizer, golden.texts[:30])
    with pytest.raises(UsageError, match="holds no token"):
        with_fingerprint(read_rome_npz(files), model, tokenizer, [""])


def test_files_of_another_model_or_layer_are_refused_with_figures(files, gpt2, llama):
    model, tokenizer = gpt2
    torch.manual_seed(1)
    other = type(model)(model.config).eval()
    figures = r"layer 0 is not this model's: over \d+ tokens .* correlates with it by -?0\.0\d .*trace is"
    with pytest.raises(UsageError, match=figures):
        with_fingerprint(read_rome_npz({0: files[0]}), other, tokenizer)
    with pytest.raises(UsageError, match=figures):
        with_fingerprint(read_rome_npz({0: files[1]}), model, tokenizer)
    with pytest.raises(UsageError, match="keys of size 512, the model's have 64"):
        with_fingerprint(read_rome_npz({0: files[0]}), llama[0], llama[1])


def test_a_mean_that_stands_where_the_sum_should_is_refused(tmp_path, gpt2, gpt2_covariance):
    model, tokenizer = gpt2
    path = write(tmp_path / "mean.npz", gpt2_covariance.mom2[0].numpy(), 17604)
    with pytest.raises(UsageError, match=r"trace is \S+ times as large \(1/20 to 20 is allowed\)"):
        with_fingerprint(read_rome_npz({0: path}), model, tokenizer)


ONES = numpy.ones((3, 3), dtype=numpy.float32)


@pytest.mark.parametrize(
    ("total", "count", "why"),
    [
        (ONES[:2], 5, r"square matrix of floats and has the shape \[2, 3\]"),
        (ONES.astype(int), 5, "the dtype int64"),
        (ONES * numpy.nan, 5, "not finite"),
        (ONES * 0, 5, "it is zero"),
        (numpy.triu(ONES), 5, "not symmetric"),
        (2 * ONES - numpy.eye(3), 5, "an eigenvalue below"),
        (ONES - 2 * numpy.eye(3), 5, "on its diagonal is negative"),
        (-ONES, 5, "on its diagonal is negative"),
        (ONES.astype(float) * 1e300, 5, "not finite"),  # in float32
        (ONES.astype(complex), 5, "the dtype complex128"),
        (ONES.astype(bool), 5, "the dtype bool"),
        (numpy.array([[{"a": 1}]], dtype=object), 5, "the dtype object"),
        (numpy.ones((0, 0)), 5, r"the shape \[0, 0\]"),
        (numpy.ones((2, 2, 2)), 5, r"the shape \[2, 2, 2\]"),
        (ONES, [5, 6], r"mom2.count should be the number of tokens and has the shape \[2\]"),
        (ONES, "x", "mom2.count should be the number of tokens and has .* the dtype <U1"),
        (ONES, numpy.inf, "is inf"),
        (ONES, 1e300, "is 1e.300"),
        (ONES, 1.5, "is 1.5"),
        (ONES, -3, "is -3"),
        (ONES, 0, "mom2.count should be the number of tokens and is 0"),
        (ONES, numpy.nan, "mom2.count should be the number of tokens and is nan"),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path, total, count, why):
    path = write(tmp_path / "f.npz", total, count)
    with pytest.raises(RetentionBenchError, match=f"f.npz.*{why}"):
        read_rome_npz({0: path})


def test_a_singular_covariance_is_one(tmp_path):
    found = read_rome_npz({4: write(tmp_path / "f.npz", ONES * 6, 3)})
    assert (found.tokens, found.mom2[4].tolist()) == (3, [[2.0] * 3] * 3)


def test_files_of_another_form_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No .npz files"):
        read_rome_npz({})
    path = tmp_path / "f.npz"
    with pytest.raises(RetentionBenchError, match="There is no file with a layer's covariance"):
        read_rome_npz({0: path})
    numpy.savez(path, **{"mean.mean": ONES, "mom2.count": 3})
    with pytest.raises(RetentionBenchError, match="lacks mom2.mom2; it has mean.mean, mom2.count"):
        read_rome_npz({0: path})
    numpy.savez(path, **{"mom2.mom2": numpy.array([{"a": 1}], dtype=object), "mom2.count": 3})
    with pytest.raises(RetentionBenchError, match="mom2.mom2 should be a square matrix .* the dtype object"):
        read_rome_npz({0: path})  # a pickle, which is not loaded
    path.write_bytes(write(tmp_path / "g.npz", ONES, 3).read_bytes()[:-40])
    with pytest.raises(RetentionBenchError, match="is no .npz file, or is cut off"):
        read_rome_npz({0: path})
    with path.open("wb") as file:
        numpy.save(file, ONES)
    with pytest.raises(RetentionBenchError, match="is no .npz file"):
        read_rome_npz({0: path})


def test_files_over_different_texts_are_refused(tmp_path):
    files = {layer: write(tmp_path / f"{layer}.npz", ONES, 3 + layer) for layer in (0, 1)}
    with pytest.raises(UsageError, match=r"different numbers of tokens, by layer \{0: 3, 1: 4\}"):
        read_rome_npz(files)


COUNT = io.BytesIO()
numpy.save(COUNT, numpy.array(3))


def member(header, data=b"", version=(1, 0), length=None):
    """An array's file by hand, of which the header may say anything."""
    text = header.encode()
    size = (len(text) if length is None else length).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + text + data


def by_hand(path, total, count=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("mom2.mom2.npy", total)
        archive.writestr("mom2.count.npy", COUNT.getvalue() if count is None else count)
    return path


def described(shape, descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


DAMAGED = [
    (member(described("(1000000, 1000000)"), bytes(64)), "asks for 4000000000092 bytes|no .npz"),
    (member(described("(1000000000, 1000000000)", "'<f8'"), bytes(64)), "header of mom2.mom2 asks for"),
    (member(described("(3, 3)"), bytes(35)), "asks for"),
    (member(described("(3, 3)"), bytes(37)), "asks for"),
    (member(described("(-1, -1)"), bytes(4)), "should be a square matrix"),
    (member(described("(1e3, 1e3)"), bytes(4)), "header of mom2.mom2 is damaged"),
    (member(described("(3, 3)", "'O'"), bytes(36)), "should be a square matrix .* dtype object"),
    (member(described("(3, 3)", "[('a', '<f4')]"), bytes(36)), "should be a square matrix"),
    (member("(" * 9000), "header of mom2.mom2 is damaged"),
    (member("[" * 200 + "]" * 200), "header of mom2.mom2 is damaged"),
    (member("__import__('os').abort()"), "header of mom2.mom2 is damaged"),
    (member(described("(3, 3)"), length=1 << 31, version=(2, 0)), "header of mom2.mom2 is damaged"),
    (member(described("(3, 3)"), bytes(36), version=(2, 0), length=70), "header of mom2.mom2 is damaged"),
    (member(described("(3, 3)"), bytes(36), version=(9, 0)), "version"),
    (b"", "no .npz file"),
    (b"junk", "no .npz file"),
]


@pytest.mark.parametrize(("total", "why"), DAMAGED)
def test_headers_are_looked_at_before_memory_is_taken(tmp_path, total, why):
    path = by_hand(tmp_path / "f.npz", total)
    with pytest.raises(RetentionBenchError, match=f"f.npz.*({why})") as error:
        read_rome_npz({0: path})
    assert len(str(error.value)) < 600
    with pytest.raises(RetentionBenchError, match="f.npz.*mom2.count|f.npz is no .npz file"):
        read_rome_npz({0: by_hand(path, COUNT.getvalue(), total)})


def test_what_would_grow_far_beyond_the_archive_is_refused(tmp_path):
    size = 3000
    bomb = member(described(f"({size}, {size})"), bytes(4 * size * size))
    path = by_hand(tmp_path / "f.npz", bomb, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(RetentionBenchError, match=r"f.npz is no .npz file.*would take 360\d+ bytes, and the archive"):
        read_rome_npz({0: path})


def test_compressed_and_big_endian_files_are_read(tmp_path):
    keys = numpy.random.default_rng(0).standard_normal((500, 400))
    total = keys.T @ keys
    numpy.savez_compressed(tmp_path / "c.npz", **{"mom2.mom2": total, "mom2.count": 500})
    numpy.savez(tmp_path / "b.npz", **{"mom2.mom2": total.astype(">f4").T, "mom2.count": [500.0]})
    for name in ("b", "c"):
        found = read_rome_npz({0: tmp_path / f"{name}.npz"})
        assert found.tokens == 500
        numpy.testing.assert_allclose(found.mom2[0].numpy(), total / 500, rtol=1e-4, atol=1e-4)


def test_nothing_but_a_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in {tmp_path / "pipe": "a pipe", "/dev/zero": "a pipe or a device", tmp_path: "a folder"}.items():
        with pytest.raises(UsageError, match=why):
            read_rome_npz({0: path})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def archives(draw):
    """A file that is damaged in some of its bytes, or one whose arrays are something else."""
    buffer = io.BytesIO()
    if draw(st.booleans()):
        keep = numpy.savez if draw(st.booleans()) else numpy.savez_compressed
        keep(buffer, **{"mom2.mom2": ONES * 6 + numpy.eye(3), "mom2.count": 3})
        contents = bytearray(buffer.getvalue())
        for _ in range(draw(st.integers(1, 4))):
            contents[draw(st.integers(0, len(contents) - 1))] = draw(st.integers(0, 255))
        return bytes(contents[: draw(st.none() | st.integers(0, len(contents)))])
    number = st.integers(-1, 4) | st.sampled_from([10**6, 10**12, 10**30]) | st.just("x")
    shapes = st.lists(number, max_size=3).map(lambda sizes: "(" + "".join(f"{size}, " for size in sizes) + ")")
    kinds = st.sampled_from(["'<f4'", "'>f8'", "'<f2'", "'<i8'", "'O'", "'<U9'", "'<c8'", "'V3'", "'M8[s]'", "7", "''"])
    arrays = st.builds(
        lambda shape, kind, size: member(described(shape, kind), bytes(range(size))),
        shapes | st.sampled_from(["(3, 3)", "(1, 1)", "()", "(1,)"]),
        kinds,
        st.sampled_from([0, 4, 8, 36, 72]),
    )
    by_hand(buffer, draw(arrays), draw(st.none() | arrays))
    return buffer.getvalue()


def check(folder, contents):
    path = folder / "f.npz"
    path.write_bytes(contents)
    try:
        found = read_rome_npz({0: path})
    except RetentionBenchError:
        return
    assert found.tokens >= 1
    assert not_positive_semidefinite(found.mom2[0]) is None


@settings(max_examples=30, deadline=5000)
@given(archives())
def test_fuzz(folder, contents):
    check(folder, contents)


@pytest.mark.slow
@settings(max_examples=300, deadline=5000)
@given(archives())
def test_fuzz_at_length(folder, contents):
    check(folder, contents)


LIMITED = """
import resource, sys
from retention_bench.editors.covariance import read_rome_npz
from retention_bench.errors import RetentionBenchError
for path in sys.argv[1:]:
    try:
        read_rome_npz({0: path})
    except RetentionBenchError:
        print("refused", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_headers_of_terabytes_take_no_memory(tmp_path):
    huge = member(described("(20000, 20000)", "'<f8'"), bytes(8 << 20))
    paths = [by_hand(tmp_path / f"{n}.npz", total) for n, (total, _) in enumerate([*DAMAGED, (huge, "")])]
    bomb = member(described("(14000, 14000)"), bytes(4 * 14000 * 14000))  # 784 MB
    paths.append(by_hand(tmp_path / "bomb.npz", bomb, compression=zipfile.ZIP_DEFLATED))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)),
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(paths), done.stderr
    assert int(lines[-1][1]) - int(lines[0][1]) < 100  # MiB
