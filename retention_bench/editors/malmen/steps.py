"""MALMEN's edit step and meta step, as functions of tokenised rows (Tan et al. 2024)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.editors.malmen.hypernetwork import HyperNetwork
from retention_bench.editors.malmen.normal_equation import NormalEquation
from retention_bench.errors import RetentionBenchError
from retention_bench.facts import object_ids
from retention_bench.models import (
    LowRank,
    WeightDelta,
    is_in_out,
    last_hidden,
    log_probabilities,
    pad,
    projection,
    projection_name,
    record,
)

IGNORED = -100
"""The label of a position that predicts no token of the answer."""

Networks = Mapping[int, tuple[HyperNetwork, int]]
"""By edited layer, the network that serves it, and as which of its modules."""


class Question(NamedTuple):
    """One question with its answer.

    Attributes:
        fact: Id of the fact that it belongs to; errors name it.
        prompt: The question.
        answer: Its answer; one space is put between the two.
    """

    fact: str
    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Questions with their answers, padded on the right.

    Attributes:
        ids: Token ids, int64 [rows, length].
        mask: 1 for tokens, 0 for padding, int64 [rows, length].
        labels: The token of the answer that follows each position, elsewhere `IGNORED`, int64 [rows, length].
        facts: The rows' facts; errors name them.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    facts: Sequence[str] = ()

    @property
    def answers(self) -> Tensor:
        """Positions at which a token of the answer is predicted, bool [rows, length]."""
        return self.labels != IGNORED

    def log_probabilities(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Log-probabilities there, [answer tokens, vocabulary], from hidden states [rows, length, d_model]."""
        return log_probabilities(model, hidden[self.answers])

    def loss(self, log_probabilities: Tensor) -> Tensor:
        """The mean over all answer tokens of -log p, from what `log_probabilities` gives."""
        return -log_probabilities.gather(1, self.labels[self.answers][:, None]).mean()


def batches(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], size: int, device: torch.device
) -> list[Batch]:
    """Tokenise questions with their answers.

    Args:
        tokenizer: The tokenizer; a prompt gets the special tokens that it adds.
        questions: The questions.
        size: Rows in a batch; the last may have fewer.
        device: Where the tensors go.
    """
    answers = {question.answer: object_ids(question.answer, tokenizer) for question in questions}
    prompts = tokenizer([question.prompt for question in questions])["input_ids"]
    # Ids are joined, not texts, so that the labels stand where they should under any tokenizer.
    ids = [[*prompt, *answers[q.answer][:-1]] for prompt, q in zip(prompts, questions, strict=True)]
    labels = [[IGNORED] * (len(prompt) - 1) + answers[q.answer] for prompt, q in zip(prompts, questions, strict=True)]
    found = []
    for start in range(0, len(questions), size):
        part = slice(start, start + size)
        padded, mask = pad(ids[part], device)
        padded_labels = pad(labels[part], device)[0].masked_fill(mask == 0, IGNORED)
        found.append(Batch(padded, mask, padded_labels, [question.fact for question in questions[part]]))
    return found


def read_gradients(
    model: PreTrainedModel, layers: Sequence[int], batch: Batch, batch_size: int
) -> tuple[dict[int, tuple[Tensor, Tensor]], float]:
    """Keys, and gradients of the loss with respect to the values, at the answer tokens.

    The loss is the batch's mean over answer tokens. A batch that is not full counts for the share of `batch_size` that
    it fills: the authors only have full ones, and the rows of a smaller one would weigh more than in training.

    Args:
        model: The unedited model; call this inside `frozen(model)`.
        layers: The edited layers.
        batch: The facts to write.
        batch_size: Rows of a full batch.

    Returns:
        By layer keys [answer tokens, d_in] and gradients [answer tokens, d_out], float32, and the loss.

    Raises:
        RetentionBenchError: The loss is not finite; the facts are named.
    """
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def reader(layer: int) -> Callable[..., None]:
        def read(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            keys[layer] = inputs[0].detach()
            # The lowest edited layer's output is where the graph begins: no parameter asks for a gradient.
            values[layer] = output.requires_grad_()

        return read

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(projection(model, layer).register_forward_hook(reader(layer)).remove)
        hidden = last_hidden(model, batch.ids, batch.mask)
    loss = batch.loss(batch.log_probabilities(model, hidden))
    _check_finite(loss, batch, "loss of what is to be edited", "Check that the model's own weights are finite.")
    share = len(batch.ids) / batch_size
    gradients = torch.autograd.grad(share * loss, [values[layer] for layer in layers])
    found = {
        layer: (keys[layer][batch.answers].float(), gradient[batch.answers].float())
        for layer, gradient in zip(layers, gradients, strict=True)
    }
    return found, loss.item()


def join(read: Sequence[Mapping[int, tuple[Tensor, Tensor]]]) -> dict[int, tuple[Tensor, Tensor]]:
    """The results of `read_gradients` on several batches, joined as if of one."""
    joined = {}
    for layer in read[0]:
        keys, gradients = zip(*(found[layer] for found in read), strict=True)
        joined[layer] = (torch.cat(keys), torch.cat(gradients))
    return joined


def equation(
    network: HyperNetwork, module: int, keys: Tensor, gradients: Tensor, rows_per_forward: int
) -> NormalEquation:
    """The least-squares problem of one layer, with the changes that its hyper-network gives.

    Args:
        network: The layer's hyper-network.
        module: As which of the network's modules.
        keys: [rows, d_in], float32.
        gradients: [rows, d_out], float32.
        rows_per_forward: Rows that go through the network at once.
    """
    with torch.no_grad():
        changes = [
            network.value_changes(module, *chunk)
            for chunk in zip(keys.split(rows_per_forward), gradients.split(rows_per_forward), strict=True)
        ]
    return NormalEquation.of(keys, torch.cat(changes), network.lamda(module))


def as_delta(model: PreTrainedModel, shifts: Mapping[int, Tensor | LowRank]) -> WeightDelta:
    """The change of weights that is a shift [d_in, d_out] for each layer."""
    return WeightDelta(
        {f"{projection_name(model, layer)}.weight": _stored(model, layer, shift) for layer, shift in shifts.items()}
    )


@dataclasses.dataclass(frozen=True)
class MetaLosses:
    """The losses of a meta step, by batch.

    Attributes:
        edit: Of the facts before they were written.
        generality: Of their paraphrases, with the edited weights.
        locality: The divergence on unrelated facts.
    """

    edit: list[float]
    generality: list[float]
    locality: list[float]

    def means(self) -> dict[str, float]:
        """The mean of each after the edit, as figures for a progress callback."""
        return {
            "edit loss": sum(self.generality) / len(self.generality),
            "locality loss": sum(self.locality) / len(self.locality),
        }


def meta_step(
    model: PreTrainedModel,
    networks: Networks,
    edits: Sequence[Batch],
    equivalents: Sequence[Batch],
    unrelated: Sequence[Batch],
    *,
    batch_size: int,
    loc_coef: float,
    rows_per_forward: int,
) -> MetaLosses:
    """Edit, take the loss on paraphrases and unrelated facts, and add its gradients to the networks' own.

    The meta loss is the sum over batches of the mean -log p of the equivalents' answer tokens, plus `loc_coef` times
    the mean KL(p_unedited || p_edited) at the unrelated ones' answer tokens; see `read_gradients` for batches that are
    not full. The edits' own rows are not in it.

    Args:
        model: The unedited model; call this inside `frozen(model)`. It is left as it is.
        networks: The hyper-networks. Their normalisers count the edits' rows first.
        edits: The facts to write.
        equivalents: As many batches of the same facts' paraphrases.
        unrelated: As many batches of facts that shall stay as they are.
        batch_size: Rows of a full batch.
        loc_coef: Weight of the locality loss.
        rows_per_forward: Rows that go through a network at once.

    Raises:
        RetentionBenchError: A loss is not finite; the facts are named.
    """
    layers = sorted(networks)
    read, edit_losses = zip(*(read_gradients(model, layers, batch, batch_size) for batch in edits), strict=True)
    for found in read:
        for layer, pair in found.items():
            networks[layer][0].observe(*pair)
    rows = join(read)
    problems = {layer: equation(*networks[layer], *rows[layer], rows_per_forward) for layer in layers}

    edited = {
        f"{projection_name(model, layer)}.weight": _edited(model, layer, problem.shift())
        for layer, problem in problems.items()
    }
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in edited.values()]
    losses = MetaLosses(list(edit_losses), [], [])
    for equivalent, other in zip(equivalents, unrelated, strict=True):
        share = len(equivalent.ids) / batch_size
        edit_loss, locality_loss = _meta_losses(model, edited, layers[0], equivalent, other)
        _check_finite(edit_loss + locality_loss, equivalent, "loss of the edited model", "Lower lr or meta_lr.")
        losses.generality.append(edit_loss.item())
        losses.locality.append(locality_loss.item())
        loss = share * (edit_loss + loc_coef * locality_loss)
        for total, gradient in zip(totals, torch.autograd.grad(loss, list(edited.values())), strict=True):
            total += gradient

    for layer, total in zip(layers, totals, strict=True):
        network, module = networks[layer]
        G = total if is_in_out(projection(model, layer)) else total.T
        dD, dlamda = problems[layer].gradients(G)
        (dlamda * network.lamda(module)).sum().backward()
        for keys, gradients, chunk in zip(*(t.split(rows_per_forward) for t in (*rows[layer], dD)), strict=True):
            (network.value_changes(module, keys, gradients) * chunk).sum().backward()
    return losses


def _meta_losses(
    model: PreTrainedModel, edited: Mapping[str, Tensor], first_layer: int, equivalent: Batch, other: Batch
) -> tuple[Tensor, Tensor]:
    """The mean -log p of the equivalents and the mean divergence of the others, from one pass of the edited model."""
    count = len(equivalent.ids)
    ids, mask = (_stack(*pair) for pair in ((equivalent.ids, other.ids), (equivalent.mask, other.mask)))
    length = other.ids.shape[1]
    start = shared = None
    if first_layer > 0:
        # Below the lowest edited layer nothing differs between the two models, so that part runs once.
        _, output = record(model, ids, mask, output=first_layer - 1)
        assert output is not None
        start, shared = (first_layer - 1, output), (first_layer - 1, output[count:, :length])
    hidden = last_hidden(model, ids, mask, start=start, weights=edited)
    with torch.no_grad():
        original = last_hidden(model, other.ids, other.mask, start=shared)
        before = other.log_probabilities(model, original)
    loss = equivalent.loss(equivalent.log_probabilities(model, hidden[:count, : equivalent.ids.shape[1]]))
    after = other.log_probabilities(model, hidden[count:, :length])
    return loss, (before.exp() * (before - after)).sum(1).mean()


def _check_finite(loss: Tensor, batch: Batch, what: str, advice: str) -> None:
    if not loss.isfinite():
        shown = ", ".join(repr(fact) for fact in batch.facts[:3]) + (", ..." if len(batch.facts) > 3 else "")
        raise RetentionBenchError(f"Facts {shown}: the {what} became {loss:g} in MALMEN. {advice}")


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both, the shorter ones padded with 0."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([torch.nn.functional.pad(rows, (0, length - rows.shape[1])) for rows in (first, second)])


def _stored(model: PreTrainedModel, layer: int, shift: Tensor | LowRank) -> Tensor | LowRank:
    """A shift [d_in, d_out] in the orientation that the layer's weight is stored in."""
    if is_in_out(projection(model, layer)):
        return shift
    return LowRank(shift.right.T, shift.left.T) if isinstance(shift, LowRank) else shift.T


def _edited(model: PreTrainedModel, layer: int, shift: Tensor | LowRank) -> Tensor:
    """The layer's weight with a shift added, as a leaf that gradients flow into."""
    stored = _stored(model, layer, shift)
    summand = stored.left @ stored.right if isinstance(stored, LowRank) else stored
    weight = projection(model, layer).get_parameter("weight")
    return (weight.detach().float() + summand).to(weight.dtype).requires_grad_()
