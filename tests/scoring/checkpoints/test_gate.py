"""The parity gate, shown each kind of checkpoint that could be put together otherwise than peft and transformers do.

The first checkpoint of the architecture is right each time; the second is loaded wrongly on purpose.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from retention_bench.models import WeightDelta, checkpoint, load_model
from retention_bench.models.reference import Reference
from retention_bench.scoring.checkpoints.batch import Options, score_checkpoints

OPTIONS = Options("hf", "float32", "cpu", ("edited", "intrinsic"))


def adapter(zoo, folder, **settings):
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings})
    torch.manual_seed(4)
    adapted = get_peft_model(load_model(str(zoo / "llama"))[0], config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(folder)
    return str(folder)


def plain_sum(model, folder, **_):
    """An adapter added to the base as it is, whatever its configuration says besides rank and scale."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    parts = load_file(Path(folder) / "adapter_model.safetensors")
    for name in [name for name in parts if name.endswith("lora_A.weight")]:
        weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.weight", "weight"))
        weight.data += config["lora_alpha"] / config["r"] * (parts[name.replace("lora_A", "lora_B")] @ parts[name])
    return model


def stale_shards(zoo, folder, monkeypatch):
    """The old shards' weights, where the model was saved whole since."""
    model = Path(shutil.copytree(zoo / "llama", folder / "model"))
    shard = "model-00001-of-00001.safetensors"
    old = {name: tensor * 0.5 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(old, model / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    read = checkpoint.read_model

    def wrong(folder, **settings):
        found = read(folder, **settings)
        if (folder / shard).exists():
            found.load_state_dict(load_file(folder / shard), strict=False)
        return found

    monkeypatch.setattr(checkpoint, "read_model", wrong)
    return Reference("second", str(model))


def adapter_kind(**settings):
    """An adapter of a kind that a plain sum gets wrong."""

    def second(zoo, folder, monkeypatch):
        monkeypatch.setattr(checkpoint, "adapted", plain_sum)
        return Reference("second", str(zoo / "llama"), adapter=adapter(zoo, folder / "adapter", **settings))

    return second


def dropped(**settings):
    """An adapter that is not put on at all."""

    def second(zoo, folder, monkeypatch):
        monkeypatch.setattr(checkpoint, "adapted", lambda model, folder, **_: model)
        return Reference("second", str(zoo / "llama"), adapter=adapter(zoo, folder / "adapter", **settings))

    return second


def delta_left_out(zoo, folder, monkeypatch):
    name = "model.layers.0.mlp.down_proj.weight"
    shape = load_model(str(zoo / "llama"))[0].get_parameter(name).shape
    WeightDelta({name: torch.ones(shape)}).save(folder / "delta.safetensors")
    monkeypatch.setattr(WeightDelta, "apply_", lambda *_: None)
    return Reference("second", str(zoo / "llama"), delta=str(folder / "delta.safetensors"))


def head_tied_again(zoo, folder, monkeypatch):
    model = Path(shutil.copytree(zoo / "llama", folder / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    read = checkpoint.read_model

    def wrong(folder, **settings):
        found = read(folder, **settings)
        if found.config.tie_word_embeddings:
            found.lm_head.weight = found.model.embed_tokens.weight
        return found

    monkeypatch.setattr(checkpoint, "read_model", wrong)
    return Reference("second", str(model))


KINDS = {
    "stale shards": stale_shards,
    "pissa": adapter_kind(init_lora_weights="pissa"),
    "olora": adapter_kind(init_lora_weights="olora"),
    "rslora": adapter_kind(use_rslora=True),
    "dora": adapter_kind(use_dora=True),
    "alpha of a module": adapter_kind(alpha_pattern={"down_proj": 1}),
    "adapter dropped": dropped(),
    "trained head dropped": dropped(modules_to_save=["lm_head"]),
    "adapter on the head dropped": dropped(target_modules=["lm_head"]),
    "delta left out": delta_left_out,
    "head tied again": head_tied_again,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_sees_a_checkpoint_that_is_put_together_otherwise(zoo, facts, tmp_path, monkeypatch, kind):
    references = [Reference("first", str(zoo / "llama")), KINDS[kind](zoo, tmp_path, monkeypatch)]
    rows = score_checkpoints(references, facts, tmp_path / "out", OPTIONS)
    failed = {row["checkpoint"]: row["error"] for row in rows if "error" in row}
    assert failed.keys() == {"second"}
    assert "get other log-probabilities from the hf engine than from a freshly loaded model" in failed["second"]


def test_the_gate_runs_once_for_every_way_of_loading(zoo, facts, tmp_path, monkeypatch):
    from retention_bench.scoring.checkpoints import batch

    asked = []
    check = batch.check_parity

    def counted(engine, name, *rest, **how):
        asked.append(name)
        return check(engine, name, *rest, **how)

    monkeypatch.setattr(batch, "check_parity", counted)
    base = str(zoo / "llama")
    references = [
        Reference("whole", base),
        Reference("tuned", str(zoo / "llama-tuned")),
        Reference("lora", base, adapter=adapter(zoo, tmp_path / "a")),
        Reference("scaled", base, adapter=adapter(zoo, tmp_path / "b", use_rslora=True)),
        Reference("lora again", base, adapter=adapter(zoo, tmp_path / "c")),
    ]
    rows = score_checkpoints(references, facts, tmp_path / "out", OPTIONS)
    assert not [row for row in rows if "error" in row]
    assert asked == ["whole", "lora", "scaled"]
    assert {row["checkpoint"]: row["parity"]["checkpoint"] for row in rows}["lora again"] == "lora"
