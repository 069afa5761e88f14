"""The answers of one model to the questions about its facts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import ClassVar

from retention_bench.data.durable import write_text
from retention_bench.facts import FactSet
from retention_bench.pipeline.loading import load
from retention_bench.pipeline.stage import Bench, Model, Stage
from retention_bench.pipeline.stages.edit import Edit
from retention_bench.pipeline.stages.facts import Facts, Group
from retention_bench.pipeline.stages.finetune import Finetune
from retention_bench.pipeline.stages.paraphrases import Paraphrases, asked
from retention_bench.results import Sample
from retention_bench.store import OUTSIDE, Input
from retention_bench.store.store import read_jsonl


@dataclasses.dataclass(frozen=True)
class Score(Stage):
    """The samples of one model.

    Attributes:
        model: The base model.
        facts: The cell's facts.
        group: Which of the edited ones are asked.
        paraphrases: The prompts that the edits were made with, which are not asked.
        checkpoint: What was done to the base model; None for the base model itself.
        kinds: The kinds of question.
        called: What is scored, for people.
    """

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 7

    model: Model
    facts: Facts
    group: Group
    paraphrases: Paraphrases | None
    checkpoint: Edit | Finetune | None
    kinds: tuple[str, ...]
    called: str = dataclasses.field(metadata=OUTSIDE)

    def title(self) -> str:
        """What it does, for people."""
        return f"score {self.called}"

    @property
    def reads(self) -> tuple[Input, ...]:
        """The base model, but where a fine-tune has written a whole one."""
        return () if isinstance(self.checkpoint, Finetune) else (self.model,)

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `samples.jsonl`."""
        from retention_bench.scoring import score

        with self.loaded(bench) as (model, tokenizer):
            samples = score(
                model,
                tokenizer,
                self.asked(bench),
                kinds=self.kinds,
                objects=self.facts.knowledge.objects(bench),
                progress=bench.progress,
            )
        lines = (json.dumps(sample.to_json(), ensure_ascii=False) + "\n" for sample in samples)
        write_text(folder / "samples.jsonl", "".join(lines))

    def read(self, bench: Bench) -> list[Sample]:
        """The samples."""
        return [Sample.model_validate(row) for row in read_jsonl(bench.get(self) / "samples.jsonl")]

    def asked(self, bench: Bench) -> FactSet:
        """The facts that the model is asked."""
        return self.group.of(asked(self.facts, self.paraphrases, bench))

    @contextlib.contextmanager
    def loaded(self, bench: Bench):  # type: ignore[no-untyped-def]
        """The model that is scored, and its tokenizer."""
        if isinstance(self.checkpoint, Finetune):
            folder = bench.get(self.checkpoint) / "model"
            yield load(str(folder), None, dtype=self.model.dtype, device=self.model.device, finite=False)
        elif self.checkpoint is not None:
            with bench.edited(self.model, self.checkpoint.file(bench)) as pair:
                yield pair
        else:
            yield bench.base(self.model)
