"""Where each entry of a leaderboard stands, and how sure that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import Answer

_RESAMPLES_AT_ONCE = 500  # bounds the memory: 500 x relations counts


@dataclass(frozen=True)
class Rank:
    """An entry's place, from 1 on.

    Attributes:
        rank: The place; entries with the same mean share the best of theirs.
        ci95: Best and worst place of the 95 % interval.
    """

    rank: int
    ci95: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """The rank as `{rank, ci95: [best, worst]}`."""
        return {"rank": self.rank, "ci95": list(self.ci95)}


def rank_intervals(
    entries: Mapping[str, Iterable[Answer]],
    *,
    lowest_first: bool = False,
    gated: Collection[str] = (),
    seed: int = 0,
    resamples: int = 10_000,
) -> dict[str, Rank]:
    """Rank entries by the mean of their answers, with percentile bootstrap intervals over the relations.

    A resample draws relations with all their facts, and every entry is ranked on what was drawn (Goldstein &
    Spiegelhalter 1996; Hall & Miller 2009, "Using the bootstrap to quantify the authority of an empirical ranking").
    Entries that tie in a resample hold all the places they share, so entries that answered alike are not told apart.
    With one relation every resample is the same, so every entry's interval is all places.

    Args:
        entries: By entry, its answers: hits, or the paired difference of every fact that has one.
        lowest_first: Whether the lowest mean is the first place, as for the paired difference, of which less is better.
        gated: The entries that have no rank: a gate says that their figures can't be trusted.
        seed: Of the bootstrap.
        resamples: Number of bootstrap resamples.

    Returns:
        The rank of every entry that is not gated, in the order of `entries`.

    Raises:
        ValueError: An entry that is to be ranked has no answer.
    """
    ranked = {name: list(own) for name, own in entries.items() if name not in gated}
    if without := [name for name, own in ranked.items() if not own]:
        raise ValueError(f"an entry must have an answer, and these have none: {without}")
    if not ranked:
        return {}
    table = _table(ranked)
    sign = 1 if lowest_first else -1
    places, relations = len(ranked), table.shape[1]
    own = stats.rankdata(sign * _means(table.sum(axis=1), sign), method="min")
    if relations == 1:
        return {name: Rank(int(place), (1, places)) for name, place in zip(ranked, own, strict=True)}
    rng = np.random.default_rng(seed)
    best, worst = [], []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = rng.multinomial(relations, np.full(relations, 1 / relations), size=count)
        means = sign * _means(np.einsum("rg,egx->rex", drawn, table), sign)
        best.append(stats.rankdata(means, method="min", axis=1))
        worst.append(stats.rankdata(means, method="max", axis=1))
    low = np.quantile(np.concatenate(best), 0.025, axis=0, method="inverted_cdf")
    high = np.quantile(np.concatenate(worst), 0.975, axis=0, method="inverted_cdf")
    return {name: Rank(int(own[i]), (int(low[i]), int(high[i]))) for i, name in enumerate(ranked)}


def _table(entries: Mapping[str, Iterable[Answer]]) -> np.ndarray:
    """The sum and the number of values by entry and relation; (entries, relations, 2)."""
    relations: dict[Hashable, int] = {}
    counts: list[dict[int, list[float]]] = []
    for answers in entries.values():
        own: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for answer in answers:
            cell = own[relations.setdefault(answer.relation, len(relations))]
            cell[0] += answer.value
            cell[1] += 1
        counts.append(own)
    return np.array([[own.get(g, [0.0, 0.0]) for g in relations.values()] for own in counts])


def _means(sums: np.ndarray, sign: int) -> np.ndarray:
    """Means, rounded so that equal ones are equal; an entry that a resample leaves no answer comes last."""
    total, count = sums[..., 0], sums[..., 1]
    return np.where(count > 0, np.round(total / np.maximum(count, 1), 12), sign * np.inf)
