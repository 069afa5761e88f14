"""Survival: against scipy, in simulation with known hazards, and by its rules."""

import dataclasses
import itertools
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.survival_simulation import simulate
from retention_bench.analysis import Answer, clustered
from retention_bench.analysis.courses import Course, between, courses
from retention_bench.analysis.hazards import contrast
from retention_bench.analysis.survival import HalfLife, curve, survival
from retention_bench.analysis.turnbull import turnbull


def course(held, fact="a", relation="r", model=0, every=5):
    steps = tuple(range(0, every * len(held), every))
    return Course(fact, relation, model, steps, tuple(10.0 * s for s in steps), tuple(h == "1" for h in held))


@pytest.mark.parametrize(
    ("held", "low", "high"),
    [
        ("1111", 150, math.inf),  # censored at the last look
        ("1100", 50, 100),
        ("1011", 150, math.inf),  # one miss between hits is no loss
        ("10100", 100, 150),
        ("1001", 0, 50),  # two misses are, whatever comes after
        ("1110", 100, 150),  # to the end
        ("1", 0, math.inf),
    ],
)
def test_a_fact_is_lost_at_the_first_look_from_which_it_stays_lost(held, low, high):
    assert between(course(held)) == (low, high)


@pytest.mark.parametrize("doses", [(0, 0), (1, 0)])
def test_doses_rise(doses):
    with pytest.raises(ValueError, match="rise"):
        Course("a", "r", 0, (0, 1), doses, (True, True))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=40))
def test_on_a_common_grid_the_estimate_is_kaplan_meiers(found):
    low = np.array([look - lost for look, lost in found], float)
    high = np.array([look if lost else math.inf for look, lost in found], float)
    events = [look for look, lost in found if lost]
    data = stats.CensoredData(uncensored=events, right=[look for look, lost in found if not lost])
    reference = stats.ecdf(data).sf
    estimate = turnbull(low, high, np.ones((1, len(found))))
    for dose, share in zip(estimate.doses, estimate.survival[0], strict=True):
        assert share == pytest.approx(reference.evaluate(dose), abs=1e-4)


def test_a_run_that_stops_between_two_looks_counts_no_loss_twice():
    # A constant hazard; runs stop at 2, 4, 6 and 8 between looks at 0, 5 and 10. Losses at their looks, as Kaplan-Meier
    # has it, would leave fewer.
    low, high, weights = [], [], []
    for stop in (2, 4, 6, 8, 10):
        looks = sorted({0, 5, 10, stop} - {look for look in (5, 10) if look > stop})
        for begin, end in itertools.pairwise(looks):
            low, high = [*low, begin], [*high, end]
            weights.append(math.exp(-0.1 * begin) - math.exp(-0.1 * end))
        low, high = [*low, looks[-1]], [*high, math.inf]
        weights.append(math.exp(-0.1 * looks[-1]))
    found = turnbull(np.array(low, float), np.array(high), np.array([weights]))
    assert found.survival[0] == pytest.approx(np.exp(-0.1 * found.doses), abs=1e-3)


def test_the_log_rank_statistic_is_scipys():
    from retention_bench.analysis.hazards import _statistic

    rng = np.random.default_rng(0)
    times, events = rng.integers(1, 7, (2, 30)), rng.random((2, 30)) < 0.6
    data = [stats.CensoredData(uncensored=t[e], right=t[~e]) for t, e in zip(times, events, strict=True)]
    grid = np.arange(1, 7)
    risk = (times[:, :, None] >= grid).sum(1).astype(float)
    lost = ((times[:, :, None] == grid) & events[:, :, None]).sum(1).astype(float)
    z = _statistic(risk[1:], lost[1:], risk.sum(0), lost.sum(0))[0]
    assert abs(z) == pytest.approx(abs(stats.logrank(*data).statistic))


def test_bands_hold_the_curve_and_stay_within_0_and_1():
    found = curve([pair[0] for pair in simulate(np.random.default_rng(3))])
    low, share, high = (np.array(values) for values in (found.low, found.survival, found.high))
    assert (low >= 0).all()
    assert (high <= 1).all()
    assert (low <= share).all()
    assert (share <= high).all()
    assert (np.diff(share) <= 1e-12).all()
    assert (found.doses[0], share[0], low[0]) == (0, 1, 1)
    assert found.half_life.low < found.half_life.dose


def test_a_half_life_that_is_not_reached_has_a_lower_bound():
    found = curve([course("1111", fact=f"f{i}", relation=f"r{i % 6}") for i in range(30)])
    assert found.half_life == HalfLife(None, 150, None, None)
    few = curve([course("1111", fact=f"f{i}", relation=f"r{i % 3}") for i in range(6)])
    assert few.half_life == HalfLife(None, 0, None, None)  # at the first look a band is already below one half
    alone = curve([course("1100"), course("1110", fact="b")])
    assert (alone.low, alone.half_life) == (None, HalfLife(100, None, None, (50, 100)))


@pytest.mark.parametrize("relations", [5, 8, 30])
def test_where_nothing_is_lost_the_band_is_as_wide_as_a_rates(relations):
    rate = clustered([Answer(i % relations, True, i) for i in range(50)]).ci95[0]
    for held, end in (("11", "low"), ("10", "high")):
        found = curve([course(held, fact=f"f{i}", relation=f"r{i % relations}") for i in range(50)])
        ends = getattr(found, end)[-1]
        assert (ends if end == "low" else 1 - ends) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize(
    ("held", "half_life"),
    [
        (["1000"] * 30, HalfLife(None, 0, 50, (0, 50))),  # "before 50"
        (["1100"] * 30, HalfLife(None, 50, 100, (50, 100))),
        (["1000"] * 24 + ["1110"] * 6, HalfLife(50 * math.log(2) / math.log(5), 0, 50, (0, 50))),
        (["1100"] * 15 + ["1110"] * 15, HalfLife(100, 50, 150, (50, 100))),
    ],
)
def test_a_half_life_is_known_to_lie_between_looks_only(held, half_life):
    found = curve([course(own, fact=f"f{i}", relation=f"r{i % 6}") for i, own in enumerate(held)]).half_life
    assert found == dataclasses.replace(half_life, dose=half_life.dose and pytest.approx(half_life.dose))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=30))
def test_a_half_lifes_interval_ends_at_looks_and_holds_those_around_it(facts):
    held = [("1" * lost + "0" * 5)[: 1 + max(last, 1)] for lost, _, last in facts]
    found = curve([course(own, fact=f"f{i}", relation=f"r{facts[i][1]}") for i, own in enumerate(held)])
    life = found.half_life
    assert (life.between is None) == (found.survival[-1] > 0.5 + 1e-6)
    if life.between is not None and life.dose is not None:
        assert life.between[0] <= life.dose <= life.between[1]
    if life.low is None:
        return
    assert {life.low, life.high} <= {None, *found.doses}
    if life.between is None:
        assert life.high is None
        return
    assert life.low <= life.between[0]
    assert life.high is None or life.high >= life.between[1]


@pytest.mark.parametrize(("shape", "every", "half"), [(0.5, 1000, 900), (1, 1000, 900), (4, 1000, 900), (4, 500, 450)])
def test_a_half_life_between_coarse_looks_is_in_its_interval_whatever_the_hazard(shape, every, half):
    # all models look at the same doses; with shape 4 the rate of loss is far from constant
    rng = np.random.default_rng(11)
    looks = tuple(range(0, 6 * every, every))
    held = []
    for _ in range(60):
        lost = half * (rng.exponential(1, 60) / math.log(2)) ** (1 / shape)
        life = curve(
            [
                Course(str(i), f"r{i % 10}", 0, looks, looks, tuple(t > look for look in looks))
                for i, t in enumerate(lost)
            ]
        ).half_life
        held.append(life.low <= half and (life.high is None or half <= life.high))
    assert np.mean(held) >= 0.93


def test_a_curve_is_of_facts_that_were_held():
    with pytest.raises(ValueError, match="held before"):
        curve([course("0111")])


def rows(experiment, kind, fact, relation, outcomes):
    return [
        {
            "experiment": experiment, "step": step, "tokens": 100 * step, "epoch": step / 8, "fact_id": fact,
            "relation": relation, "kind": kind, "hit": outcome in ("new" if kind == "edited" else "true"),
            "outcome": outcome,
        }
        for step, outcome in enumerate(outcomes)
    ]  # fmt: skip


def trajectory():
    return [
        *rows(0, "edited", "a", "r", ["new", "new", "true", "true"]),
        *rows(0, "edited", "b", "s", ["other", "new", "new", "new"]),  # not taken
        *rows(1, "edited", "c", "s", ["new", "new"]),
        *rows(None, "edited", "a", "r", ["true"] * 4),
        *rows(None, "edited", "b", "s", ["true"] * 4),
        *rows(None, "edited", "c", "s", ["other"] * 4),  # not known
        *rows(0, "intrinsic", "i", "t", ["true", "true", "none", "none"]),
        *rows(1, "intrinsic", "i", "t", ["true", "true"]),
        *rows(None, "intrinsic", "i", "t", ["true"] * 4),
    ]


def test_a_trajectory_becomes_arms():
    found = survival(trajectory())
    assert set(found.curves) == {"edited", "control", "intrinsic"}
    assert found.left_out == {"not_taken": 1, "not_known": 1, "intrinsic": 0}
    assert (found.curves["edited"].facts, found.curves["edited"].lost, found.curves["control"].lost) == (1, 1, 0)
    assert (found.curves["intrinsic"].facts, found.curves["intrinsic"].courses) == (1, 2)
    assert found.contrast.lost == (1, 0)
    assert found.contrast.hazard_ratio is None
    assert json.loads(json.dumps(found.to_json()))["curves"]["edited"]["doses"][-1] == 200
    assert survival(trajectory(), "epochs").curves["edited"].doses[-1] == 2 / 8
    assert survival([]).curves == {}
    assert survival([]).contrast is None


def test_a_trajectory_of_its_own_makes_sense():
    with pytest.raises(ValueError, match="tokens, steps, epochs"):
        courses([], "hours")
    with pytest.raises(ValueError, match="two rows"):
        courses(trajectory()[:1] * 2)


def test_the_same_courses_give_the_same_figures():
    pairs = simulate(np.random.default_rng(4), relations=20)
    assert contrast(pairs) == contrast(pairs)
    swapped = contrast([(b, a) for a, b in pairs])
    assert swapped.hazard_ratio == pytest.approx(1 / contrast(pairs).hazard_ratio)


def lost_at_the_first_look(edited, control, facts=50, relations=8):
    """Pairs of which those facts are lost, in relations one after the other."""
    return [
        tuple(
            course("100" if fact in lost else "111", f"f{fact}", f"r{fact % relations}", model)
            for lost, model in ((edited, 0), (control, None))
        )
        for fact in range(facts)
    ]


@pytest.mark.parametrize(
    ("edited", "control", "ratio"), [({0, 8, 16}, {24}, 3.09), ({0}, {8}, 1.0), ({0, 1}, {8, 9}, 1.0), ({0}, {1}, 1.0)]
)
def test_losses_in_few_relations_give_no_interval(edited, control, ratio):
    # an interval of no width was printed, beside a p of 1
    found = contrast(lost_at_the_first_look(edited, control))
    assert (found.log_rank_p, found.ci95) == (1.0, None)
    assert found.hazard_ratio == pytest.approx(ratio, abs=0.01)
    assert found.reason == "facts were lost in fewer than 3 relations"


@pytest.mark.parametrize("each", [1, 2, 3])
def test_where_relations_agree_the_interval_is_that_of_independent_facts(each):
    relations = 4
    edited, control = set(range(relations * each)), set(range(24, 24 + relations * each))
    found = contrast(lost_at_the_first_look(edited, control, 80, relations))
    # two shares of 80, each of 4 x each lost: their log hazards' errors by the delta method
    lost = relations * each / 80
    error = math.sqrt(2 * lost / (1 - lost) / 80) / -math.log1p(-lost)
    assert found.hazard_ratio == pytest.approx(1)
    assert math.log(found.ci95[1]) == pytest.approx(stats.norm.ppf(0.975) * error, rel=0.02)
    assert found.reason is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=25))
def test_a_ratio_or_an_interval_that_is_not_there_has_a_reason(facts):
    pairs = [
        (
            course(("1" * one + "0000")[:4], f"f{i}", f"r{relation}"),
            course(("1" * other + "0000")[:4], f"f{i}", f"r{relation}", None),
        )
        for i, (relation, one, other) in enumerate(facts)
    ]
    found = contrast(pairs)
    assert (found.reason is None) == (found.ci95 is not None)
    if found.ci95 is not None:
        low, high = found.ci95
        assert 0 < low < found.hazard_ratio < high < math.inf
        losses = sum(found.lost)
        assert math.log(high / low) > 2 * 1.96 * math.sqrt(2 / losses)  # as many independent facts' at most


@pytest.mark.parametrize(
    ("edited", "control", "reason"),
    [
        (set(), {0, 1}, "of edited facts none was lost"),
        ({0, 1}, set(), "of the same facts in the control none was lost"),
        (set(range(50)), set(range(33)), "edited facts were all lost at the first look after the start"),
        (
            set(range(7)),
            set(range(50)),
            "the same facts in the control were all lost at the first look after the start",
        ),
    ],
)
def test_without_a_ratio_the_reason_is_given(edited, control, reason):
    found = contrast(lost_at_the_first_look(edited, control))
    assert (found.hazard_ratio, found.ci95, found.reason) == (None, None, reason)
    assert found.to_json()["reason"] == reason


def test_pieces_of_the_dose_do_not_separate_the_arms():
    # The edited facts are lost at the first look or, all that are left, at the second; the control's at the second or
    # never. Were the rate free on both sides of the first look, any ratio could be made up for.
    pairs = [
        (
            course("1000" if i % 7 < 5 else "1100", f"f{i}", f"r{i // 6}"),
            course("1100" if i % 3 == 0 else "1111", f"f{i}", f"r{i // 6}", None),
        )
        for i in range(42)
    ]
    found = contrast(pairs)
    assert found.reason is None
    assert 1 < found.ci95[0] < found.hazard_ratio < found.ci95[1] < 100


def test_a_model_that_fits_exactly_is_no_reason_to_warn():
    # statsmodels takes shares that are fitted exactly for a separation
    pairs = [
        (
            course("10" if i % 6 < 3 else "11", f"f{i}", f"r{i // 6}"),
            course("10" if i % 6 < 2 else "11", f"f{i}", f"r{i // 6}", None),
        )
        for i in range(30)
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert contrast(pairs).hazard_ratio == pytest.approx(math.log(1 / 2) / math.log(2 / 3))
    assert not said


def test_runs_that_stop_at_different_steps_do_not_bias():
    """Edits that do nothing: the naive share alive at the end calls the edited facts the more durable ones."""
    rng = np.random.default_rng(5)
    naive, rejected, ratios = [], [], []
    for _ in range(30):
        pairs = simulate(rng, relations=10, ratio=1)
        alive = [np.mean([pair[arm].held[-1] for pair in pairs]) for arm in (0, 1)]
        naive.append(alive[0] - alive[1])
        found = contrast(pairs)
        rejected.append(found.log_rank_p <= 0.05)
        ratios.append(math.log(found.hazard_ratio))
    assert np.mean(naive) > 0.1  # in truth there is no difference
    assert abs(np.mean(ratios)) < 0.15
    assert np.mean(rejected) <= 0.2


@pytest.mark.parametrize(
    ("runs", "least", "relations", "frailty"),
    [(30, 0.86, 8, 0.5), pytest.param(300, 0.925, 15, 0.5, marks=pytest.mark.slow)],
)
def test_known_hazards_are_recovered(runs, least, relations, frailty):
    rng = np.random.default_rng(6)
    half, ratio = [], []
    for _ in range(runs):
        pairs = simulate(rng, facts=60, relations=relations, frailty=frailty)
        life, found = curve([pair[0] for pair in pairs]).half_life, contrast(pairs)
        half.append(life.low <= 968 and (life.high is None or life.high >= 968))  # over all relations
        ratio.append(found.ci95[0] <= 1.88 <= found.ci95[1])
    assert np.mean(half) >= least
    assert np.mean(ratio) >= least
