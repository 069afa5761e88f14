"""Which parts of a model a fine-tune may change: `none`, `edited`, `unedited`, `below:K` and `window:C:W`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from retention_bench.errors import UsageError
from retention_bench.finetune.dropped import shown

ALLOWED = "none, edited, unedited, below:K, window:C:W"

MOST = 100_000
"""Layers beyond which a count is a slip of the pen, or worse."""


class Freeze(NamedTuple):
    """A parsed `--freeze`.

    Attributes:
        kind: `none`, `edited`, `unedited`, `below` or `window`.
        numbers: K, or C and W.
    """

    kind: str
    numbers: tuple[int, ...] = ()

    @property
    def needs_edit(self) -> bool:
        """Whether it depends on which layers were edited."""
        return self.kind in ("edited", "unedited")

    def layers(self, count: int, edited: Collection[int] = ()) -> tuple[int, ...]:
        """The layers that are trained.

        Args:
            count: How many layers the model has.
            edited: The layers that an edit changed.

        Raises:
            UsageError: A layer that the model lacks, or no layer is left; or there are more than any model has.
        """
        if count > MOST:
            raise UsageError(f"The model's config names {count:,} layers, and {MOST:,} is the most. Correct it.")
        centre = self.numbers[0] if self.numbers else 0
        chosen: Collection[int] = {
            "none": range(count),
            "edited": set(range(count)) - set(edited),
            "unedited": edited,
            "below": range(centre, count),
            "window": range(centre - self.numbers[-1] // 2, centre + (self.numbers[-1] + 1) // 2)
            if self.numbers
            else (),
        }[self.kind]
        trained = tuple(layer for layer in range(count) if layer in chosen)
        if centre >= count or not trained:
            raise UsageError(
                f"--freeze {self} leaves none of the model's {count} layers to train, or names one that it lacks. "
                f"Layers are counted from 0{f'; edited were {sorted(edited)}' if self.needs_edit else ''}."
            )
        return trained

    def apply(self, model: Any, edited: Collection[int] = ()) -> tuple[int, ...]:
        """Set `requires_grad` of all parameters; `none` leaves it as it is.

        `edited` also trains what belongs to no layer: embeddings, final norm and head. `below:K` trains of
        those only what stands above the layers: the final norm, and the head where it is not the embedding matrix.
        `unedited` and `window` train layers alone.

        Args:
            model: A causal language model.
            edited: The layers that an edit changed.

        Returns:
            The layers that are trained.

        Raises:
            UsageError: As `layers`.
        """
        from retention_bench.models import block, num_layers

        count = num_layers(model)
        trained = self.layers(count, edited)
        if self.kind == "none":
            return trained
        inside = {id(p) for layer in range(count) for p in block(model, layer).parameters()}
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
        above = _above(model, inside) - embeddings  # a tied head is the embedding matrix
        for parameter in model.parameters():
            outside = id(parameter) not in inside
            if self.kind == "edited":
                parameter.requires_grad_(outside)
            else:
                parameter.requires_grad_(outside and self.kind == "below" and id(parameter) in above)
        for layer in trained:
            block(model, layer).requires_grad_(True)
        return trained

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self.numbers)])


def parse_freeze(text: str) -> Freeze:
    """Read a `--freeze`.

    Raises:
        UsageError: It is none of those.
    """
    if text in ("none", "edited", "unedited"):
        return Freeze(text)
    found = re.fullmatch(r"(below):(\d{1,9})|(window):(\d{1,9}):(\d{1,9})", text, re.ASCII)
    if found is None or (found[3] and int(found[5]) == 0):
        raise UsageError(
            f"--freeze {shown(text)} is not known. Allowed: {ALLOWED}; layers are counted from 0. below:K trains the "
            "layers from K on, window:C:W the W layers around C."
        )
    kind, *numbers = (part for part in found.groups() if part is not None)
    return Freeze(kind, tuple(map(int, numbers)))


def _above(model: Any, inside: Collection[int]) -> set[int]:
    """Ids of the parameters that are read after the last layer: the final norm's and the head's.

    Of every family the base model lists its parameters in the order they are used in.
    """
    parameters = list(model.base_model.parameters())
    last = max(place for place, parameter in enumerate(parameters) if id(parameter) in inside)
    return {id(p) for p in (*parameters[last + 1 :], *model.get_output_embeddings().parameters())}
