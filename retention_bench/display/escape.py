"""Text of others made safe to show: names, ids, paths, facts, answers and errors must not drive a terminal."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_LINE_ENDS = "\n\t"
_BIDI = frozenset(map(chr, (0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
_ASCII = re.compile(r"[\n\t\x20-\x7e]*")


def plain(text: object) -> str:
    r"""A text with what would drive a terminal written out: escape sequences as `\x1b`, half characters as `\ud800`.

    Line ends and tabs stay. Marks that turn the direction of what follows are written out too, as they can make a text
    look like another.
    """
    return _written_out(str(text), _LINE_ENDS)


def line(text: object) -> str:
    r"""The same in one line: line ends and tabs are written out too, as `\n` and `\t`."""
    return _written_out(str(text), "")


def cut(text: str, length: int = 300) -> str:
    """A text, its end left out where it is longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def markup(text: object) -> str:
    """As `plain`, where rich reads markup: `[/x]` in it is text and ends no style."""
    from rich.markup import escape  # here, since rich takes a while

    return escape(plain(text))


def json_text(value: Any, *, indent: int | None = 2, ascii_only: bool = False) -> str:
    r"""JSON in which nothing drives a terminal: such characters stand there as `\u001b`, which is the same JSON.

    Args:
        value: A JSON value.
        indent: As for `json.dumps`.
        ascii_only: Write every other character than ASCII's so.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    if _ASCII.fullmatch(text):
        return text
    return "".join(f"\\u{ord(c):04x}" if c not in _LINE_ENDS and _drives(c) else c for c in text)


def _written_out(text: str, kept: str) -> str:
    if _ASCII.fullmatch(text) and (kept or not any(end in text for end in _LINE_ENDS)):
        return text  # nearly always
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if c not in kept and _drives(c) else c for c in text
    )


def _drives(character: str) -> bool:
    return character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
