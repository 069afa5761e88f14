"""What each fact contributes to a measure: from samples to one number a fact, with the relation and the model it is of.

Every measure of a cell, and of several seeds, is a mean or a share of such numbers. Here is what they are; how sure a
mean of them is, `analysis` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from retention_bench.analysis import Answer
from retention_bench.results.samples import Sample

Key = tuple[str, str, int | None]
"""A fact's id, the prompt it was asked with, and the model that was asked: None for the base model and the control."""

BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
"""Edges of the bins of the target's probability before the fine-tune."""


class Answers:
    """The samples of a cell, by stage and kind of question."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        """Index samples.

        Args:
            samples: The samples of a cell, with their stage and experiment.
        """
        self._found: dict[tuple[str | None, str], dict[Key, Sample]] = {}
        for sample in samples:
            own = self._found.setdefault((sample.stage, sample.kind), {})
            own[sample.fact_id, sample.prompt, sample.experiment] = sample

    def of(self, stage: str, kind: str) -> dict[Key, Sample]:
        """The answers of one kind at one stage, in the order of the samples."""
        return self._found.get((stage, kind), {})

    def before_after(self, kind: str, *, control: bool = False) -> Iterator[tuple[Sample, Sample]]:
        """Each question before and after the fine-tune: in the same edited model, or in the base model and the control.

        Args:
            kind: The kind of question.
            control: Whether the unedited model is looked at.
        """
        stages = ("base", "control_finetune") if control else ("post_edit", "post_finetune")
        before, after = (self.of(stage, kind) for stage in stages)
        return ((sample, after[key]) for key, sample in before.items() if key in after)


def known(answers: Answers, kind: str, *, control: bool = False) -> Iterator[tuple[Sample, Sample]]:
    """As `Answers.before_after`, of what the base model answers: the same questions in both arms.

    An edit may lose a fact before the fine-tune. Were only what the edited model still answers counted, the edited
    arm alone would have its least sure facts left out.
    """
    base = answers.of("base", kind)
    for before, after in answers.before_after(kind, control=control):
        own = base.get((before.fact_id, before.prompt, None))
        if own is not None and own.hit:
            yield before, after


def answer(sample: Sample, value: float) -> Answer:
    """A value of the fact, the relation and the model that a sample is of."""
    return Answer(sample.relation, value, sample.fact_id, sample.experiment)


def kept(answers: Answers, kind: str, *, control: bool = False) -> list[Answer]:
    """Of the questions answered before the fine-tune, whether each still is."""
    return [answer(b, a.hit) for b, a in answers.before_after(kind, control=control) if b.hit]


def taken(answers: Answers) -> list[Sample]:
    """The edited facts whose edit took, as the edited models answered them after the edit."""
    return [sample for sample in answers.of("post_edit", "edited").values() if sample.hit]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One edited fact in both arms: the base model knew it, and the edit took.

    Attributes:
        edited: The new object in the edited model, before and after the fine-tune.
        control: The true object in the unedited model, before and after the fine-tune.
    """

    edited: tuple[Sample, Sample]
    control: tuple[Sample, Sample]


def pairs(answers: Answers) -> list[Pair]:
    """The edited facts that the base model answered with the true object, and the edited model with the new one.

    Each is its own control: the subject, the relation and the words are the same in both arms.
    """
    control = {before.fact_id: (before, after) for before, after in answers.before_after("edited_true", control=True)}
    found = []
    for before, after in answers.before_after("edited"):
        own = control.get(before.fact_id)
        if before.hit and own is not None and own[0].hit:
            found.append(Pair((before, after), own))
    return found


def paired_difference(some: Sequence[Pair]) -> list[Answer]:
    """For each fact: whether the control still gives the true object, minus whether the edited model gives the new one.

    Positive where edited facts are lost more easily. Its mean is the headline.
    """
    return [answer(p.edited[0], p.control[1].hit - p.edited[1].hit) for p in some]


def hits_after(some: Sequence[Pair], arm: Callable[[Pair], tuple[Sample, Sample]]) -> list[Answer]:
    """Whether each fact of the pairs is still answered in one arm."""
    return [answer(p.edited[0], arm(p)[1].hit) for p in some]


def collateral(answers: Answers, kind: str, stage: str) -> list[Answer]:
    """What edits did to facts that they were not about: of those that the base model answers, edited minus unedited.

    Args:
        answers: The cell's answers.
        kind: `"locality"`, `"intrinsic"` or `"intrinsic_matched"`.
        stage: `"post_edit"`, against the base model; or `"post_finetune"`, against the control.
    """
    base = answers.of("base", kind)
    unedited = base if stage == "post_edit" else answers.of("control_finetune", kind)
    found = []
    for (fact, prompt, _), sample in answers.of(stage, kind).items():
        key = (fact, prompt, None)
        if key in base and base[key].hit and key in unedited:
            found.append(answer(sample, sample.hit - unedited[key].hit))
    return found


def outcomes(samples: Iterable[Sample]) -> dict[str, int]:
    """How many answers were the new object, the true one, a related one, another, and none."""
    counts = dict.fromkeys(("new", "true", "related", "other", "none"), 0)
    for sample in samples:
        counts[sample.outcome] += 1
    return counts


def lost(answers: Answers) -> list[Sample]:
    """The edits that took and are gone after the fine-tune, as answered then."""
    return [after for before, after in answers.before_after("edited") if before.hit and not after.hit]


def by_confidence(asked: Iterable[tuple[Sample, Sample]]) -> list[list[Answer]]:
    """Whether what was answered before still is, by the bin of `BINS` that the target's probability was in before.

    Args:
        asked: Questions before and after the fine-tune.
    """
    found: list[list[Answer]] = [[] for _ in BINS[1:]]
    for before, after in asked:
        if before.hit and before.logprob is not None:
            chance = math.exp(before.logprob)
            place = next(i for i, end in enumerate(BINS[1:]) if chance <= end or end == BINS[-1])
            found[place].append(answer(before, after.hit))
    return found
