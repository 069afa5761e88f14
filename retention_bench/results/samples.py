"""A sample: one question put to one model, and its answer. What `samples.jsonl` and `scores.jsonl` hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from retention_bench.results.kinds import KindName, StageName


class Sample(pydantic.BaseModel):
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

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

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
