"""Facts with known hazards, followed through fine-tunes that stop at different steps."""

from __future__ import annotations

import numpy as np

from retention_bench.analysis.courses import Course

TOKENS = 100.0
"""Tokens of a step."""


def simulate(
    rng: np.random.Generator,
    *,
    facts: int = 100,
    relations: int = 15,
    models: int = 10,
    half_life: float = 1000,
    ratio: float = 2,
    frailty: float = 0.5,
    every: int = 2,
    last: int = 24,
) -> list[tuple[Course, Course]]:
    """Pairs of courses, edited and control, in which time to loss is exponential.

    Args:
        rng: Where chance comes from.
        facts: About how many facts; relations have unequal sizes, 1 : 2 : 3 and so on.
        relations: How many relations.
        models: How many edited models; each stops at a step between a third of `last` and `last`, the control at `last`.
        half_life: Of edited facts without frailty, in tokens.
        ratio: Hazard of edited facts over the control's.
        frailty: SD of the relations' log-hazards; half of its variance is shared by the arms.
        every: Steps between two looks. The control is looked at also where an edited model stops.
        last: The most steps.
    """
    sizes = np.maximum(1, np.round(facts * np.arange(1, relations + 1) / np.arange(1, relations + 1).sum())).astype(int)
    relation = np.repeat(np.arange(relations), sizes)
    count = len(relation)
    common, *own = rng.normal(size=(3, relations)) * frailty / np.sqrt(2)
    model = rng.permutation(np.arange(count) % models)
    stops = rng.integers(last // 3, last + 1, models)
    arms = []
    for arm, hazard in enumerate((np.log(2) / half_life, np.log(2) / half_life / ratio)):
        lost = rng.exponential(1, count) / (hazard * np.exp((common + own[arm])[relation]))
        followed = []
        for i in range(count):
            stop = last if arm else int(stops[model[i]])
            steps = tuple(sorted({*range(0, stop + 1, every), stop, *(stops.tolist() if arm else ())}))
            doses = tuple(TOKENS * step for step in steps)
            held = tuple(bool(lost[i] > dose) for dose in doses)
            followed.append(Course(f"f{i}", f"r{relation[i]}", None if arm else int(model[i]), steps, doses, held))
        arms.append(followed)
    return list(zip(*arms, strict=True))
