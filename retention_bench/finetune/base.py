"""What a fine-tune is: a task's rows, and how they are trained on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from retention_bench.data import is_local
from retention_bench.errors import UsageError
from retention_bench.facts import Fact
from retention_bench.finetune.contamination import Removed, Terms
from retention_bench.finetune.dropped import Drop, to_json
from retention_bench.finetune.settings import TrainingSettings

CUSTOM = "path"
"""The task on a user's own data set."""


class Example(NamedTuple):
    """One tokenised row.

    Attributes:
        input_ids: Token ids.
        labels: As long as `input_ids`: the token's own id where it counts in the loss, else -100. The shift by one
            position is the model's business. For a task with classes the row's class alone.
    """

    input_ids: list[int]
    labels: list[int]


@dataclasses.dataclass(frozen=True)
class TuningContext:
    """What a task is handed to prepare its rows with.

    Attributes:
        tokenizer: The model's fast tokenizer; left as it is.
        terms: What no row may mention.
        seed: Decides which rows are drawn, and in which order.
        unknown: For a task that `asks_base`, those of the facts in its source that the base model does not answer.
    """

    tokenizer: Any
    terms: Terms
    seed: int
    unknown: Sequence[Fact] = ()


@dataclasses.dataclass(frozen=True)
class TuningData:
    """What a task trains and validates on.

    Attributes:
        train: The training rows.
        validation: The validation rows; whether they are training rows too is the task's protocol.
        removed: What the contamination filter took out.
        dropped: Rows that were left out since nothing in them can be trained on, by reason.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    removed: Removed
    dropped: Mapping[str, Drop] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What a first look into a task's data found.

    Attributes:
        reads: What is read as what, in words; None where the data could not be looked into.
        skipped: Why not, in words.
        rows: The rows there are, without those of another format; None where that is not known.
        tried: Rows that were tokenised.
        usable: Those of them that can be trained on.
        dropped: The rows that cannot, of all that were looked at, by reason.
        longest: Tokens of the longest row that was tokenised.
    """

    reads: str | None
    skipped: str | None = None
    rows: int | None = None
    tried: int = 0
    usable: int = 0
    dropped: Mapping[str, Drop] = dataclasses.field(default_factory=dict)
    longest: int = 0

    def to_json(self) -> dict[str, Any]:
        """The finding as plain JSON values."""
        return {**dataclasses.asdict(self), "dropped": to_json(self.dropped)}


class Finetune(Protocol):
    """A downstream task: what its rows are, and how they are trained on."""

    @property
    def name(self) -> str:
        """The task's name in the registry."""

    @property
    def settings(self) -> TrainingSettings:
        """The settings; of a subclass where the task has more of its own."""

    def prepare(self, context: TuningContext) -> TuningData:
        """Read, filter, sample and tokenise the rows; the same for the same arguments."""


@runtime_checkable
class CheckedFinetune(Protocol):
    """A task that can look into its data before anything else is computed; others find out when they prepare it."""

    def check(self, tokenizer: Any) -> DataCheck:
        """Read the first rows.

        Raises:
            RetentionBenchError: The data, or the tokenizer for it, cannot be used.
        """


def parse_finetune(text: str) -> tuple[str, dict[str, Any]]:
    """Read a fine-tune as it is named on the command line.

    Args:
        text: A task's name; or `path:` and a local file or a Hub data set id, this with `@` and its revision.

    Returns:
        The task's name, and the settings that go over the suite's for it: none, or the task `path` with its `source`,
        a file's made absolute, and a Hub data set's `revision`.

    Raises:
        UsageError: `path:` has no data set behind it.
    """
    kind, colon, source = text.partition(":")
    if kind != CUSTOM or not colon:
        return text, {}
    if not source:
        raise UsageError(f"{text!r} names no data set. Give {CUSTOM}:FILE or {CUSTOM}:OWNER/NAME@REVISION.")
    if is_local(source):
        return CUSTOM, {"source": os.path.abspath(os.path.expanduser(source))}
    source, _, revision = source.partition("@")
    return CUSTOM, {"source": source, **({"revision": revision} if revision else {})}
