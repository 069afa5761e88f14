"""Fine-tunes: what is done to an edited model downstream, trained with TRL until a stop rule holds.

A task (`Tulu3`) is its rows and one object of plain settings; `train` runs any of them, with `FinetuneOptions`. Nothing
here imports torch until `train` is asked for.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retention_bench.finetune.base import (
    CheckedFinetune,
    DataCheck,
    Example,
    Finetune,
    TuningContext,
    TuningData,
    parse_finetune,
)
from retention_bench.finetune.contamination import ContaminationFilter, Removed
from retention_bench.finetune.freezing import Freeze, parse_freeze
from retention_bench.finetune.horizon import Horizon, parse_horizon
from retention_bench.finetune.mentions import Matcher, Mention, Terms
from retention_bench.finetune.options import ADAPTERS, FinetuneOptions
from retention_bench.finetune.schedule import Dose
from retention_bench.finetune.settings import TrainingSettings
from retention_bench.registry import FINETUNES

if TYPE_CHECKING:
    from retention_bench.finetune.training import FinetuneLog, Track, train

__all__ = [
    "ADAPTERS",
    "CheckedFinetune",
    "ContaminationFilter",
    "DataCheck",
    "Dose",
    "Example",
    "Finetune",
    "FinetuneLog",
    "FinetuneOptions",
    "Freeze",
    "Horizon",
    "Matcher",
    "Mention",
    "Removed",
    "Terms",
    "Track",
    "TrainingSettings",
    "TuningContext",
    "TuningData",
    "make_finetune",
    "parse_finetune",
    "parse_freeze",
    "parse_horizon",
    "train",
]


def make_finetune(name: str, settings: Mapping[str, Any]) -> Finetune:
    """Make a fine-tune of its settings; see `Registry.make`."""
    return FINETUNES.make(name, settings)


def __getattr__(name: str) -> Any:
    if name in ("FinetuneLog", "Track", "train"):
        from retention_bench.finetune import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
