"""`Layout` and `Checkpoint` against what transformers itself loads."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from retention_bench.errors import RetentionBenchError
from retention_bench.models import Checkpoint, Layout, LowRank, WeightDelta

NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture
def llama(make_family_model):
    return make_family_model("llama", 300)


def own(model):
    """The weights that a model doesn't share with another."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_familys_weights_are_those_of_its_files(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layout = Layout.of(model.config)
    assert layout.shapes.keys() - layout.tied == stored.keys()
    assert all(layout.shapes[name] == tensor.shape for name, tensor in stored.items())
    assert len(layout.tied) == len(model.all_tied_weights_keys)
    assert_equal(dict(layout.check(Checkpoint(str(tmp_path)))), stored)


def test_it_is_read_in_parts_and_in_another_process(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = pickle.loads(pickle.dumps(Checkpoint(str(tmp_path))))
    assert_equal(dict(checkpoint), own(llama))
    assert_equal(dict(checkpoint), own(llama))  # and a second time


def test_names_without_the_prefix_and_masks_of_old_checkpoints(make_family_model, tmp_path):
    """As the GPT-2 models on the Hub have them."""
    model = make_family_model("gpt2", 300)
    stored = {name.removeprefix("transformer."): tensor for name, tensor in own(model).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(4)}
    model.config.save_pretrained(tmp_path)
    save_file(stored | masks, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(dict(Checkpoint(str(tmp_path))), own(model))


def test_a_delta_is_added_after_the_conversion(llama, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = llama.get_parameter(name).shape
    torch.manual_seed(3)
    WeightDelta({name: LowRank(torch.randn(rows, 2), torch.randn(2, columns))}).save(tmp_path / "delta.safetensors")
    llama.save_pretrained(tmp_path)
    read = Checkpoint(str(tmp_path), str(tmp_path / "delta.safetensors"), dtype=torch.bfloat16)
    WeightDelta.load(tmp_path / "delta.safetensors").apply_(llama.bfloat16())
    assert_equal(dict(read), own(llama))


def test_a_tied_head_may_be_there(make_family_model):
    model = make_family_model("gpt2", 300)
    assert_equal(dict(Layout.of(model.config).check(model.state_dict().items())), own(model))


def test_what_is_missing_unknown_or_of_another_shape_is_named(llama):
    layout, weights = Layout.of(llama.config), dict(llama.state_dict())
    with pytest.raises(RetentionBenchError, match=f"ended without 1 that the model needs, {NORM}"):
        list(layout.check((name, tensor) for name, tensor in weights.items() if name != NORM))
    with pytest.raises(RetentionBenchError, match="no weight 'model.norm.wait'. Did you mean 'model.norm.weight'?"):
        list(layout.check([("model.norm.wait", weights["model.norm.weight"])]))
    with pytest.raises(RetentionBenchError, match=r"norm.weight has the shape \[15\]; the model's has \[16\]"):
        list(layout.check([("model.norm.weight", torch.ones(15))]))


def test_a_folder_without_weights_or_with_broken_ones(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    with pytest.raises(RetentionBenchError, match="has no weights"):
        list(Checkpoint(str(tmp_path)))
    llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RetentionBenchError, match="could not be loaded"):
        list(Checkpoint(str(tmp_path)))
