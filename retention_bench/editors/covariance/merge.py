"""One covariance out of several: the shards of a measurement, or covariances over different texts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from retention_bench.editors.covariance.covariance import Covariance, Measurement
from retention_bench.editors.covariance.fingerprint import TOLERANCE, distance
from retention_bench.errors import UsageError


def merged(parts: Sequence[Covariance]) -> Covariance:
    """The covariance over all texts of several, each weighted by its tokens.

    Args:
        parts: All shards of one measurement, in any order, or covariances over different texts.

    Raises:
        UsageError: Nothing to merge, parts that are missing, given twice or of different measurements, or parts of
            different models, layers or settings.
    """
    if not parts:
        raise UsageError("No covariance was given to merge. Give all shards of one measurement.")
    first = parts[0]
    for part in parts[1:]:
        _check_alike(first, part)
    shards = sorted(part.measured.shard for part in parts if part.measured.shard)
    if shards:
        count = shards[0][1]
        whole = len(shards) == len(parts) == count and shards == [(index, count) for index in range(count)]
        if not whole:
            named = ", ".join("/".join(map(str, shard)) for shard in shards)
            raise UsageError(
                f"The shards {named} are not the whole of one measurement. Merge 0/{count} to "
                f"{count - 1}/{count}, each once."
            )
    elif any(_same(one, other) for one, other in itertools.combinations(parts, 2)):
        raise UsageError("The same covariance was given twice, and would count twice. Give each once.")
    tokens = sum(part.tokens for part in parts)
    mom2 = {}
    for layer, matrix in first.mom2.items():
        total = torch.zeros_like(matrix, dtype=torch.float64)
        for part in parts:
            total.add_(part.mom2[layer], alpha=part.tokens / tokens)
        mom2[layer] = total.float()
    counts = [part.measured.texts for part in parts]
    texts = None if None in counts else sum(count for count in counts if count is not None)
    sources = "; ".join(dict.fromkeys(part.source for part in parts if part.source))
    measured = dataclasses.replace(first.measured, texts=texts, shard=None)
    return Covariance(mom2, tokens, sources, first.fingerprint, measured)


def _same(first: Covariance, other: Covariance) -> bool:
    """Whether two were collected over as many tokens and have the same matrices."""
    return first.tokens == other.tokens and all(
        torch.equal(matrix, other.mom2[layer]) for layer, matrix in first.mom2.items()
    )


def _check_alike(first: Covariance, other: Covariance) -> None:
    """Refuse parts of different models, layers or settings."""
    shapes = [{layer: len(matrix) for layer, matrix in part.mom2.items()} for part in (first, other)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"Covariances of different layers or sizes cannot be merged: the size of the keys by layer is {shapes[0]} "
            f"in one and {shapes[1]} in another."
        )
    plain = [dataclasses.replace(part.measured, texts=None, shard=None) for part in (first, other)]
    for field in dataclasses.fields(Measurement):
        ours, theirs = (getattr(measured, field.name) for measured in plain)
        if ours != theirs:
            raise UsageError(
                f"Covariances that were measured differently cannot be merged: {field.name} is {str(ours)[:200]} in "
                f"one and {str(theirs)[:200]} in another."
            )
    if set(first.fingerprint) != set(other.fingerprint):
        raise UsageError(
            "Covariances with and without a fingerprint of their model cannot be merged. Collect them anew."
        )
    for layer, keys in first.fingerprint.items():
        away = distance(other.fingerprint[layer], keys)
        if not away <= TOLERANCE:
            raise UsageError(
                f"Covariances of different models cannot be merged: their fingerprints of layer {layer} differ by "
                f"{100 * away:.1f} %."
            )
