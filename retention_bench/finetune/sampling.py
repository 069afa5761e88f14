"""Drawing the rows that a task trains and validates on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from retention_bench.data import Source
from retention_bench.errors import RetentionBenchError
from retention_bench.finetune.base import DataCheck, Example
from retention_bench.finetune.contamination import LOOK, ContaminationFilter
from retention_bench.finetune.dataset_formats import DatasetFormat, Sample, encoder, find_format
from retention_bench.finetune.dropped import Copies, Dropped, Unusable, described
from retention_bench.finetune.rows import first_rows, shuffled_rows
from retention_bench.finetune.settings import TrainingSettings

T = TypeVar("T")


def source_of(settings: TrainingSettings, split: str = "train", *, stream: bool = False) -> Source:
    """Where a task's rows come from."""
    return Source(settings.source, settings.revision, settings.config, split, stream)


def format_of(
    settings: TrainingSettings, formats: Sequence[DatasetFormat], *, stream: bool = False, also: str = ""
) -> DatasetFormat:
    """The format of a task's data set; see `find_format`."""
    return find_format(settings.source, source_of(settings, stream=stream).columns(), formats, also)


def samples(
    settings: TrainingSettings,
    data_format: DatasetFormat,
    rng: random.Random,
    dropped: Dropped,
    *,
    split: str = "train",
    stream: bool = False,
) -> Iterator[tuple[str, Sample]]:
    """What can be trained on in a data set's rows, with where each stands, in an order drawn at random.

    Args:
        settings: The task.
        data_format: The format of its rows.
        rng: Source of chance.
        dropped: Counts the rows that are left out.
        split: The Hub data set's split.
        stream: Whether a Hub data set is streamed; see `Source.rows` for what is then sampled.
    """
    source = source_of(settings, split, stream=stream)
    rows = shuffled_rows(source, data_format.columns, rng, dropped, optional=data_format.optional)
    for place, row in rows:
        try:
            sample = data_format.sample(row)
        except Unusable as error:
            dropped.count(place, error)
        else:
            yield place, sample


def words(sample: Sample) -> str:
    """All words of a sample, for the contamination filter."""
    return sample.words


def draw(
    rows: Iterable[tuple[str, T]],
    encode: Callable[[T], Sequence[Example]],
    *,
    text: Callable[[T], str],
    contamination: ContaminationFilter,
    dropped: Dropped,
    source: object,
    setting: str,
    size: int | None,
    what: str = "rows",
    unit: str = "",
) -> list[Example]:
    """Take rows in their order, without those that mention a fact, until there are enough examples.

    The contamination filter looks at the first `LOOK` of them before; at `size` where that is fewer, as no fewer are
    needed where a row makes one example.

    Args:
        rows: Where a row stands and the row, in the order they are drawn; no more are asked for than are needed.
        encode: Makes the examples of a row, or raises `Unusable`.
        text: What of a row the contamination filter reads.
        contamination: The filter.
        dropped: Counts the rows that are left out; it may have counted some of `rows` before they come here.
        source: What the rows are from, for the error.
        setting: The setting that says how many examples are wanted, for the error.
        size: How many are; None for all there are.
        what: What the rows are called there.
        unit: What follows the number of examples there, with a space before it.

    Returns:
        `size` examples, or one or more where that is None.

    Raises:
        RetentionBenchError: There are too few.
    """
    drawn: list[Example] = []
    seen, before = 0, contamination.report().removed
    dropped_before = dropped.rows
    rows = iter(rows)
    first = list(itertools.islice(rows, LOOK if size is None else min(LOOK, size)))
    contamination.look(text(row) for _, row in first)
    rows = itertools.chain(first, rows)
    for place, row in rows:
        if contamination.passes(text(row)):
            try:
                drawn += encode(row)
                seen += 1
            except Unusable as error:
                dropped.count(place, error)
        else:
            seen += 1
        if size is not None and len(drawn) >= size:
            return drawn[:size]
    if size is None and drawn:
        return drawn
    seen += dropped.rows - dropped_before
    left_out = described(dropped.report())
    wanted = "one at least is needed" if size is None else f"{setting} is {size}"
    remedy = "Give more rows" if size is None else f"Lower {setting}, or give more rows"
    raise RetentionBenchError(
        f"{source} holds {seen} {what}; {contamination.report().removed - before} of them mention an edited or "
        f"intrinsic fact{f', {left_out}' if left_out else ''}. That leaves {len(drawn)}{unit}, and {wanted}. {remedy}."
    )


def check_differ(copies: Copies, rows: int, source: object) -> None:
    """Refuse rows that are all the same one: a run would train on it alone, and be judged by it alone.

    Args:
        copies: Saw all the rows.
        rows: Those that can be trained on, without copies.
        source: What the rows are from, for the error.

    Raises:
        RetentionBenchError: They are.
    """
    if rows == 1 and copies.rows:
        raise RetentionBenchError(
            f"{source} holds one row, {1 + copies.rows} times: nothing but that row could be learned, and the stop "
            "rule would see nothing else. Give rows that differ."
        )


TRIED = 50
"""Rows that a first look tokenises."""


def look(
    settings: TrainingSettings,
    formats: Sequence[DatasetFormat],
    tokenizer: Any,
    *,
    size: int | None = None,
    setting: str = "train_size",
    also: str = "",
    distinct: bool = False,
) -> DataCheck:
    """Look into a task's data before anything else is computed.

    A local file is read whole, and its first rows are tokenised: `TRIED`, or more until one can be used. Of a Hub data
    set the first rows are streamed, where the Hub can be reached.

    Args:
        settings: The task.
        formats: The formats that its rows may have.
        tokenizer: The model's tokenizer.
        size: How many rows are needed, where a row makes one example.
        setting: The setting that says so, for the error.
        also: As in `find_format`.
        distinct: Whether copies of a row count once.

    Raises:
        UsageError: The tokenizer or the columns cannot be used.
        RetentionBenchError: The data cannot be read, no row can be used, or there are too few.
    """
    encode, dropped, source = encoder(tokenizer, settings.max_length), Dropped(), source_of(settings, stream=True)
    if reason := source.unreachable():
        return DataCheck(None, skipped=f"{settings.source} is looked into when the fine-tune begins: {reason}")
    data_format = format_of(settings, formats, stream=True, also=also)
    local = source.is_local
    rows = tried = usable = longest = 0
    copies = Copies()
    for place, row in first_rows(source, data_format.columns, dropped, optional=data_format.optional, hub=TRIED):
        rows += 1
        enough = tried >= TRIED and usable > 0
        if enough and not distinct:
            continue
        tried += not enough
        try:
            sample = data_format.sample(row)
            examples = [] if enough else encode(sample)
            if distinct:
                if examples:
                    copies.refuse(examples)
                copies.refuse(sample)
        except Unusable as error:
            dropped.count(place, error)
            rows -= 1
            continue
        usable += not enough
        longest = max([longest, *(len(example.input_ids) for example in examples)])
    if not usable or (local and size is not None and rows < size):
        left_out, there = described(dropped.report()), rows + dropped.rows
        wanted = f"{setting} is {size}" if usable else "one at least is needed"
        raise RetentionBenchError(
            f"{settings.source}: {data_format.reads}; of {'' if local else 'the first '}{there} rows {rows or 'none'} "
            f"can be trained on, and {wanted}. {f'Left out: {left_out}. ' if left_out else ''}Correct that, or "
            "give others."
        )
    if local:
        check_differ(copies, rows, settings.source)
    return DataCheck(
        data_format.reads,
        rows=rows if local else None,
        tried=tried,
        usable=usable,
        dropped=dropped.report(),
        longest=longest,
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
