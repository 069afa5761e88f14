"""What tells a covariance which model it belongs to: the model's mean keys on a fixed row of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retention_bench.models import frozen, record

TOLERANCE = 0.02
"""How far, relatively, a model's fingerprint may lie from the one that was kept with a covariance.

Measured on atlas-gpt2, atlas-llama and the tests' golden GPT-2 against the same weights in float32: bfloat16 0.001 to
0.005 (it grows with depth), float16 below 0.001, another attention kernel below 0.0001. Above the first layer, 20 steps
of fine-tuning at a learning rate of 2e-5 gave 0.014 to 0.65, one fact written by AlphaEdit 0.03 to 0.12, random weights
of the same shape over 1. A layer below everything that changed keeps its keys, so its covariance still holds.
"""

_TOKENS = 32  # token ids 1 to this, whatever they stand for, so that no tokenizer is needed


def key_fingerprint(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, Tensor]:
    """A model's mean keys on a fixed row of tokens; they tell models of one shape apart.

    Args:
        model: The model; it is left as it was found.
        layers: The layers.

    Returns:
        By layer [d_mlp], float32 on the CPU: the mean over the tokens 1 to 32, modulo the size of the vocabulary, or as
        many as the model has positions for.
    """
    length = min(_TOKENS, model.config.max_position_embeddings)
    ids = torch.arange(1, length + 1, device=model.device).remainder(model.config.vocab_size)[None]
    with frozen(model):
        keys, _ = record(model, ids, torch.ones_like(ids), keys=layers)
    return {layer: keys[layer][0].float().mean(0).cpu() for layer in layers}


def distance(found: Tensor, expected: Tensor) -> float:
    """The relative distance of two fingerprints of a layer; NaN where an entry of one is NaN."""
    return ((found - expected).norm() / expected.norm()).item()
