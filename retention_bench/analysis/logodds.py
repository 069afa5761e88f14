"""Log-odds of probabilities that are given as their natural logarithms."""

from __future__ import annotations

import math

LEAST_PROBABILITY = 1e-9
"""A probability below it counts as it: log-odds of -20.7. Otherwise one target of many tokens would outweigh all."""
LARGEST_PROBABILITY = 1 - 1e-6
"""A probability above it counts as it: log-odds of +13.8. Float32 logits of size 16 leave none finer."""


def logit(logprob: float) -> float:
    """Log-odds, in nats, of a probability; one beyond the limits counts as the limit.

    Args:
        logprob: Its natural logarithm, at most 0; `-inf` is allowed.

    Raises:
        ValueError: It is above 0 or no number.
    """
    if not logprob <= 0:  # also where it is no number
        raise ValueError(f"a log-probability must be at most 0, got {logprob}")
    inside = min(max(logprob, math.log(LEAST_PROBABILITY)), math.log(LARGEST_PROBABILITY))
    # log(1 - p) by expm1: of 1 - exp(-1e-6) ten digits would be left.
    return inside - math.log(-math.expm1(inside))


def is_clipped(logprob: float) -> bool:
    """Whether a probability, given as its natural logarithm, lies beyond the limits of `logit`."""
    return not math.log(LEAST_PROBABILITY) <= logprob <= math.log(LARGEST_PROBABILITY)
