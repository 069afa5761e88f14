import pytest
from transformers import OPTConfig, OPTForCausalLM

from retention_bench.errors import UsageError
from retention_bench.models import (
    block,
    family,
    is_in_out,
    key_size,
    mlp,
    num_layers,
    projection,
    projection_name,
)


def test_finds_every_part_of_a_model(model):
    assert num_layers(model) == 4
    assert key_size(model, 2) == 24
    assert is_in_out(projection(model, 0)) == (model.config.model_type == "gpt2")
    weight = model.get_parameter(f"{projection_name(model, 3)}.weight")
    assert weight is projection(model, 3).weight
    assert tuple(weight.shape) == ((24, 16) if is_in_out(projection(model, 3)) else (16, 24))
    assert projection(model, 1) in list(block(model, 1).modules())
    assert projection(model, 2) in list(mlp(model, 2).children())


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_refused(model, layer):
    with pytest.raises(UsageError, match=rf"no layer {layer}: the model has 4 layers, 0 to 3"):
        projection(model, layer)


def test_an_unknown_family_is_refused_with_the_lines_that_add_it():
    config = OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, word_embed_proj_dim=8
    )
    with pytest.raises(UsageError, match=r"(?s)'opt' are not supported.*gpt2.*llama.*\"opt\": Family\(.*\"opt\": {"):
        num_layers(OPTForCausalLM(config))
    with pytest.raises(UsageError, match="mamba"):
        family("mamba")
