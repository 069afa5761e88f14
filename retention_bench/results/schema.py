"""The schema of `results.json`: a cell's results, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import pydantic

from retention_bench.data import find_file, read_json
from retention_bench.data.durable import write_text
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.results.kinds import KindName
from retention_bench.results.measure_types import (
    Bin,
    Collateral,
    Decay,
    Gaps,
    Paired,
    Rates,
    Retention,
    Survival,
    Typed,
)

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION: Final = 4


class Gate(Typed):
    """One condition that a cell must meet to be compared and ranked.

    Attributes:
        name: Its name.
        passed: Whether it is met.
        value: What was found.
        limit: What is asked for.
        text: Both in words.
    """

    name: str
    passed: bool
    value: float
    limit: float
    text: str


class Seeds(Typed):
    """The seeds of a cell's parts."""

    facts: int
    edit: int
    finetune: int


class FinetuneLog(Typed):
    """How a fine-tune went; see `finetune.FinetuneLog`, whose every field is here or among the extra ones."""

    model_config = pydantic.ConfigDict(extra="allow")

    steps: int
    stopped_by: str
    learned: bool
    why_not: str | None
    metric: str
    value: float | None
    threshold: float


class Experiment(Typed):
    """One edited model of a cell.

    Attributes:
        index: Its place among the cell's experiments, from 0.
        edited: The ids of the facts that were edited into it.
        edit_norm: The Frobenius norm of the change that the edit made, over all weights.
        edit_factor: Of an edit that is made of another one: that norm as a multiple of the other's; None for others.
        stages: Its hit rates.
        finetune_log: How its fine-tune went.
    """

    index: int
    edited: list[str]
    edit_norm: float
    edit_factor: float | None
    stages: Rates
    finetune_log: FinetuneLog


class Control(Typed):
    """The unedited control: how its fine-tune went."""

    finetune_log: FinetuneLog


class Results(Typed):
    """A cell's results: what `results.json` holds. All rates can be computed again from `samples.jsonl`.

    Attributes:
        schema_version: `SCHEMA_VERSION`.
        suite: The suite's name.
        notice: What a reader must know about the suite's figures.
        model: The model's name.
        editor: The editor's name in the suite.
        finetune: The fine-tune's name.
        freeze: What the fine-tunes left as it was.
        adapter: What they trained in the weights' place.
        learned: Whether every fine-tune reached its threshold. Else what is left says little about retention.
        not_learned: Why not, in words.
        paraphrases: How many more prompts each fact was edited with.
        paraphrase_source: Where they came from.
        paraphrase_mode: How the edits took them: `mean` or `separate`.
        paraphrase_counts: How many of all the edits' prompts came from each source.
        horizon: When the fine-tunes end: at their threshold, or after a dose.
        paraphrase_questions: How many paraphrases were asked, and how many not, since edits were made with them.
        defaults: What the suite has no settings for, so that its own defaults were used.
        seed: The seed.
        seeds: The seeds of its parts, which are `seed` where nothing else was asked for.
        key: The key of the results in the store.
        ranked: Whether all gates are passed; else no rank counts the cell.
        gates: What must hold for that, and what was found.
        paired: The headline: the paired difference.
        paired_step_matched: The same against the control at the step at which each edited model stopped; None where the
            fine-tunes were not followed.
        decay: The same contrast in log-odds.
        survival: The same along the fine-tune; None where it was not followed.
        retention: What survived, of what was there before.
        stages: Hit rates of all models together, whatever was right before: the paper's retention rates (equation 1).
        gap: Intrinsic facts against edited ones.
        lost: What the edited models answer in the place of edits that took and are lost.
        confidence: Retention by the target's probability before the fine-tune.
        collateral: By kind, what edits did to other facts.
        experiments: The edited models.
        control: The unedited control.
        trajectory: The course of the fine-tunes of the edited models by step; None where it was not followed.
        facts: What the known-fact filter counted.
        provenance: Versions, contents and settings that the results come from.
        timing: Seconds that each stage took when it was computed, and the highest peak memory among them.
    """

    schema_version: Literal[4]
    suite: str
    notice: str
    model: str
    editor: str
    finetune: str
    freeze: str
    adapter: str
    learned: bool
    not_learned: list[str]
    paraphrases: int
    paraphrase_source: str | None
    paraphrase_mode: str | None = None
    paraphrase_counts: dict[str, int] = pydantic.Field({})
    horizon: str
    paraphrase_questions: dict[str, int]
    defaults: list[str]
    seed: int
    seeds: Seeds
    key: str
    ranked: bool
    gates: list[Gate]
    paired: Paired
    paired_step_matched: Paired | None
    decay: Decay
    survival: Survival | None
    retention: Retention
    stages: Rates
    gap: Gaps
    lost: dict[str, int]
    confidence: list[Bin]
    collateral: dict[KindName, Collateral]
    experiments: list[Experiment]
    control: Control
    trajectory: list[dict[str, Any]] | None = None
    facts: dict[str, Any]
    provenance: dict[str, Any]
    timing: dict[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> Results:
        """Read results.

        Args:
            path: The folder that `evaluate` wrote, or its `results.json`.

        Raises:
            UsageError: There is no such file.
            RetentionBenchError: It holds no results, or those of another version of the schema.
        """
        place = Path(path)
        if place.is_dir():
            place = place / "results.json"
            if not place.is_file():
                raise UsageError(
                    f"{path} holds no finished run: results.json must be there. Give the folder that `evaluate` wrote."
                )
        file = find_file(place, "results file")
        check_version(file)
        return read_json(file, cls)

    def to_dict(self) -> dict[str, Any]:
        """The results as plain JSON values."""
        row = self.model_dump(mode="json")
        if self.trajectory is None:
            del row["trajectory"]
        return row

    def save(self, path: Path | str) -> None:
        """Write the results as JSON, to a temporary name that is then renamed.

        Args:
            path: The file.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(path), f"{text}\n")

    def to_frame(self) -> pandas.DataFrame:
        """The hit rates as a table: a row for each stage and kind of the cell and of each of its edited models.

        Returns:
            Columns experiment (None for all models together), stage, kind, hits, total, rate, low, high.
        """
        import pandas

        parts: list[tuple[int | None, Rates]] = [(None, self.stages), *((e.index, e.stages) for e in self.experiments)]
        rows = [
            {
                "experiment": experiment,
                "stage": stage,
                "kind": kind,
                "hits": rate.hits,
                "total": rate.total,
                "rate": rate.rate,
                "low": rate.ci95 and rate.ci95[0],
                "high": rate.ci95 and rate.ci95[1],
            }
            for experiment, rates in parts
            for stage, kinds in rates.items()
            for kind, rate in kinds.items()
        ]
        return pandas.DataFrame(rows)


class _Version(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    schema_version: int


def check_version(file: Path) -> None:
    """Refuse a `results.json` that another version of the schema has written.

    Raises:
        RetentionBenchError: It is one, or holds no results.
    """
    try:
        version = read_json(file, _Version).schema_version
    except RetentionBenchError as error:
        raise RetentionBenchError(f"{error} These are not the results of a run; run `evaluate` again.") from error
    if version != SCHEMA_VERSION:
        raise RetentionBenchError(
            f"{file} has schema_version {version!r}; this version reads {SCHEMA_VERSION}. Run `evaluate` again."
        )
