"""What a model's own code computes, by faster kernels of a GPU; on a CPU nothing is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers.activations import GELUTanh, NewGELUActivation


@contextlib.contextmanager
def fused_gelu(model: torch.nn.Module, device: str) -> Iterator[None]:
    """For the time of a `with` block, one kernel in the place of the eight that GPT-2's and GPT-J's GELU takes.

    The formula is the same. In bfloat16 autocast, which cubes in float32, the eight keep so much for the gradient, and
    move so much, that at GPT-2 XL's shape they were half of a fine-tune's step.

    Args:
        model: The model.
        device: Where it runs; on `"cpu"` nothing happens, and numbers stay what they are to the last bit.
    """
    replaced = [
        (module, name, child)
        for module in (model.modules() if device != "cpu" else ())
        for name, child in module.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    try:
        for module, name, _ in replaced:
            setattr(module, name, GELUTanh())
        yield
    finally:
        for module, name, child in replaced:
            setattr(module, name, child)
