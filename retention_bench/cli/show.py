"""`retention-bench show`: the results of a run once more."""

from __future__ import annotations

from pathlib import Path

import click

from retention_bench.cli.options import json_option
from retention_bench.display import say_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--paper",
    is_flag=True,
    help="Only what the paper's Table 1 has: edited and intrinsic facts answered at every stage, whatever was right "
    "before (equation 1).",
)
@json_option("the results")
def show(run: Path, paper: bool, as_json: bool) -> None:
    """Show the results of a finished run.

    RUN is a folder that `evaluate` wrote, with --seeds or without.
    """
    from retention_bench.display.results import print_paper, print_results, print_seeds
    from retention_bench.results import Results
    from retention_bench.results.seeds import SeedsResults

    several = (run / "seeds.json").is_file()
    results = (SeedsResults.load(run) if several else Results.load(run)).to_dict()
    if as_json and paper:
        kinds = ("edited", "intrinsic")
        say_json(
            {stage: {kind: own[kind] for kind in kinds if kind in own} for stage, own in results["stages"].items()}
        )
    elif as_json:
        say_json(results)
    elif paper:
        print_paper(results)
    elif several:
        print_seeds(results, run)
    else:
        print_results(results, run, real=None)
