"""The value z that makes a model say a new object: MEMIT's and AlphaEdit's `compute_z`, for all facts at once.

For a fact with subject s, delta is added to the block output of layer L at the last token of s, and fitted by Adam:

    loss = mean over templates of -log p(target | context, prompt) / |target|
         + kl_factor * KL(p_new || p_old) at the last token of s in "{s} is a"
         + weight_decay * |delta| / |h|^2,        h = the block output itself, in the bare prompt

Source: MEMIT, equation 16, in the form that its code's `compute_z` and AlphaEdit's share. What differs here is only how
it is computed: facts share a batch, each with its own Adam state; the blocks up to L run once, since delta cannot reach
them; logits are made only where the loss reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditRequest
from retention_bench.editors.subject import context_rows, subject_rows, target_ids
from retention_bench.errors import RetentionBenchError
from retention_bench.models import hidden_from, log_probabilities, pad, record
from retention_bench.progress import Progress, silent

STOP_LOSS = 5e-2
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults, as in the reference


def optimise_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    layer: int,
    *,
    lr: float,
    steps: int,
    weight_decay: float,
    clamp_norm_factor: float,
    kl_factor: float,
    max_rows: int = 64,
    progress: Progress = silent,
) -> Tensor:
    """Optimise every request's value on a frozen model.

    Args:
        model: The model; call this inside `frozen(model)`.
        tokenizer: Its tokenizer.
        requests: The requests.
        templates: Context templates without the bare `"{}"`.
        layer: The layer L whose block output is optimised.
        lr: Adam's learning rate.
        steps: Forward passes; there is one update fewer, the last pass only reads the loss.
        weight_decay: Factor of the norm penalty.
        clamp_norm_factor: delta is kept no longer than this times |h|.
        kl_factor: Factor of the divergence.
        max_rows: Sequences that share a batch; bounds the memory, a fact has 2 + templates of them.
        progress: Told the forward passes done and the mean loss.

    Returns:
        z = h + delta, [requests, d_model] in float32 on the model's device.

    Raises:
        RetentionBenchError: A loss is not finite; the fact is named.
        UsageError: The model has no such layer.
    """
    per_batch = max(1, max_rows // (2 + len(templates)))
    values = []
    for start in range(0, len(requests), per_batch):
        batch = _Batch.of(model, tokenizer, requests[start : start + per_batch], templates, layer)
        norms = batch.initial.norm(dim=1)
        delta = torch.zeros_like(batch.initial)
        mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
        old_kl: Tensor | None = None
        active = torch.arange(len(delta), device=delta.device)
        for step in range(1, steps + 1):
            part = batch.take(active)
            moved = delta[active].requires_grad_()
            nll, new_kl = part.forward(model, layer, moved)
            if old_kl is None:
                old_kl = new_kl.detach()
            # KL(p_new || p_old): the references hand F.kl_div its arguments in this order.
            kl = (new_kl.exp() * (new_kl - old_kl[active])).sum(1)
            decay = moved.norm(dim=1) / norms[active] ** 2
            loss = nll + kl_factor * kl + weight_decay * decay
            _check_finite(loss, part.requests)
            progress(
                "value optimisation",
                start * steps + step * len(delta),
                len(requests) * steps,
                {"loss": float(loss.detach().mean())},
            )
            going = loss.detach() >= STOP_LOSS
            if step == steps or not going.any():
                break
            gradient = torch.autograd.grad(loss.sum(), moved)[0][going]
            active = active[going]
            mean[active] = _BETA1 * mean[active] + (1 - _BETA1) * gradient
            square[active] = _BETA2 * square[active] + (1 - _BETA2) * gradient**2
            # All facts in the batch begin together, so they share the step that Adam's bias correction counts.
            scale = square[active].sqrt() / (1 - _BETA2**step) ** 0.5 + _EPSILON
            updated = delta[active] - lr / (1 - _BETA1**step) * mean[active] / scale
            length, longest = updated.norm(dim=1), clamp_norm_factor * norms[active]
            delta[active] = torch.where(length > longest, longest / length, 1.0)[:, None] * updated
        values.append(batch.initial + delta)
        progress("value optimisation", min(start + per_batch, len(requests)) * steps, len(requests) * steps)
    return torch.cat(values)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Facts optimised together: F facts, R = 2 + templates rows each (the KL row last), S tokens, J target tokens.

    Attributes:
        requests: The facts.
        ids: [F, R, S].
        mask: [F, R, S].
        subject: Index of the subject's last token [F, R].
        positions: Where each target token is predicted [F, R - 1, J].
        targets: Ids of the target's tokens, padded with 0 [F, J].
        weights: What each target token's -log p counts, 0 where it is padding [F, J].
        output: Block outputs of the layer without delta [F, R, S, d_model].
        initial: The block output at the subject in the bare prompt, float32 [F, d_model].
    """

    requests: Sequence[EditRequest]
    ids: Tensor
    mask: Tensor
    subject: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    output: Tensor
    initial: Tensor

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        templates: Sequence[str],
        layer: int,
    ) -> _Batch:
        """Tokenise the facts' rows and run them up to the layer."""
        device = model.device
        prompts = context_rows(tokenizer, templates, requests)
        kl_rows = subject_rows(tokenizer, ["{} is a"] * len(requests), requests)
        targets = [target_ids(tokenizer, request) for request in requests]
        longest = max(len(target) for target in targets)
        rows, positions = [], []
        for group, kl_row, target in zip(prompts, kl_rows, targets, strict=True):
            # Ids are joined, not texts, so that the labels stand where they should under any tokenizer. The padding's
            # position repeats the last token's; its weight is 0.
            rows += [[*row.ids, *target[:-1]] for row in group] + [list(kl_row.ids)]
            steps = [min(j, len(target) - 1) for j in range(longest)]
            positions.append([[len(row.ids) - 1 + j for j in steps] for row in group])
        ids, mask = pad(rows, device)
        _, output = record(model, ids, mask, output=layer)
        assert output is not None
        shape = (len(requests), 2 + len(templates))
        output = output.unflatten(0, shape)
        subject = torch.tensor(
            [[row.subject for row in [*group, kl]] for group, kl in zip(prompts, kl_rows, strict=True)], device=device
        )
        counts = [(1 + len(templates)) * len(target) for target in targets]
        return cls(
            requests=requests,
            ids=ids.unflatten(0, shape),
            mask=mask.unflatten(0, shape),
            subject=subject,
            positions=torch.tensor(positions, device=device),
            targets=pad(targets, device)[0],
            weights=pad(targets, device)[1] / torch.tensor(counts, device=device)[:, None],
            output=output,
            initial=output[torch.arange(len(requests), device=device), 0, subject[:, 0]].float(),
        )

    def take(self, facts: Tensor) -> _Batch:
        """The same for some of the facts."""
        if len(facts) == len(self.requests):
            return self
        tensors = {
            field.name: getattr(self, field.name)[facts]
            for field in dataclasses.fields(self)
            if field.name != "requests"
        }
        return _Batch(requests=[self.requests[index] for index in facts.tolist()], **tensors)

    def forward(self, model: PreTrainedModel, layer: int, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks above the layer with delta added at every row's subject.

        Returns:
            The negative log-likelihood [F], and the KL rows' log-probabilities at the subject [F, vocabulary].
        """
        facts = torch.arange(len(self.requests), device=delta.device)
        rows = torch.arange(self.ids.shape[1], device=delta.device)
        output = self.output.clone()
        site = (facts[:, None], rows, self.subject)
        output[site] = (self.output[site].float() + delta[:, None]).to(output.dtype)
        top = hidden_from(model, layer, output.flatten(0, 1), self.ids.flatten(0, 1), self.mask.flatten(0, 1))
        top = top.unflatten(0, self.ids.shape[:2])

        read = top[facts[:, None, None], rows[:-1, None], self.positions]
        targets = self.targets[:, None].expand(self.positions.shape)
        weights = self.weights[:, None].expand(self.positions.shape)
        real = weights > 0
        picked = log_probabilities(model, read[real]).gather(1, targets[real][:, None])[:, 0]
        nll = torch.zeros(weights.shape, device=delta.device).masked_scatter(real, -picked * weights[real]).sum((1, 2))
        return nll, log_probabilities(model, top[facts, -1, self.subject[:, -1]])


def _check_finite(loss: Tensor, requests: Sequence[EditRequest]) -> None:
    bad = (~loss.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RetentionBenchError(
            f"Fact {requests[bad[0]].fact_id!r}: the loss became {loss[bad[0]]:g} while its value was optimised. Lower "
            "v_lr, and check that the model's own weights are finite."
        )
