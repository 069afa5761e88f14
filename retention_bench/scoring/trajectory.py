"""Follow facts through a fine-tune: what is answered, and between which tokens the probability moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.facts import Fact, FirstTokens, first_tokens, token_text
from retention_bench.scoring.hf import RetentionHFLM
from retention_bench.scoring.judge import outcome_of
from retention_bench.scoring.metric import Outcome, judge_ids
from retention_bench.scoring.prefixes import Prompt

TOP = 5
"""How many of the most probable tokens are kept."""


@dataclass(frozen=True)
class Point:
    """One fact at one moment of a fine-tune: the token classes of the paper's figure 4.

    The probabilities are those of the token right after the prompt, each object standing for its first content token.
    Where one of a fact's objects begins with a lone space (see `facts.target`), the space is passed over, as by the
    metric: the tokens behind it take its probability. So they add up to 1 under any tokenizer, unless the old object
    and the new one begin with the same token. Where the model puts out no number, as one that diverged, they are None
    and `top` is empty.

    Attributes:
        fact_id: The fact.
        kind: `"edited"`, `"intrinsic"` or `"intrinsic_matched"`.
        hit: What the retention metric says.
        outcome: What the first content token of the answer is, as in `Sample`.
        true: Probability of the original object.
        edited: Probability of the new object; None for an intrinsic fact.
        related: Of all other objects of the same relation.
        other: Of all other tokens.
        top: The most probable tokens and their probabilities, `TOP` of them.
    """

    fact_id: str
    kind: str
    hit: bool
    outcome: Outcome
    true: float | None
    edited: float | None
    related: float | None
    other: float | None
    top: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """The point as plain JSON values."""
        return asdict(self)


class Follower:
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
        starts = {
            relation: {first_tokens(text, tokenizer) for text in set(texts)} for relation, texts in objects.items()
        }
        self._classes = [_Classes.of(fact, starts.get(fact.relation, set()), tokenizer) for fact in self._facts]

    @torch.inference_mode()
    def look(self) -> list[Point]:
        """Ask all facts.

        Returns:
            A point a fact, in their order.
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
            self._point(fact, classes, [found[(*prompt, *lead)] for lead in classes.leads], answers[prompt])
            for fact, classes, prompt in zip(self._facts, self._classes, prompts, strict=True)
        ]

    def _point(self, fact: Fact, classes: _Classes, rows: Sequence[torch.Tensor], answer: Sequence[int]) -> Point:
        kind = "edited" if fact.target_new is not None else "intrinsic_matched" if fact.matched else "intrinsic"
        verdict = judge_ids(answer, fact.target, self._tokenizer)
        content, named = verdict.content_token, frozenset(classes.related)
        outcome = outcome_of(content, new=classes.new, true=classes.true, related=named)
        row = _passing_over(classes.leads, rows)
        if not row.isfinite().all():
            return Point(fact.id, kind, verdict.hit, outcome, None, None, None, None, ())
        true, new, related = classes.true, classes.new, classes.related
        every = sorted({true, *([] if new is None else [new]), *related})
        top = row.topk(TOP)
        return Point(
            fact_id=fact.id,
            kind=kind,
            hit=verdict.hit,
            outcome=outcome,
            true=row[true].item(),
            edited=None if new is None else row[new].item(),
            related=row[related].sum().item(),
            other=max(0.0, 1.0 - row[every].sum().item()),
            top=tuple(
                (token_text(token, self._tokenizer), value)
                for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ),
        )


@dataclass(frozen=True)
class _Classes:
    """The tokens that stand for a fact's objects.

    Attributes:
        true: For the original object.
        new: For the new one, if there is one.
        related: For other objects of the same relation.
        leads: What is read behind the prompt: nothing, and the lone space where an object begins with one.
    """

    true: int
    new: int | None
    related: list[int]
    leads: list[tuple[int, ...]]

    @classmethod
    def of(cls, fact: Fact, objects: Set[FirstTokens], tokenizer: PreTrainedTokenizerBase) -> _Classes:
        starts = {
            text: first_tokens(text, tokenizer) for text in (fact.target_true, fact.target_new) if text is not None
        }
        true = starts[fact.target_true].token
        new = None if fact.target_new is None else starts[fact.target_new].token
        assert true is not None  # facts that the metric cannot find have been left out
        every = objects | set(starts.values())
        leads = {start.lead[:end] for start in every for end in range(len(start.lead) + 1)}
        related = {start.token for start in objects if start.token is not None} - {true, new}
        return cls(true, new, sorted(related), sorted(leads))


def _passing_over(leads: Sequence[tuple[int, ...]], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Probabilities of the token that comes first where lone spaces are passed over, (vocabulary).

    Args:
        leads: What is passed over; sorted, so that each follows those that it begins with. The first is empty.
        rows: Probabilities of the token behind the prompt and each of them, (vocabulary).
    """
    chances: dict[tuple[int, ...], torch.Tensor] = {(): rows[0].clone()}
    for lead, row in zip(leads[1:], rows[1:], strict=True):
        chances[lead] = row * chances[lead[:-1]][lead[-1]]
        chances[lead[:-1]][lead[-1]] = 0.0
    return torch.stack([*chances.values()]).sum(0)
