"""Keeping fine-tuning rows that mention an edited or intrinsic fact out of the training data.

The paper removes fine-tuning data that mentions an edited or intrinsic subject, relation keyword or object before it
trains, so that retention is not re-learning. A mention is a term as whole words, whatever its case and whatever Unicode
form it is written in: "Iran" is mentioned by "IRAN's", not by "Iranian".
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ahocorasick_rs import BytesAhoCorasick, Implementation

from retention_bench.errors import UsageError
from retention_bench.facts import Fact

Kind = Literal["subject", "object", "keyword"]
KINDS: tuple[Kind, ...] = ("subject", "object", "keyword")

SAMPLES = 20
"""How many removed rows a report shows."""

_EXCERPT = 80
"""Characters shown on either side of a mention."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What fine-tuning rows must not mention.

    Attributes:
        subjects: The facts' subjects.
        objects: Their objects, original and counterfactual.
        keywords: Keywords of their relations.
    """

    subjects: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            terms = getattr(self, field.name)
            for term in terms:
                if not _normalise(term).strip():
                    raise UsageError(f"Empty term {term!r} among the {field.name}: every text mentions it. Remove it.")
            object.__setattr__(self, field.name, tuple(sorted(set(terms))))

    @classmethod
    def from_facts(cls, facts: Iterable[Fact], *, keywords: Mapping[str, Sequence[str]] | None = None) -> Terms:
        """Collect the terms of edited and intrinsic facts.

        Args:
            facts: The facts, edited and intrinsic.
            keywords: Keywords by relation; those of relations that no fact has are left out. They are given and not
                guessed from the prompts: of "The mother tongue of {} is" a row with the word "mother" says nothing.
        """
        facts = list(facts)
        # Relations that share a template are one, named after all their ids: "P17+P131".
        relations = {part for fact in facts for part in fact.relation.split("+")}
        return cls(
            subjects=tuple(fact.subject for fact in facts),
            objects=tuple(o for fact in facts for o in (fact.target_true, fact.target_new) if o is not None),
            keywords=tuple(word for r, words in (keywords or {}).items() if r in relations for word in words),
        )


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


class Matcher:
    """Finds the terms that a text mentions, in time linear in the text.

    An Aho-Corasick automaton looks for all terms in one pass: for each term's longest piece between whitespace, in the
    UTF-8 of the text. It reports overlapping pieces too, so that "Iran" within "Iranian" hides no other term. The few
    terms left are searched for with their limits and whitespace.
    """

    def __init__(self, terms: Terms) -> None:
        """Index the terms."""
        by_piece: dict[str, list[tuple[Kind, str, re.Pattern[str]]]] = defaultdict(list)
        for kind, group in zip(KINDS, (terms.subjects, terms.objects, terms.keywords), strict=True):
            for term in group:
                by_piece[max(_normalise(term).split(), key=len)].append((kind, term, _pattern(term)))
        self._terms = list(by_piece.values())
        self._limits = [(piece[0].isalnum(), piece[-1].isalnum()) for piece in by_piece]
        # The whole table of transitions: twice as fast as the default, which saves memory with more than a few terms.
        self._automaton = BytesAhoCorasick([_utf8(piece) for piece in by_piece], implementation=Implementation.DFA)

    def find(self, text: str) -> list[Mention]:
        """The terms a text mentions, each once, sorted by kind and term.

        Args:
            text: Any text. In a script that puts no spaces between words, only a term that stands between other
                characters than letters and digits is found.
        """
        text = _normalise(text)
        encoded = _utf8(text)
        pieces = set()
        for piece, start, end in self._automaton.find_matches_as_indexes(encoded, overlapping=True):
            # Of bytes only ASCII's are known to be letters or digits: this lets too much through and never too little.
            limit_before, limit_after = self._limits[piece]
            if limit_before and encoded[start - 1 : start].isalnum():
                continue
            if limit_after and encoded[end : end + 1].isalnum():
                continue
            pieces.add(piece)
        mentions = []
        for piece in pieces:
            for kind, term, pattern in self._terms[piece]:
                if found := pattern.search(text):
                    start, end = max(found.start() - _EXCERPT, 0), found.end() + _EXCERPT
                    mentions.append(Mention(kind, term, " ".join(text[start:end].split())))
        return sorted(mentions)


@dataclasses.dataclass(frozen=True)
class Removed:
    """What a contamination filter took out.

    Attributes:
        seen: Rows it looked at.
        removed: Rows it took out.
        by_kind: How many of these mention a subject, an object, a keyword; a row may count for several.
        samples: The first mention of each of the first rows taken out, at most `SAMPLES`.
    """

    seen: int
    removed: int
    by_kind: Mapping[Kind, int]
    samples: tuple[Mention, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "seen": self.seen,
            "removed": self.removed,
            "by_kind": dict(self.by_kind),
            "samples": [mention._asdict() for mention in self.samples],
        }


class ContaminationFilter:
    """Lets rows pass that mention no term, and counts the others."""

    def __init__(self, terms: Terms) -> None:
        """Start with nothing seen."""
        self._matcher = Matcher(terms)
        self._seen = self._removed = 0
        self._by_kind: Counter[Kind] = Counter(dict.fromkeys(KINDS, 0))
        self._samples: list[Mention] = []

    def passes(self, text: str) -> bool:
        """Whether a row's text mentions no term."""
        self._seen += 1
        mentions = self._matcher.find(text)
        if not mentions:
            return True
        self._removed += 1
        self._by_kind.update({mention.kind for mention in mentions})
        if len(self._samples) < SAMPLES:
            self._samples.append(mentions[0])
        return False

    def report(self) -> Removed:
        """What was taken out so far."""
        return Removed(self._seen, self._removed, dict(self._by_kind), tuple(self._samples))


def _normalise(text: str) -> str:
    """Unicode's caseless form under compatibility: NFKC, casefold, and NFKC again, as casefolding can undo it."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _utf8(text: str) -> bytes:
    """UTF-8 that takes a lone surrogate too; JSON can hold one."""
    return text.encode("utf-8", "surrogatepass")


def _pattern(term: str) -> re.Pattern[str]:
    """A term between word limits; a limit is only asked for where the term itself ends in a letter or a digit.

    An underscore is no part of a word here: it marks emphasis in chats ("_Iran_").
    """
    term = _normalise(term)
    words = r"\s+".join(re.escape(word) for word in term.split())
    before = r"(?<![^\W_])" if term.strip()[0].isalnum() else ""
    after = r"(?![^\W_])" if term.strip()[-1].isalnum() else ""
    return re.compile(before + words + after)
