"""The end of a cell: its models' samples brought together, and counted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

from retention_bench.analysis import survival
from retention_bench.data.durable import write_text
from retention_bench.facts import FactSet
from retention_bench.pipeline.stage import Bench, Stage
from retention_bench.pipeline.stages.edit import Edit
from retention_bench.pipeline.stages.facts import Group
from retention_bench.pipeline.stages.finetune import Finetune
from retention_bench.pipeline.stages.score import Score
from retention_bench.pipeline.stages.step_matched import step_matched
from retention_bench.results.aggregate import Run, aggregate, rates
from retention_bench.results.figure import draw
from retention_bench.results.samples import Sample
from retention_bench.results.schema import SCHEMA_VERSION, Results
from retention_bench.results.trajectory import summarise
from retention_bench.store import OUTSIDE
from retention_bench.store.store import Store, manifest, versions
from retention_bench.version import PACKAGE

_Rows = list[dict[str, Any]]

FIGURES = ("survival.svg", "survival.png")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One edited model: its score after the edit, and after the fine-tune."""

    after_edit: Score
    after_finetune: Score

    @property
    def group(self) -> Group:
        """The facts that it holds."""
        return self.after_edit.group

    @property
    def edit(self) -> Edit:
        """Its edit."""
        assert isinstance(self.after_edit.checkpoint, Edit)
        return self.after_edit.checkpoint

    @property
    def finetune(self) -> Finetune:
        """Its fine-tune."""
        assert isinstance(self.after_finetune.checkpoint, Finetune)
        return self.after_finetune.checkpoint


@dataclasses.dataclass(frozen=True)
class Gather(Stage):
    """A cell's results; with all that it needs, the whole plan of a cell.

    Attributes:
        suite: The suite's name.
        notice: What a reader must know about its figures.
        model: The model's name in the results.
        editor: The editor's name in the suite.
        finetune: The fine-tune's name in the results.
        base: The score of the base model.
        control: The score of the unedited control.
        experiments: The edited models.
        defaults: What the suite has no settings for, so that its own defaults were used.
        seed: The cell's seed.
        facts_seed: The seed of the split.
        edit_seed: The seed of the edits.
        finetune_seed: The seed of the fine-tunes.
        min_efficacy: The share of the edits that must have taken for the cell to be ranked.
        real: The suite to name as the real one to go on to, where this one is a stand-in.
    """

    name: ClassVar[str] = "results"
    version: ClassVar[int] = 11

    suite: str
    notice: str
    model: str
    editor: str
    finetune: str
    base: Score
    control: Score  # before the edits: a threshold that the base model is beyond is refused before any is made
    experiments: tuple[Experiment, ...]
    defaults: tuple[str, ...]
    seed: int
    facts_seed: int
    edit_seed: int
    finetune_seed: int
    min_efficacy: float
    real: str | None = dataclasses.field(metadata=OUTSIDE)

    def title(self) -> str:
        """What it does, for people."""
        return "gather the results"

    @property
    def tuned_control(self) -> Finetune:
        """The fine-tune of the unedited model."""
        assert isinstance(self.control.checkpoint, Finetune)
        return self.control.checkpoint

    @property
    def finetunes(self) -> list[Finetune]:
        """All fine-tunes, the control's last."""
        return [*(e.finetune for e in self.experiments), self.tuned_control]

    def run(self, folder: Path, bench: Bench) -> None:
        """Write facts, samples and results; where the fine-tunes were followed, their trajectory and its figure."""
        facts, asked = self.base.facts.read(bench), self.base.asked(bench)
        scored: list[tuple[int | None, str, Score]] = [(None, "base", self.base)]
        for index, e in enumerate(self.experiments):
            scored += [(index, "post_edit", e.after_edit), (index, "post_finetune", e.after_finetune)]
        scored.append((None, "control_finetune", self.control))
        samples = [s.at(stage, index) for index, stage, score in scored for s in score.read(bench)]
        steps = self._trajectory(bench)
        matched = step_matched(bench, self.tuned_control, [e.finetune for e in self.experiments])
        results = self._results(bench, facts, asked, samples, steps, matched)
        facts.write(folder / "facts.jsonl")
        _write_rows(folder / "samples.jsonl", [sample.to_json() for sample in samples])
        if steps:
            _write_rows(folder / "trajectory.jsonl", steps)
            _write_rows(folder / "step_matched.jsonl", matched)
        if results.survival is not None and results.survival.curves:
            for file in FIGURES:
                draw(
                    results.survival.model_dump(),
                    folder / file,
                    editor=self.editor,
                    finetune=self.finetune,
                    model=self.model,
                )
        results.save(folder / "results.json")

    def _results(
        self, bench: Bench, facts: FactSet, asked: FactSet, samples: list[Sample], steps: _Rows, matched: _Rows
    ) -> Results:
        logs = [finetune.log(bench) for finetune in self.finetunes]
        control, paraphrases = self.tuned_control, self.base.paraphrases
        counted = aggregate([Run(samples, logs, matched)], min_efficacy=self.min_efficacy)
        row = {
            "schema_version": SCHEMA_VERSION,
            "suite": self.suite,
            "notice": self.notice,
            "model": self.model,
            "editor": self.editor,
            "finetune": self.finetune,
            "freeze": control.options.freeze,
            "adapter": control.options.adapter,
            "learned": all(log["learned"] for log in logs),
            "not_learned": sorted({log["why_not"] for log in logs if log["why_not"]}),
            "paraphrases": paraphrases.count if paraphrases else 0,
            "paraphrase_source": paraphrases.shown if paraphrases else None,
            "paraphrase_mode": self.experiments[0].edit.paraphrase_mode,
            "paraphrase_counts": paraphrases.counts(bench) if paraphrases else {},
            "horizon": control.options.horizon,
            "paraphrase_questions": _paraphrase_questions(facts, asked),
            "defaults": list(self.defaults),
            "seed": self.seed,
            "seeds": {"facts": self.facts_seed, "edit": self.edit_seed, "finetune": self.finetune_seed},
            "key": self.key,
            "survival": survival(steps).to_json() if steps else None,
            **{field.name: getattr(counted, field.name) for field in dataclasses.fields(counted)},
            "experiments": [
                {
                    "index": index,
                    "edited": [f.id for f in facts.edited.facts[e.group.start : e.group.stop]],
                    "edit_norm": e.edit.norm(bench),
                    "edit_factor": e.edit.factor(bench),
                    "stages": rates([s for s in samples if s.experiment == index]),
                    "finetune_log": logs[index],
                }
                for index, e in enumerate(self.experiments)
            ],
            "control": {"finetune_log": logs[-1]},
            "trajectory": summarise(steps) if steps else None,
            "facts": self.base.facts.counts(bench),
            "provenance": self._provenance(facts),
            "timing": self._timing(bench.store),
        }
        return Results.model_validate(row)

    def _trajectory(self, bench: Bench) -> list[dict[str, Any]]:
        """The rows of all models' trajectories, the control's last and with `experiment` null."""
        rows: list[dict[str, Any]] = []
        for index, finetune in enumerate(self.finetunes):
            own = index if index < len(self.experiments) else None
            rows += [{"experiment": own, **row} for row in finetune.trajectory(bench)]
        return rows

    def _provenance(self, facts: FactSet) -> dict[str, Any]:
        control, edit, paraphrases = self.tuned_control, self.experiments[0].edit, self.base.paraphrases
        knowledge = self.base.facts.knowledge
        return {
            "versions": versions(),
            "model": dict(knowledge.model.fingerprint),
            "facts": dict(knowledge.pool.fingerprint),
            "facts_sha256": facts.sha256,
            "finetune_data": dict(control.data.fingerprint),
            "paraphrase_writer": dict(paraphrases.writer.fingerprint) if paraphrases and paraphrases.writer else None,
            "editor": edit.editor,
            "editor_settings": dict(edit.settings),
            "finetune_settings": dict(control.settings),
            "seed": self.seed,
            "dtype": knowledge.model.dtype,
            "backend": "hf",
            "device": knowledge.model.device,
            "git": _git(),
        }

    def _timing(self, store: Store) -> dict[str, Any]:
        """Seconds that each stage took when it was computed, and the highest peak memory among them."""
        seconds: dict[str, float] = defaultdict(float)
        peak = 0
        for stage in self.plan()[:-1]:
            folder = store.find(stage)
            if folder is not None:
                entry = manifest(folder)
                seconds[stage.name] += entry["seconds"]
                peak = max(peak, entry["peak_memory_mib"])
        return {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "peak_memory_mib": peak}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _paraphrase_questions(facts: FactSet, asked: FactSet) -> dict[str, int]:
    """How many of the edited facts' paraphrases were asked, and how many not, since the edits were made with them."""
    had, left = (sum(len(fact.paraphrases) for fact in some.edited) for some in (facts, asked))
    return {"asked": left, "used_by_edits": had - left}


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from; None for an installed wheel."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
