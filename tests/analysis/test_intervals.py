"""Intervals against published values, against scipy, and by their invariants."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from retention_bench.analysis import Gap, Rate, clustered, gap, rate, retention

trials = st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # the textbook's 8 successes of 10
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_gives_the_published_intervals(hits: int, total: int, low: float, high: float) -> None:
    assert rate(hits, total).ci95 == pytest.approx((low, high), abs=5e-5)


@given(trials)
def test_wilson_equals_scipy(case: tuple[int, int]) -> None:
    hits, total = case
    reference = binomtest(hits, total).proportion_ci(method="wilson")
    assert rate(hits, total).ci95 == pytest.approx((reference.low, reference.high), abs=1e-12)


@given(trials)
def test_the_interval_contains_the_rate_and_stays_within_0_and_1(case: tuple[int, int]) -> None:
    result = rate(*case)
    assert result.rate is not None
    assert result.ci95 is not None
    assert 0 <= result.ci95[0] <= result.rate <= result.ci95[1] <= 1
    assert result.ci95[0] < result.ci95[1]


@given(trials)
def test_misses_mirror_hits(case: tuple[int, int]) -> None:
    hits, total = case
    low, high = rate(hits, total).ci95 or (None, None)
    assert rate(total - hits, total).ci95 == pytest.approx((1 - high, 1 - low))


def test_without_trials_there_is_no_rate() -> None:
    assert rate(0, 0) == Rate(hits=0, total=0, rate=None, ci95=None)
    assert rate(0, 0).to_json() == {"hits": 0, "total": 0, "rate": None, "ci95": None}


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="between 0 and total"):
        rate(hits, total)


def test_json_holds_plain_values_only() -> None:
    low, high = rate(8, 10).ci95 or (None, None)
    assert json.loads(json.dumps(rate(8, 10).to_json())) == {"hits": 8, "total": 10, "rate": 0.8, "ci95": [low, high]}


def test_retention_counts_only_what_was_correct_before() -> None:
    before = {"a": True, "b": True, "c": False, "d": True}
    after = {"a": True, "b": False, "c": True, "d": True}
    assert retention(before, after) == rate(2, 3)
    assert retention({"a": False}, {"a": True}) == rate(0, 0)


def test_retention_needs_the_same_questions_before_and_after() -> None:
    with pytest.raises(ValueError, match="'c'"):
        retention({"a": True}, {"a": True, "c": True})


def outcomes(hits: int, total: int) -> dict[int, bool]:
    return {key: key < hits for key in range(total)}


def test_gap_is_intrinsic_minus_edited() -> None:
    known = outcomes(50, 60)
    result = gap(known, outcomes(20, 60), known, outcomes(45, 60), seed=0)
    assert result.value == pytest.approx(45 / 50 - 20 / 50)
    assert result.ci95 is not None
    assert 0 < result.ci95[0] < result.value < result.ci95[1]


def test_the_bootstrap_interval_is_close_to_the_normal_one_for_large_samples() -> None:
    n = 2000
    known = outcomes(n, n)
    result = gap(known, outcomes(800, n), known, outcomes(1600, n), seed=3)
    error = np.sqrt(0.4 * 0.6 / n + 0.8 * 0.2 / n)
    assert result.ci95 == pytest.approx((0.4 - 1.96 * error, 0.4 + 1.96 * error), abs=0.1 * error)


def test_the_seed_decides_the_interval() -> None:
    arguments = (outcomes(29, 29), outcomes(17, 29), outcomes(31, 31), outcomes(24, 31))
    assert gap(*arguments, seed=1, resamples=99) == gap(*arguments, seed=1, resamples=99)
    assert gap(*arguments, seed=1, resamples=99) != gap(*arguments, seed=2, resamples=99)


def test_repeated_outcomes_of_a_fact_do_not_count_as_new_evidence() -> None:
    known, edited, intrinsic = outcomes(40, 40), outcomes(15, 40), outcomes(30, 40)

    def five_times(hits: dict[int, bool]) -> dict[int, list[bool]]:
        return {key: [hit] * 5 for key, hit in hits.items()}

    once = gap(known, edited, known, intrinsic, seed=7)
    assert gap(known, edited, five_times(known), five_times(intrinsic), seed=7) == once
    as_if_independent = {(key, i): hit for key, hit in intrinsic.items() for i in range(5)}
    wrong = gap(known, edited, dict.fromkeys(as_if_independent, True), as_if_independent, seed=7)
    assert wrong.ci95 is not None
    assert once.ci95 is not None
    assert wrong.ci95[1] - wrong.ci95[0] < once.ci95[1] - once.ci95[0]


def test_each_outcome_is_paired_with_its_own_later_one() -> None:
    before = {"fact": [True, False, True, True]}
    after = {"fact": [True, True, False, True]}
    assert gap({"e": True}, {"e": False}, before, after, seed=0).value == pytest.approx(2 / 3)


def test_a_gap_without_known_facts_has_no_value() -> None:
    known = outcomes(3, 3)
    assert gap(outcomes(0, 3), known, known, known, seed=0) == Gap(value=None, ci95=None)
    assert gap({}, {}, known, known, seed=0).to_json() == {"value": None, "ci95": None}


def test_outcomes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"longer|shorter"):
        gap({"a": [True]}, {"a": [True, True]}, {"b": True}, {"b": True}, seed=0)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20),
)
def test_the_gap_and_its_interval_stay_within_minus_1_and_1(edited: list, intrinsic: list) -> None:
    sides = [dict(enumerate(pair[i] for pair in side)) for side in (edited, intrinsic) for i in (0, 1)]
    result = gap(*sides, seed=0, resamples=50)
    if result.value is None:
        assert not any(b for b, _ in edited) or not any(b for b, _ in intrinsic)
    else:
        assert result.ci95 is not None
        assert -1 <= result.ci95[0] <= result.ci95[1] <= 1
        assert -1 <= result.value <= 1


UNEQUAL = (1, 1, 2, 2, 3, 4, 6, 8, 10, 13) * 5


def draw(rate: float, correlation: float, sizes: Sequence[int], runs: int = 2000) -> np.ndarray:
    """Hits in clusters of these sizes, beta-binomial; int64, (runs, clusters)."""
    rng = np.random.default_rng(round(1000 * rate) + round(10 * correlation) + len(sizes))
    shape = (runs, len(sizes))
    if correlation == 1:
        return np.array(sizes) * (rng.random(shape) < rate)
    a, b = ((1 - correlation) / correlation * x for x in (rate, 1 - rate)) if correlation else (None, None)
    return rng.binomial(sizes, rng.beta(a, b, size=shape) if correlation else rate, size=shape)


def coverage(rate_: float, hits: np.ndarray, sizes: Sequence[int]) -> float:
    found = [clustered(((i, j < h) for i, h in enumerate(run) for j in range(sizes[i])), "fact").ci95 for run in hits]
    return float(np.mean([low <= rate_ <= high for low, high in found]))


@pytest.mark.parametrize("p", [0.2, 0.374, 0.634, 0.815, 0.9, 0.95])
def test_wilson_covers_the_rate_at_50_facts(p: float) -> None:
    hits = np.random.default_rng(6).binomial(50, p, size=2000)
    found = {count: rate(count, 50).ci95 for count in set(hits.tolist())}
    covered = np.mean([found[count][0] <= p <= found[count][1] for count in hits.tolist()])
    assert 0.93 <= covered <= 0.975  # exactly 0.970 at 0.9: hits are whole numbers


@pytest.mark.parametrize("p", [0.5, 0.634, 0.815, 0.9])
@pytest.mark.parametrize("correlation", [0, 0.3, 1])
def test_clustered_rates_cover_the_rate_at_50_facts(p: float, correlation: float) -> None:
    sizes = [4] * 50
    assert 0.93 <= coverage(p, draw(p, correlation, sizes), sizes) <= 0.97


@pytest.mark.parametrize("p", [0.9, 0.95])
@pytest.mark.parametrize("correlation", [0.3, 0.6, 1])
def test_facts_asked_more_or_less_often_cover_the_rate(p: float, correlation: float) -> None:
    # 86 to 92 % with the design effect from how far the clusters' sums differ
    assert 0.93 <= coverage(p, draw(p, correlation, UNEQUAL), UNEQUAL) <= 0.97


@pytest.mark.parametrize(("p", "low", "high"), [(0.95, 0.91, 0.97), (0.98, 0.94, 0.98)])
@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_rates_near_1_are_covered_less_surely(p: float, low: float, high: float, correlation: float) -> None:
    # ten related answers a fact; without the half trials 88 to 89 % at 0.98
    sizes = [10] * 50
    assert low <= coverage(p, draw(p, correlation, sizes), sizes) <= high


def test_a_plain_interval_does_not_cover_clustered_answers() -> None:
    hits = draw(0.634, 1, [4] * 50).sum(axis=1)
    covered = np.mean([low <= 0.634 <= high for low, high in (rate(int(h), 200).ci95 for h in hits)])
    assert covered < 0.75


@pytest.mark.parametrize("clusters", [5, 10])
def test_few_edited_models_err_on_the_wide_side(clusters: int) -> None:
    sizes = [50 // clusters] * clusters  # 50 facts in 5 or 10 models
    for p, correlation in itertools.product((0.634, 0.95), (0, 0.3)):
        assert coverage(p, draw(p, correlation, sizes), sizes) >= 0.93


def test_the_design_effect_rests_on_the_published_correlation() -> None:
    # The example of Fleiss, Levin & Paik (2003), "Statistical methods for rates and proportions", for raters that vary
    # in number, with 25 subjects; Stata's manual of `kappa`, which has the data too, gives 0.5415. A thousand copies,
    # so that the half trials and degrees of freedom don't count.
    raters = np.array([2, 2, 3, 4, 3, 4, 3, 5, 2, 4, 5, 3, 4, 4, 2, 2, 3, 2, 4, 5, 3, 4, 3, 3, 2] * 1000)
    positive = np.array([2, 0, 2, 3, 3, 1, 0, 0, 0, 4, 5, 3, 4, 3, 0, 2, 1, 1, 1, 4, 2, 0, 0, 3, 2] * 1000)
    found = clustered(((i, j < p) for i, (n, p) in enumerate(zip(raters, positive, strict=True)) for j in range(n)), "")
    total = raters.sum()
    kappa = (total / found.effective - 1) / ((raters @ raters) / total - 1)
    assert kappa == pytest.approx(0.5415, abs=2e-4)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_clusters_of_one_are_independent_trials(hits: list[int]) -> None:
    assert clustered(enumerate(map(bool, hits)), "fact") == rate(sum(hits), len(hits))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40))
def test_a_clustered_interval_contains_the_rate_and_is_no_narrower_than_a_plain_one(outcomes: list) -> None:
    found, plain = clustered(outcomes, "fact"), rate(sum(hit for _, hit in outcomes), len(outcomes))
    assert (found.hits, found.total, found.rate) == (plain.hits, plain.total, plain.rate)
    assert 0 <= found.ci95[0] <= found.rate + 1e-12
    assert found.rate - 1e-12 <= found.ci95[1] <= 1
    assert found.ci95[1] - found.ci95[0] >= plain.ci95[1] - plain.ci95[0] - 1e-9


def test_clusters_that_agree_within_themselves_count_once() -> None:
    # 40 of 50 facts, each with four answers alike: the interval is that of 40 of 50, but for the 199 and 49 degrees of
    # freedom
    found = clustered(((i, i < 40) for i in range(50) for _ in range(4)), "fact")
    assert found.ci95 == pytest.approx(rate(40, 50).ci95, abs=0.005)
    assert found.to_json() | {"clustered_by": "fact", "clusters": 50} == found.to_json()
    assert found.effective == pytest.approx(50 * (1.9720 / 2.0096) ** 2, rel=1e-4)


def test_one_cluster_is_one_trial() -> None:
    assert clustered([("a", True)] * 9, "fact").effective == 1
    # where all answers agree nothing tells that they are not one a cluster
    alike = clustered([(i, True) for i in range(50) for _ in range(4)], "fact")
    assert alike.effective == pytest.approx(48.15, abs=0.01)
    assert clustered([], "fact") == rate(0, 0)


def test_retention_can_be_clustered() -> None:
    before = {(fact, model): fact < 9 for fact in range(10) for model in range(3)}
    after = {(fact, model): fact < 6 for fact, model in before}
    found = retention(before, after, cluster=lambda key: key[0])
    assert (found.hits, found.total, found.clusters, found.clustered_by) == (18, 27, 9, "fact")


@pytest.mark.parametrize(("edited", "intrinsic"), [(0.374, 0.824), (0.634, 0.831), (0.815, 0.817), (0.95, 0.8)])
def test_the_gap_covers_the_difference_at_50_facts(edited: float, intrinsic: float) -> None:
    # the paper's rates on Llama3-8B; 50 edited and 100 intrinsic facts
    rng = np.random.default_rng(7)
    runs = list(zip(rng.binomial(50, edited, 2000).tolist(), rng.binomial(100, intrinsic, 2000).tolist(), strict=True))
    found = {
        (e, i): gap(outcomes(50, 50), outcomes(e, 50), outcomes(100, 100), outcomes(i, 100), seed=0, resamples=500).ci95
        for e, i in set(runs)
    }
    covered = np.mean(
        [found[run][0] <= intrinsic - edited + 1e-12 and intrinsic - edited - 1e-12 <= found[run][1] for run in runs]
    )
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("edited", [0.5, 0.634])
def test_the_gap_covers_the_difference_where_edits_share_a_model(edited: float) -> None:
    # 10 models with 5 edits, lost together with a correlation of 0.3; resampled by model, and as if by fact
    rng = np.random.default_rng(8)
    by_model, by_fact = [], []
    for hits in draw(edited, 0.3, [5] * 10, runs=800):
        models = {m: [i < h for i in range(5)] for m, h in enumerate(hits)}
        facts = {(m, i): hit for m, own in models.items() for i, hit in enumerate(own)}
        kept = outcomes(int(rng.binomial(100, 0.824)), 100)
        for found, after, known in ((by_model, models, [True] * 5), (by_fact, facts, True)):
            low, high = gap(
                dict.fromkeys(after, known), after, dict.fromkeys(kept, True), kept, seed=0, resamples=300
            ).ci95
            found.append(low <= 0.824 - edited <= high)
    assert 0.93 <= np.mean(by_model) <= 0.97
    assert np.mean(by_fact) < 0.88


def test_one_key_has_no_spread() -> None:
    assert gap({"m": [True] * 4}, {"m": [True, False] * 2}, {"i": True}, {"i": True}, seed=0) == Gap(0.5, (0.5, 0.5))
