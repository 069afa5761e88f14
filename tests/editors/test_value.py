import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.editors import EditRequest
from retention_bench.editors.locate import value as module
from retention_bench.editors.locate.value import optimise_values
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen

SHIPPED = {"site": "block", "lr": 0.5, "steps": 20, "weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625}
TEMPLATES = ("Then the old man came. {}", "Because. {}")


def optimise(model, requests, templates, layer, **settings):
    with frozen(model[0]):
        return optimise_values(*model, requests, templates, layer, **settings)


def test_values_are_the_references(gpt2, golden, distance):
    expected = golden.arrays("alphaedit")["batch5.b0.zs"]
    values = optimise(gpt2, golden.requests, golden.templates, 2, **SHIPPED)
    for value, wanted in zip(values, expected, strict=True):
        assert distance(value, wanted) < 1e-5


def test_a_fact_that_is_done_leaves_the_batch_as_in_the_reference(gpt2, golden, distance):
    run = golden.expected["early_stop"]
    assert run["forwards"] == [66, 80, 80, 80, 80]  # request 0 stops early, the others use all their passes
    settings = {
        "site": "block",
        "lr": run["hparams"]["v_lr"],
        "steps": run["hparams"]["v_num_grad_steps"],
        "weight_decay": run["hparams"]["v_weight_decay"],
        "clamp_norm_factor": run["hparams"]["clamp_norm_factor"],
        "kl_factor": run["hparams"]["kl_factor"],
    }
    values = optimise(gpt2, golden.requests[:2], golden.templates, 2, **settings)
    for value, wanted in zip(values, golden.arrays("alphaedit")["early_stop.zs"][:2], strict=True):
        assert distance(value, wanted) < 1e-4


# Not the last layer: nothing there reaches the target but for rounding, and Adam blows rounding up.
@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize(("layer", "templates"), [(0, ()), (0, TEMPLATES), (2, TEMPLATES)])
def test_values_are_those_of_a_plain_implementation(
    llama, llama_requests, distance, plain_value, site, layer, templates
):
    settings = SHIPPED | {"site": site, "steps": 12, "lr": 0.1, "clamp_norm_factor": 2.0}
    with frozen(llama[0]):
        expected = [plain_value(*llama, request, templates, layer, **settings) for request in llama_requests]
    values = optimise(llama, llama_requests, templates, layer, **settings)
    for value, wanted in zip(values, expected, strict=True):
        assert distance(value, wanted) < 1e-4


@settings(deadline=None, max_examples=6)
@given(order=st.permutations(range(3)), max_tokens=st.integers(1, 200))
def test_order_and_batches_have_no_part(llama, llama_requests, order, max_tokens):
    quick = SHIPPED | {"steps": 5, "lr": 0.1}
    expected = optimise(llama, llama_requests, TEMPLATES, 1, **quick)
    shuffled = optimise(llama, [llama_requests[i] for i in order], TEMPLATES, 1, **quick, max_tokens=max_tokens)
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-4, atol=1e-4)


def test_a_paraphrase_weighs_like_the_prompt(llama, llama_requests, distance, plain_value):
    """Facts with different numbers of prompts share no batch; each has the mean over its own prompts."""
    settings = SHIPPED | {"steps": 8, "lr": 0.1}
    more = dataclasses.replace(llama_requests[0], paraphrases=("The book is by {} who plays the", "{} is"))
    requests = [more, *llama_requests[1:]]
    with frozen(llama[0]):
        expected = [plain_value(*llama, request, TEMPLATES, 1, **settings) for request in requests]
    values = optimise(llama, requests, TEMPLATES, 1, **settings)
    for value, wanted in zip(values, expected, strict=True):
        assert distance(value, wanted) < 1e-4
    assert distance(values[0], optimise(llama, llama_requests[:1], TEMPLATES, 1, **settings)[0]) > 1e-2


def test_the_padding_side_has_no_part(llama, llama_requests):
    expected = optimise(llama, llama_requests, TEMPLATES, 1, **SHIPPED | {"steps": 4})
    llama[1].padding_side = "left"
    try:
        assert torch.equal(optimise(llama, llama_requests, TEMPLATES, 1, **SHIPPED | {"steps": 4}), expected)
    finally:
        llama[1].padding_side = "right"


def test_the_change_is_kept_short(llama, llama_requests):
    start = optimise(llama, llama_requests, (), 1, **SHIPPED | {"steps": 1})  # one pass: no update
    value = optimise(llama, llama_requests, (), 1, **SHIPPED | {"clamp_norm_factor": 0.3, "weight_decay": 0.0})
    moved = (value - start).norm(dim=1) / start.norm(dim=1)
    assert (moved <= 0.3 + 1e-5).all()
    assert (moved > 0.29).all()  # the limit is what held it


def test_progress_ends_at_the_total(llama, llama_requests):
    seen = []
    optimise(llama, llama_requests, (), 1, **SHIPPED, max_tokens=1, progress=lambda *args: seen.append(args))
    assert seen[-1][:3] == ("value optimisation", 60, 60)
    assert [done for _, done, *_ in seen] == sorted(done for _, done, *_ in seen)
    assert seen[0][3]["loss"] > seen[18][3]["loss"]


def test_a_loss_that_is_not_finite_names_the_fact(llama, llama_requests, untouched):
    model, _ = llama
    weight = model.get_parameter("model.embed_tokens.weight")
    rare = llama[1].encode("zither", add_special_tokens=False)[0]
    odd = EditRequest("odd-one", "{} plays the", "zither", "violin")
    with untouched(model):
        saved = weight.detach().clone()
        weight.data[rare] = float("nan")
        try:
            with pytest.raises(RetentionBenchError, match="Fact 'odd-one': the loss became nan"):
                optimise(llama, [llama_requests[0], odd], (), 1, **SHIPPED)
        finally:
            weight.data.copy_(saved)


def test_a_layer_that_is_not_there_is_refused(llama, llama_requests):
    with pytest.raises(UsageError, match="no layer 4"):
        optimise(llama, llama_requests, (), 4, **SHIPPED)


@pytest.mark.parametrize("every", [3, 5, 100])
def test_how_often_losses_are_looked_at_has_no_part(gpt2, golden, monkeypatch, every):
    """A GPU looks now and then. What has converged between two looks stays where it is."""
    run = golden.expected["early_stop"]["hparams"]
    settings = {
        "site": "block",
        "lr": run["v_lr"],
        "steps": run["v_num_grad_steps"],
        "weight_decay": run["v_weight_decay"],
        "clamp_norm_factor": run["clamp_norm_factor"],
        "kl_factor": run["kl_factor"],
    }
    expected = optimise(gpt2, golden.requests, golden.templates, 2, **settings)
    monkeypatch.setitem(module._LOOK_EVERY, "cpu", every)
    steps = []
    found = optimise(
        gpt2, golden.requests, golden.templates, 2, **settings, progress=lambda *args: steps.append(args[1])
    )
    assert len(steps) <= 2 + settings["steps"] / every
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_not_finite_is_found_at_the_next_look(llama, llama_requests, untouched, monkeypatch):
    monkeypatch.setitem(module._LOOK_EVERY, "cpu", 5)
    model, _ = llama
    weight = model.get_parameter("model.embed_tokens.weight")
    rare = llama[1].encode("zither", add_special_tokens=False)[0]
    with untouched(model):
        saved = weight.detach().clone()
        weight.data[rare] = float("nan")
        try:
            with pytest.raises(RetentionBenchError, match="Fact 'c': the loss became nan"):
                optimise(llama, llama_requests, (), 1, **SHIPPED)
        finally:
            weight.data.copy_(saved)
