"""MALMEN (Tan et al. 2024, arXiv 2311.04661): a hyper-network, trained first, turns gradients into an edit."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.data.durable import set_aside
from retention_bench.display import plain
from retention_bench.editors.base import EditContext, EditRequest
from retention_bench.editors.locate.subject import check_requests
from retention_bench.editors.malmen.fit import Training, load_networks, new_networks, save_networks
from retention_bench.editors.malmen.steps import (
    MetaLosses,
    Question,
    as_delta,
    batches,
    equation,
    join,
    meta_step,
    read_gradients,
)
from retention_bench.editors.settings import Count, Layers, NonNegative, Positive, Rank
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.models import WeightDelta, frozen

T = TypeVar("T")

_log = logging.getLogger("retention_bench")

RESULT = "malmen.safetensors"
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 60.0
"""Seconds between two checkpoints: a fit that is cut off loses no more than these and the step it was in."""


@dataclass(frozen=True)
class MALMEN:
    """Meta-learned editing of many facts at once. Defaults are the authors' (their zsRE run), but for `steps`.

    Attributes:
        layers: Layers that are edited, ascending, counted from 0; the authors take a model's last six.
        edits_per_model: Facts written into one copy of the model; None for all.
        rank: Rank of the hyper-network's blocks.
        n_blocks: Its number of blocks.
        lr: Every layer's learning rate in the edit, before it is trained.
        meta_lr: Adam's learning rate for the hyper-network.
        loc_coef: Weight of the locality loss.
        max_grad_norm: The hyper-network's gradients are clipped to this norm.
        editor_batch_size: Answer tokens that go through the hyper-network at once; does not change the result.
        batch_size: Rows in a forward pass of the model. The gradients are those of the mean over so many rows.
        n_edits: Facts in a meta step; the hyper-network learns to edit about as many at once.
        steps: Meta steps. Our choice: the authors make one pass over their training set.
    """

    layers: Layers
    edits_per_model: Count | None = None
    rank: Rank = 1920
    n_blocks: Rank = 2
    lr: Positive = 1e-6
    meta_lr: Positive = 1e-5
    loc_coef: NonNegative = 1.0
    max_grad_norm: Positive = 1.0
    editor_batch_size: Count = 1024
    batch_size: Count = 32
    n_edits: Count = 512
    steps: Count = 500

    name: ClassVar[str] = "malmen"
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: FactSet,
        folder: Path,
        context: EditContext,
    ) -> None:
        """Train the hyper-networks; see `FittedEditor.fit`.

        A meta step edits `n_edits` facts, and takes the loss on their paraphrases and on facts that shall stay as they
        are. Random draws begin where the context's generator stands, which is not advanced.

        Raises:
            UsageError: Too few facts, one without `target_new`, no generator, a layer that the model lacks, or a
                folder with another fit.
            RetentionBenchError: A loss or a gradient is not finite; the step is named.
        """
        self._check_facts(facts)
        if context.generator is None:
            raise UsageError("MALMEN's fit draws facts at random. Put a seeded generator into the EditContext.")
        generator = context.generator.clone_state()
        about = {**self._fit_settings(), "facts": facts.sha256, "seed": generator.initial_seed()}
        result, checkpoint = folder / RESULT, folder / CHECKPOINT
        if _whole(result, lambda: load_networks(result, model, about)):
            return
        training = _whole(checkpoint, lambda: Training.load(checkpoint, model, about, self.meta_lr))
        if training is None:
            networks = new_networks(
                model, self.layers, rank=self.rank, n_blocks=self.n_blocks, lr=self.lr, generator=generator
            )
            training = Training.of(networks, self.meta_lr, generator)
        saved = time.monotonic()
        with frozen(model):
            while training.step < self.steps:
                losses = self._step(model, tokenizer, facts.facts, training)
                if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    training.save(checkpoint, model, about)
                    saved = time.monotonic()
                context.progress("MALMEN fit", training.step, self.steps, losses.means())
        save_networks(result, model, training.networks, about)
        checkpoint.unlink(missing_ok=True)

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        context: EditContext,
    ) -> WeightDelta:
        """Write all requests with one solve per layer, in which each prompt of a request is a row; see `Editor.edit`.

        The delta has low rank where there are fewer answer tokens than a projection has inputs and outputs.

        Raises:
            UsageError: No requests, no fit, or one with other settings or for another model.
            RetentionBenchError: The fit's file is missing or broken, or a loss is not finite; facts are named.
        """
        check_requests(requests)
        if context.fitted is None:
            raise UsageError(
                "MALMEN edits with a hyper-network that is trained first. Call its fit on this model, and put the "
                "folder into the EditContext as fitted."
            )
        networks = load_networks(context.fitted / RESULT, model, self._fit_settings())
        questions = [
            Question(request.fact_id, prompt.replace("{}", request.subject), request.target_new)
            for request in requests
            for prompt in request.prompts
        ]
        parts = batches(tokenizer, questions, self.batch_size, model.device)
        found = []
        with frozen(model):
            for part in parts:
                gradients, loss = read_gradients(model, self.layers, part, self.batch_size)
                found.append(gradients)
                context.progress("MALMEN gradients", len(found), len(parts), {"loss": loss})
        rows, shifts = join(found), {}
        for layer, (network, module) in networks.items():
            shifts[layer] = equation(network, module, *rows[layer], self.editor_batch_size).shift()
            context.progress("MALMEN layers", len(shifts), len(networks))
        return as_delta(model, shifts)

    def _step(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        training: Training,
    ) -> MetaLosses:
        """One meta step: draw facts, take the gradients, clip them, and let Adam step."""
        drawn = [
            batches(tokenizer, questions, self.batch_size, model.device)
            for questions in _draw(facts, self.n_edits, training.generator)
        ]
        training.step += 1
        training.adam.zero_grad()
        try:
            losses = meta_step(
                model,
                training.networks,
                *drawn,
                batch_size=self.batch_size,
                loc_coef=self.loc_coef,
                rows_per_forward=self.editor_batch_size,
            )
        except RetentionBenchError as error:
            raise RetentionBenchError(f"Step {training.step} of MALMEN's fit: {error}") from error
        norm = torch.nn.utils.clip_grad_norm_(training.weights, self.max_grad_norm)
        if not norm.isfinite():
            raise RetentionBenchError(
                f"Step {training.step} of MALMEN's fit: the hyper-network's gradient became {norm:g}. Lower lr or "
                "meta_lr."
            )
        training.adam.step()
        return losses

    def _fit_settings(self) -> dict[str, Any]:
        """The settings that a fit depends on, as JSON has them."""
        settings = dataclasses.asdict(self) | {"layers": list(self.layers)}
        return {name: settings[name] for name in settings if name not in ("edits_per_model", "editor_batch_size")}

    def _check_facts(self, facts: FactSet) -> None:
        if len(facts) <= self.n_edits:
            raise UsageError(
                f"MALMEN was given {len(facts)} facts to train on, and n_edits is {self.n_edits}. Each step takes "
                "n_edits facts, and at least one more for the locality loss. Lower n_edits, or give more facts."
            )
        for fact in facts.intrinsic:
            raise UsageError(
                f"Fact {fact.id!r} has no target_new, so MALMEN cannot train on writing it. Leave it out, or give it "
                "one."
            )


def _whole(path: Path, load: Callable[[], T]) -> T | None:
    """What a file of an earlier run holds, or None where there is none; a damaged one is set aside with a warning.

    Raises:
        UsageError: It is of another fit.
    """
    if not path.is_file():
        return None
    try:
        return load()
    except UsageError:
        raise
    except RetentionBenchError as error:
        aside = set_aside(path)
        _log.warning("%s", plain(f"The MALMEN fit begins anew: {error} It was set aside as {aside}."))
        return None


def _draw(
    facts: Sequence[Fact], count: int, generator: torch.Generator
) -> tuple[list[Question], list[Question], list[Question]]:
    """Draw the facts of a meta step, and make its three kinds of questions of them.

    A fact is edited with its prompt, and asked by one of its paraphrases, or by its prompt where it has none. Locality
    is asked by one of its neighborhood prompts, with the true object. Where it has none, or only prompts that the step
    itself edits, it is asked by the prompt and true object of a fact that the step does not edit.

    Args:
        facts: More than `count`.
        count: How many are drawn.
        generator: On the CPU; it is advanced.

    Returns:
        Edits, equivalents and unrelated questions.
    """
    order = torch.randperm(len(facts), generator=generator).tolist()
    drawn, left = [facts[index] for index in order[:count]], order[count:]
    written = {fact.question for fact in drawn}

    def index(options: Sequence) -> int:
        return int(torch.randint(len(options), (), generator=generator))

    edits, equivalents, unrelated = [], [], []
    for fact in drawn:
        assert fact.target_new is not None
        edits.append(Question(fact.id, fact.question, fact.target_new))
        prompts = fact.paraphrases or (fact.question,)
        equivalents.append(Question(fact.id, prompts[index(prompts)], fact.target_new))
        near = [prompt for prompt in fact.neighborhood if prompt not in written]
        if near:
            unrelated.append(Question(fact.id, near[index(near)], fact.target_true))
        else:
            other = facts[left[index(left)]]
            unrelated.append(Question(other.id, other.question, other.target_true))
    return edits, equivalents, unrelated
