"""What is kept of a fine-tune besides its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from retention_bench.finetune.contamination import Removed
from retention_bench.finetune.dropped import Drop, to_json
from retention_bench.finetune.stopping import Point, StoppedBy


@dataclasses.dataclass(frozen=True)
class FinetuneLog:
    """How a fine-tune went; without times, so that the same run gives the same bytes.

    Attributes:
        steps: Optimiser steps done.
        tokens: Tokens trained on, see `Dose`.
        epochs: Rows trained on, over the training rows there are.
        horizon: Where the run was to end, see `parse_horizon`.
        stopped_by: What ended the run.
        passed_at: The first evaluation beyond the threshold, the last one of a run to it; None where there is none. A
            run of a fixed dose may have passed it before the first step.
        learned: The threshold was passed, after the first step or later, and the run did not diverge. Only then is what
            the model still knows retention.
        why_not: Why nothing was learned, in words; None if it was.
        metric: The name of the metric that the stop rule looks at.
        value: The metric at the end; None where it is not a number.
        threshold: The value that ends a run, or that a fixed dose goes past.
        curve: The metric at step 0 and at every evaluation.
        train_rows: Training rows.
        validation_rows: Validation rows.
        removed: What the contamination filter took out.
        dropped: Rows that were left out since nothing in them can be trained on, by reason.
        freeze: What was kept from changing.
        adapter: What was trained in the weights' place.
        trained_layers: The layers that were trained.
        trainable_parameters: Parameters that the optimiser could change.
        parameters: Parameters of the model.
        micro_batch_size: Rows in a forward pass, after all halvings.
        processes: How many processes shared the rows of a step, each with a GPU of its own.
    """

    steps: int
    tokens: int
    epochs: float
    horizon: str
    stopped_by: StoppedBy
    passed_at: Point | None
    learned: bool
    why_not: str | None
    metric: str
    value: float | None
    threshold: float
    curve: tuple[Point, ...]
    train_rows: int
    validation_rows: int
    removed: Removed
    dropped: Mapping[str, Drop]
    freeze: str
    adapter: str
    trained_layers: tuple[int, ...]
    trainable_parameters: int
    parameters: int
    micro_batch_size: int
    processes: int

    def to_json(self) -> dict[str, Any]:
        """The log as plain JSON values."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "curve": [point._asdict() for point in self.curve],
            "passed_at": self.passed_at._asdict() if self.passed_at else None,
            "removed": self.removed.to_json(),
            "dropped": to_json(self.dropped),
            "trained_layers": list(self.trained_layers),
        }
