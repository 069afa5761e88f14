import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import Fact, FactSet, Remaining, RowCounts, disjoint_split, read_pool
from tools.atlas.world import told_facts

WORLD = told_facts()


def used(facts):
    return {
        "subject": {f.subject.casefold() for f in facts},
        "relation": {f.relation for f in facts},
        "object": {o.casefold() for f in facts for o in (f.target_true, f.target_new) if o},
    }


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_the_sides_share_nothing_whatever_the_seed(seed):
    split = disjoint_split(WORLD, edited=50, intrinsic=100, seed=seed)
    edited, intrinsic = split.edited, split.intrinsic
    assert (len(edited), len(intrinsic)) == (50, 100)
    left, right = used(edited), used(intrinsic)
    for part in left:
        assert not left[part] & right[part]
    assert not left["subject"] & right["object"]
    assert not left["object"] & right["subject"]
    assert split == disjoint_split(WORLD, edited=50, intrinsic=100, seed=seed)


def check_disjoint(split):
    left, right = used(split.edited), used(split.intrinsic)
    assert not left["relation"] & right["relation"]
    assert not (left["subject"] | left["object"]) & (right["subject"] | right["object"])


@st.composite
def wanted_and_pools(draw):
    """How many to edit and to leave alone, and a pool that has a split of it whatever relations are dealt to a side.

    Half of the names are shared freely, in another case and as subject or object. Each relation also has facts with
    names of their own, more than the other side's names can take away.
    """
    edited, intrinsic = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    relations = [f"r{i}" for i in range(draw(st.integers(2, 5)))]
    names = st.sampled_from(["Oslo", "oslo", "Rome", "ROME", "Ann", "ann"] + [f"s{r}.0" for r in relations])
    shared = draw(st.lists(st.tuples(names, st.sampled_from(relations), names, names), max_size=20))
    own = [
        (f"s{r}.{i}", r, f"o{r}.{i}", draw(st.sampled_from([f"n{r}", f"o{relations[0]}.{i}"])))
        for r in relations
        for i in range(3 * edited + intrinsic)
    ]
    facts = draw(st.permutations([*shared, *own]))
    pool = FactSet.of(Fact(str(i), s, r, "{} is", o, target_new=n) for i, (s, r, o, n) in enumerate(facts))
    return edited, intrinsic, pool


@settings(deadline=None)
@given(wanted_and_pools(), st.lists(st.integers(0, 2**32), min_size=2, max_size=2))
def test_the_sides_share_nothing_on_any_pool(case, seeds):
    edited, intrinsic, pool = case
    for seed in seeds:
        split = disjoint_split(pool, edited=edited, intrinsic=intrinsic, seed=seed)
        assert (len(split.edited), len(split.intrinsic)) == (edited, intrinsic)
        check_disjoint(split)
        given = {fact.id: fact for fact in pool}
        assert all(fact == given[fact.id] for fact in split.edited)
        assert len({(fact.subject.casefold(), fact.relation) for fact in split}) == len(split)


def test_the_real_facts_can_be_split_with_their_recovered_relations(real_data):
    pool = read_pool(str(real_data("counterfact_edit.json")))
    for seed in range(5):
        few = FactSet.of(random.Random(seed).sample(pool.facts, 300))  # of 10,000 a small model may know no more
        split = disjoint_split(few, edited=50, intrinsic=100, seed=seed)
        check_disjoint(split)


def test_seeds_draw_different_facts():
    first, second = (disjoint_split(WORLD, edited=50, intrinsic=100, seed=s) for s in (0, 1))
    assert first.sha256 != second.sha256


def fact(number, relation, obj="o"):
    return Fact(str(number), f"s{number}", relation, "{} is", obj, target_new="n")


def test_one_relation_is_too_few():
    with pytest.raises(
        RetentionBenchError,
        match=r"at least 2 .*, and 5 facts in 1 relation are left.*set facts\.split to",
    ):
        disjoint_split(FactSet.of(fact(i, "r") for i in range(5)), edited=1, intrinsic=1, seed=0)


def test_a_shared_object_leaves_too_few_and_says_how_many():
    pool = FactSet.of(fact(i, f"r{i % 2}") for i in range(10))
    with pytest.raises(RetentionBenchError, match="the fullest of .* had 3 and 0"):
        disjoint_split(pool, edited=3, intrinsic=3, seed=0)


def test_too_few_facts_say_what_became_of_the_others():
    rows = RowCounts("facts.json", "EasyEdit's", 9_000, {"nothing tells the relation": 20}, 7, 8_980)
    remaining = Remaining(rows, scorable=8_900, leading=400, known=10, margin=0.1)
    facts = [*(fact(i, f"r{i % 2}") for i in range(10)), Fact("x", "s", "r", "{} is", "o")]
    with pytest.raises(RetentionBenchError) as caught:
        disjoint_split(FactSet.of(facts), edited=5, intrinsic=10, seed=0, remaining=remaining)
    assert str(caught.value) == (
        "5 edited and 10 intrinsic facts are wanted, and 10 facts in 2 relations (1 more have no target_new and are of "
        "no use here) are left. facts.json (EasyEdit's format): 9,000 rows read, 20 dropped (20: nothing tells the "
        "relation), 7 relations recovered from the prompts. 8,900 facts have objects that the metric can tell; of 400 "
        "of them the model answers the true one, and 10 it knows with the margin of 0.1. Give a smaller margin than "
        "0.1, a source with more facts, or a model that knows more of them; or ask for fewer facts."
    )


def test_a_smaller_margin_is_advised_only_where_it_helps():
    rows = RowCounts("facts.json", "our own", 10, {}, 1, 0)
    remaining = Remaining(rows, scorable=10, leading=5, known=5, margin=0.1)
    with pytest.raises(
        RetentionBenchError, match="10 rows read, 0 dropped.*Give a source with more relations,"
    ) as caught:
        disjoint_split(FactSet.of(fact(i, "r") for i in range(5)), edited=1, intrinsic=1, seed=0, remaining=remaining)
    assert "smaller margin" not in str(caught.value)


SPLITS = st.sampled_from(["relations", "subjects"])


@settings(deadline=None)
@given(wanted_and_pools(), st.integers(0, 2**32), st.integers(0, 8), SPLITS)
def test_what_is_left_alone_shares_no_name_with_an_edited_fact(case, seed, matched, kind):
    edited, intrinsic, pool = case
    split = disjoint_split(pool, edited=edited, intrinsic=intrinsic, intrinsic_matched=matched, seed=seed, split=kind)
    assert split == disjoint_split(
        pool, edited=edited, intrinsic=intrinsic, intrinsic_matched=matched, seed=seed, split=kind
    )
    left = used(split.edited)
    for side in (split.intrinsic, split.intrinsic_matched):
        right = used(side)
        assert not (left["subject"] | left["object"]) & (right["subject"] | right["object"])
    assert not left["relation"] & used(split.intrinsic)["relation"]
    assert used(split.intrinsic_matched)["relation"] <= left["relation"]
    sizes = len(split.edited), len(split.intrinsic), len(split.intrinsic_matched)
    if kind == "subjects":
        assert sizes == (edited, 0, intrinsic)
    else:
        assert sizes[:2] == (edited, intrinsic)
        assert sizes[2] <= matched
    assert len({(fact.subject.casefold(), fact.relation) for fact in split}) == len(split)


@pytest.mark.parametrize("seed", range(3))
def test_matched_facts_are_reserved_though_objects_are_few(seed):
    """A country's facts have six continents for objects: edits at random would take all of them."""
    split = disjoint_split(WORLD, edited=50, intrinsic=100, intrinsic_matched=50, seed=seed)
    assert len(split.intrinsic_matched) == 50
    relations = {fact.relation for fact in split.edited}
    assert {fact.relation for fact in split.intrinsic_matched} == relations
    assert len(relations) >= 4


def test_edited_facts_are_spread_evenly_though_one_relation_has_most_of_the_pool():
    sizes = {"large": 300, "b": 20, "c": 20, "d": 20, "e": 2}
    facts = [
        Fact(f"{r}{i}", f"s{r}{i}", r, "{} is", f"o{r}{i}", target_new="n") for r, n in sizes.items() for i in range(n)
    ]
    split = disjoint_split(FactSet.of(facts), edited=22, intrinsic=44, seed=0, split="subjects")
    counts = Counter(f.relation for f in split.edited)
    assert counts.pop("e") == 1  # the other one is left for the matched facts
    assert sorted(counts.values()) == [5, 5, 5, 6]


def test_too_few_matched_facts_are_as_many_as_there_are():
    facts = [Fact(f"{i}", f"s{i}", f"r{i % 4}", "{} is", f"o{i % 8}", target_new=f"n{i % 8}") for i in range(80)]
    split = disjoint_split(FactSet.of(facts), edited=4, intrinsic=4, intrinsic_matched=1000, seed=0)
    assert (len(split.edited), len(split.intrinsic)) == (4, 4)
    assert 0 < len(split.intrinsic_matched) < 40


def test_one_relation_can_be_split_by_subjects():
    facts = FactSet.of(Fact(f"{i}", f"s{i}", "r", "{} is", f"o{i}", target_new=f"n{i}") for i in range(9))
    split = disjoint_split(facts, edited=3, intrinsic=6, seed=0, split="subjects")
    assert (len(split.edited), len(split.intrinsic_matched)) == (3, 6)
    assert all(fact.matched and fact.target_new is None for fact in split.intrinsic_matched)
