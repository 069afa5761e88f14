"""How a fine-tune is run, whatever it trains on."""

from __future__ import annotations

import dataclasses

from retention_bench.errors import UsageError, unknown_name
from retention_bench.finetune.freezing import parse_freeze
from retention_bench.finetune.horizon import parse_horizon

ADAPTERS = ("none", "lora", "dora")
"""What is trained in the weights' place."""


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options that are the same for every task: plain values, checked.

    Attributes:
        freeze: What is kept from changing, see `parse_freeze`. With `none`, parameters that do not require a gradient
            stay as they are.
        adapter: `none`, or `lora` or `dora` on every linear map of the layers that are trained.
        track_every: The facts are looked at wherever the model is evaluated; with more than 0, also every so many
            optimiser steps. None for no trajectory.
        horizon: Where a run ends, see `parse_horizon`.

    Raises:
        UsageError: An option is none of these.
    """

    freeze: str = "none"
    adapter: str = "none"
    track_every: int | None = 0
    horizon: str = "threshold"

    def __post_init__(self) -> None:
        parse_freeze(self.freeze)
        parse_horizon(self.horizon)
        if self.adapter not in ADAPTERS:
            raise unknown_name("adapter", self.adapter, ADAPTERS)
        if self.track_every is not None and self.track_every < 0:
            raise UsageError(
                f"--track-every {self.track_every} is below 0. Give steps, 0 to look at the facts at evaluations only, "
                "or off."
            )
