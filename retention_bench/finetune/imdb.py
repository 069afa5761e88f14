"""Whether a film review is for or against its film: a linear head on the state of EOS (`stanfordnlp/imdb`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import pydantic

from retention_bench.finetune.base import Example, Metric, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.rows import Row, is_local, parse_text, shuffled_rows
from retention_bench.finetune.sampling import draw, origin
from retention_bench.finetune.settings import Count, Positive, Recipe, check_share
from retention_bench.finetune.texts import check_tokenizer, encode_class, parse_class


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class IMDB(Recipe):
    """Reviews with the label 0 (against) or 1 (for), the paper's classification task.

    A row is a review and EOS; a long review is cut at `max_length` tokens and EOS is kept. No training row has the
    tokens of a validation row. Of a Hub data set the training rows are from the split `train` and the validation rows
    from `test`; of a local file they are different rows.

    Attributes:
        source: A `.jsonl`, `.jsonl.gz` or `.parquet` file or a Hub data set id, with the columns `text` and `label`.
        train_size: Training rows, sampled by seed from the rows that pass the contamination filter. None for all of
            them: the paper's 25,000 are all that IMDB has, and some mention a fact.
        validation_size: Validation rows.
        threshold: The accuracy above which the run ends.
        max_steps: The run ends after this many optimiser steps in any case; the paper names no budget.
    """

    name: ClassVar[str] = "imdb"
    metric: ClassVar[Metric] = "validation_accuracy"
    classes: ClassVar[int | None] = 2
    asks_base: ClassVar[bool] = False

    batch_size: Count = 64
    eval_every: Count = 5
    train_size: Count | None = None
    validation_size: Count
    threshold: Positive
    max_steps: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.threshold)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the reviews.

        Raises:
            UsageError: The source does not exist, or the tokenizer has no EOS token.
            RetentionBenchError: A row is malformed, or too few rows are left after filtering.
        """
        check_tokenizer(context.tokenizer)
        columns: dict[str, Callable[[Any], Any]] = {"text": parse_text, "label": lambda cell: parse_class(cell, 2)}
        rng = random.Random(context.seed)
        contamination = ContaminationFilter(context.terms)
        taken: set[tuple[int, ...]] = set()

        def encode(row: Row) -> list[Example]:
            example = encode_class(context.tokenizer, row["text"], row["label"], self.max_length)
            return [] if tuple(example.input_ids) in taken else [example]

        def drawn(setting: str, size: int | None, lacking: str, what: str) -> list[Example]:
            return draw(
                rows,
                encode,
                text=lambda row: row["text"],
                contamination=contamination,
                source=self.source,
                setting=setting,
                size=size,
                lacking=lacking,
                what=what,
            )

        local = is_local(self.source)
        rows = shuffled_rows(origin(self, "train" if local else "test"), columns, rng)
        validation = drawn("validation_size", self.validation_size, "", "rows" if local else "rows in the split test")
        taken.update(tuple(example.input_ids) for example in validation)
        if not local:
            rows = shuffled_rows(origin(self, "train"), columns, rng)
        what = "rows besides those validated on" if local else "rows in the split train"
        train = drawn("train_size", self.train_size, "read like one that is validated on", what)
        return TuningData(train, validation, contamination.report())
