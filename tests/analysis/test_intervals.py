"""Rates: against published values, against scipy, and by their invariants."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from retention_bench.analysis import Answer, Rate, clustered, gap, rate

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
    assert rate(0, 0) == Rate(hits=0, total=0, rate=None, ci95=None) == clustered([])
    assert rate(0, 0).to_json() == {"hits": 0, "total": 0, "rate": None, "ci95": None}


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="between 0 and total"):
        rate(hits, total)


def test_json_holds_plain_values_only() -> None:
    low, high = rate(8, 10).ci95 or (None, None)
    assert json.loads(json.dumps(rate(8, 10).to_json())) == {"hits": 8, "total": 10, "rate": 0.8, "ci95": [low, high]}
    found = clustered([Answer(i % 5, i > 3) for i in range(20)])
    assert json.loads(json.dumps(found.to_json())) == vars(found) | {"ci95": list(found.ci95)}


def alike(relations: int, each: int, lost: int = 0) -> list[Answer]:
    """Facts of some relations; those of the first `lost` relations are missed."""
    return [Answer(g, g >= lost, (g, i)) for g in range(relations) for i in range(each)]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_clusters_of_one_are_independent_trials(hits: list[int]) -> None:
    assert clustered(enumerate(map(bool, hits)), "fact") == rate(sum(hits), len(hits))


answered = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None)
@given(answered)
def test_a_clustered_interval_contains_the_rate_and_is_no_narrower_than_a_plain_one(outcomes: list) -> None:
    found, plain = clustered(outcomes, "fact"), rate(sum(hit for _, hit in outcomes), len(outcomes))
    assert (found.hits, found.total) == (plain.hits, plain.total)
    assert found.rate == pytest.approx(plain.rate)
    assert 0 <= found.ci95[0] <= found.rate + 1e-12
    assert found.rate - 1e-12 <= found.ci95[1] <= 1
    assert found.ci95[1] - found.ci95[0] >= plain.ci95[1] - plain.ci95[0] - 1e-9


@settings(deadline=None)
@given(answered)
def test_clustered_misses_mirror_clustered_hits(outcomes: list) -> None:
    found, turned = clustered(outcomes), clustered([(g, not hit) for g, hit in outcomes])
    assert turned.ci95 == pytest.approx((1 - found.ci95[1], 1 - found.ci95[0]))


def test_relations_that_are_lost_as_a_whole_count_once() -> None:
    # 6 of 30 relations lost, four facts each: about the interval of 24 of 30
    found = clustered(alike(30, 4, lost=6))
    assert found.ci95 == pytest.approx(rate(24, 30).ci95, abs=0.02)
    assert (found.clustered_by, found.clusters, found.total) == ("relation", 30, 120)
    assert 24 < found.effective < 30


def test_a_fact_that_many_models_answer_is_no_new_fact() -> None:
    once = alike(8, 5)
    many = [a._replace(model=m) for a in once for m in range(10)]
    assert clustered(many).ci95 == pytest.approx(clustered(once).ci95, abs=0.005)


def test_models_that_lose_all_of_their_edits_widen_the_interval() -> None:
    # 10 models of 5 edits, three of which lost all of theirs; the edits are of ten relations
    def edits(models: int) -> Rate:
        return clustered(Answer(i % 10, i >= 15, i, i // 5 % models) for i in range(50))

    assert edits(10).effective < 0.5 * edits(4).effective  # of four models nothing can be said


def test_one_relation_says_nothing_about_others() -> None:
    found = clustered(alike(1, 9))
    assert (found.rate, found.ci95, found.clusters, found.effective) == (1.0, (0.0, 1.0), 1, 0.0)
    assert clustered(alike(5, 10)).ci95[0] < rate(50, 50).ci95[0]  # five relations are few, even where all is answered


def test_seeds_count_alike_and_widen_the_interval_where_they_differ() -> None:
    rng = np.random.default_rng(0)
    answers = [
        Answer(i % 10, bool(rng.random() < (0.9, 0.6)[s]), i, seed=s) for s in (0, 1) for i in range(100 - 50 * s)
    ]
    found, pooled = clustered(answers), clustered([a._replace(seed=None, fact=None) for a in answers])
    by_seed = [np.mean([a.value for a in answers if a.seed == s]) for s in (0, 1)]
    assert found.rate == pytest.approx(np.mean(by_seed)) != pooled.rate
    assert found.effective < 0.5 * pooled.effective


@settings(deadline=None)
@given(
    st.integers(2, 4).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))),
    st.integers(2, 6),
    st.integers(1, 5),
)
def test_models_that_keep_all_and_models_that_keep_none_leave_an_interval(models, relations, each) -> None:
    keep, several = models
    found = clustered([a._replace(value=m < keep, model=m) for a in alike(relations, each) for m in range(several)])
    assert 0 < found.ci95[0] < found.rate < found.ci95[1] < 1
    assert 0 < found.effective <= relations * each  # however often they are asked
    every = gap(
        [Answer(g, m < keep, i, m) for g in range(relations) for i in range(each) for m in range(several)], alike(3, 5)
    )
    assert every.ci95[0] < every.value < every.ci95[1]


several = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.lists(st.booleans(), min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[:2],
)


@settings(deadline=None)
@given(several, st.booleans())
def test_an_interval_of_facts_asked_several_times_is_finite_and_has_a_width(facts: list, seeds: bool) -> None:
    answers = [
        Answer(g, hit, (g, i), m, seed=m % 2 if seeds else None) for g, i, hits in facts for m, hit in enumerate(hits)
    ]
    found = clustered(answers)
    low, high = found.ci95
    assert 0 <= low <= found.rate + 1e-12
    assert found.rate - 1e-12 <= high <= 1
    assert high - low > 0.02
    assert low == 0 or low < found.rate
    assert high == 1 or high > found.rate
