"""A user's own data set, without any code: `--finetune path:FILE_OR_HUB_ID`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import pydantic
from pydantic import Field

from retention_bench.errors import UsageError
from retention_bench.finetune.base import Example, Metric, TuningContext, TuningData
from retention_bench.finetune.chats import chat_template, chat_text, encode_chat, parse_messages
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.rows import Columns, Row, column_names, parse_text, shuffled_rows
from retention_bench.finetune.sampling import draw, origin, sample_validation
from retention_bench.finetune.settings import Count, Positive, Recipe, check_sampled_validation, check_share
from retention_bench.finetune.texts import check_tokenizer, encode_class, encode_completion, encode_text, parse_class

VALIDATION = 100
"""Validation rows where no `validation_size` is set and there are as many training rows."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Custom(Recipe):
    """Whatever a data set's columns ask for, as in TRL.

    `messages` are chats, with the loss on the assistant's turns; `prompt` and `completion` are texts, with the loss on
    the completion and the EOS behind it; `text` is modelled as it stands, with EOS at its end. A data set with several
    of these is taken for the first. With `classes` set, `text` and `label` are classified like IMDB's.

    The validation rows are sampled from the training rows. All defaults but those of `Recipe` are own choices, so that
    a data set can be named without a suite's entry.

    Attributes:
        source: A `.jsonl`, `.jsonl.gz` or `.parquet` file or a Hub data set id (its split `train`).
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
    train_size: Count | None = None
    validation_size: Count | None = None
    threshold: Positive = 1.7
    max_steps: Count = 1000
    classes: Annotated[int, Field(strict=True, ge=2)] | None = None
    stream: Annotated[bool, Field(strict=True)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the rows.

        Raises:
            UsageError: The source does not exist, its columns are none of those above, or the tokenizer cannot be used.
            RetentionBenchError: A row is malformed, or too few rows are left after filtering.
        """
        kind = self._kind(context.tokenizer)
        rng = random.Random(context.seed)
        contamination = ContaminationFilter(context.terms)
        train = draw(
            shuffled_rows(origin(self), kind.columns, rng, stream=self.stream),
            kind.encode,
            text=kind.text,
            contamination=contamination,
            source=self.source,
            setting="train_size",
            size=self.train_size,
            lacking=kind.lacking,
        )
        size = min(VALIDATION, len(train)) if self.validation_size is None else self.validation_size
        return TuningData(train, sample_validation(train, size, rng), contamination.report())

    def _kind(self, tokenizer: Any) -> _Kind:
        names = column_names(origin(self), stream=self.stream)
        if self.classes is not None:
            return _classified(tokenizer, self.classes, self.max_length)
        for columns, kind in _KINDS.items():
            if set(columns) <= set(names):
                return kind(tokenizer, self.max_length)
        allowed = ", ".join(" + ".join(columns) for columns in _KINDS)
        raise UsageError(
            f"{self.source} has the columns {', '.join(names)}, and a data set to train on has one of: {allowed}; or "
            "text + label with the setting `classes`. Rename its columns."
        )


class _Kind(NamedTuple):
    """What is made of a data set's rows."""

    columns: Columns
    encode: Callable[[Row], list[Example]]
    text: Callable[[Row], str]
    lacking: str = ""


def _chats(tokenizer: Any, max_length: int) -> _Kind:
    template = chat_template(tokenizer)
    return _Kind(
        {"messages": parse_messages},
        lambda row: encode_chat(tokenizer, template, row["messages"], max_length),
        lambda row: chat_text(row["messages"]),
        f"have no assistant's words within max_length {max_length}",
    )


def _completions(tokenizer: Any, max_length: int) -> _Kind:
    check_tokenizer(tokenizer, fast=True)
    return _Kind(
        {"prompt": parse_text, "completion": parse_text},
        lambda row: encode_completion(tokenizer, row["prompt"], row["completion"], max_length),
        lambda row: row["prompt"] + row["completion"],
        f"have no part of the completion within max_length {max_length}",
    )


def _texts(tokenizer: Any, max_length: int) -> _Kind:
    check_tokenizer(tokenizer)

    def encode(row: Row) -> list[Example]:
        ids = encode_text(tokenizer, row["text"])[:max_length]
        return [Example(ids, ids)]

    return _Kind({"text": parse_text}, encode, lambda row: row["text"])


def _classified(tokenizer: Any, classes: int, max_length: int) -> _Kind:
    check_tokenizer(tokenizer)
    return _Kind(
        {"text": parse_text, "label": lambda cell: parse_class(cell, classes)},
        lambda row: [encode_class(tokenizer, row["text"], row["label"], max_length)],
        lambda row: row["text"],
    )


_KINDS: dict[tuple[str, ...], Callable[[Any, int], _Kind]] = {
    ("messages",): _chats,
    ("prompt", "completion"): _completions,
    ("text",): _texts,
}
