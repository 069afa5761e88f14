"""A plan as a file: the stages of a cell as JSON, from which any process makes them again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pydantic

from retention_bench.data import checked, read_json
from retention_bench.data.durable import write_text
from retention_bench.errors import UsageError
from retention_bench.pipeline.stage import Stage, values_of


class _Entry(pydantic.BaseModel, extra="forbid"):
    stage: str
    values: dict[str, Any]


def write_plan(stage: Stage, path: Path) -> None:
    """Write a stage and all that it needs as JSON, from which `read_plan` makes the same again.

    Args:
        stage: The last stage.
        path: The file.
    """
    entries = {s.key: {"stage": s.name, "values": values_of(s, inside=False)} for s in stage.plan()}
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
    """A dataclass from its fields as `values_of` wrote them."""
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
    if isinstance(value, str) and issubclass(record, Stage):
        found = made.get(value)
        if not isinstance(found, tuple(records)):
            raise UsageError(f"{place}: the plan has no such stage {value!r} before this one. Make the plan anew.")
        return found
    return _made(record, value, made, place)
