"""A cell of the leaderboard, and the stages that it consists of.

A cell is laid out before anything runs: every key follows from the cell's settings and its input files, so a plan costs
no model and a second run finds all that the first one finished.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retention_bench.data import read_json
from retention_bench.errors import UsageError, unknown_name
from retention_bench.facts import MODEL, load_pool, parse_source, relation_keywords
from retention_bench.finetune import Finetune as Task
from retention_bench.finetune import FinetuneOptions, Freeze, parse_freeze
from retention_bench.pipeline.distributed.launching import Launcher, check_one_gpu, launcher
from retention_bench.pipeline.edits import edits_of, plain_settings, rows_of
from retention_bench.pipeline.stage import Model, Rows
from retention_bench.pipeline.stages import (
    Edit,
    Experiment,
    Facts,
    Finetune,
    Gather,
    Knowledge,
    Paraphrases,
    Score,
    Unknown,
)
from retention_bench.pipeline.stages.edit import PARAPHRASE_MODES
from retention_bench.pipeline.stages.facts import Group
from retention_bench.pipeline.stages.finetune import Tracked
from retention_bench.pipeline.suite import ModelConfig, Suite
from retention_bench.registry import FINETUNES
from retention_bench.results import KINDS, MIN_EFFICACY
from retention_bench.results.schema import Seeds
from retention_bench.store.fingerprints import config_file, model_fingerprint, source_fingerprint

MOST_MODELS = 10_000
"""Edited models of a cell."""

_SEVERAL = re.compile(rb'^\s*\[|"requested_rewrite"\s*:\s*\[')  # a line that holds several facts, as MQuAKE's


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is run: one editor and one fine-tune on one model of a suite.

    Attributes:
        suite: The suite.
        model: A model of the suite, a folder or a Hub id; None for the suite's default.
        editor: The editor's name in the suite.
        finetune: The fine-tune's name, or `path:` and a data set, see `parse_finetune`.
        seed: Seed of the split, the edits and the fine-tunes, where they have none of their own.
        device: `"cpu"` or `"cuda"`.
        paraphrases: How many more prompts each fact is edited with.
        paraphrase_source: Where they come from, see `parse_source`; a model can be one of the suite's.
        paraphrase_mode: How an edit takes them: `mean` writes a fact once, for all its prompts together; `separate`
            makes each prompt a request of its own.
        freeze: What the fine-tunes must not change, see `parse_freeze`.
        adapter: What they train in the weights' place: `none`, `lora` or `dora`.
        track_every: All facts are looked at wherever a fine-tune is evaluated; with more than 0, also every so many
            steps. None for no trajectory.
        horizon: Where the fine-tunes end, see `parse_horizon`.
        accelerate_config: How fine-tunes are started on several GPUs, see `launcher`; None for one, in this process.
        covariance: A file of the covariance of the keys, in place of one that is collected.
        min_efficacy: The share of the edits that must have taken for the cell to be ranked.
        facts_seed: Seed of the split, and of the paraphrases that edits are made with; None for `seed`.
        edit_seed: Seed of the edits, and of an editor that trains; None for `seed`.
        finetune_seed: Seed of the fine-tunes; None for `seed`.
    """

    suite: Suite
    model: str | None
    editor: str
    finetune: str
    seed: int
    device: str
    paraphrases: int = 0
    paraphrase_source: str = "own"
    paraphrase_mode: str = "mean"
    freeze: str = "none"
    adapter: str = "none"
    track_every: int | None = 0
    horizon: str = "threshold"
    accelerate_config: str | None = None
    covariance: str | None = None
    min_efficacy: float = MIN_EFFICACY
    facts_seed: int | None = None
    edit_seed: int | None = None
    finetune_seed: int | None = None

    @property
    def seeds(self) -> Seeds:
        """The seed of every part."""
        facts, edit, finetune = (
            self.seed if own is None else own for own in (self.facts_seed, self.edit_seed, self.finetune_seed)
        )
        return Seeds(facts=facts, edit=edit, finetune=finetune)


def plan(cell: Cell) -> Gather:
    """Resolve a cell's settings and lay out its stages.

    Args:
        cell: The cell.

    Returns:
        The last stage, which holds all the others.

    Raises:
        UsageError: An unknown model, editor, fine-tune, paraphrase source or setting.
        RetentionBenchError: An input file is missing.
    """
    suite = cell.suite
    model_name, config = suite.model(cell.model)
    tuned_by = suite.finetune(cell.finetune, config)
    task = tuned_by.registered
    finetune: Task = FINETUNES.make(task, tuned_by.settings)
    data, finetune_name = _data(cell, task, finetune)
    options = FinetuneOptions(cell.freeze, cell.adapter, cell.track_every, cell.horizon)
    freeze = parse_freeze(cell.freeze)
    _check_trainable(config, freeze)
    start = _launcher(cell, finetune)
    model, pool = model_of(config, cell.device), rows_of(suite.facts)
    _check_pool(suite)
    keywords = _keywords(suite)
    facts = Facts(
        Knowledge(model, pool),
        suite.facts.margin,
        suite.facts.edited,
        suite.facts.intrinsic,
        cell.seeds.facts,
        suite.facts.split,
        suite.facts.intrinsic_matched if suite.facts.split == "relations" else 0,
    )
    paraphrases = _paraphrases(cell, facts)
    edits = edits_of(
        cell.editor,
        suite,
        config,
        facts,
        paraphrases=paraphrases,
        mode=cell.paraphrase_mode,
        covariance=cell.covariance,
        seed=cell.seeds.edit,
    )
    unknown = Unknown(Knowledge(model, data)) if finetune.settings.asks_base else None

    def score(called: str, checkpoint: Edit | Finetune | None, group: Group) -> Score:
        return Score(model, facts, group, paraphrases, checkpoint, tuple(KINDS), called)

    def tuned(label: str, group: Group, edit: Edit | None, frozen_by: tuple[Edit, ...] = ()) -> Finetune:
        return Finetune(
            model=model,
            facts=facts,
            keywords=keywords,
            edit=edit,
            frozen_by=frozen_by,
            task=task,
            settings=plain_settings(finetune.settings),
            data=data,
            unknown=unknown,
            options=options,
            tracked=Tracked(group, facts.knowledge) if cell.track_every is not None else None,
            launcher=start,
            seed=cell.seeds.finetune,
            called=(finetune_name, label),
        )

    everyone = Group(0, suite.facts.edited)
    size = edits.edits_per_model or suite.facts.edited
    count = math.ceil(suite.facts.edited / size)
    if count > MOST_MODELS:
        raise UsageError(
            f"facts.edited {suite.facts.edited:,} with edits_per_model {size} makes {count:,} edited models, each "
            f"fine-tuned on its own; {MOST_MODELS:,} at most. Lower facts.edited, or raise edits_per_model."
        )
    experiments = []
    for index in range(count):
        group = Group(index * size, min((index + 1) * size, suite.facts.edited))
        label = f"model {index + 1} of {count}"
        edit = edits.make(group, label)
        after_edit = score(f"after the edit, {label}", edit, group)
        experiments.append(
            Experiment(after_edit, score(f"after the fine-tune, {label}", tuned(label, group, edit), group))
        )
    # The control leaves alone what the edited models leave alone.
    frozen_by = tuple(e.edit for e in experiments) if freeze.needs_edit else ()
    own = [*((f"editor {found.name}", found) for found in edits.resolved), (f"fine-tune {cell.finetune}", tuned_by)]
    return Gather(
        suite=suite.name,
        notice=" ".join(suite.notice.split()),
        model=model_name,
        editor=cell.editor,
        finetune=finetune_name,
        base=score("the base model", None, everyone),
        experiments=tuple(experiments),
        control=score("the control", tuned("unedited control", everyone, None, frozen_by), everyone),
        defaults=tuple(what for what, found in own if found.given_by == "its own defaults"),
        seed=cell.seed,
        facts_seed=cell.seeds.facts,
        edit_seed=cell.seeds.edit,
        finetune_seed=cell.seeds.finetune,
        min_efficacy=cell.min_efficacy,
        real=suite.real,
    )


def model_of(config: ModelConfig, device: str) -> Model:
    """A model as stages read it.

    Raises:
        RetentionBenchError: The model's files are missing.
    """
    return Model(config.path, model_fingerprint(config.path, config.revision), config.dtype, device, config.revision)


def _data(cell: Cell, task: str, finetune: Task) -> tuple[Rows, str]:
    """The fine-tune's data, and its name in the results."""
    settings = finetune.settings
    fingerprint = source_fingerprint(settings.source, settings.revision)
    data = Rows(settings.source, fingerprint, settings.config, settings.revision)
    if cell.finetune == task:
        return data, task
    # Files of one name in two folders are told apart by what is in them.
    told_apart = str(fingerprint.get("sha256", settings.revision))[:8]
    return data, f"{task}:{Path(settings.source).name}@{told_apart}"


def _launcher(cell: Cell, finetune: Task) -> Launcher | None:
    start = launcher(cell.accelerate_config, cell.device) if cell.accelerate_config is not None else None
    if start is None and cell.device != "cpu":
        check_one_gpu()
    if start and finetune.settings.batch_size % start.processes:
        raise UsageError(
            f"{start.processes} processes cannot share the {finetune.settings.batch_size} rows of a step equally. Set "
            f"num_processes, in a file for --accelerate-config, to a divisor of {finetune.settings.batch_size}."
        )
    if start and start.sharded and cell.track_every is not None and finetune.settings.classes is not None:
        raise UsageError(
            f"Under FSDP a model cannot be asked while {cell.finetune} trains its backbone below another head. Give "
            "--track-every off, or --accelerate-config ddp."
        )
    return start


def _paraphrases(cell: Cell, facts: Facts) -> Paraphrases | None:
    if cell.paraphrase_mode not in PARAPHRASE_MODES:
        raise unknown_name("paraphrase mode", cell.paraphrase_mode, PARAPHRASE_MODES)
    sources = parse_source(cell.paraphrase_source, cell.paraphrases)
    if not cell.paraphrases:
        return None
    if sources.model is None:
        return Paraphrases(facts, cell.paraphrases, sources.names, None, cell.seeds.facts, cell.paraphrase_source)
    name, config = cell.suite.model(sources.model)
    # It writes in the dtype and on the device of the base model.
    base = facts.knowledge.model
    writer = dataclasses.replace(model_of(config, base.device), dtype=base.dtype)
    shown = "+".join([*sources.names[:-1], f"{MODEL}{name}"])
    return Paraphrases(facts, cell.paraphrases, sources.names, writer, cell.seeds.facts, shown)


def _keywords(suite: Suite) -> Mapping[str, tuple[str, ...]]:
    """The suite's keywords, or those that it wants taken from its pool.

    Raises:
        UsageError: One is for a relation that no fact has.
        RetentionBenchError: The pool cannot be read.
    """
    given, pool = suite.facts.keywords, rows_of(suite.facts)
    if not given:
        return {}
    if given == "auto":
        return relation_keywords(load_pool(pool.path, pool.revision, pool.config, need_relation=True).facts)
    load_pool(pool.path, pool.revision, pool.config, keywords=given)
    return given


def _check_pool(suite: Suite) -> None:
    """Refuse at once what the split would refuse after the known-fact filter.

    Raises:
        UsageError: The pool is a local file of a fact a line, with fewer lines than facts are wanted.
    """
    path, wanted = Path(suite.facts.source), suite.facts.edited + suite.facts.intrinsic
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
