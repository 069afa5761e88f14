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
from typing import Literal

from transformers import PreTrainedTokenizerBase

from retention_bench.facts import Fact, FactSet, first_tokens, object_ids, target_token, token_text
from retention_bench.scoring.stop_words import ends_answer, ends_sentence, is_content_character, is_stop_text

MAX_DECODED_TOKENS = 8
"""Tokens among which the first content token is looked for; without one it is a miss. Our choice, the paper sets no
limit."""

MAX_TARGET_TOKENS = 16
"""Tokens of a target that `whole` looks at; what is longer is judged by so many."""

MAX_ANSWER_TOKENS = MAX_DECODED_TOKENS + MAX_TARGET_TOKENS
"""Tokens decoded at most, kept free in the model's context behind a prompt."""

Outcome = Literal["new", "true", "related", "other", "none"]
"""What was said: the fact's new object, its true one, another one of the relation, something else, nothing."""


@dataclass(frozen=True)
class Verdict:
    """What the metric says about one answer.

    Attributes:
        hit: Whether the first content token equals the target's.
        content_token: Id of the first content token; None if decoding ended before there was one.
        skipped: Number of stop tokens before it, or in all.
        strict: Whether the answer begins with the target's first content token, at most a lone space in front.
        whole: Whether all of the target's tokens stand there, from the first content token on.
    """

    hit: bool
    content_token: int | None
    skipped: int
    strict: bool
    whole: bool


class DecodedText(str):
    """A generated text that remembers its tokens, so that lm-eval hands them on to the metric.

    lm-eval passes a task nothing but the generated string; a subclass reaches the task's `process_results` intact.

    Attributes:
        token_ids: The generated ids as decoded; see `is_answered` for where that ends.
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
        if reason is None and context is not None and not _fits(fact, tokenizer, context - MAX_ANSWER_TOKENS):
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


def _begin(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int, bool]:
    """How an answer begins.

    Returns:
        The place of the first content token, or None; how many stop tokens come before it; and whether the answer
        ended before there was one.
    """
    begun = False
    for place, token in enumerate(token_ids[:MAX_DECODED_TOKENS]):
        if is_special_token(token, tokenizer):
            return None, place, True
        text = token_text(token, tokenizer)
        if not is_stop_text(text):
            lead = text[: next(i for i, character in enumerate(text) if is_content_character(character))]
            ended = begun and ends_answer(lead.replace(".", ""), begun)  # ".NET" is a word, "\nNext" another line
            return (None, place, True) if ended else (place, place, False)
        if ends_answer(text, begun):
            return None, place, True
        begun = begun or bool(text.strip())
    stops = min(len(token_ids), MAX_DECODED_TOKENS)
    return None, stops, stops == MAX_DECODED_TOKENS


def target_ids(target: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A target's tokens from its first content token on, `MAX_TARGET_TOKENS` at most."""
    lead = first_tokens(target, tokenizer).lead
    return object_ids(target, tokenizer)[len(lead) :][:MAX_TARGET_TOKENS]


def is_answered(token_ids: Sequence[int], length: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding may end: no further token would change the verdict.

    Args:
        token_ids: What has been decoded.
        length: Tokens of the target from its first content token on.
        tokenizer: The model's tokenizer.
    """
    place, _, ended = _begin(token_ids, tokenizer)
    if place is None:
        return ended
    return len(token_ids) >= place + length or is_special_token(token_ids[-1], tokenizer)


def judge_ids(token_ids: Sequence[int], target: str, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Judge greedily decoded tokens.

    Args:
        token_ids: Generated ids, prompt not included; the first content token must be among the first
            `MAX_DECODED_TOKENS`.
        target: The object the model should answer with, without a leading space.
        tokenizer: The model's tokenizer.

    Returns:
        A hit if the first token that is no stop token equals the target's first token. A special token, the end of the
        sentence or the line before that, stop tokens only, or no tokens: a miss without content token.
    """
    decoded = list(token_ids)
    place, skipped, _ = _begin(decoded, tokenizer)
    if place is None:
        return Verdict(hit=False, content_token=None, skipped=skipped, strict=False, whole=False)
    lead, token = first_tokens(target, tokenizer)
    wanted = target_ids(target, tokenizer)
    return Verdict(
        hit=decoded[place] == token,
        content_token=decoded[place],
        skipped=skipped,
        strict=decoded[: place + 1] in ([token], [*lead, token]),
        whole=bool(wanted) and decoded[place : place + len(wanted)] == wanted,
    )


@dataclass(frozen=True)
class TextVerdict:
    """As `Verdict`, of a text.

    Attributes:
        hit: Whether the first content word equals the target's.
        content: The first content word; None if there is none before the answer ends.
        strict: Whether it is the very first word.
        whole: Whether all of the target's words stand there, from its first content word on.
    """

    hit: bool
    content: str | None
    strict: bool
    whole: bool


def judge_text(text: str, target: str) -> TextVerdict:
    """Judge a generated text by words, where the tokens are not known.

    Stop words are skipped on both sides, so "The Hague" is found by "Hague". Words end at punctuation; case counts. The
    first content word must be among the first `MAX_DECODED_TOKENS` words.
    """
    words = _words(_sentence(text))
    place = next((i for i, word in enumerate(words[:MAX_DECODED_TOKENS]) if not is_stop_text(word)), None)
    wanted = _words(target)
    first = next((i for i, word in enumerate(wanted) if not is_stop_text(word)), None)
    if place is None or first is None:
        return TextVerdict(hit=False, content=None if place is None else words[place], strict=False, whole=False)
    following = _words(text)
    return TextVerdict(
        hit=words[place] == wanted[first],
        content=words[place],
        strict=place == 0 and words[place] == wanted[first],
        whole=following[place : place + len(wanted) - first] == wanted[first:],
    )


def content_word(text: str) -> str | None:
    """The first word of a text that is no stop word, whatever stands in front of it."""
    return next(_content_words(text), None)


def _sentence(text: str) -> str:
    """A text up to where the answer ends; a point within a word ends nothing."""
    text = text.lstrip()
    for place, character in enumerate(text):
        inside = place + 1 < len(text) and is_content_character(text[place + 1])
        if ends_answer(character, begun=True) and not (ends_sentence(character) and inside):
            return text[:place]
    return text


def _words(text: str) -> list[str]:
    """The words of a text, whichever way its accents are written (NFC).

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
    return [piece if is_stop_text(piece) else piece.lstrip("'") for piece in pieces if piece != "'"]


def _content_words(text: str) -> Iterator[str]:
    return (word for word in _words(text) if not is_stop_text(word))
