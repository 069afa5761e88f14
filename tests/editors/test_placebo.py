import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.editors import EditContext, EditRequest, make_editor, parse_editor
from retention_bench.editors.placebo import LARGEST_FACTOR, TOLERANCE, _matched, _probability
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import LowRank, WeightDelta

LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def other(llama):
    """An edit with a low-rank and a dense entry."""
    generator = torch.Generator().manual_seed(3)
    entries = {}
    for layer in (0, 1):
        rows, columns = llama[0].get_parameter(f"model.layers.{layer}.mlp.down_proj.weight").shape
        left, right = (torch.randn(size, generator=generator) for size in ((rows, 2), (2, columns)))
        entries[f"model.layers.{layer}.mlp.down_proj.weight"] = LowRank(left, right) if layer else left @ right
    return WeightDelta(entries)


def dense(entry):
    return entry.left @ entry.right if isinstance(entry, LowRank) else entry


def made(llama, requests, editor, other, seed=0):
    context = EditContext(delta=other, generator=torch.Generator().manual_seed(seed))
    return editor.edit(*llama, requests, context)


def test_none_changes_nothing(llama, llama_requests):
    assert made(llama, llama_requests, make_editor("none", {}), None).entries == {}


def test_noise_has_the_norm_and_the_rank_of_the_edit(llama, llama_requests, other):
    noise = made(llama, llama_requests, make_editor("random", {"of": "x"}), other)
    assert noise.norms() == pytest.approx(other.norms(), rel=1e-6)
    for name, entry in other.entries.items():
        drawn = noise.entries[name]
        assert dense(drawn).norm().item() == pytest.approx(dense(entry).norm().item(), rel=1e-5)
        assert isinstance(drawn, LowRank) == isinstance(entry, LowRank)
        cosine = (dense(drawn) * dense(entry)).sum() / (dense(drawn).norm() * dense(entry).norm())
        assert abs(cosine) < 0.5
    assert torch.linalg.matrix_rank(dense(noise.entries[LAYER])) == 2


def test_noise_follows_the_seed_and_the_facts(llama, llama_requests, other):
    editor = make_editor("random", {"of": "x"})

    def drawn(requests, seed):
        return dense(made(llama, requests, editor, other, seed).entries[LAYER])

    first = drawn(llama_requests, 0)
    assert torch.equal(first, drawn(llama_requests, 0))
    assert not torch.equal(first, drawn(llama_requests, 1))
    assert not torch.equal(first, drawn(llama_requests[:1], 0))  # the models of one cell differ


def test_noise_as_large_as_nothing_is_nothing(llama, llama_requests, other):
    noise = made(llama, llama_requests, make_editor("random", {"of": "x"}), other.scaled(0))
    assert set(noise.norms().values()) == {0.0}


def test_the_whole_edit_is_itself_to_the_byte(llama, llama_requests, other, tmp_path):
    other.save(tmp_path / "a")
    made(llama, llama_requests, make_editor("scaled", {"of": "x", "factor": 1}), other).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 8))
def test_a_scaled_delta_is_every_summand_times_the_factor(factor):
    delta = WeightDelta({"a": torch.ones(2, 3), "b": LowRank(torch.ones(2, 1), torch.full((1, 3), 2.0))}, "base")
    scaled = delta.scaled(factor)
    assert scaled.base == "base"
    assert scaled.norms() == pytest.approx({name: factor * norm for name, norm in delta.norms().items()}, rel=1e-6)
    assert isinstance(scaled.entries["b"], LowRank)


@pytest.mark.parametrize(("name", "given"), [("random", {}), ("scaled", {"factor": 2})])
def test_without_the_other_edit_there_is_nothing_to_make_it_of(llama, llama_requests, name, given):
    with pytest.raises(UsageError, match=f"{name} makes its edit of another editor's"):
        made(llama, llama_requests, make_editor(name, {"of": "x", **given}), None)


# The matched edit


def ft(llama, requests, **given):
    return make_editor("ft", {"layer": 1, "lr": 1e-2, "num_steps": 25, **given}).edit(*llama, requests, EditContext())


def test_a_matched_edit_is_as_sure_as_the_model_was(gpt2, untouched):
    # The model was trained on this city.
    requests = [EditRequest("f", "{} lives in the city of", "Ulawex Corvel", "Velith", target_true="Tirova")]
    whole = ft(gpt2, requests, lr=5e-4, num_steps=100)
    with untouched(gpt2[0]):
        matched = made(gpt2, requests, make_editor("scaled", {"of": "ft", "factor": "matched"}), whole)
    wanted = _probability(*gpt2, [(request, request.target_true) for request in requests])
    asked = [(request, request.target_new) for request in requests]
    with whole.applied(gpt2[0]):
        assert _probability(*gpt2, asked) > wanted + 2 * TOLERANCE
    with matched.applied(gpt2[0]):
        assert _probability(*gpt2, asked) == pytest.approx(wanted, abs=TOLERANCE)
    factors = [matched.norms()[name] / norm for name, norm in whole.norms().items()]
    assert 0 < factors[0] < 1
    assert factors == pytest.approx([factors[0]] * len(factors))


def test_a_fact_counts_once_however_many_requests_it_makes(llama, llama_requests):
    requests = [dataclasses.replace(request, target_true="violin") for request in llama_requests]
    whole = ft(llama, requests)
    editor = make_editor("scaled", {"of": "ft", "factor": "matched"})
    more = dataclasses.replace(requests[0], paraphrases=("Here is what {} says about the",)).separate
    assert len(more) == 2
    separate = made(llama, [*more, *requests[1:]], editor, whole)
    assert separate.norms() == made(llama, requests, editor, whole).norms()


def test_the_probability_is_that_of_the_whole_object(llama, llama_requests):
    model, tokenizer = llama
    total = 0.0
    for request in llama_requests:
        prompt = tokenizer.encode(request.prompt.replace("{}", request.subject))
        probability = 1.0
        for token in tokenizer.encode(f" {request.target_new}", add_special_tokens=False):
            with torch.no_grad():
                probability *= model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[token].item()
            prompt.append(token)
        total += probability
    asked = [(request, request.target_new) for request in llama_requests]
    assert _probability(model, tokenizer, asked) == pytest.approx(total / len(asked), rel=1e-4)


def test_matching_needs_the_true_objects(llama, llama_requests, other):
    with pytest.raises(UsageError, match="Fact 'a': its request has no target_true"):
        made(llama, llama_requests, make_editor("scaled", {"of": "x", "factor": "matched"}), other)


@given(st.floats(0.05, 0.95), st.floats(0.5, 20))
def test_bisection_finds_where_a_rising_curve_crosses(wanted, steepness):
    def curve(factor):
        return 1 - 2.0 ** (-steepness * factor)

    if curve(LARGEST_FACTOR) < wanted - TOLERANCE:
        with pytest.raises(RetentionBenchError, match="scaled:matched:ft: .*too weak"):
            _matched(curve, wanted, "ft")
    else:
        assert curve(_matched(curve, wanted, "ft")) == pytest.approx(wanted, abs=TOLERANCE)


# Names


@pytest.mark.parametrize(
    ("text", "name", "given"),
    [
        ("memit", "memit", {}),
        ("scaled", "scaled", {}),
        ("random:r-rome", "random", {"of": "r-rome"}),
        ("scaled:0.5:alphaedit", "scaled", {"factor": 0.5, "of": "alphaedit"}),
        ("scaled:matched:ft", "scaled", {"factor": "matched", "of": "ft"}),
        ("scaled:2:random:memit", "scaled", {"factor": 2.0, "of": "random:memit"}),
    ],
)
def test_a_placebo_is_named_with_what_it_is_made_of(text, name, given):
    assert parse_editor(text) == (name, given)
    if given:
        assert make_editor(name, given).of == given["of"]


@pytest.mark.parametrize(
    "text", ["random:", "scaled:", "scaled:0.5", "scaled:0.5:", "scaled:half:memit", "scaled:memit"]
)
def test_half_a_name_says_how_it_is_written(text):
    with pytest.raises(UsageError, match="Write "):
        parse_editor(text)


@pytest.mark.parametrize("factor", [-0.5, float("nan"), float("inf"), "double"])
def test_a_factor_is_a_number_from_0_on_or_matched(factor):
    with pytest.raises(UsageError, match="factor"):
        make_editor("scaled", {"of": "memit", "factor": factor})


def test_a_request_keeps_the_true_object_and_separates_its_prompts():
    request = EditRequest("f", "{} is", "Mira", "zither", ("Here {} is", "So {} is"), "violin")
    assert [r.prompt for r in request.separate] == ["{} is", "Here {} is", "So {} is"]
    assert {(r.fact_id, r.subject, r.target_new, r.target_true, r.paraphrases) for r in request.separate} == {
        ("f", "Mira", "zither", "violin", ())
    }


def test_an_edit_is_matched_also_where_more_of_it_would_spoil_the_model():
    def curve(factor):  # 0.7 with the whole edit, at its surest with 1.3 times it, and 0.01 with twice it
        return 0.9 * math.exp(-((factor - 1.3) ** 2) / 0.1 * (0.25 if factor < 1.3 else 1))

    assert curve(2) < 0.01 < 0.7 < curve(1) < 0.85
    assert curve(_matched(curve, 0.85, "ft")) == pytest.approx(0.85, abs=TOLERANCE)
    with pytest.raises(RetentionBenchError, match=r"probability of 0.900 at most, at 1.3 times the edit, .* 0.950"):
        _matched(curve, 0.95, "ft")
