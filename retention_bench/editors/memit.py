"""MEMIT: many facts in one least-squares solve per layer, weighed against the keys of text (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.locate.linalg import cholesky
from retention_bench.editors.locate.residual import distribute_residual
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.locate.value import optimise_values
from retention_bench.editors.settings import Count, Layers, NonNegative, Positive
from retention_bench.models import WeightDelta, frozen


@dataclass(frozen=True)
class MEMIT:
    """Mass-editing memory. Defaults are those its authors ship for GPT-2 XL, with the layers 13 to 17.

    Attributes:
        layers: Layers that are edited, ascending, counted from 0; the value is optimised at the last.
        edits_per_model: Facts written into one copy of the model; None for all. The paper on retention has 10.
        v_lr: Adam's learning rate for the value.
        v_num_grad_steps: Forward passes for the value, one more than updates.
        v_weight_decay: Factor of the penalty on the value's change.
        clamp_norm_factor: The value moves no farther than this times the block output's norm.
        kl_factor: Factor of the divergence at the subject.
        mom2_update_weight: lambda, the covariance's weight: it counts as this many keys of text against the edits' own.
    """

    layers: Layers
    edits_per_model: Count | None = 10
    v_lr: Positive = 0.5
    v_num_grad_steps: Count = 20
    v_weight_decay: NonNegative = 0.5
    clamp_norm_factor: Positive = 0.75
    kl_factor: NonNegative = 0.0625
    mom2_update_weight: Positive = 20_000.0

    name: ClassVar[str] = "memit"
    template_lengths: ClassVar[tuple[int, ...]] = (10,)

    @property
    def covariance_layers(self) -> tuple[int, ...]:
        """All edited layers."""
        return self.layers

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Write all requests with one solve per layer; see `Editor.edit`. The delta has low rank.

        Raises:
            UsageError: No requests, no covariance or another model's, or a layer that the model lacks.
            RetentionBenchError: A loss is not finite (the fact is named), or the covariance is singular.
        """
        check_requests(requests)
        covariance = context.required_covariance("MEMIT", model, self.layers)

        def solve(layer: int, keys: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            # MEMIT, equation 14, with keys K and residuals R as columns: X = (lambda C + K K')^-1 K R'.
            wide = keys.double()
            system = self.mom2_update_weight * covariance.mom2[layer].to(wide) + wide.T @ wide
            return torch.cholesky_solve(wide.T, cholesky(system, layer)), residual.double()

        with frozen(model):
            values = optimise_values(
                model,
                tokenizer,
                requests,
                context.templates,
                self.layers[-1],
                site="block",
                lr=self.v_lr,
                steps=self.v_num_grad_steps,
                weight_decay=self.v_weight_decay,
                clamp_norm_factor=self.clamp_norm_factor,
                kl_factor=self.kl_factor,
                progress=context.progress,
            )
            return distribute_residual(model, tokenizer, requests, context, self.layers, values, solve)
