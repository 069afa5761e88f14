"""Instruction tuning on chats in the format of the Tulu-3 SFT mixture (`allenai/tulu-3-sft-mixture`)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, ClassVar

import pydantic

from retention_bench.finetune.base import DataCheck, TuningContext, TuningData
from retention_bench.finetune.chats import chat_template
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dataset_formats import CHATS, encoder
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.sampling import draw, format_of, look, sample_validation, samples, words
from retention_bench.finetune.settings import Count, SampledSettings


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Tulu3Settings(SampledSettings):
    """See `SampledSettings`; `source` has a column `messages`, or another format of `CHATS`."""

    batch_size: Count = 64


@dataclasses.dataclass(frozen=True)
class Tulu3:
    """Chat SFT; the loss is on the assistant's turns alone, as in open-instruct, Tulu 3's own training code.

    The validation rows are sampled from the training rows. A Hub data set is downloaded, not streamed: the mixture's
    rows are sorted by origin, and a stream would sample the first origins only.
    """

    settings: Tulu3Settings
    name: ClassVar[str] = "tulu3"

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the chats; see `CheckedFinetune`."""
        settings = self.settings
        chat_template(tokenizer)
        return look(settings, CHATS, tokenizer, size=settings.train_size)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the chats.

        Raises:
            UsageError: The source does not exist, or the tokenizer cannot be used.
            RetentionBenchError: The data cannot be read, or fewer than `train_size` rows are left after filtering.
        """
        settings = self.settings
        encode, data_format = encoder(context.tokenizer, settings.max_length), format_of(settings, CHATS)
        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        train = draw(
            samples(settings, data_format, rng, dropped),
            encode,
            text=words,
            contamination=contamination,
            dropped=dropped,
            source=settings.source,
            setting="train_size",
            size=settings.train_size,
        )
        validation = sample_validation(train, settings.validation_size, rng)
        return TuningData(train, validation, contamination.report(), dropped.report())
