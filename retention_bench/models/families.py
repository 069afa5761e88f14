"""Where each model family keeps its blocks, its MLP down-projections, its final norm and its head.

Layers count from 0. "Projection" is the MLP's last linear map: its input is the key of the editing papers, its output
the value. GPT-2 stores its weight as (in, out), the Llama-like families as (out, in).
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retention_bench.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Family:
    """Module names of one family.

    Attributes:
        blocks: The list of blocks.
        projection: The MLP's down-projection, seen from its block.
        norm: The norm behind the last block.
        head: The map from hidden states to logits.
    """

    blocks: str
    projection: str
    norm: str
    head: str


_LLAMA = Family(blocks="model.layers", projection="mlp.down_proj", norm="model.norm", head="lm_head")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(blocks="transformer.h", projection="mlp.c_proj", norm="transformer.ln_f", head="lm_head"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def family(model_type: str) -> Family:
    """The module names of a family.

    Args:
        model_type: As in the model's `config.json`.

    Raises:
        UsageError: The family is not in the table; the message has the line that adds it.
    """
    if model_type not in FAMILIES:
        raise UsageError(
            f"Models of type {model_type!r} are not supported; supported are {', '.join(sorted(FAMILIES))}. To add the "
            "family, add a line to FAMILIES in retention_bench/models/families.py with its own module names: "
            f'"{model_type}": Family(blocks="model.layers", projection="mlp.down_proj", norm="model.norm", '
            'head="lm_head"),'
        )
    return FAMILIES[model_type]


def num_layers(model: PreTrainedModel) -> int:
    """The number of blocks."""
    return len(_blocks(model))


def block(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The block of a layer.

    Raises:
        UsageError: The model has no such layer.
    """
    blocks = _blocks(model)
    if not 0 <= layer < len(blocks):
        raise UsageError(f"There is no layer {layer}: the model has {len(blocks)} layers, 0 to {len(blocks) - 1}.")
    return blocks[layer]


def projection(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The MLP down-projection of a layer (a `Conv1D` or a `Linear`).

    Raises:
        UsageError: The model has no such layer.
    """
    return block(model, layer).get_submodule(family(model.config.model_type).projection)


def projection_name(model: PreTrainedModel, layer: int) -> str:
    """The full name of a layer's projection; its weight's is that plus `.weight`.

    Raises:
        UsageError: The model has no such layer.
    """
    block(model, layer)
    names = family(model.config.model_type)
    return f"{names.blocks}.{layer}.{names.projection}"


def is_in_out(linear: torch.nn.Module) -> bool:
    """Whether a projection stores its weight as (in, out), as `Conv1D` does, and not as (out, in)."""
    return isinstance(linear, Conv1D)


def key_size(model: PreTrainedModel, layer: int) -> int:
    """The size of a key, d_mlp: the input features of the layer's projection."""
    linear = projection(model, layer)
    rows, columns = linear.get_parameter("weight").shape
    return rows if is_in_out(linear) else columns


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """The norm behind the last block."""
    return model.get_submodule(family(model.config.model_type).norm)


def head(model: PreTrainedModel) -> torch.nn.Module:
    """The map from normed hidden states to logits."""
    return model.get_submodule(family(model.config.model_type).head)


def _blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    blocks = model.get_submodule(family(model.config.model_type).blocks)
    assert isinstance(blocks, torch.nn.ModuleList)
    return blocks
