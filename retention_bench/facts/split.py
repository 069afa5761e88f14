"""The disjoint split (protocol, "Facts"): edited and intrinsic facts with nothing in common."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

from retention_bench.errors import RetentionBenchError
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.known import Remaining

TRIES = 200
"""Assignments of relations to the two sides that are tried before the split is refused."""


def disjoint_split(
    facts: FactSet, *, edited: int, intrinsic: int, seed: int, remaining: Remaining | None = None
) -> FactSet:
    """Sample edited and intrinsic facts that share no relation and no name.

    Relations are dealt to the two sides in proportion to the facts each side needs. A name that one side uses, be it as
    subject, true or counterfactual object, is not used by the other, in whatever role: stricter than subject against
    subject and object against object, since a model's "Spain" is one thing in both roles.

    Args:
        facts: Known facts, each with a `target_new`.
        edited: How many facts to edit.
        intrinsic: How many facts to leave alone.
        seed: Seed of the sample.
        remaining: What the known-fact filter left of how much, for the errors.

    Returns:
        The edited facts, in the order they were drawn, then the intrinsic ones with their `target_new` taken away.

    Raises:
        RetentionBenchError: Too few relations or facts remain; it says what was read, dropped and known, and what to
            change.
    """
    pool = [f for f in facts if f.target_new is not None]
    relations = sorted({f.relation for f in pool})
    counts = f"{len(pool)} facts in {len(relations)} relations"
    without = len(facts) - len(pool)
    if without:
        counts += f" ({without} more have no target_new and are of no use here)"
    wanted = f"{edited} edited and {intrinsic} intrinsic facts"
    if len(relations) < 2:
        raise _refused(f"The disjoint split needs at least 2 relations, and {counts} are left.", remaining, "relations")
    if len(pool) < edited + intrinsic:
        raise _refused(f"{wanted} are wanted, and {counts} are left.", remaining, "facts")
    rng = random.Random(seed)
    share = min(len(relations) - 1, max(1, round(len(relations) * edited / (edited + intrinsic))))
    candidates = [_Candidate.of(f) for f in pool]
    best = (0, 0)
    for _ in range(TRIES):
        dealt = frozenset(rng.sample(relations, len(relations))[:share])
        first = _draw([c for c in candidates if c.fact.relation in dealt], edited, frozenset(), rng)
        taken = frozenset(name for c in first for name in (*c.names, c.new))
        second = _draw([c for c in candidates if c.fact.relation not in dealt], intrinsic, taken, rng)
        if len(first) == edited and len(second) == intrinsic:
            left_alone = (dataclasses.replace(c.fact, target_new=None) for c in second)
            return FactSet.of([*(c.fact for c in first), *left_alone])
        best = max(best, (len(first), len(second)), key=sum)
    raise _refused(
        f"No split of {counts} into {wanted} without a name or relation in common was found; the fullest of {TRIES} "
        f"had {best[0]} and {best[1]}.",
        remaining,
        "relations and objects",
    )


class _Candidate(NamedTuple):
    """A fact with its names as they are compared: those in the way of either side, and the one of an edited fact."""

    fact: Fact
    names: tuple[str, str]
    new: str

    @classmethod
    def of(cls, fact: Fact) -> _Candidate:
        assert fact.target_new is not None
        return cls(fact, (fact.subject.casefold(), fact.target_true.casefold()), fact.target_new.casefold())


def _draw(pool: Sequence[_Candidate], count: int, taken: frozenset[str], rng: random.Random) -> list[_Candidate]:
    """Up to `count` facts of the pool, in random order, that use no name in `taken`; no (subject, relation) twice."""
    drawn: list[_Candidate] = []
    seen: set[tuple[str, str]] = set()
    for candidate in rng.sample(pool, len(pool)):
        if len(drawn) == count:
            break
        about = (candidate.names[0], candidate.fact.relation)
        if about not in seen and taken.isdisjoint(candidate.names):
            drawn.append(candidate)
            seen.add(about)
    return drawn


def _refused(what: str, remaining: Remaining | None, short_of: str) -> RetentionBenchError:
    """The error that says what is missing, how it came to that, and what to change."""
    history, margin = "", ""
    if remaining is not None:
        history = f" {remaining}"
        if remaining.leading > remaining.known:
            margin = f" a smaller margin than {remaining.margin:g},"
    return RetentionBenchError(
        f"{what}{history} Give{margin} a source with more {short_of}, or a model that knows more of them; or ask for "
        "fewer facts."
    )
