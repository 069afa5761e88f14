"""Which terms a text mentions: names and keywords as whole words, in any case and any Unicode form.

"Iran" is mentioned by "IRAN's", not by "Iranian". Two rules are for names alone:

- A subject's name without its trailing version or number is a term too, see `without_number`.
- A name that is a common word, as "Nice" and "Reading" are, is not mentioned where it stands in small letters. Which
  names are, the data says, see `ContaminationFilter.look`. At a sentence's beginning, and in capitals, a common word
  cannot be told from the name, and is taken for it: better a row too few than a fact learned again.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ahocorasick_rs import BytesAhoCorasick, Implementation

from retention_bench.errors import UsageError
from retention_bench.facts import Fact, keyword_forms

Kind = Literal["subject", "subject_without_number", "object", "keyword"]
KINDS: tuple[Kind, ...] = ("subject", "subject_without_number", "object", "keyword")

_EXCERPT = 80
"""Characters shown on either side of a mention."""

_SHORTEST = 4
"""Letters of a single word that a subject is without its number: "TV" of "TV 2" says nothing."""

_BEFORE_NUMBER = frozenset(
    "a an and at episode for in mk no nr number of on part season the to v version vol volume".split()
)
"""Words that go with the number behind them: "Symphony No. 5", "Revolution of 1956"."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What fine-tuning rows must not mention.

    Attributes:
        subjects: The facts' subjects.
        objects: Their objects, original and counterfactual.
        keywords: Keywords of their relations. One that ends in `*` stands for the forms of a word, see `keyword_forms`.
    """

    subjects: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            terms = getattr(self, field.name)
            for term in terms:
                if not _normalise(term).strip() or (field.name == "keywords" and not term.strip("* \t\n")):
                    raise UsageError(f"Empty term {term!r} among the {field.name}: every text mentions it. Remove it.")
            object.__setattr__(self, field.name, tuple(sorted(set(terms))))

    @classmethod
    def from_facts(cls, facts: Iterable[Fact], *, keywords: Mapping[str, Sequence[str]] | None = None) -> Terms:
        """Collect the terms of edited and intrinsic facts.

        Args:
            facts: The facts, edited and intrinsic.
            keywords: Keywords by relation, one's own or those of `relation_keywords`; of relations that no fact has
                they are left out. None for none: of "The mother tongue of {} is" a row with the word "mother" says
                little.
        """
        facts = list(facts)
        # Relations that share a template are one, named after all their ids: "P17+P131".
        relations = {part for fact in facts for part in (fact.relation, *fact.relation.split("+"))}
        return cls(
            subjects=tuple(fact.subject for fact in facts),
            objects=tuple(o for fact in facts for o in (fact.target_true, fact.target_new) if o is not None),
            keywords=tuple(word for r, words in (keywords or {}).items() if r in relations for word in words),
        )

    @property
    def subjects_without_number(self) -> tuple[str, ...]:
        """What subjects are without their number, where that is no name of a fact itself."""
        names = {_normalise(name) for name in (*self.subjects, *self.objects)}
        shorter = {short for subject in self.subjects if (short := without_number(subject))}
        return tuple(sorted(short for short in shorter if _normalise(short) not in names))


class Mention(NamedTuple):
    """A term in a text.

    Attributes:
        kind: What the term is.
        term: The term as it was given.
        excerpt: The words around it, normalised.
    """

    kind: Kind
    term: str
    excerpt: str


class _Term(NamedTuple):
    kind: Kind
    term: str
    pattern: re.Pattern[str]
    common: bool


class Matcher:
    """Finds the terms that a text mentions, in time linear in the text.

    An Aho-Corasick automaton looks for all terms in one pass: for each term's longest piece between whitespace, in the
    UTF-8 of the text. It reports overlapping pieces too, so that "Iran" within "Iranian" hides no other term. The few
    terms left are searched for with their limits and whitespace.
    """

    def __init__(self, terms: Terms, common: Collection[str] = ()) -> None:
        """Index the terms.

        Args:
            terms: The terms.
            common: The names among them that are common words. They are no mentions in small letters; one word that a
                subject is without its number is no term then.
        """
        self._common = frozenset(common)
        groups = (terms.subjects, terms.subjects_without_number, terms.objects, terms.keywords)
        by_piece: dict[str, list[_Term]] = defaultdict(list)
        open_ended = set()
        for kind, group in zip(KINDS, groups, strict=True):
            for name in group:
                if kind == "subject_without_number" and name in self._common and len(name.split()) == 1:
                    continue
                begins, goes_on = keyword_forms(name[:-1]) if kind == "keyword" and name.endswith("*") else (name, "")
                piece = max(_normalise(begins).split(), key=len)
                if goes_on:
                    open_ended.add(piece)
                is_common = kind != "keyword" and name in self._common
                by_piece[piece].append(_Term(kind, name, _pattern(_normalise(begins), goes_on), is_common))
        self._terms = list(by_piece.values())
        self._limits = [(p[0].isalnum(), p[-1].isalnum() and p not in open_ended) for p in by_piece]
        # The whole table of transitions: twice as fast as the default, which saves memory with more than a few terms.
        self._automaton = BytesAhoCorasick([_utf8(piece) for piece in by_piece], implementation=Implementation.DFA)
        self._whole: dict[str, set[str]] = defaultdict(set)
        for subject in terms.subjects:
            if short := without_number(subject):
                self._whole[short].add(subject)

    def find(self, text: str) -> list[Mention]:
        """The terms a text mentions, each once, sorted by kind and term.

        Args:
            text: Any text. In a script that puts no spaces between words, only a term that stands between other
                characters than letters and digits is found.
        """
        normal = _normalise(text)
        terms = self._candidates(normal)
        if not terms:
            return []
        mentions = []
        for kind, name, pattern, is_common in terms:
            found, searched = pattern.search(normal), normal
            if found and is_common and _has_capitals(text):
                places = list(_places(name, text))
                # A form that only casefolding knows for the name's ("STRASSE") has no place, and is a mention.
                found = next((place for place, small in places if not small), None) if places else found
                searched = found.string if found else normal
            if found:
                start, end = max(found.start() - _EXCERPT, 0), found.end() + _EXCERPT
                mentions.append(Mention(kind, name, " ".join(searched[start:end].split())))
        subjects = {mention.term for mention in mentions if mention.kind == "subject"}
        # A subject is not counted twice.
        return sorted(
            mention
            for mention in mentions
            if mention.kind != "subject_without_number" or not subjects & self._whole[mention.term]
        )

    def cases(self, text: str) -> Iterator[tuple[str, bool, bool]]:
        """Whether the names that a text mentions stand there in small letters, and whether otherwise.

        Nothing is said of a name without capitals, nor by a text without.
        """
        if not _has_capitals(text):
            return
        seen = set()
        for kind, name, pattern, _ in self._candidates(normal := _normalise(text)):
            if kind == "keyword" or name in seen or not _has_capitals(name):
                continue
            seen.add(name)
            if pattern.search(normal):
                small = {small for _, small in _places(name, text)}
                yield name, True in small, small != {True}

    def _candidates(self, normal: str) -> list[_Term]:
        """The terms that a normalised text has a piece of."""
        encoded = _utf8(normal)
        pieces = set()
        for piece, start, end in self._automaton.find_matches_as_indexes(encoded, overlapping=True):
            # Of bytes only ASCII's are known to be letters or digits: this lets too much through and never too little.
            limit_before, limit_after = self._limits[piece]
            if limit_before and encoded[start - 1 : start].isalnum():
                continue
            if limit_after and encoded[end : end + 1].isalnum():
                continue
            pieces.add(piece)
        return [term for piece in pieces for term in self._terms[piece]] if pieces else []


def without_number(name: str) -> str | None:
    """A name without the version or number at its end: "Windows Mobile" of "Windows Mobile 6.5".

    What is cut off are the last words that hold a digit, and what goes with them ("No.", "of"). A number within a word
    ("Shahab-2") and a Roman one ("Elizabeth II") stay.

    Args:
        name: A subject.

    Returns:
        Two words or more, or one of `_SHORTEST` letters; None where there is no number, or less is left.
    """
    words = name.split()
    kept = list(words)
    while kept and any(map(str.isdigit, kept[-1])):
        kept.pop()
    if kept == words:
        return None
    while kept and (not any(map(str.isalpha, kept[-1])) or kept[-1].strip(".,:;()").casefold() in _BEFORE_NUMBER):
        kept.pop()
    short = " ".join(kept).rstrip(" ,:;-([")
    if len(kept) == 1 and sum(map(str.isalpha, short)) < _SHORTEST:
        return None
    return short or None


def _has_capitals(text: str) -> bool:
    return text != text.lower()


def _places(name: str, text: str) -> Iterator[tuple[re.Match[str], bool]]:
    """Where a name stands in a text, in any case, and whether in small letters; places may overlap."""
    cased = _compatible(text)
    low, at = _small(cased), 0
    pattern = _pattern(_small(_compatible(name)))
    while found := pattern.search(low, at):
        yield found, not _has_capitals(cased[found.start() : found.end()])
        at = found.start() + 1


def _small(text: str) -> str:
    """A text in small letters, but for the few characters that are several then: all others keep their place."""
    small = text.lower()
    return small if len(small) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _normalise(text: str) -> str:
    """Unicode's caseless form under compatibility: NFKC, casefold, and NFKC again, as casefolding can undo it."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _compatible(text: str) -> str:
    """The same without the casefolding."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _utf8(text: str) -> bytes:
    """UTF-8 that takes a lone surrogate too; JSON can hold one."""
    return text.encode("utf-8", "surrogatepass")


def _pattern(term: str, goes_on: str = "") -> re.Pattern[str]:
    """A term between word limits; a limit is only asked for where the term itself ends in a letter or a digit.

    An underscore is no part of a word here: it marks emphasis in chats ("_Iran_").

    Args:
        term: The term, normalised as the text.
        goes_on: A regular expression of how its last word goes on.
    """
    words = r"\s+".join(re.escape(word) for word in term.split())
    before = r"(?<![^\W_])" if term.strip()[0].isalnum() else ""
    after = r"(?![^\W_])" if goes_on or term.strip()[-1].isalnum() else ""
    return re.compile(before + words + goes_on + after)
