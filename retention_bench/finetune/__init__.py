"""Fine-tunes: what is done to an edited model downstream, trained with TRL until a stop rule holds.

A task (`Tulu3`) is plain settings plus its data and its metric; `train` runs any of them. Nothing here imports torch
until `train` is asked for.
"""

from typing import TYPE_CHECKING, Any

from retention_bench.finetune.base import (
    ADAPTERS,
    CheckedFinetune,
    DataCheck,
    Example,
    Finetune,
    TuningContext,
    TuningData,
    finetune_names,
    make_finetune,
    parse_finetune,
)
from retention_bench.finetune.contamination import ContaminationFilter, Matcher, Mention, Removed, Terms
from retention_bench.finetune.freezing import Freeze, parse_freeze

if TYPE_CHECKING:
    from retention_bench.finetune.training import FinetuneLog, Watch, train

__all__ = [
    "ADAPTERS",
    "CheckedFinetune",
    "ContaminationFilter",
    "DataCheck",
    "Example",
    "Finetune",
    "FinetuneLog",
    "Freeze",
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
    "parse_freeze",
    "train",
]


def __getattr__(name: str) -> Any:
    # `retention-bench list finetunes` names the tasks without waiting for torch and TRL.
    if name in ("FinetuneLog", "Watch", "train"):
        from retention_bench.finetune import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
