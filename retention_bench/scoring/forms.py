"""How a question is put to a model: as it is, or as the user's turn of a chat."""

from __future__ import annotations

from typing import Any

from retention_bench.errors import RetentionBenchError

PLAIN_CHAT = "<|user|>\n{}\n<|assistant|>\n"
"""Tulu 3's format with its role markers as plain text, for tokenizers without a chat template: what the fine-tune on
Tulu 3 trains such models on."""


def plain_chat(said: str) -> str:
    """A user's turn, and the beginning of the answer, without a template."""
    return PLAIN_CHAT.replace("{}", said)


def has_template(lm: Any) -> bool:
    """Whether an lm-eval model's tokenizer has a chat template of its own."""
    return getattr(lm.tokenizer, "chat_template", None) is not None


def chat(lm: Any, said: str) -> str:
    """A user's turn, and the beginning of the answer, as lm-eval renders it; without a template as `plain_chat`.

    Raises:
        RetentionBenchError: The template cannot render it.
    """
    if not has_template(lm):
        return plain_chat(said)
    try:
        return str(lm.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True))
    except Exception as error:  # a template is a program, and may raise anything
        raise RetentionBenchError(
            f"The tokenizer's chat template cannot render a user's turn ({type(error).__name__}: {error}). Correct "
            "chat_template.jinja, remove it to ask in Tulu 3's format, or leave out the kinds in a chat."
        ) from error
