"""One cell of the leaderboard: which stages it consists of, and under which key each is kept.

A cell is planned before anything runs: every key follows from the cell's settings and its input files, so a plan costs
no model and a second run finds all that the first one finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench.editors import Editor, FittedEditor, editor_names, make_editor
from retention_bench.errors import UsageError, unknown_name
from retention_bench.facts import MODEL, check_source
from retention_bench.finetune import (
    ADAPTERS,
    Finetune,
    Freeze,
    finetune_names,
    make_finetune,
    parse_finetune,
    parse_freeze,
)
from retention_bench.pipeline.inputs import config_file, model_fingerprint, model_inputs, source_fingerprint
from retention_bench.pipeline.store import Store
from retention_bench.pipeline.suite import ModelConfig, StatisticsConfig, Suite

# Raised when a stage's mathematics or files change, so that results of the old one are not found any more.
VERSIONS = {
    "facts": 2,
    "statistics": 2,
    "paraphrases": 1,
    "fit": 1,
    "edit": 2,
    "unknown": 1,
    "finetune": 2,
    "score": 2,
    "results": 3,
}


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
        probe_every: Optimiser steps between two looks at all facts while a model is trained; 0 for none.
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
    probe_every: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a plan.

    Attributes:
        name: Which stage it is.
        title: The same for people.
        inputs: Everything its result depends on.
    """

    name: str
    title: str
    inputs: Mapping[str, Any]


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


def plan(cell: Cell, store: Store) -> Plan:
    """Resolve a cell's settings and lay out its stages.

    Args:
        cell: The cell.
        store: Makes the keys; it is not written.

    Raises:
        UsageError: An unknown model, editor, fine-tune, paraphrase source or setting.
        RetentionBenchError: An input file is missing.
    """
    suite = cell.suite
    model_name, model = suite.model(cell.model)
    settings = _settings("editor", cell.editor, editor_names(), model.editors, suite)
    settings.pop("editor", None)
    registered = _registered(cell.editor, model, suite)
    editor = make_editor(registered, settings)
    task, given = parse_finetune(cell.finetune)
    # A data set of one's own needs no entry in the suite; where there is one it says how it is trained on.
    entry = (
        {}
        if given and task not in model.finetunes
        else _settings("fine-tune", task, finetune_names(), model.finetunes, suite)
    )
    finetune = make_finetune(task, {**entry, **given})
    data = source_fingerprint(finetune.source, finetune.revision)
    # Files of one name in two folders are told apart by what is in them.
    finetune_name = (
        f"{task}:{Path(finetune.source).name}@{str(data.get('sha256', finetune.revision))[:8]}" if given else task
    )
    freeze = parse_freeze(cell.freeze)
    _check_trainable(model, freeze)
    if cell.adapter not in ADAPTERS:
        raise unknown_name("adapter", cell.adapter, ADAPTERS)
    base = model_inputs(model, cell.device)

    def stage(name: str, title: str, **inputs: Any) -> Stage:
        return Stage(name, title, {"version": VERSIONS[name], **base, **inputs})

    facts = stage(
        "facts",
        "known-fact filter and split",
        pool=source_fingerprint(suite.locate(suite.facts.source), suite.facts.revision),
        **suite.facts.model_dump(include={"margin", "edited", "intrinsic", "config"}),
        seed=cell.seed,
    )
    facts_key = store.key("facts", facts.inputs)
    statistics = None
    if editor.statistics_layers:
        corpus = suite.statistics.model_copy(update={"source": suite.locate(suite.statistics.source)})
        statistics = statistics_stage(model, cell.device, corpus, editor.statistics_layers)

    fit = None
    if isinstance(editor, FittedEditor):
        fit = stage(
            "fit",
            f"{cell.editor} training",
            facts=facts_key,
            editor=registered,
            settings=_plain(editor),
            seed=cell.seed,
        )
    paraphrases, source, writer = None, None, None
    if cell.paraphrases:
        check_source(cell.paraphrase_source)
        source, written = cell.paraphrase_source, {}
        if source.startswith(MODEL):
            writer_name, writer = suite.model(source.removeprefix(MODEL))
            source = f"{MODEL}{writer_name}"
            written = {"writer": model_fingerprint(writer.path, writer.revision)}
        paraphrases = stage(
            "paraphrases",
            f"paraphrases for the edits, {cell.paraphrases} a fact ({source})",
            facts=facts_key,
            count=cell.paraphrases,
            source="model" if writer else source,
            **written,
            seed=cell.seed,
        )
    # Only where there are some, so that everything without them keeps its key. What is scored depends on them too: a
    # fact is not asked in the words it was edited with.
    augmented = {"paraphrases": store.key("paraphrases", paraphrases.inputs)} if paraphrases else {}

    def score(title: str, checkpoint: Stage | None, group: slice) -> Stage:
        scored = store.key(checkpoint.name, checkpoint.inputs) if checkpoint else None
        return stage("score", title, checkpoint=scored, facts=facts_key, group=[group.start, group.stop], **augmented)

    unknown = None
    if finetune.asks_base:
        unknown = stage("unknown", "what the base model does not know", pool=data, config=finetune.config)

    def tuned(title: str, edit: Stage | None, frozen_by: Sequence[Stage] = ()) -> Stage:
        return stage(
            "finetune",
            title,
            edit=store.key("edit", edit.inputs) if edit else None,
            facts=facts_key,
            keywords=suite.facts.keywords,
            finetune=task,
            settings=_plain(finetune),
            data=data,
            freeze=cell.freeze,
            adapter=cell.adapter,
            seed=cell.seed,
            **({"unknown": store.key("unknown", unknown.inputs)} if unknown else {}),
            **({"frozen_by": [store.key("edit", other.inputs) for other in frozen_by]} if frozen_by else {}),
            **({"probe_every": cell.probe_every} if cell.probe_every else {}),
        )

    everyone = slice(0, suite.facts.edited)
    size = editor.edits_per_model or suite.facts.edited
    count = math.ceil(suite.facts.edited / size)
    experiments = []
    for index in range(count):
        group = slice(index * size, min((index + 1) * size, suite.facts.edited))
        label = f"model {index + 1} of {count}"
        edit = stage(
            "edit",
            f"{cell.editor} edit, {label}",
            facts=facts_key,
            group=[group.start, group.stop],
            statistics=store.key("statistics", statistics.inputs) if statistics else None,
            editor=registered,
            settings=_plain(editor),
            seed=cell.seed,
            **({"fit": store.key("fit", fit.inputs)} if fit else {}),
            **augmented,
        )
        tune = tuned(f"{finetune_name} fine-tune, {label}", edit)
        experiments.append(
            Experiment(
                index,
                group,
                edit,
                score(f"score after the edit, {label}", edit, group),
                tune,
                score(f"score after the fine-tune, {label}", tune, group),
            )
        )
    # The control leaves alone what the edited models leave alone.
    edits = [e.edit for e in experiments] if freeze.needs_edit else []
    control = tuned(f"{finetune_name} fine-tune, unedited control", None, edits)
    base_score = score("score the base model", None, everyone)
    control_score = score("score the control", control, everyone)
    parts = [base_score, control_score, *(s for e in experiments for s in (e.edit_score, e.finetune_score))]
    results = stage(
        "results",
        "gather the results",
        suite=suite.name,
        notice=suite.notice,
        model_name=model_name,
        editor=cell.editor,
        finetune=finetune_name,
        scores=[store.key("score", part.inputs) for part in parts],
        finetunes=[store.key("finetune", part.inputs) for part in (control, *(e.finetune for e in experiments))],
        paraphrase_source=source,
        seed=cell.seed,
    )
    return Plan(
        cell=cell,
        model_name=model_name,
        model=model,
        editor=editor,
        finetune=finetune,
        finetune_name=finetune_name,
        facts=facts,
        base_score=base_score,
        statistics=statistics,
        fit=fit,
        paraphrases=paraphrases,
        paraphrase_source=source,
        writer=writer,
        unknown=unknown,
        experiments=tuple(experiments),
        control=control,
        control_score=control_score,
        results=results,
    )


def statistics_stage(
    model: ModelConfig,
    device: str,
    corpus: StatisticsConfig,
    layers: Sequence[int],
    shard: tuple[int, int] | None = None,
) -> Stage:
    """The stage that measures key statistics, the same for whoever asks for them.

    Args:
        model: The model, its path absolute.
        device: `"cpu"` or `"cuda"`.
        corpus: The texts, their source absolute.
        layers: The layers.
        shard: (i, n) for every text whose index is i modulo n; None for all texts.

    Raises:
        UsageError: The corpus does not exist or has no revision, or the model's family is not supported.
        RetentionBenchError: The model's files are missing.
    """
    from retention_bench.models import family

    config = json.loads(config_file(model.path, model.revision).read_text(encoding="utf-8"))
    names = family(str(config.get("model_type")))
    layers = sorted(set(layers))
    inputs = {
        "version": VERSIONS["statistics"],
        **model_inputs(model, device),
        "corpus": source_fingerprint(corpus.source, corpus.revision),
        **corpus.model_dump(include={"config", "texts", "max_length"}),
        "layers": layers,
        "modules": [f"{names.blocks}.{layer}.{names.projection}" for layer in layers],
    }
    if shard is None:
        return Stage("statistics", "key statistics", inputs)
    return Stage("statistics", f"key statistics, shard {shard[0]}/{shard[1]}", {**inputs, "shard": list(shard)})


def _check_trainable(model: ModelConfig, freeze: Freeze) -> None:
    """Refuse at once what the fine-tunes would refuse after all editing.

    Raises:
        UsageError: The model's dtype is not float32, or `freeze` names a layer that the model lacks.
    """
    if model.dtype != "float32":
        raise UsageError(f"A fine-tune needs float32 weights, the suite has {model.dtype}. Set `dtype: float32`.")
    config = json.loads(config_file(model.path, model.revision).read_text(encoding="utf-8"))
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if count is not None and not freeze.needs_edit:
        freeze.layers(count)


def _settings(
    kind: str, name: str, registered: Collection[str], given: Mapping[str, dict[str, Any]], suite: Suite
) -> dict[str, Any]:
    """The suite's settings for an editor or a fine-tune, its paths made absolute."""
    if name not in given:
        if name not in registered:
            raise unknown_name(kind, name, given)
        raise UsageError(
            f"The suite {suite.name!r} has no settings for the {kind} {name!r}; it has them for "
            f"{', '.join(sorted(given)) or 'none'}. Add them to a copy of its YAML file and give that with --suite."
        )
    settings = dict(given[name])
    if isinstance(settings.get("source"), str):
        settings["source"] = suite.locate(settings["source"])
    return settings


def _registered(name: str, model: ModelConfig, suite: Suite) -> str:
    """The registered editor that goes by a name in the suite.

    Raises:
        UsageError: There is no such editor; the entry is named.
    """
    registered = model.registered[name]
    if registered not in editor_names():
        error = unknown_name("editor", registered, editor_names())
        raise UsageError(
            f"The suite {suite.name!r}, editors.{name}: {error} An entry that goes by another name than its editor "
            "names that with the key `editor`."
        )
    return registered


def _plain(settings: Any) -> dict[str, Any]:
    """A dataclass's settings as JSON values, without where its data lie: their content has a fingerprint of its own."""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("source", "revision")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
