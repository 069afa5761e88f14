"""`results.json` and `samples.jsonl` (schema version 1), gathered from the stages' folders.

Every aggregate is recomputed from the samples, never carried along beside them.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import retention_bench
from retention_bench.analysis import gap, rate, retention
from retention_bench.facts import FactSet
from retention_bench.pipeline.cell import Plan
from retention_bench.pipeline.store import Store, manifest, read_jsonl, versions, write_text

SCHEMA_VERSION = 1
STAGES = ("base", "post_edit", "post_finetune", "control_finetune")
KINDS = ("edited", "intrinsic", "paraphrase", "locality")

Row = Mapping[str, Any]


def gather(
    plan: Plan,
    store: Store,
    facts: FactSet,
    asked: FactSet,
    known: Mapping[str, Any],
    scored: Sequence[tuple[int | None, str, Path]],
    tuned: Sequence[Path],
    control: Path,
    folder: Path,
) -> None:
    """Write a cell's `results.json` and `samples.jsonl`.

    Args:
        plan: The cell's plan.
        store: The store that holds its stages.
        facts: The cell's facts.
        asked: The same without the paraphrases that the edits were made with.
        known: Counts of the known-fact filter.
        scored: (experiment or None, stage, folder of the samples) of every scored model.
        tuned: Folders of the fine-tuned models, by experiment.
        control: Folder of the fine-tuned control.
        folder: Where to write.
    """
    rows = [
        {"experiment": experiment, "stage": stage, **row}
        for experiment, stage, place in scored
        for row in read_jsonl(place / "samples.jsonl")
    ]
    cell, log = plan.cell, _read_log
    logs = [log(folder) for folder in (*tuned, control)]
    steps = _trajectory([*tuned, control])
    results = {
        "schema_version": SCHEMA_VERSION,
        "suite": cell.suite.name,
        "notice": " ".join(cell.suite.notice.split()),
        "model": plan.model_name,
        "editor": cell.editor,
        "finetune": plan.finetune_name,
        "freeze": cell.freeze,
        "adapter": cell.adapter,
        "learned": all(entry["learned"] for entry in logs),
        "not_learned": sorted({entry["why_not"] for entry in logs if entry["why_not"]}),
        "paraphrases": cell.paraphrases,
        "paraphrase_source": plan.paraphrase_source,
        "paraphrase_questions": _paraphrase_questions(facts, asked),
        "seed": cell.seed,
        "key": store.key(plan.results.name, plan.results.inputs),
        **aggregate(rows, seed=cell.seed),
        "experiments": [
            {
                "index": e.index,
                "edited": [f.id for f in facts.edited.facts[e.facts]],
                "stages": rates(r for r in rows if r["experiment"] == e.index),
                "finetune_log": log(tuned[e.index]),
            }
            for e in plan.experiments
        ],
        "control": {"finetune_log": log(control)},
        **({"trajectory": summarise(steps)} if steps else {}),
        "facts": known,
        "provenance": _provenance(plan, facts),
        "timing": _timing(plan, store),
    }
    write_text(folder / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if steps:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in steps)
        write_text(folder / "trajectory.jsonl", "".join(lines))
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def aggregate(rows: Sequence[Row], *, seed: int) -> dict[str, Any]:
    """Everything in `results.json` that follows from the samples: `stages`, `retention` and `gap`.

    Retention is measured from after the edit to after the fine-tune, in the same model. Samples of several experiments
    are pooled; the gap's bootstrap resamples an intrinsic fact with its outcomes in all of them.

    Args:
        rows: The samples, as in `samples.jsonl`.
        seed: Seed of the bootstrap.
    """

    def outcomes(stage: str, kind: str) -> dict[tuple[str, int], bool]:
        return {(r["fact_id"], r["experiment"]): r["hit"] for r in rows if r["stage"] == stage and r["kind"] == kind}

    def by_fact(flat: Mapping[tuple[str, int], bool]) -> dict[str, list[bool]]:
        grouped: dict[str, list[bool]] = defaultdict(list)
        for (fact, _), hit in sorted(flat.items()):
            grouped[fact].append(hit)
        return grouped

    before = {kind: outcomes("post_edit", kind) for kind in ("edited", "intrinsic")}
    after = {kind: outcomes("post_finetune", kind) for kind in ("edited", "intrinsic")}
    control = {
        kind: {r["fact_id"]: r["hit"] for r in rows if r["stage"] == kind[0] and r["kind"] == kind[1]}
        for kind in (("base", "intrinsic"), ("control_finetune", "intrinsic"))
    }
    return {
        "stages": rates(rows),
        "retention": {kind: retention(before[kind], after[kind]).to_json() for kind in ("edited", "intrinsic")}
        | {"control_intrinsic": retention(*control.values()).to_json()},
        "gap": gap(
            by_fact(before["edited"]),
            by_fact(after["edited"]),
            by_fact(before["intrinsic"]),
            by_fact(after["intrinsic"]),
            seed=seed,
        ).to_json(),
    }


def rates(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Hit rates by stage and kind, with Wilson intervals; only what the samples hold."""
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in rows:
        hits[row["stage"], row["kind"]].append(row["hit"])
    return {
        stage: {kind: rate(sum(h), len(h)).to_json() for kind in KINDS if (h := hits.get((stage, kind)))}
        for stage in STAGES
        if any((stage, kind) in hits for kind in KINDS)
    }


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The course of the fine-tunes of the edited models, step by step, for each kind of fact.

    Args:
        rows: As in `trajectory.jsonl`; those of the control are left out.

    Returns:
        By step: how many models were still trained, and for edited and intrinsic facts the hit rate and the mean
        probability of every class of tokens.
    """
    grouped: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["experiment"] is not None:
            grouped[row["step"]][row["kind"]].append(row)
    summary = []
    for step, kinds in sorted(grouped.items()):
        entry: dict[str, Any] = {"step": step, "models": len({r["experiment"] for k in kinds.values() for r in k})}
        for kind, some in kinds.items():
            entry[kind] = rate(sum(r["hit"] for r in some), len(some)).to_json()
            for name in ("true", "edited", "related", "other"):
                values = [r[name] for r in some if r[name] is not None]
                entry[kind][name] = sum(values) / len(values) if values else None
        summary.append(entry)
    return summary


def _trajectory(tuned: Sequence[Path]) -> list[Row]:
    """The looks at all models, the control's last and with `experiment` null."""
    rows: list[Row] = []
    for number, folder in enumerate(tuned):
        path = folder / "trajectory.jsonl"
        if path.is_file():
            own = number if number < len(tuned) - 1 else None
            rows += [{"experiment": own, **row} for row in read_jsonl(path)]
    return rows


def _paraphrase_questions(facts: FactSet, asked: FactSet) -> dict[str, int]:
    """How many of the edited facts' paraphrases were asked, and how many not, since the edits were made with them."""
    had, left = (sum(len(fact.paraphrases) for fact in some.edited) for some in (facts, asked))
    return {"asked": left, "used_by_edits": had - left}


def _read_log(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.json").read_text(encoding="utf-8"))


def _provenance(plan: Plan, facts: FactSet) -> dict[str, Any]:
    inputs = plan.facts.inputs
    return {
        "versions": versions(),
        "model": inputs["model"],
        "facts": inputs["pool"],
        "facts_sha256": facts.sha256,
        "finetune_data": plan.control.inputs["data"],
        "paraphrase_writer": plan.paraphrases.inputs.get("writer") if plan.paraphrases else None,
        "editor": plan.experiments[0].edit.inputs["editor"],
        "editor_settings": plan.experiments[0].edit.inputs["settings"],
        "finetune_settings": plan.control.inputs["settings"],
        "seed": plan.cell.seed,
        "dtype": inputs["dtype"],
        "backend": "hf",
        "device": inputs["device"],
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from; None for an installed wheel."""
    root = Path(retention_bench.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}


def _timing(plan: Plan, store: Store) -> dict[str, Any]:
    """Seconds that each stage took when it was computed, and the highest peak memory among them."""
    seconds: dict[str, float] = defaultdict(float)
    peak = 0
    for stage in plan.stages()[:-1]:
        folder = store.find(stage.name, stage.inputs)
        if folder is not None:
            entry = manifest(folder)
            seconds[stage.name] += entry["seconds"]
            peak = max(peak, entry["peak_memory_mib"])
    return {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "peak_memory_mib": peak}
