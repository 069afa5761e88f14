from pathlib import Path

import pytest
import torch

from retention_bench.editors import EditContext, sample_context_templates
from retention_bench.editors.locate.templates import PROMPTS
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import load_model

GOLDEN = Path(__file__).parent.parent / "golden" / "model-gpt2"


def sample(model, seed, **settings):
    return sample_context_templates(*model, torch.Generator().manual_seed(seed), **settings)


def test_templates_continue_their_prompts_and_can_be_used(gpt2, llama, untouched):
    for model in (gpt2, llama):
        with untouched(model[0]):
            templates = sample(model, 0)
        assert len(EditContext(templates=templates).templates) == 5
        for prompt, template in zip(PROMPTS, templates, strict=True):
            assert template.startswith(prompt)
            assert template.endswith(". {}")
            assert len(template) > len(prompt) + 4  # something was written


def test_the_seed_decides(gpt2):
    assert sample(gpt2, 1) == sample(gpt2, 1)
    assert sample(gpt2, 1) != sample(gpt2, 2)


def test_length_counts_prompt_and_special_tokens(gpt2, llama):
    for _, tokenizer in (gpt2, llama):
        assert len(tokenizer.encode("The")) <= 3
    short = sample(gpt2, 0, prompts=("The",), lengths=(len(gpt2[1].encode("The")),))
    assert short == ("The. {}",)
    for seed in range(3):
        [template] = sample(gpt2, seed, prompts=("The",), lengths=(6,))
        assert len(gpt2[1].encode(template.removesuffix(". {}"))) <= 6


def test_every_length_has_a_template_of_each_prompt(gpt2):
    templates = sample(gpt2, 0, prompts=("The", "I"), lengths=(3, 3, 12))
    assert all(template.startswith(prompt) for template, prompt in zip(templates, ["The", "I"] * 3, strict=True))
    lengths = [len(gpt2[1].encode(template.removesuffix(". {}"))) for template in templates]
    assert max(lengths[:4]) <= 3 < min(lengths[4:])


def test_only_the_most_probable_tokens_are_drawn(gpt2):
    assert sample(gpt2, 1, top_k=1) == sample(gpt2, 2, top_k=1)  # one to draw from: no chance left


def test_braces_line_breaks_and_special_tokens_are_taken_out():
    model, tokenizer = load_model(str(GOLDEN))
    # A model whose every next token is one of these: all logits are equal but theirs.
    wanted = [tokenizer.encode(text)[0] for text in ("{", "}", "\n")] + [tokenizer.eos_token_id]
    bias = torch.zeros(len(tokenizer))
    bias[wanted] = 100.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 0 + bias)
    templates = sample((model, tokenizer), 0, top_k=4, lengths=(30,))
    text = "".join(templates)
    assert text.count("{") == text.count("}") == 5
    assert "\n\n" not in text
    assert tokenizer.eos_token not in text
    assert "\n" in text


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lengths": (10**30,)}, "template of 10+ tokens was asked for, and the model has 128 positions"),
        ({"lengths": (0,)}, "template of 0 tokens"),
        ({"top_k": 10**9}, "top_k is 1000000000. Give 1 to"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_what_the_model_cannot_sample_is_refused(gpt2, settings, why):
    with pytest.raises(UsageError, match=why):
        sample(gpt2, 0, **settings)


def test_prompts_and_models_that_give_nothing_are_refused(gpt2):
    with pytest.raises(RetentionBenchError, match="makes no token of ''"):
        sample(gpt2, 0, prompts=("",))
    model, tokenizer = load_model(str(GOLDEN))
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(RetentionBenchError, match="probabilities are not finite"):
        sample((model, tokenizer), 0)
