"""From samples to measures: everything in `results.json` that is counted is counted here, from a cell's rows alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from retention_bench import analysis
from retention_bench.analysis import Answer
from retention_bench.results import measures
from retention_bench.results.gates import MIN_EFFICACY, gates
from retention_bench.results.kinds import KINDS, STAGES
from retention_bench.results.measure_types import (
    Bin,
    Change,
    Collateral,
    Decay,
    Estimate,
    Gaps,
    Paired,
    Rate,
    Rates,
    Retention,
)
from retention_bench.results.measures import Answers, Pair
from retention_bench.results.samples import Sample
from retention_bench.results.schema import Gate

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The rows of one cell, as its files have them.

    Attributes:
        samples: The samples, with their stage and experiment.
        logs: How the fine-tunes went, the control's included.
        step_matched: The control's rows of the trajectory at the step at which each edited model stopped, with the
            model's `experiment`; none where the fine-tunes were not followed.
        seed: The run's seed, where several are counted together.
    """

    samples: Sequence[Sample]
    logs: Sequence[Row]
    step_matched: Sequence[Row] = ()
    seed: int | None = None

    @functools.cached_property
    def answers(self) -> Answers:
        """The samples by stage and kind."""
        return Answers(self.samples)

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """The facts of the headline."""
        return measures.pairs(self.answers)


@dataclasses.dataclass(frozen=True)
class Aggregates:
    """What follows from the samples of one run or of several seeds; the fields are those of `Results`."""

    ranked: bool
    gates: list[Gate]
    paired: Paired
    paired_step_matched: Paired | None
    decay: Decay
    retention: Retention
    stages: Rates
    gap: Gaps
    lost: dict[str, int]
    confidence: list[Bin]
    collateral: dict[str, Collateral]


def aggregate(runs: Sequence[Run], *, min_efficacy: float = MIN_EFFICACY) -> Aggregates:
    """Count what follows from a cell's samples, or from those of several seeds of one cell.

    All intervals are clustered by relation. With several seeds a measure is the mean of the seeds' own, and its
    interval takes seeds as crossed with relations: answers of several seeds are never pooled as if independent.

    Args:
        runs: One run, or a run of each seed.
        min_efficacy: The share of the edits that must have taken in a run for the cell to be ranked.
    """
    found = [
        gate.model_copy(update={"text": f"seed {run.seed}: {gate.text}"}) if len(runs) > 1 else gate
        for run in runs
        for gate in gates(run.answers, run.pairs, run.logs, min_efficacy=min_efficacy)
    ]

    def kept(kind: str, *, control: bool = False) -> list[Answer]:
        return _over(runs, lambda run: measures.kept(run.answers, kind, control=control))

    def moved(kind: str, stage: str) -> Estimate:
        return _mean(_over(runs, lambda run: measures.collateral(run.answers, kind, stage)))

    gone = [measures.outcomes(measures.lost(run.answers)) for run in runs]
    return Aggregates(
        ranked=all(gate.passed for gate in found),
        gates=found,
        paired=_paired(runs, lambda run: run.pairs),
        paired_step_matched=_paired(runs, _step_matched) if all(run.step_matched for run in runs) else None,
        decay=_decay(runs),
        retention=Retention(
            **{k: _rate(kept(k)) for k in ("edited", "paraphrase", "locality", "intrinsic", "intrinsic_matched")},
            **{
                f"control_{kind}": _rate(kept(kind, control=True))
                for kind in ("edited_true", "intrinsic", "intrinsic_matched")
            },
        ),
        stages=_stages(runs),
        gap=Gaps(
            unmatched=_estimate(analysis.gap(kept("edited"), kept("intrinsic"))),
            matched=_estimate(analysis.gap(kept("edited"), kept("intrinsic_matched"))),
        ),
        lost={outcome: sum(own[outcome] for own in gone) for outcome in gone[0]},
        confidence=_confidence(runs),
        collateral={
            kind: Collateral(post_edit=moved(kind, "post_edit"), post_finetune=moved(kind, "post_finetune"))
            for kind in ("locality", "intrinsic", "intrinsic_matched")
        },
    )


def rates(samples: Sequence[Sample]) -> Rates:
    """Hit rates by stage and kind, whatever was right before: the paper's equation 1. Only what the samples hold."""
    return _stages([Run(samples, ())])


def _over(runs: Sequence[Run], measure: Callable[[Run], Iterable[Answer]]) -> list[Answer]:
    """What the facts of all runs contribute, each with its run's seed."""
    return [answer._replace(seed=run.seed) for run in runs for answer in measure(run)]


def _rate(answers: Iterable[Answer]) -> Rate:
    return Rate.model_validate(analysis.clustered(answers).to_json())


def _estimate(found: analysis.Estimate) -> Estimate:
    return Estimate.model_validate(found.to_json())


def _mean(answers: Iterable[Answer]) -> Estimate:
    return _estimate(analysis.mean(answers))


def _stages(runs: Sequence[Run]) -> Rates:
    groups: dict[tuple[str | None, str], list[Answer]] = defaultdict(list)
    for run in runs:
        for sample in run.samples:
            groups[sample.stage, sample.kind].append(measures.answer(sample, sample.hit)._replace(seed=run.seed))
    found: Rates = {}
    for stage, kind in itertools.product(STAGES, KINDS):
        if own := groups.get((stage, kind)):
            found.setdefault(stage, {})[kind] = _rate(own)
    return found


def _paired(runs: Sequence[Run], pairs: Callable[[Run], Sequence[Pair]]) -> Paired:
    return Paired(
        difference=_mean(_over(runs, lambda run: measures.paired_difference(pairs(run)))),
        control=_rate(_over(runs, lambda run: measures.hits_after(pairs(run), lambda pair: pair.control))),
        edited=_rate(_over(runs, lambda run: measures.hits_after(pairs(run), lambda pair: pair.edited))),
    )


def _step_matched(run: Run) -> list[Pair]:
    """The pairs of the headline with the control as it was when each edited model stopped."""
    still = {
        (row["fact_id"], row["experiment"]): row["outcome"] == "true"
        for row in run.step_matched
        if row["kind"] == "edited"
    }
    moved = []
    for pair in run.pairs:
        before, after = pair.control
        hit = still[pair.edited[0].fact_id, pair.edited[0].experiment]
        moved.append(dataclasses.replace(pair, control=(before, after.model_copy(update={"hit": hit}))))
    return moved


def _decay(runs: Sequence[Run]) -> Decay:
    def whole(run: Run) -> list[Pair]:
        return [pair for pair in run.pairs if _numbers(*pair.edited, *pair.control)]

    def others(run: Run, control: bool) -> list[tuple[Sample, Sample]]:
        found = measures.known(run.answers, "intrinsic", control=control)
        return [(before, after) for before, after in found if _numbers(before, after)]

    def paired(pair: Pair) -> Answer:
        return measures.answer(pair.edited[0], _change(*pair.edited) - _change(*pair.control))

    def mean(changes: Callable[[Run], Iterable[Answer]]) -> Change:
        return Change.model_validate(analysis.mean(_over(runs, changes), bounded=False).to_json())

    pairs = [pair for run in runs for pair in whole(run)]
    return Decay(
        paired=mean(lambda run: map(paired, whole(run))),
        edited=mean(lambda run: [_changed(*pair.edited) for pair in whole(run)]),
        control=mean(lambda run: [_changed(*pair.control) for pair in whole(run)]),
        intrinsic=mean(lambda run: [_changed(*two) for two in others(run, False)]),
        control_intrinsic=mean(lambda run: [_changed(*two) for two in others(run, True)]),
        before={
            "edited": _probability([pair.edited[0] for pair in pairs]),
            "control": _probability([pair.control[0] for pair in pairs]),
            "intrinsic": _probability([before for run in runs for before, _ in others(run, False)]),
        },
        clipped=sum(any(map(_clipped, (*pair.edited, *pair.control))) for pair in pairs),
        no_number=sum(len(run.pairs) for run in runs) - len(pairs),
    )


def _numbers(*samples: Sample) -> bool:
    return all(sample.logprob is not None for sample in samples)


def _clipped(sample: Sample) -> bool:
    return sample.logprob is not None and analysis.is_clipped(sample.logprob)


def _change(before: Sample, after: Sample) -> float:
    assert before.logprob is not None
    assert after.logprob is not None
    return analysis.logit(after.logprob) - analysis.logit(before.logprob)


def _changed(before: Sample, after: Sample) -> Answer:
    return measures.answer(before, _change(before, after))


def _probability(samples: Sequence[Sample]) -> float | None:
    found = [math.exp(sample.logprob) for sample in samples if sample.logprob is not None]
    return sum(found) / len(found) if found else None


def _confidence(runs: Sequence[Run]) -> list[Bin]:
    def binned(asked: Callable[[Run], Iterable[tuple[Sample, Sample]]]) -> list[Rate]:
        found = [(run.seed, measures.by_confidence(asked(run))) for run in runs]
        return [
            _rate(answer._replace(seed=seed) for seed, bins in found for answer in bins[place])
            for place in range(len(measures.BINS) - 1)
        ]

    edited = binned(lambda run: (pair.edited for pair in run.pairs))
    control = binned(lambda run: (pair.control for pair in run.pairs))
    intrinsic = binned(lambda run: run.answers.before_after("intrinsic"))
    return [
        Bin(low=low, high=high, edited=edited[place], control=control[place], intrinsic=intrinsic[place])
        for place, (low, high) in enumerate(itertools.pairwise(measures.BINS))
    ]
