"""Paired statistics against published examples, by their invariants, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retention_bench.analysis import (
    detectable,
    detectable_paired,
    difference,
    holm,
    mcnemar,
    mcnemar_by_fact,
    rank_intervals,
)

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_mcnemar_gives_the_published_p() -> None:
    # Fagerland, Lydersen & Laake (2013), BMC Medical Research Methodology 13:91: airway hyper-responsiveness before
    # and after stem cell transplantation (Bentur et al. 2009), 7 pairs one way and 1 the other; exact p = 0.070
    assert mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 2**8)
    assert round(mcnemar(7, 1), 3) == 0.070
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_symmetric(lost: int, gained: int) -> None:
    assert mcnemar(lost, gained) == mcnemar(gained, lost)
    assert 0 < mcnemar(lost, gained) <= 1


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="not be negative, got 3 and -1"):
        mcnemar(3, -1)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60))
def test_by_fact_is_mcnemar_where_facts_change_by_one(changes: list[int]) -> None:
    assert mcnemar_by_fact(changes) == mcnemar(changes.count(-1), changes.count(1))


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), max_size=9), st.integers(1, 50))
def test_by_fact_goes_through_all_signs(changes: list[int], unit: int) -> None:
    totals = np.array([abs(np.dot(signs, changes)) for signs in itertools.product([-1, 1], repeat=len(changes))])
    p = mcnemar_by_fact(changes)
    assert p == pytest.approx(np.mean(totals >= abs(sum(changes))))
    assert p == pytest.approx(mcnemar_by_fact([-change for change in changes]))
    assert p == pytest.approx(mcnemar_by_fact([change * unit for change in changes]))


def test_by_fact_rejects_no_more_often_than_it_says() -> None:
    # Two models equally good, asked four questions of each of 50 facts, whose answers hang together within a model.
    rng = np.random.default_rng(2)
    one, other = (rng.binomial(4, rng.beta(1.5, 0.5, size=(1000, 50))) for _ in range(2))
    by_fact = np.mean([mcnemar_by_fact(run.tolist()) < 0.05 for run in other - one])
    assert 0.025 < by_fact < 0.065
    counts = (
        rng.permuted(np.arange(4) < one[..., None], axis=-1),
        rng.permuted(np.arange(4) < other[..., None], axis=-1),
    )
    lost, gained = (np.sum(a & ~b, axis=(1, 2)) for a, b in (counts, counts[::-1]))
    by_question = np.mean([mcnemar(int(a), int(b)) < 0.05 for a, b in zip(lost, gained, strict=True)])
    assert by_question > 0.15  # as if a fact's answers were independent


def test_holm_gives_the_textbook_example() -> None:
    # the example of the Holm-Bonferroni method: four hypotheses, of which the first and last fall at 5 %
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(p_values)
def test_holm_keeps_the_order_and_is_never_below_the_raw_p(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(raw <= corrected <= 1 for raw, corrected in zip(p, adjusted, strict=True))
    assert all(corrected <= min(1.0, raw * len(p)) for raw, corrected in zip(p, adjusted, strict=True))
    ordered = [corrected for _, corrected in sorted(zip(p, adjusted, strict=True))]
    assert ordered == sorted(ordered)


@given(p_values, st.randoms())
def test_holm_does_not_depend_on_the_order_given(p: list[float], random) -> None:
    places = list(range(len(p)))
    random.shuffle(places)
    assert holm([p[i] for i in places]) == [holm(p)[i] for i in places]


def test_difference_gives_the_published_interval() -> None:
    # ci.prop.ps(.05, 12, 4, 26, 6) of statpsych, the package of the interval's first author: 26 one way, 4 the other
    found = difference([[1]] * 26 + [[-1]] * 4 + [[0]] * 18)
    assert found.ci95 == pytest.approx((0.2548067, 0.6251933), abs=5e-8)
    assert found.value == pytest.approx(22 / 48)


facts = st.lists(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1.0]), min_size=1, max_size=5), min_size=1, max_size=20)


@given(facts)
def test_the_difference_is_within_its_interval_and_turns_with_the_sides(changes: list[list[float]]) -> None:
    found, turned = difference(changes), difference([[-c for c in fact] for fact in changes])
    assert -1 <= found.ci95[0] <= found.value <= found.ci95[1] <= 1
    assert turned.value == pytest.approx(-found.value)
    assert turned.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))


def test_a_question_asked_again_is_no_new_evidence() -> None:
    changes = [[1.0]] * 9 + [[-1.0]] * 3 + [[0.0]] * 38
    once, four_times = difference(changes), difference([fact * 4 for fact in changes])
    assert four_times.value == once.value
    assert four_times.ci95 == pytest.approx(once.ci95, abs=0.005)
    with pytest.raises(ValueError, match="must be a question"):
        difference([[], []])


@pytest.mark.parametrize("questions", [1, 4])
@pytest.mark.parametrize(("first", "second"), [(0.63, 0.82), (0.5, 0.5), (0.9, 0.8)])
@pytest.mark.parametrize("alike", [0.0, 1.5])
def test_the_paired_interval_covers_the_difference(questions: int, first: float, second: float, alike: float) -> None:
    # 50 facts; `alike` is how far a fact's own difficulty, the same for both sides, decides its answers
    rng = np.random.default_rng(3)
    shape = (2000, 50, questions)
    spread = math.sqrt(1 + 1.5 * alike**2)
    hardness = alike * rng.standard_normal((2000, 50, 1))
    sides = []
    for rate in (first, second):
        own = hardness + alike * math.sqrt(0.5) * rng.standard_normal((2000, 50, 1)) + rng.standard_normal(shape)
        sides.append(own < stats.norm.ppf(rate) * spread)
    changes = sides[1].astype(float) - sides[0]
    intervals = [difference(run.tolist()).ci95 for run in changes]
    covered = np.mean([low <= second - first <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.97


def test_detectable_is_the_published_sample_size_turned_round() -> None:
    # The formula without continuity correction in Fleiss, Levin & Paik (2003), section 4.4: to tell 0.3 from 0.4 at 5 %
    # with a power of 80 %, 356 in each group.
    assert detectable(0.3, 356, 356) == pytest.approx(0.1, abs=1e-4)
    assert detectable(0.7, 356, 356) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(("n", "other_way"), [(50, 0.0), (50, 0.05), (100, 0.1), (20, 0.0)])
def test_detectable_paired_has_the_power_it_states(n: int, other_way: float) -> None:
    delta = detectable_paired(n, other_way)
    assert delta is not None
    rng = np.random.default_rng(4)
    counts = rng.multinomial(n, [delta + other_way, other_way, 1 - delta - 2 * other_way], size=4000)
    found = np.mean([mcnemar(int(one), int(other)) < 0.05 for one, other, _ in counts])
    assert found == pytest.approx(0.8, abs=0.025)


def test_too_few_facts_show_nothing() -> None:
    assert detectable_paired(5) is None  # 5 of 5 one way: p = 0.0625
    assert detectable_paired(6) == pytest.approx(0.8 ** (1 / 6), abs=1e-6)  # all six must change
    assert detectable_paired(50, 0.5) is None
    assert detectable(0.5, 2, 2) is None


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(5, 500), st.integers(5, 500))
def test_more_facts_show_smaller_differences(rate: float, n: int, other_n: int) -> None:
    few, many = detectable(rate, n, other_n), detectable(rate, 4 * n, 4 * other_n)
    assert few is None or (many is not None and many < few)
    assert many == pytest.approx(detectable(1 - rate, 4 * n, 4 * other_n))


def entry(hits: np.ndarray) -> dict[str, tuple[float, float]]:
    return {f"fact-{i}": (float(hit), 1.0) for i, hit in enumerate(hits)}


def test_entries_that_answer_alike_share_their_places() -> None:
    hits = np.arange(50) < 40
    ranks = rank_intervals({"a": entry(hits), "b": entry(hits), "c": entry(np.arange(50) < 2)}, seed=0)
    assert {name: (r.rank, r.ci95) for name, r in ranks.items()} == {
        "a": (1, (1, 2)),
        "b": (1, (1, 2)),
        "c": (3, (3, 3)),
    }
    assert ranks["a"].to_json() == {"rank": 1, "ci95": [1, 2]}


def test_an_entry_without_trials_has_no_rank() -> None:
    with pytest.raises(ValueError, match=r"these have none: \['b'\]"):
        rank_intervals({"a": {"f": (1, 1)}, "b": {"f": (0, 0)}}, seed=0)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=5))
def test_ranks_and_their_intervals_are_places(sides: list[list[bool]]) -> None:
    entries = {f"e{i}": entry(np.array(side)) for i, side in enumerate(sides)}
    ranks = rank_intervals(entries, seed=1, resamples=60)
    for name, found in ranks.items():
        better = sum(sum(sides[int(other[1:])]) > sum(sides[int(name[1:])]) for other in ranks)
        assert found.rank == 1 + better
        assert 1 <= found.ci95[0] <= found.ci95[1] <= len(sides)


def test_rank_intervals_hold_the_true_rank() -> None:
    rng = np.random.default_rng(5)
    rates = np.array([0.85, 0.75, 0.6, 0.55])
    held = []
    for _ in range(400):
        hits = rng.random((4, 50)) < rates[:, None]
        ranks = rank_intervals({str(i): entry(own) for i, own in enumerate(hits)}, seed=0, resamples=400)
        held += [r.ci95[0] <= int(name) + 1 <= r.ci95[1] for name, r in ranks.items()]
    assert np.mean(held) >= 0.95
