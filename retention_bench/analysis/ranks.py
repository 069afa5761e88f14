"""Where each entry of a leaderboard stands, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

_RESAMPLES_AT_ONCE = 500  # bounds the memory: 500 x facts counts


@dataclass(frozen=True)
class Rank:
    """An entry's place, 1 for the highest rate.

    Attributes:
        rank: The place; entries with the same rate share the best of theirs.
        ci95: Best and worst place of the 95 % interval.
    """

    rank: int
    ci95: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """The rank as `{rank, ci95: [best, worst]}`."""
        return {"rank": self.rank, "ci95": list(self.ci95)}


def rank_intervals(
    entries: Mapping[str, Mapping[str, tuple[float, float]]], *, seed: int, resamples: int = 10_000
) -> dict[str, Rank]:
    """Rank entries by their rate, with percentile bootstrap intervals over the facts.

    A resample draws facts, and every entry is ranked on the facts drawn (Goldstein & Spiegelhalter 1996; Hall & Miller
    2009, "Using the bootstrap to quantify the authority of an empirical ranking"). Entries that tie in a resample hold
    all the places they share, so entries that answered alike are not told apart.

    Args:
        entries: By entry and fact, the number of hits and of trials; for retention, the trials are the answers that
            were correct before. A fact that an entry lacks counts as no trial.
        seed: Of the bootstrap.
        resamples: Number of bootstrap resamples.

    Returns:
        The rank of every entry, in the order of `entries`.

    Raises:
        ValueError: An entry has no trial.
    """
    facts = sorted({fact for own in entries.values() for fact in own})
    table = np.array([[own.get(fact, (0, 0)) for fact in facts] for own in entries.values()], dtype=np.float64)
    table = table.reshape(len(entries), len(facts), 2)
    without = [name for name, trials in zip(entries, table[:, :, 1].sum(axis=1), strict=True) if not trials]
    if without:
        raise ValueError(f"an entry must have a trial, and these have none: {without}")
    rng = np.random.default_rng(seed)
    best, worst = [], []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = rng.multinomial(len(facts), np.full(len(facts), 1 / len(facts)), size=count)
        rates = _rates(np.einsum("rf,efx->rex", drawn, table))
        best.append(stats.rankdata(-rates, method="min", axis=1))
        worst.append(stats.rankdata(-rates, method="max", axis=1))
    low = np.quantile(np.concatenate(best), 0.025, axis=0, method="inverted_cdf")
    high = np.quantile(np.concatenate(worst), 0.975, axis=0, method="inverted_cdf")
    own = stats.rankdata(-_rates(table.sum(axis=1)), method="min")
    return {name: Rank(int(own[i]), (int(low[i]), int(high[i]))) for i, name in enumerate(entries)}


def _rates(counts: np.ndarray) -> np.ndarray:
    """Hits over trials, rounded so that equal rates are equal; an entry that a resample leaves no trial comes last."""
    hits, trials = counts[..., 0], counts[..., 1]
    return np.where(trials > 0, np.round(hits / np.maximum(trials, 1e-300), 12), -1.0)
