import copy

import pytest
import torch

from retention_bench.editors import FT, EditContext, EditRequest, finetune_loop
from retention_bench.errors import RetentionBenchError, UsageError


def edit(model, requests, editor, losses=None):
    def progress(stage, done, total, figures):
        if losses is not None:
            losses.append(figures["loss"])

    return editor.edit(*model, requests, EditContext(progress=progress))


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("unconstr_lr5e-4", "prompt_last"),
        ("constr_layer0_eps5e-4", "prompt_last"),
        ("paper_lr5e-5", "prompt_last"),
        ("unconstr_batch5", "prompt_last"),
        ("easyedit_target_new_lr5e-4", "target"),
    ],
)
def test_runs_are_the_references(gpt2, golden, distance, untouched, probabilities, name, objective):
    arrays, run = golden.arrays("ft"), golden.expected["ft"][name]
    given = run["hparams"]
    [layer] = given["layers"]
    editor = FT(
        layer=layer, lr=given["lr"], num_steps=25, objective=objective, norm_constraint=given["norm_constraint"] or None
    )
    for index, reference in enumerate(run["runs"]):
        losses, requests = [], golden.pick(reference["requests"])
        with untouched(gpt2[0]):
            delta = edit(gpt2, requests, editor, losses)
        assert losses == pytest.approx(reference["losses"], abs=1e-4)
        assert set(delta.entries) == {f"transformer.h.{layer}.mlp.c_proj.{part}" for part in ("weight", "bias")}
        for parameter, change in delta.entries.items():
            key = f"{name}.{index}.delta.{parameter}"
            if change.dim() == 2:
                assert distance(change[:, :8], arrays[f"{key}.columns"]) < 1e-4
                assert change.norm().item() == pytest.approx(arrays[f"{key}.norm"].item(), rel=1e-4)
            else:
                assert distance(change, arrays[key]) < 1e-4
        with delta.applied(gpt2[0]):
            assert probabilities(*gpt2, requests) == pytest.approx(reference["probabilities"], abs=1e-3)


@pytest.mark.parametrize(
    ("weight_decay", "tokens"), [(0.0, finetune_loop.MAX_TOKENS), (0.1, finetune_loop.MAX_TOKENS), (0.0, 24)]
)
def test_a_llama_is_trained_as_by_plain_code(
    llama, llama_requests, distance, untouched, monkeypatch, weight_decay, tokens
):
    monkeypatch.setattr(finetune_loop, "MAX_TOKENS", tokens)  # a step's requests may go in several passes
    model, tokenizer = llama
    plain = copy.deepcopy(model)
    weight = plain.get_parameter("model.layers.2.mlp.down_proj.weight")
    adam = torch.optim.Adam([weight], lr=1e-3, weight_decay=weight_decay)
    for _ in range(6):
        loss = 0.0
        for request in llama_requests:
            prompt = tokenizer.encode(request.prompt.replace("{}", request.subject))
            target = tokenizer.encode(f" {request.target_new}", add_special_tokens=False)
            labels = torch.tensor([[-100] * len(prompt) + target])
            loss = loss + plain(torch.tensor([prompt + target]), labels=labels).loss / len(llama_requests)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with untouched(model):
        delta = edit(llama, llama_requests, FT(layer=2, lr=1e-3, num_steps=6, weight_decay=weight_decay))
    before = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    assert distance(delta.entries["model.layers.2.mlp.down_proj.weight"], (weight - before).detach()) < 1e-3


def test_chunks_take_a_step_each(llama, llama_requests):
    one, chunks = [], []
    edit(llama, llama_requests, FT(lr=1e-2, num_steps=2), one)
    edit(llama, llama_requests, FT(lr=1e-2, num_steps=2, batch_size=1), chunks)
    assert chunks[0] < one[0]  # the second and third fact were already met by a changed weight


def test_stops_when_the_loss_is_low(llama, llama_requests):
    losses = []
    edit(llama, llama_requests[:1], FT(lr=1e-2, num_steps=200, stop_loss=1.0), losses)
    assert losses[-1] < 1.0 <= min(losses[:-1])
    nothing = edit(llama, llama_requests[:1], FT(num_steps=3, stop_loss=1e9))
    assert set(nothing.norms().values()) == {0.0}


def test_no_number_moves_past_the_constraint(gpt2, golden):
    delta = edit(gpt2, golden.requests[:1], FT(lr=1e-2, num_steps=5, norm_constraint=1e-3))
    for change in delta.entries.values():
        assert change.abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def test_half_precision_models_add_up_small_steps(gpt2, golden):
    half = copy.deepcopy(gpt2[0]).to(torch.bfloat16)
    delta = edit((half, gpt2[1]), golden.requests[:1], FT(lr=1e-6, num_steps=5))
    change = delta.entries["transformer.h.1.mlp.c_proj.weight"]
    assert 4e-6 < change.abs().max() < 6e-6  # five steps; bfloat16 itself would have lost each of them


def test_a_model_in_training_mode_is_left_so(gpt2, golden, untouched, distance):
    model = copy.deepcopy(gpt2[0]).train()
    model.transformer.h[0].attn.attn_dropout.p = 0.5
    with untouched(model):
        first = edit((model, gpt2[1]), golden.requests[:1], FT(num_steps=2))
    second = edit(gpt2, golden.requests[:1], FT(num_steps=2))
    for name, change in second.entries.items():
        assert distance(first.entries[name], change) < 1e-3  # no dropout within


def test_a_loss_that_is_not_finite_names_the_fact(gpt2, golden):
    broken = copy.deepcopy(gpt2[0])
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RetentionBenchError, match="Fact '0': the loss became nan"):
        edit((broken, gpt2[1]), golden.requests, FT())


def test_what_cannot_be_edited_is_refused(gpt2, golden):
    with pytest.raises(UsageError, match="list of requests is empty"):
        edit(gpt2, [], FT())
    with pytest.raises(UsageError, match="no layer 6"):
        edit(gpt2, golden.requests, FT(layer=6))


@pytest.mark.parametrize("objective", ["target", "prompt_last"])
def test_a_requests_loss_is_the_mean_over_its_prompts(llama, llama_requests, distance, objective):
    def settings(**more):
        return FT(layer=1, lr=1e-3, objective=objective, **more)

    def first_loss(requests):
        losses = []
        edit(llama, requests, settings(num_steps=1), losses)
        return losses[0]

    def prompted(request, *prompts):
        return EditRequest(request.fact_id, prompts[0], request.subject, request.target_new, prompts[1:])

    one, other = llama_requests[0], llama_requests[2]
    texts = (one.prompt, "They say that {} plays the", "Here {} plays the")
    alone = [first_loss([prompted(one, text)]) for text in texts]
    assert first_loss([prompted(one, *texts)]) == pytest.approx(sum(alone) / 3, rel=1e-5)
    # Every request counts the same, however many prompts it has.
    both = first_loss([prompted(one, *texts), other])
    assert both == pytest.approx((sum(alone) / 3 + first_loss([other])) / 2, rel=1e-5)
    # The gradient is that of this mean: a prompt that stands there twice weighs as much as two.
    twice = edit(llama, [prompted(one, texts[0], texts[1], texts[0], texts[1])], settings(num_steps=3))
    once = edit(llama, [prompted(one, texts[0], texts[1])], settings(num_steps=3))
    for name, change in once.entries.items():
        assert distance(twice.entries[name], change) < 1e-3


def test_paraphrases_are_written_too(gpt2, golden, probabilities):
    request = golden.requests[0]
    other = EditRequest("p", f"In other words, {request.prompt}", request.subject, request.target_new)
    both = EditRequest("b", request.prompt, request.subject, request.target_new, (other.prompt,))
    editor = FT(lr=5e-4, num_steps=8)
    with edit(gpt2, [request], editor).applied(gpt2[0]):
        [without] = probabilities(*gpt2, [other])
    with edit(gpt2, [both], editor).applied(gpt2[0]):
        [within] = probabilities(*gpt2, [other])
    assert within > without
