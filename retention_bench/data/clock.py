"""The fixed date that chat templates are given."""

from __future__ import annotations

import datetime

TODAY = datetime.datetime(2026, 1, 1)
"""What a template that writes the date of the day into a chat (Llama 3.2, Granite, gpt-oss) is told, whatever the day:
the same command must give the same tokens tomorrow."""


def strftime_now(pattern: str) -> str:
    """`TODAY` as text, under the name and in the form that chat templates ask for the time."""
    return TODAY.strftime(pattern)
