"""A user's own data set, without any code: `--finetune path:FILE_OR_HUB_ID`."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from retention_bench.finetune.base import DataCheck, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dataset_formats import FORMATS, DatasetFormat, encoder, labelled
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.sampling import draw, format_of, look, sample_validation, samples, words
from retention_bench.finetune.settings import Count, Metric, Positive, Size, TrainingSettings, check_sampled_validation

VALIDATION = 100
"""Validation rows where no `validation_size` is set and there are as many training rows."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class CustomSettings(TrainingSettings):
    """See `TrainingSettings`; all defaults are our choices, so that a data set can be named without a suite's entry.

    Attributes:
        train_size: Training rows, sampled by seed from the rows that pass the contamination filter; None for all.
        validation_size: Validation rows; None for `VALIDATION`, or all training rows where those are fewer.
        threshold: The value of the metric that ends the run; the default is the paper's for instruction tuning of
            GPT-2 XL. A model that begins beyond it is not trained, and the log says so.
        max_steps: The run ends after this many optimiser steps in any case.
        classes: How many labels there are, from 0 on; None where the data set is not one for classification. With
            classes the metric is the accuracy, and the threshold must be a share.
        stream: Whether a Hub data set is streamed instead of downloaded; see `Source.rows`. Needs a `train_size`.
    """

    batch_size: Count = 64
    train_size: Size | None = None
    validation_size: Size | None = None
    threshold: Positive = 1.7
    max_steps: Count = 1000
    classes: Annotated[int, Field(strict=True, ge=2, le=100_000)] | None = None
    stream: Annotated[bool, Field(strict=True)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_size is not None and self.validation_size is not None:
            check_sampled_validation(self.train_size, self.validation_size)
        if self.train_size is None and self.stream:
            raise ValueError("a streamed data set needs a train_size, which says when there are enough rows")

    @property
    def metric(self) -> Metric:
        """The accuracy for a data set with classes, the loss for the others."""
        return "validation_loss" if self.classes is None else "validation_accuracy"


@dataclasses.dataclass(frozen=True)
class Custom:
    """Whatever a data set's columns ask for, as in TRL.

    `messages` are chats, with the loss on the assistant's turns, and so are ShareGPT's `conversations` and Alpaca's
    `instruction`, `input` and `output`; `prompt` and `completion` are texts, with the loss on the completion and the
    EOS behind it, or messages; `text` is modelled as it is, with EOS at its end. A data set with the columns of several
    formats is read in the first of `FORMATS`. With `classes` set, `text` and `label` are classified like IMDB's. The
    split of a Hub data set is `train`. The validation rows are sampled from the training rows.
    """

    settings: CustomSettings
    name: ClassVar[str] = "path"

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the rows; see `CheckedFinetune`."""
        settings = self.settings
        size = settings.train_size or settings.validation_size
        setting = "train_size" if settings.train_size else "validation_size"
        return look(settings, self._formats, tokenizer, size=size, setting=setting, also=self._also)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the rows.

        Raises:
            UsageError: The source does not exist, its columns are none of those above, or the tokenizer cannot be used.
            RetentionBenchError: A row is malformed, or too few rows are left after filtering.
        """
        settings = self.settings
        encode = encoder(context.tokenizer, settings.max_length)
        data_format = format_of(settings, self._formats, stream=settings.stream, also=self._also)
        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        train = draw(
            samples(settings, data_format, rng, dropped, stream=settings.stream),
            encode,
            text=words,
            contamination=contamination,
            dropped=dropped,
            source=settings.source,
            setting="train_size",
            size=settings.train_size,
        )
        size = min(VALIDATION, len(train)) if settings.validation_size is None else settings.validation_size
        validation = sample_validation(train, size, rng)
        return TuningData(train, validation, contamination.report(), dropped.report())

    @property
    def _formats(self) -> Sequence[DatasetFormat]:
        return FORMATS if self.settings.classes is None else [labelled(self.settings.classes)]

    @property
    def _also(self) -> str:
        return "; or text + label, with the setting classes" if self.settings.classes is None else ""
