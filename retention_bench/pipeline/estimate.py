"""What a plan will take before any of it runs: optimiser steps, memory and disk of its fine-tunes."""

from __future__ import annotations

import dataclasses
from typing import Any

from retention_bench.finetune import Finetune as Task
from retention_bench.finetune import parse_freeze, parse_horizon
from retention_bench.pipeline.stages import Finetune, Gather
from retention_bench.store import Store

_FLOAT = 4
_ADAM = 3 * _FLOAT
"""Bytes a trained number takes besides itself: its gradient and Adam's two moments."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Upper limits.

    Attributes:
        parameters: Numbers in the model.
        trainable: Numbers that a fine-tune can change. Which layers an edit changes is not known before it is made, so
            with `--freeze edited` or `unedited` it is the whole model.
        finetunes: Fine-tunes that are not in the store.
        steps: Their optimiser steps if each uses up its budget; None where their horizon is counted in epochs or
            tokens, and so depends on the data.
        memory_bytes: What a fine-tune's weights, gradients and optimiser take, on each GPU where there are several;
            activations come on top, and grow with micro_batch_size and max_length.
        disk_bytes: What the store grows by: a model a fine-tune, and the checkpoints of one that runs.
    """

    parameters: int
    trainable: int
    finetunes: int
    steps: int | None
    memory_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, int | None]:
        """The estimate as plain JSON values."""
        return dataclasses.asdict(self)


def estimate(plan: Gather, store: Store) -> Estimate:
    """Estimate what the fine-tunes of a plan will take.

    Args:
        plan: The plan.
        store: Where what is there already is looked for.

    Raises:
        UsageError: The model lacks a layer that `--freeze` names.
    """
    missing = sum(not store.holds(stage) for stage in plan.finetunes)
    control = plan.tuned_control
    start, task = control.launcher, control.made()
    parameters, trainable = _count(control, task)
    steps = parse_horizon(control.options.horizon).known_steps(task.settings.max_steps)
    adapters = trainable if control.options.adapter != "none" else 0
    memory = _FLOAT * (parameters + adapters) + _ADAM * trainable
    if control.model.device != "cpu":
        memory += 2 * parameters  # bfloat16 autocast keeps the weights in that dtype for a pass
    if start and start.sharded:
        # Each has its share, or at the start and in the end the weights alone.
        memory = max(memory // start.processes, _FLOAT * (parameters + adapters))
    elif start:
        memory += _FLOAT * trainable  # the buckets in which DDP brings gradients together
    # Two checkpoints lie beside each other: the last, and the one before it, in case the last is damaged.
    checkpoint = _FLOAT * (parameters + adapters) + 2 * _FLOAT * trainable
    return Estimate(
        parameters=parameters,
        trainable=trainable,
        finetunes=missing,
        steps=None if steps is None else missing * steps,
        memory_bytes=memory,
        disk_bytes=missing * _FLOAT * parameters + (2 * checkpoint if missing else 0),
    )


def _count(stage: Finetune, task: Task) -> tuple[int, int]:
    """The model's numbers, and those that a fine-tune can change, counted on a model without weights."""
    import torch

    from retention_bench.finetune.adapters import adapted
    from retention_bench.models import empty_model, load_config, num_layers

    config = load_config(stage.model.path, stage.model.revision)
    freeze = parse_freeze(stage.options.freeze)
    model: Any = empty_model(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model.parameters())
        layers = tuple(range(num_layers(model))) if freeze.needs_edit else freeze.apply(model)
        with adapted(
            model,
            stage.options.adapter,
            layers,
            rank=task.settings.adapter_rank,
            alpha=task.settings.adapter_alpha,
            seed=0,
        ):
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, trainable
