"""How long facts survive a fine-tune: curves over its dose, their half-life, and edited facts against the control."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import Z
from retention_bench.analysis.courses import Course, between, courses, paired
from retention_bench.analysis.hazards import Contrast, contrast
from retention_bench.analysis.turnbull import turnbull

_CLOSE = 1e-7
"""Shares are found step by step, to about this much."""


@dataclass(frozen=True)
class HalfLife:
    """The dose at which half of the facts are lost.

    The looks tell between which of them it lies and no more: `dose` takes the rate of loss between those two as
    constant. The interval takes nothing of the kind and ends at looks.

    Attributes:
        dose: It; None where more than half survive the last look: "not reached". None too where nothing is left at the
            look at which it is over, since no rate of loss is that high: it lies between the two of `between`.
        low: Lower end of its 95 % interval, the last look until which half are surely there: 0 where that is the one
            before the first step. None where there is no band.
        high: Upper end, the first look at which half are surely gone; None where there is none such.
        between: The looks between which it lies by the curve; None where it is not reached.
    """

    dose: float | None
    low: float | None
    high: float | None
    between: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """The half-life as `{dose, low, high, between}`."""
        return vars(self) | {"between": self.between and list(self.between)}


@dataclass(frozen=True)
class Curve:
    """The share of facts that survive, over the dose.

    What happens between two of its doses no look has seen; it is drawn as steps.

    Attributes:
        doses: Doses at looks, ascending, from before the first step on.
        survival: The share not lost at each.
        low: Lower ends of 95 % intervals, each for itself, clustered by relation; None with fewer than two relations.
        high: Upper ends.
        at_risk: How many courses are followed and held through each look.
        facts: How many facts are followed.
        courses: How many courses: a fact that several models are asked has one in each.
        relations: Of how many relations.
        lost: How many courses end with a loss.
        half_life: The dose at which half of them are lost.
    """

    doses: tuple[float, ...]
    survival: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    at_risk: tuple[int, ...]
    facts: int
    courses: int
    relations: int
    lost: int
    half_life: HalfLife

    def to_json(self) -> dict[str, Any]:
        """The curve as plain JSON values."""
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        return vars(self) | lists | {"half_life": self.half_life.to_json()}


@dataclass(frozen=True)
class Survival:
    """Facts followed along the fine-tunes of a cell.

    Attributes:
        dose: What doses are counted in: "tokens", "steps" or "epochs".
        curves: By arm: `edited` and `control` (the same facts: held before the first step in both), `intrinsic` and
            `intrinsic_matched` (in the edited models). An arm without a fact to follow is not there.
        left_out: How many courses are not followed: of edited facts those that the edit did not write (`not_taken`) or
            whose true object the control did not give before the first step (`not_known`); of the other arms those not
            answered before it.
        contrast: `edited` against `control`; None where no pair has been looked at twice.
    """

    dose: str
    curves: Mapping[str, Curve]
    left_out: Mapping[str, int]
    contrast: Contrast | None

    def to_json(self) -> dict[str, Any]:
        """The survival as plain JSON values."""
        return {
            "dose": self.dose,
            "curves": {arm: curve.to_json() for arm, curve in self.curves.items()},
            "left_out": dict(self.left_out),
            "contrast": self.contrast and self.contrast.to_json(),
        }


def survival(rows: Iterable[Mapping[str, Any]], dose: str = "tokens") -> Survival:
    """Survival of edited facts, of the same facts in the control, and of intrinsic facts.

    Args:
        rows: As in `trajectory.jsonl`, see `courses.courses`.
        dose: "tokens", "steps" or "epochs".
    """
    arms = courses(rows, dose)
    edited = arms.pop("edited", [])
    pairs = paired(edited, arms.pop("control", []))
    taken = sum(course.at_risk for course in edited)
    left_out = {"not_taken": len(edited) - taken, "not_known": taken - len(pairs)}
    followed = {
        "edited": [pair[0] for pair in pairs],
        "control": list({pair[1].fact: pair[1] for pair in pairs}.values()),
    }
    for arm, own in sorted(arms.items()):
        followed[arm] = [course for course in own if course.at_risk]
        left_out[arm] = len(own) - len(followed[arm])
    return Survival(
        dose=dose,
        curves={arm: curve(own) for arm, own in followed.items() if own},
        left_out=left_out,
        contrast=contrast(pairs),
    )


def curve(followed: Sequence[Course]) -> Curve:
    """The share of facts that survive, with bands and half-life.

    Losses are known to lie between two looks only, and models stop at different doses: `turnbull` estimates the share
    from both. Its errors come from leaving out one relation at a time, and are no smaller than those of as many
    independent facts would be. The bands are symmetric in log(-log) and so within 0 and 1 (Kalbfleisch & Prentice 1980,
    section 1.3), with t and one degree of freedom less than relations. Where nothing has been lost yet, or nothing is
    left, nothing tells how far relations differ: they are exact binomial ones of fewer facts, by the square of t's
    quantile over the normal one, as those of rates.

    Args:
        followed: Courses of facts that were held before the first step; one at least.

    Raises:
        ValueError: There is none, or one was not held.
    """
    if not followed or not all(course.at_risk for course in followed):
        raise ValueError("a curve needs courses of facts that were held before the first step")
    low, high = np.array([between(course) for course in followed]).T
    labels = np.unique([course.relation for course in followed], return_inverse=True)[1]
    groups = int(labels.max()) + 1
    weights = np.ones((1 + groups * (groups > 1), len(followed)))
    for group, row in enumerate(weights[1:]):
        row[labels == group] = 0
    estimate = turnbull(low, high, weights, min(course.doses[0] for course in followed))
    doses, shares = estimate.doses, estimate.survival[0]
    shares = np.where(shares < _CLOSE, 0.0, np.where(shares > 1 - _CLOSE, 1.0, shares))
    facts = np.array([course.fact for course in followed])
    bands = None
    if groups > 1:
        error = np.sqrt((groups - 1) / groups * ((estimate.survival[1:] - shares) ** 2).sum(0))
        through = np.array([len(set(facts[low >= dose])) for dose in doses])
        bands = _bands(shares, error, through, len(set(facts)), groups)
    return Curve(
        doses=tuple(doses.tolist()),
        survival=tuple(shares.tolist()),
        low=bands and tuple(bands[0].tolist()),
        high=bands and tuple(bands[1].tolist()),
        at_risk=tuple(int((low >= dose).sum()) for dose in doses),
        facts=len(set(facts)),
        courses=len(followed),
        relations=groups,
        lost=int(np.isfinite(high).sum()),
        half_life=_half_life(doses, shares, bands),
    )


def _bands(
    shares: np.ndarray, error: np.ndarray, through: np.ndarray, facts: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of the intervals at each dose.

    Args:
        shares: That survive, (doses).
        error: Their standard errors by relation, (doses).
        through: How many facts are held through each look, (doses).
        facts: How many facts there are.
        groups: How many relations.
    """
    error = np.maximum(error, np.sqrt(shares * (1 - shares) / facts))
    inside = (shares > 0) & (shares < 1)
    low, high = np.zeros_like(shares), np.ones_like(shares)
    logs, quantile = np.log(shares[inside]), stats.t.ppf(0.975, groups - 1)
    wider = (quantile / Z) ** 2
    stretch = np.exp(np.minimum(quantile * error[inside] / np.abs(shares[inside] * logs), 500))
    low[inside], high[inside] = np.exp(logs * stretch), np.exp(logs / stretch)
    none_lost = shares == 1
    low[none_lost] = 0.025 ** (wider / np.maximum(through[none_lost], 1))
    low[0] = 1  # held before the first step by definition
    high[shares == 0] = 1 - 0.025 ** (wider / facts)
    return low, high


def _half_life(doses: np.ndarray, shares: np.ndarray, bands: tuple[np.ndarray, np.ndarray] | None) -> HalfLife:
    """The half-life, and in its interval every dose at which the band could hold one half (Brookmeyer & Crowley 1982).

    The curve falls somewhere between two looks, so the interval reaches to the look at which a band is still on one
    side of one half, or already on the other.
    """
    low, own, high = (_down(ends) for ends in (bands and bands[0], shares, bands and bands[1]))
    before = None if bands is None else float(doses[-1 if low is None else low - 1])
    after = None if high is None else float(doses[high])
    if own is None:
        return HalfLife(None, before, None, None)
    begin, end = float(doses[own - 1]), float(doses[own])
    if shares[own] == 0:
        return HalfLife(None, before, after, (begin, end))
    part = min(1.0, math.log(2 * shares[own - 1]) / math.log(shares[own - 1] / shares[own]))
    return HalfLife(begin + part * (end - begin), before, after, (begin, end))


def _down(shares: np.ndarray | None) -> int | None:
    """Number of the first look at which at most one half is there; None where there is none such."""
    if shares is None or not (below := shares <= 0.5 + _CLOSE).any():
        return None
    return int(below.argmax())
