"""FT: fine-tune one layer's MLP down-projection on the new facts (EDITORS "6"; the baseline of ROME, appendix E.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.settings import Count, Layer, NonNegative, Positive
from retention_bench.editors.subject import check_requests, target_ids
from retention_bench.errors import RetentionBenchError
from retention_bench.models import WeightDelta, frozen, log_probabilities, pad, projection, projection_name


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
        objective: `"target"` is the cross-entropy of the target's tokens, each after those before it. `"prompt_last"`
            is the reference's: every token of the target is trained to follow the prompt directly, which is wrong for
            more than one.
        norm_constraint: No number moves farther than this from where it was (FT-L); None for no limit.
        batch_size: Facts a step.
    """

    edits_per_model: Count | None = 1
    layer: Layer = 1
    lr: Positive = 5e-5
    num_steps: Count = 25
    weight_decay: NonNegative = 0.0
    stop_loss: NonNegative = 1e-2
    objective: Literal["target", "prompt_last"] = "target"
    norm_constraint: Positive | None = None
    batch_size: Count = 128

    name: ClassVar[str] = "ft"
    statistics_layers: ClassVar[tuple[int, ...]] = ()
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
        optimizer = torch.optim.Adam(trained.values(), lr=self.lr, weight_decay=self.weight_decay)
        rows = [_row(tokenizer, request, self.objective) for request in requests]
        with frozen(model):
            for step in range(self.num_steps):
                total = 0.0
                for start in range(0, len(rows), self.batch_size):
                    chunk = slice(start, start + self.batch_size)
                    losses = _losses(
                        model, {name: weight.to(model.dtype) for name, weight in trained.items()}, rows[chunk]
                    )
                    _check_finite(losses, requests[chunk])
                    loss = losses.mean()
                    total += loss.item() * len(losses)
                    if loss.item() >= self.stop_loss:
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        self._constrain(trained, before)
                context.progress("FT", step + 1, self.num_steps, {"loss": total / len(rows)})
                if total / len(rows) < self.stop_loss:
                    break
        return WeightDelta({name: trained[name].detach() - before[name] for name in trained})

    @torch.no_grad()
    def _constrain(self, trained: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        if self.norm_constraint is not None:
            for name, weight in trained.items():
                weight.clamp_(before[name] - self.norm_constraint, before[name] + self.norm_constraint)


def _row(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, objective: str
) -> tuple[list[int], list[int], list[int]]:
    """A request's token ids, the positions that are trained, and what each shall predict."""
    prompt = tokenizer.encode(request.prompt.replace("{}", request.subject))
    target = target_ids(tokenizer, request)
    if objective == "prompt_last":
        return prompt, [len(prompt) - 1] * len(target), target
    return prompt + target[:-1], [len(prompt) - 1 + j for j in range(len(target))], target


def _losses(
    model: PreTrainedModel, weights: dict[str, Tensor], rows: Sequence[tuple[list[int], list[int], list[int]]]
) -> Tensor:
    """Every row's mean -log p over its target tokens [rows], with `weights` in the place of the model's."""
    ids, mask = pad([row[0] for row in rows], model.device)
    base, prefix = model.base_model, f"{model.base_model_prefix}."
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    inner = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    hidden = torch.func.functional_call(base, inner, kwargs=inputs).last_hidden_state
    losses = []
    for row, (_, positions, targets) in enumerate(rows):
        predicted = log_probabilities(model, hidden[row, positions])
        losses.append(-predicted[range(len(targets)), targets].mean())
    return torch.stack(losses)


def _check_finite(losses: Tensor, requests: Sequence[EditRequest]) -> None:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RetentionBenchError(
            f"Fact {requests[bad[0]].fact_id!r}: the loss became {losses[bad[0]]:g} during FT. Lower lr, and check "
            "that the model's own weights are finite."
        )
