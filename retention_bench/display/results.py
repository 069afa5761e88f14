"""What a person sees of a cell: its plan, its results, its trajectory. Drawn with rich, to fit into 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from retention_bench.display.curve import curve
from retention_bench.display.escape import line, plain
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
        f"{_dropped([data['dropped']])}."
    )


def _dropped(drops: Sequence[Mapping[str, Any]]) -> str:
    """The rows that were left out, by reason, each by the most that one model's fine-tune left out."""
    rows: dict[str, int] = {}
    for some in drops:
        for reason, drop in some.items():
            rows[reason] = max(rows.get(reason, 0), drop["rows"])
    if not rows:
        return ""
    first = {reason: drop["first"] for some in drops for reason, drop in some.items()}
    listed = ", ".join(f"{count:,} {reason} ({first[reason].rstrip('.')})" for reason, count in rows.items())
    return f"; left out: {listed}"


def _removed(logs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the contamination filter took out of each fine-tune's data, in a line; those that are alike are one."""
    lines = []
    for removed in (log["removed"] for log in logs if "removed" in log):
        by_kind = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in removed["by_kind"].items())
        lines.append(
            f"Rows of the fine-tune's data left out, since they mention a fact: {removed['removed']:,} of "
            f"{removed['seen']:,} ({by_kind}; a row may count for several)."
        )
    return list(dict.fromkeys(lines))


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def print_results(results: Mapping[str, Any], out: Path, *, real: str | None) -> None:
    """Print a cell's results so that they are understood without the paper, in the order of MEASURES.

    Args:
        results: As in `results.json`.
        out: The folder they were written to.
        real: Name of the real suite to go on to, if this one is a stand-in.
    """
    console = screen()
    title = line(f"{results['editor']} x {results['finetune']} on {results['model']}")
    console.print(Text(title, "bold"))
    _print_gates(results["gates"])
    console.print()
    _print_headline(results)
    console.print()
    console.print(_answered(results, ""))
    console.print(
        "\nedited: the edited facts, answered with the new object; edited_true: the same prompts, answered with the "
        "true one; paraphrase: the edited facts, by paraphrases. locality: other subjects that share an edited fact's "
        "true object; intrinsic: facts that no edit is about, of other relations; intrinsic_matched: of the same.\n"
    )
    console.print(_kept(results))
    console.print(
        "Kept: of what was answered before the fine-tune, the share that still is. All intervals are 95 % and "
        "clustered by relation.\n"
    )
    _print_rest(results)
    console.print()
    console.print(_drawn_from(results["facts"]), soft_wrap=True)
    for what in results["defaults"]:
        console.print(
            f"The suite has no settings for the {line(what)}, which ran with its own defaults.", soft_wrap=True
        )
    if results["paraphrases"]:
        console.print(_augmented(results), soft_wrap=True)
    if results["freeze"] != "none" or results["adapter"] != "none":
        console.print(_trained(results), soft_wrap=True)
    models = len(results["experiments"])
    if models > 1:
        console.print(f"The edited facts are spread over {models} edited models; each is asked all other facts.")
    if results["experiments"][0]["edit_factor"] is not None:
        factors = ", ".join(f"{e['edit_factor']:.2f}" for e in results["experiments"])
        console.print(f"The norm of each edit, as a multiple of the one it is made of: {factors}.", soft_wrap=True)
    console.print(_learned(results), soft_wrap=True)
    logs = [e["finetune_log"] for e in results["experiments"]] + [results["control"]["finetune_log"]]
    for removed in _removed(logs):
        console.print(plain(removed), soft_wrap=True, markup=False)
    if left_out := _dropped([log.get("dropped", {}) for log in logs]):
        console.print(plain(f"Rows of the fine-tune's data{left_out}."), soft_wrap=True, markup=False)
    if results.get("trajectory"):
        console.print()
        console.print(_trajectory(results["trajectory"]))
    if results["survival"]:
        _print_survival(results["survival"])
    console.print(Text(f"\n{plain(results['notice'])}\n", "yellow"), soft_wrap=True)
    console.print(f"Results: {line(out / 'results.json')}, every answer: {line(out / 'samples.jsonl')}", soft_wrap=True)
    if real:
        console.print(f"The same cell on a real model (GPU, Hub access): {_command(results, real)}", soft_wrap=True)


def _command(results: Mapping[str, Any], suite: str) -> str:
    """The command that runs the same cell of another suite."""
    command = ["retention-bench", "evaluate", "--suite", suite]
    command += ["--editor", results["editor"], "--finetune", results["finetune"]]
    if results["paraphrases"]:
        command += ["--paraphrases", str(results["paraphrases"])]
        command += ["--paraphrase-source", results["paraphrase_source"]]
        if results["paraphrase_mode"] != "mean":
            command += ["--paraphrase-mode", results["paraphrase_mode"]]
    for option, usual in {"freeze": "none", "adapter": "none", "horizon": "threshold"}.items():
        if results[option] != usual:
            command += [f"--{option}", results[option]]
    return shlex.join(command)


def _print_gates(gates: Sequence[Mapping[str, Any]]) -> None:
    """Say which gates a cell fails; nothing where it passes all."""
    failed = [gate["text"] for gate in gates if not gate["passed"]]
    if failed:
        screen().print(
            Text.assemble(("Not ranked: ", "bold red"), plain("; ".join(failed).replace("_", " ")), "."), soft_wrap=True
        )


def _print_headline(results: Mapping[str, Any]) -> None:
    """The paired difference, the step-matched one, and decay."""
    console = screen()
    paired, decay = results["paired"], results["decay"]
    difference = paired["difference"]
    console.print(
        Text.assemble("Paired difference: ", (_points(difference), "bold"), "."), soft_wrap=True, highlight=False
    )
    if difference["value"] is not None:
        console.print(
            f"  Of {difference['n']} facts in {difference['clusters']} relations that the base model knew and the edit "
            f"took, the unedited control still gives the true object for {_share(paired['control'])}, the edited model "
            f"the new one for {_share(paired['edited'])}. Positive: edits are lost more easily than what they "
            f"replaced. {_effect(difference)}",
            soft_wrap=True,
        )
    matched = results["paired_step_matched"]
    if matched and matched["difference"] != difference:
        console.print(
            f"  Against the control at the step at which each edited model stopped: {_points(matched['difference'])}.",
            soft_wrap=True,
        )
    if decay["paired"]["value"] is not None:
        before = decay["before"]
        console.print(Text.assemble("Decay in log-odds: ", (_nats(decay["paired"]), "bold"), "."), highlight=False)
        console.print(
            f"  The edits' new objects changed by {_nats(decay['edited'])} from a mean probability of "
            f"{before['edited']:.2f}, the same facts' true objects in the control by {_nats(decay['control'])} from "
            f"{before['control']:.2f}. Negative: edits lose more confidence. Hits see only large effects, and edits "
            "start surer than knowledge does.",
            soft_wrap=True,
        )


def _print_survival(survival: Mapping[str, Any]) -> None:
    """The curves of survival, and edited facts against the same facts in the control."""
    console = screen()
    console.print("\nSurvival along the fine-tune: of the facts held before it, the share that is not lost yet")
    console.print(curve(survival), markup=False, highlight=False)
    contrast = survival["contrast"]
    if contrast and contrast["log_rank_p"] is not None:
        ratio = "none, as one side lost nothing"
        if contrast["hazard_ratio"] is not None:
            low, high = contrast["ci95"] or (None, None)
            interval = "" if low is None else f" (95 % interval {low:.2f} to {high:.2f})"
            ratio = f"{contrast['hazard_ratio']:.2f}{interval}"
        console.print(
            f"Lost: {contrast['lost'][0]} of {contrast['pairs']} edited facts, {contrast['lost'][1]} of the same in "
            f"the control; log-rank p {contrast['log_rank_p']:.3f}, hazard ratio {ratio}.",
            soft_wrap=True,
            highlight=False,
        )


def _print_rest(results: Mapping[str, Any]) -> None:
    """The gaps, what became of lost edits, retention by confidence, and collateral."""
    console = screen()
    gap = results["gap"]
    for name, what in (("unmatched", "of other relations, the paper's gap"), ("matched", "of the same relations")):
        if gap[name]["value"] is not None:
            console.print(
                f"Gap, {name} (intrinsic minus edited; {what}): {_points(gap[name])}. {_effect(gap[name])}",
                soft_wrap=True,
            )
    if gone := sum(results["lost"].values()):
        what = ", ".join(f"{name} {count}" for name, count in results["lost"].items() if count)
        console.print(f"Of {gone} lost edits the answer became: {what}.", soft_wrap=True)
    rows = [
        f"{low:g}-{high:g}: {_short(own['edited'])} of edits, {_short(own['control'])} of the same facts in the control"
        for own in results["confidence"]
        if own["edited"]["total"] or own["control"]["total"]
        for low, high in [(own["low"], own["high"])]
    ]
    if rows:
        console.print(f"Kept by the target's probability before: {'; '.join(rows)}.", soft_wrap=True)
    moved = [
        f"{kind} {_points(own['post_edit'])} after the edit, {_points(own['post_finetune'])} after the fine-tune"
        for kind, own in results["collateral"].items()
        if own["post_finetune"]["value"] is not None
    ]
    if moved:
        console.print(f"Collateral, edited models against unedited ones: {'; '.join(moved)}.", soft_wrap=True)


def _answered(results: Mapping[str, Any], title: str) -> Table:
    """The questions answered at every stage, whatever was right before: the paper's retention rates (equation 1)."""
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


def _kept(results: Mapping[str, Any]) -> Table:
    """Retention, conditional on having been right before, in the edited models and in the control."""
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


def print_seeds(results: Mapping[str, Any], out: Path) -> None:
    """Print what several seeds of one cell have together.

    Args:
        results: As in `seeds.json`.
        out: The folder they were written to.
    """
    console = screen()
    title = f"{results['editor']} x {results['finetune']} on {results['model']}, {len(results['runs'])} seeds"
    console.print(Text(line(title), "bold"))
    _print_gates(results["gates"])
    table = Table("seed", "paired difference", "edited model", "control", "", box=SIMPLE_HEAD, show_edge=False)
    for run in results["runs"]:
        paired = run["paired"]
        mark = "" if run["ranked"] else "not ranked"
        own = (_points(paired["difference"]), _share(paired["edited"]), _share(paired["control"]))
        table.add_row(str(run["seed"]), *own, mark)
    console.print(table)
    _print_headline(results)
    console.print()
    console.print(_answered(results, ""))
    console.print(_kept(results))
    console.print(
        "Means over seeds; the 95 % intervals take relations and seeds as crossed, and never answers of several seeds "
        "as independent.\n"
    )
    _print_rest(results)
    console.print(Text(f"\n{plain(results['notice'])}\n", "yellow"), soft_wrap=True)
    console.print(f"Results: {line(out / 'seeds.json')}, each seed's own beside it.", soft_wrap=True)


def print_paper(results: Mapping[str, Any]) -> None:
    """Print the quantities of the paper's Table 1: edited and intrinsic, unconditional, at every stage.

    Args:
        results: As in `results.json`.
    """
    table = _answered(
        {
            **results,
            "stages": {
                stage: {kind: rate for kind, rate in kinds.items() if kind in ("edited", "intrinsic")}
                for stage, kinds in results["stages"].items()
            },
        },
        line(f"{results['editor']} x {results['finetune']} on {results['model']}, retention rates (equation 1)"),
    )
    screen().print(table)


def _cell(rate: Mapping[str, Any] | None) -> str:
    if not rate or rate["rate"] is None:
        return "-"
    return f"{rate['hits']} of {rate['total']}\n{_short(rate)}"


def _short(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "none"
    low, high = rate["ci95"]
    return f"{100 * rate['rate']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def _share(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "none of none"
    low, high = rate["ci95"]
    return f"{rate['hits']} ({100 * rate['rate']:.0f} %, {100 * low:.0f}-{100 * high:.0f})"


def _points(difference: Mapping[str, Any]) -> str:
    """A difference of rates in points, with its interval."""
    if difference["value"] is None:
        return "none, as a side has no fact"
    if difference["ci95"] is None:
        return f"{_signed(difference['value'])} points, with no interval"
    low, high = map(_signed, difference["ci95"])
    return f"{_signed(difference['value'])} points (95 % interval {low} to {high})"


def _signed(share: float) -> str:
    """A difference of shares in whole points; there is no -0."""
    return f"{round(100 * share) or 0:+d}"


def _nats(change: Mapping[str, Any]) -> str:
    """A change of log-odds, with its interval."""
    if change["ci95"] is None:
        return f"{change['value']:+.2f}, with no interval"
    low, high = change["ci95"]
    return f"{change['value']:+.2f} ({low:+.2f} to {high:+.2f})"


def _effect(difference: Mapping[str, Any]) -> str:
    """The minimum detectable effect in words."""
    effect = difference["detectable"]
    if effect is None:
        return "So few relations or facts show no difference, however large."
    return f"Minimum detectable effect: {100 * effect:.0f} points (80 % power)."


def _drawn_from(facts: Mapping[str, Any]) -> str:
    """Of how many facts the asked ones were drawn, in one line."""
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in facts["rows"]["dropped"].items())
    left_out = "".join(f", {found['facts']:,} left out ({reason})" for reason, found in facts["left_out"].items())
    return (
        f"The facts were drawn from {facts['known']:,} that the base model knows, of {facts['rows']['read']:,} rows "
        f"read{dropped}{left_out}."
    )


def _augmented(results: Mapping[str, Any]) -> str:
    """With which prompts the facts were edited, and what that leaves to ask, in one line."""
    count, source = results["paraphrases"], results["paraphrase_source"]
    questions, counts = results["paraphrase_questions"], results["paraphrase_counts"]
    came = source if len(counts) < 2 else f"{source}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())
    how = ", each a request of its own" if results["paraphrase_mode"] == "separate" else ""
    text = f"Each fact was edited with {count} more prompt{'s' * (count > 1)} ({came}{how})."
    if not questions["used_by_edits"]:
        return text
    if not questions["asked"]:
        return f"{text} These are all the paraphrases that the facts have: none is left to ask."
    return f"{text} {questions['used_by_edits']} paraphrases went into the edits and are not asked."


def _learned(results: Mapping[str, Any]) -> Text:
    """How the fine-tunes ended, in one line."""
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


def _trained(results: Mapping[str, Any]) -> str:
    """What the fine-tunes could change, in one line."""
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


def _probability(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _trajectory(steps: Sequence[Mapping[str, Any]]) -> Table:
    """What the edited models answered while they were trained."""
    table = Table(
        title="While training: facts answered, and mean probabilities of the next token",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for column in ("step", "models", "edited\nright", "new", "old", "related", "other", "intrinsic\nright", "its own"):
        table.add_column(column, justify="right")
    for step in steps:
        edited, intrinsic = step["edited"], step["intrinsic"]
        figures = (_probability(edited[name]) for name in ("edited", "true", "related", "other"))
        own = (f"{100 * intrinsic['rate']:.0f} %", _probability(intrinsic["true"]))
        table.add_row(f"{step['step']}", f"{step['models']}", f"{100 * edited['rate']:.0f} %", *figures, *own)
    return table
