"""Fine-tunes: what is done to an edited model downstream, trained with TRL until a stop rule holds.

A task (`Tulu3`) is plain settings plus its data and its metric; `train` runs any of them. Nothing here imports torch
until `train` is asked for.
"""

from typing import TYPE_CHECKING, Any

from retention_bench.finetune.base import (
    Example,
    Finetune,
    TuningContext,
    TuningData,
    finetune_names,
    make_finetune,
    parse_finetune,
)
from retention_bench.finetune.contamination import ContaminationFilter, Matcher, Mention, Removed, Terms

if TYPE_CHECKING:
    from retention_bench.finetune.training import FinetuneLog, Watch, train

__all__ = [
    "ContaminationFilter",
    "Example",
    "Finetune",
    "FinetuneLog",
    "Matcher",
    "Mention",
    "Removed",
    "Terms",
    "TuningContext",
    "TuningData",
    "Watch",
    "finetune_names",
    "make_finetune",
    "parse_finetune",
    "train",
]


def __getattr__(name: str) -> Any:
    # `retention-bench list finetunes` names the tasks without waiting for torch and TRL.
    if name in ("FinetuneLog", "Watch", "train"):
        from retention_bench.finetune import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
