"""The course of the fine-tunes, over which models."""

import random

import pytest

from retention_bench.results.trajectory import summarise


def rows(experiment, looks, hit=True, kinds=("edited", "intrinsic"), facts=2):
    """Rows of a model that was looked at at these steps; `hit` may depend on the step."""
    return [
        {
            "experiment": experiment,
            "step": step,
            "tokens": 100 * step,
            "epoch": step / 8,
            "fact_id": f"{kind}-{number}",
            "relation": f"r{number % 5}",
            "kind": kind,
            "hit": hit(step) if callable(hit) else hit,
            "true": 0.5,
            "edited": 0.25 if kind == "edited" else None,
            "related": 0.125,
            "other": 0.125,
        }
        for step in looks
        for kind in kinds
        for number in range(facts)
    ]


def test_a_look_is_averaged_over_its_models_and_facts():
    entries = summarise(rows(0, [0, 5]) + rows(1, [0, 5], hit=lambda step: step == 0) + rows(None, [0, 5], hit=False))
    assert [(e["step"], e["tokens"], e["epoch"], e["models"], e["changed"]) for e in entries] == [
        (0, 0, 0.0, 2, False),
        (5, 500, 0.625, 2, False),
    ]
    assert [(e["edited"]["hits"], e["edited"]["total"]) for e in entries] == [(4, 4), (2, 4)]
    assert entries[1]["intrinsic"] == entries[1]["edited"] | {"edited": None}
    assert [entries[0]["edited"][name] for name in ("true", "edited", "related", "other")] == [0.5, 0.25, 0.125, 0.125]


def test_where_models_stopped_is_marked():
    """The naive reading of the means, that edits come back after step 5, is what `changed` warns of."""
    entries = summarise(rows(0, [0, 5], hit=lambda step: step < 5) + rows(1, [0, 5, 10, 15]))
    assert [e["edited"]["rate"] for e in entries] == [1.0, 0.5, 1.0, 1.0]
    assert [e["models"] for e in entries] == [2, 2, 1, 1]
    assert [e["changed"] for e in entries] == [False, False, True, False]


def test_as_many_but_other_models_are_a_change():
    entries = summarise(rows(0, [0, 3]) + rows(1, [0, 5]))  # one diverged between two evaluations
    assert [(e["step"], e["models"], e["changed"]) for e in entries] == [(0, 2, False), (3, 1, True), (5, 1, True)]


def test_the_order_of_the_rows_does_not_matter():
    some = rows(0, [0, 5]) + rows(1, [0, 5, 10])
    shuffled = random.Random(0).sample(some, len(some))
    assert [{**e, "edited": 0, "intrinsic": 0} for e in summarise(shuffled)] == [
        {**e, "edited": 0, "intrinsic": 0} for e in summarise(some)
    ]


def test_kinds_that_were_asked_are_there_and_no_others():
    [entry] = summarise(rows(0, [0], kinds=("edited", "intrinsic", "intrinsic_matched")))
    assert set(entry) == {"step", "tokens", "epoch", "models", "changed", "edited", "intrinsic", "intrinsic_matched"}


def test_a_model_that_puts_out_no_number_has_no_probability():
    some = [row | dict.fromkeys(("true", "edited", "related", "other")) for row in rows(0, [0])]
    [entry] = summarise(some)
    assert entry["edited"]["true"] is None
    [entry] = summarise(some + rows(1, [0]))
    assert entry["edited"]["true"] == pytest.approx(0.5)
    assert summarise([]) == []


def test_rates_are_as_sure_as_there_are_relations_and_facts_and_not_models():
    def intrinsic(models):
        # of five relations one is lost; every model answers the same
        some = [row for m in range(models) for row in rows(m, [0], kinds=["intrinsic"], facts=20)]
        return summarise([row | {"hit": row["relation"] != "r0"} for row in some])[0]["intrinsic"]

    one, many = intrinsic(1), intrinsic(50)
    assert (many["hits"], many["total"], many["clustered_by"], many["clusters"]) == (800, 1000, "relation", 5)
    assert many["ci95"] == pytest.approx(one["ci95"], abs=0.01)
    assert many["ci95"][1] - many["ci95"][0] > 0.5
