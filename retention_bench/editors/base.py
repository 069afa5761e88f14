"""What an editor is: requests and context in, a `WeightDelta` out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from retention_bench.display.progress import Progress, silent
from retention_bench.errors import UsageError
from retention_bench.facts.fact import Fact, FactSet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retention_bench.editors.covariance import Covariance
    from retention_bench.models import WeightDelta


@dataclasses.dataclass(frozen=True)
class EditRequest:
    """One fact to write into a model.

    Attributes:
        fact_id: The fact's id; errors name it.
        prompt: Contains `{}` once, where the subject goes; ends right before the object.
        subject: The subject.
        target_new: The object to write; kept without surrounding spaces, the one before it is part of its first token.
        paraphrases: Other prompts for the same triple, in the form of `prompt`, that the edit shall hold for too.
        target_true: The object that the model answers with before the edit, where it is known; no edit aims at it.

    Raises:
        UsageError: A prompt has no place for the subject, or a field is empty; the fact is named.
    """

    fact_id: str
    prompt: str
    subject: str
    target_new: str
    paraphrases: tuple[str, ...] = ()
    target_true: str | None = None

    def __post_init__(self) -> None:
        for prompt in (self.prompt, *self.paraphrases):
            if prompt.count("{}") != 1:
                raise UsageError(
                    f"Fact {self.fact_id!r}: the prompt {prompt!r} must contain '{{}}' exactly once, where the "
                    f"subject {self.subject!r} goes."
                )
        if not self.subject.strip():
            raise UsageError(
                f"Fact {self.fact_id!r}: the subject is empty. An edit needs one, its last token is where it acts."
            )
        if not self.target_new.strip():
            raise UsageError(f"Fact {self.fact_id!r}: target_new is empty. Give the object to write.")
        object.__setattr__(self, "prompt", self.prompt.rstrip())
        object.__setattr__(self, "target_new", self.target_new.strip())
        object.__setattr__(self, "paraphrases", tuple(prompt.rstrip() for prompt in self.paraphrases))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, then its paraphrases."""
        return (self.prompt, *self.paraphrases)

    @property
    def separate(self) -> tuple[EditRequest, ...]:
        """A request for each prompt: the "training volume" of the paper's section 5.1."""
        return tuple(dataclasses.replace(self, prompt=prompt, paraphrases=()) for prompt in self.prompts)

    @classmethod
    def from_fact(cls, fact: Fact, paraphrases: Sequence[str] = ()) -> EditRequest:
        """The request that writes a fact's `target_new`.

        Args:
            fact: The fact.
            paraphrases: Other prompts that the edit shall hold for too, in the form of `Fact.prompt`; see `augment`.
                The fact's own `paraphrases` are left out unless they are given here: the fact is asked in those.

        Raises:
            UsageError: The fact has no `target_new`.
        """
        if fact.target_new is None:
            raise UsageError(
                f"Fact {fact.id!r} has no target_new, so there is nothing to edit. Leave it out, or give it one."
            )
        return cls(fact.id, fact.prompt, fact.subject, fact.target_new, tuple(paraphrases), fact.target_true)


@dataclasses.dataclass(frozen=True)
class EditContext:
    """What an edit needs besides model and requests; every part comes from the caller, and nothing in it is changed.

    Attributes:
        covariance: The covariance of the keys, of the layers that the editor's `covariance_layers` names.
        templates: Context templates, each with `{}` once where the prompt goes; the bare `"{}"` is not among them.
        generator: Seeded, for editors that draw random numbers.
        progress: Called with how far the edit is.
        cache_c: Keys of earlier edits by layer, each [keys, d_mlp]: AlphaEdit's `cache_c` is the sum of their k k^T.
            See `edit_sequentially`.
        fitted: The folder that the editor's `fit` wrote, for editors that train first.
        delta: The edit of the same requests by the editor that a `DerivedEditor` names.

    Raises:
        UsageError: A template does not contain `{}` exactly once.
    """

    covariance: Covariance | None = None
    templates: tuple[str, ...] = ()
    generator: torch.Generator | None = None
    progress: Progress = silent
    cache_c: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    fitted: Path | None = None
    delta: WeightDelta | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            if template.count("{}") != 1:
                raise UsageError(
                    f"The context template {template!r} must contain '{{}}' exactly once, where the prompt goes."
                )

    def required_covariance(self, editor: str, model: PreTrainedModel, layers: Sequence[int]) -> Covariance:
        """The covariance, for an editor that needs it.

        Args:
            editor: The editor's name, for errors.
            model: The model that is edited.
            layers: The layers that are needed.

        Raises:
            UsageError: There is none, or it cannot be this model's.
        """
        if self.covariance is None:
            raise UsageError(
                f"{editor} needs the covariance of layers {list(layers)}. Make it with collect_covariance, and put it "
                "into the EditContext."
            )
        # Keys of earlier edits say that the model carries those edits; the covariance is the unedited model's.
        self.covariance.check(model, layers, edited=bool(self.cache_c))
        return self.covariance


class Editor(Protocol):
    """A way to write facts into a model: a frozen dataclass whose fields are its hyper-parameters.

    An editor that trains before it edits is also a `FittedEditor`.
    """

    @property
    def name(self) -> str:
        """The editor's name in the registry."""

    @property
    def edits_per_model(self) -> int | None:
        """How many facts are written into one copy of the model; None for all."""

    @property
    def covariance_layers(self) -> tuple[int, ...]:
        """Layers whose covariance `edit` needs."""

    @property
    def template_lengths(self) -> tuple[int, ...]:
        """Lengths of the context templates `edit` wants, in tokens; see `sample_context_templates`."""

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Compute the change of weights that writes the requests; the model is left as it was found.

        Args:
            model: The model.
            tokenizer: Its tokenizer, a fast one.
            requests: The facts to write, all at once.
            context: What else the edit needs.

        Returns:
            The change. The caller applies it.

        Raises:
            RetentionBenchError: The requests or the context cannot be used with this model.
        """


@runtime_checkable
class FittedEditor(Protocol):
    """What an editor also has if it trains once for a model, before it edits."""

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: FactSet,
        folder: Path,
        context: EditContext,
    ) -> None:
        """Train, and write what `edit` needs into a folder, which is then handed to it as `EditContext.fitted`.

        Called again with a folder in which an earlier run was cut off, it goes on from that run's last checkpoint.

        Args:
            model: The unedited model; it is left as it was found.
            tokenizer: Its tokenizer, a fast one.
            facts: Facts to train on, each with a `target_new`; none of those that will be edited or asked.
            folder: An existing folder, where checkpoints and the result go.
            context: Its generator and progress callback are used.

        Raises:
            RetentionBenchError: The facts cannot be trained on, or the training diverges.
        """


@runtime_checkable
class DerivedEditor(Protocol):
    """What an editor also has if it makes its edit of another editor's, which it gets as `EditContext.delta`.

    The other editor's `edits_per_model` counts, and its own does not.
    """

    @property
    def of(self) -> str:
        """The other editor, by its name in the suite."""


_FORMS = {"random": ("random:EDITOR", "random:memit"), "scaled": ("scaled:FACTOR:EDITOR", "scaled:0.5:memit")}


def parse_editor(text: str) -> tuple[str, dict[str, Any]]:
    """Read an editor as it is named on the command line.

    Args:
        text: An editor's name; or `random:EDITOR`, `scaled:FACTOR:EDITOR` or `scaled:matched:EDITOR`.

    Returns:
        The editor's name, and the settings that go over the suite's for it: none, or those behind the colons.

    Raises:
        UsageError: Something is missing behind a colon, or the factor is no number.
    """
    name, colon, rest = text.partition(":")
    if not colon or name not in _FORMS:
        return text, {}
    form, example = _FORMS[name]
    settings: dict[str, Any] = {}
    if name == "scaled":
        factor, _, rest = rest.partition(":")
        try:
            settings["factor"] = factor if factor == "matched" else float(factor)
        except ValueError:
            raise UsageError(f"{text!r}: the factor {factor!r} is no number and not 'matched'. Write {form}.") from None
    if not rest:
        raise UsageError(f"{text!r} does not name the editor that it is made of. Write {form}, as in {example}.")
    return name, {**settings, "of": rest}
