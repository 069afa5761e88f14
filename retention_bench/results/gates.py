"""Gates: what must hold before a cell's figures are compared or ranked (MEASURES, "Gates")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retention_bench.results.measures import Answers, Pair
from retention_bench.results.schema import Gate

MIN_EFFICACY = 0.8
"""The share of the edits that must have taken, where nothing else is asked for."""

MIN_FACTS = 20
MIN_RELATIONS = 5
"""What must be left on either side of the comparison that a cell makes."""

ROUNDING = 1e-9
"""What a share of a count may be off by: 0.55 x 100 is a little more than 55."""


def counted(found: Iterable[Gate], stage: str | None) -> list[Gate]:
    """The gates that count for the models of one stage: those of the edits from the edit on, not before it.

    Args:
        found: A cell's gates.
        stage: One of `STAGES`; None for the cell as a whole.
    """
    if stage == "base":
        return []
    if stage == "post_edit":
        return [gate for gate in found if gate.name != "learned"]
    if stage == "control_finetune":
        return [gate for gate in found if gate.name == "learned"]
    return list(found)


def strictest(cells: Mapping[str, Sequence[Gate]]) -> dict[str, list[str]]:
    """The gates that each of several cells fails where all are held to the strictest limit among them.

    A cell that was run with a lower `--min-efficacy` than another has no other chance to be ranked beside it.

    Args:
        cells: By name, the gates that count.

    Returns:
        By name, the failed ones in words.
    """
    # How many fine-tunes must learn is how many a cell has.
    limits = {
        gate.name: max(g.limit for own in cells.values() for g in own if g.name == gate.name)
        for own in cells.values()
        for gate in own
        if gate.name != "learned"
    }
    failed: dict[str, list[str]] = {name: [] for name in cells}
    for name, own in cells.items():
        for gate in own:
            limit = limits.get(gate.name, gate.limit)
            if not gate.passed:
                failed[name].append(gate.text)
            elif gate.value < limit - ROUNDING:
                failed[name].append(f"{gate.text}; the limit of another side is {limit:g}")
    return failed


def gates(
    answers: Answers, pairs: Sequence[Pair], logs: Sequence[Mapping[str, Any]], *, min_efficacy: float = MIN_EFFICACY
) -> list[Gate]:
    """Look whether a cell may be ranked.

    Args:
        answers: Its answers.
        pairs: The facts of its headline.
        logs: How its fine-tunes went, the control's included.
        min_efficacy: The share of the edits that must have taken.

    Returns:
        Every gate, with what was found and what it asks for.
    """
    edits = list(answers.of("post_edit", "edited").values())
    took = sum(sample.hit for sample in edits)
    learned = sum(bool(log["learned"]) for log in logs)
    reasons = sorted({log["why_not"] for log in logs if log["why_not"]})
    # The kind that the split leaves alone; matched facts are no stand-in for intrinsic ones that are too few.
    matched = not answers.of("base", "intrinsic") and bool(answers.of("base", "intrinsic_matched"))
    alone = "intrinsic_matched" if matched else "intrinsic"
    sides = {
        "edited": ([pair.edited[0] for pair in pairs], "edited facts that the base model knew and the edit took"),
        "intrinsic": (
            [before for before, _ in answers.before_after(alone, control=True) if before.hit],
            f"{'matched ' * matched}intrinsic facts that the base model knew",
        ),
    }
    found = [
        Gate(
            name="learned",
            passed=learned == len(logs),
            value=learned,
            limit=len(logs),
            text=f"{learned} of {len(logs)} fine-tunes learned{f' ({reasons[0]})' if reasons else ''}",
        ),
        Gate(
            name="efficacy",
            passed=bool(edits) and took >= min_efficacy * len(edits) - ROUNDING,
            value=took / len(edits) if edits else 0.0,
            limit=min_efficacy,
            text=f"{took} of {len(edits)} edits took; {100 * min_efficacy:g} % must",
        ),
    ]
    for side, (some, what) in sides.items():
        facts, relations = len({s.fact_id for s in some}), len({s.relation for s in some})
        found += [
            Gate(
                name=f"{side}_facts",
                passed=facts >= MIN_FACTS,
                value=facts,
                limit=MIN_FACTS,
                text=f"{facts} {what}; {MIN_FACTS} are needed",
            ),
            Gate(
                name=f"{side}_relations",
                passed=relations >= MIN_RELATIONS,
                value=relations,
                limit=MIN_RELATIONS,
                text=f"{relations} relations among the {what}; {MIN_RELATIONS} are needed",
            ),
        ]
    return found
