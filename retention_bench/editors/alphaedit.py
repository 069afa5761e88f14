"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): write only along directions that other knowledge does not use."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.keys import block_outputs, mean_keys
from retention_bench.editors.settings import Count, Layer, NonNegative, Positive
from retention_bench.editors.statistics import KeyStatistics, null_space_projector
from retention_bench.editors.subject import check_requests
from retention_bench.editors.value import optimise_values
from retention_bench.errors import UsageError
from retention_bench.models import LowRank, WeightDelta, frozen, is_in_out, projection, projection_name


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError("Layers should ascend, each once")
    return layers


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
        nullspace_threshold: Directions whose mean second moment is below this, an absolute number, may be written to.
        L2: Ridge of the solve; the paper's formula has 1, its code 10.
    """

    layers: Annotated[tuple[Layer, ...], Field(min_length=1), AfterValidator(_ascending)]
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
    def statistics_layers(self) -> tuple[int, ...]:
        """All edited layers."""
        return self.layers

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Write all requests in one solve a layer; see `Editor.edit`. The delta has low rank.

        Keys in `context.remembered` are kept from being written over; where there are any, the model is taken to carry
        their edits, and the statistics, the unedited model's, are compared with it by layers and sizes only.

        Raises:
            UsageError: No requests, no statistics or those of another model, or a layer that the model lacks.
            RetentionBenchError: A loss is not finite; the fact is named.
        """
        check_requests(requests)
        statistics = self._statistics(model, context)
        delta = WeightDelta({})
        with frozen(model), contextlib.ExitStack() as edits:
            values = optimise_values(
                model,
                tokenizer,
                requests,
                context.templates,
                self.layers[-1],
                lr=self.v_lr,
                steps=self.v_num_grad_steps,
                weight_decay=self.v_weight_decay,
                clamp_norm_factor=self.clamp_norm_factor,
                kl_factor=self.kl_factor,
                progress=context.progress,
            )
            for done, layer in enumerate(self.layers):
                keys = mean_keys(model, tokenizer, requests, context.templates, [layer])[layer]
                reached = block_outputs(model, tokenizer, requests, self.layers[-1])
                # What is missing is spread evenly over the layers that are still to come.
                residual = (values - reached) / (len(self.layers) - done)
                projector = null_space_projector(statistics.moments[layer].to(keys.device), self.nullspace_threshold)
                left, right = _solve(keys, residual, projector, self.L2, context.remembered.get(layer))
                if not is_in_out(projection(model, layer)):
                    left, right = right.T, left.T
                step = WeightDelta({f"{projection_name(model, layer)}.weight": LowRank(left, right)})
                edits.enter_context(step.applied(model))
                delta += step
                context.progress(
                    "AlphaEdit layers", done + 1, len(self.layers), {"residual": float(residual.norm(dim=1).mean())}
                )
        return delta

    def edit_sequentially(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batches: Iterable[Sequence[EditRequest]],
        context: EditContext,
    ) -> list[WeightDelta]:
        """Edit batch after batch, each on top of those before and keeping off their keys; the model is left as it was.

        Args:
            model: The unedited model.
            tokenizer: Its tokenizer.
            batches: The requests of each edit.
            context: As for `edit`; its statistics are the unedited model's.

        Returns:
            A delta a batch; their sum edits the unedited model.

        Raises:
            RetentionBenchError: As `edit`.
        """
        deltas = []
        with contextlib.ExitStack() as edits:
            for requests in batches:
                delta = self.edit(model, tokenizer, requests, context)
                edits.enter_context(delta.applied(model))
                context = dataclasses.replace(context, remembered=self.remember(model, tokenizer, requests, context))
                deltas.append(delta)
        return deltas

    def remember(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> dict[int, Tensor]:
        """The keys that edits from now on shall keep: those remembered so far and those of these requests.

        Args:
            model: The model with the requests' edit applied.
            tokenizer: Its tokenizer.
            requests: What was edited.
            context: The edit's context.

        Returns:
            By layer [keys, d_mlp], float32 on the CPU, to be handed to the next edit as `EditContext.remembered`.
        """
        with frozen(model):
            fresh = mean_keys(model, tokenizer, requests, context.templates, self.layers)
        return {
            layer: torch.cat([*([context.remembered[layer]] if layer in context.remembered else []), keys.cpu()])
            for layer, keys in fresh.items()
        }

    def _statistics(self, model: PreTrainedModel, context: EditContext) -> KeyStatistics:
        if context.statistics is None:
            raise UsageError(
                f"AlphaEdit needs the key statistics of layers {list(self.layers)}. "
                "Make them with collect_key_statistics and put them into the EditContext."
            )
        # Keys remembered from earlier edits say that the model carries those, which its statistics know nothing of.
        context.statistics.check(model, self.layers, edited=bool(context.remembered))
        return context.statistics


def _solve(
    keys: Tensor, residual: Tensor, projector: Tensor, L2: float, remembered: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The change of one layer's weight, as factors.

    The paper's equation 14 asks for X in (P (K K' + M M') + L2 I) X = P K R', with the keys K and residuals R of the
    new facts and the keys M of earlier ones as columns. X lies in the span of P A, A = [K M], so with X = P A Y it is
    enough that (A' P A + L2 I) Y = [R'; 0]: a symmetric system with an unknown a fact, and no d_mlp x d_mlp solve.

    Args:
        keys: K', [facts, d_mlp].
        residual: R', [facts, d_model].
        projector: P, float64 [d_mlp, d_mlp].
        L2: The ridge.
        remembered: M', [earlier facts, d_mlp], or None.

    Returns:
        P A [d_mlp, rank] and Y [rank, d_model], whose product is X, in float64.
    """
    rows = keys.double()
    wanted = residual.double()
    if remembered is not None:
        rows = torch.cat([rows, remembered.to(rows)])
        wanted = torch.cat([wanted, wanted.new_zeros(len(remembered), wanted.shape[1])])
    projected = projector @ rows.T
    system = rows @ projected + L2 * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return projected, torch.linalg.solve(system, wanted)
