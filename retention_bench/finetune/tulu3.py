"""Instruction tuning on chats in the form of the Tulu-3 SFT mixture (`allenai/tulu-3-sft-mixture`)."""

from __future__ import annotations

import random
from typing import ClassVar

import pydantic

from retention_bench.finetune.base import Metric, TuningContext, TuningData
from retention_bench.finetune.chats import chat_template, chat_text, encode_chat, parse_messages
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.rows import shuffled_rows
from retention_bench.finetune.sampling import draw, origin, sample_validation
from retention_bench.finetune.settings import Count, Settings, check_sampled_validation


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Tulu3(Settings):
    """Chat SFT; the loss is on the assistant's turns alone, as in open-instruct, Tulu 3's own training code.

    The validation rows are sampled from the training rows. A Hub data set is downloaded, not streamed: the mixture's
    rows stand sorted by origin, and a stream would sample the first origins only.

    Attributes:
        source: A `.jsonl`, `.jsonl.gz` or `.parquet` file or a Hub data set id, with a column `messages`.
    """

    name: ClassVar[str] = "tulu3"
    metric: ClassVar[Metric] = "validation_loss"
    classes: ClassVar[int | None] = None
    asks_base: ClassVar[bool] = False

    batch_size: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled_validation(self.train_size, self.validation_size)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the chats.

        Raises:
            UsageError: The source does not exist, or the tokenizer cannot be used.
            RetentionBenchError: A row is malformed, or fewer than `train_size` rows are left after filtering.
        """
        template = chat_template(context.tokenizer)
        rng = random.Random(context.seed)
        contamination = ContaminationFilter(context.terms)
        train = draw(
            shuffled_rows(origin(self), {"messages": parse_messages}, rng),
            lambda row: encode_chat(context.tokenizer, template, row["messages"], self.max_length),
            text=lambda row: chat_text(row["messages"]),
            contamination=contamination,
            source=self.source,
            setting="train_size",
            size=self.train_size,
            lacking=f"have no assistant's words within max_length {self.max_length}",
        )
        return TuningData(train, sample_validation(train, self.validation_size, rng), contamination.report())
