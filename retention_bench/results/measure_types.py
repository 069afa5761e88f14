"""The types of the measures of a cell, as `results.json` has them; numbers in parentheses are those of MEASURES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pydantic

from retention_bench.results.kinds import KindName, StageName

Interval = Annotated[tuple[float, float], pydantic.Field(strict=False)]
"""Lower and upper end; of 95 % where nothing else is said."""


class Typed(pydantic.BaseModel):
    """What results are made of: values of the stated types, and nothing else."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")


class Rate(Typed):
    """A share of hits with its 95 % interval; see `analysis.Rate`.

    Attributes:
        hits: Number of hits.
        total: Number of trials.
        rate: hits / total, over several seeds the mean of the seeds' own; None if there were no trials.
        ci95: The interval, within [0, 1]; None if there were no trials.
        clustered_by: What trials belong to that are not independent; None where all are.
        clusters: How many of those there are.
        effective: How many independent trials would give an interval as wide.
    """

    hits: int
    total: int
    rate: float | None
    ci95: Interval | None
    clustered_by: str | None = None
    clusters: int | None = None
    effective: float | None = None

    @pydantic.model_serializer(mode="wrap")
    def _without_clusters(self, plain: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        row: dict[str, Any] = plain(self)
        return row if self.clusters is not None else {k: row[k] for k in ("hits", "total", "rate", "ci95")}

    def __str__(self) -> str:
        if self.rate is None or self.ci95 is None:
            return "none of none"
        low, high = (100 * end for end in self.ci95)
        return f"{self.hits} of {self.total}, {100 * self.rate:.0f} % (95 % interval {low:.0f}-{high:.0f})"


Rates = dict[StageName, dict[KindName, Rate]]
"""Hit rates by stage and kind; only what was asked."""


class Estimate(Typed):
    """A difference of rates with its 95 % interval, clustered by relation; see `analysis.Estimate`.

    Attributes:
        value: The estimate; None where a side has no fact.
        ci95: The interval; None where `value` is, and where there is a value whose spread nothing is known of.
        n: Number of facts, of the smaller side.
        clusters: Number of relations.
        df: Degrees of freedom of the interval.
        detectable: The minimum detectable effect; None where no possible difference is large enough.
    """

    value: float | None
    ci95: Interval | None
    n: int
    clusters: int
    df: float | None
    detectable: float | None

    def __str__(self) -> str:
        """A difference of rates in words, in points."""
        return self._worded("points", lambda share: f"{round(100 * share) or 0:+d}")

    def _worded(self, unit: str, number: Callable[[float], str]) -> str:
        if self.value is None:
            return "none: a side has no fact"
        if self.ci95 is None:
            return f"{number(self.value)} {unit}, with no interval"
        low, high = map(number, self.ci95)
        return f"{number(self.value)} {unit} (95 % interval {low} to {high})"


class Change(Estimate):
    """A mean change of log-odds, or a difference of two, in nats; else as `Estimate`."""

    def __str__(self) -> str:
        """The change in words, in nats."""
        return self._worded("nats", lambda change: f"{round(change, 2) or 0:+.2f}")


class Paired(Typed):
    """The headline: edited facts against themselves in the control (MEASURES, 1).

    Counted are the edited facts whose true object the base model gives, and whose edit took.

    Attributes:
        difference: The share whose true object the control still gives, minus the share whose new object the edited
            model still gives. Positive where edited facts are lost more easily.
        control: The first share.
        edited: The second.
    """

    difference: Estimate
    control: Rate
    edited: Rate


class Decay(Typed):
    """Mean changes of logit P(target) over the fine-tune, in nats; negative where facts became less sure (MEASURES, 2).

    Attributes:
        paired: The edited facts of the headline: change in the edited model minus change in the control.
        edited: Their new objects, in the edited models.
        control: Their true objects, in the control.
        intrinsic: Intrinsic facts that the base model knows, in the edited models; also those that the edit lost.
        control_intrinsic: The same, in the control.
        before: Mean probability of the target before the fine-tune: `edited`, `control`, `intrinsic`.
        clipped: How many of the headline's facts have a probability beyond the limits of `analysis.logit`, in one arm
            at least, before the fine-tune or after; a fact of several seeds counts in each.
        no_number: How many are left out, since a model that diverged gives no number; counted alike.
    """

    paired: Change
    edited: Change
    control: Change
    intrinsic: Change
    control_intrinsic: Change
    before: dict[str, float | None]
    clipped: int
    no_number: int


class HalfLife(Typed):
    """The dose at which half of the facts are lost; see `analysis.survival.HalfLife`."""

    dose: float | None
    low: float | None
    high: float | None
    between: Interval | None


class Curve(Typed):
    """The share of facts that survive, over the dose; see `analysis.survival.Curve`."""

    doses: list[float]
    survival: list[float]
    low: list[float] | None
    high: list[float] | None
    at_risk: list[int]
    facts: int
    courses: int
    relations: int
    lost: int
    half_life: HalfLife


class Contrast(Typed):
    """Edited facts against the same facts in the control, along the fine-tune; see `analysis.hazards.Contrast`."""

    pairs: int
    relations: int
    lost: list[int]
    log_rank_p: float | None
    hazard_ratio: float | None
    ci95: Interval | None
    reason: str | None


class Survival(Typed):
    """Facts followed along the fine-tunes of a cell (MEASURES, 3); see `analysis.survival.Survival`.

    Attributes:
        dose: What doses are counted in: tokens.
        curves: By arm: `edited`, `control` (the same facts), `intrinsic` and `intrinsic_matched`.
        left_out: How many are not followed, as they were not there before the first step.
        contrast: `edited` against `control`; None where no pair has been looked at twice.
    """

    dose: str
    curves: dict[str, Curve]
    left_out: dict[str, int]
    contrast: Contrast | None


class Retention(Typed):
    """Of what was answered before the fine-tune, the share that is answered after it (MEASURES, 4).

    Attributes:
        edited: Edited facts, in the edited models.
        paraphrase: The same facts, asked by their paraphrases.
        locality: Questions about other subjects with an edited fact's true object.
        intrinsic: Intrinsic facts, in the edited models.
        intrinsic_matched: Intrinsic facts of the relations of the edited ones, in the edited models.
        control_edited_true: The edited facts' true objects, in the unedited control.
        control_intrinsic: Intrinsic facts, in the control.
        control_intrinsic_matched: Matched facts, in the control.
    """

    edited: Rate
    paraphrase: Rate
    locality: Rate
    intrinsic: Rate
    intrinsic_matched: Rate
    control_edited_true: Rate
    control_intrinsic: Rate
    control_intrinsic_matched: Rate


class Gaps(Typed):
    """Retention of intrinsic facts minus that of edited facts, in the edited models (MEASURES, 6).

    Attributes:
        unmatched: Against intrinsic facts: the paper's gap, of different relations on the two sides.
        matched: Against matched intrinsic facts, of the same relations.
    """

    unmatched: Estimate
    matched: Estimate


class Bin(Typed):
    """Retention of the facts whose target had a probability in one bin before the fine-tune (MEASURES, 8).

    Each arm is binned by its own probability, so `edited` and `control` hold the same facts over all bins together, and
    in one bin what began as sure: mostly other facts, as edits begin surer.

    Attributes:
        low: The bin's lower edge, which it does not hold but for 0.
        high: Its upper edge, which it holds.
        edited: The edited facts of the headline, in the edited models.
        control: The same facts' true objects, in the control.
        intrinsic: Intrinsic facts, in the edited models.
    """

    low: float
    high: float
    edited: Rate
    control: Rate
    intrinsic: Rate


class Collateral(Typed):
    """What edits did to a kind of fact that they were not about, of those the base model answers (MEASURES, 9).

    Attributes:
        post_edit: Share answered after the edit, minus the base model's.
        post_finetune: Share answered after the fine-tune, minus the control's.
    """

    post_edit: Estimate
    post_finetune: Estimate
