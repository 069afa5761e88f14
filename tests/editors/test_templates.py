from pathlib import Path

import torch

from retention_bench.editors import EditContext, sample_context_templates
from retention_bench.editors.templates import PROMPTS
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
