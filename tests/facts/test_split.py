import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.atlas.world import told_facts
from retention_bench.errors import RetentionBenchError
from retention_bench.facts import Fact, FactSet, disjoint_split

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


def test_seeds_draw_different_facts():
    first, second = (disjoint_split(WORLD, edited=50, intrinsic=100, seed=s) for s in (0, 1))
    assert first.sha256 != second.sha256


def fact(number, relation, obj="o"):
    return Fact(str(number), f"s{number}", relation, "{} is", obj, target_new="n")


def test_one_relation_is_too_few():
    with pytest.raises(RetentionBenchError, match=r"at least 2 relations, and 5 facts in 1 relations"):
        disjoint_split(FactSet.of(fact(i, "r") for i in range(5)), edited=1, intrinsic=1, seed=0)


def test_a_shared_object_leaves_too_few_and_says_how_many():
    pool = FactSet.of(fact(i, f"r{i % 2}") for i in range(10))
    with pytest.raises(RetentionBenchError, match="the fullest of .* had 3 and 0"):
        disjoint_split(pool, edited=3, intrinsic=3, seed=0)
