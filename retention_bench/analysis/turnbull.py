"""The distribution of a time that is known only to lie between two looks, or beyond the last one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 20_000
_CLOSE = 1e-9


@dataclass(frozen=True)
class Estimate:
    """Shares that survive, for several weightings of the same observations.

    Attributes:
        doses: The start and the ends of the observations' intervals, ascending, (ends).
        survival: The share whose time is beyond each, (weightings, ends); 1 at the first.
    """

    doses: np.ndarray
    survival: np.ndarray


def turnbull(low: np.ndarray, high: np.ndarray, weights: np.ndarray, start: float = 0.0) -> Estimate:
    """The nonparametric maximum-likelihood estimate from interval-censored times.

    Turnbull (1976), "The empirical distribution function with arbitrarily grouped, censored and truncated data": mass
    lies only on the innermost intervals, and EM finds how much on each. Where all are looked at at the same doses, it
    is Kaplan and Meier's estimate with each loss at the look at which it shows. Where runs stop between two looks of
    others, it is not: Kaplan-Meier would count the losses in such a run's last, shorter interval on top of those that
    the others have in the longer one.

    Args:
        low: Doses beyond which the times lie, (observations).
        high: Doses at or before which they lie, infinite where a time is right-censored, (observations).
        weights: How often each observation counts, (weightings, observations); each weighting counts one at least.
        start: The dose at which all are followed from.

    Returns:
        The estimate. Each weighting after the first starts close to the first's estimate, so that where it cannot tell
        two intervals apart they keep the first's proportion.
    """
    observed, place = np.unique(np.stack([low, high], axis=1), axis=0, return_inverse=True)
    counts = np.zeros((len(weights), len(observed)))
    for row, own in zip(counts, weights, strict=True):
        row += np.bincount(place.ravel(), own, minlength=len(observed))
    begins, ends = _innermost(observed[:, 0], observed[:, 1])
    inside = ((observed[:, :1] <= begins) & (ends <= observed[:, 1:])).astype(float)
    shares = np.full((1, len(begins)), 1 / len(begins))
    first = _maximise(shares, counts[:1], inside)
    near = np.repeat(0.99 * first + 0.01 * shares, len(counts) - 1, axis=0)
    shares = np.concatenate([first, _maximise(near, counts[1:], inside)])
    doses = np.unique([start, *observed[np.isfinite(observed)]])
    survival = 1 - shares @ (ends[:, None] <= doses)
    return Estimate(doses, survival.clip(0, 1))


def _innermost(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals (begin, end] that begin with an observation's begin, end with one's end, and have none in between."""
    lefts, rights = np.unique(low), np.unique(high)
    begins = lefts[np.searchsorted(lefts, rights) - 1]  # the last begin before each end
    previous = np.concatenate([[-np.inf], rights[:-1]])
    own = previous <= begins
    return begins[own], rights[own]


def _maximise(shares: np.ndarray, counts: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """EM: shares of the intervals, (weightings, intervals).

    Args:
        shares: To start from; none is 0.
        counts: Of the distinct observations, (weightings, observations).
        inside: Whether an interval lies in an observation, (observations, intervals).
    """
    for _ in range(_ROUNDS if len(counts) else 0):
        found = shares @ inside.T
        # An observation that a weighting leaves out may come to have no share, and counts nothing.
        parts = np.divide(counts, found, out=np.zeros_like(counts), where=counts > 0)
        better = shares * (parts @ inside) / counts.sum(1, keepdims=True)
        moved = np.abs(better - shares).max()
        shares = better
        if moved < _CLOSE:
            break
    return shares
