"""Which tokens begin an object where it stands, behind a prompt and one space.

The first *content* token is the one notion of "the object's first token" that the filter, the metric and trajectories
share. Some tokenizers put a lone space in front of it: Llama 3, Qwen, Mistral and Gemma cut " 1984" into " ", "1" (or
"198") and so on, and SentencePiece puts one before a character that it has no other piece for. Such a space is part of
the object's text, so editors and fine-tunes train it with the rest (`object_ids`), and nothing of the answer, so the
metric passes over it and whoever looks at probabilities asks behind it (`first_tokens`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A word to stand before the target, so that the target is tokenised as it is behind a prompt. Tokenised alone, " Paris"
# differs under tokenizers that put a space in front of every text themselves (SentencePiece's dummy prefix).
_CARRIER = "is"


class FirstTokens(NamedTuple):
    """How an object begins.

    Attributes:
        lead: The tokens without visible text in front, a lone space or none.
        token: The first content token: the first with visible text; None if no token has any.
    """

    lead: tuple[int, ...]
    token: int | None


def first_tokens(target: str, tokenizer: PreTrainedTokenizerBase) -> FirstTokens:
    """Find the first content token of a target where it stands: after a word and one space.

    Args:
        target: The object, without a leading space.
        tokenizer: The model's tokenizer.
    """
    tokens = object_ids(target, tokenizer)
    for place, token in enumerate(tokens):
        if token_text(token, tokenizer).strip():
            return FirstTokens(tuple(tokens[:place]), token)
    return FirstTokens(tuple(tokens), None)


def target_token(target: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of a target's first content token, see `first_tokens`."""
    return first_tokens(target, tokenizer).token


def object_ids(target: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a whole object where it stands: after a word and one space, no special tokens added.

    A lone space in front is among them.

    Args:
        target: The object, without a leading space.
        tokenizer: The model's tokenizer.
    """
    before = tokenizer.encode(_CARRIER, add_special_tokens=False)
    return list(tokenizer.encode(f"{_CARRIER} {target}", add_special_tokens=False)[len(before) :])


def token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one token, special tokens included."""
    return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
