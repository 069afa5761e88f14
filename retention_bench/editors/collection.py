"""Measuring the second moments of the keys: one pass over the texts for all layers, that can be cut off and go on."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.data import shortened
from retention_bench.data.durable import set_aside
from retention_bench.display import plain
from retention_bench.display.progress import Progress, silent
from retention_bench.editors.settings import MOST_LAYERS
from retention_bench.editors.statistics import KeyStatistics, describe, distance, probe_keys
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import (
    check_place,
    frozen,
    key_size,
    pad,
    read_tensors,
    record,
    write_tensors,
)

_Whole = Annotated[int, pydantic.Field(strict=True, ge=0, le=sys.maxsize)]

_log = logging.getLogger("retention_bench")

_KIND = "checkpoint of key statistics"
_VERSION = 1
_GROUP = 100  # texts that are sorted by length together, so that a batch has little padding
_BLOCKS = 8  # columns of a symmetric sum are added in this many blocks: 9/16 of the work, and of the memory
_NARROWEST = 128  # columns a block has at least; narrower ones make slow products
_CPU_TOKENS, _GPU_TOKENS = 1024, 8192  # a forward pass; on a CPU larger activations fall out of the cache
_SAME = 5e-3  # relative distance on the probe of the same weights, whose bits the number of threads may change
_SHARE = 20  # a checkpoint takes at most about 1/20 of the time


def collect_key_statistics(
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
) -> KeyStatistics:
    """Measure the second moment of the keys over texts, for all layers in one pass (ROME, appendix E.1; `layer_stats`).

    One text is one sequence, cut at `max_length`; padding is left out and every other token counts, a BOS token too.

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer; special tokens are added as it adds them.
        texts: The texts; they are not held in memory.
        layers: The layers.
        max_length: Tokens of a text that count.
        batch_tokens: Tokens a forward pass, padding included, which bound the activations; at least one text goes in.
            By default what is fast on the model's device.
        dtype: What batches are summed up in.
        memory: Bytes that the sums may take. Where all layers' take more, the layers are done in several passes, and
            the texts must be such that they can be gone through again.
        shard: (i, n) to take only the texts whose index is i modulo n; see `KeyStatistics.merged`.
        checkpoint: A file to go on from where an earlier call with the same arguments was cut off; what it ends with
            has the same bits. It is written by this, and left to the caller to delete once the result is safe. One
            that is damaged is set aside with a warning, and the measurement begins anew.
        checkpoint_every: Seconds between two checkpoints, at least; writing them takes 1/20 of the time at most. 0 for
            one after each 100 texts, however long it takes.
        source: What the texts are, for people; kept in the result.
        settings: What the caller files the measurement under, JSON values; kept in the result.
        total: How many texts there will be, for the progress; by default their number where they have one.
        progress: Told the texts done.

    Returns:
        The statistics.

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
    run = _Run(
        probe_keys(model, layers),
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
            if part[0] in run.moments:
                continue
            stage = "key statistics" if len(passes) == 1 else f"key statistics, pass {number} of {len(passes)}"
            if run.sums is None:
                run.sums = _Sums.zero({layer: sizes[layer] for layer in part}, dtype, model.device)
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
    measured = describe(model, layers, texts=done, max_length=max_length, shard=shard, settings=dict(settings or {}))
    return KeyStatistics({layer: run.moments[layer] for layer in layers}, tokens, source, run.probe, measured)


class _Sums:
    """Running sums of k k^T for some layers.

    They are symmetric, so only the upper triangle is added up, in blocks of rows: block b of a layer holds rows
    b * width to (b + 1) * width, from the diagonal on.
    """

    def __init__(self, blocks: dict[int, list[Tensor]]) -> None:
        self.blocks = blocks

    @classmethod
    def zero(cls, sizes: Mapping[int, int], dtype: torch.dtype, device: torch.device) -> _Sums:
        """Nothing summed up yet."""
        return cls(
            {
                layer: [torch.zeros(shape, dtype=dtype, device=device) for shape in _shapes(size)]
                for layer, size in sizes.items()
            }
        )

    def add(self, layer: int, keys: Tensor) -> None:
        """Add keys, float32 [tokens, d_mlp]."""
        for block in self.blocks[layer]:
            right = keys[:, keys.shape[1] - block.shape[1] :]
            block += right[:, : block.shape[0]].T @ right

    def check_finite(self, done: int) -> None:
        """Refuse keys that are no numbers early, and not after hours: one of them makes its diagonal entry none.

        Raises:
            RetentionBenchError: A sum is not finite.
        """
        for layer, blocks in self.blocks.items():
            if not all(block.diagonal().isfinite().all() for block in blocks):
                raise RetentionBenchError(
                    f"The keys of layer {layer} are not all finite numbers, in the first {done} texts. "
                    "Check the model's weights and dtype."
                )

    def moments(self, tokens: int) -> dict[int, Tensor]:
        """The whole matrices over the number of tokens, float32 on the CPU."""
        found = {}
        for layer, blocks in self.blocks.items():
            moment = torch.empty(blocks[0].shape[1], blocks[0].shape[1])
            for block in blocks:
                mean = (block / tokens).float().cpu()
                rows, columns = mean.shape
                first = len(moment) - columns
                mean[:, :rows] = mean[:, :rows].triu() + mean[:, :rows].triu(1).T
                moment[first : first + rows, first:] = mean
                moment[first:, first : first + rows] = mean.T
            found[layer] = moment
        return found


class _State(pydantic.BaseModel):
    """How far a run was: texts and tokens of its pass, those of a whole pass, finished layers, blocks of the others."""

    done: _Whole
    tokens: _Whole
    digest: str
    whole: tuple[_Whole, _Whole, str]
    finished: list[_Whole]
    summed: dict[int, _Whole]


class _About(pydantic.BaseModel):
    """What stands beside a checkpoint's tensors."""

    run: dict[str, Any]
    state: _State


class _OtherRunError(RetentionBenchError):
    """A checkpoint is good, and another run's."""


class _Run:
    """What a run has so far: the moments of finished passes, and the sums of the pass that it is in."""

    def __init__(
        self,
        probe: dict[int, Tensor],
        about: Mapping[str, Any],
        dtype: torch.dtype,
        path: Path | None,
        every: float,
    ) -> None:
        self.probe = probe
        self.dtype = dtype
        self.about = json.loads(json.dumps(about))  # as a checkpoint gives it back
        self.path = path
        self.every = every
        self.due = time.monotonic() + every
        self.moments: dict[int, Tensor] = {}
        self.sums: _Sums | None = None
        self.done, self.tokens, self.digest = 0, 0, ""
        self.whole: tuple[int, int, str] = (0, 0, "")  # the same at the end of a pass

    def groups(self, texts: Iterator[str]) -> Iterator[list[str]]:
        """The texts in groups, without those that an earlier run had done.

        A group counts as done when the next one is asked for, and then a checkpoint is written if one is due.

        Raises:
            RetentionBenchError: The texts are not those that the earlier run had.
        """
        before, digest, seen = self.done, hashlib.sha256(), 0
        while group := list(itertools.islice(texts, _GROUP)):
            for text in group:
                contents = text.encode("utf-8", "surrogatepass")
                digest.update(len(contents).to_bytes(8, "big") + contents)
            seen += len(group)
            if seen - len(group) < before:
                if seen > before or (seen == before and digest.hexdigest() != self.digest):
                    raise self._other("its texts are others")
                continue
            yield group
            self.done, self.digest = seen, digest.hexdigest()
            if self.path and time.monotonic() >= self.due:
                self._save(self.path)
        if seen < before:
            raise self._other(f"it had {before} texts already, and this one has {seen}")

    def finish(self) -> None:
        """End a pass.

        Raises:
            RetentionBenchError: There was no token, or the texts were others than in the pass before.
        """
        if not self.tokens:
            raise RetentionBenchError("The texts for the key statistics hold no token. Give texts that are not empty.")
        whole = (self.done, self.tokens, self.digest)
        if self.moments and whole != self.whole:
            raise RetentionBenchError(
                "The texts for the key statistics were not the same in two passes over them. Give texts that are."
            )
        assert self.sums is not None
        self.moments |= self.sums.moments(self.tokens)
        self.sums, self.whole = None, whole
        self.done, self.tokens, self.digest = 0, 0, ""

    def resume(self, device: torch.device) -> None:
        """Go on from the checkpoint, where there is one.

        Raises:
            RetentionBenchError: It is of another run.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            tensors, about = read_tensors(self.path, _About, kind=_KIND, version=_VERSION)
            for name, ours in self.about.items():
                if about.run.get(name) != ours:
                    raise self._other(f"its {name} is {str(about.run.get(name))[:200]}, this one's {ours}")
            state = about.state
            if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != self._contents(state):
                raise RetentionBenchError(f"{self.path} is damaged: it lacks tensors, or has others.")
        except _OtherRunError:
            raise
        except RetentionBenchError as error:
            # What is wrong with it would be so for ever: the next run would stop here as well.
            aside = set_aside(self.path)
            notice = f"{error} It was set aside as {aside}, and the key statistics are measured from the start."
            _log.warning("%s", plain(notice))
            return
        if not all(distance(tensors[f"probe.{layer}"], keys) < _SAME for layer, keys in self.probe.items()):
            raise self._other("its model has other weights")
        self.done, self.tokens, self.digest = state.done, state.tokens, state.digest
        self.whole = state.whole
        self.moments = {layer: tensors[f"moment.{layer}"] for layer in state.finished}
        self.sums = _Sums(
            {
                layer: [tensors[f"sum.{layer}.{number}"].to(device) for number in range(blocks)]
                for layer, blocks in sorted(state.summed.items())
            }
        )

    def _contents(self, state: _State) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """What a checkpoint in a state holds: dtype and shape by name; nothing where there is no such state.

        It is in one of the passes, with the moments of those before.
        """
        for number, part in enumerate(self.about["passes"]):
            if part != sorted(state.summed) or state.finished != list(itertools.chain(*self.about["passes"][:number])):
                continue
            sizes = {layer: len(keys) for layer, keys in self.probe.items()}
            found = {f"probe.{layer}": (torch.float32, [size]) for layer, size in sizes.items()}
            found |= {f"moment.{layer}": (torch.float32, [sizes[layer]] * 2) for layer in state.finished}
            for layer in part:
                shapes = enumerate(_shapes(sizes[layer]))
                found |= {f"sum.{layer}.{block}": (self.dtype, list(shape)) for block, shape in shapes}
            return {name: (dtype, torch.Size(shape)) for name, (dtype, shape) in found.items()}
        return {}

    def _save(self, path: Path) -> None:
        began = time.monotonic()
        tensors = {f"probe.{layer}": keys for layer, keys in self.probe.items()}
        tensors |= {f"moment.{layer}": moment for layer, moment in self.moments.items()}
        assert self.sums is not None
        for layer, blocks in self.sums.blocks.items():
            tensors |= {f"sum.{layer}.{number}": block.cpu() for number, block in enumerate(blocks)}
        state = {
            "done": self.done,
            "tokens": self.tokens,
            "digest": self.digest,
            "whole": self.whole,
            "finished": list(self.moments),
            "summed": {layer: len(blocks) for layer, blocks in self.sums.blocks.items()},
        }
        write_tensors(path, tensors, kind=_KIND, version=_VERSION, run=self.about, state=state)
        now = time.monotonic()
        self.due = now + (max(self.every, _SHARE * (now - began)) if self.every else 0)

    def _other(self, why: str) -> _OtherRunError:
        return _OtherRunError(
            f"The checkpoint {self.path} is of another run: {why}. Delete it to begin anew, or name another file."
        )


def _check(model: PreTrainedModel, layers: Sequence[int], max_length: int, shard: tuple[int, int] | None) -> None:
    """Refuse what cannot be measured."""
    if not layers:
        raise UsageError("No layers were given to collect key statistics for.")
    if len(layers) > MOST_LAYERS:
        raise UsageError(f"{len(layers)} layers were given to collect key statistics for. Give those of the model.")
    positions = model.config.max_position_embeddings
    if not 1 <= max_length <= positions:
        raise UsageError(
            f"max_length is {shortened(max_length)}; the model has {positions} positions. Give 1 to {positions}."
        )
    if shard and not 0 <= shard[0] < shard[1] <= sys.maxsize:
        raise UsageError(
            f"There is no shard {shortened(shard[0])}/{shortened(shard[1])}. Of N shards, give 0/N to (N - 1)/N."
        )


def _shapes(size: int) -> list[tuple[int, int]]:
    """Rows and columns of a symmetric matrix's blocks, from the diagonal on."""
    width = max(_NARROWEST, -(-size // _BLOCKS))
    return [(min(width, size - start), size - start) for start in range(0, size, width)]


def _passes(sizes: Mapping[int, int], dtype: torch.dtype, memory: int | None) -> list[list[int]]:
    """The layers of each pass, so that their sums take no more than `memory` bytes."""
    passes: list[list[int]] = [[]]
    free = memory
    for layer, size in sizes.items():
        needed = dtype.itemsize * sum(rows * columns for rows, columns in _shapes(size))
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
