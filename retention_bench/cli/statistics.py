"""`retention-bench statistics`: what locate-and-edit methods need of a model's keys."""

from __future__ import annotations

from typing import Any

import click

from retention_bench.cli.options import PATH, Filled, Out, Positive, chosen_device, count, json_option
from retention_bench.display import say, say_json


@click.command()
@click.option("--model", type=Filled(), help="A folder, or a Hub id.")
@click.option("--revision", type=Filled(), help="The model's Hub revision; pin it.")
@click.option("--layers", metavar="LAYERS", help="Layers, counted from 0: 0,1,2 or 13-17.")
@click.option("--corpus", type=Filled(), help="A .jsonl or .jsonl.gz file with a column `text`, or a Hub data set id.")
@click.option("--corpus-revision", type=Filled(), help="The data set's Hub revision; it must be pinned.")
@click.option("--corpus-config", type=Filled(), help="The data set's configuration.")
@click.option("--samples", type=count(1), default=100_000, show_default=True, help="Texts, from the front.")
@click.option("--max-length", type=count(1), default=1024, show_default=True, help="Tokens of a text that count.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The dtype of the model.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--memory", type=Positive(), metavar="GIB", help="What the sums may take.")
@click.option("--shard", metavar="I/N", help="Only every N-th text, from the I-th on, I from 0 to N - 1.")
@click.option(
    "--merge", type=PATH, multiple=True, metavar="FILE", help="Put all shards, or a whole file, in the store."
)
@click.option(
    "--from-npz", multiple=True, metavar="LAYER=FILE", help="Import a file of ROME's, MEMIT's, AlphaEdit's code."
)
@click.option("--inspect", type=PATH, metavar="FILE", help="Say what a file holds.")
@click.option("--out", type=Out(folder=False), metavar="FILE.safetensors", help="Also write the result here.")
@click.option("--dry-run", is_flag=True, help="Print where the result will be, and whether it is there already.")
@json_option("the answer")
def statistics(**options: Any) -> None:
    """Measure the key statistics that editors need, once for a model; or merge, import or inspect them.

    \b
    retention-bench statistics --model M --layers 13-17 --corpus C      measure
    retention-bench statistics --merge A --merge B                      put shards together
    retention-bench statistics --model M --from-npz 13=F --from-npz ... import
    retention-bench statistics --inspect FILE                           look into a file

    Prints the file. It is kept in the store under everything it depends on, where `evaluate` finds it. A run that was
    cut off goes on where it was when it is started again.
    """  # noqa: D301 - click keeps lines as they are behind a backspace
    from retention_bench.display import tables
    from retention_bench.display.progress import show_progress
    from retention_bench.pipeline import Store, default_root
    from retention_bench.pipeline.statistics import Request, answer

    as_json, device = options.pop("as_json"), options.pop("device")
    request = Request(**options, device="" if options["inspect"] or options["merge"] else chosen_device(device))
    with show_progress(1) as (announce, progress):
        found = answer(request, Store(default_root()), announce=announce, progress=progress)
    if as_json:
        say_json(found)
    elif request.inspect:
        tables.print_statistics(found)
    elif request.dry_run:
        say(f"{found['file']} ({'in the store' if found['in_store'] else 'not there yet'})")
    else:
        say(found["file"])
