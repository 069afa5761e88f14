"""The plain-text curve."""

import pytest

from retention_bench.display.curve import curve, half_life


def arm(survival, facts=20, dose=None):
    life = {"dose": dose, "low": 100.0, "high": None, "between": dose and [0, 500]}
    return {"doses": [0, 500, 1000], "survival": survival, "facts": facts, "relations": 5, "half_life": life}


SURVIVAL = {
    "dose": "tokens",
    "curves": {"edited": arm([1, 0.5, 0.2], dose=500), "control": arm([1, 0.9, 0.8]), "intrinsic": arm([1, 1, 1])},
}


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", "●○·"), ("ascii", "Ec."), ("latin-1", "Ec.")])
def test_it_fits_the_stream_and_tells_the_arms_apart_without_colour(encoding, marks):
    text = curve(SURVIVAL, encoding=encoding)
    text.encode(encoding)
    assert "\x1b" not in text
    lines = text.split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("100 %")
    assert all(mark in "".join(lines[:12]) for mark in marks)
    assert "1,000" in text
    assert "fine-tune tokens" in text


def test_a_curve_falls_where_facts_are_lost():
    lines = curve(SURVIVAL, encoding="utf-8").split("\n")[:12]
    edited = [[row for row, line in enumerate(lines) if line[7 + column : 8 + column] == "●"] for column in (0, 30, 59)]
    assert edited == [[0], [6], [9]]


def test_half_lives_are_said():
    text = curve(SURVIVAL, encoding="utf-8")
    assert "edited (20 facts of 5 relations)\n         half-life 500 tokens (95 % interval 100 to open)" in text
    assert "half-life not reached, above 100 tokens" in text
    nothing = {"dose": None, "low": None, "high": None, "between": None}
    assert half_life(nothing, "tokens") == "half-life not reached"
    known = nothing | {"low": 0.0, "high": 1000.0, "between": [0, 1000]}
    assert half_life(known, "tokens") == "half-life before 1,000 tokens (95 % interval 0 to 1,000)"
    later = nothing | {"between": [500, 1000]}
    assert half_life(later, "tokens") == "half-life after 500 and before 1,000 tokens"


def test_matched_facts_are_drawn_where_there_are_no_intrinsic_ones():
    curves = {"edited": arm([1, 0.5, 0.2]), "intrinsic_matched": arm([1, 0.7, 0.6], facts=31)}
    text = curve(SURVIVAL | {"curves": curves}, encoding="utf-8")
    assert "· intrinsic, matched (31 facts" in text
    assert "·" in "".join(text.split("\n")[:12])
    both = curve(SURVIVAL | {"curves": SURVIVAL["curves"] | curves}, encoding="utf-8")
    assert "matched" not in both


def test_without_a_second_look_there_is_no_curve():
    assert "no survival" in curve({"dose": "tokens", "curves": {}})
