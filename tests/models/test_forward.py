import pytest
import torch

from retention_bench.models import (
    block,
    frozen,
    last_hidden,
    log_probabilities,
    pad,
    projection,
    projection_name,
    record,
)

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def states(model):
    modules = {name: (module.training, "forward" in vars(module)) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return modules, hooks, [parameter.requires_grad for parameter in model.parameters()]


def test_padding_is_on_the_right_and_masked():
    ids, mask = pad([(5, 6, 7), (8,)], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_records_what_a_full_pass_has(model):
    seen = {}
    for layer in (0, 2):
        projection(model, layer).register_forward_pre_hook(lambda m, args, layer=layer: seen.update({layer: args[0]}))
    with torch.no_grad():
        full = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    expected = dict(seen)
    keys, output = record(model, IDS, MASK, keys=[0, 2], output=1)
    for layer in (0, 2):
        torch.testing.assert_close(keys[layer], expected[layer], rtol=0, atol=0)
    torch.testing.assert_close(output, full[2], rtol=0, atol=0)
    assert not output.requires_grad


def test_does_not_run_blocks_above_what_is_asked_for(model):
    runs = []
    for layer in range(4):
        projection(model, layer).register_forward_hook(lambda *_, layer=layer: runs.append(layer))
    record(model, IDS, MASK, keys=[1])
    assert runs == [0, 1]
    runs.clear()
    record(model, IDS, MASK, keys=[2], start=(0, torch.zeros(2, 5, 16)))
    assert runs == [1, 2]


def test_a_key_is_read_without_its_own_projection(model):
    def products(**asked):
        with torch.profiler.profile() as profile:
            record(model, IDS, MASK, **asked)
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::linear"))

    before = states(model)
    assert products(keys=[1]) < products(output=1)
    assert states(model) == before


@pytest.mark.parametrize("layer", [0, 2])
def test_starting_above_a_layer_gives_what_a_whole_pass_has(model, layer):
    whole, top = record(model, IDS, MASK, keys=[3], output=3)
    _, output = record(model, IDS, MASK, output=layer)
    keys, resumed = record(model, IDS, MASK, keys=[3], output=3, start=(layer, output))
    torch.testing.assert_close(keys[3], whole[3])
    torch.testing.assert_close(resumed, top)


def test_last_hidden_feeds_the_head(model):
    with torch.no_grad():
        got = log_probabilities(model, last_hidden(model, IDS, MASK))
        torch.testing.assert_close(got, model(input_ids=IDS, attention_mask=MASK).logits.log_softmax(-1))


@pytest.mark.parametrize("layer", [None, 1])
def test_other_weights_can_stand_for_the_models_own(model, layer):
    name = f"{projection_name(model, 2)}.weight"
    other = torch.randn_like(model.get_parameter(name)).requires_grad_()
    own = model.get_parameter(name).detach().clone()
    start = None if layer is None else (layer, record(model, IDS, MASK, output=layer)[1])
    hidden = last_hidden(model, IDS, MASK, start=start, weights={name: other})
    [gradient] = torch.autograd.grad(hidden[0, 2, 3], other)
    assert gradient.norm() > 0
    torch.testing.assert_close(model.get_parameter(name), own, rtol=0, atol=0)
    with torch.no_grad():
        model.get_parameter(name).copy_(other)
        torch.testing.assert_close(hidden, last_hidden(model, IDS, MASK), rtol=1e-4, atol=1e-5)


def test_partial_passes_leave_no_trace_even_when_they_fail(model):
    before = states(model)
    record(model, IDS, MASK, keys=[1], output=2)
    with pytest.raises(RuntimeError):
        record(model, IDS, MASK, keys=[2], start=(1, torch.zeros(2, 5, 3)))  # a wrong d_model
    with pytest.raises((IndexError, RuntimeError)):
        record(model, IDS + 10_000, MASK, keys=[1])
    assert states(model) == before


def test_a_forward_that_was_wrapped_before_is_put_back(model):
    own = block(model, 0).forward
    block(model, 0).forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs)
    record(model, IDS, MASK, keys=[2], start=(1, torch.zeros(2, 5, 16)))
    assert block(model, 0).forward is wrapped


def test_frozen_puts_modes_and_gradients_back(model):
    model.train()
    block(model, 2).eval()
    next(iter(block(model, 1).parameters())).requires_grad_(False)
    before = states(model)

    def use():
        with frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert states(model) == before
