"""What MEMIT and AlphaEdit share: the residual distributed over several layers, lowest first (MEMIT, algorithm 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.locate.keys import SubjectStates
from retention_bench.models import LowRank, WeightDelta, is_in_out, projection, projection_name

Solve = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer, its keys [requests, d_mlp] and residuals [requests, d_model]; returns two factors [d_mlp, rank] and
[rank, d_model], whose product is what is added to the projection, seen as a map from keys on the left."""


def distribute_residual(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    context: EditContext,
    layers: Sequence[int],
    values: Tensor,
    solve: Solve,
) -> WeightDelta:
    """Edit layer after layer, each with its share of the residual: the values minus what the last block puts out.

    Keys and block outputs are read with the lower layers' edits in place; afterwards the model is as it was.

    Args:
        model: The model; call this inside `frozen(model)`.
        tokenizer: Its tokenizer.
        requests: The requests.
        context: Its templates and progress are used.
        layers: The layers, ascending.
        values: What the last layer's block shall put out at the subjects' last tokens [requests, d_model], float32.
        solve: Computes one layer's change.

    Returns:
        The sum of the layers' changes, of low rank.
    """
    delta = WeightDelta({})
    states = SubjectStates(model, tokenizer, requests, context.templates)
    with contextlib.ExitStack() as edits:
        for done, layer in enumerate(layers):
            keys = states.mean_keys(layer)
            # Read anew at each layer, and distributed evenly over this layer and those above it.
            residual = (values - states.outputs(layers[-1])) / (len(layers) - done)
            left, right = solve(layer, keys, residual)
            if not is_in_out(projection(model, layer)):
                left, right = right.T, left.T
            step = WeightDelta({f"{projection_name(model, layer)}.weight": LowRank(left, right)})
            edits.enter_context(step.applied(model))
            delta += step
            context.progress("layers", done + 1, len(layers), {"residual": float(residual.norm(dim=1).mean())})
    return delta
