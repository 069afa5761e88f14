"""The first-content-token metric: does the first generated token that is no stop word begin the target?

From "On the Retention of Edited Knowledge in Fine-tuned Language Models" (Wen & Zhang), experimental setup: decode
greedily; while the most probable token is a stop word, keep decoding; the fact is retained if the first other token
equals the target's first token. `judge_ids` is that metric; `scorable` leaves out the facts that it cannot tell.
`judge_text` stands in for it where only the generated text is at hand, as under plain `lm_eval --model hf`. The two can
differ:

- Two words that share a first token: target "Guinea", generated "Guatemala", both from " Gu". Ids hit, text misses.
- A word that the limit of `MAX_DECODED_TOKENS` tokens cuts off after its first token. Ids hit, text misses.
- The same word in another tokenisation: "Paris" right after a quotation mark or a line end is not the token " Paris".
  Ids miss, text hits.
- A special token in the middle, which the text no longer shows. Ids miss, text may hit.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from retention_bench.facts import Fact, FactSet, target_token, token_text
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


NOT_FOUND = "the object's first token is a stop word or special, which the metric passes over"
TOO_SHORT = "the object's first content token is one character or digit"
SAME = "the old and the new object have the same first content token"
NO_WORD = "the object has no content word"
SAME_WORD = "the old and the new object have the same first content word"
TOO_LONG = "a prompt leaves no room for an answer in the model's context"

LeftOut = Mapping[str, tuple[str, ...]]
"""Ids of the facts that are left out, by reason."""


def scorable(
    facts: FactSet, tokenizer: PreTrainedTokenizerBase, *, context: int | None = None
) -> tuple[FactSet, LeftOut]:
    """Leave out the facts that the metric cannot judge: they would be a hit or a miss whatever was learned.

    An edited fact is judged by both its objects, since it was edited only if the new one can be told from the old one;
    any other by its true object. One is left out if

    - an object begins with a stop word or a special token, so that it could never be found;
    - an object's first content token is only one character or digit, see `is_short`: most years begin with "1";
    - the old and the new object have the same first content token, or are the same;
    - one of its prompts leaves no room for an answer, where the model's context is given.

    Args:
        facts: Edited facts have a `target_new`.
        tokenizer: The model's tokenizer.
        context: Tokens that the model reads at most.

    Returns:
        The other facts, in their order, and the ids of those that are left out, by reason.
    """
    objects = {text for fact in facts for text in (fact.target_true, fact.target_new) if text is not None}
    begins = {text: target_token(text, tokenizer) for text in objects}
    bad = {text: reason for text, token in begins.items() if (reason := _unfit(token, tokenizer))}
    kept, dropped = [], defaultdict[str, list[str]](list)
    for fact in facts:
        own = [text for text in (fact.target_true, fact.target_new) if text is not None]
        reason = next((bad[text] for text in own if text in bad), None)
        if reason is None and len(own) > 1 and begins[own[0]] == begins[own[1]]:
            reason = SAME
        if reason is None and context is not None and not _fits(fact, tokenizer, context - MAX_DECODED_TOKENS):
            reason = TOO_LONG
        if reason is None:
            kept.append(fact)
        else:
            dropped[reason].append(fact.id)
    return FactSet.of(kept), {reason: tuple(ids) for reason, ids in dropped.items()}


def scorable_as_text(facts: FactSet) -> tuple[FactSet, LeftOut]:
    """Leave out the facts that `judge_text` could not tell, for where no tokens are known; else as `scorable`."""
    kept, dropped = [], defaultdict[str, list[str]](list)
    for fact in facts:
        words = [next(_content_words(text), None) for text in (fact.target_true, fact.target_new) if text is not None]
        if None in words:
            dropped[NO_WORD].append(fact.id)
        elif len(words) > len(set(words)):
            dropped[SAME_WORD].append(fact.id)
        else:
            kept.append(fact)
    return FactSet.of(kept), {reason: tuple(ids) for reason, ids in dropped.items()}


def describe_left_out(left_out: LeftOut) -> str:
    """What `scorable` left out, in one line: how many facts, why, and which, three of each kind named."""
    parts = []
    for reason, ids in left_out.items():
        named = ", ".join(repr(name if len(name) <= 40 else f"{name[:37]}...") for name in ids[:3])
        parts.append(f"{len(ids):,}: {reason} ({named}{', ...' if len(ids) > 3 else ''})")
    count = sum(map(len, left_out.values()))
    return f"{count:,} {'fact is' if count == 1 else 'facts are'} left out ({'; '.join(parts)})"


def is_short(text: str) -> bool:
    """Whether a token's text is at most one letter or digit, and so begins too many answers to stand for one.

    Counted are whole letters and digits; a mark counts with the letter that it stands on, and a fragment of a
    character (U+FFFD), being less than one, not at all. An ideograph or a Hangul syllable is one of thousands and says
    as much as a word's first token, so one is enough.
    """
    counted = [c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c)[0] in "LN"]
    return len(counted) < 2 and not any(unicodedata.name(c, "").startswith(_LARGE_SCRIPTS) for c in counted)


_LARGE_SCRIPTS = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE")


def _unfit(token: int | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a target that begins with a token cannot be told, or None."""
    if token is None or is_special_token(token, tokenizer) or is_stop_token(token, tokenizer):
        return NOT_FOUND
    return TOO_SHORT if is_short(token_text(token, tokenizer)) else None


def _fits(fact: Fact, tokenizer: PreTrainedTokenizerBase, room: int) -> bool:
    """Whether all prompts of a fact have so many tokens at most."""
    # No token is less than a byte, and few prompts are long, so few are tokenised.
    long = (p for p in (fact.question, *fact.paraphrases, *fact.neighborhood) if len(p.encode()) + 2 > room)
    return all(len(tokenizer.encode(prompt)) <= room for prompt in long)


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
    """The words of a text that are no stop words, whichever way its accents are written (NFC).

    An apostrophe begins a piece of its own, as in "It 's".
    """
    pieces = "".join(
        " '"
        if character in "'\N{RIGHT SINGLE QUOTATION MARK}"
        else character
        if is_content_character(character)
        else " "
        for character in unicodedata.normalize("NFC", text)
    ).split()
    return (piece.lstrip("'") for piece in pieces if not is_stop_text(piece))
