"""`retention-bench inspect`: everything known about one fact."""

from __future__ import annotations

import click

from retention_bench.cli.options import json_option
from retention_bench.display import say_json


@click.command()
@click.argument("fact")
@click.argument("sides", nargs=-1, required=True, metavar="A...")
@json_option("the answers")
def inspect(fact: str, sides: tuple[str, ...], as_json: bool) -> None:
    """Show everything that is known about one fact: its prompts and targets, and every answer to them.

    FACT is its id, as `compare` prints it and facts.jsonl has it. A side is what `compare` takes; of a RUN without a
    stage all stages are shown.
    """
    from retention_bench.display import tables
    from retention_bench.results.compare import inspected

    found = inspected(fact, sides)
    if as_json:
        say_json(found)
    else:
        tables.print_fact(found)
