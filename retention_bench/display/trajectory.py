"""The course of the fine-tunes: what edited models answered step by step, and the most probable tokens of one fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from retention_bench.display.escape import line
from retention_bench.display.streams import screen


def trajectory_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """What the edited models answered while they were trained, about intrinsic facts or, without any, matched ones.

    Args:
        steps: As `trajectory` of `results.json` has them.
    """
    kinds = [kind for kind in ("intrinsic", "intrinsic_matched") if any(kind in step for step in steps)]
    alone = kinds[0] if kinds else "intrinsic"
    label = "matched" if alone == "intrinsic_matched" else "intrinsic"
    table = Table(
        title="While training: facts answered, and mean probabilities of the next token",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for column in ("step", "models", "edited\nright", "new", "old", "related", "other", f"{label}\nright", "its own"):
        table.add_column(column, justify="right")
    for step in steps:
        edited, other = step.get("edited", {}), step.get(alone, {})
        figures = (_probability(edited.get(name)) for name in ("edited", "true", "related", "other"))
        own = (_percent(other.get("rate")), _probability(other.get("true")))
        table.add_row(f"{step['step']}", f"{step['models']}", _percent(edited.get("rate")), *figures, *own)
    return table


def _probability(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def print_tokens(fact: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print which tokens are the most probable behind a fact's prompt, step by step.

    Args:
        fact: The fact's id.
        rows: Its rows of `trajectory.jsonl`.
    """
    console = screen()
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        own = [row for row in rows if row["experiment"] == experiment]
        where = "the unedited control" if experiment is None else f"edited model {experiment + 1}"
        title = f"\nMost probable tokens: fact {line(fact)} ({own[0]['kind']}) in {where}"
        console.print(title, soft_wrap=True)
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("step", justify="right")
        for place in range(1, 1 + max(len(row["top"]) for row in own)):
            table.add_column(f"{place}.")
        for row in own:
            tokens = (f"{line(token.strip()) or repr(token)} {value:.2f}" for token, value in row["top"])
            table.add_row(f"{row['step']}", *tokens)
        console.print(table)
