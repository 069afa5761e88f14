"""A stage: plain values that say what is computed, from which it is computed, and under which key it is kept.

A stage holds the stages that it needs, so the last one of a cell is the whole plan. It pickles, it can be written as
JSON and read back in another process, and its key follows from its values alone: nothing is loaded to make a plan.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import pydantic

from retention_bench.data import checked, read_json
from retention_bench.data.durable import write_text
from retention_bench.errors import UsageError
from retention_bench.store import OUTSIDE, Input
from retention_bench.store.store import key_of

if TYPE_CHECKING:
    from retention_bench.pipeline.bench import Bench


@dataclasses.dataclass(frozen=True)
class Model(Input):
    """A base model as stages read it.

    Attributes:
        path: Its folder or Hub id.
        fingerprint: As `model_fingerprint` gave it.
        dtype: The dtype that it is edited, trained and scored in, by torch's name.
        device: `"cpu"` or `"cuda"`.
        revision: The Hub revision that it is read at; the fingerprint has the commit that this stands for.
    """

    dtype: str
    device: str
    revision: str | None = dataclasses.field(default=None, metadata=OUTSIDE)


@dataclasses.dataclass(frozen=True)
class Rows(Input):
    """A local file or a Hub data set as stages read it.

    Attributes:
        path: The file, or the Hub id.
        fingerprint: As `source_fingerprint` gave it.
        config: The Hub data set's configuration.
        revision: The Hub revision; the fingerprint has it too.
    """

    config: str | None = None
    revision: str | None = dataclasses.field(default=None, metadata=OUTSIDE)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What all stages have. Each is a frozen dataclass in a file of its own below `stages/`.

    Fields are JSON values, dataclasses of them, inputs and other stages. All are a part of the key but those that are
    marked with `OUTSIDE`.
    """

    name: ClassVar[str]
    """Which stage it is; a folder of the store."""
    version: ClassVar[int]
    """Raised when the stage's mathematics or files change, so that results of the old one are not found any more."""

    def title(self) -> str:
        """What it does, for people."""
        raise TypeError(f"{type(self).__name__} has no title")

    def run(self, folder: Path, bench: Bench) -> None:
        """Compute the result.

        Args:
            folder: Where its files go.
            bench: Gives the folders of the stages that this one needs, and the base model.
        """
        raise TypeError(f"{type(self).__name__} cannot be run")

    @functools.cached_property
    def key(self) -> str:
        """What its result is kept under."""
        return key_of(self.name, self.inputs)

    @functools.cached_property
    def inputs(self) -> Mapping[str, Any]:
        """Everything that its result depends on, as JSON values; a stage stands there by its key."""
        return {"version": self.version, **_values(self, inside=True)}

    @property
    def needs(self) -> tuple[Stage, ...]:
        """The stages that it needs, in the order of its fields, each once."""
        return tuple({stage.key: stage for stage in _found(self, Stage)}.values())

    @property
    def reads(self) -> tuple[Input, ...]:
        """What it reads from outside the store, itself and not through another stage."""
        return tuple(_found(self, Input))

    def plan(self) -> list[Stage]:
        """This stage and all that it needs, directly or not, each once and behind those that it needs itself."""
        ordered: dict[str, Stage] = {}
        waiting: list[tuple[Stage, bool]] = [(self, False)]
        while waiting:
            stage, ready = waiting.pop()
            if stage.key in ordered:
                continue
            if ready:
                ordered[stage.key] = stage
            else:
                waiting += [(stage, True), *((need, False) for need in reversed(stage.needs))]
        return list(ordered.values())


def _found(value: Any, kind: type) -> Iterator[Any]:
    """What of a kind stands in the fields of a stage, also within dataclasses and tuples; not within other stages."""
    parts = [getattr(value, field.name) for field in dataclasses.fields(value)] if _is_record(value) else value
    for part in parts:
        if isinstance(part, kind):
            yield part
        elif isinstance(part, tuple | list) or (_is_record(part) and not isinstance(part, Stage | Input)):
            yield from _found(part, kind)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _values(record: Any, *, inside: bool) -> dict[str, Any]:
    """The fields of a dataclass as JSON values; with `inside` those alone that a key is made of."""
    fields = [f for f in dataclasses.fields(record) if not (inside and f.metadata == OUTSIDE)]
    return {f.name: _plain(getattr(record, f.name), inside=inside) for f in fields}


def _plain(value: Any, *, inside: bool) -> Any:
    if isinstance(value, Stage):
        return value.key
    if _is_record(value):
        return _values(value, inside=inside)
    if isinstance(value, Mapping):
        return {str(name): _plain(part, inside=inside) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part, inside=inside) for part in value]
    return value


class _Entry(pydantic.BaseModel, extra="forbid"):
    stage: str
    values: dict[str, Any]


def write_plan(stage: Stage, path: Path) -> None:
    """Write a stage and all that it needs as JSON, from which `read_plan` makes the same again.

    Args:
        stage: The last stage.
        path: The file.
    """
    entries = {s.key: {"stage": s.name, "values": _values(s, inside=False)} for s in stage.plan()}
    write_text(path, json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False))


def read_plan(path: Path, stages: Mapping[str, type[Stage]]) -> dict[str, Stage]:
    """The stages of a plan by key.

    Args:
        path: A file that `write_plan` wrote.
        stages: All kinds of stage by name.

    Raises:
        UsageError: There is no such file.
        RetentionBenchError: It is no plan.
    """
    made: dict[str, Stage] = {}
    for key, entry in read_json(path, dict[str, _Entry], "plan").items():
        place = f"{path}, {key}"
        if entry.stage not in stages:
            raise UsageError(f"{place}: there is no stage {entry.stage!r}. Allowed: {', '.join(stages)}.")
        kind = stages[entry.stage]
        stage = _made(kind, entry.values, made, place)
        if stage.key != key:
            raise UsageError(
                f"{place}: this version makes the key {stage.key} of that stage. Make the plan with the versions that "
                "it is run with."
            )
        made[key] = stage
    return made


def _made(kind: type[Any], values: Mapping[str, Any], made: Mapping[str, Stage], place: str) -> Any:
    """A dataclass from its fields as `_values` wrote them."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if values.keys() != fields.keys():
        odd = min(values.keys() ^ fields.keys())
        raise UsageError(f"{place}: {kind.__name__} and its values differ in {odd!r}. Make the plan anew.")
    return kind(**{name: _typed(hints[name], value, made, f"{place}, {name}") for name, value in values.items()})


def _typed(hint: Any, value: Any, made: Mapping[str, Stage], place: str) -> Any:
    """A value as the annotation of its field has it."""
    options = [hint, *getattr(hint, "__args__", ())]
    records = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    if value is None or not records:
        return checked(hint, value, place)
    [record, *_] = records
    if isinstance(value, list):
        return tuple(_typed(record, part, made, place) for part in value)
    for one in records:
        if issubclass(one, Stage) and isinstance(value, str):
            if value not in made:
                raise UsageError(f"{place}: the plan has no stage {value!r} before this one. Make the plan anew.")
            return made[value]
    return _made(record, value, made, place)
