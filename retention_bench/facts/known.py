"""The known-fact filter (protocol, "Facts"): keep what the base model knows with a margin."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from retention_bench.facts.fact import Fact, FactSet
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
                for (index, _), row in zip(chunk, probabilities, strict=True):
                    fact = facts.facts[index]
                    token = target_token(fact.target_true, tokenizer)
                    target = 0.0 if token is None else row[token].item()
                    if token is not None:
                        row[token] = -1.0
                    found[index] = Knowledge(fact, target, row.max().item())
                progress("known-fact filter", len(found), len(facts))
    return [found[index] for index in range(len(facts))]
