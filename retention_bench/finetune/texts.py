"""Plain text as token ids that end with EOS."""

from __future__ import annotations

from typing import Any

from retention_bench.errors import UsageError
from retention_bench.finetune.base import Example
from retention_bench.finetune.dropped import Unusable, shown


def check_tokenizer(tokenizer: Any, *, fast: bool = False) -> None:
    """Refuse a tokenizer that rows cannot be made with. A padding token is not needed: padding is masked.

    Args:
        tokenizer: The tokenizer.
        fast: Whether it must say which characters a token stands for.

    Raises:
        UsageError: It is slow and must not be, or has no EOS token.
    """
    if fast and not tokenizer.is_fast:
        raise UsageError("This fine-tune needs a fast tokenizer (tokenizer.json); the model comes with a slow one.")
    if tokenizer.eos_token_id is None:
        raise UsageError("The tokenizer has no EOS token, which ends a text and a turn. Set `eos_token` in its config.")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids, with the BOS that the tokenizer adds and an EOS at the end."""
    return [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]


def encode_completion(tokenizer: Any, prompt: str, completion: str, max_length: int) -> list[Example]:
    """Tokenise a prompt with its completion; only the completion and EOS are targets.

    Both are tokenised as one text, which is what a model is trained and asked with. A token that begins in the prompt
    and ends in the completion is a target.

    Args:
        tokenizer: A fast tokenizer.
        prompt: The prompt.
        completion: What follows it, with the space before it where there is to be one.
        max_length: Tokens to keep, from the front.

    Returns:
        One example.

    Raises:
        Unusable: No token of the completion is left.
    """
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id][:max_length]
    ends = [end for _, end in encoded["offset_mapping"]]
    first = next((index for index, end in enumerate(ends) if end > len(prompt)), len(ids))
    if first >= len(ids):
        raise Unusable(f"have no part of the completion within max_length {max_length}")
    return [Example(ids, [-100] * first + ids[first:])]


def encode_class(tokenizer: Any, text: str, label: int, max_length: int) -> Example:
    """A text whose class is asked at its EOS.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        label: Its class.
        max_length: Tokens to keep: those from the front, and EOS.
    """
    ids = encode_text(tokenizer, text)
    return Example([*ids[: max_length - 1], ids[-1]] if len(ids) > max_length else ids, [label])


def parse_class(cell: Any, classes: int) -> int:
    """Check a cell that holds a class, as a number or, in CSV, as the text of one.

    Raises:
        ValueError: It is none of 0 to `classes` - 1.
    """
    if isinstance(cell, str) and cell.isascii() and cell.isdecimal() and cell == str(int(cell[:9])):
        cell = int(cell)
    if isinstance(cell, bool) or not isinstance(cell, int) or not 0 <= cell < classes:
        allowed = ", ".join(map(str, range(classes))) if classes <= 10 else f"0 to {classes - 1}"
        raise ValueError(f"must be one of {allowed}, got {shown(cell)}")
    return cell
