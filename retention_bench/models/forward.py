"""Parts of a forward pass: read keys and block outputs on the way up, and start above a block.

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

from retention_bench.models.families import block, family, num_layers, projection


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


def last_hidden(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    *,
    start: tuple[int, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Hidden states behind the final norm.

    Args:
        model: The model.
        ids: Token ids [rows, length], padded on the right.
        mask: 1 for tokens, 0 for padding [rows, length].
        start: A layer and what stands for its block's output [rows, length, d_model]; only the blocks above it run.
        weights: By full parameter name, what stands for the model's own in this pass; gradients flow into them.

    Returns:
        [rows, length, d_model] in the model's dtype.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    replaced: dict[torch.nn.Module, Callable[..., Tensor]] = {}
    if start is not None:
        layer, output = start
        replaced = {block(model, below): hand_through for below in range(layer)}
        replaced[block(model, layer)] = lambda *args, **kwargs: output
    with replaced_forwards(model, replaced):
        if not weights:  # `functional_call` looks at every module, which a GPU waits for
            return model.base_model(**inputs).last_hidden_state
        own = f"{model.base_model_prefix}."
        inner = {name.removeprefix(own): weight for name, weight in weights.items()}
        return torch.func.functional_call(model.base_model, inner, kwargs=inputs).last_hidden_state


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Log-probabilities of the next token.

    Args:
        model: The model.
        hidden: Hidden states behind the final norm [..., d_model].

    Returns:
        [..., vocabulary] in float32.
    """
    logits = model.get_output_embeddings()(hidden).float()
    # Gemma 2 squashes its logits; the other families have no such setting, or have it at None.
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


@torch.no_grad()
def record(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    *,
    keys: Sequence[int] = (),
    output: int | None = None,
    start: tuple[int, Tensor] | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Run the model up to the last layer asked for, and read what passes there.

    Where the last thing asked for is a key, that layer's own projection does not run.

    Args:
        model: The model.
        ids: Token ids [rows, length], padded on the right.
        mask: 1 for tokens, 0 for padding [rows, length].
        keys: Layers whose projection input is read.
        output: Layer whose block output is read.
        start: A layer and what its block put out for these rows in an earlier pass [rows, length, d_model]; only the
            blocks above it run.

    Returns:
        The keys by layer, each [rows, length, d_mlp], and the block output [rows, length, d_model] or None, all in the
        model's dtype.

    Raises:
        UsageError: The model has no such layer.
    """
    found: dict[int, Tensor] = {}
    out: list[Tensor] = []

    def key_reader(layer: int) -> Callable[[Tensor], None]:
        return lambda key: found.update({layer: key})

    with contextlib.ExitStack() as stack:
        for layer in keys:
            stack.enter_context(hooked(projection(model, layer), input=key_reader(layer)))
        if output is not None:
            stack.enter_context(hooked(block(model, output), output=out.append))
        top = max([*keys, *([] if output is None else [output])])
        unused: dict[torch.nn.Module, Callable[..., Any]]
        unused = {block(model, layer): hand_through for layer in range(top + 1, num_layers(model))}
        if output != top:
            size = model.config.hidden_size
            unused[projection(model, top)] = lambda key: key.new_zeros(*key.shape[:-1], size)
        stack.enter_context(replaced_forwards(model, unused))
        last_hidden(model, ids, mask, start=start)
    return found, out[0] if out else None


@contextlib.contextmanager
def hooked(
    module: torch.nn.Module,
    *,
    input: Callable[[Tensor], object] | None = None,
    output: Callable[[Tensor], object] | None = None,
) -> Iterator[None]:
    """For the time of a `with` block, hand a module's input or its output to a function."""

    def before(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if input is not None:
            input(inputs[0])

    def after(_: torch.nn.Module, inputs: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> None:
        if output is not None:
            output(result[0] if isinstance(result, tuple) else result)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hand_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a block that is left out."""
    return hidden_states


@contextlib.contextmanager
def replaced_forwards(
    model: PreTrainedModel, replacements: Mapping[torch.nn.Module, Callable[..., Any]]
) -> Iterator[None]:
    """For the time of a `with` block, give modules another `forward`, which may return a tensor for a tuple."""
    blocks = {block(model, layer) for layer in range(num_layers(model))}
    with contextlib.ExitStack() as stack:
        for module, forward in replacements.items():
            if module in blocks and family(model.config.model_type).tuples:
                forward = _as_tuple(forward)
            # In the instance's own dict, where a dispatched model already keeps a wrapped forward.
            attributes = vars(module)
            if "forward" in attributes:
                stack.callback(attributes.__setitem__, "forward", attributes["forward"])
            else:
                stack.callback(attributes.__delitem__, "forward")
            attributes["forward"] = forward
        yield


def _as_tuple(forward: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        result = forward(*args, **kwargs)
        return result if isinstance(result, tuple) else (result, None)

    return wrapped
