"""Rich's console, for texts of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from retention_bench.display.escape import plain

LEAST = 80
"""Columns that tables are made for. On a narrower terminal their lines are wrapped, and no figure is cut."""


class Screen(Console):
    """A console on which texts are texts: nothing in one is markup, an emoji's name, or a control character.

    A style of our own is given as `Text.assemble(("Not learned:", "red"), …)`.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not stderr and self.width < LEAST:
            self.width = LEAST

    def render_str(self, text: str, **options: Any) -> Text:
        """Also of cells, titles and columns; before anything is measured."""
        return super().render_str(plain(text), **(options | {"markup": False, "emoji": False}))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The last door: what was given as a `Text` comes through here too."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)
