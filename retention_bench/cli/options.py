"""Types of options and what commands share; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from retention_bench.display import line
from retention_bench.errors import UsageError, unknown_name


def json_option(what: str) -> Callable:
    """The option `--json`, for `what`."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON on standard output.")


PATH = click.Path(path_type=Path)


class Out(click.ParamType):
    """Where something is to be written; refused at once where it cannot be."""

    name = "path"

    def __init__(self, *, folder: bool) -> None:
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, if something can be written there."""
        from retention_bench.data import output_file, output_folder

        try:
            return output_folder(value) if self.folder else output_file(value)
        except UsageError as error:
            self.fail(line(error), param, ctx)


class Filled(click.ParamType):
    """A text that is not empty: an unset shell variable is no name, and an empty revision would be the newest."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if there is one."""
        if not str(value).strip():
            self.fail("It is empty. Give a value, or leave the option out.", param, ctx)
        return str(value)


class Positive(click.FloatRange):
    """A number above 0 that is one."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, if it is finite and above 0."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number to count with.", param, ctx)
        return number


def count(least: int) -> click.IntRange:
    """A whole number from `least` to 2^31 - 1."""
    return click.IntRange(min=least, max=2**31 - 1)


class CountOrOff(click.ParamType):
    """A whole number from 0, or `off`, which is None."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number, or None."""
        return None if value == "off" else count(0).convert(value, param, ctx)


SEED = click.IntRange(min=0, max=2**32 - 1)


def listed(option: str, given: str, allowed: Collection[str] | None = None) -> tuple[str, ...]:
    """Names separated by commas.

    Raises:
        UsageError: One is not allowed, or stands twice.
    """
    names = tuple(name.strip() for name in given.split(",") if name.strip())
    for number, name in enumerate(names):
        if allowed is not None and name not in allowed:
            raise unknown_name("kind of question", name, allowed)
        if name in names[:number]:
            raise UsageError(f"{option} names {name} twice. Give each once.")
    return names
