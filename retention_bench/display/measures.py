"""The measures of a cell, each with what it is of: the headline and decay, survival, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from retention_bench.display.curve import curve
from retention_bench.display.streams import screen
from retention_bench.display.words import counted_rate, nats, points, rate_of, short_rate, smallest_effect


def print_headline(results: Mapping[str, Any]) -> None:
    """Print the paired difference, the step-matched one, and decay.

    Args:
        results: As in `results.json` or `seeds.json`.
    """
    console = screen()
    paired, decay = results["paired"], results["decay"]
    difference = paired["difference"]
    console.print(
        Text.assemble("Paired difference: ", (points(difference), "bold"), "."), soft_wrap=True, highlight=False
    )
    if difference["value"] is not None:
        seeds, share = len(results.get("runs", ())), counted_rate
        facts = f"{difference['n']} facts in {difference['clusters']} relations"
        if seeds:  # a share is the mean of the seeds' own, of no count
            facts, share = f"{paired['edited']['total']} answers of {seeds} seeds about {facts}", short_rate
        console.print(
            f"  Of {facts} that the base model knew and the edit took, the unedited control still gives the true "
            f"object for {share(paired['control'])}, the edited model the new one for {share(paired['edited'])}. "
            f"Positive: edits are lost more easily than what they replaced. {smallest_effect(difference)}",
            soft_wrap=True,
        )
    matched = results["paired_step_matched"]
    if matched and matched["difference"] != difference:
        console.print(
            f"  Against the control at the step at which each edited model stopped: {points(matched['difference'])}.",
            soft_wrap=True,
        )
    if decay["paired"]["value"] is not None:
        before = decay["before"]
        console.print(Text.assemble("Decay in log-odds: ", (nats(decay["paired"]), "bold"), "."), highlight=False)
        console.print(
            f"  The edits' new objects changed by {nats(decay['edited'])} from a mean probability of "
            f"{before['edited']:.2f}, the same facts' true objects in the control by {nats(decay['control'])} from "
            f"{before['control']:.2f}. Negative: edits lose more confidence. Hits see only large effects, and edits "
            "start surer than knowledge does.",
            soft_wrap=True,
        )
    each = ", counted in each seed," if "runs" in results else ""
    if decay["clipped"]:
        console.print(
            f"  {decay['clipped']} of these facts{each} have a probability so near 0 or 1 that it is clipped.",
            soft_wrap=True,
        )
    if decay["no_number"]:
        console.print(
            f"  {decay['no_number']} of these facts{each} have no log-odds: a model that diverged gives no number.",
            soft_wrap=True,
        )


def print_survival(survival: Mapping[str, Any]) -> None:
    """Print the curves of survival, and edited facts against the same facts in the control.

    Args:
        survival: As in `results.json`.
    """
    console = screen()
    console.print("\nSurvival along the fine-tune: of the facts held before it, the share that is not lost yet")
    console.print(curve(survival), markup=False, highlight=False)
    contrast = survival["contrast"]
    if contrast and contrast["log_rank_p"] is not None:
        ratio = "none" if contrast["hazard_ratio"] is None else f"{contrast['hazard_ratio']:.2f}"
        if contrast["ci95"]:
            low, high = contrast["ci95"]
            ratio += f" (95 % interval {low:.2f} to {high:.2f})"
        else:
            ratio += f", no interval: {contrast['reason']}" if contrast["hazard_ratio"] else f": {contrast['reason']}"
        console.print(
            f"Lost: {contrast['lost'][0]} of {contrast['pairs']} edited facts, {contrast['lost'][1]} of the same in "
            f"the control; log-rank p {contrast['log_rank_p']:.3f}, hazard ratio {ratio}.",
            soft_wrap=True,
            highlight=False,
        )


def print_rest(results: Mapping[str, Any]) -> None:
    """Print the gaps, what became of lost edits, retention by confidence, and collateral.

    Args:
        results: As in `results.json` or `seeds.json`.
    """
    console = screen()
    gap = results["gap"]
    for name, what in (("unmatched", "of other relations, the paper's gap"), ("matched", "of the same relations")):
        if gap[name]["value"] is not None:
            console.print(
                f"Gap, {name} (intrinsic minus edited; {what}): {points(gap[name])}. {smallest_effect(gap[name])}",
                soft_wrap=True,
            )
    if gone := sum(results["lost"].values()):
        what = ", ".join(f"{name} {count}" for name, count in results["lost"].items() if count)
        over = " of all seeds" if "runs" in results else ""
        console.print(f"Of {gone} lost edits{over} the answer became: {what}.", soft_wrap=True)
    rows = [
        f"{low:g}-{high:g}: {rate_of(own['edited'], 'new objects')}, {rate_of(own['control'], 'true objects')}"
        for own in results["confidence"]
        if own["edited"]["total"] or own["control"]["total"]
        for low, high in [(own["low"], own["high"])]
    ]
    if rows:
        console.print(
            "Kept by the probability before the fine-tune, of new objects in the edited models and of true objects in "
            f"the control that began as sure (in one bin mostly other facts): {'; '.join(rows)}.",
            soft_wrap=True,
        )
    moved = [
        f"{kind} {points(own['post_edit'])} after the edit, {points(own['post_finetune'])} after the fine-tune"
        for kind, own in results["collateral"].items()
        if own["post_finetune"]["value"] is not None
    ]
    if moved:
        console.print(f"Collateral, edited models against unedited ones: {'; '.join(moved)}.", soft_wrap=True)
