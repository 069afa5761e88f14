"""How a covariance is collected: cut off and resumed, in shards, in several passes."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from retention_bench.editors import Covariance, collect_covariance
from retention_bench.editors.covariance import merged as merge
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import projection

TEXTS = [f"Mira plays the violin {'in the old town ' * (i % 4)}with Jon Ek, who reads book {i}." for i in range(250)]


def collect(model, texts=TEXTS, layers=(0, 2), **kwargs):
    return collect_covariance(*model, texts, list(layers), **{"max_length": 24, "batch_tokens": 300} | kwargs)


@pytest.fixture(scope="module")
def whole(llama):
    return collect(llama)


class CutError(Exception):
    pass


def cut_after(texts):
    """A progress callback that cuts the run off."""

    def progress(stage, done, total, figures=None):
        if done > texts:
            raise CutError

    return progress


def same(first, second):
    return first.tokens == second.tokens and all(
        torch.equal(second.mom2[layer], moment) for layer, moment in first.mom2.items()
    )


@pytest.mark.parametrize("after", [0, 120, 240])
@pytest.mark.parametrize("memory", [None, 64 * 64 * 8])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(llama, whole, tmp_path, untouched, after, memory):
    path = tmp_path / "checkpoint"
    arguments = {"checkpoint": path, "checkpoint_every": 0, "memory": memory}
    with untouched(llama[0]), pytest.raises(CutError):
        collect(llama, progress=cut_after(after), **arguments)
    assert path.exists() == (after > 0)
    asked = []
    resumed = collect(llama, progress=lambda stage, done, total, figures=None: asked.append(done), **arguments)
    assert asked[0] > (after // 100) * 100  # what was done is not done again
    assert same(whole, resumed)
    assert resumed.measured == whole.measured


def test_a_run_cut_off_in_its_second_pass_goes_on_there(llama, whole, tmp_path):
    arguments = {"checkpoint": tmp_path / "c", "checkpoint_every": 0, "memory": 64 * 64 * 8}

    def cut(stage, done, total, figures=None):
        if "pass 2 of 2" in stage and done > 120:
            raise CutError

    with pytest.raises(CutError):
        collect(llama, progress=cut, **arguments)
    stages = []
    resumed = collect(llama, progress=lambda stage, *_: stages.append(stage), **arguments)
    assert set(stages) == {"covariance, pass 2 of 2"}
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_length": 20}, "its max_length is 24, this one's 20"),
        ({"layers": [0]}, r"its layers is \[0, 2\], this one's \[0\]"),
        ({"shard": (0, 2)}, "its shard is None"),
        ({"texts": ["another", *TEXTS[1:]]}, "its texts are others"),
        ({"texts": TEXTS[:60]}, "its texts are others|it had 100 texts already, and this one has 60"),
        ({"texts": TEXTS[:30]}, "it had 100 texts already, and this one has 30"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(llama, tmp_path, change, why):
    arguments = {"checkpoint": tmp_path / "c", "checkpoint_every": 0}
    with pytest.raises(CutError):
        collect(llama, progress=cut_after(110), **arguments)
    with pytest.raises(RetentionBenchError, match=f"of another run: ({why}).*Delete it"):
        collect(llama, **arguments | change)


def test_a_checkpoint_of_another_model_is_refused(llama, tmp_path):
    model, _ = llama
    arguments = {"checkpoint": tmp_path / "c", "checkpoint_every": 0}
    with pytest.raises(CutError):
        collect(llama, progress=cut_after(110), **arguments)
    weight = projection(model, 0).weight.data
    saved = weight.clone()
    try:
        weight.add_(0.01)
        with pytest.raises(RetentionBenchError, match="other weights"):
            collect(llama, **arguments)
    finally:
        weight.copy_(saved)


def test_checkpoints_keep_to_their_interval(llama, tmp_path):
    collect(llama, checkpoint=tmp_path / "c", checkpoint_every=3600)
    assert not (tmp_path / "c").exists()


def test_texts_may_come_as_a_stream(llama, whole):
    seen = []
    streamed = collect(llama, iter(TEXTS), progress=lambda *args: seen.append(args[1:3]))
    assert same(whole, streamed)
    assert streamed.measured.texts == 250
    assert all(done <= total for done, total in seen)
    seen.clear()
    collect(llama, iter(TEXTS), total=250, progress=lambda *args: seen.append(args[1:3]))
    assert seen[0][1] == seen[-1][0] == 250


def test_passes_that_the_texts_cannot_be_read_for_are_refused(llama):
    with pytest.raises(UsageError, match="take 2 passes over the texts, and these can be read only once"):
        collect(llama, iter(TEXTS), memory=64 * 64 * 8)
    with pytest.raises(UsageError, match="sums of layer 0 take 32768 bytes, and memory is 100"):
        collect(llama, memory=100)
    assert same(collect(llama, memory=64 * 64 * 4, dtype=torch.float32), collect(llama, dtype=torch.float32))


def test_texts_that_change_between_passes_are_refused(llama):
    class Fickle:
        def __init__(self):
            self.times = itertools.count()

        def __iter__(self):
            return iter(TEXTS[next(self.times) :])

    with pytest.raises(RetentionBenchError, match="not the same in two passes"):
        collect(llama, Fickle(), memory=64 * 64 * 8)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 5), st.integers(5, 40))
def test_the_merged_shards_are_the_whole(llama, count, texts):
    expected = collect(llama, TEXTS[:texts], source="s", settings={"a": 1})
    shards = [
        collect(llama, TEXTS[:texts], source="s", settings={"a": 1}, shard=(index, count)) for index in range(count)
    ]
    merged = merge(shards[::-1])
    assert (merged.tokens, merged.source, merged.measured) == (expected.tokens, "s", expected.measured)
    for layer, moment in expected.mom2.items():
        torch.testing.assert_close(merged.mom2[layer], moment, rtol=1e-5, atol=1e-7)
        assert torch.equal(merged.fingerprint[layer], expected.fingerprint[layer])


def test_what_does_not_belong_together_is_not_merged(llama, whole):
    first, second = (collect(llama, TEXTS[:9], shard=(index, 2)) for index in (0, 1))
    moved = {layer: keys + 0.1 * keys.norm() for layer, keys in whole.fingerprint.items()}
    huge = dataclasses.replace(first.measured, shard=(0, 10**12))  # no list of so many is made
    for parts, why in [
        ([], "No covariance was given"),
        ([first], "shards 0/2 are not the whole.*0/2 to 1/2"),
        ([first, first], "shards 0/2, 0/2 are not the whole"),
        ([dataclasses.replace(first, measured=huge), second], "not the whole"),
        ([whole, whole], "given twice"),
        ([whole, dataclasses.replace(whole)], "given twice"),
        ([first, second, whole], "not the whole"),
        ([whole, collect(llama, layers=[0])], "different layers or sizes"),
        ([whole, collect(llama, max_length=20)], "max_length is 24 in one and 20"),
        ([whole, collect(llama, settings={"device": "cuda"})], "settings is {} in one"),
        ([whole, dataclasses.replace(whole, fingerprint={})], "with and without a fingerprint"),
        (
            [
                whole,
                dataclasses.replace(whole, fingerprint=moved),
            ],
            r"different models.*fingerprints of layer 0 differ by \d+",
        ),
    ]:
        with pytest.raises(UsageError, match=why):
            merge(parts)
    other = collect(llama, TEXTS[:40], source="other texts")
    both = merge([whole, other])
    assert (both.tokens, both.measured.texts) == (whole.tokens + other.tokens, 290)
    assert both.source == "other texts"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"shard": (2, 2)}, r"no shard 2/2. Of N shards"),
        ({"shard": (-1, 2)}, r"no shard -1/2. Of N shards"),
        ({"shard": (1, 10**30)}, r"no shard 1/10+. Of N shards"),
        ({"memory": float("nan")}, "memory is nan"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": 10**30}, "memory is 10+"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"checkpoint_every": float("nan")}, "checkpoint_every is nan"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"checkpoint": Path("/nowhere/at/all")}, "/nowhere/at/all cannot be written: No such file"),
        ({"checkpoint": Path("/dev/null")}, "/dev/null is no file"),
        ({"checkpoint": Path(__file__).parent}, "is no file, and is not written over"),
    ],
)
def test_numbers_and_places_out_of_range_are_refused_before_anything_is_measured(llama, arguments, why):
    with pytest.raises(UsageError, match=why):
        collect(llama, progress=None, **arguments)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    path.write_bytes(contents)


def other(path):
    Covariance({0: torch.eye(2)}, 3).save(path)


def rewrite(change):
    """The checkpoint written anew, without its checksum, with something changed."""

    def damage(path):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["retention_bench"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        del about["sha256"]
        change(about, tensors)
        save_file(tensors, path, {"retention_bench": json.dumps(about)})

    return damage


DAMAGES = {
    "cut off": cut,
    "emptied": empty,
    "a byte flipped": flip,
    "another kind": other,
    "no state": rewrite(lambda about, _: about.pop("state")),
    "no run": rewrite(lambda about, _: about.update(run=[])),
    "state of another kind": rewrite(lambda about, _: about["state"].update(done="many")),
    "negative": rewrite(lambda about, _: about["state"].update(done=-1)),
    "unknown blocks": rewrite(lambda about, _: about["state"].update(summed={"0": 9})),
    "unknown layers": rewrite(lambda about, _: about["state"].update(finished=[7])),
    "a tensor is missing": rewrite(lambda _, tensors: tensors.pop("sum.2.0")),
    "no fingerprint": rewrite(lambda _, tensors: tensors.pop("fingerprint.0")),
    "another shape": rewrite(lambda _, tensors: tensors.update({"sum.2.0": torch.ones(3, dtype=torch.float64)})),
    "another dtype": rewrite(lambda _, tensors: tensors.update({"sum.2.0": tensors["sum.2.0"].float()})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_begins_anew(llama, whole, tmp_path, damage, caplog):
    arguments = {"checkpoint": tmp_path / "c", "checkpoint_every": 0}
    with pytest.raises(CutError):
        collect(llama, progress=cut_after(110), **arguments)
    damage(tmp_path / "c")
    found = collect(llama, **arguments)
    assert re.search("set aside as .*c.damaged-1, and the covariance is collected from", caplog.text)
    assert same(whole, found)
    assert (tmp_path / "c.damaged-1").is_file()


@pytest.mark.parametrize("layers", [[2], [1]])
def test_matrices_of_wide_keys_are_whole_and_symmetric(make_tokenizer, make_model, layers):
    """Several blocks, the last one narrower: sizes that no block divides."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer("gpt2", TEXTS, vocab_size=300)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=3, n_head=2, n_inner=300))
    found = collect_covariance(model, tokenizer, TEXTS[:20], layers, max_length=32).mom2[layers[0]]
    rows = []
    projection(model, layers[0]).register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    with torch.no_grad():
        for text in TEXTS[:20]:
            model.eval()(torch.tensor([tokenizer.encode(text)[:32]]))
    keys = torch.cat(rows).double()
    torch.testing.assert_close(found, (keys.T @ keys / len(keys)).float(), rtol=1e-4, atol=1e-8)
    assert torch.equal(found, found.T)


def test_keys_that_are_not_finite_end_the_run_early(llama):
    model, tokenizer = llama
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight.data
    saved = weight.clone()
    seen = []
    try:
        weight[3, 3] = float("inf")
        with pytest.raises(RetentionBenchError, match="keys of layer 0 are not all finite, in the first 100"):
            collect_covariance(model, tokenizer, TEXTS, [0], max_length=24, progress=lambda *args: seen.append(args[1]))
    finally:
        weight.copy_(saved)
    assert max(seen) == 100
