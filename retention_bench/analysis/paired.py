"""Two models asked the same facts: the exact tests, by fact and by relation, and Holm's correction for many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's exact test.

    Were both sides alike, each fact on which they differ would be as likely to be lost as gained (McNemar 1947; the
    exact conditional test of Fagerland, Lydersen & Laake 2013).

    Args:
        lost: Facts that only the first side answers.
        gained: Facts that only the second side answers.

    Returns:
        The probability of at least so uneven a split; 1 where the sides do not differ.

    Raises:
        ValueError: A count is negative.
    """
    if min(lost, gained) < 0:
        raise ValueError(f"counts must not be negative, got {lost} and {gained}")
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def sign_flips(changes: Sequence[int]) -> float:
    """McNemar's exact test where a fact, or a relation, can change by more than one answer.

    Answers of a fact are not independent, nor are those of a relation, so each counts once, with the sum of its
    changes: were both sides alike, every sum would be as likely with the other sign. That is the permutation test for
    pairs (Fisher 1935); with one question for each fact it is `mcnemar`. All signs are gone through, so it is exact;
    but where a side was asked more often than the other, signs are not quite exchangeable: with 50 models against one,
    6 to 7 % of simulated comparisons without a difference had p below 0.05. Five relations can't have a p below 0.0625.

    Args:
        changes: For every fact (or relation), how many more answers the second side has, in whole units of one's own
            choice.

    Returns:
        Two-sided p: the probability of a total at least as far from 0.
    """
    sizes = [abs(change) for change in changes if change]
    if len(set(sizes)) <= 1:
        return mcnemar(sum(change < 0 for change in changes), sum(change > 0 for change in changes))
    unit = math.gcd(*sizes)
    sizes = [size // unit for size in sizes]
    most, total = sum(sizes), abs(sum(changes)) // unit
    # Probabilities of the totals from -most to most, one by one.
    chances = np.zeros(2 * most + 1)
    chances[most] = 1.0
    for size in sizes:
        up, down = np.zeros_like(chances), np.zeros_like(chances)
        up[size:], down[:-size] = chances[:-size], chances[size:]
        chances = (up + down) / 2
    return min(1.0, float(chances[: most - total + 1].sum() + chances[most + total :].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several: with those below 0.05, one false finding at most in 20 such families.

    Holm's step-down ("A simple sequentially rejective multiple test procedure", 1979).

    Args:
        p_values: The p-values of all tests that are looked at.

    Returns:
        The adjusted p-values in the same order; none is below its own p, and their order is that of the p-values.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(value) for value in adjusted]
