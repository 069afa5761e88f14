"""More prompts to edit a fact with: its own paraphrases, its prompt behind an opening, or a model's paraphrases."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from retention_bench.display.progress import Progress, silent
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.llm_paraphrases import write_paraphrases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "model:"
"""What a source begins with that names a model."""

OPENINGS = (
    "It is known that ",
    "According to the encyclopedia, ",
    "As everyone knows, ",
    "It has been confirmed that ",
    "Most sources agree that ",
    "Records show that ",
    "Teachers explain that ",
    "In short, ",
    "To put it simply, ",
    "Experts have often said that ",
    "It is a well-established fact that ",
    "As the guide told the visitors, ",
    "If you look it up, you will find that ",
    "People who have studied the matter say that ",
    "Fact: ",
    "Note: ",
    "The following is true: ",
    "From a reference book: ",
    "Complete the sentence: ",
    "Fill in the word that comes next: ",
    "Question: How does this sentence end? Answer: ",
    "Q: What is true here? A: ",
    "The weather was mild that day. ",
    "The meeting began at nine. ",
    "Here is something worth knowing. ",
    "She turned the page and read on. ",
)
"""What the source `template` puts before a prompt. The prompt's ending, behind which the object follows, stays."""

_WITHIN = frozenset(
    "A All Among An As At By During For From If In It Its Like Most Of On One People Since That The Their These This "
    "To Under When Where With".split()
)
"""Words that are written in lower case where a sentence does not begin with them."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where paraphrases come from, in the order in which they fill a fact's.

    Attributes:
        names: Of `own`, `template` and `model`, each once.
        model: The instruct model's name, where one writes; it comes last.
    """

    names: tuple[str, ...]
    model: str | None = None


def parse_source(text: str, count: int = 0) -> Sources:
    """Read a source of paraphrases, or several with `+` between them: `own+template+model:NAME`.

    What follows `model:` is the model's name to the end, since a folder may have a `+` in its name.

    Raises:
        UsageError: One is none of `own`, `template` and `model:` with a name, one stands there twice, or they have
            fewer than `count` for any fact.
    """
    before, colon, model = text.partition(MODEL)
    names = before.removesuffix("+").split("+") if before or not colon else []
    for name in names:
        if name not in _PICK:
            raise _unknown(name)
    if colon and (not model or (before and not before.endswith("+"))):
        raise _unknown(text)
    if len(set(names)) < len(names):
        raise UsageError(f"The paraphrase source {text!r} names one source twice. Name each once.")
    if names == ["template"] and not colon and count > len(OPENINGS):
        raise UsageError(
            f"The paraphrase source 'template' has {len(OPENINGS)} openings, and {count} paraphrases a fact were asked "
            f"for. Ask for {len(OPENINGS)} at most, or let an instruct model write more: template+{MODEL}NAME."
        )
    return Sources((*names, *([MODEL.rstrip(":")] if colon else [])), model or None)


def _unknown(name: str) -> UsageError:
    error = unknown_name("paraphrase source", name, [*_PICK, f"{MODEL}NAME"])
    return UsageError(
        f"{error} NAME is an instruct model's folder or Hub id; several sources are joined as in own+template."
    )


@dataclasses.dataclass(frozen=True)
class Augmented:
    """More prompts for facts.

    Attributes:
        prompts: By fact id its prompts with `{}` once, where the subject goes; they differ from each other and from
            the fact's own by more than capitals.
        counts: How many of all of them came from each source, by its name in `Sources.names`.
    """

    prompts: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]


def augment(
    facts: Iterable[Fact],
    count: int,
    source: str,
    *,
    seed: int,
    load: Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    progress: Progress = silent,
) -> Augmented:
    """Find more prompts for facts, in the form of `Fact.prompt`.

    Args:
        facts: The facts.
        count: Prompts for each. The first of them are those that a smaller count gives, except for a model's.
        source: `own` takes a fact's paraphrases, in their order; `template` puts the fact's prompt behind one of
            `OPENINGS`; `model:NAME` lets the instruct model in a folder or on the Hub write them. Of several, as in
            `own+template+model:NAME`, each fills what those before it leave.
        seed: Seed of the openings and of the model's sampling.
        load: Loads the model that a source `model:NAME` names, and its tokenizer; such a source needs it.
        progress: Told how many facts a model has written for.

    Returns:
        `count` prompts for each fact, and where they came from.

    Raises:
        UsageError: No such source, a negative count, more than the source has for every fact, or a model without
            `load`.
        RetentionBenchError: A fact has too few, and is named. Also what `load` raises.
    """
    sources = parse_source(source, count)
    if count < 0:
        raise UsageError(f"{count} paraphrases a fact were asked for. Give 0 or more.")
    facts = list(facts)
    counts = dict.fromkeys(sources.names, 0)
    prompts: dict[str, tuple[str, ...]] = {}
    for fact in facts:
        found = {fact.prompt.casefold(): fact.prompt}
        for name in sources.names:
            for prompt in _PICK[name](fact, seed) if name in _PICK else ():
                if len(found) <= count and prompt.casefold() not in found:
                    found[prompt.casefold()] = prompt
                    counts[name] += 1
        prompts[fact.id] = tuple(found.values())[1:]
        if len(prompts[fact.id]) < count and sources.model is None:
            raise _too_few(fact, source, len(prompts[fact.id]), count)
    lacking = [fact for fact in facts if len(prompts[fact.id]) < count]
    if sources.model is not None and lacking:
        if load is None:
            raise UsageError(
                f"The paraphrase source {source!r} needs its model. Give augment `load`, or another source."
            )
        model, tokenizer = load(sources.model)
        prompts |= write_paraphrases(
            model, tokenizer, lacking, count, seed=seed, name=sources.model, had=dict(prompts), progress=progress
        )
        counts[sources.names[-1]] = count * len(facts) - sum(counts.values())
    return Augmented(prompts, counts)


def _too_few(fact: Fact, source: str, found: int, count: int) -> RetentionBenchError:
    has, more = (
        f"{source} gives {found} paraphrases of it",
        f"{source}+{MODEL}NAME for an instruct model that writes them",
    )
    if source == "own":
        has = f"it has {found} paraphrases of its own in which the subject {fact.subject!r} stands"
        more = f"own+template, or {more}"
    return RetentionBenchError(
        f"Fact {fact.id!r}: {has}, and {count} are wanted. Ask for fewer, leave the fact out, or add a source: {more}."
    )


def unseen(facts: FactSet, prompts: Mapping[str, Sequence[str]]) -> FactSet:
    """Facts without those of their paraphrases that they were edited with, which would not test the edit.

    Args:
        facts: The facts.
        prompts: By fact id the prompts of its edit.
    """

    def kept(fact: Fact) -> Fact:
        used = {_plain(prompt.replace("{}", fact.subject)) for prompt in prompts.get(fact.id, ())}
        rest = tuple(text for text in fact.paraphrases if _plain(text) not in used)
        return dataclasses.replace(fact, paraphrases=rest)

    return FactSet.of(kept(fact) for fact in facts)


def _plain(text: str) -> str:
    """What two prompts share that differ in capitals and spaces alone, as a model's may from a fact's own."""
    return " ".join(text.casefold().split())


def _own(fact: Fact, seed: int) -> Iterator[str]:
    """A fact's paraphrases, each with the subject's last occurrence taken out."""
    for text in fact.paraphrases:
        before, subject, after = text.rpartition(fact.subject)
        prompt = f"{before}{{}}{after}".rstrip()
        if subject and "{}" not in text and prompt.count("{}") == 1:
            yield prompt


def _template(fact: Fact, seed: int) -> Iterator[str]:
    """A fact's prompt behind openings, drawn in an order of the fact's own."""
    for opening in random.Random(f"{seed} {fact.id}").sample(OPENINGS, len(OPENINGS)):
        yield opening + _behind(opening, fact.prompt)


def _behind(opening: str, prompt: str) -> str:
    """A prompt as it is written behind an opening."""
    begins = opening.rstrip().endswith((".", ":", "?"))
    if begins or prompt.split(" ", 1)[0] not in _WITHIN:
        return prompt
    return prompt[0].lower() + prompt[1:]


_PICK: dict[str, Callable[[Fact, int], Iterator[str]]] = {"own": _own, "template": _template}
