import copy
import dataclasses

import pytest
import torch

from retention_bench.editors import ROME, Covariance, EditContext, EditRequest, edit_sequentially, make_editor
from retention_bench.editors.locate.value import optimise_values
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen

RUNS = ["ref20", "paper50", "nomom2", "wd1e-3_steps25", "early_stop", "random_prefix_keys", "prompt_keys"]
TEMPLATES = ("Then the old man came. {}", "Because. {}")


@pytest.fixture(scope="module")
def context(gpt2_covariance, golden):
    return EditContext(covariance=gpt2_covariance, templates=golden.expected["rome_templates"])


@pytest.mark.parametrize("run", RUNS)
def test_runs_are_the_references(gpt2, golden, context, distance, probabilities, untouched, run):
    arrays, expected = golden.arrays("rome"), golden.expected["rome"][run]
    editor = make_editor("rome", expected["settings"])
    for number, request in enumerate(golden.requests):
        with untouched(gpt2[0]):
            delta = editor.edit(*gpt2, [request], context)
        assert list(delta.entries) == [f"transformer.h.{editor.layer}.mlp.c_proj.weight"]
        [entry] = delta.entries.values()
        assert distance(entry.left[:, 0], arrays[f"{run}.{number}.left_u"]) < 1e-3
        assert distance(entry.right[0], arrays[f"{run}.{number}.right_r"]) < 1e-3
        with delta.applied(gpt2[0]):
            [probability] = probabilities(*gpt2, [request])
        assert probability == pytest.approx(expected["probabilities"][number], abs=1e-3)


def test_values_are_the_references(gpt2, golden, context, distance):
    for run in ("ref20", "early_stop"):
        settings = golden.expected["rome"][run]["settings"]
        with frozen(gpt2[0]):
            values = optimise_values(
                *gpt2, golden.requests, context.templates, settings["layer"],
                site="mlp", lr=settings["v_lr"], steps=settings["v_num_grad_steps"],
                weight_decay=settings["v_weight_decay"], clamp_norm_factor=settings["clamp_norm_factor"],
                kl_factor=settings["kl_factor"],
            )  # fmt: skip
        for number, value in enumerate(values):
            assert distance(value, golden.arrays("rome")[f"{run}.{number}.v_star"]) < 1e-4


def test_one_after_the_other_is_the_references(gpt2, golden, context, distance, probabilities):
    arrays, expected = golden.arrays("rome"), golden.expected["rome"]["sequential"]
    editor = make_editor("rome", expected["settings"])
    delta = editor.edit(*gpt2, golden.requests, context)
    [entry] = delta.entries.values()
    change = entry.left @ entry.right
    assert distance(change[:, :8], arrays["sequential.delta_w.columns"]) < 1e-3
    assert change.norm().item() == pytest.approx(arrays["sequential.delta_w.norm"].item(), rel=1e-3)
    with delta.applied(gpt2[0]):
        assert probabilities(*gpt2, golden.requests) == pytest.approx(expected["probabilities"], abs=1e-3)
    parts = edit_sequentially(editor, *gpt2, [[request] for request in golden.requests], context)
    [summed] = sum(parts[1:], parts[0]).entries.values()
    assert distance(summed.left @ summed.right, change) < 1e-6


@pytest.mark.parametrize("variant", ["rome", "r-rome", "r-rome-prompt"])
@pytest.mark.parametrize("paraphrases", [(), ("The book is by {} and",)])
def test_a_llama_is_edited_as_by_plain_code(
    llama, llama_requests, distance, untouched, plain_key, plain_value, variant, paraphrases
):
    """Equation 2 with the inverse written out; keys and values from whole forward passes of single rows."""
    model, tokenizer = llama
    request = dataclasses.replace(llama_requests[1], paraphrases=paraphrases)
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    moment = rows.T @ rows / 300
    editor = ROME(layer=1, v_num_grad_steps=6, v_lr=0.1, variant=variant)
    context = EditContext(covariance=Covariance({1: moment}, 300), templates=TEMPLATES)
    with untouched(model):
        delta = editor.edit(model, tokenizer, [request], context)

    with frozen(model):
        value = plain_value(
            model, tokenizer, request, TEMPLATES, 1,
            site="mlp", lr=0.1, steps=6, weight_decay=0.5, clamp_norm_factor=4.0, kl_factor=0.0625,
        ).double()  # fmt: skip
    own = dataclasses.replace(request, paraphrases=())
    bare = plain_key(model, tokenizer, own, TEMPLATES, 1, bare_weight=1.0)
    mean = plain_key(model, tokenizer, request, TEMPLATES, 1, bare_weight=1 / 3)
    towards = bare if variant == "r-rome-prompt" else mean
    key = mean if variant == "r-rome" else bare
    u = torch.linalg.inv(moment.double()) @ towards
    u = u / u.norm()
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach().double()
    change = torch.outer((value - weight @ key) / (key @ u), u)
    entry = delta.entries["model.layers.1.mlp.down_proj.weight"]
    assert distance(entry.left @ entry.right, change.float()) < 1e-3


def test_the_key_is_mapped_to_the_value_exactly(gpt2, golden, context, distance):
    arrays = golden.arrays("rome")
    delta = make_editor("rome", golden.expected["rome"]["ref20"]["settings"]).edit(*gpt2, golden.requests[:1], context)
    [entry] = delta.entries.values()
    moved = arrays["ref20.0.w_k_star"] + arrays["ref20.0.k_star"] @ entry.left @ entry.right
    assert distance(moved, arrays["ref20.0.v_star"]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_can_be_edited(gpt2, golden, context, probabilities, dtype):
    half = copy.deepcopy(gpt2[0]).to(dtype)
    settings = golden.expected["rome"]["ref20"]["settings"]
    before = probabilities(half, gpt2[1], golden.requests[:1])
    with make_editor("rome", settings).edit(half, gpt2[1], golden.requests[:1], context).applied(half):
        assert probabilities(half, gpt2[1], golden.requests[:1])[0] > 0.8 > before[0]
    assert probabilities(half, gpt2[1], golden.requests[:1]) == before


def test_a_key_at_a_right_angle_names_the_fact(gpt2, golden, context, monkeypatch):
    def keys(self, layer):
        bare, other = torch.eye(512)[:2]
        return [torch.stack([bare, other - bare])[None]]

    monkeypatch.setattr("retention_bench.editors.rome.SubjectStates.keys", keys)
    editor = ROME(layer=0, v_num_grad_steps=1, mom2_adjustment=False)
    with pytest.raises(RetentionBenchError, match="Fact '0': its change is not finite.*r-rome"):
        editor.edit(*gpt2, golden.requests[:1], dataclasses.replace(context, templates=TEMPLATES[:1]))


def test_what_cannot_be_edited_is_refused(gpt2, golden, context):
    with pytest.raises(UsageError, match="list of requests is empty"):
        ROME(layer=0).edit(*gpt2, [], context)
    with pytest.raises(UsageError, match="ROME needs the covariance of layers"):
        ROME(layer=0).edit(*gpt2, golden.requests, EditContext())
    with pytest.raises(UsageError, match="no layer 6"):
        ROME(layer=6, mom2_adjustment=False).edit(*gpt2, golden.requests, context)
    poor = Covariance({0: torch.zeros(512, 512)}, 100)
    with pytest.raises(RetentionBenchError, match="covariance of layer 0 is singular"):
        ROME(layer=0).edit(*gpt2, golden.requests, dataclasses.replace(context, covariance=poor))
    with pytest.raises(UsageError, match="'r-rome' or 'r-rome-prompt', got 'rrome'"):
        make_editor("rome", {"layer": 0, "variant": "rrome"})


def test_a_covariance_is_asked_for_where_they_are_used():
    assert ROME(layer=3).covariance_layers == (3,)
    assert ROME(layer=3, mom2_adjustment=False).covariance_layers == ()


def test_a_subject_that_stands_twice_is_edited_at_its_place(gpt2, context, probabilities):
    request = EditRequest("t", "Oscor Tavsevmi is here. {} lives in the city of", "Oscor Tavsevmi", "Velith")
    before = probabilities(*gpt2, [request])
    with ROME(layer=0).edit(*gpt2, [request], context).applied(gpt2[0]):
        assert probabilities(*gpt2, [request])[0] > max(0.5, before[0])
