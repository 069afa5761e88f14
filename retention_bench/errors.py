"""The two errors that reach a user, and the one way to say that a name is not known.

Every message says what was given, what is allowed and what to do next. The command line prints them without a
traceback; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 100
_SHOWN = 200


class RetentionBenchError(Exception):
    """Something went wrong that the user can act on (exit code 1).

    Args:
        message: What was given, what is allowed and what to do next, in one line.
        quoted: What another program said about it, if that takes more lines.
    """

    exit_code = 1

    def __init__(self, message: str = "", quoted: str = "") -> None:
        super().__init__(message, *([quoted] if quoted else []))

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class UsageError(RetentionBenchError):
    """What was asked for does not exist or is not well formed (exit code 2)."""

    exit_code = 2


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> UsageError:
    """Build the error for a name that is not in a registry.

    Args:
        kind: What the name stands for, for example `"editor"`.
        given: The name as it was given.
        allowed: The names that exist.

    Returns:
        An error that lists the allowed names and, where one is close, asks "did you mean".
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names[:_LISTED]) if names else "none"
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    shown = given if len(given) <= _SHOWN else f"{given[: _SHOWN - 3]}..."
    return UsageError(f"Unknown {kind} {shown!r}.{hint} Allowed: {listed}{more}.")
