"""LoRA: train low-rank adapters on the new facts with peft, and merge them (Hu et al. 2022, arXiv 2106.09685)."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.finetune_loop import finetune_loop
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.settings import Count, Layers, NonNegative, Positive, Rank
from retention_bench.models import (
    LowRank,
    WeightDelta,
    block,
    frozen,
    is_in_out,
    last_hidden,
    num_layers,
    projection,
    projection_name,
)

_ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """AdamW on peft's LoRA adapters until the loss is low. Rank and learning rate are those EasyEdit ships.

    A request's loss is the mean over its prompt and paraphrases of the mean -log p over its target's tokens, each given
    the tokens before it.

    Attributes:
        layers: Layers with adapters, ascending, counted from 0; None for all.
        modules: `"projection"` adapts the MLP down-projections, `"all-linear"` every linear map of the layers.
        r: The adapters' rank.
        lora_alpha: The adapters' product is scaled by this over `r`.
        lora_dropout: Share of an adapter's inputs that are dropped in training.
        lr: AdamW's learning rate.
        num_steps: Passes over the facts at most.
        weight_decay: AdamW's decay of the factors.
        stop_loss: No step is taken on a batch whose loss is below this, and a pass whose mean is below it is the last.
        batch_size: Facts in a step, each with all its prompts.
        edits_per_model: Facts written into one copy of the model; None for all.
    """

    layers: Layers | None = None
    modules: Literal["projection", "all-linear"] = "projection"
    r: Rank = 8
    lora_alpha: Count = 16
    lora_dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    lr: Positive = 5e-3
    num_steps: Count = 25
    weight_decay: NonNegative = 0.0
    stop_loss: NonNegative = 1e-2
    batch_size: Count = 128
    edits_per_model: Count | None = 1

    name: ClassVar[str] = "lora"
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Train on all requests; see `Editor.edit`. The delta has the adapters' rank.

        The adapters' first factors, and what dropout drops, are drawn from `context.generator`.

        Raises:
            UsageError: No requests, or the model has no such layer.
            RetentionBenchError: A loss is not finite; the fact is named.
        """
        check_requests(requests)
        with frozen(model), _seeded(model, context.generator):
            adapted = self._adapted(model)
            adapters = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
            trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
            for adapter in adapters.values():
                adapter.lora_dropout.train()  # the model's own dropout stays off
            finetune_loop(
                adapted,
                tokenizer,
                requests,
                torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay),
                functools.partial(last_hidden, adapted),
                name="LoRA",
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                stop_loss=self.stop_loss,
                progress=context.progress,
            )
        return WeightDelta({f"{name}.weight": _merged(adapter) for name, adapter in adapters.items()})

    def _adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the model with adapters: its modules are its own, its weights are the model's."""
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(model),
            fan_in_fan_out=is_in_out(projection(model, 0)),
        )
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        twin: Any = copy.deepcopy(model, shared)
        inject_adapter_in_model(config, twin, _ADAPTER)  # the adapters of a model in half precision are in float32
        return twin

    def _targets(self, model: PreTrainedModel) -> list[str]:
        """Full names of the modules that get an adapter.

        Raises:
            UsageError: The model has no such layer.
        """
        layers = range(num_layers(model)) if self.layers is None else self.layers
        if self.modules == "projection":
            return [projection_name(model, layer) for layer in layers]
        inside = {id(module) for layer in layers for module in block(model, layer).modules()}
        return [
            name
            for name, module in model.named_modules()
            if id(module) in inside and isinstance(module, (torch.nn.Linear, Conv1D))
        ]


def _merged(adapter: LoraLayer) -> LowRank:
    """What peft's `get_delta_weight` would add to the weight, as factors in the orientation that it is stored in."""
    left = adapter.lora_B[_ADAPTER].get_parameter("weight").detach() * adapter.scaling[_ADAPTER]  # [d_out, r]
    right = adapter.lora_A[_ADAPTER].get_parameter("weight").detach()  # [r, d_in]
    return LowRank(right.T, left.T) if is_in_out(adapter.get_base_layer()) else LowRank(left, right)


@contextlib.contextmanager
def _seeded(model: PreTrainedModel, generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's global generators, which peft draws from, follow ours; on the way out they are as they were."""
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    devices = range(torch.cuda.device_count()) if model.device.type == "cuda" else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
