"""Shares of hits with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import MODELS, Answer, Side, Z, by_fact, layout, spread

ALIKE = 1e-20
"""A variance between relations below it is rounding: they do not differ. One hit more in 10,000 makes 1e-8."""


@dataclass(frozen=True)
class Rate:
    """A share of hits, with a score interval.

    Attributes:
        hits: Number of hits.
        total: Number of trials.
        rate: hits / total, with several seeds the mean of theirs; None if there were no trials.
        ci95: Lower and upper end of the 95 % interval, within [0, 1]; None if there were no trials.
        clustered_by: What the trials belong to that are not independent, for example `"relation"`; None where all are.
        clusters: How many of those there are; None where all trials are independent.
        effective: How many independent trials would give an interval as wide; None where all are. 0 where there is one
            cluster, whose interval is (0, 1).
    """

    hits: int
    total: int
    rate: float | None
    ci95: tuple[float, float] | None
    clustered_by: str | None = None
    clusters: int | None = None
    effective: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The rate as `{hits, total, rate, ci95: [low, high]}`, null where there is no value.

        Where trials are clustered also `clustered_by`, `clusters` and `effective`.
        """
        plain = {"hits": self.hits, "total": self.total, "rate": self.rate, "ci95": self.ci95 and list(self.ci95)}
        if self.clusters is None:
            return plain
        return plain | {"clustered_by": self.clustered_by, "clusters": self.clusters, "effective": self.effective}


def rate(hits: int, total: int) -> Rate:
    """A share of hits among independent trials, with its 95 % interval.

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
    low, high = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return Rate(hits=hits, total=total, rate=hits / total, ci95=(float(low), float(high)))


def clustered(answers: Iterable[Answer | tuple[Any, bool]], by: str = "relation") -> Rate:
    """A share of hits among answers that are independent only between relations.

    The interval is Wilson's for the effective number of answers: as many as would give the variance that is clustered
    by relation (`clusters.spread`), with the quantile of its t distribution for the normal one (Korn & Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated from survey data"). It
    is never narrower than if facts were independent, and where all relations have the same share of their answers right
    than one of as many trials as there are facts. benchmarks/README.md has its coverage.

    Args:
        answers: The answers; pairs of a cluster and a hit are taken for answers of a fact each.
        by: What a cluster is, for `Rate.clustered_by`.

    Returns:
        The rate; with the plain Wilson interval where every cluster has one answer and neither models nor seeds hold
        several, and with (0, 1) where there is one cluster of several.
    """
    given = [Answer(*answer) for answer in answers]
    (side,) = layout([given])
    values = np.array([[bool(a.value) for a in given]], dtype=np.float64)
    hits, total = int(values.sum()), len(given)
    clusters = len({a.relation for a in given})
    if total == clusters and len(np.unique(side.seed)) < 2 and len(np.unique(side.model)) in (*range(MODELS), total):
        return rate(hits, total)
    value = float(side.mean(values)[0])
    found = effective(side, values)
    if found is None:
        return Rate(hits, total, value, (0.0, 1.0), by, clusters, 0.0)
    low, high = (float(end[0]) for end in wilson(np.array([value]), found))
    ends = (0.0 if hits == 0 else low, 1.0 if hits == total else high)
    return Rate(hits, total, value, ends, by, clusters, float(found[0]))


def effective(side: Side, values: np.ndarray) -> np.ndarray | None:
    """How many independent trials would give an interval as wide; (studies,).

    Args:
        side: The layout of the answers.
        values: Hits as 1 and misses as 0; (studies, answers).

    Returns:
        The number; None where there is a single relation.
    """
    found = spread([(side, values, 1.0)], skewed=True)
    if found is None:
        return None
    p = side.mean(values)
    wider = (stats.t.ppf(0.975, found.df) / Z) ** 2
    alike = found.variance < ALIKE
    variance = np.maximum(found.variance * wider, least_variance(side, values))
    # Where relations do not differ nothing tells how far they could: only the quantile makes up for their being few.
    return np.where(alike, side.distinct / wider, p * (1 - p) / np.where(alike, 1.0, variance))


def least_variance(side: Side, values: np.ndarray) -> np.ndarray:
    """The variance of a share of hits if facts were independent, (studies,); no smaller than if all answers were.

    Hits and misses of a fact may cancel, as where one model keeps all facts and another one none: then facts do not
    differ, and still the share is not known for sure.
    """
    p = side.mean(values)
    return np.maximum(by_fact(side, values), p * (1 - p) * (side.weight**2).sum())


def wilson(p: np.ndarray, n: np.ndarray, quantile: np.ndarray | float = Z) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval for rates p of n trials, which need not be whole numbers."""
    centre, half = p + quantile**2 / (2 * n), quantile * np.sqrt(p * (1 - p) / n + quantile**2 / (4 * n**2))
    return (centre - half) / (1 + quantile**2 / n), (centre + half) / (1 + quantile**2 / n)
