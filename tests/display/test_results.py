"""What is printed of a cell's results: every figure with what it is of."""

import pytest

from retention_bench.display.measures import print_headline, print_rest
from retention_bench.display.streams import screen
from retention_bench.display.trajectory import trajectory_table

RATE = {"hits": 3, "total": 4, "rate": 0.75, "ci95": [0.3, 0.95]}
NONE = {"hits": 0, "total": 0, "rate": None, "ci95": None}
DIFFERENCE = {"value": 0.05, "ci95": [-0.1, 0.1], "n": 30, "clusters": 6, "detectable": 0.12}
NATS = {"value": -0.8, "ci95": [-1.3, -0.5]}
DECAY = {"paired": NATS, "edited": NATS, "control": NATS, "clipped": 0, "no_number": 0}
DECAY["before"] = {"edited": 0.95, "control": 0.4}
HEADLINE = {"paired": {"difference": DIFFERENCE, "control": RATE, "edited": RATE | {"hits": 112, "total": 150}}}
HEADLINE |= {"paired_step_matched": None, "decay": DECAY}
REST = {"gap": {name: {"value": None} for name in ("unmatched", "matched")}, "lost": {}, "collateral": {}}


@pytest.fixture
def printed(capsys, monkeypatch):
    """What a function prints, its white space as single spaces."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(function, *given):
        function(*given)
        return " ".join(capsys.readouterr().out.split())

    return call


def test_answers_of_seeds_are_no_facts(printed):
    one, several = printed(print_headline, HEADLINE), printed(print_headline, HEADLINE | {"runs": [{}] * 5})
    assert "Of 30 facts in 6 relations that" in one
    assert "the edited model the new one for 112 (75 %, 30-95)" in one
    assert "Of 150 answers of 5 seeds about 30 facts in 6 relations that" in several
    assert "for 75 % (30-95), the edited model the new one for 75 % (30-95)." in several


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({}, ()),
        ({"clipped": 3}, ("3 of these facts have a probability so near 0 or 1 that it is clipped.",)),
        ({"no_number": 2}, ("2 of these facts have no log-odds: a model that diverged gives no number.",)),
        ({"no_number": 2, "paired": {"value": None}}, ("2 of these facts have no log-odds",)),  # none is left
    ],
)
def test_what_decay_clips_and_leaves_out_is_said(printed, counts, says):
    found = printed(print_headline, HEADLINE | {"decay": DECAY | counts})
    assert all(text in found for text in says)
    assert ("clipped" in found, "no log-odds" in found) == ("clipped" in counts, "no_number" in counts)


def test_by_confidence_each_arm_has_its_own_number(printed):
    bins = [
        {"low": 0.2, "high": 0.4, "edited": NONE, "control": RATE},
        {"low": 0.95, "high": 1.0, "edited": RATE | {"total": 9}, "control": RATE},
        {"low": 0.0, "high": 0.2, "edited": NONE, "control": NONE},
    ]
    found = printed(print_rest, REST | {"confidence": bins})
    assert "the same facts" not in found
    assert "0.2-0.4: no new objects, 75 % (30-95) of 4 true objects; 0.95-1: 75 % (30-95) of 9 new objects" in found
    assert "0-0.2" not in found


SEEN = {"rate": 1.0, "edited": 0.5, "true": 0.25, "related": 0.125, "other": 0.125}


@pytest.mark.parametrize(
    ("kinds", "label", "row"),
    [
        (("intrinsic",), "intrinsic right", "100 % 0.25"),
        (("intrinsic_matched",), "matched right", "100 % 0.25"),
        (("intrinsic", "intrinsic_matched"), "intrinsic right", "100 % 0.25"),
        ((), "intrinsic right", "- -"),
    ],
)
def test_a_trajectory_shows_the_facts_that_are_there(printed, kinds, label, row):
    steps = [{"step": 12, "models": 2, "edited": SEEN, **dict.fromkeys(kinds, SEEN)}]
    found = printed(lambda: screen().print(trajectory_table(steps)))
    assert "12 2 100 % 0.50 0.25 0.12 0.12 " + row in found
    assert label.split()[0] in found
    assert ("matched" in found) == (label == "matched right")
