"""What is said of a cell's fine-tunes: which rows they left out, how they ended, what they could change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from retention_bench.display.escape import line


def dropped_rows(drops: Sequence[Mapping[str, Any]]) -> str:
    """The rows that could not be trained on, by reason, each by the most that one model's fine-tune left out.

    Args:
        drops: For each fine-tune, by reason: `rows`, how many, and `first`, the first of them.

    Returns:
        The end of a sentence; empty where no row was left out.
    """
    rows: dict[str, int] = {}
    for some in drops:
        for reason, drop in some.items():
            rows[reason] = max(rows.get(reason, 0), drop["rows"])
    if not rows:
        return ""
    first = {reason: drop["first"] for some in drops for reason, drop in some.items()}
    listed = ", ".join(f"{count:,} {reason} ({first[reason].rstrip('.')})" for reason, count in rows.items())
    return f"; left out: {listed}"


def removed_rows(logs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the contamination filter took out of each fine-tune's data, in a line; those that are alike are one.

    Args:
        logs: The logs of the fine-tunes.
    """
    lines = []
    for removed in (log["removed"] for log in logs if "removed" in log):
        by_kind = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in removed["by_kind"].items())
        lines.append(
            f"Rows of the fine-tune's data left out, since they mention a fact: {removed['removed']:,} of "
            f"{removed['seen']:,} ({by_kind}; a row may count for several)."
        )
    return list(dict.fromkeys(lines))


def learned(results: Mapping[str, Any]) -> Text:
    """How the fine-tunes of a cell's results ended, in one line."""
    logs = [e["finetune_log"] for e in results["experiments"]] + [results["control"]["finetune_log"]]
    steps = sorted({log["steps"] for log in logs})
    span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    below = logs[0]["metric"] == "validation_loss"
    metric, threshold = logs[0]["metric"].replace("_", " "), logs[0]["threshold"]
    sign = "<" if below else ">"
    if results["learned"] and logs[0]["stopped_by"] == "horizon":
        passed = sorted({log["passed_at"]["step"] for log in logs})
        between = f"{passed[0]}" if len(passed) == 1 else f"{passed[0]} to {passed[-1]}"
        return Text(
            f"Every fine-tune went on for {span} steps and passed its threshold ({line(metric)} {sign} {threshold:g}) "
            f"after {between}."
        )
    if results["learned"]:
        return Text(f"Every fine-tune reached its threshold ({line(metric)} {sign} {threshold:g}) after {span} steps.")
    reasons = results["not_learned"]
    more = f" (and {len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
    return Text.assemble(
        ("Not learned:", "red"),
        f" {line(reasons[0].replace('_', ' '))}{more}. What is left standing then says little about retention.",
    )


def trained(results: Mapping[str, Any]) -> str:
    """What the fine-tunes of a cell's results could change, in one line."""
    log = results["experiments"][0]["finetune_log"]
    what = {"none": "the weights", "lora": "LoRA adapters", "dora": "DoRA adapters"}[results["adapter"]]
    return (
        f"Trained were {what} of layers {_span(log['trained_layers'])} (--freeze {results['freeze']}): "
        f"{log['trainable_parameters']:,} of the model's {log['parameters']:,} parameters."
    )


def _span(layers: Sequence[int]) -> str:
    """Layers in words: 2 to 5, or 0, 3."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
