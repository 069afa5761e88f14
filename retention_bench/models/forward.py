"""Parts of a forward pass: read keys and block outputs on the way up, or start above a block.

A block is left out by giving it, for the time of one pass, a forward that hands its input through. The model's own code
goes on making masks and position embeddings and calling its blocks, so nothing of a family is written down here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retention_bench.models.families import block, final_norm, head, num_layers, projection


@contextlib.contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no parameter gradients; on the way out every module and parameter is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right, whatever the tokenizer's own side is.

    Returns:
        Ids and attention mask, both int64 [rows, length]. Padding has the id 0, which the mask hides.
    """
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def last_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states behind the final norm.

    Args:
        model: The model.
        ids: Token ids [rows, length], padded on the right.
        mask: 1 for tokens, 0 for padding [rows, length].

    Returns:
        [rows, length, d_model] in the model's dtype.
    """
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Log-probabilities of the next token.

    Args:
        model: The model.
        hidden: Hidden states behind the final norm [..., d_model].

    Returns:
        [..., vocabulary] in float32.
    """
    return head(model)(hidden).float().log_softmax(-1)


@torch.no_grad()
def record(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, *, keys: Sequence[int] = (), output: int | None = None
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Run the model up to the last layer asked for, and read what passes there.

    Where the last thing asked for is a key, that layer's own projection does not run; the final norm never does.

    Args:
        model: The model.
        ids: Token ids [rows, length], padded on the right.
        mask: 1 for tokens, 0 for padding [rows, length].
        keys: Layers whose projection input is read.
        output: Layer whose block output is read.

    Returns:
        The keys by layer, each [rows, length, d_mlp], and the block output [rows, length, d_model] or None, all in the
        model's dtype.

    Raises:
        UsageError: The model has no such layer.
    """
    found: dict[int, Tensor] = {}
    out: list[Tensor] = []

    def key_reader(layer: int) -> Callable[..., None]:
        def read(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[layer] = inputs[0]

        return read

    def read_output(module: torch.nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        out.append(result)

    with contextlib.ExitStack() as stack:
        for layer in keys:
            handle = projection(model, layer).register_forward_pre_hook(key_reader(layer))
            stack.callback(handle.remove)
        if output is not None:
            stack.callback(block(model, output).register_forward_hook(read_output).remove)
        top = max([*keys, *([] if output is None else [output])])
        stack.enter_context(_forwards(model, dict.fromkeys(range(top + 1, num_layers(model)), _hand_through)))
        stack.enter_context(_forward(final_norm(model), _hand_through))
        if output != top:
            stack.enter_context(_forward(projection(model, top), _nothing(model.config.hidden_size)))
        last_hidden(model, ids, mask)
    return found, out[0] if out else None


def hidden_from(model: PreTrainedModel, layer: int, output: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Run only the blocks above a layer, as if that layer's block had put out `output`; gradients flow into it.

    Args:
        model: The model.
        layer: The layer below the first block that runs.
        output: What stands for the layer's block output [rows, length, d_model], in the model's dtype.
        ids: The rows' token ids [rows, length], padded on the right.
        mask: 1 for tokens, 0 for padding [rows, length].

    Returns:
        Hidden states behind the final norm [rows, length, d_model].
    """
    replaced: dict[int, Callable[..., Tensor]] = dict.fromkeys(range(layer), _hand_through)
    replaced[layer] = lambda *args, **kwargs: output
    with _forwards(model, replaced):
        return last_hidden(model, ids, mask)


def _hand_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _nothing(size: int) -> Callable[[Tensor], Tensor]:
    """A forward in a projection's place that puts out zeros [..., size]."""
    return lambda keys: keys.new_zeros(*keys.shape[:-1], size)


@contextlib.contextmanager
def _forwards(model: PreTrainedModel, replacements: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
    """Give blocks another `forward`; afterwards each has its own again."""
    with contextlib.ExitStack() as stack:
        for layer, forward in replacements.items():
            stack.enter_context(_forward(block(model, layer), forward))
        yield


@contextlib.contextmanager
def _forward(module: torch.nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Give a module another `forward`; afterwards it has its own again."""
    # In the instance's own dict, where a dispatched model already keeps a wrapped forward.
    attributes = vars(module)
    own = {name: attributes[name] for name in ("forward",) if name in attributes}
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(own)
