"""Survival as a plain-text picture: three curves over the dose, told apart by their marks, not by colour."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

ARMS = {
    "edited": ("edited", "●", "E"),
    "control": ("the same facts in the control", "○", "c"),
    "intrinsic": ("intrinsic", "·", "."),
    "intrinsic_matched": ("intrinsic, matched", "·", "."),
}
"""By arm: its label, its mark, and its mark in ASCII. Matched facts are drawn where there are no intrinsic ones."""
_FRAME = {"│": "|", "└": "+", "─": "-", "┤": "|"}


def curve(survival: Mapping[str, Any], *, width: int = 60, height: int = 12, encoding: str | None = None) -> str:
    """Draw the curves of a survival.

    Args:
        survival: As `Survival.to_json` of `retention_bench.analysis.survival` gives it.
        width: Columns of the plot, axis apart.
        height: Rows of the plot.
        encoding: Of the stream it is for; that of standard output by default. Where it lacks the marks they are ASCII.

    Returns:
        Lines without colour, joined by line ends; a sentence where there is no curve.
    """
    curves = {arm: survival["curves"][arm] for arm in ARMS if arm in survival["curves"]}
    if "intrinsic" in curves:
        curves.pop("intrinsic_matched", None)
    last = max((own["doses"][-1] for own in curves.values()), default=0)
    if not last:
        return "No fact was looked at twice: there is no survival to draw."
    unicode = _writes(encoding or getattr(sys.stdout, "encoding", None) or "utf-8")
    plot = [[" "] * width for _ in range(height)]
    for arm in reversed(curves):  # the first in the legend lies on top
        mark = ARMS[arm][1 if unicode else 2]
        for column in range(width):
            dose = last * column / (width - 1)
            if dose <= curves[arm]["doses"][-1]:
                share = _at(curves[arm]["doses"], curves[arm]["survival"], dose)
                plot[round((1 - share) * (height - 1))][column] = mark
    labels = {0: "100 %", round((height - 1) / 2): "50 %", height - 1: "0 %"}
    lines = [f"{labels.get(row, ''):>5} {'┤' if row in labels else '│'}{''.join(plot[row])}" for row in range(height)]
    lines.append(f"{'':>6}└{'─' * width}")
    ends = ("0", _number(last / 2), _number(last))
    middle = width - len(ends[0]) - len(ends[2])
    lines.append(f"{'':>7}{ends[0]}{ends[1]:^{middle}}{ends[2]}")
    lines.append(f"{'':>7}{'fine-tune ' + survival['dose']:^{width}}".rstrip())
    for arm, own in curves.items():
        mark = ARMS[arm][1 if unicode else 2]
        facts = f"{own['facts']} facts of {own['relations']} relations"
        lines.append(f"{mark:>8} {ARMS[arm][0]} ({facts})")
        lines.append(f"{'':>9}{half_life(own['half_life'], survival['dose'])}")
    text = "\n".join(line.rstrip() for line in lines)
    return text if unicode else text.translate({ord(mark): ascii_mark for mark, ascii_mark in _FRAME.items()})


def half_life(found: Mapping[str, Any], dose: str) -> str:
    """A half-life in words.

    Args:
        found: As `HalfLife.to_json` gives it.
        dose: What doses are counted in.
    """
    low, high = found["low"], found["high"]
    if found["between"] is None:
        return "half-life not reached" + ("" if low is None else f", above {_number(low)} {dose}")
    if found["dose"] is None:
        begin, end = map(_number, found["between"])
        said = f"half-life {f'after {begin} and ' if found['between'][0] else ''}before {end} {dose}"
    else:
        said = f"half-life {_number(found['dose'])} {dose}"
    if low is None:
        return said
    return f"{said} (95 % interval {_number(low)} to {'open' if high is None else _number(high)})"


def _number(dose: float) -> str:
    return f"{dose:,.0f}" if dose >= 100 else f"{dose:.3g}"


def _writes(encoding: str) -> bool:
    try:
        "".join((*(mark for _, mark, _ in ARMS.values()), *_FRAME)).encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _at(doses: Sequence[float], shares: Sequence[float], dose: float) -> float:
    """A step curve's value: that of the last look up to a dose."""
    return [share for at, share in zip(doses, shares, strict=True) if at <= dose][-1]
