"""Progress of long work: the callback it reports to, and what a person sees of it.

The mathematics never prints. The pipeline hands a callback down; the command line draws it with rich, or writes plain
lines when the output is no terminal. rich is imported where it draws, since it takes a while.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from retention_bench.display.escape import line
from retention_bench.display.streams import say_error, screen

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY_S = 10.0
"""Seconds between two progress lines of one stage where the output is no terminal."""

Announce = Callable[[str, bool], None]
"""Takes the title of a stage that begins, and whether the store holds it."""


class Progress(Protocol):
    """Called as work advances; must be cheap and must not raise."""

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """Report progress.

        Args:
            stage: What is being done, in a few words (`"value optimisation"`).
            done: Steps finished.
            total: Steps in all.
            figures: Current figures, for example `{"loss": 1.25}`.
        """


def silent(stage: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
    """A `Progress` that says nothing."""


@contextlib.contextmanager
def show_progress(stages: int) -> Iterator[tuple[Announce, Progress]]:
    """Show progress on standard error while the block runs.

    Args:
        stages: How many stages there will be.

    Yields:
        A function to call with each stage's title and whether the store held it, and the progress callback.
    """
    console = screen(stderr=True)
    with _bars(console, stages) if console.is_terminal else _lines(stages) as pair:
        yield pair


@contextlib.contextmanager
def _bars(console: Console, stages: int) -> Iterator[tuple[Announce, Progress]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("stages", total=stages, figures="")
        inner: Any = None
        count = 0

        def announce(title: str, cached: bool) -> None:
            nonlocal inner, count
            count += 1
            bars.update(whole, completed=count - 1, total=max(count, stages))
            if inner is not None:
                bars.remove_task(inner)
                inner = None
            bars.console.print(Text.assemble(("kept" if cached else "run ", "dim"), "  ", line(title)))

        def report(stage: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
            nonlocal inner
            stage = line(stage)
            if inner is None or bars.tasks[-1].description != stage:
                if inner is not None:
                    bars.remove_task(inner)
                inner = bars.add_task(stage, total=total, figures="")
            bars.update(inner, completed=done, total=total, figures=_figures(figures))

        yield announce, report


@contextlib.contextmanager
def _lines(stages: int) -> Iterator[tuple[Announce, Progress]]:
    count, last = 0, 0.0

    def announce(title: str, cached: bool) -> None:
        nonlocal count, last
        count, last = count + 1, time.monotonic()
        # A stage may ask for one that no plan can know: the control up to a step at which an edited model stopped.
        say_error(f"[{count}/{max(count, stages)}] {line(title)}{' (from the store)' if cached else ''}")

    def report(stage: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            say_error(f"    {line(stage)}: {done}/{total} {line(_figures(figures))}".rstrip())

    yield announce, report


def _figures(figures: Mapping[str, float] | None) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
