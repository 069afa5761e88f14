"""Intervals against published values, against scipy, and by their invariants."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from retention_bench.analysis import Gap, Rate, gap, rate, retention

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
