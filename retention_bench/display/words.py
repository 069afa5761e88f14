"""Rates, differences of rates and changes of log-odds in words. Each is given as `results.json` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def short_rate(rate: Mapping[str, Any]) -> str:
    """A rate with its interval, in per cent."""
    if rate["rate"] is None:
        return "none"
    low, high = rate["ci95"]
    return f"{100 * rate['rate']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def rate_of(rate: Mapping[str, Any], what: str) -> str:
    """A rate with its interval and how many of what it is of."""
    return f"{short_rate(rate)} of {rate['total']} {what}" if rate["total"] else f"no {what}"


def counted_rate(rate: Mapping[str, Any]) -> str:
    """A rate with its hits and its interval."""
    if rate["rate"] is None:
        return "none of none"
    low, high = rate["ci95"]
    return f"{rate['hits']} ({100 * rate['rate']:.0f} %, {100 * low:.0f}-{100 * high:.0f})"


def points(difference: Mapping[str, Any]) -> str:
    """A difference of rates in points, with its interval."""
    if difference["value"] is None:
        return "none, as a side has no fact"
    if difference["ci95"] is None:
        return f"{_signed(difference['value'])} points, with no interval"
    low, high = map(_signed, difference["ci95"])
    return f"{_signed(difference['value'])} points (95 % interval {low} to {high})"


def _signed(share: float) -> str:
    """A difference of shares in whole points; there is no -0."""
    return f"{round(100 * share) or 0:+d}"


def nats(change: Mapping[str, Any]) -> str:
    """A change of log-odds, with its interval."""
    value, *ends = (f"{round(number, 2) or 0:+.2f}" for number in (change["value"], *(change["ci95"] or ())))
    return f"{value} ({ends[0]} to {ends[1]})" if ends else f"{value}, with no interval"


def smallest_effect(difference: Mapping[str, Any]) -> str:
    """The minimum detectable effect in words."""
    effect = difference["detectable"]
    if effect is None:
        return "So few relations or facts show no difference, however large."
    return f"Minimum detectable effect: {100 * effect:.0f} points (80 % power)."
