"""What the base model knows of a pool of facts: asked once for a model and a pool, whatever the seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

from retention_bench.data.durable import write_text
from retention_bench.facts import FactSet, knowledge, read_pool
from retention_bench.facts.known import Knowledge as Known
from retention_bench.pipeline.stage import Bench, Model, Rows, Stage
from retention_bench.store.store import read_jsonl


@dataclasses.dataclass(frozen=True)
class Knowledge(Stage):
    """The base model's probabilities of every fact's true target.

    Attributes:
        model: The base model.
        pool: The facts.
    """

    name: ClassVar[str] = "knowledge"
    version: ClassVar[int] = 1

    model: Model
    pool: Rows

    def title(self) -> str:
        """What it does, for people."""
        return "what the base model knows"

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `facts.jsonl`, the pool, and `knowledge.jsonl`, one row for each fact."""
        facts = read_pool(self.pool.path, self.pool.revision, self.pool.config)
        facts.write(folder / "facts.jsonl")
        known = knowledge(*bench.base(self.model), facts, progress=bench.progress)
        rows = ({"fact_id": k.fact.id, "target": k.target, "second": k.runner_up, "lead": k.lead} for k in known)
        write_text(folder / "knowledge.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def read(self, bench: Bench) -> list[Known]:
        """What it found, in the order of the pool."""

        def load() -> list[Known]:
            folder = bench.get(self)
            facts, rows = FactSet.read(folder / "facts.jsonl"), read_jsonl(folder / "knowledge.jsonl")
            return [
                Known(fact, row["target"], row["second"], row["lead"]) for fact, row in zip(facts, rows, strict=True)
            ]

        return bench.once(("knowledge", self.key), load)

    def objects(self, bench: Bench) -> dict[str, list[str]]:
        """The names of all objects in the pool, by relation."""
        names: dict[str, set[str]] = {}
        for known in self.read(bench):
            fact = known.fact
            named = {name for name in (fact.target_true, fact.target_new) if name is not None}
            names.setdefault(fact.relation, set()).update(named)
        return {relation: sorted(some) for relation, some in names.items()}
