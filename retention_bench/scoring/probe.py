"""Follow facts through a fine-tune: what is answered, and between which tokens the probability moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.facts import Fact, target_token, token_text
from retention_bench.scoring.hf import RetentionHFLM
from retention_bench.scoring.metric import judge_ids
from retention_bench.scoring.prefixes import Prompt

TOP = 5
"""How many of the most probable tokens are kept."""


@dataclass(frozen=True)
class Probe:
    """One fact at one moment of a fine-tune: the token classes of the paper's figure 4.

    The probabilities are those of the token right after the prompt, each object standing for its first token. They add
    up to 1, unless the old object and the new one begin with the same token. Where the model puts out no number, as one
    that diverged, they are None and `top` is empty.

    Attributes:
        fact_id: The fact.
        kind: `"edited"` or `"intrinsic"`.
        hit: What the retention metric says.
        true: Probability of the original object.
        edited: Probability of the new object; None for an intrinsic fact.
        related: Of all other objects of the same relation.
        other: Of all other tokens.
        top: The most probable tokens and their probabilities, `TOP` of them.
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
        tokens = {relation: _tokens(texts, tokenizer) for relation, texts in objects.items()}
        self._classes = [_classes(fact, tokens.get(fact.relation, set()), tokenizer) for fact in self._facts]

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

            answers = lm.answer(prompts, first=keep)
        finally:
            self._model.train(training)
        return [
            self._probe(fact, classes, found[prompt], answers[prompt])
            for fact, classes, prompt in zip(self._facts, self._classes, prompts, strict=True)
        ]

    def _probe(
        self, fact: Fact, classes: tuple[int, int | None, list[int]], row: torch.Tensor, answer: Sequence[int]
    ) -> Probe:
        true, new, related = classes
        kind = "intrinsic" if fact.target_new is None else "edited"
        hit = judge_ids(answer, fact.target, self._tokenizer).hit
        if not row.isfinite().all():
            return Probe(fact.id, kind, hit, None, None, None, None, ())
        named = sorted({true, *([] if new is None else [new]), *related})
        top = row.topk(TOP)
        return Probe(
            fact_id=fact.id,
            kind=kind,
            hit=hit,
            true=row[true].item(),
            edited=None if new is None else row[new].item(),
            related=row[related].sum().item(),
            other=max(0.0, 1.0 - row[named].sum().item()),
            top=tuple(
                (token_text(token, self._tokenizer), value)
                for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ),
        )


def _tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {token for text in set(texts) if (token := target_token(text, tokenizer)) is not None}


def _classes(fact: Fact, objects: set[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None, list[int]]:
    """The tokens of the original and the new object, and the related ones."""
    true = target_token(fact.target_true, tokenizer)
    new = None if fact.target_new is None else target_token(fact.target_new, tokenizer)
    assert true is not None  # facts that the metric cannot find have been left out
    return true, new, sorted(objects - {true, new})
