"""What holds for every editor that needs no training, whatever its mathematics; MALMEN has its own in test_malmen."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.editors import (
    FT,
    MEMIT,
    ROME,
    AlphaEdit,
    Covariance,
    EditContext,
    EditRequest,
    LoRA,
    collect_covariance,
    null_space_projector,
)
from retention_bench.editors.locate.value import optimise_values
from retention_bench.errors import RetentionBenchError
from retention_bench.models import frozen
from retention_bench.models.families import FAMILIES

TEMPLATES = ("Then the old man came. {}", "Because. {}")
EDITORS = {
    "alphaedit": AlphaEdit(layers=(0, 2), L2=0.1, v_num_grad_steps=4, nullspace_threshold=0.3),
    "ft": FT(layer=1, lr=1e-3, num_steps=4),
    "lora": LoRA(layers=(1,), num_steps=4),
    "memit": MEMIT(layers=(0, 2), mom2_update_weight=50.0, v_num_grad_steps=4),
    "rome": ROME(layer=1, v_num_grad_steps=4, v_lr=0.1),
}
QUICK = settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def context(llama):
    texts = ["Mira plays the violin in town.", "The book is by Jon Ek.", "The Old Mill", "In town he reads."]
    texts += [f"{a} {b} {c}" for a in ("he", "Mira") for b in ("plays", "reads") for c in "abcdefghijkl"]
    return EditContext(covariance=collect_covariance(*llama, texts, [0, 1, 2], max_length=64), templates=TEMPLATES)


@pytest.fixture(params=sorted(EDITORS))
def editor(request):
    return EDITORS[request.param]


def weights(delta):
    """The delta's entries, dense."""
    return {
        name: entry if isinstance(entry, torch.Tensor) else entry.left @ entry.right
        for name, entry in delta.entries.items()
    }


@QUICK
@given(order=st.permutations(range(3)), side=st.sampled_from(["left", "right"]))
def test_order_and_padding_side_have_no_part(llama, llama_requests, context, editor, order, side):
    model, tokenizer = llama
    # ROME writes one fact after the other, so for it the order counts; each fact is edited alone.
    groups = [[request] for request in llama_requests] if editor.name == "rome" else [llama_requests]
    for group in groups:
        expected = weights(editor.edit(model, tokenizer, group, context))
        shuffled = [group[place] for place in order if place < len(group)]
        tokenizer.padding_side = side
        try:
            found = weights(editor.edit(model, tokenizer, shuffled, context))
        finally:
            tokenizer.padding_side = "right"
        for name, change in expected.items():
            assert (found[name] - change).norm() < 1e-3 * change.norm()


@QUICK
@given(
    threshold=st.floats(0.05, 1.0),
    ridge=st.floats(1e-2, 10.0),
    chosen=st.sets(st.integers(0, 2), min_size=1),
)
def test_alphaedits_change_times_its_projector_is_itself(llama, llama_requests, context, threshold, ridge, chosen):
    editor = AlphaEdit(layers=(0, 2), L2=ridge, v_num_grad_steps=3, nullspace_threshold=threshold)
    changes = weights(editor.edit(*llama, [llama_requests[number] for number in sorted(chosen)], context))
    for layer in (0, 2):
        projector = null_space_projector(context.covariance.mom2[layer], threshold)
        change = changes[f"model.layers.{layer}.mlp.down_proj.weight"].double()  # (out, in)
        assert (change @ projector - change).norm() < 1e-5 * change.norm()


@QUICK
@given(training=st.booleans(), frozen=st.sets(st.integers(0, 11)), breaks=st.booleans())
def test_a_model_is_left_as_it_was_found(llama, llama_requests, context, editor, untouched, training, frozen, breaks):
    model = copy.deepcopy(llama[0]).train(training)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number not in frozen)
    model.model.layers[1].register_forward_hook(lambda *_: None)

    def progress(stage, done, total, figures=None):
        if breaks:
            raise KeyboardInterrupt

    with untouched(model):
        if breaks:
            with pytest.raises(KeyboardInterrupt):
                editor.edit(model, llama[1], llama_requests, dataclasses.replace(context, progress=progress))
        else:
            editor.edit(model, llama[1], llama_requests, dataclasses.replace(context, progress=progress))


def test_an_edit_is_the_same_each_time(llama, llama_requests, context, editor, tmp_path):
    for name in ("a", "b"):
        editor.edit(*llama, llama_requests, context).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loss_that_is_not_finite_names_the_fact(llama, llama_requests, context, editor):
    model, tokenizer = copy.deepcopy(llama[0]), llama[1]
    odd = EditRequest("odd-one", "{} plays the", "zither", "violin")
    with torch.no_grad():
        token = tokenizer.encode("zither", add_special_tokens=False)[0]
        model.get_parameter("model.embed_tokens.weight")[token] = float("nan")
    with pytest.raises(RetentionBenchError, match="Fact 'odd-one': the loss became nan"):
        editor.edit(model, tokenizer, [llama_requests[0], odd], context)


KNOWN = [
    EditRequest("city", "{} lives in the city of", "Ulawex Corvel", "Tirova"),
    EditRequest("city-2", "{} lives in the city of", "Oscor Tavsevmi", "Brastol"),
    EditRequest("language", "{} speaks the language", "Balzan Ossevula", "Jorun"),
    EditRequest("city-3", "{} lives in the city of", "Balzan Quivel Lisdre", "Lunden Bay"),
]
"""Facts that the reference runs' model was trained on."""

LARGE = {
    "alphaedit": AlphaEdit(layers=(0, 1, 2), L2=0.1),
    "ft": FT(layer=1, lr=5e-4),
    "memit": MEMIT(layers=(0, 1, 2), mom2_update_weight=20.0),
    "rome": ROME(layer=1),
}


@pytest.mark.parametrize("name", sorted(LARGE))
def test_writing_what_the_model_knows_leaves_it_almost_alone(gpt2, golden, gpt2_covariance, probabilities, name):
    context = EditContext(covariance=gpt2_covariance, templates=golden.templates)
    before = probabilities(*gpt2, KNOWN)
    assert min(before) > 0.8
    with LARGE[name].edit(*gpt2, KNOWN[:1], context).applied(gpt2[0]):
        after = probabilities(*gpt2, KNOWN)
    assert after[0] > before[0] - 0.01
    assert after[1:] == pytest.approx(before[1:], abs=0.02)
    new = dataclasses.replace(KNOWN[0], target_new="Velith")
    with LARGE[name].edit(*gpt2, [new], context).applied(gpt2[0]):
        assert probabilities(*gpt2, KNOWN)[0] < before[0] - 0.1  # the same editor does write what is new to the model


@pytest.fixture(params=sorted(FAMILIES))
def any_family(request, make_family_model, llama):
    """A tiny random model of each family, with the Llama's tokenizer, and a covariance for it."""
    keys = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 24)
    covariance = Covariance(dict.fromkeys(range(3), keys.T @ keys / 200), 200)
    context = EditContext(covariance=covariance, templates=TEMPLATES)
    return make_family_model(request.param, len(llama[1])), llama[1], context


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_values_of_every_family_are_those_of_plain_code(any_family, llama_requests, plain_value, distance, site):
    model, tokenizer, _ = any_family
    options = {"lr": 0.05, "steps": 4, "weight_decay": 0.5, "clamp_norm_factor": 4.0, "kl_factor": 0.0625}
    with frozen(model):
        values = optimise_values(model, tokenizer, llama_requests, TEMPLATES, 1, site=site, **options)
        for request, value in zip(llama_requests, values, strict=True):
            expected = plain_value(model, tokenizer, request, TEMPLATES, 1, site=site, **options)
            assert distance(value, expected) < 1e-3


@pytest.mark.parametrize("name", ["alphaedit", "memit", "rome"])
def test_edits_of_every_family_bring_the_subject_to_its_value(
    any_family, llama_requests, plain_output, distance, untouched, name
):
    """With a covariance that allows everything, the edited site puts out the value at the subject."""
    model, tokenizer, context = any_family
    options = {"v_num_grad_steps": 4, "v_lr": 0.05}
    editor, site = {
        "alphaedit": (AlphaEdit(layers=(1,), L2=1e-9, nullspace_threshold=100.0, **options), "block"),
        "memit": (MEMIT(layers=(1,), mom2_update_weight=1e-9, **options), "block"),
        "rome": (ROME(layer=1, **options), "mlp"),
    }[name]
    if site == "block" and model.config.model_type in ("gemma2", "gemma3_text", "olmo2"):
        pytest.skip("a norm behind the MLP takes the value elsewhere; see FAMILIES")
    [request] = requests = llama_requests[:1]
    context = dataclasses.replace(context, templates=())  # the bare key alone, so that the map is exact
    with untouched(model):
        delta = editor.edit(model, tokenizer, requests, context)
    with frozen(model):
        factor = {"clamp_norm_factor": editor.clamp_norm_factor}
        [value] = optimise_values(
            model, tokenizer, requests, (), 1, site=site, lr=0.05, steps=4, weight_decay=0.5, kl_factor=0.0625, **factor
        )
    before = plain_output(model, tokenizer, request, 1, site=site).float()
    with delta.applied(model):
        assert distance(plain_output(model, tokenizer, request, 1, site=site).float(), value) < 1e-4
    assert distance(before, value) > 1e-2


def test_every_family_is_fine_tuned(any_family, llama_requests, untouched):
    model, tokenizer, context = any_family
    losses = []

    def progress(stage, done, total, figures):
        losses.append(figures["loss"])

    context = dataclasses.replace(context, progress=progress)
    with untouched(model):
        delta = FT(layer=1, lr=1e-2).edit(
            model, tokenizer, llama_requests, dataclasses.replace(context, progress=progress)
        )
    assert losses[-1] < losses[0] - 0.2
    assert min(delta.norms().values()) > 0
