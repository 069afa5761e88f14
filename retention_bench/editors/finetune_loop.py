"""The training loop of the editors that fine-tune on their requests, FT and LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.display.progress import Progress
from retention_bench.editors.base import EditRequest
from retention_bench.editors.locate.subject import target_ids
from retention_bench.errors import RetentionBenchError
from retention_bench.models import log_probabilities, pad

Objective = Literal["target", "prompt_last"]
"""`"target"` is the cross-entropy of the target's tokens, each after those before it. `"prompt_last"` is that of FT's
reference: every token of the target is trained to follow the prompt directly, which is wrong for targets of several
tokens."""


MAX_TOKENS = 8192
"""Tokens in a pass, padding included, unless a single request has more; bounds the memory, and changes no result."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """One prompt of a request: its token ids, the positions that are trained, and the token that each shall predict."""

    ids: list[int]
    positions: list[int]
    targets: list[int]


def finetune_loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    optimizer: torch.optim.Optimizer,
    hidden: Callable[[Tensor, Tensor], Tensor],
    *,
    name: str,
    num_steps: int,
    batch_size: int,
    stop_loss: float,
    progress: Progress,
    objective: Objective = "target",
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise the mean over requests of the mean over a request's prompts of the mean -log p over its target's tokens.

    Args:
        model: Its head turns hidden states into predictions, and is not trained.
        tokenizer: Its tokenizer.
        requests: The facts; each is trained on all its prompts.
        optimizer: The optimiser of the parameters that are trained.
        hidden: Computes, from token ids and mask, both [rows, length], the hidden states after the final norm
            [rows, length, d_model], with the trained parameters in use.
        name: The editor's, for progress and errors.
        num_steps: Passes over the requests at most.
        batch_size: Requests in a step.
        stop_loss: No step is taken on a batch whose loss is below this, and a pass whose mean is below it is the last.
        progress: Called after every pass over the requests.
        objective: What is minimised.
        after_step: Called after every step.

    Raises:
        RetentionBenchError: A loss is not finite; the fact is named.
    """
    rows = [_rows(tokenizer, request, objective) for request in requests]
    for step in range(num_steps):
        total = 0.0
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            optimizer.zero_grad()
            parts = []
            for part in _passes(batch):
                losses = _losses(model, hidden, part)
                (losses.sum() / len(batch)).backward()  # gradients add up to those of the batch's mean
                parts.append(losses.detach())
            losses = torch.cat(parts)
            _check_finite(losses, requests[start : start + batch_size], name)
            total += losses.sum().item()
            if losses.mean().item() >= stop_loss:
                optimizer.step()
                after_step()
        progress(name, step + 1, num_steps, {"loss": total / len(rows)})
        if total / len(rows) < stop_loss:
            break


def _rows(tokenizer: PreTrainedTokenizerBase, request: EditRequest, objective: Objective) -> list[_Row]:
    """A row for each of a request's prompts."""
    target = target_ids(tokenizer, request)
    rows = []
    for text in request.prompts:
        prompt = tokenizer.encode(text.replace("{}", request.subject))
        if objective == "prompt_last":
            rows.append(_Row(prompt, [len(prompt) - 1] * len(target), target))
        else:
            rows.append(_Row(prompt + target[:-1], [len(prompt) - 1 + j for j in range(len(target))], target))
    return rows


def _passes(batch: Sequence[Sequence[_Row]]) -> Iterator[list[Sequence[_Row]]]:
    """A batch's requests, in order, in parts of at most `MAX_TOKENS`."""
    part: list[Sequence[_Row]] = []
    for rows in batch:
        lengths = [len(row.ids) for group in (*part, rows) for row in group]
        if part and max(lengths) * len(lengths) > MAX_TOKENS:
            yield part
            part = []
        part.append(rows)
    yield part


def _losses(
    model: PreTrainedModel, hidden: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Sequence[_Row]]
) -> Tensor:
    """Every request's loss [requests], all their prompts in one pass."""
    flat = [row for group in rows for row in group]
    states = hidden(*pad([row.ids for row in flat], model.device))
    # The head runs once for all rows: its matrix is the largest of the model.
    counts = [len(row.targets) for row in flat]
    numbers = [index for index, count in enumerate(counts) for _ in range(count)]
    predicted = log_probabilities(model, states[numbers, [place for row in flat for place in row.positions]])
    picked = predicted[range(len(numbers)), [token for row in flat for token in row.targets]]
    groups = torch.stack([-part.mean() for part in picked.split(counts)]).split([len(group) for group in rows])
    return torch.stack([group.mean() for group in groups])


def _check_finite(losses: Tensor, requests: Sequence[EditRequest], name: str) -> None:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RetentionBenchError(
            f"Fact {requests[bad[0]].fact_id!r}: the loss became {losses[bad[0]]:g} during {name}. Lower lr, and check "
            "that the model's own weights are finite."
        )
