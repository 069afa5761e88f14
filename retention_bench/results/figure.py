"""Survival as a figure for a page or a paper: three step curves with bands over the dose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARMS = {
    "intrinsic": ("intrinsic", "#0072B2", ":"),
    "intrinsic_matched": ("intrinsic, matched", "#0072B2", ":"),
    "control": ("same facts in the control", "#009E73", "--"),
    "edited": ("edited", "#D55E00", "-"),
}
"""By arm: its label, its colour (Okabe & Ito's, which the colour-blind tell apart) and its line.
Matched facts are drawn where there are no intrinsic ones."""


def draw(survival: Mapping[str, Any], path: Path, *, editor: str, finetune: str, model: str) -> None:
    """Write the figure; the same survival gives the same bytes.

    Args:
        survival: As `Survival.to_json` gives it, with one curve at least.
        path: The file; its suffix, `.svg` or `.png`, says what is written.
        editor: The editor's name, for the title.
        finetune: The fine-tune's.
        model: The model's.
    """
    # Imported here, since matplotlib takes a second; without pyplot, so that no window system is asked for.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    curves = survival["curves"]
    with rc_context({"svg.hashsalt": "retention-bench", "font.family": "DejaVu Sans", "text.parse_math": False}):
        figure = Figure(figsize=(7.2, 4.6), dpi=160, layout="constrained")
        axes = figure.subplots()
        for arm, (label, colour, line) in ARMS.items():
            if arm not in curves or (arm == "intrinsic_matched" and "intrinsic" in curves):
                continue
            own = curves[arm]
            if own["low"] is not None:
                axes.fill_between(own["doses"], own["low"], own["high"], step="post", color=colour, alpha=0.14, lw=0)
            name = f"{label}, {own['facts']} facts"
            axes.step(own["doses"], own["survival"], where="post", color=colour, ls=line, lw=2, label=name)
        axes.axhline(0.5, color="0.6", lw=0.8, ls=(0, (2, 3)), zorder=0)
        axes.set(ylim=(0, 1.01), xlabel=f"fine-tune {survival['dose']}", ylabel="facts that survive")
        axes.set_xlim(0, max(own["doses"][-1] for own in curves.values()) or 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        main = curves.get("edited") or next(iter(curves.values()))
        axes.set_title(
            f"{editor} x {finetune} on {model}\n{main['facts']} facts of {main['relations']} relations; "
            "bands: 95 %, clustered by relation",
            loc="left",
            fontsize=10,
        )
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        dated = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=dated)
