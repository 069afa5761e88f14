"""How far a fine-tune goes: to its threshold, as in the paper, or a fixed dose (MEASURES, "Dose")."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from retention_bench.errors import UsageError

Unit = Literal["threshold", "steps", "epochs", "tokens"]

_FORMS = re.compile(r"threshold|(steps|tokens):([1-9]\d{0,14})|(epochs):(\d{1,7}(?:\.\d{1,6})?)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Horizon:
    """Where a run ends.

    Attributes:
        unit: `threshold`: at the first evaluation beyond the threshold, or when the budget of steps is spent. Else what
            the dose is counted in; such a run passes the threshold and goes on.
        amount: The dose; 0 for the threshold.
    """

    unit: Unit = "threshold"
    amount: float = 0

    @property
    def fixed(self) -> bool:
        """Whether the run goes on whatever it has learned."""
        return self.unit != "threshold"

    def known_steps(self, max_steps: int) -> int | None:
        """The most optimiser steps of a run; None where they follow from the data.

        Args:
            max_steps: The budget of a run to the threshold; a dose needs none.
        """
        if self.unit == "threshold":
            return max_steps
        return int(self.amount) if self.unit == "steps" else None


def parse_horizon(text: str) -> Horizon:
    """Read `threshold`, `steps:N`, `epochs:X` or `tokens:N`.

    Raises:
        UsageError: It is none of these, or a dose of nothing.
    """
    found = _FORMS.fullmatch(text)
    if found is None or (found[4] is not None and float(found[4]) == 0):
        raise UsageError(
            f"--horizon {text[:100]!r} is not known. Allowed: threshold, steps:N, epochs:X and tokens:N, as steps:200, "
            "epochs:0.5 or tokens:1000000."
        )
    if found[1]:
        return Horizon("steps" if found[1] == "steps" else "tokens", int(found[2]))
    return Horizon("epochs", float(found[4])) if found[3] else Horizon()
