"""Context templates: short texts by the model itself, put before a prompt so that an edit holds in many contexts."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.models import frozen, last_hidden, log_probabilities

PROMPTS = ("The", "Therefore", "Because", "I", "You")


def sample_context_templates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    lengths: Sequence[int] = (10,),
    top_k: int = 5,
) -> tuple[str, ...]:
    """Sample a context template for every length from each prompt.

    Ancestral top-k sampling without temperature, from the unedited model. Sources: `get_context_templates` of MEMIT
    (one of 10 tokens from each prompt) and ROME (ten of 5 and ten of 10 tokens, here spread over the prompts).

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer.
        generator: On the CPU, seeded; it is advanced.
        prompts: What the texts begin with.
        lengths: For each template of a prompt its tokens in all, those of the prompt and special ones included.
        top_k: How many of the most probable tokens are drawn from.

    Returns:
        A template a length and prompt: the text without braces, then `". {}"`.
    """
    templates = []
    with frozen(model), torch.no_grad():
        for length, prompt in itertools.product(lengths, prompts):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
            while ids.shape[1] < length:
                hidden = last_hidden(model, ids, torch.ones_like(ids))[0, -1]
                best, tokens = log_probabilities(model, hidden).topk(top_k)
                # Drawn on the CPU, so that the generator's seed means the same on every device.
                drawn = torch.multinomial(best.softmax(-1).cpu(), 1, generator=generator)
                ids = torch.cat([ids, tokens[drawn.to(tokens.device)][None]], 1)
            text = tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = unicodedata.normalize("NFKD", str(text))
            templates.append(text.replace("\n\n", " ").replace("{", " ").replace("}", " ") + ". {}")
    return tuple(templates)
