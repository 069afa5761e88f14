"""More prompts for the edited facts, which the edits are made with too."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from retention_bench.data.durable import write_text
from retention_bench.facts import MODEL, FactSet, augment, unseen
from retention_bench.pipeline.stage import Bench, Model, Stage
from retention_bench.pipeline.stages.facts import Facts
from retention_bench.store import OUTSIDE


@dataclasses.dataclass(frozen=True)
class Paraphrases(Stage):
    """The prompts that each edited fact gets besides its own.

    Attributes:
        facts: The cell's facts.
        count: How many each fact gets.
        sources: Where they come from, in the order in which they fill a fact's; see `Sources.names`.
        writer: The model that writes them, if one does.
        seed: Seed of the choice.
        shown: The source as results name it: a model by its name.
    """

    name: ClassVar[str] = "paraphrases"
    version: ClassVar[int] = 4

    facts: Facts
    count: int
    sources: tuple[str, ...]
    writer: Model | None
    seed: int
    shown: str = dataclasses.field(metadata=OUTSIDE)

    def title(self) -> str:
        """What it does, for people."""
        return f"paraphrases for the edits, {self.count} a fact ({self.shown})"

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `prompts.json`, by the fact's id its prompts with `{}` for the subject, and `sources.json`."""
        writer = self.writer
        if writer is not None:
            bench.release()
        found = augment(
            self.facts.read(bench).edited,
            self.count,
            "+".join([*self.sources[:-1], f"{MODEL}{writer.path}"] if writer else self.sources),
            seed=self.seed,
            load=_loader(writer),
            progress=bench.progress,
        )
        write_text(folder / "prompts.json", json.dumps(dict(found.prompts), indent=2, ensure_ascii=False))
        write_text(folder / "sources.json", json.dumps(dict(found.counts)))

    def read(self, bench: Bench) -> Mapping[str, list[str]]:
        """The prompts by the fact's id."""
        found: Mapping[str, list[str]] = json.loads((bench.get(self) / "prompts.json").read_text(encoding="utf-8"))
        return found

    def counts(self, bench: Bench) -> dict[str, int]:
        """How many prompts came from each source."""
        found: dict[str, int] = json.loads((bench.get(self) / "sources.json").read_text(encoding="utf-8"))
        return found


def _loader(writer: Model | None) -> Callable[[str], tuple[Any, Any]]:
    """What loads the model that writes; no other source loads one."""
    import torch

    from retention_bench.models import load_model

    if writer is None:
        return load_model
    dtype = getattr(torch, writer.dtype)
    return functools.partial(load_model, device=writer.device, dtype=dtype, revision=writer.revision)


def asked(facts: Facts, paraphrases: Paraphrases | None, bench: Bench) -> FactSet:
    """A cell's facts without the paraphrases that their edits were made with: those are not asked."""
    found = facts.read(bench)
    return found if paraphrases is None else unseen(found, paraphrases.read(bench))
