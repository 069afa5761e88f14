"""The known-fact filter and the split: the facts of a cell (protocol, "Facts")."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from retention_bench.data.durable import write_text
from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet, Pool, Split, disjoint_split, known_facts, load_pool
from retention_bench.pipeline.stage import Bench, Stage
from retention_bench.pipeline.stages.knowledge import Knowledge
from retention_bench.store import Input

if TYPE_CHECKING:
    from retention_bench.scoring import LeftOut

_log = logging.getLogger("retention_bench")


@dataclasses.dataclass(frozen=True)
class Facts(Stage):
    """The edited facts, in the order they were drawn, then the intrinsic and the matched ones.

    Attributes:
        knowledge: What the base model knows of the pool.
        margin: By how much the true target must lead.
        edited: How many facts are edited.
        intrinsic: How many are left alone.
        seed: Seed of the split.
        split: How edited facts and those left alone are divided, see `disjoint_split`.
        intrinsic_matched: How many more are left alone of the edited facts' relations, in the split by relations.
    """

    name: ClassVar[str] = "facts"
    version: ClassVar[int] = 5

    knowledge: Knowledge
    margin: float
    edited: int
    intrinsic: int
    seed: int
    split: Split = "relations"
    intrinsic_matched: int = 0

    def title(self) -> str:
        """What it does, for people."""
        return "known-fact filter and split"

    @property
    def reads(self) -> tuple[Input, ...]:
        """The pool, whose rows it counts, and the model, for its tokenizer."""
        return (self.knowledge.model, self.knowledge.pool)

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `facts.jsonl` and `known.json`, what the filter counted."""
        from retention_bench.scoring import describe_left_out

        pool, scorable, left_out = self.scorable(bench)
        unasked = describe_left_out(left_out) if left_out else ""
        if not len(scorable):
            raise RetentionBenchError(
                f"No fact of {self.knowledge.pool.path} can be scored: {unasked}. Give facts whose objects begin with "
                "content words, the old and the new one with different ones."
            )
        asked = {(k.fact.question, k.fact.target_true): k for k in self.knowledge.read(bench)}
        known = [dataclasses.replace(asked[f.question, f.target_true], fact=f) for f in scorable]
        kept, remaining = known_facts(known, self.margin, pool.rows, unasked)
        split = disjoint_split(
            kept,
            edited=self.edited,
            intrinsic=self.intrinsic,
            intrinsic_matched=self.intrinsic_matched,
            seed=self.seed,
            split=self.split,
            remaining=remaining,
        )
        split.write(folder / "facts.jsonl")
        probability = {k.fact.id: k for k in known}

        def mean(facts: FactSet) -> dict[str, float] | None:
            if not len(facts):
                return None
            chosen = [probability[f.id] for f in facts]
            return {
                "target": sum(k.target for k in chosen) / len(chosen),
                "second": sum(k.runner_up for k in chosen) / len(chosen),
            }

        sides = {"edited": split.edited, "intrinsic": split.intrinsic, "intrinsic_matched": split.intrinsic_matched}
        wanted = {"edited": self.edited, **self._left_alone}
        if (found := len(split.intrinsic_matched)) < wanted["intrinsic_matched"]:
            _log.warning(
                "facts.intrinsic_matched is %d, and the known facts of the edited relations leave %d without a name in "
                "common with an edited one. Give a larger pool, or edit fewer facts.",
                wanted["intrinsic_matched"],
                found,
            )
        counts = {
            "rows": pool.rows.to_json(),
            "pool": len(pool.facts),
            "left_out": {why: {"facts": len(ids), "first": list(ids[:10])} for why, ids in left_out.items()},
            "unknown": len(scorable) - len(kept),
            "known": len(kept),
            "split": self.split,
            "sides": {
                name: {"facts": len(side), "relations": len({f.relation for f in side}), "wanted": wanted[name]}
                for name, side in sides.items()
            },
            "probability": {name: mean(side) for name, side in sides.items()},
        }
        write_text(folder / "known.json", json.dumps(counts, indent=2))

    @property
    def _left_alone(self) -> dict[str, int]:
        """How many facts of each kind are to be left alone."""
        if self.split == "subjects":
            return {"intrinsic": 0, "intrinsic_matched": self.intrinsic}
        return {"intrinsic": self.intrinsic, "intrinsic_matched": self.intrinsic_matched}

    def read(self, bench: Bench) -> FactSet:
        """The facts."""
        return FactSet.read(bench.get(self) / "facts.jsonl")

    def counts(self, bench: Bench) -> dict[str, Any]:
        """What the filter counted, and the mean probabilities (the paper's Table 4)."""
        found: dict[str, Any] = json.loads((bench.get(self) / "known.json").read_text(encoding="utf-8"))
        return found

    def scorable(self, bench: Bench) -> tuple[Pool, FactSet, LeftOut]:
        """The pool, its facts whose answers the metric can tell, and by reason the ids of those that it cannot."""
        return bench.once(("scorable", self.knowledge.key), self._scorable)

    def _scorable(self) -> tuple[Pool, FactSet, LeftOut]:
        from retention_bench.models import load_config, load_tokenizer
        from retention_bench.scoring import scorable

        model, pool = self.knowledge.model, self.knowledge.pool
        found = load_pool(pool.path, pool.revision, pool.config, need_relation=True)
        config = load_config(model.path, model.revision).get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        facts, left_out = scorable(found.facts, load_tokenizer(model.path, revision=model.revision), context=context)
        return found, facts, left_out


@dataclasses.dataclass(frozen=True)
class Group:
    """The facts that one model is asked: those of the cell's edited ones that it holds, and all that are not edited.

    Attributes:
        start: The first of its edited facts.
        stop: One behind the last.
    """

    start: int
    stop: int

    def of(self, facts: FactSet) -> FactSet:
        """Its facts among a cell's."""
        edited = facts.edited.facts[self.start : self.stop]
        return FactSet.of([*edited, *facts.intrinsic, *facts.intrinsic_matched])
