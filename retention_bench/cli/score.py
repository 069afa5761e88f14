"""`retention-bench score`: checkpoints that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from retention_bench.cli.options import PATH, Filled, Out, count, json_option, listed
from retention_bench.device import chosen_device
from retention_bench.display import say_error, say_json
from retention_bench.errors import UsageError


@click.command()
@click.argument("checkpoints", nargs=-1)
@click.option(
    "--facts",
    type=PATH,
    required=True,
    metavar="FACTS.jsonl",
    help="What to ask: facts in any form that a suite takes.",
)
@click.option(
    "--manifest", type=PATH, metavar="FILE", help="More checkpoints: a line each, or a JSON object with name."
)
@click.option(
    "--tasks",
    metavar="KIND,KIND",
    help="The kinds of question to ask, as edited, or groups: retention, retention_qa, retention_chat.  [default: all]",
)
@click.option("--also", default="", metavar="TASK,TASK", help="Tasks of lm-eval's own to run on the same live engine.")
@click.option(
    "--include-path", type=click.Path(exists=True, file_okay=False), help="A folder with more tasks for --also."
)
@click.option("--backend", type=click.Choice(["auto", "hf", "vllm"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What weights are converted to.  [auto: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option("--batch-size", type=count(1), default=64, show_default=True, help="For --backend hf.")
@click.option("--tensor-parallel-size", type=count(1), default=1, show_default=True, help="For --backend vllm.")
@click.option("--allow-pickle", is_flag=True, help="Also read pickled weights; loading those of a stranger is a risk.")
@click.option(
    "--tokenizer", type=Filled(), metavar="FOLDER", help="Take the tokenizer from here, for checkpoints without one."
)
@click.option("--out", type=Out(folder=True), default="scores", show_default=True, help="Folder for scores.jsonl.")
@json_option("the scores")
def score(checkpoints: tuple[str, ...], facts: Path, manifest: Path | None, out: Path, **options: Any) -> None:
    """Score checkpoints that are there already, hundreds of them on one live engine.

    \b
    CHECKPOINT is one of
      FOLDER  or  OWNER/NAME[@REVISION]      a model
      MODEL+DELTA.safetensors                a base model and an edit
      MODEL+ADAPTER_FOLDER, ADAPTER_FOLDER   a base model and a peft adapter
      'runs/*/model'                         every folder that fits, in quotes

    What OUT/scores.jsonl holds already is not scored again, so a run that was cut off goes on. A checkpoint that cannot
    be scored is recorded with the reason, and the others are scored; the exit code is 1 then.
    """  # noqa: D301 - click keeps lines as they are behind a backspace
    from retention_bench.scoring.engine_process import EngineProcess, resolve_backend

    as_json, device = options.pop("as_json"), chosen_device(options.pop("device"))
    backend = resolve_backend(options.pop("backend"), device)
    # It takes some seconds to get ready, and so do the imports here.
    process = EngineProcess(device) if backend == "vllm" else None

    from retention_bench.data import find_file
    from retention_bench.display import tables
    from retention_bench.display.progress import show_progress
    from retention_bench.facts import load_pool
    from retention_bench.models import read_manifest, read_references
    from retention_bench.results.kinds import GROUPS, KINDS
    from retention_bench.scoring.checkpoints import Options, score_checkpoints

    tasks = options.pop("tasks")
    kinds = tuple(KINDS)
    if tasks is not None:
        named = listed("--tasks", tasks, [*KINDS, *GROUPS])
        kinds = tuple(dict.fromkeys(kind for name in named for kind in GROUPS.get(name, (name,))))
    also = listed("--also", options.pop("also"))
    if ours := set(also) & {*GROUPS, *(kind.task for kind in KINDS.values())}:
        raise UsageError(f"--also names {min(ours)}, a kind of question of our own. Give it with --tasks.")
    if not kinds and not also:
        raise UsageError(f"--tasks and --also name nothing to ask. Give --tasks some of {', '.join(KINDS)}.")
    manifested = [] if manifest is None else read_manifest(manifest)
    references, unreadable = read_references([*checkpoints, *manifested], say_error)
    if not references and not unreadable:
        raise UsageError("No checkpoint is given. Name some, or give --manifest FILE.")
    pool = load_pool(str(find_file(facts, "facts file").absolute()))
    if pool.rows.dropped:
        say_error(pool.rows)
    dtype = options.pop("dtype")
    dtype = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
    chosen = Options(backend=backend, dtype=dtype, device=device, kinds=kinds, also=also, **options)
    with show_progress(len(references)) as (announce, progress):
        rows = score_checkpoints(
            references,
            pool.facts,
            out,
            chosen,
            unreadable=unreadable,
            announce=announce,
            progress=progress,
            process=process,
        )
    if as_json:
        say_json(rows)
    else:
        tables.print_scores(rows, out / "scores.jsonl")
    if any("error" in row for row in rows):
        click.get_current_context().exit(1)
