"""The folder of a cell's results where none is named."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from retention_bench.data.durable import canonical
from retention_bench.facts import MODEL
from retention_bench.pipeline.cell import Cell
from retention_bench.pipeline.stage import Model
from retention_bench.pipeline.stages import Gather


def default_folder(cell: Cell, plan: Gather) -> Path:
    """A folder below `runs/`; what differs from the usual is in its name.

    Args:
        cell: The cell.
        plan: Its plan.
    """
    model = _model(plan.model, cell.model, plan.base.model, cell)
    folder = Path("runs") / cell.suite.name / model / _part(cell.editor) / _part(plan.finetune)
    if cell.suite.overrides:
        told_apart = hashlib.sha256(canonical(dict(cell.suite.overrides)).encode()).hexdigest()
        folder /= f"set-{told_apart[:8]}"
    if (paraphrases := plan.base.paraphrases) is not None:
        source = paraphrases.shown
        if paraphrases.writer:
            given = cell.paraphrase_source.partition(":")[2]
            before, _, writer = source.partition(MODEL)
            source = f"{before}model-{_model(writer, given, paraphrases.writer, cell)}"
        mode = "" if cell.paraphrase_mode == "mean" else f"-{cell.paraphrase_mode}"
        folder /= _part(f"paraphrases-{paraphrases.count}-{source}{mode}")
    if cell.freeze != "none":
        folder /= _part(f"freeze-{cell.freeze}")
    if cell.adapter != "none":
        folder /= _part(cell.adapter)
    if cell.horizon != "threshold":
        folder /= _part(cell.horizon)
    named = [f"seed-{cell.seed}"]
    for part in ("facts", "edit", "finetune"):
        if (seed := getattr(cell, f"{part}_seed")) is not None:
            named.append(f"{part}-{seed}")
    return folder / "-".join(named)


def _model(name: str, given: str | None, model: Model, cell: Cell) -> str:
    """A model's part of that; folders of one name are told apart by where they lie and what is in them."""
    if given in (None, *cell.suite.models) or "files" not in model.fingerprint:
        return _part(name)
    told_apart = hashlib.sha256(canonical([model.path, model.fingerprint]).encode()).hexdigest()
    return f"{_part(name)}-{told_apart[:8]}"


def _part(name: str) -> str:
    """A name as one part of a path: of the characters that every file system has, and not too long."""
    part = re.sub(r"[^A-Za-z0-9._@-]", "-", name)
    if part.startswith(".") or len(part) > 150:
        part = f"{part[:140].lstrip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return part
