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
from retention_bench.analysis import Rate, clustered, detectable, detectable_paired, gap, rate, retention
from retention_bench.data.durable import write_text
from retention_bench.facts import FactSet
from retention_bench.pipeline.cell import Plan
from retention_bench.pipeline.store import Store, manifest, read_jsonl, versions

SCHEMA_VERSION = 1
STAGES = ("base", "post_edit", "post_finetune", "control_finetune")
KINDS = ("edited", "intrinsic", "paraphrase", "locality")
MODELS = 5
"""With fewer edited models, nothing can be said of how much they differ; rates then hold for these models."""

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
    """Everything in `results.json` that follows from the samples: `stages`, `retention`, `gap` and `detectable`.

    Retention is measured from after the edit to after the fine-tune, in the same model. Samples of several experiments
    are pooled. The intervals of rates take answers of one edited model as dependent where at least `MODELS` models
    hold several edits each, else answers of one fact, and the gap's bootstrap resamples what they do; intrinsic facts
    always by fact, with the outcomes in all experiments. `detectable` has the smallest differences that so many facts
    show in 8 of 10 repetitions at 5 %: in the gap (`gap`), and in edited facts against another run with the same facts
    (`paired`; and `paired_one_in_20` where one fact in 20 changes the other way).

    Args:
        rows: The samples, as in `samples.jsonl`.
        seed: Seed of the bootstrap.
    """

    def outcomes(stage: str, kind: str) -> dict[tuple[str, int], bool]:
        return {(r["fact_id"], r["experiment"]): r["hit"] for r in rows if r["stage"] == stage and r["kind"] == kind}

    def grouped(flat: Mapping[tuple[str, int], bool], by: str) -> dict[Any, list[bool]]:
        groups: dict[Any, list[bool]] = defaultdict(list)
        for (fact, experiment), hit in sorted(flat.items()):
            groups[experiment if by == "experiment" else fact].append(hit)
        return groups

    before = {kind: outcomes("post_edit", kind) for kind in ("edited", "intrinsic")}
    after = {kind: outcomes("post_finetune", kind) for kind in ("edited", "intrinsic")}
    control = {
        kind: {r["fact_id"]: r["hit"] for r in rows if r["stage"] == kind[0] and r["kind"] == kind[1]}
        for kind in (("base", "intrinsic"), ("control_finetune", "intrinsic"))
    }
    by = _clustering("edited", [r for r in rows if r["stage"] == "post_edit" and r["kind"] == "edited"])
    kept = {
        "edited": retention(
            before["edited"], after["edited"], cluster=lambda key: key[1 if by == "experiment" else 0], by=by
        ),
        "intrinsic": retention(before["intrinsic"], after["intrinsic"], cluster=lambda key: key[0]),
    }
    return {
        "stages": rates(rows),
        "retention": {kind: found.to_json() for kind, found in kept.items()}
        | {"control_intrinsic": retention(*control.values()).to_json()},
        "gap": gap(
            grouped(before["edited"], by),
            grouped(after["edited"], by),
            grouped(before["intrinsic"], "fact"),
            grouped(after["intrinsic"], "fact"),
            seed=seed,
        ).to_json(),
        "detectable": {
            "gap": _detectable_gap(kept["edited"], kept["intrinsic"]),
            "paired": detectable_paired(len(after["edited"])),
            "paired_one_in_20": detectable_paired(len(after["edited"]), 0.05),
        },
    }


def _detectable_gap(edited: Rate, intrinsic: Rate) -> float | None:
    if edited.rate is None or intrinsic.rate is None:
        return None
    return detectable(edited.rate, edited.effective or edited.total, intrinsic.effective or intrinsic.total)


def rates(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Hit rates by stage and kind, with intervals as `aggregate` explains them; only what the samples hold."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["stage"], row["kind"]].append(row)

    def found(kind: str, some: Sequence[Row]) -> dict[str, Any]:
        by = _clustering(kind, some)
        column = "experiment" if by == "experiment" else "fact_id"
        return clustered(((row[column], row["hit"]) for row in some), by).to_json()

    return {
        stage: {kind: found(kind, some) for kind in KINDS if (some := groups.get((stage, kind)))}
        for stage in STAGES
        if any((stage, kind) in groups for kind in KINDS)
    }


def _clustering(kind: str, rows: Sequence[Row]) -> str:
    """What the answers to one kind of question, after one stage, are clustered by: `"experiment"` or `"fact"`.

    Intrinsic facts are asked in every experiment, so they are not a part of one.
    """
    models = {row["experiment"] for row in rows}
    several = len({row["fact_id"] for row in rows}) > len(models)
    return "experiment" if kind != "intrinsic" and several and len(models) >= MODELS else "fact"


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
