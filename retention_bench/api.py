"""The Python API: what the command line does, as functions. `import retention_bench as rb` offers them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from retention_bench.device import chosen_device
from retention_bench.display.progress import Progress, silent
from retention_bench.errors import UsageError
from retention_bench.facts import FactSet, load_pool
from retention_bench.pipeline.cell import Cell, plan
from retention_bench.pipeline.folder import default_folder
from retention_bench.pipeline.run import announced
from retention_bench.pipeline.run import evaluate as run
from retention_bench.pipeline.suite import Suite, load_suite, suite_names
from retention_bench.registry import EDITORS, FINETUNES
from retention_bench.results import MIN_EFFICACY
from retention_bench.results.compare import compared
from retention_bench.results.kinds import KINDS
from retention_bench.results.schema import Results
from retention_bench.results.seeds import SeedsResults
from retention_bench.store import Store, default_root

PathLike = str | os.PathLike[str]


def evaluate(
    *,
    editor: str,
    finetune: str,
    suite: str | Suite = "atlas",
    overrides: Sequence[str] = (),
    model: str | None = None,
    seed: int = 0,
    facts_seed: int | None = None,
    edit_seed: int | None = None,
    finetune_seed: int | None = None,
    min_efficacy: float = MIN_EFFICACY,
    device: str = "auto",
    paraphrases: int = 0,
    paraphrase_source: str = "own",
    paraphrase_mode: str = "mean",
    freeze: str = "none",
    adapter: str = "none",
    track_every: int | None = 0,
    horizon: str = "threshold",
    accelerate_config: str | None = None,
    covariance: str | None = None,
    out: PathLike | None = None,
    store: PathLike | None = None,
    save_checkpoints: bool = False,
    quiet: bool = False,
) -> Results:
    """Edit, fine-tune and score one cell: an editor and a fine-tune on one model.

    What was computed before is taken from the store, so a run that was interrupted goes on with the stage it was in.

    Args:
        editor: The editor, by its name in the suite; or a placebo: `"none"`, `"random:EDITOR"`,
            `"scaled:FACTOR:EDITOR"` or `"scaled:matched:EDITOR"`.
        finetune: The downstream fine-tune; or `path:` and a data set of one's own, see `parse_finetune`.
        suite: A suite, its name, or a YAML file.
        overrides: Other values for keys of the suite, as `"facts.edited=25"`.
        model: A model of the suite, a folder or a Hub id; None for the suite's first.
        seed: Seed of the facts drawn, the edits and the fine-tunes.
        facts_seed: Seed of the facts drawn; None for `seed`. The same for the two below.
        edit_seed: Seed of the edits.
        finetune_seed: Seed of the fine-tunes.
        min_efficacy: The share of the edits that must have taken for the cell to be ranked.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        paraphrases: Edit each fact with so many more prompts.
        paraphrase_source: Where those come from: `"own"`, `"template"`, `"model:NAME"`, or several, as in
            `"own+template+model:NAME"`, each of which fills what those before it leave.
        paraphrase_mode: `"mean"` writes a fact once, for all its prompts together; `"separate"` makes each prompt a
            request of its own.
        freeze: What the fine-tunes leave as it is, see `parse_freeze`.
        adapter: What they train in the weights' place: `"none"`, `"lora"` or `"dora"`.
        track_every: All facts are asked wherever a fine-tune is evaluated; with more than 0, also every so many steps.
            None for no trajectory.
        horizon: Where the fine-tunes end: `"threshold"`, or a dose: `"steps:N"`, `"epochs:X"` or `"tokens:N"`.
        accelerate_config: How fine-tunes are started on several GPUs: `"ddp"`, `"fsdp"` or a file.
        covariance: A file of the covariance of the keys, in place of one that is collected.
        out: Folder for the results; None for one below `runs/`.
        store: The store's folder; None for `$RETENTION_BENCH_STORE`, or one in the user's cache.
        save_checkpoints: Also write every scored model as a full checkpoint.
        quiet: Show no progress on standard error.

    Returns:
        The results, as in `results.json`.

    Raises:
        UsageError: The cell names something that does not exist, or `out` is not ours.
        RetentionBenchError: A stage cannot go on; everything computed before is kept.
    """
    if isinstance(suite, Suite) and overrides:
        raise UsageError("overrides go with the name of a suite. Give them to load_suite, which made this one.")
    cell = Cell(
        suite if isinstance(suite, Suite) else load_suite(suite, overrides),
        model=model,
        editor=editor,
        finetune=finetune,
        seed=seed,
        facts_seed=facts_seed,
        edit_seed=edit_seed,
        finetune_seed=finetune_seed,
        min_efficacy=min_efficacy,
        device=chosen_device(device),
        paraphrases=paraphrases,
        paraphrase_source=paraphrase_source,
        paraphrase_mode=paraphrase_mode,
        freeze=freeze,
        adapter=adapter,
        track_every=track_every,
        horizon=horizon,
        accelerate_config=accelerate_config,
        covariance=covariance,
    )
    planned = plan(cell)
    folder = default_folder(cell, planned) if out is None else Path(out)
    kept = _store(store)
    with _progress(announced(planned, kept, save_checkpoints=save_checkpoints), quiet) as (announce, progress):
        return run(
            planned,
            store=kept,
            out=folder,
            progress=progress,
            announce=announce,
            save_checkpoints=save_checkpoints,
        )


def evaluate_seeds(
    seeds: Sequence[int],
    *,
    editor: str,
    finetune: str,
    suite: str | Suite = "atlas",
    overrides: Sequence[str] = (),
    device: str = "auto",
    out: PathLike | None = None,
    store: PathLike | None = None,
    quiet: bool = False,
    **options: Any,
) -> SeedsResults:
    """Evaluate one cell with several seeds, and count the runs together.

    Args:
        seeds: The seeds.
        editor: As for `evaluate`, and so are the others.
        finetune: The downstream fine-tune.
        suite: A suite, its name, or a YAML file.
        overrides: Other values for keys of the suite.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        out: Folder for `seeds.json` and the runs; None for one below `runs/`.
        store: The store's folder.
        quiet: Show no progress on standard error.
        options: Further options of `evaluate`, as `horizon="steps:100"`.

    Returns:
        The results, as in `seeds.json`.

    Raises:
        UsageError: As `evaluate`.
        RetentionBenchError: As `evaluate`; the runs before are kept.
    """
    from retention_bench.pipeline.seeds import announced as ahead
    from retention_bench.pipeline.seeds import evaluate_seeds as run_seeds

    if isinstance(suite, Suite) and overrides:
        raise UsageError("overrides go with the name of a suite. Give them to load_suite, which made this one.")
    given = suite if isinstance(suite, Suite) else load_suite(suite, overrides)
    where = {"device": chosen_device(device), "seed": seeds[0] if seeds else 0}
    cell = Cell(given, editor=editor, finetune=finetune, **({"model": None} | options | where))
    kept = _store(store)
    folder = default_folder(cell, plan(cell)).parent / "seeds" if out is None else Path(out)
    with _progress(ahead(cell, seeds, kept), quiet) as (announce, progress):
        return run_seeds(cell, seeds, store=kept, out=folder, progress=progress, announce=announce)


def score(
    checkpoints: Sequence[str],
    *,
    facts: PathLike | FactSet,
    out: PathLike = "scores",
    kinds: Collection[str] = tuple(KINDS),
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 64,
    allow_pickle: bool = False,
    tokenizer: str | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Score checkpoints that are there already, on one live engine.

    Args:
        checkpoints: Folders, Hub ids, `MODEL+DELTA.safetensors`, `MODEL+ADAPTER_FOLDER`, or patterns such as
            `"runs/*/model"`.
        facts: What to ask: facts, or a file in any form that a suite takes.
        out: Folder for `scores.jsonl`; what it holds already is not scored again.
        kinds: The kinds of question.
        backend: `"auto"`, `"hf"` or `"vllm"`.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        dtype: What weights are converted to; `"auto"` is float32 on a CPU and bfloat16 on a GPU.
        batch_size: Prompts a forward pass at most, for `"hf"`.
        allow_pickle: Also read pickled weights.
        tokenizer: A folder to take the tokenizer from, for checkpoints without one.
        quiet: Show no progress on standard error.

    Returns:
        A row for each checkpoint and task, as in `scores.jsonl`: with rate, interval and samples; or with `error`,
        where it could not be scored.

    Raises:
        UsageError: There is nothing to score or to ask.
        RetentionBenchError: The facts or the output folder cannot be used.
    """
    from retention_bench.models import read_references
    from retention_bench.scoring.checkpoints import Options, score_checkpoints
    from retention_bench.scoring.engine_process import resolve_backend

    where = chosen_device(device)
    options = Options(
        backend=resolve_backend(backend, where),
        dtype=resolve_dtype(dtype, where),
        device=where,
        kinds=tuple(kinds),
        batch_size=batch_size,
        allow_pickle=allow_pickle,
        tokenizer=tokenizer,
    )
    references, unreadable = read_references(list(checkpoints), lambda notice: None)
    if not references and not unreadable:
        raise UsageError("No checkpoint is given. Name some.")
    asked = facts if isinstance(facts, FactSet) else load_pool(Path(facts)).facts
    with _progress(len(references), quiet) as (announce, progress):
        return score_checkpoints(
            references, asked, Path(out), options, unreadable=unreadable, announce=announce, progress=progress
        )


def resolve_dtype(asked: str, device: str) -> str:
    """The dtype that checkpoints are scored in: the one asked for, or what fits the device."""
    return ("float32" if device == "cpu" else "bfloat16") if asked == "auto" else asked


def compare(*sides: PathLike, stage: str = "post_finetune", kinds: Collection[str] = tuple(KINDS)) -> dict[str, Any]:
    """Compare runs or scored checkpoints, every two of them, fact by fact.

    Args:
        sides: Run folders (`RUN`, `RUN:STAGE`) and files that `score` wrote (`FILE`, `FILE:CHECKPOINT`).
        stage: The stage of runs that are given without one.
        kinds: The kinds of question.

    Returns:
        `{sides, failed, unequal, gated, headlines, comparisons, ranks}`, see `results.compare.compared`.

    Raises:
        UsageError: There is nothing of that name, or there are fewer than two sides.
        RetentionBenchError: A file is malformed.
    """
    return compared([os.fspath(side) for side in sides], stage=stage, kinds=kinds)


def list_editors() -> list[str]:
    """Names of the editors that can be used."""
    return EDITORS.names()


def list_finetunes() -> list[str]:
    """Names of the fine-tunes that can be used."""
    return FINETUNES.names()


def list_suites() -> list[str]:
    """Names of the suites that come with the package."""
    return suite_names()


def _store(folder: PathLike | None) -> Store:
    return Store(default_root() if folder is None else Path(folder))


@contextlib.contextmanager
def _progress(stages: int, quiet: bool) -> Iterator[tuple[Callable[[str, bool], None], Progress]]:
    if quiet:
        yield lambda title, cached: None, silent
        return
    from retention_bench.display.progress import show_progress

    with show_progress(stages) as pair:
        yield pair
