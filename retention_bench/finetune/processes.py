"""The processes that share one fine-tune, one a GPU: how many there are, and what each of them has.

Outside of a process group, which `accelerate launch` and `accelerate.PartialState` set up, there is one.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

T = TypeVar("T")


def index() -> int:
    """This process's number; 0 reports, writes and decides for all."""
    return distributed.get_rank() if _several() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _several() else 1


def sharded() -> bool:
    """Whether `accelerate` is configured to spread the parameters over the processes (FSDP)."""
    return _several() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def gathered(value: T) -> list[T]:
    """What all processes have, in their order, once all of them have called this."""
    if not _several():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def unshard(model: Any) -> None:
    """Give a model whose parameters are spread over the processes all of them back, in every process, on the CPU.

    Args:
        model: A model; one that is not spread is left as it is. One that was can be read, merged and saved afterwards,
            but not run: the hooks that gather its parameters for a forward pass remain.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some are still gathered from the last forward pass, in memory that belongs to FSDP
    whole: dict[int, Parameter] = {}  # a tied parameter stays tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    full = parameter.full_tensor().detach().cpu()
                    whole[id(parameter)] = Parameter(full, requires_grad=parameter.requires_grad)
                setattr(module, name, whole[id(parameter)])


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
