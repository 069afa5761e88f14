"""From samples to rates: everything in `results.json` that is counted is counted here, from the samples alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from retention_bench.analysis import Answer, clustered, detectable_paired, gap, retained
from retention_bench.analysis import Rate as Counted
from retention_bench.results.schema import KINDS, STAGES, Detectable, Difference, Rate, Rates, Retention, Sample


@dataclasses.dataclass(frozen=True)
class Aggregates:
    """What follows from a cell's samples; the fields are those of `Results`."""

    stages: Rates
    retention: Retention
    gap: Difference
    detectable: Detectable


def aggregate(samples: Sequence[Sample], *, seed: int) -> Aggregates:
    """Count what follows from a cell's samples.

    Retention is measured from after the edit to after the fine-tune, in the same model. Intervals are clustered by fact
    and by edited model where there are enough (`analysis.MODELS`). `detectable` has the smallest differences that show
    in 8 of 10 repetitions at 5 %: in the gap (`gap`), and in edited facts against another run with the same facts
    (`paired`; and `paired_one_in_20` where one fact in 20 changes the other way).

    Args:
        samples: The samples, with their stage and experiment.
        seed: Not used.
    """

    def outcomes(stage: str, kind: str) -> dict[tuple[str, int | None], Answer]:
        return {(s.fact_id, s.experiment): _answer(s) for s in samples if (s.stage, s.kind) == (stage, kind)}

    after = outcomes("post_finetune", "edited")
    edited = retained(outcomes("post_edit", "edited"), after)
    intrinsic = retained(outcomes("post_edit", "intrinsic"), outcomes("post_finetune", "intrinsic"))
    control = retained(outcomes("base", "intrinsic"), outcomes("control_finetune", "intrinsic"))
    difference = gap(edited, intrinsic)
    return Aggregates(
        stages=rates(samples),
        retention=Retention(
            edited=_typed(clustered(edited, "fact")),
            intrinsic=_typed(clustered(intrinsic, "fact")),
            control_intrinsic=_typed(clustered(control, "fact")),
        ),
        gap=Difference(value=difference.value, ci95=difference.ci95),
        detectable=Detectable(
            gap=difference.detectable,
            paired=detectable_paired(len(after)),
            paired_one_in_20=detectable_paired(len(after), 0.05),
        ),
    )


def _answer(sample: Sample) -> Answer:
    return Answer(sample.fact_id, sample.hit, sample.fact_id, sample.experiment)


def _typed(counted: Counted) -> Rate:
    return Rate.model_validate(counted.to_json())


def rates(samples: Iterable[Sample]) -> Rates:
    """Hit rates by stage and kind, with intervals as `aggregate` explains them; only what the samples hold."""
    groups: dict[tuple[str | None, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.stage, sample.kind].append(sample)

    return {
        stage: {
            kind: _typed(clustered(map(_answer, some), "fact")) for kind in KINDS if (some := groups.get((stage, kind)))
        }
        for stage in STAGES
        if any((stage, kind) in groups for kind in KINDS)
    }
