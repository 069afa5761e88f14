"""What a fine-tune is, and the registry of them: built-in tasks and those of other packages."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import pydantic

from retention_bench.data import is_local, shortened
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.facts import Fact
from retention_bench.finetune.contamination import Removed, Terms
from retention_bench.finetune.dropped import Drop, to_json

ENTRY_POINTS = "retention_bench.finetunes"
ADAPTERS = ("none", "lora", "dora")
"""What can be trained in the weights' place."""

CUSTOM = "path"
"""The task on a user's own data set."""

# One line registers a task. The module is imported when the task is made, not before.
BUILT_IN = {
    "commoncrawl": "retention_bench.finetune.commoncrawl:CommonCrawl",
    "counterfact": "retention_bench.finetune.counterfact:CounterFact",
    "imdb": "retention_bench.finetune.imdb:IMDB",
    "path": "retention_bench.finetune.custom:Custom",
    "tulu3": "retention_bench.finetune.tulu3:Tulu3",
}


Metric = Literal["validation_loss", "validation_accuracy"]
"""What the stop rule looks at: the mean loss of a target token or row in nats, which ends a run when it is below the
threshold; or the share of validation rows whose every target is the most probable one, which does when it is above."""


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
    """A downstream task: a frozen dataclass whose fields are plain settings, and its data.

    `train` reads the settings below and calls `prepare` once. `Settings` has all of them but the first four.
    """

    @property
    def name(self) -> str:
        """The task's name in suites and results."""

    @property
    def metric(self) -> Metric:
        """What the stop rule looks at."""

    @property
    def classes(self) -> int | None:
        """How many outputs a linear head on the last token's state has; None: trained is the model's own head."""

    @property
    def asks_base(self) -> bool:
        """Whether the source is a fact pool, and the rows are its facts that the base model does not answer."""

    @property
    def source(self) -> str:
        """Where the rows come from: a local file or a Hub data set id."""

    @property
    def revision(self) -> str | None:
        """The Hub data set's revision."""

    @property
    def config(self) -> str | None:
        """The Hub data set's configuration."""

    @property
    def batch_size(self) -> int:
        """Rows in an optimiser step."""

    @property
    def micro_batch_size(self) -> int:
        """Rows in a forward pass; divides `batch_size`, or is larger and then does not matter."""

    @property
    def lr(self) -> float:
        """Learning rate, constant over the run."""

    @property
    def weight_decay(self) -> float:
        """AdamW's weight decay."""

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's betas."""

    @property
    def adapter_rank(self) -> int:
        """Rank of adapters."""

    @property
    def adapter_alpha(self) -> int:
        """An adapter's change is scaled by this over its rank."""

    @property
    def adapter_lr(self) -> float:
        """Learning rate of adapters."""

    @property
    def max_length(self) -> int:
        """Tokens of a row that count."""

    @property
    def eval_every(self) -> int:
        """Optimiser steps between two evaluations."""

    @property
    def threshold(self) -> float:
        """The metric's value that ends the run."""

    @property
    def max_steps(self) -> int:
        """The budget: optimiser steps after which the run ends in any case."""

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


def finetune_names() -> list[str]:
    """Names of the fine-tunes that can be made, sorted; imports none of them."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


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


def make_finetune(name: str, settings: Mapping[str, Any]) -> Finetune:
    """Make a fine-tune from its name and settings.

    Args:
        name: A built-in task or one of another package (entry-point group `retention_bench.finetunes`). A built-in
            name cannot be taken over.
        settings: The task's fields, as they stand in a suite's YAML.

    Raises:
        UsageError: No such task, an unknown or missing setting, or one of the wrong type or range.
        RetentionBenchError: The other package's task cannot be imported.
    """
    task = _load(name)
    fields = [field.name for field in dataclasses.fields(task)]
    for given in settings:
        if given not in fields:
            raise unknown_name(f"setting of the fine-tune {name!r}:", str(given), fields)
    try:
        made: Finetune = pydantic.TypeAdapter(task).validate_python(dict(settings))
    except pydantic.ValidationError as error:
        raise UsageError(_explain(name, error)) from error
    return made


def _load(name: str) -> Any:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise RetentionBenchError(
                f"The fine-tune {name!r} ({entry.value}) cannot be imported: {error}. Repair or uninstall its package."
            ) from error
    raise unknown_name("fine-tune", name, finetune_names())


def _explain(name: str, error: pydantic.ValidationError) -> str:
    """The first thing wrong with a task's settings, in one sentence that names the setting."""
    first = error.errors()[0]
    task, given = f"the fine-tune {name!r}", first["input"]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"Settings of {task}: {reason}."
    setting = first["loc"][0]
    if first["type"] == "missing":
        return f"Setting {setting!r} of {task} is missing. Add it to the suite."
    hint = ""
    if isinstance(given, str) and "e" in given.lower() and _is_number(given):
        hint = f" YAML reads {given:.40} as text: write the number with a point, as in 2.0e-5."
    return f"Setting {setting!r} of {task}: {reason}, got {shortened(given)}.{hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
