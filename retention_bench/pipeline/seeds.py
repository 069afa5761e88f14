"""Run one cell with several seeds, and count them together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from retention_bench.data import checked, read_jsonl
from retention_bench.display.progress import Progress, silent
from retention_bench.errors import UsageError
from retention_bench.pipeline.cell import Cell, plan
from retention_bench.pipeline.run import evaluate
from retention_bench.pipeline.stage import Announce, Bench
from retention_bench.results.samples import Sample
from retention_bench.results.seeds import SeedsResults, over_seeds
from retention_bench.store import Store
from retention_bench.store.output import check_output, exclusive

FILES = ("seeds.json",)
MOST = 1_000
"""Seeds at most."""

_PART = re.compile(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", re.ASCII)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0-4`, `0,2,5` or both together.

    Raises:
        UsageError: It is neither, a seed stands twice, or there are fewer than two or too many.
    """
    allowed = f"Give seeds as 0-4, or 0,2,5: from 2 to {MOST:,} of them, each from 0 to 4294967295."
    seeds: list[int] = []
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise UsageError(f"--seeds {text!r} is no list of seeds. {allowed}")
        first = int(found[1])
        last = first if found[2] is None else int(found[2])
        if last < first or last >= 2**32 or last - first >= MOST:
            raise UsageError(f"--seeds {text!r}: {part.strip()!r} is no range of seeds. {allowed}")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text!r} names a seed twice. Give each once.")
    if not 2 <= len(seeds) <= MOST:
        raise UsageError(f"--seeds {text!r} has {len(seeds):,} seeds. {allowed}")
    return tuple(seeds)


def announced(cell: Cell, seeds: Sequence[int], store: Store) -> int:
    """How many titles `evaluate_seeds` will announce at most; seeds may share stages."""
    return sum(Bench(store).ahead(plan(dataclasses.replace(cell, seed=seed))) for seed in seeds)


def evaluate_seeds(
    cell: Cell,
    seeds: Sequence[int],
    *,
    store: Store,
    out: Path,
    progress: Progress = silent,
    announce: Announce = lambda title, cached: None,
) -> SeedsResults:
    """Evaluate a cell with every seed and count the runs together; what the store holds is not computed again.

    Args:
        cell: The cell. Its `seed` is replaced; a part with a seed of its own keeps it.
        seeds: The seeds.
        store: As `evaluate`.
        out: Folder that gets `seeds.json`, and `seed-N` for every run.
        progress: As `evaluate`.
        announce: As `evaluate`; titles have the seed.

    Returns:
        The results, as written to `seeds.json`.

    Raises:
        UsageError: As `evaluate`.
        RetentionBenchError: As `evaluate`; the runs before are kept.
    """
    check_output(out, "evaluate", FILES)
    plans = {seed: plan(dataclasses.replace(cell, seed=seed)) for seed in seeds}
    with exclusive(out, "evaluate", FILES) as output:
        runs = []
        for seed, last in plans.items():
            folder = out / f"seed-{seed}"
            results = evaluate(
                last,
                store=store,
                out=folder,
                progress=progress,
                announce=lambda title, cached, seed=seed: announce(f"seed {seed}: {title}", cached),  # type: ignore[misc]
            )
            rows = read_jsonl(folder / "samples.jsonl")
            matched = folder / "step_matched.jsonl"
            followed = [row for _, row in read_jsonl(matched)] if matched.is_file() else []
            runs.append((results, [checked(Sample, row, f"line {number}") for number, row in rows], followed))
        found = over_seeds(runs, min_efficacy=cell.min_efficacy)
        partial = out / ".retention-bench.seeds"
        found.save(partial)
        output.put({"seeds.json": partial})
        partial.unlink()
    return found
