"""Run a cell: compute the stages that the store does not hold, in order, and hand out the results."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention_bench.data.durable import DamagedError, check, remove, seal, write_text
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import (
    MODEL,
    FactSet,
    Pool,
    augment,
    disjoint_split,
    knowledge,
    known_facts,
    load_pool,
    read_pool,
    unseen,
)
from retention_bench.pipeline.cell import Cell, Experiment, Plan, Stage
from retention_bench.pipeline.data_check import check_data
from retention_bench.pipeline.inputs import unchanged
from retention_bench.pipeline.loading import load, save
from retention_bench.pipeline.planning import plan
from retention_bench.pipeline.results import gather
from retention_bench.pipeline.statistics import measure
from retention_bench.pipeline.store import MARK, Store, check_output, exclusive
from retention_bench.progress import Progress, silent

if TYPE_CHECKING:
    from retention_bench.editors import KeyStatistics
    from retention_bench.models import WeightDelta
    from retention_bench.scoring import LeftOut

FILES = ("samples.jsonl", "facts.jsonl", "trajectory.jsonl", "results.json")
"""What a run writes into its output folder."""


def evaluate(
    cell: Cell,
    *,
    store: Store,
    out: Path,
    progress: Progress = silent,
    announce: Callable[[str, bool], None] = lambda title, cached: None,
    save_checkpoints: bool = False,
) -> dict[str, Any]:
    """Edit, fine-tune and score one cell; what the store holds already is not computed again.

    Args:
        cell: The cell.
        store: Where stage results are kept.
        out: Folder that gets `results.json`, `samples.jsonl` and `facts.jsonl`, and `trajectory.jsonl` where the
            fine-tunes are followed.
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
    planned = plan(cell, store)
    check_data(planned, store)
    with exclusive(out, "evaluate", FILES) as output:
        if save_checkpoints:
            _check_checkpoints(out / "checkpoints", planned)
        bench = _Bench(planned, store, progress, announce)
        folder = bench.results()
        # What is not there this time may be another run's, into the same folder.
        output.put({name: folder / name if (folder / name).is_file() else None for name in FILES})
        if save_checkpoints:
            bench.save_checkpoints(out / "checkpoints")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _check_checkpoints(folder: Path, planned: Plan) -> None:
    """Refuse to write checkpoints where that cannot be, or where something lies that we did not write.

    Raises:
        UsageError: One of them would replace something else, or the folder cannot be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is no folder, and checkpoints are to be written there. Move it away.")
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} may not be written, and checkpoints are to be. Change its permissions.")
    indices = [e.index for e in planned.experiments]
    edited = [f"{stage}-{index}" for index in indices for stage in ("post_edit", "post_finetune")]
    for name in ("base", *edited, "control_finetune"):
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


class _Bench:
    """The stages of one plan; keeps the base model loaded between stages that leave it as it is."""

    def __init__(self, planned: Plan, store: Store, progress: Progress, announce: Callable[[str, bool], None]) -> None:
        self.plan = planned
        self.store = store
        self.progress = progress
        self.announce = announce
        self._base: tuple[Any, Any] | None = None

    def _get(self, stage: Stage, compute: Callable[[Path], None]) -> Path:
        found = self.store.find(stage.name, stage.inputs)
        self.announce(stage.title, found is not None)
        return found or self.store.get(stage.name, stage.inputs, compute, stage.reads)

    def _load(self, path: str, revision: str | None, *, finite: bool = True) -> tuple[Any, Any]:
        # Training keeps the dtype; the recipes' mixed precision is the fine-tune's own affair.
        return load(path, revision, dtype=self.plan.model.dtype, device=self.plan.cell.device, finite=finite)

    def base(self) -> tuple[Any, Any]:
        """The base model and its tokenizer, loaded once."""
        if self._base is None:
            self._base = self._load(self.plan.model.path, self.plan.model.revision)
        return self._base

    def release(self) -> None:
        """Drop the base model, so that its memory is free for training."""
        self._base = None
        gc.collect()
        if self.plan.cell.device != "cpu":
            import torch

            torch.cuda.empty_cache()  # other processes cannot use what torch keeps for later

    @contextlib.contextmanager
    def edited(self, experiment: Experiment) -> Iterator[tuple[Any, Any]]:
        """The base model with an experiment's delta applied; afterwards it has its own bits back."""
        model, tokenizer = self.base()
        with self.delta(experiment).applied(model):
            yield model, tokenizer

    # The stages, in the order of the plan

    @functools.cached_property
    def facts(self) -> FactSet:
        """The cell's facts: the edited ones first, then the intrinsic ones."""
        return FactSet.read(self._facts / "facts.jsonl")

    @functools.cached_property
    def _facts(self) -> Path:
        """The folder of the facts and of what the filter counted."""

        def compute(folder: Path) -> None:
            suite = self.plan.cell.suite
            from retention_bench.scoring import describe_left_out

            pool, (scorable, left_out) = self._pool, self._scorable
            model, tokenizer = self.base()
            if not len(scorable):
                raise RetentionBenchError(
                    f"No fact of {suite.facts.source} can be scored: {describe_left_out(left_out)}. Give facts whose "
                    "objects begin with content words, the old and the new one with different ones."
                )
            known = knowledge(model, tokenizer, scorable, progress=self.progress)
            unasked = describe_left_out(left_out) if left_out else ""
            kept, remaining = known_facts(known, suite.facts.margin, pool.rows, unasked)
            split = disjoint_split(
                kept,
                edited=suite.facts.edited,
                intrinsic=suite.facts.intrinsic,
                seed=self.plan.cell.seed,
                remaining=remaining,
            )
            split.write(folder / "facts.jsonl")
            probability = {k.fact.id: k for k in known}

            def mean(facts: FactSet) -> dict[str, float]:
                chosen = [probability[f.id] for f in facts]
                return {
                    "target": sum(k.target for k in chosen) / len(chosen),
                    "second": sum(k.runner_up for k in chosen) / len(chosen),
                }

            counts = {
                "rows": pool.rows.to_json(),
                "pool": len(pool.facts),
                "left_out": {why: {"facts": len(ids), "first": list(ids[:10])} for why, ids in left_out.items()},
                "unknown": len(scorable) - len(kept),
                "known": len(kept),
                "probability": {"edited": mean(split.edited), "intrinsic": mean(split.intrinsic)},
            }
            write_text(folder / "known.json", json.dumps(counts, indent=2))

        return self._get(self.plan.facts, compute)

    @functools.cached_property
    def _pool(self) -> Pool:
        """The suite's pool."""
        suite = self.plan.cell.suite
        facts = suite.facts
        return load_pool(suite.locate(facts.source), facts.revision, facts.config, need_relation=True)

    @functools.cached_property
    def _scorable(self) -> tuple[FactSet, LeftOut]:
        """The pool's facts whose answers the metric can tell, and those that it cannot, by reason."""
        from retention_bench.scoring import scorable

        model, tokenizer = self.base()
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return scorable(self._pool.facts, tokenizer, context=context)

    def known(self) -> dict[str, Any]:
        """Counts of the known-fact filter and mean probabilities (the paper's Table 4)."""
        return json.loads((self._facts / "known.json").read_text(encoding="utf-8"))

    @functools.cached_property
    def prompts(self) -> dict[str, list[str]]:
        """The prompts that each edited fact gets besides its own, by its id; none where the cell wants none."""
        stage, cell, writer = self.plan.paraphrases, self.plan.cell, self.plan.writer
        if stage is None:
            return {}

        def compute(folder: Path) -> None:
            if writer is not None:
                self.release()
            found = augment(
                self.facts.edited,
                cell.paraphrases,
                f"{MODEL}{writer.path}" if writer else cell.paraphrase_source,
                seed=cell.seed,
                device=cell.device,
                dtype=self.plan.model.dtype,
                revision=writer.revision if writer else None,
                progress=self.progress,
            )
            write_text(folder / "prompts.json", json.dumps(found, indent=2, ensure_ascii=False))

        return json.loads((self._get(stage, compute) / "prompts.json").read_text(encoding="utf-8"))

    def group(self, experiment: Experiment | None) -> FactSet:
        """The facts one model is asked: its edited ones and all intrinsic ones, in words that no edit was made with."""
        facts = unseen(self.facts, self.prompts)
        if experiment is None:
            return facts
        return FactSet.of([*facts.edited.facts[experiment.facts], *facts.intrinsic])

    @functools.cached_property
    def statistics(self) -> Path | None:
        """The file of the key statistics, or None where the editor needs none."""
        stage = self.plan.statistics
        if stage is None:
            return None
        suite = self.plan.cell.suite
        corpus = suite.statistics.model_copy(update={"source": suite.locate(suite.statistics.source)})
        self.announce(stage.title, self.store.find(stage.name, stage.inputs) is not None)
        return measure(self.store, stage, self.base, corpus, progress=self.progress)

    @functools.cached_property
    def unknown(self) -> Path | None:
        """The file of the facts that the fine-tune teaches, those in its source that the base model answers wrongly.

        None where it teaches something else.
        """
        stage, task = self.plan.unknown, self.plan.finetune.settings
        if stage is None:
            return None

        def compute(folder: Path) -> None:
            pool = read_pool(task.source, task.revision, task.config)
            asked = knowledge(*self.base(), pool, progress=self.progress)
            wrong = FactSet.of(k.fact for k in asked if k.margin < 0)
            if not len(wrong):
                raise RetentionBenchError(
                    f"The base model answers all {len(pool)} facts of {task.source}, so there is none to teach it. "
                    "Give facts that it does not know."
                )
            wrong.write(folder / "facts.jsonl")

        return self._get(stage, compute) / "facts.jsonl"

    @functools.cached_property
    def fitted(self) -> Path | None:
        """The folder that the editor's `fit` wrote, or None where it does not train."""
        stage = self.plan.fit
        if stage is None:
            return None

        def compute(folder: Path) -> None:
            import torch

            from retention_bench.editors import EditContext, FittedEditor

            editor = self.plan.editor
            assert isinstance(editor, FittedEditor)  # or there would be no such stage
            scorable, _ = self._scorable
            # Facts about a subject that is edited or asked would give something of it away.
            drawn = {fact.subject.casefold() for fact in self.facts}
            facts = FactSet.of(f for f in scorable.edited if f.subject.casefold() not in drawn)
            if not len(facts):
                raise RetentionBenchError(
                    f"{self.plan.cell.editor} trains before it edits, and of the {len(scorable)} facts in "
                    f"{self.plan.cell.suite.facts.source} that can be scored none is left to train on: each has the "
                    "subject of one that is edited or asked, or no target_new. Give more facts, or let fewer be edited."
                )
            work = self.store.scratch(stage.name, stage.inputs)
            generator = torch.Generator().manual_seed(self.plan.cell.seed)
            model, tokenizer = self.base()
            editor.fit(model, tokenizer, facts, work, EditContext(generator=generator, progress=self.progress))
            shutil.copytree(work, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.damaged-*"))

        return self._get(stage, compute)

    # Read and sampled once, not for every edited copy of the model.

    @functools.cached_property
    def key_statistics(self) -> KeyStatistics | None:
        """What the file of the key statistics holds."""
        from retention_bench.editors import KeyStatistics

        return KeyStatistics.load(self.statistics) if self.statistics else None

    @functools.cached_property
    def templates(self) -> tuple[str, ...]:
        """The context templates that the model samples for the editor."""
        import torch

        from retention_bench.editors import sample_context_templates

        generator = torch.Generator().manual_seed(self.plan.cell.seed)
        return sample_context_templates(*self.base(), generator, lengths=self.plan.editor.template_lengths)

    def delta(self, experiment: Experiment) -> WeightDelta:
        """An experiment's edit."""
        from retention_bench.models import WeightDelta

        return WeightDelta.load(self._delta(experiment))

    def _delta(self, experiment: Experiment) -> Path:
        """The file of an experiment's edit."""

        def compute(folder: Path) -> None:
            import torch

            from retention_bench.editors import EditContext, EditRequest

            statistics, templates, fitted = self.key_statistics, self.templates, self.fitted
            model, tokenizer = self.base()
            context = EditContext(
                statistics=statistics,
                templates=templates,
                generator=torch.Generator().manual_seed(self.plan.cell.seed),
                progress=self.progress,
                fitted=fitted,
            )
            requests = [EditRequest.from_fact(f, self.prompts.get(f.id, ())) for f in self.group(experiment).edited]
            self.plan.editor.edit(model, tokenizer, requests, context).save(folder / "delta.safetensors")

        stage = experiment.edit
        return self.store.get(stage.name, stage.inputs, compute, stage.reads) / "delta.safetensors"

    def tuned(self, stage: Stage, experiment: Experiment | None) -> Path:
        """The folder of a fine-tuned model: a full checkpoint in `model/` and the log."""

        def compute(folder: Path) -> None:
            from retention_bench.finetune import parse_finetune, parse_freeze
            from retention_bench.pipeline.launching import launch
            from retention_bench.pipeline.tuning import Job, tune

            p, cell = self.plan, self.plan.cell
            delta = self._delta(experiment) if experiment else None
            edits = [delta] if delta else []
            if not edits and parse_freeze(cell.freeze).needs_edit:
                edits = [self._delta(e) for e in p.experiments]
            unknown = self.unknown
            work = self.store.scratch(stage.name, stage.inputs)
            asked, objects = None, {}
            if cell.track_every:
                asked, objects = str(work / "asked.jsonl"), self._objects()
                self.group(experiment).write(Path(asked))
            self.release()
            job = Job(
                model=p.model.path,
                revision=p.model.revision,
                dtype=p.model.dtype,
                device=cell.device,
                delta=str(delta) if delta else None,
                edits=tuple(map(str, edits)),
                facts=str(self._facts / "facts.jsonl"),
                keywords=cell.suite.facts.keywords,
                unknown=str(unknown) if unknown else None,
                finetune=parse_finetune(cell.finetune)[0],
                settings=dataclasses.asdict(p.finetune.settings),
                freeze=cell.freeze,
                adapter=cell.adapter,
                seed=cell.seed,
                track_every=cell.track_every,
                asked=asked,
                objects=objects,
                work=str(work),
            )
            if p.launcher is None:
                tune(job, folder, self.progress)
            else:
                launch(job, folder, p.launcher, self.progress)

        return self._get(stage, compute)

    def _objects(self) -> dict[str, list[str]]:
        """The names of all objects in the pool, by relation."""
        names: dict[str, set[str]] = {}
        for fact in self._pool.facts:
            named = {name for name in (fact.target_true, fact.target_new) if name is not None}
            names.setdefault(fact.relation, set()).update(named)
        return {relation: sorted(some) for relation, some in names.items()}

    def score(self, stage: Stage, experiment: Experiment | None, tuned: Path | None) -> Path:
        """The folder of a model's samples."""

        def compute(folder: Path) -> None:
            from retention_bench.scoring import score

            with contextlib.ExitStack() as stack:
                if tuned is not None:
                    model, tokenizer = self._load(str(tuned / "model"), None, finite=False)
                elif experiment is not None:
                    model, tokenizer = stack.enter_context(self.edited(experiment))
                else:
                    model, tokenizer = self.base()
                samples = score(model, tokenizer, self.group(experiment), progress=self.progress)
            write_text(
                folder / "samples.jsonl", "".join(json.dumps(s.to_json(), ensure_ascii=False) + "\n" for s in samples)
            )

        return self._get(stage, compute)

    def results(self) -> Path:
        """Run every stage that is missing and gather the results."""
        found = self.store.find(self.plan.results.name, self.plan.results.inputs)
        if found is not None:
            self.announce("all stages", True)
            for stage in self.plan.stages():
                self.store.inspect(stage.name, stage.inputs)
            return found
        p, facts = self.plan, self.facts
        _ = self.prompts  # announced before the scores that leave their words out
        scored: list[tuple[int | None, str, Path]] = [(None, "base", self.score(p.base_score, None, None))]
        logs: list[Path] = []
        for e in p.experiments:
            edited = self.store.find(e.edit.name, e.edit.inputs) is not None
            if not edited:
                _ = self.statistics, self.fitted  # announced before the edit that needs them
            _ = self.unknown
            self.announce(e.edit.title, edited)
            self._delta(e)
            scored.append((e.index, "post_edit", self.score(e.edit_score, e, None)))
            tuned = self.tuned(e.finetune, e)
            logs.append(tuned)
            scored.append((e.index, "post_finetune", self.score(e.finetune_score, e, tuned)))
        control = self.tuned(p.control, None)
        scored.append((None, "control_finetune", self.score(p.control_score, None, control)))

        def compute(folder: Path) -> None:
            facts.write(folder / "facts.jsonl")
            gather(p, self.store, facts, self.group(None), self.known(), scored, logs, control, folder)

        return self._get(p.results, compute)

    def save_checkpoints(self, folder: Path) -> None:
        """Write every scored model as a full checkpoint, each with the facts it is asked."""

        def put(name: str, facts: FactSet, model: Any, tokenizer: Any) -> None:
            self.announce(f"write checkpoint {name}", False)
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

        folder.mkdir(parents=True, exist_ok=True)
        with unchanged(self.plan.base_score.reads):  # no stage looks after the model here
            self.base()
        put("base", self.group(None), *self.base())
        for e in self.plan.experiments:
            with self.edited(e) as (model, tokenizer):
                put(f"post_edit-{e.index}", self.group(e), model, tokenizer)
            put(
                f"post_finetune-{e.index}",
                self.group(e),
                *self._load(str(self.tuned(e.finetune, e) / "model"), None, finite=False),
            )
        put(
            "control_finetune",
            self.group(None),
            *self._load(str(self.tuned(self.plan.control, None) / "model"), None, finite=False),
        )
