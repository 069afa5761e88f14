"""Covariance files of the reference editors' own code."""

import numpy
import pytest
import torch

from retention_bench.editors import KeyStatistics
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
def files(tmp_path_factory, gpt2_statistics):
    """The golden model's statistics, layers 0 to 2, as the references would have kept them."""
    folder = tmp_path_factory.mktemp("npz")
    return {
        layer: write(folder / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_1400.npz", moment.numpy() * 17604, 17604)
        for layer, moment in gpt2_statistics.moments.items()
    }


def test_files_of_the_references_are_read_and_get_a_probe(files, gpt2, gpt2_statistics, untouched, tmp_path, distance):
    model, tokenizer = gpt2
    with untouched(model):
        found = KeyStatistics.from_npz(files, model=model, tokenizer=tokenizer, source="ROME's files")
    assert (found.tokens, found.source) == (17604, "ROME's files")
    for layer, moment in gpt2_statistics.moments.items():
        assert distance(found.moments[layer], moment) < 1e-6
        assert torch.equal(found.probe[layer], gpt2_statistics.probe[layer])
    found.save(tmp_path / "s.safetensors")
    KeyStatistics.load(tmp_path / "s.safetensors").check(model, [0, 1, 2])


def test_without_a_model_there_is_nothing_to_compare_with(files):
    found = KeyStatistics.from_npz(files)
    assert (list(found.moments), found.probe, found.measured.modules) == ([0, 1, 2], {}, {})


def test_text_nearer_to_their_corpus_may_be_given(files, gpt2, golden):
    model, tokenizer = gpt2
    KeyStatistics.from_npz(files, model=model, tokenizer=tokenizer, texts=golden.texts[:30])
    with pytest.raises(UsageError, match="holds no token"):
        KeyStatistics.from_npz(files, model=model, tokenizer=tokenizer, texts=[""])


def test_files_of_another_model_or_layer_are_refused_with_figures(files, gpt2, llama):
    model, tokenizer = gpt2
    torch.manual_seed(1)
    other = type(model)(model.config).eval()
    figures = r"layer 0 is not this model's: over \d+ tokens .* correlates with it by -?0\.0\d .*trace is"
    with pytest.raises(UsageError, match=figures):
        KeyStatistics.from_npz({0: files[0]}, model=other, tokenizer=tokenizer)
    with pytest.raises(UsageError, match=figures):
        KeyStatistics.from_npz({0: files[1]}, model=model, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="keys of size 512, the model's have 64"):
        KeyStatistics.from_npz({0: files[0]}, model=llama[0], tokenizer=llama[1])


def test_a_mean_that_stands_where_the_sum_should_is_refused(tmp_path, gpt2, gpt2_statistics):
    model, tokenizer = gpt2
    path = write(tmp_path / "mean.npz", gpt2_statistics.moments[0].numpy(), 17604)
    with pytest.raises(UsageError, match=r"trace is \S+ times as large \(1/20 to 20 is allowed\)"):
        KeyStatistics.from_npz({0: path}, model=model, tokenizer=tokenizer)


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
def test_what_is_no_second_moment_is_refused(tmp_path, total, count, why):
    path = write(tmp_path / "f.npz", total, count)
    with pytest.raises(RetentionBenchError, match=f"f.npz.*{why}"):
        KeyStatistics.from_npz({0: path})


def test_a_singular_moment_is_one(tmp_path):
    found = KeyStatistics.from_npz({4: write(tmp_path / "f.npz", ONES * 6, 3)})
    assert (found.tokens, found.moments[4].tolist()) == (3, [[2.0] * 3] * 3)


def test_files_of_another_form_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No .npz files"):
        KeyStatistics.from_npz({})
    path = tmp_path / "f.npz"
    with pytest.raises(RetentionBenchError, match="There is no file with a layer's covariance"):
        KeyStatistics.from_npz({0: path})
    numpy.savez(path, **{"mean.mean": ONES, "mom2.count": 3})
    with pytest.raises(RetentionBenchError, match="lacks mom2.mom2; it has mean.mean, mom2.count"):
        KeyStatistics.from_npz({0: path})
    numpy.savez(path, **{"mom2.mom2": numpy.array([{"a": 1}], dtype=object), "mom2.count": 3})
    with pytest.raises(RetentionBenchError, match="mom2.mom2 should be a square matrix .* the dtype object"):
        KeyStatistics.from_npz({0: path})  # a pickle, which is not loaded
    path.write_bytes(write(tmp_path / "g.npz", ONES, 3).read_bytes()[:-40])
    with pytest.raises(RetentionBenchError, match="is no .npz file, or is cut off"):
        KeyStatistics.from_npz({0: path})
    with path.open("wb") as file:
        numpy.save(file, ONES)
    with pytest.raises(RetentionBenchError, match="is no .npz file"):
        KeyStatistics.from_npz({0: path})


def test_files_over_different_texts_are_refused(tmp_path):
    files = {layer: write(tmp_path / f"{layer}.npz", ONES, 3 + layer) for layer in (0, 1)}
    with pytest.raises(UsageError, match=r"different numbers of tokens, by layer \{0: 3, 1: 4\}"):
        KeyStatistics.from_npz(files)
