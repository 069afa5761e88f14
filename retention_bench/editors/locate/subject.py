"""Token rows with the index of the subject's last token, where locate-and-edit methods act.

The index comes from the tokenizer's offsets in the whole text, so it is right with a BOS token, with any padding, and
for a subject that also occurs elsewhere in the text. (The references tokenise pieces and add their lengths.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from retention_bench.editors.base import EditRequest
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import object_ids

BARE = "{}"
"""The context template that adds nothing."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One tokenised prompt.

    Attributes:
        ids: Token ids, with the special tokens that the tokenizer adds.
        subject: Index of the subject's last token in `ids`.
    """

    ids: tuple[int, ...]
    subject: int


def subject_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], requests: Sequence[EditRequest]
) -> list[Row]:
    """Tokenise prompts with the subjects filled in.

    Args:
        tokenizer: A fast tokenizer.
        prompts: Texts with `{}` once, where the subject goes.
        requests: Whose subject goes into each prompt.

    Returns:
        A row for each prompt.

    Raises:
        UsageError: The tokenizer is not a fast one, so it gives no offsets.
        RetentionBenchError: A subject has no token; the fact is named.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and gives no character offsets, which locate the "
            "subject. Use a model folder with a tokenizer.json."
        )
    texts, spans = [], []
    for prompt, request in zip(prompts, requests, strict=True):
        before, _, after = prompt.partition("{}")
        texts.append(before + request.subject + after)
        spans.append((len(before), len(before) + len(request.subject.rstrip())))
    encoded = tokenizer(texts, return_offsets_mapping=True)
    rows = []
    for ids, offsets, span, request in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, requests, strict=True
    ):
        # The last token that begins before the subject ends. Special tokens have empty spans.
        inside = [
            index for index, (start, end) in enumerate(offsets) if start < span[1] and end > span[0] and start < end
        ]
        if not inside:
            raise RetentionBenchError(
                f"Fact {request.fact_id!r}: the tokenizer has no token for the subject {request.subject!r}. "
                "Leave the fact out."
            )
        rows.append(Row(tuple(ids), inside[-1]))
    return rows


def context_rows(
    tokenizer: PreTrainedTokenizerBase, templates: Iterable[str], requests: Sequence[EditRequest]
) -> list[list[Row]]:
    """For every request, each of its prompts in the bare template and then in the context templates.

    Returns:
        A list for each request, of prompts x (1 + templates) rows.
    """
    templates = (BARE, *templates)
    texts = [[t.replace("{}", prompt) for prompt in request.prompts for t in templates] for request in requests]
    owners = [request for request, group in zip(requests, texts, strict=True) for _ in group]
    rows = iter(subject_rows(tokenizer, [text for group in texts for text in group], owners))
    return [[next(rows) for _ in group] for group in texts]


def target_ids(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> list[int]:
    """Token ids of a request's target as it stands behind a prompt: one space before it, no special tokens."""
    return object_ids(request.target_new, tokenizer)


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Refuse an empty list of requests.

    Raises:
        UsageError: There are none.
    """
    if not requests:
        raise UsageError(
            "There is nothing to edit: the list of requests is empty. Give at least one fact with a target_new."
        )
