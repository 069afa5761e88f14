"""The smallest difference that so many facts can show: two-sided 5 %, in 8 of 10 repetitions."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, stats

from retention_bench.analysis.intervals import Z

POWER = 0.8
_Z_POWER = float(stats.norm.ppf(POWER))


def detectable(rate: float, n: float, other_n: float) -> float | None:
    """The smallest difference between two rates on different facts that a test at 5 % finds with a power of 80 %.

    The normal approximation with the pooled variance under equality (Fleiss, Levin & Paik 2003, "Statistical methods
    for rates and proportions", section 4.4).

    Args:
        rate: The rate that the other one is compared with, within [0, 1].
        n: Number of facts behind it; the effective one where they are clustered.
        other_n: Number of facts behind the other rate.

    Returns:
        The difference, on the side where there is more room and, at 0.5, either; None where even the largest
        possible one is not found.
    """
    base = min(rate, 1 - rate)  # mirrored, the same question

    def lacking(delta: float) -> float:
        other = base + delta
        pooled = (n * base + other_n * other) / (n + other_n)
        equal = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / other_n))
        apart = math.sqrt(base * (1 - base) / n + other * (1 - other) / other_n)
        return delta - Z * equal - _Z_POWER * apart

    room = 1 - base
    return float(optimize.brentq(lacking, 1e-9, room)) if lacking(room) >= 0 else None


def detectable_paired(n: int, other_way: float = 0.0) -> float | None:
    """The smallest difference between two rates on the same facts that McNemar's exact test at 5 % finds, power 80 %.

    The power is computed exactly, over all numbers of facts that change.

    Args:
        n: Number of facts.
        other_way: Share of the facts that change against the difference; with 0 the smallest difference that can be
            found at all.

    Returns:
        The difference; None where even the largest possible one is not found.
    """
    changed = np.arange(n + 1)
    # The test rejects where at most this many change the other way: two tails of binomial(changed, 1/2).
    few = stats.binom.ppf(0.025, changed, 0.5)
    few -= 2 * stats.binom.cdf(few, changed, 0.5) > 0.05

    def lacking(delta: float) -> float:
        share = delta + 2 * other_way
        against = stats.binom.cdf(few, changed, other_way / share)
        return POWER - float(stats.binom.pmf(changed, n, share) @ against)

    room = 1 - 2 * other_way
    if room <= 0 or lacking(room) > 0:
        return None
    return float(optimize.brentq(lacking, 1e-9, room))
