"""Several sides asked the same facts: what each lost and gained against another, kind by kind."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retention_bench.analysis.paired import Difference, difference, holm, mcnemar_by_fact
from retention_bench.analysis.power import detectable_paired
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
        difference: The second side's rate minus the first's.
        p: Two-sided p of McNemar's exact test, by fact.
        p_holm: The same after Holm's correction for all comparisons that were made together.
        detectable: The smallest difference that so many facts would show in 8 of 10 repetitions, if as many of them
            changed the other way as did here; None where there is none.
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
    difference: Difference
    p: float
    p_holm: float
    detectable: float | None

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
        sides: By name, the samples; of one stage each.
        kinds: The kinds of question to compare.

    Returns:
        A comparison for every pair, in the order of `sides`, and kind of which they share a question.

    Raises:
        UsageError: Two sides share no question.
    """
    asked = {name: _by_kind(rows) for name, rows in sides.items()}
    found: list[Comparison] = []
    for first, second in itertools.combinations(asked, 2):
        pairs = [
            _pair(first, second, kind, asked[first][kind], asked[second][kind])
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
    adjusted = holm([c.p for c in found])
    return [replace(c, p_holm=p) for c, p in zip(found, adjusted, strict=True)]


def rank(sides: Mapping[str, Sequence[Row]], kinds: Collection[str]) -> dict[str, dict[str, Rank]]:
    """Rank all sides by the questions that every one of them was asked.

    Args:
        sides: As for `compare`.
        kinds: As for `compare`.

    Returns:
        By kind and side, its rank; only kinds of which all sides share a question.
    """
    asked = [_by_kind(rows) for rows in sides.values()]
    ranks = {}
    for kind in kinds:
        shared = set.intersection(*(set(own[kind]) for own in asked))
        if shared:
            entries = {}
            for name, own in zip(sides, asked, strict=True):
                counts: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
                for question in sorted(shared):
                    hits, total = counts[question[0]]
                    counts[question[0]] = (hits + _share(own[kind][question]), total + 1)
                entries[name] = counts
            ranks[kind] = rank_intervals(entries, seed=0)
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


def _by_kind(rows: Sequence[Row]) -> dict[str, Answers]:
    asked: dict[str, Answers] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        asked[row["kind"]][row["fact_id"], row["prompt"], row["target"]].append(bool(row["hit"]))
    return asked


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _pair(first: str, second: str, kind: str, one: Answers, other: Answers) -> Comparison:
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
        difference=difference([[change / unit for change in own] for own in changes.values()]),
        p=(p := mcnemar_by_fact(list(sums.values()))),
        p_holm=p,
        detectable=detectable_paired(len(sums), min(len(lost), len(gained)) / len(sums)),
    )


def _mean(answers: Answers, shared: Sequence[Question]) -> float:
    return sum(_share(answers[question]) for question in shared) / len(shared)
