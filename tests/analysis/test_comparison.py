"""What is lost, gained and kept between sides, from their samples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.analysis import about_fact, compare, mcnemar, rank
from retention_bench.errors import UsageError

KINDS = ("edited", "intrinsic", "paraphrase", "locality")


def row(fact: str, hit: bool, kind: str = "edited", prompt: str = "p", target: str = "t", **more) -> dict:
    return {"kind": kind, "fact_id": fact, "prompt": prompt, "target": target, "hit": hit} | more


def rows(hits: str, kind: str = "edited") -> list[dict]:
    """A fact for each letter, answered where it is x."""
    return [row(f"f{i}", letter == "x", kind) for i, letter in enumerate(hits)]


def test_facts_are_lost_gained_kept_or_never_answered() -> None:
    (found,) = compare({"a": rows("xxx..."), "b": rows("x.xx..")}, KINDS)
    assert (found.first, found.second, found.kind, found.facts, found.questions) == ("a", "b", "edited", 6, 6)
    assert (found.lost, found.gained, found.kept, found.never) == (("f1",), ("f3",), ("f0", "f2"), ("f4", "f5"))
    assert found.rates == (0.5, 0.5)
    assert found.difference.value == 0
    assert (found.p, found.p_holm, found.p_relations) == (1.0, 1.0, 1.0)


def test_relations_decide_how_sure_a_difference_is() -> None:
    # twelve facts lost: of twelve relations, or all of two
    def sides(relation) -> list:
        one = [row(f"f{i}", True, relation=relation(i)) for i in range(24)]
        return compare({"a": one, "b": [r | {"hit": i >= 12} for i, r in enumerate(one)]}, KINDS)

    (many,), (few,) = sides(lambda i: f"r{i}"), sides(lambda i: f"r{i // 6}")
    assert many.p == few.p == many.p_relations == mcnemar(12, 0)
    assert few.p_relations == mcnemar(2, 0) == 0.5
    assert few.p_relations_holm == 0.5
    assert (few.difference.clusters, many.difference.clusters) == (4, 24)
    assert few.difference.ci95[1] > 0 > many.difference.ci95[1]
    (old,) = compare({"a": rows("x" * 24), "b": rows("." * 12 + "x" * 12)}, KINDS)  # files without relations
    assert old.difference == many.difference


def test_every_pair_and_kind_is_compared_and_corrected_together() -> None:
    sides = {
        name: rows(edited) + rows(intrinsic, "intrinsic")
        for name, edited, intrinsic in [("a", "x" * 9, "xx"), ("b", "." * 9, "xx"), ("c", "x" * 9, "..")]
    }
    found = compare(sides, KINDS)
    assert [(c.first, c.second, c.kind) for c in found] == [
        (first, second, kind)
        for first, second in [("a", "b"), ("a", "c"), ("b", "c")]
        for kind in ("edited", "intrinsic")
    ]
    assert [c.p for c in found] == [mcnemar(9, 0), 1, 1, 0.5, mcnemar(0, 9), 0.5]
    assert [c.p_holm for c in found] == [6 * mcnemar(9, 0), 1, 1, 1, 6 * mcnemar(0, 9), 1]
    assert {c.kind for c in compare(sides, ["intrinsic"])} == {"intrinsic"}


def test_only_what_both_were_asked_is_compared() -> None:
    one = [*rows("xx"), row("f2", True, target="old"), row("f3", True)]
    (found,) = compare({"a": one, "b": [*rows("x."), row("f2", True, target="new")]}, KINDS)
    assert (found.facts, found.only_first, found.only_second, found.lost) == (2, 2, 1, ("f1",))


def test_sides_without_a_question_in_common_are_refused() -> None:
    with pytest.raises(UsageError, match="a and b share no question"):
        compare({"a": rows("xx"), "b": rows("xx", "intrinsic")}, KINDS)


def test_a_fact_with_several_questions_counts_once() -> None:
    def paraphrases(fact: str, hits: str) -> list[dict]:
        return [row(fact, letter == "x", "paraphrase", f"p{i}") for i, letter in enumerate(hits)]

    one = [*paraphrases("f", "xxxx"), *paraphrases("g", "x..."), *paraphrases("h", "x.x.")]
    other = [*paraphrases("f", "...."), *paraphrases("g", "xx.."), *paraphrases("h", ".x.x")]
    (found,) = compare({"a": one, "b": other}, KINDS)
    assert (found.questions, found.facts) == (12, 3)
    assert (found.lost, found.gained, found.kept) == (("f",), ("g",), ("h",))
    assert found.difference.value == pytest.approx(-3 / 12)
    assert found.p == 1.0  # 4 one way, 1 the other: of the four pairs of signs all come at least as far


def test_a_fact_asked_of_several_models_counts_by_its_share() -> None:
    one = [row("f", model < 3, "intrinsic", experiment=model) for model in range(4)]
    (found,) = compare({"a": one, "b": [row("f", True, "intrinsic", experiment=None)]}, KINDS)
    assert found.rates == (0.75, 1.0)
    assert found.gained == ("f",)
    assert found.difference.value == pytest.approx(0.25)


samples = st.lists(
    st.tuples(
        st.sampled_from("abcde"),
        st.sampled_from(["edited", "paraphrase"]),
        st.sampled_from("pq"),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(samples)
def test_every_shared_fact_is_in_one_list_and_sides_can_be_turned(answers: list) -> None:
    one = [row(fact, hit, kind, prompt) for fact, kind, prompt, hit, _ in answers]
    other = [row(fact, hit, kind, prompt) for fact, kind, prompt, _, hit in answers]
    for found, turned in zip(
        compare({"a": one, "b": other}, KINDS), compare({"b": other, "a": one}, KINDS), strict=True
    ):
        listed = [*found.kept, *found.lost, *found.gained, *found.never]
        assert sorted(listed) == sorted({fact for fact, kind, *_ in answers if kind == found.kind})
        assert (found.lost, found.gained, found.p) == (turned.gained, turned.lost, turned.p)
        assert found.difference.value == pytest.approx(found.rates[1] - found.rates[0])
        assert found.p <= found.p_holm <= 1


def test_ranks_take_the_questions_that_all_were_asked() -> None:
    sides = {"a": [*rows("x..."), row("extra", True)], "b": rows("xxxx"), "c": [*rows("xx.."), *rows("x", "locality")]}
    found = rank(sides, KINDS)
    assert {name: r.rank for name, r in found["edited"].items()} == {"a": 3, "b": 1, "c": 2}
    assert set(found) == {"edited"}


def test_a_gated_side_is_not_ranked() -> None:
    sides = {"a": rows("xxx."), "b": rows("xxxx"), "c": rows("xx..")}
    found = rank(sides, KINDS, gated=["b"])
    assert {name: r.rank for name, r in found["edited"].items()} == {"a": 1, "c": 2}
    assert rank(sides, KINDS, gated=sides) == {}


def test_ranks_go_by_relation() -> None:
    def side(hits: str) -> list[dict]:
        return [r | {"relation": f"r{i // 6}"} for i, r in enumerate(rows(hits))]

    sides = {"a": "x" * 24, "b": "." * 6 + "x" * 18}
    by_relation = rank({name: side(hits) for name, hits in sides.items()}, KINDS)["edited"]
    by_fact = rank({name: rows(hits) for name, hits in sides.items()}, KINDS)["edited"]
    assert (by_relation["b"].ci95, by_fact["b"].ci95) == ((1, 2), (2, 2))


def test_all_answers_to_a_facts_questions_are_found() -> None:
    found = about_fact(
        "f",
        [
            row("f", False, "locality", "n", stage="base"),
            row("f", True, stage="base"),
            row("f", False, stage="post_edit"),
            row("g", True, stage="base"),
        ],
        KINDS,
    )
    assert found == [
        {
            "kind": "edited",
            "prompt": "p",
            "target": "t",
            "answers": [{"hit": True, "stage": "base"}, {"hit": False, "stage": "post_edit"}],
        },
        {"kind": "locality", "prompt": "n", "target": "t", "answers": [{"hit": False, "stage": "base"}]},
    ]
