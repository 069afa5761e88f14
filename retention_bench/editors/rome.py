"""ROME: one fact, one rank-one change of one layer (Meng et al. 2022); and R-ROME (Gupta et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.locate.keys import SubjectStates
from retention_bench.editors.locate.linalg import cholesky
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.locate.value import optimise_values
from retention_bench.editors.settings import Count, Layer, NonNegative, Positive
from retention_bench.errors import RetentionBenchError
from retention_bench.models import LowRank, WeightDelta, frozen, is_in_out, projection, projection_name, restoring


@dataclass(frozen=True)
class ROME:
    """Rank-one model editing. Defaults are those its authors ship for GPT-2 XL, with layer 17.

    The mean key over a fact's prompts and contexts, equally weighted, gives the direction u of the change; the
    change maps the key k* to the value v* exactly. ROME takes the bare prompt's key as k*, another one than
    in u, which makes the change large where the two differ much (R-ROME's "disabling edits").

    Attributes:
        layer: The layer, counted from 0.
        edits_per_model: Facts written into one copy of the model, one after the other; None for all.
        v_lr: Adam's learning rate for the value.
        v_num_grad_steps: Forward passes for the value, one more than updates.
        v_weight_decay: Factor of the penalty on the value's change.
        clamp_norm_factor: The value moves no farther than this times the MLP output's norm.
        kl_factor: Factor of the divergence at the subject.
        mom2_adjustment: Whether u is multiplied by the inverse of the keys' covariance; EasyEdit ships `False`.
        variant: `"rome"`; `"r-rome"`, where k* is the mean key too; or `"r-rome-prompt"`, where both are the bare key.
    """

    layer: Layer
    edits_per_model: Count | None = 1
    v_lr: Positive = 0.5
    v_num_grad_steps: Count = 20
    v_weight_decay: NonNegative = 0.5
    clamp_norm_factor: Positive = 4.0
    kl_factor: NonNegative = 0.0625
    mom2_adjustment: bool = True
    variant: Literal["rome", "r-rome", "r-rome-prompt"] = "rome"

    name: ClassVar[str] = "rome"
    template_lengths: ClassVar[tuple[int, ...]] = (5, 5, 10, 10)

    @property
    def covariance_layers(self) -> tuple[int, ...]:
        """The edited layer, if u is multiplied by the inverse."""
        return (self.layer,) if self.mom2_adjustment else ()

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Write request after request, each into the model that the earlier ones left; see `Editor.edit`.

        The delta's rank is the number of requests.

        Raises:
            UsageError: No requests, no covariance or another model's, or a layer that the model lacks.
            RetentionBenchError: A loss or a change is not finite (the fact is named), or the covariance is singular.
        """
        check_requests(requests)
        linear = projection(model, self.layer)
        factor = None
        if self.mom2_adjustment:
            # Once for all requests: the covariance stays that of the unedited model.
            C = context.required_covariance("ROME", model, (self.layer,)).mom2[self.layer]
            factor = cholesky(C.to(model.device, torch.float64), self.layer)
        name = f"{projection_name(model, self.layer)}.weight"
        lefts, rights = [], []
        with frozen(model), restoring(model, [name]):
            for done, request in enumerate(requests):
                [value] = optimise_values(
                    model,
                    tokenizer,
                    [request],
                    context.templates,
                    self.layer,
                    site="mlp",
                    lr=self.v_lr,
                    steps=self.v_num_grad_steps,
                    weight_decay=self.v_weight_decay,
                    clamp_norm_factor=self.clamp_norm_factor,
                    kl_factor=self.kl_factor,
                    progress=context.progress,
                )
                [keys] = SubjectStates(model, tokenizer, [request], context.templates).keys(self.layer)
                left, right = self._rank_one(keys, value, linear, factor)
                if not (left.isfinite().all() and right.isfinite().all()):
                    raise RetentionBenchError(
                        f"Fact {request.fact_id!r}: its change is not finite, since its key is orthogonal to the "
                        "direction of the change. Leave the fact out, or take the variant r-rome."
                    )
                if not is_in_out(linear):
                    left, right = right.T, left.T
                step = WeightDelta({name: LowRank(left, right)})
                step.apply_(model)
                lefts.append(left)
                rights.append(right)
                context.progress("ROME", done + 1, len(requests), {"norm": step.norms()[name]})
        return WeightDelta({name: LowRank(torch.cat(lefts, 1), torch.cat(rights, 0))})

    def _rank_one(
        self, keys: Tensor, value: Tensor, linear: torch.nn.Module, factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The factors u [d_mlp, 1] and (v* - W k*) / (k* . u) [1, d_model], in float64 (ROME, equation 2).

        Args:
            keys: The request's keys [prompts, 1 + templates, d_mlp], float32; the bare prompt is first.
            value: v* [d_model], float32.
            linear: The projection.
            factor: Cholesky factor of the keys' covariance, or None to leave it out.
        """
        bare, mean = keys[0, 0], keys.flatten(0, 1).mean(0)
        towards = bare if self.variant == "r-rome-prompt" else mean
        key = mean if self.variant == "r-rome" else bare
        direction = towards.double()
        if factor is not None:
            direction = torch.cholesky_solve(direction[:, None], factor)[:, 0]
        direction = direction / direction.norm()
        # The output at a mean of keys is the mean of their outputs; the bias is part of it, as it is of v*.
        reached = linear(key.to(linear.get_parameter("weight").dtype)).double()
        return direction[:, None], ((value.double() - reached) / (key.double() @ direction))[None]
