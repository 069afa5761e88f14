"""Means and differences with their intervals: one typed result for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import Answer, Side, layout, spread
from retention_bench.analysis.power import detectable


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means.

    Attributes:
        value: The estimate; None where a side has no answer.
        ci95: Lower and upper end of the 95 % interval; None where value is. Where a side has a single relation nothing
            is known of others: the interval is the whole range, and None where there is no range. None too where values
            without a range are all the same, which says nothing about how they spread.
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


def mean(answers: Iterable[Answer], ends: tuple[float, float] | None = (-1.0, 1.0)) -> Estimate:
    """The mean of values that belong to facts of several relations, for example of each fact's paired difference.

    The interval is a t interval whose variance is clustered by relation (`clusters.spread`). Values with a range are
    few-valued, and all may be alike: one value at either end of the range is added to the centre and to the variance,
    as in Bonett & Price's interval for paired proportions (2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data").

    Answers of several seeds are averaged seed by seed and then over seeds; a fact that several models or seeds answer
    is no new fact.

    Args:
        answers: The values with what they belong to.
        ends: The lowest and the highest value that there can be; None for values without bounds, as log-odds.

    Returns:
        The mean and its interval.
    """
    return _contrast([(list(answers), 1.0, ends)], ends)


def gap(
    edited: Iterable[Answer], intrinsic: Iterable[Answer], ends: tuple[float, float] | None = (0.0, 1.0)
) -> Estimate:
    """The second side's mean minus the first's.

    Relations that both sides have make it a matched difference, those that one side has an unmatched one: the
    variance is that of every relation's part in the difference, which is Welch's where no relation is shared. One hit
    and one miss are added to either side (Agresti & Caffo 2000, "Simple and effective confidence intervals for
    proportions and differences of proportions"), so that 0 of 50 and 100 of 100 have a width.

    Args:
        edited: The answers of the first side.
        intrinsic: Those of the second.
        ends: As for `mean`.

    Returns:
        The difference and its interval.
    """
    whole = None if ends is None else (ends[0] - ends[1], ends[1] - ends[0])
    return _contrast([(list(edited), -1.0, ends), (list(intrinsic), 1.0, ends)], whole)


def _contrast(
    sides: Sequence[tuple[list[Answer], float, tuple[float, float] | None]], whole: tuple[float, float] | None
) -> Estimate:
    laid = layout([answers for answers, _, _ in sides])
    facts = min(side.facts for side in laid)
    clusters = len({answer.relation for answers, _, _ in sides for answer in answers})
    if not facts:
        return Estimate(None, None, facts, clusters, None, None)
    values = [np.array([[a.value for a in answers]], dtype=np.float64) for answers, _, _ in sides]
    signed = [(side, v, sign) for side, v, (_, sign, _) in zip(laid, values, sides, strict=True)]
    found = interval(signed, sides[0][2])
    value = float(sum(sign * side.mean(v)[0] for side, v, sign in signed))
    if found is None:
        return Estimate(value, whole, facts, clusters, None, None)
    low, high, error, df = (float(part[0]) for part in found)
    if not error:
        return Estimate(value, None, facts, clusters, df, None)
    low, high = min(low, value), max(high, value)
    effect = detectable(error, df)
    if whole is not None:
        low, high = max(low, whole[0]), min(high, whole[1])
    possible = whole is None or effect <= whole[1]
    return Estimate(value, (low, high), facts, clusters, df, effect if possible else None)


def interval(
    sides: Sequence[tuple[Side, np.ndarray, float]], ends: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """The interval of a sum of signed means, for many studies of one layout.

    Args:
        sides: For every mean its layout, its values (studies, answers) and its sign.
        ends: The lowest and the highest value of all sides; None where there are none.

    Returns:
        Lower and upper ends, standard errors and degrees of freedom; (studies,) each. None where a side has a single
        relation.
    """
    # Of two sides the skews cancel each other.
    found = spread(sides, skewed=ends is not None and len(sides) == 1)
    if found is None:
        return None
    centre, variance = np.zeros_like(found.variance), found.variance
    if ends is None:
        centre = sum((sign * side.mean(values) for side, values, sign in sides), centre)
    else:
        low, high = ends
        shrunk = 1.0
        added = np.zeros_like(variance)
        for side, values, sign in sides:
            n = side.facts
            own = (n * side.mean(values) + low + high) / (n + 2)
            centre = centre + sign * own
            added = added + ((low - own) ** 2 + (high - own) ** 2) / (n + 2) ** 2
            shrunk = min(shrunk, n / (n + 2))
        variance = variance * shrunk**2 + added
    error = np.sqrt(variance)
    half = stats.t.ppf(0.975, found.df) * error
    return centre - half, centre + half, error, found.df
