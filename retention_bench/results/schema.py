"""The one schema of what is measured: kinds of question, stages of a model, samples, rates and a cell's results.

Whoever asks, counts, prints or reads results takes names and labels from here. A kind of question is one entry in
`KINDS` and a task file in `tasks/`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import pydantic

from retention_bench.data import find_file, read_json
from retention_bench.data.durable import write_text
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name

if TYPE_CHECKING:
    import pandas

    from retention_bench.facts import Fact, FactSet

SCHEMA_VERSION: Final = 4


FORMS: dict[str, str] = {
    "cloze": "{}",
    "qa": "Question: {} what?\nAnswer:",
    "chat": "Complete the sentence with the missing words only: {} ...",
}
"""The forms of a question, with what is put around a prompt. That of a chat is what the user says."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: Its name in samples, in rates and, behind `retention_`, in lm-eval.
        label: What tables call it.
        about: Which facts are asked: `"edited"`, those with a `target_new`, `"intrinsic"`, those without, or
            `"intrinsic_matched"`, those without whose relations edited facts have too.
        prompts: The attribute of a `Fact` that holds its prompt or prompts.
        target: The attribute of a `Fact` that holds the object to be answered.
        form: One of `FORMS`: how the prompt is put.
    """

    name: str
    label: str
    about: Literal["edited", "intrinsic", "intrinsic_matched"]
    prompts: Literal["question", "paraphrases", "neighborhood"]
    target: Literal["target_true", "target_new"]
    form: Literal["cloze", "qa", "chat"] = "cloze"

    @property
    def task(self) -> str:
        """The lm-eval task that asks it."""
        return f"retention_{self.name}"

    def questions(self, facts: FactSet) -> list[tuple[Fact, str, str]]:
        """Its questions: the fact, what is asked and the object to be answered, in the order of the facts."""
        found = []
        for fact in getattr(facts, self.about):
            prompts = getattr(fact, self.prompts)
            for prompt in (prompts,) if isinstance(prompts, str) else prompts:
                found.append((fact, FORMS[self.form].replace("{}", prompt), getattr(fact, self.target)))
        return found


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("edited", "edited", "edited", "question", "target_new"),
        Kind("edited_true", "edited, true object", "edited", "question", "target_true"),
        Kind("intrinsic", "intrinsic", "intrinsic", "question", "target_true"),
        Kind("intrinsic_matched", "intrinsic, matched", "intrinsic_matched", "question", "target_true"),
        Kind("paraphrase", "paraphrase", "edited", "paraphrases", "target_new"),
        Kind("locality", "locality", "edited", "neighborhood", "target_true"),
        Kind("edited_qa", "edited, as a question", "edited", "question", "target_new", "qa"),
        Kind("intrinsic_qa", "intrinsic, as a question", "intrinsic", "question", "target_true", "qa"),
        Kind("edited_chat", "edited, in a chat", "edited", "question", "target_new", "chat"),
        Kind("intrinsic_chat", "intrinsic, in a chat", "intrinsic", "question", "target_true", "chat"),
    )
}
"""All kinds of question, in the order in which they are asked."""

GROUPS: dict[str, tuple[str, ...]] = {
    f"retention{end}": tuple(name for name, kind in KINDS.items() if kind.form == form)
    for end, form in (("", "cloze"), ("_qa", "qa"), ("_chat", "chat"))
}
"""The groups of lm-eval tasks, with the kinds in each."""

STAGES: dict[str, str] = {
    "base": "base model",
    "post_edit": "after the edit",
    "post_finetune": "after the fine-tune",
    "control_finetune": "unedited, after the fine-tune",
}
"""The stages at which models are scored, each with its label."""


def _known(what: str, allowed: Mapping[str, Any]) -> Any:
    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(str(unknown_name(what, name, allowed)).removesuffix("."))
        return name

    return pydantic.AfterValidator(check)


KindName = Annotated[str, _known("kind of question", KINDS)]
StageName = Annotated[str, _known("stage", STAGES)]
Interval = Annotated[tuple[float, float], pydantic.Field(strict=False)]
"""Lower and upper end; of 95 % where nothing else is said."""


class _Typed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")


class Sample(_Typed):
    """One question put to one model, and its answer.

    Attributes:
        experiment: Which edited model of a cell was asked, from 0; None for the base model, the control, and a
            checkpoint that `score` was given.
        stage: At which stage of a cell it was asked; None for a checkpoint that `score` was given.
        kind: The kind of question.
        fact_id: The fact it belongs to.
        relation: The fact's relation.
        prompt: The text the model was given.
        target: The object it should answer with, without leading space.
        hit: Whether the first content token it decoded equals the target's first content token; in a chat the first
            content word.
        strict: Whether the very first token it decoded is the target's first, in a chat the very first word.
        whole: Whether it decoded all of the target, from the first content token on.
        outcome: What the first content token is: of the fact's new object, of its true one, of another object of the
            relation, or another; none where decoding ended before there was one.
        token_ids: The ids it decoded, up to the target's length from the first content token on, or the end.
        text: The same, decoded, without special tokens.
        logprob: Natural logarithm of the probability of the whole target after the prompt (teacher forced);
            None where the model puts out no number, as one that diverged in training.
    """

    experiment: Annotated[int, pydantic.Field(ge=0)] | None = None
    stage: StageName | None = None
    kind: KindName
    fact_id: str
    relation: str
    prompt: str
    target: str
    hit: bool
    strict: bool
    whole: bool
    outcome: Literal["new", "true", "related", "other", "none"]
    token_ids: Annotated[tuple[int, ...], pydantic.Field(strict=False)]
    text: str
    logprob: float | None

    def to_json(self) -> dict[str, Any]:
        """The sample as plain JSON values; without `experiment` and `stage` where it is of no cell."""
        row = self.model_dump(mode="json")
        return row if self.stage is not None else {k: v for k, v in row.items() if k not in ("experiment", "stage")}

    def at(self, stage: str, experiment: int | None) -> Sample:
        """The same sample as one of a cell's."""
        return self.model_copy(update={"stage": stage, "experiment": experiment})


class Rate(_Typed):
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


class Estimate(_Typed):
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


class Paired(_Typed):
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


class Decay(_Typed):
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


class HalfLife(_Typed):
    """The dose at which half of the facts are lost; see `analysis.survival.HalfLife`."""

    dose: float | None
    low: float | None
    high: float | None
    between: Interval | None


class Curve(_Typed):
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


class Contrast(_Typed):
    """Edited facts against the same facts in the control, along the fine-tune; see `analysis.hazards.Contrast`."""

    pairs: int
    relations: int
    lost: list[int]
    log_rank_p: float | None
    hazard_ratio: float | None
    ci95: Interval | None
    reason: str | None


class Survival(_Typed):
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


class Retention(_Typed):
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


class Gaps(_Typed):
    """Retention of intrinsic facts minus that of edited facts, in the edited models (MEASURES, 6).

    Attributes:
        unmatched: Against intrinsic facts: the paper's gap, of different relations on the two sides.
        matched: Against matched intrinsic facts, of the same relations.
    """

    unmatched: Estimate
    matched: Estimate


class Bin(_Typed):
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


class Collateral(_Typed):
    """What edits did to a kind of fact that they were not about, of those the base model answers (MEASURES, 9).

    Attributes:
        post_edit: Share answered after the edit, minus the base model's.
        post_finetune: Share answered after the fine-tune, minus the control's.
    """

    post_edit: Estimate
    post_finetune: Estimate


class Gate(_Typed):
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


class Seeds(_Typed):
    """The seeds of a cell's parts."""

    facts: int
    edit: int
    finetune: int


class FinetuneLog(_Typed):
    """How a fine-tune went; see `finetune.FinetuneLog`, whose every field is here or among the extra ones."""

    model_config = pydantic.ConfigDict(extra="allow")

    steps: int
    stopped_by: str
    learned: bool
    why_not: str | None
    metric: str
    value: float | None
    threshold: float


Rates = dict[StageName, dict[KindName, Rate]]
"""Hit rates by stage and kind; only what was asked."""


class Experiment(_Typed):
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


class Control(_Typed):
    """The unedited control: how its fine-tune went."""

    finetune_log: FinetuneLog


class Results(_Typed):
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
    paraphrase_counts: dict[str, int] = {}
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
