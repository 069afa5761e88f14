"""What makes a step faster on a GPU; on a CPU nothing of it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from retention_bench.models.kernels import fused_gelu


@contextlib.contextmanager
def faster_steps(model: Any, device: str) -> Iterator[None]:
    """For the time of a `with` block, a model's passes take a GPU's faster kernels; nothing happens on a CPU.

    The formulas stay the same, and so do the dtypes of weights and sums.

    Args:
        model: A causal language model. The rows that it is trained on are padded on the right.
        device: `"cpu"` or `"cuda"`.
    """
    with fused_gelu(model, device), contextlib.nullcontext() if device == "cpu" else _unmasked(model):
        yield


@contextlib.contextmanager
def _unmasked(model: Any) -> Iterator[None]:
    """In training the backbone sees no attention mask, and so takes the kernels that need none.

    What pads a row on the right comes after its tokens, which do not look ahead, and nothing reads what it gives. Who
    asks the model between two steps may pad on the left, and has it in eval mode: there the mask stays.
    """

    def without(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": None} if module.training else kwargs

    handle = model.base_model.register_forward_pre_hook(without, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
