"""Rates with their intervals: how many, how many survived, and how much fewer edited facts than intrinsic ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

_Z = NormalDist().inv_cdf(0.975)  # two-sided 95 %
_RESAMPLES_AT_ONCE = 500  # bounds the memory of the bootstrap: 500 x clusters indices


@dataclass(frozen=True)
class Rate:
    """A share of hits, with Wilson's score interval.

    Attributes:
        hits: Number of hits.
        total: Number of trials.
        rate: hits / total; None if there were no trials.
        ci95: Lower and upper end of the 95 % interval, within [0, 1]; None if there were no trials.
    """

    hits: int
    total: int
    rate: float | None
    ci95: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """The rate as `{hits, total, rate, ci95: [low, high]}`, null where there is no value."""
        return {"hits": self.hits, "total": self.total, "rate": self.rate, "ci95": self.ci95 and list(self.ci95)}


@dataclass(frozen=True)
class Gap:
    """Intrinsic retention minus edited retention: positive where edited facts are lost more easily.

    Attributes:
        value: The difference, within [-1, 1]; None if one side has no fact that was correct before.
        ci95: Lower and upper end of the 95 % interval; None where value is.
    """

    value: float | None
    ci95: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """The gap as `{value, ci95: [low, high]}`, null where there is no value."""
        return {"value": self.value, "ci95": self.ci95 and list(self.ci95)}


def rate(hits: int, total: int) -> Rate:
    """A share of hits with its 95 % interval.

    The interval is Wilson's score interval without continuity correction (Wilson 1927; method 3 in Newcombe 1998,
    "Two-sided confidence intervals for the single proportion"): it keeps near its nominal coverage for few trials and
    for rates near 0 and 1, where the usual ± 1.96 standard errors does not.

    Raises:
        ValueError: Not 0 <= hits <= total.
    """
    if not 0 <= hits <= total:
        raise ValueError(f"hits must be between 0 and total, got {hits} of {total}")
    if total == 0:
        return Rate(hits=0, total=0, rate=None, ci95=None)
    p = hits / total
    centre = (p + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z / (1 + _Z**2 / total) * math.sqrt(p * (1 - p) / total + _Z**2 / (4 * total**2))
    # At 0 and 1 an end of the interval is exact; rounding must not push the rate out of it.
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == total else centre + half
    return Rate(hits=hits, total=total, rate=p, ci95=(low, high))


def retention(before: Mapping[Any, bool], after: Mapping[Any, bool]) -> Rate:
    """P(correct after | correct before): of the questions answered before, the share that still is.

    Args:
        before: Whether each question was answered correctly, by a key of one's own choice.
        after: The same questions, later.

    Returns:
        The rate with its own denominator, the questions answered correctly before. Its interval takes the questions as
        independent; where several belong to one fact it is too narrow.

    Raises:
        ValueError: The two do not have the same keys.
    """
    _same_keys(before, after)
    known = [key for key, hit in before.items() if hit]
    return rate(sum(bool(after[key]) for key in known), len(known))


def gap(
    edited_before: Mapping[Any, bool | Sequence[bool]],
    edited_after: Mapping[Any, bool | Sequence[bool]],
    intrinsic_before: Mapping[Any, bool | Sequence[bool]],
    intrinsic_after: Mapping[Any, bool | Sequence[bool]],
    *,
    seed: int,
    resamples: int = 10_000,
) -> Gap:
    """Retention of intrinsic facts minus retention of edited facts, with a 95 % percentile bootstrap interval.

    The two sides are resampled independently, and by key: a fact that was asked several times (an intrinsic fact in
    every one of several edited models) goes in or stays out with all its outcomes, because they are not independent
    (the cluster bootstrap; Davison & Hinkley 1997, section 3.8). Resampled are the keys with an outcome that was
    correct before: retention is not defined on the others.

    Args:
        edited_before: By fact, whether it was answered correctly; a list where it was asked several times.
        edited_after: The same facts later, lists in the same order.
        intrinsic_before: As `edited_before`, for intrinsic facts.
        intrinsic_after: As `edited_after`, for intrinsic facts.
        seed: Of the bootstrap; the same seed gives the same interval.
        resamples: Number of bootstrap resamples.

    Returns:
        The gap; without a value where a side has no fact that was correct before.

    Raises:
        ValueError: Before and after do not have the same keys, or lists of a key differ in length.
    """
    edited = _clusters(edited_before, edited_after)
    intrinsic = _clusters(intrinsic_before, intrinsic_after)
    if not len(edited) or not len(intrinsic):
        return Gap(value=None, ci95=None)
    rng = np.random.default_rng(seed)
    differences = _bootstrap(intrinsic, rng, resamples) - _bootstrap(edited, rng, resamples)
    low, high = np.quantile(differences, [0.025, 0.975])
    return Gap(value=_ratio(intrinsic) - _ratio(edited), ci95=(float(low), float(high)))


def _clusters(before: Mapping[Any, bool | Sequence[bool]], after: Mapping[Any, bool | Sequence[bool]]) -> np.ndarray:
    """Counts of (correct before and after, correct before) by key; int64, (keys with a correct before, 2)."""
    _same_keys(before, after)
    counts = []
    for key in before:
        pairs = list(zip(_outcomes(before[key]), _outcomes(after[key]), strict=True))
        counts.append((sum(b and a for b, a in pairs), sum(b for b, _ in pairs)))
    table = np.array(counts, dtype=np.int64).reshape(-1, 2)
    return table[table[:, 1] > 0]


def _outcomes(value: bool | Sequence[bool]) -> list[bool]:
    return [bool(outcome) for outcome in value] if isinstance(value, Sequence) else [bool(value)]


def _ratio(clusters: np.ndarray) -> float:
    survived, known = clusters.sum(axis=0)
    return float(survived / known)


def _bootstrap(clusters: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Retention in each resample of the clusters; float64, (resamples,)."""
    n = len(clusters)
    ratios = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        rows = rng.integers(0, n, size=(min(_RESAMPLES_AT_ONCE, resamples - start), n))
        ratios.append(clusters[rows, 0].sum(axis=1) / clusters[rows, 1].sum(axis=1))
    return np.concatenate(ratios)


def _same_keys(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> None:
    if before.keys() != after.keys():
        raise ValueError(f"before and after differ in keys: {sorted(map(str, before.keys() ^ after.keys()))[:5]}")
