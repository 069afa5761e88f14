"""Rows that are left out because they hold nothing to train on, counted by reason."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 3, 3, 80, 80


class Unusable(ValueError):  # noqa: N818 - it says of a row what it is
    """A row is left out.

    Attributes:
        reason: What is true of such rows, as they are counted: "have a message without text".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        """Say why, for all such rows and for this one."""
        super().__init__(detail or reason)
        self.reason = reason


class Drop(NamedTuple):
    """The rows that were left out for one reason.

    Attributes:
        rows: How many.
        first: Where the first of them stands, and what was found there.
    """

    rows: int
    first: str


class Dropped:
    """Counts the rows that are left out."""

    def __init__(self) -> None:
        """Start with none."""
        self._drops: dict[str, Drop] = {}

    def count(self, place: str, error: Unusable) -> None:
        """Count a row.

        Args:
            place: Where it stands in its file.
            error: Why it is left out.
        """
        before = self._drops.get(error.reason)
        first = place if str(error) == error.reason else f"{place}: {error}"
        self._drops[error.reason] = before._replace(rows=before.rows + 1) if before else Drop(1, first)

    @property
    def rows(self) -> int:
        """How many rows were left out."""
        return sum(drop.rows for drop in self._drops.values())

    def report(self) -> dict[str, Drop]:
        """What was left out so far, by reason."""
        return dict(self._drops)


class Copies:
    """Leaves out rows that say the same as one before them.

    Attributes:
        rows: How many it left out.
    """

    def __init__(self) -> None:
        """Start with none seen."""
        self.rows = 0
        self._seen: set[bytes] = set()

    def refuse(self, row: object) -> None:
        """Look at a row, or at the tokens that it became.

        Raises:
            Unusable: An equal one was looked at before.
        """
        digest = hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            self.rows += 1
            raise Unusable("are copies of another row")
        self._seen.add(digest)


def described(drops: Mapping[str, Drop]) -> str:
    """What was left out, in words: "3 have a message without text (line 7: ...), 1 ..."."""
    return ", ".join(f"{drop.rows} {reason} ({drop.first.rstrip('.')})" for reason, drop in drops.items())


def to_json(drops: Mapping[str, Drop]) -> dict[str, Any]:
    """What was left out as plain JSON values."""
    return {reason: drop._asdict() for reason, drop in drops.items()}


def shown(value: Any) -> str:
    """A value in a few characters, however large and deep it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write out a number of thousands of digits
        return "a number that is too long to show"
