"""Text of others made safe to show: names, ids, paths, facts, answers and errors must not drive a terminal."""

from __future__ import annotations

import unicodedata

from rich.markup import escape

_KEPT = "\n\t"
_BIDI = frozenset(map(chr, (0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def plain(text: object) -> str:
    r"""A text with what would drive a terminal written out: escape sequences as `\x1b`, half characters as `\ud800`.

    Line ends and tabs stay. Marks that turn the direction of what follows are written out too, as they can make a text
    look like another.
    """
    return "".join(_shown(character) for character in str(text))


def markup(text: object) -> str:
    """The same, where rich reads markup: `[/x]` in it is text and ends no style."""
    return escape(plain(text))


def _shown(character: str) -> str:
    drives = character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    if character in _KEPT or not drives:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()
