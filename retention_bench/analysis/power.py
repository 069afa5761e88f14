"""The smallest difference that can be shown: two-sided 5 %, in 8 of 10 repetitions."""

from __future__ import annotations

import numpy as np
from scipy import optimize, stats

POWER = 0.8


def detectable(error: float, df: float) -> float:
    """The true effect that a two-sided t test at 5 % finds in 80 % of studies.

    Args:
        error: The standard error of the estimate.
        df: Its degrees of freedom.

    Returns:
        The effect, from the noncentral t distribution (Cohen 1988, "Statistical power analysis", chapter 2).
    """
    critical = float(stats.t.ppf(0.975, df))
    # Found on the right side; that the wrong side adds nothing at this power.
    shift = optimize.brentq(lambda by: float(stats.nct.sf(critical, df, by)) - POWER, 0.0, 10.0 * critical)
    return error * float(shift)


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
