"""The unedited control, read at the steps at which the edited models stopped (MEASURES, "Arms of a cell")."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from retention_bench.pipeline.stage import Bench
from retention_bench.pipeline.stages.finetune import Finetune


def step_matched(bench: Bench, control: Finetune, edited: Sequence[Finetune]) -> list[dict[str, Any]]:
    """What the control answered after as much training as each edited model had.

    The control's own trajectory has it where it went as far. Where an edited model stopped later, the control is
    trained once more, with the horizon at the last of these steps: its first steps are those of the control. That
    is a stage of its own, computed when it is first needed, which all editors with the same last step share.

    Args:
        bench: Computes what is not there.
        control: The fine-tune of the unedited model; tracked, or there is nothing to read.
        edited: The fine-tunes of the edited models, by experiment.

    Returns:
        Rows as in `trajectory.jsonl`, with the `experiment` that they are for and `stopped`, its last step, before
        the control's `step`; of the facts that this edited model was asked. The two steps are the same but for an
        edited model that diverged between two evaluations, or a control that did: then the last look before it counts.
        Without a trajectory none.
    """
    if control.tracked is None:
        return []
    stops = [int(finetune.log(bench)["steps"]) for finetune in edited]
    rows = _longest(bench, control, max(stops, default=0)).trajectory(bench)
    steps = {row["step"] for row in rows}
    matched = []
    for index, (finetune, stop) in enumerate(zip(edited, stops, strict=True)):
        look = max(step for step in steps if step <= stop)  # step 0 was looked at
        asked = {row["fact_id"] for row in finetune.trajectory(bench)}
        own = (row for row in rows if row["step"] == look and row["fact_id"] in asked)
        matched += [{"experiment": index, "stopped": stop, **row} for row in own]
    return matched


def _longest(bench: Bench, control: Finetune, needed: int) -> Finetune:
    """The control, or its continuation where it ended before it had `needed` steps."""
    log = control.log(bench)
    if log["steps"] >= needed or log["stopped_by"] == "diverged":
        return control
    return dataclasses.replace(
        control,
        options=dataclasses.replace(control.options, horizon=f"steps:{needed}"),
        called=(control.called[0], f"{control.called[1]} to step {needed}"),
    )
