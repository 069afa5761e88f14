"""The split (protocol, "Facts"): edited facts, and facts left alone that have no name in common with them.

Two splits. `relations` is the paper's: edited and intrinsic facts share no relation either, and `intrinsic_matched`
facts are reserved beside them, of the edited facts' relations. `subjects` keeps to the relations: all facts
left alone have relations that edited facts have too, so all are matched and none is intrinsic as the paper means it.

A name that edited facts use, be it as subject, true or new object, is used by no fact left alone, in whatever role:
stricter than subject against subject and object against object, since a model's "Spain" is one thing in both roles.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from retention_bench.errors import RetentionBenchError
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.known import Remaining

Split = Literal["relations", "subjects"]

TRIES = 200
"""Draws that are tried before the split is refused, or is taken with fewer matched facts than are wanted."""


def disjoint_split(
    facts: FactSet,
    *,
    edited: int,
    intrinsic: int,
    seed: int,
    intrinsic_matched: int = 0,
    split: Split = "relations",
    remaining: Remaining | None = None,
) -> FactSet:
    """Sample edited facts and facts to leave alone that share no name with them.

    In `relations` whole relations are dealt to the two sides at random, in proportion to the facts each side needs, the
    matched ones on the edited facts' side. Each kind is then drawn from its relations in turn, so that it has as many
    relations as the pool allows with about as many facts each: an interval is as wide as few relations make it.

    Objects are few in many relations, and an edited fact takes two from the matched ones. So an edited fact is passed
    over at first where it would leave its relation fewer matched facts than its share of them, or than half of it.

    Args:
        facts: Known facts, each with a `target_new`.
        edited: How many facts to edit.
        intrinsic: How many facts to leave alone: of other relations, or, in `subjects`, all matched.
        seed: Seed of the sample.
        intrinsic_matched: How many more to leave alone in `relations`, of the edited facts' relations; as many as
            there are where the pool has too few.
        split: Whether whole relations go to a side, or the facts of each relation are divided.
        remaining: What the known-fact filter left of how much, for the errors.

    Returns:
        The edited facts, in the order they were drawn, then the intrinsic and the matched ones with their `target_new`
        taken away.

    Raises:
        RetentionBenchError: Too few relations or facts remain; it says what was read, dropped and known, and what to
            change.
    """
    pool = [_Candidate.of(f) for f in facts if f.target_new is not None]
    relations = sorted({c.fact.relation for c in pool})
    counts = f"{len(pool)} facts in {len(relations)} relation{'s' * (len(relations) != 1)}"
    without = len(facts) - len(pool)
    if without:
        counts += f" ({without} more have no target_new and are of no use here)"
    wanted = f"{edited} edited and {intrinsic} {'intrinsic' if split == 'relations' else 'matched'} facts"
    if split == "relations" and len(relations) < 2:
        raise _refused(
            f"The split by relations needs at least 2 relations, and {counts} are left.", remaining, "relations", split
        )
    if len(pool) < edited + intrinsic:
        raise _refused(f"{wanted} are wanted, and {counts} are left.", remaining, "facts", split)
    rng = random.Random(seed)
    best, fullest = None, (0, 0)
    for _ in range(TRIES):
        if split == "relations":
            drawn = _by_relations(pool, relations, edited, intrinsic, intrinsic_matched, rng)
        else:
            first, left_alone = _draw_matched(pool, edited, intrinsic, rng)
            drawn = _Drawn(first, [], left_alone)
        found = (len(drawn.edited), len(drawn.intrinsic if split == "relations" else drawn.matched))
        fullest = max(fullest, found, key=sum)
        if found == (edited, intrinsic) and (best is None or len(drawn.matched) > len(best.matched)):
            best = drawn
            if split == "subjects" or len(drawn.matched) == intrinsic_matched:
                break
    if best is None:
        apart = "a name or relation" if split == "relations" else "a name"
        raise _refused(
            f"No split of {counts} into {wanted} without {apart} in common was found; the fullest of {TRIES} "
            f"had {fullest[0]} and {fullest[1]}.",
            remaining,
            "relations and objects",
            split,
        )
    return FactSet.of(
        [
            *(c.fact for c in best.edited),
            *(dataclasses.replace(c.fact, target_new=None) for c in best.intrinsic),
            *(dataclasses.replace(c.fact, target_new=None, matched=True) for c in best.matched),
        ]
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

    @property
    def about(self) -> tuple[str, str]:
        return self.names[0], self.fact.relation


class _Drawn(NamedTuple):
    edited: list[_Candidate]
    intrinsic: list[_Candidate]
    matched: list[_Candidate]


def _by_relations(
    pool: Sequence[_Candidate],
    relations: Sequence[str],
    edited: int,
    intrinsic: int,
    matched: int,
    rng: random.Random,
) -> _Drawn:
    """Deal the relations to the two sides, and draw from each."""
    first = edited + matched
    share = min(len(relations) - 1, max(1, round(len(relations) * first / (first + intrinsic))))
    dealt = frozenset(rng.sample(relations, len(relations))[:share])
    ours, beside = _draw_matched([c for c in pool if c.fact.relation in dealt], edited, matched, rng)
    others = _draw([c for c in pool if c.fact.relation not in dealt], intrinsic, _names(ours), rng)
    return _Drawn(ours, others, beside)


def _draw_matched(
    pool: Sequence[_Candidate], edited: int, matched: int, rng: random.Random
) -> tuple[list[_Candidate], list[_Candidate]]:
    """Up to so many facts to edit and to leave alone, of the same relations, without a name in common."""
    by_relation: dict[str, list[_Candidate]] = defaultdict(list)
    for candidate in pool:
        by_relation[candidate.fact.relation].append(candidate)
    reserve = _level({r: len({c.about for c in own}) // 2 for r, own in by_relation.items()}, matched)
    taken: set[str] = set()
    seen: set[tuple[str, str]] = set()

    def take(candidate: _Candidate, *, reserving: bool) -> bool:
        if candidate.about in seen:
            return False
        after = taken.union(candidate.names, (candidate.new,))
        if reserving:
            relation = candidate.fact.relation
            left = {c.about for c in by_relation[relation] if after.isdisjoint(c.names)}
            if len(left) < reserve[relation]:
                return False
        taken.update(after)
        seen.add(candidate.about)
        return True

    drawn = _in_turn(pool, edited, lambda c: take(c, reserving=True), rng)
    # What is still missing is edited all the same: matched facts are wanted, edited ones needed.
    drawn += _in_turn(pool, edited - len(drawn), lambda c: take(c, reserving=False), rng)
    chosen = {c.fact.relation for c in drawn}
    return drawn, _draw([c for c in pool if c.fact.relation in chosen], matched, taken, rng)


def _draw(pool: Sequence[_Candidate], count: int, taken: Iterable[str], rng: random.Random) -> list[_Candidate]:
    """Up to `count` facts to leave alone that use no name in `taken`; no (subject, relation) twice."""
    taken, seen = frozenset(taken), set()

    def take(candidate: _Candidate) -> bool:
        if candidate.about in seen or not taken.isdisjoint(candidate.names):
            return False
        seen.add(candidate.about)
        return True

    return _in_turn(pool, count, take, rng)


def _in_turn(
    pool: Sequence[_Candidate], count: int, take: Callable[[_Candidate], bool], rng: random.Random
) -> list[_Candidate]:
    """Up to `count` facts of a pool that `take` accepts: one of each relation in turn, in an order drawn at random."""
    waiting: dict[str, list[_Candidate]] = defaultdict(list)
    for candidate in rng.sample(pool, len(pool)):
        waiting[candidate.fact.relation].append(candidate)
    drawn: list[_Candidate] = []
    while waiting and len(drawn) < count:
        for relation in list(waiting)[: count - len(drawn)]:
            chosen = next(filter(take, _popped(waiting[relation])), None)
            if chosen is None:
                del waiting[relation]
            else:
                drawn.append(chosen)
    return drawn


def _popped(queue: list[_Candidate]) -> Iterator[_Candidate]:
    while queue:
        yield queue.pop()


def _level(most: Mapping[str, int], total: int) -> dict[str, int]:
    """Shares of a total that are as even as what each can give at most allows."""
    shares: Counter[str] = Counter()
    missing = min(total, sum(most.values()))
    while missing:
        for name in sorted(most, key=lambda name: most[name]):
            if missing and shares[name] < most[name]:
                shares[name] += 1
                missing -= 1
    return {name: shares[name] for name in most}


def _names(drawn: Iterable[_Candidate]) -> frozenset[str]:
    return frozenset(name for c in drawn for name in (*c.names, c.new))


def _refused(what: str, remaining: Remaining | None, short_of: str, split: Split) -> RetentionBenchError:
    """The error that says what is missing, how it came to that, and what to change."""
    history, margin = "", ""
    if remaining is not None:
        history = f" {remaining}"
        if remaining.leading > remaining.known:
            margin = f" a smaller margin than {remaining.margin:g},"
    within = ""
    if split == "relations" and short_of != "facts":
        within = " Or set facts.split to subjects: it divides the facts of each relation, and few will do."
    return RetentionBenchError(
        f"{what}{history} Give{margin} a source with more {short_of}, or a model that knows more of them; or ask for "
        f"fewer facts.{within}"
    )
