"""The one list of stop words, which generated tokens and words count as one, and where an answer ends.

The paper decodes greedily past stop words without naming its list, so this one is our choice. The rules:

1. A text is a stop text if it is in `STOP_WORDS` once white space around it is stripped and it is case-folded, or if it
   holds no letter, digit or combining mark at all: punctuation, symbols, white space, line ends, nothing.
2. A generated token is a stop token if its decoded text is a stop text.
3. A token that is a fragment of a character (it decodes to U+FFFD) is content: it begins or ends a letter that only
   further tokens complete, and skipping it would skip part of a word.
4. The list holds English function words only. It leaves out whatever can be an answer, or begin one, once case is
   folded: numbers ("one"), months ("may"), names ("will"), acronyms ("us"), content words ("mine", "like"), and single
   letters other than the words "a" and "i".
5. Passing over a word must leave what is said of the object that follows as it is. So the list has
   - no denial: not, no, never, neither, nor, cannot, n't, 't, and the verbs that a tokenizer cuts off before n't;
   - no exception and no contrast: without, except, but, than, other, another, unless, although, yet, however;
   - no restriction and no degree: only, just, even, few, less, more, rather, almost, quite, hardly;
   - nothing that leaves it open: if, whether, or, either, perhaps, and the modal verbs ("would be French", "'d");
   - nothing that moves it to another time: once, ever, before, after, until. Tense alone does not ("was French").
6. A preposition stays if the object is the place, time or topic itself: in, at, on, of, within, from, to, by, during.
   It goes if the sentence is as true of another one: near, around, off, outside, beyond, behind, above, below, over,
   under, between, across, along, towards, against. "From" stays for origins ("is from Paris"); distances have a
   content word in front of it ("far from", "miles from").
7. An answer ends with its sentence or line, see `ends_answer`.
8. A contraction counts in the two pieces that byte-level tokenizers cut it into: "it" + "'s", "they" + "'re".
"""

from __future__ import annotations

import unicodedata

STOP_WORDS_VERSION = 2
"""Raised with every change of the rules; answers that were judged by different versions are never mixed."""

_LIST = """
a an the this that these those such same each every both all any some
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves someone something everyone everything
who whom whose which what when where why how whoever whatever whichever whenever wherever
and so then because while since as
of in on at by for with from to into onto upon about among amongst through throughout during within per via
am is are was were be been being has have had having do does did doing done
also very still already again always often here there now thus hence therefore indeed most much many several own
's 're 've 'm 'll
"""

STOP_WORDS: frozenset[str] = frozenset(_LIST.split())
"""English function words, case-folded; contractions in pieces, with a straight apostrophe."""

_FRAGMENT = "\N{REPLACEMENT CHARACTER}"


def is_content_character(character: str) -> bool:
    """Whether a character is a letter, a digit or number, a combining mark, or U+FFFD, a fragment of a character."""
    return unicodedata.category(character)[0] in "LNM" or character == _FRAGMENT


def is_stop_text(text: str) -> bool:
    """Whether a token's or a word's text is a stop word, or holds nothing that could be part of an answer."""
    word = text.strip().casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return word in STOP_WORDS or not any(map(is_content_character, word))


_SENTENCE_ENDS = frozenset(".!?\N{HORIZONTAL ELLIPSIS}\N{IDEOGRAPHIC FULL STOP}\N{FULLWIDTH EXCLAMATION MARK}")
_LINE_ENDS = frozenset("\n\r\v\f\x85\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}")


def ends_sentence(character: str) -> bool:
    """Whether a character ends a sentence."""
    return character in _SENTENCE_ENDS


def ends_answer(text: str, begun: bool) -> bool:
    """Whether a stop text ends an answer: a sentence's end always does, a line's end once something has been said.

    White space and line ends in front of everything are passed over, as chats begin with them.

    Args:
        text: A stop text.
        begun: Whether anything but white space came before it.
    """
    for character in text:
        if character in _SENTENCE_ENDS or (begun and character in _LINE_ENDS):
            return True
        begun = begun or not character.isspace()
    return False
