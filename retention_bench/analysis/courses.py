"""What became of each fact along a fine-tune: whether it was held at each look, and when it was lost."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DOSES = ("tokens", "steps", "epochs")
"""What a dose of fine-tuning can be counted in."""
_FIELDS = {"tokens": "tokens", "steps": "step", "epochs": "epoch"}


@dataclass(frozen=True)
class Course:
    """One fact in one model, from before the first step of its fine-tune to the model's last look.

    Attributes:
        fact: The fact's id.
        relation: Its relation.
        model: Number of the edited model; None for the unedited control.
        steps: The optimiser steps done at each look, ascending; before the first step at the first look.
        doses: The dose given until each look, ascending.
        held: Whether the fact was answered as it should be, look by look.
    """

    fact: str
    relation: str
    model: int | None
    steps: tuple[int, ...]
    doses: tuple[float, ...]
    held: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.doses) == len(self.held) > 0:
            raise ValueError(f"a course needs a dose and an answer for each look, of which there is one: {self}")
        if any(b <= a for values in (self.steps, self.doses) for a, b in itertools.pairwise(values)):
            raise ValueError(f"steps and doses must rise from look to look: {self}")

    @property
    def at_risk(self) -> bool:
        """Whether it was held before the first step; only then can the fine-tune lose it."""
        return self.held[0]

    @property
    def lost_at(self) -> int | None:
        """Number of the look at which it is lost; None where it never is.

        The first look from which it stays lost for two looks or to the end (MEASURES, survival): one miss between two
        hits is no loss. At the last look a single miss is one, as nothing more is known.
        """
        for look in range(1, len(self.held)):
            if not any(self.held[look : look + 2]):
                return look
        return None

    def until(self, steps: Iterable[int], doses: Mapping[int, float]) -> Course:
        """The course at some of its looks alone, with the doses given for them."""
        kept = [at for at, step in enumerate(self.steps) if step in set(steps)]
        own = tuple(self.steps[at] for at in kept)
        held = tuple(self.held[at] for at in kept)
        return Course(self.fact, self.relation, self.model, own, tuple(doses[step] for step in own), held)


def between(course: Course) -> tuple[float, float]:
    """The doses between which a fact was lost: after the first, at the second or before.

    The first is the last look at which it was held. The second is infinite where it was never lost: it is censored at
    its model's last look.
    """
    look = course.lost_at
    return (course.doses[-1], math.inf) if look is None else (course.doses[look - 1], course.doses[look])


def courses(rows: Iterable[Mapping[str, Any]], dose: str = "tokens") -> dict[str, list[Course]]:
    """Read courses from a trajectory.

    Args:
        rows: As in `trajectory.jsonl`: a row for each model (`experiment`, null for the control), look (`step`,
            `tokens`, `epoch`) and fact (`fact_id`, `relation`, `kind`), with its `outcome` or `hit`.
        dose: What to count the dose in, one of `DOSES`.

    Returns:
        By arm: `edited` (the edited facts in their models; held is an outcome "new"), `control` (the same facts in the
        control; held is "true"), `intrinsic` and `intrinsic_matched` (in the edited models; held is a hit).

    Raises:
        ValueError: `dose` is none of `DOSES`, or a fact has two rows for one look.
    """
    if dose not in DOSES:
        raise ValueError(f"the dose must be one of {', '.join(DOSES)}, got {dose!r}")
    looks: dict[tuple[str, int | None, str], dict[int, tuple[float, bool, str]]] = defaultdict(dict)
    for row in rows:
        model, kind, step = row["experiment"], row["kind"], row["step"]
        if kind == "edited":
            arm, held = ("control", "true") if model is None else ("edited", "new")
            answered = row["outcome"] == held
        elif model is None:
            continue  # intrinsic facts are compared within the edited models
        else:
            arm, answered = kind, bool(row["hit"])
        own = looks[arm, model, row["fact_id"]]
        if step in own:
            raise ValueError(f"fact {row['fact_id']!r} has two rows for step {step} of experiment {model}")
        own[step] = (row[_FIELDS[dose]], answered, row["relation"])
    found: dict[str, list[Course]] = defaultdict(list)
    for (arm, model, fact), own in looks.items():
        steps = sorted(own)
        values, held_at, relations = zip(*(own[step] for step in steps), strict=True)
        found[arm].append(Course(fact, relations[0], model, tuple(steps), values, held_at))
    return dict(found)


def paired(edited: Sequence[Course], control: Sequence[Course]) -> list[tuple[Course, Course]]:
    """Edited courses, each with the same fact's in the control, where both were held before the first step.

    Both are whole; `shared` cuts them to the same looks.
    """
    same = {course.fact: course for course in control if course.at_risk}
    return [(course, same[course.fact]) for course in edited if course.at_risk and course.fact in same]


def shared(pair: tuple[Course, Course]) -> tuple[Course, Course]:
    """Both courses of a pair at the looks that they share, with the control's doses: nothing but the edit differs."""
    edited, control = pair
    doses = dict(zip(control.steps, control.doses, strict=True))
    steps = doses.keys() & set(edited.steps)
    return edited.until(steps, doses), control.until(steps, doses)
