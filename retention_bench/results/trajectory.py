"""The course of a cell's fine-tunes, from the rows of `trajectory.jsonl` alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from retention_bench.analysis import Answer, clustered

Row = Mapping[str, Any]

CLASSES = ("true", "edited", "related", "other")
"""The classes of tokens that a look has the probability of, see `scoring.Point`."""


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What the edited models answered while they were trained, look by look.

    Models stop at different steps, and those that need many are not like those that need few. So a mean over the models
    that are left is no point of the curve that the means before it are on, and a stopped model's last look is not what
    it would answer had it gone on. Each entry says over how many models it is, and whether they are those of the entry
    before: a line may be drawn between entries of the same models, and not where `changed` is true.

    Args:
        rows: As in `trajectory.jsonl`; those of the control are left out.

    Returns:
        In the order of the steps: `step`, `tokens` and `epoch`, see `Dose`; `models` that were looked at there;
        `changed`, whether these are others than in the entry before; and for each kind of fact the hit rate, clustered
        by relation, and the mean probability of every class of tokens.
    """
    looks: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["experiment"] is not None:
            looks[row["step"]].append(row)
    summary: list[dict[str, Any]] = []
    before: set[int] | None = None
    for step, seen in sorted(looks.items()):
        models = {row["experiment"] for row in seen}
        kinds: dict[str, list[Row]] = defaultdict(list)
        for row in seen:
            kinds[row["kind"]].append(row)
        summary.append(
            {
                "step": step,
                # The same rows in the same order train all models of a cell.
                "tokens": seen[0]["tokens"],
                "epoch": seen[0]["epoch"],
                "models": len(models),
                "changed": before is not None and models != before,
                **{kind: _averaged(some) for kind, some in kinds.items()},
            }
        )
        before = models
    return summary


def _averaged(rows: list[Row]) -> dict[str, Any]:
    means = {}
    for name in CLASSES:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    # A fact that several models are asked is no new fact, and facts of a relation are lost together.
    answers = (Answer(row["relation"], row["hit"], row["fact_id"], row["experiment"]) for row in rows)
    return {**clustered(answers).to_json(), **means}
