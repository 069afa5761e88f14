"""The one list of stop words, and which generated tokens and words count as one.

The paper decodes greedily past stop words without naming its list, so this one is our choice. The rules:

1. A text is a stop text if it is in `STOP_WORDS` once white space around it is stripped and it is case-folded, or if it
   holds no letter, digit or combining mark at all: punctuation, symbols, white space, line ends, nothing.
2. A generated token is a stop token if its decoded text is a stop text.
3. A token that is a fragment of a character (it decodes to U+FFFD) is content: it begins or ends a letter that only
   further tokens complete, and skipping it would skip part of a word.
4. The list holds English function words only. It leaves out whatever can be an answer, or begin one, once case is
   folded: numbers ("one"), months ("may"), names ("will"), acronyms ("us"), content words ("mine", "like"), and single
   letters other than the words "a" and "i".
5. A contraction counts in the two pieces that byte-level tokenizers cut it into: "it" + "'s", "doesn" + "'t".
"""

from __future__ import annotations

import unicodedata

_LIST = """
a an the this that these those such same other another each every either neither both all any some no
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves someone something anyone anything everyone everything
who whom whose which what when where why how whoever whatever whichever whenever wherever
and or but nor so yet if then than because while although though unless until whereas whether since as
of in on at by for with from to into onto upon about against between among amongst through throughout during
before after above below over under up down out off within without along across behind beyond near around
toward towards per via despite
am is are was were be been being has have had having do does did doing done
can could shall should would might must ought cannot
not also very too just only even still already again ever never always often once here there now thus hence
therefore however indeed perhaps rather quite almost more most less least much many few several own
's 't 're 've 'm 'll 'd n't
aren couldn didn doesn hadn hasn isn shouldn wasn weren wouldn
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
