"""Second moments of the keys over ordinary text, and the directions of key space that text does not use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen, key_size, pad, read_tensors, record, write_tensors
from retention_bench.progress import Progress, silent

_KIND = "set of key statistics"
_VERSION = 1
_GROUP = 100  # texts that are sorted by length together, so that a batch has little padding


@dataclasses.dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Uncentred second moments of a model's keys.

    Attributes:
        moments: By layer E[k k^T], float32 [d_mlp, d_mlp], on the CPU.
        tokens: Number of tokens that the expectation was taken over.
        source: What it was computed from, for people.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    source: str = ""

    def check(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """Refuse statistics that cannot be this model's.

        Raises:
            UsageError: A layer is missing or its keys have another size than the model's.
        """
        for layer in layers:
            size = key_size(model, layer)
            if layer not in self.moments:
                raise UsageError(
                    f"The key statistics cover layers {sorted(self.moments)}, not layer {layer}. "
                    "Collect them for all layers that are edited."
                )
            if self.moments[layer].shape[0] != size:
                raise UsageError(
                    f"The key statistics of layer {layer} are for keys of size {self.moments[layer].shape[0]}, the "
                    f"model's have {size}: they belong to another model. Collect them on the model that is edited."
                )

    def save(self, path: Path | str) -> None:
        """Write as safetensors: to a temporary name first, then renamed, so no reader sees half a file."""
        tensors = {str(layer): moment for layer, moment in self.moments.items()}
        write_tensors(path, tensors, kind=_KIND, version=_VERSION, tokens=self.tokens, source=self.source)

    @classmethod
    def load(cls, path: Path | str) -> KeyStatistics:
        """Read statistics that `save` wrote.

        Raises:
            RetentionBenchError: There is no such file, it holds no statistics or of another version, or it is broken.
        """
        tensors, about = read_tensors(path, kind=_KIND, version=_VERSION)
        return cls({int(layer): moment for layer, moment in tensors.items()}, about["tokens"], about["source"])


def required_statistics(
    editor: str, model: PreTrainedModel, context: EditContext, layers: Sequence[int]
) -> KeyStatistics:
    """The statistics that an edit was given.

    Raises:
        UsageError: There are none, or they cannot be this model's.
    """
    if context.statistics is None:
        raise UsageError(
            f"{editor} needs the key statistics of layers {list(layers)}. "
            "Make them with collect_key_statistics and put them into the EditContext."
        )
    context.statistics.check(model, layers)
    return context.statistics


def collect_key_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_length: int,
    batch_tokens: int = 4096,
    dtype: torch.dtype = torch.float64,
    source: str = "",
    progress: Progress = silent,
) -> KeyStatistics:
    """Measure the second moment of the keys over texts, for all layers in one pass (ROME, appendix E.1; `layer_stats`).

    One text is one sequence, cut at `max_length`; padding is masked and every other token counts, a BOS token too.

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer; special tokens are added as it adds them.
        texts: The texts.
        layers: The layers.
        max_length: Tokens of a text that count.
        batch_tokens: Tokens a forward pass, padding included; at least one text goes in.
        dtype: What batches are summed up in.
        source: What the texts are, for people; kept in the result.
        progress: Told the texts done.

    Returns:
        The statistics.

    Raises:
        UsageError: No layers, a layer that the model lacks, or `max_length` beyond the model's positions.
        RetentionBenchError: The texts hold no token, or a key is not finite.
    """
    if not layers:
        raise UsageError("No layers were given to collect key statistics for.")
    positions = model.config.max_position_embeddings
    if not 1 <= max_length <= positions:
        raise UsageError(f"max_length is {max_length}; the model has {positions} positions. Give 1 to {positions}.")
    texts = list(texts)
    sums = {}
    for layer in layers:
        size = key_size(model, layer)
        sums[layer] = torch.zeros(size, size, dtype=dtype, device=model.device)
    tokens = done = 0
    with frozen(model):
        for batch in _batches(tokenizer, texts, max_length, batch_tokens):
            done += len(batch)
            rows = [row for row in batch if row]
            if rows:
                ids, mask = pad(rows, model.device)
                keys, _ = record(model, ids, mask, keys=layers)
                for layer in layers:
                    counted = keys[layer][mask.bool()].float()
                    sums[layer] += counted.T @ counted
                tokens += int(mask.sum())
            progress("key statistics", done, len(texts), {"tokens": tokens})
    if not tokens:
        raise RetentionBenchError("The texts for the key statistics hold no token. Give texts that are not empty.")
    moments = {layer: (total / tokens).float().cpu() for layer, total in sums.items()}
    for layer, moment in moments.items():
        if not moment.isfinite().all():
            raise RetentionBenchError(
                f"The keys of layer {layer} are not all finite numbers. Check the model's weights and dtype."
            )
    return KeyStatistics(moments, tokens, source)


def null_space_projector(moment: Tensor, threshold: float) -> Tensor:
    """The projector onto the directions of key space that text hardly uses (AlphaEdit, section 3.2, equation 7).

    Args:
        moment: E[k k^T], symmetric [d_mlp, d_mlp].
        threshold: Eigenvectors whose eigenvalue is below this, an absolute number, span the space.

    Returns:
        P = U U^T in float64 [d_mlp, d_mlp], on the moment's device.

    Raises:
        UsageError: No eigenvalue is below the threshold.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    unused = vectors[:, values < threshold]
    if not unused.shape[1]:
        raise UsageError(
            f"nullspace_threshold is {threshold:g}, and no direction of the keys is below it (the smallest is "
            f"{values[0]:.3g}). Raise the threshold."
        )
    return unused @ unused.T


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_tokens: int
) -> Iterator[list[list[int]]]:
    """Token rows in batches of similar length."""
    for start in range(0, len(texts), _GROUP):
        encoded = tokenizer(texts[start : start + _GROUP], truncation=True, max_length=max_length)["input_ids"]
        batch: list[list[int]] = []
        for row in sorted(encoded, key=len):
            if batch and len(row) * (len(batch) + 1) > batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        yield batch
