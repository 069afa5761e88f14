"""FT: fine-tune one layer's MLP down-projection on the new facts (the baseline of ROME, appendix E.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.finetune_loop import Objective, finetune_loop
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.settings import Count, Layer, NonNegative, Positive
from retention_bench.models import WeightDelta, frozen, last_hidden, projection, projection_name


@dataclass(frozen=True)
class FT:
    """Adam on the weight and bias of one projection until the loss is low. Defaults are the paper's.

    Attributes:
        edits_per_model: Facts written into one copy of the model; None for all.
        layer: The layer, counted from 0.
        lr: Adam's learning rate.
        num_steps: Passes over the facts at most.
        weight_decay: Adam's L2 penalty.
        stop_loss: No step is taken on a batch whose loss is below this, and a pass whose mean is below it is the last.
        objective: What is minimised, see `Objective`; a request's loss is the mean over its prompt and paraphrases.
        norm_constraint: No parameter moves farther than this from its value before (FT-L); None for no limit.
        batch_size: Facts in a step, each with all its prompts.
    """

    edits_per_model: Count | None = 1
    layer: Layer = 1
    lr: Positive = 5e-5
    num_steps: Count = 25
    weight_decay: NonNegative = 0.0
    stop_loss: NonNegative = 1e-2
    objective: Objective = "target"
    norm_constraint: Positive | None = None
    batch_size: Count = 128

    name: ClassVar[str] = "ft"
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Fine-tune on all requests; see `Editor.edit`. The delta is dense.

        Raises:
            UsageError: No requests, or the model has no such layer.
            RetentionBenchError: A loss is not finite; the fact is named.
        """
        check_requests(requests)
        prefix = f"{projection_name(model, self.layer)}."
        # What is trained are copies in float32, put in the place of the model's own weights for each pass. So the model
        # never changes, and steps that are too small for half precision still add up.
        before = {prefix + name: p.detach().float() for name, p in projection(model, self.layer).named_parameters()}
        trained = {name: weight.clone().requires_grad_() for name, weight in before.items()}

        def hidden(ids: Tensor, mask: Tensor) -> Tensor:
            weights = {name: weight.to(model.dtype) for name, weight in trained.items()}
            return last_hidden(model, ids, mask, weights=weights)

        with frozen(model):
            finetune_loop(
                model,
                tokenizer,
                requests,
                torch.optim.Adam(trained.values(), lr=self.lr, weight_decay=self.weight_decay),
                hidden,
                name="FT",
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                stop_loss=self.stop_loss,
                progress=context.progress,
                objective=self.objective,
                after_step=lambda: self._constrain(trained, before),
            )
        return WeightDelta({name: trained[name].detach() - before[name] for name in trained})

    @torch.no_grad()
    def _constrain(self, trained: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        if self.norm_constraint is not None:
            for name, weight in trained.items():
                weight.clamp_(before[name] - self.norm_constraint, before[name] + self.norm_constraint)
