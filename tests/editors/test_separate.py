"""Several prompts of a fact, as one request (`mean`) and as a request each (`separate`)."""

import dataclasses

import pytest
import torch

from retention_bench.editors import FT, MEMIT, ROME, AlphaEdit, EditContext, LoRA

OPENINGS = ("It is known that {}", "Note this down: {}", "The old man says: {}")
LAYERS = (0, 1, 2)


def ranks(delta):
    """The numerical rank of each weight's change, in float64."""
    changes = [entry.left.double() @ entry.right.double() for entry in delta.entries.values()]
    return [torch.linalg.matrix_rank(change, rtol=1e-9).item() for change in changes]


@pytest.fixture
def ten(golden):
    """Ten facts with three more prompts each."""
    written = golden.requests
    others = [
        dataclasses.replace(r, subject=s.subject) for r, s in zip(written, written[1:] + written[:1], strict=True)
    ]
    return [
        dataclasses.replace(r, fact_id=str(number), paraphrases=tuple(o.replace("{}", r.prompt) for o in OPENINGS))
        for number, r in enumerate([*written, *others])
    ]


@pytest.mark.parametrize("editor", [AlphaEdit(LAYERS, v_num_grad_steps=2, L2=0.1), MEMIT(LAYERS, v_num_grad_steps=2)])
def test_the_rank_is_that_of_the_facts_or_of_their_prompts(gpt2, golden, gpt2_covariance, ten, editor):
    assert len(ten) == 10
    context = EditContext(covariance=gpt2_covariance, templates=golden.templates[:2])
    assert ranks(editor.edit(*gpt2, ten, context)) == [10] * 3
    separate = [one for request in ten for one in request.separate]
    assert ranks(editor.edit(*gpt2, separate, context)) == [40] * 3


def test_rome_writes_one_prompt_after_the_other(gpt2, golden, gpt2_covariance, ten, probabilities):
    editor = ROME(1, v_num_grad_steps=20)
    context = EditContext(covariance=gpt2_covariance, templates=golden.templates[:2])
    requests = ten[0].separate
    delta = editor.edit(*gpt2, requests, context)
    [entry] = delta.entries.values()
    assert entry.left.shape[1] == len(requests)
    with delta.applied(gpt2[0]):
        assert min(probabilities(*gpt2, requests)) > 0.5  # the later ones do not undo the earlier


@pytest.mark.parametrize("editor", [FT(layer=1, lr=1e-3, num_steps=4), LoRA(layers=(1,), num_steps=4)])
def test_training_on_prompts_is_training_on_facts_while_all_fit_a_step(gpt2, ten, editor):
    separate = [one for request in ten for one in request.separate]

    def change(editor, requests):
        context = EditContext(generator=torch.Generator().manual_seed(0))
        [entry, *_] = editor.edit(*gpt2, requests, context).entries.values()
        return entry if isinstance(entry, torch.Tensor) else entry.left @ entry.right

    mean = change(editor, ten)
    assert (change(editor, separate) - mean).norm() < 1e-2 * mean.norm()
    # A step takes so many requests, so more steps are taken where prompts are requests.
    small = dataclasses.replace(editor, batch_size=10)
    assert (change(small, separate) - mean).norm() > 0.1 * mean.norm()
