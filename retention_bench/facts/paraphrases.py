"""More prompts to edit a fact with: its own paraphrases, its prompt behind an opening, or a model's paraphrases."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def check_source(source: str, count: int = 0) -> None:
    """Refuse a source of paraphrases that there is not, or that has fewer than `count` for any fact.

    Raises:
        UsageError: It is none of `own`, `template` and `model:` with a name, or has too few.
    """
    if source not in _PICK and (not source.startswith(MODEL) or source == MODEL):
        error = unknown_name("paraphrase source", source, [*_PICK, f"{MODEL}NAME"])
        raise UsageError(f"{error} NAME is an instruct model's folder or Hub id.")
    if source == "template" and count > len(OPENINGS):
        raise UsageError(
            f"The paraphrase source 'template' has {len(OPENINGS)} openings, and {count} paraphrases a fact were asked "
            f"for. Ask for {len(OPENINGS)} at most, or give {MODEL}NAME for an instruct model that writes them."
        )


def augment(
    facts: Iterable[Fact],
    count: int,
    source: str,
    *,
    seed: int,
    load: Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    progress: Progress = silent,
) -> dict[str, tuple[str, ...]]:
    """Find more prompts for facts, in the form of `Fact.prompt`.

    Args:
        facts: The facts.
        count: Prompts for each. The first of them are those that a smaller count gives, except for a model's.
        source: `own` takes a fact's paraphrases, in their order; `template` puts the fact's prompt behind one of
            `OPENINGS`; `model:NAME` lets the instruct model in a folder or on the Hub write them.
        seed: Seed of the openings and of the model's sampling.
        load: Loads the model that a source `model:NAME` names, and its tokenizer; such a source needs it.
        progress: Told how many facts a model has written for.

    Returns:
        By fact id `count` prompts with `{}` once, where the subject goes, that differ from each other and from the
        fact's own.

    Raises:
        UsageError: No such source, a negative count, more than the source has for every fact, or a model without
            `load`.
        RetentionBenchError: A fact has too few, and is named. Also what `load` raises.
    """
    check_source(source, count)
    if count < 0:
        raise UsageError(f"{count} paraphrases a fact were asked for. Give 0 or more.")
    facts = list(facts)
    if count == 0:
        return {fact.id: () for fact in facts}
    if not source.startswith(MODEL):
        return {fact.id: _PICK[source](fact, count, seed) for fact in facts}
    if load is None:
        raise UsageError(f"The paraphrase source {source!r} needs its model. Give augment `load`, or another source.")
    name = source.removeprefix(MODEL)
    model, tokenizer = load(name)
    return write_paraphrases(model, tokenizer, facts, count, seed=seed, name=name, progress=progress)


def unseen(facts: FactSet, prompts: Mapping[str, Sequence[str]]) -> FactSet:
    """Facts without those of their paraphrases that they were edited with, which would not test the edit.

    Args:
        facts: The facts.
        prompts: By fact id the prompts of its edit.
    """

    def kept(fact: Fact) -> Fact:
        used = {prompt.replace("{}", fact.subject).rstrip() for prompt in prompts.get(fact.id, ())}
        rest = tuple(text for text in fact.paraphrases if text.rstrip() not in used)
        return dataclasses.replace(fact, paraphrases=rest)

    return FactSet.of(kept(fact) for fact in facts)


def _own(fact: Fact, count: int, seed: int) -> tuple[str, ...]:
    """A fact's first paraphrases, each with the subject's last occurrence taken out."""
    found: dict[str, None] = {}  # ordered, each once
    for text in fact.paraphrases:
        before, subject, after = text.rpartition(fact.subject)
        prompt = f"{before}{{}}{after}".rstrip()
        if subject and "{}" not in text and prompt.count("{}") == 1 and prompt != fact.prompt:
            found[prompt] = None
    if len(found) < count:
        raise RetentionBenchError(
            f"Fact {fact.id!r}: it has {len(found)} paraphrases of its own in which the subject {fact.subject!r} "
            f"stands, and {count} are wanted. Ask for fewer, leave the fact out, or give another source: template, or "
            f"{MODEL}NAME for an instruct model that writes them."
        )
    return tuple(found)[:count]


def _template(fact: Fact, count: int, seed: int) -> tuple[str, ...]:
    """A fact's prompt behind openings, drawn in an order of the fact's own."""
    drawn = random.Random(f"{seed} {fact.id}").sample(OPENINGS, len(OPENINGS))[:count]
    return tuple(opening + _behind(opening, fact.prompt) for opening in drawn)


def _behind(opening: str, prompt: str) -> str:
    """A prompt as it is written behind an opening."""
    begins = opening.rstrip().endswith((".", ":", "?"))
    if begins or prompt.split(" ", 1)[0] not in _WITHIN:
        return prompt
    return prompt[0].lower() + prompt[1:]


_PICK = {"own": _own, "template": _template}
