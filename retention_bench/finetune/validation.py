"""The metrics that stop rules look at, over a whole set of validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retention_bench.errors import RetentionBenchError
from retention_bench.finetune import processes
from retention_bench.finetune.base import Example
from retention_bench.finetune.heads import collator
from retention_bench.finetune.settings import Metric

ROWS = 8
"""Rows in a forward pass, if they fit."""


class Measured(NamedTuple):
    """Loss and accuracy on validation rows.

    Attributes:
        loss: The mean over the target tokens of all rows, in nats; NaN where the logits are. Each token weighs the
            same, whichever row it stands in: `Trainer.evaluate` would give the mean of batch means, which weighs a
            token in a batch of short answers more and changes with the batch size.
        accuracy: The share of rows whose every target is the most probable token or class.
    """

    loss: float
    accuracy: float


def measure(trained: Any, rows: Sequence[Example], classes: int | None = None, size: int = ROWS) -> Measured:
    """Loss and accuracy on validation rows, fewer at a time where `size` do not fit the memory.

    Several processes share the rows out, and each gets what all of them found.

    Args:
        trained: A causal language model, or the `Classifier` of a task with classes; evaluated with dropout off, its
            mode is given back. On a GPU the forward pass runs in bfloat16 autocast, as training does.
        rows: The rows; at least one of them has a target.
        classes: As in `Finetune`.
        size: Rows in a forward pass, to begin with.

    Raises:
        RetentionBenchError: A single row does not fit.
        torch.OutOfMemoryError: `size` rows do not fit, and there are other processes, which would wait for this one.
    """
    while True:
        try:
            return _measure(trained, rows, classes, size)
        except torch.OutOfMemoryError as error:
            if processes.count() > 1:
                raise
            if size == 1:
                longest = max(len(row.input_ids) for row in rows)
                raise RetentionBenchError(
                    f"A single validation row of up to {longest} tokens does not fit the memory. Lower max_length, or "
                    "take a larger device."
                ) from error
        size //= 2
        torch.cuda.empty_cache()


@torch.no_grad()
def _measure(trained: Any, rows: Sequence[Example], classes: int | None, size: int) -> Measured:
    device = next(trained.parameters()).device
    training = trained.training
    trained.eval()
    loss, targets, right = 0.0, 0, 0
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            batches = _batches(rows, classes, size)
            for number in range(processes.index(), _rounded_up(len(batches), processes.count()), processes.count()):
                # Where the model is spread over the processes, a forward pass takes all of them: those that have no
                # batch left take one that does not count.
                counts = number < len(batches)
                batch = batches[number if counts else 0]
                named = {key: value.to(device) for key, value in batch.items()}
                labels = named.pop("labels")
                if classes is None:
                    logits, labels = trained(**named, use_cache=False).logits[:, :-1], labels[:, 1:]
                else:
                    logits, labels = trained(**named)["logits"][:, None], labels[:, None]
                if not counts:
                    continue
                hit = labels != -100
                loss += torch.nn.functional.cross_entropy(logits[hit].float(), labels[hit], reduction="sum").item()
                targets += int(hit.sum())
                right += int(((logits.argmax(-1) == labels) | ~hit).all(1).sum())
    finally:
        trained.train(training)
    sums = [sum(column) for column in zip(*processes.gathered((loss, targets, right)), strict=True)]
    return Measured(sums[0] / sums[1], sums[2] / len(rows))


def reached(metric: Metric, value: float, threshold: float) -> bool:
    """Whether a value of the metric is beyond the threshold: a loss below it, an accuracy above it."""
    return value < threshold if metric == "validation_loss" else value > threshold


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _batches(rows: Sequence[Example], classes: int | None, size: int) -> list[dict[str, Tensor]]:
    """Rows of like length together."""
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    collate = collator(classes)
    return [collate([row._asdict() for row in rows[start : start + size]]) for start in range(0, len(rows), size)]
