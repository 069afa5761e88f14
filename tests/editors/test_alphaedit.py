import copy
import dataclasses

import pytest
import torch

from retention_bench.editors import (
    AlphaEdit,
    EditContext,
    EditRequest,
    collect_covariance,
    edit_sequentially,
    null_space_projector,
)
from retention_bench.editors.locate.keys import SubjectStates
from retention_bench.editors.locate.value import optimise_values
from retention_bench.errors import UsageError
from retention_bench.models import frozen

# The reference runs: layers 0 to 2, ridge 0.1, everything else as shipped.
REFERENCE = AlphaEdit(layers=(0, 1, 2), L2=0.1)
QUICK = AlphaEdit(layers=(0, 2), L2=0.1, v_num_grad_steps=4, nullspace_threshold=0.3)
TEMPLATES = ("Then the old man came. {}", "Because. {}")


def dense(entry):
    return entry.left @ entry.right


@pytest.fixture(scope="module")
def context(gpt2_covariance, golden):
    return EditContext(covariance=gpt2_covariance, templates=golden.templates)


@pytest.fixture(scope="module")
def llama_context(llama):
    texts = ["Mira plays the violin in town.", "The book is by Jon Ek.", "The Old Mill", "In town he reads."] * 3
    return EditContext(covariance=collect_covariance(*llama, texts, [0, 2], max_length=64), templates=TEMPLATES)


@pytest.mark.parametrize("run", ["batch5", "seq2"])
def test_runs_are_the_references(gpt2, golden, context, distance, probabilities, untouched, run):
    arrays, expected = golden.arrays("alphaedit"), golden.expected["alphaedit"][run]
    batches = [golden.pick(ids) for ids in expected["batches"]]
    with untouched(gpt2[0]):
        deltas = edit_sequentially(REFERENCE, *gpt2, batches, context)
    assert len(deltas) == len(batches)
    for requests, delta in zip(batches, deltas, strict=True):  # cache_c adds nothing to the rank
        assert {entry.left.shape[1] for entry in delta.entries.values()} == {len(requests)}
    for index, delta in enumerate(deltas):
        assert list(delta.entries) == [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(3)]
        for layer, entry in enumerate(delta.entries.values()):
            key = f"{run}.b{index}.layer{layer}.delta_w"
            assert distance(dense(entry)[:, :8], arrays[f"{key}.columns"]) < 1e-3
            assert dense(entry).norm().item() == pytest.approx(arrays[f"{key}.norm"].item(), rel=1e-3)
    with sum(deltas[1:], deltas[0]).applied(gpt2[0]):
        assert probabilities(*gpt2, golden.requests) == pytest.approx(expected["probabilities"], abs=1e-3)


def test_cache_c_is_the_references(gpt2, golden, context, distance):
    arrays = golden.arrays("alphaedit")
    first, second = golden.requests[:3], golden.requests[3:]
    delta = REFERENCE.edit(*gpt2, first, context)
    with delta.applied(gpt2[0]):
        cache_c = REFERENCE.update_cache(*gpt2, first, context)
        for layer, keys in cache_c.items():
            assert distance(keys, arrays[f"seq2.b0.layer{layer}.ks_after"]) < 1e-4
        again = REFERENCE.update_cache(*gpt2, second, dataclasses.replace(context, cache_c=cache_c))
    assert {layer: keys.shape for layer, keys in again.items()} == dict.fromkeys(range(3), (5, 512))
    assert all(torch.equal(again[layer][:3], cache_c[layer]) for layer in range(3))


def test_a_model_with_edits_is_told_apart_unless_their_keys_are_in_cache_c(gpt2, golden, context):
    first, second = golden.requests[:3], golden.requests[3:]
    editor = dataclasses.replace(REFERENCE, v_num_grad_steps=3)
    with editor.edit(*gpt2, first, context).applied(gpt2[0]):
        with pytest.raises(UsageError, match="measured on another model"):
            editor.edit(*gpt2, second, context)
        cache_c = editor.update_cache(*gpt2, first, context)
        editor.edit(*gpt2, second, dataclasses.replace(context, cache_c=cache_c))


def test_edits_in_cache_c_are_preserved(gpt2, golden, context):
    first, second = golden.requests[:3], golden.requests[3:]
    editor = dataclasses.replace(REFERENCE, v_num_grad_steps=3)
    forgetful = editor.edit(*gpt2, second, context)
    keys = {0: SubjectStates(*gpt2, first, golden.templates).mean_keys(0)}
    mindful = editor.edit(*gpt2, second, dataclasses.replace(context, cache_c=keys))
    name = "transformer.h.0.mlp.c_proj.weight"
    moved = [(keys[0] @ dense(delta.entries[name])).norm() for delta in (forgetful, mindful)]
    assert moved[1] < 0.5 * moved[0]


def test_a_llama_is_edited_as_by_plain_code(
    llama, llama_requests, llama_context, distance, untouched, plain_key, plain_output
):
    """The formulas of the paper with their d_mlp x d_mlp solve, keys from whole forward passes of single rows."""
    model, tokenizer = llama
    with untouched(model):
        delta = QUICK.edit(model, tokenizer, llama_requests, llama_context)

    plain = copy.deepcopy(model)
    with frozen(plain):
        values = optimise_values(
            plain, tokenizer, llama_requests, TEMPLATES, 2,
            site="block", lr=0.5, steps=4, weight_decay=0.5, clamp_norm_factor=0.75, kl_factor=0.0625,
        )  # fmt: skip
    for done, layer in enumerate((0, 2)):
        K = torch.stack([plain_key(plain, tokenizer, r, TEMPLATES, layer, bare_weight=0.5) for r in llama_requests], 1)
        outputs = torch.stack([plain_output(plain, tokenizer, request, 2) for request in llama_requests])
        R = ((values.double() - outputs) / (2 - done)).T
        P = null_space_projector(llama_context.covariance.mom2[layer], 0.3)
        X = torch.linalg.solve(P @ K @ K.T + 0.1 * torch.eye(len(P), dtype=torch.float64), P @ K @ R.T)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert distance(dense(delta.entries[name]), X.T.float()) < 1e-3
        with torch.no_grad():
            plain.get_parameter(name).add_(X.T.float())


def test_memory_is_that_of_the_whole_solve(gpt2, golden, context, distance):
    """One layer, with cache_c: (P (K K' + M M') + L2 I) X = P K R'."""
    editor = AlphaEdit(layers=(1,), L2=0.1, v_num_grad_steps=3)
    first, second = golden.requests[:3], golden.requests[3:]
    M = {1: SubjectStates(*gpt2, first, golden.templates).mean_keys(1)}
    delta = editor.edit(*gpt2, second, dataclasses.replace(context, cache_c=M))
    with frozen(gpt2[0]):
        values = optimise_values(
            *gpt2, second, golden.templates, 1,
            site="block", lr=0.5, steps=3, weight_decay=0.5, clamp_norm_factor=0.75, kl_factor=0.0625,
        )  # fmt: skip
    states = SubjectStates(*gpt2, second, golden.templates)
    K = states.mean_keys(1).double().T
    R = (values - states.outputs(1)).double().T
    P = null_space_projector(context.covariance.mom2[1], 2e-2)
    C = M[1].double().T @ M[1].double()
    X = torch.linalg.solve(P @ (K @ K.T + C) + 0.1 * torch.eye(512, dtype=torch.float64), P @ K @ R.T)
    assert distance(dense(delta.entries["transformer.h.1.mlp.c_proj.weight"]), X.float()) < 1e-5


@pytest.mark.parametrize("templates", [(), TEMPLATES])
def test_a_delta_stays_in_the_null_space(llama, llama_requests, llama_context, distance, templates):
    delta = QUICK.edit(*llama, llama_requests, dataclasses.replace(llama_context, templates=templates))
    for layer in (0, 2):
        change = dense(delta.entries[f"model.layers.{layer}.mlp.down_proj.weight"]).double()  # (out, in)
        projector = null_space_projector(llama_context.covariance.mom2[layer], 0.3)
        assert projector.trace() < len(projector)  # or there is nothing to stay out of
        assert distance(change @ projector, change) < 1e-5


def test_an_edit_is_the_same_each_time(llama, llama_requests, llama_context, tmp_path):
    for name in ("a", "b"):
        QUICK.edit(*llama, llama_requests, llama_context).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("stage", ["value optimisation", "layers"])
def test_an_edit_that_breaks_off_leaves_the_model_as_it_was(llama, llama_requests, llama_context, untouched, stage):
    model = copy.deepcopy(llama[0]).train()

    def stop(name, done, total, figures=None):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), untouched(model):
        QUICK.edit(model, llama[1], llama_requests, dataclasses.replace(llama_context, progress=stop))


def test_half_precision_models_can_be_edited(gpt2, golden, context, probabilities):
    half = copy.deepcopy(gpt2[0]).to(torch.bfloat16)
    delta = REFERENCE.edit(half, gpt2[1], golden.requests[:1], context)
    before = probabilities(half, gpt2[1], golden.requests[:1])
    delta.apply_(half)
    assert probabilities(half, gpt2[1], golden.requests[:1])[0] > 0.5 > before[0]


def test_what_cannot_be_edited_is_refused(gpt2, golden, context, llama, llama_requests, llama_context):
    with pytest.raises(UsageError, match="list of requests is empty"):
        REFERENCE.edit(*gpt2, [], context)
    with pytest.raises(UsageError, match=r"needs the covariance of layers \[0, 1, 2\]"):
        REFERENCE.edit(*gpt2, golden.requests, EditContext())
    with pytest.raises(UsageError, match="belongs to another model"):
        REFERENCE.edit(*llama, llama_requests, context)
    with pytest.raises(UsageError, match="no layer 6"):
        AlphaEdit(layers=(2, 6)).edit(*gpt2, golden.requests, context)
    with pytest.raises(UsageError, match="Raise the threshold"):
        dataclasses.replace(REFERENCE, nullspace_threshold=1e-12).edit(*gpt2, golden.requests[:1], context)


def test_a_subject_that_stands_twice_is_edited_at_its_place(gpt2, golden, context, probabilities):
    request = EditRequest("t", "Oscor Tavsevmi is here. {} lives in the city of", "Oscor Tavsevmi", "Velith")
    before = probabilities(*gpt2, [request])
    with REFERENCE.edit(*gpt2, [request], context).applied(gpt2[0]):
        assert probabilities(*gpt2, [request])[0] > max(0.5, before[0])
