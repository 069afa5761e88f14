"""How long work reports on itself: a callback that takes a stage, steps done of how many, and figures.

The mathematics never prints. The pipeline hands a callback down; the command line draws it with rich, or writes plain
lines when the output is no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


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
