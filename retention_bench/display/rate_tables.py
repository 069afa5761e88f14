"""The two tables of a cell's rates: questions answered at every stage, and what was kept of what was right before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from retention_bench.display.escape import line
from retention_bench.display.words import short_rate


def answered_table(results: Mapping[str, Any], title: str) -> Table:
    """The questions answered at every stage, whatever was right before: the paper's retention rates (equation 1).

    Args:
        results: As in `results.json` or `seeds.json`.
        title: The table's title; empty for none.
    """
    stages = results["stages"]
    # Two spaces between columns and short labels, so that the table fits into a terminal of 80 columns.
    table = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("questions\nanswered", no_wrap=True)
    names = {
        "base": "base\nmodel",
        "post_edit": f"after\n{line(results['editor'])}",
        "post_finetune": f"after\n{line(results['finetune'])}",
        "control_finetune": f"unedited,\nafter {line(results['finetune'])}",
    }
    for stage in names:
        table.add_column(names[stage], justify="right")
    for kind in dict.fromkeys(kind for stage in names for kind in stages.get(stage, {})):
        table.add_row(line(kind), *(_cell(stages.get(stage, {}).get(kind)) for stage in names))
    return table


def kept_table(results: Mapping[str, Any]) -> Table:
    """Retention, conditional on having been right before, in the edited models and in the control.

    Args:
        results: As in `results.json` or `seeds.json`.
    """
    kept = results["retention"]
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("kept", no_wrap=True)
    table.add_column("edited models", justify="right")
    table.add_column("unedited control", justify="right")
    for kind in ("edited", "edited_true", "paraphrase", "locality", "intrinsic", "intrinsic_matched"):
        own, control = kept.get(kind), kept.get(f"control_{kind}")
        if any(rate and rate["total"] for rate in (own, control)):
            table.add_row(kind, _cell(own), _cell(control))
    return table


def _cell(rate: Mapping[str, Any] | None) -> str:
    if not rate or rate["rate"] is None:
        return "-"
    return f"{rate['hits']} of {rate['total']}\n{short_rate(rate)}"
