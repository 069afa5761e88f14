"""Types of editors' settings; `make_editor` checks them."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

MOST_LAYERS = 10_000
"""More layers than any model has."""

Count = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
"""A whole number from 1 on: steps, facts, rows."""

Rank = Annotated[int, Field(strict=True, ge=1, le=2**16)]
"""A rank, or a number of blocks; smaller than a `Count`, since memory is allocated for each."""

Layer = Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS - 1)]
"""The index of a layer, counted from 0."""


def _listed(layers: Any) -> Any:
    """Layers as they are written on a command line, `3-8` or `0,2,5-7` or one number, as a list."""
    if isinstance(layers, int) and not isinstance(layers, bool):
        return [layers]
    if not isinstance(layers, str):
        return layers
    listed: list[int] = []
    for part in layers.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip(), re.ASCII)
        numbers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not numbers:
            raise ValueError("layers are written as [0, 2], 0,2 or 3-8")
        listed += numbers
    return listed


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError("Layers should ascend, each once")
    return layers


Layers = Annotated[
    tuple[Layer, ...],
    Field(min_length=1, max_length=MOST_LAYERS, fail_fast=True),
    AfterValidator(_ascending),
    BeforeValidator(_listed),
]
"""One or more layers, ascending; also as the text `3-8` or `0,2,5-7`."""

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
"""A finite number above 0."""

NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""A finite number, 0 or more."""
