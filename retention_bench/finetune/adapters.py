"""LoRA and DoRA in the place of full fine-tuning, through peft, merged into the weights when the run is over."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from retention_bench.finetune import processes
from retention_bench.models import block, is_in_out, projection


@contextlib.contextmanager
def adapted(model: Any, kind: str, layers: Collection[int], *, rank: int, alpha: int, seed: int) -> Iterator[None]:
    """For the time of a `with` block a model trains adapters alone; at its end they are merged into the weights.

    An error leaves them merged as they are then; not so in one of several processes, which would wait for the others.

    Args:
        model: A causal language model; peft replaces modules in place and `requires_grad` is set.
        kind: `"none"` changes nothing.
        layers: Every linear map of these layers gets an adapter.
        rank: The rank r of the change.
        alpha: The change is scaled by alpha / r.
        seed: Seed of the adapters' first factors.
    """
    if kind == "none":
        yield
        return
    inside = {id(module) for layer in layers for module in block(model, layer).modules()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        use_dora=kind == "dora",
        target_modules=[
            name
            for name, module in model.named_modules()
            if id(module) in inside and isinstance(module, (torch.nn.Linear, Conv1D))
        ],
        fan_in_fan_out=is_in_out(projection(model, 0)),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    try:
        yield
    except BaseException:
        if processes.count() == 1:
            _merge(model)
        raise
    _merge(model)


def _merge(model: Any) -> None:
    for name, module in [*model.named_modules()]:
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=False)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    del model.peft_config  # injecting leaves it on the model
