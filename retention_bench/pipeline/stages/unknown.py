"""The facts that a fine-tune teaches: those of its data that the base model answers wrongly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet
from retention_bench.pipeline.stage import Bench, Stage
from retention_bench.pipeline.stages.knowledge import Knowledge


@dataclasses.dataclass(frozen=True)
class Unknown(Stage):
    """The facts that the base model does not know.

    Attributes:
        knowledge: What the base model knows of the fine-tune's data.
    """

    name: ClassVar[str] = "unknown"
    version: ClassVar[int] = 3

    knowledge: Knowledge

    def title(self) -> str:
        """What it does, for people."""
        return "what the base model does not know"

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `facts.jsonl`."""
        found = self.knowledge.read(bench)
        wrong = FactSet.of(k.fact for k in found if k.margin < 0)
        if not len(wrong):
            raise RetentionBenchError(
                f"The base model answers all {len(found)} facts of {self.knowledge.pool.path}, so there is none to "
                "teach it. Give facts that it does not know."
            )
        wrong.write(folder / "facts.jsonl")

    def read(self, bench: Bench) -> FactSet:
        """The facts."""
        return FactSet.read(bench.get(self) / "facts.jsonl")
