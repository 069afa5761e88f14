"""Edited facts against the same facts in the control: are they lost sooner, and by how much."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from retention_bench.analysis.clusters import Z
from retention_bench.analysis.courses import Course, between, shared

_SWAPS = 9_999
_ALL_SWAPS = 12
"""With so many relations or fewer all ways to swap their arms are tried."""
_LEAST = 3
"""An interval of the hazard ratio needs losses in so many relations."""
_PIECES = 4
_LOSSES_A_PIECE = 10


@dataclass(frozen=True)
class Contrast:
    """Edited facts against the same facts in the control, at the looks that both models have.

    Attributes:
        pairs: How many facts, held before the first step in both models and looked at again in both.
        relations: Of how many relations.
        lost: How many were lost in the edited models, and how many in the control.
        log_rank_p: Two-sided p of the log-rank test: how often its statistic is as large when the two arms of whole
            relations are swapped at random. With G relations it is no smaller than 2 / 2^G, so with five no smaller
            than 0.06. None where nothing was lost.
        hazard_ratio: The rate of loss of edited facts over that in the control, as it is over all relations together;
            above 1 where edits are lost sooner. None where one side lost nothing, or all before the second look.
        ci95: Its 95 % interval, clustered by relation; None without a ratio and with losses in fewer than three
            relations.
        reason: Why the ratio or its interval is not there, in words; None where they are.
    """

    pairs: int
    relations: int
    lost: tuple[int, int]
    log_rank_p: float | None
    hazard_ratio: float | None
    ci95: tuple[float, float] | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """The contrast as plain JSON values."""
        return vars(self) | {"lost": list(self.lost), "ci95": self.ci95 and list(self.ci95)}


def contrast(pairs: Sequence[tuple[Course, Course]]) -> Contrast | None:
    """Compare the arms of pairs, each an edited fact's course and the same fact's in the control.

    Both are cut to the looks that they share, so that a model that stops sooner gives its facts no other chance to be
    lost than the control gives them.

    Args:
        pairs: As `courses.paired` gives them.

    Returns:
        The contrast; None where no pair has two looks in common.
    """
    cut = [pair for pair in map(shared, pairs) if len(pair[0].steps) > 1]
    if not cut:
        return None
    table = _LifeTable.of(cut)
    ratio, ci95, reason = _hazard_ratio(table)
    return Contrast(
        pairs=len(cut),
        relations=table.relations,
        lost=(int(table.losses[table.arm == 1].sum()), int(table.losses[table.arm == 0].sum())),
        log_rank_p=_log_rank(table),
        hazard_ratio=ratio,
        ci95=ci95,
        reason=reason,
    )


@dataclass(frozen=True)
class _LifeTable:
    """Facts at risk and lost, by relation, arm and interval between two looks, (rows).

    Attributes:
        relations: How many relations.
        relation: Number of the row's relation.
        arm: 1 for edited, 0 for the control.
        begin: Dose at the look that opens the interval.
        end: Dose at the look that closes it.
        trials: Facts held at its begin.
        losses: Those of them that were lost in it.
    """

    relations: int
    relation: np.ndarray
    arm: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    trials: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[Course, Course]]) -> _LifeTable:
        numbers = {relation: i for i, relation in enumerate(sorted({pair[0].relation for pair in pairs}))}
        trials: Counter[tuple[int, int, float, float]] = Counter()
        losses: Counter[tuple[int, int, float, float]] = Counter()
        for edited, control in pairs:
            for arm, course in ((1, edited), (0, control)):
                lost = between(course)[1]
                for begin, end in itertools.pairwise(course.doses):
                    cell = (numbers[edited.relation], arm, begin, end)
                    trials[cell] += 1
                    if end >= lost:
                        losses[cell] += 1
                        break
        cells = sorted(trials)
        columns = [np.array(column) for column in zip(*cells, strict=True)]
        counts = [np.array([counter[cell] for cell in cells], dtype=float) for counter in (trials, losses)]
        return cls(len(numbers), *columns, *counts)


def _log_rank(table: _LifeTable) -> float | None:
    """P of the log-rank test, by swapping the arms of relations.

    Swapping is exact where an edit does nothing: then nothing tells the two courses of a fact apart, and those of one
    relation need not be independent.
    """
    if not table.losses.any():
        return None
    times, place = np.unique(table.end, return_inverse=True)
    risk, lost = np.zeros((2, 2, table.relations, len(times)))
    np.add.at(risk, (table.arm, table.relation, place), table.trials)
    np.add.at(lost, (table.arm, table.relation, place), table.losses)
    if table.relations <= _ALL_SWAPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=table.relations)))
    else:
        signs = np.random.default_rng(0).choice([1.0, -1.0], (1 + _SWAPS, table.relations))
        signs[0] = 1  # as it is
    swapped = [_swapped(counts, signs) for counts in (risk, lost)]
    statistic = np.abs(_statistic(swapped[0], swapped[1], risk.sum((0, 1)), lost.sum((0, 1))))
    return float(np.mean(statistic >= statistic[0] - 1e-9))


def _swapped(counts: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Counts of the edited arm, (swaps, times), where relations with the sign -1 give those of their other arm.

    Args:
        counts: By arm, relation and time.
        signs: By swap and relation.
    """
    return (counts.sum((0, 1)) + signs @ (counts[1] - counts[0])) / 2


def _statistic(risk: np.ndarray, lost: np.ndarray, all_risk: np.ndarray, all_lost: np.ndarray) -> np.ndarray:
    """The log-rank test's z, (swaps): losses of one arm less those expected, over their hypergeometric spread."""
    several = all_risk > 1
    share = risk[:, several] / all_risk[several]
    spread = all_lost[several] * (all_risk[several] - all_lost[several]) / (all_risk[several] - 1)
    variance = (share * (1 - share)) @ spread
    excess = lost[:, several].sum(1) - share @ all_lost[several]
    return np.divide(excess, np.sqrt(variance), out=np.zeros_like(excess), where=variance > 0)


def _hazard_ratio(table: _LifeTable) -> tuple[float | None, tuple[float, float] | None, str | None]:
    """The ratio, its interval, and why one of them is not there, from the proportional hazards model for grouped times.

    Prentice & Gloeckler (1978): a fact that is held at one look is lost at the next with probability
    1 - exp(-rate x dose between them), a binomial model with complementary log-log link and the logarithm of the dose
    as offset. The rate is constant within each of up to four pieces of the dose. Errors are by relation, from leaving
    out one at a time in one Newton step (CR3), with t and one degree of freedom less than relations in which facts were
    lost, as the others tell next to nothing of the ratio. The interval is no narrower than the normal one of as many
    independent facts: where both arms lose as much in every relation, leaving one out changes nothing.
    """
    # Imported here, since it takes a second.
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.families.links import CLogLog
    from statsmodels.genmod.generalized_linear_model import GLM
    from statsmodels.tools.sm_exceptions import ModelWarning

    kept = table.trials - table.losses
    for arm, name in ((1, "edited facts"), (0, "the same facts in the control")):
        own = table.arm == arm
        if not table.losses[own].any():
            return None, None, f"of {name} none was lost"
        if not kept[own].any():
            return None, None, f"{name} were all lost at the first look after the start"
    pieces = _pieces(table)
    design = np.column_stack([pieces, table.arm])
    length = table.end - table.begin
    model = GLM(
        np.column_stack([table.losses, kept]), design, family=Binomial(CLogLog()), offset=np.log(length / length.mean())
    )
    with warnings.catch_warnings():
        # It warns of a separation where shares are fitted exactly, as with one look; `_pieces` sees to it that there is
        # none. Whether it converged is asked below.
        warnings.simplefilter("ignore", ModelWarning)
        fit = model.fit()
    if not (fit.converged and np.isfinite(fit.params).all()):
        return None, None, "the model could not be fitted"
    log_ratio = float(fit.params[-1])
    groups = len(np.unique(table.relation[table.losses > 0]))
    if groups < _LEAST:
        return math.exp(log_ratio), None, f"facts were lost in fewer than {_LEAST} relations"
    scores = np.zeros((table.relations, design.shape[1]))
    np.add.at(scores, table.relation, model.score_obs(fit.params))
    weights = model.hessian_factor(fit.params)[:, None] * design
    parts = np.zeros((table.relations, design.shape[1], design.shape[1]))
    np.add.at(parts, table.relation, weights[:, :, None] * design[:, None, :])
    without = -np.einsum("gij,gj->gi", np.linalg.pinv(parts.sum(0) - parts, hermitian=True), scores)[:, -1]
    by_relation = math.sqrt((table.relations - 1) / table.relations * float(without @ without))
    half = max(float(stats.t.ppf(0.975, groups - 1)) * by_relation, Z * float(fit.bse[-1]))
    return math.exp(log_ratio), (math.exp(log_ratio - half), math.exp(log_ratio + half)), None


def _pieces(table: _LifeTable) -> np.ndarray:
    """Which piece of the dose a row is in, (rows, pieces): as many as have ten losses each, and facts that stay.

    Some piece must have losses in either arm where facts of the other stay. Else the ratio could be as large, or as
    small, as one likes: the pieces would make up for it (Albert & Anderson 1984, "On the existence of maximum
    likelihood estimates in logistic regression models"). A single piece has both where each arm has both.
    """
    lost, kept = np.repeat(table.end, table.losses.astype(int)), table.trials - table.losses
    for count in range(min(_PIECES, max(1, len(lost) // _LOSSES_A_PIECE)), 1, -1):
        borders = np.unique(np.quantile(lost, np.arange(1, count) / count, method="higher"))
        place = np.searchsorted(borders, table.end)
        pieces = (place[:, None] == np.unique(place)).astype(float)
        (lost_there, lost_here), (kept_there, kept_here) = (
            [(counts * (table.arm == arm)) @ pieces > 0 for arm in (0, 1)] for counts in (table.losses, kept)
        )
        bounded = (lost_here & kept_there).any() and (lost_there & kept_here).any()
        if bounded and ((lost_here | lost_there) & (kept_here | kept_there)).all():
            return pieces
    return np.ones((len(table.end), 1))
