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

from retention_bench.errors import UsageError
from retention_bench.facts import Fact

Kind = Literal["subject", "object", "keyword"]
KINDS: tuple[Kind, ...] = ("subject", "object", "keyword")

SAMPLES = 20
"""How many removed rows a report shows."""

_WORD = re.compile(r"[^\W_]+")
_ASCII_WORDS = "".join(chr(i) if chr(i).isalnum() else " " for i in range(128))
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
        relations = {fact.relation for fact in facts}
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
    """Finds the terms that a text mentions, in time linear in the text and independent of the number of terms.

    A term can only be in a text that holds the term's longest word. So the text is cut into words once, those are
    looked up, and only the few terms that are left are searched for with their punctuation and their limits.
    """

    def __init__(self, terms: Terms) -> None:
        """Index the terms."""
        self._by_word: dict[str, list[tuple[Kind, str, re.Pattern[str]]]] = defaultdict(list)
        for kind, group in zip(KINDS, (terms.subjects, terms.objects, terms.keywords), strict=True):
            for term in group:
                words = _words(_normalise(term))
                # A term without a letter or digit ("!!!") has no word to look up and is searched for in every text.
                self._by_word[max(words, key=len, default="")].append((kind, term, _pattern(term)))

    def find(self, text: str) -> list[Mention]:
        """The terms a text mentions, each once, sorted by kind and term.

        Args:
            text: Any text. In a script that puts no spaces between words, only a term that stands between other
                characters than letters and digits is found.
        """
        text = _normalise(text)
        mentions = []
        for word in ("", *self._by_word.keys() & _words(text)):
            for kind, term, pattern in self._by_word.get(word, ()):
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


def _words(text: str) -> list[str]:
    """The runs of letters and digits; three times as fast for ASCII as with the regular expression."""
    return text.translate(_ASCII_WORDS).split() if text.isascii() else _WORD.findall(text)


def _pattern(term: str) -> re.Pattern[str]:
    """A term between word limits; a limit is only asked for where the term itself ends in a letter or a digit.

    An underscore is no part of a word here: it marks emphasis in chats ("_Iran_").
    """
    term = _normalise(term)
    words = r"\s+".join(re.escape(word) for word in term.split())
    before = r"(?<![^\W_])" if _WORD.match(term.lstrip()) else ""
    after = r"(?![^\W_])" if _WORD.match(term.rstrip()[-1]) else ""
    return re.compile(before + words + after)
