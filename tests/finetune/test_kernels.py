import pytest
import torch

from retention_bench.finetune import Terms, train, training
from retention_bench.finetune.kernels import faster_steps
from retention_bench.models.families import FAMILIES


def parts(model):
    return [(module, len(module._forward_pre_hooks), "forward" in vars(module)) for module in model.modules()]


def test_on_a_cpu_nothing_is_touched(gpt2):
    before = parts(gpt2)
    with faster_steps(gpt2, "cpu"):
        assert parts(gpt2) == before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_padded_on_the_right_need_no_mask(make_family_model, family):
    model = make_family_model(family, 50)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(1, 41).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    seen = []
    model.train()
    before, expected = parts(model), model(input_ids=ids, attention_mask=mask).logits
    with faster_steps(model, "cuda"):
        watched = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        found = model(input_ids=ids, attention_mask=mask).logits
        model.eval()  # as who asks between two steps has it, perhaps with rows padded on the left
        model(input_ids=ids, attention_mask=mask)
        watched.remove()
    assert seen[0] is None
    assert seen[1] is mask
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert parts(model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fine_tune_learns_the_same_with_them(task, family, request, tmp_path, monkeypatch):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    model = request.getfixturevalue(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights, before = [], parts(model)
    for number, faster in enumerate([lambda model, device: faster_steps(model, "cuda"), training.faster_steps]):
        monkeypatch.setattr(training, "faster_steps", faster)
        model.load_state_dict(start)
        train(model, tokenizer, task(), terms=Terms(), seed=0, output_dir=tmp_path / str(number))
        assert parts(model) == before
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    for name in start:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=2e-3)
