import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from retention_bench.errors import RetentionBenchError
from retention_bench.models import LowRank, WeightDelta, projection_name


def random_delta(model, seed=0, scale=1.0):
    """A low-rank entry for layer 1's projection and a dense one for layer 2's."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (f"{projection_name(model, layer)}.weight" for layer in (1, 2))
    rows, columns = model.get_parameter(first).shape
    left, right = torch.randn(rows, 3, generator=generator), torch.randn(3, columns, generator=generator)
    return WeightDelta(
        {first: LowRank(scale * left, right), second: scale * torch.randn(rows, columns, generator=generator)}
    )


def dense(entry):
    return entry.left @ entry.right if isinstance(entry, LowRank) else entry


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


def test_apply_adds_to_the_named_parameters_only(model):
    delta, before = random_delta(model), bits(model)
    delta.apply_(model)
    for name, parameter in model.named_parameters():
        if name in delta.entries:
            torch.testing.assert_close(parameter.data, before[name] + dense(delta.entries[name]))
            assert not torch.equal(parameter.data, before[name])
        else:
            assert torch.equal(parameter.data, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applied_gives_the_original_bits_back(model, dtype):
    model.to(dtype)
    delta, before = random_delta(model, scale=100.0), bits(model)

    def use():
        with delta.applied(model):
            assert not equal(bits(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert equal(bits(model), before)


def test_half_precision_sums_are_rounded_once(model):
    model.to(torch.bfloat16)
    name = f"{projection_name(model, 0)}.weight"
    model.get_parameter(name).data.fill_(1.0)
    # bfloat16 has steps of 2^-7 above 1: one of these alone is lost, two together are exactly one step.
    small = WeightDelta({name: torch.full(model.get_parameter(name).shape, 2.0**-8)})
    with small.applied(model):
        assert (model.get_parameter(name) == 1).all()
    with (small + small).applied(model):
        assert (model.get_parameter(name) == 1 + 2**-7).all()
    # A little more than half a step rounds up; rounded to bfloat16 before the sum, it would be exactly half, and lost.
    WeightDelta({name: torch.full(model.get_parameter(name).shape, 2.0**-8 + 2.0**-17)}).apply_(model)
    assert (model.get_parameter(name) == 1 + 2**-7).all()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e25), (torch.float16, 1e3)])
def test_sums_that_are_not_finite_are_refused(model, dtype, size):
    model.to(dtype)
    name, before = f"{projection_name(model, 0)}.weight", bits(model)
    rows, columns = before[name].shape
    delta = WeightDelta({name: LowRank(torch.full((rows, 1), size), torch.full((1, columns), size))})
    wrong = f"{name} makes weights that are not finite in {str(dtype).removeprefix('torch.')}"
    with pytest.raises(RetentionBenchError, match=wrong), delta.applied(model):
        pass
    with pytest.raises(RetentionBenchError, match=wrong):
        delta.apply_(model)
    with pytest.raises(RetentionBenchError, match=wrong):
        list(delta.apply_to(iter(before.items())))
    assert equal(bits(model), before)


def test_a_stream_of_weights_gets_what_apply_does(model):
    delta = random_delta(model)
    weights = list(bits(model).items())
    streamed = dict(delta.apply_to(iter(weights)))
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in weights)  # the stream's own are kept
    delta.apply_(model)
    assert list(streamed) == [name for name, _ in weights]
    assert equal(streamed, bits(model))


def test_a_stream_without_a_changed_weight_is_refused(model):
    delta = random_delta(model)
    absent = next(iter(delta.entries))
    with pytest.raises(RetentionBenchError, match=f"without {absent}"):
        list(delta.apply_to((n, t) for n, t in bits(model).items() if n != absent))


def test_saving_and_loading_keeps_every_bit(model, tmp_path):
    delta = WeightDelta(random_delta(model).entries, base="tiny")
    delta.save(tmp_path / "a.safetensors")
    loaded = WeightDelta.load(tmp_path / "a.safetensors")
    assert loaded.base == "tiny"
    assert loaded.entries.keys() == delta.entries.keys()
    for name, entry in delta.entries.items():
        assert type(loaded.entries[name]) is type(entry)
        assert torch.equal(dense(loaded.entries[name]), dense(entry))
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(0, 2**31))
def test_sums_and_norms_are_those_of_the_dense_matrices(rows, columns, first_rank, second_rank, seed):
    generator = torch.Generator().manual_seed(seed)

    def entry(rank):  # rank 0 stands for a dense one
        if rank == 0:
            return torch.randn(rows, columns, generator=generator)
        return LowRank(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))

    first, second = WeightDelta({"w": entry(first_rank)}), WeightDelta({"w": entry(second_rank), "v": torch.ones(2)})
    both = first + second
    expected = dense(first.entries["w"]) + dense(second.entries["w"])
    torch.testing.assert_close(dense(both.entries["w"]), expected, rtol=1e-4, atol=1e-5)
    assert both.norms()["w"] == pytest.approx(expected.norm().item(), rel=1e-4, abs=1e-4)
    assert both.norms()["v"] == pytest.approx(2**0.5)


def test_deltas_of_different_models_do_not_add_up():
    with pytest.raises(RetentionBenchError, match="different models, 'a' and 'b'"):
        WeightDelta({}, base="a") + WeightDelta({}, base="b")
    assert (WeightDelta({}, base="a") + WeightDelta({})).base == "a"


def test_a_delta_for_another_model_is_refused_and_changes_nothing(model):
    before = bits(model)
    good = random_delta(model)
    first = next(iter(good.entries))
    misnamed = WeightDelta({first: good.entries[first], first.replace("weight", "weigh"): torch.zeros(2)})
    misshapen = WeightDelta({first: good.entries[first], first.replace(".1.", ".2."): torch.zeros(2, 2)})
    with pytest.raises(RetentionBenchError, match="Did you mean"):
        misnamed.apply_(model)
    with pytest.raises(RetentionBenchError, match=r"shape \[2, 2\], the weight"), misshapen.applied(model):
        pass
    assert equal(bits(model), before)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "the delta of w has numbers that are not finite"),
        (LowRank(torch.ones(2, 1), torch.full((1, 2), float("inf"))), "not finite"),
        (torch.full((2,), 1e300, dtype=torch.float64), "not finite"),  # in float32
        (torch.ones(2, dtype=torch.complex64), "dtype complex64"),
        (torch.ones(2, dtype=torch.int64), "dtype int64"),
        (torch.ones(2, dtype=torch.bool), "dtype bool"),
        (torch.ones(2).to(torch.float8_e4m3fn), "dtype float8_e4m3fn"),
        (torch.ones(0, 3), r"shape \[0, 3\]: it is empty"),
        (LowRank(torch.ones(2, 0), torch.ones(0, 2)), r"shape \[2, 0\]: it is empty"),
        (LowRank(torch.ones(2), torch.ones(2, 2)), r"do not fit: \[2\] times \[2, 2\]"),
        (LowRank(torch.ones(2, 1), torch.ones(1, 2, dtype=torch.int8)), "dtype int8"),
        (LowRank(torch.ones(2, 3), torch.ones(2, 2)), r"do not fit: \[2, 3\] times \[2, 2\]"),
    ],
)
def test_broken_entries_are_refused(entry, message):
    with pytest.raises(RetentionBenchError, match=f"(?i){message}"):
        WeightDelta({"w": entry})


def test_a_low_rank_pair_of_a_file_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    for left, right in ((torch.ones(4, 2), torch.ones(3, 4)), (torch.ones(4), torch.ones(4, 2))):
        tensors = {"w:left": left, "w:right": right}
        save_file(tensors, path, {"retention_bench": '{"kind": "weight delta", "version": 1, "base": null}'})
        with pytest.raises(RetentionBenchError, match="d.safetensors: The low-rank factors of w do not fit"):
            WeightDelta.load(path)
    save_file({"w:right": torch.ones(2, 2)}, path, {"retention_bench": '{"kind": "weight delta", "version": 1}'})
    with pytest.raises(RetentionBenchError, match=r"d.safetensors: w has the parts \['right'\]"):
        WeightDelta.load(path)


def test_layers_of_names_that_are_none_are_passed_over(model):
    name = projection_name(model, 1)
    delta = WeightDelta({name: torch.ones(1), name.replace(".1.", ".x."): torch.ones(1)})
    assert delta.layers(model) == (1,)


def test_files_that_are_no_delta_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(RetentionBenchError, match="no file"):
        WeightDelta.load(path)
    path.write_text("junk")
    with pytest.raises(RetentionBenchError, match="no safetensors file"):
        WeightDelta.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(RetentionBenchError, match="holds something else"):
        WeightDelta.load(path)
    WeightDelta({"w": torch.ones(2)}).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RetentionBenchError, match="cut off"):
        WeightDelta.load(path)
    WeightDelta({"w": torch.full((1,), 1.5)}).save(path)
    nan = torch.full((1,), float("nan")).numpy().tobytes()
    path.write_bytes(path.read_bytes()[:-4] + nan)
    with pytest.raises(RetentionBenchError, match="not finite"):
        WeightDelta.load(path)
