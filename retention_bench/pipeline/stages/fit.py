"""The training of an editor that trains before it edits, as MALMEN does."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from retention_bench.editors import EditContext, Editor, FittedEditor
from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet
from retention_bench.pipeline.stage import Bench, Stage
from retention_bench.pipeline.stages.facts import Facts
from retention_bench.registry import EDITORS
from retention_bench.store import OUTSIDE, Input


@dataclasses.dataclass(frozen=True)
class Fit(Stage):
    """A trained editor.

    Attributes:
        facts: The cell's facts; the rest of their pool is trained on.
        editor: The editor's registered name.
        settings: Its settings.
        seed: Seed of the training.
        called: The editor's name in the suite.
    """

    name: ClassVar[str] = "fit"
    version: ClassVar[int] = 3

    facts: Facts
    editor: str
    settings: Mapping[str, Any]
    seed: int
    called: str = dataclasses.field(metadata=OUTSIDE)

    def title(self) -> str:
        """What it does, for people."""
        return f"{self.called} training"

    @property
    def reads(self) -> tuple[Input, ...]:
        """The model and the pool."""
        return self.facts.reads

    def run(self, folder: Path, bench: Bench) -> None:
        """Write what the editor's `fit` writes."""
        import torch

        editor: Editor = EDITORS.make(self.editor, self.settings, entry=self.called)
        if not isinstance(editor, FittedEditor):
            raise TypeError(f"The editor {self.editor!r} does not train, so it has no such stage.")
        _, scorable, _ = self.facts.scorable(bench)
        # Facts about a subject that is edited or asked would give something of it away.
        drawn = {fact.subject.casefold() for fact in self.facts.read(bench)}
        facts = FactSet.of(f for f in scorable.edited if f.subject.casefold() not in drawn)
        if not len(facts):
            raise RetentionBenchError(
                f"{self.called} trains before it edits, and of the {len(scorable)} facts in "
                f"{self.facts.knowledge.pool.path} that can be scored none is left to train on: each has the subject "
                "of one that is edited or asked, or no target_new. Give more facts, or let fewer be edited."
            )
        work = bench.store.scratch(self)
        generator = torch.Generator().manual_seed(self.seed)
        model, tokenizer = bench.base(self.facts.knowledge.model)
        editor.fit(model, tokenizer, facts, work, EditContext(generator=generator, progress=bench.progress))
        shutil.copytree(work, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.damaged-*"))
