"""A fine-tune: an edited model, or the unedited control, trained downstream until its stop rule holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from retention_bench.data.durable import write_text
from retention_bench.finetune import Finetune as Task
from retention_bench.finetune import FinetuneOptions, Terms
from retention_bench.pipeline.distributed.launching import Launcher, launch
from retention_bench.pipeline.loading import load, save
from retention_bench.pipeline.stage import Bench, Model, Rows, Stage
from retention_bench.pipeline.stages.edit import Edit
from retention_bench.pipeline.stages.facts import Facts, Group
from retention_bench.pipeline.stages.knowledge import Knowledge
from retention_bench.pipeline.stages.unknown import Unknown
from retention_bench.registry import FINETUNES
from retention_bench.store import OUTSIDE, Input
from retention_bench.store.store import read_jsonl

if TYPE_CHECKING:
    from retention_bench.finetune import Dose, Track


@dataclasses.dataclass(frozen=True)
class Tracked:
    """What is asked again and again while a model is trained.

    Attributes:
        group: Which of the edited facts are asked, in the words of their edits; all others are too.
        knowledge: Has the objects of their relations.
    """

    group: Group
    knowledge: Knowledge


@dataclasses.dataclass(frozen=True)
class Finetune(Stage):
    """A fine-tuned model.

    Attributes:
        model: The base model.
        facts: The cell's facts, which no training row may mention.
        keywords: Keywords of their relations, which none may mention either.
        edit: The edit that is trained on; None for the unedited control.
        frozen_by: The edits whose layers `freeze` goes by, where that is not `edit` alone.
        task: The fine-tune's registered name.
        settings: Its settings.
        data: Its data.
        unknown: The facts that it teaches, if it teaches what the base model does not know.
        options: How it is run.
        tracked: What is asked while it is trained, where `options` has a trajectory.
        launcher: What starts it in processes of their own, if there shall be several.
        seed: Its seed.
        called: Its name in the results, and which model it trains, for people.
    """

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 9

    model: Model
    facts: Facts
    keywords: Mapping[str, tuple[str, ...]]
    edit: Edit | None
    frozen_by: tuple[Edit, ...]
    task: str
    settings: Mapping[str, Any]
    data: Rows
    unknown: Unknown | None
    options: FinetuneOptions
    tracked: Tracked | None
    launcher: Launcher | None
    seed: int
    called: tuple[str, str] = dataclasses.field(metadata=OUTSIDE)

    def title(self) -> str:
        """What it does, for people."""
        return f"{self.called[0]} fine-tune, {self.called[1]}"

    def made(self) -> Task:
        """The task, with its settings and data."""
        made: Task = FINETUNES.make(
            self.task, {**self.settings, "source": self.data.path, "revision": self.data.revision}
        )
        return made

    @property
    def reads(self) -> tuple[Input, ...]:
        """The model and the data, and the launcher's file where there is one."""
        return (self.model, self.data, *([self.launcher.file] if self.launcher else []))

    def run(self, folder: Path, bench: Bench) -> None:
        """Write the model to `model/`, `log.json`, and `trajectory.jsonl` where it is tracked."""
        work = bench.store.scratch(self)
        bench.release()
        if self.launcher is None:
            self.train(folder, work, bench)
        else:
            launch(self, self.launcher, self.settings, folder, work, bench.store, bench.progress)

    def log(self, bench: Bench) -> dict[str, Any]:
        """How it went, see `FinetuneLog`."""
        found: dict[str, Any] = json.loads((bench.get(self) / "log.json").read_text(encoding="utf-8"))
        return found

    def trajectory(self, bench: Bench) -> list[dict[str, Any]]:
        """What was seen of the facts while the model was trained, a row for each fact and look; none if untracked.

        Each row has the dose up to there (`step`, `tokens`, `epoch`), the fact's `relation`, and what a `Point` has.
        """
        return read_jsonl(bench.get(self) / "trajectory.jsonl") if self.tracked is not None else []

    def train(self, folder: Path, work: Path, bench: Bench, micro_batch_size: int | None = None) -> None:
        """Edit a model, train it and write it.

        Processes of a process group may call this together, see `finetune.train`; the first of them writes.

        Args:
            folder: Where the result goes.
            work: A folder that outlives a kill; a run that finds another's there goes on from it.
            bench: Told every step; holds the stages that this one needs.
            micro_batch_size: Rows in a forward pass, in place of the setting.

        Raises:
            UsageError: As `finetune.train`.
            RetentionBenchError: As `finetune.train`.
            torch.OutOfMemoryError: As `finetune.train`.
        """
        import torch

        from retention_bench.finetune import processes, train
        from retention_bench.finetune.stopping import TRAJECTORY
        from retention_bench.models import WeightDelta

        torch.manual_seed(self.seed)
        model, tokenizer = load(self.model.path, self.model.revision, dtype=self.model.dtype, device=self.model.device)
        edits = [edit.file(bench) for edit in ([self.edit] if self.edit else self.frozen_by)]
        layers = {layer for edit in edits for layer in WeightDelta.load(edit).layers(model)}
        if self.edit is not None:
            WeightDelta.load(edits[0]).apply_(model)
        task = self.made()
        if micro_batch_size is not None:
            settings = dataclasses.replace(task.settings, micro_batch_size=micro_batch_size)
            task = dataclasses.replace(task, settings=settings)  # type: ignore[type-var]
        log = train(
            model,
            tokenizer,
            task,
            terms=Terms.from_facts(self.facts.read(bench), keywords=self.keywords),
            seed=self.seed,
            output_dir=work,
            device=self.model.device,
            unknown=self.unknown.read(bench).facts if self.unknown else (),
            options=self.options,
            edited=layers,
            track=self._track(work, model, tokenizer, bench),
            progress=bench.progress,
        )
        if processes.index():
            return
        save(model, tokenizer, folder / "model")
        write_text(folder / "log.json", json.dumps(log.to_json(), indent=2, allow_nan=False))
        if self.tracked is not None:
            # A run that was cut off may have come further than the one that ended. All names are of one length.
            last = f"trajectory-{log.steps:09}.jsonl"
            points = sorted(path for path in work.glob(TRAJECTORY) if path.name <= last)
            write_text(folder / "trajectory.jsonl", "".join(point.read_text(encoding="utf-8") for point in points))

    def _track(self, work: Path, model: Any, tokenizer: Any, bench: Bench) -> Track | None:
        """What asks the facts while the model is trained; each point has a file, which outlives a kill."""
        from retention_bench.finetune import processes
        from retention_bench.scoring import Follower

        if self.tracked is None:
            return None
        facts = self.tracked.group.of(self.facts.read(bench))
        follower = Follower(model, tokenizer, facts, self.tracked.knowledge.objects(bench))
        relations = {fact.id: fact.relation for fact in facts}

        def track(dose: Dose) -> None:
            points = follower.look()
            if processes.index() == 0:
                seen = ({**dose._asdict(), "relation": relations[p.fact_id], **p.to_json()} for p in points)
                rows = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in seen)
                write_text(work / f"trajectory-{dose.step:09}.jsonl", "".join(rows))

        return track
