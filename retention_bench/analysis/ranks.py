"""Where each entry of a leaderboard stands, and how sure that is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import Answer, Side, layout
from retention_bench.analysis.estimates import difference


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
    entries: Mapping[str, Iterable[Answer]], *, lowest_first: bool = False, gated: Collection[str] = ()
) -> dict[str, Rank]:
    """Rank entries by the mean of their answers, with intervals from all differences between two of them.

    An entry's best place is behind those that are surely better, its worst before those that are surely worse: those
    the interval of whose difference, clustered by relation, excludes 0. An entry is held against all others, so the
    intervals are of 1 - 5 % / (entries - 1): its places hold the true one in 95 % of studies (Bonferroni; Mohamad,
    Goeman & van Zwet 2019, "Simultaneous confidence intervals for ranks"). Two entries are told apart exactly where the
    interval of their difference excludes 0.

    Args:
        entries: By entry, its answers: hits, or the paired difference of every fact that has one; within [-1, 1].
        lowest_first: Whether the lowest mean is the first place, as for the paired difference, of which less is better.
        gated: The entries that have no rank: a gate says that their figures can't be trusted.

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
    sides = layout(list(ranked.values()))
    # Of each entry a study of its own.
    values = [np.array([[a.value for a in own]], dtype=np.float64) for own in ranked.values()]
    means = np.array([float(side.mean(own)[0]) for side, own in zip(sides, values, strict=True)])
    places = stats.rankdata(np.round(means if lowest_first else -means, 12), method="min")  # equal ones are equal
    ahead = apart(sides, values)[..., 0] * (-1 if lowest_first else 1)
    best, worst = 1 + (ahead < 0).sum(axis=1), len(sides) - (ahead > 0).sum(axis=1)
    return {name: Rank(int(places[i]), (int(best[i]), int(worst[i]))) for i, name in enumerate(ranked)}


def apart(sides: Sequence[Side], values: Sequence[np.ndarray]) -> np.ndarray:
    """Which entries' means differ for sure, for many studies of one layout.

    Args:
        sides: The layout of every entry.
        values: Its values, within [-1, 1]; (studies, answers).

    Returns:
        1 where the first entry's mean is surely the larger one, -1 where the second's is, else 0; (entries, entries,
        studies).
    """
    found = np.zeros((len(sides), len(sides), len(values[0])), dtype=np.int64)
    for i, j in itertools.combinations(range(len(sides)), 2):
        ends = difference((sides[i], values[i]), (sides[j], values[j]), level=1 - 0.05 / (len(sides) - 1))
        if ends is not None:
            found[i, j] = (ends[0] > 0).astype(np.int64) - (ends[1] < 0)
            found[j, i] = -found[i, j]
    return found
