import copy
import dataclasses

import pytest
import torch

from retention_bench.editors import MEMIT, Covariance, EditContext, collect_covariance, make_editor
from retention_bench.editors.locate.value import optimise_values
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen

QUICK = MEMIT(layers=(0, 2), mom2_update_weight=50.0, v_num_grad_steps=4)
TEMPLATES = ("Then the old man came. {}", "Because. {}")
RUNS = ["ref_batch5", "paper_batch5", "early_stop_batch5", "single_layer_batch3", "lambda_high_batch5"]


def dense(entry):
    return entry.left @ entry.right


@pytest.fixture(scope="module")
def context(gpt2_covariance, golden):
    return EditContext(covariance=gpt2_covariance, templates=golden.templates)


@pytest.fixture(scope="module")
def llama_context(llama):
    # More tokens than a key has dimensions, or the covariance would be singular.
    texts = ["Mira plays the violin in town.", "The book is by Jon Ek.", "The Old Mill", "In town he reads."]
    texts += [f"{a} {b} {c}" for a in ("he", "Mira") for b in ("plays", "reads") for c in "abcdefghijkl"]
    return EditContext(covariance=collect_covariance(*llama, texts, [0, 2], max_length=64), templates=TEMPLATES)


@pytest.mark.parametrize("run", RUNS)
def test_runs_are_the_references(gpt2, golden, context, distance, probabilities, untouched, run):
    arrays, expected = golden.arrays("memit"), golden.expected["memit"][run]
    editor = make_editor("memit", expected["settings"])
    requests = golden.requests[: expected["requests"]]
    with untouched(gpt2[0]):
        delta = editor.edit(*gpt2, requests, context)
    assert list(delta.entries) == [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in editor.layers]
    for layer, entry in zip(editor.layers, delta.entries.values(), strict=True):
        key = f"{run}.layer{layer}.delta_w"
        assert distance(dense(entry)[:, :4], arrays[f"{key}.columns"]) < 1e-3
        assert dense(entry).norm().item() == pytest.approx(arrays[f"{key}.norm"].item(), rel=1e-3)
    with delta.applied(gpt2[0]):
        assert probabilities(*gpt2, requests) == pytest.approx(expected["probabilities"], abs=1e-3)


def test_a_llama_is_edited_as_by_plain_code(
    llama, llama_requests, llama_context, distance, untouched, plain_key, plain_output
):
    """The formulas of the paper with their d_mlp x d_mlp solve, keys from whole forward passes of single rows."""
    model, tokenizer = llama
    requests = [dataclasses.replace(llama_requests[0], paraphrases=("The book is by {} and",)), *llama_requests[1:]]
    with untouched(model):
        delta = QUICK.edit(model, tokenizer, requests, llama_context)
    plain = copy.deepcopy(model)
    with frozen(plain):
        values = optimise_values(
            plain, tokenizer, requests, TEMPLATES, 2,
            site="block", lr=0.5, steps=4, weight_decay=0.5, clamp_norm_factor=0.75, kl_factor=0.0625,
        )  # fmt: skip
    for done, layer in enumerate((0, 2)):
        K = torch.stack([plain_key(plain, tokenizer, r, TEMPLATES, layer, bare_weight=0.5) for r in requests], 1)
        outputs = torch.stack([plain_output(plain, tokenizer, request, 2) for request in requests])
        R = ((values.double() - outputs) / (2 - done)).T
        C = llama_context.covariance.mom2[layer].double()
        change = R @ K.T @ torch.linalg.inv(50.0 * C + K @ K.T)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert distance(dense(delta.entries[name]), change.float()) < 1e-3
        with torch.no_grad():
            plain.get_parameter(name).add_(change.float())


def test_more_weight_on_text_moves_less(gpt2, golden, context):
    light, heavy = (
        MEMIT(layers=(1,), mom2_update_weight=weight, v_num_grad_steps=3).edit(*gpt2, golden.requests, context)
        for weight in (1.0, 1e4)
    )
    assert sum(heavy.norms().values()) < 0.5 * sum(light.norms().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_can_be_edited(gpt2, golden, context, probabilities, dtype):
    half = copy.deepcopy(gpt2[0]).to(dtype)
    bits = copy.deepcopy(half.state_dict())
    editor = make_editor("memit", golden.expected["memit"]["ref_batch5"]["settings"])
    delta = editor.edit(half, gpt2[1], golden.requests, context)
    assert all(entry.left.dtype == entry.right.dtype == torch.float32 for entry in delta.entries.values())
    with delta.applied(half):
        expected = golden.expected["memit"]["ref_batch5"]["probabilities"]
        assert probabilities(half, gpt2[1], golden.requests) == pytest.approx(expected, abs=0.05)
    assert all(torch.equal(bits[name], weight) for name, weight in half.state_dict().items())


def test_a_singular_covariance_is_refused(gpt2, golden, context):
    keys = torch.randn(100, 512, generator=torch.Generator().manual_seed(0))
    poor = Covariance({1: keys.T @ keys / 100}, 100)
    with pytest.raises(RetentionBenchError, match="covariance of layer 1 is singular.*more text.*512 dimensions"):
        MEMIT(layers=(1,), v_num_grad_steps=1).edit(
            *gpt2, golden.requests, dataclasses.replace(context, covariance=poor)
        )


def test_what_cannot_be_edited_is_refused(gpt2, golden, context, llama, llama_requests):
    with pytest.raises(UsageError, match="list of requests is empty"):
        QUICK.edit(*gpt2, [], context)
    with pytest.raises(UsageError, match=r"MEMIT needs the covariance of layers \[0, 2\]"):
        QUICK.edit(*gpt2, golden.requests, EditContext())
    with pytest.raises(UsageError, match="belongs to another model"):
        QUICK.edit(*llama, llama_requests, context)
    with pytest.raises(UsageError, match="no layer 6"):
        MEMIT(layers=(2, 6)).edit(*gpt2, golden.requests, context)
