"""`retention-bench evaluate`: one cell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retention_bench.cli.options import SEED, CountOrOff, Filled, Out, count, json_option
from retention_bench.device import chosen_device
from retention_bench.display import say_json
from retention_bench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from retention_bench.pipeline import Cell, Suite
    from retention_bench.store import Store


@click.command()
@click.option(
    "--editor",
    required=True,
    help="The editor, by its name in the suite or in `retention-bench list editors`; one that the suite does not name "
    "has its own defaults. Or a placebo: none (no change), random:EDITOR (noise with its norms), scaled:FACTOR:EDITOR, "
    "or scaled:matched:EDITOR (as sure of the new objects as the base model was of the true ones).",
)
@click.option(
    "--finetune",
    required=True,
    help="The downstream fine-tune, see `retention-bench list finetunes`; or path:FILE or path:OWNER/NAME@REVISION for "
    "data of your own.",
)
@click.option("--suite", default="atlas", show_default=True, help="A suite's name, or a YAML file of your own.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value for a key of the suite, such as facts.edited=25, editors.alphaedit.layers=3-8 or "
    "finetunes.tulu3.source=chats.jsonl; can be given several times.",
)
@click.option(
    "--model", type=Filled(), help="A model of the suite, a folder, or a Hub id.  [default: the suite's first]"
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Seed of the facts drawn, the edits and the fine-tunes."
)
@click.option(
    "--seeds",
    metavar="0-4|0,2,5",
    help="Run the cell with each of these seeds, and count the runs together: seeds.json. Not with --seed.",
)
@click.option("--facts-seed", type=SEED, help="Seed of the facts drawn.  [default: --seed]")
@click.option("--edit-seed", type=SEED, help="Seed of the edits.  [default: --seed]")
@click.option("--finetune-seed", type=SEED, help="Seed of the fine-tunes.  [default: --seed]")
@click.option(
    "--min-efficacy",
    type=click.FloatRange(min=0, max=1),
    default=0.8,
    show_default=True,
    help="The share of the edits that must have taken for the cell to be ranked.",
)
@click.option(
    "--paraphrases",
    type=click.IntRange(min=0, max=1000),
    default=0,
    show_default=True,
    metavar="N",
    help="Edit each fact with N more prompts.",
)
@click.option(
    "--paraphrase-source",
    default="own",
    show_default=True,
    metavar="own|template|model:NAME|A+B",
    help="Where those come from: the fact's own paraphrases (which are not asked then), other words before its prompt, "
    "or an instruct model (one of the suite, a folder, or a Hub id) that writes them. With "
    "own+template+model:NAME each fills what those before it leave.",
)
@click.option(
    "--paraphrase-mode",
    type=click.Choice(["mean", "separate"]),
    default="mean",
    show_default=True,
    help="mean: a fact is written once, for all its prompts together. separate: each prompt is a request of its own.",
)
@click.option(
    "--freeze",
    default="none",
    show_default=True,
    metavar="none|edited|unedited|below:K|window:C:W",
    help="What the fine-tunes leave as it is: the edited layers; all but those; layers below K, counted from 0; all "
    "but the W layers around C.",
)
@click.option(
    "--adapter",
    default="none",
    show_default=True,
    metavar="none|lora|dora",
    help="Train adapters, merged for scoring, and not the weights.",
)
@click.option(
    "--horizon",
    default="threshold",
    show_default=True,
    metavar="threshold|steps:N|epochs:X|tokens:N",
    help="Where the fine-tunes end: at the threshold, as in the paper, or after a dose, whatever was learned by then.",
)
@click.option(
    "--track-every",
    type=CountOrOff(),
    default="0",
    metavar="N|off",
    help="All facts are asked at every evaluation of the fine-tunes, for trajectory.jsonl. Ask them every N steps too, "
    "or never.",
)
@click.option("--probe-every", type=count(0), hidden=True, help="The old name of --track-every.")
@click.option(
    "--probe-fact",
    multiple=True,
    metavar="ID",
    help="Also print this fact's most probable tokens, look by look.",
)
@click.option(
    "--accelerate-config",
    type=Filled(),
    metavar="ddp|fsdp|FILE",
    help="Fine-tune on all visible GPUs: ddp for models that fit one of them, fsdp for larger ones; or a file that "
    "`accelerate config` wrote.",
)
@click.option(
    "--covariance",
    type=Filled(),
    metavar="FILE",
    help="Take the covariance of the keys from this file of `retention-bench covariance`, in place of collecting it.",
)
@click.option("--out", type=Out(folder=True), help="Folder for the results.  [default: below runs/]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--save-checkpoints", is_flag=True, help="Also write every scored model as a full checkpoint.")
@click.option(
    "--plan",
    "plan_file",
    type=Out(folder=False),
    metavar="FILE",
    help="Write the stages to a file, for `retention-bench stage`, and compute nothing.",
)
@click.option("--dry-run", is_flag=True, help="Print the stages that would run, and which are in the store already.")
@json_option("the results")
def evaluate(
    suite: str,
    overrides: tuple[str, ...],
    seeds: str | None,
    track_every: int | None,
    probe_every: int | None,
    probe_fact: tuple[str, ...],
    out: Path | None,
    device: str,
    save_checkpoints: bool,
    plan_file: Path | None,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Edit, fine-tune and score one cell: an editor and a fine-tune on one model.

    What was computed before is taken from the store ($RETENTION_BENCH_STORE, or retention-bench in your cache folder),
    so an interrupted run goes on with the stage it was in.
    """
    from retention_bench.display.plan import print_plan
    from retention_bench.display.progress import show_progress
    from retention_bench.display.results import print_results
    from retention_bench.display.trajectory import print_tokens
    from retention_bench.pipeline import Cell, load_suite, plan
    from retention_bench.pipeline.folder import default_folder
    from retention_bench.pipeline.plan_file import write_plan
    from retention_bench.pipeline.run import announced, preview
    from retention_bench.pipeline.run import evaluate as run
    from retention_bench.store import Store, default_root
    from retention_bench.store.store import read_jsonl

    track_every = probe_every if probe_every is not None else track_every
    if probe_fact and track_every is None:
        raise UsageError("--probe-fact needs the trajectory. Leave --track-every off out.")
    store = Store(default_root())
    # The other options are named as the fields of a cell are.
    cell = Cell(load_suite(suite, overrides), device=chosen_device(device), track_every=track_every, **chosen)
    planned = plan(cell)
    if seeds is not None:
        given: dict[str, object] = {"--plan": plan_file, "--probe-fact": probe_fact}
        given["--save-checkpoints"] = save_checkpoints
        _evaluate_seeds(cell, seeds, store, out or default_folder(cell, planned).parent, as_json, dry_run, given)
        return
    out = out or default_folder(cell, planned)
    if probe_fact:
        _check_known(cell.suite, probe_fact)
    if plan_file:
        write_plan(planned, plan_file)
        if not dry_run:
            return
    if dry_run:
        found = preview(planned, store=store, out=out)
        if as_json:
            say_json(found)
        else:
            print_plan(found["stages"], store.root, found["estimate"], found["data"])
        return
    titles = announced(planned, store, save_checkpoints=save_checkpoints)
    with show_progress(titles) as (announce, progress):
        results = run(
            planned, store=store, out=out, progress=progress, announce=announce, save_checkpoints=save_checkpoints
        ).to_dict()
    if as_json:
        say_json(results)
    else:
        print_results(results, out, real=planned.real)
    if probe_fact:
        rows = read_jsonl(out / "trajectory.jsonl")
        ids = dict.fromkeys(row["fact_id"] for row in rows)
        for fact in probe_fact:
            if fact not in ids:
                raise unknown_name("fact of this cell:", fact, ids)
            if not as_json:
                print_tokens(fact, [row for row in rows if row["fact_id"] == fact])


def _evaluate_seeds(
    cell: Cell, seeds: str, store: Store, out: Path, as_json: bool, dry_run: bool, given: Mapping[str, object]
) -> None:
    """Run the cell with several seeds, and print what they have together."""
    from retention_bench.display.plan import print_plan
    from retention_bench.display.progress import show_progress
    from retention_bench.display.results import print_seeds
    from retention_bench.pipeline import plan
    from retention_bench.pipeline.run import preview
    from retention_bench.pipeline.seeds import announced, evaluate_seeds, parse_seeds

    numbers = parse_seeds(seeds)
    for option, value in given.items():
        if value:
            raise UsageError(f"{option} is for one seed. Leave it out, or give --seed in place of --seeds.")
    if cell.seed:
        raise UsageError("--seed and --seeds are both given. Give one of them.")
    folder = out / f"seeds-{re.sub(r'[^0-9-]+', '_', seeds)}"
    if dry_run:
        plans = {seed: plan(dataclasses.replace(cell, seed=seed)) for seed in numbers}
        found = {seed: preview(own, store=store, out=folder / f"seed-{seed}") for seed, own in plans.items()}
        if as_json:
            stages = {stage["key"]: stage for own in found.values() for stage in own["stages"]}  # shared ones once
            say_json({"stages": list(stages.values()), "seeds": found})
            return
        for own in found.values():
            print_plan(own["stages"], store.root, own["estimate"], own["data"])
        return
    with show_progress(announced(cell, numbers, store)) as (announce, progress):
        results = evaluate_seeds(cell, numbers, store=store, out=folder, progress=progress, announce=announce)
    if as_json:
        say_json(results.to_dict())
    else:
        print_seeds(results.to_dict(), folder)


def _check_known(suite: Suite, facts: Collection[str]) -> None:
    """Refuse ids that no fact of a suite has; which of its facts a cell takes is found out when it runs."""
    from retention_bench.facts import load_pool

    source = suite.facts
    pool = load_pool(source.source, source.revision, source.config).facts
    ids = [fact.id for fact in pool]
    for fact in set(facts) - set(ids):
        raise unknown_name("fact of this suite:", fact, ids)
