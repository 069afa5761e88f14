"""Run a cell: compute the stages that the store does not hold, and hand out the results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from retention_bench.data.durable import DamagedError, check, remove, seal
from retention_bench.display.progress import Progress, silent
from retention_bench.errors import UsageError
from retention_bench.facts import FactSet
from retention_bench.pipeline.cell import Cell, plan
from retention_bench.pipeline.data_check import check_data
from retention_bench.pipeline.estimate import estimate
from retention_bench.pipeline.loading import save
from retention_bench.pipeline.stage import Announce, Bench
from retention_bench.pipeline.stages import Gather, Score
from retention_bench.pipeline.stages.results import FIGURES
from retention_bench.results import Results
from retention_bench.store import Store
from retention_bench.store.fingerprints import unchanged
from retention_bench.store.output import MARK, check_output, exclusive

FILES = ("samples.jsonl", "facts.jsonl", "trajectory.jsonl", "step_matched.jsonl", *FIGURES, "results.json")
"""What a run writes into its output folder."""


def evaluate(
    cell: Cell | Gather,
    *,
    store: Store,
    out: Path,
    progress: Progress = silent,
    announce: Announce = lambda title, cached: None,
    save_checkpoints: bool = False,
) -> Results:
    """Edit, fine-tune and score one cell; what the store holds already is not computed again.

    Args:
        cell: The cell, or its plan.
        store: Where stage results are kept.
        out: Folder that gets `results.json`, `samples.jsonl` and `facts.jsonl`, and where the fine-tunes are followed
            `trajectory.jsonl`, `step_matched.jsonl`, `survival.svg` and `survival.png`.
        progress: Told how far the running stage is.
        announce: Told the title of each stage as it comes up, and whether the store held it.
        save_checkpoints: Also write every scored model as a full checkpoint below `out/checkpoints`.

    Returns:
        The results, as written to `results.json`.

    Raises:
        UsageError: The cell names something that does not exist, or `out` is not ours.
        RetentionBenchError: A stage cannot go on; everything computed before is kept.
    """
    check_output(out, "evaluate", FILES)
    last = plan(cell) if isinstance(cell, Cell) else cell
    check_data(last, store)
    with exclusive(out, "evaluate", FILES) as output:
        if save_checkpoints:
            _check_checkpoints(out / "checkpoints", last)
        bench = Bench(store, progress, announce)
        if store.find(last) is not None:  # nothing else is read then, and damage to it would not be noticed
            for stage in last.plan():
                store.inspect(stage)
        folder = bench.get(last)
        # What is not there this time may be another run's, into the same folder.
        output.put({name: folder / name if (folder / name).is_file() else None for name in FILES})
        if save_checkpoints:
            _save_checkpoints(out / "checkpoints", last, bench)
    return Results.load(folder)


def announced(last: Gather, store: Store, *, save_checkpoints: bool) -> int:
    """How many titles `evaluate` will announce."""
    return Bench(store).ahead(last) + (len(_scored(last)) if save_checkpoints else 0)


def _scored(last: Gather) -> dict[str, Score]:
    """All scores of a cell, by the name that the scored model has as a checkpoint."""
    scores = {"base": last.base}
    for index, e in enumerate(last.experiments):
        scores |= {f"post_edit-{index}": e.after_edit, f"post_finetune-{index}": e.after_finetune}
    return scores | {"control_finetune": last.control}


def _check_checkpoints(folder: Path, last: Gather) -> None:
    """Refuse to write checkpoints where that cannot be, or where something lies that we did not write.

    Raises:
        UsageError: One of them would replace something else, or the folder cannot be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is no folder, and checkpoints are to be written there. Move it away.")
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} may not be written, and checkpoints are to be. Change its permissions.")
    for name in _scored(last):
        if os.path.lexists(folder / name):
            _check_checkpoint(folder / name)


def _check_checkpoint(folder: Path) -> None:
    try:
        check(folder, MARK)
    except DamagedError as error:
        raise UsageError(
            f"{folder} would be replaced, and is not what `retention-bench evaluate` wrote there: {error}. Nothing was "
            "touched. Move it away, or give another folder with --out."
        ) from error


def _save_checkpoints(folder: Path, last: Gather, bench: Bench) -> None:
    """Write every scored model as a full checkpoint, each with the facts it is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    with unchanged(last.base.reads):  # no stage looks after the model here
        bench.base(last.base.model)
    for name, score in _scored(last).items():
        bench.tell(f"write checkpoint {name}")
        with score.loaded(bench) as (model, tokenizer):
            _put(folder, name, score.asked(bench), model, tokenizer)


def _put(folder: Path, name: str, facts: FactSet, model: Any, tokenizer: Any) -> None:
    target, partial, old = folder / name, folder / f"{MARK}.{name}", folder / f"{MARK}.{name}.old"
    remove(partial)
    remove(old)
    save(model, tokenizer, partial)
    facts.write(partial / "facts.jsonl")
    seal(partial, MARK, {"written_by": "evaluate"})
    if os.path.lexists(target):
        _check_checkpoint(target)
        target.rename(old)
    partial.rename(target)
    remove(old)


def preview(last: Gather, *, store: Store, out: Path) -> dict[str, Any]:
    """What `evaluate` would do, and what can be known before it does: nothing is computed or written.

    Args:
        last: The plan of a cell.
        store: Where what is there already is looked for.
        out: The folder that the results would be written to.

    Returns:
        `{store, stages, estimate, data}` as JSON values: every stage with its key and whether the store holds it, an
        `Estimate`, and what a look into the fine-tune's data found, None where nobody looked.

    Raises:
        UsageError: `out` is not ours, or the data does not fit.
        RetentionBenchError: The data cannot be used.
    """
    check_output(out, "evaluate", FILES)
    data = check_data(last, store)
    return {
        "store": str(store.root),
        "stages": [
            {"stage": stage.name, "title": stage.title(), "key": stage.key, "in_store": store.holds(stage)}
            for stage in last.plan()
        ],
        "estimate": estimate(last, store).to_json(),
        "data": data.to_json() if data else None,
    }
