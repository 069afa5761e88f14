"""A user's own data set, without any code: `--finetune path:FILE_OR_HUB_ID`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from retention_bench.finetune.base import DataCheck, Example, Metric, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dropped import Copies, Dropped
from retention_bench.finetune.forms import FORMS, Form, Sample, encoder, labelled
from retention_bench.finetune.sampling import check_differ, draw, form_of, look, sample_validation, samples, words
from retention_bench.finetune.settings import (
    Count,
    Positive,
    Recipe,
    Size,
    check_sampled_validation,
    check_share,
    check_steps,
)

VALIDATION = 100
"""Validation rows where no `validation_size` is set and there are as many training rows."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Custom(Recipe):
    """Whatever a data set's columns ask for, as in TRL.

    `messages` are chats, with the loss on the assistant's turns, and so are ShareGPT's `conversations` and Alpaca's
    `instruction`, `input` and `output`; `prompt` and `completion` are texts, with the loss on the completion and the
    EOS behind it, or messages; `text` is modelled as it stands, with EOS at its end. A data set with several of these
    is taken for the first of `FORMS`. With `classes` set, `text` and `label` are classified like IMDB's.

    The validation rows are sampled from the training rows. A row that is there several times counts once, and a file
    of copies of one row is refused. All defaults but those of `Recipe` are own choices, so that a data set can be named
    without a suite's entry.

    Attributes:
        source: A `.jsonl`, `.json` or `.parquet` file or a Hub data set id (its split `train`).
        train_size: Training rows, sampled by seed from the rows that pass the contamination filter; None for all.
        validation_size: Validation rows; None for `VALIDATION`, or all training rows where those are fewer.
        threshold: The value of the metric that ends the run; the default is the paper's for instruction tuning of
            GPT-2 XL. A model that begins beyond it is not trained, and the log says so.
        max_steps: The run ends after this many optimiser steps in any case.
        classes: How many labels there are, from 0 on; None where the data set is not one for classification. With
            classes the metric is the accuracy, and the threshold must be a share.
        stream: Whether a Hub data set is streamed instead of downloaded; see `shuffled_rows`. Needs a `train_size`.
    """

    name: ClassVar[str] = "path"
    asks_base: ClassVar[bool] = False

    batch_size: Count = 64
    train_size: Size | None = None
    validation_size: Size | None = None
    threshold: Positive = 1.7
    max_steps: Count = 1000
    classes: Annotated[int, Field(strict=True, ge=2, le=100_000)] | None = None
    stream: Annotated[bool, Field(strict=True)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.batch_size, self.max_steps)
        if self.classes is not None:
            check_share(self.threshold)
        if self.train_size is not None and self.validation_size is not None:
            check_sampled_validation(self.train_size, self.validation_size)
        if self.train_size is None and self.stream:
            raise ValueError("a streamed data set needs a train_size, which says when there are enough rows")

    @property
    def metric(self) -> Metric:
        """The accuracy for a data set with classes, the loss for the others."""
        return "validation_loss" if self.classes is None else "validation_accuracy"

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the rows; see `CheckedFinetune`."""
        size = self.train_size or self.validation_size
        setting = "train_size" if self.train_size else "validation_size"
        return look(self, self._forms, tokenizer, size=size, setting=setting, also=self._also, distinct=True)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the rows.

        Raises:
            UsageError: The source does not exist, its columns are none of those above, or the tokenizer cannot be used.
            RetentionBenchError: A row is malformed, or too few rows are left after filtering.
        """
        encode = encoder(context.tokenizer, self.max_length)
        form = form_of(self, self._forms, stream=self.stream, also=self._also)
        rng = random.Random(context.seed)
        contamination, dropped, copies = ContaminationFilter(context.terms), Dropped(), Copies()

        def encode_new(sample: Sample) -> list[Example]:
            examples = encode(sample)
            copies.refuse(examples)
            return examples

        train = draw(
            samples(self, form, rng, dropped, stream=self.stream),
            encode_new,
            text=words,
            contamination=contamination,
            dropped=dropped,
            source=self.source,
            setting="train_size",
            size=self.train_size,
        )
        if self.train_size is None:
            check_differ(copies, len(train), self.source)
        size = min(VALIDATION, len(train)) if self.validation_size is None else self.validation_size
        validation = sample_validation(train, size, rng)
        return TuningData(train, validation, contamination.report(), dropped.report())

    @property
    def _forms(self) -> Sequence[Form]:
        return FORMS if self.classes is None else [labelled(self.classes)]

    @property
    def _also(self) -> str:
        return "; or text + label, with the setting classes" if self.classes is None else ""
