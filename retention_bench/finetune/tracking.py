"""Follow facts through a fine-tune: when they are looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retention_bench.finetune.schedule import Dose
from retention_bench.finetune.stopping import StopRule

Track = Callable[[Dose], None]
"""Takes a point of a trajectory, given the dose up to there: it may run the model, and leaves it and the random states
as they are. It is called at every evaluation, that before the first step and that after the last included, and every
`track_every` steps, in every process; by a run that goes on after a kill perhaps again for the same steps."""


class Tracker(TrainerCallback):
    """Calls `track` where it is due. It comes behind the stop rule in the trainer's list of callbacks."""

    def __init__(self, track: Track, rule: StopRule, every: int) -> None:
        """Begin a run.

        Args:
            track: What is called.
            rule: Says where an evaluation was made.
            every: Optimiser steps between two further looks; 0 for none.
        """
        self._track, self._rule, self._every = track, rule, every
        self._last = -1

    def look(self, step: int) -> None:
        """Take a point."""
        self._track(self._rule.schedule.at(step))
        self._last = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at an evaluation, and every few steps."""
        step = state.global_step
        if self._rule.curve[-1].step == step or (self._every and step % self._every == 0):
            self.look(step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look after the last step of a run that the rule ends here, since its training loss is not a number."""
        if self._rule.diverged and state.global_step != self._last:
            self.look(state.global_step)


def without_autocast(model: Any, track: Track) -> Track:
    """The same, without the autocast that the trainer puts around the model on a GPU: scores are taken without it.

    The parameters of an FSDP model are gathered in bfloat16 for every forward pass, also for this one.
    """

    def tracked(dose: Dose) -> None:
        wrapped = model.__dict__.pop("forward", None)
        try:
            track(dose)
        finally:
            if wrapped is not None:
                model.forward = wrapped

    return tracked
