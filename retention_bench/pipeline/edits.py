"""The edits of a cell: its editor, what that needs, and the other editor whose edits it changes, if it is a placebo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from retention_bench.data import find_file
from retention_bench.editors import DerivedEditor, Editor, FittedEditor
from retention_bench.errors import UsageError
from retention_bench.pipeline.stage import Model, Rows
from retention_bench.pipeline.stages import Covariance, CovarianceFile, Edit, Facts, Fit, Paraphrases
from retention_bench.pipeline.stages.facts import Group
from retention_bench.pipeline.suite import ModelConfig, Resolved, Source, Suite
from retention_bench.registry import EDITORS
from retention_bench.store.fingerprints import source_fingerprint


@dataclasses.dataclass(frozen=True)
class Edits:
    """How the edits of a cell are made.

    Attributes:
        resolved: The editor, then the one whose edits it changes, and so on.
        edits_per_model: How many facts go into one copy of the model; None for all.
        make: The edit of a group of facts into one model, and which model that is, for people.
    """

    resolved: tuple[Resolved, ...]
    edits_per_model: int | None
    make: Callable[[Group, str], Edit]


def edits_of(
    name: str,
    suite: Suite,
    config: ModelConfig,
    facts: Facts,
    *,
    paraphrases: Paraphrases | None,
    mode: str,
    covariance: str | None,
    seed: int,
    seen: tuple[str, ...] = (),
) -> Edits:
    """Resolve an editor, and lay out what its edits need.

    Args:
        name: The editor's name.
        suite: The suite.
        config: The model's configuration.
        facts: The cell's facts.
        paraphrases: More prompts for them.
        mode: How edits take those, see `PARAPHRASE_MODES`.
        covariance: A file of the covariance of the keys, in place of the suite's.
        seed: Seed of the edits.
        seen: Editors that are made of this one.

    Raises:
        UsageError: An unknown editor or setting, or an editor that is made of itself.
    """
    if name in seen:
        raise UsageError(
            f"The editor {name!r} is made of itself: {' of '.join([*seen, name])}. Set `of` to an editor that writes "
            "facts."
        )
    named = suite.editor(name, config)
    registered = named.registered
    editor: Editor = EDITORS.make(registered, named.settings, entry=name)
    settings, model = plain_settings(editor), facts.knowledge.model
    keys = _covariance(suite, model, editor, covariance)
    fit = Fit(facts, registered, settings, seed, name) if isinstance(editor, FittedEditor) else None
    other = None
    if isinstance(editor, DerivedEditor):
        other = edits_of(
            editor.of,
            suite,
            config,
            facts,
            paraphrases=paraphrases,
            mode=mode,
            covariance=covariance,
            seed=seed,
            seen=(*seen, name),
        )

    def make(group: Group, label: str) -> Edit:
        return Edit(
            model=model,
            facts=facts,
            group=group,
            paraphrases=paraphrases,
            paraphrase_mode=mode if paraphrases else None,
            covariance=keys,
            fit=fit,
            of=other.make(group, label) if other else None,
            editor=registered,
            settings=settings,
            seed=seed,
            called=(name, label),
        )

    if other is None:
        return Edits((named,), editor.edits_per_model, make)
    return Edits((named, *other.resolved), other.edits_per_model, make)


def rows_of(source: Source) -> Rows:
    """A suite's rows as stages read them.

    Raises:
        UsageError: There is no such file, or a Hub data set has no revision.
    """
    fingerprint = source_fingerprint(source.source, source.revision)
    return Rows(source.source, fingerprint, source.config, source.revision)


def plain_settings(settings: Any) -> dict[str, Any]:
    """A dataclass's settings as JSON values, without where its data lie: their content has a fingerprint of its own."""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("source", "revision")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _covariance(suite: Suite, model: Model, editor: Editor, given: str | None) -> Covariance | CovarianceFile | None:
    """The covariance of the keys, if the editor needs it: collected, or from the given file or the suite's."""
    if not editor.covariance_layers:
        return None
    corpus, file = suite.covariance, suite.covariance.file
    if given is not None:
        file = str(find_file(given, "covariance file").resolve())
    elif file is not None:
        file = str(find_file(file, "covariance file"))
    if file is not None:
        return CovarianceFile.of(model, file, editor.covariance_layers)
    return Covariance.of(
        model, rows_of(corpus), editor.covariance_layers, texts=corpus.texts, max_length=corpus.max_length
    )
