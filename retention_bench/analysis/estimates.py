"""Means and differences with their intervals: one typed result for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import Answer, Side, layout, spread
from retention_bench.analysis.intervals import ALIKE, least_variance, wilson
from retention_bench.analysis.power import detectable

_ROUNDING = 1e-9
"""An error that is as small beside the values is none."""


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means.

    Attributes:
        value: The estimate; None where a side has no answer.
        ci95: Lower and upper end of the 95 % interval; None where value is. Where a side has a single relation nothing
            is known of others: the interval is the whole range, and None where there is no range. None too where the
            relations' means of values without a range are all the same, which says nothing about how they spread.
        n: Number of facts, of the smaller side.
        clusters: Number of relations.
        df: Degrees of freedom of the interval, at most the number of relations less the number of unmatched sides;
            None where there is one relation or none.
        detectable: The minimum detectable effect: a true difference of that size makes an interval like this one
            exclude 0 in 80 % of studies. None where no difference within the range would.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    clusters: int
    df: float | None
    detectable: float | None

    def to_json(self) -> dict[str, Any]:
        """The estimate as `{value, ci95: [low, high], n, clusters, df, detectable}`, null where there is no value."""
        return vars(self) | {"ci95": self.ci95 and list(self.ci95)}


def mean(answers: Iterable[Answer], *, bounded: bool = True) -> Estimate:
    """The mean of values that belong to facts of several relations, for example of each fact's paired difference.

    The interval is a t interval whose variance is clustered by relation (`clusters.spread`). Values within [-1, 1] are
    few, and all may be alike: one value at either end of the range is added to the centre and to the variance, as in
    Bonett & Price's interval for paired proportions (2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data").

    Answers of several seeds are averaged seed by seed and then over seeds; a fact that several models or seeds answer
    is no new fact.

    Args:
        answers: The values with what they belong to.
        bounded: Whether values are within [-1, 1]; else they have no bounds, as log-odds.

    Returns:
        The mean and its interval.
    """
    return _contrast([(list(answers), 1.0)], bounded)


def gap(edited: Iterable[Answer], intrinsic: Iterable[Answer], *, bounded: bool = True) -> Estimate:
    """The second side's mean minus the first's.

    Relations that both sides have make it a matched difference, those that one side has an unmatched one: the
    variance is that of every relation's part in the difference, which is Welch's where no relation is shared. Of rates
    the interval is put together from the sides' score intervals (Newcombe 1998, "Interval estimation for the
    difference between independent proportions", method 10, and its paired form; Zou & Donner 2008, "Construction of
    confidence limits about effect measures: a general approach"), so that 0 of 50 and 100 of 100 have a width, and
    rates near 1 a longer arm towards the middle. The quantile is t's.

    Args:
        edited: The answers of the first side.
        intrinsic: Those of the second.
        bounded: Whether values are within [0, 1]; else they have no bounds, as log-odds.

    Returns:
        The difference and its interval.
    """
    return _contrast([(list(edited), -1.0), (list(intrinsic), 1.0)], bounded)


def _contrast(sides: Sequence[tuple[list[Answer], float]], bounded: bool) -> Estimate:
    laid = layout([answers for answers, _ in sides])
    facts = min(side.facts for side in laid)
    clusters = len({answer.relation for answers, _ in sides for answer in answers})
    if not facts:
        return Estimate(None, None, facts, clusters, None, None)
    signed = [
        (side, np.array([[a.value for a in answers]], dtype=np.float64), sign)
        for side, (answers, sign) in zip(laid, sides, strict=True)
    ]
    value = float(sum(sign * side.mean(values)[0] for side, values, sign in signed))
    found = interval(signed, bounded=bounded)
    if found is None:
        return Estimate(value, (-1.0, 1.0) if bounded else None, facts, clusters, None, None)
    low, high, error, df = (float(part[0]) for part in found)
    # Of equal values sums differ by rounding.
    if error <= _ROUNDING * max(1.0, *(float(np.abs(values).max()) for _, values, _ in signed)):
        return Estimate(value, None, facts, clusters, df, None)
    low, high = min(low, value), max(high, value)
    effect = detectable(error, df)
    if not bounded:
        return Estimate(value, (low, high), facts, clusters, df, effect)
    return Estimate(value, (max(low, -1.0), min(high, 1.0)), facts, clusters, df, effect if effect <= 1 else None)


Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def interval(sides: Sequence[tuple[Side, np.ndarray, float]], *, bounded: bool) -> Parts | None:
    """The interval of a sum of signed means, for many studies of one layout.

    Args:
        sides: For every mean its layout, its values (studies, answers) and its sign.
        bounded: Whether the values of a single side are within [-1, 1], of two sides within [0, 1].

    Returns:
        Lower and upper ends, standard errors and degrees of freedom; (studies,) each. None where a side has a single
        relation.
    """
    found = spread(sides, skewed=bounded)
    if found is None:
        return None
    critical = stats.t.ppf(0.975, found.df)
    if bounded and len(sides) == 2:
        low, high = _from_sides(sides, found.variance, critical)
        return low, high, (high - low) / 2 / critical, found.df
    variance = found.variance
    centre = sum((sign * side.mean(values) for side, values, sign in sides), np.zeros_like(variance))
    if bounded:
        ((side, _, _),) = sides
        centre, variance = _with_both_ends(centre, variance, side.facts)
    error = np.sqrt(variance)
    return centre - critical * error, centre + critical * error, error, found.df


def difference(
    one: tuple[Side, np.ndarray], other: tuple[Side, np.ndarray], *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray] | None:
    """The interval of the first mean minus the second, of values within [-1, 1], for many studies of one layout.

    Where both are asked alike it is `mean`'s of their differences, answer by answer. They need not be: relations that
    both have are paired.

    Args:
        one: The layout of the first mean and its values (studies, answers).
        other: Those of the second.
        level: How often it is to hold the truth.

    Returns:
        Lower and upper ends; (studies,) each. None where a side has a single relation.
    """
    (first, values), (second, others) = one, other
    alike = all(np.array_equal(getattr(first, f), getattr(second, f)) for f in ("relation", "fact", "model", "seed"))
    sides = [(first, values - others, 1.0)] if alike else [(first, values, 1.0), (second, others, -1.0)]
    found = spread(sides, skewed=True)
    if found is None:
        return None
    centre = first.mean(values) - second.mean(others)
    centre, variance = _with_both_ends(centre, found.variance, min(first.facts, second.facts))
    half = stats.t.ppf((1 + level) / 2, found.df) * np.sqrt(variance)
    return centre - half, centre + half


def _with_both_ends(centre: np.ndarray, variance: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A mean of n values and its variance, with a 1 and a -1 added to them."""
    centre = n * centre / (n + 2)
    return centre, (n**2 * variance + (1 - centre) ** 2 + (1 + centre) ** 2) / (n + 2) ** 2


def _from_sides(
    sides: Sequence[tuple[Side, np.ndarray, float]], variance: np.ndarray, critical: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the difference of two rates, the second minus the first; (studies,) each."""
    parts: list[Parts] = []
    for side, values, _ in sides:
        p = side.mean(values)
        alone = spread([(side, values, 1.0)], skewed=True)
        assert alone is not None  # there are several relations, or there were no variance
        # By chance all relations may agree better than they could: half as wide as if facts were independent, at least.
        own = np.maximum(alone.variance, least_variance(side, values) / 4)
        alike = alone.variance < ALIKE
        n = np.where(alike, side.distinct, p * (1 - p) / np.where(alike, 1.0, own))
        low, high = wilson(p, n, critical)
        parts.append((p, low, high, alone.variance))
    (p, p_low, p_high, p_variance), (q, q_low, q_high, q_variance) = parts
    shared = (p_variance + q_variance - variance) / 2
    # A hit and a miss more on either side keep sides that happen to be alike from being taken for the same.
    more = [0.5 / (side.facts + 2) ** 2 for side, _, _ in sides]
    together = np.clip(shared / np.sqrt((p_variance + more[0]) * (q_variance + more[1])), -1, 1)

    def reach(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(0.0, one**2 + other**2 - 2 * together * one * other))

    return q - p - reach(q - q_low, p_high - p), q - p + reach(q_high - q, p - p_low)
