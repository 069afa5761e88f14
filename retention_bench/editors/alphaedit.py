"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): write only in key directions that other knowledge hardly uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.locate.keys import SubjectStates
from retention_bench.editors.locate.residual import distribute_residual
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.locate.value import optimise_values
from retention_bench.editors.settings import Count, Layers, NonNegative, Positive
from retention_bench.models import WeightDelta, frozen


@dataclass(frozen=True)
class AlphaEdit:
    """Null-space constrained editing. Defaults are those its authors ship for GPT-2 XL, with the layers 13 to 17.

    Attributes:
        layers: Layers that are edited, ascending, counted from 0; the value is optimised at the last.
        edits_per_model: Facts written into one copy of the model; None for all.
        v_lr: Adam's learning rate for the value.
        v_num_grad_steps: Forward passes for the value, one more than updates.
        v_weight_decay: Factor of the penalty on the value's change.
        clamp_norm_factor: The value moves no farther than this times the block output's norm.
        kl_factor: Factor of the divergence at the subject.
        nullspace_threshold: Directions in which the covariance is below this, an absolute value, may be written to.
        L2: Ridge of the solve; the paper's formula has 1, its code 10.
    """

    layers: Layers
    edits_per_model: Count | None = None
    v_lr: Positive = 0.5
    v_num_grad_steps: Count = 20
    v_weight_decay: NonNegative = 0.5
    clamp_norm_factor: Positive = 0.75
    kl_factor: NonNegative = 0.0625
    nullspace_threshold: Positive = 2e-2
    L2: Positive = 10.0

    name: ClassVar[str] = "alphaedit"
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

        Earlier edits, whose keys are in `context.cache_c`, are preserved. Where there are any, the model is taken to
        carry them, and the covariance, which is the unedited model's, is compared with it by layers and sizes only.

        Raises:
            UsageError: No requests, no covariance or another model's, or a layer that the model lacks.
            RetentionBenchError: A loss is not finite; the fact is named.
        """
        check_requests(requests)
        covariance = context.required_covariance("AlphaEdit", model, self.layers)

        def solve(layer: int, keys: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            projector = covariance.projector(layer, self.nullspace_threshold, keys.device)
            return _solve(keys, residual, projector, self.L2, context.cache_c.get(layer))

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

    def update_cache(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> dict[int, Tensor]:
        """The keys that later edits shall preserve: those of earlier edits and those of these requests.

        Args:
            model: The model with the requests' edit applied.
            tokenizer: Its tokenizer.
            requests: What was edited.
            context: The edit's context.

        Returns:
            By layer [keys, d_mlp], float32 on the CPU, for the next edit's `EditContext.cache_c`.
        """
        with frozen(model):
            states = SubjectStates(model, tokenizer, requests, context.templates)
            fresh = {layer: states.mean_keys(layer) for layer in self.layers}
        return {
            layer: torch.cat([*([context.cache_c[layer]] if layer in context.cache_c else []), keys.cpu()])
            for layer, keys in fresh.items()
        }


def _solve(
    keys: Tensor, residual: Tensor, projector: Tensor, L2: float, cache_c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The change of one layer's weight, as factors.

    The paper's equation 14 asks for X in (P (K K' + M M') + L2 I) X = P K R', with the keys K and residuals R of the
    new facts and the keys M of earlier ones as columns. X lies in the span of P A, A = [K M], so with X = P A Y it is
    enough that (A' P A + L2 I) Y = [I; 0] R': a symmetric system of the size of the facts, and no d_mlp x d_mlp solve.

    Args:
        keys: K', [facts, d_mlp].
        residual: R', [facts, d_model].
        projector: P, float64 [d_mlp, d_mlp].
        L2: The ridge.
        cache_c: M', [earlier facts, d_mlp], or None.

    Returns:
        Two factors [d_mlp, facts] and [facts, d_model], whose product is X, in float64. Their rank is that of the new
        facts, however many earlier ones there are.
    """
    rows = keys.double()
    if cache_c is not None:
        rows = torch.cat([rows, cache_c.to(rows)])
    projected = projector @ rows.T
    system = rows @ projected + L2 * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    new = torch.eye(len(rows), len(keys), dtype=rows.dtype, device=rows.device)
    return projected @ torch.linalg.solve(system, new), residual.double()
