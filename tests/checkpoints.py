"""Checkpoints as people save them: a model's folder laid out in many ways, and adapters of many kinds for it.

What a checkpoint should answer is what transformers and peft themselves make of the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retention_bench.models.adapter import REPEATABLE

LINEAR = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
EMBEDDINGS = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["wte", "lm_head"]}


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that transformers loads from a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def family_of(folder: Path) -> str:
    """The model type of a folder: a key of `LINEAR` and `EMBEDDINGS`."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def configure(folder: Path, **settings: object) -> None:
    """Change settings in a folder's `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def plain(folder: Path) -> None:
    """As `save_pretrained` wrote it."""


def sharded(folder: Path) -> None:
    """Several files and an index."""
    theirs(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def sharded_and_whole(folder: Path) -> None:
    """A whole file beside the shards of an older save."""
    stale = load_file(folder / "model.safetensors")
    names = dict.fromkeys(stale, "model-00001-of-00001.safetensors")
    save_file({n: t * 0 for n, t in stale.items()}, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def half(folder: Path) -> None:
    """Stored in bfloat16."""
    theirs(folder, torch.bfloat16).save_pretrained(folder)


def float16(folder: Path) -> None:
    """Stored in float16."""
    theirs(folder, torch.float16).save_pretrained(folder)


def buffers(folder: Path) -> None:
    """With buffers that old versions of transformers saved."""
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def head_of_its_own(folder: Path) -> None:
    """With a head in the file that differs from the embeddings, whatever the configuration says about tying."""
    model = theirs(folder)
    head = torch.nn.Parameter(-model.get_input_embeddings().weight.detach() * 2)
    weights = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"} | {"lm_head.weight": head.data}
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def tied(folder: Path) -> None:
    """The head is the embeddings, by the configuration and in the file."""
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if n != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    configure(folder, tie_word_embeddings=True)


def untied(folder: Path) -> None:
    """The head is not the embeddings, by the configuration and in the file."""
    head_of_its_own(folder)
    configure(folder, tie_word_embeddings=False)


LAYOUTS: list[Callable[[Path], None]] = [
    *(plain, sharded, sharded_and_whole, half, float16, buffers, head_of_its_own, tied, untied)
]

KINDS: dict[str, dict[str, object]] = {
    **{f"init-{initial}": {"init_lora_weights": initial} for initial in REPEATABLE if initial is not None},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"0.*c_proj": 2, "down_proj": 3}, "alpha_pattern": {"c_attn": 9, "^.*q_proj": 1}},
    "one-layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ".*0.*"},
    "head": {"modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
}
"""Settings of a LoRA adapter on `LINEAR`, all of kinds that peft can put on a base again."""


def lora(base: Path, **settings: object) -> LoraConfig:
    """The configuration of a LoRA adapter for a base model."""
    family = family_of(base)
    targets = {"target_modules": LINEAR[family], "fan_in_fan_out": family == "gpt2"}
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **targets, **settings})


def perturb(model: Any, scale: float = 0.2) -> Any:
    """Change what can be trained, as training would; the same change each time."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_adapter(base: Path, folder: Path, config: Any) -> Path:
    """Train and save an adapter."""
    torch.manual_seed(5)
    perturb(get_peft_model(theirs(base), config)).save_pretrained(folder)
    return folder


def make_adapter_with_vocabulary(base: Path, folder: Path, added: int, *, saved: bool) -> Any:
    """Save an adapter that was trained after tokens were added to the base, or taken away; returns what was trained.

    Args:
        base: The base model.
        folder: Where the adapter goes.
        added: How many tokens were added.
        saved: Whether embeddings and head are in `modules_to_save`.
    """
    model = theirs(base)
    model.resize_token_embeddings(model.config.vocab_size + added)
    torch.manual_seed(5)
    tuned = perturb(get_peft_model(model, lora(base, modules_to_save=EMBEDDINGS[family_of(base)] if saved else None)))
    tuned.save_pretrained(folder, save_embedding_layers=True)
    return tuned.eval()


GENERATION: dict[str, dict[str, object]] = {
    "no-sampling": {"temperature": 0.9, "top_p": 0.6},  # Llama 2, Vicuna
    "sampling-off": {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"early_stopping": True, "length_penalty": 2.0},
    "ends": {"eos_token_id": [0, 5]},
    "penalty": {"repetition_penalty": 1.1},
}
"""What a `generation_config.json` may say without changing an answer up to its first content token."""
