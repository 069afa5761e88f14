"""Paired statistics against published examples, by their invariants, and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.analysis import (
    Answer,
    Rank,
    holm,
    mcnemar,
    mean,
    rank_intervals,
    sign_flips,
)
from retention_bench.analysis.clusters import layout
from retention_bench.analysis.ranks import apart

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
def test_sign_flips_are_mcnemar_where_facts_change_by_one(changes: list[int]) -> None:
    assert sign_flips(changes) == mcnemar(changes.count(-1), changes.count(1))


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), max_size=9), st.integers(1, 50))
def test_sign_flips_go_through_all_signs(changes: list[int], unit: int) -> None:
    totals = np.array([abs(np.dot(signs, changes)) for signs in itertools.product([-1, 1], repeat=len(changes))])
    p = sign_flips(changes)
    assert p == pytest.approx(np.mean(totals >= abs(sum(changes))))
    assert p == pytest.approx(sign_flips([-change for change in changes]))
    assert p == pytest.approx(sign_flips([change * unit for change in changes]))


def test_sign_flips_reject_no_more_often_than_they_say() -> None:
    # Two models equally good, asked four questions of each of 50 facts, whose answers hang together within a model.
    rng = np.random.default_rng(2)
    one, other = (rng.binomial(4, rng.beta(1.5, 0.5, size=(1000, 50))) for _ in range(2))
    by_fact = np.mean([sign_flips(run.tolist()) < 0.05 for run in other - one])
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


def entry(hits: np.ndarray, relations: int = 50) -> list[Answer]:
    return [Answer(i % relations, float(hit), i) for i, hit in enumerate(hits)]


def test_entries_that_answer_alike_share_their_places() -> None:
    hits = np.arange(50) < 40
    entries = {"a": entry(hits), "b": entry(hits), "c": entry(np.arange(50) < 2)}
    ranks = rank_intervals(entries)
    assert {name: (r.rank, r.ci95) for name, r in ranks.items()} == {
        "a": (1, (1, 2)),
        "b": (1, (1, 2)),
        "c": (3, (3, 3)),
    }
    assert ranks["a"].to_json() == {"rank": 1, "ci95": [1, 2]}
    turned = rank_intervals(entries, lowest_first=True)
    assert [turned[name].rank for name in "abc"] == [2, 2, 1]
    assert turned["c"].ci95 == (1, 1)


def test_a_gated_entry_has_no_rank_and_takes_no_place() -> None:
    entries = {name: entry(np.arange(50) < n) for name, n in {"a": 49, "b": 30, "c": 5}.items()}
    found = rank_intervals(entries, gated=["a"])
    assert {name: r.rank for name, r in found.items()} == {"b": 1, "c": 2}
    assert rank_intervals(entries | {"d": []}, gated=["a", "b", "c", "d"]) == {}


def test_an_entry_without_answers_has_no_rank() -> None:
    with pytest.raises(ValueError, match=r"these have none: \['b'\]"):
        rank_intervals({"a": entry(np.ones(3)), "b": []})


def test_ranks_are_as_sure_as_there_are_relations() -> None:
    # b lost more, but all of it in one of its five relations
    hits = np.ones(50)
    other = hits.copy()
    other[::5] = 0
    many = rank_intervals({"a": entry(hits), "b": entry(other)})
    few = rank_intervals({"a": entry(hits, 5), "b": entry(other, 5)})
    one = rank_intervals({"a": entry(hits, 1), "b": entry(other, 1)})
    assert [r["b"].rank for r in (many, few, one)] == [2, 2, 2]
    assert [r["b"].ci95 for r in (many, few, one)] == [(2, 2), (1, 2), (1, 2)]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=5), st.booleans())
def test_ranks_and_their_intervals_are_places(sides: list[list[bool]], lowest_first: bool) -> None:
    entries = {f"e{i}": entry(np.array(side), 4) for i, side in enumerate(sides)}
    ranks = rank_intervals(entries, lowest_first=lowest_first)
    sums = {name: sum(side) * (-1 if lowest_first else 1) for name, side in zip(entries, sides, strict=True)}
    for name, found in ranks.items():
        assert found.rank == 1 + sum(sums[other] > sums[name] for other in ranks)
        assert 1 <= found.ci95[0] <= found.ci95[1] <= len(sides)


sizes = st.lists(st.integers(1, 12), min_size=2, max_size=8)


@settings(deadline=None)
@given(sizes, st.integers(0, 10_000))
def test_two_entries_are_told_apart_where_the_interval_of_their_difference_excludes_0(sizes: list, seed: int) -> None:
    relations = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    one, other = (rng.random(len(relations)) < rate for rate in (0.9, 0.5))
    sides = [
        [Answer(int(g), float(hit), i) for i, (g, hit) in enumerate(zip(relations, side, strict=True))]
        for side in (one, other)
    ]
    ranks = rank_intervals(dict(zip("ab", sides, strict=True)))
    found = mean(a._replace(value=a.value - b.value) for a, b in zip(*sides, strict=True))
    assert (ranks["a"].ci95 != ranks["b"].ci95) == (found.ci95[0] > 0 or found.ci95[1] < 0)
    assert ranks["a"].ci95 in ((1, 1), (1, 2)) or ranks["b"].ci95 == (1, 1)


def test_entries_of_other_facts_and_relations_can_be_told_apart() -> None:
    def own(first: int, hits: int, relations: int = 10) -> list[Answer]:
        return [Answer((i + first) % 20 if relations > 1 else 0, float(i < hits), i + first) for i in range(60)]

    assert rank_intervals({"a": own(0, 58), "b": own(30, 20)})["b"].ci95 == (2, 2)
    assert rank_intervals({"a": own(0, 58), "b": own(30, 54)})["b"] == Rank(2, (1, 2))
    assert rank_intervals({"a": own(0, 58), "b": own(30, 20, 1)})["b"].ci95 == (1, 2)  # one relation says nothing


@pytest.mark.parametrize(("relations", "each"), [(5, 10), (8, 6), (10, 5)])
@pytest.mark.parametrize("entries", [2, 4])
def test_equal_editors_with_few_relations_share_their_places(relations: int, each: int, entries: int) -> None:
    # a bootstrap over relations told two apart in 14.5 % with five relations, in 8 % with ten
    rng = np.random.default_rng(3)
    answers = [Answer(g, 0.0, (g, i)) for g in range(relations) for i in range(each)]
    common = 1.7 + 0.5 * rng.standard_normal((1000, relations, 1))
    hits = [
        rng.random((1000, relations, each))
        < 1 / (1 + np.exp(-common - 0.7 * rng.standard_normal((1000, relations, 1))))
        for _ in range(entries)
    ]
    values = [side.reshape(1000, -1).astype(float) for side in hits]
    assert np.mean(apart(layout([answers] * entries), values)[0].any(axis=0)) <= 0.055


def test_rank_intervals_hold_the_true_rank() -> None:
    rng = np.random.default_rng(5)
    rates = np.array([0.85, 0.75, 0.6, 0.55])
    held = []
    for _ in range(400):
        hits = rng.random((4, 50)) < rates[:, None]
        ranks = rank_intervals({str(i): entry(own) for i, own in enumerate(hits)})
        held += [r.ci95[0] <= int(name) + 1 <= r.ci95[1] for name, r in ranks.items()]
    assert np.mean(held) >= 0.95
