"""The disjoint split (protocol, "Facts"): edited and intrinsic facts with nothing in common."""

from __future__ import annotations

import dataclasses
import random

from retention_bench.errors import RetentionBenchError
from retention_bench.facts.fact import Fact, FactSet

TRIES = 200
"""Assignments of relations to the two sides that are tried before the split is refused."""


def disjoint_split(facts: FactSet, *, edited: int, intrinsic: int, seed: int) -> FactSet:
    """Sample edited and intrinsic facts that share no relation and no name.

    Relations are dealt to the two sides in proportion to the facts each side needs. A name that one side uses, be it as
    subject, true or counterfactual object, is not used by the other, in whatever role: stricter than subject against
    subject and object against object, since a model's "Spain" is one thing in both roles.

    Args:
        facts: Known facts, each with a `target_new`.
        edited: How many facts to edit.
        intrinsic: How many facts to leave alone.
        seed: Seed of the sample.

    Returns:
        The edited facts, in the order they were drawn, then the intrinsic ones with their `target_new` taken away.

    Raises:
        RetentionBenchError: Too few relations or facts remain.
    """
    pool = [f for f in facts if f.target_new is not None]
    relations = sorted({f.relation for f in pool})
    counts = f"{len(pool)} facts in {len(relations)} relations"
    if len(relations) < 2:
        raise RetentionBenchError(
            f"The disjoint split needs at least 2 relations, and {counts} are left after the known-fact filter. "
            "Give more facts, a smaller margin, or a model that knows more of them."
        )
    rng = random.Random(seed)
    share = min(len(relations) - 1, max(1, round(len(relations) * edited / (edited + intrinsic))))
    best = (0, 0)
    for _ in range(TRIES):
        dealt = rng.sample(relations, len(relations))
        first = _draw([f for f in pool if f.relation in dealt[:share]], edited, set(), rng)
        taken = {name for f in first for name in _names(f, f.target_new)}
        second = _draw([f for f in pool if f.relation in dealt[share:]], intrinsic, taken, rng)
        if len(first) == edited and len(second) == intrinsic:
            return FactSet.of([*first, *(dataclasses.replace(f, target_new=None) for f in second)])
        best = max(best, (len(first), len(second)), key=sum)
    raise RetentionBenchError(
        f"No split of {counts} into {edited} edited and {intrinsic} intrinsic facts without a name or relation in "
        f"common was found; the fullest of {TRIES} had {best[0]} and {best[1]}. Ask for fewer, or give more facts."
    )


def _names(fact: Fact, target_new: str | None) -> set[str]:
    names = {fact.subject.casefold(), fact.target_true.casefold()}
    return names | {target_new.casefold()} if target_new else names


def _draw(pool: list[Fact], count: int, taken: set[str], rng: random.Random) -> list[Fact]:
    """Up to `count` facts of the pool, in random order, that use no name in `taken`; no (subject, relation) twice."""
    drawn: list[Fact] = []
    seen: set[tuple[str, str]] = set()
    for fact in rng.sample(pool, len(pool)):
        about = (fact.subject.casefold(), fact.relation)
        if len(drawn) < count and about not in seen and not (_names(fact, None) & taken):
            drawn.append(fact)
            seen.add(about)
    return drawn
