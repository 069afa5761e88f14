"""Follow facts through a fine-tune: what is answered, and between which tokens the probability moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.facts import Fact, FirstTokens, first_tokens
from retention_bench.scoring.hf import RetentionHFLM
from retention_bench.scoring.metric import judge_ids
from retention_bench.scoring.prefixes import Prompt

TOP = 5
"""How many of the most probable tokens are kept."""


@dataclass(frozen=True)
class Probe:
    """One fact at one moment of a fine-tune: the token classes of the paper's figure 4.

    The probabilities are those of the first token after the prompt, each object standing for its first content token.
    Where an object begins with a lone space (see `facts.target`), the space is passed over: in its place stand the
    tokens behind it, each with the space's probability times its own. So the probabilities add up to 1 under any
    tokenizer, unless the old object and the new one begin with the same token. Where the model puts out no number, as
    one that diverged, they are None and `top` is empty.

    Attributes:
        fact_id: The fact.
        kind: `"edited"` or `"intrinsic"`.
        hit: What the retention metric says.
        true: Probability of the original object.
        edited: Probability of the new object; None for an intrinsic fact.
        related: Of all other objects of the same relation.
        other: Of all other tokens.
        top: The most probable tokens and their probabilities, `TOP` of them; those behind a lone space with the space.
    """

    fact_id: str
    kind: str
    hit: bool
    true: float | None
    edited: float | None
    related: float | None
    other: float | None
    top: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """The probe as plain JSON values."""
        return asdict(self)


class Prober:
    """Asks a model the same facts again and again; leaves its weights, mode and all random states as they are.

    Args:
        model: A causal language model; it may be in training.
        tokenizer: Its tokenizer.
        facts: What to ask; facts with a `target_new` are the edited ones.
        objects: The objects of each relation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Iterable[Fact],
        objects: Mapping[str, Iterable[str]],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._facts = list(facts)
        starts = {relation: _starts(texts, tokenizer) for relation, texts in objects.items()}
        self._classes = [_Classes.of(fact, starts.get(fact.relation, set()), tokenizer) for fact in self._facts]

    @torch.inference_mode()
    def look(self) -> list[Probe]:
        """Ask all facts.

        Returns:
            A probe a fact, in their order.
        """
        training = self._model.training
        try:
            lm = RetentionHFLM(self._model, self._tokenizer)
            prompts = [lm.prompt_ids(fact.question) for fact in self._facts]
            found: dict[Prompt, torch.Tensor] = {}

            def keep(batch: Sequence[Prompt], logits: torch.Tensor) -> None:
                found.update(zip(batch, logits.softmax(-1).cpu(), strict=True))

            asked = {(*prompt, *lead) for prompt, c in zip(prompts, self._classes, strict=True) for lead in c.leads}
            answers = lm.answer(asked, first=keep)
        finally:
            self._model.train(training)
        return [
            self._probe(fact, classes, [found[(*prompt, *lead)] for lead in classes.leads], answers[prompt])
            for fact, classes, prompt in zip(self._facts, self._classes, prompts, strict=True)
        ]

    def _probe(self, fact: Fact, classes: _Classes, rows: Sequence[torch.Tensor], answer: Sequence[int]) -> Probe:
        kind = "intrinsic" if fact.target_new is None else "edited"
        hit = judge_ids(answer, fact.target, self._tokenizer).hit
        if not all(row.isfinite().all() for row in rows):
            return Probe(fact.id, kind, hit, None, None, None, None, ())
        chances = _chances(classes.leads, rows)
        true, new, related = (
            [
                classes.leads.index(start.lead) * len(rows[0]) + start.token
                for start in starts
                if start.token is not None
            ]
            for starts in (classes.true, classes.new, classes.related)
        )
        top = chances.topk(TOP)
        return Probe(
            fact_id=fact.id,
            kind=kind,
            hit=hit,
            true=chances[true].sum().item(),
            edited=None if fact.target_new is None else chances[new].sum().item(),
            related=chances[related].sum().item(),
            other=max(0.0, 1.0 - chances[sorted({*true, *new, *related})].sum().item()),
            top=tuple(
                (self._text(classes.leads[place // len(rows[0])], place % len(rows[0])), value)
                for place, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ),
        )

    def _text(self, lead: Sequence[int], token: int) -> str:
        return str(self._tokenizer.decode([*lead, token], clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class _Classes:
    """How a fact's objects begin.

    Attributes:
        true: The original object.
        new: The new one, if there is one.
        related: Other objects of the same relation.
        leads: What is read behind the prompt: nothing, and the lone space where an object begins with one.
    """

    true: list[FirstTokens]
    new: list[FirstTokens]
    related: list[FirstTokens]
    leads: list[tuple[int, ...]]

    @classmethod
    def of(cls, fact: Fact, objects: Set[FirstTokens], tokenizer: PreTrainedTokenizerBase) -> _Classes:
        true, new = sorted(_starts([fact.target_true], tokenizer)), sorted(_starts([fact.target_new], tokenizer))
        leads = {start.lead[:end] for start in {*true, *new, *objects} for end in range(len(start.lead) + 1)}
        return cls(true, new, sorted(objects - {*true, *new}), sorted({(), *leads}))


def _starts(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> set[FirstTokens]:
    found = {first_tokens(text, tokenizer) for text in set(texts) if text is not None}
    return {start for start in found if start.token is not None}


def _chances(leads: Sequence[tuple[int, ...]], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Probabilities of what comes first, a lone space passed over.

    Args:
        leads: Sorted, so that each follows those that it begins with.
        rows: Probabilities of the token behind the prompt and each of them, (vocabulary).

    Returns:
        (leads x vocabulary): of a token behind a lead, lead and all; 0 for a token that is passed over itself.
    """
    chances: dict[tuple[int, ...], torch.Tensor] = {}
    for lead, row in zip(leads, rows, strict=True):
        share = chances[lead[:-1]][lead[-1]].item() if lead else 1.0
        if lead:
            chances[lead[:-1]][lead[-1]] = 0.0
        chances[lead] = row * share
    return torch.cat([chances[lead] for lead in leads])
