"""How much a fine-tune moves the confidence in a fact, in log-odds: edited facts against themselves in the control."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEAST_PROBABILITY = 1e-9
"""A probability below it counts as it: log-odds of -20.7. Otherwise one target of many tokens would outweigh all."""
LARGEST_PROBABILITY = 1 - 1e-6
"""A probability above it counts as it: log-odds of +13.8. Float32 logits of size 16 give no finer ones."""


@dataclass(frozen=True)
class Confidence:
    """How probable one edited fact's target was, before and after a fine-tune, in the edited model and in the control.

    Log-probabilities are natural logarithms of the whole target's probability, at most 0; `-inf` is allowed.

    Attributes:
        relation: The fact's relation, by which facts are clustered.
        edited_before: Log-probability of the new object in the edited model, before the fine-tune.
        edited_after: The same after it.
        control_before: Log-probability of the true object in the unedited model, before the fine-tune.
        control_after: The same after the control's fine-tune.
    """

    relation: str
    edited_before: float
    edited_after: float
    control_before: float
    control_after: float


@dataclass(frozen=True)
class Change:
    """A mean change of log-odds, in nats: negative where a fact has become less sure.

    Attributes:
        mean: Over facts.
        ci95: 95 % interval, clustered by relation; None with fewer than two relations.
    """

    mean: float
    ci95: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """The change as `{mean, ci95: [low, high]}`; null where there is no interval."""
        return {"mean": self.mean, "ci95": self.ci95 and list(self.ci95)}


@dataclass(frozen=True)
class Decay:
    """Mean change of the facts' logit P(target) over a fine-tune.

    Attributes:
        edited: Of the new objects, in the edited models.
        control: Of the same facts' true objects, in the unedited control.
        paired: Edited minus control, fact by fact: negative where edits decay faster than knowledge.
        facts: How many facts.
        relations: Of how many relations.
        clipped: How many of the facts' four probabilities lay outside of `LEAST_PROBABILITY` to `LARGEST_PROBABILITY`.
    """

    edited: Change
    control: Change
    paired: Change
    facts: int
    relations: int
    clipped: int

    def to_json(self) -> dict[str, Any]:
        """The decay as plain JSON values."""
        changes = {name: getattr(self, name).to_json() for name in ("edited", "control", "paired")}
        return vars(self) | changes


def decay(facts: Iterable[Confidence]) -> Decay | None:
    """How much confidence edits lose in a fine-tune, against the same facts in the control.

    Args:
        facts: Edited facts, each once; those that count for the paired difference.

    Returns:
        The changes; None without facts.

    Raises:
        ValueError: A log-probability is above 0 or no number.
    """
    rows = list(facts)
    if not rows:
        return None
    columns = ("edited_before", "edited_after", "control_before", "control_after")
    logs = np.array([[getattr(row, name) for name in columns] for row in rows], dtype=float)
    relations = [row.relation for row in rows]
    odds, clipped = _logit(logs)
    edited, control = odds[:, 1] - odds[:, 0], odds[:, 3] - odds[:, 2]
    return Decay(
        edited=_mean(edited, relations),
        control=_mean(control, relations),
        paired=_mean(edited - control, relations),
        facts=len(rows),
        relations=len(set(relations)),
        clipped=clipped,
    )


def logit(logprob: float) -> float:
    """Log-odds, in nats, of a probability that is given as its natural logarithm; clipped, see `Decay.clipped`.

    Raises:
        ValueError: It is above 0 or no number.
    """
    return float(_logit(np.array([logprob]))[0][0])


def _logit(logs: np.ndarray) -> tuple[np.ndarray, int]:
    """Log-odds of log-probabilities, of any shape, and how many were clipped."""
    if not (logs <= 0).all():  # also where one is no number
        raise ValueError(f"a log-probability must be at most 0, got {logs[~(logs <= 0)][0]}")
    inside = logs.clip(math.log(LEAST_PROBABILITY), math.log(LARGEST_PROBABILITY))
    # log(1 - p) by expm1, as 1 - exp(-1e-6) loses six of its digits.
    return inside - np.log(-np.expm1(inside)), int((inside != logs).sum())


def _mean(values: np.ndarray, relations: list[str]) -> Change:
    """A mean with its interval by relation.

    CR2 with Bell and McCaffrey's degrees of freedom (2002, "Bias reduction in standard errors for linear regression
    with multi-stage samples"; Pustejovsky & Tipton 2018), which for a mean has a closed form: a cluster's sum of
    residuals counts 1 / sqrt(1 - m / n) times, for m of n facts. With clusters of one size it is OLS with
    cluster-robust errors and t with one degree of freedom less than clusters.
    """
    mean = float(values.mean())
    labels = np.unique(relations, return_inverse=True)[1]
    sizes = np.bincount(labels).astype(float)
    if len(sizes) < 2:
        return Change(mean, None)
    n = len(values)
    sums = np.bincount(labels, values - mean)
    adjust = 1 / np.sqrt(1 - sizes / n)
    error = float(np.sqrt(np.sum((adjust * sums) ** 2)) / n)
    # The covariance of the clusters' adjusted sums if all facts were independent: the working model.
    working = adjust[:, None] * (np.diag(sizes) - np.outer(sizes, sizes) / n) * adjust
    dof = float(np.trace(working) ** 2 / np.sum(working**2))
    half = float(stats.t.ppf(0.975, dof)) * error
    return Change(mean, (mean - half, mean + half))
