"""Draw what a fine-tune left of edited and intrinsic facts: the figure of the README.

    python -m tools.figure RUN... --out docs/images/retention.svg

A RUN is a folder that `retention-bench evaluate` wrote. The SVG is plain text with a background of its own, so that it
reads the same on a light and on a dark page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from retention_bench.results import KINDS, Rate, Results
from retention_bench.results.kinds import GROUPS

STAGES = {
    "post_edit": ("after the edit", "#8a8f98"),
    "post_finetune": ("after the fine-tune", "#c2410c"),
    "control_finetune": ("unedited, after the fine-tune", "#2563eb"),
}
"""What is drawn of each kind of question: the stages, their labels and colours."""

DRAWN = GROUPS["retention"]
"""The kinds of question that are drawn."""

LEFT, PANEL, GAP, RIGHT = 150, 330, 30, 16
TOP, ROW, LINE = 84, 76, 20
"""Pixels: the margins, a panel's width, the room between two, a kind's height, the distance of two stages."""


def figure(runs: Sequence[Results]) -> str:
    """The SVG: one panel for each run, with the rates of all stages and their intervals for each kind of question.

    Args:
        runs: Results of cells.
    """
    width = LEFT + len(runs) * PANEL + (len(runs) - 1) * GAP + RIGHT
    height = TOP + len(DRAWN) * ROW + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img">',
        f"<title>{escape(_title(runs))}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        *_legend(),
    ]
    for row, kind in enumerate(KINDS[kind] for kind in DRAWN):
        y = TOP + row * ROW + ROW / 2
        parts.append(_text(LEFT - 14, y + 4, kind.label, anchor="end", weight="bold"))
    for column, run in enumerate(runs):
        parts += _panel(LEFT + column * (PANEL + GAP), run, height - 44)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(runs: Sequence[Results]) -> str:
    cells = ", ".join(f"{run.editor} x {run.finetune} on {run.model}" for run in runs)
    return f"Questions answered, with 95 % intervals: {cells}"


def _legend() -> Iterator[str]:
    x = float(LEFT)
    for label, colour in STAGES.values():
        yield f'<circle cx="{x:g}" cy="24" r="5" fill="{colour}"/>'
        yield _text(x + 11, 28, label)
        x += 32 + 6.3 * len(label)
    yield _text(x, 28, "lines: 95 % intervals", colour="#6b7280")


def _panel(left: float, run: Results, bottom: float) -> Iterator[str]:
    """One run: the axis, and its rates."""
    scale = PANEL - 70  # the counts stand to the right of it

    def at(rate: float) -> float:
        return left + scale * rate

    yield _text(left, 62, f"{run.editor} x {run.finetune} on {run.model}", weight="bold")
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield f'<line x1="{at(tick):g}" y1="{TOP - 8}" x2="{at(tick):g}" y2="{bottom:g}" stroke="#e5e7eb"/>'
        yield _text(at(tick), bottom + 18, f"{100 * tick:g} %", anchor="middle", colour="#6b7280")
    for row, kind in enumerate(DRAWN):
        for line, (stage, (_, colour)) in enumerate(STAGES.items()):
            y = TOP + row * ROW + ROW / 2 + (line - 1) * LINE
            rate = run.stages.get(stage, {}).get(kind)
            if rate is not None and rate.rate is not None and rate.ci95 is not None:
                yield from _mark(at(rate.ci95[0]), at(rate.rate), at(rate.ci95[1]), y, colour)
                yield _text(left + PANEL, y + 4, _count(rate), anchor="end", colour="#374151")


def _mark(low: float, middle: float, high: float, y: float, colour: str) -> Iterator[str]:
    yield f'<line x1="{low:.1f}" y1="{y:g}" x2="{high:.1f}" y2="{y:g}" stroke="{colour}" stroke-width="2.5"/>'
    yield f'<circle cx="{middle:.1f}" cy="{y:g}" r="5" fill="{colour}"/>'


def _count(rate: Rate) -> str:
    return f"{rate.hits}/{rate.total}"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", colour: str = "#111827"
) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def main() -> None:
    """Draw the runs that are named on the command line."""
    parser = argparse.ArgumentParser(description="Draw what a fine-tune left of edited and intrinsic facts.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that `retention-bench evaluate` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    given = parser.parse_args()
    drawn = figure([Results.load(run) for run in given.runs])
    given.out.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
