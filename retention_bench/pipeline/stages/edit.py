"""An edit: a group of facts written into a fresh copy of the base model, kept as the change of its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from retention_bench.editors import EditContext, Editor, EditRequest, sample_context_templates
from retention_bench.pipeline.stage import Bench, Model, Stage
from retention_bench.pipeline.stages.covariance import Covariance, CovarianceFile
from retention_bench.pipeline.stages.facts import Facts, Group
from retention_bench.pipeline.stages.fit import Fit
from retention_bench.pipeline.stages.paraphrases import Paraphrases
from retention_bench.registry import EDITORS
from retention_bench.store import OUTSIDE

PARAPHRASE_MODES = ("mean", "separate")
"""`mean`: a fact is one request, whose keys and losses are means over its prompts. `separate`: each of its prompts is a
request of its own ("training volume", paper section 5.1)."""


@dataclasses.dataclass(frozen=True)
class Edit(Stage):
    """The change of the base model's weights.

    Attributes:
        model: The base model.
        facts: The cell's facts.
        group: Which of them are edited.
        paraphrases: More prompts that the edit shall hold for, if there are any.
        paraphrase_mode: How the edit takes them, one of `PARAPHRASE_MODES`; None without.
        covariance: The covariance of the keys, if the editor needs it.
        fit: The trained editor, if it is one that trains.
        of: The edit of the same facts that this one is made of, for a `DerivedEditor`.
        editor: The editor's registered name.
        settings: Its settings.
        seed: Seed of what the editor draws.
        called: The editor's name in the suite, and which model it edits, for people.
    """

    name: ClassVar[str] = "edit"
    version: ClassVar[int] = 4

    model: Model
    facts: Facts
    group: Group
    paraphrases: Paraphrases | None
    paraphrase_mode: str | None
    covariance: Covariance | CovarianceFile | None
    fit: Fit | None
    of: Edit | None
    editor: str
    settings: Mapping[str, Any]
    seed: int
    called: tuple[str, str] = dataclasses.field(metadata=OUTSIDE)

    def title(self) -> str:
        """What it does, for people."""
        return f"{self.called[0]} edit, {self.called[1]}"

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `delta.safetensors`."""
        import torch

        from retention_bench.models import WeightDelta

        editor: Editor = EDITORS.make(self.editor, self.settings, entry=self.called[0])
        prompts = self.paraphrases.read(bench) if self.paraphrases else {}

        def templates() -> tuple[str, ...]:
            generator = torch.Generator().manual_seed(self.seed)
            return sample_context_templates(*bench.base(self.model), generator, lengths=editor.template_lengths)

        # Sampled once, not for every edited copy; the key of what the model knows tells models apart by their content.
        sampled = bench.once(("templates", self.facts.knowledge.key, self.seed, editor.template_lengths), templates)
        context = EditContext(
            covariance=self.covariance.read(bench) if self.covariance else None,
            templates=sampled,
            generator=torch.Generator().manual_seed(self.seed),
            progress=bench.progress,
            fitted=bench.get(self.fit) if self.fit else None,
            delta=WeightDelta.load(self.of.file(bench)) if self.of else None,
        )
        edited = self.group.of(self.facts.read(bench)).edited
        requests = [EditRequest.from_fact(fact, prompts.get(fact.id, ())) for fact in edited]
        if self.paraphrase_mode == "separate":
            requests = [separate for request in requests for separate in request.separate]
        editor.edit(*bench.base(self.model), requests, context).save(folder / "delta.safetensors")

    def file(self, bench: Bench) -> Path:
        """The file of the change."""
        return bench.get(self) / "delta.safetensors"

    def norm(self, bench: Bench) -> float:
        """The Frobenius norm of the change, over all weights."""
        from retention_bench.models import WeightDelta

        return bench.once(("norm", self.key), lambda: math.hypot(*WeightDelta.load(self.file(bench)).norms().values()))

    def factor(self, bench: Bench) -> float | None:
        """The change's norm as a multiple of the one that it is made of; None where there is none, or it is nothing."""
        whole = self.of.norm(bench) if self.of else 0.0
        return self.norm(bench) / whole if whole else None
