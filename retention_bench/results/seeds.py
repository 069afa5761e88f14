"""One cell with several seeds: the runs counted together, with seeds as what they are - repetitions of one cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from retention_bench.data import read_json
from retention_bench.data.durable import write_text
from retention_bench.results.aggregate import Row, Run, aggregate
from retention_bench.results.gates import MIN_EFFICACY
from retention_bench.results.kinds import KindName
from retention_bench.results.measure_types import Bin, Collateral, Decay, Gaps, Paired, Rates, Retention
from retention_bench.results.samples import Sample
from retention_bench.results.schema import SCHEMA_VERSION, Gate, Results, Seeds


class SeedRun(pydantic.BaseModel):
    """One of the runs.

    Attributes:
        seed: Its seed.
        seeds: The seeds of its parts.
        key: The key of its results in the store.
        ranked: Whether it passes its gates.
        paired: Its own headline.
    """

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

    seed: int
    seeds: Seeds
    key: str
    ranked: bool
    paired: Paired


class SeedsResults(pydantic.BaseModel):
    """What `seeds.json` holds: the measures of `Results`, over seeds.

    A measure is the mean of the seeds' own. Its interval is clustered by relation and by seed, which are crossed
    (Cameron, Gelbach & Miller 2011); answers of several seeds are never pooled as if they were independent.
    Survival, which has no interval over seeds and relations at once, is counted for each seed alone, in its own
    `results.json`.

    Attributes:
        schema_version: `SCHEMA_VERSION`.
        suite: The suite's name.
        model: The model's name.
        editor: The editor's name in the suite.
        finetune: The fine-tune's name.
        notice: What a reader must know about the suite's figures.
        runs: The runs, each with its own headline.
        ranked: Whether every run passes its gates.
        gates: The gates of all runs.
        paired: As in `Results`, and so are the others.
    """

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

    schema_version: Literal[4]
    suite: str
    model: str
    editor: str
    finetune: str
    notice: str
    runs: list[SeedRun]
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
    collateral: dict[KindName, Collateral]

    @classmethod
    def load(cls, path: Path | str) -> SeedsResults:
        """Read `seeds.json`.

        Args:
            path: The folder that `evaluate --seeds` wrote, or the file.

        Raises:
            UsageError: There is no such file.
            RetentionBenchError: It holds something else.
        """
        place = Path(path)
        return read_json(place / "seeds.json" if place.is_dir() else place, cls)

    def to_dict(self) -> dict[str, Any]:
        """The results as plain JSON values."""
        return self.model_dump(mode="json")

    def save(self, path: Path | str) -> None:
        """Write the results as JSON, to a temporary name that is then renamed."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(path), f"{text}\n")


def over_seeds(
    runs: Sequence[tuple[Results, Sequence[Sample], Sequence[Row]]], *, min_efficacy: float = MIN_EFFICACY
) -> SeedsResults:
    """Count the runs of several seeds of one cell together.

    Args:
        runs: The results of every seed, with their samples and the rows of `step_matched.jsonl`; no rows where the
            fine-tunes were not followed.
        min_efficacy: The share of the edits that must have taken in every run.
    """
    first = runs[0][0]
    counted = aggregate(
        [
            Run(
                samples,
                [
                    log.model_dump()
                    for log in (*(e.finetune_log for e in results.experiments), results.control.finetune_log)
                ],
                step_matched=matched,
                seed=results.seed,
            )
            for results, samples, matched in runs
        ],
        min_efficacy=min_efficacy,
    )
    return SeedsResults(
        schema_version=SCHEMA_VERSION,
        suite=first.suite,
        model=first.model,
        editor=first.editor,
        finetune=first.finetune,
        notice=first.notice,
        runs=[SeedRun(seed=r.seed, seeds=r.seeds, key=r.key, ranked=r.ranked, paired=r.paired) for r, *_ in runs],
        **vars(counted),
    )
