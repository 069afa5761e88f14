"""Batches of requests written one after another, each on top of those before."""

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
class RememberingEditor(Protocol):
    """What an editor has besides if an edit keeps off the keys of those before."""

    def remember(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> Mapping[int, Tensor]:
        """What later edits get as `EditContext.remembered`; the model has the requests' edit applied."""


def edit_sequentially(
    editor: Editor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Sequence[EditRequest]],
    context: EditContext,
) -> list[WeightDelta]:
    """Edit batch after batch; the model is left as it was.

    Args:
        editor: The editor. AlphaEdit keeps off the earlier batches' keys; the others remember nothing, as in their
            references.
        model: The unedited model.
        tokenizer: Its tokenizer.
        batches: The requests of each edit.
        context: As for `Editor.edit`; its statistics are the unedited model's and serve all batches.

    Returns:
        A delta a batch; their sum edits the unedited model.

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
            if isinstance(editor, RememberingEditor):
                remembered = editor.remember(model, tokenizer, requests, context)
                context = dataclasses.replace(context, remembered=remembered)
            if context.statistics is not None:
                # They were compared with the unedited model; from now on its keys differ on purpose.
                context = dataclasses.replace(context, statistics=dataclasses.replace(context.statistics, probe={}))
            deltas.append(delta)
    return deltas
