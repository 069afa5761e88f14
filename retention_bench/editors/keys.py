"""What a model holds at the subject's last token: keys (projection inputs) and block outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditRequest
from retention_bench.editors.subject import Row, context_rows
from retention_bench.models import pad, record

MAX_ROWS = 128


def mean_keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    layers: Sequence[int],
) -> dict[int, Tensor]:
    """Every request's key, averaged over contexts as MEMIT and AlphaEdit do.

    The bare prompt weighs 1/2 and the mean over the context templates 1/2; without templates the bare prompt is all.

    Args:
        model: The model with its current weights.
        tokenizer: Its tokenizer.
        requests: The requests.
        templates: Context templates without the bare `"{}"`.
        layers: Layers whose keys are wanted.

    Returns:
        By layer, [requests, d_mlp] in float32 on the model's device.
    """
    contexts = context_rows(tokenizer, templates, requests)
    rows = [row for group in contexts for row in group]
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for ids, mask, numbers, subjects in _batches(rows, model.device):
        keys, _ = record(model, ids, mask, keys=layers)
        for layer in layers:
            parts[layer].append(keys[layer][numbers, subjects].float())
    means = {}
    for layer in layers:
        keys_by_context = torch.cat(parts[layer]).unflatten(0, (len(requests), 1 + len(templates)))
        bare, sampled = keys_by_context[:, 0], keys_by_context[:, 1:]
        means[layer] = (bare + sampled.mean(1)) / 2 if templates else bare
    return means


def block_outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], layer: int
) -> Tensor:
    """Every request's block output in the bare prompt.

    Args:
        model: The model with its current weights.
        tokenizer: Its tokenizer.
        requests: The requests.
        layer: The block's layer.

    Returns:
        [requests, d_model] in float32 on the model's device.
    """
    rows = [group[0] for group in context_rows(tokenizer, (), requests)]
    parts = []
    for ids, mask, numbers, subjects in _batches(rows, model.device):
        _, output = record(model, ids, mask, output=layer)
        assert output is not None
        parts.append(output[numbers, subjects].float())
    return torch.cat(parts)


def _batches(rows: Sequence[Row], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Ids and mask [rows, length] of each batch, and where the subjects are: row numbers and token indices [rows]."""
    for start in range(0, len(rows), MAX_ROWS):
        batch = rows[start : start + MAX_ROWS]
        ids, mask = pad([row.ids for row in batch], device)
        subjects = torch.tensor([row.subject for row in batch], device=device)
        yield ids, mask, torch.arange(len(batch), device=device), subjects
