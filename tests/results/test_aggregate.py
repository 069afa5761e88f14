"""Measures counted by hand: the worked example of docs/statistics.md, gates, and several seeds."""

import json
import math
import re
from pathlib import Path

import pytest

from retention_bench.analysis import logit
from retention_bench.analysis.logodds import LARGEST_PROBABILITY, LEAST_PROBABILITY, is_clipped
from retention_bench.results import Run, Sample, aggregate
from retention_bench.results.gates import MIN_FACTS, MIN_RELATIONS
from retention_bench.results.measure_types import Change, Estimate

DOCS = Path(__file__).parents[2] / "docs" / "statistics.md"
LEARNED = {"learned": True, "why_not": None}


def sample(fact, stage, kind, hit, *, chance=0.5, outcome=None, experiment=None):
    """An answer about fact `NUMBER-RELATION`."""
    return Sample(
        experiment=experiment,
        stage=stage,
        kind=kind,
        fact_id=fact,
        relation=fact.partition("-")[2],
        prompt=f"{fact} is",
        target="x",
        hit=hit,
        strict=hit,
        whole=hit,
        outcome=outcome or (("new" if kind == "edited" else "true") if hit else "other"),
        token_ids=(1,),
        text="x",
        logprob=math.log(chance),
    )


def edited(fact, took=True, known=True, kept=True, control=True, outcome="other", after=0.5):
    """The answers about one edited fact in all arms."""
    return [
        sample(fact, "base", "edited_true", known),
        sample(fact, "post_edit", "edited", took, experiment=0, chance=0.9),
        sample(fact, "post_finetune", "edited", kept, experiment=0, outcome=None if kept else outcome, chance=after),
        sample(fact, "control_finetune", "edited_true", control, chance=0.4),
    ]


def alone(fact, kind="intrinsic", kept=True, control=True):
    """The answers about one fact that is not edited."""
    return [
        sample(fact, "base", kind, True),
        sample(fact, "post_edit", kind, True, experiment=0),
        sample(fact, "post_finetune", kind, kept, experiment=0),
        sample(fact, "control_finetune", kind, control),
    ]


def test_the_worked_example_of_the_documents_is_what_is_counted():
    rows = json.loads(re.search(r"```json worked\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
    samples = [row for fact in rows["edited"] for row in edited(**fact)]
    samples += [row for fact in rows["intrinsic"] for row in alone(**fact)]
    found = aggregate([Run(samples, [LEARNED])])
    told = json.loads(re.search(r"```json counted\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
    assert found.paired.difference.value == pytest.approx(told["paired difference"])
    assert (found.paired.difference.n, found.paired.difference.clusters) == (told["facts"], told["relations"])
    assert [round(end, 3) for end in found.paired.difference.ci95] == told["interval"]
    assert found.decay.paired.value == pytest.approx(told["decay"], abs=1e-3)
    assert found.retention.edited.rate == pytest.approx(told["retention, edited"])
    assert found.retention.intrinsic.rate == pytest.approx(told["retention, intrinsic"])
    assert found.stages["post_finetune"]["edited"].rate == pytest.approx(told["edited, equation 1"])
    assert found.gap.unmatched.value == pytest.approx(told["gap, unmatched"])
    assert found.lost == {"new": 0, "true": 0, "related": 0, "other": 0, "none": 0} | told["lost"]
    assert found.collateral["intrinsic"].post_finetune.value == pytest.approx(told["collateral, intrinsic"])


def test_a_cell_in_which_few_edits_took_is_not_ranked():
    samples = [row for i in range(50) for row in edited(f"{i}-r{i % 10}", took=i < 3)]
    samples += [row for i in range(100) for row in alone(f"{100 + i}-s{i % 10}")]
    found = aggregate([Run(samples, [LEARNED, LEARNED])])
    failed = {gate.name: gate.text for gate in found.gates if not gate.passed}
    assert not found.ranked
    assert failed["efficacy"] == "3 of 50 edits took; 80 % must"
    assert failed["edited_facts"].startswith("3 edited facts")
    assert set(failed) == {"efficacy", "edited_facts", "edited_relations"}
    assert not {g.name for g in aggregate([Run(samples, [LEARNED])], min_efficacy=0.05).gates if not g.passed} >= {
        "efficacy"
    }


@pytest.mark.parametrize(
    ("facts", "relations", "failed"),
    [
        (MIN_FACTS, MIN_RELATIONS, set()),
        (MIN_FACTS - 1, MIN_RELATIONS, {"edited_facts"}),
        (MIN_FACTS, MIN_RELATIONS - 1, {"edited_relations"}),
    ],
)
def test_a_side_needs_facts_and_relations(facts, relations, failed):
    samples = [row for i in range(facts) for row in edited(f"{i}-r{i % relations}")]
    samples += [row for i in range(100) for row in alone(f"{100 + i}-s{i % 10}")]
    found = aggregate([Run(samples, [LEARNED])])
    assert {gate.name for gate in found.gates if not gate.passed} == failed
    assert found.ranked is (not failed)


@pytest.mark.parametrize(
    ("intrinsic", "matched", "failed"),
    [
        (40, 0, []),
        (3, 40, ["3 intrinsic facts that the base model knew; 20 are needed"]),
        (0, 40, []),  # as the split `subjects` has them
        (0, 3, ["3 matched intrinsic facts that the base model knew; 20 are needed"]),
        (0, 0, ["0 intrinsic facts that the base model knew; 20 are needed"]),
    ],
)
def test_facts_of_another_kind_are_no_stand_in(intrinsic, matched, failed):
    samples = [row for i in range(30) for row in edited(f"{i}-r{i % 6}")]
    samples += [row for i in range(intrinsic) for row in alone(f"{100 + i}-s{i % 6}")]
    samples += [row for i in range(matched) for row in alone(f"{500 + i}-r{i % 6}", kind="intrinsic_matched")]
    gates = aggregate([Run(samples, [LEARNED])]).gates
    assert [gate.text for gate in gates if gate.name == "intrinsic_facts" and not gate.passed] == failed


@pytest.mark.parametrize("share", [0.55, 0.07])  # times 100 each is a little more than a whole number
def test_exactly_the_share_of_edits_that_must_take_is_enough(share):
    took = round(100 * share)
    samples = [row for i in range(100) for row in edited(f"{i}-r{i % 10}", took=i < took)]
    gates = {gate.name: gate.passed for gate in aggregate([Run(samples, [LEARNED])], min_efficacy=share).gates}
    assert gates["efficacy"]
    samples = [row for i in range(100) for row in edited(f"{i}-r{i % 10}", took=i < took - 1)]
    gates = {gate.name: gate.passed for gate in aggregate([Run(samples, [LEARNED])], min_efficacy=share).gates}
    assert not gates["efficacy"]


def test_a_fine_tune_that_did_not_learn_is_a_gate():
    samples = [row for i in range(50) for row in edited(f"{i}-r{i % 10}")]
    samples += [row for i in range(100) for row in alone(f"{100 + i}-s{i % 10}")]
    found = aggregate([Run(samples, [LEARNED, {"learned": False, "why_not": "diverged"}])])
    assert [gate.text for gate in found.gates if not gate.passed] == ["1 of 2 fine-tunes learned (diverged)"]


def test_seeds_are_averaged_and_never_pooled():
    """Two seeds that say 0 and 0.4: the mean is theirs, whatever their sizes, and the interval knows they differ."""

    def run(seed, facts, lost):
        samples = [row for i in range(facts) for row in edited(f"{i}-r{i % 10}", kept=i % 10 >= lost)]
        return Run(samples + [row for i in range(100) for row in alone(f"{100 + i}-s{i % 10}")], [LEARNED], seed=seed)

    small, large = run(1, 20, 0), run(2, 200, 4)
    both = aggregate([small, large])
    assert aggregate([small]).paired.difference.value == 0
    assert aggregate([large]).paired.difference.value == pytest.approx(0.4)
    assert both.paired.difference.value == pytest.approx(0.2)
    again = aggregate([small, run(3, 20, 0)])
    assert again.paired.difference.value == 0
    assert again.paired.difference.n == 20  # a fact in two seeds is one fact
    low, high = both.paired.difference.ci95
    assert high - low > 0.3
    assert [gate.text[:7] for gate in both.gates[:1]] == ["seed 1:"]


def test_the_step_matched_control_takes_the_place_of_the_control():
    samples = [row for i in range(20) for row in edited(f"{i}-r{i % 5}")]
    rows = [
        {"kind": "edited", "fact_id": f"{i}-r{i % 5}", "experiment": 0, "outcome": "true" if i < 10 else "other"}
        for i in range(20)
    ]
    found = aggregate([Run(samples, [LEARNED], rows)])
    assert found.paired.difference.value == 0
    assert found.paired_step_matched.difference.value == -0.5
    assert aggregate([Run(samples, [LEARNED])]).paired_step_matched is None
    still = [row | {"outcome": "true"} for row in rows]
    both = aggregate([Run(samples, [LEARNED], own, seed=seed) for seed, own in enumerate((rows, still))])
    assert both.paired_step_matched.difference.value == -0.25


def test_a_model_that_gives_no_number_is_left_out_of_decay():
    samples = [row for i in range(20) for row in edited(f"{i}-r{i % 5}")]
    samples[2] = samples[2].model_copy(update={"logprob": None})
    found = aggregate([Run(samples, [LEARNED])]).decay
    assert (found.no_number, found.paired.n) == (1, 19)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_fact_with_a_clipped_probability_is_counted_once(place):
    samples = [row for i in range(20) for row in edited(f"{i}-r{i % 5}")]
    samples[place] = samples[place].model_copy(update={"logprob": 0.0})
    assert aggregate([Run(samples, [LEARNED])]).decay.clipped == 1
    certain = [row.model_copy(update={"logprob": 0.0}) for row in samples[:12]]
    assert aggregate([Run(certain + samples[12:], [LEARNED])]).decay.clipped == 3
    assert aggregate([Run(certain, [LEARNED], seed=seed) for seed in (1, 2)]).decay.clipped == 6


def test_decay_of_intrinsic_facts_is_of_the_same_facts_in_both_arms():
    """The edit loses every other fact: those count too, with the little that is left to lose."""
    samples = [row for i in range(20) for row in alone(f"{i}-r{i % 5}")]
    samples += [sample(f"x{i}-r{i % 5}", "base", "intrinsic", False) for i in range(5)]  # not known, and no fact of it
    samples += [sample(f"x{i}-r{i % 5}", "post_edit", "intrinsic", True, experiment=0) for i in range(5)]
    samples += [sample(f"x{i}-r{i % 5}", "post_finetune", "intrinsic", True, experiment=0) for i in range(5)]
    gone = {f"{i}-r{i % 5}" for i in range(0, 20, 2)}
    low = {"hit": False, "logprob": math.log(0.01)}
    samples = [
        row.model_copy(update=low) if row.fact_id in gone and row.stage == "post_edit" else row for row in samples
    ]
    found = aggregate([Run(samples, [LEARNED])]).decay
    assert (found.intrinsic.n, found.control_intrinsic.n) == (20, 20)
    assert found.intrinsic.value == pytest.approx((logit(math.log(0.5)) - logit(math.log(0.01))) / 2)
    assert found.before["intrinsic"] == pytest.approx((0.5 + 0.01) / 2)


def test_by_confidence_both_arms_hold_the_facts_of_the_headline():
    """A fact whose edit did not take is in neither arm, and each arm is binned by its own probability."""
    samples = [row for i in range(6) for row in edited(f"{i}-r{i}", took=i < 5, kept=i < 4)]
    samples += [row for i in range(6, 8) for row in edited(f"{i}-r{i}", known=False)]
    bins = aggregate([Run(samples, [LEARNED])]).confidence
    assert [(own.low, own.edited.hits, own.edited.total) for own in bins if own.edited.total] == [(0.8, 4, 5)]
    assert [(own.low, own.control.hits, own.control.total) for own in bins if own.control.total] == [(0.4, 5, 5)]


@pytest.mark.parametrize(
    ("kind", "value", "ci95", "says"),
    [
        (Estimate, 0.0512, (-0.1, 0.2), "+5 points (95 % interval -10 to +20)"),
        (Estimate, -0.001, None, "+0 points, with no interval"),
        (Estimate, None, None, "none: a side has no fact"),
        (Change, -2.671, (-3.0, -0.001), "-2.67 nats (95 % interval -3.00 to +0.00)"),
        (Change, -2.671, None, "-2.67 nats, with no interval"),
    ],
)
def test_an_estimate_says_its_unit_and_whether_it_has_an_interval(kind, value, ci95, says):
    assert str(kind(value=value, ci95=ci95, n=3, clusters=1, df=None, detectable=None)) == says


def test_changes_of_log_odds_are_in_nats():
    samples = [row for i in range(20) for row in edited(f"{i}-r{i % 5}", after=0.2 + 0.01 * i)]
    samples += [row for i in range(20) for row in alone(f"{100 + i}-s{i % 5}")]
    found = aggregate([Run(samples, [LEARNED])])
    assert " nats" in str(found.decay.paired)
    assert all(" nats" in str(getattr(found.decay, name)) for name in ("edited", "control", "intrinsic"))
    assert " points" in str(found.paired.difference)
    alike = aggregate([Run(edited("1-a") + edited("2-a"), [LEARNED])]).decay.paired
    assert str(alike).endswith("nats, with no interval")  # one relation


def test_log_odds_are_clipped_and_counted():
    assert logit(math.log(0.5)) == pytest.approx(0)
    assert logit(math.log(0.9)) == pytest.approx(math.log(9))
    assert logit(-math.inf) == pytest.approx(math.log(LEAST_PROBABILITY), abs=1e-6)
    assert logit(0.0) == pytest.approx(-math.log(1 - LARGEST_PROBABILITY), rel=1e-6)
    assert [is_clipped(value) for value in (-math.inf, 0.0, -0.1)] == [True, True, False]
    for wrong in (0.1, math.nan):
        with pytest.raises(ValueError, match="at most 0"):
            logit(wrong)
