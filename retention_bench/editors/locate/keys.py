"""What a model holds at the subjects' last tokens while layer after layer is edited: keys and block outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditRequest
from retention_bench.editors.locate.subject import Row, context_rows
from retention_bench.models import pad, record

MAX_ROWS = 128


class SubjectStates:
    """Keys and block outputs of the requests, read with the weights that the model has at each call.

    Layers are asked for in ascending order, and between two calls only weights of the layer asked for last, or of
    layers above it, may change: what is below is not run again. Rows end at the subject, since what follows cannot
    reach it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        requests: The requests.
        templates: Context templates without the bare `"{}"`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        templates: Sequence[str],
    ) -> None:
        self._model = model
        self._templates = len(templates)
        # A fact's bare prompt stands first; outputs are read there, so those rows are kept apart.
        groups = context_rows(tokenizer, templates, requests)
        self._prompts = [len(request.prompts) for request in requests]
        self._bare = list(_chunks([group[0] for group in groups], model.device))
        self._others = list(_chunks([row for group in groups for row in group[1:]], model.device))

    def keys(self, layer: int) -> list[Tensor]:
        """Every request's keys in all its contexts.

        Args:
            layer: The layer.

        Returns:
            A tensor a request, [prompts, 1 + templates, d_mlp] in float32 on the model's device; the bare template
            is first.

        Raises:
            UsageError: The model has no such layer.
            ValueError: The layer is below one that was asked for before.
        """
        bare = self._read(self._bare, layer)
        others = self._read(self._others, layer) if self._others else bare[:0]
        sizes = [prompts * (1 + self._templates) - 1 for prompts in self._prompts]
        return [
            torch.cat([own[None], rest]).unflatten(0, (prompts, 1 + self._templates))
            for own, rest, prompts in zip(bare, others.split(sizes), self._prompts, strict=True)
        ]

    def mean_keys(self, layer: int) -> Tensor:
        """Every request's key as MEMIT and AlphaEdit average it.

        A prompt's bare template weighs 1/2 and the mean over the context templates 1/2 (without templates the bare one
        is all); a request's prompts, its own and the paraphrases, weigh the same.

        Returns:
            [requests, d_mlp] in float32 on the model's device.
        """
        means = []
        for keys in self.keys(layer):
            bare, sampled = keys[:, 0], keys[:, 1:]
            means.append(((bare + sampled.mean(1)) / 2 if self._templates else bare).mean(0))
        return torch.stack(means)

    def outputs(self, layer: int) -> Tensor:
        """Every request's block output in its bare prompt.

        Args:
            layer: The block's layer, at or above the last that `keys` was asked for.

        Returns:
            [requests, d_model] in float32 on the model's device.

        Raises:
            ValueError: The layer is below that one.
        """
        parts = []
        for chunk in self._bare:
            chunk.check(layer)
            _, output = record(self._model, chunk.ids, chunk.mask, output=layer, start=chunk.state)
            assert output is not None
            parts.append(chunk.at_subjects(output))
        return torch.cat(parts)

    def _read(self, chunks: Sequence[_Chunk], layer: int) -> Tensor:
        """The keys of the chunks' rows [rows, d_mlp]; what enters the layer's block is kept for the next call."""
        parts = []
        for chunk in chunks:
            chunk.check(layer)
            advance = layer - 1 if layer and (chunk.state is None or chunk.state[0] < layer - 1) else None
            keys, output = record(self._model, chunk.ids, chunk.mask, keys=[layer], output=advance, start=chunk.state)
            if advance is not None and output is not None:
                chunk.state = (advance, output)
            parts.append(chunk.at_subjects(keys[layer]))
        return torch.cat(parts)


@dataclasses.dataclass
class _Chunk:
    """Rows that run together.

    Attributes:
        ids: [rows, length].
        mask: [rows, length].
        subjects: Index of each row's subject [rows].
        state: The highest layer below those still to be read, and its block's output [rows, length, d_model].
    """

    ids: Tensor
    mask: Tensor
    subjects: Tensor
    state: tuple[int, Tensor] | None = None

    def check(self, layer: int) -> None:
        """Refuse a layer whose input is not known any more: what was read there would be wrong."""
        if self.state is not None and layer <= self.state[0]:
            raise ValueError(f"layer {layer} was asked for after layer {self.state[0] + 1}; ask in ascending order")

    def at_subjects(self, states: Tensor) -> Tensor:
        return states[torch.arange(len(states), device=states.device), self.subjects].float()


def _chunks(rows: Sequence[Row], device: torch.device) -> Iterator[_Chunk]:
    for start in range(0, len(rows), MAX_ROWS):
        chunk = rows[start : start + MAX_ROWS]
        ids, mask = pad([row.ids[: row.subject + 1] for row in chunk], device)
        yield _Chunk(ids, mask, torch.tensor([row.subject for row in chunk], device=device))
