"""Sequential editing: batches of requests, each edited into the model that the earlier ones left."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, Editor, EditRequest
from retention_bench.models import WeightDelta, restoring


@runtime_checkable
class CachingEditor(Protocol):
    """What an editor also has if its edits preserve earlier ones, as AlphaEdit's do."""

    def update_cache(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> Mapping[int, Tensor]:
        """What later edits get as `EditContext.cache_c`; the model has the requests' edit applied."""


def edit_sequentially(
    editor: Editor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Sequence[EditRequest]],
    context: EditContext,
) -> list[WeightDelta]:
    """Edit batch after batch; the model is left as it was.

    Args:
        editor: The editor. AlphaEdit preserves the earlier batches' edits; the others take no account of them, as in
            their references.
        model: The unedited model.
        tokenizer: Its tokenizer.
        batches: The requests of each edit.
        context: As for `Editor.edit`; its covariance is the unedited model's and serves all batches.

    Returns:
        A delta for each batch; their sum edits the unedited model.

    Raises:
        RetentionBenchError: As `Editor.edit`.
    """
    deltas: list[WeightDelta] = []
    saved: set[str] = set()
    with contextlib.ExitStack() as edits:
        for requests in batches:
            delta = editor.edit(model, tokenizer, requests, context)
            # Saved once, not once a batch, or the copies would fill the memory.
            edits.enter_context(restoring(model, delta.entries.keys() - saved))
            saved |= delta.entries.keys()
            delta.apply_(model)
            if isinstance(editor, CachingEditor):
                context = dataclasses.replace(context, cache_c=editor.update_cache(model, tokenizer, requests, context))
            if context.covariance is not None:
                # It was compared with the unedited model; from now on the model's keys differ on purpose.
                unmarked = dataclasses.replace(context.covariance, fingerprint={})
                context = dataclasses.replace(context, covariance=unmarked)
            deltas.append(delta)
    return deltas
