"""From samples to rates: everything in `results.json` that is counted is counted here, from the samples alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retention_bench.analysis import Rate as Counted
from retention_bench.analysis import clustered, detectable, detectable_paired, gap, retention
from retention_bench.results.schema import KINDS, STAGES, Detectable, Difference, Rate, Rates, Retention, Sample

MODELS = 5
"""With fewer edited models, nothing can be said of how much they differ; rates then hold for these models."""


@dataclasses.dataclass(frozen=True)
class Aggregates:
    """What follows from a cell's samples; the fields are those of `Results`."""

    stages: Rates
    retention: Retention
    gap: Difference
    detectable: Detectable


def aggregate(samples: Sequence[Sample], *, seed: int) -> Aggregates:
    """Count what follows from a cell's samples.

    Retention is measured from after the edit to after the fine-tune, in the same model. Samples of several experiments
    are pooled. The intervals of rates take answers of one edited model as dependent where at least `MODELS` models
    hold several edits each, else answers of one fact, and the gap's bootstrap resamples what they do; intrinsic facts
    always by fact, with the outcomes in all experiments. `detectable` has the smallest differences that so many facts
    show in 8 of 10 repetitions at 5 %: in the gap (`gap`), and in edited facts against another run with the same facts
    (`paired`; and `paired_one_in_20` where one fact in 20 changes the other way).

    Args:
        samples: The samples, with their stage and experiment.
        seed: Seed of the bootstrap.
    """

    def outcomes(stage: str, kind: str) -> dict[tuple[str, int | None], bool]:
        return {(s.fact_id, s.experiment): s.hit for s in samples if (s.stage, s.kind) == (stage, kind)}

    def grouped(flat: Mapping[tuple[str, int | None], bool], by: str) -> dict[Any, list[bool]]:
        groups: dict[Any, list[bool]] = defaultdict(list)
        for (fact, experiment), hit in sorted(flat.items()):
            groups[experiment if by == "experiment" else fact].append(hit)
        return groups

    before = {kind: outcomes("post_edit", kind) for kind in ("edited", "intrinsic")}
    after = {kind: outcomes("post_finetune", kind) for kind in ("edited", "intrinsic")}
    control = [outcomes(stage, "intrinsic") for stage in ("base", "control_finetune")]
    by = _clustering("edited", [s for s in samples if (s.stage, s.kind) == ("post_edit", "edited")])
    kept = {
        "edited": retention(
            before["edited"], after["edited"], cluster=lambda key: key[1 if by == "experiment" else 0], by=by
        ),
        "intrinsic": retention(before["intrinsic"], after["intrinsic"], cluster=lambda key: key[0]),
    }
    return Aggregates(
        stages=rates(samples),
        retention=Retention(
            edited=_typed(kept["edited"]),
            intrinsic=_typed(kept["intrinsic"]),
            control_intrinsic=_typed(retention(*control)),
        ),
        gap=Difference.model_validate(
            gap(
                grouped(before["edited"], by),
                grouped(after["edited"], by),
                grouped(before["intrinsic"], "fact"),
                grouped(after["intrinsic"], "fact"),
                seed=seed,
            ).to_json()
        ),
        detectable=Detectable(
            gap=_detectable_gap(kept["edited"], kept["intrinsic"]),
            paired=detectable_paired(len(after["edited"])),
            paired_one_in_20=detectable_paired(len(after["edited"]), 0.05),
        ),
    )


def _typed(counted: Counted) -> Rate:
    return Rate.model_validate(counted.to_json())


def _detectable_gap(edited: Counted, intrinsic: Counted) -> float | None:
    if edited.rate is None or intrinsic.rate is None:
        return None
    return detectable(edited.rate, edited.effective or edited.total, intrinsic.effective or intrinsic.total)


def rates(samples: Iterable[Sample]) -> Rates:
    """Hit rates by stage and kind, with intervals as `aggregate` explains them; only what the samples hold."""
    groups: dict[tuple[str | None, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.stage, sample.kind].append(sample)

    def found(kind: str, some: Sequence[Sample]) -> Rate:
        by = _clustering(kind, some)
        return _typed(clustered(((s.experiment if by == "experiment" else s.fact_id, s.hit) for s in some), by))

    return {
        stage: {kind: found(kind, some) for kind in KINDS if (some := groups.get((stage, kind)))}
        for stage in STAGES
        if any((stage, kind) in groups for kind in KINDS)
    }


def _clustering(kind: str, samples: Sequence[Sample]) -> str:
    """What the answers to one kind of question, after one stage, are clustered by: `"experiment"` or `"fact"`.

    Intrinsic facts are asked in every experiment, so they are not a part of one.
    """
    models = {sample.experiment for sample in samples}
    several = len({sample.fact_id for sample in samples}) > len(models)
    return "experiment" if KINDS[kind].about == "edited" and several and len(models) >= MODELS else "fact"
