"""How sure a mean is whose answers belong to facts, the facts to relations, and both to models and seeds.

Everything here takes arrays with a leading axis of studies, so that a simulation goes through the code that a run does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

MODELS = 5
"""With fewer edited models, nothing can be said of how much they differ; what is counted holds for these models."""

Z = float(stats.norm.ppf(0.975))
"""The normal quantile of a two-sided 95 % interval, and of a two-sided test at 5 %."""


class Answer(NamedTuple):
    """One value and what it belongs to.

    Attributes:
        relation: The relation of its fact: answers are independent only between relations. Where relations are not
            known, the fact.
        value: A hit (1 or 0), a difference, or a change of log-odds.
        fact: Its fact; None where every answer is of a fact of its own.
        model: The edited model that gave it; None where there is one.
        seed: The seed of its run; None where there is one.
    """

    relation: Hashable
    value: float
    fact: Hashable = None
    model: Hashable = None
    seed: Hashable = None


@dataclass(frozen=True)
class Side:
    """The layout of one mean's answers: what each belongs to and how much it counts.

    Attributes:
        relation: The relation of every answer, counted from 0 over all sides; int64, (answers,).
        fact: Its fact, counted from 0 in this side.
        model: Its model, the same way; a single label where models are too few.
        seed: Its seed, the same way.
        count: How often it counts in the mean; (answers,). Seeds count alike, and answers within a seed.
    """

    relation: np.ndarray
    fact: np.ndarray
    model: np.ndarray
    seed: np.ndarray
    count: np.ndarray

    @property
    def facts(self) -> int:
        """How many facts there are."""
        return int(self.fact.max(initial=-1)) + 1

    @property
    def distinct(self) -> float:
        """How many facts that count alike would tell as much: all of them where they do, else fewer."""
        return float(1 / (np.bincount(self.fact, self.weight) ** 2).sum())

    @property
    def weight(self) -> np.ndarray:
        """The share of every answer in the mean; (answers,)."""
        return np.asarray(self.count / self.count.sum())

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The weighted means; values (..., answers), means (...)."""
        return np.asarray(values @ self.count / self.count.sum())


def layout(sides: Sequence[Sequence[Answer]]) -> list[Side]:
    """Number the relations, models and seeds of all sides, so that equal ones have equal labels."""
    relations: dict[Hashable, int] = {}
    models: dict[Hashable, int] = {}
    seeds: dict[Hashable, int] = {}
    found = []
    for answers in sides:
        relation = _numbered((a.relation for a in answers), relations)
        model = _numbered(((a.seed, a.model) for a in answers), models)
        seed = _numbered((a.seed for a in answers), seeds)
        names = ((a.relation, i if a.fact is None else a.fact, a.fact is None) for i, a in enumerate(answers))
        counts = np.bincount(seed, minlength=len(seeds))
        found.append(
            Side(
                relation=relation,
                fact=_numbered(names, {}),
                model=model,
                seed=seed,
                count=counts.max(initial=0) / counts[seed],
            )
        )
    return found


def _numbered(labels: Iterable[Hashable], numbers: dict[Hashable, int]) -> np.ndarray:
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate and what it rests on.

    Attributes:
        variance: Its variance; (studies,).
        df: Degrees of freedom of that variance; (studies,).
        clusters: The number of relations.
    """

    variance: np.ndarray
    df: np.ndarray
    clusters: int


def spread(sides: Sequence[tuple[Side, np.ndarray, float]], *, skewed: bool) -> Spread | None:
    """The variance of a sum of signed means, clustered by relation, and by model and seed where these add to it.

    By relation it is CR2, the squared sums of residuals, each over 1 minus the relation's share of the answers (Bell &
    McCaffrey 2002, "Bias reduction in standard errors for linear regression with multi-stage samples"); with relations
    of one size the variance of Student's t. Means of a few values near the end of their range are skewed, and need
    their CR3, the jackknife's: k / (k - 1) times as much with k relations of one size. A relation that is on several
    sides counts with its sum over them, so matched sides are paired and unmatched ones are Welch's.
    Degrees of freedom are Satterthwaite's for that variance, under a random effect of relations as large as the data
    show (Imbens & Kolesar 2016, "Robust standard errors in small samples").

    Models (from `MODELS` on) and seeds (from two on) are crossed with relations: what they add is the two-way variance
    of Cameron, Gelbach & Miller (2011, "Robust inference with multiway clustering"), never below 0.

    Args:
        sides: For every mean its layout, its values (studies, answers) and its sign.
        skewed: Whether to take CR3.

    Returns:
        The variance; None where a side has a single relation, which says nothing about others.
    """
    relations = _labels(sides, "relation")
    if any(len(np.unique(side.relation)) < 2 for side, _, _ in sides):
        return None
    root = 1.0 if skewed else 0.5
    variance, df = _one_way(sides, relations, root)
    parts = [(variance, df)]
    # Models are of a seed, so with several seeds these hold what models add.
    dimension = "seed" if len(np.unique(np.concatenate(_labels(sides, "seed")))) > 1 else "model"
    others = _labels(sides, dimension)
    counts = [len(np.unique(own)) for own in others]
    crossed = [(side, own) for side, own, n in zip(sides, others, counts, strict=True) if n >= _least(dimension)]
    if crossed:
        some, own = [side for side, _ in crossed], [labels for _, labels in crossed]
        least = max(np.max(labels) for labels in own) + 1
        both = [side.relation * least + labels for (side, _, _), labels in zip(some, own, strict=True)]
        between, between_df = _one_way(some, own, root)
        parts.append((np.maximum(0.0, between - _sums(some, both, root)), between_df))
    total = sum((v for v, _ in parts), np.zeros_like(variance))
    doubt = sum((v**2 / d for v, d in parts), np.zeros_like(variance))
    df = np.where(doubt > 0, total**2 / np.where(doubt > 0, doubt, 1.0), df)
    return Spread(variance=total, df=df, clusters=len(np.unique(np.concatenate(relations))))


def by_fact(side: Side, values: np.ndarray) -> np.ndarray:
    """The variance of a mean if facts were independent, also of one relation; (studies,)."""
    return _sums([(side, values, 1.0)], [side.fact], 0.5)


def _least(dimension: str) -> int:
    return MODELS if dimension == "model" else 2


def _labels(sides: Sequence[tuple[Side, np.ndarray, float]], dimension: str) -> list[np.ndarray]:
    return [getattr(side, dimension) for side, _, _ in sides]


def _sums(sides: Sequence[tuple[Side, np.ndarray, float]], labels: Sequence[np.ndarray], root: float) -> np.ndarray:
    """The clustered variance alone; (studies,)."""
    _, numbered = np.unique(np.concatenate(labels), return_inverse=True)
    clusters = numbered.max() + 1
    total, start = np.zeros((len(sides[0][1]), clusters)), 0
    for side, values, sign in sides:
        own = numbered[start : (start := start + len(side.count))]
        weight = side.weight
        share = np.bincount(own, weight, clusters)
        residuals = weight * (values - side.mean(values)[:, None])
        total += sign * by_cluster(residuals, own, clusters) / np.where(share < 1, 1 - share, 1.0) ** root
    return np.asarray((total**2).sum(axis=1))


def _one_way(
    sides: Sequence[tuple[Side, np.ndarray, float]], labels: Sequence[np.ndarray], root: float
) -> tuple[np.ndarray, np.ndarray]:
    """The clustered variance and its degrees of freedom; (studies,) each."""
    _, numbered = np.unique(np.concatenate(labels), return_inverse=True)
    clusters = int(numbered.max()) + 1
    expected, start = [], 0
    for side, values, _ in sides:
        own = numbered[start : (start := start + len(side.count))]
        expected.append(_expected(side, values, own, clusters, root))
    trace = sum(((c.scale**2 * (c.effect + c.common - 2 * c.weighted)).sum(axis=1) for c in expected), np.zeros(1))
    squares = sum((_product(one, other) for one in expected for other in expected), np.zeros(1))
    return _sums(sides, labels, root), trace**2 / squares


class _Covariance(NamedTuple):
    """The covariance of a side's cluster sums; of clusters g and h scale_g scale_h (common - weighted_g - weighted_h).

    On the diagonal, where g is h, scale_g^2 effect_g comes to that. Kept so, as clusters can be ten thousand facts.
    """

    scale: np.ndarray  # (clusters,)
    effect: np.ndarray  # (studies, clusters)
    weighted: np.ndarray  # (studies, clusters)
    common: np.ndarray  # (studies, 1)


def _product(one: _Covariance, other: _Covariance) -> np.ndarray:
    """The sum of the products of two covariances' entries; (studies,)."""
    scale = one.scale * other.scale
    first, second = one.common - one.weighted, other.common - other.weighted
    all_pairs = (
        scale.sum() * (first * second) @ scale
        - (first @ scale) * (other.weighted @ scale)
        - (one.weighted @ scale) * (second @ scale)
        + scale.sum() * (one.weighted * other.weighted) @ scale
    )
    diagonal = one.effect * (other.effect + second - other.weighted) + other.effect * (first - one.weighted)
    return np.asarray(all_pairs + diagonal @ scale**2)


def _expected(side: Side, values: np.ndarray, labels: np.ndarray, clusters: int, root: float) -> _Covariance:
    """The covariance of a side's cluster sums where clusters have a random effect as large as the data show."""
    sizes = np.bincount(labels, minlength=clusters)
    share = np.bincount(labels, side.weight, clusters)
    squares = np.bincount(labels, side.weight**2, clusters)
    there = sizes > 0
    sums = by_cluster(values, labels, clusters)
    n, k = len(labels), int(there.sum())
    # Components of variance by the analysis of variance (Searle, Casella & McCulloch 1992, chapter 3).
    of_means = (sums[:, there] ** 2 / sizes[there]).sum(axis=1)
    within = np.maximum(0.0, (values**2).sum(axis=1) - of_means) / max(n - k, 1)
    among = np.maximum(0.0, of_means - sums.sum(axis=1) ** 2 / n) / (k - 1)
    between = np.maximum(0.0, among - (within if n > k else 0.0)) / ((n - (sizes @ sizes) / n) / (k - 1))
    within = np.where(within + between > 0, within, 1.0)  # all alike: no effect of clusters is seen
    of_mean = np.divide(squares, share**2, out=np.zeros(clusters), where=there)
    effect = np.where(there, between[:, None] + within[:, None] * of_mean, 0.0)
    scale = np.where(there, share / np.where(share < 1, 1 - share, 1.0) ** root, 0.0)
    weighted = share * effect
    return _Covariance(scale, effect, weighted, (share * weighted).sum(axis=1)[:, None])


def by_cluster(values: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """The sums of every cluster; values (studies, answers), sums (studies, clusters)."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    sums = np.zeros((len(values), clusters))
    sums[:, present] = np.add.reduceat(values[:, order], starts, axis=1)
    return sums
