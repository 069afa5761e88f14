"""`retention-bench stage`: one stage of a plan, in any process."""

from __future__ import annotations

from pathlib import Path

import click

from retention_bench.cli.options import PATH, json_option
from retention_bench.display import say, say_json
from retention_bench.errors import unknown_name


@click.command()
@click.argument("plan", type=PATH)
@click.argument("key")
@json_option("the folder")
def stage(plan: Path, key: str, as_json: bool) -> None:
    """Compute one stage of a plan, and what it needs, unless the store holds it; print its folder.

    PLAN is a file that `evaluate --plan` wrote, KEY a stage's key, or its first letters, as --dry-run prints it.
    Several processes may do this at once: each stage is computed by one of them, and the others wait for it.
    """
    from retention_bench.display.progress import show_progress
    from retention_bench.pipeline import Bench
    from retention_bench.pipeline.plan_file import read_plan
    from retention_bench.pipeline.stages import STAGES
    from retention_bench.store import Store, default_root

    stages = read_plan(plan, STAGES)
    fitting = [found for found in stages.values() if found.key.startswith(key)]
    if len(fitting) != 1:
        raise unknown_name("key" if not fitting else "key, of several that begin so,", key, stages)
    [chosen] = fitting
    with show_progress(len(chosen.plan())) as (announce, progress):
        folder = Bench(Store(default_root()), progress, announce).get(chosen)
    if as_json:
        say_json({"stage": chosen.name, "key": chosen.key, "folder": str(folder)})
    else:
        say(folder)
