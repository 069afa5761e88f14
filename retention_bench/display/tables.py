"""What a person sees of comparisons, of scores, of single facts and of covariances. Drawn with rich, for 80 columns."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retention_bench.display.escape import cut, line, plain
from retention_bench.display.streams import screen

SHOWN = 10
"""How many facts of a list are named; `--json` has all."""

TABLE = 4
"""How many kinds of question stand side by side."""

TASK = "retention_"
"""What the names of the lm-eval tasks begin with that ask a kind of question each."""


def print_comparisons(found: Mapping[str, Any]) -> None:
    """Print comparisons of every two sides so that they are understood without the documentation.

    Args:
        found: As `pipeline.scored.compared` returns it.
    """
    console = screen()
    letters = dict(zip(found["sides"], _letters(), strict=False))
    for name, letter in letters.items():
        console.print(f"{letter:>2}  {line(name)}", soft_wrap=True)
    _print_failed(console, found["failed"])
    for (first, second), group in itertools.groupby(found["comparisons"], key=lambda c: (c["first"], c["second"])):
        comparisons = list(group)
        one, other = letters[first], letters[second]
        console.print()
        console.print(_pair_table(comparisons, one, other))
        for comparison in comparisons:
            _print_lists(console, comparison, one, other)
    tests = len(found["comparisons"])
    console.print(
        "\nFacts are lost where the second side answers them less often than the first, gained where more often, kept "
        "where as often, never where neither does. The difference is in points, with its 95 % interval. p rel. is that "
        "of the exact test by relation: it holds for relations like these. p fact is that of McNemar's exact test by "
        "fact: it holds for these relations only, and is too small for others. Below each is p after Holm's correction "
        f"for {'the one comparison' if tests == 1 else f'all {tests} comparisons'} shown. MDE is the minimum "
        "detectable effect of so many facts, in points (two-sided test at 5 %, power 80 %).",
    )
    _print_headlines(console, found["headlines"], letters)
    _print_ranks(console, found["ranks"], letters)
    _print_unequal(console, found, letters)


def print_scores(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Print what checkpoints answered, and why some could not be scored.

    Args:
        rows: As `pipeline.batch.score_checkpoints` returns them.
        file: The file that holds them.
    """
    console = screen()
    scored = [row for row in rows if "error" not in row]
    kinds = list(dict.fromkeys(row["task"].removeprefix(TASK) for row in scored if "metrics" not in row))
    names = dict.fromkeys(row["checkpoint"] for row in scored)
    for number, name in enumerate(names, start=1):
        console.print(f"{number:>3}  {line(name)}", soft_wrap=True)
    for some in (
        kinds[place : place + TABLE] for place in range(0, len(kinds), TABLE)
    ):  # a few at a time, so that none is cut in a narrow terminal
        table = Table("", *map(line, some), box=SIMPLE_HEAD)
        for number, name in enumerate(names, start=1):
            own = {row["task"]: row for row in scored if row["checkpoint"] == name}
            table.add_row(str(number), *(_rate(own.get(f"{TASK}{kind}")) for kind in some))
        console.print(table)
    if kinds:
        console.print(
            "edited and paraphrase count answers with the new object, locality, intrinsic and edited_true with the "
            "fact's own; with 95 % intervals, clustered by relation."
        )
    for row in scored:
        if "metrics" in row:
            values = {name: "no number" if v is None else f"{v:.4g}" for name, v in row["metrics"].items()}
            found = ", ".join(f"{name.partition(',')[0]} {value}" for name, value in values.items())
            console.print(line(f"{row['checkpoint']}, {row['task']}: {found}"), soft_wrap=True)
    for left_out in dict.fromkeys(
        f"{row['checkpoint']}: {_left_out(reason, found)}"
        for row in scored
        for reason, found in row.get("left_out", {}).items()
    ):
        console.print(line(left_out), soft_wrap=True)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        console.print(f"Not scored: {line(row['checkpoint'])}: {line(row['error'])}", soft_wrap=True)
    checkpoints = len({row["checkpoint"] for row in scored})
    console.print(f"{checkpoints} checkpoints scored, {len(failed)} not. Every answer: {line(file)}", soft_wrap=True)


def _left_out(reason: str, found: Mapping[str, Any]) -> str:
    """Facts that were left out for one reason, three of them named."""
    count, named = found["facts"], ", ".join(cut(name, 40) for name in found["first"][:3])
    return f"{count:,} {'fact is' if count == 1 else 'facts are'} left out: {reason} ({named}{', ...' * (count > 3)})"


def _rate(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["rate"] is None:
        return "-"
    low, high = row["ci95"]
    return f"{row['hits']} of {row['total']}\n{100 * row['rate']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def print_fact(found: Mapping[str, Any]) -> None:
    """Print what is known about one fact.

    Args:
        found: As `pipeline.scored.inspected` returns it.
    """
    console = screen()
    _print_failed(console, found["failed"])
    for side in found["sides"]:
        console.print(f"\nfact {line(found['fact_id'])} in {line(side['name'])}", soft_wrap=True)
        if side["fact"]:
            for name in ("subject", "relation", "target_true", "target_new"):
                if side["fact"][name] is not None:
                    console.print(f"  {name:12} {line(side['fact'][name])}", soft_wrap=True)
        if not side["questions"]:
            console.print("  was not asked")
        for question in side["questions"]:
            asked = line(f"{question['prompt']} -> {question['target']}")
            console.print(f"\n  {line(question['kind'])}: {asked}", soft_wrap=True)
            console.print(_answers(question["answers"]))


def _letters() -> Iterator[str]:
    """A to Z, then AA, AB and so on."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_uppercase, repeat=length))


def _print_failed(console: Console, failed: Sequence[Mapping[str, Any]]) -> None:
    for one in failed:
        task = f", {one['task']}" if one["task"] else ""
        text = f"Left out, as it could not be scored: {line(one['name'])}{line(task)}: {plain(one['error'])}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _plain_table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)


def _pair_table(comparisons: Sequence[Mapping[str, Any]], one: str, other: str) -> Table:
    table = _plain_table(f"From {one} to {other}")
    table.add_column("questions\nanswered", no_wrap=True)
    # The sides' rates stand in one column, so that both tests fit into 80 columns.
    sides = f"{one}\n{other}"
    columns = (sides, "lost", "gained", "kept", "never", "points\n95 %", "p rel.\nHolm", "p fact\nHolm", "MDE")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for c in comparisons:
        low, high = c["difference"]["ci95"]
        rates = "\n".join(f"{100 * rate:.0f} %" for rate in c["rates"])
        counts = (f"{len(c[name])}" for name in ("lost", "gained", "kept", "never"))
        points = f"{100 * c['difference']['value']:+.0f}\n{100 * low:+.0f} to {100 * high:+.0f}"
        smallest = "none" if (effect := c["difference"]["detectable"]) is None else f"{100 * effect:.0f}"
        tests = (f"{_p(c[p])}\n{_p(c[f'{p}_holm'])}" for p in ("p_relations", "p"))
        table.add_row(f"{line(c['kind'])}\n{c['facts']} facts", rates, *counts, points, *tests, smallest)
    return table


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _print_lists(console: Console, comparison: Mapping[str, Any], one: str, other: str) -> None:
    kind = line(comparison["kind"])
    for name in ("lost", "gained"):
        ids = comparison[name]
        if ids:
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            console.print(f"{name}, {kind}: {line(', '.join(ids[:SHOWN]))}{more}", soft_wrap=True)
    alone = [(one, comparison["only_first"]), (other, comparison["only_second"])]
    told = [f"{count} that only {side} was asked" for side, count in alone if count]
    if told:
        console.print(f"not compared, {kind}: {' and '.join(told)}")


def _print_ranks(console: Console, ranks: Mapping[str, Mapping[str, Any]], letters: Mapping[str, str]) -> None:
    if not ranks:
        return
    console.print("\nThe sides ranked by the questions that all of them were asked, with 95 % intervals:")
    table = _plain_table(None)
    table.add_column("")
    for kind in ranks:
        table.add_column(line(kind), justify="right")
    for name, letter in letters.items():
        places = (own.get(name) for own in ranks.values())
        table.add_row(letter, *("-" if p is None else f"{p['rank']} ({p['ci95'][0]}-{p['ci95'][1]})" for p in places))
    console.print(table)


def _print_headlines(console: Console, headlines: Mapping[str, Mapping[str, Any]], letters: Mapping[str, str]) -> None:
    """The paired difference of every run, with its rank."""
    if not headlines:
        return
    console.print("\nPaired difference of each run (less is better), with its rank:")
    table = _plain_table(None)
    for column in ("", "points", "95 %", "facts", "rank"):
        table.add_column(column, justify="right")
    for name, own in headlines.items():
        found, place = own["difference"], own["rank"]
        value = "-" if found["value"] is None else f"{100 * found['value']:+.0f}"
        span = "-" if found["ci95"] is None else " to ".join(f"{100 * end:+.0f}" for end in found["ci95"])
        rank = "not ranked" if place is None else f"{place['rank']} ({place['ci95'][0]}-{place['ci95'][1]})"
        table.add_row(letters[name], value, span, f"{found['n']}", rank)
    console.print(table)


def _print_unequal(console: Console, found: Mapping[str, Any], letters: Mapping[str, str]) -> None:
    """Which sides no rank counts, and in what runs differ besides their editor."""
    for name, failed in found["gated"].items():
        console.print(Text(f"{letters[name]} is not ranked: {plain('; '.join(failed))}."), soft_wrap=True)
    for what, values in found["unequal"].items():
        told: dict[str, list[str]] = {}
        for name, value in values.items():
            told.setdefault("none" if value is None else str(value), []).append(letters[name])
        listed = "; ".join(f"{line(value)} ({', '.join(names)})" for value, names in told.items())
        text = f"Not alike but for the editor: {line(what)} is {listed}."
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _answers(answers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    staged = "stage" in answers[0]
    if staged:
        table.add_column("stage", no_wrap=True)
        table.add_column("model", justify="right")
    table.add_column("answered")
    table.add_column("hit")
    table.add_column("target's\nlog-prob.", justify="right")
    for answer in answers:
        model = answer.get("experiment")
        where = (answer["stage"], "-" if model is None else f"{model + 1}") if staged else ()
        logprob = "-" if answer["logprob"] is None else f"{answer['logprob']:.2f}"
        said = line(answer["text"].strip()) or repr(answer["text"])
        table.add_row(*where, said, "yes" if answer["hit"] else "no", logprob)
    return table


def print_covariance(about: Mapping[str, Any]) -> None:
    """Print what a file of a covariance holds.

    Args:
        about: `file`, and what `Covariance.summary` returns.
    """
    console = screen()
    shard = about["shard"]
    parts = {
        "source": about["source"] or "not stated",
        "tokens": f"{about['tokens']:,}" + (f" of {about['texts']:,} texts" if about["texts"] else ""),
        "cut at": f"{about['max_length']} tokens a text" if about["max_length"] else "not stated",
        "model's dtype": about["dtype"] or "not stated",
        "shard": f"{shard[0]}/{shard[1]}: merge it with the others before use" if shard else "whole",
        "fingerprint": "tells the model"
        if about["fingerprint"]
        else "none: only layers and sizes are compared with a model",
    }
    console.print(line(about["file"]), soft_wrap=True)
    for name, value in parts.items():
        console.print(f"  {name:14} {line(value)}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("layer", "size", "trace", "largest", "smallest", "rank", "condition", "below 0.02"):
        table.add_column(column, justify="right")
    for layer, found in about["layers"].items():
        condition = "infinite" if found["condition"] is None else f"{found['condition']:.3g}"
        figures = (f"{found[name]:.4g}" for name in ("trace", "largest", "smallest"))
        table.add_row(layer, f"{found['size']}", *figures, f"{found['rank']}", condition, f"{found['below']}")
    console.print(table)
