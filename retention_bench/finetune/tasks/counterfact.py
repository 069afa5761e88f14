"""The object of factual triples, on facts that the base model gets wrong."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, ClassVar

import pydantic

from retention_bench.data import is_local
from retention_bench.errors import RetentionBenchError
from retention_bench.facts import Fact, object_ids, read_pool
from retention_bench.finetune.base import DataCheck, Example, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dropped import Dropped, Unusable
from retention_bench.finetune.sampling import draw, sample_validation
from retention_bench.finetune.settings import Metric, SampledSettings


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class CounterFactSettings(SampledSettings):
    """See `SampledSettings`; `source` is a fact pool, as `read_pool` reads it, and `threshold` is an accuracy."""

    @property
    def metric(self) -> Metric:
        """The accuracy."""
        return "validation_accuracy"

    @property
    def asks_base(self) -> bool:
        """It does."""
        return True


@dataclasses.dataclass(frozen=True)
class CounterFact:
    """The true object behind a fact's prompt, the paper's structured task.

    The loss is on the object's tokens alone, and a validation row is right where every one of them is the most
    probable. The validation rows are sampled from the training rows.
    """

    settings: CounterFactSettings
    name: ClassVar[str] = "counterfact"

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the pool; see `CheckedFinetune`."""
        settings = self.settings
        if not is_local(settings.source):
            return DataCheck(
                None, skipped=f"{settings.source} is looked into when the base model is asked for its facts"
            )
        pool = read_pool(settings.source, settings.revision, settings.config)
        if len(pool) < settings.train_size:
            raise RetentionBenchError(
                f"{settings.source} holds {len(pool)} facts, and train_size is {settings.train_size}. "
                "Lower train_size, or give more facts."
            )
        return DataCheck("a fact's prompt is read, and its true object trained on", rows=len(pool))

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the facts that the base model does not answer.

        Raises:
            RetentionBenchError: Fewer than `train_size` facts are left after filtering.
        """
        settings = self.settings
        tokenizer = context.tokenizer

        def encode(fact: Fact) -> list[Example]:
            prompt, answer = tokenizer.encode(fact.question), object_ids(fact.target_true, tokenizer)
            if len(prompt) + len(answer) > settings.max_length:  # a part of an object would count as the whole
                raise Unusable(f"do not fit into max_length {settings.max_length}")
            return [Example([*prompt, *answer], [-100] * len(prompt) + answer)]

        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        train = draw(
            ((f"fact {fact.id}", fact) for fact in rng.sample(context.unknown, len(context.unknown))),
            encode,
            text=lambda fact: f"{fact.question} {fact.target_true}",
            contamination=contamination,
            dropped=dropped,
            source=settings.source,
            setting="train_size",
            size=settings.train_size,
            what="facts that the base model does not answer",
        )
        validation = sample_validation(train, settings.validation_size, rng)
        return TuningData(train, validation, contamination.report(), dropped.report())
