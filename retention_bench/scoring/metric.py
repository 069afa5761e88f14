"""The first-content-token metric: does the first generated token that is no stop word begin the target?

From "On the Retention of Edited Knowledge in Fine-tuned Language Models" (Wen & Zhang), experimental setup: decode
greedily; while the most probable token is a stop word, keep decoding; the fact is retained if the first other token
equals the target's first token. `judge_ids` is that metric. `judge_text` stands in for it where only the generated text
is at hand, as under plain `lm_eval --model hf`. The two can differ:

- Two words that share a first token: target "Guinea", generated "Guatemala", both from " Gu". Ids hit, text misses.
- A word that the limit of `MAX_DECODED_TOKENS` tokens cuts off after its first token. Ids hit, text misses.
- The same word in another tokenisation: "Paris" right after a quotation mark or a line end is not the token " Paris".
  Ids miss, text hits.
- A special token in the middle, which the text no longer shows. Ids miss, text may hit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet, target_token, token_text
from retention_bench.scoring.stop_words import is_content_character, is_stop_text

MAX_DECODED_TOKENS = 8
"""Tokens decoded at most; if all of them are stop tokens, it is a miss. Our choice, the paper sets no limit."""


@dataclass(frozen=True)
class Verdict:
    """What the metric says about one answer.

    Attributes:
        hit: Whether the first content token equals the target's.
        content_token: Id of the first content token; None if decoding ended before there was one.
        skipped: Number of stop tokens before it, or in all.
    """

    hit: bool
    content_token: int | None
    skipped: int


class DecodedText(str):
    """A generated text that remembers its tokens, so that lm-eval hands them on to the metric.

    lm-eval passes a task nothing but the generated string; a subclass reaches the task's `process_results` intact.

    Attributes:
        token_ids: The generated ids as decoded, up to the first content token or the end of decoding.
        tokenizer: The tokenizer they belong to.
    """

    token_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    def __new__(cls, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> DecodedText:
        """Decode ids to text, special tokens left out."""
        ids = [int(token) for token in token_ids]
        text = super().__new__(cls, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        text.token_ids = tuple(ids)
        text.tokenizer = tokenizer
        return text


def is_special_token(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is special (end of text, padding, unknown, …): it ends the decoding."""
    # Asked through decoding, because `all_special_ids` leaves out special tokens without a role (Llama 3 has 250).
    return not tokenizer.decode([token_id], skip_special_tokens=True) and bool(token_text(token_id, tokenizer))


def is_stop_token(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding goes on past this token: its text is a stop text and it is no special token."""
    return is_stop_text(token_text(token_id, tokenizer)) and not is_special_token(token_id, tokenizer)


def is_scorable(target: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the metric can ever find this target: its first token is neither a stop token nor a special one."""
    token = target_token(target, tokenizer)
    return token is not None and not is_special_token(token, tokenizer) and not is_stop_token(token, tokenizer)


def check_targets(facts: FactSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse facts with a target that the metric could never find.

    Looked at are `target_new` of edited facts, `target_true` of intrinsic ones and of edited ones with neighbours.

    Raises:
        RetentionBenchError: A target's first token is a stop token or special; the first such fact is named.
    """
    refused = [
        (fact.id, target)
        for fact in facts
        for target in ([fact.target, fact.target_true] if fact.neighborhood else [fact.target])
        if not is_scorable(target, tokenizer)
    ]
    if refused:
        fact_id, target = refused[0]
        token = target_token(target, tokenizer)
        shown = "" if token is None else f", {token_text(token, tokenizer)!r},"
        others = f" ({len(refused)} targets in all)" if len(refused) > 1 else ""
        raise RetentionBenchError(
            f"Fact {fact_id!r}: the first token{shown} of the target {target!r} is a stop word or special, which the "
            f"retention metric skips, so it could never be found{others}. "
            "Start the target with a content word, or leave the fact out."
        )


def judge_ids(token_ids: Sequence[int], target: str, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Judge greedily decoded tokens.

    Args:
        token_ids: Generated ids, prompt not included; at most the first `MAX_DECODED_TOKENS` count.
        target: The object the model should answer with, without a leading space.
        tokenizer: The model's tokenizer.

    Returns:
        A hit if the first token that is no stop token equals the target's first token. A special token before that,
        stop tokens only, or no tokens: a miss without content token.
    """
    decoded = list(token_ids)[:MAX_DECODED_TOKENS]
    for skipped, token in enumerate(decoded):
        if is_special_token(token, tokenizer):
            return Verdict(hit=False, content_token=None, skipped=skipped)
        if not is_stop_token(token, tokenizer):
            return Verdict(hit=token == target_token(target, tokenizer), content_token=token, skipped=skipped)
    return Verdict(hit=False, content_token=None, skipped=len(decoded))


def judge_text(text: str, target: str) -> bool:
    """Judge a generated text by words, where the tokens are not known.

    Stop words are skipped on both sides, so "The Hague" is found by "Hague". Words end at punctuation; case counts.

    Returns:
        Whether the first content word of the text equals the first content word of the target.
    """
    wanted = next(_content_words(target), None)
    return wanted is not None and next(_content_words(text), None) == wanted


def _content_words(text: str) -> Iterator[str]:
    """The words of a text that are no stop words; an apostrophe begins a piece of its own, as in "It 's"."""
    pieces = "".join(
        " '"
        if character in "'\N{RIGHT SINGLE QUOTATION MARK}"
        else character
        if is_content_character(character)
        else " "
        for character in text
    ).split()
    return (piece.lstrip("'") for piece in pieces if not is_stop_text(piece))
