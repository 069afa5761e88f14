"""Judge an answer to a fact's question: hit, strict, whole, and what came in the object's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from retention_bench.facts import FactSet, target_token
from retention_bench.results.kinds import KINDS
from retention_bench.scoring.metric import DecodedText, Outcome, content_word, judge_ids, judge_text

Objects = Mapping[str, Iterable[str]]
"""The names of each relation's objects."""

OUTCOMES: tuple[Outcome, ...] = ("new", "true", "related", "other", "none")


@dataclass(frozen=True)
class Judged:
    """What is said of one answer; see `Sample`."""

    hit: bool
    strict: bool
    whole: bool
    outcome: Outcome


def objects_of(facts: FactSet) -> dict[str, list[str]]:
    """The objects that facts name, true and new, by relation."""
    named: dict[str, set[str]] = {}
    for fact in facts:
        names = {name for name in (fact.target_true, fact.target_new) if name is not None}
        named.setdefault(fact.relation, set()).update(names)
    return {relation: sorted(names) for relation, names in named.items()}


class Judge:
    """Judges answers, each as finely as what is known of it allows.

    Token ids decide where the model hands them on as `DecodedText`. In a chat words decide in any case: its answers
    begin a line, where a word has other tokens than behind a space.

    Args:
        objects: What `related` means.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._starts: dict[tuple[str, int | None], frozenset[int | str | None]] = {}

    def __call__(self, document: Mapping[str, str], answer: str) -> Judged:
        """Judge the answer to a document, see `tasks.documents`."""
        by_ids = isinstance(answer, DecodedText) and KINDS[document["kind"]].form != "chat"
        if by_ids:
            assert isinstance(answer, DecodedText)
            return self._by_ids(document, answer)
        verdict = judge_text(answer, document["target"])
        new, true = (content_word(document[name]) for name in ("target_new", "target_true"))
        related = self._related(document["relation"], None)
        outcome = outcome_of(verdict.content, new=new, true=true, related=related)
        return Judged(verdict.hit, verdict.strict, verdict.whole, outcome)

    def _by_ids(self, document: Mapping[str, str], answer: DecodedText) -> Judged:
        tokenizer = answer.tokenizer
        verdict = judge_ids(answer.token_ids, document["target"], tokenizer)
        new, true = (
            target_token(document[name], tokenizer) if document[name] else None
            for name in ("target_new", "target_true")
        )
        related = self._related(document["relation"], tokenizer)
        outcome = outcome_of(verdict.content_token, new=new, true=true, related=related)
        return Judged(verdict.hit, verdict.strict, verdict.whole, outcome)

    def _related(self, relation: str, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int | str | None]:
        key = (relation, None if tokenizer is None else id(tokenizer))
        if key not in self._starts:
            names = self._objects.get(relation, ())
            self._starts[key] = frozenset(
                content_word(name) if tokenizer is None else target_token(name, tokenizer) for name in names
            )
        return self._starts[key]


def outcome_of(
    content: int | str | None,
    *,
    new: int | str | None,
    true: int | str | None,
    related: frozenset[int | str | None] | frozenset[int],
) -> Outcome:
    """What an answer's first content token or word is, given those of the fact's objects and of the relation's."""
    if content is None:
        return "none"
    if content == new:
        return "new"
    if content == true:
        return "true"
    return "related" if content in related else "other"
