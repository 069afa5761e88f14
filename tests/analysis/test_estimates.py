"""Means and differences: against statsmodels and the textbook, by their invariants, and at their edges."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retention_bench.analysis import Answer, Estimate, clustered, detectable, gap, mean
from retention_bench.analysis.clusters import layout, spread


def of_relations(values: np.ndarray, relations: np.ndarray) -> list[Answer]:
    return [Answer(int(g), float(v), i) for i, (v, g) in enumerate(zip(values, relations, strict=True))]


def error(estimate: Estimate) -> float:
    low, high = estimate.ci95
    return (high - low) / 2 / stats.t.ppf(0.975, estimate.df)


@pytest.mark.parametrize("each", [1, 6])
def test_the_mean_of_equal_relations_is_students(each: int) -> None:
    values = np.random.default_rng(1).standard_normal((7, each)) + np.arange(7)[:, None]
    found = mean(of_relations(values.ravel(), np.repeat(np.arange(7), each)), bounded=False)
    assert found.ci95 == pytest.approx(stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval())
    assert (found.df, found.n, found.clusters) == (pytest.approx(6), 7 * each, 7)


def test_the_variance_of_skewed_means_is_the_jackknifes_over_relations() -> None:
    rng = np.random.default_rng(2)
    relations = np.repeat(np.arange(6), [3, 9, 4, 20, 1, 7])
    values = rng.standard_normal(len(relations))
    left_out = [values[relations != g].mean() for g in range(6)]
    (side,) = layout([of_relations(values, relations)])
    jackknife = np.sum((np.array(left_out) - values.mean()) ** 2)
    assert spread([(side, values[None], 1.0)], skewed=True).variance == pytest.approx(jackknife)
    assert spread([(side, values[None], 1.0)], skewed=False).variance < jackknife


def test_two_way_variance_is_statsmodels() -> None:
    # without the corrections for few clusters, that is with many of equal size
    import statsmodels.api as sm
    from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

    rng = np.random.default_rng(3)
    relation, model = (a.ravel() for a in np.meshgrid(np.arange(60), np.arange(50), indexing="ij"))
    values = rng.standard_normal(60)[relation] + rng.standard_normal(50)[model] + rng.standard_normal(3000)
    fit = sm.OLS(values, np.ones((len(values), 1))).fit()
    both = cov_cluster_2groups(fit, relation, model, use_correction=False)[0][0, 0]
    rows = enumerate(zip(values, relation, model, strict=True))
    found = mean([Answer(g, v, i, m) for i, (v, g, m) in rows], bounded=False)
    assert error(found) ** 2 == pytest.approx(both, rel=0.06)
    one_way = mean([Answer(g, v, i) for i, (v, g) in enumerate(zip(values, relation, strict=True))], bounded=False)
    assert error(one_way) ** 2 < 0.8 * both


def test_a_gap_without_shared_relations_is_welchs() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.standard_normal(8), 3 * rng.standard_normal(12)
    found = gap(of_relations(one, np.arange(8)), of_relations(other, 1000 + np.arange(12)), bounded=False)
    welch = stats.ttest_ind(other, one, equal_var=False)
    assert found.ci95 == pytest.approx(welch.confidence_interval())
    assert found.df == pytest.approx(welch.df)


def test_a_gap_of_the_same_relations_is_paired_by_relation() -> None:
    rng = np.random.default_rng(5)
    effect = 3 * rng.standard_normal(10)
    one, other = effect + rng.standard_normal(10), 1 + effect + rng.standard_normal(10)
    matched = gap(of_relations(one, np.arange(10)), of_relations(other, np.arange(10)), bounded=False)
    unmatched = gap(of_relations(one, np.arange(10)), of_relations(other, 100 + np.arange(10)), bounded=False)
    assert error(matched) == pytest.approx(stats.sem(other - one))
    assert matched.value == pytest.approx(unmatched.value)
    assert error(matched) < 0.5 * error(unmatched)
    assert (matched.clusters, unmatched.clusters) == (10, 20)


def test_nothing_and_everything_keep_a_width() -> None:
    # 0 of 50 and 100 of 100 had the interval (1, 1)
    lost = [Answer(i % 5, 0, i) for i in range(50)]
    kept = [Answer(9 + i % 9, 1, i) for i in range(100)]
    found = gap(lost, kept)
    assert found.value == 1
    assert 0.85 < found.ci95[0] < 0.95
    assert found.ci95[1] == 1
    assert gap(lost, lost).ci95 == pytest.approx((-0.13, 0.13), abs=0.01)  # the same answers twice
    unchanged = mean([Answer(i % 7, 0, i) for i in range(50)])
    assert unchanged.ci95[0] == -unchanged.ci95[1] < -0.04


@pytest.mark.parametrize(("relations", "ends"), [(1, (-1.0, 1.0)), (1, None), (0, None)])
def test_where_nothing_can_be_said_nothing_is(relations: int, ends: tuple[float, float] | None) -> None:
    found = mean([Answer(0, 0.5, i) for i in range(9 * relations)], bounded=ends is not None)
    assert found == Estimate(0.5 if relations else None, ends, 9 * relations, relations, None, None)
    assert json.loads(json.dumps(found.to_json()))["ci95"] == (ends and list(ends))


def test_one_relation_on_a_side_leaves_the_whole_range() -> None:
    one, many = [Answer(0, 1, i) for i in range(9)], [Answer(i % 5, 1, i) for i in range(50)]
    assert gap(one, many).ci95 == gap(many, one).ci95 == (-1.0, 1.0)
    assert gap([], many) == Estimate(None, None, 0, 5, None, None)


@pytest.mark.parametrize(("values", "value"), [([0.25], 0.25), ([0.1 + 0.2 - 3], -2.7), ([1.1, 2.3, -3.4], 0.0)])
def test_relations_that_are_all_the_same_have_no_known_spread(values: list[float], value: float) -> None:
    # with rounding errors of their sums, which would make an interval of no width
    found = mean([Answer(i % 5, values[i // 5 % len(values)], i) for i in range(30)], bounded=False)
    assert (found.value, found.ci95, found.detectable) == (pytest.approx(value), None, None)


facts = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([-1.0, -0.5, 0.0, 1.0]), st.integers(0, 2), st.integers(0, 2)),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(facts, st.randoms())
def test_the_mean_is_within_its_interval_and_turns_with_its_sign(rows: list, random) -> None:
    answers = [Answer(g, v, i, m, s) for i, (g, v, m, s) in enumerate(rows)]
    found, turned = mean(answers), mean([a._replace(value=-a.value) for a in answers])
    assert -1 <= found.ci95[0] <= found.value <= found.ci95[1] <= 1
    assert turned.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))
    random.shuffle(answers)
    assert mean(answers).ci95 == pytest.approx(found.ci95)


@settings(deadline=None)
@given(facts, facts)
def test_the_gap_stays_within_its_range_and_turns_with_its_sides(one: list, other: list) -> None:
    sides = [[Answer(g, v > 0, i, m) for i, (g, v, m, _) in enumerate(rows)] for rows in (one, other)]
    found, turned = gap(*sides), gap(*sides[::-1])
    assert -1 <= found.ci95[0] <= found.value <= found.ci95[1] <= 1
    assert turned.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))


def test_seeds_that_repeat_the_same_answers_are_no_new_evidence() -> None:
    rng = np.random.default_rng(6)
    once = [Answer(i % 8, float(rng.integers(-1, 2)), i) for i in range(40)]
    five = [a._replace(seed=s) for a in once for s in range(5)]
    assert mean(five).value == pytest.approx(mean(once).value)
    assert error(mean(five)) == pytest.approx(error(mean(once)), rel=0.02)
    assert error(mean(five)) > 1.8 * error(mean([a._replace(relation=(a.relation, a.seed), seed=None) for a in five]))


def test_seeds_that_differ_are_what_the_mean_over_seeds_rests_on() -> None:
    # all facts of a seed alike: the variance between seeds is that of five numbers
    levels = np.array([0.1, 0.5, -0.2, 0.4, 0.3])
    answers = [Answer(i % 10, level, i, seed=s) for s, level in enumerate(levels) for i in range(50)]
    found = mean(answers, bounded=False)
    assert found.value == pytest.approx(levels.mean())
    assert error(found) == pytest.approx(stats.sem(levels), rel=0.05)
    assert found.df == pytest.approx(4, abs=0.3)


def test_few_relations_and_unequal_ones_have_few_degrees_of_freedom() -> None:
    rng = np.random.default_rng(7)

    def df(sizes: list[int]) -> float:
        relations = np.repeat(np.arange(len(sizes)), sizes)
        values = 3 * rng.standard_normal(len(sizes))[relations] + rng.standard_normal(len(relations))
        (side,) = layout([of_relations(values, relations)])
        return float(spread([(side, values[None], 1.0)], skewed=False).df[0])

    assert df([10] * 8) == pytest.approx(7)
    assert df([40, 2, 2, 2, 2, 2, 2, 2]) < 2


@pytest.mark.parametrize("df", [3.0, 9.5, 200.0])
def test_the_detectable_effect_is_detected_in_8_of_10_studies(df: float) -> None:
    rng = np.random.default_rng(8)
    effect = detectable(0.1, df)
    t = (effect + 0.1 * rng.standard_normal(20_000)) / (0.1 * np.sqrt(rng.chisquare(df, 20_000) / df))
    assert np.mean(np.abs(t) > stats.t.ppf(0.975, df)) == pytest.approx(0.8, abs=0.012)


def test_no_effect_beyond_the_range_is_promised() -> None:
    found = mean([Answer(i // 2, (-1) ** (i // 2), i) for i in range(6)])
    assert found.detectable is None


def test_degrees_of_freedom_are_those_of_the_whole_matrix() -> None:
    # Satterthwaite's by hand: tr(C)^2 / tr(C^2), C the covariance of the relations' parts under the estimated effects
    rng = np.random.default_rng(9)
    groups = [np.repeat(np.arange(4), [3, 5, 9, 2]), 2 + np.repeat(np.arange(5), [4, 4, 1, 7, 3])]
    values = [2 * rng.standard_normal(7)[g] + rng.standard_normal(len(g)) for g in groups]
    whole = np.zeros((7, 7))
    for g, v in zip(groups, values, strict=True):
        sizes = np.bincount(g, minlength=7)
        there = sizes > 0
        n, k = len(v), there.sum()
        means = np.bincount(g, v, 7)[there] / sizes[there]
        within = sum((v[g == i] ** 2).sum() - sizes[i] * v[g == i].mean() ** 2 for i in np.flatnonzero(there)) / (n - k)
        among = (sizes[there] * (means - v.mean()) ** 2).sum() / (k - 1)
        between = max(0.0, (among - within) / ((n - (sizes**2).sum() / n) / (k - 1)))
        share = sizes / n
        residual = (np.eye(7) - share)[there]
        effect = np.diag(np.where(there, between + within / np.maximum(sizes, 1), 0))
        scale = np.diag((share / np.sqrt(1 - share))[there])
        whole[np.ix_(there, there)] += scale @ residual @ effect @ residual.T @ scale
    found = gap(*(of_relations(v, g) for g, v in zip(groups, values, strict=True)), bounded=False)
    assert found.df == pytest.approx(np.trace(whole) ** 2 / np.trace(whole @ whole))


def test_ten_thousand_clusters_are_no_burden() -> None:
    answers = [Answer(i, i % 3 > 0, i, j) for i in range(10_000) for j in range(2)]
    assert clustered(answers).clusters == mean(answers).clusters == 10_000
