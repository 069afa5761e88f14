"""Forward passes that run only what a change at one token and one layer can reach.

What an editor adds at a row's subject, in layer L, cannot reach the tokens before it nor the blocks below it. So those
are run once: the tokens before it leave their attention keys and values in a cache, the blocks below it the suffix's
hidden states. A pass then costs the tokens from the subject on, times the blocks above L.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from retention_bench.models.families import block, mlp, num_layers
from retention_bench.models.forward import hand_through, hooked, replaced_forwards

Site = Literal["block", "mlp"]
"""Whose output is looked at: the whole block's, or that of its MLP (the projection's, behind its bias)."""


@dataclasses.dataclass(frozen=True)
class Suffixes:
    """Rows of tokens, each cut in two: a prefix that is done with, and a suffix that runs in every pass.

    Rows are laid out so that all suffixes begin in the same column: prefixes are padded on the left, suffixes on the
    right. So the tokenizer's own padding side has no part, and the place of the change is always column 0.

    Attributes:
        layer: The layer L.
        site: Whose output of that layer is given in `output` and taken by `hidden`.
        output: What the site puts out for the suffixes [rows, S, d_model], in the model's dtype.
        ids: The suffixes' token ids [rows, S].
        mask: 1 for tokens, 0 for padding, prefixes included [rows, P + S].
        positions: The suffixes' positions [rows, S].
        entering: What enters block L for the suffixes [rows, S, d_model]; None where no pass needs it.
        cache: Attention keys and values of the prefixes [rows, heads, P, head_dim] by layer, of those that passes run;
            empty where no row has a prefix.
    """

    layer: int
    site: Site
    output: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    entering: Tensor | None
    cache: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, rows: Sequence[Sequence[int]], begins: Sequence[int], layer: int, site: Site
    ) -> Suffixes:
        """Run the prefixes through the whole model, and the suffixes up to the layer.

        Args:
            model: The model; call this inside `frozen(model)`.
            rows: Token ids.
            begins: Index of each row's first suffix token.
            layer: The layer L.
            site: Whose output is looked at.

        Raises:
            UsageError: The model has no such layer.
        """
        found: dict[str, Tensor] = {}
        block(model, layer)  # refuses a layer that is not there, before anything runs
        before = max(begins)
        length = max(len(row) - begin for row, begin in zip(rows, begins, strict=True))
        ids = torch.zeros(len(rows), before + length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, (row, begin) in enumerate(zip(rows, begins, strict=True)):
            place = slice(before - begin, before - begin + len(row))
            ids[number, place] = torch.tensor(row)
            mask[number, place] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)

        cache = DynamicCache()
        if before:
            model.base_model(
                input_ids=ids[:, :before],
                attention_mask=mask[:, :before],
                position_ids=positions[:, :before],
                past_key_values=cache,
                use_cache=True,
            )
        kept = {number: (keys, values) for number, (keys, values, *_) in enumerate(cache)}
        with contextlib.ExitStack() as stack:
            watched = block(model, layer) if site == "block" else mlp(model, layer)
            stack.enter_context(hooked(watched, output=lambda output: found.update(output=output)))
            stack.enter_context(hooked(block(model, layer), input=lambda hidden: found.update(entering=hidden)))
            above = {block(model, number): hand_through for number in range(layer + 1, num_layers(model))}
            stack.enter_context(replaced_forwards(model, above))
            _run(model, ids[:, before:], mask, positions[:, before:], kept)
        # Passes at the MLP run the block's attention, hence need what enters it; passes at the block begin above it.
        lowest = layer + (site == "block")
        return cls(
            layer=layer,
            site=site,
            output=found["output"],
            ids=ids[:, before:],
            mask=mask,
            positions=positions[:, before:],
            entering=found["entering"] if site == "mlp" else None,
            cache={number: pair for number, pair in kept.items() if number >= lowest},
        )

    def take(self, rows: Tensor) -> Suffixes:
        """The same for some of the rows."""
        return dataclasses.replace(
            self,
            output=self.output[rows],
            ids=self.ids[rows],
            mask=self.mask[rows],
            positions=self.positions[rows],
            entering=None if self.entering is None else self.entering[rows],
            cache={number: (keys[rows], values[rows]) for number, (keys, values) in self.cache.items()},
        )

    def hidden(self, model: PreTrainedModel, output: Tensor) -> Tensor:
        """Run what is above the site, as if it had put out `output`; gradients flow into that.

        Args:
            model: The model.
            output: In the place of `self.output`.

        Returns:
            The suffixes' hidden states behind the final norm [rows, S, d_model].
        """
        here = block(model, self.layer)
        replaced: dict[torch.nn.Module, Callable[..., Any]]
        replaced = {block(model, number): hand_through for number in range(self.layer)}
        if self.site == "block":
            replaced[here] = lambda *args, **kwargs: output
        else:
            forward, entering = here.forward, self.entering
            replaced[here] = lambda hidden_states, *args, **kwargs: forward(entering, *args, **kwargs)
            replaced[mlp(model, self.layer)] = lambda *args, **kwargs: output
        with replaced_forwards(model, replaced):
            return _run(model, self.ids, self.mask, self.positions, self.cache)


def _run(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, prefixes: Mapping[int, tuple[Tensor, Tensor]]
) -> Tensor:
    """A pass over the suffixes, behind the prefixes' keys and values, which only layers that run need to have."""
    before = mask.shape[1] - ids.shape[1]
    cache: DynamicCache | None = None
    if before:
        # A pass appends to its cache, so each has its own. Of a layer that does not run only the length is asked.
        length = mask.new_zeros(len(ids), 1, before, 1)
        cache = DynamicCache([prefixes.get(number, (length, length)) for number in range(num_layers(model))])
    return model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
