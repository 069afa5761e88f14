"""Instruction tuning on chats in the format of the Tulu-3 SFT mixture (`allenai/tulu-3-sft-mixture`)."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pydantic

from retention_bench.finetune.base import DataCheck, Metric, TuningContext, TuningData
from retention_bench.finetune.chats import chat_template
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dataset_formats import CHATS, encoder
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.sampling import draw, format_of, look, sample_validation, samples, words
from retention_bench.finetune.settings import Count, Settings, check_sampled_validation


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Tulu3(Settings):
    """Chat SFT; the loss is on the assistant's turns alone, as in open-instruct, Tulu 3's own training code.

    The validation rows are sampled from the training rows. A Hub data set is downloaded, not streamed: the mixture's
    rows stand sorted by origin, and a stream would sample the first origins only.

    Attributes:
        source: A data file (see `Source`) or a Hub data set id, with a column `messages` or another format of
            `CHATS`.
    """

    name: ClassVar[str] = "tulu3"
    metric: ClassVar[Metric] = "validation_loss"
    classes: ClassVar[int | None] = None
    asks_base: ClassVar[bool] = False

    batch_size: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled_validation(self.train_size, self.validation_size)

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the chats; see `CheckedFinetune`."""
        chat_template(tokenizer)
        return look(self, CHATS, tokenizer, size=self.train_size)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the chats.

        Raises:
            UsageError: The source does not exist, or the tokenizer cannot be used.
            RetentionBenchError: The data cannot be read, or fewer than `train_size` rows are left after filtering.
        """
        encode, data_format = encoder(context.tokenizer, self.max_length), format_of(self, CHATS)
        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        train = draw(
            samples(self, data_format, rng, dropped),
            encode,
            text=words,
            contamination=contamination,
            dropped=dropped,
            source=self.source,
            setting="train_size",
            size=self.train_size,
        )
        validation = sample_validation(train, self.validation_size, rng)
        return TuningData(train, validation, contamination.report(), dropped.report())
