"""Which token begins an object where it stands, behind a prompt and one space."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A word to stand before the target, so that the target is tokenised as it is behind a prompt. Tokenised alone, " Paris"
# differs under tokenizers that put a space in front of every text themselves (SentencePiece's dummy prefix).
_CARRIER = "is"


def target_token(target: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that begins a target where it stands: after a word and one space, no special tokens added.

    A leading token without visible text (SentencePiece's lone space) is passed over, as decoding passes over it.

    Args:
        target: The object, without a leading space.
        tokenizer: The model's tokenizer.

    Returns:
        The id, or None if no token of the target has visible text.
    """
    tokens = object_ids(target, tokenizer)
    return next((token for token in tokens if token_text(token, tokenizer).strip()), None)


def object_ids(target: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a whole object where it stands: after a word and one space, no special tokens added.

    Args:
        target: The object, without a leading space.
        tokenizer: The model's tokenizer.
    """
    before = tokenizer.encode(_CARRIER, add_special_tokens=False)
    return list(tokenizer.encode(f"{_CARRIER} {target}", add_special_tokens=False)[len(before) :])


def token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one token, special tokens included."""
    return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
