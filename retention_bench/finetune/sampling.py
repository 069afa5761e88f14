"""Drawing the rows that a task trains and validates on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from retention_bench.errors import RetentionBenchError
from retention_bench.finetune.base import Example
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.rows import Origin
from retention_bench.finetune.settings import Recipe

T = TypeVar("T")


def origin(settings: Recipe, split: str = "train") -> Origin:
    """Where a task's rows come from."""
    return Origin(settings.source, settings.revision, settings.config, split)


def draw(
    rows: Iterable[T],
    encode: Callable[[T], Sequence[Example]],
    *,
    text: Callable[[T], str],
    contamination: ContaminationFilter,
    source: object,
    setting: str,
    size: int | None,
    lacking: str,
    what: str = "rows",
    unit: str = "",
) -> list[Example]:
    """Take rows in their order, without those that mention a fact, until there are enough examples.

    Args:
        rows: The rows, in the order they are drawn; no more of them are asked for than are needed.
        encode: Makes the examples of a row; none where nothing of it can be trained on.
        text: What of a row the contamination filter reads.
        contamination: The filter.
        source: What the rows are from, for the error.
        setting: The setting that says how many examples are wanted, for the error.
        size: How many are; None for all there are.
        lacking: What is true of the rows that `encode` makes nothing of, for the error: "have no ...".
        what: What the rows are called there.
        unit: What follows the number of examples there, with a space before it.

    Returns:
        `size` examples, or one or more where that is None.

    Raises:
        RetentionBenchError: There are too few.
    """
    drawn: list[Example] = []
    seen = empty = 0
    removed_before = contamination.report().removed
    for row in rows:
        seen += 1
        if not contamination.passes(text(row)):
            continue
        examples = encode(row)
        empty += not examples
        drawn += examples
        if size is not None and len(drawn) >= size:
            return drawn[:size]
    if size is None and drawn:
        return drawn
    removed = contamination.report().removed - removed_before
    nothing = f" and {empty} {lacking}" if lacking else ""
    wanted = "one at least is needed" if size is None else f"{setting} is {size}"
    remedy = "Give more rows" if size is None else f"Lower {setting}, or give more rows"
    raise RetentionBenchError(
        f"{source} holds {seen} {what}; {removed} of them mention an edited or intrinsic fact{nothing}. That leaves "
        f"{len(drawn)}{unit}, and {wanted}. {remedy}."
    )


def sample_validation(train: Sequence[Example], size: int, rng: random.Random) -> list[Example]:
    """Sample validation rows that are training rows too, as in the paper ("10,000 / 1,000 (from train)").

    The stop rule then says how well the model has learned its task, not how well it generalises.

    Raises:
        RetentionBenchError: There are fewer training rows.
    """
    if size > len(train):
        raise RetentionBenchError(
            f"validation_size is {size}, and there are {len(train)} training rows to sample the validation rows from. "
            "Lower validation_size, or give more rows."
        )
    return rng.sample(train, size)
