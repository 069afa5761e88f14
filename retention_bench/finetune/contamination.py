"""Keeping fine-tuning rows that mention an edited or intrinsic fact out of the training data.

The paper removes fine-tuning data that mentions an edited or intrinsic subject, relation keyword or object before it
trains, so that retention is not re-learning. What a mention is stands in `mentions`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from retention_bench.finetune.mentions import KINDS, Kind, Matcher, Mention, Terms

SAMPLES = 20
"""How many removed rows, and how many terms, a report shows."""

LOOK = 5_000
"""Rows that are looked at before any is removed, for which names are common words."""

SMALL_ROWS, SMALL_SHARE = 3, 0.3
"""How many rows, and what share of those that mention a name, have it in small letters where it is a common word.

Own choice: of CounterFact's names in samples of IMDB, C4 and instruction chats, common words ("Nice", "Word",
"Reading", "Moon") stand so in 35 % of the rows or more, other names in 25 % or less ("English", "Hollywood").
"""


@dataclasses.dataclass(frozen=True)
class Removed:
    """What a contamination filter took out.

    Attributes:
        seen: Rows it looked at.
        removed: Rows it took out.
        by_kind: How many of these mention a subject, a subject without its number (and not the subject itself), an
            object, a keyword; a row may count for several.
        samples: The first mention of each of the first rows taken out, at most `SAMPLES`.
        terms: How many rows mention the terms that took out most, at most `SAMPLES` of them.
        common: Names that were taken for common words, and are no mentions in small letters.
    """

    seen: int
    removed: int
    by_kind: Mapping[Kind, int]
    samples: tuple[Mention, ...]
    terms: Mapping[str, int] = dataclasses.field(default_factory=dict)
    common: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "seen": self.seen,
            "removed": self.removed,
            "by_kind": dict(self.by_kind),
            "samples": [mention._asdict() for mention in self.samples],
            "terms": dict(self.terms),
            "common": list(self.common),
        }


class ContaminationFilter:
    """Lets rows pass that mention no term, and counts the others."""

    def __init__(self, terms: Terms) -> None:
        """Start with nothing seen, and no name taken for a common word."""
        self._terms = terms
        self._matcher = self._any_case = Matcher(terms)
        self._common: tuple[str, ...] = ()
        self._small: Counter[str] = Counter()
        self._capital: Counter[str] = Counter()
        self._seen = self._removed = 0
        self._by_kind: Counter[Kind] = Counter(dict.fromkeys(KINDS, 0))
        self._by_term: Counter[str] = Counter()
        self._samples: list[Mention] = []

    def look(self, texts: Iterable[str]) -> None:
        """Learn from rows which names are common words in them, before they are asked for; they are not counted.

        A name with capitals is one if it stands in small letters in `SMALL_ROWS` rows or more, and in `SMALL_SHARE` of
        those that mention it. For one word that a subject is without its number, one row is enough, as it must be
        specific by itself. Rows without any capital say nothing. Where a filter looks twice, all rows count.

        Args:
            texts: The rows' texts.
        """
        for text in texts:
            for name, small, capital in self._any_case.cases(text):
                self._small[name] += small
                self._capital[name] += capital
        alone = {name for name in self._terms.subjects_without_number if len(name.split()) == 1}
        common = (
            name
            for name, small in self._small.items()
            if small >= (1 if name in alone else SMALL_ROWS) and small >= SMALL_SHARE * (small + self._capital[name])
        )
        self._common = tuple(sorted(common))
        self._matcher = Matcher(self._terms, self._common)

    def passes(self, text: str) -> bool:
        """Whether a row's text mentions no term."""
        self._seen += 1
        mentions = self._matcher.find(text)
        if not mentions:
            return True
        self._removed += 1
        self._by_kind.update({mention.kind for mention in mentions})
        self._by_term.update({mention.term for mention in mentions})
        if len(self._samples) < SAMPLES:
            self._samples.append(mentions[0])
        return False

    def report(self) -> Removed:
        """What was taken out so far."""
        most = sorted(self._by_term.items(), key=lambda item: (-item[1], item[0]))[:SAMPLES]
        return Removed(self._seen, self._removed, dict(self._by_kind), tuple(self._samples), dict(most), self._common)
