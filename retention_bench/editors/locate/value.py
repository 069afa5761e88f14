"""The value that makes a model say a new object, for all facts at once: ROME's v* and MEMIT's and AlphaEdit's z.

For a fact with subject s, delta is added in layer L at the last token of s, to the output of the MLP (ROME) or of the
whole block (MEMIT, AlphaEdit), and fitted by Adam:

    loss = mean over prompts and templates of -log p(target | context, prompt) / |target|
         + kl_factor * KL(p_new || p_old) at the last token of s in "{s} is a"
         + weight_decay * |delta| / |h|^2,        h = that output itself, in the bare prompt

Source: ROME, equation 4, and MEMIT, equation 16, in the form that `compute_v` and `compute_z` share. What differs here
is only how it is computed: facts share a batch, each with its own Adam state, and leave it when they have converged; a
step runs only the tokens from the subject on and the blocks above the change, since delta reaches nothing else; logits
are made only where the loss reads them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.display.progress import Progress, silent
from retention_bench.editors.base import EditRequest
from retention_bench.editors.locate.subject import Row, context_rows, subject_rows, target_ids
from retention_bench.errors import RetentionBenchError
from retention_bench.models import Site, Suffixes, block, log_probabilities, num_layers, pad
from retention_bench.models.kernels import fused_gelu

STOP_LOSS = 5e-2
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults, as in the reference
_LOOK_EVERY = {"cuda": 5}
"""Steps between two looks at the losses, where it is not 1: a GPU must have done all its work for one."""
_KEPT_A_TOKEN = 32
"""Numbers that a layer keeps of a token for the gradient, in multiples of its width: a GPT-2 17, a Llama 21, others
perhaps more."""


def optimise_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    layer: int,
    *,
    site: Site,
    lr: float,
    steps: int,
    weight_decay: float,
    clamp_norm_factor: float,
    kl_factor: float,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Optimise every request's value on a frozen model.

    Args:
        model: The model; call this inside `frozen(model)`.
        tokenizer: Its tokenizer.
        requests: The requests. A paraphrase's rows count in the first term like the prompt's own.
        templates: Context templates without the bare `"{}"`.
        layer: The layer L.
        site: Whose output is optimised.
        lr: Adam's learning rate.
        steps: Forward passes; there is one update fewer, the last pass only reads the loss.
        weight_decay: Factor of the norm penalty.
        clamp_norm_factor: delta is kept no longer than this times |h|.
        kl_factor: Factor of the divergence.
        max_tokens: Tokens from the subject on that a step runs, padding included, if it has more than one fact. What
            the blocks above the layer keep for the gradient, most of the memory, grows with it. None: 2,048,
            and up to 8,192 on a GPU, as its memory allows.
        progress: Told the forward passes done and the mean loss.

    Returns:
        h + delta, [requests, d_model] in float32 on the model's device.

    Raises:
        RetentionBenchError: A loss is not finite; the fact is named.
        UsageError: The model has no such layer.
    """
    facts = [_Fact.of(tokenizer, request, templates) for request in requests]
    block(model, layer)  # refuses a layer that is not there, before anything else
    factors = _Factors(lr, weight_decay, clamp_norm_factor, kl_factor)
    device = model.device.type
    look_every = _LOOK_EVERY.get(device, 1)
    values: dict[int, Tensor] = {}
    with fused_gelu(model, device):
        for numbers in _batches(facts, max_tokens or _tokens(model, layer)):
            before = len(values) * steps
            batch = _Batch.of(model, [facts[number] for number in numbers], layer, site)
            fit = _Fit.of(model, batch, numbers, factors)
            for step in range(1, steps + 1):
                fit.step(step, last=step == steps)
                if step < steps and step % look_every:
                    continue
                _check_finite(fit.loss, fit.batch.facts)
                figures = {"loss": float(fit.loss.mean())}
                progress("value optimisation", before + step * len(numbers), len(requests) * steps, figures)
                going = int(fit.going.sum())
                if step == steps or not going:
                    break
                if going < len(fit.numbers):
                    values |= fit.values(~fit.going)
                    fit = fit.take(fit.going)
            values |= fit.values(torch.ones_like(fit.going))
            progress("value optimisation", len(values) * steps, len(requests) * steps)
    return torch.stack([values[number] for number in range(len(requests))])


class _Factors(NamedTuple):
    """The settings of `optimise_values` that a step needs."""

    lr: float
    weight_decay: float
    clamp_norm: float
    kl: float


@dataclasses.dataclass
class _Fit:
    """A batch of F facts with Adam's state, which a step changes in place, and without asking a GPU for a number.

    All facts in the batch began together, so they share the step that Adam's bias correction counts.

    Attributes:
        model: The model.
        batch: The facts.
        numbers: Their numbers among all requests.
        factors: The settings.
        initial: h [F, d_model].
        delta: What is added to it [F, d_model].
        mean: Adam's first moment [F, d_model].
        square: Adam's second moment [F, d_model].
        going: The facts that have not converged yet; the others stay where they are [F].
        loss: The loss of the last step [F].
        old_kl: The first step's log-probabilities at the divergence rows [F, vocabulary].
    """

    model: PreTrainedModel
    batch: _Batch
    numbers: Sequence[int]
    factors: _Factors
    initial: Tensor
    delta: Tensor
    mean: Tensor
    square: Tensor
    going: Tensor
    loss: Tensor
    old_kl: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, batch: _Batch, numbers: Sequence[int], factors: _Factors) -> _Fit:
        """No step done."""
        initial = batch.initial
        delta, mean, square = (torch.zeros_like(initial) for _ in range(3))
        loss = initial.new_zeros(len(initial))
        going = torch.ones_like(loss, dtype=torch.bool)
        return cls(model, batch, numbers, factors, initial, delta, mean, square, going, loss)

    def take(self, rows: Tensor) -> _Fit:
        """The same for the facts that are marked [F]."""
        tensors = ("initial", "delta", "mean", "square", "going", "loss", "old_kl")
        taken = {name: getattr(self, name)[rows] for name in tensors}
        numbers = [number for number, row in zip(self.numbers, rows.tolist(), strict=True) if row]
        return dataclasses.replace(self, batch=self.batch.take(rows), numbers=numbers, **taken)

    def values(self, rows: Tensor) -> dict[int, Tensor]:
        """The values of the facts that are marked [F], by number."""
        found = zip(self.numbers, self.initial + self.delta, rows.tolist(), strict=True)
        return {number: value for number, value, row in found if row}

    def step(self, step: int, *, last: bool) -> None:
        """Read the losses, and move the facts that are still going unless it is the last step."""
        loss, moved = self._losses()
        if not last:
            self._move(torch.autograd.grad(loss.sum(), moved)[0], step)

    def _losses(self) -> tuple[Tensor, Tensor]:
        """The losses [F], and delta as what their gradient is asked for."""
        moved = self.delta.clone().requires_grad_()
        nll, new_kl = self.batch.forward(self.model, moved)
        if self.old_kl is None:
            self.old_kl = new_kl.detach()
        # KL(p_new || p_old): the references hand F.kl_div its arguments in this order.
        kl = (new_kl.exp() * (new_kl - self.old_kl)).sum(1)
        decay = moved.norm(dim=1) / self.initial.norm(dim=1) ** 2
        loss = nll + self.factors.kl * kl + self.factors.weight_decay * decay
        self.loss.copy_(loss.detach())
        self.going &= self.loss >= STOP_LOSS
        return loss, moved

    def _move(self, gradient: Tensor, step: int) -> None:
        """One of Adam's steps, and what `clamp_norm_factor` leaves of it."""
        rate, root = self.factors.lr / (1 - _BETA1**step), (1 - _BETA2**step) ** 0.5
        self.mean.copy_(_BETA1 * self.mean + (1 - _BETA1) * gradient)
        self.square.copy_(_BETA2 * self.square + (1 - _BETA2) * gradient**2)
        updated = self.delta - rate * self.mean / (self.square.sqrt() / root + _EPSILON)
        length, longest = updated.norm(dim=1), self.factors.clamp_norm * self.initial.norm(dim=1)
        updated = torch.where(length > longest, longest / length, 1.0)[:, None] * updated
        self.delta.copy_(torch.where(self.going[:, None], updated, self.delta))


def _tokens(model: PreTrainedModel, layer: int) -> int:
    """Tokens a step where none are given: on a GPU as many as half of the free memory holds, within limits."""
    if model.device.type != "cuda":
        return 2048
    a_token = _KEPT_A_TOKEN * (num_layers(model) - layer) * model.config.hidden_size * model.dtype.itemsize
    return min(max(torch.cuda.mem_get_info(model.device)[0] // (2 * a_token), 2048), 8192)


@dataclasses.dataclass(frozen=True)
class _Fact:
    """One fact's token rows: its prompts in all templates, the bare one first.

    Attributes:
        request: The fact.
        rows: The rows, without the target.
        kl_row: The tokens up to the subject of "{subject} is a", at whose end the divergence is taken.
        target: Ids of the target's tokens.
    """

    request: EditRequest
    rows: Sequence[Row]
    kl_row: Sequence[int]
    target: Sequence[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, request: EditRequest, templates: Sequence[str]) -> _Fact:
        [kl_row] = subject_rows(tokenizer, ["{} is a"], [request])
        [rows] = context_rows(tokenizer, templates, [request])
        return cls(request, rows, kl_row.ids[: kl_row.subject + 1], target_ids(tokenizer, request))

    @property
    def suffix(self) -> int:
        """Tokens from the subject's last on, in the longest row with the target."""
        return max(len(row.ids) - row.subject for row in self.rows) + len(self.target) - 1


def _batches(facts: Sequence[_Fact], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of the facts that go together: those with as many rows, and of similar length, so little is padding."""
    batch: list[int] = []
    for number in sorted(range(len(facts)), key=lambda number: (len(facts[number].rows), facts[number].suffix)):
        rows, suffix = len(facts[number].rows), facts[number].suffix
        if batch and (rows != len(facts[batch[0]].rows) or (len(batch) + 1) * rows * suffix > max_tokens):
            yield batch
            batch = []
        batch.append(number)
    yield batch


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Facts optimised together: F facts of R rows each, J target tokens at most.

    Attributes:
        facts: The facts.
        prompts: Their F * R rows with the target, from the subject on.
        kl: Their F divergence rows, the subject alone.
        positions: Where each target token is predicted, counted from the subject [F, R, J].
        targets: Ids of the target's tokens, padded with 0 [F, J].
        weights: What each target token's -log p counts, 0 where it is padding [F, J].
    """

    facts: Sequence[_Fact]
    prompts: Suffixes
    kl: Suffixes
    positions: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, facts: Sequence[_Fact], layer: int, site: Site) -> _Batch:
        """Run the facts' rows up to the layer."""
        device = model.device
        longest = max(len(fact.target) for fact in facts)
        rows, begins, positions = [], [], []
        for fact in facts:
            # Ids are joined, not texts, so that the labels stand where they should under any tokenizer. The padding's
            # position repeats the last token's; its weight is 0.
            rows += [[*row.ids, *fact.target[:-1]] for row in fact.rows]
            begins += [row.subject for row in fact.rows]
            steps = [min(j, len(fact.target) - 1) for j in range(longest)]
            positions.append([[len(row.ids) - 1 - row.subject + j for j in steps] for row in fact.rows])
        targets, real = pad([fact.target for fact in facts], device)
        counts = torch.tensor([len(fact.rows) * len(fact.target) for fact in facts], device=device)
        kl_rows = [fact.kl_row for fact in facts]
        return cls(
            facts=facts,
            prompts=Suffixes.of(model, rows, begins, layer, site),
            kl=Suffixes.of(model, kl_rows, [len(row) - 1 for row in kl_rows], layer, site),
            positions=torch.tensor(positions, device=device),
            targets=targets,
            weights=real / counts[:, None],
        )

    @property
    def initial(self) -> Tensor:
        """h, the output at the subject in the bare prompt, float32 [F, d_model]."""
        return self.prompts.output[:: self.positions.shape[1], 0].float()

    @functools.cached_property
    def real(self) -> Tensor:
        """Where `positions`, laid out flat, are of no padding; found once, since a GPU is waited for."""
        return self.weights[:, None].expand(self.positions.shape).flatten().nonzero()[:, 0]

    def take(self, going: Tensor) -> _Batch:
        """The same for the facts that are marked [F]."""
        return _Batch(
            facts=[fact for fact, goes in zip(self.facts, going.tolist(), strict=True) if goes],
            prompts=self.prompts.take(going.repeat_interleave(self.positions.shape[1])),
            kl=self.kl.take(going),
            positions=self.positions[going],
            targets=self.targets[going],
            weights=self.weights[going],
        )

    def forward(self, model: PreTrainedModel, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Run what is above the site with delta added at every row's subject.

        Returns:
            The negative log-likelihood [F], and the divergence rows' log-probabilities at the subject [F, vocabulary].
        """
        facts, rows, _ = self.positions.shape
        top = _moved(model, self.prompts, delta.repeat_interleave(rows, 0)).unflatten(0, (facts, rows))
        numbers = torch.arange(facts, device=delta.device)[:, None, None]
        read = top[numbers, torch.arange(rows, device=delta.device)[:, None], self.positions]
        targets = self.targets[:, None].expand(self.positions.shape).flatten()[self.real]
        weights = self.weights[:, None].expand(self.positions.shape).flatten()[self.real]
        picked = log_probabilities(model, read.flatten(0, 2)[self.real]).gather(1, targets[:, None])[:, 0]
        every = torch.zeros(self.positions.numel(), device=delta.device).index_put((self.real,), -picked * weights)
        nll = every.view(self.positions.shape).sum((1, 2))
        return nll, log_probabilities(model, _moved(model, self.kl, delta)[:, 0])


def _moved(model: PreTrainedModel, suffixes: Suffixes, delta: Tensor) -> Tensor:
    """Hidden states behind the final norm with delta [rows, d_model] added at the subjects."""
    output = suffixes.output.clone()
    output[:, 0] = (suffixes.output[:, 0].float() + delta).to(output.dtype)
    return suffixes.hidden(model, output)


def _check_finite(loss: Tensor, facts: Sequence[_Fact]) -> None:
    bad = (~loss.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RetentionBenchError(
            f"Fact {facts[bad[0]].request.fact_id!r}: the loss became {loss[bad[0]]:g} while its value was optimised. "
            "Lower v_lr, and check that the model's own weights are finite."
        )
