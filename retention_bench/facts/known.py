"""The known-fact filter (protocol, "Facts"): keep what the base model knows with a margin."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retention_bench.display.progress import Progress, silent
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.pool import RowCounts
from retention_bench.facts.target import first_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """How well a model knows one fact.

    Where the true target begins with a lone space (see `target.py`), the model is asked twice, as the metric passes
    over the space: right behind the prompt, and behind the space if that is what the model says. What leads by more
    counts.

    Attributes:
        fact: The fact.
        target: Probability of the true target's first content token, behind the prompt or the lone space.
        runner_up: Probability of the most probable other token there.
        lead: By how much the lone space leads behind the prompt, where it is asked behind the space; else 1.
    """

    fact: Fact
    target: float
    runner_up: float
    lead: float = 1.0

    @property
    def margin(self) -> float:
        """By how much the true target leads, up to its first content token (negative where it doesn't)."""
        return min(self.lead, self.target - self.runner_up)


@dataclasses.dataclass(frozen=True)
class Remaining:
    """How many facts the steps of the filter left, one after the other.

    Attributes:
        rows: The source's rows, read and dropped.
        scorable: Facts with objects that the metric can find and tell apart, which the model was asked.
        leading: Of these, facts whose true target has the highest probability.
        known: Of these, facts whose true target leads by the margin.
        margin: The margin.
        left_out: What became of the others, in words; empty if there are none.
    """

    rows: RowCounts
    scorable: int
    leading: int
    known: int
    margin: float
    left_out: str = ""

    def __str__(self) -> str:
        others = f" ({self.left_out})" if self.left_out else ""
        return (
            f"{self.rows}. {self.scorable:,} facts have objects that the metric can tell{others}; of {self.leading:,} "
            f"of them the model answers the true one, and {self.known:,} it knows with the margin of {self.margin:g}."
        )


def known_facts(
    found: Sequence[Knowledge], margin: float, rows: RowCounts, left_out: str = ""
) -> tuple[FactSet, Remaining]:
    """Keep what a model knows with a margin.

    Args:
        found: What the model knows, see `knowledge`.
        margin: By how much the true target's probability must lead.
        rows: The source's rows, for the counts.
        left_out: What the model was not asked, in words, for the same.

    Returns:
        The facts that are left, and how many each step left.
    """
    kept = FactSet.of(k.fact for k in found if k.margin >= margin)
    return kept, Remaining(rows, len(found), sum(k.margin >= 0 for k in found), len(kept), margin, left_out)


def knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: FactSet,
    *,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[Knowledge]:
    """How well a model knows each fact: the probabilities of its true target and of the runner-up.

    Prompts of equal length go together, so no padding can change a probability. What is longer than the model's context
    is not known.

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

    config = getattr(model, "config", None)
    context = config and getattr(config.get_text_config(), "max_position_embeddings", None)
    # Every token that is asked for: whose it is, behind which ids, and which one. For a fact these are its first
    # content token, the lone space, if there is one, and its first content token behind that.
    asked: dict[int, list[tuple[int, list[int], int | None]]] = defaultdict(list)
    for index, fact in enumerate(facts):
        first = first_tokens(fact.target_true, tokenizer)
        prompt = tokenizer.encode(fact.question)
        if context and len(prompt) + len(first.lead) > context:
            continue
        for place in range(len(first.lead) + 1):
            ids = [*prompt, *first.lead[:place]]
            asked[len(ids)] += [(index, ids, token) for token in (first.token, *first.lead[place : place + 1])]
    chances: dict[int, list[tuple[float, float]]] = defaultdict(list)
    total, done = sum(map(len, asked.values())), 0
    last: dict[str, Any] = {"logits_to_keep": 1}
    with torch.inference_mode():
        for _, group in sorted(asked.items()):
            for start in range(0, len(group), batch_size):
                chunk = group[start : start + batch_size]
                rows = torch.tensor([ids for _, ids, _ in chunk], device=model.device)
                logits = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, **last).logits
                probabilities = logits[:, -1].float().softmax(-1)
                places = torch.tensor([[token or 0] for _, _, token in chunk], device=probabilities.device)
                targets = probabilities.gather(1, places)[:, 0].tolist()
                best, where = (part.tolist() for part in probabilities.topk(2))
                for (index, _, token), target, (first, second), (top, _) in zip(
                    chunk, targets, best, where, strict=True
                ):
                    chance = 0.0 if token is None else target
                    chances[index].append((chance, second if top == token else first))
                done += len(chunk)
                progress("known-fact filter", done, total)

    def found(index: int, fact: Fact) -> Knowledge:
        if index not in chances:
            return Knowledge(fact, 0.0, 1.0)
        ways, lead = [], 1.0
        for number, (target, runner_up) in enumerate(chances[index]):  # shorter ids come first: in the order asked for
            if number % 2 == 0:
                ways.append(Knowledge(fact, target, runner_up, lead))
            else:
                lead = min(lead, target - runner_up)
        return max(reversed(ways), key=lambda way: way.margin)

    return [found(index, fact) for index, fact in enumerate(facts)]
