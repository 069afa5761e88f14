"""One cell of the leaderboard, and what it consists of once its settings are resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from retention_bench.editors import Editor
from retention_bench.finetune import Finetune
from retention_bench.pipeline.inputs import Input
from retention_bench.pipeline.launching import Launcher
from retention_bench.pipeline.suite import ModelConfig, Suite


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is run: one editor and one fine-tune on one model of a suite.

    Attributes:
        suite: The suite.
        model: A model of the suite, a folder or a Hub id; None for the suite's default.
        editor: The editor's name in the suite.
        finetune: The fine-tune's name, or `path:` and a data set, see `parse_finetune`.
        seed: Seed of the split, the edits and the fine-tunes.
        device: `"cpu"` or `"cuda"`.
        paraphrases: How many more prompts each fact is edited with.
        paraphrase_source: Where they come from, see `augment`; a model can be one of the suite's.
        freeze: What the fine-tunes must not change, see `parse_freeze`.
        adapter: What they train in the weights' place: `none`, `lora` or `dora`.
        track_every: Optimiser steps between two points of the trajectory of all facts; 0 for no trajectory.
        accelerate_config: How fine-tunes are started on several GPUs, see `launcher`; None for one, in this process.
    """

    suite: Suite
    model: str | None
    editor: str
    finetune: str
    seed: int
    device: str
    paraphrases: int = 0
    paraphrase_source: str = "own"
    freeze: str = "none"
    adapter: str = "none"
    track_every: int = 0
    accelerate_config: str | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a plan.

    Attributes:
        name: Which stage it is.
        title: The same for people.
        inputs: Everything its result depends on.
        reads: What it reads from outside the store, itself and not through another stage.
    """

    name: str
    title: str
    inputs: Mapping[str, Any]
    reads: tuple[Input, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One edited copy of the base model.

    Attributes:
        index: Its place among the cell's experiments.
        facts: The edited facts it holds, as a slice of the cell's.
        edit: The stage that edits it.
        edit_score: The stage that scores it after the edit.
        finetune: The stage that fine-tunes it.
        finetune_score: The stage that scores it after the fine-tune.
    """

    index: int
    facts: slice
    edit: Stage
    edit_score: Stage
    finetune: Stage
    finetune_score: Stage


@dataclasses.dataclass(frozen=True)
class Plan:
    """A cell with its settings resolved and checked.

    Attributes:
        cell: The cell.
        model_name: The model's name in the results.
        model: The model's configuration, its path absolute.
        editor: The editor with the suite's settings.
        finetune: The fine-tune with the suite's settings.
        finetune_name: Its name in the results.
        facts: The stage that filters and splits the facts.
        base_score: The stage that scores the base model.
        statistics: The stage that measures the key statistics, if the editor needs them.
        fit: The stage that trains the editor, if it is one that trains first.
        paraphrases: The stage that finds more prompts for the edits, if there shall be any.
        paraphrase_source: Where they come from, a model by its name in the results; None if there are none.
        writer: The model that writes them, if one does, its path absolute.
        launcher: What starts the fine-tunes in processes of their own, if there shall be several.
        unknown: The stage that finds the facts that the base model does not know, if the fine-tune teaches those.
        experiments: The edited copies.
        control: The stage that fine-tunes the unedited base model.
        control_score: The stage that scores it.
        results: The stage that gathers everything.
    """

    cell: Cell
    model_name: str
    model: ModelConfig
    editor: Editor
    finetune: Finetune
    finetune_name: str
    facts: Stage
    base_score: Stage
    statistics: Stage | None
    fit: Stage | None
    paraphrases: Stage | None
    paraphrase_source: str | None
    writer: ModelConfig | None
    launcher: Launcher | None
    unknown: Stage | None
    experiments: tuple[Experiment, ...]
    control: Stage
    control_score: Stage
    results: Stage

    def stages(self) -> list[Stage]:
        """All stages in the order they run."""
        stages = [self.facts, *([self.paraphrases] if self.paraphrases else []), self.base_score]
        stages += [stage for stage in (self.statistics, self.fit, self.unknown) if stage]
        for e in self.experiments:
            stages += [e.edit, e.edit_score, e.finetune, e.finetune_score]
        return [*stages, self.control, self.control_score, self.results]
