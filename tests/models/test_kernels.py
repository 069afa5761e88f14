import pytest
import torch
from transformers.activations import GELUTanh, NewGELUActivation

from retention_bench.models.kernels import fused_gelu


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_one_kernel_gives_the_gelu_of_eight(make_family_model, family):
    model = make_family_model(family, 50)
    ids = torch.arange(20)[None]
    before, expected = [*model.modules()], model(ids).logits
    with fused_gelu(model, "cuda"):  # what a GPU runs is what this processor can run too
        assert kinds(model).count(GELUTanh) == 4
        assert NewGELUActivation not in kinds(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert [*model.modules()] == before
    assert torch.equal(model(ids).logits, expected)


def test_an_error_puts_the_gelu_back(make_family_model):
    model = make_family_model("gpt2", 50)
    before = [*model.modules()]
    with pytest.raises(KeyboardInterrupt), fused_gelu(model, "cuda"):
        raise KeyboardInterrupt
    assert [*model.modules()] == before


def test_on_a_cpu_nothing_is_replaced(make_family_model):
    model = make_family_model("gpt2", 50)
    before = [*model.modules()]
    with fused_gelu(model, "cpu"):
        assert [*model.modules()] == before
