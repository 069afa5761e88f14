"""Collecting the covariance of the keys: one pass over the texts for all layers, which can be cut off and go on."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.data import shortened
from retention_bench.display.progress import Progress, silent
from retention_bench.editors.covariance.checkpoint import Run
from retention_bench.editors.covariance.covariance import Covariance, Measurement
from retention_bench.editors.covariance.fingerprint import key_fingerprint
from retention_bench.editors.covariance.sums import Sums, block_shapes
from retention_bench.editors.settings import MOST_LAYERS
from retention_bench.errors import UsageError
from retention_bench.models import check_place, frozen, key_size, pad, record

_CPU_TOKENS, _GPU_TOKENS = 1024, 8192  # a forward pass; on a CPU larger activations fall out of the cache


def collect_covariance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
    memory: int | None = None,
    shard: tuple[int, int] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
    source: str = "",
    settings: Mapping[str, Any] | None = None,
    total: int | None = None,
    progress: Progress = silent,
) -> Covariance:
    """Collect E[k k^T] over texts, for all layers in one pass (ROME, appendix E.1; `layer_stats`).

    A text is a sequence, cut at `max_length`. Padding is left out; every other token counts, a BOS token too.

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer; special tokens are added as it adds them.
        texts: The texts; they are not held in memory.
        layers: The layers.
        max_length: Tokens of a text that count.
        batch_tokens: Tokens in a forward pass, padding included, unless a single text has more; they bound the
            activations. By default what is fast on the model's device.
        dtype: What batches are summed up in.
        memory: Bytes that the sums may take. Where those of all layers take more, there are several passes, and the
            texts must be iterable more than once.
        shard: (i, n) to take only the texts whose index is i modulo n; see `merged`.
        checkpoint: A file to write checkpoints to, and to go on from where an earlier call with the same arguments was
            cut off; the result has the same bits as without the cut. The caller deletes it once the result is safe.
            A damaged one is set aside with a warning, and the collection begins anew.
        checkpoint_every: Seconds between two checkpoints at least; writing them takes 1/20 of the time at most. 0 for
            one after each 100 texts, however long that takes.
        source: What the texts are, for people; kept in the result.
        settings: What the caller files the measurement under, JSON values; kept in the result.
        total: How many texts there will be, for the progress; by default their number where they have one.
        progress: Told the texts done.

    Returns:
        The covariance.

    Raises:
        UsageError: No layers, a layer that the model lacks, `max_length` beyond the model's positions, no such shard,
            another number out of range, too little `memory` for one layer, texts that can be read once where several
            passes are needed, or a `checkpoint` where no file can be.
        RetentionBenchError: The texts hold no token, a key is not finite, or the checkpoint is of another run.
    """
    _check(model, layers, max_length, shard)
    for name, value in (("batch_tokens", batch_tokens), ("memory", memory)):
        if value is not None and not 1 <= value <= sys.maxsize:
            raise UsageError(f"{name} is {shortened(value)}. Give a whole number from 1 on, or None.")
    if not (checkpoint_every >= 0 and math.isfinite(checkpoint_every)):
        raise UsageError(f"checkpoint_every is {checkpoint_every}. Give seconds, 0 or more.")
    if checkpoint is not None:
        check_place(checkpoint)
    layers = sorted(set(layers))
    index, count = shard or (0, 1)
    if total is None and isinstance(texts, Sized):
        total = len(range(index, len(texts), count))
    batch_tokens = batch_tokens or (_CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS)
    sizes = {layer: key_size(model, layer) for layer in layers}
    passes = _passes(sizes, dtype, memory)
    if len(passes) > 1 and iter(texts) is texts:
        raise UsageError(
            f"{len(layers)} layers in {memory} bytes take {len(passes)} passes over the texts, and these can be read "
            "only once. Give a list, or what can be gone through again, or more memory."
        )
    run = Run(
        key_fingerprint(model, layers),
        {
            "layers": layers,
            "passes": [list(part) for part in passes],
            "max_length": max_length,
            "batch_tokens": batch_tokens,
            "sums": str(dtype),
            "model": str(model.dtype),
            "device": model.device.type,
            "shard": list(shard) if shard else None,
            "settings": dict(settings or {}),
        },
        dtype,
        checkpoint,
        checkpoint_every,
    )
    run.resume(model.device)
    with frozen(model):
        for number, part in enumerate(passes, start=1):
            if part[0] in run.mom2:
                continue
            stage = "covariance" if len(passes) == 1 else f"covariance, pass {number} of {len(passes)}"
            if run.sums is None:
                run.sums = Sums.zero({layer: sizes[layer] for layer in part}, dtype, model.device)
            for group in run.groups(itertools.islice(texts, index, None, count)):
                seen = run.done
                for batch in _batches(tokenizer, group, max_length, batch_tokens):
                    seen += len(batch)
                    rows = [row for row in batch if row]
                    if rows:
                        ids, mask = pad(rows, model.device)
                        # Padding stands behind the tokens and attention is causal: hiding it changes no token's keys,
                        # and a pass without a mask is faster.
                        keys, _ = record(model, ids, torch.ones_like(mask), keys=part)
                        for layer in part:
                            run.sums.add(layer, keys[layer][mask.bool()].float())
                        run.tokens += sum(map(len, rows))
                    progress(stage, seen, max(seen, total or 0), {"tokens": run.tokens})
                run.sums.check_finite(seen)
            run.finish()
    done, tokens, _ = run.whole
    measured = Measurement.of(
        model, layers, texts=done, max_length=max_length, shard=shard, settings=dict(settings or {})
    )
    return Covariance({layer: run.mom2[layer] for layer in layers}, tokens, source, run.fingerprint, measured)


def _check(model: PreTrainedModel, layers: Sequence[int], max_length: int, shard: tuple[int, int] | None) -> None:
    """Refuse what cannot be measured."""
    if not layers:
        raise UsageError("No layers were given to collect a covariance of. Give those that are edited.")
    if len(layers) > MOST_LAYERS:
        raise UsageError(f"{len(layers)} layers were given to collect a covariance of. Give those of the model.")
    positions = model.config.max_position_embeddings
    if not 1 <= max_length <= positions:
        raise UsageError(
            f"max_length is {shortened(max_length)}; the model has {positions} positions. Give 1 to {positions}."
        )
    if shard and not 0 <= shard[0] < shard[1] <= sys.maxsize:
        raise UsageError(
            f"There is no shard {shortened(shard[0])}/{shortened(shard[1])}. Of N shards, give 0/N to (N - 1)/N."
        )


def _passes(sizes: Mapping[int, int], dtype: torch.dtype, memory: int | None) -> list[list[int]]:
    """The layers of each pass, so that their sums take no more than `memory` bytes."""
    passes: list[list[int]] = [[]]
    free = memory
    for layer, size in sizes.items():
        needed = dtype.itemsize * sum(rows * columns for rows, columns in block_shapes(size))
        if memory is not None and free is not None:
            if needed > memory:
                raise UsageError(
                    f"The sums of layer {layer} take {needed} bytes, and memory is {memory}. Give more, or sum up in "
                    "float32."
                )
            if needed > free:
                passes.append([])
                free = memory
            free -= needed
        passes[-1].append(layer)
    return passes


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_tokens: int
) -> Iterator[list[list[int]]]:
    """Token rows of a group in batches of similar length."""
    batch: list[list[int]] = []
    for row in sorted(tokenizer(texts, truncation=True, max_length=max_length)["input_ids"], key=len):
        if batch and len(row) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
