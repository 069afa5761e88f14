"""Placebo editors: no change, a random change as large as another editor's, and another editor's change scaled.

They are edits like all others, so whatever is measured of an edit is measured of them too, and says what the harness
itself does (MEASURES, "Placebos").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.settings import Count, NonNegative
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import object_ids
from retention_bench.models import LowRank, WeightDelta, frozen, last_hidden, log_probabilities, pad

LARGEST_FACTOR = 4.0
"""How far `scaled` goes where even the whole edit is less sure than the base model was."""

TOLERANCE = 1e-3
"""How near the mean probability comes to the one that is matched."""

_ROWS = 64


@dataclass(frozen=True)
class NoEdit:
    """A change of nothing: the null of the harness.

    `scaled:0:EDITOR` is the same in that editor's layers and groups of facts.

    Attributes:
        edits_per_model: Facts of one copy of the model; None for all.
    """

    edits_per_model: Count | None = None

    name: ClassVar[str] = "none"
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """A delta without entries; see `Editor.edit`.

        Raises:
            UsageError: No requests.
        """
        check_requests(requests)
        return WeightDelta({})


@dataclass(frozen=True)
class RandomEdit:
    """A Gaussian change of the same weights, with the same Frobenius norm in each, as another editor's.

    Low-rank changes get Gaussian factors of the same rank. Dense noise of the same norm would spread it over all
    directions of the weight: its largest singular value, and so the most that it does to any one input, would be many
    times smaller than the edit's.

    Attributes:
        of: The other editor, by its name in the suite.
    """

    of: str

    name: ClassVar[str] = "random"
    edits_per_model: ClassVar[None] = None
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Draw the change; see `Editor.edit`. It follows `context.generator` and which facts there are.

        Raises:
            UsageError: No requests, or no edit of the other editor.
        """
        check_requests(requests)
        other = _other(self.name, context)
        # The facts count, so that the edited models of one cell do not all get the same noise.
        seed = context.generator.initial_seed() if context.generator is not None else 0
        told_apart = hashlib.sha256(repr([seed, *(request.fact_id for request in requests)]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(told_apart[:7], "big"))
        norms = other.norms()
        return WeightDelta({name: _noise(entry, norms[name], generator) for name, entry in other.entries.items()})


@dataclass(frozen=True)
class ScaledEdit:
    """Another editor's change times a factor.

    Half an edit must not survive better than the whole one. With `"matched"` the new objects start as sure as what the
    model knew: the factor is found by bisection, so that their mean probability after the edit is that of the facts'
    true objects before it.

    Attributes:
        of: The other editor, by its name in the suite.
        factor: The factor, or `"matched"`.
    """

    of: str
    factor: NonNegative | Literal["matched"]

    name: ClassVar[str] = "scaled"
    edits_per_model: ClassVar[None] = None
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Scale the change; see `Editor.edit`.

        Raises:
            UsageError: No requests, no edit of the other editor, or a request without `target_true` that is matched.
            RetentionBenchError: No factor up to `LARGEST_FACTOR` makes the new objects as sure as the true ones were.
        """
        check_requests(requests)
        other = _other(self.name, context)
        if self.factor != "matched":
            return other.scaled(float(self.factor))
        # A fact counts once and in its own words, however many requests there are about it.
        facts = list({request.fact_id: request for request in reversed(requests)}.values())[::-1]
        for request in facts:
            if request.target_true is None:
                raise UsageError(
                    f"Fact {request.fact_id!r}: its request has no target_true, and the edit shall be matched to how "
                    "sure the model was of it. Give one, or a factor."
                )
        with frozen(model):
            wanted = _probability(model, tokenizer, [(r, str(r.target_true)) for r in facts])

            def reached(factor: float) -> float:
                with other.scaled(factor).applied(model):
                    found = _probability(model, tokenizer, [(r, r.target_new) for r in facts])
                context.progress("matching", 0, 1, {"factor": factor, "probability": found, "wanted": wanted})
                return found

            return other.scaled(_matched(reached, wanted, self.of))


def _other(name: str, context: EditContext) -> WeightDelta:
    if context.delta is None:
        raise UsageError(f"{name} makes its edit of another editor's. Put that into the EditContext as delta.")
    return context.delta


def _noise(entry: Tensor | LowRank, norm: float, generator: torch.Generator) -> Tensor | LowRank:
    """Gaussian noise of an entry's shape, rank and norm."""

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    if isinstance(entry, LowRank):
        left, right = drawn(entry.left), drawn(entry.right)
        return LowRank(left * (norm / (left @ right).norm()), right)
    noise = drawn(entry)
    return noise * (norm / noise.norm())


def _matched(reached: Callable[[float], float], wanted: float, editor: str) -> float:
    """The factor at which a mean probability is the wanted one, by bisection.

    Above the whole edit the factor rises by tenths: far beyond it an edit spoils the model, its own objects too.

    Args:
        reached: Computes the mean probability of the new objects at a factor.
        wanted: That of the true objects before the edit.
        editor: Whose edit it is, for the error.

    Raises:
        RetentionBenchError: The probability is below the wanted one up to `LARGEST_FACTOR`.
    """
    low, high = 0.0, 1.0
    surest = (0.0, 0.0)
    while (found := reached(high)) < wanted - TOLERANCE:
        surest = max(surest, (found, high))
        low, high = high, round(high + 0.1, 1)  # so that the largest is tried too
        if high > LARGEST_FACTOR:
            raise RetentionBenchError(
                f"scaled:matched:{editor}: the new objects have a mean probability of {surest[0]:.3f} at most, at "
                f"{surest[1]:.1f} times the edit, and the true ones had {wanted:.3f} before it. The edit is too weak "
                "to be matched; give it more steps, or give a factor."
            )
    factor = high
    while abs(found - wanted) > TOLERANCE and high - low > 1e-6:
        factor = (low + high) / 2
        found = reached(factor)
        low, high = (factor, high) if found < wanted else (low, factor)
    return factor


@torch.no_grad()
def _probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[EditRequest, str]]
) -> float:
    """The mean probability of objects, each whole and behind its request's prompt (teacher forced)."""
    total = 0.0
    for start in range(0, len(asked), _ROWS):
        prompts, targets = [], []
        for request, target in asked[start : start + _ROWS]:
            prompts.append(tokenizer.encode(request.prompt.replace("{}", request.subject)))
            targets.append(object_ids(target, tokenizer))
        rows = [[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)]
        states = last_hidden(model, *pad(rows, model.device))
        for state, prompt, ids in zip(states, prompts, targets, strict=True):
            predicted = log_probabilities(model, state[len(prompt) - 1 : len(prompt) - 1 + len(ids)])
            total += float(predicted[range(len(ids)), ids].double().sum().exp())
    return total / len(asked)
