"""The settings that all tasks have, checked once."""

from __future__ import annotations

import errno
import os
import re
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from retention_bench.data import is_local
from retention_bench.finetune.dropped import shown

# The upper limits of counts are far beyond what anybody trains with, and keep a typing error from taking all memory.
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Size = Annotated[int, Field(strict=True, ge=1, le=100_000_000)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

MOST_ROWS = 100_000_000
"""Rows that all steps of a run together may have: they are put in order before the first."""

Metric = Literal["validation_loss", "validation_accuracy"]
"""What ends a run: the mean loss of a target token in nats, once it is below the threshold; or the share of validation
rows whose every target is the most probable token or class, once it is above."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a task's rows are trained on; the paper's numbers are the defaults where it has the same for all tasks.

    A task adds its own settings in a subclass. They stand side by side in a suite.

    Attributes:
        source: A local file or a Hub data set id.
        revision: The Hub data set's revision; pin it.
        config: The Hub data set's configuration.
        batch_size: Rows in an optimiser step.
        micro_batch_size: Rows in a forward pass; divides `batch_size`, or is larger and then does not matter. It
            changes memory and speed, and the weights by rounding only.
        lr: Learning rate, constant.
        weight_decay: AdamW's weight decay; biases and norms are not decayed.
        betas: AdamW's betas.
        max_length: Tokens of a row that count; the rest is cut off.
        eval_every: Optimiser steps between two evaluations.
        threshold: The value of the metric that ends the run. It depends on the model and has no default.
        max_steps: The run ends after this many optimiser steps in any case; the paper names no budget.
        adapter_rank: Rank of LoRA and DoRA adapters. This and the two below are our choices.
        adapter_alpha: Their change is scaled by alpha over the rank.
        adapter_lr: Their learning rate.
    """

    source: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"\S")] | None = None
    config: Annotated[str, Field(pattern=r"\S")] | None = None
    batch_size: Count = 256
    micro_batch_size: Count = 8
    lr: Positive = 2e-5
    weight_decay: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    max_length: Annotated[int, Field(strict=True, ge=2, le=10_000_000)] = 1024
    eval_every: Count = 20
    threshold: Positive
    max_steps: Count
    adapter_rank: Annotated[int, Field(strict=True, ge=1, le=16_384)] = 16
    adapter_alpha: Count = 32
    adapter_lr: Positive = 2e-4

    def __post_init__(self) -> None:
        _check_source(self.source)
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.batch_size * self.max_steps > MOST_ROWS:
            raise ValueError(
                f"batch_size {self.batch_size:,} times max_steps {self.max_steps:,} is more than {MOST_ROWS:,}, the "
                "most rows of a run"
            )
        if self.metric == "validation_accuracy" and self.threshold >= 1:
            raise ValueError(
                f"threshold {self.threshold:g} is not below 1: it is a share of rows, which a run ends above"
            )

    @property
    def metric(self) -> Metric:
        """What the stop rule compares with the threshold; a task may have another one."""
        return "validation_loss"

    @property
    def classes(self) -> int | None:
        """For a classification task, how many classes a linear head on the last token's state tells apart.

        None for the others: they train the model's own head.
        """
        return None

    @property
    def asks_base(self) -> bool:
        """Whether the source is a fact pool, and the rows are the facts in it that the base model does not answer."""
        return False


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSettings(TrainingSettings):
    """Settings of a task whose validation rows are sampled from its training rows.

    Attributes:
        train_size: Training rows, sampled by seed from the rows that pass the contamination filter.
        validation_size: Validation rows.
    """

    train_size: Size
    validation_size: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled_validation(self.train_size, self.validation_size)


def _check_source(source: str) -> None:
    """Refuse what is neither a path nor a Hub id; whether there is something is found out later.

    Raises:
        ValueError: It is neither.
    """
    try:
        os.stat(os.path.expanduser(source))
    except ValueError as error:  # NUL
        raise ValueError(f"source is no path: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"source is no path: {error.strerror}") from error
    if not is_local(source) and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", source, re.ASCII):
        raise ValueError(f"source is neither a file nor a Hub data set id (owner/name): {shown(source)}")


def check_sampled_validation(train_size: int, validation_size: int) -> None:
    """Refuse more validation rows than there are training rows that they are sampled from.

    Raises:
        ValueError: There are.
    """
    if validation_size > train_size:
        raise ValueError(
            f"validation_size {validation_size} is larger than train_size {train_size}, "
            "and the validation rows are sampled from the training rows"
        )
