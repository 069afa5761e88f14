"""`retention-bench compare`: runs or scored checkpoints, fact by fact."""

from __future__ import annotations

import click

from retention_bench.cli.options import json_option
from retention_bench.display import say_json

_STAGES = click.Choice(["base", "post_edit", "post_finetune", "control_finetune"])


@click.command()
@click.argument("sides", nargs=-1, required=True, metavar="A B...")
@click.option(
    "--stage", type=_STAGES, default="post_finetune", show_default=True, help="The stage of a run without one."
)
@click.option("--kind", "kinds", multiple=True, help="Compare only this kind of question, as edited; repeatable.")
@json_option("the comparison")
def compare(sides: tuple[str, ...], stage: str, kinds: tuple[str, ...], as_json: bool) -> None:
    """Compare runs or scored checkpoints, fact by fact: what was lost, gained and kept.

    \b
    A side is one of
      RUN               a folder that `evaluate` wrote, after its fine-tune or at --stage
      RUN:STAGE         the same at base, post_edit, post_finetune or control_finetune
      FILE              all checkpoints in a file that `score` wrote
      FILE:CHECKPOINT   one of them

    Only questions that both sides of a pair were asked are compared. The p-values are those of the exact test by
    relation and of McNemar's by fact, which holds for these relations only; with Holm's correction for all pairs and
    kinds shown. Sides that fail a gate are not ranked, and what runs differ in besides their editor is said.
    """  # noqa: D301 - click keeps lines as they are behind a backspace
    from retention_bench.display import tables
    from retention_bench.errors import unknown_name
    from retention_bench.results.compare import compared
    from retention_bench.results.kinds import KINDS

    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of question", kind, KINDS)
    found = compared(sides, stage=stage, **({"kinds": kinds} if kinds else {}))
    if as_json:
        say_json(found)
    else:
        tables.print_comparisons(found)
