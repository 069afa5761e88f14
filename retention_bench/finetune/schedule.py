"""Which rows each optimiser step trains on, and the dose that the model has had by then."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from retention_bench.errors import UsageError
from retention_bench.finetune.horizon import Horizon
from retention_bench.finetune.settings import MOST_ROWS


class Dose(NamedTuple):
    """How far a fine-tune has come.

    Attributes:
        step: Optimiser steps done.
        tokens: Tokens that the model was trained on until then: the input tokens of the rows of all these steps, as
            often as a row was in one. Padding is not counted; a prompt's tokens are, which carry no loss. All micro-
            batches of a step count, on whichever process.
        epoch: Rows that it was trained on, over the training rows there are.
    """

    step: int
    tokens: int
    epoch: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The rows of a whole run. It follows from the rows, the seed and the horizon alone, so a resumed run has the same.

    Attributes:
        order: The row of each place, `batch_size` of them a step.
        tokens: The tokens of the rows of the first 0, 1, 2, … steps.
        rows: The training rows there are.
        batch_size: Rows in a step.
    """

    order: Sequence[int]
    tokens: Sequence[int]
    rows: int
    batch_size: int

    @property
    def steps(self) -> int:
        """The most optimiser steps of the run."""
        return len(self.tokens) - 1

    def at(self, step: int) -> Dose:
        """The dose after so many steps."""
        return Dose(step, self.tokens[step], step * self.batch_size / self.rows)


def schedule(
    lengths: Sequence[int], batch_size: int, seed: int, max_steps: int, horizon: Horizon | None = None
) -> Schedule:
    """Lay out a run: the rows are shuffled anew in every epoch, and stand by length within a step.

    A step's gradient does not depend on the order of its rows, and micro-batches of like rows have little padding: on
    the atlas chats a step has a quarter fewer tokens than with rows as they come. The first steps of a run are those of
    any longer one.

    Args:
        lengths: Tokens of each training row.
        batch_size: Rows in a step.
        seed: Seed of the shuffling.
        max_steps: The budget of a run to the threshold.
        horizon: Where it ends; at the threshold, if it is not given. A dose in epochs or tokens is reached within the
            last step.

    Raises:
        UsageError: The dose takes more rows than a run can have.
    """
    horizon = horizon or Horizon()
    per_epoch = sum(lengths)
    steps = horizon.known_steps(max_steps)
    if horizon.unit == "epochs":
        steps = math.ceil(round(horizon.amount * len(lengths), 6) / batch_size)
    needed = horizon.amount / per_epoch * len(lengths) if steps is None else steps * batch_size
    if needed > MOST_ROWS:
        raise UsageError(
            f"--horizon {horizon.unit}:{horizon.amount:g} takes {needed:,.0f} rows; a run has {MOST_ROWS:,} at most."
        )
    rng = random.Random(seed)
    order: list[int] = []
    tokens = [0]
    waiting: collections.deque[int] = collections.deque()
    while len(tokens) <= steps if steps is not None else tokens[-1] < horizon.amount:
        while len(waiting) < batch_size:
            waiting.extend(rng.sample(range(len(lengths)), len(lengths)))
        step = sorted((waiting.popleft() for _ in range(batch_size)), key=lengths.__getitem__)
        order += step
        tokens.append(tokens[-1] + sum(lengths[row] for row in step))
    return Schedule(order, tokens, len(lengths), batch_size)
