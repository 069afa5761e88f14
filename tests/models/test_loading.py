import json

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import load_model


def test_loads_a_folder_ready_to_use(folder):
    model, tokenizer = load_model(str(folder))
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|end|>", "right")  # the saved one has no padding token
    ids = tokenizer("Mira plays", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_that_is_asked_for(folder, stored):
    LlamaForCausalLM.from_pretrained(folder).to(stored).save_pretrained(folder)
    original = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert original.dtype == stored
    wide, _ = load_model(str(folder))
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    narrow, _ = load_model(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_says_which_file_a_folder_lacks(folder):
    weights = folder / "model.safetensors"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(RetentionBenchError, match="has no tokenizer"):
        load_model(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(RetentionBenchError, match="only pickled weights"):
        load_model(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(RetentionBenchError, match="has no weights"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(RetentionBenchError, match=r"has no config\.json"):
        load_model(str(folder))


def test_broken_and_incomplete_weights_are_refused(folder):
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({name: t for name, t in whole.items() if "layers.1.mlp.down_proj" not in name}, path, {"format": "pt"})
    with pytest.raises(
        RetentionBenchError, match=r"lack 1 that the model needs, model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load_model(str(folder))
    path.write_bytes(b"not weights")
    with pytest.raises(RetentionBenchError, match="could not be loaded"):
        load_model(str(folder))


def test_an_unsupported_family_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    with pytest.raises(UsageError, match="'opt' are not supported"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(RetentionBenchError, match="could not be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_id(path):
    with pytest.raises(UsageError, match="no model folder"):
        load_model(path)


def test_a_hub_model_that_cannot_be_fetched_says_what_to_check(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RetentionBenchError, match=r"'nobody/nothing' could not be loaded from the Hub.*Check the id"):
        load_model("nobody/nothing")
