"""Several sides asked the same facts: what each lost and gained against another, kind by kind."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retention_bench.analysis.clusters import Answer
from retention_bench.analysis.estimates import Estimate, mean
from retention_bench.analysis.paired import holm, sign_flips
from retention_bench.analysis.ranks import Rank, rank_intervals
from retention_bench.errors import UsageError

Row = Mapping[str, Any]
Question = tuple[str, str, str]  # fact id, prompt, target
Answers = dict[Question, list[bool]]  # a list, as several edited models are asked the same


@dataclass(frozen=True)
class Comparison:
    """One kind of question, put to two sides.

    A fact that was asked in several ways, or of several edited models, counts once: as lost where the second side has
    fewer of its answers right, as gained where it has more.

    Attributes:
        first: Name of the first side.
        second: Name of the second.
        kind: The kind of question.
        questions: How many both were asked.
        only_first: How many the second was not asked; they are left out.
        only_second: How many the first was not asked.
        rates: The shares of the questions that each side answers.
        lost: Ids of the facts that the second side answers less often.
        gained: Ids of those that it answers more often.
        kept: Ids of those that both answer, equally often.
        never: Ids of those that neither answers.
        difference: The second side's rate minus the first's, clustered by relation.
        p: Two-sided p of McNemar's exact test, by fact: it holds for these relations.
        p_holm: The same after Holm's correction for all comparisons that were made together.
        p_relations: As `p`, with relations in the place of facts: it holds for relations like these.
        p_relations_holm: The same after Holm's correction.
    """

    first: str
    second: str
    kind: str
    questions: int
    only_first: int
    only_second: int
    rates: tuple[float, float]
    lost: tuple[str, ...]
    gained: tuple[str, ...]
    kept: tuple[str, ...]
    never: tuple[str, ...]
    difference: Estimate
    p: float
    p_holm: float
    p_relations: float
    p_relations_holm: float

    @property
    def facts(self) -> int:
        """How many facts both sides were asked."""
        return sum(map(len, (self.lost, self.gained, self.kept, self.never)))

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("rates", "lost", "gained", "kept", "never")}
        return vars(self) | lists | {"facts": self.facts, "difference": self.difference.to_json()}


def compare(sides: Mapping[str, Sequence[Row]], kinds: Collection[str]) -> list[Comparison]:
    """Compare every two sides, fact by fact, on the questions that both were asked.

    Args:
        sides: By name, the samples; of one stage each. Those of older files lack the relation: a fact is then taken
            for one of its own.
        kinds: The kinds of question to compare.

    Returns:
        A comparison for every pair, in the order of `sides`, and kind of which they share a question.

    Raises:
        UsageError: Two sides share no question.
    """
    asked = {name: _by_kind(rows) for name, rows in sides.items()}
    relations = _relations(row for rows in sides.values() for row in rows)
    found: list[Comparison] = []
    for first, second in itertools.combinations(asked, 2):
        pairs = [
            _pair(first, second, kind, asked[first][kind], asked[second][kind], relations)
            for kind in kinds
            if asked[first][kind].keys() & asked[second][kind].keys()
        ]
        if not pairs:
            raise UsageError(
                f"{first} and {second} share no question: no prompt of a fact was put to both with the same target "
                f"(kinds looked at: {', '.join(kinds)}). Compare what was scored on the same facts, as runs of one "
                "suite with the same seed are."
            )
        found += pairs
    adjusted = zip(holm([c.p for c in found]), holm([c.p_relations for c in found]), strict=True)
    return [
        replace(c, p_holm=p, p_relations_holm=by_relation) for c, (p, by_relation) in zip(found, adjusted, strict=True)
    ]


def rank(
    sides: Mapping[str, Sequence[Row]], kinds: Collection[str], gated: Collection[str] = ()
) -> dict[str, dict[str, Rank]]:
    """Rank all sides by the questions that every one of them was asked.

    A rate alone does not say what survived: the headline's ranks are `rank_intervals` of every entry's paired
    differences.

    Args:
        sides: As for `compare`.
        kinds: As for `compare`.
        gated: The sides that get no rank.

    Returns:
        By kind and side, its rank; only kinds of which all sides share a question.
    """
    ranked = {name: rows for name, rows in sides.items() if name not in gated}
    if not ranked:
        return {}
    asked = [_by_kind(rows) for rows in ranked.values()]
    relations = _relations(row for rows in ranked.values() for row in rows)
    ranks = {}
    for kind in kinds:
        shared = set.intersection(*(set(own[kind]) for own in asked))
        if shared:
            entries = {
                name: [Answer(relations[q[0]], _share(own[kind][q]), q[0]) for q in sorted(shared)]
                for name, own in zip(ranked, asked, strict=True)
            }
            ranks[kind] = rank_intervals(entries)
    return ranks


def about_fact(fact: str, rows: Sequence[Row], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """All answers to one fact's questions.

    Args:
        fact: Its id.
        rows: Samples, of any stages.
        kinds: All kinds of question, in the order in which they are given out.

    Returns:
        Its questions, by kind, as `{kind, prompt, target, answers}`; an answer is what the sample has besides.
    """
    of_question = ("kind", "prompt", "target")
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["fact_id"] == fact:
            answer = {name: value for name, value in row.items() if name not in (*of_question, "fact_id")}
            grouped[tuple(row[name] for name in of_question)].append(answer)
    ordered = sorted(grouped.items(), key=lambda item: kinds.index(item[0][0]))
    return [dict(zip(of_question, question, strict=True)) | {"answers": answers} for question, answers in ordered]


def _relations(rows: Iterable[Row]) -> dict[str, str]:
    """The relation of every fact; the fact itself where a row has none."""
    found: dict[str, str] = {}
    for row in rows:
        fact = str(row["fact_id"])
        found[fact] = str(row.get("relation") or found.get(fact, fact))
    return found


def _by_kind(rows: Sequence[Row]) -> dict[str, Answers]:
    asked: dict[str, Answers] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        asked[row["kind"]][row["fact_id"], row["prompt"], row["target"]].append(bool(row["hit"]))
    return asked


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _pair(first: str, second: str, kind: str, one: Answers, other: Answers, relations: Mapping[str, str]) -> Comparison:
    shared = [question for question in one if question in other]
    # Changes in whole units, so that equal ones are equal: a unit is one answer where both sides were asked once.
    unit = math.lcm(*{len(answers[question]) for question in shared for answers in (one, other)})
    changes: dict[str, list[int]] = defaultdict(list)
    answered: dict[str, bool] = defaultdict(bool)
    for question in shared:
        before, after = (sum(a[question]) * unit // len(a[question]) for a in (one, other))
        changes[question[0]].append(after - before)
        answered[question[0]] |= after + before > 0
    sums = {fact: sum(own) for fact, own in changes.items()}
    by_relation: dict[str, int] = defaultdict(int)
    for fact, change in sums.items():
        by_relation[relations[fact]] += change
    lost = tuple(fact for fact, change in sums.items() if change < 0)
    gained = tuple(fact for fact, change in sums.items() if change > 0)
    return Comparison(
        first=first,
        second=second,
        kind=kind,
        questions=len(shared),
        only_first=len(one) - len(shared),
        only_second=len(other) - len(shared),
        rates=(_mean(one, shared), _mean(other, shared)),
        lost=lost,
        gained=gained,
        kept=tuple(fact for fact, change in sums.items() if not change and answered[fact]),
        never=tuple(fact for fact in sums if not answered[fact]),
        difference=mean(Answer(relations[f], change / unit, f) for f, own in changes.items() for change in own),
        p=(p := sign_flips(list(sums.values()))),
        p_holm=p,
        p_relations=(p_relations := sign_flips(list(by_relation.values()))),
        p_relations_holm=p_relations,
    )


def _mean(answers: Answers, shared: Sequence[Question]) -> float:
    return sum(_share(answers[question]) for question in shared) / len(shared)
