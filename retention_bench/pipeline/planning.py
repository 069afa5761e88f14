"""Which stages a cell consists of, and under which key each is kept.

A cell is planned before anything runs: every key follows from the cell's settings and its input files, so a plan costs
no model and a second run finds all that the first one finished.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench.data import read_json
from retention_bench.editors import FittedEditor, editor_names, make_editor
from retention_bench.errors import UsageError, unknown_name
from retention_bench.facts import MODEL, check_source
from retention_bench.finetune import (
    ADAPTERS,
    Freeze,
    finetune_names,
    make_finetune,
    parse_finetune,
    parse_freeze,
)
from retention_bench.pipeline.cell import Cell, Experiment, Plan, Stage
from retention_bench.pipeline.inputs import Input, config_file, model_fingerprint, model_inputs, source_fingerprint
from retention_bench.pipeline.launching import check_one_gpu, launcher
from retention_bench.pipeline.store import Store
from retention_bench.pipeline.suite import ModelConfig, StatisticsConfig, Suite

# Raised when a stage's mathematics or files change, so that results of the old one are not found any more.
VERSIONS = {
    "facts": 3,
    "statistics": 2,
    "paraphrases": 2,
    "fit": 2,
    "edit": 2,
    "unknown": 2,
    "finetune": 5,
    "score": 5,
    "results": 6,
}


MOST_MODELS = 10_000
"""Edited models of a cell."""

_SEVERAL = re.compile(rb'^\s*\[|"requested_rewrite"\s*:\s*\[')  # a line that holds several facts, as MQuAKE's


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
    start = launcher(cell.accelerate_config, cell.device) if cell.accelerate_config is not None else None
    if start is None and cell.device != "cpu":
        check_one_gpu()
    if start and finetune.batch_size % start.processes:
        raise UsageError(
            f"{start.processes} processes cannot share the {finetune.batch_size} rows of a step equally. Set "
            f"num_processes, in a file for --accelerate-config, to a divisor of {finetune.batch_size}."
        )
    base = model_inputs(model, cell.device)
    rows = suite.locate(suite.facts.source)
    pool = Input(rows, source_fingerprint(rows, suite.facts.revision))
    weights = Input(model.path, base["model"])
    trained_on = Input(finetune.source, data)

    def stage(name: str, title: str, reads: Sequence[Input] = (), **inputs: Any) -> Stage:
        return Stage(name, title, {"version": VERSIONS[name], **base, **inputs}, tuple(reads))

    _check_pool(suite)
    facts = stage(
        "facts",
        "known-fact filter and split",
        [weights, pool],
        pool=pool.fingerprint,
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
            [weights, pool],
            facts=facts_key,
            editor=registered,
            settings=_plain(editor),
            seed=cell.seed,
        )
    paraphrases, source, writer = None, None, None
    check_source(cell.paraphrase_source, cell.paraphrases)
    if cell.paraphrases:
        source, written, reads = cell.paraphrase_source, {}, []
        if source.startswith(MODEL):
            writer_name, writer = suite.model(source.removeprefix(MODEL))
            source = f"{MODEL}{writer_name}"
            written = {"writer": model_fingerprint(writer.path, writer.revision)}
            reads = [Input(writer.path, written["writer"])]
        paraphrases = stage(
            "paraphrases",
            f"paraphrases for the edits, {cell.paraphrases} a fact ({source})",
            reads,
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
        reads = [weights] if checkpoint is None or checkpoint.name == "edit" else []
        return stage(
            "score", title, reads, checkpoint=scored, facts=facts_key, group=[group.start, group.stop], **augmented
        )

    unknown = None
    if finetune.asks_base:
        unknown = stage(
            "unknown", "what the base model does not know", [weights, trained_on], pool=data, config=finetune.config
        )

    def tuned(title: str, edit: Stage | None, frozen_by: Sequence[Stage] = ()) -> Stage:
        reads = [weights, trained_on, *([pool] if cell.probe_every else [])]
        if start:
            reads.append(Input(str(start.path), source_fingerprint(str(start.path), None)))
        return stage(
            "finetune",
            title,
            reads,
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
            **({"accelerate": start.to_json()} if start else {}),
        )

    everyone = slice(0, suite.facts.edited)
    size = editor.edits_per_model or suite.facts.edited
    count = math.ceil(suite.facts.edited / size)
    if count > MOST_MODELS:
        raise UsageError(
            f"facts.edited {suite.facts.edited:,} with edits_per_model {size} makes {count:,} edited models, each "
            f"fine-tuned on its own; {MOST_MODELS:,} at most. Lower facts.edited, or raise edits_per_model."
        )
    experiments = []
    for index in range(count):
        group = slice(index * size, min((index + 1) * size, suite.facts.edited))
        label = f"model {index + 1} of {count}"
        edit = stage(
            "edit",
            f"{cell.editor} edit, {label}",
            [weights],
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
        launcher=start,
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

    config = _config(model)
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
    reads = (Input(model.path, inputs["model"]), Input(corpus.source, inputs["corpus"]))
    if shard is None:
        return Stage("statistics", "key statistics", inputs, reads)
    return Stage("statistics", f"key statistics, shard {shard[0]}/{shard[1]}", {**inputs, "shard": list(shard)}, reads)


def _check_pool(suite: Suite) -> None:
    """Refuse at once what the split would refuse after the known-fact filter.

    Raises:
        UsageError: The pool is a local file of a fact a line, with fewer lines than facts are wanted.
    """
    path, wanted = Path(suite.locate(suite.facts.source)), suite.facts.edited + suite.facts.intrinsic
    if path.suffix != ".jsonl" or not path.is_file():
        return
    lines = 0
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            if _SEVERAL.search(line):
                return
            lines += 1
    if lines < wanted:
        raise UsageError(
            f"facts: {suite.facts.edited:,} edited and {suite.facts.intrinsic:,} intrinsic facts are wanted, and the "
            f"pool {path} has {lines:,} lines. Ask for fewer, or give a larger pool."
        )


def _check_trainable(model: ModelConfig, freeze: Freeze) -> None:
    """Refuse at once what the fine-tunes would refuse after all editing.

    Raises:
        UsageError: The model's dtype is not float32, or `freeze` names a layer that the model lacks.
    """
    if model.dtype != "float32":
        raise UsageError(f"A fine-tune needs float32 weights, the suite has {model.dtype}. Set `dtype: float32`.")
    config = _config(model)
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(count, int) and not freeze.needs_edit:
        freeze.layers(count)


def _config(model: ModelConfig) -> dict[str, Any]:
    return read_json(config_file(model.path, model.revision), dict[str, Any], "model's configuration")


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
