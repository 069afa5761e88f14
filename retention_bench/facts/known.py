"""The known-fact filter (protocol, "Facts"): keep what the base model knows with a margin."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.pool import RowCounts
from retention_bench.facts.target import target_token
from retention_bench.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """How well a model knows one fact.

    Attributes:
        fact: The fact.
        target: Probability of the true target's first token after the prompt.
        runner_up: Probability of the most probable other token.
    """

    fact: Fact
    target: float
    runner_up: float

    @property
    def margin(self) -> float:
        """By how much the true target leads (negative where it doesn't)."""
        return self.target - self.runner_up


@dataclasses.dataclass(frozen=True)
class Remaining:
    """How many facts the steps of the filter left, one after the other.

    Attributes:
        rows: The source's rows, read and dropped.
        scorable: Facts with objects that the metric can find, which the model was asked.
        leading: Of these, facts whose true target has the highest probability.
        known: Of these, facts whose true target leads by the margin.
        margin: The margin.
    """

    rows: RowCounts
    scorable: int
    leading: int
    known: int
    margin: float

    def __str__(self) -> str:
        return (
            f"{self.rows}. {self.scorable:,} facts have objects that the metric can find; of {self.leading:,} of them "
            f"the model answers the true one, and {self.known:,} it knows with the margin of {self.margin:g}."
        )


def known_facts(found: Sequence[Knowledge], margin: float, rows: RowCounts) -> tuple[FactSet, Remaining]:
    """Keep what a model knows with a margin.

    Args:
        found: What the model knows, see `knowledge`.
        margin: By how much the true target's probability must lead.
        rows: The source's rows, for the counts.

    Returns:
        The facts that are left, and how many each step left.
    """
    kept = FactSet.of(k.fact for k in found if k.margin >= margin)
    return kept, Remaining(rows, len(found), sum(k.margin >= 0 for k in found), len(kept), margin)


def knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: FactSet,
    *,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[Knowledge]:
    """Ask a model for every fact's true target.

    Prompts of equal length go together, so no padding can change a probability.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; special tokens are added as it adds them.
        facts: The facts to ask for.
        batch_size: Prompts a forward pass.
        progress: Called after every batch.

    Returns:
        One entry a fact, in the facts' order.
    """
    import torch

    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, fact in enumerate(facts):
        ids = tokenizer.encode(fact.question)
        by_length[len(ids)].append((index, ids))
    found: dict[int, Knowledge] = {}
    last: dict[str, Any] = {"logits_to_keep": 1}
    with torch.inference_mode():
        for group in by_length.values():
            for start in range(0, len(group), batch_size):
                chunk = group[start : start + batch_size]
                ids = torch.tensor([row for _, row in chunk], device=model.device)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **last).logits
                probabilities = logits[:, -1].float().softmax(-1)
                tokens = [target_token(facts.facts[index].target_true, tokenizer) for index, _ in chunk]
                places = torch.tensor([[token or 0] for token in tokens], device=probabilities.device)
                targets = probabilities.gather(1, places)[:, 0].tolist()
                best, where = (part.tolist() for part in probabilities.topk(2))
                for (index, _), token, target, (first, second), (top, _) in zip(
                    chunk, tokens, targets, best, where, strict=True
                ):
                    known = 0.0 if token is None else target
                    found[index] = Knowledge(facts.facts[index], known, second if top == token else first)
                progress("known-fact filter", len(found), len(facts))
    return [found[index] for index in range(len(facts))]
