import copy

import peft
import pytest
import torch

from retention_bench.editors import EditContext, EditRequest, LoRA, make_editor
from retention_bench.editors import lora as lora_module
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import LowRank


def edit(model, requests, editor, losses=None, seed=0):
    def progress(stage, done, total, figures):
        if losses is not None:
            losses.append(figures["loss"])

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return editor.edit(*model, requests, EditContext(progress=progress, generator=generator))


@pytest.fixture(params=["gpt2", "llama"])
def case(request, golden, llama_requests):
    """A model whose weights are (in, out) or one whose are (out, in), with its tokenizer; requests; projections."""
    requests = golden.requests[:3] if request.param == "gpt2" else llama_requests
    name = "transformer.h.{}.mlp.c_proj" if request.param == "gpt2" else "model.layers.{}.mlp.down_proj"
    return request.getfixturevalue(request.param), requests, name


def merged(model, targets, adapters=None, train=None):
    """A model that peft itself adapted and merged."""
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=model.config.model_type == "gpt2"),
    )
    if adapters is not None:
        own = {name: p for name, p in wrapped.base_model.model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, parameter in adapters.named_parameters():
                if "lora_" in name:
                    own.pop(name).copy_(parameter)
        assert not own
    if train is not None:
        train(wrapped)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize(("modules", "count"), [("projection", 2), ("all-linear", {"gpt2": 8, "llama": 14})])
def test_the_delta_is_what_peft_merges(case, untouched, monkeypatch, modules, count):
    model, requests, name = case
    kept, inject = [], lora_module.inject_adapter_in_model
    monkeypatch.setattr(lora_module, "inject_adapter_in_model", lambda *words: kept.append(inject(*words)))
    objects, attributes = [id(part) for part in model[0].modules()], set(vars(model[0]))
    with untouched(model[0]):
        delta = edit(model, requests, LoRA(layers=(0, 2), modules=modules, lr=1e-2, num_steps=3))
    assert [id(part) for part in model[0].modules()] == objects
    assert set(vars(model[0])) == attributes

    assert len(delta.entries) == (count if modules == "projection" else count[model[0].config.model_type])
    assert {f"{name.format(layer)}.weight" for layer in (0, 2)} <= set(delta.entries)
    assert all(isinstance(entry, LowRank) and entry.left.shape[1] == 8 for entry in delta.entries.values())
    assert min(delta.norms().values()) > 0
    theirs = merged(model[0], [entry.removesuffix(".weight") for entry in delta.entries], adapters=kept[0])
    with delta.applied(model[0]):
        for name, weight in theirs.named_parameters():
            assert torch.allclose(model[0].get_parameter(name), weight, rtol=0, atol=1e-5), name


def test_training_is_that_of_plain_code(case, distance):
    model, requests, name = case

    def train(wrapped):
        adam = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(4):
            loss = 0.0
            for request in requests:
                target = model[1].encode(f" {request.target_new}", add_special_tokens=False)
                for text in request.prompts:
                    prompt = model[1].encode(text.replace("{}", request.subject))
                    labels = torch.tensor([[-100] * len(prompt) + target])
                    one = wrapped(torch.tensor([prompt + target]), labels=labels).loss
                    loss = loss + one / len(requests) / len(request.prompts)
            adam.zero_grad()
            loss.backward()
            adam.step()

    first = requests[0]
    requests = [
        EditRequest(first.fact_id, first.prompt, first.subject, first.target_new, ("I say: {} is",)),
        *requests[1:],
    ]
    delta = edit(model, requests, LoRA(layers=(1,), lr=1e-2, num_steps=4, weight_decay=0.1))
    seed = torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)).item()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = merged(model[0], [name.format(1)], train=train)
    weight = f"{name.format(1)}.weight"
    [entry] = delta.entries.values()
    change = (theirs.get_parameter(weight) - model[0].get_parameter(weight)).detach()
    assert distance(entry.left @ entry.right, change) < 1e-3


def test_edits_take_and_training_stops_when_the_loss_is_low(gpt2, golden, probabilities):
    losses, requests = [], golden.requests[:3]
    delta = edit(gpt2, requests, LoRA(lr=2e-2, num_steps=40, stop_loss=0.05), losses)
    assert losses[-1] < 0.05 <= min(losses[:-1])
    before = probabilities(*gpt2, requests)
    with delta.applied(gpt2[0]):
        after = probabilities(*gpt2, requests)
    assert max(before) < 0.5 < min(after)
    nothing = edit(gpt2, requests, LoRA(num_steps=3, stop_loss=1e9))
    assert set(nothing.norms().values()) == {0.0}


def test_the_generator_decides_and_torchs_own_is_left_alone(case):
    model, requests, _ = case
    editor = LoRA(layers=(1,), num_steps=2, lora_dropout=0.3)
    state = torch.get_rng_state()
    first, again, other, none, none_again = (edit(model, requests, editor, seed=s) for s in (0, 0, 1, None, None))
    assert torch.equal(torch.get_rng_state(), state)

    def same(one, two):
        return all(
            torch.equal(one.entries[name].left, two.entries[name].left)
            and torch.equal(one.entries[name].right, two.entries[name].right)
            for name in one.entries
        )

    assert same(first, again)
    assert same(none, none_again)
    assert not same(first, other)


def test_half_precision_models_train_adapters_in_float32(llama, llama_requests, untouched, probabilities):
    half = copy.deepcopy(llama[0]).to(torch.bfloat16)
    with untouched(half):
        small = edit((half, llama[1]), llama_requests, LoRA(layers=(1,), lr=1e-6, num_steps=5))
        delta = edit((half, llama[1]), llama_requests, LoRA(lr=2e-2, num_steps=30))
    [entry] = small.entries.values()
    assert 4e-6 < entry.left.abs().max() / 2 < 6e-6  # five steps from zero, times alpha over r
    begin = edit((half, llama[1]), llama_requests, LoRA(layers=(1,), lr=1e-6, num_steps=1))
    [start] = begin.entries.values()
    assert 2e-6 < (entry.right - start.right).abs().max() < 6e-6  # bfloat16 itself would have lost each of them
    before = probabilities(half, llama[1], llama_requests)
    with delta.applied(half):
        after = probabilities(half, llama[1], llama_requests)
    # This random head gives no token much more than a half.
    assert all(now > 100 * then for then, now in zip(before, after, strict=True))


def test_a_model_in_training_mode_is_left_so(gpt2, golden, untouched, distance):
    model = copy.deepcopy(gpt2[0]).train()
    model.transformer.h[0].attn.attn_dropout.p = 0.5
    editor = LoRA(layers=(1,), num_steps=2)
    with untouched(model):
        first = edit((model, gpt2[1]), golden.requests[:1], editor)
    second = edit(gpt2, golden.requests[:1], editor)
    for name, change in second.entries.items():
        assert distance(first.entries[name].left, change.left) < 1e-3  # no dropout within


def test_a_loss_that_is_not_finite_names_the_fact_and_leaves_the_model(gpt2, golden, untouched):
    broken = copy.deepcopy(gpt2[0])
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(float("inf"))
    with untouched(broken), pytest.raises(RetentionBenchError, match="Fact '0': the loss became nan during LoRA"):
        edit((broken, gpt2[1]), golden.requests, LoRA())


def test_what_cannot_be_edited_is_refused(gpt2, golden):
    with pytest.raises(UsageError, match="list of requests is empty"):
        edit(gpt2, [], LoRA())
    for modules in ("projection", "all-linear"):
        with pytest.raises(UsageError, match="no layer 6"):
            edit(gpt2, golden.requests, LoRA(layers=(1, 6), modules=modules))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [2, 1]}, "setting 'layers': .*ascend"),
        ({"layers": []}, "setting 'layers'"),
        ({"modules": "all"}, "setting 'modules': .*'projection' or 'all-linear', got 'all'"),
        ({"r": 0}, "setting 'r'"),
        ({"lora_dropout": 1.0}, "setting 'lora_dropout'"),
        ({"alpha": 16}, "Unknown setting of the editor 'lora': 'alpha'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        make_editor("lora", settings)
