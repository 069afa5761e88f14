"""Context templates: short texts sampled from the model, put before a prompt so that an edit holds in many contexts."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.data import shortened
from retention_bench.errors import RetentionBenchError, UsageError
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
    """Sample a context template of every length from each prompt.

    Ancestral top-k sampling without temperature, from the unedited model. Sources: `get_context_templates` of MEMIT
    (one of 10 tokens from each prompt) and ROME (ten of 5 and ten of 10 tokens, here spread over the prompts).

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer.
        generator: On the CPU, seeded; it is advanced.
        prompts: What the texts begin with.
        lengths: Tokens of each of a prompt's templates, those of the prompt and special ones included.
        top_k: How many of the most probable tokens are drawn from.

    Returns:
        A template for each length and prompt: the text without braces, then `". {}"`.

    Raises:
        UsageError: A length beyond the model's positions, or a `top_k` beyond its vocabulary.
        RetentionBenchError: The tokenizer makes no token of a prompt, or the model's probabilities are not finite.
    """
    positions, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for length in lengths:
        if not 1 <= length <= positions:
            raise UsageError(
                f"A context template of {shortened(length)} tokens was asked for, and the model has {positions} "
                f"positions. Give 1 to {positions}."
            )
    if not 1 <= top_k <= vocabulary:
        raise UsageError(f"top_k is {shortened(top_k)}. Give 1 to {vocabulary}, the size of the model's vocabulary.")
    templates = []
    with frozen(model), torch.no_grad():
        for length, prompt in itertools.product(lengths, prompts):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
            if not ids.shape[1]:
                raise RetentionBenchError(
                    f"The tokenizer makes no token of {prompt!r}, so no context template can begin with it. Check the "
                    "tokenizer."
                )
            while ids.shape[1] < length:
                hidden = last_hidden(model, ids, torch.ones_like(ids))[0, -1]
                best, tokens = log_probabilities(model, hidden).topk(top_k)
                if not best.isfinite().all():
                    raise RetentionBenchError(
                        "The model's probabilities are not finite where context templates are sampled. Check its "
                        "weights and its dtype."
                    )
                # Drawn on the CPU, so that the generator's seed means the same on every device.
                drawn = torch.multinomial(best.softmax(-1).cpu(), 1, generator=generator)
                ids = torch.cat([ids, tokens[drawn.to(tokens.device)][None]], 1)
            text = tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = unicodedata.normalize("NFKD", str(text))
            templates.append(text.replace("\n\n", " ").replace("{", " ").replace("}", " ") + ". {}")
    return tuple(templates)
