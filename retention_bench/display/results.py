"""A cell's results as a whole: of one seed, of several, or as the paper has them. Drawn to fit into 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from retention_bench.display.escape import line, plain
from retention_bench.display.finetunes import dropped_rows, learned, removed_rows, trained
from retention_bench.display.measures import print_headline, print_rest, print_survival
from retention_bench.display.rate_tables import answered_table, kept_table
from retention_bench.display.streams import screen
from retention_bench.display.trajectory import trajectory_table
from retention_bench.display.words import counted_rate, points


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
    print_headline(results)
    console.print()
    console.print(answered_table(results, ""))
    console.print(
        "\nedited: the edited facts, answered with the new object; edited_true: the same prompts, answered with the "
        "true one; paraphrase: the edited facts, by paraphrases. locality: other subjects that share an edited fact's "
        "true object; intrinsic: facts that no edit is about, of other relations; intrinsic_matched: of the same.\n"
    )
    console.print(kept_table(results))
    console.print(
        "Kept: of what was answered before the fine-tune, the share that still is. All intervals are 95 % and "
        "clustered by relation.\n"
    )
    print_rest(results)
    console.print()
    console.print(_drawn_from(results["facts"]), soft_wrap=True)
    for what in results["defaults"]:
        console.print(
            f"The suite has no settings for the {line(what)}, which ran with its own defaults.", soft_wrap=True
        )
    if results["paraphrases"]:
        console.print(_augmented(results), soft_wrap=True)
    if results["freeze"] != "none" or results["adapter"] != "none":
        console.print(trained(results), soft_wrap=True)
    models = len(results["experiments"])
    if models > 1:
        console.print(f"The edited facts are spread over {models} edited models; each is asked all other facts.")
    if results["experiments"][0]["edit_factor"] is not None:
        factors = ", ".join(f"{e['edit_factor']:.2f}" for e in results["experiments"])
        console.print(f"The norm of each edit, as a multiple of the one it is made of: {factors}.", soft_wrap=True)
    console.print(learned(results), soft_wrap=True)
    logs = [e["finetune_log"] for e in results["experiments"]] + [results["control"]["finetune_log"]]
    for removed in removed_rows(logs):
        console.print(plain(removed), soft_wrap=True, markup=False)
    if left_out := dropped_rows([log.get("dropped", {}) for log in logs]):
        console.print(plain(f"Rows of the fine-tune's data{left_out}."), soft_wrap=True, markup=False)
    if results.get("trajectory"):
        console.print()
        console.print(trajectory_table(results["trajectory"]))
    if results["survival"]:
        print_survival(results["survival"])
    console.print(Text(f"\n{plain(results['notice'])}\n", "yellow"), soft_wrap=True)
    console.print(f"Results: {line(out / 'results.json')}, every answer: {line(out / 'samples.jsonl')}", soft_wrap=True)
    if real:
        console.print(f"The same cell on a real model (GPU, Hub access): {_command(results, real)}", soft_wrap=True)


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
        own = (points(paired["difference"]), counted_rate(paired["edited"]), counted_rate(paired["control"]))
        table.add_row(str(run["seed"]), *own, mark)
    console.print(table)
    print_headline(results)
    console.print()
    console.print(answered_table(results, ""))
    console.print(kept_table(results))
    console.print(
        "Percentages are means over seeds, counts are answers of all seeds; the 95 % intervals take relations and "
        "seeds as crossed, and never answers of several seeds as independent.\n"
    )
    print_rest(results)
    console.print(Text(f"\n{plain(results['notice'])}\n", "yellow"), soft_wrap=True)
    console.print(
        f"Results: {line(out / 'seeds.json')}, each seed's own beside it. Survival is counted for each seed alone: "
        "`retention-bench show` prints it for a seed's folder.",
        soft_wrap=True,
    )


def print_paper(results: Mapping[str, Any]) -> None:
    """Print the quantities of the paper's Table 1: edited and intrinsic, unconditional, at every stage.

    Args:
        results: As in `results.json`.
    """
    table = answered_table(
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


def _print_gates(gates: Sequence[Mapping[str, Any]]) -> None:
    """Say which gates a cell fails; nothing where it passes all."""
    failed = [gate["text"] for gate in gates if not gate["passed"]]
    if failed:
        screen().print(
            Text.assemble(("Not ranked: ", "bold red"), plain("; ".join(failed).replace("_", " ")), "."), soft_wrap=True
        )


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
