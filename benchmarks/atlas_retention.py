"""Cells of suite atlas, a table row each.

    python benchmarks/atlas_retention.py EDITOR[,EDITOR] FINETUNE[,FINETUNE] MODEL[,MODEL] SEED[,SEED]

Runs `evaluate` for all of them, with the store that it uses. The control is that of the same row's fine-tune and seed.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import retention_bench as rb

COLUMNS = (
    "model | fine-tune | editor | seed | edits that took | intrinsic after the edit | edits retained | same facts "
    "in the control | paired difference, points | decay, paired | gap unmatched, points | intrinsic retained | "
    "control, intrinsic | stopped by (steps) | seconds"
)


def row(editor: str, finetune: str, model: str, seed: int) -> str:
    """Run one cell and put it into a table row."""
    with tempfile.TemporaryDirectory() as folder:
        cell = {"editor": editor, "finetune": finetune, "model": model, "seed": seed, "device": "cpu"}
        results = rb.evaluate(**cell, out=Path(folder) / "out").to_dict()

    def count(rate: dict) -> str:
        return f"{rate['hits']}/{rate['total']}"

    edited, kept, paired = results["stages"]["post_edit"], results["retention"], results["paired"]
    logs = [e["finetune_log"] for e in [*results["experiments"], results["control"]]]

    def estimate(found: dict, scale: float, form: str) -> str:
        if found["value"] is None:
            return "-"
        ends = [scale * end for end in found["ci95"] or ()]
        around = f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else ""
        return f"{scale * found['value']:{form}}{around}"

    return " | ".join(
        [
            model,
            finetune,
            editor,
            str(seed),
            count(edited["edited"]),
            count(edited["intrinsic"]),
            count(kept["edited"]),
            count(paired["control"]),
            estimate(paired["difference"], 100, "+.0f"),
            estimate(results["decay"]["paired"], 1, "+.2f"),
            estimate(results["gap"]["unmatched"], 100, "+.0f"),
            count(kept["intrinsic"]),
            count(results["stages"]["control_finetune"]["intrinsic"]),
            ", ".join(f"{log['stopped_by']} ({log['steps']})" for log in logs),
            f"{sum(results['timing']['seconds'].values()):.0f}",
        ]
    )


if __name__ == "__main__":
    editors, finetunes, models, seeds = (argument.split(",") for argument in sys.argv[1:])
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}")
    for model, seed, finetune, editor in itertools.product(models, seeds, finetunes, editors):
        print(f"| {row(editor, finetune, model, int(seed))} |", flush=True)
