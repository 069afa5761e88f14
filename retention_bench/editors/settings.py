"""Types of editors' settings; `make_editor` checks them."""

from typing import Annotated

from pydantic import AfterValidator, Field

MOST_LAYERS = 10_000
"""More layers than any model has."""

Count = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
"""A whole number from 1 on: steps, facts, rows."""

Rank = Annotated[int, Field(strict=True, ge=1, le=2**16)]
"""A rank, or a number of blocks; smaller than a `Count`, since memory is allocated for each."""

Layer = Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS - 1)]
"""The index of a layer, counted from 0."""


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError("Layers should ascend, each once")
    return layers


Layers = Annotated[
    tuple[Layer, ...], Field(min_length=1, max_length=MOST_LAYERS, fail_fast=True), AfterValidator(_ascending)
]
"""One or more layers, ascending."""

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
"""A finite number above 0."""

NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""A finite number, 0 or more."""
