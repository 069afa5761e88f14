"""When a fine-tune ends: at its threshold or horizon, at its budget, or when it diverges; one rule for every model."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retention_bench.data.durable import DamagedError, check, remove, seal
from retention_bench.display import plain
from retention_bench.display.progress import Progress
from retention_bench.errors import RetentionBenchError
from retention_bench.finetune import processes
from retention_bench.finetune.schedule import Schedule
from retention_bench.finetune.settings import Metric
from retention_bench.finetune.validation import Measured, reached

StoppedBy = Literal["threshold", "budget", "horizon", "diverged"]
"""`horizon`: the end of a fixed dose. `budget`: the steps that a run may take to its threshold are spent."""

DIVERGED = 3.0
"""A run whose validation loss is more than this times that at its start has diverged."""

CHECKPOINT_SHARE = 0.05
"""Writing checkpoints takes this share of a run's time at most: one that took long is not soon followed by another."""

TRAJECTORY = "trajectory-*.jsonl"
"""Files beside the checkpoints that belong to them: the points of the trajectory up to there."""

_CURVE, _SEAL = "curve.json", "retention-bench.json"
_log = logging.getLogger("retention_bench")


class Point(NamedTuple):
    """An evaluation.

    Attributes:
        step: Optimiser steps done.
        tokens: Tokens trained on until then, see `Dose`.
        epoch: Rows trained on until then, over the training rows there are.
        value: The metric; None where it is not a finite number.
        loss: The validation loss; None where it is not a finite number.
    """

    step: int
    tokens: int
    epoch: float
    value: float | None
    loss: float | None


class StopRule(TrainerCallback):
    """Evaluates before the first step, then every few steps and after the last, and ends the run.

    Attributes:
        schedule: The run's steps.
        curve: The evaluations.
        diverged: How the run diverged, in words; None if it did not.
    """

    def __init__(
        self,
        measure: Callable[[], Measured],
        *,
        metric: Metric,
        threshold: float,
        fixed: bool,
        every: int,
        schedule: Schedule,
        progress: Progress,
    ) -> None:
        """Begin a run.

        Args:
            measure: Measures the model as it is now.
            metric: What the threshold is for.
            threshold: The value that ends the run.
            fixed: The run passes the threshold and goes on to the end of its schedule.
            every: Optimiser steps between two evaluations.
            schedule: The run's steps; it ends with the last in any case.
            progress: Called at every step with the loss of its batch and the last evaluation.
        """
        self._measure, self._metric, self._threshold = measure, metric, threshold
        self._fixed, self._every, self._progress = fixed, every, progress
        self.schedule = schedule
        self._asked, self._saved, self._cost = 0.0, 0.0, 0.0  # when a checkpoint was begun and ended, and its seconds
        self.curve: list[Point] = []
        self.diverged: str | None = None

    def evaluate(self, step: int) -> bool:
        """Evaluate, note the point, and say whether the run is over.

        Raises:
            RetentionBenchError: Before the first step the loss is not a finite number, or beyond the threshold that
                the run would end at.
        """
        measured = self._measure()
        value = measured.loss if self._metric == "validation_loss" else measured.accuracy
        if not math.isfinite(measured.loss):
            if step == 0:
                raise RetentionBenchError(
                    f"The validation loss is {measured.loss} before the first step. The model was broken before it was "
                    "trained: look at its edit."
                )
            self._note(step, None, None)
            self.diverged = f"after {step} steps the validation loss is {measured.loss}"
            return True
        self._note(step, value, measured.loss)
        self._progress("fine-tune", step, self.schedule.steps, {self._metric: value})
        first = self.curve[0].loss
        assert first is not None  # or the run would not have begun
        if measured.loss > DIVERGED * first:
            self.diverged = (
                f"after {step} steps the validation loss is {measured.loss:.4g}, more than {DIVERGED:g} times the "
                f"{first:.4g} before the first"
            )
            return True
        if self._fixed or not self._passed(value):
            return False
        if step == 0:
            raise RetentionBenchError(_passed_at_once(self._metric, value, self._threshold))
        return True

    @property
    def passed_at(self) -> Point | None:
        """The first evaluation beyond the threshold."""
        return next((point for point in self.curve if self._passed(point.value)), None)

    @property
    def stopped_by(self) -> StoppedBy:
        """What ended the run."""
        if self.diverged:
            return "diverged"
        if self._fixed:
            return "horizon"
        return "threshold" if self._passed(self.curve[-1].value) else "budget"

    def _passed(self, value: float | None) -> bool:
        return value is not None and reached(self._metric, value, self._threshold)

    def _note(self, step: int, value: float | None, loss: float | None) -> None:
        self.curve.append(Point(*self.schedule.at(step), value, loss))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate where it is due."""
        step = state.global_step
        due = step % self._every == 0 or step == self.schedule.steps
        over = due and self.evaluate(step)
        if over:
            control.should_training_stop = True
        # Nobody goes on from the last evaluation, so it needs no checkpoint.
        self._asked = time.monotonic()
        affordable = (self._asked - self._saved) * CHECKPOINT_SHARE >= self._cost
        # All processes write at the same steps: the clock of the first decides.
        control.should_save = due and not over and step < self.schedule.steps and processes.gathered(affordable)[0]
        if control.should_save and processes.index() == 0:
            assert args.output_dir is not None
            for older in _checkpoints(Path(args.output_dir))[:-1]:  # so that there are never more than two
                remove(older)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a step's training loss, and end a run where it is not a number."""
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss) and not self.diverged:
            self.diverged = f"after {state.global_step} steps the training loss is {loss}"
            if self.curve[-1].step != state.global_step:
                self._note(state.global_step, None, None)
            control.should_training_stop, control.should_save = True, False
        figures = {"loss": loss}
        if (value := self.curve[-1].value) is not None:
            figures[self._metric] = value
        self._progress("fine-tune", state.global_step, self.schedule.steps, figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the curve into the trainer's checkpoint and seal it: it is whole now, and damage to it is noticed."""
        assert args.output_dir is not None
        processes.gathered(None)  # each has written its part
        if processes.index():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        points = [f"../{path.name}" for path in folder.parent.glob(TRAJECTORY)]
        (folder / _CURVE).write_text(json.dumps(self.curve), encoding="utf-8")
        seal(folder, _SEAL, {}, beside=points)
        self._saved = time.monotonic()
        self._cost = self._saved - self._asked

    def resume(self, folder: Path) -> Path | None:
        """Find the checkpoint to go on from, and take up its curve.

        Args:
            folder: The trainer's output folder. What a kill left half written in it, and what is damaged, is removed.

        Returns:
            The last checkpoint whose every byte is what was written, or None where there is none.
        """
        found = _resumable(folder) if processes.index() == 0 else None
        whole, points = processes.gathered(found)[0] or (None, [])
        self.curve = [Point(*point) for point in points]
        return Path(whole) if whole else None


def _passed_at_once(metric: Metric, value: float, threshold: float) -> str:
    """Why a run is refused that would end before it began."""
    advice = "Lower" if metric == "validation_loss" else "Raise"
    return (
        f"The threshold {threshold:g} is passed before the first step: the {metric.replace('_', ' ')} is {value:.4g}. "
        f"{advice} `threshold` (--set finetunes.NAME.threshold=VALUE), or give --horizon steps:N for a fixed dose."
    )


def _resumable(folder: Path) -> tuple[str, list[Any]] | None:
    """The last checkpoint that is whole, and its curve; those after it are removed."""
    damaged = []
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            check(checkpoint, _SEAL)
        except DamagedError as error:
            if (checkpoint / _SEAL).exists():  # else a kill came before it was whole
                damaged.append(f"{checkpoint.name} ({error})")
            remove(checkpoint)
            continue
        if damaged:
            _log.warning("%s", plain(f"Damaged: {', '.join(damaged)}. The fine-tune goes on from {checkpoint.name}."))
        return str(checkpoint), json.loads((checkpoint / _CURVE).read_text(encoding="utf-8"))
    if damaged:
        _log.warning("%s", plain(f"Damaged: {', '.join(damaged)}. The fine-tune begins anew."))
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The trainer's checkpoints by their steps."""
    found = {path: re.fullmatch(r"checkpoint-(\d{1,18})", path.name) for path in folder.glob("checkpoint-*")}
    return sorted((path for path in found if found[path]), key=lambda path: int(path.name.rpartition("-")[2]))
