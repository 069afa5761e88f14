"""When a fine-tune ends: at its threshold or at its budget, the same rule for every edited model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retention_bench.errors import RetentionBenchError
from retention_bench.progress import Progress


class Point(NamedTuple):
    """An evaluation.

    Attributes:
        step: Optimiser steps done.
        value: The metric.
    """

    step: int
    value: float


class StopRule(TrainerCallback):
    """Evaluates before the first step, then every few steps and at the budget's end, and stops beyond the threshold.

    Attributes:
        curve: The evaluations.
    """

    def __init__(
        self,
        measure: Callable[[], float],
        reached: Callable[[float], bool],
        *,
        metric: str,
        every: int,
        budget: int,
        progress: Progress,
    ) -> None:
        """Begin a run.

        Args:
            measure: Gives the metric of the model as it is now.
            reached: Whether a value is beyond the threshold.
            metric: The metric's name.
            every: Optimiser steps between two evaluations.
            budget: Optimiser steps after which the run ends in any case.
            progress: Called at every step with the loss of its batch and the last evaluation.
        """
        self._measure, self._reached, self._metric = measure, reached, metric
        self._every, self._budget, self._progress = every, budget, progress
        self.curve: list[Point] = []

    def evaluate(self, step: int) -> bool:
        """Evaluate, note the point, and say whether the threshold is reached.

        Raises:
            RetentionBenchError: The metric is not a finite number: the model has diverged.
        """
        value = self._measure()
        if not math.isfinite(value):
            raise self._diverged(step, f"its {self._metric} is {value}")
        self.curve.append(Point(step, value))
        self._progress("fine-tune", step, self._budget, {self._metric: value})
        return self._reached(value)

    @property
    def stopped_by(self) -> Literal["threshold", "budget"]:
        """What ended the run."""
        return "threshold" if self._reached(self.curve[-1].value) else "budget"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate where it is due."""
        step = state.global_step
        due = step % self._every == 0 or step == self._budget
        if due and self.evaluate(step):
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a step's training loss."""
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise self._diverged(state.global_step, f"its training loss is {loss}")
        figures = {"loss": loss, self._metric: self.curve[-1].value}
        self._progress("fine-tune", state.global_step, self._budget, figures)

    def _diverged(self, step: int, what: str) -> RetentionBenchError:
        return RetentionBenchError(
            f"The fine-tune diverged: after {step} steps {what}. "
            + ("The model was broken before it was trained: look at its edit." if step == 0 else "Lower the task's lr.")
        )
