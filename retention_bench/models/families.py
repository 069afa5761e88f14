"""Where each model family keeps its blocks and its MLP down-projections.

Layers count from 0. "Projection" is the MLP's last linear map: its input is the key of the editing papers, its output
the value. GPT-2 stores its weight as (in, out), all others as (out, in).
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
        tuples: Whether a block returns a tuple with the hidden state in front, and not the hidden state alone.
    """

    blocks: str
    projection: str
    tuples: bool = False


_LLAMA = Family("model.layers", "mlp.down_proj")

FAMILIES: dict[str, Family] = {
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Family("transformer.h", "mlp.c_proj"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "gptj": Family("transformer.h", "mlp.fc_out", tuples=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "phi": Family("model.layers", "mlp.fc2"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By `model_type`. Pythia is a GPT-NeoX. Gemma 2 and 3 and OLMo 2 put a norm between the MLP and the residual stream,
which no editor's formula knows of: what an edit adds is normed there like all that the MLP puts out."""


def family(model_type: str) -> Family:
    """The module names of a family.

    Args:
        model_type: As in the model's `config.json`.

    Raises:
        UsageError: The family is not in the table; the message has the two lines that add it.
    """
    if model_type not in FAMILIES:
        raise UsageError(
            f"Models of type {model_type!r} are not supported; supported are {', '.join(sorted(FAMILIES))}. Two lines "
            "add a family, with its own module names and sizes. In FAMILIES, retention_bench/models/families.py:\n"
            f'    "{model_type}": Family("model.layers", "mlp.down_proj"),\n'
            "and in SIZES, tests/conftest.py, with which it is tested on a tiny random model:\n"
            f'    "{model_type}": {{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, '
            '"num_attention_heads": 2},'
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


def mlp(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The MLP of a layer, whose last part is the projection.

    Raises:
        UsageError: The model has no such layer.
    """
    return block(model, layer).get_submodule(family(model.config.model_type).projection.rpartition(".")[0])


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


def _blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    blocks = model.get_submodule(family(model.config.model_type).blocks)
    assert isinstance(blocks, torch.nn.ModuleList)
    return blocks
