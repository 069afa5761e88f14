"""A cell's plan: its stages, and what the fine-tunes will take and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from retention_bench.display.escape import line, plain
from retention_bench.display.finetunes import dropped_rows
from retention_bench.display.streams import screen


def print_plan(
    stages: Sequence[Mapping[str, Any]], store: Path, estimate: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> None:
    """Print the stages of a plan, whether the store holds them, and what the fine-tunes will take and read.

    Args:
        stages: The stages.
        store: The store's folder.
        estimate: As `pipeline.Estimate` has it.
        data: As `finetune.DataCheck` has it; None where nobody looked.
    """
    table = Table("stage", "what it does", "key", "in the store")
    for stage in stages:
        table.add_row(
            stage["stage"], stage["title"], stage["key"][:12], "yes" if stage["in_store"] else "no, would run"
        )
    console = screen()
    console.print(table)
    console.print(f"Store: {line(store)}", soft_wrap=True)
    memory, disk = (_size(estimate[f"{what}_bytes"]) for what in ("memory", "disk"))
    known = estimate["steps"] is not None
    steps = f"{estimate['steps']:,} optimiser steps at most" if known else "as many steps as their horizon takes"
    console.print(
        f"{estimate['finetunes']} fine-tunes to run, {steps}. Each trains "
        f"{estimate['trainable']:,} of {estimate['parameters']:,} parameters at most and takes up to {memory} of "
        f"memory, activations apart; the store grows by up to {disk}.",
        soft_wrap=True,
    )
    if data:
        console.print(_data(data), soft_wrap=True, markup=False)


def _data(data: Mapping[str, Any]) -> str:
    """What a look into the fine-tune's data found, in one line."""
    if data["skipped"]:
        return plain(f"Data: {data['skipped']}.")
    return plain(
        f"Data: {data['reads']}; {data['usable']} of the first {data['tried']} rows tried can be trained on"
        f"{dropped_rows([data['dropped']])}."
    )


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
