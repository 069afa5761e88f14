"""The validation loss: the mean over target tokens of a whole set of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from retention_bench.finetune.base import Example

ROWS = 8
"""Rows in a forward pass."""


@torch.no_grad()
def mean_token_loss(model: Any, rows: Sequence[Example]) -> float:
    """Mean negative log-likelihood of the target tokens of all rows, in nats.

    Each token weighs the same, whichever row it stands in. `Trainer.evaluate` would give the mean of batch means, which
    weighs a token in a batch of short answers more and changes with the batch size.

    Args:
        model: A causal language model; evaluated with dropout off, its mode is given back. On a GPU the forward pass
            runs in bfloat16 autocast, as training does.
        rows: The rows; at least one of them has a target token.

    Returns:
        The loss; NaN where the model's logits are.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for batch in _batches(rows):
                labels = batch.pop("labels").to(device)[:, 1:]
                hit = labels != -100
                logits = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits[:, :-1][hit]
                total += torch.nn.functional.cross_entropy(logits.float(), labels[hit], reduction="sum").item()
                count += int(hit.sum())
    finally:
        model.train(training)
    return total / count


def _batches(rows: Sequence[Example]) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of like length, padded on the right: `input_ids`, `attention_mask`, `labels`, each [rows, length]."""
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        shape = (len(batch), len(batch[-1].input_ids))
        ids = torch.zeros(shape, dtype=torch.long)  # which id pads does not matter: it is masked and never a target
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100, dtype=torch.long)
        for i, row in enumerate(batch):
            length = len(row.input_ids)
            ids[i, :length] = torch.tensor(row.input_ids)
            mask[i, :length] = 1
            labels[i, :length] = torch.tensor(row.labels)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
