"""The words that ask for a relation, taken from its prompts: keywords for the contamination filter.

The paper filters fine-tuning data by relation keywords and does not list them; in its case study of a developer one is
"develop". So of "{} was developed by" the content words are taken, and of each what is left once a regular ending is
cut off: `develop*`, which stands for "developed", "developer" and "development" too, see `keyword_forms`. The rules are
for English. Words of subjects are left to the filter's own rules for names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from retention_bench.facts.fact import Fact

AUTO = "auto"
"""The setting `keywords` that takes the words of `relation_keywords`."""

FACTS, SHARE = 2, 0.05
"""How many facts of a relation, and what share of them, have a word in their prompts where it is the relation's.

Of the words that stand in paraphrases alone, in the 10,000 facts of counterfact_edit.json those that belong to the
relation stand in 9 % of its facts or more, but for two; what is left of unrelated sentences ("Category", "County") in
1.9 % or less.
"""

_SHORTEST = 4
"""Letters that are left when an ending is cut off: "us*" of "used" would stand for "user" and "us"."""

_FUNCTION_WORDS = frozenset(
    """
a about above across after again against all almost along already also although always am among an and another any are
around as at be because been before being below between both but by can cannot could did do does doing done down during
each either else ever every few for from further had has have having he hence her here hers herself him himself his how
however i if in indeed into is it its itself just least less like many may me might mine more most much must my myself
neither never no nobody none nor not nothing now of off often on once one only onto or other others ought our ours out
over own per perhaps quite rather same shall she should since so some someone something still such than that the their
theirs them themselves then there therefore these they thing things this those though through thus to together too
toward towards two under unless until up upon us very via was we were what whatever when where whereas whether which
while who whoever whom whose why will with within without would yet you your yours yourself
""".split()
)

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_POSSESSIVE = re.compile(r"['\N{RIGHT SINGLE QUOTATION MARK}]s\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?\n]\s")
_DOUBLED = re.compile(r"([bdgmnprt])\1$")
_ENDINGS = "e|s|es|ed|er|ers|ing|ings|or|ors|ion|ions|ment|ments"


def relation_keywords(facts: Iterable[Fact]) -> dict[str, tuple[str, ...]]:
    """The keywords of every relation, for `Terms.from_facts`.

    They are the content words of the relation's prompts; and those of the paraphrases' that enough of its facts have,
    see `FACTS`, of the sentence with the subject alone: CounterFact puts unrelated sentences before it.

    Args:
        facts: All facts there are of the relations, those of a pool rather than those of a cell: the keywords are then
            the same whichever facts are drawn.

    Returns:
        By relation its keywords, sorted; those of `keyword` that end in `*` stand for several forms of a word.
    """
    count: Counter[str] = Counter()
    prompts: dict[str, set[str]] = defaultdict(set)
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for fact in facts:
        own = set(_words(fact.prompt.replace("{}", " ")))
        count[fact.relation] += 1
        prompts[fact.relation] |= own
        asked[fact.relation].update(own.union(*(_words(_around(text, fact.subject)) for text in fact.paraphrases)))
    enough = {relation: max(FACTS, SHARE * facts) for relation, facts in count.items()}
    return {
        relation: tuple(sorted(own | {word for word, facts in asked[relation].items() if facts >= enough[relation]}))
        for relation, own in sorted(prompts.items())
    }


def keyword(word: str) -> str:
    """A word as a keyword: without a regular ending, in whose place there is `*`.

    Args:
        word: A word in small letters.

    Returns:
        `develop*` of "developed", "developing" and "develops"; the word itself where too little would be left.
    """
    stem = word
    if word.endswith("ies"):
        stem = word[:-3] + "y"
    elif word.endswith(("sses", "xes", "ches", "shes", "zes")):
        stem = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        stem = word[:-1]
    elif word.endswith("ing"):
        stem = _DOUBLED.sub(r"\1", word[:-3])
    elif word.endswith("ed"):
        stem = _DOUBLED.sub(r"\1", word[:-2])
    stem = stem.removesuffix("e")
    return f"{stem}*" if len(stem) >= _SHORTEST and stem.isalpha() else word


def keyword_forms(stem: str) -> tuple[str, str]:
    """What a keyword with `*` stands for.

    Args:
        stem: The keyword without the `*`, in the letters of the text that is searched.

    Returns:
        What all its forms begin with, and a regular expression of how they go on: with nothing or a regular ending,
        before which a consonant may be doubled. "party" is no form of `part*`.
    """
    if stem.endswith("y") and len(stem) > 1:
        return stem[:-1], f"(?:y|y(?:{_ENDINGS})|ies|ied|ier|iers)"
    doubled = f"(?:{stem[-1]}(?=[ei]))?" if stem[-1] in "bdgmnprt" else ""
    return stem, f"(?:{doubled}(?:{_ENDINGS}))?"


def _words(text: str) -> Iterable[str]:
    """The keywords of a text."""
    for word in _WORD.findall(_POSSESSIVE.sub("", text).casefold()):
        if len(word) > 2 and word not in _FUNCTION_WORDS:
            yield keyword(word)


def _around(text: str, subject: str) -> str:
    """The sentence of a prompt that its subject is in, without the subject; nothing where it isn't in the prompt."""
    before, found, after = text.partition(subject)
    if not found:
        return ""
    return f"{_SENTENCE_END.split(before)[-1]} {after}"
